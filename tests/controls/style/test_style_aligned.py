"""StyleAligned against a transcription of the published attention: rows one by one, probabilities materialised."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.controls.style.style_aligned import StyleAligned, left_alone
from controlroom.core.errors import ControlRoomError, InputError
from controlroom.sampling.inversion import invert
from controlroom.sampling.pipeline import Pipeline
from tests.controls.nets import tiny_controlnet
from tests.tiny import BACKBONES

DRAW: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": 5.0, "seed": 3}
PROMPTS = ["a red cat", "a blue dog on the beach", "the frog"]
TOLERANCE = 1e-4


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


PUBLISHED: dict[str, Any] = {
    "share_group_norm": True,
    "share_attention": True,
    "adain_queries": True,
    "adain_keys": True,
    "adain_values": False,
    "full_attention_share": False,
    "shared_score_scale": 1.0,
    "shared_score_shift": 0.0,
    "only_self_level": 0.0,
}


class Published:
    """The method on a diffusers pipeline: in each half of the batch all rows look at its first."""

    def __init__(self, plain: Any, **settings: Any) -> None:
        self.unet, self.settings = plain.unet, {**PUBLISHED, **settings}
        self.processors = self.unet.attn_processors
        self.norms = [m for m in self.unet.modules() if isinstance(m, torch.nn.GroupNorm)]
        names = [name for name in self.processors if "attn1" in name]
        level = self.settings["only_self_level"]
        chosen = {**self.processors}
        for number, name in enumerate(names):
            alone = level == 1.0 or (level == 0.5 and number % (len(names) // int(0.5 * len(names))) == 0)
            if not alone:
                chosen[name] = self.attention
        self.unet.set_attn_processor(chosen)
        if self.settings["share_group_norm"]:
            for norm in self.norms:
                norm.forward = self.normalise(norm.forward)

    def close(self) -> None:
        self.unet.set_attn_processor(self.processors)
        for norm in self.norms:
            norm.__dict__.pop("forward", None)

    @staticmethod
    def normalise(plain: Any) -> Any:
        def forward(x: torch.Tensor) -> torch.Tensor:
            rows = []
            for row in range(len(x)):
                first = 0 if row < len(x) // 2 else len(x) // 2
                joined = torch.cat([x[row], x[first]], dim=1)
                rows.append(plain(joined[None])[:, :, : x.shape[2]])
            return torch.cat(rows)

        return forward

    def attention(self, attn: Any, x: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        s, half = self.settings, len(x) // 2
        q, k, v = (p(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for p in (attn.to_q, attn.to_k, attn.to_v))
        out = []
        for row in range(len(x)):
            first = 0 if row < half else half
            if s["full_attention_share"]:
                keys = torch.cat([k[r] for r in range(first, first + half)], dim=1)
                values = torch.cat([v[r] for r in range(first, first + half)], dim=1)
                p = (q[row] @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
                out.append(p @ values)
                continue
            own = [
                self.like(each[row], each[first]) if s[f"adain_{name}"] else each[row]
                for name, each in (("queries", q), ("keys", k), ("values", v))
            ]
            logits = own[0] @ own[1].transpose(-1, -2)
            value = own[2]
            if s["share_attention"]:
                factor = 1.0 if row == first else s["shared_score_scale"]
                shared = own[0] @ (factor * k[first]).transpose(-1, -2)
                shift = s["shared_score_shift"] * q.shape[-1] ** 0.5
                logits, value = torch.cat([logits, shared + shift], dim=-1), torch.cat([value, v[first]], dim=1)
            out.append((logits * q.shape[-1] ** -0.5).softmax(-1) @ value)
        return attn.to_out[0](torch.stack(out).transpose(1, 2).flatten(2))

    @staticmethod
    def like(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """[heads, tokens, width]"""

        def statistics(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            mean = y.sum(1, keepdim=True) / y.shape[1]
            variance = ((y - mean) ** 2).sum(1, keepdim=True) / (y.shape[1] - 1)
            return mean, (variance + 1e-5).sqrt()

        (mean, deviation), (wanted_mean, wanted) = statistics(x), statistics(other)
        return (x - mean) / deviation * wanted + wanted_mean


def published(plain: Any, prompts: list[str], more: Any = None, seeds: Any = None, **settings: Any) -> torch.Tensor:
    method = Published(plain, **settings)
    call = {key: value for key, value in DRAW.items() if key != "seed"}
    seeds = range(3, 3 + len(prompts)) if seeds is None else seeds
    try:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return plain(prompts, generator=generators, **call, **(more or {})).images
    finally:
        method.close()


def check(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert torch.isfinite(theirs).all()
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.std()


CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "attention alone": {"share_group_norm": False, "adain_queries": False, "adain_keys": False},
    "norms alone": {"share_attention": False, "adain_queries": False, "adain_keys": False},
    "values too": {"adain_values": True, "share_group_norm": False},
    "shift and scale": {"shared_score_shift": 0.7, "shared_score_scale": 0.5},
    "every second layer": {"only_self_level": 0.5},
    "all see all": {"full_attention_share": True, "share_group_norm": False},
    "all see all, norms": {"full_attention_share": True},
}


@pytest.mark.parametrize(
    ("kind", "case"),
    [("sd1", case) for case in CASES] + [("sd2", "default"), ("sdxl", "default"), ("sdxl", "all see all")],
)
def test_a_set_equals_the_published_one(plains: Any, kind: str, case: str) -> None:
    pipe = Pipeline.from_diffusers(plains[kind])
    result = pipe(PROMPTS, controls=[StyleAligned(**CASES[case])], **DRAW)
    theirs = published(plains[kind], PROMPTS, **CASES[case])
    check(result.images, theirs)
    without = pipe(PROMPTS, **DRAW).images
    assert all((result.images[i] - without[i]).abs().max() > 0.02 * without.std() for i in (1, 2))
    full = "full_attention_share" in CASES[case]
    if not full:
        # The first picture of a set is what it is alone, and so is the reference that is drawn along.
        check(result.images[:1], without[:1])
        check(result.states["style"], without[:1])
    cost = result.manifest["cost"]
    assert (cost["unet_rows"], cost["unet_passes"]) == (3 * (6 if full else 8), 3)


def test_a_picture_is_as_in_any_set_with_that_reference(pipe: Pipeline) -> None:
    both = pipe(PROMPTS[1:], controls=[StyleAligned(prompt=PROMPTS[0], seed=3)], **{**DRAW, "seed": 4})
    check(both.images, pipe(PROMPTS, controls=[StyleAligned()], **DRAW).images[1:])
    one = pipe(PROMPTS[2], controls=[StyleAligned(prompt=PROMPTS[0], seed=3)], **{**DRAW, "seed": 5})
    check(one.images, both.images[1:])
    check(one.states["style"], pipe(PROMPTS[0], **DRAW).images)


def test_one_picture_is_no_set(pipe: Pipeline) -> None:
    plain, ours = pipe(PROMPTS[0], **DRAW), pipe(PROMPTS[0], controls=[StyleAligned()], **DRAW)
    assert torch.equal(ours.images, plain.images) and ours.manifest["cost"] == plain.manifest["cost"]
    assert any("no set" in note for note in ours.manifest["notes"])


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_a_given_picture_equals_the_published_transfer(plains: Any, kind: str) -> None:
    """The first row is put to the recorded latents of the inversion after every step."""
    plain, pipe = plains[kind], Pipeline.from_diffusers(plains[kind])
    found = invert(pipe, picture(), "a hat", num_inference_steps=3, mode="stretch", measure=False)
    settings: dict[str, Any] = {"shared_score_shift": 0.5}
    levels = found.latents[:, 0]
    starts = [torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)]

    def hold(_: Any, i: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        kept["latents"][0] = levels[2 - i]
        return kept

    more = {"latents": torch.cat([levels[3][None], *starts]), "callback_on_step_end": hold}
    theirs = published(plain, ["a hat", *PROMPTS[:2]], more, **settings)[1:]
    for reference in (found, picture()):
        result = pipe(PROMPTS[:2], controls=[StyleAligned(reference, prompt="a hat", **settings)], **DRAW)
        check(result.images, theirs)
        cost = result.manifest["cost"]
        assert (cost["unet_rows"], cost["unet_passes"], cost["side_passes"]) == (18, 3, 0 if reference is found else 3)


def test_another_solver_sees_the_same_picture(pipe: Pipeline) -> None:
    control = StyleAligned(picture(), prompt="a hat")
    found = pipe(PROMPTS[:2], controls=[control], scheduler="euler", **DRAW).images
    assert torch.isfinite(found).all()
    assert (found - pipe(PROMPTS[:2], scheduler="euler", **DRAW).images).abs().max() > 0.02


@pytest.mark.parametrize("settings", [{"scale": 0.0}, {"start": 0.9, "end": 0.95}])
def test_neutral_is_absence_bit_for_bit(pipe: Pipeline, settings: dict[str, Any]) -> None:
    plain = pipe(PROMPTS, **DRAW)
    ours = pipe(PROMPTS, controls=[StyleAligned(**settings)], **DRAW)
    assert torch.equal(ours.images, plain.images) and ours.manifest["cost"] == plain.manifest["cost"]


@pytest.mark.parametrize("full", [False, True])
def test_small_scale_is_close_to_absence(pipe: Pipeline, full: bool) -> None:
    plain = pipe(PROMPTS, **DRAW).images
    ours = pipe(PROMPTS, controls=[StyleAligned(scale=1e-4, full_attention_share=full)], **DRAW).images
    assert 0 < (ours - plain).abs().max() < 2e-3 * plain.std()


def test_mask_and_window(pipe: Pipeline) -> None:
    whole = pipe(PROMPTS, controls=[StyleAligned()], **DRAW).images
    check(pipe(PROMPTS, controls=[StyleAligned(mask=np.ones((32, 32), np.float32))], **DRAW).images, whole)
    left = np.zeros((32, 32), np.float32)
    left[:, :8] = 1
    one = {**DRAW, "num_inference_steps": 1}
    change = pipe(PROMPTS, controls=[StyleAligned(mask=left)], **one).images[1:] - pipe(PROMPTS, **one).images[1:]
    change = change.abs().mean((0, 1, 2))
    assert change[:4].mean() > 1.5 * change[-8:].mean() > 0
    late = pipe(PROMPTS, controls=[StyleAligned(start=0.6)], **DRAW)
    # A reference that is drawn along is there from the first step.
    assert late.manifest["cost"]["unet_rows"] == 3 * 8 and not torch.equal(late.images, whole)


def test_no_residuals_for_the_reference(plains: Any, pipe: Pipeline) -> None:
    net = tiny_controlnet(plains["sd1"].unet)
    controls = [StyleAligned(), ControlNet(model=net, image=torch.rand(3, 32, 32))]
    result = pipe(PROMPTS, controls=controls, **DRAW)
    assert result.manifest["cost"]["side_rows"] == 3 * 6
    check(result.states["style"], pipe(PROMPTS[:1], **DRAW).images)


def test_which_layers_are_left_alone() -> None:
    assert left_alone(5, 0.0) == [False] * 5 and left_alone(5, 1.0) == [True] * 5
    assert left_alone(6, 0.5) == [True, False] * 3 and left_alone(10, 0.01) == [False] * 10


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"reference": "nowhere.png"}, "nowhere.png"),
        ({"reference": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"reference": [picture(0), picture(1)]}, "one reference"),
        ({"mask": np.zeros((32, 32), np.float32)}, "black"),
        ({"only_self_level": 1.0, "share_group_norm": False}, "nothing would happen"),
        ({"reference": picture(), "seed": 3}, "Leave one out"),
        ({"scale": 1.5}, "less than or equal"),
        ({"wrong": 1}, "not permitted"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_input(pipe: Pipeline, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ControlRoomError, match=match):
        pipe(PROMPTS, controls=[StyleAligned(**settings)], **DRAW)


def test_an_inversion_that_does_not_fit_says_what_to_do(pipe: Pipeline) -> None:
    found = invert(pipe, [picture(0), picture(1)], num_inference_steps=2, measure=False)
    with pytest.raises(InputError, match="steps of DDIM"):
        pipe(PROMPTS, controls=[StyleAligned(found)], **DRAW)
    with pytest.raises(InputError, match="a reference is one"):
        pipe(PROMPTS, controls=[StyleAligned(found)], **{**DRAW, "num_inference_steps": 2})
    with pytest.raises(InputError, match="another size"):
        pipe(PROMPTS, controls=[StyleAligned(found)], height=16, width=16, **{**DRAW, "num_inference_steps": 2})
