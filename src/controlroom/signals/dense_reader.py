"""A small network that reads every pixel of a picture: its depth, its class, and the soft edges.

It knows nothing of the world it was trained on; names and colours of its classes lie beside its weights. The theatre's
is trained by `controlroom.training.recipes.theatre_dense_reader`; its own error is the suite ``signals``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from controlroom.backbones.loading import THEATRE, find_model
from controlroom.core.errors import InputError, ModelError
from controlroom.signals.palette import palette_picture, spread_palette
from controlroom.signals.readers import Block, load_module, pixels_of, save_module
from controlroom.signals.recognise import (
    recognise_depth,
    recognise_segmentation,
    recognise_soft_edges,
    recognise_strokes,
)
from controlroom.signals.signal import SignalMap, white_on_black

DENSE = f"{THEATRE}/readers/dense"
DenseKind = Literal["depth", "segmentation", "soft_edge"]
_LARGEST = 1024


@dataclass(frozen=True)
class DenseLogits:
    """``depth`` and ``edges`` [B, H, W] (before the sigmoid) and ``classes`` [B, classes, H, W]."""

    depth: Tensor
    classes: Tensor
    edges: Tensor


@dataclass(frozen=True)
class DenseReading:
    """``depth`` and ``edges`` [H, W] in [0, 1] and ``labels`` [H, W], of one picture, float32."""

    depth: NDArray[np.float32]
    labels: NDArray[np.float32]
    edges: NDArray[np.float32]


class DenseReader(nn.Module):
    """Depth, classes and soft edges of every pixel.

    ``forward`` maps [B, 3, H, W] in [-1, 1], sides multiples of 32, to `DenseLogits`. Down to 1/16 to see whole
    figures, up again to half the size, where each place answers for its 2 x 2 pixels.

    Args:
        classes: names of the classes, by number.
        size: of the pictures it is trained on; others are brought to it on their shorter side.
        width: channels at half the size.
    """

    def __init__(self, classes: Sequence[str], size: int = 128, width: int = 24) -> None:
        super().__init__()
        self.classes, self.size, self.width = tuple(classes), size, width
        w = width
        self.stem = nn.Sequential(nn.Conv2d(3, w, 4, 2, 1), nn.SiLU(), nn.Conv2d(w, w, 3, 1, 1), nn.SiLU())
        self.down = nn.ModuleList([Block(w, 2 * w, 2), Block(2 * w, 3 * w, 2), Block(3 * w, 4 * w, 2)])
        self.bottom = Block(4 * w, 4 * w)
        self.up = nn.ModuleList([Block(7 * w, 3 * w), Block(5 * w, 2 * w), Block(3 * w, w)])
        self.heads = nn.Conv2d(w, 4 * (len(self.classes) + 2), 1)

    def forward(self, pixels: Tensor) -> DenseLogits:
        h = self.stem(pixels)
        skips = [h]
        for block in self.down:
            h = block(h)
            skips.append(h)
        h = self.bottom(h)
        for block, skip in zip(self.up, reversed(skips[:-1]), strict=True):
            h = block(torch.cat([F.interpolate(h, scale_factor=2.0, mode="nearest"), skip], dim=1))
        fine = F.pixel_shuffle(self.heads(h), 2)
        return DenseLogits(fine[:, 0], fine[:, 2:], fine[:, 1])

    @torch.no_grad()
    def read(self, pictures: Sequence[Image.Image], batch_size: int = 32) -> list[DenseReading]:
        """Maps of each picture, in its own size.

        Raises:
            InputError: a picture far longer than it is wide.
        """
        if any(picture.size != (self.size, self.size) for picture in pictures):
            return [self._one(picture) for picture in pictures]
        found: list[DenseReading] = []
        for start in range(0, len(pictures), batch_size):
            logits = self(pixels_of(pictures[start : start + batch_size], self.size))
            found += [_reading(logits, row) for row in range(len(logits.depth))]
        return found

    def _one(self, picture: Image.Image) -> DenseReading:
        scale = self.size / min(picture.size)
        width, height = (max(32, round(side * scale / 32) * 32) for side in picture.size)
        if max(width, height) > _LARGEST:
            raise InputError(
                f"The picture is {picture.width} x {picture.height} pixels; the reader takes one that is at most "
                f"{_LARGEST // self.size} times as long as wide. Crop it."
            )
        small = np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS))
        pixels = torch.from_numpy(small.copy()).permute(2, 0, 1)[None].float().div_(127.5).sub_(1.0)
        logits = self(pixels)

        def sized(values: Tensor) -> Tensor:
            return F.interpolate(values, (picture.height, picture.width), mode="bilinear", align_corners=False)

        depth, edges = (sized(values[:, None])[:, 0] for values in (logits.depth, logits.edges))
        return _reading(DenseLogits(depth, sized(logits.classes), edges), 0)

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        save_module(self, folder, {"classes": self.classes, "size": self.size, "width": self.width})

    @classmethod
    def load(cls, folder: Path) -> DenseReader:
        """What `save` wrote.

        Raises:
            ModelError: a file is missing or broken.
        """
        return load_module(folder, lambda settings: cls(settings["classes"], settings["size"], settings["width"]))


def _reading(logits: DenseLogits, row: int) -> DenseReading:
    labels = logits.classes[row].argmax(dim=0).float().numpy()
    depth, edges = (values[row].float().sigmoid().numpy() for values in (logits.depth, logits.edges))
    return DenseReading(depth, labels, edges)


def theatre_dense_reader() -> DenseReader:
    """The theatre's dense reader.

    Raises:
        ModelError: it is not in this installation; the message says how it is made.
    """
    try:
        folder = find_model(DENSE, "dense reader")
    except ModelError as error:
        raise ModelError(
            "The theatre's dense reader, which finds depth, parts and soft edges, is not in this installation. Train "
            "it (python -m controlroom.training.theatre dense_reader, then assemble), or for a photograph give a "
            "folder of a network of transformers."
        ) from error
    return DenseReader.load(folder)


@dataclass(frozen=True)
class DenseSignal:
    """One of the maps that a `DenseReader` finds.

    Attributes:
        kind: ``depth``, ``segmentation`` or ``soft_edge``. Normals are `Normal` over the depth.
        reader: the network.
        recognise: pass on a picture that already is such a map.

    Raises:
        InputError: another kind.
    """

    kind: DenseKind
    reader: DenseReader
    recognise: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ("depth", "segmentation", "soft_edge"):
            raise InputError(f"A dense reader finds depth, segmentation or soft_edge; got {self.kind!r}.")

    def __call__(self, image: Image.Image) -> SignalMap:
        palette = spread_palette(len(self.reader.classes))
        values, recognised = None, False
        if self.recognise:
            if self.kind == "depth":
                values = recognise_depth(image)
            elif self.kind == "segmentation":
                values = recognise_segmentation(image, palette)
            else:
                values = recognise_soft_edges(image)
                values = recognise_strokes(image) if values is None else values
            recognised = values is not None
        if values is None:
            reading = self.reader.read([image])[0]
            values = {"depth": reading.depth, "segmentation": reading.labels, "soft_edge": reading.edges}[self.kind]
        picture = palette_picture(values, palette) if self.kind == "segmentation" else white_on_black(values)
        return SignalMap(self.kind, values, picture, recognised)
