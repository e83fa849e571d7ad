"""MultiDiffusion against diffusers' panorama pipeline, and its regions against the published loop, written out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPanoramaPipeline
from PIL import Image

from controlroom.controls.editing.upscale import Upscale
from controlroom.controls.guidance.attend_and_excite import AttendAndExcite
from controlroom.controls.guidance.guidance_interval import GuidanceInterval
from controlroom.controls.guidance.prompt_weighting import PromptWeighting
from controlroom.controls.personal.ip_adapter import IPAdapter
from controlroom.controls.region import Region
from controlroom.controls.regions.multidiffusion import MultiDiffusion
from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.controls.windows import windows_of
from controlroom.core.errors import ConflictError, InputError
from controlroom.core.random import stream_seed
from controlroom.sampling.pipeline import Pipeline
from controlroom.sampling.solver import make_scheduler
from tests.controls.nets import tiny_controlnet, tiny_image_encoder, tiny_ip_adapter
from tests.tiny import BACKBONES, tiny_sd1, tiny_vae
from tests.traces import traces

DRAW: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent", "seed": 5, "height": 16, "width": 32}
"""Latents of 8 x 16."""
WIDE = {"window": 8, "stride": 4}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(tiny_sd1())


def picture(seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((32, 16), Image.Resampling.BICUBIC)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert (found - expected).abs().max() <= tolerance * expected.std()


# Panoramas.


class Panorama(StableDiffusionPanoramaPipeline):
    """diffusers' pipeline with windows of 8 every 4 latent pixels instead of 64 every 8."""

    def get_views(self, panorama_height: int, panorama_width: int, *args: Any, **settings: Any) -> Any:  # type: ignore
        factor = 8 // self.vae_scale_factor
        sizes = (panorama_height * factor, panorama_width * factor)
        return super().get_views(*sizes, window_size=8, stride=4, circular_padding=settings["circular_padding"])


def theirs(kind: str, scheduler: str, size: tuple[int, int] = (16, 32), **settings: Any) -> torch.Tensor:
    plain = BACKBONES[kind]()
    parts = {name: part for name, part in plain.components.items() if name != "image_encoder"}
    reference: Any = Panorama(**parts, requires_safety_checker=False)
    reference.scheduler = make_scheduler(plain.scheduler, scheduler)
    reference.set_progress_bar_config(disable=True)
    return reference(
        "a red cat",
        height=size[0],
        width=size[1],
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(5),
        **{"output_type": "latent", **settings},
    ).images


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpmpp_2m", "unipc"])
def test_latents_are_those_of_the_pipeline(pipe: Pipeline, scheduler: str, circular: bool) -> None:
    """A scheduler's memory for each window there, one for the canvas here; they agree since steps are linear."""
    control = MultiDiffusion(**WIDE, circular=circular)
    found = pipe("a red cat", controls=[control], scheduler=scheduler, **DRAW).images
    close(found, theirs("sd1", scheduler, circular_padding=circular))


@pytest.mark.parametrize(
    "settings",
    [{"view_batch_size": 3}, {"guidance_scale": 1.0}],
    ids=lambda s: next(iter(s)),
)
def test_latents_of_other_settings(pipe: Pipeline, settings: dict[str, Any]) -> None:
    more = {name: value for name, value in settings.items() if name != "view_batch_size"}
    control = MultiDiffusion(**WIDE, view_batch_size=settings.get("view_batch_size"))
    found = pipe("a red cat", controls=[control], scheduler="ddim", **{**DRAW, "height": 24, **more}).images
    close(found, theirs("sd1", "ddim", (24, 32), **settings))


def test_guidance_is_rescaled(pipe: Pipeline) -> None:
    """There it has no effect: the pipeline asks a property that is always false."""
    drawn = pipe("a red cat", controls=[MultiDiffusion(**WIDE)], scheduler="ddim", guidance_rescale=0.7, **DRAW).images
    plain = pipe("a red cat", controls=[MultiDiffusion(**WIDE)], scheduler="ddim", **DRAW).images
    assert (drawn - plain).abs().max() > 1e-2
    close(plain, theirs("sd1", "ddim", guidance_rescale=0.7))


def test_v_prediction_agrees_and_sdxl_runs() -> None:
    ours = Pipeline.from_diffusers(BACKBONES["sd2"]())
    close(ours("a red cat", controls=[MultiDiffusion(**WIDE)], scheduler="ddim", **DRAW).images, theirs("sd2", "ddim"))
    large = Pipeline.from_diffusers(BACKBONES["sdxl"]())
    assert torch.isfinite(large("a red cat", controls=[MultiDiffusion(**WIDE)], **DRAW).images).all()


def test_a_seamless_picture_is_decoded_around_its_edge(pipe: Pipeline) -> None:
    control = MultiDiffusion(**WIDE, circular=True)
    settings = {**DRAW, "output_type": "np"}
    found = pipe("a red cat", controls=[control], scheduler="ddim", **settings).images
    expected = theirs("sd1", "ddim", circular_padding=True, output_type="np")
    np.testing.assert_allclose(found, expected, atol=1e-4)
    latents = pipe("a red cat", controls=[control], scheduler="ddim", **DRAW).images
    assert np.abs(found - pipe.decode(latents, "np"))[:, :, 0].max() > 1e-2, "the edge is decoded otherwise"


def test_a_circular_canvas_has_no_first_column(pipe: Pipeline) -> None:
    """Noise shifted by a stride gives the picture shifted by a stride."""
    noise = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(1))
    control, settings = MultiDiffusion(**WIDE, circular=True), {**DRAW, "seed": 1, "scheduler": "ddim"}
    plain = pipe("a cat", controls=[control], latents=noise, **settings).images
    moved = pipe("a cat", controls=[control], latents=noise.roll(4, -1), **settings).images
    close(moved, plain.roll(4, -1))
    # One window over a canvas of its own width also closes.
    narrow = pipe("a cat", controls=[control], **{**DRAW, "width": 16})
    assert narrow.manifest["cost"]["unet_rows"] == 3 * 2 * 2


def test_noise_of_the_steps_is_drawn_once_for_the_canvas(pipe: Pipeline) -> None:
    """The named deviation: there it is drawn for each window, and averaged where they overlap."""
    control = MultiDiffusion(**WIDE)
    settings: dict[str, Any] = {**DRAW, "scheduler": "euler_a", "num_inference_steps": 20, "guidance_scale": 1.0}
    ours = pipe("a cat", controls=[control], **settings).images
    again = pipe("a cat", controls=[control], **settings).images
    assert torch.equal(ours, again)
    two = pipe(["a cat", "a dog"], controls=[control], **settings).images
    torch.testing.assert_close(two[:1], ours, atol=1e-3, rtol=1e-3)


def test_one_window_over_the_picture_is_absence_bit_for_bit(pipe: Pipeline) -> None:
    settings = {**DRAW, "width": 16}
    plain = pipe("a cat", **settings)
    seen = pipe("a cat", controls=[MultiDiffusion(8)], **settings)
    assert torch.equal(plain.images, seen.images)
    assert plain.manifest["cost"] == seen.manifest["cost"]


@pytest.mark.parametrize("batch", [1, 2, 100])
def test_windows_in_turns_are_the_same_picture(pipe: Pipeline, batch: int) -> None:
    """With two pictures, a ControlNet and an IP-Adapter whose masks differ from window to window."""
    unet, mask = pipe.unet, torch.zeros(16, 32)
    mask[4:12, 10:26] = 1
    adapter = IPAdapter(tiny_ip_adapter(unet), image=picture(1), image_encoder=tiny_image_encoder(), mask=mask)
    others = [ControlNet(tiny_controlnet(unet), picture(2), mask=mask), adapter]
    prompts = ["a cat", "a red dog"]
    whole = pipe(prompts, controls=[MultiDiffusion(**WIDE), *others], **DRAW)
    controls = [MultiDiffusion(**WIDE, view_batch_size=batch), *others]
    turns = pipe(prompts, controls=controls, **DRAW)
    torch.testing.assert_close(turns.images, whole.images, atol=1e-4, rtol=1e-4)
    passes = math.ceil(3 / batch)
    cost, plain = turns.manifest["cost"], whole.manifest["cost"]
    assert cost["unet_passes"] == 3 * passes and cost["unet_rows"] == plain["unet_rows"]
    spec = turns.spec
    assert spec is not None and sum(pipe.explain(spec).passes) == 3 * passes
    before = traces(pipe)
    with pytest.raises(RuntimeError, match="broken"):
        pipe(
            "a cat",
            controls=controls,
            **DRAW,
            callback_on_step_end=lambda *a: (_ for _ in ()).throw(RuntimeError("broken")),
        )
    assert traces(pipe) == before


def test_what_sees_all_windows_at_once_refuses_turns(pipe: Pipeline) -> None:
    excite = AttendAndExcite(words=["cat"], iterations=1, thresholds={}, step_size=5.0)
    with pytest.raises(ConflictError, match="MultiDiffusion and AttendAndExcite.*view_batch_size"):
        pipe("a cat", controls=[MultiDiffusion(**WIDE, view_batch_size=1), excite], **DRAW)
    assert torch.isfinite(pipe("a cat", controls=[MultiDiffusion(**WIDE), excite], **DRAW).images).all()


# Regions.


def published(
    prompts: list[str], masks: torch.Tensor, steps: int, bootstrapping: int, negatives: str = ""
) -> tuple[torch.Tensor, Any]:
    """The published loop with every window, every region and every step of the solver by itself; masks [regions, h, w]
    with the background's first. Colours are drawn from the control's own stream."""
    plain = tiny_sd1()
    height, width = masks.shape[-2:]
    x = torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(5))
    noise = x.clone()
    dice = torch.Generator().manual_seed(stream_seed(5, "multidiffusion/colours"))
    colours, choices = [], torch.zeros(0)
    if bootstrapping:
        rgb = torch.rand(bootstrapping, 3, generator=dice)
        choices = torch.randint(0, bootstrapping, (bootstrapping, len(prompts) - 1), generator=dice)
        vae = tiny_vae()
        for colour in rgb:
            flat = (2 * colour - 1)[None, :, None, None].repeat(1, 1, 2 * height, 2 * width)
            colours.append(vae.encode(flat).latent_dist.mean * vae.config.scaling_factor)
    scheduler = plain.scheduler
    scheduler.set_timesteps(steps)
    windows = range(0, width - 8 + 1, 4)
    for i, t in enumerate(scheduler.timesteps):
        value, count = torch.zeros_like(x), torch.zeros_like(x)
        for left in windows:
            part = slice(left, left + 8)
            for r, prompt in enumerate(prompts):
                mask = masks[r][None, None, :, part]
                seen = x[..., part]
                if r and i < bootstrapping:
                    background = colours[int(choices[i, r - 1])][..., part]
                    background = scheduler.add_noise(background, noise[..., part], t[None])
                    seen = seen * mask + background * (1 - mask)
                c, u = plain.encode_prompt(prompt, "cpu", 1, True, negatives)
                eps_u, eps_c = (plain.unet(seen, t, text).sample for text in (u, c))
                stepped = scheduler.step(eps_u + 7.5 * (eps_c - eps_u), t, seen).prev_sample
                value[..., part] += stepped * mask
                count[..., part] += mask
        x = torch.where(count > 0, value / count, value)
    return x, None


LEFT = (0.0, 0.0, 0.375, 1.0)
RIGHT = (0.5, 0.25, 1.0, 0.75)


def boxes() -> torch.Tensor:
    masks = torch.zeros(3, 8, 16)
    masks[1, :, :6] = 1
    masks[2, 2:6, 8:] = 1
    masks[0] = 1 - masks[1:].sum(0)
    return masks


@pytest.mark.parametrize(("bootstrap", "count"), [(0.0, 0), (0.5, 2), (1.0, 4)])
@torch.no_grad()
def test_regions_are_those_of_the_published_loop(pipe: Pipeline, bootstrap: float, count: int) -> None:
    regions = [Region("a red cat", LEFT), Region("a blue dog", RIGHT)]
    control = MultiDiffusion(**WIDE, regions=regions, bootstrap=bootstrap)
    found = pipe("the beach", controls=[control], **{**DRAW, "num_inference_steps": 4})
    expected, _ = published(["the beach", "a red cat", "a blue dog"], boxes(), 4, count)
    close(found.images, expected)
    # Three windows; away from bootstrapping all regions share the picture's prediction without words.
    assert found.manifest["cost"]["unet_rows"] == 3 * (4 * (2 + 2) + 2 * count)


@torch.no_grad()
def test_overlapping_regions_are_averaged_where_that_is_allowed(pipe: Pipeline) -> None:
    masks = boxes()
    masks[2, :, 4:] = 1
    masks[0] = (1 - masks[1:].sum(0)).clamp(min=0)
    regions = [Region("a red cat", LEFT), Region("a blue dog", (0.25, 0.0, 1.0, 1.0))]
    control = MultiDiffusion(**WIDE, regions=regions, bootstrap=0.0, overlap="mean")
    found = pipe("the beach", controls=[control], **DRAW).images
    close(found, published(["the beach", "a red cat", "a blue dog"], masks, 3, 0)[0])
    with pytest.raises(InputError, match="Regions 1 .*and 2 .*overlap on 12.5%"):
        pipe("the beach", controls=[MultiDiffusion(**WIDE, regions=regions)], **DRAW)


def test_a_mask_is_a_region_as_its_box_is(pipe: Pipeline) -> None:
    mask = np.zeros((16, 32), np.uint8)
    mask[4:12, 16:] = 255
    for prompts in (["the beach"], ["the beach", "the night"]):
        drawn = [
            pipe(prompts, controls=[MultiDiffusion(**WIDE, regions=[region])], **DRAW).images
            for region in (Region("a dog", RIGHT), Region("a dog", mask=mask))
        ]
        assert torch.equal(*drawn)


def test_a_region_of_scale_0_or_an_empty_window_is_absence(pipe: Pipeline) -> None:
    plain = pipe("the beach", controls=[MultiDiffusion(**WIDE)], **DRAW)
    for more in ({"scale": 0.0}, {"start": 1.0}, {"end": 0.0}):
        region = Region("a dog", RIGHT, **more)
        found = pipe("the beach", controls=[MultiDiffusion(**WIDE, regions=[region])], **DRAW)
        assert torch.equal(found.images, plain.images) and found.manifest["cost"] == plain.manifest["cost"]
    near = MultiDiffusion(**WIDE, regions=[Region("a dog", RIGHT, scale=1e-4)])
    close(pipe("the beach", controls=[near], **DRAW).images, plain.images, 1e-2)
    late = MultiDiffusion(**WIDE, regions=[Region("a dog", RIGHT, start=0.6)], bootstrap=0.0)
    assert pipe("the beach", controls=[late], **DRAW).manifest["cost"]["unet_rows"] == 3 * (3 * 2 + 1)


def test_negative_prompts_batches_and_no_guidance(pipe: Pipeline) -> None:
    regions = [Region("a dog", RIGHT, negative_prompt="blue")]
    control = MultiDiffusion(**WIDE, regions=regions)
    other = MultiDiffusion(**WIDE, regions=[Region("a dog", RIGHT)])
    first = pipe("the beach", controls=[control], **DRAW).images
    assert (first - pipe("the beach", controls=[other], **DRAW).images).abs().max() > 1e-3
    both = pipe(["the beach", "a frog"], controls=[control], **DRAW).images
    torch.testing.assert_close(both[:1], first, atol=1e-4, rtol=1e-4)
    unguided = pipe("the beach", controls=[control], guidance_scale=1.0, **DRAW)
    assert unguided.manifest["cost"]["unet_rows"] == 3 * 3 * 2
    # A step without guidance has no words to be guided away from, in regions neither.
    interval = pipe("the beach", controls=[control, GuidanceInterval(guidance_end=0.5)], **DRAW)
    assert torch.isfinite(interval.images).all()


def test_regions_are_written_and_read_again(pipe: Pipeline) -> None:
    from controlroom.core.spec import RunSpec

    regions = [Region("a dog", mask=Image.new("L", (32, 16), 255)), Region("a cat", RIGHT)]
    spec = RunSpec(prompt="the beach", controls=[MultiDiffusion(**WIDE, regions=regions, overlap="mean")], **DRAW)
    again = RunSpec.from_yaml(spec.to_yaml())
    assert torch.equal(pipe.run(again).images, pipe.run(spec).images)


# With other controls.


def test_maps_and_masks_are_cut_along_with_the_windows(pipe: Pipeline) -> None:
    """A window whose part of every mask is black is drawn as without the controls; the others are not."""
    unet, mask = pipe.unet, torch.zeros(16, 48)
    mask[:, :8] = 1  # latent columns 0 to 3: of five windows only the first sees white
    adapter = {"model": tiny_ip_adapter(unet), "image": picture(1), "image_encoder": tiny_image_encoder()}
    settings = {**DRAW, "width": 48, "num_inference_steps": 1}
    alone = pipe("a cat", controls=[MultiDiffusion(**WIDE)], **settings).images
    for control in (ControlNet(tiny_controlnet(unet), picture(2), mask=mask), IPAdapter(**adapter, mask=mask)):
        found = pipe("a cat", controls=[MultiDiffusion(**WIDE), control], **settings).images
        changed = (found - alone).abs().amax(dim=(0, 1, 2))
        assert changed[:8].max() > 1e-3
        assert changed[8:].max() <= 1e-5, "windows that see no white are untouched"


def test_a_condition_is_cut_where_the_window_lies(pipe: Pipeline) -> None:
    """One window of the panorama is the plain run on its part of noise and condition."""
    net = tiny_controlnet(pipe.unet)
    condition = torch.rand(3, 16, 32, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(4))
    settings = {**DRAW, "num_inference_steps": 1}
    # Windows that do not overlap: each is a picture of its own.
    apart = pipe("a cat", controls=[MultiDiffusion(8, 8), ControlNet(net, condition)], latents=noise, **settings).images
    for part in (0, 1):
        cut = condition[..., 16 * part : 16 * part + 16]
        alone = {**settings, "width": 16}
        single = pipe("a cat", controls=[ControlNet(net, cut)], latents=noise[..., 8 * part : 8 * part + 8], **alone)
        close(apart[..., 8 * part : 8 * part + 8], single.images)


def test_enlarging_in_tiles(pipe: Pipeline) -> None:
    """`Upscale` beside windows: every tile is denoised as it would be alone where windows do not overlap."""
    small = torch.randn(1, 4, 4, 8, generator=torch.Generator().manual_seed(2))
    tiles = [Upscale(small, strength=0.7, mode="latents"), MultiDiffusion(8, 8)]
    found = pipe("a cat", controls=tiles, **DRAW)
    assert found.images.shape == (1, 4, 8, 16)
    assert found.manifest["cost"]["unet_rows"] == 2 * 2 * 2
    overlapping = pipe("a cat", controls=[tiles[0], MultiDiffusion(**WIDE)], **DRAW).images
    assert (overlapping - found.images).abs().max() > 1e-3


def test_weighted_prompts_beside_regions(pipe: Pipeline) -> None:
    """Notations are the run's prompt's; a prompt of several chunks fills up those of the regions."""
    regions = [Region("a dog", RIGHT)]
    plain = pipe("the beach", controls=[MultiDiffusion(**WIDE, regions=regions)], **DRAW)
    weighted = [PromptWeighting("the (beach:1.4)"), MultiDiffusion(**WIDE, regions=regions)]
    for controls in (weighted, weighted[::-1]):
        found = pipe("the beach", controls=controls, **DRAW)
        assert (found.images - plain.images).abs().max() > 1e-3
    long = [PromptWeighting("the beach BREAK night"), MultiDiffusion(**WIDE, regions=regions)]
    found = pipe("", controls=long, **DRAW)
    assert found.manifest["cost"]["unet_passes"] == 3 and torch.isfinite(found.images).all()
    several = [PromptWeighting("the beach AND a red cat:0.5"), MultiDiffusion(**WIDE, regions=regions)]
    assert torch.isfinite(pipe("", controls=several, **DRAW).images).all()


# Bad input.


@pytest.mark.parametrize(
    ("settings", "size", "said"),
    [
        ({"window": 64}, (16, 32), "window=64 is larger than the picture, whose latents are 8 x 16"),
        ({"window": (8, 20)}, (16, 32), "larger than the picture"),
        ({"window": 8, "stride": 9}, (16, 64), "stride=9 leaves gaps"),
        (
            {"window": 8, "stride": 4},
            (16, 36),
            "do not reach the edge of a width of 18: 2 are left.*16 or 20.*stride=2",
        ),
        ({"window": 8, "stride": 5}, (26, 16), "height of 13"),
        ({"window": 8, "stride": 4, "circular": True}, (16, 36), "do not close around a width of 18"),
    ],
)
def test_windows_that_do_not_fit(pipe: Pipeline, settings: dict[str, Any], size: tuple[int, int], said: str) -> None:
    steps: list[int] = []
    draw = {**DRAW, "height": size[0], "width": size[1], "callback_on_step_end": lambda *a: steps.append(1) or {}}
    if said.endswith("height of 13"):
        pipe("a cat", controls=[MultiDiffusion(**settings)], **draw)  # 5 divides what is left of 13
        return
    with pytest.raises(InputError, match=said):
        pipe("a cat", controls=[MultiDiffusion(**settings)], **draw)
    assert not steps


@pytest.mark.parametrize("settings", [{"window": 0}, {"stride": (4, 0)}, {"bootstrap": 1.5}, {"view_batch_size": 0}])
def test_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        MultiDiffusion(**settings)


@pytest.mark.parametrize(
    ("region", "said"),
    [
        (lambda: Region("a dog"), "needs a place"),
        (lambda: Region("a dog", RIGHT, Image.new("L", (8, 8), 255)), "needs a place"),
        (lambda: Region("a dog", (0.5, 0.0, 0.5, 1.0)), "left < right"),
        (lambda: Region("a dog", (0.0, 0.0, 1.5, 1.0)), "between 0 and 1"),
        (lambda: Region("a dog", (0.0, 0.0, 0.01, 1.0)), "Region 1 .*is empty"),
        (lambda: Region("a dog", mask=Image.new("L", (8, 8), 0)), "black all over"),
        (lambda: Region("a dog", mask=Image.new("L", (16, 8), 100)), "Region 1 .*is empty"),
        (lambda: Region("a dog", mask="nowhere.png"), "nowhere.png"),
    ],
)
def test_regions_that_are_none(pipe: Pipeline, region: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        pipe("the beach", controls=[MultiDiffusion(**WIDE, regions=[region()])], **DRAW)


def test_what_nothing_is_said_about(pipe: Pipeline) -> None:
    half = MultiDiffusion(**WIDE, regions=[Region("a dog", (0.0, 0.0, 0.5, 1.0))])
    with pytest.raises(InputError, match="leave 50% of the picture free"):
        pipe("", controls=[half], **DRAW)
    both = [Region("a dog", (0.0, 0.0, 0.5, 1.0)), Region("a cat", (0.5, 0.0, 1.0, 1.0))]
    assert torch.isfinite(pipe("", controls=[MultiDiffusion(**WIDE, regions=both)], **DRAW).images).all()
    given = tiny_sd1().encode_prompt("a cat", "cpu", 1, False)[0]
    assert torch.isfinite(pipe(prompt_embeds=given, controls=[half], **DRAW).images).all()


def test_windows_cut_and_average() -> None:
    """Against sums written out; a window across the right edge goes on at the left one."""
    windows = windows_of((4, 6), 4, 2, circular=True)
    assert windows is not None and windows.count == 3
    canvas = torch.arange(24.0).reshape(1, 1, 4, 6)
    parts = windows.split(canvas).chunk(3)
    assert torch.equal(parts[2], canvas[..., [4, 5, 0, 1]])
    assert torch.equal(windows.merge(torch.cat(parts)), canvas)
    assert torch.equal(
        windows.split(canvas.repeat_interleave(2, -1).repeat_interleave(2, -2), 2)[2, 0, ::2, ::2], parts[2][0, 0]
    )
    merged = windows.merge(torch.stack([torch.full((1, 4, 4), float(i)) for i in range(3)]))
    assert merged[0, 0, 0].tolist() == [1.0, 1.0, 0.5, 0.5, 1.5, 1.5]
