"""Draws the pictures of ``docs/theatre.md``: ``.venv/bin/python tools/draw_theatre.py``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from controlroom.core.images import save_png
from controlroom.data.theatre import vocabulary as v
from controlroom.data.theatre.doodle import draw_doodle
from controlroom.data.theatre.edits import sample_edit
from controlroom.data.theatre.pairs import sample_pair
from controlroom.data.theatre.poses import fit_to_canvas, named_pose
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import Dice, Mix, Scene, sample_scene
from controlroom.data.theatre.truth import edges, maps

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "pictures"


def sheet(rows: list[list[Image.Image]], path: Path) -> None:
    """Pictures of 128 x 128 in rows, without gaps."""
    page = Image.new("RGB", (128 * max(map(len, rows)), 128 * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            page.paste(picture.convert("RGB"), (128 * x, 128 * y))
    save_png(page.quantize(256).convert("RGB"), path)


def world() -> list[list[Image.Image]]:
    """Scenes of the default mix, then every style, view and named pose."""
    scenes = [render(sample_scene(seed, "held_out")) for seed in range(24)]
    one = sample_scene(3, "held_out", Mix(kinds={"puppet": 1.0}, styles={"flat": 1.0}, views={"front": 1.0}))
    styled = [render(replace(one, style=style)) for style in v.STYLES]
    viewed = [render(_changed(one, view=view)) for view in v.VIEWS[1:]]
    posed = [render(_changed(one, pose=p, angles=named_pose(p, Dice(p)))) for p in v.POSES]
    return [
        scenes[:12],
        scenes[12:],
        (styled + viewed + [render(_changed(one, expression=e)) for e in v.EXPRESSIONS])[:12],
        posed,
    ]


def _changed(scene: Scene, **changes: object) -> Scene:
    return replace(scene, actors=(fit_to_canvas(replace(scene.puppets[0], **changes)),))  # type: ignore[arg-type]


def truth() -> list[list[Image.Image]]:
    """A column for each scene: picture, parts, depth, edges, the puppet elsewhere, doodle, an edit's after."""
    columns = []
    for seed in range(12):
        pair, edit = sample_pair(seed, "held_out"), sample_edit(seed, "held_out")
        found = maps(pair.source)
        parts = Image.fromarray((found.part.astype(np.uint16) * 17).astype(np.uint8))
        columns.append(
            [
                render(pair.source),
                parts,
                Image.fromarray(found.depth),
                Image.fromarray(edges(pair.source)),
                render(pair.target),
                draw_doodle(pair.target.puppets[0], seed).picture,
                render(edit.before),
                render(edit.after),
            ]
        )
    return [list(row) for row in zip(*columns, strict=True)]


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    sheet(world(), FOLDER / "theatre_world.png")
    sheet(truth(), FOLDER / "theatre_truth.png")
