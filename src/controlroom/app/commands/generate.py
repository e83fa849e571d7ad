"""``controlroom generate``: pictures from words, or from a file that describes a run."""

from __future__ import annotations

import json as json_module
import re
from typing import Annotated, Any

import typer

from controlroom.core.errors import InputError


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to draw.", show_default=False)] = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="PNG file to write. Default: named after prompt and seed.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", "-c", help="YAML file of a run (with its controls); '-' reads standard input."),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", "--negative", help="What not to draw.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Picture i uses seed + i. Default: drawn.")] = None,
    steps: Annotated[int | None, typer.Option(help="Solver steps. Default: 50.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="How strongly the prompt counts; 1 or less: no guidance. Default: 7.5.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="512, or WIDTHxHEIGHT. Default: the model's.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="ddim, euler, euler_a, dpmpp_2m, unipc, … Default: the model's.")
    ] = None,
    num_images: Annotated[int | None, typer.Option("--num-images", "-n", help="Pictures for each prompt.")] = None,
    model: Annotated[
        str | None, typer.Option(help="theatre, a folder, a hub id, or a .safetensors file. Default: theatre.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Draw pictures from words, or from a run's YAML file. Options count more than the file."""
    from controlroom.app import output, runs
    from controlroom.core.spec import RunSpec

    if prompt is None and config is None:
        raise InputError("There is nothing to draw. Give a prompt (it may be empty: ''), or --config run.yaml.")
    width, height = (None, None) if size is None else parse_size(size)
    settings: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "seed": seed,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "width": width,
        "height": height,
        "scheduler": scheduler,
        "num_images_per_prompt": num_images,
        "model": model,
        "output_type": "pil",
    }
    spec = runs.with_seed(runs.changed(RunSpec() if config is None else runs.read_run(config), settings))
    words = spec.prompt if isinstance(spec.prompt, str) else (spec.prompt or [""])[0]
    target = output.name_for(words, spec.seed or 0) if out is None else out
    files = output.destinations(target, spec.num_images)
    result, seconds = runs.draw(runs.open_pipeline(spec.model), spec)
    for index, file in enumerate(files):
        result.save(file, index)
    masks = runs.save_masks(result, files)
    if json:
        data = runs.summary(result, (*files, *masks), seconds) | {"mask_files": [str(file) for file in masks]}
        typer.echo(json_module.dumps(data, ensure_ascii=False))
    else:
        typer.echo("\n".join(str(file) for file in (*files, *masks)))


def parse_size(text: str) -> tuple[int, int]:
    """Width and height in pixels.

    Raises:
        InputError: it is neither one number nor two.

    >>> parse_size("512"), parse_size("640x384")
    ((512, 512), (640, 384))
    """
    match = re.fullmatch(r"\s*([0-9]{1,5})(?:\s*[xX×]\s*([0-9]{1,5}))?\s*", text)
    if match is None:
        raise InputError(f"The size {text[:40]!r} is not one; expected 512, or WIDTHxHEIGHT as in 640x384.")
    return int(match[1]), int(match[2] or match[1])
