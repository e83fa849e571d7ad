"""Masks by words: the map against plain attention, and every control that takes one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import Field
from torch.nn import functional as F

from controlroom.controls.editing.image_to_image import ImageToImage
from controlroom.controls.editing.instruct_pix2pix import InstructPix2Pix
from controlroom.controls.editing.masactrl import MasaCtrl
from controlroom.controls.editing.prompt_to_prompt import PromptToPrompt
from controlroom.controls.guidance.prompt_weighting import PromptWeighting
from controlroom.controls.personal.ip_adapter import IPAdapter
from controlroom.controls.pose.appearance import AppearanceControl
from controlroom.controls.region import Region
from controlroom.controls.run_mask import RunMask, mask_sites, run_mask
from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.controls.style.cross_image_attention import CrossImageAttention
from controlroom.controls.style.ctrl_x import CtrlX
from controlroom.controls.style.reference_only import ReferenceOnly
from controlroom.controls.style.style_aligned import StyleAligned
from controlroom.controls.word_mask import MaskInput, WordMask
from controlroom.core.attention import AttentionCall
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import InputError
from controlroom.core.run import Run
from controlroom.core.spec import RunSpec
from controlroom.core.step import Step
from controlroom.sampling.pipeline import Pipeline
from tests.controls.nets import tiny_controlnet, tiny_image_encoder, tiny_ip_adapter
from tests.sampling.test_engine_rest import Seen
from tests.tiny import BACKBONES, tiny_sd1, tiny_unet

PROMPT = "a red cat on the beach"
DRAW: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent", "seed": 5, "scheduler": "ddim"}


class Looks(Control):
    """Reads where its words are, and changes nothing."""

    type: Literal["looks"] = Field(default="looks", kw_only=True)
    mask: MaskInput = None

    def declare(self, outline: Outline) -> Declaration:
        return Declaration(attention=mask_sites(outline, self.mask))

    def prepare(self, run: Run) -> RunMask:
        return run_mask(self.mask, run, self)

    def attention(self, call: AttentionCall) -> None:
        call.step.memory(self).attention(call)

    def finish(self, step: Step) -> None:
        step.memory(self).update()


def picture(seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((32, 32), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(tiny_sd1())


def found(pipe: Pipeline, mask: Any, prompt: Any = PROMPT, **settings: Any) -> torch.Tensor:
    return pipe(prompt, controls=[Looks(mask=mask)], **{**DRAW, **settings}).masks["Looks.mask"]


@torch.no_grad()
def published(kind: str, prompt: str, tokens: list[int], side: int, threshold: float, guidance: float) -> torch.Tensor:
    """The last mask of a run, with every probability materialised and the maps of all steps summed up."""
    source = BACKBONES[kind]()
    total: list[torch.Tensor] = []

    class Reading:
        def __call__(self, attn: Any, hidden: Any, encoder_hidden_states: Any = None, **more: Any) -> Any:
            context = hidden if encoder_hidden_states is None else encoder_hidden_states
            q, k, v = attn.to_q(hidden), attn.to_k(context), attn.to_v(context)
            q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
            p = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
            if encoder_hidden_states is not None and hidden.shape[1] == side * side:
                for token in tokens:
                    for head in p[-1]:  # the row with the prompt is the last
                        total.append(head[:, token].reshape(side, side))
            return attn.to_out[0]((p @ v).transpose(1, 2).flatten(2))

    source.unet.set_attn_processor(Reading())
    source.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(5)
    source(prompt, num_inference_steps=3, guidance_scale=guidance, generator=noise, output_type="latent")
    map_ = sum(total[1:], total[0])
    spread = torch.stack(
        [F.pad(map_, (1, 1, 1, 1), value=-1)[i : i + side, j : j + side] for i in range(3) for j in range(3)]
    )
    wide = spread.amax(0).repeat_interleave(32 // side, 0).repeat_interleave(32 // side, 1)
    return (wide > threshold * wide.max()).float()[None, None]


@pytest.mark.parametrize(
    ("kind", "words", "tokens", "side", "threshold", "guidance"),
    [
        ("sd1", "cat", [3], 8, 0.9, 7.5),
        ("sd1", ["red cat", "beach"], [2, 3, 6], 8, 0.85, 1.0),
        ("sd1", "beach", [6], 16, 0.7, 7.5),
        ("sd2", "cat", [3], 8, 0.95, 7.5),
        ("sdxl", "red", [2], 8, 0.9, 7.5),
    ],
)
def test_equals_plain_attention(
    kind: str, words: Any, tokens: list[int], side: int, threshold: float, guidance: float
) -> None:
    expected = published(kind, PROMPT, tokens, side, threshold, guidance)
    mask = WordMask(words, threshold=threshold, resolution=side)
    ours = found(Pipeline.from_diffusers(BACKBONES[kind]()), mask, guidance_scale=guidance)
    assert 0.02 < float(expected.mean()) < 0.98
    assert torch.equal(ours, expected)


def test_reading_changes_nothing_and_costs_no_row(pipe: Pipeline) -> None:
    plain = pipe(PROMPT, **DRAW)
    result = pipe(PROMPT, controls=[Looks(mask="words: cat")], **DRAW)
    assert (plain.images - result.images).abs().max() < 1e-5 * plain.images.std()
    assert plain.manifest["cost"] == result.manifest["cost"] and not plain.masks


def test_a_higher_threshold_is_a_smaller_mask(pipe: Pipeline) -> None:
    masks = [found(pipe, WordMask("cat", threshold=threshold)) for threshold in (0.0, 0.5, 0.8, 0.95)]
    areas = [float(mask.mean()) for mask in masks]
    assert areas[0] == 1.0 and areas == sorted(areas, reverse=True) and 0 < areas[-1] < areas[0]
    assert all(bool((small <= large).all()) for large, small in pairwise(masks))


def test_every_picture_of_a_batch_has_its_own(pipe: Pipeline) -> None:
    prompts = [PROMPT, "the dog with a blue hat"]
    mask = WordMask(["cat", "hat"], threshold=0.9)
    together = found(pipe, mask, prompts)
    for index, (prompt, word) in enumerate(zip(prompts, ("cat", "hat"), strict=True)):
        alone = found(pipe, WordMask(word, threshold=0.9), prompt, seed=5 + index)
        assert torch.equal(together[index], alone[0])
    assert not torch.equal(together[0], together[1])
    twice = found(pipe, mask, prompts, num_images_per_prompt=2)
    assert twice.shape == (4, 1, 32, 32) and torch.equal(twice[0], together[0])


def test_beside_prompts_that_are_longer(pipe: Pipeline) -> None:
    """Chunks make all texts of a run longer; the words stay where they are."""
    long = "a red cat and a blue frog with a green hat on the beach and a dog and a hat"
    prompts = [f"(cat:1.0) on the beach, {long}", "the dog"]
    control = PromptWeighting(dialect="a1111")
    spec = RunSpec(prompt=prompts, controls=[control, Looks(mask=WordMask(["beach", "dog"], threshold=0.9))], **DRAW)
    mask = pipe.run(spec).masks["Looks.mask"]
    assert mask.shape == (2, 1, 32, 32) and all(0 < float(row.mean()) < 1 for row in mask)


CONTROLS: dict[str, Callable[[Any], Callable[..., Control]]] = {
    "controlnet": lambda unet: lambda **s: ControlNet(tiny_controlnet(unet), picture(), **s),
    "ip_adapter": lambda unet: (
        lambda adapter, encoder: lambda **s: IPAdapter(adapter, picture(), image_encoder=encoder, scale=2.0, **s)
    )(tiny_ip_adapter(unet), tiny_image_encoder()),
    "appearance_control": lambda unet: lambda **s: AppearanceControl(picture(), tiny_unet(seed=5), **s),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_act_where_the_words_were_in_the_steps_before(name: str, pipe: Pipeline) -> None:
    """Two steps: the first everywhere, the second within what the first has shown, as with that picture as mask."""
    make = CONTROLS[name](pipe.unet)
    draw = {**DRAW, "num_inference_steps": 2}
    words = WordMask("cat", threshold=0.95)
    result = pipe(PROMPT, controls=[make(mask=words)], **draw)
    ((label, mask),) = result.masks.items()
    assert label.endswith(".mask") and 0.02 < float(mask.mean()) < 0.98
    split = [make(end=0.5), make(start=0.5, mask=mask[0, 0].numpy())]
    expected = pipe(PROMPT, controls=split, **draw).images
    scale = expected.std()
    assert (result.images - expected).abs().max() < 1e-4 * scale
    everywhere = pipe(PROMPT, controls=[make()], **draw).images
    assert (result.images - everywhere).abs().max() > 1e-3 * scale
    white = pipe(PROMPT, controls=[make(mask=WordMask("cat", threshold=0.0))], **draw).images
    assert (white - everywhere).abs().max() < 1e-3 * scale


def test_reference_only_looks_where_the_words_are(pipe: Pipeline) -> None:
    for settings in ({}, {"reference_attn": False, "reference_adain": True}):
        plain = pipe(PROMPT, controls=[ReferenceOnly(picture(), **settings)], **DRAW).images
        white, part = (
            pipe(PROMPT, controls=[ReferenceOnly(picture(), mask=WordMask("cat", threshold=t), **settings)], **DRAW)
            for t in (0.0, 0.95)
        )
        assert (white.images - plain).abs().max() < 1e-4 * plain.std()
        assert (part.images - plain).abs().max() > 1e-3 * plain.std()
        assert list(part.masks) == ["ReferenceOnly.mask"]


CALM: dict[str, Any] = {"structure_schedule": 1.0, "appearance_schedule": 1.0, "recurrence": (0, 0, 0)}
BESIDE: dict[str, Callable[..., Control]] = {
    "structure": lambda **s: CtrlX(picture(), **CALM, **s),
    "appearance": lambda **s: CtrlX(None, picture(), **CALM, **s),
    "style_aligned": lambda **s: StyleAligned(prompt="a blue dog", **s),
    "cross_image": lambda **s: CrossImageAttention(
        picture(), picture(1), 1.0, attention_start=0.0, structure_every=0, adain_start=0.0, **s
    ),
    "adain alone": lambda **s: StyleAligned(prompt="a blue dog", share_group_norm=False, share_attention=False, **s),
}


@pytest.mark.parametrize("name", BESIDE)
def test_pictures_beside_act_where_the_words_are(name: str, pipe: Pipeline) -> None:
    make = BESIDE[name]
    plain = pipe(PROMPT, controls=[make()], **DRAW).images
    white, part = (pipe(PROMPT, controls=[make(mask=WordMask("cat", threshold=t))], **DRAW) for t in (0.0, 0.95))
    assert (white.images - plain).abs().max() < 1e-3 * plain.std()
    ((label, mask),) = part.masks.items()
    assert label.endswith(".mask") and 0 < float(mask.mean()) < 1
    # As little as one that acts in the first step alone, and as all of it, it is not.
    for other in (plain, pipe(PROMPT, controls=[make(end=0.3)], **DRAW).images):
        assert (part.images - other).abs().max() > 1e-3 * plain.std()


@pytest.mark.parametrize(
    "make",
    [
        lambda mask: Region("a dog", mask=mask),
        lambda mask: AppearanceControl(picture(), reference_mask=mask),
        lambda mask: CrossImageAttention(picture(), picture(1), appearance_mask=mask),
    ],
)
def test_what_must_be_known_before_takes_no_words(make: Callable[[Any], Any]) -> None:
    for mask in ("words: shirt", WordMask("shirt"), ["words: shirt"]):
        with pytest.raises(InputError, match="'shirt' cannot be the mask here"):
            make(mask)


class TestProportions:
    def test_a_mask_is_not_stretched(self, pipe: Pipeline, tmp_path: Any) -> None:
        wide = tmp_path / "wide.png"
        Image.new("L", (64, 32), 255).save(wide)
        control = ReferenceOnly(picture(), mask=str(wide))
        with pytest.raises(InputError, match=r"wide\.png' is 64 x 32 pixels and the picture 32 x 32"):
            pipe(PROMPT, controls=[control], **DRAW)
        assert torch.isfinite(pipe(PROMPT, controls=[control], **{**DRAW, "width": 64}).images).all()
        nearly = ReferenceOnly(picture(), mask=np.ones((100, 104)))
        assert torch.isfinite(pipe(PROMPT, controls=[nearly], **DRAW).images).all()

    def test_but_with_the_picture_that_it_is_of(self, pipe: Pipeline, tmp_path: Any) -> None:
        wide = np.zeros((32, 64))
        wide[:, :32] = 1
        controls = [ImageToImage(picture().resize(size), 0.7, mask=wide) for size in ((64, 32), (64, 64))]
        assert torch.isfinite(pipe(PROMPT, controls=controls[:1], **DRAW).images).all()
        with pytest.raises(InputError, match="proportions"):
            pipe(PROMPT, controls=controls[1:], **DRAW)

    def test_black_all_over_names_the_file(self, pipe: Pipeline, tmp_path: Any) -> None:
        Image.new("L", (32, 32), 0).save(tmp_path / "black.png")
        with pytest.raises(InputError, match=r"black\.png' is black all over"):
            pipe(PROMPT, controls=[ReferenceOnly(picture(), mask=tmp_path / "black.png")], **DRAW)


def test_words_for_each_picture_of_an_ip_adapter(pipe: Pipeline) -> None:
    adapter, encoder = tiny_ip_adapter(pipe.unet), tiny_image_encoder()
    pictures = [picture(0), picture(1)]
    masks = ["words: cat", WordMask("beach", threshold=0.9)]
    control = IPAdapter(adapter, pictures, mask=masks, image_encoder=encoder)
    assert control.mask == [WordMask("cat"), WordMask("beach", threshold=0.9)]
    result = pipe(PROMPT, controls=[control], **DRAW)
    assert list(result.masks) == ["IPAdapter.mask 1", "IPAdapter.mask 2"]
    assert not torch.equal(*result.masks.values())


class TestPicturesThatAreKept:
    def test_image_to_image(self, pipe: Pipeline) -> None:
        control = ImageToImage(picture(), 0.7, mask=WordMask("cat", threshold=0.9))
        result = pipe(PROMPT, controls=[control], **DRAW)
        self.check(result, ImageToImage(picture(), 0.7), pipe)

    def test_instruct_pix2pix(self) -> None:
        pipe = Pipeline.from_diffusers(tiny_sd1(in_channels=8))
        result = pipe(PROMPT, controls=[InstructPix2Pix(picture(), mask=WordMask("cat", threshold=0.9))], **DRAW)
        self.check(result, InstructPix2Pix(picture()), pipe)

    @staticmethod
    def check(result: Any, without: Control, pipe: Pipeline) -> None:
        """Outside of what was found at the last step it is the picture as the autoencoder has it."""
        (mask,) = result.masks.values()
        outside = F.interpolate(mask, size=(16, 16))[0, 0] == 0
        assert 0.02 < float(outside.float().mean()) < 0.98
        pixels = torch.from_numpy(np.asarray(picture(), np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        with torch.no_grad():
            posterior = pipe.vae.encode(pixels).latent_dist
        kept = (result.images - posterior.mean * pipe.vae.config.scaling_factor)[0][:, outside]
        # Image to image starts from a sample of the posterior, as diffusers' does.
        assert kept.abs().max() <= 5 * float(posterior.std.max()) * pipe.vae.config.scaling_factor
        plain = pipe(PROMPT, controls=[without], **DRAW).images
        assert (result.images - plain)[0][:, outside].abs().max() > 1e-2


def test_prompt_to_prompt_shows_its_local_blend(pipe: Pipeline) -> None:
    edit = PromptToPrompt("a red dog on the beach", local_blend=(["dog"], ["cat"]), blend_threshold=0.95)
    result = pipe(PROMPT, controls=[edit], **DRAW)
    mask = result.masks["PromptToPrompt.local_blend"]
    same = (result.images == result.states["source"]).all(1, keepdim=True)
    assert torch.equal(F.interpolate(mask, size=(16, 16)) == 0, same) and 0 < float(mask.mean()) < 1


def test_masactrl_takes_words_for_both_masks(pipe: Pipeline) -> None:
    source = "a red dog on the beach"
    words = MasaCtrl(source, 1, 1, words=(["dog"], ["cat"]), threshold=0.6)
    masks = MasaCtrl(source, 1, 1, source_mask="words: dog", target_mask=WordMask("cat"), threshold=0.6)
    assert masks == words and MasaCtrl(**masks.model_dump(mode="json")) == words
    shown = pipe(PROMPT, controls=[masks], **DRAW).masks["MasaCtrl.target_mask"]
    assert shown.shape == (1, 1, 32, 32) and 0 < float(shown.mean()) < 1 and set(shown.unique().tolist()) == {0.0, 1.0}
    assert not pipe(PROMPT, controls=[MasaCtrl(source, 1, 1)], **DRAW).masks
    for bad in (
        {"source_mask": "words: dog"},
        {"source_mask": "words: dog", "target_mask": "cat.png"},
        {"source_mask": "words: dog", "target_mask": WordMask("cat", threshold=0.5)},
        {"source_mask": "words: dog", "target_mask": "words: cat", "words": "cat"},
    ):
        with pytest.raises(InputError, match="words stand for both masks"):
            MasaCtrl(source, **bad)


class TestShown:
    def test_as_a_picture(self, pipe: Pipeline) -> None:
        result = pipe(PROMPT, controls=[Looks(mask=WordMask("cat", threshold=0.9))], **{**DRAW, "output_type": "pil"})
        shown = result.mask_picture()
        assert shown.size == result.images[0].size == (32, 32) and shown.mode == "L"
        assert np.array_equal(np.asarray(shown) / 255, result.masks["Looks.mask"][0, 0].numpy())
        assert np.array_equal(np.asarray(result.mask_picture("Looks.mask")), np.asarray(shown))
        with pytest.raises(InputError, match=r"no mask 'ControlNet\.mask'.*Looks\.mask"):
            result.mask_picture("ControlNet.mask")
        with pytest.raises(InputError, match="none"):
            pipe(PROMPT, **DRAW).mask_picture()


class TestWhatDoesNotFit:
    @pytest.mark.parametrize(
        ("mask", "prompt", "said"),
        [
            ("words: cta", PROMPT, r"'cta' is not in the prompt .* Did you mean 'cat'"),
            ("words: re", PROMPT, "'re' is not in the prompt"),
            (["cat", "zebra"], PROMPT, "'zebra'"),
            ("words: cat", [PROMPT, "a dog"], r"'cat'.* is in 'a dog'"),
            (
                "words: beach",
                "a cat and a frog and a red hat and a dog and a blue hat on the beach",
                "'beach' lies behind",
            ),
        ],
    )
    def test_words_are_named(self, pipe: Pipeline, mask: Any, prompt: Any, said: str) -> None:
        words = WordMask(mask) if isinstance(mask, list) else mask
        with pytest.raises(InputError, match=said):
            found(pipe, words, prompt)

    def test_resolution(self, pipe: Pipeline) -> None:
        with pytest.raises(InputError, match="resolution 5"):
            found(pipe, WordMask("cat", resolution=5))

    def test_a_list_with_words_and_a_canvas_of_windows(self, pipe: Pipeline) -> None:
        net = tiny_controlnet(pipe.unet)
        with pytest.raises(InputError, match="One set of words serves all prompts"):
            pipe(PROMPT, controls=[ControlNet(net, picture(), mask=["words: cat"])], **DRAW)
        with pytest.raises(InputError, match="in one view"):
            pipe(PROMPT, controls=[Seen(), Looks(mask="words: cat")], **{**DRAW, "width": 24, "height": 16})


@pytest.mark.parametrize("control", [ControlNet, IPAdapter, ReferenceOnly, AppearanceControl, ImageToImage])
def test_travels_with_a_run(control: Any) -> None:
    settings: dict[str, Any] = {"image": "anna.png", "mask": "words: red hat, shirt"}
    if "model" in control.model_fields:
        settings["model"] = "theatre/x"
    spec = RunSpec(prompt=PROMPT, controls=[control(**settings)])
    for read in (RunSpec.from_json(spec.to_json()), RunSpec.from_yaml(spec.to_yaml())):
        assert read == spec
        assert read.controls[0].mask == WordMask(("red hat", "shirt"))  # type: ignore[attr-defined]
