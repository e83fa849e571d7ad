"""What can be asked of things in a picture, each named by words of the prompt: edits, and the goals they come to.

An edit is what a person writes; a goal is one term of an energy: a quantity of one thing, and what it should be.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from controlroom.backbones.words import PromptTokens
from controlroom.core.control import Settings
from controlroom.core.errors import InputError

Words = str | list[str]
Quantity = Literal["centroid", "size", "shape", "appearance"]
Share = Annotated[float, Field(ge=0, le=1)]
Shift = Annotated[float, Field(ge=-1, le=1)]
Factor = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Goal:
    """One term of the energy of one picture.

    Attributes:
        quantity: of the thing: its centre, the share of the picture it covers, its outline, its look.
        weight: of the term.
        places: tokens of the thing in the prompt; its map is the mean of theirs.
        original: tokens of the thing that it is compared with, in the prompt of the original picture.
        to: what the quantity should be; empty: what it is in the original picture, changed by:
        by: a shift, in shares of width and height;
        factor: a factor on the size.
    """

    quantity: Quantity
    weight: float
    places: tuple[int, ...] = ()
    original: tuple[int, ...] = ()
    to: tuple[float, ...] = ()
    by: tuple[float, float] = (0.0, 0.0)
    factor: float = 1.0

    @property
    def relative(self) -> bool:
        """Whether it compares with the original picture."""
        return not self.to


class ObjectEdit(Settings):
    """What edits have in common: things named by words.

    A phrase is one thing, and so are all its occurrences; a list names several, each of which is asked for the same.
    ``source_words`` names them in the prompt of the original picture where it has other words for them.
    """

    @field_validator("words", "source_words", check_fields=False)
    @classmethod
    def _something(cls, value: Words | None) -> Words | None:
        if value is not None and (not value or any(not item.strip() for item in listed(value))):
            raise ValueError("an empty text or list")
        return value

    @field_validator("source_words", check_fields=False)
    @classmethod
    def _as_many(cls, value: Words | None, info: ValidationInfo) -> Words | None:
        if value is not None and len(listed(value)) != len(listed(info.data.get("words") or [])):
            raise ValueError("as many words as source_words are needed")
        return value

    @model_serializer(mode="wrap")
    def _named(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Also where what is left at its default is not written: reading tells edits apart by it.
        return {"type": type(self).model_fields["type"].default, **handler(self)}

    @property
    def moves(self) -> bool:
        """Whether things are to be elsewhere or larger than in the original picture, so that the rest is held."""
        return False


class Move(ObjectEdit):
    """Bring the centre of a thing elsewhere.

    Args:
        words: the thing.
        by: shift from where it is in the original picture: x to the right and y down, in shares of the picture.
        to: instead, where: x and y, (0, 0) being the upper left corner and (1, 1) the lower right.
        weight: of the energy.
        source_words: the thing in the prompt of the original picture, where that has other words.
    """

    type: Literal["move"] = Field(default="move", kw_only=True)
    words: Words
    by: tuple[Shift, Shift] | None = None
    to: tuple[Share, Share] | None = None
    weight: float = Field(default=1.0, ge=0)
    source_words: Words | None = None

    @model_validator(mode="after")
    def _where(self) -> Move:
        if (self.by is None) == (self.to is None):
            raise ValueError("say where to, either by=(0.2, 0.0) or to=(0.5, 0.5)")
        return self

    @property
    def moves(self) -> bool:
        """Yes."""
        return True

    @property
    def goal(self) -> Goal:
        """Its centre."""
        return Goal("centroid", self.weight, to=self.to or (), by=self.by or (0.0, 0.0))


class Resize(ObjectEdit):
    """Make a thing larger or smaller.

    Args:
        words: the thing.
        by: factor on the area that it covers in the original picture.
        to: instead, the share of the picture that it should cover.
        weight: of the energy.
        source_words: the thing in the prompt of the original picture, where that has other words.
    """

    type: Literal["resize"] = Field(default="resize", kw_only=True)
    words: Words
    by: Factor | None = None
    to: Annotated[float, Field(gt=0, lt=1)] | None = None
    weight: float = Field(default=1.0, ge=0)
    source_words: Words | None = None

    @model_validator(mode="after")
    def _how(self) -> Resize:
        if (self.by is None) == (self.to is None):
            raise ValueError("say how large, either by=1.5 or to=0.3")
        return self

    @property
    def moves(self) -> bool:
        """Yes."""
        return True

    @property
    def goal(self) -> Goal:
        """The share it covers."""
        return Goal("size", self.weight, to=() if self.to is None else (self.to,), factor=self.by or 1.0)


class KeepShape(ObjectEdit):
    """Give a thing the outline that it has in the original picture; moved and resized as a whole, if asked.

    Args:
        words: the thing.
        by: shift in x and y, in shares of the picture.
        factor: on its width and height.
        weight: of the energy.
        source_words: the thing in the prompt of the original picture, where that has other words.
    """

    type: Literal["keep_shape"] = Field(default="keep_shape", kw_only=True)
    words: Words
    by: tuple[Shift, Shift] = (0.0, 0.0)
    factor: Factor = 1.0
    weight: float = Field(default=1.0, ge=0)
    source_words: Words | None = None

    @property
    def moves(self) -> bool:
        """If it is moved or resized."""
        return self.by != (0.0, 0.0) or self.factor != 1.0

    @property
    def goal(self) -> Goal:
        """Its outline."""
        return Goal("shape", self.weight, by=self.by, factor=self.factor)


class KeepAppearance(ObjectEdit):
    """Give a thing the look that it has in the original picture.

    Args:
        words: the thing.
        weight: of the energy.
        source_words: the thing in the prompt of the original picture, where that has other words.
    """

    type: Literal["keep_appearance"] = Field(default="keep_appearance", kw_only=True)
    words: Words
    weight: float = Field(default=0.1, ge=0)
    source_words: Words | None = None

    @property
    def goal(self) -> Goal:
        """Its look."""
        return Goal("appearance", self.weight)


class CopyLayout(ObjectEdit):
    """Give all things the outlines that they have in the original picture; what they look like is free.

    Args:
        words: the things; None: every word that both prompts have.
        weight: of the energy.
        source_words: the things in the prompt of the original picture, where that has other words.
    """

    type: Literal["copy_layout"] = Field(default="copy_layout", kw_only=True)
    words: Words | None = None
    weight: float = Field(default=1.0, ge=0)
    source_words: Words | None = None

    @property
    def goal(self) -> Goal:
        """Their outlines."""
        return Goal("shape", self.weight)


class CopyAppearance(ObjectEdit):
    """Give all things the look that they have in the original picture; where they are is free.

    Args:
        words: the things; None: every word that both prompts have.
        weight: of the energy.
        source_words: the things in the prompt of the original picture, where that has other words.
    """

    type: Literal["copy_appearance"] = Field(default="copy_appearance", kw_only=True)
    words: Words | None = None
    weight: float = Field(default=0.1, ge=0)
    source_words: Words | None = None

    @property
    def goal(self) -> Goal:
        """Their look."""
        return Goal("appearance", self.weight)


Edit = Move | Resize | KeepShape | KeepAppearance | CopyLayout | CopyAppearance


def listed(words: Words) -> list[str]:
    """A phrase, or a list of them, as a list."""
    return [words] if isinstance(words, str) else words


def pairs(edit: Edit, prompt: PromptTokens, original: PromptTokens) -> list[tuple[str, str]]:
    """Each thing's words in the prompt and in that of the original; without ``words`` all that both have."""
    if edit.words is None:
        return [(word, word) for word in dict.fromkeys(word for word, _ in prompt.words) if word in original]
    words = listed(edit.words)
    return list(zip(words, words if edit.source_words is None else listed(edit.source_words), strict=True))


def goals(edit: Edit, prompt: PromptTokens, original: PromptTokens) -> list[Goal]:
    """The goals that an edit comes to in one picture, of things that are in it; they share the weight."""
    found = []
    for word, source in pairs(edit, prompt, original):
        goal = replace(edit.goal, places=places(prompt, word), original=places(original, source))
        if goal.places and (goal.original or not goal.relative):
            found.append(goal)
    return shared(found)


def shared(found: list[Goal]) -> list[Goal]:
    """Goals whose weights are divided by their number, so that together they are a mean."""
    return [replace(goal, weight=goal.weight / len(found)) for goal in found]


def places(prompt: PromptTokens, word: str) -> tuple[int, ...]:
    """Token positions of all occurrences of a word or phrase; none where it is not in the prompt."""
    return tuple(place for occurrence in prompt.find(word) for place in occurrence) if word in prompt else ()


def check_words(edit: Edit, pictures: list[tuple[PromptTokens, PromptTokens]], label: str) -> None:
    """Every thing of an edit must be in the prompts of some picture.

    Args:
        edit: the edit.
        pictures: prompt of each picture, and that of the original beside it.
        label: of the control.

    Raises:
        InputError: a word is in none; it is named. Or the prompts have no word in common.
    """
    if edit.words is None:
        if not any(pairs(edit, prompt, original) for prompt, original in pictures):
            prompt, original = pictures[0]
            raise InputError(f"{label}: the prompts {prompt.text!r} and {original.text!r} have no word in common.")
        return
    for word, source in pairs(edit, *pictures[0]):
        if any(word in prompt and (source in original or not edit.goal.relative) for prompt, original in pictures):
            continue
        pictures[0][0].find(word)
        pictures[0][1].find(source)
        raise InputError(f"{label}: no picture has {word!r} in its prompt and {source!r} in that of its original.")
