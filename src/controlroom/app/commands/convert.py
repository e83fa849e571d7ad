"""``controlroom convert``: pickles to safetensors, LoRAs between dialects, single files to folders."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from controlroom.core.errors import InputError

_DIALECTS = ("diffusers", "kohya", "peft")


def convert(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A .bin, .pt, .pth, .ckpt or .safetensors file, or a folder.")
    ],
    out: Annotated[
        str,
        typer.Option(
            "--out", "-o", help=".safetensors file to write; or a folder, for a ControlNet, a whole model, and PEFT."
        ),
    ],
    to: Annotated[str | None, typer.Option(help="Dialect of a LoRA: diffusers, kohya, peft. Default: its own.")] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Folder of the base model, where shapes do not tell its configuration; or theatre."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Convert a file of weights. Pickles are opened here alone: as weights, in a process without network."""
    from controlroom.app import runs
    from controlroom.app.commands.inspect import as_data, usable
    from controlroom.backbones import convert as conversion

    if to is not None and to not in _DIALECTS:
        raise InputError(f"--to is {to!r}; it can be {', '.join(_DIALECTS)}.")
    if "\0" in file + out:
        raise InputError("A path has no null character. Give another one.")
    runs.quiet_libraries()
    done = conversion.convert(Path(file), Path(out), to, base)  # type: ignore[arg-type]
    if json:
        kind = None if done.kind is None else as_data(done.kind)
        data = {"files": [str(path) for path in done.files], "from": kind, "notes": list(done.notes)}
        typer.echo(json_module.dumps(data, ensure_ascii=False))
        return
    for path in done.files:
        typer.echo(str(path))
    console = runs.notes()
    for note in done.notes:
        console.print(f"note: {note}", markup=False)
    if done.kind is not None:
        name = done.kind.name + (f", for {done.kind.base}" if done.kind.base else "")
        console.print(f"it was: {name}; {done.kind.account}", markup=False)
        if usable(done.kind):
            line = done.kind.use.replace(repr(file), repr(str(done.files[0])))
            console.print(f"use: {line}", markup=False)
