"""The runner: what it draws and keeps, how it stops and goes on, and what it refuses to mix."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from controlroom.core.errors import InputError, OutputError
from controlroom.core.spec import RunSpec
from controlroom.evaluation.suites.journal import Journal, Record
from controlroom.evaluation.suites.report import summarise
from controlroom.evaluation.suites.runner import THUMBNAIL, Progress, packed, run, thumbnail, unpacked
from controlroom.evaluation.suites.suite import Arm, Case, Measure, Shown, Suite, SuiteSettings, Table, Values
from tests.evaluation.suites.stage import Draws, opened


class Brightness:
    """How bright a picture is, and whether it is brighter than half."""

    fingerprint = "brightness 1"
    measures = (Measure("level"), Measure("bright", "share"))

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, shown: Sequence[Shown[int]]) -> list[Values]:
        found = []
        for one in shown:
            self.seen.append(one.case.number)
            assert one.case.truth == 10 * one.case.number
            levels = {arm: float(np.asarray(picture).mean()) / 255 for arm, picture in one.pictures.items()}
            found.append({arm: {"level": x, "bright": float(x > 0.5)} for arm, x in levels.items()})
        return found


def toy(n: int = 5, steps: int = 2, seed: int = 100) -> Suite[int]:
    settings = SuiteSettings(steps=steps, seed=seed)

    def case(number: int) -> Case[int]:
        base = RunSpec(prompt=f"case {number}", num_inference_steps=steps, seed=seed + number)
        other = base.model_copy(update={"negative_prompt": "dark"})
        white = Image.new("RGB", (300, 200), "white")
        return Case(number, f"case {number}", 10 * number, {"plain": base, "other": other}, {"true": lambda: white})

    return Suite(
        name="toy",
        title="A toy",
        n=n,
        settings=settings,
        arms=(Arm("plain", "plain"), Arm("other", "other"), Arm("true", "true", known=True)),
        case=case,
        judges=(Brightness(),),
        table=Table(rank=lambda values: (values["other"]["level"] or 0.0,), baseline="plain", ours="other"),
        reference="true",
        world="toy-1",
    )


def grey(prompt: str, controlled: bool, seed: int) -> Image.Image:
    """A level that says which case it is."""
    number = int(prompt.split()[1])
    assert seed == 100 + number
    return Image.new("RGB", (8, 8), (20 * number + 10,) * 3)


def measured(suite: Suite[int], draw: Draws, path: Path, **more: Any) -> list[Record]:
    return run(suite, draw, Journal(path, suite.about(draw.fingerprint)), **more)


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True)


def test_every_case_is_a_line(tmp_path: Path) -> None:
    path, draw, suite = tmp_path / "new/toy.cases.jsonl", Draws(grey), toy()
    told: list[Progress] = []
    records = measured(suite, draw, path, batch_size=2, progress=told.append)
    # Two arms, three batches; consecutive cases are one run.
    assert draw.runs == [(2, 100, False)] * 2 + [(2, 102, False)] * 2 + [(1, 104, False)] * 2
    assert [record.number for record in records] == list(range(5))
    assert len(lines_of(path)) == 1 + 5
    for record in records:
        assert record.values["plain"]["level"] == pytest.approx((20 * record.number + 10) / 255)
        assert record.values["true"] == {"level": 1.0, "bright": 1.0}
        assert opened(record.thumbnails["plain"]).size == (8, 8)
        assert opened(record.thumbnails["true"]).size == (THUMBNAIL, 128)
    assert [(one.done, one.n) for one in told] == [(0, 5), (2, 5), (4, 5), (5, 5)]
    assert told[0].seconds_left is None and told[-1].seconds_left == 0.0
    assert all(one.seconds_left is not None and one.seconds_left > 0 for one in told[1:-1])
    # Again: nothing is left to do.
    again = Draws(grey)
    assert measured(suite, again, path) == records and again.runs == []


def test_continues_after_a_crash(tmp_path: Path) -> None:
    path, suite = tmp_path / "toy.cases.jsonl", toy()
    before = measured(suite, Draws(grey), path)
    whole = lines_of(path)
    # Cases 1 and 4 are lost; the line of case 3 was being written.
    path.write_text("".join([whole[0], whole[1], whole[3]]) + whole[4][:70])
    draw = Draws(grey)
    after = measured(suite, draw, path, batch_size=8)
    assert draw.runs == [(1, 101, False)] * 2 + [(2, 103, False)] * 2
    assert [one.model_copy(update={"seconds": 0}) for one in after] == [
        one.model_copy(update={"seconds": 0}) for one in before
    ]
    assert len(lines_of(path)) == 6
    about = suite.about("fake")
    reports = [summarise(suite, rows, about).model_copy(update={"seconds": 0}) for rows in (before, after)]
    assert reports[0] == reports[1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_was_finished_before_an_interrupt_is_kept(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "toy.cases.jsonl"

    def until_three(prompt: str, controlled: bool, seed: int) -> Image.Image:
        if seed == 103:
            raise error
        return grey(prompt, controlled, seed)

    with pytest.raises(error):
        measured(toy(), Draws(until_three), path, batch_size=1)
    assert len(lines_of(path)) == 1 + 3
    draw = Draws(grey)
    assert len(measured(toy(), draw, path)) == 5
    assert draw.runs == [(2, 103, False)] * 2


def test_more_cases_are_added_and_fewer_are_a_part(tmp_path: Path) -> None:
    path = tmp_path / "toy.cases.jsonl"
    measured(toy(2), Draws(grey), path)
    draw = Draws(grey)
    assert len(measured(toy(4), draw, path)) == 4
    assert draw.runs == [(2, 102, False)] * 2
    again = Draws(grey)
    assert [record.number for record in measured(toy(3), again, path)] == [0, 1, 2] and again.runs == []
    assert len(lines_of(path)) == 5


def test_stops_when_its_time_is_over(tmp_path: Path) -> None:
    path = tmp_path / "toy.cases.jsonl"
    assert measured(toy(), Draws(grey), path, seconds=0) == []
    assert len(lines_of(path)) == 1
    assert len(measured(toy(), Draws(grey), path, seconds=600)) == 5


@pytest.mark.parametrize(
    ("suite", "draws", "said"),
    [
        (toy(steps=3), "fake", r"settings steps \(2 there, 3 now\)"),
        (toy(seed=100), "other weights", r"model \(fake there, other weights now\)"),
        (toy(seed=7), "fake", "settings seed"),
    ],
)
def test_another_measurement_is_refused(tmp_path: Path, suite: Suite[int], draws: str, said: str) -> None:
    path = tmp_path / "toy.cases.jsonl"
    measured(toy(), Draws(grey), path)
    before, draw = path.read_bytes(), Draws(grey, draws)
    with pytest.raises(InputError, match=said):
        measured(suite, draw, path)
    assert path.read_bytes() == before and draw.runs == []


def test_judges_world_and_cases_belong_to_a_measurement() -> None:
    from dataclasses import replace

    suite = toy()
    other = Brightness()
    other.fingerprint = "brightness 2"
    same = suite.about("fake")
    assert toy(n=99).about("fake") == same
    assert replace(suite, judges=(other,)).about("fake") != same
    assert replace(suite, world="toy-2").about("fake") != same
    assert replace(suite, case=lambda number: toy(seed=5).case(number)).about("fake") != same


@pytest.mark.parametrize("text", ["not a journal\n", '{"format": 1}\n', "\n\n", "\x00\xff"])
def test_another_file_is_not_touched(tmp_path: Path, text: str) -> None:
    path = tmp_path / "toy.cases.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match="is not the journal"):
        measured(toy(), Draws(grey), path)
    assert path.read_text() == text


def test_two_that_ran_at_once_leave_one_record_of_each_case(tmp_path: Path) -> None:
    path = tmp_path / "toy.cases.jsonl"
    records = measured(toy(), Draws(grey), path)
    journal = Journal(path, toy().about("fake"))
    journal.append(records[:2])
    assert measured(toy(), Draws(grey), path) == records
    header = json.loads(lines_of(path)[0])
    assert header["about"]["suite"] == "toy" and len(header["fingerprint"]) == 16


def test_no_room(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="folder"):
        measured(toy(), Draws(grey), tmp_path / "file/toy.cases.jsonl")
    path = tmp_path / "toy.cases.jsonl"
    records = measured(toy(), Draws(grey), path)
    path.unlink()
    path.mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        Journal(path, {}).append(records)


@pytest.mark.parametrize("pictures", [[], [Image.new("RGB", (2, 2))] * 3, [torch.zeros(3, 2, 2)] * 2])
def test_a_run_draws_one_picture_for_a_case(tmp_path: Path, pictures: list[Any]) -> None:
    class Wrong:
        fingerprint = "fake"

        def __call__(self, spec: RunSpec) -> list[Any]:
            return pictures

    with pytest.raises(InputError, match="one picture, as PIL"):
        measured(toy(2), Wrong(), tmp_path / "toy.cases.jsonl")  # type: ignore[arg-type]


def test_two_measures_of_one_name_are_refused() -> None:
    from dataclasses import replace

    with pytest.raises(InputError, match="bright, level"):
        replace(toy(), judges=(Brightness(), Brightness()))


def test_settings_say_what_is_wrong() -> None:
    with pytest.raises(InputError, match="steps: .*got 0"):
        SuiteSettings(steps=0)
    with pytest.raises(InputError, match="colour"):
        SuiteSettings(colour="red")


def test_thumbnails_and_vectors() -> None:
    values = np.random.default_rng(0).normal(size=7).astype(np.float32)
    assert np.array_equal(unpacked(packed(values)), values)
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)).resize((600, 400))
    small = opened(thumbnail(smooth))
    assert small.size == (THUMBNAIL, 128)
    assert np.abs(np.asarray(small, int) - np.asarray(smooth.resize((THUMBNAIL, 128)), int)).mean() < 6
