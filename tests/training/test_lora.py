"""LoRA and DreamBooth-LoRA: what moves, exact resume, and that their files draw the same here and in diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import controlroom as cr
from controlroom.core.errors import InputError
from controlroom.training.loop import train
from controlroom.training.recipes.dreambooth_lora import DreamBoothLoRASettings
from controlroom.training.recipes.lora import FILE, LoRASettings
from tests.tiny import tiny_sd1, tiny_sdxl
from tests.training.recipe_checks import check_learns, check_moves_only_what_trains, check_resumes, loop, painted

DRAWN: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, "output_type": "latent"}


def maker(tmp_path: Path, settings: LoRASettings, make: Any = tiny_sd1, **pictures: Any) -> Any:
    pipe = cr.Pipeline.from_diffusers(make())
    return lambda: settings.build(pipe, painted(**pictures), tmp_path)


@pytest.mark.parametrize("make", [tiny_sd1, tiny_sdxl])
@pytest.mark.parametrize("text", [False, True])
def test_only_the_low_rank_layers_move(tmp_path: Path, make: Any, text: bool) -> None:
    settings = LoRASettings(rank=2, text_encoders=text)
    recipe = check_moves_only_what_trains(maker(tmp_path, settings, make), tmp_path / "run")
    adapter: Any = recipe.modules()["lora"]
    parts = {part for part, _ in adapter.layers}
    texts = {"text_encoder", "text_encoder_2"} if make is tiny_sdxl else {"text_encoder"}
    assert parts == ({"unet"} | texts if text else {"unet"})


def test_it_learns(tmp_path: Path) -> None:
    check_learns(maker(tmp_path, LoRASettings(rank=8)), tmp_path / "run", learning_rate=2e-2)


@pytest.mark.parametrize("settings", [LoRASettings(rank=2, without_words=0.5, flip=True), LoRASettings(dora=True)])
def test_a_broken_run_continues(tmp_path: Path, settings: LoRASettings) -> None:
    check_resumes(maker(tmp_path, settings), tmp_path)


@pytest.mark.parametrize("make", [tiny_sd1, tiny_sdxl])
@pytest.mark.parametrize("file_format", ["diffusers", "kohya"])
def test_its_file_draws_the_same_here_and_in_diffusers(tmp_path: Path, make: Any, file_format: Any) -> None:
    settings = LoRASettings(rank=2, alpha=1.0, text_encoders=True, file_format=file_format)
    result = train(maker(tmp_path, settings, make)(), loop(tmp_path / "run", learning_rate=0.1))
    pipe = cr.Pipeline.from_diffusers(make())
    plain = pipe("a cat", **DRAWN).images
    ours = pipe("a cat", controls=[cr.LoRA(str(result.weights / FILE))], **DRAWN).images
    assert float((ours - plain).abs().max()) > 0.05
    peer = make()
    peer.load_lora_weights(str(result.weights), weight_name=FILE)
    peer.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(plain.shape, generator=generator)
    settings_of_run: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "latent"}
    theirs = peer("a cat", latents=noise, **settings_of_run).images
    again = pipe("a cat", controls=[cr.LoRA(str(result.weights / FILE))], latents=noise, **settings_of_run).images
    assert float((again - theirs).abs().max()) < 1e-3 * float(theirs.std())


def test_masked_pictures_teach_only_what_is_white(tmp_path: Path) -> None:
    white = painted(read_mask=lambda: Image.new("L", (32, 32), 255))
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    plain = train(LoRASettings(rank=2).build(pipe, painted(), tmp_path), loop(tmp_path / "a"))
    masked = train(LoRASettings(rank=2).build(pipe, white, tmp_path), loop(tmp_path / "b"))
    assert masked.losses["loss"] == pytest.approx(plain.losses["loss"], rel=1e-5)
    half = Image.new("L", (32, 32), 0)
    half.paste(255, (0, 0, 16, 32))
    other = train(LoRASettings(rank=2).build(pipe, painted(read_mask=lambda: half), tmp_path), loop(tmp_path / "c"))
    assert other.losses["loss"] != pytest.approx(plain.losses["loss"], rel=1e-5)
    black = painted(read_mask=lambda: Image.new("L", (32, 32), 0))
    with pytest.raises(InputError, match="black"):
        LoRASettings().build(pipe, black, tmp_path)


def test_words_are_needed(tmp_path: Path) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    with pytest.raises(InputError, match=r"red\.png has no caption"):
        LoRASettings().build(pipe, painted(caption=""), tmp_path)
    named = LoRASettings(prompt="a cat").build(pipe, painted(caption=""), tmp_path)
    assert set(named.shown.prompts) == {"a cat"}
    with pytest.raises(InputError, match="no picture"):
        LoRASettings().build(pipe, (), tmp_path)
    with pytest.raises(InputError, match="rank"):
        LoRASettings(rank=0)


# -- DreamBooth with a LoRA --

CLASS = DreamBoothLoRASettings(prompt="a red cat", class_prompt="a cat", class_count=3, class_steps=2)


def test_class_is_drawn_once_and_shown_beside(tmp_path: Path) -> None:
    make = maker(tmp_path, CLASS)
    recipe = make()
    assert sorted(p.name for p in (tmp_path / "class").glob("*.png")) == ["00000.png", "00001.png", "00002.png"]
    kept, drawn = (
        (tmp_path / "class/00000.png").stat().st_mtime_ns,
        np.asarray(Image.open(tmp_path / "class/00001.png")),
    )
    (tmp_path / "class/00001.png").unlink()
    make()  # only what is missing is drawn, and it comes out the same to rounding (it was drawn in a batch)
    assert np.abs(np.asarray(Image.open(tmp_path / "class/00001.png")).astype(int) - drawn).max() <= 2
    assert (tmp_path / "class/00000.png").stat().st_mtime_ns == kept
    subject, beside = recipe.batch([0, 1], 0)
    assert subject.prompts == ("a red cat",) * 2 and beside.prompts == ("a cat",) * 2
    assert set(train(recipe, loop(tmp_path / "run")).losses) >= {"loss", "subject", "class"}
    with pytest.raises(InputError, match="another prompt"):
        maker(tmp_path, CLASS.model_copy(update={"class_prompt": "a dog"}))()


def test_without_weight_the_class_teaches_nothing(tmp_path: Path) -> None:
    alone = train(maker(tmp_path, CLASS.model_copy(update={"class_prompt": None}))(), loop(tmp_path / "a"))
    unweighted = train(maker(tmp_path, CLASS.model_copy(update={"class_weight": 0.0}))(), loop(tmp_path / "b"))
    assert unweighted.losses["loss"] == pytest.approx(alone.losses["loss"], rel=1e-4)
    weighted = train(maker(tmp_path, CLASS)(), loop(tmp_path / "c"))
    assert weighted.losses["loss"] > 1.2 * alone.losses["loss"]


def test_dreambooth_lora_moves_and_continues(tmp_path: Path) -> None:
    check_moves_only_what_trains(maker(tmp_path, CLASS), tmp_path / "run")
    check_resumes(maker(tmp_path, CLASS), tmp_path)


def test_subject_and_class_are_of_one_size() -> None:
    with pytest.raises(InputError, match="one pass"):
        DreamBoothLoRASettings(buckets=True)


def test_subject_needs_a_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a name"):
        maker(tmp_path, DreamBoothLoRASettings(), caption="")()


def test_pictures_keep_their_shape_in_buckets(tmp_path: Path) -> None:
    """Wide and square pictures train together, each batch of one size, and a broken run continues."""

    def made() -> Any:
        wide = painted(("red", "blue"), size=(64, 32), read=lambda: Image.new("RGB", (64, 32), "red"))
        return LoRASettings(rank=2).build(
            cr.Pipeline.from_diffusers(tiny_sd1()), (*wide, *painted(("green",))), tmp_path
        )

    recipe = made()
    order = recipe.batch_order(2, 3, 0)
    sizes = {recipe.batch(order.indices(range(2 * step, 2 * step + 2)), step)[0].size for step in range(4)}
    assert len(sizes) == 2 and (32, 32) in sizes and all(h * w <= 32 * 32 for h, w in sizes)
    wide = next(h_w for h_w in sizes if h_w != (32, 32))
    assert wide[1] / wide[0] == pytest.approx(2, abs=0.6)
    check_resumes(made, tmp_path)
