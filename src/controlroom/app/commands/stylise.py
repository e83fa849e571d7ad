"""``controlroom stylise``: a picture drawn anew as words say, with its geometry kept."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer

from controlroom.app.commands.generate import parse_size
from controlroom.core.errors import InputError


def stylise(
    image: Annotated[str, typer.Argument(help="The picture.")],
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="What the result shows, and in which style.", show_default=False)
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="PNG file to write; its depth lies beside it as a PNG.")],
    depth: Annotated[str | None, typer.Option(help="Depth map, near is bright. Default: estimated.")] = None,
    depth_model: Annotated[
        str | None, typer.Option(help="Folder of a depth network, such as Depth Anything. Default: the theatre's.")
    ] = None,
    strength: Annotated[float, typer.Option(help="How far it may go, above 0 to 1.")] = 0.8,
    depth_scale: Annotated[float, typer.Option(help="How strongly the depth counts; 0: not at all.")] = 1.0,
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", "--negative", help="What not to draw.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Default: drawn.")] = None,
    steps: Annotated[int | None, typer.Option(help="Solver steps of the whole schedule.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="How strongly the words count.")] = None,
    size: Annotated[str | None, typer.Option(help="512, or WIDTHxHEIGHT. Default: the picture's proportions.")] = None,
    scheduler: Annotated[str, typer.Option(help="ddim, euler, dpmpp_2m, unipc, …")] = "unipc",
    model: Annotated[str, typer.Option(help="theatre, a folder, a hub id, or a .safetensors file.")] = "theatre",
    controlnet: Annotated[str, typer.Option(help="ControlNet for depth.")] = "theatre/multi",
    json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Draw IMAGE anew in another style; write the picture, and beside it the depth map it was drawn along."""
    from controlroom.app import output, runs
    from controlroom.tasks.stylise import StyliseOptions, plan_stylise

    (file,) = output.destinations(out)
    for name, path in (("picture", image), ("depth map", depth)):
        if path is not None and output.same_file(file, path):
            raise InputError(f"{out!r} is the {name} itself, which would be lost. Choose another name for the result.")
    if depth is not None and depth_model is not None:
        raise InputError("A depth map was given, so nothing estimates one. Leave --depth or --depth-model out.")
    chosen = {
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "size": None if size is None else parse_size(size),
    }
    options = StyliseOptions(
        model=model,
        controlnet=controlnet,
        depth_model=depth_model,
        strength=strength,
        depth_scale=depth_scale,
        negative_prompt=negative_prompt,
        scheduler=scheduler,
        **{name: value for name, value in chosen.items() if value is not None},
    )
    runs.quiet_libraries()
    seed = runs.new_seed() if seed is None else seed
    plan = plan_stylise(image, prompt, depth=depth, seed=seed, options=options)
    run, seconds = runs.draw(plan.pipeline, plan.spec)
    files = plan.finished(run).save(file)
    if not json:
        typer.echo("\n".join(str(one) for one in files))
        return
    found = {"source": "given" if depth is not None else "estimated", "file": str(files[1]) if files[1:] else None}
    data = runs.summary(run, files, seconds) | {"picture": image, "depth": None if plan.depth is None else found}
    typer.echo(json_module.dumps(data, ensure_ascii=False))
