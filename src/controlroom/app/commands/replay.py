"""``controlroom replay``: a picture drawn again from the run that it carries."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from PIL import Image

DIFFERENT = 1
"""Exit code of ``--verify`` for a picture that came out otherwise."""


def replay(
    picture: Annotated[str, typer.Argument(help="PNG that controlroom wrote.")],
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="PNG file to write. Default: beside it, as NAME.replay.png.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare with the file, byte for byte; write only with -o.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Where the model is now, if it has moved.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Draw a picture of controlroom again; on the same machine the file is the same, byte for byte.

    Says what cannot be restored: inputs that are gone or have changed, objects that were given in memory.
    """
    from controlroom.app import output, runs
    from controlroom.core.png import png_bytes
    from controlroom.sampling.manifest import read_recorded, versions

    recorded = read_recorded(picture)
    target = out
    if target is None and not verify:
        target = str(Path(picture).with_name(f"{Path(picture).stem}.replay.png"))
    files = () if target is None else output.destinations(target)
    pipeline = runs.open_pipeline(model or recorded.spec.model)
    then, now = recorded.manifest.get("versions"), versions()
    if then != now:
        runs.notes().print(f"warning: drawn with {_listed(then)}; this is {_listed(now)}", markup=False)
    # The model keeps the name it has in the file, wherever it is now.
    result, seconds = runs.draw(pipeline, recorded.spec.model_copy(update={"output_type": "pil"}))
    drawn = result.images[recorded.index]
    content = png_bytes(drawn, result.texts[recorded.index])
    with open(picture, "rb") as file:
        before = file.read()
    same = content == before
    verdict = "identical" if same else _difference(picture, drawn)
    for file in files:
        result.save(file, recorded.index)
    if json:
        data = runs.summary(result, files, seconds) | {"identical": same, "comparison": verdict}
        typer.echo(json_module.dumps(data, ensure_ascii=False))
    else:
        typer.echo("\n".join([*(str(file) for file in files), *([verdict] if verify else [])]))
    if verify and not same:
        raise typer.Exit(DIFFERENT)


def _difference(path: str, drawn: Image.Image) -> str:
    """In words, how a picture that was drawn again differs from its file."""
    import numpy as np

    from controlroom.core.images import load_image

    stored = load_image(path)
    if stored.size != drawn.size:
        return f"different: the file has {stored.width} x {stored.height} pixels, the run draws {drawn.size}"
    gap = np.abs(np.asarray(stored, np.int16) - np.asarray(drawn.convert("RGB"), np.int16))
    if not gap.any():
        return "same pixels; the file differs in its text or its compression"
    share = float((gap.max(-1) > 0).mean())
    return f"different: {share:.2%} of the pixels, by at most {int(gap.max())} of 255"


def _listed(found: object) -> str:
    return ", ".join(f"{k} {v}" for k, v in found.items()) if isinstance(found, dict) else "unknown versions"
