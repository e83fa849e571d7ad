"""Runs of diffusers' pipelines of guidance, and pieces of runs done by hand, for tests of the controls."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPAGPipeline, StableDiffusionXLPAGPipeline
from diffusers.pipelines.deprecated.semantic_stable_diffusion import SemanticStableDiffusionPipeline
from diffusers.pipelines.deprecated.stable_diffusion_sag import StableDiffusionSAGPipeline

PROMPT = "a cat and a red frog"
SMALL: dict[str, Any] = {"height": 16, "width": 16, "output_type": "latent"}


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def parts_of(source: Any) -> dict[str, Any]:
    return {name: part for name, part in source.components.items() if name not in ("image_encoder",)}


def reference(kind: type, source: Any, **settings: Any) -> Any:
    """A pipeline of diffusers with the parts of another one, silent."""
    if kind is not StableDiffusionXLPAGPipeline:
        settings["requires_safety_checker"] = False
    pipe = kind(**parts_of(source), **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def processors(unet: Any) -> dict[str, Any]:
    return dict(unet.attn_processors)


def semantic(source: Any, prompt: Any, *seeds: int, **settings: Any) -> torch.Tensor:
    """Latents of diffusers' SEGA."""
    pipe = reference(SemanticStableDiffusionPipeline, source)
    return pipe(prompt, generator=generators(*seeds), **{**SMALL, **settings}).images


def self_attention(source: Any, prompt: Any, *seeds: int, **settings: Any) -> torch.Tensor:
    """Latents of diffusers' self-attention guidance; the processors that it leaves are put back."""
    pipe, held = reference(StableDiffusionSAGPipeline, source), processors(source.unet)
    try:
        return pipe(prompt, generator=generators(*seeds), **{**SMALL, **settings}).images
    finally:
        source.unet.set_attn_processor(held)


def perturbed(source: Any, prompt: Any, *seeds: int, layers: Any = "mid", **settings: Any) -> torch.Tensor:
    """Latents of diffusers' perturbed-attention guidance, for Stable Diffusion 1, 2 and XL."""
    large = hasattr(source, "text_encoder_2")
    kind = StableDiffusionXLPAGPipeline if large else StableDiffusionPAGPipeline
    pipe, held = reference(kind, source, pag_applied_layers=layers), processors(source.unet)
    try:
        return pipe(prompt, generator=generators(*seeds), **{**SMALL, **settings}).images
    finally:
        source.unet.set_attn_processor(held)


class ByHand:
    """The parts of a miniature, to write a method out a row at a time."""

    def __init__(self, source: Any, steps: int, scheduler: Any = None, seed: int = 5) -> None:
        self.source, self.large = source, hasattr(source, "text_encoder_2")
        self.scheduler = (
            scheduler if scheduler is not None else type(source.scheduler).from_config(source.scheduler.config)
        )
        self.scheduler.set_timesteps(steps)
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).to(source.unet.dtype)
        self.x = noise * self.scheduler.init_noise_sigma

    def told(self, text: str, nothing: bool = False) -> tuple[torch.Tensor, dict[str, Any]]:
        """What the network is told of a text; with ``nothing`` as the branch without a prompt is."""
        if not self.large:
            return self.source.encode_prompt(text, "cpu", 1, False)[0], {}
        found = self.source.encode_prompt(text, device="cpu", num_images_per_prompt=1, negative_prompt=None)
        tokens, empty, pooled, empty_pooled = found
        ids = torch.tensor([[16, 16, 0, 0, 16, 16]], dtype=tokens.dtype)
        if nothing:
            tokens, pooled = empty, empty_pooled
        return tokens, {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}

    @torch.no_grad()
    def predict(self, t: Any, told: tuple[torch.Tensor, dict[str, Any]], x: torch.Tensor | None = None) -> torch.Tensor:
        """The network's prediction for one row, of the scaled latents or of what is given."""
        sample = self.scheduler.scale_model_input(self.x, t) if x is None else x
        return self.source.unet(sample, t, told[0], **told[1]).sample

    def step(self, eps: torch.Tensor, t: Any) -> None:
        self.x = self.scheduler.step(eps, t, self.x).prev_sample


def close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> bool:
    """Whether the largest difference is small against the reference's deviation."""
    assert ours.shape == expected.shape and torch.isfinite(expected).all()
    return bool((ours - expected).abs().max() <= tolerance * expected.std())
