"""AppearanceControl against its equations: diffusers' pipelines with processors that join the recorded states."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from controlroom.backbones.reference import joined, new_writer
from controlroom.controls.pose.appearance import AppearanceControl
from controlroom.core.errors import ControlRoomError, InputError, ModelError
from controlroom.core.spec import RunSpec
from controlroom.sampling.pipeline import Pipeline
from tests.tiny import BACKBONES

DRAW: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 7.5, "seed": 3}
PROMPT = "a red cat"
Bank = dict[str, torch.Tensor]


def picture(seed: int = 0, size: tuple[int, int] = (32, 32)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def tools() -> dict[str, tuple[Any, Any]]:
    """Name -> diffusers pipeline and a writer with other weights."""
    found = {}
    for name, make in BACKBONES.items():
        plain = make()
        plain.set_progress_bar_config(disable=True)
        found[name] = plain, make(seed=9).unet
    return found


@pytest.fixture(scope="module")
def pipe(tools: dict[str, tuple[Any, Any]]) -> Pipeline:
    return Pipeline.from_diffusers(tools["sd1"][0])


@pytest.fixture(scope="module")
def writer(tools: dict[str, tuple[Any, Any]]) -> Any:
    return tools["sd1"][1]


# -- the equations, written out --


class Recording:
    """Plain attention that keeps its input."""

    def __init__(self, bank: Bank, name: str) -> None:
        self.bank, self.name = bank, name

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        self.bank[self.name] = hidden_states.clone()
        return attention(attn, hidden_states, hidden_states)


class Joining:
    """Rows of the second half (the conditional ones) attend to the bank as well; those of the first to zeros or not."""

    def __init__(self, bank: Bank, name: str, uncond: str, scale: float, masks: Callable[[int], Any] | None) -> None:
        self.bank, self.name, self.uncond, self.scale, self.masks = bank, name, uncond, scale, masks

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        u, c = hidden_states.chunk(2)
        more = self.bank[self.name].expand(c.shape[0], -1, -1)
        query, key = (1.0, 1.0) if self.masks is None else self.masks(hidden_states.shape[1])
        joined = max(self.scale, 1) * query * key * torch.ones(c.shape[1], more.shape[1])
        weights = torch.cat([torch.ones(c.shape[1], c.shape[1]), joined], 1)
        out = attention(attn, c, torch.cat([c, more], 1), weights)
        out = attention(attn, c, c) + min(self.scale, 1) * (out - attention(attn, c, c))
        if self.uncond == "zeros":
            return torch.cat([attention(attn, u, torch.cat([u, torch.zeros_like(more)], 1), weights), out])
        return torch.cat([attention(attn, u, u), out])


def attention(attn: Any, x: torch.Tensor, context: torch.Tensor, weights: Any = 1.0) -> torch.Tensor:
    """With materialised probabilities; ``weights`` [queries, keys] multiply before they are normalised."""
    q, k, v = attn.to_q(x), attn.to_k(context), attn.to_v(context)
    q, k, v = (t.reshape(t.shape[0], t.shape[1], attn.heads, -1).transpose(1, 2) for t in (q, k, v))
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
    mass = (logits - logits.amax(-1, keepdim=True)).exp() * weights
    out = mass / mass.sum(-1, keepdim=True) @ v
    return attn.to_out[0](out.transpose(1, 2).flatten(2))


def record(plain: Any, writer: Any, source: Image.Image, t: Any = 0, noise: torch.Tensor | None = None) -> Bank:
    """The states of a whole forward pass of the writer over a reference."""
    pixels = torch.from_numpy(np.asarray(source, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    latents = plain.vae.encode(pixels).latent_dist.mode() * plain.vae.config.scaling_factor
    if noise is not None:
        latents = plain.scheduler.add_noise(latents, noise, t.reshape(1))
    parts = plain.encode_prompt("", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    added = None
    if len(parts) == 4:
        ids = torch.tensor([[source.height, source.width, 0, 0, source.height, source.width]], dtype=torch.float32)
        added = {"text_embeds": parts[2], "time_ids": ids}
    bank: Bank = {}
    before = writer.attn_processors
    writer.set_attn_processor(
        {k: Recording(bank, k.removesuffix(".processor")) if "attn1" in k else v for k, v in before.items()}
    )
    writer(latents, t, encoder_hidden_states=parts[0], added_cond_kwargs=added)
    writer.set_attn_processor(before)
    return bank


@torch.no_grad()
def published(
    plain: Any,
    bank: Bank | Callable[[Any], Bank],
    uncond: str = "absent",
    scale: float = 1.0,
    masks: Any = None,
    seed: int = 3,
    **settings: Any,
) -> torch.Tensor:
    """Diffusers' own pipeline, its UNet's self-attentions joined with a bank (or with the bank of each timestep)."""
    held: Bank = {} if callable(bank) else bank

    def give(module: Any, inputs: Any) -> None:
        if callable(bank):
            held.update(bank(inputs[1]))

    before = plain.unet.attn_processors
    joining = {
        k: Joining(held, k.removesuffix(".processor"), uncond, scale, masks) if "attn1" in k else v
        for k, v in before.items()
    }
    handle = plain.unet.register_forward_pre_hook(give)
    plain.unet.set_attn_processor(joining)
    try:
        settings = {"prompt": PROMPT, **{k: v for k, v in DRAW.items() if k != "seed"}, **settings}
        return plain(generator=torch.Generator().manual_seed(seed), **settings).images
    finally:
        plain.unet.set_attn_processor(before)
        handle.remove()


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    assert torch.isfinite(theirs).all()
    return bool((ours - theirs).abs().max() <= 1e-4 * theirs.std())


# -- parity --


@pytest.mark.parametrize("uncond", ["absent", "zeros"])
@pytest.mark.parametrize("kind", BACKBONES)
def test_equals_the_equations(tools: dict[str, Any], kind: str, uncond: Any) -> None:
    plain, writer = tools[kind]
    control = AppearanceControl(picture(), model=writer, uncond=uncond)
    ours = Pipeline.from_diffusers(plain)(PROMPT, controls=[control], **DRAW)
    with torch.no_grad():
        theirs = published(plain, record(plain, writer, picture()), uncond)
    assert close(ours.images, theirs)
    without = Pipeline.from_diffusers(plain)(PROMPT, **DRAW).images
    assert (ours.images - without).abs().max() > 0.05 * without.std()
    cost = ours.manifest["cost"]
    assert (cost["unet_rows"], cost["unet_passes"], cost["side_rows"], cost["side_passes"]) == (8, 4, 1, 1)


@pytest.mark.parametrize("noised", [False, True])
def test_published_variant_reads_at_each_steps_t(tools: dict[str, Any], pipe: Pipeline, noised: bool) -> None:
    plain, writer = tools["sd1"]
    control = AppearanceControl(picture(), model=writer, time="match", ref_noise="match" if noised else "clean")
    ours = pipe(PROMPT, controls=[control], **DRAW)
    from controlroom.core.random import Streams

    noise = Streams([3]).normal("appearance:0", (1, 4, 16, 16)) if noised else None
    theirs = published(plain, lambda t: record(plain, writer, picture(), t, noise))
    assert close(ours.images, theirs)
    assert ours.manifest["cost"]["side_passes"] == 4


@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_several_references_are_joined_and_scaled(tools: dict[str, Any], pipe: Pipeline, scale: float) -> None:
    plain, writer = tools["sd1"]
    sources = [picture(0), picture(1, (24, 40))]
    ours = pipe(PROMPT, controls=[AppearanceControl(sources, model=writer, scale=scale)], **DRAW)
    with torch.no_grad():
        # Keeps its proportions: as many pixels as 32x32, in steps of what the network can halve.
        parts = [record(plain, writer, s) for s in (sources[0], sources[1].resize((24, 40)))]
    theirs = published(plain, {k: torch.cat([p[k] for p in parts], 1) for k in parts[0]}, scale=scale)
    assert close(ours.images, theirs)
    assert ours.manifest["cost"]["side_passes"] == 2


def test_masks_of_picture_and_reference(tools: dict[str, Any], pipe: Pipeline) -> None:
    plain, writer = tools["sd1"]
    left, top = np.zeros((32, 32), np.float32), np.zeros((32, 32), np.float32)
    left[:, :16], top[:16] = 1, 1
    control = AppearanceControl(picture(), model=writer, mask=left, reference_mask=top)
    ours = pipe(PROMPT, controls=[control], **DRAW).images

    def masks(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        side = round(tokens**0.5)
        q, k = torch.zeros(side, side), torch.zeros(side, side)
        q[:, : side // 2], k[: side // 2] = 1, 1
        return q.reshape(-1, 1), k.reshape(1, -1)

    with torch.no_grad():
        theirs = published(plain, record(plain, writer, picture()), masks=masks)
    assert close(ours, theirs)
    white = AppearanceControl(picture(), model=writer, mask=np.ones((8, 8), np.float32))
    assert close(
        pipe(PROMPT, controls=[white], **DRAW).images,
        pipe(PROMPT, controls=[AppearanceControl(picture(), model=writer)], **DRAW).images,
    )


def test_training_sees_what_a_run_sees(tools: dict[str, Any], pipe: Pipeline) -> None:
    plain, writer = tools["sd1"]
    ours = pipe(PROMPT, controls=[AppearanceControl(picture(), model=writer)], **{**DRAW, "guidance_scale": 1.0}).images
    with torch.no_grad(), joined(plain.unet, record(plain, writer, picture())):
        settings = {k: v for k, v in DRAW.items() if k != "seed"}
        theirs = plain(PROMPT, generator=torch.Generator().manual_seed(3), **{**settings, "guidance_scale": 1.0}).images
    assert close(ours, theirs)


def test_shared_writer_and_later_layers_only(tools: dict[str, Any], pipe: Pipeline) -> None:
    plain, _ = tools["sd1"]
    with torch.no_grad():
        bank = record(plain, plain.unet, picture())
    ours = pipe(PROMPT, controls=[AppearanceControl(picture(), model="shared")], **DRAW).images
    assert close(ours, published(plain, bank))
    late = pipe(PROMPT, controls=[AppearanceControl(picture(), model="shared", layers="midup")], **DRAW).images
    assert (late - ours).abs().max() > 1e-2 * ours.std()


# -- what every control promises --


@pytest.mark.parametrize("settings", [{"scale": 0.0}, {"start": 0.9, "end": 0.95}])
def test_neutral_is_absence_bit_for_bit(pipe: Pipeline, writer: Any, settings: dict[str, float]) -> None:
    plain = pipe(PROMPT, **DRAW)
    ours = pipe(PROMPT, controls=[AppearanceControl(picture(), model=writer, **settings)], **DRAW)
    assert torch.equal(ours.images, plain.images)
    assert ours.manifest["cost"] == plain.manifest["cost"]


def test_small_scale_is_close_to_absence(pipe: Pipeline, writer: Any) -> None:
    plain = pipe(PROMPT, **DRAW).images
    ours = pipe(PROMPT, controls=[AppearanceControl(picture(), model=writer, scale=1e-4)], **DRAW).images
    assert 0 < (ours - plain).abs().max() < 1e-3 * plain.std()


def test_window(pipe: Pipeline, writer: Any) -> None:
    seen: dict[str, list[torch.Tensor]] = {"with": [], "without": []}
    for name, controls in (("with", [AppearanceControl(picture(), model=writer, start=0.5)]), ("without", [])):

        def keep(_: Any, i: int, t: Any, kept: dict[str, Any], name: str = name) -> dict[str, Any]:
            seen[name].append(kept["latents"].clone())
            return {}

        pipe(PROMPT, controls=controls, callback_on_step_end=keep, **DRAW)
    same = [torch.equal(a, b) for a, b in zip(seen["with"], seen["without"], strict=True)]
    assert same == [True, True, False, False]


def test_each_prompt_has_its_reference_as_if_alone(pipe: Pipeline, writer: Any) -> None:
    prompts = ["a red cat", "a dog"]
    both = pipe(prompts, controls=[AppearanceControl([[picture(0)], [picture(1)]], model=writer)], **DRAW)
    assert both.manifest["cost"]["side_rows"] == 2
    assert both.manifest["cost"]["side_passes"] == 1
    for i, prompt in enumerate(prompts):
        alone = pipe(prompt, controls=[AppearanceControl(picture(i), model=writer)], **{**DRAW, "seed": 3 + i}).images
        assert close(both.images[i : i + 1], alone)
    noised = AppearanceControl(picture(0), model=writer, ref_noise="match")
    both = pipe(prompts, controls=[noised], **DRAW).images
    alone = pipe(prompts[1], controls=[noised], **{**DRAW, "seed": 4}).images
    assert close(both[1:], alone)


def test_no_trace(tools: dict[str, Any], pipe: Pipeline, writer: Any) -> None:
    plain = tools["sd1"][0]

    def state() -> Any:
        return [
            (n, id(getattr(m, "processor", None)), len(m._forward_hooks), len(m._forward_pre_hooks), m.training)
            for net in (plain.unet, writer)
            for n, m in net.named_modules()
        ], [(p.data_ptr(), p.requires_grad, p.sum().item()) for net in (plain.unet, writer) for p in net.parameters()]

    before = state()
    for model in (writer, "shared"):
        pipe(PROMPT, controls=[AppearanceControl(picture(), model=model, time="match")], **DRAW)
        assert state() == before

        def fail(*_: Any) -> Any:
            raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            pipe(PROMPT, controls=[AppearanceControl(picture(), model=model)], callback_on_step_end=fail, **DRAW)
        assert state() == before


def test_loaded_folder_is_kept_and_equals_the_module(pipe: Pipeline, writer: Any, tmp_path: Path) -> None:
    new_writer(writer).save_pretrained(tmp_path / "appearance")
    control = AppearanceControl(picture(), model=str(tmp_path / "appearance"))
    ours = pipe(PROMPT, controls=[control], **DRAW).images
    assert torch.equal(ours, pipe(PROMPT, controls=[AppearanceControl(picture(), model=writer)], **DRAW).images)
    assert torch.equal(ours, pipe(PROMPT, controls=[control], **DRAW).images)


def test_two_people_and_written_runs(pipe: Pipeline, writer: Any, tmp_path: Path) -> None:
    new_writer(writer).save_pretrained(tmp_path / "a")
    two = [AppearanceControl(picture(i), model=str(tmp_path / "a"), scale=0.5 + i) for i in range(2)]
    a = pipe(PROMPT, controls=two, **DRAW).images
    b = pipe(PROMPT, controls=two[::-1], **DRAW).images
    assert close(a, b)
    spec = RunSpec(model="theatre", prompt=PROMPT, controls=[two[0]])
    again = RunSpec.model_validate(json.loads(spec.model_dump_json()))
    assert torch.equal(
        pipe(PROMPT, controls=list(again.controls), **DRAW).images, pipe(PROMPT, controls=[two[0]], **DRAW).images
    )


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"image": None}, "no reference"),
        ({"image": []}, "no reference"),
        ({"image": "nowhere.png"}, "nowhere.png"),
        ({"image": [[picture()], [picture(), picture()]]}, "as many"),
        ({"image": [[picture()], [picture()], [picture()]]}, "3 prompts"),
        ({"mask": np.zeros((32, 32), np.float32)}, "black"),
        ({"reference_mask": np.zeros((32, 32), np.float32)}, "black"),
        ({"reference_mask": [picture(), picture()]}, "2 masks for 1"),
        ({"model": "theatre/nothing"}, "theatre/nothing"),
        ({"model": "weights.bin"}, "pickle"),
        ({"model": 3}, "int"),
        ({"model": torch.nn.Linear(2, 2)}, "Linear"),
        ({"model": "the sdxl one"}, "another base model"),
        ({"scale": -1.0}, "greater than or equal"),
        ({"scale": float("nan")}, "finite"),
        ({"uncond": "none"}, "absent"),
        ({"time": "later"}, "zero"),
        ({"start": 2.0}, "less than or equal"),
        ({"wrong": 1}, "not permitted"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_input(pipe: Pipeline, tools: Any, writer: Any, settings: dict[str, Any], match: str) -> None:
    if settings.get("model") == "the sdxl one":
        settings = {"model": tools["sdxl"][1]}
    with pytest.raises(ControlRoomError, match=match) as caught:
        pipe(
            ["a cat", "a dog"],
            controls=[AppearanceControl(**{"image": picture(), "model": writer, **settings})],
            **DRAW,
        )
    assert isinstance(caught.value, InputError | ModelError)
