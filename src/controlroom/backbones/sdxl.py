"""Stable Diffusion XL (arXiv 2307.01952): two text encoders, a pooled text embedding, the picture's size and crop."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from controlroom.backbones.base import Backbone, execution_device
from controlroom.core.branch import Condition


class StableDiffusionXL(Backbone):
    """Stable Diffusion XL base, and refiners of its text layout."""

    name = "sdxl"

    def encode_text(
        self,
        prompts: Sequence[str],
        negative: bool = False,
        size: tuple[int, int] | None = None,
        clip_skip: int | None = None,
        second: Sequence[str] | None = None,
    ) -> Condition:
        """States of both encoders side by side, the pooled embedding of the second, and the time ids."""
        pairs = [
            (self.tokenizer, self.text_encoder, prompts),
            (self.tokenizer_2, self.text_encoder_2, prompts if second is None else second),
        ]
        skip = 0 if clip_skip is None or negative else clip_skip
        states, pooled = [], None
        for tokenizer, encoder, texts in pairs:
            if encoder is None:
                continue
            device = execution_device(encoder)
            out = encoder(self.tokenize(tokenizer, texts).to(device), output_hidden_states=True)
            # Only an encoder with a projection gives [B, width] first; it is the second one.
            if out[0].ndim == 2:
                pooled = out[0].to(self.device)
            states.append(out.hidden_states[-(skip + 2)].to(self.device))
        tokens = torch.cat(states, dim=-1).to(self.text_encoder_2.dtype)
        height, width = size or self.default_size
        return Condition(
            tokens=tokens, pooled=pooled, time_ids=self.time_ids(len(prompts), (height, width), tokens.dtype)
        )

    def time_ids(
        self,
        rows: int,
        size: tuple[int, int],
        dtype: torch.dtype,
        original: tuple[int, int] | None = None,
        crop: tuple[int, int] = (0, 0),
        target: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """[rows, 6]: original size, crop at the top left, target size, each as (height, width)."""
        values = [*(original or size), *crop, *(target or size)]
        return torch.tensor([values], dtype=dtype, device=self.device).repeat(rows, 1)

    def added_conditions(self, condition: Condition) -> dict[str, torch.Tensor] | None:
        """Pooled text and time ids under the names of diffusers."""
        if condition.pooled is None or condition.time_ids is None:
            raise RuntimeError("a condition for Stable Diffusion XL needs pooled and time_ids (use run.encode_text)")
        return {"text_embeds": condition.pooled, "time_ids": condition.time_ids}
