"""Ctrl-X against a transcription of the published equations, with materialised probabilities (arXiv 2406.07540)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from controlroom.controls.style.ctrl_x import CtrlX
from controlroom.core.control import Outline
from controlroom.core.errors import ControlRoomError, InputError
from controlroom.core.random import Streams, draw
from controlroom.core.spec import RunSpec
from controlroom.sampling.pipeline import Pipeline
from tests.tiny import BACKBONES

STEPS = 5
DRAW: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": 5.0, "seed": 3}
PROMPT = "a red cat"
TOLERANCE = 1e-4


def picture(seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((32, 32), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def plains() -> dict[str, Any]:
    return {name: make() for name, make in BACKBONES.items()}


@pytest.fixture(scope="module")
def pipe(plains: dict[str, Any]) -> Pipeline:
    return Pipeline.from_diffusers(plains["sd1"])


# Layers of the miniatures, as the published configuration has those of Stable Diffusion XL: features and attention of
# the first decoder block; appearance in the last encoder blocks, the first decoder block without its first transformer,
# and the next one without its last.
LAYERS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "sd1": (
        "up_blocks.0.resnets.0",
        ("up_blocks.0.attentions.0", "up_blocks.0.attentions.1"),
        ("down_blocks.0.attentions.0", "up_blocks.0.attentions.1", "up_blocks.1.attentions.0"),
    ),
    "sdxl": (
        "up_blocks.0.resnets.0",
        ("up_blocks.0.attentions.0", "up_blocks.0.attentions.1"),
        ("down_blocks.1.attentions.0", "up_blocks.0.attentions.1"),
    ),
}
LAYERS["sd2"] = LAYERS["sd1"]


class Published:
    """The method in a UNet whose rows are named by ``order``; only the row ``cond`` is changed."""

    def __init__(self, plain: Any, kind: str) -> None:
        self.unet, self.order = plain.unet, ("uncond", "cond")
        self.structure, self.appearance = False, False
        resnet, self.structural, self.dressed = LAYERS[kind]
        self.processors = self.unet.attn_processors
        for name, module in self.unet.named_modules():
            if name.endswith("attn1"):
                module.processor = lambda a, h, *args, name=name, **more: self.attention(name, a, h)
        self.handle = self.unet.get_submodule(resnet).register_forward_hook(self.feature)

    def close(self) -> None:
        self.unet.set_attn_processor(self.processors)
        self.handle.remove()

    def feature(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return self.injected(output) if self.structure else output

    def injected(self, x: torch.Tensor) -> torch.Tensor:
        rows = list(x)
        rows[self.order.index("cond")] = x[self.order.index("structure")]
        return torch.stack(rows)

    def attention(self, name: str, attn: Any, x: torch.Tensor) -> torch.Tensor:
        structure = self.structure and any(layer + "." in name for layer in self.structural)
        appearance = self.appearance and any(layer + "." in name for layer in self.dressed)
        cond = self.order.index("cond")

        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.reshape(len(y), y.shape[1], attn.heads, -1).transpose(1, 2)

        def normal(y: torch.Tensor) -> torch.Tensor:
            mean = y.mean(-2, keepdim=True)
            return (y - mean) / (((y - mean) ** 2).sum(-2, keepdim=True) / (y.shape[-2] - 1)).sqrt()

        def probabilities(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)

        if appearance:
            q, k = heads(attn.to_q(normal(x))), heads(attn.to_k(normal(x)))
            if structure:
                q = self.injected(q)
            other = self.order.index("appearance")
            p, value = probabilities(q[cond], k[other]), heads(x)[other]
            mean = p @ value
            deviation = (p @ value**2 - mean**2).clamp(min=0).sqrt()
            new = deviation * normal(heads(x)[cond]) + mean
            rows = list(x)
            rows[cond] = new.transpose(0, 1).flatten(1)
            x = torch.stack(rows)
        q, k, v = heads(attn.to_q(x)), heads(attn.to_k(x)), heads(attn.to_v(x))
        if structure:
            q, k = self.injected(q), self.injected(k)
        return attn.to_out[0]((probabilities(q, k) @ v).transpose(1, 2).flatten(2))


@torch.no_grad()
def published(
    plain: Any,
    kind: str,
    structure: Image.Image | None,
    appearance: Image.Image | None,
    schedules: tuple[float, float] = (0.6, 0.6),
    recurrence: tuple[float, float, int] = (0.1, 0.5, 2),
    eta: float = 0.0,
) -> dict[str, torch.Tensor]:
    """Latents of the picture and of those beside it."""
    texts = {"uncond": "", "cond": PROMPT}
    told: dict[str, Any] = {}
    for name, text in texts.items():
        if kind == "sdxl":
            tokens, _, pooled, _ = plain.encode_prompt(text, device="cpu")
            zero = 0.0 if name == "uncond" else 1.0
            told[name] = (tokens * zero, pooled * zero)
        else:
            told[name] = (plain.encode_prompt(text, "cpu", 1, False)[0], None)
    scheduler, streams = plain.scheduler, Streams([3])
    scheduler.set_timesteps(STEPS)
    main = [torch.Generator().manual_seed(3)]
    x = draw(main, (1, 4, 16, 16), "cpu", torch.float32)
    clean: dict[str, torch.Tensor] = {}
    beside = {"structure": x, "appearance": x}
    for name, given in (("structure", structure), ("appearance", appearance)):
        if given is not None:
            pixels = torch.from_numpy(np.asarray(given, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
            clean[name] = plain.vae.encode(pixels).latent_dist.mode() * plain.vae.config.scaling_factor
    method = Published(plain, kind)
    try:
        for i, t in enumerate(scheduler.timesteps):
            for name, latents in clean.items():
                beside[name] = scheduler.add_noise(latents, streams.normal(name, latents.shape), t.reshape(1))

            def predict(rows: dict[str, tuple[torch.Tensor, str]], t: Any = t) -> dict[str, torch.Tensor]:
                method.order = tuple(rows)
                more: dict[str, Any] = {}
                if kind == "sdxl":
                    ids = torch.tensor([[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]]).repeat(len(rows), 1)
                    pooled = torch.cat([told[text][1] for _, text in rows.values()])
                    more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
                sample = torch.cat([latents for latents, _ in rows.values()])
                text = torch.cat([told[text][0] for _, text in rows.values()])
                out = plain.unet(sample, t, encoder_hidden_states=text, **more).sample
                return {name: out[j : j + 1] for j, name in enumerate(rows)}

            method.structure = i < round(STEPS * schedules[0])
            method.appearance = i < round(STEPS * schedules[1])
            rows = {"uncond": (x, "uncond"), "cond": (x, "cond")}
            for name, latents in beside.items():
                rows[name] = (latents, "cond")
                rows[f"{name}/uncond"] = (latents, "uncond")
            eps = predict(rows)
            drawn = {name: [torch.Generator()] for name in beside}
            for copy in drawn.values():
                copy[0].set_state(main[0].get_state())
            for name, pair in {"": ("uncond", "cond"), **{n: (f"{n}/uncond", n) for n in beside}}.items():
                both = eps[pair[0]] + 5.0 * (eps[pair[1]] - eps[pair[0]])
                if name == "":
                    x = scheduler.step(both, t, x, eta=eta, generator=main).prev_sample
                elif name not in clean:
                    beside[name] = scheduler.step(both, t, beside[name], eta=eta, generator=drawn[name]).prev_sample
            begin, end, count = recurrence
            method.structure = method.appearance = False
            for _ in range(count if round(STEPS * begin) <= i < round(STEPS * end) else 0):
                before = scheduler.timesteps[i + 1] if i + 1 < STEPS else 0
                share = scheduler.alphas_cumprod[t] / scheduler.alphas_cumprod[before]
                noise = streams.normal("ctrl_x:recurrence", x.shape)
                x = share**0.5 * x + (1 - share) ** 0.5 * noise
                eps = predict({"uncond": (x, "uncond"), "cond": (x, "cond")})
                both = eps["uncond"] + 5.0 * (eps["cond"] - eps["uncond"])
                x = scheduler.step(both, t, x, eta=eta, generator=streams.stream("ctrl_x:recurrence")).prev_sample
    finally:
        method.close()
    return {"image": x, **beside}


def check(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert torch.isfinite(theirs).all()
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.std()


# Rows: guided steps of the picture, of the pictures beside it, and of two repetitions in steps 0.5 to 2.5 (0 and 1).
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "both": ({}, {}, 10 + 6 + 8),
    "both, eta 1": ({}, {"eta": 1.0}, 10 + 6 + 8),
    "structure alone": ({"appearance": None}, {}, 10 + 3 + 10 + 8),
    "appearance alone": ({"structure": None}, {"eta": 0.5}, 10 + 3 + 10 + 8),
    "schedules, no recurrence": (
        {"structure_schedule": 0.2, "appearance_schedule": 1.0, "recurrence": (0.0, 0.0, 0)},
        {"schedules": (0.2, 1.0), "recurrence": (0.0, 0.0, 0)},
        10 + 1 + 5,
    ),
}


@pytest.mark.parametrize(
    ("kind", "case"),
    [*(("sd1", case) for case in CASES), ("sd2", "both"), ("sdxl", "both"), ("sdxl", "structure alone")],
)
def test_equals_the_published_equations(plains: Any, kind: str, case: str) -> None:
    settings, changed, rows = CASES[case]
    pictures = {"structure": picture(0), "appearance": picture(1), **settings}
    pipe = Pipeline.from_diffusers(plains[kind])
    eta = changed.get("eta", 0.0)
    result = pipe(PROMPT, controls=[CtrlX(**pictures)], eta=eta, **DRAW)
    theirs = published(plains[kind], kind, pictures["structure"], pictures["appearance"], **changed)
    check(result.images, theirs["image"])
    for name, latents in result.states.items():
        check(latents, theirs[name])
    without = pipe(PROMPT, eta=eta, **DRAW).images
    assert (result.images - without).abs().max() > 0.05 * without.std()
    cost = result.manifest["cost"]
    assert cost["unet_rows"] == rows
    planned = pipe.explain(RunSpec(prompt=PROMPT, controls=[CtrlX(**pictures)], eta=eta, **DRAW))
    assert (sum(planned.rows), sum(planned.passes)) == (cost["unet_rows"], cost["unet_passes"])


def test_default_layers_of_stable_diffusion_xl_are_the_published_ones() -> None:
    """Of the real network's skeleton, on the meta device."""
    from diffusers import UNet2DConditionModel

    from controlroom.backbones.sites import attention_sites, feature_sites

    xl: dict[str, Any] = {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
    }
    sd1: dict[str, Any] = {"block_out_channels": (320, 640, 1280, 1280)}
    encoder = {"down_blocks.1.0", "down_blocks.1.1", "down_blocks.2.0", "down_blocks.2.1"}

    def decoder(block: int, *numbers: int) -> set[str]:
        return {f"up_blocks.{block}.{number}" for number in numbers}

    expected = {
        "sdxl": ("up_blocks.0.resnets.0", decoder(0, 0, 1, 2), encoder | decoder(0, 1, 2) | decoder(1, 0, 1)),
        "sd1": ("up_blocks.1.resnets.0", decoder(1, 0, 1, 2), encoder | decoder(1, 1, 2) | decoder(2, 0, 1)),
    }
    for kind, settings in (("sdxl", xl), ("sd1", sd1)):
        with torch.device("meta"):
            unet: Any = UNet2DConditionModel(cross_attention_dim=64, **settings)
        hw = (64, 64)
        outline = Outline(kind, 1, 10, (4, *hw), True, attention_sites(unet, hw), feature_sites(unet, hw), ("a cat",))
        control = CtrlX(picture(), picture())
        resnet, structure, appearance = expected[kind]

        def short(sites: Any) -> set[str]:
            return {site.name.partition(".transformer")[0].replace(".attentions", "") for site in sites}

        assert [site.name for site in control._features(outline)] == [resnet]
        assert short(control._layers("structure", outline)) == structure
        assert short(control._layers("appearance", outline)) == appearance


def test_layers_by_name(pipe: Pipeline) -> None:
    default = CtrlX(picture(), picture(1))
    resnet, structure, appearance = LAYERS["sd1"]
    named = CtrlX(
        picture(),
        picture(1),
        structure_features=resnet,
        structure_attention=list(structure),
        appearance_attention=list(appearance),
    )
    expected = pipe(PROMPT, controls=[default], **DRAW).images
    assert torch.equal(pipe(PROMPT, controls=[named], **DRAW).images, expected)
    other = CtrlX(picture(), picture(1), structure_features="mid")
    assert not torch.equal(pipe(PROMPT, controls=[other], **DRAW).images, expected)


def test_neutral(pipe: Pipeline) -> None:
    plain = pipe(PROMPT, **DRAW)
    for control in (
        CtrlX(),
        CtrlX(picture(), scale=0.0),
        CtrlX(picture(), structure_schedule=0, appearance_schedule=0),
    ):
        ours = pipe(PROMPT, controls=[control], **DRAW)
        assert torch.equal(ours.images, plain.images) and ours.manifest["cost"] == plain.manifest["cost"]
    small = CtrlX(picture(), picture(1), scale=1e-4, recurrence=(0, 0, 0))
    change = (pipe(PROMPT, controls=[small], **DRAW).images - plain.images).abs().max()
    assert 0 < change < 2e-3 * plain.images.std()


def test_mask(pipe: Pipeline) -> None:
    one = {**DRAW, "num_inference_steps": 1}
    settings: dict[str, Any] = {"structure_schedule": 1.0, "appearance_schedule": 1.0, "recurrence": (0, 0, 0)}
    whole = pipe(PROMPT, controls=[CtrlX(picture(), picture(1), **settings)], **one).images
    white = CtrlX(picture(), picture(1), mask=np.ones((32, 32), np.float32), **settings)
    check(pipe(PROMPT, controls=[white], **one).images, whole)
    left = np.zeros((32, 32), np.float32)
    left[:, :8] = 1
    half = pipe(PROMPT, controls=[CtrlX(picture(), picture(1), mask=left, **settings)], **one).images
    change = (half - pipe(PROMPT, **one).images).abs().mean((0, 1, 2))
    assert change[:4].mean() > 1.5 * change[-8:].mean() > 0


def test_batches_are_as_if_alone(pipe: Pipeline) -> None:
    prompts = ["a red cat", "a dog"]
    both = pipe(prompts, controls=[CtrlX([picture(0), picture(2)], picture(1))], eta=1.0, **DRAW).images
    for i, prompt in enumerate(prompts):
        control = CtrlX(picture(2 * i), picture(1))
        alone = pipe(prompt, controls=[control], eta=1.0, **{**DRAW, "seed": 3 + i}).images
        check(both[i : i + 1], alone)


def test_prompts_of_the_pictures(pipe: Pipeline) -> None:
    found = [
        pipe(PROMPT, controls=[CtrlX(structure_prompt=text, appearance_schedule=0)], **DRAW)
        for text in ("a blue dog", "the frog")
    ]
    assert not torch.equal(found[0].images, found[1].images)
    check(found[0].states["structure"], pipe("a blue dog", **DRAW).images)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"structure": "nowhere.png"}, "nowhere.png"),
        ({"appearance": [picture(), picture(), picture()]}, "3 appearance"),
        ({"structure_prompt": ["a", "b", "c"]}, "3 prompts"),
        ({"mask": np.zeros((32, 32), np.float32)}, "black"),
        ({"structure_attention": "nowhere"}, "nowhere"),
        ({"recurrence": (0.5, 0.1, 2)}, "from <= to"),
        ({"structure_schedule": 1.5}, "less than or equal"),
        ({"wrong": 1}, "not permitted"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_input(pipe: Pipeline, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ControlRoomError, match=match):
        pipe(["a cat", "a dog"], controls=[CtrlX(**{"structure": picture(), **settings})], **DRAW)


def test_a_solver_with_a_memory_takes_no_step_twice(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match='scheduler="ddim"'):
        pipe(PROMPT, controls=[CtrlX(picture())], scheduler="dpmpp_2m", **DRAW)
    result = pipe(PROMPT, controls=[CtrlX(picture(), recurrence=(0, 0, 0))], scheduler="dpmpp_2m", **DRAW)
    assert torch.isfinite(result.images).all()
