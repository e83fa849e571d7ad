"""What caches on disk spare a training: a second start encodes nothing, and the run is the same with and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

import controlroom as cr
from controlroom.core.errors import InputError
from controlroom.data.pictures import Picture
from controlroom.tasks.train import plan_training
from controlroom.training.base_model import BaseModel
from controlroom.training.loop import train
from controlroom.training.recipes.dreambooth import DreamBoothSettings
from controlroom.training.recipes.lora import LoRASettings
from controlroom.training.shown import Shown
from tests.tiny import BACKBONES, tiny_sd1
from tests.training.recipe_checks import loop, painted


def drawn(number: int, mask: bool = False) -> Picture:
    """No two alike, none the same mirrored; wide ones beside square ones."""
    size = (64, 32) if number % 2 else (32, 32)

    def read() -> Image.Image:
        picture = Image.new("RGB", size, (40 * number, 200, 90))
        ImageDraw.Draw(picture).polygon([(2, 2), (20 + number, 5), (6, 28)], "navy")
        return picture

    def half() -> Image.Image:
        found = Image.new("L", size, 0)
        found.paste(255, (0, 0, 13, 32))
        return found

    return Picture(f"{number}.png", str(number), size, read, f"a cat, {number}", half if mask else None)


def counted(pipe: cr.Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is encoded from now on, by any model of the pipeline's kind."""
    told: list[str] = []

    def count(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given, **more: told.append(name) or call(*given, **more)

    kind = type(pipe.backbone)
    monkeypatch.setattr(kind, "posterior", count("picture", kind.posterior))
    monkeypatch.setattr(kind, "encode_ids", count("prompt", kind.encode_ids))
    return told


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_second_start_encodes_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = cr.Pipeline.from_diffusers(BACKBONES[kind]())
    told = counted(pipe, monkeypatch)
    weights: dict[str, Path] = {}
    for name, cache in (("first", tmp_path / "cache"), ("second", tmp_path / "cache"), ("without", None)):
        told.clear()
        settings = LoRASettings(rank=2, flip=True, cache=None if cache is None else str(cache))
        pictures = [drawn(0), drawn(1, mask=True), drawn(2)]
        weights[name] = train(settings.build(pipe, pictures, tmp_path / name), loop(tmp_path / name)).weights
        assert told.count("picture") == (0 if name == "second" else 6), name
        assert ("prompt" in told) is (name != "second"), name
    first, second, without = (load_file(weights[name] / "lora.safetensors") for name in weights)
    for key, value in without.items():
        assert torch.equal(first[key], value) and torch.equal(second[key], value), key


def test_batches_are_equal_bit_for_bit_and_as_the_model_encodes(tmp_path: Path) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    pictures = [drawn(0, mask=True), drawn(1), drawn(2), drawn(3)]
    kept, plain = (BaseModel(pipe, cache_folder=folder) for folder in (tmp_path / "cache", None))
    shown = [Shown(base, pictures, size=(32, 32), flip=True, buckets=True) for base in (kept, plain)]
    assert shown[0].fingerprint() == shown[1].fingerprint()
    assert not shown[0]._kept, "on disk, they are not in memory as well"
    for rows in ([0, 2, 4], [1, 7]):
        ours, theirs = (one.batch(rows) for one in shown)
        assert torch.equal(ours.latents, theirs.latents) and ours.names == theirs.names
        assert ours.mask is not None and theirs.mask is not None and torch.equal(ours.mask, theirs.mask)
    mirrored = [pictures[0].read(), pictures[0].read().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    assert torch.equal(shown[0].batch([0, 4]).latents[0], plain.latents(mirrored[:1], (32, 32))[0])
    assert torch.equal(shown[0].batch([0, 4]).latents[1], plain.latents(mirrored[1:], (32, 32))[0])
    mask = shown[0].batch([0, 4]).mask
    assert mask is not None and torch.equal(mask[0], mask[1].flip(-1)) and 0 < float(mask.mean()) < 1
    for size in ((32, 32), (32, 64)):
        told = [base.condition(["a cat", "", "a cat"], size) for base in (kept, plain)]
        assert torch.equal(told[0].tokens, told[1].tokens)


def test_text_encoders_that_learn_are_asked_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    told = counted(pipe, monkeypatch)
    for name in ("first", "second"):
        told.clear()
        settings = DreamBoothSettings(prompt="a sks cat", text_encoders=True, cache=str(tmp_path / "cache"))
        train(settings.build(pipe, painted(), tmp_path / name), loop(tmp_path / name, total_steps=3))
        assert told.count("prompt") == 3


def test_what_autocast_says_of_prompts_is_not_kept(tmp_path: Path) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    base = BaseModel(pipe, cache_folder=tmp_path / "cache")
    with torch.autocast("cpu", torch.bfloat16):
        rough = base.condition(["a cat"]).tokens
    fine = BaseModel(pipe, cache_folder=tmp_path / "cache").condition(["a cat"]).tokens
    assert torch.equal(fine, BaseModel(pipe).condition(["a cat"]).tokens) and not torch.equal(rough, fine)


def test_a_changed_picture_is_another_and_a_black_mask_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    told = counted(pipe, monkeypatch)
    base = BaseModel(pipe, cache_folder=tmp_path)
    Shown(base, [drawn(0), drawn(2)])
    Shown(base, [drawn(0), drawn(4)])
    assert len(told) == 3
    black = painted(("red",), read_mask=lambda: Image.new("L", (32, 32), 0))
    with pytest.raises(InputError, match=r"red\.png is black"):
        Shown(base, black)


def test_the_command_line_keeps_them_in_the_run_s_folder() -> None:
    plan = plan_training("lora", data="x", out="somewhere")
    assert plan.resolved()["settings"]["cache"] == str(Path("somewhere/cache"))
    assert plan.settings.fingerprint() == LoRASettings().fingerprint()
    named: Any = plan_training("ip_adapter", data="x", changes=["cache=shared"]).settings
    off: Any = plan_training("lora", data="x", changes=["cache="]).settings
    assert named.cache == "shared" and not off.cache
    assert LoRASettings().cache is None
