"""The theatre's readers: attributes and keypoints, learned from renders whose truth is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from controlroom.data.theatre import attributes as a
from controlroom.data.theatre.doodle import draw_doodle
from controlroom.data.theatre.pairs import appearance
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import Dice, Mix, Scene, sample_identity, sample_scene
from controlroom.data.theatre.truth import keypoints
from controlroom.data.theatre.vocabulary import PLACES, WORLD_VERSION
from controlroom.signals.readers import AttributeReader, KeypointReader
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses
from controlroom.training.recipes.theatre_autoencoder import to_pixels

#: The readers judge mostly single puppets and pairs of props; every style and view is read too.
READER_MIX = Mix(
    kinds={
        "puppet": 0.4,
        "portrait": 0.03,
        "puppet_and_prop": 0.14,
        "two_puppets": 0.03,
        "prop": 0.04,
        "two_props": 0.33,
        "three": 0.03,
    },
    styles={"flat": 0.76, "sketch": 0.06, "watercolour": 0.06, "pixel": 0.06, "neon": 0.06},
    views={"front": 0.79, "side": 0.09, "back": 0.07, "above": 0.05},
)


def soften(pixels: Tensor, rng: StepRandom) -> Tensor:
    """What a decoder does to a picture, roughly: blur, noise, a change of contrast; each sample by another amount."""
    amount = rng.uniform("blur")[:, None, None, None]
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    mixed = pixels + (blurred - pixels) * (amount * 1.2).clamp(max=1.0)
    noise = rng.normal("grain", pixels.shape[1:]) * 0.08 * rng.uniform("grain amount")[:, None, None, None]
    contrast = 1.0 + 0.16 * (rng.uniform("contrast") - 0.5)[:, None, None, None]
    return (mixed * contrast + noise).clamp(-1.0, 1.0)


@torch.no_grad()
def reconstructed(vae: Any, pixels: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] through an autoencoder, by the means of its posterior."""
    latents = vae.encode(pixels.to(vae.device)).latent_dist.mean
    return vae.decode(latents).sample.clamp(-1.0, 1.0).to(pixels.device)


@dataclass(frozen=True)
class LabelledBatch:
    """``pixels`` [B, 3, 128, 128]; ``labels`` [B, questions], -1 where a question has no answer."""

    pixels: Tensor
    labels: Tensor


class TheatreAttributeReader:
    """Recipe: attributes of a picture, cross-entropy over every question that has an answer.

    Args:
        vae_folder: An autoencoder, through which every second render goes first: pictures that are drawn come out of
            its decoder, and the reader must not judge how a decoder draws. None shows renders alone.
    """

    name = "theatre_attribute_reader"

    def __init__(self, vae_folder: Path | None = None) -> None:
        torch.manual_seed(1)
        self.reader = AttributeReader(a.ANSWERS)
        self.vae: Any = None if vae_folder is None else AutoencoderKL.from_pretrained(vae_folder).eval()

    def modules(self) -> dict[str, nn.Module]:
        return {"reader": self.reader}

    def frozen(self) -> dict[str, nn.Module]:
        return {} if self.vae is None else {"vae": self.vae}

    def fingerprint(self) -> str:
        return f"{WORLD_VERSION} reconstructed={self.vae is not None} {sorted(READER_MIX.kinds.items())}"

    def batch(self, indices: Sequence[int], step: int) -> LabelledBatch:
        scenes = [sample_scene(index, "train", READER_MIX) for index in indices]
        labels = torch.tensor([a.labels(a.attributes(scene)) for scene in scenes])
        pixels = to_pixels([render(scene) for scene in scenes])
        if self.vae is not None:
            pixels[::2] = reconstructed(self.vae, pixels[::2])
        return LabelledBatch(pixels, labels)

    def loss(self, batch: LabelledBatch, step: int, rng: StepRandom) -> Losses:
        logits = self.reader(soften(batch.pixels, rng))
        total = torch.zeros(())
        right = asked = 0
        for column, values in enumerate(logits.values()):
            target = batch.labels[:, column]
            known = target >= 0
            if known.any():
                total = total + F.cross_entropy(values.float()[known], target[known])
                right += int((values.argmax(1) == target)[known].sum())
                asked += int(known.sum())
        return Losses(total / len(logits), {"accuracy": right / max(asked, 1)})

    def export(self, folder: Path) -> None:
        self.reader.save(folder)

    def load(self, folder: Path) -> None:
        self.reader.load_state_dict(AttributeReader.load(folder).state_dict())

    def validate(self, step: int) -> dict[str, float]:
        """Share of right answers to each question on 256 held-out scenes of the default mix."""
        return attribute_accuracy(self.reader, [sample_scene(index, "held_out") for index in range(256)])


def attribute_accuracy(reader: AttributeReader, scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of right answers by question over renders of ``scenes``; props are joined to "props shown"."""
    answers = reader.read([render(scene) for scene in scenes])
    tally: dict[str, list[int]] = {}
    for scene, read in zip(scenes, answers, strict=True):
        for question, truth in a.attributes(scene).items():
            if truth is None or truth == a.ABSENT:
                continue
            name = (
                question if question in a.PUPPET_ANSWERS or question in ("place", "style", "puppets") else "props shown"
            )
            tally.setdefault(name, []).append(int(read[question] == truth))
    return {name: float(np.mean(values)) for name, values in tally.items()}


@dataclass(frozen=True)
class KeypointBatch:
    """``pixels`` [B, 3, 128, 128]; ``places`` [B, 18, 2] in [0, 1]; ``present`` [B, 18] 0 or 1."""

    pixels: Tensor
    places: Tensor
    present: Tensor


class TheatreKeypointReader:
    """Recipe: keypoints of puppets and of doodles, cross-entropy of a heatmap at each joint."""

    name = "theatre_keypoint_reader"

    def __init__(self, doodles: float = 0.4) -> None:
        torch.manual_seed(2)
        self.reader, self.doodles = KeypointReader(), doodles

    def modules(self) -> dict[str, nn.Module]:
        return {"reader": self.reader}

    def frozen(self) -> dict[str, nn.Module]:
        return {}

    def fingerprint(self) -> str:
        return f"{WORLD_VERSION} doodles={self.doodles}"

    def batch(self, indices: Sequence[int], step: int) -> KeypointBatch:
        pictures, points = [], []
        for index in indices:
            picture, found = keypoint_sample(index, "train", self.doodles)
            pictures.append(picture)
            points.append(found)
        truth = torch.from_numpy(np.stack(points))
        return KeypointBatch(to_pixels(pictures), truth[..., :2] / 128.0, (truth[..., 2] > 0).float())

    def loss(self, batch: KeypointBatch, step: int, rng: StepRandom) -> Losses:
        heat, presence = self.reader(soften(batch.pixels, rng))
        side = heat.shape[-1]
        cells = batch.places * side - 0.5
        grid = torch.arange(side)
        squared = (grid - cells[..., :1]).square()[:, :, None, :] + (grid - cells[..., 1:]).square()[:, :, :, None]
        target = (-squared / (2 * 0.9**2)).exp().flatten(2)
        target = target / target.sum(dim=2, keepdim=True).clamp_min(1e-6)
        each = -(target * heat.float().flatten(2).log_softmax(dim=2)).sum(dim=2)
        where = (each * batch.present).sum() / batch.present.sum().clamp_min(1.0)
        there = F.binary_cross_entropy_with_logits(presence.float(), batch.present)
        error = (self.reader.locate(heat.detach()) - batch.places).norm(dim=2) * 128.0
        error = (error * batch.present).sum() / batch.present.sum().clamp_min(1.0)
        return Losses(where + there, {"pixels off": error, "presence": there.detach()})

    def export(self, folder: Path) -> None:
        self.reader.save(folder)

    def load(self, folder: Path) -> None:
        self.reader.load_state_dict(KeypointReader.load(folder).state_dict())

    def validate(self, step: int) -> dict[str, float]:
        return {
            "pck scenes": keypoint_accuracy(self.reader, 128, doodles=0.0),
            "pck doodles": keypoint_accuracy(self.reader, 128, doodles=1.0),
        }


def keypoint_sample(index: int, split: str, doodles: float) -> tuple[object, np.ndarray]:
    """One picture with one figure and its keypoints [18, 3] in pixels of 128 x 128."""
    dice = Dice("keypoints", split, index)
    if dice.chance(doodles):
        puppet = appearance(sample_identity(dice), dice, "studio", 0, free=0.6).puppets[0]
        drawn = draw_doodle(puppet, int(dice.unit() * 2**40))
        return drawn.picture, drawn.keypoints
    if dice.chance(0.5):
        scene = appearance(sample_identity(dice), dice, dice.pick(PLACES), int(dice.unit() * 2**31), free=0.6)
    else:
        mix = Mix(
            kinds={"puppet": 0.75, "portrait": 0.05, "puppet_and_prop": 0.2},
            styles=READER_MIX.styles,
            views=READER_MIX.views,
        )
        scene = sample_scene(index, "train" if split == "train" else "held_out", mix)
    return render(scene), keypoints(scene)


def keypoint_accuracy(reader: KeypointReader, count: int, doodles: float, threshold: float = 0.2) -> float:
    """PCK: share of keypoints in the picture within ``threshold`` torso lengths, on held-out pictures."""
    samples = [keypoint_sample(index, "held_out", doodles) for index in range(count)]
    truth = np.stack([found for _, found in samples])
    read = reader.keypoints([picture for picture, _ in samples])  # type: ignore[misc]
    torso = np.linalg.norm(truth[:, 1, :2] - (truth[:, 8, :2] + truth[:, 11, :2]) / 2, axis=1)
    near = np.linalg.norm(read[..., :2] - truth[..., :2], axis=2) <= threshold * torso[:, None]
    return float(near[truth[..., 2] > 0].mean())
