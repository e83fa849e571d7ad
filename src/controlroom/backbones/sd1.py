"""Stable Diffusion 1 (arXiv 2112.10752): one CLIP ViT-L text encoder, predicts the noise."""

from __future__ import annotations

from controlroom.backbones.base import Backbone


class StableDiffusion1(Backbone):
    """Stable Diffusion 1.x, and the theatre's checkpoint."""

    name = "sd1"
