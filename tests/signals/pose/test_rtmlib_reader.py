"""The adapter to rtmlib, against a stand-in with rtmlib 0.0.16's interface; no weights can be had here."""

from __future__ import annotations

import builtins
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from controlroom.core.errors import InputError, ModelError
from controlroom.signals.pose.rtmlib_reader import RtmlibReader

POINTS = np.stack([np.arange(17.0) + 10, 2 * np.arange(17.0) + 20], 1)[None]


def stand_in(monkeypatch: pytest.MonkeyPatch, points=POINTS, scores=None, boxes=((0, 0, 5, 5), (1, 1, 60, 70))) -> list:
    calls: list = []

    class Tool:
        def __init__(self, onnx_model: str, model_input_size=(0, 0), backend="onnxruntime", device="cpu") -> None:
            print("load", onnx_model)

    class RTMPose(Tool):
        def __call__(self, image: np.ndarray, bboxes: list = []):  # noqa: B006
            calls.append((image, bboxes))
            return points, np.full(points.shape[:2], 0.8) if scores is None else scores

    class YOLOX(Tool):
        def __call__(self, image: np.ndarray):
            return np.array(boxes)

    module = types.ModuleType("rtmlib")
    module.RTMPose, module.YOLOX = RTMPose, YOLOX  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rtmlib", module)
    return calls


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    (tmp_path / "model.onnx").write_bytes(b"onnx")
    return tmp_path / "model.onnx"


def test_reads_the_largest_person(
    monkeypatch: pytest.MonkeyPatch, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = stand_in(monkeypatch)
    pose = RtmlibReader(weights, weights).read(Image.new("RGB", (80, 90), (10, 20, 30)))
    (image, boxes) = calls[0]
    assert image[0, 0].tolist() == [30, 20, 10]  # OpenCV's order
    assert boxes == [[1, 1, 60, 70]]
    assert pose.keypoints[0].tolist() == [10, 20] and pose.keypoints[1].tolist() == [15.5, 31]
    assert (pose.width, pose.height) == (80, 90) and pose.visible.all()
    assert capsys.readouterr().out == ""


def test_unsure_joints_are_left_out_and_nobody_is_an_error(monkeypatch: pytest.MonkeyPatch, weights: Path) -> None:
    scores = np.full((1, 17), 1.3)
    scores[0, 9], scores[0, 10] = 0.1, np.nan
    stand_in(monkeypatch, scores=scores)
    pose = RtmlibReader(weights).read(Image.new("RGB", (80, 90)))
    assert np.flatnonzero(~pose.visible).tolist() == [4, 7] and pose.confidence.max() == 1
    stand_in(monkeypatch, scores=np.zeros((1, 17)))
    with pytest.raises(InputError):
        RtmlibReader(weights).read(Image.new("RGB", (80, 90)))
    stand_in(monkeypatch, boxes=())
    with pytest.raises(InputError, match="No person"):
        RtmlibReader(weights, weights).read(Image.new("RGB", (80, 90)))
    stand_in(monkeypatch, points=np.zeros((1, 133, 2)))
    with pytest.raises(ModelError, match="17"):
        RtmlibReader(weights).read(Image.new("RGB", (80, 90)))


def test_missing_weights_and_missing_package(monkeypatch: pytest.MonkeyPatch, weights: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "no.onnx", tmp_path, "rtmpose-m", "https://download.openmmlab.com/rtmpose.onnx"):
        with pytest.raises(ModelError, match="Nothing is downloaded"):
            RtmlibReader(path)
    real = builtins.__import__

    def without_rtmlib(name: str, *rest):
        if name == "rtmlib":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "rtmlib", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_rtmlib)
    with pytest.raises(ModelError, match="pip install"):
        RtmlibReader(weights)
