"""Subjects: a person, animal or thing, a few pictures of it, and prompts that put it elsewhere.

What DreamBench, CustomConcept101 and the theatre's own benchmark are read into. Captions and prompts hold `TOKEN` where
the subject's words go: "a {token} on the beach" becomes "a sks dog on the beach", "a <anna> on the beach", or, for the
class, "a dog on the beach".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from controlroom.core.errors import InputError
from controlroom.data.pictures import Picture

TOKEN = "{token}"
"""Stands for the subject's words in captions and prompts."""


@dataclass(frozen=True)
class Subject:
    """Someone or something to learn, and what to ask for afterwards.

    Attributes:
        name: unique in its set.
        class_words: what it is an instance of: "dog".
        pictures: of it; their captions hold `TOKEN`.
        prompts: hold `TOKEN`.
        live: a person or an animal.
    """

    name: str
    class_words: str
    pictures: tuple[Picture, ...]
    prompts: tuple[str, ...]
    live: bool = False


def named(text: str, words: str) -> str:
    """A caption or prompt with the subject's words in their place.

    Raises:
        InputError: no words.
    """
    if not words.strip():
        raise InputError("A subject needs words, such as 'sks dog' or '<anna>'; got none.")
    return text.replace(TOKEN, words.strip())


def with_words(pictures: Sequence[Picture], words: str | Mapping[str, str]) -> tuple[Picture, ...]:
    """Pictures with the words in their captions.

    Args:
        pictures: whose captions hold `TOKEN`; others stay.
        words: of all, or of each subject by its name.

    Raises:
        InputError: no words for a subject.
    """

    def of(picture: Picture) -> str:
        if isinstance(words, str):
            return words
        if picture.subject not in words:
            raise InputError(f"There are no words for the subject {picture.subject!r} of {picture.name!r}.")
        return words[picture.subject]

    return tuple(
        replace(picture, caption=named(picture.caption, of(picture))) if TOKEN in picture.caption else picture
        for picture in pictures
    )
