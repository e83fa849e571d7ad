"""Five points of a face: drawn as InstantID's code draws them, and taken out of poses."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from skimage import draw

from controlroom.core.errors import InputError
from controlroom.core.pose import L_EYE, NOSE, R_EYE, Keypoints, Pose
from controlroom.signals.face import draw_face, five_points, head_crop

POINTS = np.array([(400.0, 380.0), (600.0, 390.0), (505.0, 500.0), (430.0, 610.0), (580.0, 620.0)])


def transcribed(points: np.ndarray, size: int) -> np.ndarray:
    """The published drawing written plainly: whole pixels, ellipses of half-width 4 at 0.6, discs of radius 10."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255)]
    canvas = np.zeros((size, size, 3))
    for one, two in ((0, 2), (1, 2), (3, 2), (4, 2)):
        a, b = points[one], points[two]
        length, angle = int(np.hypot(*(a - b)) / 2), np.radians(int(np.degrees(np.arctan2(a[1] - b[1], a[0] - b[0]))))
        middle = ((a + b) / 2).astype(int)
        rows, columns = draw.ellipse(middle[1], middle[0], 4, length, canvas.shape, rotation=-angle)
        canvas[rows, columns] = colours[one]
    canvas = (canvas * 0.6).astype(np.uint8).astype(float)
    for (x, y), colour in zip(points, colours, strict=True):
        canvas[draw.disk((int(y), int(x)), 10, shape=canvas.shape[:2])] = colour
    return canvas


def test_equals_the_published_drawing_up_to_the_edges() -> None:
    ours, theirs = np.asarray(draw_face(POINTS, 1024, 1024), float), transcribed(POINTS, 1024)
    different = np.abs(ours - theirs).max(-1) > 12
    inside = different[2:-2, 2:-2].copy()
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            inside &= different[2 + dy : 1022 + dy, 2 + dx : 1022 + dx]
    assert not inside.any()
    assert (theirs.max(-1) > 0).sum() > 3000
    assert different.sum() < 0.25 * (theirs.max(-1) > 0).sum()


def test_thickness_follows_the_size() -> None:
    small = np.asarray(draw_face(POINTS / 4, 256, 256), float)
    large = np.asarray(draw_face(POINTS, 1024, 1024).resize((256, 256), Image.Resampling.BOX), float)
    assert np.abs(small - large).mean() < 0.2 * small.mean()


def test_points_of_a_whole_face_and_of_a_body() -> None:
    face = np.zeros((70, 2))
    face[36:42], face[42:48], face[30], face[48], face[54] = POINTS
    body = np.zeros((18, 2))
    body[R_EYE], body[L_EYE], body[NOSE] = POINTS[:3]
    there = np.zeros(18)
    there[[R_EYE, L_EYE, NOSE]] = 1
    whole = Pose(body, there, 1024, 1024, Keypoints(face, np.ones(70)))
    assert np.allclose(five_points(whole), POINTS)
    guessed = five_points(Pose(body, there, 1024, 1024))
    assert np.allclose(guessed[:3], POINTS[:3])
    # Below the nose, right corner to the right eye's side.
    assert (guessed[3:, 1] > 560).all() and guessed[3, 0] < guessed[4, 0]
    mean = np.array([(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366)])
    body[[R_EYE, L_EYE, NOSE]] = 3 * mean + 5
    guessed = five_points(Pose(body, there, 1024, 1024))
    assert np.allclose(guessed[3:], 3 * np.array([(41.5493, 92.3655), (70.7299, 92.2041)]) + 5)


def test_the_head_is_cut_out_around_the_face() -> None:
    picture = Image.new("RGB", (1024, 1024), "white")
    picture.paste((200, 10, 10), (360, 340, 640, 660))
    crop = head_crop(picture, POINTS, side=2.75)
    assert crop.width == crop.height == round(np.linalg.norm(POINTS[3:].mean(0) - POINTS[:2].mean(0)) * 2.75)
    assert np.asarray(crop)[crop.height // 2, crop.width // 2].tolist() == [200, 10, 10]
    assert head_crop(picture, POINTS / 4).getpixel((0, 0)) == (0, 0, 0)


def test_bad_input() -> None:
    for bad in (np.zeros((4, 2)), np.full((5, 2), np.nan), "face", None, np.full((5, 2), 1e9)):
        with pytest.raises(InputError, match="points of a face"):
            draw_face(bad, 64, 64)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no face"):
        five_points(Pose(np.zeros((18, 2)), np.zeros(18), 64, 64))
    with pytest.raises(InputError, match="one place"):
        head_crop(Image.new("RGB", (8, 8)), np.ones((5, 2)))
