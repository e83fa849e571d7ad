"""The pose of a picture as a signal: read by whatever reads poses, drawn as ControlNet takes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from controlroom.signals.pose.skeleton import draw_skeleton
from controlroom.signals.pose.source import PoseReader, read_pose
from controlroom.signals.signal import SignalMap


@dataclass(frozen=True)
class PoseSignal:
    """The main person's pose, as a skeleton; a drawn skeleton is recognised and passed on.

    Attributes:
        reader: finds the person in photographs; None reads skeletons and doodles only.
    """

    reader: PoseReader | None = None
    kind: Literal["pose"] = "pose"

    def __call__(self, image: Image.Image) -> SignalMap:
        reading = read_pose(image, self.reader, torso=False)
        pose = reading.pose
        values = np.concatenate([pose.keypoints, pose.confidence[:, None]], axis=1)[None]
        recognised = reading.kind == "skeleton"
        picture = image.convert("RGB") if recognised else draw_skeleton(pose, *image.size)
        return SignalMap(self.kind, values.astype(np.float32), picture, recognised)
