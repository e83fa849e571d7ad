"""A loss or gradient that is not finite: which samples made it, told to the reader and to a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from controlroom.core.errors import ControlRoomError
from controlroom.core.files import write_text_atomically
from controlroom.training.checkpoint import checkpoints
from controlroom.training.randomness import DataOrder
from controlroom.training.recipe import Named, Recipe

_SHOWN = 8


class DivergedError(ControlRoomError):
    """A loss or gradient that is not finite. The step was not taken; the last checkpoint is good.

    `indices` are the samples that went into it. The folder of the run holds them as `diverged-step-N.json`.
    """

    def __init__(self, text: str, indices: Sequence[int] = ()) -> None:
        super().__init__(text)
        self.indices = tuple(indices)

    def __reduce__(self) -> tuple[type[DivergedError], tuple[str, tuple[int, ...]]]:
        return type(self), (str(self), self.indices)  # it travels between processes


def refuse_step(
    what: str, value: float, step: int, slots: Sequence[range], order: DataOrder, recipe: Recipe[Any], folder: Path
) -> None:
    """Write `diverged-step-N.json` and raise DivergedError, which says the same.

    `slots` are those of every part of the batch that is not finite; of a gradient, which is one of the whole step,
    all. The recipe names the samples if it can (`Named`).
    """
    every = [slot for part in slots for slot in part]
    indices = order.indices(every)
    names = [str(name) for name in recipe.names(indices)] if isinstance(recipe, Named) else None
    kept = checkpoints(folder)
    record = {
        "what": what,
        "value": repr(value),  # JSON has no word for it
        "step": step,
        "slots": every,
        "indices": indices,
        "names": names,
        "recipe": recipe.name,
        "checkpoint": str(kept[-1]) if kept else None,
    }
    path = folder / f"diverged-step-{step:08d}.json"
    write_text_atomically(path, json.dumps(record, indent=1, ensure_ascii=False))
    places = " and ".join(f"{part[0]} to {part[-1]}" for part in slots)
    shown = names if names is not None else indices
    listed = f"[{', '.join(str(one) for one in shown[:_SHOWN])}{', ...' if len(shown) > _SHOWN else ''}]"
    last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
    raise DivergedError(
        f"The {what} is {value} at step {step} (slots {places}, data {listed}; all in {path}). The step was not taken "
        f"and nothing was saved; {last}. Look at these samples, lower the learning rate, or train in float32.",
        indices,
    )
