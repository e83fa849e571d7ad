"""Pairs of one puppet in two poses, as what retargeting learns from: cached latents, words, skeletons, and the loss.

Who somebody is shows in a small part of the picture: a head is a fifteenth of it, and its hat less. Where `focused`,
errors there count more, and those of the place, which is soon learned, less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from controlroom.core.pose import Pose
from controlroom.data.theatre import vocabulary as v
from controlroom.data.theatre.captions import article, full_caption, training_caption
from controlroom.data.theatre.holes import grown
from controlroom.data.theatre.paint import Part
from controlroom.data.theatre.pairs import Pair, sample_pair
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import CANVAS, Dice, Puppet, Scene
from controlroom.data.theatre.truth import keypoints, maps
from controlroom.signals.pose.skeleton import draw_skeleton
from controlroom.training.latent_cache import LatentCache, cache_key
from controlroom.training.randomness import StepRandom
from controlroom.training.recipes.theatre_autoencoder import to_pixels
from controlroom.training.recipes.theatre_unet import Conditioner, theatre_objective

MOVED_SHARE = 0.35
"""Pairs whose target is in another place; their words name it."""
EMPTY_SHARE = 0.8
"""Of the pairs in one place, those without any words: the reference alone must carry the place."""
HELD_OUT_PAIRS = 16
FOCUS = {"place": 0.1, "puppet": 0.6, "head": 1.0}
"""How much an error counts in each part of the target, where the loss is focused."""
HEAD_MARGIN = 5
"""Pixels around the head that count as it: where a hat would be."""

Predict = Callable[["PairBatch", Tensor, Tensor], Tensor]
"""Batch, noisy target latents and timesteps -> predicted noise."""


@dataclass(frozen=True)
class PairBatch:
    """``source`` and ``target`` [B, 4, 16, 16], scaled; ``ids`` [B, 77]; ``skeleton`` [B, 3, 128, 128] in [0, 1].

    ``focus`` [B, 1, 128, 128] in [0, 1] is how much errors of the target count; None: all the same.
    """

    source: Tensor
    target: Tensor
    ids: Tensor
    skeleton: Tensor
    focus: Tensor | None = None


def pair_of(index: int) -> Pair:
    """The training pair of that number."""
    return sample_pair(index, moved=MOVED_SHARE)


def pair_words(pair: Pair, dice: Dice) -> str:
    """What the main network is told: where the target is, if it is elsewhere; else nothing, or a caption of it."""
    if pair.moved:
        # Half of the captions leave the puppet to the reference.
        if dice.chance(0.5):
            return full_caption(pair.target)
        return f"{article(pair.target.puppets[0].identity.figure)} {v.PLACE_PHRASES[pair.target.place]}"
    return "" if dice.chance(EMPTY_SHARE) else training_caption(pair.target, dice)


def skeleton_map(scene: Scene) -> Tensor:
    """[3, 128, 128] in [0, 1]: the scene's first puppet as ControlNet's skeletons are drawn, hidden joints as well."""
    found = keypoints(scene)
    picture = draw_skeleton(Pose(found[:, :2], found[:, 2], CANVAS, CANVAS))
    return torch.from_numpy(np.asarray(picture, np.float32) / 255).permute(2, 0, 1)


def focus_map(scene: Scene) -> Tensor:
    """[1, 128, 128] in [0, 1]: `FOCUS` of the place, of the scene's first puppet, and of its head."""
    index = next(i for i, actor in enumerate(scene.actors) if isinstance(actor, Puppet))
    found = maps(scene)
    weight = np.full((CANVAS, CANVAS), FOCUS["place"], dtype=np.float32)
    weight[found.mask(index)] = FOCUS["puppet"]
    weight[grown(found.mask(index, Part.HAIR, Part.HEAD, Part.HAT), HEAD_MARGIN)] = FOCUS["head"]
    return torch.from_numpy(weight)[None]


class Pairs:
    """Training pairs 0 to ``count`` - 1 and a few held-out ones, with the loss that both stages share.

    Args:
        vae_folder, clip_folder: the theatre's autoencoder and CLIP.
        cache_folder: where latents are kept.
        count: number of training pairs; two latents each.
        skeletons: whether batches hold drawn skeletons (else zeros).
        focused: whether errors count as `focus_map` says (else all the same).
    """

    def __init__(
        self,
        vae_folder: Path,
        clip_folder: Path,
        cache_folder: Path,
        count: int,
        skeletons: bool,
        focused: bool = False,
    ) -> None:
        self.count, self.skeletons, self.focused = count, skeletons, focused
        self.vae: Any = AutoencoderKL.from_pretrained(vae_folder).eval().requires_grad_(False)
        self.conditioner = Conditioner(clip_folder)
        self.objective = theatre_objective()
        side = CANVAS // 2 ** (len(self.vae.config.block_out_channels) - 1)
        shape = (int(self.vae.config.latent_channels), side, side)
        key = cache_key({"vae": self.vae}, v.WORLD_VERSION, f"pairs moved={MOVED_SHARE}")
        self.cache = LatentCache(cache_folder, key, 2 * count, shape).build(self._encode_slots, report=_report)
        self._held_out: PairBatch | None = None

    @torch.no_grad()
    def encode(self, scenes: Sequence[Scene]) -> Tensor:
        """Scaled latents (posterior means) of scenes."""
        pixels = to_pixels([render(scene) for scene in scenes]).to(self.vae.device)
        mean = self.vae.encode(pixels).latent_dist.mean
        return mean * self.vae.config.scaling_factor

    def _encode_slots(self, slots: Sequence[int]) -> Tensor:
        """Slot 2i is the source of pair i, slot 2i + 1 its target."""
        pairs = {index: pair_of(index) for index in {slot // 2 for slot in slots}}
        return self.encode([pairs[s // 2].target if s % 2 else pairs[s // 2].source for s in slots])

    def empty(self, rows: int) -> Tensor:
        """Token states of the empty prompt, which the writer is told: [rows, 77, width]."""
        return self.conditioner(self.conditioner.ids([""])).expand(rows, -1, -1)

    def batch(self, indices: Sequence[int], step: int, words: Callable[[Pair, Dice], str] = pair_words) -> PairBatch:
        """Pairs of these numbers; other words each epoch."""
        pairs = [pair_of(index) for index in indices]
        texts = [words(pair, Dice("pair words", index, step)) for pair, index in zip(pairs, indices, strict=True)]
        source, target = (self.cache.read([2 * index + side for index in indices]) for side in (0, 1))
        focus = torch.stack([focus_map(pair.target) for pair in pairs]) if self.focused else None
        return PairBatch(source, target, self.conditioner.ids(texts), self._maps(pairs), focus)

    def _maps(self, pairs: Sequence[Pair]) -> Tensor:
        if not self.skeletons:
            return torch.zeros(len(pairs), 3, 1, 1)
        return torch.stack([skeleton_map(pair.target) for pair in pairs])

    def loss(self, batch: PairBatch, rng: StepRandom, predict: Predict) -> tuple[Tensor, Tensor]:
        """Error of the predicted noise, weighted by min(SNR, 5) / SNR (arXiv 2303.09556); and without that weight."""
        drawn = self.objective.draw(batch.target, rng)
        each = self.objective.errors(predict(batch, drawn.latents, drawn.t), drawn, batch.focus)
        return (each * drawn.weight).mean(), each.detach().mean()

    @torch.no_grad()
    def held_out(self, predict: Predict) -> float:
        """Unweighted error on held-out pairs without words, at four noise levels; the same noise every time."""
        if self._held_out is None:
            pairs = [sample_pair(index, "held_out", moved=0.0) for index in range(HELD_OUT_PAIRS)]
            source, target = self.encode([p.source for p in pairs]), self.encode([p.target for p in pairs])
            self._held_out = PairBatch(
                source, target, self.conditioner.ids([""] * len(pairs)), self._maps(pairs).to(source.device)
            )
        batch = self._held_out
        return self.objective.held_out(lambda noisy, t: predict(batch, noisy, t), batch.target)


def _report(done: int, total: int) -> None:
    if done % 6400 < 64:
        print(f"latents of pairs: {done} of {total}", flush=True)
