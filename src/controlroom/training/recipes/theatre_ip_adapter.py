"""The theatre's IP-Adapter, base shape (Ye et al., arXiv 2308.06721): what retargeting is measured against.

A linear layer turns the feature of a picture of a puppet into four tokens; new keys and values in every cross-attention
of the frozen UNet, which start as the copies of the words', learn to denoise the same puppet from them. The picture,
the words, or both are left out of a sample in twenty each. Deviations: the picture shows the puppet in another pose,
often in another place, where the paper reads the target itself, since that is what it is asked to do here; half of
the pairs in one place have no words, as for the appearance module; the loss is weighted by min(SNR, 5) / SNR.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import save_file
from torch import Tensor, nn

from controlroom.backbones.image_encoder import clip_pixels, image_features
from controlroom.backbones.image_projection import LinearProjection
from controlroom.backbones.image_prompt_attention import prompted
from controlroom.backbones.ip_adapter import IPAdapterModel, load_ip_adapter
from controlroom.data.theatre.pairs import sample_pair
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import Scene
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.training.checkpoint import storable
from controlroom.training.clip_vision import image_encoder_of
from controlroom.training.latent_cache import LatentCache, cache_key
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses
from controlroom.training.recipes.theatre_pairs import (
    EMPTY_SHARE,
    HELD_OUT_PAIRS,
    MOVED_SHARE,
    PairBatch,
    Pairs,
    pair_of,
)

FILE = "ip_adapter.safetensors"
#: Shares of samples with both, without the picture, without words, without either.
DROPOUT = (0.85, 0.05, 0.05, 0.05)


@dataclass(frozen=True)
class PromptedBatch:
    """``pairs``, and the features of their sources [B, width]."""

    pairs: PairBatch
    features: Tensor


class TheatreIPAdapter:
    """Recipe: the base IP-Adapter on pairs of the theatre.

    Args:
        unet_folder, vae_folder, clip_folder: the theatre's trained parts.
        cache_folder: where latents and features of pairs are kept.
        pairs: number of training pairs.
        tokens: that a picture becomes.

    Exported are ``ip_adapter.safetensors`` with the keys of the published files, and the image encoder beside it.
    """

    name = "theatre_ip_adapter"

    def __init__(
        self,
        unet_folder: Path,
        vae_folder: Path,
        clip_folder: Path,
        cache_folder: Path,
        pairs: int = 30_000,
        tokens: int = 4,
    ) -> None:
        self.pairs = Pairs(vae_folder, clip_folder, cache_folder, pairs, skeletons=False)
        self.dataset_size: int | None = pairs
        self.unet: Any = UNet2DConditionModel.from_pretrained(unet_folder).eval().requires_grad_(False)
        # Explicit softmax attention trains faster than SDPA on a CPU at these sizes.
        self.unet.set_attn_processor(AttnProcessor())
        self.encoder: Any = image_encoder_of(clip_folder)
        torch.manual_seed(6)
        width = int(self.encoder.config.projection_dim)
        projection = LinearProjection(width, int(self.unet.config.cross_attention_dim), tokens)
        self.adapter = IPAdapterModel.for_unet(self.unet, projection).requires_grad_(True)
        key = cache_key({"image_encoder": self.encoder}, WORLD_VERSION, f"pairs moved={MOVED_SHARE}")
        self.cache = LatentCache(cache_folder, key, pairs, (width, 1, 1))
        self.cache.build(lambda slots: self.features([pair_of(slot).source for slot in slots])[..., None, None])
        self.empty = self.pairs.conditioner.ids([""])
        self._held_out: Tensor | None = None

    def modules(self) -> dict[str, nn.Module]:
        return {"ip_adapter": self.adapter}

    def frozen(self) -> dict[str, nn.Module]:
        return {
            "unet": self.unet,
            "text_encoder": self.pairs.conditioner.encoder,
            "vae": self.pairs.vae,
            "image_encoder": self.encoder,
        }

    def fingerprint(self) -> str:
        return f"{WORLD_VERSION} pairs={self.pairs.count} moved={MOVED_SHARE} empty={EMPTY_SHARE} dropout={DROPOUT}"

    @torch.no_grad()
    def features(self, scenes: Sequence[Scene]) -> Tensor:
        """[n, width]: what the image encoder says of pictures of scenes, as a run's image prompt."""
        pixels = clip_pixels([render(scene) for scene in scenes], int(self.encoder.config.image_size))
        return image_features(self.encoder, pixels, states=False)

    def batch(self, indices: Sequence[int], step: int) -> PromptedBatch:
        return PromptedBatch(self.pairs.batch(indices, step), self.cache.read(list(indices)).flatten(1))

    def predict(self, batch: PairBatch, noisy: Tensor, t: Tensor, features: Tensor) -> Tensor:
        """The noise in the target, seen by the frozen UNet with an image prompt beside the words."""
        with prompted(self.unet, self.adapter, self.adapter.image_proj(features)):
            return self.unet(noisy, t, self.pairs.conditioner(batch.ids)).sample

    def loss(self, batch: PromptedBatch, step: int, rng: StepRandom) -> Losses:
        left_out = rng.choice("left out", DROPOUT)
        no_picture, no_words = (left_out % 2 == 1)[:, None], (left_out >= 2)[:, None]
        # Zero features are the absence of a picture, as in a run's branch without words.
        features = batch.features.masked_fill(no_picture, 0.0)
        pairs = replace(batch.pairs, ids=torch.where(no_words, self.empty, batch.pairs.ids))
        total, error = self.pairs.loss(pairs, rng, lambda b, noisy, t: self.predict(b, noisy, t, features))
        return Losses(total, {"mse": error})

    def validate(self, step: int) -> dict[str, float]:
        """Error on held-out pairs without words, with their sources as image prompts and with none."""
        if self._held_out is None:
            found = [sample_pair(index, "held_out", moved=0.0).source for index in range(HELD_OUT_PAIRS)]
            self._held_out = self.features(found)
        seen, unseen = self._held_out, torch.zeros_like(self._held_out)
        return {
            "held_out": self.pairs.held_out(lambda b, noisy, t: self.predict(b, noisy, t, seen)),
            "without_picture": self.pairs.held_out(lambda b, noisy, t: self.predict(b, noisy, t, unseen)),
        }

    def export(self, folder: Path) -> None:
        save_file(storable(self.adapter.state_dict()), str(folder / FILE), {"format": "pt"})
        self.encoder.save_pretrained(folder / "image_encoder")

    def load(self, folder: Path) -> None:
        self.adapter.load_state_dict(load_ip_adapter(folder / FILE, self.unet).state_dict())
