"""Drawing the cases of a suite: several in one run, each as it would be alone; what a fingerprint depends on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from controlroom.backbones import loading
from controlroom.controls.editing.prompt_to_prompt import PromptToPrompt
from controlroom.controls.guidance.attend_and_excite import AttendAndExcite
from controlroom.core.errors import ModelError
from controlroom.core.spec import RunSpec
from controlroom.evaluation.suites.attend_and_excite import Settings as ExciteSettings
from controlroom.evaluation.suites.attend_and_excite import build as build_excite
from controlroom.evaluation.suites.drawing import PipelineDrawer, together, weights_hash
from controlroom.evaluation.suites.prompt_to_prompt import Settings as EditSettings
from controlroom.evaluation.suites.prompt_to_prompt import build as build_edits
from tests.evaluation.suites.stage import Knows, Words, write_stage

WORDS = frozenset({"attend_and_excite.words"})


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stage(tmp_path_factory.mktemp("stage") / "theatre")


def excite(*words: str, **more: Any) -> AttendAndExcite:
    return AttendAndExcite(words=[list(words)], **more)


def test_consecutive_runs_become_one() -> None:
    specs = [
        RunSpec(prompt=f"a {word} and a hat", seed=4 + i, controls=[excite(word, "hat")])
        for i, word in enumerate(("cat", "dog", "frog"))
    ]
    joined = together(specs, WORDS)
    assert joined is not None
    assert joined.prompt == ["a cat and a hat", "a dog and a hat", "a frog and a hat"] and joined.seed == 4
    (control,) = joined.controls
    assert isinstance(control, AttendAndExcite)
    assert control.words == [["cat", "hat"], ["dog", "hat"], ["frog", "hat"]]
    assert together(specs[:1], WORDS) is specs[0]


@pytest.mark.parametrize(
    "second",
    [
        RunSpec(prompt="b", seed=6, controls=[excite("b")]),  # another noise
        RunSpec(prompt="b", seed=5, controls=[]),  # another number of controls
        RunSpec(prompt="b", seed=5, controls=[PromptToPrompt(source=["a"])]),
        RunSpec(prompt="b", seed=5, controls=[excite("b", step_size=3.0)]),
        RunSpec(prompt="b", seed=5, controls=[excite("b")], guidance_scale=2.0),
        RunSpec(prompt=["b", "c"], seed=5, controls=[excite("b")]),
        RunSpec(prompt="b", seed=5, controls=[AttendAndExcite(indices=[[1]])]),
        RunSpec(prompt="b", seed=5, controls=[excite("b")], latents=torch.zeros(1, 4, 2, 2)),
    ],
)
def test_runs_that_differ_otherwise_stay_apart(second: RunSpec) -> None:
    first = RunSpec(prompt="a", seed=4, controls=[excite("a")])
    assert together([first, second], WORDS) is None
    # Words that are not said to be a list for each prompt are a setting like any other.
    assert together([first, first.model_copy(update={"seed": 5})], frozenset()) is not None
    assert together([first, RunSpec(prompt="b", seed=5, controls=[excite("b")])], frozenset()) is None


@pytest.mark.parametrize("name", ["attend_and_excite", "prompt_to_prompt"])
def test_a_case_in_a_batch_is_drawn_as_alone(stage: Path, name: str) -> None:
    """And the control's arm is another picture than its absence, from the same noise."""
    knows: Any = Knows([])
    common: dict[str, Any] = {"model": str(stage), "steps": 4, "seed": 3}
    if name == "attend_and_excite":
        suite: Any = build_excite(ExciteSettings(**common, refinements=2), 3, knows, Words())
        plain, ours = "without", "with"
    else:
        suite = build_edits(EditSettings(**common, cross_replace=1.0, self_replace=1.0), 3, knows, knows)
        plain, ours = "reprompted", "prompt_to_prompt"
    draw = PipelineDrawer(str(stage))
    specs = [suite.case(number).specs for number in range(3)]
    joined = together([spec[ours] for spec in specs], suite.per_prompt)
    assert joined is not None and len(joined.prompt) == 3
    batch = list(draw(joined))
    for number, picture in enumerate(batch):
        (alone,) = draw(specs[number][ours])
        assert np.abs(np.asarray(alone, int) - np.asarray(picture, int)).max() <= 2
        (without,) = draw(specs[number][plain])
        assert np.abs(np.asarray(without, int) - np.asarray(picture, int)).max() > 2
    assert np.abs(np.asarray(batch[0], int) - np.asarray(batch[1], int)).max() > 20


def test_fingerprint_is_of_everything_that_draws(stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "theatre"
    shutil.copytree(stage, copy, symlinks=True)
    monkeypatch.setattr(loading, "theatre_folder", lambda: copy)
    before = weights_hash("theatre")
    assert before == weights_hash("theatre") and len(before) == 16
    # Readers judge; they draw nothing.
    shutil.rmtree(copy / "readers")
    assert weights_hash("theatre") == before
    (copy / "scheduler/scheduler_config.json").write_text("{}")
    changed = weights_hash("theatre")
    assert changed != before
    file = copy / "unet/diffusion_pytorch_model.safetensors"
    save_file({key: value * 1.1 for key, value in load_file(file).items()}, file)
    assert weights_hash("theatre") not in (before, changed)
    assert weights_hash(str(stage)) != weights_hash(str(copy))
    assert weights_hash(str(stage), [str(stage / "vae")]) != weights_hash(str(stage))
    shutil.rmtree(copy / "unet")
    with pytest.raises(ModelError, match="theatre/unet"):
        PipelineDrawer("theatre")
    with pytest.raises(ModelError, match="There is no model"):
        PipelineDrawer(str(tmp_path / "nothing"))
    with pytest.raises(ModelError, match="There is no model"):
        PipelineDrawer(str(stage), ["/no/weights"])
