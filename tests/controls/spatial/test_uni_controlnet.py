"""Uni-ControlNet against the paper's equations, written out here, and what every control promises.

The reference takes nothing from the code under test but the weights: residual blocks are diffusers' own, with their
norms replaced by FDN computed with plain functions; the global tokens are appended to the text; the loop is by hand.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from controlroom.backbones.image_encoder import clip_pixels
from controlroom.backbones.uni_controlnet import load_local_adapter, new_local_adapter, save_adapter
from controlroom.controls.spatial.uni_controlnet import LocalConditions, UniControlNet
from controlroom.core.control import Control
from controlroom.core.errors import InputError, ModelError
from controlroom.core.spec import RunSpec
from controlroom.sampling.pipeline import Pipeline
from tests.controls.nets import tiny_image_encoder, tiny_uni_adapters, write_uni_controlnet
from tests.tiny import BACKBONES, tiny_sd1

DRAW: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}
KINDS = ("canny", "depth", "pose")


def picture(seed: int = 0, size: tuple[int, int] = (32, 32)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def mapped(seed: int = 0) -> torch.Tensor:
    return torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(seed))


class Replaced(nn.Module):
    """FDN(Z, c) = norm(Z) (1 + conv_γ(zero(h(c)))) + conv_β(zero(h(c))) in the place of a norm."""

    def __init__(self, norm: nn.GroupNorm, weights: dict[str, torch.Tensor], feature: torch.Tensor) -> None:
        super().__init__()
        self.norm, self.weights, self.feature = norm, weights, feature

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        groups = z.reshape(len(z), self.norm.num_groups, -1)
        mean, variance = groups.mean(-1, keepdim=True), groups.var(-1, unbiased=False, keepdim=True)
        normal = ((groups - mean) / (variance + self.norm.eps).sqrt()).reshape(z.shape)
        normal = normal * self.norm.weight[:, None, None] + self.norm.bias[:, None, None]
        w = self.weights
        gamma = F.conv2d(self.feature, w["gamma.weight"], w["gamma.bias"], padding=1)
        beta = F.conv2d(self.feature, w["beta.weight"], w["beta.bias"], padding=1)
        return normal * (1 + gamma) + beta


def reference_local(
    unet: Any, net: Any, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, c: torch.Tensor, added: Any
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Residuals of the local adapter for joined conditions ``c`` [B, C, H, W]."""
    w = net.state_dict()

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)}

    encoder = copy.deepcopy(unet)
    own = {k.replace(".resnets.0.resnet.", ".resnets.0."): v for k, v in w.items()}
    own = {k: v for k, v in own.items() if k in encoder.state_dict()}
    assert any(k.startswith("down_blocks.0.resnets.0.conv1") for k in own)
    encoder.load_state_dict(own, strict=False)
    h = F.silu(F.conv2d(c, w["features.first.0.weight"], w["features.first.0.bias"], padding=1))
    for level, block in enumerate(encoder.down_blocks):
        key = f"features.levels.{level}.0"
        h = F.silu(F.conv2d(h, w[f"{key}.weight"], w[f"{key}.bias"], stride=2, padding=1))
        key = f"features.zero.{level}"
        feature = F.conv2d(h, w[f"{key}.weight"], w[f"{key}.bias"], padding=1)
        first, prefix = block.resnets[0], f"down_blocks.{level}.resnets.0."
        first.norm1 = Replaced(first.norm1, part(f"{prefix}norm_in."), feature)
        first.norm2 = Replaced(first.norm2, part(f"{prefix}norm_out."), feature)
    emb = encoder.time_embedding(encoder.time_proj(t.reshape(-1).expand(len(x))))
    if added is not None:
        emb = emb + encoder.get_aug_embed(emb=emb, encoder_hidden_states=context, added_cond_kwargs=added)
    z = encoder.conv_in(x)
    skips = [z]
    for block in encoder.down_blocks:
        more = {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}
        z, found = block(hidden_states=z, temb=emb, **more)
        skips += found
    z = encoder.mid_block(z, emb, encoder_hidden_states=context)
    down = [
        torch.einsum("oi,bihw->bohw", w[f"zero.{i}.weight"][..., 0, 0], s) + w[f"zero.{i}.bias"][:, None, None]
        for i, s in enumerate(skips)
    ]
    mid = torch.einsum("oi,bihw->bohw", w["zero_mid.weight"][..., 0, 0], z) + w["zero_mid.bias"][:, None, None]
    return down, mid


def reference_tokens(net: Any, feature: torch.Tensor) -> torch.Tensor:
    """norm, gated layer, norm, gated layer, split into four tokens."""
    w, h = net.state_dict(), feature
    for number in ("1", "2"):
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        h = h * w[f"norm{number}.weight"] + w[f"norm{number}.bias"]
        both = h @ w[f"ff{number}.gate.weight"].T + w[f"ff{number}.gate.bias"]
        value, gate = both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :]
        erf = torch.erf(gate / 2**0.5)
        h = (value * gate * (1 + erf) / 2) @ w[f"ff{number}.out.weight"].T + w[f"ff{number}.out.bias"]
    return h.reshape(len(h), 4, -1)


def reference_run(
    source: Any, kind: str, nets: dict[str, Any], maps: dict[str, torch.Tensor], content: Any, local: float, lam: float
) -> torch.Tensor:
    """Three steps of DDIM with guidance 7.5, by hand."""
    pipe = Pipeline.from_diffusers(source)
    words, empty = pipe.backbone.encode_text(["a red cat"], size=(32, 32)), None
    if kind == "sdxl":
        empty = {"tokens": torch.zeros_like(words.tokens), "pooled": torch.zeros_like(words.pooled)}
    else:
        empty = {"tokens": pipe.backbone.encode_text([""], negative=True).tokens, "pooled": None}
    encoder, extra = tiny_image_encoder(), {}
    if content is not None:
        feature = encoder(clip_pixels([content], 32)).image_embeds
        for name, given in (("cond", feature), ("uncond", torch.zeros_like(feature))):
            extra[name] = lam * reference_tokens(nets["global"], given)
    joined = torch.cat([maps.get(k, torch.zeros(3, 32, 32)) for k in KINDS])[None]
    scheduler = copy.deepcopy(source.scheduler)
    scheduler.set_timesteps(3)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        eps = {}
        for name in ("uncond", "cond"):
            tokens = words.tokens if name == "cond" else empty["tokens"]
            pooled = words.pooled if name == "cond" else empty["pooled"]
            context = torch.cat([tokens, extra[name]], dim=1) if extra else tokens
            added = {"text_embeds": pooled, "time_ids": words.time_ids} if kind == "sdxl" else None
            more: dict[str, Any] = {"added_cond_kwargs": added} if added else {}
            if maps:
                down, mid = reference_local(source.unet, nets["local"], x, t, context, joined, added)
                more["down_block_additional_residuals"] = [local * d for d in down]
                more["mid_block_additional_residual"] = local * mid
            eps[name] = source.unet(x, t, encoder_hidden_states=context, **more).sample
        x = scheduler.step(eps["uncond"] + 7.5 * (eps["cond"] - eps["uncond"]), t, x).prev_sample
    return x


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    assert torch.isfinite(theirs).all()
    return bool((ours - theirs).abs().max() <= 1e-4 * theirs.std())


@pytest.mark.parametrize(
    ("kind", "kinds", "content", "local", "lam"),
    [
        ("sd1", ("canny", "pose"), True, 0.8, 0.6),
        ("sd1", ("depth",), False, 1.0, 1.0),
        ("sd1", (), True, 1.0, 1.3),
        ("sd2", KINDS, True, 1.0, 1.0),
        ("sdxl", ("canny",), True, 0.7, 1.0),
    ],
)
@torch.no_grad()
def test_latents_equal_the_published_equations(
    kind: str, kinds: tuple[str, ...], content: bool, local: float, lam: float
) -> None:
    source = BACKBONES[kind]()
    nets = tiny_uni_adapters(source.unet)
    maps = {k: mapped(i) for i, k in enumerate(kinds)}
    seen = picture(5) if content else None
    theirs = reference_run(source, kind, nets, maps, seen, local, lam)
    pipe, noise = Pipeline.from_diffusers(source), torch.Generator().manual_seed(3)
    control = UniControlNet(
        nets,
        LocalConditions(**maps),
        seen,
        local_scale=local,
        global_scale=lam,
        image_encoder=tiny_image_encoder(),
    )
    ours = pipe("a red cat", controls=[control], generator=noise, **DRAW).images
    assert close(ours, theirs)
    without = pipe("a red cat", generator=torch.Generator().manual_seed(3), **DRAW).images
    assert (ours - without).abs().max() > 0.02 * theirs.std()


@pytest.fixture(scope="module")
def plain() -> Any:
    return tiny_sd1()


@pytest.fixture(scope="module")
def pipe(plain: Any) -> Pipeline:
    return Pipeline.from_diffusers(plain)


@pytest.fixture(scope="module")
def nets(plain: Any) -> dict[str, Any]:
    return tiny_uni_adapters(plain.unet)


def control(nets: Any, images: dict[str, Any] | None = None, content: Any = None, **settings: Any) -> UniControlNet:
    return UniControlNet(nets, images or {}, content, image_encoder=tiny_image_encoder(), **settings)


def draw(pipe: Pipeline, *controls: Control, **settings: Any) -> Any:
    return pipe(**{"prompt": "a red cat", "seed": 5, **DRAW, **settings}, controls=list(controls))


def test_any_subset_is_zeros_for_the_others(pipe: Pipeline, nets: Any) -> None:
    maps, zeros, drawn = {k: mapped(i) for i, k in enumerate(KINDS)}, torch.zeros(3, 32, 32), []
    for number in range(1, 8):
        subset = {k: maps[k] for i, k in enumerate(KINDS) if number >> i & 1}
        drawn.append(draw(pipe, control(nets, subset), num_inference_steps=1).images)
        filled = control(nets, {**dict.fromkeys(KINDS, zeros), **subset})
        assert torch.equal(drawn[-1], draw(pipe, filled, num_inference_steps=1).images)
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_a_new_adapter_is_the_encoder_and_adds_nothing(plain: Any, pipe: Pipeline) -> None:
    net = new_local_adapter(plain.unet, KINDS, (8,), (8, 16), 1).eval()
    x, t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([300, 700])
    context, maps = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(2)), torch.rand(2, 9, 32, 32)
    with torch.no_grad():
        down, mid = net(x, t, context, maps)
        assert all(float(r.abs().max()) == 0 for r in (*down, mid))
        for zero in (*net.zero, net.zero_mid):
            nn.init.dirac_(zero.weight)
        skips, middle = net(x, t, context, maps)
        unet = plain.unet
        seen: list[torch.Tensor] = []
        hook = unet.mid_block.register_forward_hook(lambda m, a, o: seen.extend([a[0], o]))
        unet(x, t, context)
        hook.remove()
    torch.testing.assert_close(skips[-1], seen[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(middle, seen[1], atol=1e-5, rtol=1e-5)
    without = draw(pipe).images
    fresh = {"local": new_local_adapter(plain.unet, KINDS, (8,), (8, 16), 1).eval()}
    assert torch.equal(draw(pipe, control(fresh, {"pose": mapped()})).images, without)


@pytest.mark.parametrize(
    "settings", [{"scale": 0.0}, {"local_scale": 0.0, "global_scale": 0.0}, {"start": 0.9, "end": 0.95}]
)
def test_neutral_is_absence_bit_for_bit_and_free(pipe: Pipeline, nets: Any, settings: dict[str, Any]) -> None:
    without, neutral = draw(pipe), draw(pipe, control(nets, {"pose": mapped()}, picture(), **settings))
    assert torch.equal(without.images, neutral.images)
    assert without.manifest["cost"] == neutral.manifest["cost"]


def test_small_scale_is_close_to_absence(pipe: Pipeline, nets: Any) -> None:
    without = draw(pipe).images
    little = draw(pipe, control(nets, {"pose": mapped()}, picture(), scale=1e-4)).images
    assert 0 < (little - without).abs().max() < 1e-2 * without.std()


def test_cost_is_one_pass_a_step_only_where_there_is_a_map(pipe: Pipeline, nets: Any) -> None:
    cost = draw(pipe, control(nets, {"pose": mapped(), "canny": mapped(1)}, picture(), end=0.7)).manifest["cost"]
    assert (cost["side_passes"], cost["side_rows"]) == (2, 4)
    assert (cost["unet_passes"], cost["unet_rows"]) == (3, 6)
    assert draw(pipe, control(nets, content=picture())).manifest["cost"]["side_passes"] == 0


def test_mask_confines_residuals_and_tokens(pipe: Pipeline, nets: Any) -> None:
    images, content = {"pose": mapped()}, picture(3)
    full = draw(pipe, control(nets, images, content)).images
    white = draw(pipe, control(nets, images, content, mask=torch.ones(32, 32))).images
    assert (full - white).abs().max() < 1e-4 * full.std()
    left, seen = torch.zeros(32, 32), []
    left[:, :16] = 1

    class Spy(UniControlNet):
        def side(self, step: Any) -> Any:
            seen.extend(super().side(step) or ())
            return tuple(seen[-1:])

        def attention(self, call: Any) -> None:
            super().attention(call)
            seen.extend(e.bias for e in call.operations.extensions.get("cond", ()))

    settings = {"image_encoder": tiny_image_encoder(), "mask": left}
    halves = draw(pipe, Spy(nets, images, content, **settings)).images
    assert (halves - full).abs().max() > 1e-3
    for residual in (*seen[0].down, seen[0].mid):
        width = residual.shape[-1]
        assert residual[..., width // 2 :].abs().max() == 0 < residual[..., : width // 2].abs().max()
    bias = next(item for item in seen if isinstance(item, torch.Tensor) and item.shape[2] == 256).reshape(16, 16)
    assert bool((bias[:, 8:] == -torch.inf).all()) and bool((bias[:, :8] == 0).all())


def test_each_picture_has_its_own_maps_and_content(pipe: Pipeline, nets: Any) -> None:
    maps, contents = [mapped(0), mapped(1)], [picture(3), picture(4)]
    settings = {"prompt": ["cat", "dog"]}
    together = draw(pipe, control(nets, {"depth": maps}, contents), **settings).images
    for i, prompt in enumerate(settings["prompt"]):
        alone = draw(pipe, control(nets, {"depth": maps[i]}, contents[i]), prompt=prompt, seed=5 + i).images
        assert (together[i : i + 1] - alone).abs().max() < 1e-4 * max(1.0, alone.std().item())


def test_folder_is_the_modules_and_a_run_is_data(plain: Any, pipe: Pipeline, nets: Any, tmp_path: Path) -> None:
    folder = write_uni_controlnet(plain.unet, tmp_path / "uni")
    images = {"pose": picture(1), "canny": picture(2)}
    expected = draw(pipe, control(nets, images, picture(3))).images
    given = UniControlNet(str(folder), LocalConditions(**images), picture(3))
    assert torch.equal(draw(pipe, given).images, expected)
    kept = len(pipe.backbone.kept)
    draw(pipe, UniControlNet(folder, images))
    assert len(pipe.backbone.kept) == kept
    spec = RunSpec(controls=[given], prompt="a red cat", seed=5, **DRAW)
    assert torch.equal(pipe.run(RunSpec.from_yaml(spec.to_yaml())).images, expected)


def test_errors_name_what_is_wrong(plain: Any, pipe: Pipeline, nets: Any, tmp_path: Path) -> None:
    other = tiny_sd1(block_out_channels=(8, 16))
    foreign = write_uni_controlnet(other.unet, tmp_path / "foreign")
    folder = write_uni_controlnet(plain.unet, tmp_path / "uni")
    save_adapter(nets["local"], tmp_path / "only/local")
    config = json.loads((folder / "local/config.json").read_text())
    broken = tmp_path / "broken/local"
    save_adapter(nets["local"], broken)
    (broken / "config.json").write_text(json.dumps({**config, "kinds": ["canny", "depth", "mood"]}))
    wide = tiny_uni_adapters(tiny_sd1(cross=16).unet)
    for model, said in (
        (foreign, "made for another base model"),
        (tiny_uni_adapters(other.unet), r"skip connections are \[8, 8, 8, 16\], this model's \[16, 16, 16, 32\]"),
        (tmp_path / "broken", "'mood'"),
        (tmp_path, "no local adapter"),
        ({"global": nets["global"]}, "local adapter of a Uni-ControlNet cannot be a NoneType"),
        (7, "cannot be a int"),
    ):
        with pytest.raises(ModelError, match=said):
            draw(pipe, control(model, {"pose": mapped()}))
    with pytest.raises(ModelError, match="tokens are 16 wide, this model's text 32"):
        draw(pipe, control(wide, content=picture()))
    with pytest.raises(ModelError, match="no global adapter"):
        draw(pipe, UniControlNet(tmp_path / "only", content=picture()))
    with pytest.raises(ModelError, match="image_encoder"):
        draw(pipe, UniControlNet(nets, content=picture()))
    for given, said in (
        (control(nets), "nothing to draw along"),
        (control(nets, {"normal": mapped()}), "does not know normal. It knows: canny, depth, pose"),
        (control(nets, {"pose": torch.zeros(3, 16, 16)}), "condition pose is a tensor of 16 x 16"),
        (control(nets, content=[picture(), picture()]), "pictures for 2 prompts, and 1 images"),
        (control(nets, {"pose": mapped()}, mask=torch.zeros(32, 32)), "black all over"),
    ):
        with pytest.raises(InputError, match=said):
            draw(pipe, given)
    with pytest.raises(InputError, match="mood"):
        control(nets, {"mood": mapped()})
    assert load_local_adapter(folder / "local", plain.unet).kinds == KINDS
