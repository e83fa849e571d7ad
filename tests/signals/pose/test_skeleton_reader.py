"""A drawn skeleton is recognised and read back; photographs, drawings and neon are not skeletons."""

from __future__ import annotations

import colorsys
import io

import numpy as np
import pytest
from PIL import Image, ImageDraw
from skimage import data

from controlroom.core.errors import InputError
from controlroom.core.pose import Pose, pck
from controlroom.signals.pose.skeleton import draw_skeleton
from controlroom.signals.pose.skeleton_reader import recognise_skeleton
from tests.signals.pose.figures import random_pose, without
from tests.signals.pose.test_skeleton import transcribed


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def resized(image: Image.Image, width: int, height: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.LANCZOS)


WAYS = {
    "plain": lambda pose: draw_skeleton(pose),
    "jpeg": lambda pose: jpeg(draw_skeleton(pose), 80),
    "small": lambda pose: draw_skeleton(pose, 128, 128),
    "large jpeg": lambda pose: jpeg(draw_skeleton(pose, 1024, 1024), 70),
    "made smaller": lambda pose: resized(draw_skeleton(pose, 512, 512), 190, 190),
    "stretched": lambda pose: resized(draw_skeleton(pose, 512, 512), 300, 512),
    "thick": lambda pose: draw_skeleton(pose, thickness=4.0),
    "hard edges": lambda pose: Image.fromarray(transcribed(pose.scaled(512, 512)).astype(np.uint8)),
}


@pytest.mark.parametrize("way", WAYS)
def test_round_trip(way: str) -> None:
    rng = np.random.default_rng(5)
    distances, shares = [], []
    for _ in range(3):
        pose = random_pose(rng)
        picture = WAYS[way](pose)
        read = recognise_skeleton(picture)
        assert read is not None
        assert (read.width, read.height) == picture.size
        read = read.scaled(256, 256)
        assert read.visible.sum() >= 17
        distances.extend(np.linalg.norm(read.keypoints - pose.keypoints, axis=1)[read.visible])
        shares.append(pck(read, pose))
    assert np.median(distances) < 1.0
    assert np.mean(shares) > 0.95


def test_joints_that_are_not_drawn_are_not_read() -> None:
    rng = np.random.default_rng(6)
    for missing in ([0, 14, 15, 16, 17], [8, 9, 10, 11, 12, 13], [4, 7, 10, 13]):
        pose = without(random_pose(rng), missing)
        read = recognise_skeleton(draw_skeleton(pose))
        assert read is not None
        np.testing.assert_array_equal(read.visible, pose.visible)
        assert np.linalg.norm(read.keypoints - pose.keypoints, axis=1).max() < 3


def test_the_larger_of_two_people() -> None:
    rng = np.random.default_rng(7)
    large, small = random_pose(rng, 400), random_pose(rng, 160)
    canvas = Image.new("RGB", (600, 400))
    canvas.paste(draw_skeleton(large, thickness=3.0), (0, 0))
    canvas.paste(draw_skeleton(small, thickness=3.0), (420, 120))
    read = recognise_skeleton(canvas)
    assert read is not None
    assert pck(read, Pose(large.keypoints, large.confidence, 600, 400)) > 0.9


@pytest.mark.parametrize(
    "name", ["astronaut", "coffee", "chelsea", "rocket", "hubble_deep_field", "immunohistochemistry", "page", "camera"]
)
def test_pictures_are_not_skeletons(name: str) -> None:
    picture = getattr(data, name)()
    assert recognise_skeleton(picture) is None
    assert recognise_skeleton((picture * 0.2).astype(np.uint8)) is None  # by night
    assert recognise_skeleton(255 - picture) is None


def test_drawings_are_not_skeletons() -> None:
    pose = random_pose(np.random.default_rng(8))
    drawn = np.asarray(draw_skeleton(pose))
    assert recognise_skeleton(255 - drawn) is None  # on white
    grey = drawn.max(-1)
    assert recognise_skeleton(grey) is None  # without colours
    assert recognise_skeleton(255 - grey) is None
    assert recognise_skeleton(np.zeros((64, 64, 3), np.uint8)) is None
    assert recognise_skeleton(np.full((64, 64, 3), 255, np.uint8)) is None
    assert recognise_skeleton(np.zeros((1, 9000, 3), np.uint8)) is None
    assert recognise_skeleton(np.zeros((3, 3, 3), np.uint8)) is None


def test_coloured_lines_on_black_are_hardly_ever_skeletons() -> None:
    rng = np.random.default_rng(9)
    taken = 0
    for trial in range(10):
        picture = Image.new("RGB", (256, 256))
        pen = ImageDraw.Draw(picture)
        for _ in range(rng.integers(5, 40)):
            red, green, blue = colorsys.hsv_to_rgb(rng.random(), 1, rng.choice([0.6, 1]))
            start = rng.uniform(0, 256, 2)
            end = start + rng.normal(0, 25, 2) if trial % 2 else rng.uniform(0, 256, 2)
            pen.line([*start, *end], fill=(int(255 * red), int(255 * green), int(255 * blue)), width=4)
        taken += recognise_skeleton(picture) is not None
    assert taken <= 1


def test_what_cannot_be_read_is_an_error() -> None:
    with pytest.raises(InputError):
        recognise_skeleton(b"nothing")
