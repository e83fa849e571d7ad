"""DreamBooth of several people on miniatures: each trained by itself, measured beside the adapters, continued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from controlroom.backbones import loading
from controlroom.evaluation import people_dreambooth
from controlroom.evaluation.people_dreambooth import measure, train_people
from controlroom.evaluation.subject_front import METHODS, Method
from controlroom.evaluation.suites import people
from controlroom.training import loop as training_loop
from tests.evaluation.suites.stage import write_stage


@pytest.fixture
def theatre(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = write_stage(tmp_path / "theatre")
    monkeypatch.setattr(loading, "theatre_folder", lambda: folder)
    return folder


LORA = METHODS["dreambooth_lora"].settings


def small(class_words: str) -> Any:
    """DreamBooth-LoRA with two pictures of the class."""
    settings: Any = LORA(class_words)
    return settings.model_copy(update={"class_count": 2, "class_steps": 1, "rank": 2})


SMALL = Method(small, 1e-2, 1)


def test_every_person_is_trained_and_measured_and_nobody_twice(
    theatre: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    adapters = train_people("dreambooth_lora", SMALL, 1, 2, work, "theatre")
    names = [people.person_number(number).name for number in range(2)]
    first, second = (load_file(adapters / name / "lora.safetensors") for name in names)
    assert any(not first[key].equal(second[key]) for key in first)
    figures = {people.person_number(number).scenes[0].puppets[0].identity.figure for number in range(2)}
    assert all((work / "training" / figure / "class" / "class.json").is_file() for figure in figures)
    report = measure(adapters, 2, work, "theatre", 2)
    kept = report.row(people.AGREES)
    assert kept is not None and report.n == 2 and {"words", "dreambooth", "truth"} <= set(kept.cells)

    def never(*_: Any) -> Any:
        raise AssertionError("what was trained was trained again")

    monkeypatch.setattr(training_loop, "train", never)
    monkeypatch.setitem(METHODS, "dreambooth_lora", SMALL)
    target = tmp_path / "people.json"
    line = ["--method", "dreambooth_lora", "--steps", "1", "--n", "2", "--drawing-steps", "2"]
    line += ["--work", str(work), "--output", str(target)]
    assert people_dreambooth.main(line) == 0
    assert json.loads(target.read_text())["rows"] == [row.model_dump() for row in report.rows]
    capsys.readouterr()
    assert people_dreambooth.main([*line, "--n", "0"]) == 2 and "at least 1" in capsys.readouterr().err
    assert people_dreambooth.main([*line, "--rate", "-1"]) == 2 and "above 0" in capsys.readouterr().err
