"""A set of training pictures: what every dataset on disk, and the theatre, is read into.

Nothing is decoded until a picture is asked for. ``content`` names the bytes, so caches and resumed runs know whether
a picture is the same one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from PIL import Image


@dataclass(frozen=True)
class Picture:
    """One training picture.

    Attributes:
        name: unique in its set, for messages; a path relative to the folder, where there is one.
        content: hash of the picture's bytes (or, if it is drawn, of what it is drawn from), with its mask's.
        size: (width, height) in pixels, upright.
        read: decodes it, RGB; raises InputError if it cannot.
        caption: what it shows; "" if nobody said.
        read_mask: decodes its mask (mode L, white counts), of the picture's size; None: everything counts.
        repeats: how often an epoch shows it.
        subject: who or what it shows, where pictures of a set show several (LFW's people); "" otherwise.
    """

    name: str
    content: str
    size: tuple[int, int]
    read: Callable[[], Image.Image]
    caption: str = ""
    read_mask: Callable[[], Image.Image] | None = None
    repeats: int = 1
    subject: str = ""


@dataclass(frozen=True)
class ConditionedPicture(Picture):
    """A picture with what is to be drawn along: edges, depth, a pose.

    Attributes:
        condition: of the same shape, maybe smaller; its bytes count in ``content`` as well.
    """

    condition: Picture = field(kw_only=True)


def fingerprint(pictures: Sequence[Picture]) -> str:
    """SHA-256 over what a set holds: contents, captions and repeats, in order."""
    lines = (f"{p.content} {p.repeats} {p.subject!r} {p.caption!r}" for p in pictures)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def by_subject(pictures: Sequence[Picture]) -> dict[str, tuple[Picture, ...]]:
    """Pictures of each subject, in order."""
    found: dict[str, list[Picture]] = {}
    for picture in pictures:
        found.setdefault(picture.subject, []).append(picture)
    return {subject: tuple(its) for subject, its in found.items()}
