"""KOSMOS-G's three stages: what moves, that they learn, resume and hand on, and what the control reads of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from controlroom.backbones.kosmos import KosmosReader, load_kosmos, new_kosmos
from controlroom.backbones.multimodal import PICTURE
from controlroom.controls.personal.kosmos_g import KosmosG
from controlroom.core.errors import InputError
from controlroom.data.groups import Group, PlacedSubject
from controlroom.data.pictures import Picture
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.catalog import recipe_entry
from controlroom.training.interleaved import entities, groups_of, interleaved
from controlroom.training.loop import train
from controlroom.training.randomness import StepRandom
from controlroom.training.recipes.kosmos_g import (
    KosmosAlignRecipe,
    KosmosGRecipe,
    KosmosGSettings,
    KosmosLanguageRecipe,
    KosmosLanguageSettings,
)
from controlroom.training.recipes.theatre_kosmos import (
    theatre_kosmos_align,
    theatre_kosmos_g,
    theatre_kosmos_language,
)
from tests.controls.nets import tiny_image_encoder
from tests.tiny import BACKBONES
from tests.training.recipe_checks import (
    check_learns,
    check_moves_only_what_trains,
    check_resumes,
    loop,
    painted,
)
from tests.training.theatre_parts import pipeline

SIZES: dict[str, int] = {"width": 32, "layers": 1, "heads": 4, "image_tokens": 2, "length": 40}
SMALL = KosmosLanguageSettings(
    width=32, layers=1, heads=4, image_tokens=2, length=40, aligner_layers=1, aligner_heads=4
)
PICTURES = painted()


def pipe_of(kind: str = "sd1") -> Pipeline:
    return Pipeline.from_diffusers(BACKBONES[kind]())


def reader_of(pipe: Pipeline) -> KosmosReader:
    return new_kosmos(tiny_image_encoder(), pipe.backbone, 7, **SIZES, aligner_layers=1, aligner_heads=4)


def groups() -> tuple[Group, ...]:
    """A cat of each colour, known from a picture of that colour; one picture of two cats."""
    known = [PlacedSubject("cat", (0.0, 0.0, 1.0, 1.0), replace(p, name=f"other {p.name}")) for p in PICTURES]
    single = [Group(p, (s,)) for p, s in zip(PICTURES, known, strict=True)]
    both = replace(PICTURES[0], name="both.png", caption="a cat and a cat")
    return (*single, Group(both, (known[1], known[2])))


def language() -> KosmosLanguageRecipe:
    return KosmosLanguageRecipe(pipe_of(), tiny_image_encoder(), PICTURES, SMALL)


def align() -> KosmosAlignRecipe:
    pipe = pipe_of()
    return KosmosAlignRecipe(pipe, reader_of(pipe), [p.caption for p in PICTURES])


def instruct(kind: str = "sd1", **more: Any) -> KosmosGRecipe:
    pipe = pipe_of(kind)
    return KosmosGRecipe(pipe, reader_of(pipe), groups(), **more)


@pytest.mark.parametrize("make", [language, align, instruct])
def test_a_stage_moves_only_what_it_declares_learns_and_resumes(make: Any, tmp_path: Path) -> None:
    recipe = check_moves_only_what_trains(make, tmp_path / "moves", batch_size=3)
    parts = recipe.modules().keys()
    wanted = {
        "kosmos_language": {"language", "eye", "connector"},
        "kosmos_align": {"encoder", "decoder"},
        "kosmos_g": {"language", "eye", "connector", "encoder"},
    }
    assert parts == wanted[recipe.name]
    assert {"unet", "vae", "text_encoder", "image_encoder"} <= recipe.frozen().keys()
    # The noise hides what little pictures of one colour tell: the last stage is held to one level of it below.
    if make is not instruct:
        check_learns(make, tmp_path / "learns", 24, learning_rate=3e-3)
    check_resumes(make, tmp_path / "resumes", batch_size=3)


def test_stages_hand_on_and_the_control_is_told_what_training_was(tmp_path: Path) -> None:
    first = train(language(), loop(tmp_path / "1", total_steps=2)).weights
    pipe = pipe_of()
    aligned = KosmosAlignRecipe(pipe, load_kosmos(first, pipe.backbone), ["a red cat", "a dog"])
    second = train(aligned, loop(tmp_path / "2", total_steps=2)).weights
    before, after = (load_kosmos(folder, pipe.backbone).model.state_dict() for folder in (first, second))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(key.startswith("aligner.") for key in changed)
    recipe = KosmosGRecipe(pipe, load_kosmos(second, pipe.backbone), groups())
    with torch.no_grad():
        error = lambda: recipe.objective.held_out(  # noqa: E731
            lambda x, t: recipe.base.predict(x, t, recipe.told(recipe.batch([0, 1, 2, 3], 0), [True] * 4)),
            recipe.batch([0, 1, 2, 3], 0).latents,
        )
        start = error()
    third = train(recipe, loop(tmp_path / "3", total_steps=25, batch_size=4, learning_rate=3e-3)).weights
    recipe.load(third)
    assert error() < 0.99 * start
    told: list[Any] = []
    handle = pipe.unet.register_forward_hook(
        lambda m, a, k, o: told.append(k["encoder_hidden_states"]), with_kwargs=True
    )
    settings: dict[str, Any] = {"num_inference_steps": 1, "output_type": "latent", "seed": 3}
    shown = [subject.picture.read() for subject in groups()[3].subjects]
    pipe(f"a cat {PICTURE} and a cat {PICTURE}", controls=[KosmosG(str(third), shown)], **settings)
    pipe(f"a {PICTURE} and a {PICTURE}", controls=[KosmosG(str(third), shown)], guidance_scale=1.0, **settings)
    handle.remove()
    with torch.no_grad():
        batch, model = recipe.batch([3], 0), recipe.reader.model
        from controlroom.backbones.multimodal import sequences

        start_alone = model(sequences(recipe.tokenizer, [""], model.shape))
        for row, kept in ((told[0][1], True), (told[1][0], False)):
            wanted = recipe.told(batch, [kept]).tokens[0]
            assert (row - wanted).abs().max() < 1e-4 * wanted.std()
    assert (told[0][0] - start_alone[0]).abs().max() < 1e-4 * start_alone.std()


@torch.no_grad()
def test_losses_are_of_what_they_say() -> None:
    recipe = align()
    rng = StepRandom(0, 0, range(2))
    assert float(recipe.loss(("a red cat", "a dog"), 0, rng).total) == pytest.approx(
        sum(float(part.mean()) for part in recipe.errors(["a red cat", "a dog"])), rel=1e-4
    )
    # Padding changes nothing: each text's errors are those that it has alone, up to the length of the way back.
    there = recipe.errors(["a red cat on the beach", "a dog"])[0]
    assert there[1] == pytest.approx(float(recipe.errors(["a dog"])[0][0]), rel=1e-4)
    words = language()
    batch = words.batch([0, 1], 0)
    alone = KosmosLanguageRecipe(
        pipe_of(), tiny_image_encoder(), PICTURES, SMALL.model_copy(update={"alone": 1.0})
    ).loss(batch, 0, rng)
    seen = KosmosLanguageRecipe(
        pipe_of(), tiny_image_encoder(), PICTURES, SMALL.model_copy(update={"alone": 0.0})
    ).loss(batch, 0, rng)
    assert abs(float(alone.total) - float(seen.total)) > 1e-4
    # By hand: the words alone.
    model, tokenizer = words.reader.model, words.tokenizer
    errors = []
    for caption in batch.captions:
        ids = torch.tensor([tokenizer(caption).input_ids])
        states = model.language(input_ids=ids).last_hidden_state[0]
        scores = (states @ model.language.embed_tokens.weight.T).log_softmax(-1)
        errors += [-scores[i, ids[0, i + 1]] for i in range(ids.shape[1] - 1)]
    assert float(alone.total) == pytest.approx(float(torch.stack(errors).mean()), rel=1e-4)


def test_stable_diffusion_xl() -> None:
    recipe = instruct("sdxl", held_out=groups()[:1])
    loss = recipe.loss(recipe.batch([0, 3], 0), 0, StepRandom(0, 0, range(2))).total
    loss.backward()
    assert all(p.grad is not None for name, m in recipe.modules().items() for p in m.parameters() if name != "language")
    with torch.no_grad():
        found = recipe.validate(0)
    assert found["held_out"] != found["by_words"]


def test_captions_with_pictures() -> None:
    caption = "a Cat and a dog, a cat on the beach"
    spans = entities(caption, ["dog", "cat", "cat"])
    assert [number for _, _, number in spans] == [1, 0, 2]
    assert interleaved(caption, spans, True) == "a Cat <image> and a dog <image>, a cat <image> on the beach"
    assert interleaved(caption, spans, False) == "a <image> and a <image>, a <image> on the beach"
    with pytest.raises(InputError, match="hat"):
        entities(caption, ["hat"])
    with pytest.raises(InputError, match="cat"):
        entities("a concatenation", ["cat"])


def test_settings_build_from_pictures_and_say_what_is_missing(tmp_path: Path) -> None:
    pipe = pipe_of()
    tiny_image_encoder().save_pretrained(tmp_path / "clip")
    first = recipe_entry("kosmos_language").load()(image_encoder=str(tmp_path / "clip"), **SIZES, aligner_layers=1)
    first.build(pipe, PICTURES, tmp_path).export(tmp_path / "1")
    recipe_entry("kosmos_align").load()(model=str(tmp_path / "1")).build(pipe, PICTURES, tmp_path)
    twice = [replace(p, subject=name, name=f"{name} {p.name}") for name in ("Tom", "Ann") for p in PICTURES]
    last = KosmosGSettings(model=str(tmp_path / "1"), word="cat").build(pipe, twice, tmp_path)
    assert last.dataset_size == 6 and last.shown.groups[2].subjects[0].picture is twice[0]
    for message, given, word in (
        ("word of the captions", twice, ""),
        ("does not name", twice, "dog"),
        ("takes two", twice[:4], "cat"),
    ):
        with pytest.raises(InputError, match=message):
            KosmosGSettings(model=str(tmp_path / "1"), word=word).build(pipe, given, tmp_path)
    silent = [Picture("x.png", "x", (32, 32), PICTURES[0].read)]
    with pytest.raises(InputError, match="no caption"):
        KosmosLanguageRecipe(pipe, tiny_image_encoder(), silent, SMALL)
    with pytest.raises(InputError, match="no text"):
        KosmosAlignRecipe(pipe, reader_of(pipe), [])
    with pytest.raises(InputError, match="40"):
        KosmosLanguageRecipe(pipe, tiny_image_encoder(), [replace(PICTURES[0], caption="cat " * 60)], SMALL)
    assert groups_of(twice, "cat")[0].subjects[0].word == "cat"


def test_the_theatre(parts: Path, tmp_path: Path) -> None:
    pipe = pipeline(parts, UNet2DConditionModel.from_pretrained(parts / "unet"))
    settings = SMALL.model_copy(update={"length": 192})
    first = theatre_kosmos_language(pipe, parts / "clip", 4, settings)
    second = theatre_kosmos_align(pipe, train(first, loop(tmp_path / "1", total_steps=1)).weights, 12)
    weights = train(second, loop(tmp_path / "2", total_steps=1)).weights
    third = theatre_kosmos_g(pipe, weights, 4, tmp_path / "cache")
    assert [len(group.subjects) for group in third.shown.groups] == [1, 1, 2, 2]
    assert train(third, loop(tmp_path / "3", total_steps=1)).finished
    assert len(set(second.texts)) > 6 and third.objective.settings.min_snr_gamma == 5.0
