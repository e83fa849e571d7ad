"""Masks by words: where the network looks when it reads them (arXiv 2208.01626, section 3.2).

A control that takes a mask also takes ``"words: red hat"`` or a `WordMask`. The cross-attention maps of the words'
tokens at one resolution, averaged over layers, heads and the steps so far, are cut at a share of their maximum. The
mask so follows the picture that is being drawn; in the first steps it is coarse. What a control found last is in
``result.masks``, and `RunResult.mask_picture` shows it.
"""

from __future__ import annotations

import os
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, field_validator

from controlroom.backbones.words import prompt_tokens
from controlroom.controls.local_blend import LocalBlend
from controlroom.core import inputs
from controlroom.core.attention import AttentionCall
from controlroom.core.control import Outline, Settings
from controlroom.core.errors import InputError
from controlroom.core.run import Run
from controlroom.core.sites import Site, nearest_size

PREFIX = "words:"


class WordMask(Settings):
    """A mask that is white where these words are.

    Args:
        words: words or phrases of the prompt. Where pictures have prompts of their own, each needs one of them.
        threshold: a place belongs to the words where their attention is above this share of its maximum.
        resolution: shorter side in tokens of the layers that are read; None: a quarter of the latents' side, or the
            nearest there is.
    """

    words: str | list[str] | tuple[str, ...]
    threshold: float = Field(default=0.3, ge=0, lt=1)
    resolution: int | None = Field(default=None, ge=1)

    @field_validator("words", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        listed = [value] if isinstance(value, str) else value
        if isinstance(listed, list | tuple) and (
            not listed or not all(isinstance(w, str) and w.strip() for w in listed)
        ):
            raise ValueError("expected words of the prompt, none of them empty")
        return tuple(listed) if isinstance(listed, list | tuple) else listed

    def sites(self, outline: Outline) -> tuple[Site, ...]:
        """The cross-attention layers that are read, for a control's declaration."""
        found = outline.sites("cross")
        hw = nearest_size(found, outline.hw, self.resolution)
        return tuple(site for site in found if site.hw == hw)

    def reader(self, run: Run, branch: str = "cond") -> WordMaps:
        """What gathers the maps of a run; once, in ``prepare``.

        Raises:
            InputError: a word that no prompt has, or a prompt that has none of the words, each named; a canvas that is
                seen through windows, which show a word each where it is in them.
        """
        if run.plan.views is not None:
            raise InputError("A mask by words needs the whole picture in one view. Give a picture as mask here.")
        tokenizer = run.backbone.tokenizers()[0]
        prompts = [prompt_tokens(tokenizer, text) for text in run.prompts]
        for word in self.words:
            if not any(word in prompt for prompt in prompts):
                prompts[0].find(word)
        rows = torch.zeros(len(prompts), max(prompt.length for prompt in prompts))
        for row, prompt in zip(rows, prompts, strict=True):
            for word in self.words:
                if word in prompt:
                    row[[place for occurrence in prompt.find(word) for place in occurrence]] = 1.0
            if not bool(row.any()):
                raise InputError(
                    f"None of the words of the mask ({', '.join(map(repr, self.words))}) is in {prompt.text!r}. Name a "
                    "word of each prompt."
                )
        blend = LocalBlend({branch: rows.to(run.device)}, self.threshold)
        return WordMaps(branch, blend, frozenset(site.name for site in self.sites(run.plan.outline)))


class WordMaps:
    """The maps of a `WordMask` in one run."""

    def __init__(self, branch: str, blend: LocalBlend, sites: frozenset[str]) -> None:
        self.branch, self._blend, self._sites = branch, blend, sites

    def attention(self, call: AttentionCall) -> None:
        """Read a layer of the main pass, if it is one of the mask's."""
        if call.phase == "main" and call.site.name in self._sites and self.branch in call:
            call.read(self.branch, self._blend.sink(self.branch, call.site.hw))

    @property
    def seen(self) -> bool:
        """Whether a layer was read yet."""
        return self._blend.seen

    def mask(self, hw: tuple[int, int] | torch.Size) -> torch.Tensor:
        """[rows, 1, h, w] in {0, 1}, from the steps so far; after the first main pass."""
        return self._blend.mask(hw)


def read_mask(value: Any) -> Any:
    """A `WordMask` where a setting speaks of words; pictures, arrays and paths as they are.

    >>> read_mask("words: red hat, shirt").words
    ('red hat', 'shirt')
    """
    value = inputs.decode(value)
    if isinstance(value, list | tuple):
        return type(value)(read_mask(item) for item in value)
    if isinstance(value, dict):
        return WordMask(**value)
    if isinstance(value, str) and value.strip().lower().startswith(PREFIX) and not os.path.exists(value):
        return WordMask(tuple(word.strip() for word in value.strip()[len(PREFIX) :].split(",")))
    return value


MaskInput = Annotated[Any, BeforeValidator(read_mask)]
"""A picture that is white where the control may act, or a `WordMask` (``"words: red hat"``); None: everywhere."""


def picture_alone(value: Any) -> Any:
    """A mask of something whose place words cannot find, since it is fixed or is no picture that is drawn.

    Raises:
        InputError: it is words.
    """
    value = read_mask(value)
    for item in value if isinstance(value, list | tuple) else (value,):
        if isinstance(item, WordMask):
            raise InputError(
                f"The words {', '.join(map(repr, item.words))} cannot be the mask here: words are looked up while the "
                "picture is drawn, and this mask must be known before. Give a picture, white where it applies (or, of "
                "a region, a box)."
            )
    return value


PictureMask = Annotated[Any, BeforeValidator(picture_alone)]
"""A picture that is white where something applies; words are refused."""
