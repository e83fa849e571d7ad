"""Small pictures with something in them, alone and with conditions, for recipes that draw along something."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from controlroom.data.pictures import ConditionedPicture, Picture

COLOURS = ("red", "blue", "green")


def drawn(number: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A bright box on a dark ground, elsewhere in each picture."""
    picture = Image.new("RGB", size, (20, 10 * number, 30))
    side = min(size) // 2
    picture.paste(COLOURS[number % 3], (2 + 4 * number, 3, 2 + 4 * number + side, 3 + side))
    return picture


def scenery(count: int = 3, size: tuple[int, int] = (32, 32)) -> tuple[Picture, ...]:
    """Captioned "a COLOUR cat"."""
    return tuple(
        Picture(f"{n}.png", f"box {n} {size}", size, lambda n=n: drawn(n, size), f"a {COLOURS[n % 3]} cat")
        for n in range(count)
    )


def ramp(number: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A condition: brighter to the right, and to below from the second on."""
    across = np.linspace(0, 200, size[0])[None] + 20.0 * number * np.linspace(0, 1, size[1])[:, None]
    return Image.fromarray(across.astype(np.uint8)).convert("RGB")


def conditioned(count: int = 3, size: tuple[int, int] = (32, 32)) -> tuple[ConditionedPicture, ...]:
    """The same with conditions."""
    return tuple(
        ConditionedPicture(
            p.name,
            f"{p.content} along",
            p.size,
            p.read,
            p.caption,
            condition=Picture(f"map {n}", f"ramp {n}", size, lambda n=n: ramp(n, size)),
        )
        for n, p in enumerate(scenery(count, size))
    )


def written(folder: Path, count: int = 3, conditions: bool = True) -> Path:
    """The pictures in files, with a table."""
    (folder / "maps").mkdir(parents=True)
    rows = []
    for number, picture in enumerate(scenery(count)):
        picture.read().save(folder / picture.name)
        row = {"file_name": picture.name, "text": picture.caption}
        if conditions:
            ramp(number).save(folder / "maps" / picture.name)
            row["conditioning_image"] = f"maps/{picture.name}"
        rows.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder
