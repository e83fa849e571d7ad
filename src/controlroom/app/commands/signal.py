"""``controlroom signal``: the map of a picture that a ControlNet is conditioned on, or a caption of it."""

from __future__ import annotations

import io
import json as json_module
from typing import TYPE_CHECKING, Annotated

import typer

from controlroom.core.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from controlroom.signals.signal import SignalMap


def signal(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="canny, soft_edge, lines, scribble, depth, normal, segmentation, pose; or caption.",
            show_default=False,
        ),
    ],
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="The picture.", show_default=False)],
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help="PNG file to write; for a caption a .txt file, or none.", show_default=False),
    ] = None,
    preview: Annotated[bool, typer.Option("--preview", help="Show the picture beside its map.")] = False,
    values: Annotated[bool, typer.Option("--values", help="Write the numbers too, as .npy beside the file.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="theatre, or for photographs a folder of a network of transformers (an ONNX file of RTMPose; BLIP for "
            "captions). "
            "Default: none where none is needed, else the theatre's readers."
        ),
    ] = None,
    detector: Annotated[
        str | None, typer.Option(help="What finds the people of a pose: a folder or ONNX file.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Find a map in a picture: edges, lines, depth, normals, parts or a pose, drawn as ControlNet takes it.

    A picture that already is such a map is recognised and passed on. A caption is a sentence, and is printed.
    """
    if kind == "caption":
        if preview or values or detector is not None:
            raise InputError("A caption is a sentence: --preview, --values and --detector are of maps. Leave them out.")
        _caption(image, out, model, json)
        return
    if out is None:
        raise InputError(f"Where shall the map go? Give --out, such as {kind}.png.")

    import numpy as np

    from controlroom.app import runs
    from controlroom.app.output import destinations
    from controlroom.core.files import write_atomically
    from controlroom.core.images import load_image
    from controlroom.core.png import save_png
    from controlroom.signals.choose import choose_signal

    (target,) = destinations(out)
    runs.quiet_libraries()
    source = load_image(image)
    found = choose_signal(kind, model, detector)(source)
    save_png(_beside(source, found) if preview else found.picture, target)
    files = [target]
    if values:
        buffer = io.BytesIO()
        np.save(buffer, found.values)
        files.append(target.with_suffix(".npy"))
        write_atomically(files[1], buffer.getvalue())
    if json:
        data = {
            "files": [str(file) for file in files],
            "kind": found.kind,
            "recognised": found.recognised,
            "size": [found.picture.width, found.picture.height],
            "values": {"shape": list(found.values.shape), "min": _end(found, "min"), "max": _end(found, "max")},
        }
        typer.echo(json_module.dumps(data, ensure_ascii=False))
        return
    for file in files:
        typer.echo(str(file))
    if found.recognised:
        typer.echo(f"The picture is a {found.kind} map already; it was passed on.", err=True)


def _caption(image: str, out: str | None, model: str | None, json: bool) -> None:
    from controlroom.app import output, runs
    from controlroom.core.files import write_text_atomically
    from controlroom.core.images import load_image
    from controlroom.tasks.caption import choose_captioner

    target = None if out is None else output.destination(out, ".txt", "a caption")
    runs.quiet_libraries()
    text = choose_captioner(model)(load_image(image))
    if target is not None:
        write_text_atomically(target, f"{text}\n")
    if json:
        files = [] if target is None else [str(target)]
        typer.echo(json_module.dumps({"caption": text, "files": files}, ensure_ascii=False))
    else:
        typer.echo(text)


def _end(found: SignalMap, which: str) -> float | None:
    return round(float(getattr(found.values, which)()), 6) if found.values.size else None


def _beside(source: Image.Image, found: SignalMap) -> Image.Image:
    from PIL import Image

    sheet = Image.new("RGB", (source.width + found.picture.width, source.height))
    sheet.paste(source, (0, 0))
    sheet.paste(found.picture, (source.width, 0))
    return sheet
