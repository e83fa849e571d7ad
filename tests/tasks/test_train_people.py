"""LFW's protocol on the command line: people with enough pictures, nobody on both sides, the others measured on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from controlroom.app.cli import main
from controlroom.backbones.ip_adapter import adapter_from_tensors, save_ip_adapter
from controlroom.core.errors import InputError
from controlroom.data.lfw import is_lfw, lfw, people_split
from controlroom.tasks.train import plan_training
from controlroom.training.image_prompts import ENCODER, FILE
from controlroom.training.recipes.ip_adapter_multi import IPAdapterMultiSettings
from tests.controls.nets import tiny_image_encoder, tiny_ip_adapter
from tests.tiny import tiny_sd1

COUNTS = {"Ann_Lee": 4, "Bo_Ek": 3, "Cy_Orr": 3, "Di_Fox": 1, "Ed_Poe": 2}
PROTOCOL = ["least_pictures=3", "train_share=0.667"]
TRAIN = ["train.total_steps=2", "train.batch_size=2", "train.threads=1", "train.learning_rate=0.01"]


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of LFW's layout."""
    root = tmp_path_factory.mktemp("lfw")
    for place, (name, count) in enumerate(COUNTS.items()):
        (root / name).mkdir()
        for number in range(1, count + 1):
            colour = (50 * place, 40 * number, 120)
            Image.new("RGB", (40, 40), colour).save(root / name / f"{name}_{number:04d}.jpg")
    return root


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter to start from, with its image encoder."""
    folder = tmp_path_factory.mktemp("adapter")
    unet = tiny_sd1().unet
    save_ip_adapter(adapter_from_tensors(tiny_ip_adapter(unet, "base"), unet), folder / FILE)
    tiny_image_encoder().save_pretrained(folder / ENCODER)
    return str(folder)


def test_the_command_learns_from_two_thirds_and_measures_on_the_others(
    faces: Path, start: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", "ip_adapter_multi", "-d", str(faces), "--model", model, "-o", str(tmp_path / "run")]
    for change in (*PROTOCOL, *TRAIN, f"start={start}", "aggregator.pictures=3"):
        line += ["--set", change]
    assert main(line) == 0
    assert (Path(capsys.readouterr().out.strip()) / FILE).is_file()
    lines = [json.loads(text) for text in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    found = [one for one in lines if one["event"] == "validation"]
    assert len(found) == 2 and found[0]["held_out"] != found[1]["held_out"] != found[1]["without_picture"]


def test_nobody_is_on_both_sides_and_it_is_the_library_s_split(
    faces: Path, start: str, model: str, tmp_path: Path
) -> None:
    plan = plan_training("ip_adapter_multi", None, str(faces), model, tmp_path, [*PROTOCOL, f"start={start}"])
    recipe: Any = plan.prepare(rehearsal=True)[1]
    learned, held_out = people_split(lfw(faces), 3, 2 / 3)
    assert [p.name for p in recipe.shown.pictures] == [p.name for p in learned]
    watched = [name for batch in recipe._held_out for name in batch.shown.names]
    assert watched == [p.name for p in held_out]
    people = [{p.subject for p in side} for side in (learned, held_out)]
    assert sorted(map(len, people)) == [1, 2] and not people[0] & people[1]
    assert people[0] | people[1] == {"Ann_Lee", "Bo_Ek", "Cy_Orr"}
    assert set(recipe.shown.prompts) == {"a photo of a person"}
    with torch.no_grad():
        assert recipe.validate(0) == recipe.validate(1)
    named: Any = plan.settings.model_copy(update={"prompt": "a face"})
    assert {p.caption for p in named.read(str(faces))} == {"a face"}


def test_what_does_not_fit_is_told_once(
    faces: Path, start: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", "ip_adapter_multi", "-d", str(faces), "--model", model, "-o", str(tmp_path / "run")]
    line += ["--set", f"start={start}"]
    assert main(line) == 2
    said = capsys.readouterr().err
    assert "one picture of 'Di_Fox'" in said and "least_pictures=2" in said
    assert main([*line, "--set", "least_pictures=9"]) == 2
    assert "Nobody has 9 pictures" in capsys.readouterr().err
    assert main([*line, "--set", "least_pictures=4", "--set", "train_share=0.5"]) == 2
    assert "1 people have 4 pictures" in capsys.readouterr().err
    with pytest.raises(InputError, match="one of the two"):
        IPAdapterMultiSettings(train_share=0.5, validation="x")
    with pytest.raises(InputError, match="train_share"):
        IPAdapterMultiSettings(train_share=1.0)


def test_other_people_can_be_named_and_those_with_few_pictures_go(faces: Path) -> None:
    settings = IPAdapterMultiSettings(validation=str(faces), least_pictures=2)
    learned, held_out = settings.sides(settings.read(str(faces)))
    assert {p.subject for p in learned} == {p.subject for p in held_out} == set(COUNTS) - {"Di_Fox"}
    assert settings.fingerprint() == IPAdapterMultiSettings().fingerprint(), "pictures have a fingerprint of their own"


def test_what_is_that_layout(faces: Path, tmp_path: Path) -> None:
    assert is_lfw(faces)
    person = tmp_path / "set/Ann_Lee"
    person.mkdir(parents=True)
    assert not is_lfw(tmp_path / "set")
    Image.new("RGB", (8, 8)).save(person / "Ann_Lee_0001.png")
    assert is_lfw(tmp_path / "set")
    (person / "Ann_Lee_0001.txt").write_text("a woman on the beach")
    assert not is_lfw(tmp_path / "set"), "captions of its own are read"
    (person / "Ann_Lee_0001.txt").unlink()
    Image.new("RGB", (8, 8)).save(person / "beach.png")
    assert not is_lfw(tmp_path / "set")
    with pytest.raises(InputError, match="nowhere"):
        is_lfw(tmp_path / "nowhere")
