"""The notations of prompts: text to tree and back, in the dialect that is asked for, never a mixture.

``a1111``: the notation of AUTOMATIC1111's web UI and its successors. ``compel``: that of the library Compel.
"""

from __future__ import annotations

from typing import Literal

from controlroom.controls import notation_a1111, notation_compel
from controlroom.controls.prompt_tree import Prompt

Dialect = Literal["a1111", "compel"]


def parse(text: str, dialect: Dialect) -> Prompt:
    """Read a prompt.

    Raises:
        InputError: brackets that do not match, numbers that are none; the message names the position.

    Example:
        >>> parse("a (red:1.5) cat", "a1111") == parse("a (red)1.5 cat", "compel")
        True
    """
    return notation_a1111.read(text) if dialect == "a1111" else notation_compel.read(text)


def write(prompt: Prompt, dialect: Dialect) -> str:
    """Write a tree so that `parse` gives it back.

    Raises:
        InputError: something that the dialect has no notation for.

    Example:
        >>> write(parse("a [red] ((cat))", "a1111"), "compel")
        'a (red)0.9090909090909091 ((cat)1.1)1.1'
    """
    return notation_a1111.write(prompt) if dialect == "a1111" else notation_compel.write(prompt)
