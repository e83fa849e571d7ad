"""A caption of a photograph by BLIP (Li et al., arXiv 2201.12086) through transformers, from a local folder.

On the theatre, `controlroom.data.theatre.captioner` says what the attribute reader sees.
"""

from __future__ import annotations

import os
from typing import Protocol, runtime_checkable

import torch
from PIL import Image

from controlroom.core.errors import InputError
from controlroom.signals.pretrained import load_pretrained


@runtime_checkable
class Captioner(Protocol):
    """Says what is in a picture."""

    def __call__(self, image: Image.Image) -> str:
        """One sentence about an RGB picture."""
        ...


class BlipCaptioner:
    """Captions by BLIP.

    Args:
        folder: of a BLIP network for captions, or a hub id that has been downloaded.
        prompt: how captions begin, such as ``a photo of``; "" leaves it to the network.
        max_new_tokens: longest caption.
        num_beams: beams of the search; 1 is greedy.
        device: where it computes.

    Raises:
        ModelError: no such network is there.
        InputError: a length or a number of beams below 1.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        prompt: str = "",
        max_new_tokens: int = 30,
        num_beams: int = 3,
        device: str = "cpu",
    ) -> None:
        for name, value in (("max_new_tokens", max_new_tokens), ("num_beams", num_beams)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} of a captioner is {value!r}; expected a whole number from 1.")
        self.network = load_pretrained(folder, "BlipForConditionalGeneration", "BLIP", device, "AutoProcessor")
        self.prompt, self.max_new_tokens, self.num_beams = prompt, max_new_tokens, num_beams

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> str:
        """One sentence about an RGB picture, the same every time."""
        words = {"text": self.prompt} if self.prompt else {}
        inputs = self.network.processor(images=image.convert("RGB"), return_tensors="pt", **words)
        given = {name: value.to(self.network.device) for name, value in inputs.items()}
        ids = self.network.model.generate(
            **given, max_new_tokens=self.max_new_tokens, num_beams=self.num_beams, do_sample=False
        )
        return str(self.network.processor.decode(ids[0], skip_special_tokens=True)).strip()
