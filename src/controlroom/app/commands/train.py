"""``controlroom train``: teach a model something, by any recipe."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="lora, dreambooth, textual_inversion, … Default: the file's.")
    ] = None,
    config: Annotated[str | None, typer.Option("--config", "-c", help="TOML file of the training.")] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="Folder of pictures.")] = None,
    model: Annotated[str | None, typer.Option(help="theatre, a folder, a hub id, or a .safetensors file.")] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder of the run; a run there is continued.")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="A setting: rank=8, train.total_steps=200; may be repeated.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and what it needs.")] = False,
    recipes: Annotated[bool, typer.Option("--list", help="Print the recipes.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Train by RECIPE; stop it with Ctrl-C and run it again to continue."""
    from controlroom.training.catalog import RECIPES

    if recipes:
        rows = [{"name": e.name, "summary": e.summary, "makes": e.makes} for e in RECIPES]
        if json:
            typer.echo(json_module.dumps(rows, ensure_ascii=False))
        else:
            wide = max(len(row["name"]) for row in rows)
            typer.echo("\n".join(f"{row['name']:{wide}}  {row['summary']} -> {row['makes']}" for row in rows))
        return

    from controlroom.app import runs
    from controlroom.tasks.train import plan_training
    from controlroom.training.memory import estimate_memory

    plan = plan_training(recipe, config, data, model, out, change or ())
    runs.quiet_libraries()
    if dry_run:
        estimate = estimate_memory(plan.prepare(rehearsal=True)[1], plan.loop)
        numbers = {name: getattr(estimate, name) for name in estimate.__dataclass_fields__} | {"total": estimate.total}
        if json:
            typer.echo(json_module.dumps(plan.resolved() | {"estimate": numbers}, ensure_ascii=False))
            return
        typer.echo(_as_toml(plan.resolved()))
        typer.echo(f"# parameters: {estimate.trained:,} train, {estimate.frozen:,} are frozen")
        parts = ("weights", "gradients", "optimizer", "average", "activations", "total")
        typer.echo("# memory: " + ", ".join(f"{name} {numbers[name] / 2**20:,.0f} MB" for name in parts))
        return
    result = plan.run()
    if json:
        facts = {"reason": result.reason, "step": result.step, "samples": result.samples, "losses": result.losses}
        typer.echo(json_module.dumps(facts | {"weights": str(result.weights), "makes": plan.entry.makes}))
    else:
        typer.echo(str(result.weights))


def _as_toml(data: dict[str, object]) -> str:
    """Plain data with one level of tables, and tables in them, as TOML."""
    lines, tables = [], []
    for key, value in data.items():
        if isinstance(value, dict):
            tables.append((key, value))
        else:
            lines.append(f"{key} = {_value(value)}")
    for name, table in tables:
        lines += ["", f"[{name}]", *(f"{key} = {_value(value)}" for key, value in table.items())]
    return "\n".join(lines)


def _value(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_value(one)}" for key, one in value.items()) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(one) for one in value)}]"
    return json_module.dumps(value, ensure_ascii=False)
