"""``controlroom direction``: the direction from one thing to another among a model's text embeddings."""

from __future__ import annotations

import json as json_module
from dataclasses import replace
from typing import Annotated

import typer


def direction(
    source: Annotated[str, typer.Option("--from", help="The thing that is in the picture, e.g. cat.")],
    target: Annotated[str, typer.Option("--to", help="The thing it becomes, e.g. dog.")],
    out: Annotated[str, typer.Option("--out", "-o", help="File to write, ending with .safetensors.")],
    sentences_from: Annotated[
        str | None, typer.Option(help="Text file with sentences about the first, one a line. Default: from rules.")
    ] = None,
    sentences_to: Annotated[str | None, typer.Option(help="The same for the second.")] = None,
    text_model: Annotated[
        str | None, typer.Option(help="Folder of a causal language model that writes the sentences instead.")
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Number of sentences of each. Default: 256, or 64.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the language model.")] = 0,
    model: Annotated[str, typer.Option(help="theatre, a folder, a hub id, or a .safetensors file.")] = "theatre",
    json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Write a direction for Pix2Pix-Zero: the mean embedding of many sentences about one thing minus another's."""
    from controlroom.app import output, runs
    from controlroom.controls.edit_direction import edit_direction
    from controlroom.controls.edit_sentences import read_sentences, sentences_about, sentences_from_model

    file = output.destination(out, ".safetensors", "a direction")
    runs.quiet_libraries()

    def sentences(thing: str, path: str | None) -> list[str]:
        if path is not None:
            return read_sentences(path)[:count]
        if text_model is not None:
            return sentences_from_model(text_model, thing, count or 64, seed)
        return sentences_about(thing, count)

    sides = [sentences(source, sentences_from), sentences(target, sentences_to)]
    found = edit_direction(runs.open_pipeline(model), *sides)
    # The words, not the sentences, are what people call it by.
    found = replace(found, names=(source, target))
    found.save(file)
    if json:
        data = {
            "file": str(file),
            "model": model,
            "backbone": found.backbone,
            "from": source,
            "to": target,
            "sentences": list(found.counts),
            "length": round(float(found.tokens.float().norm()), 4),
        }
        typer.echo(json_module.dumps(data, ensure_ascii=False))
    else:
        typer.echo(str(file))
