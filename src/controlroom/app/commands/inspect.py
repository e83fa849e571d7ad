"""``controlroom inspect``: what a file of weights is, for which model, and which control takes it."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from controlroom.backbones.adapter_files import AdapterKind


def inspect(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="A .safetensors file, a folder, a theatre name or a downloaded hub id."),
    ],
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Print what a file is, told from its keys: kind, base model, keys counted, metadata, and the control for it."""
    from controlroom.backbones.adapter_files import recognise
    from controlroom.backbones.loading import THEATRE, find_model, theatre_folder

    place = theatre_folder() if file == THEATRE and not Path(file).exists() else find_model(file, "file")
    found = recognise(place, file)
    typer.echo(json_module.dumps(as_data(found), ensure_ascii=False) if json else "\n".join(lines(found)))


def usable(found: AdapterKind) -> bool:
    """Whether this version has the control or class that takes the file."""
    import controlroom

    return bool(found.control) and hasattr(controlroom, found.control)


def as_data(found: AdapterKind) -> dict[str, object]:
    """What was found, for ``--json``."""
    return {
        "file": found.header.what,
        "kind": found.kind,
        "name": found.name,
        "base": found.base or None,
        "keys": found.keys,
        "groups": dict(found.groups),
        "parameters": found.header.parameters,
        "dtypes": dict(found.header.dtypes),
        "notes": list(found.notes),
        "metadata": dict(found.header.metadata),
        "use": found.use if usable(found) else None,
    }


def lines(found: AdapterKind) -> list[str]:
    """What was found, for people."""
    header = found.header
    kinds = ", ".join(f"{kind}" if len(header.dtypes) == 1 else f"{n} in {kind}" for kind, n in header.dtypes.items())
    told = [
        f"{header.what}: {found.name}"
        + (f", for {found.base}" if found.base else "; its shapes do not tell the model"),
        f"  {found.account}",
        f"  {header.parameters:,} numbers in {found.keys} tensors ({kinds})",
    ]
    told += [f"  {note}" for note in found.notes]
    told += [f"  metadata {key}: {_cut(text)}" for key, text in header.metadata.items()]
    takes = f"use: {found.use}" if usable(found) else "no control of this version takes it"
    return [*told, f"  {takes}"]


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 80 else line[:79] + "…"
