"""PhotoMaker (Li et al., "PhotoMaker: Customizing Realistic Human Photos via Stacked ID Embedding", arXiv 2312.04461).

The word for a person ("woman") is said once for each picture of them, and each picture is fused into the word's states;
a LoRA of the UNet was trained along.

Deviations from the published code: works for several prompts at once, each with pictures of its own (its fuse module
counts the pictures of a whole batch and raises for more than one prompt); a prompt too long for the encoder keeps its
end token; ``scale`` moves what the network is told from the plain words to the fused ones, and scales the LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator

from controlroom.backbones.added_layers import Strength, added, names_of, prepared
from controlroom.backbones.lora_names import PARTS
from controlroom.backbones.photomaker import PhotoMakerModel, find_photomaker, tokens_per_picture
from controlroom.controls.face_inputs import face_vectors
from controlroom.controls.prompt_pictures import prompt_pixels
from controlroom.controls.stacked_prompt import StackedPrompt, person_in, stacked_ids
from controlroom.core.backbone import Backbone
from controlroom.core.branch import Condition
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline, Texts, implements
from controlroom.core.errors import ConflictError, InputError
from controlroom.core.run import Run
from controlroom.core.step import Step


class PhotoMaker(Control):
    """Draw the person of some pictures where the prompt says a word for them.

    Args:
        model: ``.safetensors`` file, folder with one, downloaded hub id with the path inside, name of the theatre, a
            mapping of tensors with a file's keys, or a `PhotoMakerModel`. Version 1 or 2 is told by the keys.
        images: pictures of the person (their face, roughly cut out); a list of lists: one list for each prompt.
        trigger: marks the word for the person, which stands before it: "a woman img on the beach".
        scale: of all it does; 0 is the absence of the control.
        start, end: share of the steps between which the pictures are fused into the word; the published delayed merging
            is 0.2. The LoRA acts in all steps.
        word: of the prompt, for the person, instead of a trigger.
        face_embeds: version 2 only: vectors of the faces, ``[pictures, width]`` or ``[prompts, pictures, width]``, as
            many as pictures; also a file with them.

    Raises:
        InputError: a prompt that does not say who is meant; at the start of a run, something that does not fit.
        ModelError: at the start of a run: no such model, or one for another base model.
    """

    by_views: ClassVar[bool] = True
    type: Literal["photomaker"] = Field(default="photomaker", kw_only=True)
    model: Any
    images: Any
    trigger: str = "img"
    scale: float = 1.0
    start: float = Field(default=0.0, ge=0.0, le=1.0)
    end: float = Field(default=1.0, ge=0.0, le=1.0)
    word: str | None = None
    face_embeds: Any = None

    @field_validator("trigger", "word")
    @classmethod
    def _one_word(cls, value: str | None) -> str | None:
        if value is not None and (not value or any(c.isspace() for c in value)):
            raise ValueError("expected one word without spaces")
        return value

    # Planning.

    def read(self, texts: Texts) -> Texts:
        """Take the trigger out of the prompts, and note whom it marked."""
        if self.scale != 0 and texts.embeds & {"prompt"}:
            raise InputError(f"{self.label} needs the prompt's words: give a prompt, not its embeddings.")
        if self.scale != 0 and "prompt" in texts.seconds:
            raise InputError(f"{self.label} tells both text encoders the same; leave prompt_2 out.")
        return Texts(tuple(map(self._read, texts.prompts)), texts.negatives, texts.embeds, texts.seconds)

    def _read(self, text: str) -> str:
        if self.scale == 0:
            marked = type(text) is str and any(part.strip(".,;:!?") == self.trigger for part in text.split())
            return " ".join(person_in(text, self.trigger, None, self.label)[0]) if marked else text
        if type(text) is not str:
            # Another control reads this prompt in a way of its own: a conflict that is found when claims are compared.
            return text
        words, place = person_in(text, self.trigger, None if self.word is None else [self.word], self.label)
        return StackedPrompt.of(words, place, self._count, self.start == 0 and self.end == 1)

    def _count(self) -> int:
        """Tokens that the word becomes."""
        return _number_of(self.images) * tokens_per_picture(self.model)

    def declare(self, outline: Outline) -> Declaration:
        return Declaration(claims=(Claim("condition", "set", branches=frozenset({"cond"})),))

    # A run.

    def attach(self, backbone: Backbone) -> AbstractContextManager[None]:
        """The LoRA, for the run."""
        model, names = find_photomaker(self.model, backbone), names_of(backbone)
        changes = prepared(model.changes(names), names)
        return added(changes, {part: Strength(self.scale) for part in PARTS}) if changes else nullcontext()

    def prepare(self, run: Run) -> None:
        """Tell the branch with words, and those that are told the same, who is meant."""
        plain = run.conditions["cond"]
        if not isinstance(plain, Condition):
            raise InputError(
                f"{self.label} needs a prompt that stays the same, and this one changes from step to step."
            )
        prompts = [text for text in run.prompts if isinstance(text, StackedPrompt)]
        if len(prompts) != len(run.prompts):
            others = [e.label for e in run.plan.controls if e.control is not self and implements(e.control, "read")]
            raise ConflictError(
                f"{self.label} and {' and '.join(others) or 'another control'} cannot run together: each reads the "
                "prompt in a way of its own. Remove one of them."
            )
        fused = self._told(run, prompts, plain)
        steps = self.window(run.n)

        def told(step: Step) -> Condition:
            return fused if step.i in steps else plain

        # A control before this one in the list may have passed on what the branch was told until now.
        for name in [name for name, other in run.conditions.items() if other is plain]:
            run.set_condition(name, fused if len(steps) == run.n else told)

    @torch.no_grad()
    def _told(self, run: Run, prompts: Sequence[StackedPrompt], plain: Condition) -> Condition:
        model = find_photomaker(self.model, run.backbone)
        identities = self._identities(run, model)
        stacks = identities.shape[1]
        ids, places = [], []
        for tokenizer in run.backbone.tokenizers():
            rows = [stacked_ids(tokenizer, str(text), text.word, stacks) for text in prompts]
            places = [where for _, where in rows]
            ids.append(torch.tensor([_padded(row, tokenizer) for row, _ in rows]))
        told = run.backbone.encode_ids(ids, size=run.size, clip_skip=run.clip_skip)
        encoder = model.encoder
        tokens = torch.stack(
            [
                encoder.fused(states, identities[row % len(identities)], where)
                for row, (states, where) in enumerate(zip(told.tokens, places, strict=True))
            ]
        )
        pooled = told.pooled
        if self.scale != 1:
            tokens = torch.lerp(plain.tokens.to(tokens), tokens, self.scale)
            if pooled is not None and plain.pooled is not None:
                pooled = torch.lerp(plain.pooled.to(pooled), pooled, self.scale)
        # The sizes that Stable Diffusion XL is told are the run's.
        return Condition(tokens.to(plain.tokens), None, pooled, plain.time_ids)

    def _identities(self, run: Run, model: PhotoMakerModel) -> torch.Tensor:
        """[1 or images, pictures * tokens, width]"""
        encoder = model.encoder
        pixels = prompt_pixels(self.images, int(encoder.config.image_size), run.images).to(run.device)
        vectors = None
        if encoder.reads is not None:
            if self.face_embeds is None:
                raise InputError(
                    f"{self.label}: this is version 2, which also needs the faces' vectors: face_embeds=…."
                )
            vectors = face_vectors(self.face_embeds, encoder.reads, run.images).to(run.device)
            if vectors.shape[1] != pixels.shape[1] or len(vectors) not in (1, len(pixels)):
                raise InputError(
                    f"There are vectors of {vectors.shape[1]} faces for {pixels.shape[1]} pictures. Give one for each."
                )
            vectors = vectors.expand(len(pixels), -1, -1).flatten(0, 1)
        elif self.face_embeds is not None:
            raise InputError(f"{self.label}: this is version 1, which reads pictures alone. Leave face_embeds out.")
        found = encoder.identities(pixels.flatten(0, 1), vectors)
        return found.unflatten(0, pixels.shape[:2]).flatten(1, 2)


def _number_of(images: Any) -> int:
    """Pictures of each prompt."""
    if isinstance(images, list | tuple) and any(isinstance(item, list | tuple) for item in images):
        images = images[0]
    shape = getattr(images, "shape", None)
    if shape is not None and len(shape) == 4:
        return int(shape[0])
    return len(images) if isinstance(images, list | tuple) else 1


def _padded(ids: list[int], tokenizer: Any) -> list[int]:
    return ids + [tokenizer.pad_token_id] * (int(tokenizer.model_max_length) - len(ids))
