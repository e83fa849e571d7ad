"""Times of recipes: counted on miniatures, written as a page, refusals named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import recipes
from benchmarks.recipes import PERSONALISE, Timed, table, timed
from controlroom.backbones import loading
from controlroom.training.catalog import RECIPES, recipe_entry
from tests.evaluation.suites.stage import write_stage


@pytest.fixture
def theatre(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = write_stage(tmp_path / "theatre")
    monkeypatch.setattr(loading, "theatre_folder", lambda: folder)
    return folder


def test_steps_are_timed_and_written(theatre: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "measured/recipes.md"
    line = ["textual_inversion", PERSONALISE, "blip_diffusion", "--steps", "2", "--threads", "1", "--write"]
    assert recipes.main([*line, "--output", str(target)]) == 0
    found = json.loads(target.with_suffix(".json").read_text())
    word, person, refused = found["rows"]
    assert found["threads"] == 1 and [row["steps"] for row in found["rows"]] == [2, 2, 0]
    published = recipe_entry("textual_inversion").load().loop
    assert (word["batch"], word["total"]) == (published["batch_size"], published["total_steps"])
    assert 0 < word["low"] <= word["seconds"] <= word["high"]
    assert word["whole"] == pytest.approx(word["seconds"] * word["total"])
    assert (person["batch"], person["total"]) == (4, 300) and refused["seconds"] is None
    page = target.read_text()
    assert "| `textual_inversion` | 4 |" in page and f"- `blip_diffusion`: {refused['why']}" in page
    assert page in capsys.readouterr().out
    with pytest.raises(SystemExit):
        recipes.main(["lorax"])


def test_a_limit_that_leaves_nothing_is_said(theatre: Path) -> None:
    found = timed("textual_inversion", 3, 1, limit=1e-6)
    assert found.seconds is None and found.whole is None and "limit" in found.why


def test_settings_that_are_needed_are_those_of_recipes() -> None:
    assert set(recipes.NEEDED) <= {entry.name for entry in RECIPES}
    for name, settings in recipes.NEEDED.items():
        recipe_entry(name).load()(**settings)
    assert "| `x` | 2 | 3.00 | 2.00 – 4.00 | 7200 | 6.0 h |" in table([Timed("x", 2, 7200, 3.0, 2.0, 4.0, 3)], 2)
