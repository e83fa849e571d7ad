"""``controlroom instruct-data``: captions before and after an instruction -> pairs of pictures."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer


def instruct_data(
    captions: Annotated[
        str, typer.Argument(help="JSONL file: caption, instruction, edited on each line; or theatre, for its own.")
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder to write to; a job there is continued.")],
    model: Annotated[str, typer.Option(help="theatre, a folder, a hub id, or a .safetensors file.")] = "theatre",
    count: Annotated[int | None, typer.Option(min=1, help="To draw. Default: all of the file, or 100.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Drawn of each pair of captions.")] = 100,
    keep: Annotated[int, typer.Option(min=1, help="Of those that pass, the best.")] = 4,
    share: Annotated[tuple[float, float], typer.Option(help="Bounds of the share of replaced steps.")] = (0.1, 0.9),
    guidance: Annotated[tuple[float, float], typer.Option(help="Bounds of the guidance scale.")] = (7.5, 15.0),
    replace_self: Annotated[bool, typer.Option(help="Replace self-attention as well.")] = True,
    text_similarity: Annotated[float, typer.Option(help="Least, of each picture and its caption.")] = 0.2,
    image_similarity: Annotated[float, typer.Option(help="Least, of the two pictures.")] = 0.7,
    direction: Annotated[float, typer.Option(help="Least, of what changed in pictures and in captions.")] = 0.2,
    clip: Annotated[
        str | None, typer.Option(help="Folder of the CLIP that filters. Default: the theatre's, for the theatre.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of the solver.")] = 100,
    size: Annotated[int | None, typer.Option(min=1, help="Side in pixels. Default: the model's own.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="ddim, euler_a, … Default: the model's own.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps.")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Draw pairs by Prompt-to-Prompt, keep the good ones; stop it with Ctrl-C and run it again to continue."""
    from controlroom.app import runs
    from controlroom.data.caption_edits import caption_edits, theatre_caption_edits
    from controlroom.tasks.instruct_data import InstructDataOptions, make_instruct_data

    options = InstructDataOptions(
        model=model,
        samples=samples,
        keep=keep,
        share=share,
        guidance=guidance,
        replace_self=replace_self,
        text_similarity=text_similarity,
        image_similarity=image_similarity,
        direction=direction,
        steps=steps,
        size=None if size is None else (size, size),
        scheduler=scheduler,
        seed=seed,
        device=device,
    )
    edits = theatre_caption_edits(count or 100) if captions == "theatre" else caption_edits(captions)[:count]
    judge = None
    if clip is not None:
        from controlroom.evaluation.extractors.pretrained import ClipExtractor

        judge = ClipExtractor.load(clip)
    runs.quiet_libraries()
    made = make_instruct_data(edits, out, options, judge)
    if json:
        facts = {"folder": str(made.folder), "captions": made.captions, "pairs": made.pairs, "drawn": made.drawn}
        typer.echo(json_module.dumps(facts))
        return
    typer.echo(str(made.folder))
    runs.notes().print(
        f"{made.pairs} pairs of {made.captions} captions; train on them: controlroom train "
        f"instruct_pix2pix --data {made.folder}"
    )
