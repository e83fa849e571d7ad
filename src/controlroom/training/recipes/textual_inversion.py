"""Textual Inversion (Gal et al., arXiv 2208.01618): a thing or a style becomes one new word of a few vectors.

The vectors that stand in the place of the word's tokens are all that learns, down the error of the predicted noise on
pictures under many short sentences with the word; in every text encoder that the model has. Deviations: pictures are
not cropped or mirrored at random (a setting mirrors them), the length of the vectors can be held, and captions can be
used instead of sentences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt, field_validator
from torch import Tensor, nn

from controlroom.core.errors import InputError
from controlroom.data.pictures import Picture
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.base_model import BaseModel
from controlroom.training.learned_word import NewWord
from controlroom.training.prior import subject_loss
from controlroom.training.prompt_templates import TEMPLATES, has_place, with_word
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses
from controlroom.training.shown import Shown, ShownBatch
from controlroom.training.shown_recipe import Batch, ShownRecipe, ShownSettings

_ANY = "{}"
"""Stands for any of the sentences."""


class TextualInversionSettings(ShownSettings):
    """How a word is learned.

    The published rate of 5e-4 is multiplied by the batch in diffusers' script (``--scale_lr``): 2e-3 for 4.
    """

    loop: ClassVar[dict[str, Any]] = {
        "total_steps": 3000,
        "batch_size": 4,
        "learning_rate": 5e-4,
        "clip_grad_norm": None,
    }

    word: str = "<subject>"
    """As it is written in prompts; nothing that the model knows."""
    vectors: PositiveInt = 1
    initial: str | None = None
    """What it starts from, best the class: "dog". None: random vectors."""
    templates: Literal["object", "style"] | tuple[str, ...] = "object"
    """Sentences with {} for the word, or which of the known sets."""
    captions: bool = False
    """Whether pictures with a caption are shown under it (with {}, {token} or the word), not under the sentences."""
    retraction: bool = False
    """Whether the vectors keep the length that they started with, so that the word does not drown out others."""

    @field_validator("templates")
    @classmethod
    def _with_place(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not isinstance(value, str) and (not value or not all(has_place(text) for text in value)):
            raise ValueError("expected sentences that each have {} where the word belongs")
        return value

    @property
    def sentences(self) -> tuple[str, ...]:
        """The sentences themselves."""
        return TEMPLATES[self.templates] if isinstance(self.templates, str) else self.templates

    def build(self, pipe: Pipeline, pictures: Sequence[Picture], folder: Path) -> TextualInversionRecipe:
        base = self.networks(pipe)
        shown, held_out = self.shown(base, pictures, _ANY, self.captions)
        return TextualInversionRecipe(base, shown, self, held_out)


class TextualInversionRecipe(ShownRecipe[TextualInversionSettings]):
    """Recipe: the vectors of one new word.

    Args:
        base: the model, all of it frozen.
        shown: the pictures; their words are captions with the word or ``{}`` in its place, or ``{}`` alone.
        settings: see `TextualInversionSettings`.
        held_out: pictures that the error is measured on; None: none.

    Exported is ``learned_word.safetensors``.

    Raises:
        InputError: a word that the model knows already, or a caption without the word.
    """

    name = "textual_inversion"

    def __init__(
        self, base: BaseModel, shown: Shown, settings: TextualInversionSettings, held_out: Shown | None = None
    ) -> None:
        super().__init__(base, shown, settings, held_out=held_out)
        self.dataset_size: int | None = len(shown)
        for one in (shown, *([] if held_out is None else [held_out])):
            for picture, text in zip(one.pictures, one.prompts, strict=True):
                if not has_place(text) and settings.word not in text:
                    raise InputError(
                        f"The caption of {picture.name} has neither {settings.word} nor {{}} in its place: {text!r}."
                    )
        self.word = NewWord(base, settings.word, settings.vectors, settings.initial)

    def modules(self) -> dict[str, nn.Module]:
        return {"word": self.word}

    def fingerprint(self) -> str:
        return f"{self.settings.sentences} {super().fingerprint()}"

    def told(self, prompt: str) -> str:
        return with_word(prompt, self.settings.word)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the block, the model knows the word."""
        with self.word.known():
            yield

    def predict(self, noisy: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
        """What the network predicts under prompts with the word."""
        with self.attached():
            condition = self.base.condition(prompts, self.shown.size, grad=True)
        return self.base.predict(noisy, t, condition)

    def prompts(self, batch: ShownBatch, rng: StepRandom) -> tuple[str, ...]:
        """What each picture is shown under."""
        sentences, word = self.settings.sentences, self.settings.word
        drawn = rng.integers("sentence", 0, len(sentences)).tolist()
        texts = [sentences[k] if text == _ANY else text for k, text in zip(drawn, batch.prompts, strict=True)]
        return tuple(with_word(text, word) for text in texts)

    def loss(self, batch: Batch, step: int, rng: StepRandom) -> Losses:
        told = replace(batch[0], prompts=self.prompts(batch[0], rng))
        return subject_loss(self.objective, self.predict, told, None, rng)

    def after_step(self, step: int) -> None:
        """Hold the length of the vectors, where asked."""
        if self.settings.retraction:
            self.word.retract()

    def export(self, folder: Path) -> None:
        self.word.save(folder)

    def load(self, folder: Path) -> None:
        self.word.load(folder)
