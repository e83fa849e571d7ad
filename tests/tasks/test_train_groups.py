"""Recipes of several subjects on the command line: from a folder that says who is where to what a control reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import controlroom as cr
from controlroom.app.cli import main
from controlroom.backbones.unimo import new_unimo
from controlroom.core.errors import InputError
from controlroom.data.group_folder import group_folder
from controlroom.data.groups import Group
from controlroom.tasks.train import plan_training
from controlroom.training.loop import train
from controlroom.training.recipes.blip_subject import BLIPSubjectSettings
from controlroom.training.recipes.ms_diffusion import FILE, MSDiffusionSettings
from tests.controls.nets import tiny_image_encoder
from tests.data.folders import paint, write_lines
from tests.training.test_kosmos_g import pipe_of, reader_of

TRAIN = ["train.total_steps=3", "train.batch_size=2", "train.threads=1", "train.learning_rate=0.01"]
SMALL = {"ms_diffusion": ["tokens=2", "depth=1"], "blip_subject": ["queries=2", "layers=1", "heads=4"]}
FILES = {"ms_diffusion": FILE, "blip_subject": "model.safetensors"}
DRAW: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "seed": 3, "height": 32, "width": 32}
CATS = ("red", "gold", "navy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures of one or two subjects, each of which is known from another picture."""
    root, rows = tmp_path_factory.mktemp("groups"), []
    for number, colour in enumerate(CATS):
        paint(root / f"{number}.png", colour, (40, 32))
        paint(root / f"cat/{number}.png", colour, (32, 32))
        cat = {"word": "cat", "box": [0, 0, 20, 32], "image": f"cat/{number}.png"}
        hat = {"word": "hat", "box": [20, 8, 40, 32], "image": "hat.png"}
        text = f"a {colour} cat" + " and a hat" * (number == 2)
        row = {"file_name": f"{number}.png", "text": text, "box_unit": "pixels"}
        rows.append({**row, "subjects": [cat, hat] if number == 2 else [cat]})
    paint(root / "hat.png", "teal", (24, 32))
    write_lines(root / "metadata.jsonl", rows)
    return root


@pytest.fixture(scope="module")
def seer(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("seer")
    tiny_image_encoder().save_pretrained(place)
    return str(place)


def line(recipe: str, data: Path, model: str, seer: str, out: Path, *changes: str) -> list[str]:
    told = ["train", recipe, "-d", str(data), "--model", model, "-o", str(out)]
    for change in (f"image_encoder={seer}", *SMALL[recipe], *TRAIN, *changes):
        told += ["--set", change]
    return told


def same(left: Path, right: Path) -> bool:
    a, b = load_file(left), load_file(right)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def control_of(recipe: str, weights: Path, group: Group) -> Any:
    if recipe == "blip_subject":
        return cr.BLIPDiffusion(str(weights), group.subjects[0].picture.read(), group.subjects[0].word, repeat=1)
    pictures, boxes = [s.picture.read() for s in group.subjects], [s.box for s in group.subjects]
    return cr.MSDiffusion(str(weights), pictures, boxes, [s.word for s in group.subjects], 1.0)


@pytest.mark.parametrize("recipe", SMALL)
def test_the_command_trains_goes_on_and_its_file_draws(
    recipe: str, folder: Path, model: str, seer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = line(recipe, folder, model, seer, tmp_path / "run", f"validation={folder}")
    assert main([*told, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["estimate"]["trained"] > 1000 and plan["estimate"]["activations"] > 0
    assert plan["settings"]["image_encoder"] == seer and not (tmp_path / "run").exists()
    assert main(told) == 0
    whole = Path(capsys.readouterr().out.strip())
    assert (tmp_path / "run/cache").is_dir()
    log = [json.loads(text) for text in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    found = [one for one in log if one["event"] == "validation"]
    other = {"ms_diffusion": "without_pictures", "blip_subject": "by_words"}[recipe]
    assert len(found) == 3 and found[0]["held_out"] != found[2]["held_out"] != found[2][other]

    # Broken off after two steps and continued, without a cache and a validation, it is the same.
    alone = line(recipe, folder, model, seer, tmp_path / "broken", "cache=")
    assert main([*alone, "--set", "train.total_steps=2"]) == 0
    assert main(alone) == 0
    again = Path(capsys.readouterr().out.split()[-1])
    assert same(whole / FILES[recipe], again / FILES[recipe]) and not (tmp_path / "broken/cache").exists()

    group, pipe = group_folder(folder)[2], cr.Pipeline.from_pretrained(model)
    drawn = pipe(group.picture.caption, controls=[control_of(recipe, whole, group)], **DRAW).images
    plain = pipe(group.picture.caption, **DRAW).images
    assert (drawn - plain).abs().max() > 1e-3 * plain.std()


@pytest.mark.parametrize("recipe", SMALL)
def test_a_dry_run_encodes_the_largest_two_only(
    recipe: str, folder: Path, model: str, seer: str, tmp_path: Path
) -> None:
    changes = [f"image_encoder={seer}", *SMALL[recipe], f"validation={tmp_path / 'nowhere'}"]
    plan = plan_training(recipe, None, str(folder), model, tmp_path / "run", changes)
    with pytest.raises(InputError, match="nowhere"):
        plan.prepare(rehearsal=True)
    looked = plan_training(recipe, None, str(folder), model, tmp_path / "run", changes[:-1]).prepare(rehearsal=True)[1]
    made: Any = looked
    assert [group.picture.name for group in made.shown.groups] == ["2.png", "0.png"]
    assert tuple(made.names([0])) == ("2.png",)


def test_what_a_resumed_run_must_share(folder: Path, model: str, seer: str, tmp_path: Path) -> None:
    def found(*changes: str, out: str = "run") -> str:
        told = [f"image_encoder={seer}", *SMALL["ms_diffusion"], "cache=", *changes]
        plan = plan_training("ms_diffusion", None, str(folder), model, tmp_path / out, told)
        made: Any = plan.prepare()[1]
        return made.fingerprint()

    first = found()
    assert first == found(f"validation={folder}", "validation_pictures=1", out="other")
    assert len({first, found("tokens=3"), found("size=64"), found("objective.min_snr_gamma=5")}) == 4
    # What runs of earlier versions noted.
    assert '{"tokens":2,"depth":1,"width":null,"seed":6}' in first
    assert BLIPSubjectSettings().own() == '{"queries":16,"layers":4,"heads":4,"unet":false,"seed":8}'


def test_captions_are_learned_as_the_control_says_them(folder: Path, model: str, seer: str, tmp_path: Path) -> None:
    groups = list(group_folder(folder))
    groups[1] = replace(groups[1], picture=replace(groups[1].picture, caption="a cat on the beach"))
    settings = BLIPSubjectSettings(image_encoder=seer, queries=2, layers=1)
    recipe = settings.build(cr.Pipeline.from_pretrained(model), groups, tmp_path)
    assert recipe.batch([0, 1], 0).prompts == ("a cat a red cat", "a cat on the beach")
    (group,) = settings.groups(groups[:1])[0]
    assert group.picture.caption == "a red cat"


def test_bad_data_is_told_before_anything_is_trained(
    folder: Path, model: str, seer: str, photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(recipe: str, data: Path, *changes: str) -> str:
        assert main(line(recipe, data, model, seer, tmp_path / "run", *changes)) == 2
        return capsys.readouterr().err

    assert "no metadata.jsonl" in said("ms_diffusion", Path(photos))
    assert "nothing to measure itself on" in said("ms_diffusion", folder, "train.validate_every=1")
    silent = line("blip_subject", folder, model, seer, tmp_path / "run")
    del silent[8:10]  # the image encoder
    assert main(silent) == 2
    assert "BLIPSubject needs an image encoder" in capsys.readouterr().err
    cut = tmp_path / "cut"
    paint(cut / "a.png", "red", (40, 32))
    paint(cut / "b.png", "blue", (40, 32))
    (cut / "b.png").write_bytes((cut / "b.png").read_bytes()[:50])
    bare = {"word": "cat", "image": "b.png"}
    row = {"file_name": "a.png", "text": "a cat"}
    write_lines(cut / "metadata.jsonl", [{**row, "subjects": [{**bare, "box": [0, 0, 1, 1]}]}])
    told = said("ms_diffusion", cut)
    assert "line 1, subject 1" in told and "b.png" in told and not (tmp_path / "run/weights").exists()
    write_lines(cut / "metadata.jsonl", [{**row, "subjects": [bare]}])
    assert "line 1, subject 1: 'box' is missing" in said("ms_diffusion", cut)
    assert "b.png" in said("blip_subject", cut), "which needs no boxes"


def test_pictures_are_no_groups(folder: Path) -> None:
    pictures = [group.picture for group in group_folder(folder)]
    with pytest.raises(InputError, match=r"0\.png does not say who is in it.*group_folder"):
        MSDiffusionSettings().groups(pictures)


def test_the_export_goes_on(folder: Path, model: str, seer: str, tmp_path: Path) -> None:
    changes = [f"image_encoder={seer}", *SMALL["ms_diffusion"], *TRAIN]
    plan = plan_training("ms_diffusion", None, str(folder), model, tmp_path / "run", changes)
    weights = plan.run().weights
    again: Any = plan.prepare()[1]
    further = plan.loop.model_copy(update={"output_dir": tmp_path / "next", "start_from": weights})
    assert not same(weights / FILE, train(again, further).weights / FILE)


def test_prompts_with_pictures_learn_from_the_same_folder(folder: Path, model: str, tmp_path: Path) -> None:
    pipe = pipe_of()
    reader_of(pipe).save(tmp_path / "kosmos")
    new_unimo(reader_of(pipe), pipe.backbone).save(tmp_path / "unimo")
    for recipe, start, word in (("kosmos_g", "kosmos", "word=cat"), ("unimo_g", "unimo", "words=['cat']")):
        changes = [f"model={tmp_path / start}", "train.total_steps=1", *TRAIN[1:]]
        plan = plan_training(recipe, None, str(folder), model, tmp_path / recipe, changes)
        made: Any = plan.prepare()[1]
        assert [len(group.subjects) for group in made.shown.groups] == [1, 1, 2]
        assert train(made, plan.loop).finished
        with pytest.raises(InputError, match="names its subjects; leave the words"):
            plan_training(recipe, None, str(folder), model, tmp_path, [*changes, word]).prepare()
    with pytest.raises(InputError, match="no mask"):
        told = [f"model={tmp_path / 'unimo'}", "same_picture=true"]
        plan_training("unimo_g", None, str(folder), model, tmp_path, told).prepare()
