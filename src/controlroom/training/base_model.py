"""A loaded pipeline as something that trains: own module structures, float32 where weights move, the rest shared.

The pipeline that was given is only read: what trains is a float32 copy, what is frozen shares its memory, and hooks
or attention processors that a recipe sets are on structures of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from controlroom.backbones.base import Backbone
from controlroom.backbones.lora_names import PARTS, TEXT, TEXT_2, Names
from controlroom.controls.source_pixels import natural_pixels, stretched
from controlroom.core.branch import Condition
from controlroom.core.control import Residuals
from controlroom.core.errors import InputError, ModelError
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.picture_cache import PictureCache, PictureEncoder
from controlroom.training.text_cache import TextCache

PART_NAMES = (*PARTS, "vae")
# Captions of a set; beyond that many (a few hundred megabytes for Stable Diffusion 1) they are encoded again.
_KEPT_CONDITIONS = 2048


class BaseModel:
    """The networks of a pipeline, for a recipe.

    Args:
        pipe: a loaded model; it stays as it is.
        trains: which of ``unet``, ``text_encoder``, ``text_encoder_2`` move as a whole.
        cache_folder: where encoded pictures and prompts are kept, so that another run finds them; None: nowhere.

    Attributes:
        backbone: the pipeline's, with these networks.
        unet, vae: its networks.
        pictures: encodes pictures, or reads them where they are kept.

    Raises:
        ModelError: a part that the model lacks, or a UNet that reads more than latents.
    """

    def __init__(self, pipe: Pipeline, trains: Collection[str] = (), cache_folder: Path | None = None) -> None:
        given = pipe.backbone
        reads, drawn = int(given.unet.config.in_channels), given.latent_channels
        if reads != drawn:
            raise ModelError(
                f"The network reads {reads} channels, not {drawn}: it edits or fills pictures. Train on the checkpoint "
                "that it was made from."
            )
        parts: dict[str, Any] = {}
        for name in PART_NAMES:
            module = getattr(given, name, None)
            if module is not None:
                parts[name] = _copied(module, name in trains)
            elif name in trains:
                raise ModelError(f"{pipe.model} has no {name}, which should be trained.")
        self.backbone: Backbone = replace(given, **parts, kept={})
        self.trains = frozenset(trains)
        self._conditions: dict[tuple[str, tuple[int, int]], Condition] = {}
        self._texts = None if cache_folder is None else TextCache(cache_folder, self.backbone)
        self.pictures = PictureEncoder(self.vae, posterior=self.backbone.posterior)
        if cache_folder is not None:
            # In float32, so that a run is the same with and without.
            self.pictures = PictureCache(cache_folder, self.vae, torch.float32, self.backbone.posterior)
        self.model, self._kind = pipe.model, type(pipe)
        if self.device.type == "cpu":
            from diffusers.models.attention_processor import AttnProcessor

            # Explicit softmax attention trains faster than SDPA on a CPU.
            self.unet.set_attn_processor(AttnProcessor())

    @property
    def unet(self) -> Any:
        """The denoiser."""
        return self.backbone.unet

    @property
    def vae(self) -> Any:
        """The autoencoder."""
        return self.backbone.vae

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.backbone.device

    def text_encoders(self) -> dict[str, Any]:
        """Text encoders by part name."""
        found = {name: getattr(self.backbone, name) for name in (TEXT, TEXT_2)}
        return {name: encoder for name, encoder in found.items() if encoder is not None}

    def names(self) -> Names:
        """Every name of every layer of UNet and text encoders."""
        return Names(self.unet, self.backbone.text_encoder, self.backbone.text_encoder_2)

    def trained(self) -> dict[str, Any]:
        """Networks that move as a whole, by part."""
        return {name: getattr(self.backbone, name) for name in PART_NAMES if name in self.trains}

    def frozen(self) -> dict[str, Any]:
        """Networks that do not."""
        found = {name: getattr(self.backbone, name) for name in PART_NAMES if name not in self.trains}
        return {name: module for name, module in found.items() if module is not None}

    # -- what the network is told, shown and asked --

    def condition(self, prompts: Sequence[str], size: tuple[int, int] | None = None, grad: bool = False) -> Condition:
        """What the network is told: one row for each prompt.

        Args:
            prompts: texts.
            size: height and width of the pictures in pixels (SDXL is told it); None: the model's own.
            grad: whether something before the text's states learns (an encoder, a word, a LoRA of the encoder).
        """
        size = size or self.backbone.default_size
        if grad or not self.text_encoders().keys().isdisjoint(self.trains):
            return self.backbone.encode_text(list(prompts), size=size)
        return _joined([self._known(prompt, size) for prompt in prompts])

    @torch.no_grad()
    def _known(self, prompt: str, size: tuple[int, int]) -> Condition:
        """One prompt's condition; frozen encoders say the same every time, so it is kept."""
        key = (prompt, size)
        if key not in self._conditions:
            if len(self._conditions) >= _KEPT_CONDITIONS:
                self._conditions.clear()
            # Under autocast the encoders say something else, which is not kept for runs without.
            kept = None if torch.is_autocast_enabled(self.device.type) else self._texts
            told = self.backbone.encode_text([prompt], size=size) if kept is None else kept.read([prompt], size)
            self._conditions[key] = told
        return self._conditions[key]

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition, residuals: Residuals | None = None) -> Tensor:
        """What the network predicts of latents [B, C, h, w] at timesteps [B], in float32."""
        dtype = self.unet.dtype
        told = condition.expand(len(noisy))
        told = replace(told, tokens=told.tokens.to(dtype))
        return self.backbone.predict(noisy.to(dtype), t, told, residuals).float()

    @torch.no_grad()
    def latents(self, pictures: Sequence[Image.Image | Tensor], size: tuple[int, int] | None = None) -> Tensor:
        """Scaled latents [n, C, h, w] (means of the posterior), float32.

        Args:
            pictures: any that controls take.
            size: height and width to stretch them to; None: the model's own.
        """
        step, (height, width) = self.backbone.pixels_per_latent, size or self.backbone.default_size
        if height % step or width % step or min(height, width) < step:
            raise InputError(f"Height and width must be multiples of {step}, got {height} x {width}.")
        pixels = [stretched(part, (height, width)) for part in natural_pixels(list(pictures))]
        rows = torch.cat(pixels).to(self.device, self.vae.dtype)
        found = [self.backbone.encode_picture(rows[i : i + 16]).float() for i in range(0, len(rows), 16)]
        return torch.cat(found)

    @contextmanager
    def drawing(self) -> Iterator[Pipeline]:
        """A pipeline that draws with these networks, for previews; they are in eval mode within the block."""
        modes = {m: m.training for part in self.trained().values() for m in part.modules()}
        for module in self.trained().values():
            module.eval()
        try:
            yield self._kind(replace(self.backbone, kept={}), None, self.model)
        finally:
            for module, mode in modes.items():
                module.training = mode


def _joined(conditions: Sequence[Condition]) -> Condition:
    """One row each."""

    def rows(name: str) -> Tensor | None:
        parts = [getattr(condition, name) for condition in conditions]
        return None if parts[0] is None else torch.cat(parts)

    # Autocast may give rows of several precisions; what is learned from them is float32 anyway.
    tokens = torch.cat([condition.tokens.float() for condition in conditions])
    return Condition(tokens, rows("mask"), rows("pooled"), rows("time_ids"))


def _copied(module: Any, trains: bool) -> Any:
    """The same structure without hooks; its numbers shared, or in float32 of its own."""
    from accelerate.hooks import remove_hook_from_module

    if trains:
        return remove_hook_from_module(copy.deepcopy(module), recurse=True).float()
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    shared |= {id(b): b.detach() for b in module.buffers()}
    return remove_hook_from_module(copy.deepcopy(module, shared), recurse=True).eval()
