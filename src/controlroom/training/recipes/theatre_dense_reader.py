"""The theatre's dense reader: depth, parts and soft edges of every pixel, learned from renders whose truth is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from controlroom.data.theatre.conditions import condition
from controlroom.data.theatre.paint import Part
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import Mix, Scene, sample_scene
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.signals.dense_reader import DenseReader
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses
from controlroom.training.recipes.theatre_autoencoder import to_pixels
from controlroom.training.recipes.theatre_readers import reconstructed, soften

#: Every style and view is read; the flat style, in which most is drawn, most often.
DENSE_MIX = Mix(
    styles={"flat": 0.6, "sketch": 0.1, "watercolour": 0.1, "pixel": 0.1, "neon": 0.1},
    views={"front": 0.7, "side": 0.12, "back": 0.1, "above": 0.08},
)
CLASSES: Final = tuple(part.name.lower() for part in Part)
_DEPTH_WEIGHT, _EDGE_WEIGHT = 5.0, 2.0
_HELD_OUT = 64


@dataclass(frozen=True)
class DenseBatch:
    """``pixels`` [B, 3, 128, 128] in [-1, 1]; ``depth``, ``edges`` [B, 128, 128] in [0, 1]; ``parts`` [B, 128, 128]."""

    pixels: Tensor
    depth: Tensor
    parts: Tensor
    edges: Tensor


def dense_truth(scenes: Sequence[Scene]) -> DenseBatch:
    """Renders of scenes with what is true of their pixels."""

    def values(kind: str) -> Tensor:
        return torch.from_numpy(np.stack([condition(scene, kind).values for scene in scenes]))

    pixels = to_pixels([render(scene) for scene in scenes])
    return DenseBatch(pixels, values("depth"), values("segmentation").long(), values("soft_edge"))


class TheatreDenseReader:
    """Recipe: cross-entropy over the parts, absolute error of depth, binary cross-entropy of soft edges.

    Args:
        vae_folder: an autoencoder, through which every second render goes first: pictures that are drawn come out of
            its decoder. None shows renders alone.
    """

    name = "theatre_dense_reader"

    def __init__(self, vae_folder: Path | None = None) -> None:
        torch.manual_seed(3)
        self.reader = DenseReader(CLASSES)
        self.vae: Any = None if vae_folder is None else AutoencoderKL.from_pretrained(vae_folder).eval()

    def modules(self) -> dict[str, nn.Module]:
        return {"reader": self.reader}

    def frozen(self) -> dict[str, nn.Module]:
        return {} if self.vae is None else {"vae": self.vae}

    def fingerprint(self) -> str:
        return f"{WORLD_VERSION} reconstructed={self.vae is not None} {sorted(DENSE_MIX.styles.items())}"

    def batch(self, indices: Sequence[int], step: int) -> DenseBatch:
        found = dense_truth([sample_scene(index, "train", DENSE_MIX) for index in indices])
        if self.vae is not None:
            found.pixels[::2] = reconstructed(self.vae, found.pixels[::2])
        return found

    def loss(self, batch: DenseBatch, step: int, rng: StepRandom) -> Losses:
        logits = self.reader(soften(batch.pixels, rng))
        parts = F.cross_entropy(logits.classes.float(), batch.parts)
        depth = (logits.depth.float().sigmoid() - batch.depth).abs().mean()
        edges = F.binary_cross_entropy_with_logits(logits.edges.float(), batch.edges)
        total = parts + _DEPTH_WEIGHT * depth + _EDGE_WEIGHT * edges
        return Losses(total, {"parts": parts.detach(), "depth": depth.detach(), "edges": edges.detach()})

    def export(self, folder: Path) -> None:
        self.reader.save(folder)

    def load(self, folder: Path) -> None:
        self.reader.load_state_dict(DenseReader.load(folder).state_dict())

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """On 64 held-out scenes: share of right pixels, mean error of depth, and of soft edges."""
        truth = dense_truth([sample_scene(index, "held_out", DENSE_MIX) for index in range(_HELD_OUT)])
        device = next(self.reader.parameters()).device
        logits = self.reader(truth.pixels.to(device))
        return {
            "right_parts": float((logits.classes.argmax(1).cpu() == truth.parts).float().mean()),
            "depth_error": float((logits.depth.sigmoid().cpu() - truth.depth).abs().mean()),
            "edge_error": float((logits.edges.sigmoid().cpu() - truth.edges).abs().mean()),
        }
