"""``controlroom direction``: what it writes, and one line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from controlroom.app.cli import main
from controlroom.controls.edit_direction import EditDirection, edit_direction
from controlroom.sampling.pipeline import Pipeline
from tests.controls.editing.test_pix2pix_zero import tiny_language_model
from tests.saved import tiny_folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def direction(*arguments: str) -> int:
    return main(["direction", "--model", str(tiny_folder()), "--from", "cat", "--to", "dog", *arguments])


def test_writes_the_direction(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert direction("-o", "d.safetensors", "--count", "5", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    read = EditDirection.load("d.safetensors")
    assert printed["sentences"] == [5, 5] == list(read.counts)
    assert (printed["from"], printed["to"]) == ("cat", "dog") == read.names
    assert printed["length"] == pytest.approx(float(read.tokens.norm()), abs=1e-3) and read.backbone == "sd1"


def test_sentences_of_files_and_of_a_language_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cats, dogs = ["a cat", "a red cat"], ["a dog"]
    Path("cats.txt").write_text("\n".join(cats))
    Path("dogs.txt").write_text("\n".join(dogs))
    files = ("--sentences-from", "cats.txt", "--sentences-to", "dogs.txt")
    assert direction("-o", "d.safetensors", *files) == 0
    expected = edit_direction(Pipeline.from_pretrained(tiny_folder()), cats, dogs)
    assert torch.equal(EditDirection.load("d.safetensors").tokens, expected.tokens)
    writer = str(tiny_language_model(here))
    assert direction("-o", "d.safetensors", "--text-model", writer, "--count", "3", "--seed", "4") == 0
    assert EditDirection.load("d.safetensors").counts == (3, 3)
    assert capsys.readouterr().out.split() == ["d.safetensors"] * 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-o", "d.png"), ".safetensors"),
        (("-o", "nowhere/d.safetensors"), "nowhere"),
        (("-o", f"{'x' * 300}.safetensors"), "file name too long"),
        (("-o", "d.safetensors", "--sentences-from", "missing.txt"), "missing.txt"),
        (("-o", "d.safetensors", "--text-model", "missing"), "causal language model"),
        (("-o", "d.safetensors", "--from", " "), "word"),
    ],
)
def test_mistakes_are_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert direction(*arguments) == 2
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert printed.out == "" and len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]
    assert not list(here.rglob("*.safetensors"))
