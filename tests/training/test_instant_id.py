"""InstantID's recipe: what moves, what is shown, exact resume, and files that the control and diffusers read alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import controlroom as cr
from controlroom.backbones.instant_id import FILE, NET
from controlroom.core.errors import InputError, ModelError
from controlroom.data.pictures import Picture
from controlroom.data.theatre.faces import face_points, points_of_people
from controlroom.data.theatre.people import people as theatre_people
from controlroom.data.theatre.render import render
from controlroom.signals.face import draw_face
from controlroom.training.base_model import BaseModel
from controlroom.training.faces import Face, encoded_faces, faces_in
from controlroom.training.loop import train
from controlroom.training.randomness import StepRandom
from controlroom.training.recipes.instant_id import InstantIDRecipe, InstantIDSettings
from controlroom.training.shown import Shown
from tests.controls.nets import tiny_image_encoder
from tests.tiny import BACKBONES, tiny_sd1
from tests.training.recipe_checks import check_learns, check_moves_only_what_trains, check_resumes, loop

DRAW: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 4.0}
POINTS = np.array([(10.0, 10.0), (20.0, 11.0), (15.0, 16.0), (11.0, 21.0), (19.0, 22.0)])
COLOURS = {"anna": (200, 30, 30), "ben": (30, 60, 210)}
SETTINGS = InstantIDSettings(tokens=3, width=24, heads=1)


def picture_of(name: str, number: int, size: tuple[int, int] = (32, 32)) -> Picture:
    def read() -> Image.Image:
        noise = np.random.default_rng(number).integers(0, 60, (4, 4, 3))
        pixels = np.clip(np.asarray(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
        return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)

    return Picture(f"{name}_{number}.png", f"{name}{number}", size, read, "a cat on the beach", subject=name)


def people(count: int = 3) -> tuple[Picture, ...]:
    return tuple(picture_of(name, number) for name in COLOURS for number in range(count))


class Recogniser:
    def embed(self, picture: Image.Image) -> Any:
        mean = np.asarray(picture.convert("RGB"), np.float32).mean((0, 1)) / 255
        return np.concatenate([mean, mean**2, mean[::-1], [1.0]])


def faces_of(pictures: tuple[Picture, ...]) -> tuple[Face, ...]:
    return encoded_faces(pictures, lambda picture, image: POINTS + float(picture.name[-5]), Recogniser())


def maker(kind: str = "sd1", **changes: Any) -> Callable[[], InstantIDRecipe]:
    pipe = cr.Pipeline.from_diffusers(BACKBONES[kind]())
    settings = SETTINGS.model_copy(update=changes)

    def make() -> InstantIDRecipe:
        base = BaseModel(pipe)
        return InstantIDRecipe(base, Shown(base, people()), settings, faces_of(people()))

    return make


@pytest.mark.parametrize("kind", BACKBONES)
def test_both_parts_move_and_nothing_else(kind: str, tmp_path: Path) -> None:
    recipe = check_moves_only_what_trains(maker(kind), tmp_path, total_steps=3)
    assert set(recipe.modules()) == {"ip_adapter", "identity_net"}
    fresh = maker(kind)()
    unet = fresh.base.unet.state_dict()
    own = {k: v for k, v in fresh.net.state_dict().items() if k in unet}
    assert len(own) > 20 and all(torch.equal(v, unet[k].float()) for k, v in own.items())
    first = next(n.removesuffix(".processor") for n in fresh.base.unet.attn_processors if "attn2" in n)
    keys = fresh.adapter.state_dict()["ip_adapter.1.to_k_ip.weight"]
    assert torch.equal(keys, fresh.base.unet.get_submodule(first).to_k.weight.float())


def test_it_learns_and_continues(tmp_path: Path) -> None:
    check_learns(maker(), tmp_path / "run", steps=24, learning_rate=2e-3)
    check_resumes(maker(), tmp_path)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_training_predicts_what_a_run_predicts(kind: str) -> None:
    recipe = maker(kind)()
    with torch.no_grad():
        for name, parameter in recipe.net.named_parameters():
            if name.startswith(("controlnet_down", "controlnet_mid", "controlnet_cond_embedding.conv_out")):
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    batch = recipe.batch([0], 0)
    pipe = cr.Pipeline.from_diffusers(BACKBONES[kind]())
    seen: list[torch.Tensor] = []
    handle = pipe.unet.register_forward_hook(lambda m, a, o: seen.extend([a[0], a[1], o[0]]))
    control = cr.InstantID(
        recipe.adapter, batch.vectors[0, 0], POINTS, recipe.net, identity_scale=1.0, controlnet_scale=1.0
    )
    settings = {**DRAW, "num_inference_steps": 1, "negative_prompt": "", "height": 32, "width": 32}
    pipe(batch.shown.prompts[0], controls=[control], seed=3, **settings)
    handle.remove()
    noisy, t, expected = seen  # rows: without words, with words
    condition = recipe.base.condition(["", batch.shown.prompts[0]])
    vectors = torch.cat([torch.zeros_like(batch.vectors), batch.vectors])
    with torch.no_grad():
        found = recipe.predict(noisy, t.expand(2), condition, vectors, batch.maps.expand(2, -1, -1, -1))
        swapped = recipe.predict(noisy, t.expand(2), condition, vectors.flip(0), batch.maps.expand(2, -1, -1, -1))
    assert (found - expected).abs().max() < 1e-4 * expected.std()
    assert (swapped - expected).abs().max() > 1e-2 * expected.std()


def test_what_it_writes_is_read_by_the_control_and_by_diffusers(tmp_path: Path) -> None:
    from diffusers import ControlNetModel

    recipe = maker()()
    weights = train(recipe, loop(tmp_path, total_steps=3)).weights
    trained = maker()()
    trained.load(weights)
    for name, module in trained.modules().items():
        assert all(torch.equal(v, module.state_dict()[k]) for k, v in recipe.modules()[name].state_dict().items())
    net: Any = ControlNetModel.from_pretrained(weights / NET, local_files_only=True)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in trained.net.state_dict().items())
    pipe, vector = cr.Pipeline.from_diffusers(tiny_sd1()), trained.faces[0].vector

    def draw(*controls: Any) -> torch.Tensor:
        return pipe("a cat", controls=list(controls), generator=torch.Generator().manual_seed(3), **DRAW).images

    plain, whole = draw(), draw(cr.InstantID(weights, vector, POINTS))
    memory = cr.InstantID(trained.adapter.eval(), vector, POINTS, trained.net.eval())
    assert (whole - draw(memory)).abs().max() <= 1e-4 * whole.std()
    assert (whole - plain).abs().max() > 1e-2 * whole.std()
    # Without a place it is an IP-Adapter of plus shape, which diffusers draws with too.
    theirs: Any = tiny_sd1()
    theirs.set_progress_bar_config(disable=True)
    theirs.load_ip_adapter(str(weights), subfolder="", weight_name=FILE, image_encoder_folder=None)
    theirs.set_ip_adapter_scale(0.8)
    embeds = torch.stack([torch.zeros_like(vector), vector])[:, None, None]
    drawn = theirs("a cat", ip_adapter_image_embeds=[embeds], generator=torch.Generator().manual_seed(3), **DRAW).images
    assert (draw(cr.InstantID(weights, vector)) - drawn).abs().max() <= 1e-4 * drawn.std()


def test_a_face_comes_from_another_picture_of_the_person(tmp_path: Path) -> None:
    recipe = maker()()
    assert {recipe.reference_of(4, step) for step in range(20)} == {3, 5}
    batch = recipe.batch([4], 7)
    assert torch.equal(batch.vectors[0, 0], recipe.faces[recipe.reference_of(4, 7)].vector)
    assert not torch.equal(batch.vectors[0, 0], recipe.faces[4].vector)
    drawn = np.asarray(draw_face(POINTS + 1.0, 32, 32), np.float32) / 255
    assert torch.equal(batch.maps[0], torch.from_numpy(drawn).permute(2, 0, 1)), "its own place"
    # A picture that is cropped takes its points along.
    wide = [picture_of("anna", number, (64, 32)) for number in range(2)]
    base, moved = recipe.base, POINTS + np.array((16.0, 0.0))
    cropped = InstantIDRecipe(base, Shown(base, wide), SETTINGS, [Face(moved, torch.ones(9))] * 2)
    drawn = np.asarray(draw_face(POINTS, 32, 32), np.float32) / 255
    assert torch.equal(cropped.batch([0], 0).maps[0], torch.from_numpy(drawn).permute(2, 0, 1))


@pytest.mark.parametrize("silent", [False, True])
def test_nothing_is_left_out_unless_told(silent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"without_words": 1.0, "without_face": 1.0} if silent else {}
    recipe = maker(**changes)()
    batch, told, words = recipe.batch([0, 1], 0), [], []
    real, condition = recipe.predict, recipe.base.condition
    monkeypatch.setattr(recipe, "predict", lambda n, t, c, v, m: told.append(v) or real(n, t, c, v, m))
    monkeypatch.setattr(recipe.base, "condition", lambda prompts, size: words.append(prompts) or condition(prompts))
    with torch.no_grad():
        recipe.loss(batch, 0, StepRandom(0, 0, range(2)))
    assert words == ([("", "")] if silent else [batch.shown.prompts])
    assert bool(told[0].any()) is not silent


def test_held_out_people_are_measured() -> None:
    base = BaseModel(cr.Pipeline.from_diffusers(tiny_sd1()))
    held = (picture_of("ben", 7), picture_of("ben", 8))
    shown = Shown(base, people()[:3])
    recipe = InstantIDRecipe(
        base, shown, SETTINGS, faces_of(people()[:3]), held_out=list(zip(held, faces_of(held), strict=True))
    )
    found = recipe.validate(0)
    assert found == recipe.validate(1) and set(found) == {"held_out", "without_face", "wrong_face"}
    assert found["held_out"] != found["without_face"]


def test_faces_come_from_a_folder_and_settings_build(tmp_path: Path) -> None:
    pictures = people()
    for picture, face in zip(pictures, faces_of(pictures), strict=True):
        tensors = {"points": torch.from_numpy(face.points), "vector": face.vector}
        save_file(tensors, str(tmp_path / picture.name.replace(".png", ".safetensors")))
    read = faces_in(tmp_path, pictures)
    assert all(np.allclose(a.points, b.points) for a, b in zip(read, faces_of(pictures), strict=True))
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    recipe = InstantIDSettings(faces=str(tmp_path), tokens=2, width=16, heads=1).build(pipe, pictures, tmp_path)
    assert recipe.names([0, 5]) == ("anna_0.png", "ben_2.png")
    assert train(recipe, loop(tmp_path / "run", total_steps=1)).finished
    assert load_file(str(tmp_path / "run/weights" / FILE))["image_proj.latents"].shape == (1, 2, 16)
    with pytest.raises(ModelError, match="faces="):
        InstantIDSettings().build(pipe, pictures, tmp_path)
    (tmp_path / "ben_2.safetensors").unlink()
    with pytest.raises(InputError, match="ben_2"):
        faces_in(tmp_path, pictures)


def test_faces_of_the_theatre() -> None:
    """Ground truth: the points lie on the drawn eyes and the mouth, and a CLIP encoder reads the heads."""
    person = theatre_people("train", 1, 3)[0]
    points = points_of_people([person])
    assert set(points) == {picture.name for picture in person.pictures()}
    for scene in person.scenes:
        found = face_points(scene)
        pixels = np.asarray(render(scene), float)
        for x, y in found[:2]:
            near = pixels[int(y) - 2 : int(y) + 3, int(x) - 2 : int(x) + 3].mean(-1)
            assert near.min() < 110 < near.max(), "a dark pupil in a white eye"
        assert found[3:, 1].min() > found[:3, 1].max()
    faces = encoded_faces(person.pictures(), lambda picture, image: points[picture.name], tiny_image_encoder())
    assert [face.vector.shape for face in faces] == [(24,)] * 3
    with pytest.raises(InputError, match="2 faces for 3"):
        base = BaseModel(cr.Pipeline.from_diffusers(tiny_sd1()))
        InstantIDRecipe(base, Shown(base, people()[:3]), SETTINGS, faces_of(people()[:2]))


def test_theatre_recipe_learns_from_people(parts: Path, tmp_path: Path) -> None:
    from controlroom.training.recipes.theatre_faces import theatre_instant_id
    from controlroom.training.recipes.theatre_ip_adapter_multi import theatre_pipeline

    pipe = theatre_pipeline(parts / "unet", parts / "vae", parts / "clip")
    settings = InstantIDSettings(tokens=2, width=16, heads=1, without_words=0.1, without_face=0.1)
    recipe = theatre_instant_id(pipe, parts / "clip", 2, 2, settings)
    assert {picture.subject for picture in recipe.shown.pictures} == {"train-0000", "train-0001"}
    result = train(recipe, loop(tmp_path, total_steps=1))
    assert (result.weights / "face_encoder/config.json").is_file() and recipe.validate(0)["held_out"] > 0
