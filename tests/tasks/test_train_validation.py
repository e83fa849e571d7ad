"""Errors on held-out pictures from the command line: the same every time, and refused where there would be none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from controlroom.app.cli import main
from controlroom.core.errors import InputError
from controlroom.tasks.train import plan_training
from controlroom.training.loop import train
from controlroom.training.objective import Objective, ObjectiveSettings
from tests.controls.nets import tiny_image_encoder
from tests.tiny import tiny_sd1

TRAIN = ["train.total_steps=2", "train.batch_size=2", "train.threads=1", "train.learning_rate=0.01"]
DDPM = ["size=16", "channels=[8, 8]", "norm_groups=4", "attention=[]", "layers=1", "timesteps=40"]
AUTOENCODER = ["size=16", "channels=[8, 8]", "norm_groups=4", "layers=1", "mid_attention=false"]
NAMES = ("held_out", "without_picture", "by_words", "psnr")
RECIPES: dict[str, list[str]] = {
    "lora": ["rank=2"],
    "dreambooth": ["prompt=a sks cat"],
    "dreambooth_lora": ["prompt=a sks cat", "rank=2"],
    "textual_inversion": ["word=<anna>"],
    "dco": ["rank=2", "word=red", "prompt=a {} cat"],
    "latent_diffusion": [],
    "ddpm": DDPM,
    "autoencoder": AUTOENCODER,
}


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pictures that are not learned from, of two shapes."""
    folder = tmp_path_factory.mktemp("others")
    for number in range(10):
        size = (32, 32) if number % 2 else (64, 32)
        Image.new("RGB", size, (25 * number, 90, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a red cat")
    return str(folder)


def logged(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key in NAMES} for line in lines if line["event"] == "validation"
    ]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_of_pictures_measures_itself(
    recipe: str, tmp_path: Path, model: str, photos: str, others: str
) -> None:
    changes = [*RECIPES[recipe], *TRAIN, f"validation={others}", "validation_pictures=9"]
    base = None if recipe in ("ddpm", "autoencoder") else model
    plan = plan_training(recipe, data=photos, model=base, out=tmp_path / "run", changes=changes)
    assert plan.loop.validate_every == 1, "a tenth of two steps"
    made: Any = plan.prepare()[1]
    for module in made.modules().values():
        module.eval()
    with torch.no_grad():
        before = made.validate(0)
        assert before == made.validate(0)
    train(made, plan.loop)
    found = logged(tmp_path / "run")
    assert len(found) == 2 and all(set(one) == set(before) for one in found)
    assert found[0] != found[1] and all(value == value for value in found[1].values())
    # A validation is seen by nobody: the run is that without one.
    alone = plan_training(recipe, data=photos, model=base, out=tmp_path / "run", changes=changes[:-2])
    assert alone.settings.fingerprint() == plan.settings.fingerprint()


def test_people_are_measured_with_their_other_pictures(tmp_path: Path, model: str) -> None:
    for side, names in (("seen", ("anna", "ben")), ("unseen", ("carl", "dora"))):
        for name in names:
            (tmp_path / side / name).mkdir(parents=True)
            for number in range(3):
                path = tmp_path / side / name / f"{number}.png"
                Image.new("RGB", (32, 32), (80 * number, len(side) * 20, ord(name[0]))).save(path)
                path.with_suffix(".txt").write_text("a cat on the beach")
    tiny_image_encoder().save_pretrained(tmp_path / "seer")
    told = {
        "ip_adapter": {"held_out", "without_picture"},
        "photomaker": {"held_out", "by_words"},
    }
    changes = [*TRAIN, f"image_encoder={tmp_path / 'seer'}", f"validation={tmp_path / 'unseen'}"]
    for recipe, names in told.items():
        more = [*changes, 'class_words=["cat"]', "rank=2"] if recipe == "photomaker" else changes
        plan = plan_training(recipe, None, str(tmp_path / "seen"), model, tmp_path / recipe, more)
        plan.run()
        found = logged(tmp_path / recipe)
        assert len(found) == 2 and set(found[0]) == names and found[0] != found[1]
        assert len(set(found[0].values())) == 2, "what is told makes a difference"


def test_validations_that_would_not_be_are_refused(
    tmp_path: Path, model: str, photos: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", "lora", "-d", photos, "--model", model, "-o", str(tmp_path / "run")]
    for change in ("rank=2", *TRAIN, "train.validate_every=1"):
        line += ["--set", change]
    assert main(line) == 2
    said = capsys.readouterr().err
    assert "nothing to measure itself on" in said and "validation" in said
    assert not (tmp_path / "run").exists()
    assert main([*line, "--set", f"validation={tmp_path / 'nowhere'}"]) == 2
    assert "nowhere" in capsys.readouterr().err
    with pytest.raises(InputError, match="validation"):
        plan_training("kosmos_language", data=photos, changes=["validation=x"])


def test_a_recipe_that_cannot_measure_itself_is_refused(tmp_path: Path) -> None:
    from tests.training.toy_recipe import ToyRecipe, toy_settings

    with pytest.raises(InputError, match="cannot measure itself"):
        train(ToyRecipe(), toy_settings(tmp_path, validate_every=2))


def test_timesteps_are_shares_of_those_that_are_trained() -> None:
    seen: list[int] = []

    def predict(noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(int(t[0]))
        return noisy

    scheduler = tiny_sd1().scheduler
    whole = Objective(scheduler)
    latents = torch.ones(2, 4, 4, 4)
    assert whole.held_out(predict, latents) == whole.held_out(predict, latents)
    late = Objective(scheduler, ObjectiveSettings(first_timestep=900, last_timestep=999))
    late.held_out(predict, latents)
    assert seen == [*[100, 300, 500, 700] * 2, 910, 930, 950, 970]
    half = torch.zeros(2, 1, 4, 4)
    half[..., :2] = 1
    torch.manual_seed(0)
    steep = torch.randn(2, 4, 4, 4)
    assert whole.held_out(predict, steep, half) != whole.held_out(predict, steep)
