"""``controlroom personalise``: photos of someone or something -> an adapter that draws them."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer


def personalise(
    photos: Annotated[str, typer.Argument(help="Folder with photos of one person or thing, or in one style.")],
    name: Annotated[str, typer.Option("--name", "-n", help="Of the adapter.", show_default=False)],
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder to write to. Default: NAME.")] = None,
    kind: Annotated[str, typer.Option(help="person, thing or style.")] = "person",
    class_word: Annotated[
        str | None, typer.Option("--class", help="What it is one of: woman, dog, backpack. Default: the kind.")
    ] = None,
    word: Annotated[str, typer.Option(help="The rare word that will stand for it.")] = "sks",
    model: Annotated[str, typer.Option(help="theatre, a folder, a hub id, or a .safetensors file.")] = "theatre",
    steps: Annotated[int | None, typer.Option(help="Default: by the model and the number of photos.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", help="Default: by the model.")] = None,
    rank: Annotated[int, typer.Option(help="Of the low-rank layers.")] = 16,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Default: by the model.")] = None,
    class_count: Annotated[
        int | None, typer.Option("--class-count", help="Pictures of the class shown beside; 0: none.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Of the contact sheet, {} is the subject; repeatable.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Side in pixels. Default: the model's own.")] = None,
    seed: Annotated[int, typer.Option(help="Of the training.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps.")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Learn who or what is on PHOTOS; stop it with Ctrl-C and run it again to continue."""
    from controlroom.app import runs
    from controlroom.app.sheet import contact_sheet
    from controlroom.core.files import atomic_path
    from controlroom.tasks.personalise import PersonaliseOptions
    from controlroom.tasks.personalise import personalise as learn

    runs.quiet_libraries()
    options = PersonaliseOptions(
        model=model,
        kind=kind,
        class_word=class_word,
        word=word,
        steps=steps,
        learning_rate=learning_rate,
        rank=rank,
        batch_size=batch_size,
        class_count=class_count,
        prompts=tuple(prompt or ()),
        size=size,
        seed=seed,
        device=device,
    )
    folder = Path(out or name)
    made = learn(photos, name, folder, options)
    sheet = folder / f"{name}.png"
    with atomic_path(sheet) as beside:
        contact_sheet(made.rows).save(beside, format="PNG")
    if json:
        facts = {"adapter": str(made.adapter), "sheet": str(sheet), "run": str(made.run), "subject": made.subject}
        typer.echo(json_module.dumps(facts | {"steps": made.result.step, "losses": made.result.losses}))
        return
    typer.echo(f"{made.adapter}\n{sheet}")
    words = f"{made.subject} on the beach"
    runs.notes().print(f"Draw with it: controlroom generate {words!r} --config {made.run}")
