"""Depth of a photograph by a network of transformers: Depth Anything (arXiv 2401.10891, 2406.09414), DPT, ZoeDepth.

Networks differ in what their numbers mean. Depth Anything and DPT give an inverse depth, large where near; those that
say metres (Depth Anything's metric models, ZoeDepth, GLPN, Depth Pro) are inverted. Either is scaled to [0, 1] over the
picture, as ControlNet's condition is.
"""

from __future__ import annotations

import os
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from controlroom.core.errors import ModelError
from controlroom.signals.pretrained import load_pretrained
from controlroom.signals.recognise import recognise_depth
from controlroom.signals.signal import SignalMap, white_on_black

_METRES = ("glpn", "zoedepth", "depth_pro", "prompt_depth_anything")


class TransformersDepth:
    """Depth by a network in a local folder.

    Args:
        folder: of the network, or a hub id that has been downloaded.
        device: where it computes.
        recognise: pass on a picture that already is a depth map.

    Raises:
        ModelError: no network for depth is there.
    """

    kind: Literal["depth"] = "depth"

    def __init__(self, folder: str | os.PathLike[str], device: str = "cpu", recognise: bool = True) -> None:
        self.network = load_pretrained(folder, "AutoModelForDepthEstimation", "a depth network", device)
        config = self.network.model.config
        metric = getattr(config, "depth_estimation_type", "relative") == "metric"
        self.in_metres, self.recognise = metric or config.model_type in _METRES, recognise

    def __call__(self, image: Image.Image) -> SignalMap:
        if self.recognise and (found := recognise_depth(image)) is not None:
            return SignalMap(self.kind, found, white_on_black(found), recognised=True)
        picture = image.convert("RGB")
        inputs = self.network.processor(images=picture, return_tensors="pt")
        raw = self.network(pixel_values=inputs["pixel_values"]).predicted_depth[None].float()
        sized = F.interpolate(raw, (image.height, image.width), mode="bicubic", align_corners=False)[0, 0]
        if not torch.isfinite(sized).all():
            raise ModelError(
                "The depth network gave values that are no numbers: its weights are broken; copy them again."
            )
        values = nearness(sized.cpu().numpy(), self.in_metres)
        return SignalMap(self.kind, values, white_on_black(values))


def nearness(depth: NDArray[np.float32], in_metres: bool) -> NDArray[np.float32]:
    """[H, W] scaled to [0, 1], 1 nearest; distances are inverted first. All 0 where everything is equally far.

    Example:
        >>> nearness(np.array([[1.0, 2.0, 4.0]], np.float32), in_metres=True).round(3).tolist()
        [[1.0, 0.3330000042915344, 0.0]]
    """
    near = 1 / np.maximum(depth, np.float32(1e-3)) if in_metres else depth
    low, high = float(near.min()), float(near.max())
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        return np.zeros(near.shape, np.float32)
    return ((near - low) / (high - low)).astype(np.float32)
