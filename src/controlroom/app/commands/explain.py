"""``controlroom explain``: what a run will do and cost, before it is run."""

from __future__ import annotations

import dataclasses
import itertools
import json as json_module
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from controlroom.sampling.explain import Explanation


def explain(
    run: Annotated[str, typer.Argument(help="YAML file of a run, a PNG of controlroom, or '-'.")],
    model: Annotated[str | None, typer.Option(help="Another model than the run names.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Print the branches, UNet rows and passes of each step, claims and warnings of a run; nothing is drawn."""
    from controlroom.app import runs

    spec = runs.changed(runs.read_run(run), {"model": model})
    found = runs.open_pipeline(spec.model).explain(spec)
    if json:
        data = dataclasses.asdict(found)
        totals = {"steps": len(found.rows), "unet_rows": sum(found.rows), "unet_passes": sum(found.passes)}
        typer.echo(json_module.dumps({"model": spec.model, **totals, **data}, ensure_ascii=False))
    else:
        typer.echo(f"{found}\nper step:\n" + "\n".join(per_step(found)))


def per_step(found: Explanation) -> list[str]:
    """Rows and passes of each step, a line for each stretch of steps that are alike."""
    lines, at = [], 0
    each = zip(found.rows, found.passes, found.energy_passes, strict=True)
    for (rows, passes, energies), group in itertools.groupby(each):
        count = len(list(group))
        steps = f"step {at}" if count == 1 else f"steps {at} to {at + count - 1}"
        gradient = f", at least {_counted(energies, 'pass')} with a gradient" if energies else ""
        lines.append(f"  {steps}: {_counted(rows, 'row')} in {_counted(passes, 'pass')}{gradient}")
        at += count
    return lines


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"
