"""Keypoints of a photograph by RTMPose (Jiang et al., arXiv 2303.07399) through the extra ``rtmlib``.

A YOLOX detector finds the people, RTMPose the 17 COCO keypoints of the largest; the neck is the middle of the
shoulders. Weights are ONNX files on this machine (Apache-2.0, from OpenMMLab's model zoo): nothing is ever downloaded,
although rtmlib would if it were given a path that does not exist. Written against the interface of rtmlib 0.0.16.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from controlroom.core.errors import InputError, ModelError
from controlroom.core.pose import Pose
from controlroom.signals.pose.openpose_document import coco_to_openpose


class RtmlibReader:
    """A `PoseReader` for photographs.

    Args:
        pose_model: ONNX file of an RTMPose body model with 17 keypoints.
        detector: ONNX file of a YOLOX person detector; without it the whole picture is taken as the person.
        pose_size: the pose model's input as (width, height), as its name says.
        detector_size: the detector's input.
        threshold: score below which a joint counts as not there.
        device: ``'cpu'`` or ``'cuda'``.

    Raises:
        ModelError: rtmlib is not installed, or a file is not there or cannot be loaded.
    """

    def __init__(
        self,
        pose_model: str | os.PathLike[str],
        detector: str | os.PathLike[str] | None = None,
        pose_size: tuple[int, int] = (192, 256),
        detector_size: tuple[int, int] = (640, 640),
        threshold: float = 0.3,
        device: str = "cpu",
    ) -> None:
        pose_path = _weights(pose_model, "RTMPose")
        detector_path = None if detector is None else _weights(detector, "YOLOX")
        try:
            import rtmlib  # type: ignore[import-not-found]
        except ImportError as error:
            raise ModelError(
                "Reading photographs with RTMPose needs the package rtmlib: pip install 'controlroom[signals]'."
            ) from error
        try:
            with contextlib.redirect_stdout(sys.stderr):  # it prints, and our output may be JSON
                self._pose: Any = rtmlib.RTMPose(
                    str(pose_path), model_input_size=pose_size, backend="onnxruntime", device=device
                )
                self._detector: Any = None
                if detector_path is not None:
                    self._detector = rtmlib.YOLOX(
                        str(detector_path), model_input_size=detector_size, backend="onnxruntime", device=device
                    )
        except Exception as error:  # onnxruntime raises its own types
            raise ModelError(f"rtmlib cannot load {pose_path} or {detector_path}: {error}") from error
        self._threshold = threshold

    def read(self, image: Image.Image) -> Pose:
        """The largest person of an RGB picture.

        Raises:
            InputError: no person was found.
            ModelError: the model does not give 17 keypoints.
        """
        pixels = np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1])  # rtmlib expects OpenCV's BGR
        boxes = [[0, 0, image.width, image.height]]
        if self._detector is not None:
            found = np.asarray(self._detector(pixels), dtype=float).reshape(-1, 4)
            if not len(found):
                raise InputError("No person was found in the picture; give one with a person, or a pose as JSON.")
            areas = (found[:, 2] - found[:, 0]) * (found[:, 3] - found[:, 1])
            boxes = [found[areas.argmax()].tolist()]
        points, scores = (np.asarray(values, dtype=float) for values in self._pose(pixels, bboxes=boxes))
        if points.shape != (1, 17, 2) or scores.shape != (1, 17):
            raise ModelError(
                f"The pose model gave keypoints of shape {points.shape}; expected (1, 17, 2): COCO's body."
            )
        scores = np.where(np.isfinite(scores) & (scores >= self._threshold), np.clip(scores, 0, 1), 0.0)
        if not scores.any():
            raise InputError("No joint of a person was found in the picture; give another, or a pose as JSON.")
        body, sure = coco_to_openpose(np.nan_to_num(points[0]), scores[0])
        return Pose(body, sure, image.width, image.height)


def _weights(path: str | os.PathLike[str], kind: str) -> Path:
    file = Path(path)
    if not file.is_file() or file.suffix != ".onnx":
        raise ModelError(
            f"{os.fspath(path)!r} is not an ONNX file on this machine; expected the {kind} weights. Nothing is "
            "downloaded: fetch them from OpenMMLab's model zoo and give the path."
        )
    return file
