"""UNIMO-G's two stages: what moves, that they learn, resume and hand on, and what the control reads of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from controlroom.backbones.multimodal import PICTURE
from controlroom.backbones.unimo import UnimoReader, load_unimo, new_unimo
from controlroom.controls.personal.unimo_g import UnimoG
from controlroom.core.errors import InputError
from controlroom.data.groups import Group, PlacedSubject
from controlroom.data.pictures import Picture
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.catalog import recipe_entry
from controlroom.training.loop import train
from controlroom.training.randomness import StepRandom
from controlroom.training.recipes.theatre_kosmos import theatre_kosmos_language
from controlroom.training.recipes.theatre_unimo import theatre_unimo_g, theatre_unimo_text
from controlroom.training.recipes.unimo_g import (
    UnimoGRecipe,
    UnimoGSettings,
    UnimoTextRecipe,
    attention_loss,
    segments,
)
from tests.data.test_entities import write_detector, write_segmenter
from tests.training.recipe_checks import check_learns, check_moves_only_what_trains, check_resumes, loop, painted
from tests.training.test_kosmos_g import SMALL, pipe_of, reader_of
from tests.training.theatre_parts import pipeline

PICTURES = painted()


def half(side: str) -> Callable[[], Image.Image]:
    """A mask that is white on that side."""
    mask = np.zeros((32, 32), np.uint8)
    mask[:, slice(0, 16) if side == "left" else slice(16, 32)] = 255
    return lambda: Image.fromarray(mask)


def unimo_of(pipe: Pipeline) -> UnimoReader:
    return new_unimo(reader_of(pipe), pipe.backbone)


def groups() -> tuple[Group, ...]:
    """A cat of each colour, known from a picture of that colour; one picture of two cats, each in its half."""
    known = [PlacedSubject("cat", (0.0, 0.0, 0.5, 1.0), replace(p, name=f"other {p.name}")) for p in PICTURES]
    single = [Group(p, (s,)) for p, s in zip(PICTURES, known, strict=True)]
    both = replace(PICTURES[0], name="both.png", caption="a cat and a cat")
    masked = (replace(known[1], read_mask=half("left")), replace(known[2], read_mask=half("right")))
    return (*single, Group(both, masked))


def text() -> UnimoTextRecipe:
    pipe = pipe_of()
    return UnimoTextRecipe(pipe, reader_of(pipe), PICTURES, held_out=PICTURES[:1])


def instruct(kind: str = "sd1", **more: Any) -> UnimoGRecipe:
    pipe = pipe_of(kind)
    return UnimoGRecipe(pipe, unimo_of(pipe), groups(), **more)


@pytest.mark.parametrize("make", [text, instruct])
def test_a_stage_moves_only_what_it_declares_and_resumes(make: Any, tmp_path: Path) -> None:
    recipe = check_moves_only_what_trains(make, tmp_path / "moves", batch_size=3)
    wanted = {"unimo_text": {"prompt", "layers"}, "unimo_g": {"prompt", "visual", "layers"}}
    assert recipe.modules().keys() == wanted[recipe.name]
    assert {"unet", "vae", "text_encoder", "image_encoder", "language", "eye", "connector"} <= recipe.frozen().keys()
    check_resumes(make, tmp_path / "resumes", batch_size=3)


def test_the_first_stage_learns_and_hands_on(tmp_path: Path) -> None:
    recipe = text()
    before = recipe.validate(0)
    weights = train(recipe, loop(tmp_path, total_steps=25, batch_size=3, learning_rate=3e-3)).weights
    recipe.load(weights)
    after = recipe.validate(25)
    assert after["held_out"] < 0.99 * before["held_out"] and after["by_clip"] == before["by_clip"]
    pipe = pipe_of()
    old, new = text().reader.model.state_dict(), load_unimo(weights, pipe.backbone).model.state_dict()
    assert all(torch.equal(old[k], new[k]) == k.startswith(("language", "eye", "connector", "visual")) for k in old)
    plain = pipe("a red cat", output_type="latent", num_inference_steps=2, seed=3).images
    told = pipe("a red cat", controls=[UnimoG(str(weights))], output_type="latent", num_inference_steps=2, seed=3)
    assert (told.images - plain).abs().max() > 1e-3


def test_attention_learns_its_places(tmp_path: Path) -> None:
    make = lambda: instruct(settings=UnimoGSettings(attention=50.0))  # noqa: E731
    recipe = make()
    batch = recipe.batch([3], 0)

    @torch.no_grad()
    def looked() -> float:
        maps: list[Any] = []
        told, condition, masks = recipe.told(batch, [True], [True])
        recipe.predict(batch.groups.latents, torch.tensor([500]), told, condition, maps)
        return float(attention_loss(maps, masks))

    start = looked()
    # The noise hides what little pictures of one colour tell: here attention is most of the loss.
    check_learns(make, tmp_path / "learns", 24, batch_size=4, learning_rate=1e-2)
    train(recipe, loop(tmp_path / "places", total_steps=20, batch_size=4, learning_rate=1e-2))
    assert looked() < start - 0.01


@torch.no_grad()
def test_the_loss_on_attention_is_of_what_it_says() -> None:
    mask = torch.zeros(2, 2, 4, 4)
    mask[0, 0, :, :2] = 1
    mask[1, 0] = 1  # everything: does not count
    maps = [torch.rand(2, 2, 16), torch.rand(2, 2, 4)]
    left = [maps[0][0, 0].reshape(4, 4), maps[1][0, 0].reshape(2, 2)]
    wanted = sum(float(m[:, len(m) // 2 :].mean() - m[:, : len(m) // 2].mean()) for m in left) / 2
    found = attention_loss(maps, mask)
    assert float(found[0]) == pytest.approx(wanted, abs=1e-6) and float(found[1]) == 0
    assert not attention_loss([], mask).any()
    both = segments(groups()[3], (4, 4))
    assert both[0, :, :2].eq(255).all() and not both[0, :, 2:].any() and torch.equal(both[1], both[0].flip(-1))
    assert torch.equal(segments(groups()[0], (4, 4))[0], both[0])


@torch.no_grad()
def test_what_is_left_out_is_left_out() -> None:
    recipe = instruct()
    batch = recipe.batch([0, 3, 1], 0)
    told, _, masks = recipe.told(batch, [True] * 3, [True, True, False], [False, False, False])
    assert told.pictures.flatten(2).any(-1).tolist() == [[True, False], [True, True], [False, False]]
    assert masks.flatten(2).any(-1).tolist() == [[True, False], [True, True], [False, False]]
    assert torch.equal(masks[1], batch.masks[1])
    nothing, _, none = recipe.told(batch, [True] * 3, [True] * 3, [True] * 3)
    start, _ = recipe.told_words([""])
    assert torch.allclose(nothing.tokens, start.tokens.expand_as(nothing.tokens), atol=1e-6) and not none.numel()
    rng = StepRandom(0, 0, range(3))
    parts = recipe.loss(batch, 0, rng).parts
    weighted = instruct(settings=UnimoGSettings(attention=2.0)).loss(batch, 0, rng)
    assert float(weighted.total) == pytest.approx(float(parts["mse"]) + 2 * float(parts["attention"]), rel=1e-4)


def test_the_control_predicts_what_training_did(tmp_path: Path) -> None:
    recipe = instruct()
    weights = train(recipe, loop(tmp_path, total_steps=3)).weights
    recipe.load(weights)
    pipe, seen = pipe_of(), list[tuple[Any, Any, Any]]()
    hook = lambda module, given, named, out: seen.append((given[0], given[1], out[0]))  # noqa: E731
    handle = pipe.unet.register_forward_hook(hook, with_kwargs=True)
    shown = [subject.picture.read() for subject in groups()[3].subjects]
    settings: dict[str, Any] = {"num_inference_steps": 1, "output_type": "latent", "seed": 3}
    prompt = f"a cat {PICTURE} and a cat {PICTURE}"
    pipe(prompt, controls=[UnimoG(str(weights), shown)], **settings)
    handle.remove()
    (noisy, t, predicted), batch = seen[0], recipe.batch([3, 3], 0)
    with torch.no_grad():
        told, condition, _ = recipe.told(batch, [True, True], [True, True], [True, False])
        wanted = recipe.predict(noisy, torch.as_tensor(t).reshape(-1).expand(2), told, condition)
    assert (predicted - wanted).abs().max() < 1e-4 * wanted.std()


def test_stable_diffusion_xl() -> None:
    recipe = instruct("sdxl", held_out=groups()[2:])
    loss = recipe.loss(recipe.batch([0, 3], 0), 0, StepRandom(0, 0, range(2))).total
    loss.backward()
    assert all(p.grad is not None for m in recipe.modules().values() for p in m.parameters())
    with torch.no_grad():
        found = recipe.validate(0)
    assert found["held_out"] != found["by_words"] and -1 < found["attention"] < 1


def test_half_precision_learns_too() -> None:
    recipe = instruct()
    whole = recipe.loss(recipe.batch([0, 3], 0), 0, StepRandom(0, 0, range(2))).total
    with torch.autocast("cpu", torch.bfloat16):
        loss = recipe.loss(recipe.batch([0, 3], 0), 0, StepRandom(0, 0, range(2))).total
    loss.backward()
    assert loss.dtype == torch.float32 and float(loss) == pytest.approx(float(whole), rel=0.03)
    assert all(
        p.grad is not None and p.grad.isfinite().all() for m in recipe.modules().values() for p in m.parameters()
    )


def test_settings_build_from_pictures_and_say_what_is_missing(tmp_path: Path) -> None:
    pipe = pipe_of()
    reader_of(pipe).save(tmp_path / "language")
    first = recipe_entry("unimo_text").load()(language=str(tmp_path / "language"))
    first.build(pipe, PICTURES, tmp_path).export(tmp_path / "1")
    twice = [replace(p, subject=name, name=f"{name} {p.name}") for name in ("Tom", "Ann") for p in PICTURES]
    last = UnimoGSettings(model=str(tmp_path / "1"), words=("cat",)).build(pipe, twice, tmp_path)
    assert last.dataset_size == 6 and last.shown.groups[2].subjects[0].picture is twice[0]
    networks = {"detector": str(write_detector(tmp_path / "owl")), "segmenter": str(write_segmenter(tmp_path / "sam"))}
    cases: tuple[tuple[str, Any, dict[str, Any]], ...] = (
        ("One word", twice, {}),
        ("does not name", twice, {"words": ("dog",)}),
        ("takes two", twice[:4], {"words": ("cat",)}),
        ("no mask", twice, {"words": ("cat",), "same_picture": True}),
        ("neither", twice, {"words": ("cat",), "detector": "owl"}),
        ("None of 6", twice, {"words": ("dog",), **networks}),
    )
    for message, given, settings in cases:
        with pytest.raises(InputError, match=message):
            UnimoGSettings(model=str(tmp_path / "1"), **settings).build(pipe, given, tmp_path)
    silent = [Picture("x.png", "x", (32, 32), PICTURES[0].read)]
    with pytest.raises(InputError, match="no caption"):
        UnimoTextRecipe(pipe, reader_of(pipe), silent)


def test_the_theatre(parts: Path, tmp_path: Path) -> None:
    pipe = pipeline(parts, UNet2DConditionModel.from_pretrained(parts / "unet"))
    theatre_kosmos_language(pipe, parts / "clip", 2, SMALL.model_copy(update={"length": 192})).export(tmp_path / "0")
    first = theatre_unimo_text(pipe, tmp_path / "0", 5, tmp_path / "cache")
    weights = train(first, loop(tmp_path / "1", total_steps=1)).weights
    second = theatre_unimo_g(pipe, weights, 4, tmp_path / "cache")
    assert [len(group.subjects) for group in second.shown.groups] == [1, 1, 2, 2]
    assert train(second, loop(tmp_path / "2", total_steps=1)).finished
    assert first.objective.settings.min_snr_gamma == second.objective.settings.min_snr_gamma == 5.0
    names = [subject.picture.name for group in second.shown.groups for subject in group.subjects]
    assert 0 < sum(name.startswith("cut out of") for name in names) < 6
    target = theatre_unimo_g(pipe, weights, 2, from_target=True)
    assert all(s.picture.read().size != (128, 128) for g in target.shown.groups for s in g.subjects)
    assert target.fingerprint() != theatre_unimo_g(pipe, weights, 2).fingerprint()
