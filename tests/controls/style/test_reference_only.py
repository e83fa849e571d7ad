"""Reference-only against the community's equations, in two passes (write, read) with materialised probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from controlroom.controls.style.reference_only import ReferenceOnly, restyled
from controlroom.core.branch import Views
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import ConflictError, ControlRoomError
from controlroom.core.random import Streams
from controlroom.sampling.pipeline import Pipeline
from tests.controls.nets import tiny_controlnet
from tests.tiny import BACKBONES

DRAW: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 7.5, "seed": 3}
PROMPT = "a red cat"


def picture(seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((32, 32), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def plains() -> dict[str, Any]:
    found = {name: make() for name, make in BACKBONES.items()}
    for plain in found.values():
        plain.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def pipe(plains: dict[str, Any]) -> Pipeline:
    return Pipeline.from_diffusers(plains["sd1"])


class Published:
    """The method on a diffusers pipeline: the reference runs first and fills banks, the picture then reads them."""

    def __init__(
        self, plain: Any, source: Image.Image, fidelity: float, attn: bool, adain: bool, attn_weight: float, gn: float
    ) -> None:
        self.plain, self.unet, self.fidelity = plain, plain.unet, fidelity
        self.writing, self.inside = False, False
        pixels = torch.from_numpy(np.asarray(source, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        with torch.no_grad():
            self.clean = plain.vae.encode(pixels).latent_dist.mode() * plain.vae.config.scaling_factor
        self.noise = Streams([3])
        self.tokens: dict[Any, torch.Tensor] = {}
        self.statistics: dict[Any, Any] = {}
        self.handles = []
        self.processors = self.unet.attn_processors
        if attn:
            # Widest first; modules in the order in which the network lists them: down, up, mid.
            layers = [(n, m) for n, m in self.unet.named_modules() if n.endswith("attn1")]
            layers.sort(key=lambda pair: -pair[1].query_dim)
            for i, (_, layer) in enumerate(layers):
                if attn_weight > i / len(layers):
                    layer.processor = lambda a, h, *args, **named: self.attention(a, h)
        if adain:
            down, up = self.unet.down_blocks, self.unet.up_blocks
            weights = [(block, 2 * (1 - i / len(down))) for i, block in enumerate(down)]
            weights += [(block, 2 * i / len(up)) for i, block in enumerate(up)]
            modules = [self.unet.mid_block]
            for block, weight in weights:
                if gn >= weight:
                    modules += list(getattr(block, "attentions", None) or block.resnets)
            self.handles += [m.register_forward_hook(self.normalise) for m in modules]
        self.handles.append(self.unet.register_forward_pre_hook(self.write, with_kwargs=True))

    def close(self) -> None:
        self.unet.set_attn_processor(self.processors)
        for handle in self.handles:
            handle.remove()

    def write(self, unet: Any, args: Any, named: Any) -> None:
        if self.inside:
            return
        sample, t = args
        noised = self.plain.scheduler.add_noise(
            self.clean, self.noise.normal("reference:0", (1, 4, 16, 16)), t.reshape(1)
        )
        noised = self.plain.scheduler.scale_model_input(torch.cat([noised] * sample.shape[0]), t)
        self.writing = self.inside = True
        unet(noised, t, **named)
        self.writing = self.inside = False

    def attention(self, attn: Any, x: torch.Tensor) -> torch.Tensor:
        if self.writing:
            self.tokens[attn] = x.clone()
            return attend(attn, x, x)
        seen = attend(attn, x, torch.cat([x, self.tokens[attn]], dim=1))
        kept = seen.clone()
        half = x.shape[0] // 2
        kept[:half] = attend(attn, x[:half], x[:half])
        return self.fidelity * kept + (1 - self.fidelity) * seen

    def normalise(self, module: Any, args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        variance, mean = x.var(dim=(2, 3), keepdim=True, unbiased=False), x.mean(dim=(2, 3), keepdim=True)
        if self.writing:
            self.statistics[module] = variance, mean
            return None
        of_reference, shift = self.statistics[module]
        moved = (x - mean) / variance.clamp(min=1e-6) ** 0.5 * of_reference.clamp(min=1e-6) ** 0.5 + shift
        kept = moved.clone()
        kept[: x.shape[0] // 2] = x[: x.shape[0] // 2]
        new = self.fidelity * kept + (1 - self.fidelity) * moved
        return (new, *output[1:]) if isinstance(output, tuple) else new


def attend(attn: Any, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    q, k, v = attn.to_q(x), attn.to_k(context), attn.to_v(context)
    q, k, v = (t.reshape(t.shape[0], t.shape[1], attn.heads, -1).transpose(1, 2) for t in (q, k, v))
    p = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5, -1)
    return attn.to_out[0]((p @ v).transpose(1, 2).flatten(2))


def published(plain: Any, fidelity: float, attn: bool, adain: bool, attn_weight: float, gn: float) -> torch.Tensor:
    method = Published(plain, picture(), fidelity, attn, adain, attn_weight, gn)
    try:
        settings = {k: v for k, v in DRAW.items() if k != "seed"}
        return plain(PROMPT, generator=torch.Generator().manual_seed(3), **settings).images
    finally:
        method.close()


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    assert torch.isfinite(theirs).all()
    return bool((ours - theirs).abs().max() <= 1e-4 * theirs.std())


@pytest.mark.parametrize(
    ("fidelity", "attn", "adain", "attn_weight", "gn"),
    [
        (0.5, True, False, 1.0, 1.0),
        (0.0, True, False, 1.0, 1.0),
        (1.0, True, False, 1.0, 1.0),
        (0.5, True, False, 0.5, 1.0),
        (0.5, False, True, 1.0, 1.0),
        (0.3, True, True, 1.0, 2.0),
        (1.0, True, True, 1.0, 0.0),
    ],
)
@pytest.mark.parametrize("kind", BACKBONES)
def test_equals_the_equations(
    plains: Any, kind: str, fidelity: float, attn: bool, adain: bool, attn_weight: float, gn: float
) -> None:
    control = ReferenceOnly(
        picture(),
        fidelity,
        reference_attn=attn,
        reference_adain=adain,
        attention_weight=attn_weight,
        adain_weight=gn,
    )
    pipe = Pipeline.from_diffusers(plains[kind])
    ours = pipe(PROMPT, controls=[control], **DRAW)
    theirs = published(plains[kind], fidelity, attn, adain, attn_weight, gn)
    assert close(ours.images, theirs)
    without = pipe(PROMPT, **DRAW).images
    assert (ours.images - without).abs().max() > 0.02 * without.std()
    cost = ours.manifest["cost"]
    # One pass; at full fidelity nobody reads the unconditional rows of the reference.
    assert (cost["unet_rows"], cost["unet_passes"], cost["side_passes"]) == (12 if fidelity == 1 else 16, 4, 0)


def test_restyled_has_the_references_statistics() -> None:
    draw = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(2, 3, 8, 8, generator=draw) * s + s for s in (1, 2, 4))
    got = restyled(x, [a, b])
    torch.testing.assert_close(got.mean((2, 3)), (a.mean((2, 3)) + b.mean((2, 3))) / 2)
    expected = (a.var((2, 3), unbiased=False) + b.var((2, 3), unbiased=False)) / 2
    torch.testing.assert_close(got.var((2, 3), unbiased=False), expected)


@pytest.mark.parametrize("settings", [{"scale": 0.0}, {"start": 0.9, "end": 0.95}])
def test_neutral_is_absence_bit_for_bit(pipe: Pipeline, settings: dict[str, float]) -> None:
    plain = pipe(PROMPT, **DRAW)
    ours = pipe(PROMPT, controls=[ReferenceOnly(picture(), reference_adain=True, **settings)], **DRAW)
    assert torch.equal(ours.images, plain.images)
    assert ours.manifest["cost"] == plain.manifest["cost"]


def test_small_scale_is_close_to_absence(pipe: Pipeline) -> None:
    plain = pipe(PROMPT, **DRAW).images
    ours = pipe(PROMPT, controls=[ReferenceOnly(picture(), scale=1e-4, reference_adain=True)], **DRAW).images
    assert 0 < (ours - plain).abs().max() < 2e-3 * plain.std()


def test_window(pipe: Pipeline) -> None:
    seen: dict[str, list[torch.Tensor]] = {"with": [], "without": []}
    runs = []
    for name, controls in (("with", [ReferenceOnly(picture(), start=0.5)]), ("without", [])):

        def keep(_: Any, i: int, t: Any, kept: dict[str, Any], name: str = name) -> dict[str, Any]:
            seen[name].append(kept["latents"].clone())
            return {}

        runs.append(pipe(PROMPT, controls=controls, callback_on_step_end=keep, **DRAW))
    same = [torch.equal(a, b) for a, b in zip(seen["with"], seen["without"], strict=True)]
    assert same == [True, True, False, False]
    assert runs[0].manifest["cost"]["unet_rows"] == 2 * 2 + 2 * 4


def test_mask(pipe: Pipeline) -> None:
    whole = pipe(PROMPT, controls=[ReferenceOnly(picture(), reference_adain=True)], **DRAW).images
    white = ReferenceOnly(picture(), reference_adain=True, mask=np.ones((32, 32), np.float32))
    assert close(pipe(PROMPT, controls=[white], **DRAW).images, whole)
    left = np.zeros((32, 32), np.float32)
    left[:, :8] = 1
    plain = pipe(PROMPT, **DRAW).images
    one = {**DRAW, "num_inference_steps": 1}
    masked = pipe(PROMPT, controls=[ReferenceOnly(picture(), 0.0, mask=left)], **one).images
    change = (masked - pipe(PROMPT, **one).images).abs().mean((0, 1, 2))
    assert change[:4].mean() > 1.5 * change[-8:].mean()
    assert (pipe(PROMPT, controls=[ReferenceOnly(picture(), mask=left)], **DRAW).images - plain).abs().max() > 1e-2


def test_batches_are_as_if_alone(pipe: Pipeline) -> None:
    prompts = ["a red cat", "a dog"]
    both = pipe(prompts, controls=[ReferenceOnly([[picture(0)], [picture(1)]], reference_adain=True)], **DRAW).images
    for i, prompt in enumerate(prompts):
        control = ReferenceOnly(picture(i), reference_adain=True)
        alone = pipe(prompt, controls=[control], **{**DRAW, "seed": 3 + i}).images
        assert close(both[i : i + 1], alone)


def test_several_references_and_a_controlnet(plains: Any, pipe: Pipeline) -> None:
    from controlroom.controls.spatial.controlnet import ControlNet

    two = pipe(PROMPT, controls=[ReferenceOnly([picture(0), picture(1)])], **DRAW)
    assert two.manifest["cost"]["unet_rows"] == 4 * 6
    net = tiny_controlnet(plains["sd1"].unet)
    both = [ReferenceOnly(picture()), ControlNet(model=net, image=torch.rand(3, 32, 32))]
    result = pipe(PROMPT, controls=both, **DRAW)
    # References get no residuals: the ControlNet runs on the rows of the picture only.
    assert result.manifest["cost"]["side_rows"] == 4 * 2
    assert torch.isfinite(result.images).all()
    alone = pipe(PROMPT, controls=[ReferenceOnly(picture())], **{**DRAW, "guidance_scale": 1.0})
    assert alone.manifest["cost"]["unet_rows"] == 4 * 2


def test_no_trace(plains: Any, pipe: Pipeline) -> None:
    unet = plains["sd1"].unet

    def state() -> Any:
        return [
            (n, id(getattr(m, "processor", None)), len(m._forward_hooks), "forward" in vars(m))
            for n, m in unet.named_modules()
        ], [(p.data_ptr(), p.requires_grad, p.sum().item()) for p in unet.parameters()]

    before = state()
    control = ReferenceOnly(picture(), reference_adain=True)
    pipe(PROMPT, controls=[control], **DRAW)
    assert state() == before

    def fail(*_: Any) -> Any:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        pipe(PROMPT, controls=[control], callback_on_step_end=fail, **DRAW)
    assert state() == before


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"image": None}, "no reference"),
        ({"image": []}, "no reference"),
        ({"image": "nowhere.png"}, "nowhere.png"),
        ({"image": [[picture()], [picture()], [picture()]]}, "3 prompts"),
        ({"mask": np.zeros((32, 32), np.float32)}, "black"),
        ({"style_fidelity": 1.5}, "less than or equal"),
        ({"reference_attn": False}, "both off"),
        ({"scale": -1.0}, "greater than or equal"),
        ({"wrong": 1}, "not permitted"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_input(pipe: Pipeline, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ControlRoomError, match=match):
        pipe(["a cat", "a dog"], controls=[ReferenceOnly(**{"image": picture(), **settings})], **DRAW)


class _Halves(Control):
    """Sees the canvas through two views."""

    type: str = "halves"

    def declare(self, outline: Outline) -> Declaration:
        class Two:
            count, hw = 2, (16, 8)

            def split(self, canvas: torch.Tensor, factor: int = 1) -> torch.Tensor:
                return torch.cat([canvas[..., : 8 * factor], canvas[..., 8 * factor :]])

            def merge(self, predictions: torch.Tensor) -> torch.Tensor:
                return torch.cat(list(predictions.chunk(2)), dim=-1)

        views: Views = Two()
        return Declaration(views=views)


def test_views_are_refused_before_the_run(pipe: Pipeline) -> None:
    with pytest.raises(ConflictError, match="reference:0"):
        pipe(PROMPT, controls=[ReferenceOnly(picture()), _Halves()], **DRAW)
