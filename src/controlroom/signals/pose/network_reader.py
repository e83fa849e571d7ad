"""The keypoint network as a reader of poses: photographs, renders and doodles to a `Pose`.

The network sees a square; other pictures are padded to one with the colour of their border and its answers carried
back, so that proportions are kept. A joint counts as there from a probability of one half.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from controlroom.core.errors import InputError
from controlroom.core.images import fit, placement
from controlroom.core.pose import Pose
from controlroom.signals.readers import KeypointReader

THRESHOLD = 0.5


class NetworkReader:
    """A `PoseReader` over a `KeypointReader`.

    Args:
        network: the loaded network.
        threshold: probability from which a joint counts as there.
    """

    def __init__(self, network: KeypointReader, threshold: float = THRESHOLD) -> None:
        self.network, self.threshold = network, threshold

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> NetworkReader:
        """Out of a folder with ``config.json`` and ``model.safetensors``.

        Raises:
            ModelError: a file is missing or broken.
        """
        return cls(KeypointReader.load(Path(folder)))

    def read(self, image: Image.Image) -> Pose:
        """The pose of the main person of a picture, in its pixels.

        Raises:
            InputError: no joint is as sure as the threshold.
        """
        side = self.network.size
        square = fit(image, side, side, "pad", _border_colour(image))
        found = self.network.keypoints([square])[0].astype(np.float64)
        scale_x, scale_y, left, top = placement(image.size, side, side, "pad")
        points = (found[:, :2] - (left, top)) / (scale_x, scale_y)
        sure = np.clip(np.nan_to_num(found[:, 2]), 0.0, 1.0)
        there = (sure >= self.threshold) & np.isfinite(points).all(axis=1)
        if not there.any():
            raise InputError(
                f"Nobody was found in the picture (the surest joint has {sure.max():.0%}). Give one with one whole "
                "person in it, or the pose as OpenPose JSON."
            )
        return Pose(np.where(there[:, None], points, 0.0), np.where(there, sure, 0.0), image.width, image.height)


def _border_colour(image: Image.Image) -> tuple[int, int, int]:
    """Median colour of the border: padding that looks like more of the same background."""
    small = np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BOX))
    border = np.concatenate([small[0], small[-1], small[:, 0], small[:, -1]])
    red, green, blue = np.median(border, axis=0).astype(int).tolist()
    return red, green, blue
