"""Reports: numbers and intervals, differences case by case, what is shown, and what refuses to be compared."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from controlroom.core.errors import InputError
from controlroom.evaluation.estimates import Estimate, mean, share
from controlroom.evaluation.metrics.accumulators import Moments
from controlroom.evaluation.metrics.fid import fid
from controlroom.evaluation.metrics.inception_score import inception_score
from controlroom.evaluation.metrics.kid import kid
from controlroom.evaluation.suites.journal import Journal
from controlroom.evaluation.suites.judges import DistanceScore, LikenessScore, PromptScore, SetDistance, with_extractor
from controlroom.evaluation.suites.pages import markdown, number, page
from controlroom.evaluation.suites.report import Cell, Report, Row, compare, read_report, summarise
from controlroom.evaluation.suites.runner import run
from controlroom.evaluation.suites.suite import Derived, Suite, Values
from tests.evaluation.suites.stage import Draws, Words, opened
from tests.evaluation.suites.test_runner import toy

LEVELS = (40, 200, 90, 160, 20, 250, 130)


def two_levels(prompt: str, controlled: bool, seed: int) -> Image.Image:
    level = LEVELS[int(prompt.split()[1])]
    return Image.new("RGB", (8, 8), (level,) * 3)


class Brighter(Draws):
    """The arm with a negative prompt is brighter by a tenth."""

    def __call__(self, spec: Any) -> list[Image.Image]:
        found = super().__call__(spec)
        return [p.point(lambda v: min(v + 25, 255)) for p in found] if spec.negative_prompt else found


def measured(suite: Suite[Any], path: Path, draw: Any = None) -> Report:
    draw = draw or Brighter(two_levels)
    about = suite.about(draw.fingerprint)
    return summarise(suite, run(suite, draw, Journal(path / "toy.cases.jsonl", about), 3), about)


class Colours:
    """An extractor of six numbers, and for those who ask it a classifier of three classes."""

    def __init__(self, label: str = "colours") -> None:
        self.name, self.hash = label, "11"

    def features(self, images: torch.Tensor) -> torch.Tensor:
        means = images.mean(dim=(2, 3))
        return torch.cat([means, means.square()], dim=1) + 0.1


class Classes(Colours):
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        return self.features(images)[:, :3] * torch.tensor([1.0, 5.0, -5.0])


class Far:
    name, hash = "far", "22"

    def distance(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return (first - second).abs().mean(dim=(1, 2, 3))


def test_numbers(tmp_path: Path) -> None:
    def brighter(rows: Sequence[Values]) -> Estimate:
        return share([row["other"]["bright"] == 1 for row in rows if row["plain"]["bright"] == 0])

    suite = toy(7)
    suite = replace(suite, table=replace(suite.table, derived=(Derived("made bright", "share", brighter),), note="Hm."))
    report = measured(suite, tmp_path)
    plain = [level / 255 for level in LEVELS]
    other = [min(level + 25, 255) / 255 for level in LEVELS]
    row = report.row("level")
    assert row is not None and report.n == 7 == report.asked
    assert row.cells["plain"] == Cell.of(mean(plain)) and row.cells["other"] == Cell.of(mean(other))
    bright = report.row("bright")
    assert bright is not None and bright.cells["plain"] == Cell.of(share([x > 0.5 for x in plain]))
    # Case by case the difference hardly varies, though the levels do.
    difference = next(one for one in report.differences if one.measure == "level").cells["other"]
    assert difference == Cell.of(mean([b - a for a, b in zip(plain, other, strict=True)]))
    assert difference.low is not None and difference.low > 0.05
    assert report.derived[0].cells[""] == Cell.of(brighter_of(plain, other))
    picked = {one.place: one.number for one in report.picked}
    assert picked == {"worst": 4, "median": 6, "best": 5}
    again = Report.model_validate_json(report.model_dump_json())
    assert again == report
    json.loads(report.model_dump_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def brighter_of(plain: list[float], other: list[float]) -> Estimate:
    return share([b > 0.5 for a, b in zip(plain, other, strict=True) if a <= 0.5])


def test_markdown_and_page(tmp_path: Path) -> None:
    report = measured(toy(7), tmp_path)
    text = markdown(report)
    assert "7 cases; 95 % intervals" in text and "| level ↑ |" in text and "| bright ↑ | 57.1 % [" in text
    assert "other minus plain, case by case" in text and "points [" in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.count("|") in (3, 5)
    html = page(report)
    assert "The worst case" in html and "The median case" in html and "The best case" in html
    pictures = re.findall(r'src="data:image/webp;base64,([^"]+)"', html)
    assert len(pictures) == 3 * 3 == html.count("<img") == html.count("src=")
    worst = np.asarray(opened(pictures[0]))
    assert worst.mean() == pytest.approx(LEVELS[4], abs=2)
    # Nothing lies elsewhere.
    assert not re.search(r"https?:|<script|<link|url\(|@import", html)
    assert html.count("<table>") == html.count("</table>") == 2


def test_what_a_suite_says_is_text_and_not_markup(tmp_path: Path) -> None:
    suite = toy(2)

    def case(number: int) -> Any:
        one = suite.case(number)
        return replace(one, title=f'<img src=x onerror="alert({number})"> a | b')

    arms = (replace(suite.arms[0], title="a | <b>"), *suite.arms[1:])
    report = measured(replace(suite, case=case, arms=arms), tmp_path)
    html = page(report)
    assert "onerror=&quot;" in html and "<img src=x" not in html and "a | &lt;b&gt;" in html
    assert "a \\| <b>" in markdown(report)


def test_part_of_the_cases_and_none(tmp_path: Path) -> None:
    suite = toy(7)
    about = suite.about("fake")
    empty = summarise(suite, [], about)
    assert empty.n == 0 and empty.picked == [] and empty.row("level") is not None
    assert "0 of 7 cases" in markdown(empty) and "<html" in page(empty)
    records = run(suite, Brighter(two_levels), Journal(tmp_path / "a.jsonl", about), 3)
    one = summarise(suite, records[:1], about)
    assert [picked.place for picked in one.picked] == ["worst"]
    assert "1 of 7 cases" in markdown(one)


def test_cells() -> None:
    row = Row(measure="m", kind="number", higher=None, extractor="", digits=2, cells={})
    assert number(row, None) == "–" == number(row, Cell(value=None, low=None, high=None, n=0))
    assert number(row, Cell(value=-1.234, low=-2.0, high=0.5, n=3)) == "-1.23 [-2.00, 0.50]"
    assert number(row, Cell(value=1.234, low=-2.0, high=0.5, n=3), True) == "+1.23 [-2.00, +0.50]"
    shares = row.model_copy(update={"kind": "share"})
    assert number(shares, Cell(value=0.125, low=0.1, high=0.2, n=3), True) == "+12.5 points [+10.0, +20.0]"


# Judges.


def test_judges_with_a_text_or_a_reference(tmp_path: Path) -> None:
    suite = toy(7)
    words, colours, far = Words(), Colours(), Far()
    suite = replace(
        suite,
        judges=(
            *suite.judges,
            PromptScore(words, {"plain": "plain", "true": "plain"}),
            LikenessScore(colours, "true", suite.compared),
            DistanceScore(far, "true", suite.compared),
        ),
    )
    report = measured(suite, tmp_path)
    rows = {row.measure: row for row in report.rows}
    assert set(rows["CLIP score"].cells) == {"plain", "true"}
    assert rows["CLIP score"].extractor == "words@00"
    assert set(rows["similarity"].cells) == {"plain", "other"} == set(rows["distance"].cells)
    levels = [1 - level / 255 for level in LEVELS]
    assert rows["distance"].cells["plain"].value == pytest.approx(np.mean(levels), abs=1e-6)
    assert rows["distance"].higher is False and rows["distance"].extractor == "far@22"
    assert "colours@11, far@22, words@00" in markdown(report)


def test_sets_are_compared_as_wholes(tmp_path: Path) -> None:
    seen = Classes()
    suite = toy(7)
    judge = SetDistance(seen, "true")
    judge.SPLITS = 2
    suite = replace(suite, set_judges=(judge,))
    report = measured(suite, tmp_path)
    rows = {row.measure: row for row in report.rows}
    features = {}
    for arm, levels in {"plain": LEVELS, "true": [255] * 7}.items():
        images = torch.tensor(levels, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 2, 2) / 255
        features[arm] = seen.features(images), seen.logits(images)
    own, true = Moments(), Moments()
    own.add(features["plain"][0])
    true.add(features["true"][0])
    assert rows["FID"].cells["plain"].value == pytest.approx(fid(own, true), rel=1e-4)
    assert rows["FID"].cells["plain"].low is None
    expected = kid(features["plain"][0], features["true"][0])
    assert rows["KID"].cells["plain"].value == pytest.approx(expected.mean, rel=1e-3)
    assert rows["KID"].cells["plain"].low == pytest.approx(expected.low, rel=1e-2)
    assert rows["IS"].cells["plain"].value == pytest.approx(inception_score(features["plain"][1], 2)[0], rel=1e-4)
    assert set(rows["FID"].cells) == {"plain", "other"} and rows["FID"].extractor == "colours@11"
    # Too few for any: the rows are there, without numbers.
    few = summarise(suite, [], suite.about("fake"))
    assert [(row.measure, row.cells) for row in few.rows if row.extractor] == [("KID", {}), ("FID", {}), ("IS", {})]


def test_one_more_extractor_says_what_it_can() -> None:
    suite = toy()
    named = {
        "CLIP score (words)": Words(),
        "colours": Colours(),
        "far": Far(),
        "KID (colours)": Classes(),
    }
    for name, extractor in named.items():
        more = with_extractor(suite, extractor)
        measures = [m.name for judge in (*more.judges, *more.set_judges) for m in judge.measures]
        assert measures[:2] == ["level", "bright"] and measures[2] == name
        assert more.about("fake")["judges"] != suite.about("fake")["judges"]
    with pytest.raises(InputError, match="no reference pictures"):
        with_extractor(replace(suite, reference=None), Colours())
    with pytest.raises(InputError, match="object is no extractor"):
        with_extractor(suite, object())


# Comparing.


def test_reports_are_compared_number_by_number(tmp_path: Path) -> None:
    first = measured(toy(7), tmp_path / "a")
    second = measured(toy(7, steps=9), tmp_path / "b", Draws(lambda *given: Image.new("RGB", (8, 8), "white")))
    found = compare(second, first)
    assert {(one.measure, one.arm) for one in found} == {
        (measure, arm) for measure in ("level", "bright") for arm in ("plain", "other", "true")
    }
    clear = {(one.measure, one.arm) for one in found if one.clear}
    assert ("level", "plain") in clear and ("level", "true") not in clear
    text = markdown(second, found)
    assert "Against the other report" in text and "| yes |" in text and "| no |" in text
    assert "Against the other report" in page(second, found)


def test_numbers_of_two_extractors_are_not_compared(tmp_path: Path) -> None:
    suite = toy(7)
    reports = []
    for extractor in (Colours("inception"), Colours("theatre-attributes")):
        judges = (*suite.judges, LikenessScore(extractor, "true", suite.compared))
        reports.append(measured(replace(suite, judges=judges), tmp_path / extractor.name))
    said = "similarity of two extractors cannot be compared: theatre-attributes@11 and inception@11"
    with pytest.raises(InputError, match=said):
        compare(reports[1], reports[0])
    assert compare(reports[0], reports[0])
    # It is found out before anything is drawn.
    other = replace(suite, judges=(*suite.judges, LikenessScore(Colours("mine"), "true", suite.compared)))
    with pytest.raises(InputError, match="mine@11 and inception@11"):
        compare(summarise(other, [], other.about("fake")), reports[0])
    with pytest.raises(InputError, match="two suites"):
        compare(reports[0].model_copy(update={"suite": "other"}), reports[0])


def test_reading_a_report(tmp_path: Path) -> None:
    report = measured(toy(3), tmp_path)
    file = tmp_path / "toy.json"
    file.write_text(report.model_dump_json())
    assert read_report(file) == report
    file.write_text("{}")
    with pytest.raises(InputError, match="is not a report"):
        read_report(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_report(tmp_path / "no.json")
