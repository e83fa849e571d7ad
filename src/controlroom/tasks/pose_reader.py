"""Which reader finds the keypoints when nobody names one: the theatre's network, or the lines of a doodle."""

from __future__ import annotations

from PIL import Image

from controlroom.backbones.loading import THEATRE, find_model
from controlroom.core.errors import ModelError
from controlroom.core.pose import Pose
from controlroom.signals.pose.doodle import DoodleReader
from controlroom.signals.pose.paper import classify
from controlroom.signals.pose.source import PoseReader

READER = f"{THEATRE}/readers/keypoints"


def default_reader() -> PoseReader:
    """The theatre's keypoint network, which reads pictures and doodles; without it, doodles are read by their lines."""
    try:
        folder = find_model(READER, "keypoint reader")
    except ModelError as error:
        return _OnlyDoodles(error)
    from controlroom.signals.pose.network_reader import NetworkReader

    return NetworkReader.load(folder)


class _OnlyDoodles:
    """Stands in for the theatre's network where it is not installed."""

    def __init__(self, missing: ModelError) -> None:
        self.missing = missing

    def read(self, image: Image.Image) -> Pose:
        if classify(image) == "doodle":
            return DoodleReader().read(image)
        raise ModelError(
            f"The pose is a photograph, and what finds the person in it is missing. {self.missing} Give the pose as "
            "OpenPose JSON, a drawn skeleton or a doodle."
        )
