"""LoRA (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685), and its relatives.

What was learned of a person, a thing or a style is a change of low rank beside the network's weights: W + s · ΔW.

Reads what people have: PEFT, diffusers, kohya (LoCon, LoHa, LoKr, DoRA), ComfyUI; see `backbones.lora_files`. Several
LoRAs of a run add up, in any order. Deviations from diffusers: a window of steps; a mask, for which the run also
predicts with the changed network and takes that prediction inside the mask, so that two people learned apart can stand
in two places; words that kohya bundled with a LoRA are known while the run lasts; DoRA's scale is linear, as in LyCORIS
and ComfyUI.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, field_validator

from controlroom.backbones.added_layers import Strength, added, names_of, prepared
from controlroom.backbones.learned_words import LearnedWord, bundled_words, known_words
from controlroom.backbones.loading import find_model, keep
from controlroom.backbones.lora_files import LoRAFile, load_lora, lora_from_tensors
from controlroom.backbones.lora_layers import Applied
from controlroom.backbones.lora_names import PARTS, UNET, Names
from controlroom.controls.reference_states import told_as
from controlroom.controls.run_mask import RunMask, mask_sites, run_mask
from controlroom.controls.word_mask import MaskInput
from controlroom.core.attention import AttentionCall
from controlroom.core.backbone import Backbone
from controlroom.core.branch import Branch
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import InputError
from controlroom.core.run import Run
from controlroom.core.step import Step

_HELD = "lora of this run"


@dataclass(frozen=True)
class _Read:
    """What a file holds, ready for a network.

    Attributes:
        changes: of the layers, with the part that each belongs to.
        words: learned words that came along.
        remarks: how many keys were read, and what was assumed.
        what: the file, for messages.
    """

    changes: list[tuple[str, Applied]]
    words: list[LearnedWord]
    remarks: tuple[str, ...]
    what: str

    @classmethod
    def of(cls, file: LoRAFile, names: Names, what: str) -> _Read:
        words = bundled_words(file.words, what)
        return cls(prepared(file.layers, names), words, (f"{what}: {file.account}", *file.notes), what)

    @contextmanager
    def held(self, backbone: Backbone, control: int) -> Iterator[None]:
        """The words are known, and what was read is at hand, for the run."""
        backbone.kept[_HELD, control] = self
        try:
            with known_words(backbone, self.words, self.what) if self.words else nullcontext():
                yield
        finally:
            backbone.kept.pop((_HELD, control), None)


class LoRA(Control):
    """Draw with what a LoRA learned.

    Args:
        model: ``.safetensors`` file, folder of PEFT or diffusers, downloaded hub id, name of the theatre, or a mapping
            of tensors with the keys of a file.
        scale: factor of the change. 0 is the absence of the control; below 0 it is turned round.
        text_scale: factor of the change of the text encoders, which has no window; None: ``scale``.
        start, end: share of the steps between which the UNet is changed.
        mask: white where it may act, or words of the prompt; this costs a second pass with as many rows. None:
            everywhere, at no rows.

    Raises:
        InputError: at the start of a run: a mask that cannot be read.
        ModelError: at the start of a run: no such file, not a LoRA, a key that nothing reads, or another base model.
    """

    type: Literal["lora"] = Field(default="lora", kw_only=True)
    model: Any
    scale: float = 1.0
    start: float = Field(default=0.0, ge=0, le=1)
    end: float = Field(default=1.0, ge=0, le=1)
    mask: MaskInput = None
    text_scale: float | None = None

    @field_validator("model")
    @classmethod
    def _given(cls, value: Any) -> Any:
        if value is None or value == "" or (isinstance(value, Mapping) and not value):
            raise ValueError("expected a file, a folder, a hub id, or a mapping of tensors")
        return value

    def neutral(self, n: int) -> bool:
        """No step lies in its window, or it changes neither the UNet nor the text encoders."""
        return not self.window(n) or (self.scale == 0 and (self.mask is not None or not self._text_scale))

    @property
    def _text_scale(self) -> float:
        return self.scale if self.text_scale is None else self.text_scale

    @property
    def _tag(self) -> str:
        """A name of its own for the rows of each LoRA of a run."""
        return "lora:" + hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:8]

    def declare(self, outline: Outline) -> Declaration:
        if self.mask is None:
            return Declaration()
        tag = self._tag
        branches = tuple(Branch(f"{tag}/{name}", weights=tag) for name in outline.text_branches)
        claims = (Claim("prediction", "add"),)
        return Declaration(branches=branches, claims=claims, attention=mask_sites(outline, self.mask))

    def attach(self, backbone: Backbone) -> AbstractContextManager[Any] | None:
        """Everywhere: the changes beside the layers, for the run. In a mask: only held ready for `weights`."""
        read = self._read(backbone)
        return self._everywhere(backbone, read) if self.mask is None else self._ready(backbone, read)

    def remarks(self, backbone: Backbone) -> tuple[str, ...]:
        """How many keys of its file were read, and what was assumed."""
        return self._read(backbone).remarks

    @contextmanager
    def _everywhere(self, backbone: Backbone, read: _Read) -> Iterator[Strength]:
        whole = self.start == 0 and self.end == 1
        unet = Strength(self.scale if whole else 0.0)
        strengths = {part: unet if part == UNET else Strength(self._text_scale) for part in PARTS}
        with read.held(backbone, id(self)), added(read.changes, strengths):
            yield unet

    @contextmanager
    def _ready(self, backbone: Backbone, read: _Read) -> Iterator[list[tuple[str, Applied]]]:
        # `weights` is asked at every pass and knows the backbone alone.
        key = (self._tag,)
        backbone.kept[key] = read.changes
        try:
            with read.held(backbone, id(self)):
                yield read.changes
        finally:
            backbone.kept.pop(key, None)

    def weights(self, tag: str, backbone: Backbone) -> AbstractContextManager[None]:
        """The changed UNet, for the rows that are taken inside the mask."""
        return added(backbone.kept[tag,], {UNET: Strength(self.scale)})

    def prepare(self, run: Run) -> RunMask | None:
        """The mask, and what its rows are told: the words as the changed text encoders read them."""
        if self.mask is None:
            return None
        changes, tag = run.attachment(self), self._tag
        texts = any(part != UNET for part, _ in changes) and self._text_scale != 0
        strength = Strength(self._text_scale)
        for name in run.plan.outline.text_branches:
            if not texts:
                run.set_condition(f"{tag}/{name}", told_as(run, name))
                continue
            if any(not prompt for prompt in run.prompts) and name == "cond":
                raise InputError(f"{self.label} with a mask changes how words are read, and needs them: give a prompt.")
            with added(changes, {part: strength for part in PARTS if part != UNET}):
                words = run.prompts if name == "cond" else tuple(text or "" for text in run.negative_prompts)
                run.set_condition(f"{tag}/{name}", run.encode_text(list(words), negative=name == "uncond"))
        return run_mask(self.mask, run, self)

    def before(self, step: Step) -> None:
        """Its window begins; a mask by words moves on."""
        mask: RunMask | None = step.memory(self)
        if mask is None:
            step.run.attachment(self).value = self.scale
        else:
            mask.update()

    def attention(self, call: AttentionCall) -> None:
        """Read where the words of the mask are."""
        mask: RunMask | None = call.step.memory(self)
        if mask is not None:
            mask.attention(call)

    def guide(self, step: Step, state: str) -> torch.Tensor | None:
        """Inside the mask, the prediction of the changed network in the place of the other."""
        found: RunMask | None = step.memory(self)
        if state != "image" or found is None:
            return None
        mask = found.latents()
        tag, scale = self._tag, step.run.guidance.scale
        cond = step.eps[f"{tag}/cond"] - step.eps["cond"]
        if "uncond" not in step.eps or f"{tag}/uncond" not in step.eps:
            return mask.to(cond) * cond
        uncond = step.eps[f"{tag}/uncond"] - step.eps["uncond"]
        return mask.to(cond) * (uncond + scale * (cond - uncond))

    def finish(self, step: Step) -> None:
        """Its window may end."""
        if self.mask is None and step.i + 1 not in self.window(step.n):
            step.run.attachment(self).value = 0.0

    def _read(self, backbone: Backbone) -> _Read:
        """Read from the file once for a network, and again when either has changed."""
        if (_HELD, id(self)) in backbone.kept:
            return backbone.kept[_HELD, id(self)]
        if isinstance(self.model, Mapping):
            names, what = names_of(backbone), "the LoRA given"
            return _Read.of(lora_from_tensors(self.model, names, what), names, what)
        path = find_model(self.model, "LoRA")
        parts = [getattr(backbone, part, None) for part in PARTS]

        def load() -> tuple[list[Any], _Read]:
            names = names_of(backbone)
            # The networks are held too, so that the numbers in the key stay theirs.
            return parts, _Read.of(load_lora(path, names), names, str(path))

        return keep(backbone, ("lora", *map(id, parts)), path, load)[1]
