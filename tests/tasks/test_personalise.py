"""Photos -> an adapter: everything that is written, continuing, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import controlroom as cr
from controlroom.app.cli import main
from controlroom.core.errors import InputError
from controlroom.tasks.personalise import PersonaliseOptions, personalise, resolved


def test_command_writes_adapter_sheet_and_run(
    tmp_path: Path, model: str, photos: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["personalise", photos, "--name", "anna", "--model", model, "--class", "cat", "--steps", "2", "--rank", "2"]
    line += ["--class-count", "1", "--batch-size", "2", "-p", "{}", "-p", "{} in {braces}, {", "--json"]
    assert main(line) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["subject"] == "sks cat" and told["steps"] == 2
    sheet = np.asarray(Image.open(told["sheet"]))
    assert sheet.shape[0] == 3 * (256 + 28) + 8 and sheet.std() > 5
    assert main(["generate", "--config", told["run"], "--steps", "2", "-o", "drawn.png", "--seed", "1"]) == 0
    capsys.readouterr()
    changed = np.asarray(Image.open("drawn.png")).astype(float)
    pipe = cr.Pipeline.from_pretrained(model)
    adapter = cr.LoRA(told["adapter"])
    same = pipe("sks cat", seed=1, num_inference_steps=2, controls=[adapter]).images[0]
    assert np.array_equal(changed, np.asarray(same).astype(float))
    before = load_file(told["adapter"])
    assert main(line) == 0  # nothing is left to do
    after = load_file(told["adapter"])  # the file's metadata has no fixed order
    assert before.keys() == after.keys() and all(torch.equal(after[key], value) for key, value in before.items())


def test_settings_fit_model_and_photos(model: str, tmp_path: Path) -> None:
    pipe = cr.Pipeline.from_pretrained(model)
    settings, loop = resolved(pipe, 5, tmp_path, PersonaliseOptions(kind="style"))
    assert settings.prompt == "sks style" and settings.class_prompt == "style"
    assert loop.total_steps == 300 and loop.learning_rate == pytest.approx(2e-3)
    chosen = PersonaliseOptions(steps=7, learning_rate=1e-4, class_count=0, batch_size=1)
    settings, loop = resolved(pipe, 5, tmp_path, chosen)
    assert (loop.total_steps, loop.learning_rate, settings.class_prompt) == (7, 1e-4, None)


@pytest.mark.parametrize("name", ["", "../anna", "a/b", ".hidden"])
def test_names_are_those_of_files(name: str, photos: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name"):
        personalise(photos, name, tmp_path)


def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["personalise", str(tmp_path / "none"), "--name", "anna"]) == 2
    assert "none" in capsys.readouterr().err
    with pytest.raises(InputError, match="kind"):
        PersonaliseOptions.model_validate({"kind": "animal"})
    with pytest.raises(InputError, match="steps"):
        PersonaliseOptions(steps=0)
