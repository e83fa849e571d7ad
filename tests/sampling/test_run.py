"""What holds for every run: batches, windows, neutral controls, energies, branches, no trace, replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import Field
from torch import nn

from controlroom.core.attention import AttentionCall, FeatureCall
from controlroom.core.branch import Branch, State
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Energy, EnergyNeed, Outline, Residuals
from controlroom.core.errors import ConflictError, InputError, ModelError
from controlroom.core.run import Run
from controlroom.core.step import Step
from controlroom.sampling.pipeline import Pipeline, replay
from controlroom.sampling.solver import SCHEDULERS
from tests.tiny import BACKBONES, tiny_sd1
from tests.traces import traces

DRAW: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "seed": 5}


class Perturbed(Control):
    """Adds a branch, an identity and an addition."""

    type: Literal["perturbed"] = Field(default="perturbed", kw_only=True)
    scale: float = 2.0
    start: float = 0.0
    end: float = 1.0

    def declare(self, outline: Outline) -> Declaration:
        sites = outline.sites("self", places=("mid",))
        claim = Claim("out", "identity", frozenset(s.name for s in sites), frozenset({"perturbed"}))
        return Declaration(branches=(Branch("perturbed"),), attention=sites, claims=(claim,))

    def prepare(self, run: Run) -> None:
        run.set_condition("perturbed", run.conditions["cond"])

    def attention(self, call: AttentionCall) -> None:
        if "perturbed" in call:
            call.identity("perturbed")

    def guide(self, step: Step, state: str) -> torch.Tensor | None:
        return self.scale * (step.eps["cond"] - step.eps["perturbed"]) if state == "image" else None


class Everything(Control):
    """Reads attention, hooks features, adds residuals, descends on an energy; may fail at a step."""

    type: Literal["everything"] = Field(default="everything", kw_only=True)
    scale: float = 1.0
    fail: str = ""
    step_size: float = 0.05
    rounds: int = 1

    def declare(self, outline: Outline) -> Declaration:
        return Declaration(
            attention=outline.sites("cross"),
            features=outline.sites("resnet", places=("up",)),
            energy=EnergyNeed(("cond",)),
        )

    def prepare(self, run: Run) -> list[torch.Tensor]:
        if self.fail == "prepare":
            raise RuntimeError("prepare")
        return []

    def attention(self, call: AttentionCall) -> None:
        if call.phase == "energy":
            call.read("cond", call.step.memory(self).append)
        if self.fail == "attention" and call.step.i == 1:
            raise RuntimeError("attention")

    def feature(self, call: FeatureCall) -> torch.Tensor | None:
        if self.fail == "feature":
            raise RuntimeError("feature")
        return call.hidden * 1.01

    def energy(self, step: Step, round: int) -> Energy:
        memory = step.memory(self)
        if self.fail == "energy":
            raise RuntimeError("energy")
        loss = sum((p.flatten(1).square().sum(1) for p in memory), torch.zeros(()))
        memory.clear()
        assert isinstance(loss, torch.Tensor)
        return Energy(self.step_size * loss, again=round + 1 < self.rounds)


class SourceBranch(Control):
    """A second solved state that shares the picture's noise and is routed into it."""

    type: Literal["source_branch"] = Field(default="source_branch", kw_only=True)
    source: str = "a dog"
    route: bool = True

    def declare(self, outline: Outline) -> Declaration:
        return Declaration(
            states=(State("source", noise_from="image"),),
            branches=(
                Branch("source/uncond", "source", "uncond"),
                Branch("source/cond", "source", "cond"),
            ),
            attention=outline.sites("self"),
        )

    def prepare(self, run: Run) -> list[torch.Tensor]:
        run.set_condition("source/cond", run.encode_text(self.source))
        run.set_condition("source/uncond", run.conditions["uncond"])
        return []

    def attention(self, call: AttentionCall) -> None:
        if self.route:
            call.route("cond", q="source/cond", k="source/cond")

    def finish(self, step: Step) -> None:
        step.memory(self).append(step.latents["source"].clone())
        if step.i == step.n - 1 and not self.route:
            step.latents["image"] = step.latents["source"]


class Residual(Control):
    """What a ControlNet does, with constants."""

    type: Literal["residual"] = Field(default="residual", kw_only=True)
    scale: float = 0.5
    only: str = ""

    def side(self, step: Step) -> Residuals:
        names = (self.only,) if self.only else step.reached(self)
        net = step.inputs(names)
        shapes = [(16, 16, 16), (16, 16, 16), (16, 8, 8), (32, 8, 8)]
        down = tuple(torch.full((net.layout.total, *shape), self.scale) for shape in shapes)
        return Residuals(names, down, torch.full((net.layout.total, 32, 8, 8), self.scale))


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(tiny_sd1())


@pytest.mark.parametrize("scheduler", ["ddim", "euler_a", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_image_of_a_batch_equals_it_alone(backbone: str, scheduler: str) -> None:
    pipe = Pipeline.from_diffusers(BACKBONES[backbone]())
    prompts = ["a red cat", "frog", "a dog on the beach"]
    # Gradients through random weights multiply rounding, so controls are compared in float64.
    for controls, dtype, tolerance in (([], torch.float32, 1e-4), ([Perturbed(), Everything()], torch.float64, 1e-9)):
        pipe.to(dtype)
        settings = {"num_inference_steps": 3, "output_type": "latent", "scheduler": scheduler, "controls": controls}
        together = pipe(prompts, seed=11, **settings).images
        for i, prompt in enumerate(prompts):
            alone = pipe(prompt, seed=11 + i, **settings).images
            assert (together[i : i + 1] - alone).abs().max() < tolerance * max(1.0, alone.std().item())


def test_seed_is_a_list_of_generators(pipe: Pipeline) -> None:
    generators = [torch.Generator().manual_seed(5 + i) for i in range(2)]
    settings = {**DRAW, "scheduler": "euler_a", "num_images_per_prompt": 2}
    ours = pipe("cat", **settings).images
    del settings["seed"]
    assert torch.equal(ours, pipe("cat", generator=generators, **settings).images)


@pytest.mark.parametrize("control", [Perturbed(scale=0.0), Perturbed(start=0.9, end=0.95), Perturbed(start=1.0)])
def test_neutral_control_is_absence_bit_for_bit_and_free(pipe: Pipeline, control: Control) -> None:
    plain, with_it = pipe("cat", **DRAW), pipe("cat", controls=[control], **DRAW)
    assert torch.equal(plain.images, with_it.images)
    assert plain.manifest["cost"] == with_it.manifest["cost"]
    assert list(with_it.manifest["dropped"]) == ["Perturbed"]


def test_small_scale_is_close_to_absence_and_a_real_one_is_not(pipe: Pipeline) -> None:
    plain = pipe("cat", **DRAW).images
    assert (pipe("cat", controls=[Perturbed(scale=1e-4)], **DRAW).images - plain).abs().max() < 1e-2
    assert (pipe("cat", controls=[Perturbed(scale=3.0)], **DRAW).images - plain).abs().max() > 1e-2


def test_window_costs_rows_only_where_it_is_open(pipe: Pipeline) -> None:
    cost = pipe("cat", controls=[Perturbed(start=0.25, end=0.75)], **DRAW).manifest["cost"]
    assert cost["unet_rows"] == 2 * 2 + 2 * 3
    assert cost["unet_passes"] == 4


def test_a_branch_guides_as_two_separate_passes_would(pipe: Pipeline) -> None:
    """Perturbed-attention guidance of the engine against diffusers' own processor in a pass by itself."""
    from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0

    settings = {**DRAW, "num_inference_steps": 1, "scheduler": "ddim"}
    ours = pipe("cat", controls=[Perturbed(2.0)], **settings).images
    reference = tiny_sd1()
    scheduler = reference.scheduler
    scheduler.set_timesteps(1)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    t = scheduler.timesteps[0]
    with torch.no_grad():
        c, u = reference.encode_prompt("cat", "cpu", 1, True)
        eps_u, eps_c = reference.unet(torch.cat([x, x]), t, torch.cat([u, c])).sample.chunk(2)
        mid = reference.unet.mid_block.attentions[0].transformer_blocks[0].attn1
        mid.processor = PAGIdentitySelfAttnProcessor2_0()
        # That processor perturbs the second half of its batch.
        eps_p = reference.unet(torch.cat([x, x]), t, torch.cat([c, c])).sample[1:]
        eps = eps_u + 7.5 * (eps_c - eps_u) + 2.0 * (eps_c - eps_p)
        expected = scheduler.step(eps, t, x).prev_sample
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scheduler", ["ddim", "euler_a", "dpmpp_2m_sde"])
def test_a_source_state_is_the_picture_of_its_own_prompt(pipe: Pipeline, scheduler: str) -> None:
    settings = {**DRAW, "scheduler": scheduler, "num_images_per_prompt": 2}
    alone = pipe("a dog", **settings).images
    source = pipe("cat", controls=[SourceBranch(route=False)], **settings).images
    assert (source - alone).abs().max() < 1e-4 * alone.std()
    routed = pipe("cat", controls=[SourceBranch()], **settings).images
    assert (routed - pipe("cat", **settings).images).abs().max() > 1e-3


def test_energy_descends_by_its_gradient(pipe: Pipeline) -> None:
    """One energy step, then the plain step from the latents so moved."""
    settings = {**DRAW, "num_inference_steps": 1, "scheduler": "ddim"}

    class Quadratic(Everything):
        def attention(self, call: AttentionCall) -> None: ...

        def feature(self, call: FeatureCall) -> None: ...

        def energy(self, step: Step, round: int) -> Energy:
            return Energy(0.1 * step.latents["image"].square().sum((1, 2, 3)), again=round < 2)

    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    moved = pipe("cat", controls=[Quadratic()], latents=x, num_images_per_prompt=2, **settings)
    expected = pipe("cat", latents=x * 0.8**3, num_images_per_prompt=2, **settings)
    torch.testing.assert_close(moved.images, expected.images, atol=1e-5, rtol=1e-4)
    assert moved.manifest["cost"] == {
        "unet_rows": 4 + 3 * 2,
        "unet_passes": 1 + 3,
        "energy_passes": 3,
        "side_rows": 0,
        "side_passes": 0,
    }


def test_energy_lowers_what_it_measures(pipe: Pipeline) -> None:
    few, many = (pipe("cat", controls=[Everything(rounds=n)], **DRAW) for n in (1, 6))
    assert torch.isfinite(many.images).all()
    assert not torch.equal(few.images, many.images)


def test_residuals_reach_only_their_rows(pipe: Pipeline) -> None:
    plain = pipe("cat", **DRAW).images
    both, cond, uncond = (pipe("cat", controls=[Residual(only=name)], **DRAW).images for name in ("", "cond", "uncond"))
    distinct = [plain, both, cond, uncond]
    for i, a in enumerate(distinct):
        for b in distinct[i + 1 :]:
            assert (a - b).abs().max() > 1e-3
    # Two controls add up.
    twice = pipe("cat", controls=[Residual(scale=0.2), Residual(scale=0.3)], **DRAW).images
    torch.testing.assert_close(twice, both, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fail", ["", "prepare", "attention", "feature", "energy", "callback"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_no_trace(backbone: str, fail: str) -> None:
    pipe = Pipeline.from_diffusers(BACKBONES[backbone]())
    pipe.unet.requires_grad_(True)
    pipe.unet.down_blocks[0].requires_grad_(False)
    # transformers prepares an encoder for `output_hidden_states` when it is first asked for them.
    pipe.backbone.encode_text(["cat"])
    before = traces(pipe)

    def callback(p: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if fail == "callback":
            raise RuntimeError("callback")
        return tensors

    def draw() -> None:
        pipe("cat", controls=[Everything(fail=fail), Perturbed()], callback_on_step_end=callback, **DRAW)

    if fail:
        with pytest.raises(RuntimeError, match=fail):
            draw()
    else:
        draw()
    assert traces(pipe) == before


def test_two_runs_do_not_meet(pipe: Pipeline) -> None:
    first = pipe("cat", **DRAW).images
    pipe("dog", controls=[Everything(), Perturbed()], **DRAW)
    assert torch.equal(first, pipe("cat", **DRAW).images)


def test_callback_as_in_diffusers_and_cancelling(pipe: Pipeline) -> None:
    seen: list[int] = []

    def callback(p: Pipeline, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(i)
        if i == 1:
            p.cancel()
        return {"latents": tensors["latents"] * 0}

    result = pipe("cat", callback_on_step_end=callback, **DRAW)
    assert seen == [0, 1]
    assert result.cancelled and not result.manifest["replayable"]
    assert result.images.abs().max() == 0


def test_png_replays_byte_for_byte(pipe: Pipeline, tmp_path: Path) -> None:
    settings = {"num_inference_steps": 2, "seed": 5, "num_images_per_prompt": 2, "negative_prompt": "dog"}
    result = pipe("a red cat", scheduler="euler_a", **settings)
    path = tmp_path / "cat.png"
    result.images[1].save(path)
    again = tmp_path / "again.png"
    replay(path, pipe).save(again)
    assert path.read_bytes() == again.read_bytes()
    assert "Negative prompt: dog\nSteps: 2" in result.images[1].text["parameters"]


def test_arrays_are_taken_as_tensors_are(pipe: Pipeline) -> None:
    torch.manual_seed(0)
    given = {"prompt_embeds": torch.randn(1, 16, 32), "negative_prompt_embeds": torch.randn(1, 16, 32)}
    given["latents"] = torch.randn(1, 4, 16, 16)
    drawn = [pipe(**kept, **DRAW).images for kept in (given, {name: x.numpy() for name, x in given.items()})]
    assert torch.equal(*drawn)


def test_generator_replays_too(pipe: Pipeline, tmp_path: Path) -> None:
    result = pipe("cat", num_inference_steps=2, generator=torch.Generator().manual_seed(3))
    result.images[0].save(tmp_path / "cat.png")
    assert replay(tmp_path / "cat.png", pipe).tobytes() == result.images[0].tobytes()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_named_scheduler_runs_with_controls(pipe: Pipeline, scheduler: str) -> None:
    settings = {**DRAW, "scheduler": scheduler, "num_inference_steps": 5}
    images = pipe("cat", controls=[Perturbed(), SourceBranch()], **settings).images
    assert torch.isfinite(images).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 33}, "multiples of 2"),
        ({"scheduler": "magic"}, "ddim"),
        ({"prompt": []}, "at least one"),
        ({"latents": torch.zeros(1, 3, 16, 16)}, "needs"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"prompt": "x" * 50_000}, "characters"),
        ({"generator": torch.Generator(), "seed": 1}, "both"),
        ({"controls": Perturbed()}, "brackets"),
        ({"controls": ["pose"]}, "control objects"),
        ({"output_type": "jpeg"}, "output_type"),
        ({"callback_on_step_end": lambda *a: {}, "callback_on_step_end_tensor_inputs": ["x"]}, "can be"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_input_errors(pipe: Pipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipe(**{"prompt": "cat", **DRAW, **settings})


def test_network_of_other_channels_says_what_is_missing() -> None:
    pipe = Pipeline.from_diffusers(tiny_sd1(in_channels=8))
    with pytest.raises(ModelError, match="InstructPix2Pix"):
        pipe("cat", **DRAW)


def test_same_branch_twice_is_a_conflict(pipe: Pipeline) -> None:
    with pytest.raises(ConflictError, match="Perturbed 2"):
        pipe("cat", controls=[Perturbed(), Perturbed(scale=1.0)], **DRAW)


def test_explain_tells_rows_before_the_run(pipe: Pipeline) -> None:
    from controlroom.core.spec import RunSpec

    control = Perturbed(start=0.5)
    spec = RunSpec(prompt="cat", controls=[control], num_inference_steps=4, seed=5, output_type="latent")
    explanation = pipe.explain(spec)
    cost = pipe.run(spec).manifest["cost"]
    assert sum(explanation.rows) == cost["unet_rows"] == 4 * 2 + 2
    assert sum(explanation.passes) == cost["unet_passes"]
    assert "perturbed: 1 rows of image, steps 2 to 3" in str(explanation)


def test_attach_is_undone() -> None:
    from contextlib import contextmanager

    class Patched(Control):
        type: Literal["patched"] = Field(default="patched", kw_only=True)

        def attach(self, backbone: Any) -> Any:
            @contextmanager
            def patched() -> Any:
                kept = backbone.unet.conv_in
                backbone.unet.conv_in = nn.Conv2d(4, 16, 3, padding=1)
                try:
                    yield
                finally:
                    backbone.unet.conv_in = kept

            return patched()

    pipe = Pipeline.from_diffusers(tiny_sd1())
    before = pipe("cat", **DRAW).images
    assert not torch.equal(before, pipe("cat", controls=[Patched()], **DRAW).images)
    assert torch.equal(before, pipe("cat", **DRAW).images)
