"""``controlroom edit``: a picture changed by an instruction, or from what it shows to what it shall show."""

from __future__ import annotations

import json as json_module
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from controlroom.app.commands.generate import parse_size
from controlroom.core.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from controlroom.core.result import RunResult
    from controlroom.sampling.inverted import Inversion
    from controlroom.tasks.edit import EditPlan


def edit(
    image: Annotated[str, typer.Argument(help="The picture.")],
    instruction: Annotated[
        str | None, typer.Option("--instruction", "-i", help='What to do: "make the shirt red".')
    ] = None,
    source: Annotated[str | None, typer.Option("--from", help="Or: what the picture shows, in words.")] = None,
    target: Annotated[str | None, typer.Option("--to", help="What it shall show.")] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help="PNG file to write. Default: named after words and seed."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="auto, instruct_pix2pix, prompt_to_prompt, null_text, masactrl, pix2pix_zero, imagic, image_to_image."
        ),
    ] = "auto",
    mask: Annotated[str | None, typer.Option(help="Picture of the same size, white where it may change.")] = None,
    mask_words: Annotated[
        str | None, typer.Option(help="Instead: words of the result, such as 'shirt' or 'red hat, shirt'.")
    ] = None,
    mask_threshold: Annotated[
        float | None,
        typer.Option(help="Share of the words' greatest attention that counts as theirs. Default: 0.3."),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="Share of the steps that is run from the picture; less keeps more.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the noise, for methods that draw some. Default: drawn.")] = None,
    steps: Annotated[int | None, typer.Option(help="Solver steps, also of the inversion. Default: 50.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="How strongly the words count. Default: 7.5.")] = None,
    image_guidance_scale: Annotated[
        float | None, typer.Option(help="Of instruct_pix2pix: how closely the picture is kept. Default: 1.5.")
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", "--negative", help="What not to draw.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="512, or WIDTHxHEIGHT. Default: the model's, in the picture's proportions.")
    ] = None,
    inversion: Annotated[
        str | None,
        typer.Option(help="File of the picture's inversion (.safetensors): read if it is there, else written."),
    ] = None,
    fit: Annotated[str | None, typer.Option(help="Of imagic: folder in which the picture is learned.")] = None,
    model: Annotated[str, typer.Option(help="theatre, a folder, a hub id, or a .safetensors file.")] = "theatre",
    json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Edit IMAGE by words; write the picture, and beside it before/after and the mask that was found by words."""
    from controlroom.app import output, runs
    from controlroom.tasks.edit import beside, keep_inversion, plan_edit
    from controlroom.tasks.edit_method import EditOptions

    seed = runs.new_seed() if seed is None else seed
    named = instruction or target or ""
    (file,) = output.destinations(output.name_for(named, seed) if out is None else out)
    for written in (file, *beside(file)):
        for name, path in (("picture", image), ("mask", mask)):
            if path is not None and output.same_file(written, path):
                raise InputError(f"{str(written)!r} is the {name} itself, which would be lost. Choose another name.")
    if inversion is not None:
        output.destination(inversion, ".safetensors", "an inversion")
    given: dict[str, Any] = {
        "mask": mask,
        "mask_words": mask_words,
        "mask_threshold": mask_threshold,
        "strength": strength,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "image_guidance_scale": image_guidance_scale,
        "negative_prompt": negative_prompt,
        "size": None if size is None else parse_size(size),
        "inversion": inversion,
        "fit": fit,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    options = EditOptions(model=model, method=method, **chosen)
    runs.quiet_libraries()
    plan = plan_edit(image, instruction, source=source, target=target, options=options)
    for line in (f"method: {plan.why}", *(f"note: {note}" for note in plan.notes)):
        runs.notes().print(line, markup=False)
    plan.fitted()
    with _shown(plan) as progress:
        found = plan.invert(progress)
    if found is not None:
        for line in (*_told(found), *(f"warning: {text}" for text in found.warnings)):
            runs.notes().print(line, markup=False)
    written = inversion is not None and not Path(inversion).exists()
    try:
        run, seconds = runs.draw(plan.pipeline, plan.spec(keep_inversion(plan, found), seed))
        files = plan.finished(run, found).save(file)
    except BaseException:
        if written and inversion is not None:
            Path(inversion).unlink(missing_ok=True)  # nothing is left of an edit that failed
        raise
    if json:
        typer.echo(json_module.dumps(_summary(plan, run, files, seconds, found), ensure_ascii=False))
    else:
        typer.echo("\n".join(str(one) for one in files))


def _summary(
    plan: EditPlan, run: RunResult, files: tuple[Path, ...], seconds: float, found: Inversion | None
) -> dict[str, Any]:
    from controlroom.app import runs

    quality = None if found is None else found.quality
    names = ("picture", "autoencoder", "ceiling")
    return runs.summary(run, files, seconds) | {
        "source": str(plan.image),
        "method": plan.method,
        "why": plan.why,
        "reconstruction_db": None if quality is None else {name: round(getattr(quality, name)[0], 2) for name in names},
        "mask_files": [str(file) for file in files if file.name.endswith(".mask.png")],
        "notes": [*plan.notes, *(() if found is None else found.warnings)],
    }


def _told(found: Inversion) -> tuple[str, ...]:
    """How well the picture comes back, in one line."""
    if found.quality is None:
        return ()
    picture, own, best = (part[0] for part in (found.quality.picture, found.quality.autoencoder, found.quality.ceiling))
    return (
        f"reconstruction: {picture:.1f} dB against the picture (the autoencoder alone: {best:.1f} dB), {own:.1f} dB "
        "against the autoencoder's",
    )


@contextmanager
def _shown(plan: EditPlan) -> Iterator[Callable[[int, int], None]]:
    """A bar for the inversion on a terminal."""
    from rich.progress import Progress

    from controlroom.app import runs

    console = runs.notes()
    with Progress(console=console, transient=True, disable=not (console.is_terminal and plan.inverts)) as bar:
        task = bar.add_task("inverting", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield progress
