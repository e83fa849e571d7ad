"""What the readers of both notations share: a place in a text, numbers, and errors that name the place."""

from __future__ import annotations

import re
from decimal import Decimal

from controlroom.controls.prompt_tree import MAX_WEIGHT
from controlroom.core.errors import InputError

MAX_DEPTH = 64
MAX_CHARACTERS = 20_000

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)")


class Source:
    """A text and how far it has been read."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_CHARACTERS:
            raise InputError(f"The prompt has {len(text)} characters; at most {MAX_CHARACTERS} are read. Shorten it.")
        self.text, self.at, self.depth = text, 0, 0

    @property
    def here(self) -> str:
        """The next character, or "" at the end."""
        return self.text[self.at : self.at + 1]

    def enter(self) -> None:
        """Go into a bracket.

        Raises:
            InputError: too many are open.
        """
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.problem(self.at, f"more than {MAX_DEPTH} brackets are open. Give the weight as a number.")

    def leave(self) -> None:
        """Come out of a bracket."""
        self.depth -= 1

    def problem(self, at: int, what: str) -> InputError:
        """The error for a place (from 0); the message counts characters from 1."""
        return InputError(f"The prompt cannot be read at character {at + 1} ({self.text[at : at + 24]!r}): {what}")

    def number(self, at: int, text: str, expected: str = "a weight. Write a number such as 1.2") -> float:
        """A number that stands at a place.

        Raises:
            InputError: it is none, or out of bounds.
        """
        if not text.isascii() or not _NUMBER.fullmatch(text):
            raise self.problem(at, f"{text!r} is not {expected}.")
        value = float(text)
        if abs(value) > MAX_WEIGHT:
            raise self.problem(at, f"numbers lie between -{MAX_WEIGHT:g} and {MAX_WEIGHT:g}, got {text[:24]}.")
        return value


def decimal(value: float) -> str:
    """A number as both notations can read it back exactly, without an exponent.

    Example:
        >>> decimal(1e-05), decimal(2.0)
        ('0.00001', '2.0')
    """
    return format(Decimal(repr(float(value))), "f")
