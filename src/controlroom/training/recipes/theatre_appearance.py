"""The theatre's appearance module: stage 1 of MagicPose (arXiv 2311.12052), the writer alone.

A copy of the UNet learns to read a clean picture of a puppet so that the frozen UNet, whose self-attentions also attend
to what the copy's are given, denoises the same puppet in another pose. Deviations: the reference is read at t = 0 with
an empty text (as in BootComp, arXiv 2411.16801), so that a run reads it once; a third of the pairs change the place and
name it, so that words keep their say; the loss is weighted by min(SNR, 5) / SNR.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from controlroom.backbones.reference import ReferenceWriter, joined, load_writer, new_writer, self_attention_layers
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses
from controlroom.training.recipes.theatre_pairs import EMPTY_SHARE, MOVED_SHARE, PairBatch, Pairs


class TheatreAppearance:
    """Recipe: the writer of `AppearanceControl`, read by the frozen UNet.

    Args:
        unet_folder, vae_folder, clip_folder: the theatre's trained parts.
        cache_folder: where latents of pairs are kept.
        pairs: number of training pairs.
    """

    name = "theatre_appearance"

    def __init__(
        self, unet_folder: Path, vae_folder: Path, clip_folder: Path, cache_folder: Path, pairs: int = 30_000
    ) -> None:
        self.pairs = Pairs(vae_folder, clip_folder, cache_folder, pairs, skeletons=False)
        self.dataset_size: int | None = pairs
        self.unet: Any = UNet2DConditionModel.from_pretrained(unet_folder).eval().requires_grad_(False)
        self.writer = new_writer(self.unet)
        for net in (self.unet, self.writer):
            # Explicit softmax attention trains faster than SDPA on a CPU at these sizes.
            net.set_attn_processor(AttnProcessor())
        self.reader = ReferenceWriter(self.writer, self_attention_layers(self.unet))

    def modules(self) -> dict[str, nn.Module]:
        return {"writer": self.writer}

    def frozen(self) -> dict[str, nn.Module]:
        return {"unet": self.unet, "text_encoder": self.pairs.conditioner.encoder, "vae": self.pairs.vae}

    def fingerprint(self) -> str:
        return f"{WORLD_VERSION} pairs={self.pairs.count} moved={MOVED_SHARE} empty={EMPTY_SHARE}"

    def batch(self, indices: Sequence[int], step: int) -> PairBatch:
        return self.pairs.batch(indices, step)

    def predict(self, batch: PairBatch, noisy: Tensor, t: Tensor) -> Tensor:
        """The noise in the target, seen by the frozen UNet with the reference joined."""
        bank = self.reader.encode(batch.source, self.pairs.empty(len(noisy)))
        with joined(self.unet, bank):
            return self.unet(noisy, t, self.pairs.conditioner(batch.ids)).sample

    def loss(self, batch: PairBatch, step: int, rng: StepRandom) -> Losses:
        total, error = self.pairs.loss(batch, rng, self.predict)
        return Losses(total, {"mse": error})

    def validate(self, step: int) -> dict[str, float]:
        """Error on held-out pairs with and without the reference."""

        def without(batch: PairBatch, noisy: Tensor, t: Tensor) -> Tensor:
            return self.unet(noisy, t, self.pairs.conditioner(batch.ids)).sample

        return {"held_out": self.pairs.held_out(self.predict), "without_reference": self.pairs.held_out(without)}

    def export(self, folder: Path) -> None:
        self.writer.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        self.writer.load_state_dict(load_writer(folder, self.unet).state_dict())
