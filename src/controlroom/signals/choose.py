"""Which signal finds a kind of map, given where its weights lie: the theatre's reader, a folder, or none at all."""

from __future__ import annotations

from pathlib import Path

from controlroom.backbones.loading import THEATRE, find_model
from controlroom.core.errors import InputError
from controlroom.signals.canny import Canny
from controlroom.signals.lines import Lines
from controlroom.signals.normal import Normal
from controlroom.signals.scribble import Scribble
from controlroom.signals.signal import Signal, checked_kind
from controlroom.signals.soft_edge import SoftEdge


def choose_signal(kind: str, model: str | None = None, detector: str | None = None) -> Signal:
    """The signal of a kind.

    Args:
        kind: one of `KINDS`.
        model: ``theatre`` for the theatre's readers; for a photograph, depth and normals take a folder of a depth
            network, segmentation of a segmentation network, pose of ViTPose or an ONNX file of RTMPose. Canny,
            lines and scribbles need none; nor do soft edges, which the theatre's dense reader finds too. None: none
            where none is needed, else the theatre's.
        detector: for a pose: folder (ViTPose) or ONNX file (RTMPose) of what finds the people first.

    Raises:
        InputError: an unknown kind, a model for a kind that takes none, a detector for another kind than pose.
        ModelError: the model is not there.
    """
    kind = checked_kind(kind)
    if detector is not None and (kind != "pose" or model in (None, THEATRE)):
        raise InputError("A detector finds people for a pose network of photographs; give both, or neither.")
    if kind in ("canny", "lines", "scribble"):
        if model not in (None, THEATRE):
            raise InputError(f"The signal {kind} has no network; leave out the model {str(model)!r}.")
        return {"canny": Canny, "lines": Lines, "scribble": Scribble}[kind]()
    if kind == "soft_edge":
        if model not in (None, THEATRE):
            raise InputError(f"Soft edges are found without a network, or by {THEATRE!r}; got {model!r}.")
        return SoftEdge() if model is None else _dense(kind)
    if kind == "pose":
        return _pose(model, detector)
    if kind == "normal":
        return Normal(choose_signal("depth", model))
    if model in (None, THEATRE):
        return _dense(kind)
    if kind == "depth":
        from controlroom.signals.depth import TransformersDepth

        return TransformersDepth(str(model))
    from controlroom.signals.segmentation import TransformersSegmentation

    return TransformersSegmentation(str(model))


def _dense(kind: str) -> Signal:
    from controlroom.signals.dense_reader import DenseSignal, theatre_dense_reader

    return DenseSignal(kind, theatre_dense_reader())  # type: ignore[arg-type]


def _pose(model: str | None, detector: str | None) -> Signal:
    from controlroom.signals.pose.pose_signal import PoseSignal

    if model in (None, THEATRE):
        from controlroom.signals.pose.network_reader import NetworkReader

        return PoseSignal(NetworkReader.load(find_model(f"{THEATRE}/readers/keypoints", "keypoint reader")))
    if Path(str(model)).suffix.lower() == ".onnx":
        from controlroom.signals.pose.rtmlib_reader import RtmlibReader

        return PoseSignal(RtmlibReader(str(model), detector))
    from controlroom.signals.pose.vitpose_reader import VitPoseReader

    return PoseSignal(VitPoseReader(str(model), detector))
