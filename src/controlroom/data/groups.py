"""Pictures of several subjects: where each is, what it is called, and a picture of it elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from controlroom.core.errors import InputError
from controlroom.data.pictures import Picture, fingerprint

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, from 0 to 1 of the picture."""


@dataclass(frozen=True)
class PlacedSubject:
    """One of the subjects of a picture.

    Attributes:
        word: what it is called.
        box: where it is.
        picture: of it alone, in another scene: a crop of the target would be copied, not understood.
        read_mask: where it is seen (mode L, white is the subject), of the size of the picture that it is one of the
            subjects of; None: in its box.

    Raises:
        InputError: no word; a box that has no area or leaves the picture.
    """

    word: str
    box: Box
    picture: Picture
    read_mask: Callable[[], Image.Image] | None = None

    def __post_init__(self) -> None:
        left, top, right, bottom = self.box
        if not self.word.strip() or not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise InputError(
                f"A subject is called {self.word!r} and has the box {self.box}; expected a word, and left < right and "
                "top < bottom from 0 to 1 of the picture."
            )


@dataclass(frozen=True)
class Group:
    """A picture (with its caption) and the subjects in it."""

    picture: Picture
    subjects: tuple[PlacedSubject, ...]

    def __post_init__(self) -> None:
        if not self.subjects:
            raise InputError(f"{self.picture.name} names no subject. Leave it out, or say who is in it.")


def groups_fingerprint(groups: Sequence[Group]) -> str:
    """SHA-256 over pictures, words and boxes, in order."""
    pictures = [picture for group in groups for picture in (group.picture, *(s.picture for s in group.subjects))]
    told = [(subject.word, subject.box) for group in groups for subject in group.subjects]
    sizes = [len(group.subjects) for group in groups]
    return hashlib.sha256(f"{fingerprint(pictures)} {told!r} {sizes}".encode()).hexdigest()
