"""The measurement of retargeting on miniatures: every method, one pair for one picture, stopped and continued."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from controlroom.backbones import loading
from controlroom.core.errors import InputError, ModelError, OutputError
from controlroom.data.theatre.attributes import ANSWERS, attributes
from controlroom.data.theatre.render import render
from controlroom.data.theatre.truth import keypoints
from controlroom.evaluation import retarget_methods, retarget_quality
from controlroom.evaluation.lines import Lines
from controlroom.evaluation.retarget_judge import IDENTITY, KEPT, Judge, Verdict
from controlroom.evaluation.retarget_methods import FIRST_PAIR, METHODS, Trial, available, draw, key_of, pair_number
from controlroom.evaluation.retarget_report import falls_short, markdown, summarise, worst_median_best
from controlroom.sampling.pipeline import Pipeline
from controlroom.signals.readers import AttributeReader
from tests.controls.nets import tiny_image_encoder, tiny_ip_adapter
from tests.tasks.theatre import write_theatre
from tests.tiny import tiny_unet

TRIAL = Trial(steps=2)


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's assets as miniatures, with an IP-Adapter and both readers."""
    folder = write_theatre(tmp_path_factory.mktemp("stage") / "theatre")
    (folder / "ip_adapter").mkdir()
    save_file(tiny_ip_adapter(tiny_unet()), str(folder / "ip_adapter/ip_adapter.safetensors"))
    tiny_image_encoder().save_pretrained(folder / "ip_adapter/image_encoder")
    torch.manual_seed(0)
    AttributeReader(ANSWERS, size=32, width=8).save(folder / "readers/attributes")
    return folder


@pytest.fixture
def theatre(stage: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(loading, "theatre_folder", lambda: stage)
    return stage


@pytest.fixture(scope="session")
def pipe(stage: Path) -> Pipeline:
    return Pipeline.from_pretrained(str(stage))


def run(output: Path, n: int = 3, *more: str) -> None:
    retarget_quality.main(
        ["--n", str(n), "--batch-size", "2", "--steps", "2", "--output", str(output), *more],
    )


def test_from_weights_to_tables_and_continued_after_a_stop(
    theatre: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "measured/retarget.json"
    run(output)
    found = json.loads(output.read_text())
    assert found["n"] == 3
    assert list(found["methods"]) == [*METHODS, "truth", "reconstruction"]
    assert list(found["differences"]) == ["ip_adapter", "reference_only", "controlnet"]
    assert found["methods"]["truth"]["ssim"]["mean"] == pytest.approx(1.0)
    assert found["methods"]["truth"]["distance"]["mean"] == 0.0
    assert 0 < found["methods"]["controlnet"]["distance"]["mean"] < 4
    table = output.with_suffix(".md").read_text()
    assert all(method.title in table for method in METHODS.values())
    assert Image.open(output.with_suffix(".png")).width > 7 * 128
    assert "12 of 12 pictures, 0 s left" in capsys.readouterr().out

    # Two verdicts are lost, and a third was being written.
    lines = output.with_suffix(".pairs.jsonl")
    rows = lines.read_text().splitlines(keepends=True)
    assert len(rows) == 3 * 6
    lost = [row for row in rows if f'"pair":{FIRST_PAIR + 2}' in row and '"ip_adapter"' in row]
    kept = [row for row in rows if row not in lost]
    lines.write_text("".join(kept[:-1]) + kept[-1][:50])
    before, drawn = output.read_bytes(), []
    real = retarget_methods.draw

    def counted(pipe: Pipeline, name: str, numbers: range, trial: Trial) -> list[Image.Image]:
        drawn.append((name, numbers))
        return real(pipe, name, numbers, trial)

    monkeypatch.setattr(retarget_quality, "draw", counted)
    monkeypatch.setattr(retarget_quality, "contact_sheet", lambda *given: None)
    run(output)
    alone = range(FIRST_PAIR + 2, FIRST_PAIR + 3)
    assert drawn == [("ip_adapter", alone), ("reconstruction", alone)]
    assert output.read_bytes() == before
    assert sorted(lines.read_text().splitlines(keepends=True)) == sorted(rows)

    # Other settings use none of these lines, and leave them.
    drawn.clear()
    run(output, 1, "--methods", "controlnet", "--guidance-scale", "1")
    assert [name for name, _ in drawn] == ["controlnet", "truth", "reconstruction"]
    assert len(lines.read_text().splitlines()) == len(rows) + 3


@pytest.mark.parametrize("name", METHODS)
def test_a_pair_in_a_batch_is_drawn_as_alone(theatre: Path, pipe: Pipeline, name: str) -> None:
    """Each prompt has its own source, pose and noise."""
    both = draw(pipe, name, range(FIRST_PAIR, FIRST_PAIR + 2), TRIAL)
    for i, picture in enumerate(both):
        number = FIRST_PAIR + i
        alone = draw(pipe, name, range(number, number + 1), TRIAL)[0]
        assert np.abs(np.asarray(alone, int) - np.asarray(picture, int)).max() <= 2
    assert np.abs(np.asarray(both[0], int) - np.asarray(both[1], int)).max() > 20


def test_methods_differ_and_captions_count(theatre: Path, pipe: Pipeline) -> None:
    one = range(FIRST_PAIR, FIRST_PAIR + 1)
    drawn = [np.asarray(draw(pipe, name, one, TRIAL)[0], int) for name in METHODS]
    drawn.append(np.asarray(draw(pipe, "controlnet", one, Trial(steps=2, captions=True))[0], int))
    for i, first in enumerate(drawn):
        assert all(np.abs(first - second).max() > 0 for second in drawn[:i])


def test_a_record_belongs_to_settings_and_weights(stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "theatre"
    shutil.copytree(stage, copy)
    monkeypatch.setattr(loading, "theatre_folder", lambda: copy)

    def keys(trial: Trial = TRIAL) -> dict[str, str]:
        return {name: key_of(name, trial, Judge.folders()) for name in METHODS}

    before = keys()
    assert len(set(before.values())) == len(METHODS) and keys() == before
    assert not set(before.values()) & set(keys(Trial(steps=3)).values())
    file = copy / "ip_adapter/ip_adapter.safetensors"
    save_file({key: value * 1.5 for key, value in load_file(str(file)).items()}, str(file))
    assert {name for name, key in keys().items() if key != before[name]} == {"ip_adapter"}
    torch.manual_seed(1)
    AttributeReader(ANSWERS, size=32, width=8).save(copy / "readers/attributes")
    assert not set(before.values()) & set(keys().values())


def test_methods_that_are_there(stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "theatre"
    shutil.copytree(stage, copy)
    monkeypatch.setattr(loading, "theatre_folder", lambda: copy)
    assert available(None) == tuple(METHODS)
    assert available(["controlnet", "ip_adapter", "controlnet"]) == ("controlnet", "ip_adapter")
    with pytest.raises(InputError, match="no method 'magic'"):
        available(["magic"])
    shutil.rmtree(copy / "ip_adapter")
    assert available(None) == ("appearance_control", "reference_only", "controlnet")
    with pytest.raises(ModelError, match="ip_adapter"):
        available(["ip_adapter"])
    shutil.rmtree(copy / "pose")
    with pytest.raises(SystemExit, match="error: .*theatre/pose"):
        run(tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


# Judging.


class Knows:
    """Stands in for both readers: knows what is in the pictures that it was told about."""

    size = 128

    def __init__(self, scenes: list[Any]) -> None:
        self.known = {render(scene).tobytes(): scene for scene in scenes}

    def read(self, pictures: Any) -> list[Any]:
        return [attributes(self.known[picture.tobytes()]) for picture in pictures]

    def keypoints(self, pictures: Any) -> Any:
        found = np.stack([keypoints(self.known[picture.tobytes()]) for picture in pictures])
        found[..., 2] = 0.9
        return found

    def features(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        return [pixels + 2.0]

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}


def test_judge_compares_with_the_target() -> None:
    pairs = [pair_number(FIRST_PAIR), pair_number(FIRST_PAIR + 1)]
    scenes = [scene for pair in pairs for scene in (pair.source, pair.target)]
    knows: Any = Knows(scenes)
    judge, numbers = Judge(knows, knows), [FIRST_PAIR, FIRST_PAIR + 1]
    right = judge([render(pair.target) for pair in pairs], pairs, numbers, "truth", "k")
    assert [v.pair for v in right] == numbers
    assert all(v.pck == 1.0 and v.distance == 0.0 and all(v.kept.values()) for v in right)
    assert all(v.ssim == pytest.approx(1.0) for v in right)
    same_person = judge([render(pair.source) for pair in pairs], pairs, numbers, "truth", "k")
    assert all(v.pck < 0.9 and v.ssim < 0.99 and v.distance > 0 and all(v.kept.values()) for v in same_person)
    swapped = judge([render(pair.target) for pair in reversed(pairs)], pairs, numbers, "truth", "k")
    for verdict, pair, other in zip(swapped, pairs, reversed(pairs), strict=True):
        truth, seen = attributes(pair.target), attributes(other.target)
        assert verdict.kept == {q: truth[q] == seen[q] for q in KEPT}
        assert not all(verdict.kept.values())


def verdict(method: str, pair: int, right: float = 1.0, **more: Any) -> Verdict:
    kept = {**dict.fromkeys(KEPT, True), **more.pop("kept", {})}
    values = {"pck": right, "ssim": right, "distance": 1.0 - right, **more}
    return Verdict(key="k", method=method, pair=pair, kept=kept, **values)


def test_summary() -> None:
    ours = [verdict("appearance_control", i, 0.8 + 0.01 * i, kept={"hat": i % 4 > 0}) for i in range(20)]
    theirs = [verdict("controlnet", i, 0.6 + 0.01 * i, kept={"hat": False, "top": False}) for i in range(20)]
    true = [verdict("truth", i) for i in range(20)]
    del ours[0].kept["skin"]  # hidden in one pair
    found = summarise({"appearance_control": ours, "controlnet": theirs, "truth": true}, {"steps": 2}, "abc")
    mine = found.methods["appearance_control"]
    assert mine["pck"].mean == pytest.approx(0.895)
    assert mine["hat"].mean == 0.75 and mine["all of these"].mean == 0.75
    assert mine["skin"].n == 19
    assert list(found.differences) == ["controlnet"]
    minus = found.differences["controlnet"]
    # Pair by pair the difference is always the same, though both methods vary.
    assert minus["pck"].low == pytest.approx(0.2) == minus["pck"].high
    assert minus["top"].mean == 1.0 and minus["hat"].mean == 0.75 and minus["lower"].mean == 0.0
    assert minus["distance"].mean == pytest.approx(-0.2)
    assert [text.partition(" ")[0] for text in falls_short(found)] == ["PCK@0.2", "hat"]
    table = markdown(found)
    assert "Falls short: PCK@0.2 torso 89.5 %" in table and "| hat | 75.0 %" in table and "+20.0 [" in table
    perfect = summarise({"appearance_control": true}, {}, "abc")
    assert falls_short(perfect) == [] and "is reached" in markdown(perfect)
    assert worst_median_best(ours) == [0, 10, 19]
    assert set(IDENTITY) < set(KEPT)


def test_lines(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "new/lines.jsonl", Verdict)
    assert lines.read() == []
    lines.append([verdict("truth", 0), verdict("truth", 1)])
    lines.append([verdict("truth", 2)])
    with lines.path.open("a") as file:
        file.write('{"key": "k", "meth')
    assert [row.pair for row in lines.read()] == [0, 1, 2]
    lines.append([verdict("truth", 3)])
    assert [row.pair for row in lines.read()] == [0, 1, 2, 3]
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        Lines(tmp_path / "file/lines.jsonl", Verdict).append([verdict("truth", 0)])
