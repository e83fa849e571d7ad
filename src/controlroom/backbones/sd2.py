"""Stable Diffusion 2: one OpenCLIP ViT-H text encoder; 768 px checkpoints predict v and ask for upcast attention.

It is used exactly as Stable Diffusion 1. What it predicts stands in the scheduler's configuration, where
`Step.clean_of` and the solver read it; ``upcast_attention`` is honoured by the attention dispatcher.
"""

from __future__ import annotations

from controlroom.backbones.base import Backbone


class StableDiffusion2(Backbone):
    """Stable Diffusion 2.x."""

    name = "sd2"
