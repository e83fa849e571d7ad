"""``controlroom retarget``: the person of one picture in the pose of another."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer

from controlroom.app.commands.generate import parse_size
from controlroom.core.errors import InputError


def retarget(
    source: Annotated[str, typer.Argument(help="Picture of the person.")],
    pose: Annotated[
        str, typer.Option("--pose", "-p", help="Photo, doodle, OpenPose JSON, or a drawn skeleton.", show_default=False)
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="PNG file to write; its pose lies beside it as JSON.")],
    prompt: Annotated[str, typer.Option(help="Words for what the picture should look like.")] = "",
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", "--negative", help="What not to draw.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Default: drawn.")] = None,
    steps: Annotated[int | None, typer.Option(help="Solver steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="How strongly words and controls count.")] = None,
    size: Annotated[str | None, typer.Option(help="512, or WIDTHxHEIGHT. Default: the model's.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="ddim, euler, dpmpp_2m, … Default: the model's.")] = None,
    mirror: Annotated[bool, typer.Option("--mirror", help="Flip the pose as in a mirror.")] = False,
    swap_sides: Annotated[
        bool, typer.Option("--swap-sides", help="Exchange the person's left and right (seen from behind).")
    ] = False,
    person: Annotated[
        int | None, typer.Option(help="Which person of a JSON file, from 0. Default: the largest.")
    ] = None,
    appearance_scale: Annotated[float, typer.Option(help="How strongly the source counts; 0: not at all.")] = 1.0,
    pose_scale: Annotated[float, typer.Option(help="How strongly the pose counts; 0: not at all.")] = 1.0,
    model: Annotated[str, typer.Option(help="theatre, a folder, a hub id, or a .safetensors file.")] = "theatre",
    identity: Annotated[
        str, typer.Option(help="What keeps the person: appearance_control, ip_adapter or reference_only.")
    ] = "appearance_control",
    appearance_model: Annotated[
        str | None, typer.Option(help="Weights of what keeps the person. Default: the theatre's.")
    ] = None,
    pose_model: Annotated[str, typer.Option(help="ControlNet for skeletons.")] = "theatre/pose",
    json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Draw the person of SOURCE in another pose; write the picture, and beside it the pose as editable JSON."""
    from controlroom.app import output, runs
    from controlroom.tasks.retarget import RetargetOptions, plan_retarget

    (file,) = output.destinations(out)
    for name, path in (("source", source), ("pose", pose)):
        if output.same_file(file, path):
            raise InputError(f"{out!r} is the {name} itself, which would be lost. Choose another name for the result.")
    chosen = {
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "size": None if size is None else parse_size(size),
        "person": person,
        "identity": identity,
    }
    options = RetargetOptions(
        model=model,
        appearance_model=appearance_model,
        pose_model=pose_model,
        appearance_scale=appearance_scale,
        pose_scale=pose_scale,
        mirror=mirror,
        swap_sides=swap_sides,
        negative_prompt=negative_prompt,
        scheduler=scheduler,
        **{name: value for name, value in chosen.items() if value is not None},
    )
    runs.quiet_libraries()
    seed = runs.new_seed() if seed is None else seed
    plan = plan_retarget(source, pose, prompt, seed=seed, options=options)
    for note in plan.notes:
        runs.notes().print(f"note: {note}", markup=False)
    run, seconds = runs.draw(plan.pipeline, plan.spec)
    files = plan.finished(run).save(file)
    if not json:
        typer.echo("\n".join(str(one) for one in files))
        return
    reading = plan.reading
    data = runs.summary(run, files, seconds) | {
        "source": source,
        "pose": {
            "source": pose,
            "kind": reading.kind,
            "reader": reading.reader,
            "confidence": round(plan.confidence, 4),
            "joints": int(plan.pose.visible.sum()),
            "file": str(files[1]) if len(files) > 1 else None,
            "canvas": [reading.pose.width, reading.pose.height],
            "mirrored": mirror,
            "sides_swapped": swap_sides,
        },
        "notes": list(plan.notes),
    }
    typer.echo(json_module.dumps(data, ensure_ascii=False))
