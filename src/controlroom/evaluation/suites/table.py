"""The suites by name: one explicit table, which loads nothing until a suite is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

from controlroom.core.errors import InputError

if TYPE_CHECKING:
    from controlroom.evaluation.suites.suite import Suite


@dataclass(frozen=True)
class Entry:
    """A suite of the table.

    Attributes:
        does: what it measures.
        n: cases unless said otherwise.
        module: where it is built, with the settings that it takes as ``Settings``.
        build: function in it.
    """

    does: str
    n: int
    module: str
    build: str = "build"


_HERE = "controlroom.evaluation.suites"
SUITES: dict[str, Entry] = {
    "attend_and_excite": Entry(
        "two-object captions without and with Attend-and-Excite", 250, f"{_HERE}.attend_and_excite"
    ),
    "prompt_to_prompt": Entry(
        "one colour word swapped, by Prompt-to-Prompt and by re-prompting", 200, f"{_HERE}.prompt_to_prompt"
    ),
    "captions": Entry("what pictures show of what their captions say", 500, f"{_HERE}.captions"),
    "two_objects": Entry("whether both objects of a caption are there", 250, f"{_HERE}.captions", "build_two_objects"),
    "retarget": Entry("one puppet in the pose of another picture", 300, f"{_HERE}.retarget"),
}


def open_suite(name: str, n: int | None = None, settings: Mapping[str, Any] | None = None) -> Suite[Any]:
    """A suite with its judges.

    Args:
        name: of the table.
        n: number of cases; None: the table's.
        settings: name -> value; see the suite's ``Settings``.

    Raises:
        InputError: an unknown suite or setting, or a value that does not fit.
        ModelError: weights that its judges need are not there.
    """
    entry = _entry(name)
    count = entry.n if n is None else n
    if count < 1:
        raise InputError(f"A suite has at least one case; got {count}.")
    module = import_module(entry.module)
    return getattr(module, entry.build)(module.Settings(**dict(settings or {})), count)


def settings_of(name: str) -> dict[str, Any]:
    """Setting -> default value of a suite.

    Raises:
        InputError: an unknown suite.
    """
    return import_module(_entry(name).module).Settings().model_dump()


def _entry(name: str) -> Entry:
    if name in SUITES:
        return SUITES[name]
    near = get_close_matches(name, SUITES, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise InputError(f"There is no suite {name[:80]!r}.{hint} There are: {', '.join(SUITES)}.")
