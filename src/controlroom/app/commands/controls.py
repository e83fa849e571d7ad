"""``controlroom controls``: what a run file may name, out of the catalogue."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Any

import typer

from controlroom.catalog import CONTROL_TYPES, FURTHER, SYSTEMS, System, control_class
from controlroom.catalog.entry import NO_WEIGHTS
from controlroom.catalog.pairs import combines, not_beside

_CONTROLS = "controlroom.controls."
_COLUMNS = ("type", "name", "state", "paper", "models", "needs", "not with", "off by", "what it does")
_NARROW = ("models", "needs", "not with", "off by")


def controls(
    name: Annotated[str | None, typer.Argument(help="Type of one control: prints its settings.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Also the systems that are no controls.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """List the controls: type in a run file, state, paper, models, what it needs, what it cannot stand beside."""
    if name is not None:
        _print_settings(name, json)
        return
    rows = [row for system in (*SYSTEMS, *FURTHER) for row in _rows(system, every)]
    if json:
        typer.echo(json_module.dumps(rows, ensure_ascii=False))
        return
    cells = [
        (
            row["type"] or "–",
            row["name"],
            row["status"],
            " ".join(paper.rpartition("/")[2] for paper in row["papers"]) or "–",
            " ".join(row["backbones"]),
            " ".join(row["needs"]) or "–",
            " ".join(row["not_with"]) or "–",
            row["neutral"] or "–",
            row["does"],
        )
        for row in rows
    ]
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        # What reads a pipe wants a line for each control, however long.
        typer.echo("\n".join("\t".join(line) for line in (_COLUMNS, *cells)))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    shown = [i for i, column in enumerate(_COLUMNS) if console.width >= 200 or column not in _NARROW]
    for i in shown:
        table.add_column(_COLUMNS[i], overflow="fold", no_wrap=_COLUMNS[i] in ("type", "state"))
    for line in cells:
        table.add_row(*(line[i] for i in shown))
    console.print(table)


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
        "needs": [*system.signals, *(["weights"] if system.weights_licence != NO_WEIGHTS else [])],
    }
    own = {path for path in system.code if path.startswith(_CONTROLS)}
    types = [type_name for type_name, path in CONTROL_TYPES.items() if path in own and _home(type_name) is system]
    if types:
        return [
            {"type": type_name, "key": system.key, **facts, "not_with": not_beside(type_name)} for type_name in types
        ]
    shared = own & set(CONTROL_TYPES.values())  # uses a control that is listed under its own name
    return [{"type": None, "key": system.key, **facts, "not_with": {}}] if (own and not shared) or every else []


def _home(type_name: str) -> System | None:
    """The system that a control belongs to, where several use it: the one of its name, or the first."""
    users = [system for system in (*SYSTEMS, *FURTHER) if CONTROL_TYPES[type_name] in system.code]
    return next((system for system in users if system.key == type_name), users[0] if users else None)


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
    home = _home(name)
    about = next((row for row in _rows(home, False) if row["type"] == name), {}) if home else {}
    if json:
        typer.echo(json_module.dumps({"type": name, **about, "settings": settings}, ensure_ascii=False, default=str))
        return
    if about:
        typer.echo(f"{about['name']}: {about['does']}")
        typer.echo(f"paper: {' '.join(about['papers']) or 'none'}")
        typer.echo(f"needs: {', '.join(about['needs']) or 'nothing'} (public weights: {about['weights_licence']})")
        typer.echo(f"off by: {about['neutral'] or 'leaving it out'}")
        typer.echo(f"combines with: {combines(name)}\n")
    for one in settings:
        value = "required" if one["required"] else f"default {one['default']!r}"
        typer.echo(f"{one['name']}: {value}" + (f". {one['description']}" if one["description"] else ""))
