"""Regional prompts against both published forms, transcribed: the code's attention and the paper's latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from controlroom.controls.personal.ip_adapter import IPAdapter
from controlroom.controls.region import Region
from controlroom.controls.regions.multidiffusion import MultiDiffusion
from controlroom.controls.regions.regional_prompts import RegionalPrompts
from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.controls.split_ratios import split_boxes
from controlroom.core.errors import InputError
from controlroom.core.spec import RunSpec
from controlroom.sampling.pipeline import Pipeline
from tests.controls.nets import tiny_controlnet, tiny_image_encoder, tiny_ip_adapter
from tests.tiny import BACKBONES

DRAW: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent", "seed": 5, "height": 16, "width": 24}
"""Latents of 8 x 12."""
PROMPTS = ["a red cat", "a blue dog", "the beach"]
RATIOS = "1,1,2;1"
"""Two cells of one and two thirds above one."""


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(BACKBONES["sd1"]())


def picture(seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((24, 16), Image.Resampling.BICUBIC)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert (found - expected).abs().max() <= tolerance * expected.std()


class Regional:
    """The published cross-attention, cell by cell: each cell's output is cut out of its own attention, mixed with the
    base's, and cells are concatenated to rows and rows to the layer's output."""

    def __init__(self, texts: list[torch.Tensor], base: float, canvas: tuple[int, int]) -> None:
        self.texts, self.base, self.canvas = texts, base, canvas

    def attend(self, attn: Any, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        q, k, v = (attn.head_to_batch_dim(p) for p in (attn.to_q(x), attn.to_k(text), attn.to_v(text)))
        out = ((q @ k.transpose(-1, -2)) * attn.scale).softmax(-1) @ v
        return attn.to_out[0](attn.batch_to_head_dim(out))

    def __call__(self, attn: Any, x: torch.Tensor, encoder_hidden_states: Any = None, **more: Any) -> torch.Tensor:
        height, width = self.canvas
        while height * width > x.shape[1]:
            height, width = height // 2, width // 2
        halves = []
        for half, text in zip(x.chunk(2), encoder_hidden_states.chunk(2), strict=True):
            base = self.attend(attn, half, text).unflatten(1, (height, width))
            if not halves:
                halves.append(base.flatten(1, 2))  # negative prompts are the same everywhere
                continue
            cells = [self.attend(attn, half, t).unflatten(1, (height, width)) for t in self.texts]
            middle, third = height // 2, int(width / 3)
            places = [
                (slice(0, middle), slice(0, third)),
                (slice(0, middle), slice(third, width)),
                (slice(middle, height), slice(0, width)),
            ]
            mixed = [
                cell[:, rows, columns] * (1 - self.base) + base[:, rows, columns] * self.base
                for cell, (rows, columns) in zip(cells, places, strict=True)
            ]
            joined = torch.cat([torch.cat(mixed[:2], dim=2), mixed[2]], dim=1)
            halves.append(joined.flatten(1, 2))
        return torch.cat(halves)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("base", [0.0, 0.3])
@torch.no_grad()
def test_attention_is_that_of_the_published_code(kind: str, base: float) -> None:
    plain: Any = BACKBONES[kind]()
    texts = [
        plain.encode_prompt(text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
        for text in PROMPTS
    ]
    control = RegionalPrompts(PROMPTS, RATIOS, base_ratio=base)
    settings = {**DRAW, "scheduler": "ddim"}
    found = Pipeline.from_diffusers(BACKBONES[kind]())("a cat and a dog", controls=[control], **settings)
    for name, module in plain.unet.named_modules():
        if name.endswith("attn2"):
            module.set_processor(Regional(texts, base, (8, 12)))
    plain.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    more = {name: DRAW[name] for name in ("num_inference_steps", "output_type", "height", "width")}
    guidance = {"guidance_scale": 7.5}
    close(found.images, plain("a cat and a dog", generator=generator, **more, **guidance).images)
    assert found.manifest["cost"]["unet_rows"] == 3 * 2, "no row more"


@pytest.mark.parametrize("fit", ["resize", "crop"])
@torch.no_grad()
def test_latents_are_those_of_the_paper(pipe: Pipeline, fit: str) -> None:
    """Every region one step from the same latents, resized (or cut), joined, mixed with the base's."""
    plain, base = BACKBONES["sd1"](), 0.3
    x = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(5))
    scheduler: Any = plain.scheduler
    scheduler.set_timesteps(3)
    places = [(slice(0, 4), slice(0, 4)), (slice(0, 4), slice(4, 12)), (slice(4, 8), slice(0, 12))]
    for t in scheduler.timesteps:
        steps = []
        for prompt in ["a cat and a dog", *PROMPTS]:
            c, u = plain.encode_prompt(prompt, "cpu", 1, True)
            eps_u, eps_c = (plain.unet(x, t, text).sample for text in (u, c))
            steps.append(scheduler.step(eps_u + 7.5 * (eps_c - eps_u), t, x).prev_sample)
        joined = torch.zeros_like(x)
        for one, (rows, columns) in zip(steps[1:], places, strict=True):
            height, width = rows.stop - rows.start, columns.stop - columns.start
            if fit == "crop":
                joined[..., rows, columns] = one[..., rows, columns]
            else:
                ys, xs = [i * 8 // height for i in range(height)], [i * 12 // width for i in range(width)]
                joined[..., rows, columns] = one[..., ys, :][..., xs]
        x = base * steps[0] + (1 - base) * joined
    control = RegionalPrompts(PROMPTS, RATIOS, base_ratio=base, form="latents", fit=fit)
    found = pipe("a cat and a dog", controls=[control], **DRAW)
    close(found.images, x)
    assert found.manifest["cost"]["unet_rows"] == 3 * (2 + 3)


@pytest.mark.parametrize("form", [{}, {"form": "latents"}, {"form": "latents", "fit": "crop"}])
def test_every_form_takes_batches_schedulers_and_no_guidance(pipe: Pipeline, form: dict[str, Any]) -> None:
    control = RegionalPrompts(["a red cat", "a blue dog"], **form)
    for scheduler in ("euler_a", "dpmpp_2m"):
        one = pipe("the beach", controls=[control], scheduler=scheduler, **DRAW).images
        two = pipe(["the beach", "night"], controls=[control], scheduler=scheduler, **DRAW).images
        torch.testing.assert_close(two[:1], one, atol=1e-3, rtol=1e-3)
    assert torch.isfinite(pipe("the beach", controls=[control], guidance_scale=1.0, **DRAW).images).all()
    near = RegionalPrompts(["a red cat", "a blue dog"], base_ratio=1 - 1e-4, **form)
    plain = pipe("the beach", **DRAW).images
    if form != {"form": "latents"}:
        close(pipe("the beach", controls=[near], **DRAW).images, plain, 1e-2)
    gone = RegionalPrompts(["a red cat", "a blue dog"], base_ratio=1.0, **form)
    assert torch.equal(pipe("the beach", controls=[gone], **DRAW).images, plain)


def test_regions_have_scales_windows_masks_and_negative_prompts(pipe: Pipeline) -> None:
    left, right = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
    whole = pipe("the beach", controls=[RegionalPrompts([Region("a cat", left), Region("a dog", right)])], **DRAW)
    split = pipe("the beach", controls=[RegionalPrompts(["a cat", "a dog"])], **DRAW)
    assert torch.equal(whole.images, split.images)
    one = pipe("the beach", controls=[RegionalPrompts([Region("a cat", left)])], **DRAW).images
    quiet = [Region("a cat", left), Region("a dog", right, scale=0.0)]
    assert torch.equal(pipe("the beach", controls=[RegionalPrompts(quiet)], **DRAW).images, one)
    mask = np.zeros((16, 24), np.uint8)
    mask[:, :12] = 255
    masked = pipe("the beach", controls=[RegionalPrompts([Region("a cat", mask=mask)])], **DRAW).images
    close(masked, one)
    for other in ({"negative_prompt": "blue"}, {"scale": 0.5}, {"end": 0.5}):
        found = pipe("the beach", controls=[RegionalPrompts([Region("a cat", left, **other)])], **DRAW).images
        assert (found - one).abs().max() > 1e-3


def test_beside_windows_maps_and_pictures(pipe: Pipeline) -> None:
    unet, mask = pipe.unet, torch.zeros(16, 24)
    mask[:, 12:] = 1
    adapter = IPAdapter(tiny_ip_adapter(unet), image=picture(1), image_encoder=tiny_image_encoder(), mask=mask)
    net = ControlNet(tiny_controlnet(unet), picture(2), mask=mask)
    control = RegionalPrompts(["a red cat", "a blue dog"])
    whole = pipe("the beach", controls=[control, MultiDiffusion(8, 4), adapter, net], **DRAW).images
    turns = MultiDiffusion(8, 4, view_batch_size=1)
    parted = pipe("the beach", controls=[turns, adapter, net, control], **DRAW).images
    torch.testing.assert_close(whole, parted, atol=1e-3, rtol=1e-3)
    with pytest.raises(InputError, match="seen through windows"):
        shrunk = RegionalPrompts(["a red cat", "a blue dog"], form="latents")
        pipe("the beach", controls=[shrunk, MultiDiffusion(8, 4)], **DRAW)


def test_a_region_of_a_picture_is_drawn_anew_and_the_rest_kept(pipe: Pipeline) -> None:
    source = picture(3)
    clean = pipe.backbone.encode_picture(_pixels(source)).detach()
    for form in ({}, {"form": "latents", "fit": "crop"}, {"form": "latents"}):
        control = RegionalPrompts([Region("a dog", (0.5, 0.0, 1.0, 1.0))], image=source, strength=0.7, **form)
        for scheduler in ("ddim", "euler", "dpmpp_2m"):
            found = pipe("the beach", controls=[control], scheduler=scheduler, **DRAW).images
            kept = (found - clean)[..., :6].abs().max()
            assert kept <= 1e-5
            assert (found - clean)[..., 6:].abs().max() > 0.5


def _pixels(source: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(source, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]


def test_written_and_read_again(pipe: Pipeline) -> None:
    regions = [Region("a cat", (0.0, 0.0, 0.5, 1.0)), Region("a dog", mask=Image.new("L", (24, 16), 255))]
    controls = [RegionalPrompts(regions, overlap="mean", image=picture())]
    spec = RunSpec(prompt="the beach", controls=controls, **DRAW)
    assert torch.equal(pipe.run(RunSpec.from_yaml(spec.to_yaml())).images, pipe.run(spec).images)


# Ratios.


@pytest.mark.parametrize(
    ("ratios", "boxes"),
    [
        ("1", [(0, 0, 1, 1)]),
        ("1,1", [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]),
        (" 1 ; 3 ", [(0, 0, 1, 0.25), (0, 0.25, 1, 1)]),
        ("1,1;2", [(0, 0, 1, 1 / 3), (0, 1 / 3, 1, 1)]),
        ("1,1,1;2", [(0, 0, 0.5, 1 / 3), (0.5, 0, 1, 1 / 3), (0, 1 / 3, 1, 1)]),
    ],
)
def test_ratios(ratios: str, boxes: list[Any]) -> None:
    assert np.allclose(split_boxes(ratios), boxes)


@pytest.mark.parametrize("ratios", ["", "1,,1", "1,-1", "0,1", "a,b", "1;", "nan", "inf,1", "1:1", ",".join("1" * 65)])
def test_ratios_that_cannot_be_read(ratios: str) -> None:
    with pytest.raises(InputError, match="ratios|cells"):
        split_boxes(ratios)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"regions": ["a", "b", "c"], "ratios": "1,1;2"}, "2 cells, but there are 3 prompts.*'1,1,1;2'"),
        ({"regions": ["a", "b"], "ratios": "1"}, "1 cells, but there are 2 prompts"),
        ({"regions": []}, "list of prompts"),
        ({"regions": "a cat"}, "list of prompts"),
        ({"regions": ["a", {"prompt": "b", "box": [0, 0, 1, 1]}]}, "all regions as prompts"),
        ({"regions": [{"prompt": "b", "box": [0, 0, 1, 1]}], "ratios": "1"}, "places of their own"),
        ({"regions": ["a"], "base_ratio": 1.5}, "base_ratio"),
        ({"regions": ["a"], "form": "words"}, "form"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        RegionalPrompts(**settings)


def test_regions_that_do_not_fit_the_picture(pipe: Pipeline) -> None:
    half = Region("a cat", (0.0, 0.0, 0.5, 1.0))
    with pytest.raises(InputError, match="overlap"):
        pipe("the beach", controls=[RegionalPrompts([half, Region("a dog", (0.25, 0.0, 1.0, 1.0))])], **DRAW)
    with pytest.raises(InputError, match="leave 50% of the picture free"):
        pipe("", controls=[RegionalPrompts([half])], **DRAW)
    with pytest.raises(InputError, match="is empty"):
        pipe("the beach", controls=[RegionalPrompts(["a cat", "a dog"], "1,1000")], **DRAW)
