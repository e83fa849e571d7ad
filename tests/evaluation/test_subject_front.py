"""The front of subjects from end to end on miniatures: trained, kept at each step, measured, drawn, continued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from controlroom.backbones import loading
from controlroom.core.errors import InputError
from controlroom.evaluation import subject_front, tradeoff
from controlroom.evaluation.subject_front import METHODS, Learned, Method, make_front, subject_of
from controlroom.evaluation.suites import subject
from controlroom.evaluation.suites.report import Cell, Report, Row
from controlroom.training import loop as training_loop
from tests.evaluation.suites.stage import write_stage

COUNT: dict[str, Any] = {"puppets": 1, "props": 1, "steps": 2}


@pytest.fixture
def theatre(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = write_stage(tmp_path / "theatre")
    monkeypatch.setattr(loading, "theatre_folder", lambda: folder)
    return folder


def small(class_words: str) -> Any:
    """DreamBooth without its class, which would be drawn first."""
    return METHODS["dreambooth"].settings(class_words).model_copy(update={"class_prompt": None})


TRIED = {
    "textual_inversion": Method(METHODS["textual_inversion"].settings, 1e-2, 1),
    "dreambooth": Method(small, 1e-3, 1),
    "dco": Method(METHODS["dco"].settings, 1e-2, 1),
}


def test_it_trains_measures_and_goes_on(theatre: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    report = make_front((1, 3), work, 2, None, TRIED, COUNT)
    names = {f"{method}-{step}" for method in TRIED for step in (1, 3)}
    kept = report.row(subject.KEPT)
    assert kept is not None and report.n == 2
    assert set(kept.cells) == names | {"class", "own", "dco-1 w3", "dco-3 w3"}
    who = subject_of(None, 1, 1)
    for method, file in (("textual_inversion", "learned_word"), ("dco", "lora")):
        first, last = (
            load_file(work / "adapters" / f"{method}-{step}" / who.name / f"{file}.safetensors") for step in (1, 3)
        )
        assert any(not first[key].equal(last[key]) for key in first)
    assert (work / "adapters/dreambooth-3" / who.name / "unet/config.json").is_file()
    picture = tradeoff.draw_front(report)
    colours = {colour for _, colour in picture.getcolors(1 << 16) or []}
    assert set(tradeoff._COLOURS[:5]) <= colours  # three methods, one of them also guided, and the class

    def never(*_: Any) -> Any:
        raise AssertionError("what was trained was trained again")

    monkeypatch.setattr(training_loop, "train", never)
    assert make_front((1, 3), work, 2, None, TRIED, COUNT).rows == report.rows


def test_the_command_writes_a_figure_and_its_numbers(
    theatre: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "front.png"
    line = ["--methods", "textual_inversion", "--steps", "1", "--n", "2", "--drawing-steps", "2", "--puppets", "1"]
    line += ["--props", "1", "--work", str(tmp_path / "work"), "--output", str(target)]
    assert subject_front.main([*line, "--rate", "textual_inversion=0.01"]) == 0
    with Image.open(target) as shown:
        assert shown.size == (760, 480)
    found = json.loads(target.with_suffix(".json").read_text())
    assert found["suite"] == "subject" and "textual_inversion-1" in found["arms"]
    assert tradeoff.main([str(target.with_suffix(".json")), "--output", str(tmp_path / "again.png")]) == 0
    assert (tmp_path / "again.png").read_bytes() == target.read_bytes()
    capsys.readouterr()
    assert subject_front.main([*line, "--rate", "dco=0.1"]) == 2 and "METHOD=RATE" in capsys.readouterr().err
    assert subject_front.main([*line, "--subject", "nobody"]) == 2 and "'nobody'" in capsys.readouterr().err


def test_methods_are_called_as_the_suite_will_call_them() -> None:
    who = subject_of(None, 1, 0)
    for name, method in METHODS.items():
        settings = method.settings(who.class_words)
        words = "<subject>" if name == "textual_inversion" else f"sks {who.class_words}"
        learned = Learned(who.name, who.class_words, who.subject().pictures, Path("a"), Path("a"))
        assert all(f" {words}" in picture.caption for picture in learned.captioned(name))
        assert settings.loop and method.rate > 0
    with pytest.raises(InputError, match="how many steps"):
        make_front((), Path("nowhere"), 1)


def test_the_front_rings_what_nothing_beats() -> None:
    def row(measure: str, **cells: float) -> Row:
        found = {arm: Cell(value=x, low=x - 0.02, high=x + 0.02, n=9) for arm, x in cells.items()}
        return Row(measure=measure, kind="number", higher=True, extractor="", digits=3, cells=found)

    def report(**arms: tuple[float, float]) -> Report:
        rows = [row(subject.FOLLOWED, **{arm: x for arm, (x, _) in arms.items()})]
        rows.append(row(subject.KEPT, **{arm: y for arm, (_, y) in arms.items()}, own=0.95))
        more: dict[str, Any] = {"note": "", "fingerprint": "0", "about": {}, "differences": [], "derived": []}
        more |= {"picked": [], "seconds": 1.0, "baseline": None, "ours": None, "n": 9, "asked": 9, "title": "t"}
        return Report(suite="subject", arms={arm: arm for arm in arms}, rows=rows, **more)

    arms = {"dco-100": (0.8, 0.5), "dco-200": (0.6, 0.7), "lora-100": (0.5, 0.6)}
    seen: list[dict[str, list[tradeoff.Point]]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tradeoff, "_figure", lambda across, up, lines, ceiling: seen.append(lines))
        tradeoff.draw_front(report(**arms, **{"dco-100 w3": (0.8, 0.6), "class": (0.9, 0.2)}))
    (lines,) = seen
    assert list(lines) == ["dco", "lora", "dco, consistency guidance 3", "the class, no adapter"]
    ringed = {(name, point.label) for name, line in lines.items() for point in line if point.ringed}
    assert ringed == {("dco", "200"), ("dco, consistency guidance 3", "100")}
    with pytest.raises(InputError, match="over steps of training"):
        tradeoff.draw_front(report(dco=(0.5, 0.5)))
