"""IP-Adapter and its form for several pictures: what moves, what is left out, exact resume, and files that diffusers
and the control read alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import controlroom as cr
from controlroom.backbones.image_aggregator import AggregatorSettings, chosen_pictures
from controlroom.backbones.ip_adapter import load_ip_adapter, save_ip_adapter
from controlroom.core.errors import InputError, ModelError
from controlroom.data.pictures import Picture
from controlroom.training.base_model import BaseModel
from controlroom.training.image_prompts import ENCODER, FILE, ImagePromptRecipe, others_of
from controlroom.training.loop import train
from controlroom.training.randomness import StepRandom
from controlroom.training.recipes.ip_adapter import IPAdapterRecipe, IPAdapterSettings
from controlroom.training.recipes.ip_adapter_multi import IPAdapterMultiRecipe, IPAdapterMultiSettings
from controlroom.training.shown import Shown
from tests.controls.nets import tiny_image_encoder, tiny_ip_adapter
from tests.tiny import BACKBONES, tiny_sd1
from tests.training.recipe_checks import check_learns, check_moves_only_what_trains, check_resumes, loop

DRAW: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 4.0}
COLOURS = {"anna": (200, 30, 30), "ben": (30, 60, 210)}


def picture_of(name: str, number: int) -> Picture:
    """A person is a colour; each picture has a place of its own."""

    def read() -> Image.Image:
        noise = np.random.default_rng(number).integers(0, 60, (4, 4, 3))
        pixels = np.clip(np.asarray(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
        return Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)

    return Picture(f"{name}_{number}.png", f"{name}{number}", (32, 32), read, "a cat on the beach", subject=name)


def people(count: int = 3) -> tuple[Picture, ...]:
    return tuple(picture_of(name, number) for name in COLOURS for number in range(count))


class Faces:
    """A face encoder: the mean colour, and something more to have a width of ten."""

    def embed(self, picture: Image.Image) -> Any:
        mean = np.asarray(picture.convert("RGB"), np.float32).mean((0, 1)) / 255
        return np.concatenate([mean, mean**2, mean[::-1], [1.0]])


@pytest.fixture(scope="module")
def encoder() -> Any:
    return tiny_image_encoder()


VARIANTS: dict[str, IPAdapterSettings] = {
    "base": IPAdapterSettings(),
    "plus": IPAdapterSettings(variant="plus", tokens=3, heads=1),
    "face": IPAdapterSettings(variant="face", rank=2),
}


def maker(variant: str, encoder: Any, kind: str = "sd1", **changes: Any) -> Callable[[], IPAdapterRecipe]:
    pipe = cr.Pipeline.from_diffusers(BACKBONES[kind]())
    settings = VARIANTS[variant].model_copy(update=changes)
    reads = Faces() if variant == "face" else encoder

    def make() -> IPAdapterRecipe:
        base = BaseModel(pipe)
        return IPAdapterRecipe(base, Shown(base, people()), settings, reads)

    return make


def multi(
    encoder: Any, tmp_path: Path, aggregator: AggregatorSettings | None = None, variant: str = "base", **more: Any
) -> Callable[[], IPAdapterMultiRecipe]:
    """From an adapter of random weights."""
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    file = tmp_path / FILE
    if not file.exists():
        from controlroom.backbones.ip_adapter import adapter_from_tensors

        save_ip_adapter(adapter_from_tensors(tiny_ip_adapter(pipe.unet, variant), pipe.unet), file)
    settings = IPAdapterMultiSettings(start=str(file), aggregator=aggregator or AggregatorSettings(), **more)

    def make() -> IPAdapterMultiRecipe:
        base = BaseModel(pipe)
        return IPAdapterMultiRecipe(
            base,
            Shown(base, people()),
            settings,
            Faces() if variant == "faceid" else encoder,
            load_ip_adapter(file, base.unet),
        )

    return make


# One picture.


@pytest.mark.parametrize(("variant", "kind"), [("base", "sdxl"), ("plus", "sd1"), ("face", "sd2")])
def test_the_adapter_moves_and_nothing_else(variant: str, kind: str, encoder: Any, tmp_path: Path) -> None:
    make = maker(variant, encoder, kind)
    recipe: Any = check_moves_only_what_trains(make, tmp_path, total_steps=3)
    assert set(recipe.modules()) == {"ip_adapter"}
    fresh = make().adapter.state_dict()
    numbers = {name: 2 * i + 1 for i, name in enumerate(_cross(recipe))}
    for name, number in numbers.items():
        # It started as the words' keys and values, and is where they are no longer.
        layer = recipe.base.unet.get_submodule(name)
        assert torch.equal(fresh[f"ip_adapter.{number}.to_k_ip.weight"], layer.to_k.weight.float())
    assert bool(any("lora" in key for key in fresh)) is (variant == "face")


def _cross(recipe: ImagePromptRecipe) -> list[str]:
    names = [name.removesuffix(".processor") for name in recipe.base.unet.attn_processors]
    return [name for name in names if name.endswith("attn2")]


def test_it_learns_and_continues(encoder: Any, tmp_path: Path) -> None:
    check_learns(maker("base", encoder), tmp_path / "run", steps=24, learning_rate=3e-3)
    check_resumes(maker("face", encoder), tmp_path)


@pytest.mark.parametrize("variant", ["base", "plus"])
def test_what_it_writes_draws_alike_here_and_in_diffusers(variant: str, encoder: Any, tmp_path: Path) -> None:
    result = train(maker(variant, encoder)(), loop(tmp_path, total_steps=2))
    look = people()[0].read()
    theirs: Any = tiny_sd1()
    theirs.set_progress_bar_config(disable=True)
    theirs.load_ip_adapter(str(result.weights), subfolder="", weight_name=FILE, local_files_only=True)
    theirs.set_ip_adapter_scale(0.8)
    drawn = theirs("a cat", ip_adapter_image=look, generator=torch.Generator().manual_seed(3), **DRAW).images
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    plain: Any = pipe("a cat", generator=torch.Generator().manual_seed(3), **DRAW).images
    control = cr.IPAdapter(str(result.weights / FILE), look, scale=0.8)
    ours: Any = pipe("a cat", controls=[control], generator=torch.Generator().manual_seed(3), **DRAW).images
    assert (ours - drawn).abs().max() <= 1e-4 * drawn.std()
    assert (ours - plain).abs().max() > 1e-2 * drawn.std()


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_predicts_what_a_run_predicts(variant: str, encoder: Any) -> None:
    recipe = maker(variant, encoder)()
    with torch.no_grad():
        for name, parameter in recipe.adapter.named_parameters():
            if "lora.up" in name:
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    batch = recipe.batch([0], 0)
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    seen: list[torch.Tensor] = []
    handle = pipe.unet.register_forward_hook(lambda m, a, o: seen.extend([a[0], a[1], o[0]]))
    settings = {**DRAW, "num_inference_steps": 1}
    other = recipe.shown.pictures[recipe.prompt_of(0, 0)[0]].read()
    given: dict[str, Any] = {"image": other, "image_encoder": encoder}
    if variant == "face":
        given = {"embeds": torch.from_numpy(np.asarray(Faces().embed(other), np.float32))[None]}
    pipe(batch.shown.prompts[0], controls=[cr.IPAdapter(recipe.adapter, **given)], seed=3, **settings)
    handle.remove()
    noisy, t, expected = seen  # rows: without words, with words
    words = recipe.base.condition(["", batch.shown.prompts[0]])
    features = torch.cat([recipe.without(batch.features, torch.tensor([True])), batch.features])
    with torch.no_grad():
        found = recipe.predict(noisy, t.expand(2), words, features)
        swapped = recipe.predict(noisy, t.expand(2), words, features.flip(0))
    assert (found - expected).abs().max() < 1e-4 * expected.std()
    assert (swapped - expected).abs().max() > 1e-2 * expected.std()


def test_left_out_are_the_picture_the_words_or_both(encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = maker("plus", encoder)()
    batch, told, words = recipe.batch([0, 1, 2, 3], 0), [], []
    real, condition = recipe.predict, recipe.base.condition
    monkeypatch.setattr(recipe, "predict", lambda n, t, c, f: told.append(f) or real(n, t, c, f))
    monkeypatch.setattr(recipe.base, "condition", lambda prompts, size: words.append(prompts) or condition(prompts))
    monkeypatch.setattr(StepRandom, "choice", lambda self, name, weights: torch.arange(4))
    with torch.no_grad():
        recipe.loss(batch, 0, StepRandom(0, 0, range(4)))
    black = recipe.null[0]
    assert bool(black.any()), "plus: a picture of zeros, encoded"
    assert [torch.equal(row[0], black) for row in told[0]] == [False, True, False, True]
    assert words == [(batch.shown.prompts[0], batch.shown.prompts[1], "", "")]
    assert sum(recipe.settings.dropout) == pytest.approx(1.0) and recipe.settings.dropout[1:] == (0.05, 0.05, 0.05)


def test_a_prompt_is_another_picture_of_the_same_person(encoder: Any) -> None:
    recipe = maker("base", encoder)()
    seen = {recipe.prompt_of(4, step)[0] for step in range(20)}
    assert seen == {3, 5}
    assert recipe.prompt_of(4, 7) == recipe.prompt_of(4, 7)
    itself = maker("base", encoder, reference="same")()
    assert itself.prompt_of(4, 7) == [4]


def test_held_out_people_are_measured(encoder: Any) -> None:
    base = BaseModel(cr.Pipeline.from_diffusers(tiny_sd1()))
    held = tuple(picture_of("ben", number) for number in (7, 8))
    recipe = IPAdapterRecipe(base, Shown(base, people()[:3]), IPAdapterSettings(), encoder, held)
    found = recipe.validate(0)
    assert found == recipe.validate(1) and set(found) == {"held_out", "without_picture"}
    assert found["held_out"] != found["without_picture"]


# Faces that a recogniser has read before.


@pytest.fixture
def read_before(tmp_path: Path) -> str:
    """A folder of what `Faces` says of the people."""
    folder = tmp_path / "faces"
    folder.mkdir()
    for picture in people():
        vector = torch.from_numpy(np.asarray(Faces().embed(picture.read()), np.float32))
        points = torch.tensor([[8.0, 12.0], [24.0, 12.0], [16.0, 18.0], [10.0, 25.0], [22.0, 25.0]])
        save_file({"points": points, "vector": vector}, folder / f"{Path(picture.name).stem}.safetensors")
    return str(folder)


def test_vectors_in_a_folder_teach_as_their_encoder(read_before: str, tmp_path: Path) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    settings = VARIANTS["face"].model_copy(update={"faces": read_before})
    stored, encoded = settings.build(pipe, people(), tmp_path), maker("face", None)()
    found, expected = (recipe.batch([0, 4], 3).features for recipe in (stored, encoded))
    assert torch.equal(found, expected) and found.shape == (2, 1, 10)
    file = tmp_path / FILE
    save_ip_adapter(encoded.adapter, file)
    (tmp_path / ENCODER).mkdir()  # which is not looked at
    more = IPAdapterMultiSettings(start=str(file), faces=read_before, aggregator=AggregatorSettings(pictures=2))
    several = more.build(pipe, people(), tmp_path)
    assert several.batch([0, 4], 3).features.shape == (2, 2, 10)
    assert check_moves_only_what_trains(lambda: more.build(pipe, people(), tmp_path), tmp_path / "run", total_steps=2)


def test_other_vectors_are_another_training(read_before: str, tmp_path: Path) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    settings = VARIANTS["face"].model_copy(update={"faces": read_before})
    before = settings.build(pipe, people(), tmp_path).fingerprint()
    assert settings.build(pipe, people(), tmp_path).fingerprint() == before
    file = Path(read_before) / f"{Path(people()[0].name).stem}.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "vector": tensors["vector"] + 1}, file)
    assert settings.build(pipe, people(), tmp_path).fingerprint() != before
    with pytest.raises(ModelError, match="one vector"):
        VARIANTS["plus"].model_copy(update={"faces": read_before}).build(pipe, people(), tmp_path)
    file.unlink()
    with pytest.raises(InputError, match="does not hold points"):
        settings.build(pipe, people(), tmp_path)
    with pytest.raises(InputError, match="give one of them"):
        IPAdapterSettings(faces="x", image_encoder="y")


# Several pictures.


@pytest.mark.parametrize("case", ["published", "mean", "lora", "face", "max"])
def test_attention_projection_keys_and_values_move(case: str, encoder: Any, tmp_path: Path) -> None:
    kinds = {"mean": {"tokens": "mean", "residual": True}, "max": {"aggregate": "max"}}
    aggregator = AggregatorSettings(pictures=4, **kinds.get(case, {}))
    more: dict[str, Any] = {"rank": 2} if case == "lora" else {}
    make = multi(encoder, tmp_path, aggregator, "faceid" if case == "face" else "base", **more)
    recipe = check_moves_only_what_trains(make, tmp_path / "run", total_steps=3)
    keys = set(recipe.modules()["ip_adapter"].state_dict())
    assert any(key.startswith("aggregator.") for key in keys) is (case != "max")
    assert any("_lora" in key for key in keys) is (case in ("lora", "face"))
    with safe_open(str(tmp_path / "run/weights" / FILE), "pt") as file:
        assert set(file.keys()) == keys
        assert AggregatorSettings.from_metadata(file.metadata(), "") == (
            AggregatorSettings(aggregate="max") if case == "max" else aggregator
        )


def test_it_learns_continues_and_draws_alike_here_and_in_diffusers(encoder: Any, tmp_path: Path) -> None:
    make = multi(encoder, tmp_path, AggregatorSettings(pictures=3))
    check_learns(make, tmp_path / "run", steps=24, learning_rate=3e-3)
    check_resumes(make, tmp_path)
    weights = tmp_path / "run/weights"
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    looks = [picture.read() for picture in people()[:3]]
    settings = {"generator": torch.Generator().manual_seed(3), **DRAW}
    ours: Any = pipe("a cat", controls=[cr.IPAdapter(str(weights), looks)], **settings).images
    model, recipe = load_ip_adapter(weights / FILE, pipe.unet), make()
    recipe.load(weights)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in recipe.adapter.state_dict().items())
    assert model.aggregator is not None
    with torch.no_grad():
        became = model.aggregator(recipe._features[None, :3])[0]
    theirs: Any = tiny_sd1()
    theirs.set_progress_bar_config(disable=True)
    theirs.load_ip_adapter(str(weights), subfolder="", weight_name=FILE, local_files_only=True)
    embeds = torch.stack([torch.zeros_like(became), became])
    settings = {"generator": torch.Generator().manual_seed(3), **DRAW}
    drawn = theirs("a cat", ip_adapter_image_embeds=[embeds], **settings).images
    assert (ours - drawn).abs().max() <= 1e-4 * drawn.std()


def test_one_is_left_out_and_there_are_always_nine(encoder: Any, tmp_path: Path) -> None:
    recipe = multi(encoder, tmp_path)()
    assert recipe.count == 9 and recipe.batch([0, 3], 0).features.shape == (2, 9, 24)
    found = recipe.prompt_of(1, 0)
    assert len(found) == 9 and set(found) == {0, 2}, "two others, and some of them again"
    recipe.others = {1: [0, *range(2, 10)], 2: [0, 1, *range(3, 15)]}
    assert sorted(recipe.prompt_of(1, 0)) == recipe.others[1], "the other nine of ten"
    more = [recipe.prompt_of(2, step) for step in range(6)]
    assert all(len(set(one)) == 9 and 2 not in one for one in more) and more[0] != more[1]
    assert recipe.prompt_of(2, 3) == more[3]
    assert chosen_pictures(2, 9, 5)[:2] == [0, 1]


def test_a_single_picture_can_have_the_same_further_training(encoder: Any, tmp_path: Path) -> None:
    recipe = multi(encoder, tmp_path, AggregatorSettings(aggregate="tokens", pictures=1))()
    assert recipe.batch([0], 0).features.shape == (1, 1, 24) and recipe.adapter.aggregator is None
    assert recipe.adapter.metadata() == {}


def test_settings_build_both(tmp_path: Path, encoder: Any) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    encoder.save_pretrained(tmp_path / "seer")
    first = IPAdapterSettings(image_encoder=str(tmp_path / "seer")).build(pipe, people(), tmp_path)
    result = train(first, loop(tmp_path / "first", total_steps=1))
    assert (result.weights / ENCODER / "config.json").is_file()
    second = IPAdapterMultiSettings(start=str(result.weights)).build(pipe, people(), tmp_path)
    assert second.adapter.aggregate == "attention"
    for parameters in (first, second):
        assert parameters.names([0, 5]) == ("anna_0.png", "ben_2.png")
    third = IPAdapterMultiSettings(start=str(train(second, loop(tmp_path / "second", total_steps=1)).weights))
    going_on = third.build(pipe, people(), tmp_path)
    assert going_on.adapter.aggregator is not None
    learned = second.adapter.state_dict()["aggregator.to_v.weight"]
    assert torch.equal(going_on.adapter.aggregator.to_v.weight, learned)


def test_bad_input(encoder: Any, tmp_path: Path) -> None:
    one = picture_of("anna", 0)
    with pytest.raises(InputError, match="one picture of 'anna'"):
        others_of([one])
    with pytest.raises(InputError, match="does not say whom"):
        others_of([Picture("x.png", "", (1, 1), one.read)])
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    with pytest.raises(ModelError, match="image_encoder="):
        IPAdapterSettings().build(pipe, people(), tmp_path)
    with pytest.raises(InputError, match="dropout"):
        IPAdapterSettings(dropout=(1.0, -0.5, 0.2, 0.3))
    with pytest.raises(InputError, match="variant"):
        IPAdapterSettings.model_validate({"variant": "half"})
    base = BaseModel(pipe)
    with pytest.raises(ModelError, match="24 wide, the adapter reads 10"):
        faceid = multi(encoder, tmp_path, variant="faceid")()
        IPAdapterMultiRecipe(base, Shown(base, people()), IPAdapterMultiSettings(), encoder, faceid.adapter)
