"""Errors on pictures that are not learned from: the same ones every time, a few at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from controlroom.core.errors import InputError
from controlroom.training.recipe import HoldsOut, Recipe, Validates

ROWS = 8
"""Pictures that are measured at once."""

Item = TypeVar("Item")


def spread_over(items: Sequence[Item], most: int) -> list[Item]:
    """As many of the items at most, from all over the sequence, in order."""
    count = min(most, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def in_parts(items: Sequence[Item]) -> list[Sequence[Item]]:
    """The items, a few at a time."""
    return [items[i : i + ROWS] for i in range(0, len(items), ROWS)]


def mean_over(parts: Iterable[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Named means of several batches, each with its number of pictures -> those of all pictures; {} of no batch."""
    total, sums = 0, dict[str, float]()
    for rows, values in parts:
        total += rows
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + rows * value
    return {name: value / total for name, value in sums.items()}


def check_measures_itself(recipe: Recipe[Any], validate_every: int | None) -> None:
    """Raise InputError where validations are asked for and there would be none."""
    if validate_every is None:
        return
    asked = f"validate_every is {validate_every}, but recipe {recipe.name!r}"
    if not isinstance(recipe, Validates):
        raise InputError(f"{asked} cannot measure itself. Leave validate_every out.")
    if isinstance(recipe, HoldsOut) and not recipe.has_held_out:
        raise nothing_held_out(recipe.name, validate_every)


def nothing_held_out(recipe: str, validate_every: int) -> InputError:
    """The error of a recipe that is asked for validations and was given nothing for them."""
    return InputError(
        f"validate_every is {validate_every}, but recipe {recipe!r} was given nothing to measure itself on. Give its "
        "setting validation (a folder like that of the training), or held-out data from Python, or leave "
        "validate_every out."
    )
