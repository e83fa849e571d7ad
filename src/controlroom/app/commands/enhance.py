"""``controlroom enhance``: a picture changed by words and enlarged, by Imagic from end to end."""

from __future__ import annotations

import json as json_module
import time
from typing import Annotated, Any

import typer

from controlroom.app.commands.generate import parse_size
from controlroom.core.errors import InputError


def enhance(
    image: Annotated[str, typer.Argument(help="The picture.")],
    target: Annotated[str, typer.Option("--to", help="What the changed picture shows.")],
    fit: Annotated[str, typer.Option(help="Folder in which the picture is learned; one that is finished is used.")],
    out: Annotated[
        str, typer.Option("--out", "-o", help="PNG file to write; of several strengths NAME_0.png, NAME_1.png, …")
    ],
    strengths: Annotated[
        str, typer.Option(help="A picture for each: 0 the picture, 1 the words, more overdoes it.")
    ] = "0.8,1.0,1.2",
    factor: Annotated[int, typer.Option(help="How much larger the result is, along each side.")] = 2,
    upscale_strength: Annotated[
        float, typer.Option(help="Share of the steps that the enlarged picture is drawn again.")
    ] = 0.4,
    seed: Annotated[int | None, typer.Option(help="Of the noise, the same for all strengths. Default: drawn.")] = None,
    steps: Annotated[int, typer.Option(help="Solver steps of each of the two drawings.")] = 50,
    guidance_scale: Annotated[float, typer.Option(help="How strongly the words count.")] = 7.5,
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", "--negative", help="What not to draw.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Of the first drawing: 512, or WIDTHxHEIGHT. Default: the model's, in the proportions."),
    ] = None,
    embedding_steps: Annotated[int, typer.Option(help="Of the fit: steps on the words.")] = 500,
    unet_steps: Annotated[int, typer.Option(help="Of the fit: steps on the network; 0: it stays as it is.")] = 1000,
    scheduler: Annotated[str | None, typer.Option(help="ddim, euler, dpmpp_2m, … Default: the model's.")] = None,
    model: Annotated[str, typer.Option(help="theatre, a folder, a hub id, or a .safetensors file.")] = "theatre",
    json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Change IMAGE by words, drawn small and enlarged by the network that was tuned to it (Imagic); resumable."""
    from controlroom.app import output, runs
    from controlroom.core.images import load_image
    from controlroom.tasks.edit import size_for
    from controlroom.tasks.enhance import EnhanceOptions
    from controlroom.tasks.enhance import enhance as enhanced
    from controlroom.training.recipes.imagic import ImagicSettings

    asked = _strengths(strengths)
    files = output.destinations(out, len(asked))
    if any(output.same_file(file, image) for file in files):
        raise InputError(f"{image!r} is the picture itself, which would be lost. Choose another name for the result.")
    given: dict[str, Any] = {
        "strengths": asked,
        "factor": factor,
        "upscale_strength": upscale_strength,
        "seed": runs.new_seed() if seed is None else seed,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
        "scheduler": scheduler,
        "fit": ImagicSettings(embedding_steps=embedding_steps, unet_steps=unet_steps, unet_words="wanted"),
    }
    EnhanceOptions(**given)
    picture = load_image(image)
    pipeline = runs.open_pipeline(model)
    width, height = size_for(picture.size, pipeline) if size is None else parse_size(size)
    begun = time.perf_counter()
    result = enhanced(pipeline, image, target, fit, EnhanceOptions(**given, small_size=(height, width)))
    for index, file in enumerate(files):
        result.large.save(file, index)
    if json:
        data = runs.summary(result.large, files, time.perf_counter() - begun)
        data |= {"source": image, "strengths": list(asked), "small_size": [width, height]}
        typer.echo(json_module.dumps(data, ensure_ascii=False))
    else:
        typer.echo("\n".join(str(file) for file in files))


def _strengths(text: str) -> tuple[float, ...]:
    """Numbers between commas.

    Raises:
        InputError: something else.

    >>> _strengths("0.8, 1")
    (0.8, 1.0)
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--strengths {text[:80]!r} are not numbers; give some such as 0.8,1.0,1.2.") from error
