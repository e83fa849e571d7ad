"""The table of effects: what is reached, what is not, what is open, and what has not been measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from controlroom.app import docs
from controlroom.core.errors import InputError
from controlroom.evaluation import effects, tradeoff
from controlroom.evaluation.effect_rules import Gain, Joint, Level, NotWorse, Rising, against
from controlroom.evaluation.effects import MEASURED, MISSING, SECTIONS
from controlroom.evaluation.suites.controlnet import SIZE
from controlroom.evaluation.suites.drawing import weights_hash
from controlroom.evaluation.suites.editing import MADE, PSNR
from controlroom.evaluation.suites.report import Cell, Report, Row
from controlroom.evaluation.suites.table import SUITES

TARGETS = [target for targets in SECTIONS.values() for target in targets]


def cell(value: float, half: float | None = None, n: int = 200) -> Cell:
    low, high = (None, None) if half is None else (value - half, value + half)
    return Cell(value=value, low=low, high=high, n=n)


def row(measure: str, kind: Any = "number", higher: bool | None = True, **cells: Cell) -> Row:
    return Row(measure=measure, kind=kind, higher=higher, extractor="x@1", digits=1, cells=cells)


def report(suite: str, rows: list[Row], **more: Any) -> Report:
    arms = {arm: arm.upper() for one in rows for arm in one.cells}
    settings: dict[str, Any] = {
        "suite": suite,
        "title": f"Title of {suite}",
        "note": "",
        "fingerprint": "0" * 16,
        "about": {"settings": {"steps": 20, "model": "theatre"}, "model": weights_hash("theatre")},
        "n": 200,
        "asked": 200,
        "arms": arms,
        "baseline": "base",
        "ours": "ours",
        "rows": rows,
        "differences": [],
        "derived": [],
        "picked": [],
        "seconds": 1.0,
    }
    return Report(**{**settings, **more})


def written(found: Report, docs_folder: Path) -> None:
    place = docs_folder / effects.REPORTS
    place.mkdir(parents=True, exist_ok=True)
    (place / f"{found.suite}.json").write_text(found.model_dump_json(), encoding="utf-8")


def line(text: str, control: str, asked: str) -> list[str]:
    (found,) = [each for each in text.splitlines() if each.startswith(f"| {control} | {asked}")]
    return [part.strip() for part in found.strip("|").split("|")]


def test_numbers_of_weights_before_are_marked(tmp_path: Path) -> None:
    target = next(target for target in TARGETS if isinstance(target.rule, Level))
    rows = [row(target.rule.measure, **{target.rule.arm: cell(0.5, 0.1)})]
    now = report(target.suite, rows)
    changed = now.model_copy(update={"about": {**now.about, "model": "0" * 16}})
    gone = now.model_copy(update={"weights": ["theatre/no_such_network"]})
    for found, marked in ((now, False), (changed, True), (gone, True)):
        written(found, tmp_path)
        text = effects.effects_page(tmp_path)
        assert (f"200 {effects.BEFORE}" in text) == marked
        assert ("measured with weights before" in text) == marked


def test_without_reports_nothing_is_measured(tmp_path: Path) -> None:
    text = effects.effects_page(tmp_path)
    rows = [each for each in text.splitlines() if each.startswith("| ") and not each.startswith("| control |")]
    assert len(rows) == len(TARGETS) and all(MISSING in each for each in rows)
    assert "depend on" not in text


def test_every_target_has_a_suite_that_is_measured_and_can_have_its_numbers() -> None:
    """The arm and measure of each rule are ones that its suite has; a renamed one would be "not measured" for ever."""
    assert {target.suite for target in TARGETS} <= set(MEASURED) <= set(SUITES)
    from controlroom.evaluation.suites.table import open_suite

    for target in TARGETS:
        suite, rule = open_suite(target.suite, 1), target.rule
        measures = {m.name for judge in (*suite.judges, *suite.set_judges) for m in judge.measures}
        arms = {arm.name for arm in suite.arms}
        if isinstance(rule, Joint):
            assert rule.measure in {one.name for one in suite.table.derived}
            continue
        assert isinstance(rule, Level | Gain | Rising | NotWorse) and rule.measure in measures
        if isinstance(rule, Gain):
            assert rule.arm in (suite.table.ours, *suite.table.others)
        elif not isinstance(rule, Rising):
            assert rule.arm in arms and (rule.base is None or rule.base in arms)


def test_levels_and_gains_are_judged_with_their_intervals(tmp_path: Path) -> None:
    rows = [row(MADE, "share", prompt_to_prompt=cell(0.9, 0.02), reprompted=cell(0.95, 0.02))]
    rows.append(row(PSNR, prompt_to_prompt=cell(25.0, 0.5), reprompted=cell(18.0, 0.5)))
    gain = [row(PSNR, prompt_to_prompt=cell(7.0, 1.5))]
    found = report("prompt_to_prompt", rows, differences=gain, baseline="reprompted", n=120)
    written(found, tmp_path)
    text = effects.effects_page(tmp_path)
    made = line(text, "Prompt-to-Prompt, swap", "change made")
    assert made[2] == "90.0 % [88.0, 92.0]" and made[3] == "REPROMPTED: 95.0 % [93.0, 97.0]" and made[5] == "yes"
    assert made[4] == "200 (stopped)"
    outside = line(text, "Prompt-to-Prompt, swap", "PSNR outside")
    assert "+7.0 [+5.5, +8.5]" in outside[2] and outside[5] == "yes, within the error"
    assert line(text, "SEGA", "attribute appears")[2] == MISSING
    assert "Title of prompt_to_prompt" in text and "measurement 0000" in text
    assert against(cell(0.5, 0.1), least=0.55) == "no, within the error"
    assert against(cell(0.5, 0.01), least=0.55) == "no"
    assert against(cell(0.9, 0.3), most=1.0) == "yes, within the error"


def test_rates_must_not_fall() -> None:
    def rising(*values: float) -> str:
        arms = dict(zip(("0.5", "1", "1.5"), (cell(value, 0.01) for value in values), strict=True))
        found = Rising("m")(report("s", [row("m", "share", True, **arms)], baseline="1"))
        assert found is not None
        return found.reached

    assert rising(0.2, 0.5, 0.8) == "yes" and rising(0.2, 0.9, 0.8) == "no" and rising(0.5, 0.5, 0.5) == "no"
    assert rising(0.5, 0.505, 0.51) == "yes, within the error"


def test_sets_are_compared_by_their_numbers() -> None:
    found = NotWorse("FID", "sag", "plain")(report("s", [row("FID", sag=cell(9.0), plain=cell(10.0))]))
    assert found is not None and found.reached == "yes" and found.base == "PLAIN: 10.0"
    worse = NotWorse("FID", "sag", "plain")(report("s", [row("FID", sag=cell(11.0), plain=cell(10.0))]))
    assert worse is not None and worse.reached == "no"
    assert NotWorse("FID", "pag", "plain")(report("s", [row("FID", sag=cell(9.0), plain=cell(10.0))])) is None


def test_reports_under_another_name_are_refused(tmp_path: Path) -> None:
    written(report("masactrl", []), tmp_path)
    place = tmp_path / effects.REPORTS
    (place / "masactrl.json").rename(place / "imagic.json")
    with pytest.raises(InputError, match="report of 'masactrl'"):
        effects.effects_page(tmp_path)


def test_the_page_is_checked_with_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert docs.main(["--folder", str(tmp_path)]) == 0
    assert docs.main(["--check", "--folder", str(tmp_path)]) == 0
    written(report("masactrl", [row(MADE, "share", masactrl=cell(0.5, 0.1))]), tmp_path)
    assert docs.main(["--check", "--folder", str(tmp_path)]) == 1
    assert "effects.md" in capsys.readouterr().err
    assert effects.main(["--folder", str(tmp_path)]) == 0
    assert docs.main(["--check", "--folder", str(tmp_path)]) == 0
    assert effects.main(["--folder", str(tmp_path / "no")]) == 2


def test_what_cannot_be_measured_does_not_stop_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from controlroom.core.errors import ModelError

    asked: list[str] = []

    def fake(suite: str, folder: Path, work: Path, wish: effects.Wish) -> Report:
        asked.append(suite)
        if suite == "instruct_pix2pix":
            raise ModelError("no weights")
        return report(suite, [])

    monkeypatch.setattr(effects, "measure", fake)
    assert effects.main(["--folder", str(tmp_path), "--measure", "instruct_pix2pix", "masactrl"]) == 1
    assert asked == ["instruct_pix2pix", "masactrl"] and "no weights" in capsys.readouterr().err
    assert (tmp_path / "effects.md").is_file()


def test_a_suite_with_steps_of_its_own_keeps_them() -> None:
    """All suites were measured with 20 steps; the one that compares 50 with 20 must have both."""
    assert {suite: effects.steps_of(suite, None) for suite in MEASURED} == {
        suite: 50 if suite == "stylise" else 20 for suite in MEASURED
    }
    assert effects.steps_of("stylise", 30) == effects.steps_of("masactrl", 30) == 30


def test_a_number_of_all_cases_is_shown_without_a_bound(tmp_path: Path) -> None:
    size = row(SIZE, **{"": cell(12.5)})
    written(report("t2i_adapter", [], derived=[size]), tmp_path)
    assert line(effects.effects_page(tmp_path), "T2I-Adapter", SIZE)[2:] == ["12.5", "–", "200", "–"]
    assert line(effects.effects_page(tmp_path), "Uni-ControlNet", SIZE)[2] == MISSING


# The curve.


def test_the_curve_has_a_line_for_each_text_guidance(tmp_path: Path) -> None:
    arms = {"I1 T3": (0.9, 18.0), "I2 T3": (0.5, 26.0), "I1 T7.5": (0.95, 16.0), "I2 T7.5": (0.7, 23.0)}
    rows = [
        row(MADE, "share", True, **{arm: cell(x, 0.03) for arm, (x, _) in arms.items()}),
        row(PSNR, "number", True, **{arm: cell(y, 0.4) for arm, (_, y) in arms.items()}, autoencoder=cell(31.0, 0.2)),
    ]
    found = report("instruct_pix2pix_sweep", rows)
    picture = tradeoff.draw_curve(found)
    colours = {colour for _, colour in picture.getcolors(1 << 16) or []}
    assert set(tradeoff._COLOURS[:2]) <= colours and tradeoff._COLOURS[2] not in colours
    source, target = tmp_path / "sweep.json", tmp_path / "curve.png"
    source.write_text(found.model_dump_json(), encoding="utf-8")
    assert tradeoff.main([str(source), "--output", str(target)]) == 0
    with Image.open(target) as shown:
        assert shown.size == picture.size
    (tmp_path / "measured").mkdir()
    picture.save(tmp_path / effects.CURVE)
    assert f"({effects.CURVE})" in effects.effects_page(tmp_path)
    with pytest.raises(InputError, match="no sweep"):
        tradeoff.draw_curve(report("masactrl", rows[:1]))
