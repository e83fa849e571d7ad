"""``controlroom plan``: a prompt split into regions, as the file of a run."""

from __future__ import annotations

from typing import Annotated

import typer


def plan(
    prompt: Annotated[str, typer.Argument(help="A sentence that names two or more things.")],
    base_ratio: Annotated[
        float, typer.Option(min=0, max=1, help="How much the whole prompt counts in a region.")
    ] = 0.5,
    text_model: Annotated[
        str | None, typer.Option(help="Folder of a chat model that plans instead of rules.", show_default=False)
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(help="OpenAI-compatible service that plans, e.g. http://localhost:8000/v1.", show_default=False),
    ] = None,
    endpoint_model: Annotated[str, typer.Option(help="What the service calls its model.")] = "default",
    retries: Annotated[int, typer.Option(min=0, max=20, help="How often a model is asked again.")] = 3,
    model: Annotated[str | None, typer.Option(help="Model of the run. Default: theatre.", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the run.", show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the run as JSON, which is read as YAML is.")] = False,
) -> None:
    """Split a prompt into regions and print the run that draws them: `plan … | generate --config -`."""
    from controlroom.app import runs
    from controlroom.tasks.plan_regions import PlannerSettings, plan_regions

    if text_model is not None:
        runs.quiet_libraries()
    chosen = PlannerSettings(text_model=text_model, endpoint=endpoint, endpoint_model=endpoint_model, retries=retries)
    spec = plan_regions(prompt, chosen).spec(base_ratio)
    run = runs.changed(spec, {"model": model, "seed": seed})
    typer.echo(run.to_json() if json else run.to_yaml().rstrip("\n"))
