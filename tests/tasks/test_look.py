"""Seeing inside: maps against materialised probabilities, components against numpy, planted cases, and no change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from controlroom.app.cli import main
from controlroom.backbones.words import prompt_tokens
from controlroom.controls.editing.image_to_image import ImageToImage
from controlroom.controls.guidance.attend_and_excite import AttendAndExcite
from controlroom.controls.observe import Observation, Observe, between_pictures
from controlroom.core.errors import InputError
from controlroom.core.spec import RunSpec
from controlroom.sampling.pipeline import Pipeline
from controlroom.tasks.look import Look, LookOptions, look, principal_components, word_maps
from controlroom.tasks.look_pictures import (
    cells,
    colours_of_matches,
    features_as_colours,
    heat_over,
    marked,
    place_colours,
)
from tests.saved import tiny_folder
from tests.tiny import BACKBONES, PIXELS, tiny_sd1, tiny_tokenizer
from tests.traces import traces

STEPS = 3
OPTIONS: dict[str, Any] = {"num_inference_steps": STEPS, "seed": 5}


def picture(seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(tiny_sd1())


class Recorded:
    """Inputs of attention layers and outputs of resnets in a plain diffusers pipeline, pass by pass."""

    def __init__(self, unet: Any) -> None:
        self.passes: list[dict[str, Any]] = []
        unet.register_forward_pre_hook(lambda module, given: self.passes.append({}))
        for name, module in unet.named_modules():
            if name.endswith(("attn1", "attn2")):
                module.register_forward_pre_hook(self._note(name), with_kwargs=True)
            if name.split(".")[-2:-1] in (["resnets"], ["attentions"]):
                module.register_forward_hook(self._output(name))

    def _note(self, name: str) -> Any:
        def note(module: Any, arguments: Any, keywords: Any) -> None:
            hidden = arguments[0] if arguments else keywords["hidden_states"]
            self.passes[-1][name] = module, hidden, keywords.get("encoder_hidden_states")

        return note

    def _output(self, name: str) -> Any:
        def note(module: Any, arguments: Any, output: Any) -> None:
            self.passes[-1][name] = output[0] if isinstance(output, tuple) else output

        return note

    def probabilities(self, step: int, name: str, query: int, key: int) -> torch.Tensor:
        """[heads, queries, keys] between rows of a pass, as the formula says."""
        module, hidden, context = self.passes[step][name]
        q = module.to_q(hidden[query]).reshape(hidden.shape[1], module.heads, -1).permute(1, 0, 2)
        source = hidden[key] if context is None else context[key]
        k = module.to_k(source).reshape(source.shape[0], module.heads, -1).permute(1, 0, 2)
        return torch.exp(q @ k.mT / q.shape[-1] ** 0.5) / torch.exp(q @ k.mT / q.shape[-1] ** 0.5).sum(-1, keepdim=True)


@torch.no_grad()
def test_maps_equal_materialised_probabilities() -> None:
    """Two pictures drawn by diffusers' pipeline with the same noise, its layers' inputs written down."""
    seen = look(
        Pipeline.from_diffusers(tiny_sd1()),
        ["a red cat", "a dog"],
        options=LookOptions(step=1, words=("red cat", "dog", "a"), **OPTIONS),
    )
    plain = tiny_sd1()
    plain.set_progress_bar_config(disable=True)
    recorded = Recorded(plain.unet)
    noise = torch.cat([torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5 + i)) for i in (0, 1)])
    plain(["a red cat", "a dog"], num_inference_steps=STEPS, latents=noise, output_type="latent")
    # Rows are: two without the prompt, two with it. Positions: start, then a=1, red=2, cat=3.
    rows, places = (2, 3), {"red cat": ((2, 3), None), "dog": (None, (2,)), "a": ((1,), (1,))}
    for word, tokens in places.items():
        for image, positions in enumerate(tokens):
            if positions is None:
                assert np.isnan(seen.words[word][image]).all()
                continue
            layers = [
                recorded.probabilities(1, name, rows[image], rows[image])[..., list(positions)].sum(-1).mean(0)
                for name in seen.layers["words"]
            ]
            expected = torch.stack(layers).mean(0).reshape(seen.words[word].shape[1:])
            np.testing.assert_allclose(seen.words[word][image], expected, atol=1e-6)
    for a in (0, 1):
        for b in (0, 1):
            layers = [recorded.probabilities(1, name, rows[a], rows[b]).mean(0) for name in seen.layers["between"]]
            expected = torch.stack(layers).mean(0).reshape(seen.between.shape[2:])
            np.testing.assert_allclose(seen.between[a, b], expected, atol=1e-6)
    (name,) = seen.layers["components"]
    features = recorded.passes[1][name][2:]
    np.testing.assert_allclose(seen.components, principal_components(features)[0], atol=1e-4)
    assert len(seen.layers["words"]) > 1 and len(seen.layers["between"]) > 1
    assert seen.timestep == int(plain.scheduler.timesteps[1]) and seen.step == 1


@pytest.mark.parametrize("kind", BACKBONES)
def test_looking_changes_no_bit_and_leaves_no_trace(kind: str) -> None:
    pipe = Pipeline.from_diffusers(BACKBONES[kind]())
    plain = pipe("a red cat", seed=5, num_inference_steps=STEPS)
    before = traces(pipe)
    seen = look(pipe, "a red cat", options=LookOptions(step=0, **OPTIONS))
    assert np.array_equal(np.asarray(seen.pictures[0]), np.asarray(plain.images[0]))
    every = Observe(
        step=1,
        cross=tuple(site.name for site in pipe.backbone.attention_sites((16, 16)) if site.kind == "cross"),
        between=tuple(site.name for site in pipe.backbone.attention_sites((16, 16)) if site.kind == "self"),
        features=tuple(site.name for site in pipe.backbone.feature_sites((16, 16))),
    )
    settings: dict[str, Any] = {"seed": 5, "num_inference_steps": STEPS, "output_type": "latent"}
    watched = pipe("a red cat", controls=[every], **settings)
    alone = pipe("a red cat", **settings)
    assert torch.equal(watched.images, alone.images)
    assert watched.manifest["cost"] == alone.manifest["cost"]
    assert traces(pipe) == before
    assert np.isfinite(seen.words["cat"]).all() and np.isfinite(seen.components).all()


def test_beside_other_controls_the_picture_is_theirs(pipe: Pipeline) -> None:
    """What is read is what they leave; the picture is that of the run with them."""
    excite = AttendAndExcite(words=["cat"], iterations=1, thresholds={}, step_size=20.0)
    expected = pipe("a red cat", controls=[excite], seed=5, num_inference_steps=STEPS).images[0]
    options = LookOptions(step=1, words=("cat",), **OPTIONS)
    seen, without = (
        look(pipe, "a red cat", options=options, controls=[excite]),
        look(pipe, "a red cat", options=options),
    )
    assert np.array_equal(np.asarray(seen.pictures[0]), np.asarray(expected))
    assert np.abs(seen.words["cat"] - without.words["cat"]).max() > 1e-5
    assert [control.type for control in seen.spec.controls] == ["attend_and_excite"]


# Principal components.


def test_components_equal_numpys_up_to_sign() -> None:
    features = (
        torch.randn(2, 7, 4, 5, generator=torch.Generator().manual_seed(1)) * torch.arange(1.0, 8.0)[:, None, None]
    )
    found, shares = principal_components(features)
    rows = features.permute(0, 2, 3, 1).reshape(-1, 7).double().numpy()
    u, s, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    expected = (u * s)[:, :3].reshape(2, 4, 5, 3).transpose(0, 3, 1, 2)
    for axis in range(3):
        ours, theirs = found[:, axis].numpy(), expected[:, axis]
        assert min(np.abs(ours - theirs).max(), np.abs(ours + theirs).max()) < 1e-4
    np.testing.assert_allclose(shares, s[:3] ** 2 / (s**2).sum(), rtol=1e-5)


def test_planted_axes_are_found() -> None:
    """Three patterns at right angles with variances 9 : 4 : 1, mixed into eight channels: shares 9/14, 4/14, 1/14."""
    y, x = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    patterns = torch.stack([3.0 * (-1.0) ** x, 2.0 * (-1.0) ** y, (-1.0) ** (x // 2)])
    mix, _ = torch.linalg.qr(torch.randn(8, 3, generator=torch.Generator().manual_seed(2)))
    found, shares = principal_components(torch.einsum("cp,pyx->cyx", mix, patterns)[None] + 5.0)
    assert shares == pytest.approx((9 / 14, 4 / 14, 1 / 14), abs=1e-6)
    for axis in range(3):
        sign = float(mix[mix[:, axis].abs().argmax(), axis].sign())
        torch.testing.assert_close(found[0, axis], sign * patterns[axis], atol=1e-5, rtol=1e-5)


def test_fewer_channels_than_components_and_flat_features() -> None:
    found, shares = principal_components(torch.randn(1, 2, 3, 3))
    assert found.shape == (1, 3, 3, 3) and not bool(found[:, 2].any()) and shares[2] == 0.0
    flat, nothing = principal_components(torch.ones(1, 5, 3, 3))
    assert not bool(flat.any()) and nothing == (0.0, 0.0, 0.0)


# Planted attention.


class Layer:
    """A self-attention layer of two heads whose queries and keys are its input, made sharp."""

    heads, scale = 2, 1.0

    @staticmethod
    def to_q(hidden: torch.Tensor) -> torch.Tensor:
        return 50.0 * hidden

    @staticmethod
    def to_k(hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def test_planted_permutation_is_found() -> None:
    """The second picture has the places of the first, reversed: each finds its own, with certainty."""
    codes = torch.eye(6).repeat(1, 2)
    between = between_pictures(Layer, torch.stack([codes, codes.flip(0)]))
    torch.testing.assert_close(between[0, 0], torch.eye(6))
    torch.testing.assert_close(between[1, 0], torch.eye(6).flip(0))
    seen = Look(
        pictures=[picture(), picture(1)],
        prompts=("a cat", "a cat"),
        words={},
        components=np.zeros((2, 3, 2, 3), np.float32),
        explained=(0.0, 0.0, 0.0),
        between=between.reshape(2, 2, 2, 3, 2, 3).numpy(),
        points=((0.1, 0.2),),
        step=0,
        timestep=1,
        layers={},
        spec=RunSpec(prompt="a cat"),
    )
    # Place (row 0, column 0) of 2 x 3 is place (row 1, column 2) of the second.
    assert seen.match((0.1, 0.2)) == pytest.approx((2.5 / 3, 1.5 / 2))
    assert seen.match((0.1, 0.2), 0, 0) == pytest.approx((0.5 / 3, 0.5 / 2))
    compass = place_colours((2, 3))
    assert np.array_equal(colours_of_matches(seen.between[1, 0], compass), compass[::-1, ::-1])
    assert len({tuple(colour) for colour in compass.reshape(-1, 3).tolist()}) == 6
    assert [title for title, _ in cells(seen)[-1]] == [
        "places of the first",
        "where they are in the second",
        "point 1",
        "looks at",
    ]


def test_words_are_sums_over_their_tokens() -> None:
    cross = torch.rand(2, 4, 16)
    prompts = [prompt_tokens(tiny_tokenizer(), text) for text in ("a cat and a cat", "a red dog")]
    assert torch.equal(word_maps(cross, prompts, "cat")[0], cross[0][:, [2, 5]].sum(-1))
    assert torch.equal(word_maps(cross, prompts, "red dog")[1], cross[1][:, [2, 3]].sum(-1))
    assert bool(word_maps(cross, prompts, "cat")[1].isnan().all())


# Given pictures.


def test_given_pictures_are_seen_at_the_step_and_not_drawn_on(pipe: Pipeline) -> None:
    """What is read is the first step of image to image that starts there."""
    seen = look(pipe, "a red cat", [picture()], LookOptions(step=2, **OPTIONS))
    assert np.array_equal(np.asarray(seen.pictures[0]), np.asarray(picture()))
    watch = Observe(step=0, cross=seen.layers["words"], features=seen.layers["components"])
    found: list[Observation] = []

    class Watching(Observe):
        def prepare(self, run: Any) -> Observation:
            found.append(Observation())
            return found[-1]

    watching = Watching(**watch.model_dump())
    controls = [ImageToImage(picture(), 1 / 3), watching]
    result = pipe("a red cat", controls=controls, seed=5, num_inference_steps=STEPS, output_type="latent")
    assert result.manifest["cost"]["unet_passes"] == 1
    cross = torch.stack(list(found[0].cross.values())).mean(0)[0, :, 3].reshape(seen.words["cat"].shape[1:])
    assert np.array_equal(seen.words["cat"][0], cross.numpy())
    assert seen.step == 2


def test_two_pictures_inverted(pipe: Pipeline) -> None:
    """The second find themselves in the first; inverted, nothing depends on the seed."""
    both = [picture(0), picture(1)]
    first, second = (
        look(pipe, "a cat", both, LookOptions(inverted=True, num_inference_steps=4, step=2, seed=seed))
        for seed in (0, 9)
    )
    assert np.array_equal(first.between, second.between)
    noised = look(pipe, "a cat", both, LookOptions(num_inference_steps=4, step=2, seed=9))
    assert not np.array_equal(noised.between, first.between)
    np.testing.assert_allclose(first.between.sum((-1, -2)), 1.0, atol=1e-5)
    rows = cells(first)
    assert len(rows) == 3 and all(image.size == (PIXELS, PIXELS) for row in rows for _, image in row)


def test_layers_can_be_chosen(pipe: Pipeline) -> None:
    deep = look(pipe, "a cat", options=LookOptions(layer="up_blocks.1", **OPTIONS))
    assert all(name.startswith("up_blocks.1.") for names in deep.layers.values() for name in names)
    one = look(pipe, "a cat", options=LookOptions(layer="mid_block.resnets.1", resolution=8, **OPTIONS))
    assert one.layers["components"] == ("mid_block.resnets.1",) and one.components.shape[2:] == (8, 8)
    assert one.layers["words"]
    with pytest.raises(InputError, match=r"'mouth'.*up_blocks\.0"):
        look(pipe, "a cat", options=LookOptions(layer="mouth", **OPTIONS))


# Pictures.


def test_maps_over_pictures() -> None:
    field = np.zeros((4, 4), np.float32)
    field[1, 2] = 0.3
    shown = np.asarray(heat_over(Image.new("RGB", (32, 32)), field), int)
    brightest = np.unravel_index(shown.sum(-1).argmax(), (32, 32))
    assert 8 <= brightest[0] < 16 and 16 <= brightest[1] < 24
    heat_over(Image.new("RGB", (32, 32)), np.full((4, 4), 0.2, np.float32))
    colours = features_as_colours(np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2))
    assert colours.min() == 0 and colours.max() == 255 and colours.shape == (2, 2, 2, 3)
    plain = Image.new("RGB", (48, 48))
    assert marked(plain, (0.5, 0.5)).getbbox() is not None and plain.getbbox() is None


def test_half_way_is_half_of_what_is_run(pipe: Pipeline) -> None:
    """A picture that is started from leaves fewer steps than are asked for."""
    options = LookOptions(**OPTIONS | {"num_inference_steps": 5})
    assert look(pipe, "a cat", options=options, controls=[ImageToImage(picture(), 0.4)]).step == 1


# Mistakes, and the command.


def test_bad_input_is_told(pipe: Pipeline) -> None:
    for arguments, options, said in (
        (("a cat", [picture()] * 3), {}, "3 pictures"),
        ((["a", "b", "c"],), {}, "3 prompts"),
        ((" ",), {}, "empty prompt"),
        (("a cat",), {"words": ("giraffe",)}, "giraffe"),
        (("a cat",), {"step": 3}, "Step 3 is not run"),
        (("a cat",), {"resolution": 5}, "resolution 5"),
        (("a cat", [picture()]), {"inverted": True, "scheduler": "euler"}, "inverted by DDIM"),
        (("a cat", ["nowhere.png"]), {}, "nowhere.png"),
    ):
        with pytest.raises(InputError, match=said):
            look(pipe, *arguments, options=LookOptions(**OPTIONS, **options))
    shorter = LookOptions(**OPTIONS | {"num_inference_steps": 5, "step": 2})
    with pytest.raises(InputError, match="Step 2 is not run: there are 2, from 0 to 1"):
        look(pipe, "a cat", options=shorter, controls=[ImageToImage(picture(), 0.4)])
    with pytest.raises(InputError, match="from 0 to 1"):
        LookOptions(points=((1.2, 0.0),))
    with pytest.raises(InputError, match="colour"):
        LookOptions(colour=1)
    with pytest.raises(InputError, match="Controls act on what is drawn"):
        look(pipe, "a cat", [picture()], LookOptions(**OPTIONS), controls=[ImageToImage(picture())])


def test_command_writes_a_picture_and_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ("--model", str(tiny_folder()), "--steps", "3", "--seed", "5")
    arguments = ("look", "a red cat", *common, "--step", "1", "--words", "cat, red", "--point", "0.2,0.8")
    assert main([*arguments, "-o", "seen.png", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["file"] == "seen.png" and numbers["step"] == 1 and list(numbers["words"]) == ["cat", "red"]
    assert 0 < numbers["words"]["cat"][0]["mean"] < 1 and len(numbers["matches"]) == 1
    assert Image.open("seen.png").width > 3 * 160
    picture().save("a.png")
    assert main(["look", "a cat", *common, "-i", "a.png", "-i", "a.png", "-o", "both.png"]) == 0
    assert capsys.readouterr().out.strip() == "both.png"
    for wrong, said in (
        (("look", "a cat", *common, "-o", "x.jpg"), ".png"),
        (("look", "a cat", *common, "-o", "a.png", "-i", "a.png"), "picture itself"),
        (("look", "a cat", *common, "-o", "x.png", "--words", "dog"), "dog"),
        (("look", "a cat", *common, "-o", "x.png", "--point", "here"), "--point"),
        (("look", "a cat", *common, "-o", "x.png", "--words", "cat,"), "empty word"),
    ):
        assert main(list(wrong)) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and said in printed.err and len(printed.err.strip().splitlines()) == 1
    assert not Path("x.png").exists()
