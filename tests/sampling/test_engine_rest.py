"""What the first controls do not use of the engine, each with a toy control: views, repeats, strength, weights, …"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image
from pydantic import Field

from controlroom.controls.guidance.attend_and_excite import AttendAndExcite
from controlroom.controls.personal.ip_adapter import IPAdapter
from controlroom.controls.pose.appearance import AppearanceControl
from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.controls.style.reference_only import ReferenceOnly
from controlroom.core.branch import Branch
from controlroom.core.control import Control, Declaration, Energy, EnergyNeed, Outline
from controlroom.core.errors import ConflictError, InputError, ModelError
from controlroom.core.random import draw
from controlroom.core.run import Run
from controlroom.core.step import Step
from controlroom.sampling.pipeline import Pipeline
from controlroom.sampling.solver import make_scheduler
from tests.controls.nets import tiny_controlnet, tiny_image_encoder, tiny_ip_adapter
from tests.tiny import BACKBONES, tiny_sd1
from tests.traces import traces

DRAW: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent", "seed": 5, "height": 16, "width": 16}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(tiny_sd1())


def noise(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture() -> Image.Image:
    return Image.radial_gradient("L").resize((16, 16)).convert("RGB")


# -- views --


class Windows:
    """Two windows of 8x8 latents over a canvas of 8x12; where they overlap, the mean."""

    count, hw = 2, (8, 8)

    def split(self, canvas: torch.Tensor, factor: int = 1) -> torch.Tensor:
        return torch.cat([canvas[..., : 8 * factor], canvas[..., 4 * factor :]])

    def merge(self, predictions: torch.Tensor) -> torch.Tensor:
        left, right = predictions.chunk(2)
        middle = (left[..., 4:] + right[..., :4]) / 2
        return torch.cat([left[..., :4], middle, right[..., 4:]], dim=-1)


class Seen(Control):
    """Shows the network a wide canvas through two windows."""

    type: Literal["seen"] = Field(default="seen", kw_only=True)
    start: float = 0.0

    def declare(self, outline: Outline) -> Declaration:
        return Declaration(views=Windows())


WIDE = {**DRAW, "width": 24}


def test_views_are_predicted_apart_and_merged(pipe: Pipeline) -> None:
    """Against a loop over the windows, written out, with two pictures."""
    result = pipe(["a cat", "a red dog"], controls=[Seen()], **WIDE)
    plain = tiny_sd1()
    scheduler, windows = plain.scheduler, Windows()
    scheduler.set_timesteps(3)
    x = torch.cat([noise(1, 4, 8, 12, seed=5), noise(1, 4, 8, 12, seed=6)])
    with torch.no_grad():
        c, u = plain.encode_prompt(["a cat", "a red dog"], "cpu", 1, True)
        for t in scheduler.timesteps:
            guided = []
            for window in windows.split(x).chunk(2):
                eps_u, eps_c = plain.unet(window.repeat(2, 1, 1, 1), t, torch.cat([u, c])).sample.chunk(2)
                guided.append(eps_u + 7.5 * (eps_c - eps_u))
            x = scheduler.step(windows.merge(torch.cat(guided)), t, x).prev_sample
    assert (result.images - x).abs().max() <= 1e-4 * x.std()
    assert result.manifest["cost"]["unet_rows"] == 3 * 2 * 2 * 2


def test_other_controls_see_the_views(pipe: Pipeline) -> None:
    """Layer sizes are those of a window, masks and conditions are cut as the canvas is."""
    unet = pipe.unet
    mask = torch.zeros(16, 24)
    mask[:, :8] = 1
    adapter = {"model": tiny_ip_adapter(unet), "image_encoder": tiny_image_encoder(), "image": picture()}
    controls = [
        AttendAndExcite(words=["cat"], iterations=2, thresholds={}, step_size=5.0),
        ControlNet(tiny_controlnet(unet), picture(), mask=mask),
        IPAdapter(**adapter, mask=mask),
        AppearanceControl(picture(), model=BACKBONES["sd1"](seed=9).unet, mask=mask),
    ]
    alone = pipe("a cat", controls=[Seen()], **WIDE).images
    for control in controls:
        result = pipe("a cat", controls=[Seen(), control], **WIDE).images
        assert torch.isfinite(result).all()
        assert (result - alone).abs().max() > 1e-3
        swapped = pipe("a cat", controls=[control, Seen()], **WIDE).images
        torch.testing.assert_close(result, swapped, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_seen_through_views_says_so(pipe: Pipeline) -> None:
    with pytest.raises(ConflictError, match="ReferenceOnly, Seen"):
        pipe("a cat", controls=[Seen(), ReferenceOnly(picture())], **WIDE)
    with pytest.raises(ConflictError, match="Seen 1 and Seen 2"):
        pipe("a cat", controls=[Seen(), Seen(start=0.1)], **WIDE)


# -- repeats --


class Again(Control):
    """Runs the second step twice, the second time from where the first one started."""

    type: Literal["again"] = Field(default="again", kw_only=True)
    declared: bool = True
    times: int = 1

    def declare(self, outline: Outline) -> Declaration:
        return Declaration(repeats=self.declared)

    def prepare(self, run: Run) -> dict[str, Any]:
        return {"times": 0}

    def before(self, step: Step) -> None:
        step.memory(self)["from"] = step.latents["image"]

    def finish(self, step: Step) -> bool:
        memory = step.memory(self)
        if step.i != 1 or memory["times"] == self.times:
            return False
        memory["times"] += 1
        step.latents["image"] = memory["from"]
        return True


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpmpp_2m", "unipc", "heun"])
def test_a_step_run_again_from_its_start_is_the_same_step(pipe: Pipeline, scheduler: str) -> None:
    """Solvers that remember earlier steps must forget the first attempt."""
    settings = {**DRAW, "num_inference_steps": 5, "scheduler": scheduler}
    plain, repeated = pipe("a cat", **settings), pipe("a cat", controls=[Again(times=2)], **settings)
    assert torch.equal(plain.images, repeated.images)
    assert repeated.manifest["cost"]["unet_passes"] == plain.manifest["cost"]["unet_passes"] + 2


def test_repeating_must_be_declared_and_end(pipe: Pipeline) -> None:
    with pytest.raises(RuntimeError, match="without having declared"):
        pipe("a cat", controls=[Again(declared=False)], **DRAW)
    with pytest.raises(RuntimeError, match="more than 256 times"):
        pipe("a cat", controls=[Again(times=10_000)], **{**DRAW, "num_inference_steps": 2})


# -- strength --


class FromPicture(Control):
    """Image to image: starts from a picture noised to the level where the run begins."""

    type: Literal["from_picture"] = Field(default="from_picture", kw_only=True)
    strength: float = 0.6
    start: float = 0.0

    def declare(self, outline: Outline) -> Declaration:
        return Declaration(strength=self.strength)

    def prepare(self, run: Run) -> None:
        pixels = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
        clean = run.backbone.encode_picture(pixels, run.streams.main)
        drawn = draw(run.streams.main, clean.shape, run.device, run.dtype)
        run.set_initial("image", run.scheduler.add_noise(clean, drawn, run.timesteps[:1]))


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "euler_a", "dpmpp_2m", "unipc", "heun"])
def test_strength_is_that_of_diffusers(pipe: Pipeline, scheduler: str) -> None:
    plain = tiny_sd1()
    plain.scheduler = make_scheduler(plain.scheduler, scheduler)
    parts = {name: part for name, part in plain.components.items() if name != "image_encoder"}
    reference = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    reference.set_progress_bar_config(disable=True)
    pixels = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    settings = {"num_inference_steps": 5, "output_type": "latent"}
    generator = torch.Generator().manual_seed(3)
    expected = reference("a cat", image=(pixels + 1) / 2, strength=0.6, generator=generator, **settings).images
    generator = torch.Generator().manual_seed(3)
    settings = {**settings, "height": 16, "width": 16, "scheduler": scheduler}
    result = pipe("a cat", controls=[FromPicture()], generator=generator, **settings)
    assert (result.images - expected).abs().max() <= 1e-4 * expected.std()
    if scheduler != "heun":
        assert result.manifest["cost"]["unet_passes"] == 3


def test_windows_count_the_steps_that_are_run(pipe: Pipeline) -> None:
    """Half of 4 steps are run; a window over the second half of the run is the last of them."""
    net = ControlNet(tiny_controlnet(pipe.unet), picture(), start=0.5)
    cost = pipe("a cat", controls=[FromPicture(strength=0.5), net], **{**DRAW, "num_inference_steps": 4}).manifest
    assert cost["cost"]["unet_passes"] == 2
    assert cost["cost"]["side_passes"] == 1


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        ([FromPicture(strength=0.1)], "leaves no step"),
        ([FromPicture(strength=0.4, start=0.6)], "window of the control that chose the strength"),
    ],
)
def test_strength_that_leaves_nothing(pipe: Pipeline, controls: list[Control], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipe("a cat", controls=controls, **DRAW)


def test_two_strengths_are_a_conflict(pipe: Pipeline) -> None:
    with pytest.raises(ConflictError, match="FromPicture 1 and FromPicture 2"):
        pipe("a cat", controls=[FromPicture(), FromPicture(strength=0.5)], **DRAW)


# -- weights of a branch --


class Weak(Control):
    """Guides away from a branch that runs with other weights."""

    type: Literal["weak"] = Field(default="weak", kw_only=True)
    name: str = "weak"
    factor: float = 0.5
    given: bool = True

    def declare(self, outline: Outline) -> Declaration:
        return Declaration(branches=(Branch(self.name, weights="weak"),))

    def weights(self, tag: str, backbone: Any) -> Any:
        assert tag == "weak"
        return self.scaled(backbone.unet.conv_out) if self.given else None

    @contextmanager
    def scaled(self, layer: Any) -> Iterator[None]:
        kept = layer.weight
        layer.weight = torch.nn.Parameter(kept * self.factor, requires_grad=False)
        try:
            yield
        finally:
            layer.weight = kept

    def prepare(self, run: Run) -> None:
        run.set_condition(self.name, run.conditions["cond"])

    def guide(self, step: Step, state: str) -> torch.Tensor:
        return 2.0 * (step.eps["cond"] - step.eps[self.name])


def test_branches_of_other_weights_run_apart(pipe: Pipeline) -> None:
    """Against the same guidance computed by hand; two controls with one tag keep their weights apart."""
    settings = {**DRAW, "num_inference_steps": 1, "scheduler": "ddim"}
    before = traces(pipe)
    result = pipe("a cat", controls=[Weak(), Weak(name="weaker", factor=0.25)], **settings)
    assert traces(pipe) == before
    plain = tiny_sd1()
    plain.scheduler.set_timesteps(1)
    t, x = plain.scheduler.timesteps[0], noise(1, 4, 8, 8)
    with torch.no_grad():
        c, u = plain.encode_prompt("a cat", "cpu", 1, True)
        bias = plain.unet.conv_out.bias[:, None, None]
        eps_u, eps_c = plain.unet(torch.cat([x, x]), t, torch.cat([u, c])).sample.chunk(2)
        weak = [eps_c - ((eps_c - bias) * factor + bias) for factor in (0.5, 0.25)]
        expected = plain.scheduler.step(eps_u + 7.5 * (eps_c - eps_u) + 2 * weak[0] + 2 * weak[1], t, x).prev_sample
    assert (result.images - expected).abs().max() <= 1e-4 * expected.std()
    assert result.manifest["cost"] == {
        "unet_rows": 4,
        "unet_passes": 3,
        "energy_passes": 0,
        "side_rows": 0,
        "side_passes": 0,
    }


def test_weights_that_nobody_gives_are_not_passed_over(pipe: Pipeline) -> None:
    with pytest.raises(RuntimeError, match="Weak has a branch with the weights 'weak'"):
        pipe("a cat", controls=[Weak(given=False)], **DRAW)


# -- energies that end in the prediction --


class Pull(Control):
    """Pulls the prediction along the latents: as the gradient of an energy, or as an addition."""

    type: Literal["pull"] = Field(default="pull", kw_only=True)
    energetic: bool = True

    def declare(self, outline: Outline) -> Declaration:
        return Declaration(energy=EnergyNeed(("cond",)) if self.energetic else None)

    def energy(self, step: Step, round: int) -> Energy:
        loss = 0.05 * step.latents["image"].square().sum((1, 2, 3))
        return Energy(loss, into="prediction")

    def guide(self, step: Step, state: str) -> torch.Tensor | None:
        if self.energetic:
            return None
        latents, views = 0.1 * step.latents["image"], step.run.plan.views
        return latents if views is None else views.split(latents)


class Move(Pull):
    """Moves the latents by the same gradient."""

    type: Literal["move"] = Field(default="move", kw_only=True)  # type: ignore[assignment]

    def energy(self, step: Step, round: int) -> Energy:
        return Energy(0.05 * step.latents["image"].square().sum((1, 2, 3)))


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
@pytest.mark.parametrize("seen", [False, True])
def test_gradient_into_the_prediction(pipe: Pipeline, seen: bool, scheduler: str) -> None:
    settings = {**(WIDE if seen else DRAW), "scheduler": scheduler, "num_images_per_prompt": 2}
    views: list[Control] = [Seen()] if seen else []
    energy = pipe("a cat", controls=[Pull(), *views], **settings).images
    addition = pipe("a cat", controls=[Pull(energetic=False), *views], **settings).images
    assert (energy - addition).abs().max() <= 1e-5 * addition.std()
    assert (energy - pipe("a cat", controls=views, **settings).images).abs().max() > 1e-2


def test_both_kinds_of_energy_share_a_pass(pipe: Pipeline) -> None:
    cost = pipe("a cat", controls=[Pull(), Move()], **DRAW).manifest["cost"]
    assert cost["energy_passes"] == 3


# -- further input channels --


class Channels(Control):
    """Four more input channels, as a checkpoint for instructions has them."""

    type: Literal["channels"] = Field(default="channels", kw_only=True)
    only: str = ""

    def declare(self, outline: Outline) -> Declaration:
        return Declaration(channels=4)

    def prepare(self, run: Run) -> None:
        height, width = run.plan.outline.latent[1:]
        for name in (self.only,) if self.only else run.plan.branches:
            run.set_channels(name, noise(1, 4, height, width, seed=1))


def test_further_channels_reach_the_network() -> None:
    plain = tiny_sd1(in_channels=8)
    pipe = Pipeline.from_diffusers(plain)
    settings = {**DRAW, "num_inference_steps": 1, "scheduler": "euler", "guidance_scale": 1.0}
    result = pipe(["a cat", "a dog"], controls=[Channels()], **settings)
    scheduler = make_scheduler(plain.scheduler, "euler")
    scheduler.set_timesteps(1)
    t = scheduler.timesteps[0]
    x = torch.cat([noise(1, 4, 8, 8, seed=5), noise(1, 4, 8, 8, seed=6)]) * scheduler.init_noise_sigma
    with torch.no_grad():
        tokens = plain.encode_prompt(["a cat", "a dog"], "cpu", 1, False)[0]
        given = torch.cat([scheduler.scale_model_input(x, t), noise(1, 4, 8, 8, seed=1).expand(2, -1, -1, -1)], 1)
        expected = scheduler.step(plain.unet(given, t, tokens).sample, t, x).prev_sample
    assert (result.images - expected).abs().max() <= 1e-4 * expected.std()
    # Through views, each window gets its part.
    assert torch.isfinite(pipe("a cat", controls=[Channels(), Seen()], **WIDE).images).all()
    with pytest.raises(RuntimeError, match="'uncond' its input channels"):
        pipe("a cat", controls=[Channels(only="cond")], **DRAW)
    with pytest.raises(ConflictError, match="Channels 1 and Channels 2"):
        pipe("a cat", controls=[Channels(), Channels(only="cond")], **DRAW)


# -- where and in which precision --


def controls_for(pipe: Pipeline, kind: str) -> list[Control]:
    unet = pipe.unet
    adapter = IPAdapter(tiny_ip_adapter(unet), picture(), image_encoder=tiny_image_encoder())
    return [
        ControlNet(tiny_controlnet(unet), picture()),
        adapter,
        AttendAndExcite(words=["cat"], iterations=1, thresholds={}, step_size=1.0),
        AppearanceControl(picture(), model=BACKBONES[kind](seed=9).unet),
        ReferenceOnly(picture(), reference_adain=True),
    ]


def test_offloading_changes_no_bit() -> None:
    """Without a GPU the components go from the CPU to the CPU, through the same hooks."""
    controls, plain = controls_for(Pipeline.from_diffusers(tiny_sd1()), "sd1"), Pipeline.from_diffusers(tiny_sd1())
    offloaded = Pipeline.from_diffusers(tiny_sd1()).enable_model_cpu_offload("cpu")
    settings = {**DRAW, "output_type": "pt"}
    for listed in ([], controls):
        for _ in range(2):
            expected = plain("a cat", controls=listed, **settings).images
            assert torch.equal(offloaded("a cat", controls=listed, **settings).images, expected)
    assert offloaded.enable_model_cpu_offload("cpu") is offloaded
    with pytest.raises(InputError, match="offloaded"):
        offloaded.to("cpu")


@pytest.mark.parametrize(("device", "kind"), [("cuda", ModelError), ("cuda:9", ModelError), ("gpu", InputError)])
def test_devices_that_are_not_there(device: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pipe = Pipeline.from_diffusers(tiny_sd1())
    before = traces(pipe)
    with pytest.raises(kind, match="GPU" if kind is ModelError else "gpu"):
        pipe.enable_model_cpu_offload(device)
    if not torch.cuda.device_count():
        with pytest.raises(kind, match=device):
            pipe.to(device)
    assert traces(pipe) == before
    assert pipe("a cat", **DRAW).images.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", BACKBONES)
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    """Close to float32 without controls; each control runs, alone and with the others."""
    pipe = Pipeline.from_diffusers(BACKBONES[kind]())
    controls = controls_for(pipe, kind)
    expected = pipe("a cat", **DRAW).images
    pipe.to(dtype)
    assert pipe.dtype == dtype
    plain = pipe("a cat", **DRAW).images
    assert plain.dtype == dtype
    assert (plain.float() - expected).abs().mean() < 0.1 * expected.std()
    for control in controls:
        result = pipe("a cat", controls=[control], **{**DRAW, "num_inference_steps": 1})
        assert result.images.isfinite().all()
    result = pipe("a cat", controls=controls, **{**DRAW, "output_type": "pil"})
    assert result.latents.isfinite().all()
    assert not torch.equal(result.latents, plain)
