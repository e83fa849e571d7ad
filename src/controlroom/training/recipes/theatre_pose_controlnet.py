"""The theatre's pose ControlNet (arXiv 2302.05543), alone or together with the appearance module.

Alone: a copy of the frozen UNet's encoder learns to read skeletons, half of the time without words. Together, stage 2
of MagicPose (arXiv 2311.12052): ControlNet and writer learn jointly, so that the pose comes from one and the looks from
the other; a few samples are without the reference, so that the ControlNet also works alone and in unconditional rows.
Beside a writer that stays as it is, the ControlNet learns alone, or only its blocks that the pose goes through on its
way in and out: the embedding of the condition and the zero convolutions. Beside a ControlNet that stays, the writer
learns alone, with errors of the person, above all of the head, counting more than those of the place.

Deviations: a narrower embedding of the condition; the loss is weighted by min(SNR, 5) / SNR; that focus on the person.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from controlroom.backbones.reference import ReferenceWriter, joined, load_writer, self_attention_layers
from controlroom.data.theatre.captions import training_caption
from controlroom.data.theatre.pairs import Pair
from controlroom.data.theatre.scene import Dice
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses
from controlroom.training.recipes.theatre_pairs import (
    EMPTY_SHARE,
    FOCUS,
    HEAD_MARGIN,
    MOVED_SHARE,
    PairBatch,
    Pairs,
    pair_words,
)
from controlroom.training.side_networks import new_controlnet

ALONE_SHARE = 0.15
"""Samples of a ControlNet that learns beside a writer that do not see the reference."""
WORDLESS_SHARE = 0.5
"""Samples of the ControlNet alone that have an empty prompt, as published."""


Learns = Literal["both", "pose", "pose_blocks", "appearance"]
"""What moves of a writer and a ControlNet: both, the ControlNet, its blocks that the pose goes through, the writer."""


def target_words(pair: Pair, dice: Dice) -> str:
    """A caption of the target, or nothing."""
    return "" if dice.chance(WORDLESS_SHARE) else training_caption(pair.target, dice)


class TheatrePoseControlNet:
    """Recipe: skeletons into the frozen UNet; with ``appearance_folder`` jointly with the writer of that folder.

    Args:
        unet_folder, vae_folder, clip_folder: the theatre's trained parts.
        cache_folder: where latents of pairs are kept.
        pairs: number of training pairs.
        controlnet_folder: ControlNet to start from; None: from the UNet.
        appearance_folder: writer to train beside; None: the ControlNet alone.
        learns: what moves where there is a writer.

    Exported are a ControlNet's folder, or, beside a writer, the folders ``pose`` and ``appearance``.
    """

    name = "theatre_pose_controlnet"

    def __init__(
        self,
        unet_folder: Path,
        vae_folder: Path,
        clip_folder: Path,
        cache_folder: Path,
        pairs: int = 30_000,
        controlnet_folder: Path | None = None,
        appearance_folder: Path | None = None,
        learns: Learns = "both",
    ) -> None:
        self.learns: Learns = learns if appearance_folder is not None else "pose"
        self._reads = self.learns in ("both", "appearance")  # whether the writer learns
        focused = self.learns == "appearance"
        self.pairs = Pairs(vae_folder, clip_folder, cache_folder, pairs, skeletons=True, focused=focused)
        self.dataset_size: int | None = pairs
        self.unet: Any = UNet2DConditionModel.from_pretrained(unet_folder).eval().requires_grad_(False)
        if controlnet_folder is None:
            halvings = len(self.pairs.vae.config.block_out_channels) - 1
            self.controlnet: Any = new_controlnet(self.unet, halvings)
        else:
            self.controlnet = ControlNetModel.from_pretrained(controlnet_folder)
        self.controlnet.requires_grad_(self.learns in ("both", "pose"))
        if self.learns == "pose_blocks":
            net = self.controlnet
            for part in (net.controlnet_cond_embedding, net.controlnet_down_blocks, net.controlnet_mid_block):
                part.requires_grad_(True)
        self.writer: Any = None if appearance_folder is None else load_writer(appearance_folder, self.unet)
        for net in (self.unet, self.controlnet, self.writer):
            if net is not None:
                # Explicit softmax attention trains faster than SDPA on a CPU at these sizes.
                net.set_attn_processor(AttnProcessor())
        self.reader: ReferenceWriter | None = None
        if self.writer is not None:
            self.writer.requires_grad_(self._reads)
            self.reader = ReferenceWriter(self.writer, self_attention_layers(self.unet))

    def modules(self) -> dict[str, nn.Module]:
        return self._networks(learning=True)

    def _networks(self, *, learning: bool) -> dict[str, nn.Module]:
        """Those of ControlNet and writer that learn, or those that stay."""
        found = {"controlnet": (self.controlnet, self.learns != "appearance"), "writer": (self.writer, self._reads)}
        return {name: net for name, (net, learns) in found.items() if net is not None and learns == learning}

    def frozen(self) -> dict[str, nn.Module]:
        beside = self._networks(learning=False)
        return {"unet": self.unet, "text_encoder": self.pairs.conditioner.encoder, "vae": self.pairs.vae, **beside}

    def fingerprint(self) -> str:
        shares = f"moved={MOVED_SHARE} empty={WORDLESS_SHARE if self.writer is None else EMPTY_SHARE}"
        learns = "" if self.learns == "both" else f" {self.learns}"
        learns += f" focus={FOCUS} {HEAD_MARGIN}" if self.pairs.focused else ""
        together = "" if self.writer is None else f" together alone={ALONE_SHARE}{learns}"
        return f"{WORLD_VERSION} pairs={self.pairs.count} {shares}{together}"

    def batch(self, indices: Sequence[int], step: int) -> PairBatch:
        return self.pairs.batch(indices, step, target_words if self.writer is None else pair_words)

    def predict(self, batch: PairBatch, noisy: Tensor, t: Tensor, keep: Tensor | None = None) -> Tensor:
        """The noise in the target, seen with the skeleton and, where ``keep`` [B] says so, with the reference."""
        tokens = self.pairs.conditioner(batch.ids)
        down, mid = self.controlnet(noisy, t, tokens, controlnet_cond=batch.skeleton, return_dict=False)
        context = nullcontext()
        if self.reader is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self._reads):
                bank = self.reader.encode(batch.source, self.pairs.empty(len(noisy)))
            context = joined(self.unet, bank, keep)
        with context:
            return self.unet(
                noisy, t, tokens, down_block_additional_residuals=down, mid_block_additional_residual=mid
            ).sample

    def loss(self, batch: PairBatch, step: int, rng: StepRandom) -> Losses:
        # A writer that learns alone would learn nothing from a sample without it.
        alone = self.reader is not None and self.learns != "appearance"
        keep = rng.uniform("alone") >= ALONE_SHARE if alone else None

        def predict(batch: PairBatch, noisy: Tensor, t: Tensor) -> Tensor:
            return self.predict(batch, noisy, t, keep)

        total, error = self.pairs.loss(batch, rng, predict)
        return Losses(total, {"mse": error})

    def validate(self, step: int) -> dict[str, float]:
        """Error on held-out pairs with the skeleton (and the reference), and with the frozen UNet alone."""

        def without(batch: PairBatch, noisy: Tensor, t: Tensor) -> Tensor:
            return self.unet(noisy, t, self.pairs.conditioner(batch.ids)).sample

        return {"held_out": self.pairs.held_out(self.predict), "unet_alone": self.pairs.held_out(without)}

    def export(self, folder: Path) -> None:
        if self.writer is None:
            self.controlnet.save_pretrained(folder)
        else:
            self.controlnet.save_pretrained(folder / "pose")
            self.writer.save_pretrained(folder / "appearance")

    def load(self, folder: Path) -> None:
        """Only what learns: what stays is what the recipe was made with."""
        if self.learns != "appearance":
            place = folder if self.writer is None else folder / "pose"
            self.controlnet.load_state_dict(ControlNetModel.from_pretrained(place).state_dict())
        if self.writer is not None and self._reads:
            self.writer.load_state_dict(load_writer(folder / "appearance", self.unet).state_dict())
