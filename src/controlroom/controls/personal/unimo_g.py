"""UNIMO-G (Li et al., "UNIMO-G: Unified Image Generation through Multimodal Conditional Diffusion", arXiv 2401.13388).

The prompt is words with pictures between them, "a woman <image> beside a ball <image>". A multimodal language model
reads both, and the UNet's cross-attention reads its states (and the pictures' own) with keys and values that were
trained for them, in the place of the words'. A prompt of words alone is read the same way.

Deviations: ``scale``, ``mask`` and a window; Stable Diffusion XL's pooled vector stays that of the words. What of the
architecture is recalled and what is this project's: `controlroom.backbones.unimo`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from controlroom.backbones.ip_adapter import layer_numbers
from controlroom.backbones.unimo import Told, UnimoModel, UnimoReader, find_unimo
from controlroom.controls.condition_map import tiled
from controlroom.controls.interleaved import SaidPrompt, picture_counts, said, said_prompts, words_of
from controlroom.controls.prompt_pictures import prompt_pixels
from controlroom.controls.run_mask import RunMask, joined_sites, mask_sites, run_mask
from controlroom.controls.word_mask import MaskInput
from controlroom.core.attention import AttentionCall
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline, Texts
from controlroom.core.run import Run
from controlroom.core.step import Step


@dataclass
class _Memory:
    """What a run knows.

    Attributes:
        model: gives keys and values.
        told: what ``cond`` and ``uncond`` are told; a row for all, or one for each image.
        numbers: of each layer in the file.
        mask: where it acts; None: everywhere.
        projected: keys and values, kept since what is told stays the same.
        queries: the mask at the size of a layer, for the views of a plan.
    """

    model: UnimoModel
    told: dict[str, Told]
    numbers: dict[str, int]
    mask: RunMask | None
    projected: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    queries: dict[tuple[str, int, int], torch.Tensor] = field(default_factory=dict)


class UnimoG(Control):
    """Read words and pictures of several entities as one prompt.

    Args:
        model: folder that its training wrote, downloaded hub id, name of the theatre; or a `UnimoReader`.
        images: a picture, or one for each ``<image>`` of the prompt, in order. Where the prompt has none, they stand
            before its words, as before an instruction. A list of lists: one list for each prompt. None: the words alone
            are read, by the language model.
        scale: 0 is the text encoder's reading of the words alone; 1 as published; between, what cross-attention gives
            moves from one to the other.
        start, end: share of the steps between which it acts; in the others the text encoder's reading does.
        mask: white where it acts; elsewhere the text encoder's reading does. A picture, or words of the prompt
            (``"words: red hat"``), which are looked up from the second step on.

    Raises:
        InputError: at planning, another number of pictures than of ``<image>``, or a prompt given as embeddings or
            apart for the second text encoder; at the start, a picture that cannot be read, or a text that is too long.
        ModelError: at the start: no such model, or one for another base model.
    """

    by_views: ClassVar[bool] = True
    type: Literal["unimo_g"] = Field(default="unimo_g", kw_only=True)
    model: Any
    images: Any = None
    scale: float = 1.0
    start: float = Field(default=0.0, ge=0.0, le=1.0)
    end: float = Field(default=1.0, ge=0.0, le=1.0)
    mask: MaskInput = None

    # Planning.

    def read(self, texts: Texts) -> Texts:
        """The words of the prompts; where pictures stand is noted."""
        if self.scale == 0:
            return replace(texts, prompts=tuple(map(words_of, texts.prompts)))
        return replace(texts, prompts=said_prompts(self.label, texts, self.images, SaidPrompt, always=True))

    def declare(self, outline: Outline) -> Declaration:
        sites = outline.sites("cross")
        told = frozenset({"cond", "uncond"})
        return Declaration(
            attention=joined_sites(sites, mask_sites(outline, self.mask)),
            # Whoever else changes what the text encoder says would not be heard.
            claims=(
                Claim("out", "replace", frozenset(site.name for site in sites)),
                Claim("condition", "own", branches=told),
            ),
        )

    # A run.

    @torch.no_grad()
    def prepare(self, run: Run) -> _Memory:
        reader = find_unimo(self.model, run.backbone)
        texts = [said(prompt) for prompt in run.prompts]
        pixels = prompt_pixels(self.images, reader.side, run.images) if any(picture_counts(self.images)) else None
        if len(set(texts)) == 1 and (pixels is None or len(pixels) == 1):
            texts = texts[:1]
        if pixels is not None:
            pixels = pixels.expand(len(texts), *pixels.shape[1:]).flatten(0, 1).to(run.device)
        tokenizer = run.backbone.tokenizers()[0]
        told = {"cond": reader(tokenizer, texts, pixels)}
        if "uncond" in run.conditions:
            told["uncond"] = _negative(reader, tokenizer, [text or "" for text in run.negative_prompts])
        mask = None if self.mask is None else run_mask(self.mask, run, self)
        return _Memory(reader.model, told, layer_numbers(run.backbone.unet), mask)

    def before(self, step: Step) -> None:
        """A mask by words moves on."""
        memory: _Memory = step.memory(self)
        if memory.mask is not None and memory.mask.update():
            memory.queries.clear()

    def attention(self, call: AttentionCall) -> None:
        memory: _Memory = call.step.memory(self)
        if memory.mask is not None:
            memory.mask.attention(call)
        for branch in call.reached(self):
            as_told = _told_as(call.step.run, branch)
            if as_told is None:
                continue
            key, told, rows = (call.site.name, as_told), memory.told[as_told], call.layout.size(branch)
            if key not in memory.projected:
                # Kept from pass to pass, so no pass's graph may hang on them.
                with torch.no_grad():
                    number = memory.numbers[call.site.name]
                    memory.projected[key] = memory.model.keys_and_values(number, told.tokens)
            k, v = (tiled(part, rows, branch) for part in memory.projected[key])
            mask = None if memory.mask is None else self._query_mask(memory.mask, memory, call, branch)
            bias = tiled(told.bias(), rows, branch)
            call.stream(branch, k, v, scale=self.scale, query_mask=mask, bias=bias, mode="replace")

    def _query_mask(self, mask: RunMask, memory: _Memory, call: AttentionCall, branch: str) -> torch.Tensor:
        """[rows, queries]: the mask at the size of the layer."""
        queries, run = call.hidden.shape[1], call.step.run
        key = (branch, queries, id(run.plan))
        if key not in memory.queries:
            memory.queries[key] = mask.tokens(branch, queries).to(run.dtype)
        return memory.queries[key]


def _told_as(run: Run, branch: str) -> str | None:
    """Which of ``cond`` and ``uncond`` a branch is told the same as; None: something else, read as it is."""
    held = run.conditions.get(branch)
    names = [name for name in ("cond", "uncond") if name in run.conditions]
    if branch in names:
        return branch
    return next((name for name in names if held is run.conditions[name]), None)


def _negative(reader: UnimoReader, tokenizer: Any, texts: Sequence[str]) -> Told:
    """Negative prompts, one for all read once."""
    return reader(tokenizer, texts[:1] if len(set(texts)) == 1 else texts)
