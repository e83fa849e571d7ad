"""Suites of regions, RPG and panoramas: right cases, and the numbers that pictures of known content must give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from controlroom.backbones import loading
from controlroom.controls.regions.multidiffusion import MultiDiffusion
from controlroom.controls.regions.regional_prompts import RegionalPrompts
from controlroom.data.theatre.render import render
from controlroom.evaluation.suites import panorama, regions
from controlroom.evaluation.suites.drawing import PipelineDrawer
from controlroom.evaluation.suites.suite import Shown
from controlroom.evaluation.suites.table import open_suite
from controlroom.evaluation.theatre_quality import CORE_MIX, TWO_OBJECTS, scenes_of
from tests.evaluation.suites.stage import Knows, Words, write_stage
from tests.evaluation.suites.test_suites import measured


class Halves(Knows):
    """Knows the mirrored halves of scenes: each shows the prop on its side."""

    def __init__(self, scenes: Any) -> None:
        super().__init__([])
        for scene in scenes:
            for half, prop in zip(regions.columns_of(render(scene), 2), regions.in_order(scene), strict=True):
                self.known[half.tobytes()] = replace(scene, actors=(prop,))


def test_each_half_is_judged_by_itself() -> None:
    (scene,) = scenes_of(TWO_OBJECTS, 1, regions.FIRST_SCENE)
    swapped = replace(scene, actors=tuple(replace(p, x=128 - p.x) for p in scene.props))
    first, second = regions.in_order(scene)
    colour = next(c for c in ("red", "green", "blue") if c not in (first.colour, second.colour))
    painted = replace(scene, actors=(replace(first, colour=colour), second))
    reader: Any = Halves([scene, swapped, painted])
    case = regions.build(regions.Settings(), 1, reader, Words()).case(0)
    pictures = {"without": render(swapped), "multidiffusion": render(painted), "truth": render(scene)}
    (found,) = regions.InPlace(reader)([Shown(case, pictures)])
    assert found["truth"] == {regions.EACH: 1.0, regions.RIGHT: 1.0}
    assert found["multidiffusion"] == {regions.EACH: 0.5, regions.RIGHT: 0.0}
    assert found["without"] == {regions.EACH: 0.0, regions.RIGHT: 0.0}


def test_cases_of_regions_and_rpg() -> None:
    reader: Any = Knows([])
    two = regions.build(regions.Settings(), 1, reader, Words()).case(0)
    first, second = regions.in_order(two.truth)
    assert first.x < second.x
    prompt = str(two.specs["without"].prompt)
    assert f"{first.colour} {first.kind} on the left" in prompt and f"{second.kind} on the right" in prompt
    (multi,) = two.specs["multidiffusion"].controls
    assert isinstance(multi, MultiDiffusion) and multi.regions is not None
    assert [region.box for region in multi.regions] == [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)]
    assert first.kind in multi.regions[0].prompt and second.kind not in multi.regions[0].prompt
    three = regions.build_rpg(regions.Settings(base_ratio=0.4), 1, reader, Words()).case(0)
    props = regions.in_order(three.truth)
    (rpg,) = three.specs["rpg"].controls
    assert isinstance(rpg, RegionalPrompts) and rpg.base_ratio == 0.4 and len(props) == 3
    assert [prop.kind in str(words) for prop, words in zip(props, rpg.regions, strict=True)] == [True] * 3
    assert {spec.seed for spec in three.specs.values()} == {1000}
    # Everything there, and one thing missing.
    lone = replace(three.truth, actors=three.truth.actors[:2])
    known: Any = Knows([three.truth, lone])
    (found,) = regions.AllShown(known)([Shown(three, {"rpg": render(three.truth), "without": render(lone)})])
    assert found["rpg"] == {regions.KINDS: 1.0, regions.RIGHT: 1.0}
    assert found["without"] == {regions.KINDS: 0.0, regions.RIGHT: 0.0}


def test_wide_pictures_are_read_column_by_column() -> None:
    scenes = scenes_of(regions.THREE_OBJECTS, 3, 7)
    alone = [replace(scene, actors=(regions.in_order(scene)[0],)) for scene in scenes]
    case = regions.build_rpg(regions.Settings(), 1, Knows([]), Words()).case(0)  # type: ignore[arg-type]
    assert all((spec.width, spec.height) == (384, 128) for spec in case.specs.values())
    square = regions.build_rpg(regions.Settings(wide=False), 1, Knows([]), Words()).case(0)  # type: ignore[arg-type]
    assert {spec.width for spec in square.specs.values()} == {None}
    wide = Image.new("RGB", (384, 128))
    for i, scene in enumerate(alone):
        wide.paste(render(scene), (128 * i, 0))
    reader: Any = Knows(alone)
    asked = replace(case, truth=replace(case.truth, actors=tuple(scene.actors[0] for scene in reversed(alone))))
    (found,) = regions.AllShown(reader)([Shown(asked, {"rpg": wide})])
    # Whichever column it stands in.
    assert found["rpg"] == {regions.KINDS: 1.0, regions.RIGHT: 1.0}


def test_seams_and_puppets_of_a_panorama() -> None:
    scenes = scenes_of(CORE_MIX, 2, panorama.FIRST_SCENE)
    pictures = [render(scene) for scene in scenes]
    empty = Image.new("RGB", (128, 128), (90, 90, 90))
    reader: Any = Knows(scenes)
    reader.known[empty.tobytes()] = replace(scenes[0], actors=())
    joined = Image.new("RGB", (512, 128))
    for i, part in enumerate((pictures[0], pictures[1], pictures[0], empty)):
        joined.paste(part, (128 * i, 0))
    case = panorama.build(panorama.Settings(), 1, reader, Words()).case(0)
    assert case.specs["plain"].width == 512 and case.specs["plain"].height == 128
    (found,) = panorama.Panoramas(reader, Words())([Shown(case, {"plain": joined})])
    assert found["plain"][panorama.PUPPETS] == found["plain"][panorama.ONE] == 0.75
    noise = np.random.default_rng(0).integers(0, 256, (128, 512, 3), dtype=np.uint8)
    assert panorama.seam_score(joined) > 2
    steps = np.tile((np.arange(512) // 128 * 60).astype(np.uint8)[None, :, None], (128, 1, 3))
    assert panorama.seam_score(Image.fromarray(steps)) > 100
    assert 0.9 < panorama.seam_score(Image.fromarray(noise)) < 1.1


@pytest.mark.parametrize("name", ["regions", "rpg", "panorama"])
def test_two_cases_from_end_to_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_stage(tmp_path / "theatre")
    monkeypatch.setattr(loading, "theatre_folder", lambda: folder)
    suite = open_suite(name, 2, {"steps": 1, "window": 16})
    if name != "panorama":
        plain = suite.case

        def small(number: int) -> Any:
            case = plain(number)
            return replace(
                case, specs={arm: s.model_copy(update={"height": 32, "width": 32}) for arm, s in case.specs.items()}
            )

        suite = replace(suite, case=small)
    else:
        suite = replace(suite, case=lambda number, plain=suite.case: _shrunk(plain(number), 128))
    report = measured(suite, PipelineDrawer("theatre"), tmp_path)
    assert report.rows and all(cell.n == 2 for row in report.rows for cell in row.cells.values())


def _shrunk(case: Any, width: int) -> Any:
    size = {"height": 32, "width": width}
    return replace(case, specs={arm: spec.model_copy(update=size) for arm, spec in case.specs.items()})
