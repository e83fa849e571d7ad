"""``controlroom evaluate``: files, continuing, comparing, and one line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from controlroom.app.cli import main
from controlroom.backbones import loading
from controlroom.evaluation.suites import drawing
from controlroom.evaluation.suites.table import SUITES
from tests.evaluation.suites.stage import write_stage


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stage(tmp_path_factory.mktemp("stage") / "theatre")


@pytest.fixture
def here(stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(loading, "theatre_folder", lambda: stage)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate(suite: str, *more: str, n: int = 2) -> int:
    return main(["evaluate", suite, "-n", str(n), "--steps", "2", *more])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_attend_and_excite_on_a_miniature(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("attend_and_excite", "--set", "refinements=2", n=3) == 0
    printed = capsys.readouterr()
    stems = ("cases.jsonl", "html", "json", "md")
    assert names(here) == [f"attend_and_excite.{stem}" for stem in stems]
    assert "failures repaired (both kinds)" in printed.out and printed.out.endswith(".html\n")
    assert "3 of 3 cases, 0 s left" in printed.err
    report = json.loads(Path("attend_and_excite.json").read_text())
    assert report["n"] == 3 and report["about"]["settings"]["refinements"] == 2
    assert Path("attend_and_excite.md").read_text() in printed.out
    assert Path("attend_and_excite.html").read_text().count("data:image/webp;base64,") == 3 * 3
    # A case that is lost is drawn again, and nothing else changes.
    lines = Path("attend_and_excite.cases.jsonl").read_text().splitlines(keepends=True)
    Path("attend_and_excite.cases.jsonl").write_text("".join(lines[:2]) + lines[3])
    assert evaluate("attend_and_excite", "--set", "refinements=2", "--json", n=3) == 0
    printed = capsys.readouterr()
    assert "2 of 3 cases" in printed.err
    again = json.loads(printed.out)
    assert again["files"] == [f"attend_and_excite.{stem}" for stem in ("json", "md", "html")] and "picked" not in again
    assert again["fingerprint"] == report["fingerprint"]
    for one, other in zip(again["rows"], report["rows"], strict=True):
        for arm, cell in one["cells"].items():
            # A case that is drawn alone equals one of a batch to rounding.
            assert cell == pytest.approx(other["cells"][arm], abs=1e-4)


def test_prompt_to_prompt_on_a_miniature_and_against_before(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("prompt_to_prompt", "-o", "one.json") == 0
    assert evaluate("prompt_to_prompt", "-o", "two.json", "--set", "cross_replace=1", "--against", "one.json") == 0
    printed = capsys.readouterr().out
    assert "Against the other report" in printed and "| PSNR outside ↑, Prompt-to-Prompt |" in printed
    assert {"one.json", "one.html", "one.md", "one.cases.jsonl"} < set(names(here))
    assert json.loads(Path("two.json").read_text())["about"]["settings"]["cross_replace"] == 1.0


def test_stopped_and_continued(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real, runs = drawing.PipelineDrawer.__call__, []

    def stopped(self: Any, spec: Any) -> Any:
        runs.append(spec.seed)
        if len(runs) > 2:
            raise KeyboardInterrupt
        return real(self, spec)

    monkeypatch.setattr(drawing.PipelineDrawer, "__call__", stopped)
    assert evaluate("captions", "--batch-size", "1", n=3) == 130
    assert "run again to continue" in capsys.readouterr().err
    assert names(here) == ["captions.cases.jsonl"]
    monkeypatch.setattr(
        drawing.PipelineDrawer, "__call__", lambda self, spec: (runs.append(spec.seed), real(self, spec))[1]
    )
    assert evaluate("captions", n=3) == 0
    assert runs == [1000, 1001, 1002, 1002]
    assert json.loads(Path("captions.json").read_text())["n"] == 3
    # No time: the report is of what is there.
    assert evaluate("captions", "--minutes", "0", n=9) == 0
    assert "3 of 9 cases" in capsys.readouterr().out


def test_suites_are_listed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0].split()[:2] == ["attend_and_excite", "250"] and len(listed) == len(SUITES)
    assert main(["evaluate", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[1]["suite"] == "prompt_to_prompt"
    assert names(here) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "There is no suite 'nothing'"),
        (["captions", "--set", "colour"], "NAME=VALUE"),
        (["captions", "--set", "colour=red"], "colour"),
        (["captions", "--steps", "0"], "steps"),
        (["captions", "-o", "report.txt"], "ends with .json"),
        (["x" * 300], "There is no suite 'xxx"),
        (["captions", "-o", f"{'x' * 300}.json"], "file name too long"),
        (["captions", "-o", "no/report.json"], "does not exist"),
        (["captions", "--against", "no.json"], "cannot be read"),
        (["captions", "--model", "./nowhere"], "There is no model"),
        (["captions", "--extractor", "inception=no.pth"], "nothing is downloaded"),
        (["captions", "--extractor", "resnet=no.pth"], "kind of extractor 'resnet'"),
    ],
)
def test_mistakes_are_one_line(here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert main(["evaluate", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and said in printed.err and len(printed.err.strip().splitlines()) == 1
    assert names(here) == []


def test_other_settings_and_extractors_do_not_mix(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("captions") == 0
    before = {path: path.read_bytes() for path in here.iterdir()}
    assert evaluate("captions", "--seed", "5") == 2
    assert "settings seed (1000 there, 5 now)" in capsys.readouterr().err
    report = json.loads(Path("captions.json").read_text())
    row = next(row for row in report["rows"] if row["measure"] == "CLIP score")
    row["extractor"] = "clip@0123456789abcdef"
    Path("other.json").write_text(json.dumps(report))
    assert evaluate("captions", "-o", "new.json", "--against", "other.json") == 2
    error = capsys.readouterr().err
    assert "CLIP score of two extractors cannot be compared" in error and "clip@0123456789abcdef" in error
    assert not Path("new.json").exists() and not Path("new.cases.jsonl").exists()
    assert {path: path.read_bytes() for path in before} == before


def test_one_more_extractor(here: Path) -> None:
    from tests.evaluation.extractors.test_pretrained import write_dino

    folder = write_dino(here / "dino")
    assert evaluate("captions", "--extractor", f"dino={folder}", "-o", "more.json") == 0
    rows = {row["measure"]: row for row in json.loads(Path("more.json").read_text())["rows"]}
    assert set(rows["dino-cls"]["cells"]) == {"drawn"} and rows["dino-cls"]["extractor"].startswith("dino-cls@")
