"""KOSMOS-G (Pan et al., "Kosmos-G: Generating Images in Context with Multimodal Large Language Models", arXiv
2310.02992).

The prompt is words with pictures between them, "a photo of <image> wearing <image>". A language model reads both, and
AlignerNet says what it read in the text encoder's space, to a UNet that never saw it: everything else goes on working.
Without words the network is told the start token alone, read the same way.

Deviations: ``scale``; the negative prompt is read alone and not in the place of the longer of the two; Stable Diffusion
XL's pooled vector stays that of the words, as the published model is for Stable Diffusion 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field

from controlroom.backbones.kosmos import KosmosReader, find_kosmos
from controlroom.backbones.multimodal import PICTURE
from controlroom.backbones.words import PromptTokens, content_ids, placed_tokens
from controlroom.controls.interleaved import SaidPrompt, picture_counts, said, said_as, said_prompts, words_of
from controlroom.controls.prompt_pictures import prompt_pixels
from controlroom.core.branch import Condition
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline, Texts
from controlroom.core.errors import InputError
from controlroom.core.run import Run


class InterleavedPrompt(SaidPrompt):
    """The words of a prompt with pictures between them, each of which takes the place of a word."""

    @classmethod
    def of(cls, said: str) -> InterleavedPrompt:
        """Out of words with `PICTURE`."""
        return said_as(cls, said)

    def tokens(self, tokenizer: Any) -> PromptTokens:
        """Where its words are, if each picture takes the place of one word, as it did in training."""
        length, bos = int(tokenizer.model_max_length), tokenizer.bos_token_id
        ids, places = [bos], []
        for number, piece in enumerate(self.said.split(PICTURE)):
            if number:
                ids.append(bos)
            for token in content_ids(tokenizer, piece):
                places.append(len(ids))
                ids.append(token)
        ids = [*ids[: length - 1], tokenizer.eos_token_id]
        inside = [place for place in places if place < length - 1]
        return placed_tokens(tokenizer, str(self), ids, content_ids(tokenizer, str(self)), inside, length)


class KosmosG(Control):
    """Read words and pictures as one prompt.

    Args:
        model: folder that its training wrote, downloaded hub id, name of the theatre; or a `KosmosReader`.
        images: a picture, or one for each ``<image>`` of the prompt, in order. Where the prompt has none, they stand
            before its words, as before an instruction. A list of lists: one list for each prompt. None: no control.
        scale: 0 is the text encoder's reading of the words alone; 1 as published; between, what the network is told
            moves from one to the other.

    Raises:
        InputError: at planning, another number of pictures than of ``<image>``, or a prompt given as embeddings or
            apart for the second text encoder; at the start, a picture that cannot be read, or a text that is too long.
        ModelError: at the start: no such model, or one for another base model.
    """

    type: Literal["kosmos_g"] = Field(default="kosmos_g", kw_only=True)
    model: Any
    images: Any = None
    scale: float = 1.0

    # Planning.

    def neutral(self, n: int) -> bool:
        """Also without pictures."""
        return not any(picture_counts(self.images)) or super().neutral(n)

    def read(self, texts: Texts) -> Texts:
        """The words of the prompts; where pictures stand is noted."""
        if self.scale == 0:
            return replace(texts, prompts=tuple(map(words_of, texts.prompts)))
        return replace(texts, prompts=said_prompts(self.label, texts, self.images, InterleavedPrompt))

    def declare(self, outline: Outline) -> Declaration:
        return Declaration(claims=(Claim("condition", "own", branches=frozenset({"cond", "uncond"})),))

    # A run.

    @torch.no_grad()
    def prepare(self, run: Run) -> None:
        """Tell ``cond`` and ``uncond``, and branches that were told the same, what the language model read."""
        reader, tokenizer = find_kosmos(self.model, run.backbone), run.backbone.tokenizers()[0]
        pixels = prompt_pixels(self.images, reader.side, run.images)
        texts = [said(prompt) for prompt in run.prompts]
        shown = pixels.expand(len(texts), *pixels.shape[1:]).flatten(0, 1).to(run.device)
        self._tell(run, "cond", lambda: reader(tokenizer, texts, shown))
        if "uncond" in run.conditions:
            negatives = [text or "" for text in run.negative_prompts]
            self._tell(run, "uncond", lambda: _each(reader, tokenizer, negatives))

    def _tell(self, run: Run, branch: str, read: Callable[[], torch.Tensor]) -> None:
        before = run.conditions[branch]
        if not isinstance(before, Condition):
            raise InputError(f"{self.label} needs a prompt that stays the same; this one changes from step to step.")
        found = read().to(before.tokens)
        told = replace(before, tokens=torch.lerp(before.tokens.expand_as(found), found, self.scale), mask=None)
        for name in [name for name, held in run.conditions.items() if held is before]:
            run.set_condition(name, told)


def _each(reader: KosmosReader, tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """Each text read once."""
    different = list(dict.fromkeys(texts))
    found = reader(tokenizer, different)
    return found[[different.index(text) for text in texts]]
