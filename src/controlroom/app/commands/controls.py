"""``controlroom controls``: what a run file may name, out of the catalogue."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Any

import typer

from controlroom.catalog import CONTROL_TYPES, SYSTEMS, System, control_class

_CONTROLS = "controlroom.controls."


def controls(
    name: Annotated[str | None, typer.Argument(help="Type of one control: prints its settings.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Also the systems that are no controls.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """List the controls: the type that a run file names, state, models, the setting that switches it off."""
    if name is not None:
        _print_settings(name, json)
        return
    rows = [row for system in SYSTEMS for row in _rows(system, every)]
    if json:
        typer.echo(json_module.dumps(rows, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("type", "name", "state", "models", "off by", "what it does"):
        table.add_column(column, overflow="fold", no_wrap=column in ("type", "state"))
    for row in rows:
        models = " ".join(row["backbones"])
        table.add_row(row["type"] or "–", row["name"], row["status"], models, row["neutral"] or "–", row["does"])
    console = Console()
    # A pipe has no width: whatever reads it gets whole lines.
    (console if console.is_terminal else Console(width=240)).print(table)


def _rows(system: System, every: bool) -> list[dict[str, Any]]:
    """One row for each control of a system; one without a type if it has none and every system is asked for."""
    facts = {
        "name": system.name,
        "status": system.status,
        "backbones": list(system.backbones),
        "neutral": system.neutral,
        "does": system.does,
        "papers": [paper.url for paper in system.papers if paper.url],
        "weights_licence": system.weights_licence,
    }
    own = [path for path in system.code if path.startswith(_CONTROLS)]
    types = [type_name for type_name, path in CONTROL_TYPES.items() if path in own]
    if types:
        return [{"type": type_name, "key": system.key, **facts} for type_name in types]
    return [{"type": None, "key": system.key, **facts}] if own or every else []


def _print_settings(name: str, json: bool) -> None:
    fields = control_class(name).model_fields
    settings = [
        {
            "name": field,
            "type": str(getattr(info.annotation, "__name__", info.annotation)).replace("typing.", ""),
            "required": info.is_required(),
            "default": None if info.is_required() else info.get_default(call_default_factory=True),
            "description": info.description,
        }
        for field, info in fields.items()
        if field != "type"
    ]
    if json:
        typer.echo(json_module.dumps({"type": name, "settings": settings}, ensure_ascii=False, default=str))
        return
    for one in settings:
        value = "required" if one["required"] else f"default {one['default']!r}"
        typer.echo(f"{one['name']}: {value}" + (f". {one['description']}" if one["description"] else ""))
