"""Stable Diffusion XL (arXiv 2307.01952): two text encoders, a pooled text embedding, the picture's size and crop."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from controlroom.backbones.base import Backbone, execution_device
from controlroom.core.branch import Condition


class StableDiffusionXL(Backbone):
    """Stable Diffusion XL base, and refiners of its text layout."""

    name = "sdxl"

    def encode_ids(
        self,
        ids: Sequence[torch.Tensor],
        negative: bool = False,
        size: tuple[int, int] | None = None,
        clip_skip: int | None = None,
        keep: torch.Tensor | None = None,
    ) -> Condition:
        """States of both encoders side by side, the pooled embedding of the second, and the time ids."""
        encoders = [encoder for encoder in (self.text_encoder, self.text_encoder_2) if encoder is not None]
        skip = 0 if clip_skip is None or negative else clip_skip
        states, pooled = [], None
        for encoder, part in zip(encoders, ids, strict=True):
            device = execution_device(encoder)
            arguments = {} if keep is None else {"attention_mask": keep.to(device)}
            out = encoder(part.to(device), output_hidden_states=True, **arguments)
            # Only an encoder with a projection gives [B, width] first; it is the second one.
            if out[0].ndim == 2:
                pooled = out[0].to(self.device)
            states.append(out.hidden_states[-(skip + 2)].to(self.device))
        tokens = torch.cat(states, dim=-1).to(self.text_encoder_2.dtype)
        height, width = size or self.default_size
        return Condition(
            tokens=tokens, pooled=pooled, time_ids=self.time_ids(len(tokens), (height, width), tokens.dtype)
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
