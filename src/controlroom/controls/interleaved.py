"""Prompts with pictures between their words: what controls of multimodal language models share."""

from __future__ import annotations

from typing import Any, TypeVar

from controlroom.backbones.multimodal import PICTURE
from controlroom.backbones.words import PlacedPrompt, PromptTokens, prompt_tokens
from controlroom.core.control import Texts
from controlroom.core.errors import InputError


class SaidPrompt(PlacedPrompt):
    """The words of a prompt with pictures between them; to the text encoder it is the words alone.

    Attributes:
        said: the words, with `PICTURE` where a picture stands.
    """

    said: str

    def tokens(self, tokenizer: Any) -> PromptTokens:
        """Where its words are, as the text encoder reads them."""
        return prompt_tokens(tokenizer, str(self))


PromptT = TypeVar("PromptT", bound=SaidPrompt)


def said_as(kind: type[PromptT], said: str) -> PromptT:
    """A prompt out of words with `PICTURE`."""
    found = kind(words_of(said))
    found.said = said
    return found


def said_prompts(
    label: str, texts: Texts, images: Any, kind: type[SaidPrompt], always: bool = False
) -> tuple[str, ...]:
    """The prompts with places for the pictures: where they have none, the pictures stand before the words.

    Args:
        label: of the control, for messages.
        texts: what the user wrote.
        images: what the control was given.
        kind: class of what is made; prompts without pictures stay as they are.
        always: whether the control reads prompts without pictures too.

    Raises:
        InputError: another number of pictures than of places, or pictures with a prompt that is not text.
    """
    counts = picture_counts(images)
    reads = always or any(counts)
    if reads and ("prompt" in texts.embeds or "prompt" in texts.seconds):
        raise InputError(f"{label} reads the prompt itself. Give it as text, and no prompt_2.")
    if reads and "negative_prompt" in texts.embeds:
        raise InputError(f"{label} reads the negative prompt too. Give it as text.")
    share = max(1, len(texts.prompts) // len(counts))
    rows = [counts[min(i // share, len(counts) - 1)] for i in range(len(texts.prompts))]
    return tuple(_said(label, text, count, kind) for text, count in zip(texts.prompts, rows, strict=True))


def _said(label: str, prompt: str, pictures: int, kind: type[SaidPrompt]) -> str:
    # What another control has read stays as it is: the two are a conflict that is found later.
    if type(prompt) is not str:
        return prompt
    places = prompt.count(PICTURE)
    if places not in (0, pictures):
        raise InputError(
            f"{label}: the prompt {prompt!r:.80} has {places} times {PICTURE}, and there are {pictures} pictures. Give "
            "one for each."
        )
    if not pictures:
        return prompt
    return said_as(kind, prompt if places else f"{PICTURE} " * pictures + prompt)


def said(prompt: str) -> str:
    """A prompt with its pictures, if it has any."""
    return prompt.said if isinstance(prompt, SaidPrompt) else str(prompt)


def words_of(text: str) -> str:
    """The text without its pictures; one without any stays as it is."""
    return " ".join(text.replace(PICTURE, " ").split()) if type(text) is str and PICTURE in text else text


def picture_counts(images: Any) -> list[int]:
    """Pictures of each list; one list for all prompts, or one for each."""
    if images is None:
        return [0]
    if isinstance(images, list | tuple) and any(isinstance(item, list | tuple) for item in images):
        return [_number_of(item) for item in images]
    return [_number_of(images)]


def _number_of(images: Any) -> int:
    shape = getattr(images, "shape", None)
    if shape is not None and len(shape) == 4:
        return int(shape[0])
    return len(images) if isinstance(images, list | tuple) else 1
