"""The catalogue: one entry for each system of the project, and the table of control types that a run file may name.

Ordinary data: nothing here imports a control. The command line, the studio, the pages in ``docs/`` and the contract
tests all read it. `load` turns a dotted path of it (``module:Name``) into the object, when it is asked for.

When a control lands: set its `status`, its `code` and `proof`, and add its line to `CONTROL_TYPES`; when its effect is
measured, write the numbers into `effect`, with n and the interval.
"""

from __future__ import annotations

from controlroom.catalog import editing, models, person, personal, structure
from controlroom.catalog.control_types import CONTROL_TYPES as CONTROL_TYPES
from controlroom.catalog.control_types import control_class as control_class
from controlroom.catalog.control_types import load as load
from controlroom.catalog.control_types import shown, suggestion
from controlroom.catalog.entry import Paper as Paper
from controlroom.catalog.entry import System as System
from controlroom.core.errors import InputError

_LISTED = 53
_ENTRIES = sorted(
    (*person.ENTRIES, *structure.ENTRIES, *editing.ENTRIES, *personal.ENTRIES, *models.ENTRIES),
    key=lambda entry: entry.number,
)
SYSTEMS: tuple[System, ...] = tuple(entry for entry in _ENTRIES if entry.number <= _LISTED)
"""The systems of the project's list, in its order."""
FURTHER: tuple[System, ...] = tuple(entry for entry in _ENTRIES if entry.number > _LISTED)
"""Controls beside the project's systems, listed with them where controls are listed."""


def system(key: str) -> System:
    """Return the entry of the catalogue with this key.

    Raises:
        InputError: there is none; the message lists the nearest ones.

    >>> system("ddpm").papers[0].url
    'https://arxiv.org/abs/2006.11239'
    """
    by_key = {entry.key: entry for entry in (*SYSTEMS, *FURTHER)}
    if key not in by_key:
        raise InputError(f"Unknown system {shown(key)}. {suggestion(key, by_key)}")
    return by_key[key]
