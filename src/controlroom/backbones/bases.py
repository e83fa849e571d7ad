"""The base models that files are made for, told by the width of the words that their layers read."""

from __future__ import annotations

SD1, SD2, XL = "Stable Diffusion 1", "Stable Diffusion 2", "Stable Diffusion XL"
BASES = {768: SD1, 1024: SD2, 2048: XL}
"""Width of the states of words -> who has it."""


def base_of(width: int | None) -> str:
    """The model whose words are that wide; "" where the width is not known.

    >>> base_of(2048), base_of(32)
    ('Stable Diffusion XL', 'a model with words 32 wide')
    """
    return "" if width is None else BASES.get(width, f"a model with words {width} wide")
