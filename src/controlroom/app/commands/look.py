"""``controlroom look``: what a model sees at one step, as one picture and in numbers."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer

from controlroom.app.commands.generate import parse_size
from controlroom.core.errors import InputError


def look(
    prompt: Annotated[
        list[str], typer.Argument(help="What is drawn, or what the pictures show; two draw two.", show_default=False)
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="PNG file to write.")],
    image: Annotated[
        list[str] | None, typer.Option("--image", "-i", help="A picture to look at, instead of drawing one; or two.")
    ] = None,
    words: Annotated[str | None, typer.Option(help="Words or phrases, with commas. Default: every word.")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Number of the step, from 0. Default: half way.")] = None,
    layer: Annotated[
        str | None, typer.Option(help="Name of a layer, or how names begin: up_blocks.1. Default: where objects show.")
    ] = None,
    resolution: Annotated[int | None, typer.Option(min=1, help="Shorter side in tokens of the layers.")] = None,
    point: Annotated[
        list[str] | None, typer.Option(help="x,y from 0 to 1 of the first picture, whose match is shown. Repeatable.")
    ] = None,
    inverted: Annotated[bool, typer.Option("--inverted", help="Invert given pictures, not noise them.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Solver steps.")] = 50,
    guidance_scale: Annotated[float, typer.Option(help="How strongly the words count.")] = 7.5,
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", "--negative", help="What not to draw.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="512, or WIDTHxHEIGHT. Default: the model's.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="ddim, euler, dpmpp_2m, … Default: the model's.")] = None,
    model: Annotated[str, typer.Option(help="theatre, a folder, a hub id, or a .safetensors file.")] = "theatre",
    json: Annotated[bool, typer.Option("--json", help="Print what was seen in numbers.")] = False,
) -> None:
    """Show what the model sees at one step: attention by word, what finds what, and a layer's features as colours."""
    from controlroom.app import output, runs
    from controlroom.app.sheet import contact_sheet
    from controlroom.core.png import save_png
    from controlroom.tasks.look import LookOptions
    from controlroom.tasks.look import look as look_into
    from controlroom.tasks.look_pictures import cells

    (file,) = output.destinations(out)
    for given in image or ():
        if output.same_file(file, given):
            raise InputError(f"{out!r} is the picture itself, which would be lost. Choose another name for the result.")
    chosen = None if words is None else tuple(word.strip() for word in words.split(","))
    if chosen is not None and not all(chosen):
        raise InputError(f"--words {words!r} has an empty word. Give words with commas between, such as 'hat, shirt'.")
    width_height = None if size is None else parse_size(size)
    options = LookOptions(
        words=chosen,
        step=step,
        layer=layer,
        resolution=resolution,
        points=tuple(_point(text) for text in point or ()),
        inverted=inverted,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        scheduler=scheduler,
        seed=seed,
        size=None if width_height is None else (width_height[1], width_height[0]),
    )
    runs.quiet_libraries()
    seen = look_into(runs.open_pipeline(model), prompt, image or (), options)
    save_png(contact_sheet(cells(seen), side=160), file)
    typer.echo(json_module.dumps({"file": str(file), **seen.numbers()}, ensure_ascii=False) if json else str(file))


def _point(text: str) -> tuple[float, float]:
    """``0.5,0.3`` -> (0.5, 0.3).

    Raises:
        InputError: not two numbers.
    """
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--point {text!r} is not a place; give x,y from 0 to 1, such as 0.5,0.3.") from error
    return x, y
