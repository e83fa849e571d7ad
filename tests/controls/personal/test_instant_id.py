"""InstantID against the published computation, written out here, and what every control promises.

The reference takes only weights: the resampler with materialised attention and the two attentions of each layer are
plain functions, IdentityNet is diffusers' own ControlNet told the face's tokens, and the loop is by hand.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from controlroom.backbones.image_encoder import clip_pixels
from controlroom.backbones.ip_adapter import adapter_from_tensors
from controlroom.controls.personal.instant_id import InstantID
from controlroom.controls.personal.ip_adapter import IPAdapter
from controlroom.controls.personal.lora import LoRA
from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.core.errors import InputError, ModelError
from controlroom.core.pose import L_EYE, NOSE, R_EYE, Pose
from controlroom.sampling.pipeline import Pipeline
from controlroom.signals.face import draw_face, five_points, head_crop
from tests.controls.loras import tiny_lora
from tests.controls.nets import (
    tiny_controlnet,
    tiny_image_encoder,
    tiny_instant_id,
    tiny_ip_adapter,
    write_instant_id,
)
from tests.tiny import BACKBONES, tiny_sd1

DRAW: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}
POINTS = np.array([(10.0, 10.0), (20.0, 11.0), (15.0, 16.0), (11.0, 21.0), (19.0, 22.0)])


def vector(seed: int = 0, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, 32, generator=torch.Generator().manual_seed(seed))


def picture(seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((40, 32), Image.Resampling.BICUBIC)


def half() -> torch.Tensor:
    mask = torch.zeros(32, 32)
    mask[:, :16] = 1
    return mask


# The published computation.


def norm(x: torch.Tensor, w: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    found = torch.zeros(*q.shape[:2], v.shape[-1])
    size, out = q.shape[-1] // heads, v.shape[-1] // heads
    for h in range(heads):
        a, b = slice(h * size, (h + 1) * size), slice(h * out, (h + 1) * out)
        p = (q[..., a] @ k[..., a].transpose(1, 2) / size**0.5).softmax(-1)
        found[..., b] = p @ v[..., b]
    return found


def resampled(file: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """[rows, states, 32] -> [rows, tokens, width]; heads of 64."""
    w = {key.removeprefix("image_proj."): value for key, value in file.items() if key.startswith("image_proj.")}
    x = x @ w["proj_in.weight"].T + w["proj_in.bias"]
    tokens = w["latents"].expand(len(x), -1, -1)
    for i in range(4):
        a, b = norm(x, w, f"layers.{i}.0.norm1"), norm(tokens, w, f"layers.{i}.0.norm2")
        k, v = (torch.cat([a, b], 1) @ w[f"layers.{i}.0.to_kv.weight"].T).chunk(2, -1)
        q = b @ w[f"layers.{i}.0.to_q.weight"].T
        tokens = attend(q, k, v, q.shape[-1] // 64) @ w[f"layers.{i}.0.to_out.weight"].T + tokens
        h = norm(tokens, w, f"layers.{i}.1.0") @ w[f"layers.{i}.1.1.weight"].T
        tokens = F.gelu(h) @ w[f"layers.{i}.1.3.weight"].T + tokens
    return norm(tokens @ w["proj_out.weight"].T + w["proj_out.bias"], w, "norm_out")


class Decoupled:
    """Words before the last ``tokens`` of what is attended to, the face's behind; the sum of the two attentions."""

    def __init__(self, file: dict[str, torch.Tensor], number: int, tokens: int, scale: float) -> None:
        self.k, self.v = (file[f"ip_adapter.{number}.to_{part}_ip.weight"] for part in "kv")
        self.tokens, self.scale = tokens, scale

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **named: Any) -> Any:
        words, face = encoder_hidden_states[:, : -self.tokens], encoder_hidden_states[:, -self.tokens :]
        q = attn.to_q(hidden_states)
        out = attend(q, attn.to_k(words), attn.to_v(words), attn.heads)
        out = out + self.scale * attend(q, face @ self.k.T, face @ self.v.T, attn.heads)
        return attn.to_out[0](out)


def reference(
    kind: str, face: torch.Tensor, map: torch.Tensor, identity: float = 0.8, place: float = 0.8, rows: int = 1
) -> torch.Tensor:
    source = BACKBONES[kind]()
    file, net = tiny_instant_id(source.unet)
    prompts = ["a red cat", "dog"][:rows]
    backbone = Pipeline.from_diffusers(source).backbone
    words = backbone.encode_text(prompts, size=(32, 32))
    empty = backbone.encode_text([""] * rows, negative=True, size=(32, 32))
    if kind == "sdxl":
        assert words.pooled is not None and empty.pooled is not None
        empty = type(empty)(torch.zeros_like(words.tokens), None, torch.zeros_like(words.pooled), words.time_ids)
    numbers = [name for name in source.unet.attn_processors if name.endswith("attn2.processor")]
    processors = dict(source.unet.attn_processors)
    for i, name in enumerate(numbers):
        processors[name] = Decoupled(file, 2 * i + 1, 6, identity)
    source.unet.set_attn_processor(processors)
    scheduler = copy.deepcopy(source.scheduler)
    scheduler.set_timesteps(3)
    generator = [torch.Generator().manual_seed(3 + i) for i in range(rows)]
    x = torch.cat([torch.randn(1, 4, 16, 16, generator=g) for g in generator])
    for t in scheduler.timesteps:
        eps = []
        for told, given in ((empty, torch.zeros_like(face[:1])), (words, face)):
            tokens = resampled(file, given).expand(rows, -1, -1)
            more: dict[str, Any] = {}
            if kind == "sdxl":
                more["added_cond_kwargs"] = {"text_embeds": told.pooled, "time_ids": words.time_ids}
            down, mid = net(
                x,
                t,
                encoder_hidden_states=tokens,
                controlnet_cond=map,
                conditioning_scale=place,
                return_dict=False,
                **more,
            )
            eps.append(
                source.unet(
                    x,
                    t,
                    encoder_hidden_states=torch.cat([told.tokens, tokens], 1),
                    down_block_additional_residuals=down,
                    mid_block_additional_residual=mid,
                    **more,
                ).sample
            )
        x = scheduler.step(eps[0] + 7.5 * (eps[1] - eps[0]), t, x).prev_sample
    return x.detach()


def drawn_map() -> torch.Tensor:
    return torch.from_numpy(np.asarray(draw_face(POINTS, 32, 32), np.float32) / 255).permute(2, 0, 1)[None]


def generators(rows: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(3 + i) for i in range(rows)]


def ours(kind: str, *controls: Any, rows: int = 1, **settings: Any) -> torch.Tensor:
    pipe = Pipeline.from_diffusers(BACKBONES[kind]())
    drawn = {"prompt": ["a red cat", "dog"][:rows], "guidance_scale": 7.5, "scheduler": "ddim", **DRAW, **settings}
    return pipe(**drawn, controls=list(controls), generator=generators(rows)).images


@pytest.mark.parametrize("kind", BACKBONES)
def test_latents_equal_the_published_computation(kind: str) -> None:
    file, net = tiny_instant_id(BACKBONES[kind]().unet)
    theirs = reference(kind, vector()[None, None], drawn_map())
    mine = ours(kind, InstantID(file, vector(), POINTS, net))
    assert torch.isfinite(theirs).all()
    assert (mine - theirs).abs().max() <= 1e-4 * theirs.std()
    assert (mine - ours(kind)).abs().max() > 0.05 * theirs.std()


def test_several_pictures_of_a_person_are_states_of_the_resampler() -> None:
    file, net = tiny_instant_id(tiny_sd1().unet)
    theirs = reference("sd1", vector(0, 3)[None], drawn_map(), 1.3, 0.4)
    mine = ours("sd1", InstantID(file, vector(0, 3), POINTS, net, identity_scale=1.3, controlnet_scale=0.4))
    assert (mine - theirs).abs().max() <= 1e-4 * theirs.std()


def test_a_face_and_a_place_for_each_prompt() -> None:
    """A batch equals the rows drawn alone, which the reference's loop over one face does not do."""
    file, net = tiny_instant_id(tiny_sd1().unet)
    places = [POINTS, POINTS + np.array((4.0, -3.0))]
    both = ours("sd1", InstantID(file, [vector(0), vector(1)], places, net), rows=2)
    maps = torch.cat([torch.from_numpy(np.asarray(draw_face(p, 32, 32), np.float32) / 255)[None] for p in places])
    theirs = reference("sd1", torch.stack([vector(0), vector(1)])[:, None], maps.permute(0, 3, 1, 2), rows=2)
    assert (both - theirs).abs().max() <= 1e-4 * theirs.std()
    assert torch.equal(
        both, ours("sd1", InstantID(file, torch.stack([vector(0), vector(1)])[:, None], places, net), rows=2)
    )


def test_points_poses_and_pictures_are_the_same_place() -> None:
    file, net = tiny_instant_id(tiny_sd1().unet)
    body, there = np.zeros((18, 2)), np.zeros(18)
    body[[R_EYE, L_EYE, NOSE]], there[[R_EYE, L_EYE, NOSE]] = POINTS[:3], 1
    pose = Pose(body, there, 32, 32)
    of_pose = ours("sd1", InstantID(file, vector(), pose, net))
    assert torch.equal(of_pose, ours("sd1", InstantID(file, vector(), five_points(pose), net)))
    mine = ours("sd1", InstantID(file, vector(), POINTS, net))
    assert torch.equal(mine, ours("sd1", InstantID(file, vector(), draw_face(POINTS, 32, 32), net)))
    assert torch.equal(mine, ours("sd1", InstantID(file, vector(), POINTS.tolist(), net)))
    assert not torch.equal(mine, of_pose)


def test_vectors_come_from_files_and_encoders(tmp_path: Path) -> None:
    unet = tiny_sd1().unet
    file, net = tiny_instant_id(unet)
    np.save(tmp_path / "anna.npy", vector().numpy())
    save_file({"face": vector()}, str(tmp_path / "anna.safetensors"))
    expected = ours("sd1", InstantID(file, vector(), POINTS, net))
    for given in (tmp_path / "anna.npy", str(tmp_path / "anna.safetensors"), vector().numpy(), vector().tolist()):
        assert torch.equal(ours("sd1", InstantID(file, given, POINTS, net)), expected)

    class Reader:
        def embed(self, picture: Image.Image) -> Any:
            return np.asarray(picture.resize((32, 1)), np.float32)[0, :, 0] / 255

    told = InstantID(file, None, POINTS, net, image=picture(), face_encoder=Reader())
    same = InstantID(file, torch.from_numpy(Reader().embed(picture())), POINTS, net)
    assert torch.equal(ours("sd1", told), ours("sd1", same))

    # A CLIP encoder, on the head that is cut out: features are 24 wide, so another adapter.
    encoder = tiny_image_encoder()
    narrow = {**file, "image_proj.proj_in.weight": file["image_proj.proj_in.weight"][:, :24].contiguous()}
    where = POINTS * 0.8
    feature = encoder(clip_pixels([head_crop(picture(), where)], 32)).image_embeds[0].detach()
    told = InstantID(narrow, None, POINTS, net, image=picture(), image_keypoints=where, face_encoder=encoder)
    expected = ours("sd1", InstantID(narrow, feature, POINTS, net))
    assert (ours("sd1", told) - expected).abs().max() <= 1e-5
    # The folder, with everything in it.
    folder = write_instant_id(unet, tmp_path / "instant_id")
    save_file(narrow, str(folder / "ip-adapter.safetensors"))
    encoder.save_pretrained(folder / "face_encoder")
    mine = ours("sd1", InstantID(folder, image=[picture()], image_keypoints=[where], keypoints=POINTS))
    assert (mine - expected).abs().max() <= 1e-4


def test_mask_confines_both_parts() -> None:
    """White is no mask. One part at a time: where the other half is the first step's prediction stays."""
    file, net = tiny_instant_id(tiny_sd1().unet)
    full = ours("sd1", InstantID(file, vector(), POINTS, net))
    white = ours("sd1", InstantID(file, vector(), POINTS, net, mask=Image.new("L", (8, 8), 255)))
    torch.testing.assert_close(full, white, atol=1e-5, rtol=1e-5)
    parts: list[dict[str, Any]] = [{"identity_scale": 0.0}, {"controlnet_scale": 0.0}]
    for part in parts:
        left = ours("sd1", InstantID(file, vector(), POINTS, net, mask=half(), **part))
        right = ours("sd1", InstantID(file, vector(), POINTS, net, mask=1 - half(), **part))
        assert (left - right).abs().max() > 1e-3
        assert (left - ours("sd1", InstantID(file, vector(), POINTS, net, **part))).abs().max() > 1e-3


def test_with_the_others(tmp_path: Path) -> None:
    """A ControlNet's pose, an IP-Adapter and a LoRA in one run: any order, and none of them goes missing."""
    source = tiny_sd1()
    file, net = tiny_instant_id(source.unet)
    tiny_lora(tmp_path / "lora.safetensors", tiny_sd1)
    controls = [
        InstantID(file, vector(), POINTS, net),
        ControlNet(tiny_controlnet(source.unet), picture(1)),
        IPAdapter(tiny_ip_adapter(source.unet), picture(2), image_encoder=tiny_image_encoder(), scale=0.5),
        LoRA(tmp_path / "lora.safetensors", 0.8),
    ]
    whole = ours("sd1", *controls)
    torch.testing.assert_close(ours("sd1", *controls[::-1]), whole, atol=1e-4, rtol=1e-4)
    for i in range(4):
        assert (ours("sd1", *controls[:i], *controls[i + 1 :]) - whole).abs().max() > 1e-3


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(tiny_sd1())


@pytest.fixture(scope="module")
def folder(pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_instant_id(pipe.unet, tmp_path_factory.mktemp("models") / "instant_id")


def draw(pipe: Pipeline, *controls: Any, **settings: Any) -> Any:
    return pipe(**{"prompt": "a red cat", "seed": 5, **DRAW, **settings}, controls=list(controls))


@pytest.mark.parametrize(
    "settings",
    [
        {"scale": 0.0},
        {"start": 0.9, "end": 0.95},
        {"identity_scale": 0.0, "controlnet_scale": 0.0},
        {"identity_scale": 0.0, "keypoints": None},
    ],
)
def test_neutral_is_absence_bit_for_bit_and_free(pipe: Pipeline, folder: Path, settings: dict[str, Any]) -> None:
    plain = draw(pipe)
    neutral = draw(pipe, InstantID(**{"model": folder, "face_embeds": vector(), "keypoints": POINTS, **settings}))
    assert torch.equal(plain.images, neutral.images)
    assert plain.manifest["cost"] == neutral.manifest["cost"]
    assert list(neutral.manifest["dropped"]) == ["InstantID"]


def test_small_scale_is_close_to_absence_and_costs_the_side_network(pipe: Pipeline, folder: Path) -> None:
    plain, small = draw(pipe), draw(pipe, InstantID(folder, vector(), POINTS, scale=1e-4))
    assert 0 < (plain.images - small.images).abs().max() < 1e-2 * plain.images.std()
    assert small.manifest["cost"] == {**plain.manifest["cost"], "side_rows": 6, "side_passes": 3}


def test_without_a_place_only_the_tokens_act(pipe: Pipeline, folder: Path) -> None:
    alone = draw(pipe, InstantID(folder, vector()))
    assert alone.manifest["cost"]["side_rows"] == 0
    silent = draw(pipe, InstantID(folder, vector(), POINTS, controlnet_scale=0.0))
    assert torch.equal(alone.images, silent.images)
    as_adapter = adapter_from_tensors(tiny_instant_id(pipe.unet)[0], pipe.unet)
    assert (draw(pipe, InstantID(as_adapter, vector())).images - alone.images).abs().max() < 1e-4


BAD_INPUT: dict[str, tuple[dict[str, Any], str]] = {
    "neither": ({"face_embeds": None}, "one of them"),
    "both": ({"image": picture()}, "one of them"),
    "width": ({"face_embeds": torch.ones(31)}, "shape"),
    "kind": ({"face_embeds": 3}, "vector of floats"),
    "nan": ({"face_embeds": torch.full((32,), float("nan"))}, "finite"),
    "prompts": ({"face_embeds": [vector(0), vector(1)]}, "2 prompts"),
    "uneven": ({"face_embeds": [vector(0), vector(1, 2)]}, "as many"),
    "no file": ({"face_embeds": "nowhere.npy"}, "cannot be read"),
    "no vector": ({"face_embeds": "anna.txt"}, "npy"),
    "points": ({"keypoints": np.zeros((4, 2))}, "condition|points"),
    "places": ({"keypoints": [POINTS, POINTS]}, "2 conditions"),
    "no face": ({"keypoints": Pose(np.ones((18, 2)), np.eye(18)[0], 32, 32)}, "no face"),
    "black mask": ({"mask": torch.zeros(8, 8)}, "black"),
    "unknown": ({"weight": 1.0}, "weight"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(pipe: Pipeline, folder: Path, case: str) -> None:
    settings, message = BAD_INPUT[case]
    with pytest.raises(InputError, match=message):
        draw(pipe, InstantID(**{"model": folder, "face_embeds": vector(), "keypoints": POINTS, **settings}))


def test_bad_models(pipe: Pipeline, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle/ip-adapter.bin").write_bytes(b"")
    (tmp_path / "alone").mkdir()
    file, net = tiny_instant_id(pipe.unet)
    save_file(file, str(tmp_path / "alone/ip-adapter.safetensors"))
    xl = tiny_instant_id(BACKBONES["sdxl"]().unet)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": tmp_path / "pickle"}, "controlroom convert"),
        ({"model": tmp_path / "alone"}, "no IdentityNet"),
        ({"model": file}, "controlnet="),
        ({"model": tiny_ip_adapter(pipe.unet), "controlnet": net}, "IPAdapter"),
        ({"model": xl[0], "controlnet": net}, "another base model"),
        ({"controlnet": xl[1]}, "another base model"),
        ({"controlnet": tiny_controlnet(pipe.unet, conditioning_channels=4)}, "4 channels"),
        ({"model": {**file, "extra": torch.ones(1)}, "controlnet": net}, "extra"),
        ({"model": 3}, "int"),
        ({"face_embeds": None, "image": picture()}, "face_encoder="),
        ({"face_embeds": None, "image": picture(), "face_encoder": tiny_image_encoder()}, "24 wide"),
    ]
    for settings, message in cases:
        given = {"model": folder, "face_embeds": vector(), "keypoints": POINTS, **settings}
        with pytest.raises((ModelError, InputError), match=message):
            draw(pipe, InstantID(**given))
