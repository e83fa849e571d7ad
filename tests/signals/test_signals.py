"""The signals that need no weights, on real photographs (scikit-image's)."""

from __future__ import annotations

import builtins
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data
from PIL import Image
from scipy.ndimage import gaussian_filter

from controlroom.core.errors import InputError, ModelError
from controlroom.signals.canny import Canny, canny
from controlroom.signals.choose import choose_signal
from controlroom.signals.filters import connected, gaussian, ridges
from controlroom.signals.lines import Lines
from controlroom.signals.normal import Normal, normals_of
from controlroom.signals.pose.pose_signal import PoseSignal
from controlroom.signals.scribble import Scribble
from controlroom.signals.signal import KINDS, Signal, SignalMap, white_on_black
from controlroom.signals.soft_edge import SoftEdge

PHOTOS = {
    name: Image.fromarray(getattr(skimage.data, name)()).convert("RGB").resize((256, 256), Image.Resampling.LANCZOS)
    for name in ("astronaut", "camera", "chelsea", "coffee")
}
CLASSICAL: dict[str, Any] = {"canny": Canny(), "soft_edge": SoftEdge(), "lines": Lines(), "scribble": Scribble()}


class Depth:
    """Depth that grows to the right."""

    kind: Any = "depth"

    def __call__(self, image: Image.Image) -> SignalMap:
        values = np.tile(np.linspace(0, 1, image.width, dtype=np.float32), (image.height, 1))
        return SignalMap("depth", values, white_on_black(values))


@pytest.mark.parametrize("name", ["astronaut", "camera", "chelsea", "coffee"])
@pytest.mark.parametrize("thresholds", [(100, 200), (200, 100), (20.7, 61.2), (0, 0)])
def test_canny_is_opencvs_to_the_pixel(name: str, thresholds: tuple[float, float]) -> None:
    pixels = getattr(skimage.data, name)()[:201, :303]
    assert np.array_equal(canny(pixels, *thresholds), cv2.Canny(pixels, *thresholds) > 0)


def test_canny_of_noise_of_bright_and_of_tiny_pictures_is_opencvs() -> None:
    dice = np.random.default_rng(0)
    for shape in ((1, 1, 3), (1, 7, 3), (2, 2), (40, 31, 3), (33, 64)):
        pixels = dice.integers(0, 256, shape, np.uint8)
        assert np.array_equal(canny(pixels), cv2.Canny(pixels, 100, 200) > 0), shape


def test_filters_are_what_they_say() -> None:
    dice = np.random.default_rng(1)
    values = dice.random((30, 41), np.float32)
    assert np.abs(gaussian(values, 1.7) - gaussian_filter(values, 1.7, mode="nearest", truncate=6 / 1.7)).max() < 1e-5
    seeds, allowed = np.zeros((5, 5), bool), np.eye(5, dtype=bool)
    seeds[0, 0] = allowed[0, 4] = True
    assert np.array_equal(connected(seeds, allowed), np.eye(5, dtype=bool))
    ramp = np.zeros((21, 21), np.float32)
    ramp[:, 9:12] = (0.5, 1.0, 0.5)
    assert np.array_equal(np.flatnonzero(ridges(ramp)[10]), [10])
    assert np.array_equal(np.flatnonzero(ridges(ramp.T)[:, 10]), [10])


@pytest.mark.parametrize("kind", CLASSICAL)
def test_photographs_have_maps(kind: str) -> None:
    signal = CLASSICAL[kind]
    assert isinstance(signal, Signal)
    for name, photo in PHOTOS.items():
        found = signal(photo)
        assert (found.kind, found.recognised, found.picture.size) == (kind, False, photo.size), name
        assert 0 <= found.values.min() and found.values.max() <= 1
        share = (found.values > 0.5).mean()
        assert 0.002 < share < 0.3, (name, share)
        assert np.array_equal(np.asarray(found.picture)[..., 0] > 127, found.values > 0.5)
        assert np.array_equal(signal(photo).values, found.values)


@pytest.mark.parametrize("kind", CLASSICAL)
def test_a_blank_picture_has_an_empty_map(kind: str) -> None:
    noise = np.random.default_rng(0).normal(128, 1.5, (96, 96, 3)).clip(0, 255).astype(np.uint8)
    for picture in (Image.new("RGB", (64, 48), (90, 120, 30)), Image.fromarray(noise)):
        assert not CLASSICAL[kind](picture).values.any()


def test_a_square_is_found_by_every_signal() -> None:
    picture = Image.new("RGB", (128, 128), (30, 40, 50))
    picture.paste((220, 200, 90), (32, 40, 96, 104))
    outline = np.zeros((128, 128), bool)
    outline[40:105, [31, 32, 95, 96]] = outline[[39, 40, 103, 104], 32:97] = True
    for kind, signal in CLASSICAL.items():
        on = signal(picture).values > 0.5
        near = np.pad(outline, 3)
        near = np.any([near[y : y + 128, x : x + 128] for y in range(7) for x in range(7)], axis=0)
        assert on.any() and near[on].all(), kind
        assert on[50:90, 29:36].any(1).mean() > 0.9, kind


def test_straight_lines_are_straight() -> None:
    found = Lines(shortest=0.2)(PHOTOS["camera"]).values
    assert 0 < found.sum() < Lines(shortest=0.05)(PHOTOS["camera"]).values.sum()


def test_lines_without_opencv_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "cv2":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModelError, match=r"controlroom\[signals\]"):
        Lines()(PHOTOS["coffee"])


def test_normals_of_a_slope_and_of_a_ball() -> None:
    tilted = Normal(Depth())(PHOTOS["coffee"])
    assert tilted.values[100, 100] == pytest.approx([-0.2435, 0.0, 0.9699], abs=2e-3)
    assert tuple(np.asarray(tilted.picture)[100, 100]) == (159, 128, 251)
    ys, xs = np.mgrid[-1:1:129j, -1:1:129j]
    inside = xs**2 + ys**2 < 0.7
    ball = np.sqrt(np.maximum(1 - xs**2 - ys**2, 0)).astype(np.float32)
    # A half ball as high as it is wide: its normals are its own points, y up.
    found = normals_of(ball, relief=0.5)
    true = np.stack([xs, -ys, ball], -1)
    assert np.abs(found - true)[inside].max() < 0.06


def test_the_pose_of_a_doodle_is_drawn_and_a_skeleton_passed_on() -> None:
    from controlroom.core.pose import Pose
    from controlroom.data.theatre.scene import sample_scene
    from controlroom.data.theatre.truth import keypoints
    from controlroom.signals.pose.skeleton import draw_skeleton

    truth = keypoints(
        next(s for s in (sample_scene(i, "held_out") for i in range(50)) if len(s.puppets) == 1), None, 256
    )
    skeleton = draw_skeleton(Pose(truth[:, :2], truth[:, 2], 256, 256))
    found = PoseSignal()(skeleton)
    assert found.recognised and found.values.shape == (1, 18, 3)
    assert np.array_equal(np.asarray(found.picture), np.asarray(skeleton))
    seen = (truth[:, 2] > 0) & (found.values[0, :, 2] > 0)
    assert seen.sum() >= 14
    assert np.abs(found.values[0, seen, :2] - truth[seen, :2]).max() < 3


def test_kinds_and_their_signals() -> None:
    for kind in KINDS[:4]:
        assert choose_signal(kind).kind == kind
    with pytest.raises(InputError, match="no signal 'hed'"):
        choose_signal("hed")
    with pytest.raises(InputError, match="has no network"):
        choose_signal("canny", "some/folder")
    with pytest.raises(InputError, match="without a network"):
        choose_signal("soft_edge", "some/folder")
    with pytest.raises(InputError, match="detector"):
        choose_signal("depth", "folder", "detector")
    for kind in ("depth", "normal", "segmentation", "pose"):
        with pytest.raises(ModelError, match="nowhere"):
            choose_signal(kind, "nowhere/at-all")
    with pytest.raises(InputError, match="computed from depth"):
        Normal(Canny())


def test_bad_settings_and_bad_maps() -> None:
    text: Any = "a"
    for wrong in (lambda: Canny(low=-1), lambda: Canny(high=float("inf")), lambda: Canny(low=text)):
        with pytest.raises(InputError, match="threshold of Canny"):
            wrong()
    for wrong in (lambda: SoftEdge(scales=()), lambda: SoftEdge(scales=(0.0,)), lambda: Lines(shortest=2)):
        with pytest.raises(InputError):
            wrong()
    for wrong in (lambda: Scribble(strength=0), lambda: Scribble(shortest=True)):
        with pytest.raises(InputError, match="of a scribble"):
            wrong()
    picture = Image.new("RGB", (4, 3))
    with pytest.raises(InputError, match=r"shape \[4, 3\]; expected \[3, 4\]"):
        SignalMap("depth", np.zeros((4, 3), np.float32), picture)
    with pytest.raises(InputError, match=r"expected \['people', 18, 3\]"):
        SignalMap("pose", np.zeros((1, 17, 3), np.float32), picture)
    SignalMap("pose", np.zeros((0, 18, 3), np.float32), picture)
    with pytest.raises(ValueError, match="read-only"):
        SignalMap("depth", np.zeros((3, 4), np.float32), picture).values[0] = 1
