"""MS-Diffusion against a plain transcription of the published networks and masked attention, and what it promises."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from controlroom.backbones.ms_diffusion import grounded_attention, inside_boxes, ms_diffusion_from_tensors
from controlroom.controls.regions.ms_diffusion import MSDiffusion
from controlroom.controls.regions.multidiffusion import MultiDiffusion
from controlroom.core.errors import InputError, ModelError
from controlroom.sampling.pipeline import Pipeline
from tests.controls.nets import tiny_image_encoder, tiny_ms_diffusion
from tests.tiny import BACKBONES, LENGTH

DRAW: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}
BOXES = [(0.0, 0.25, 0.45, 0.8), (0.3, 0.1, 1.0, 0.75)]
WORDS = ["cat", "red dog"]
DUMMIES, TOKENS = 4, 3


def picture(seed: int = 0, size: tuple[int, int] = (50, 40)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


PICTURES = [picture(0), picture(1, (33, 64))]


@pytest.fixture(scope="module")
def encoder() -> Any:
    return tiny_image_encoder()


# The published method, transcribed: nothing of the package but the tensors of a file.


def norm(file: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], file[f"{name}.weight"], file[f"{name}.bias"])


def linear(file: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, file[f"{name}.weight"], file.get(f"{name}.bias"))


def published_tokens(file: dict[str, Tensor], states: Tensor, box: Any, phrase: Tensor, grounded: bool) -> Tensor:
    """[tokens, width] of one subject: its states [length, 32], its box, its phrase's embedding [32]."""
    if grounded:
        angles = [[100 ** (k / 8) * side for side in box] for k in range(8)]
        waves = [f(angle) for row in angles for f in (math.sin, math.cos) for angle in row]
        query = torch.cat([phrase, torch.tensor(waves)])
        query = linear(file, "image_proj.latent_proj.2", F.gelu(linear(file, "image_proj.latent_proj.0", query)))
        query = norm(file, "image_proj.latent_norm", query.view(TOKENS, -1))
    else:
        query = file["image_proj.grounding_latents"][0]
    seen = linear(file, "image_proj.proj_in", states)
    for i in range(2):
        layer = f"image_proj.layers.{i}"
        mine, theirs = norm(file, f"{layer}.0.norm2", query), norm(file, f"{layer}.0.norm1", seen)
        both = torch.cat([theirs, mine])
        k, v = linear(file, f"{layer}.0.to_kv", both).chunk(2, dim=-1)
        q, found = linear(file, f"{layer}.0.to_q", mine), []
        for head in range(2):
            part = slice(64 * head, 64 * head + 64)
            found.append(((q[:, part] @ k[:, part].T) / 8).softmax(-1) @ v[:, part])
        query = query + linear(file, f"{layer}.0.to_out", torch.cat(found, dim=-1))
        inner = F.gelu(linear(file, f"{layer}.1.1", norm(file, f"{layer}.1.0", query)))
        query = query + linear(file, f"{layer}.1.3", inner)
    query = linear(file, "image_proj.proj_out", norm(file, "image_proj.attention_norm", query))
    return norm(file, "image_proj.norm_out", query)


class Published:
    """Masked multi-subject cross-attention of one layer: probabilities and masks materialised, heads one by one."""

    def __init__(self, file: dict[str, Tensor], number: int, tokens: Tensor, boxes: Any, scale: Any, off: int) -> None:
        self.file, self.number, self.tokens, self.boxes, self.scale, self.off = file, number, tokens, boxes, scale, off

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **other: Any) -> Tensor:
        rows, queries, _ = hidden_states.shape
        side, subjects = math.isqrt(queries), len(self.boxes)
        allowed = torch.zeros(queries, DUMMIES + subjects * TOKENS)
        for y in range(side):
            for x in range(side):
                for n, (left, top, right, bottom) in enumerate(self.boxes):
                    across = math.floor(left * side) <= x < math.ceil(right * side)
                    if across and math.floor(top * side) <= y < math.ceil(bottom * side):
                        first = DUMMIES + n * TOKENS
                        allowed[y * side + x, first : first + TOKENS] = 1
        background = allowed.sum(1) == 0
        allowed[background, :DUMMIES] = 1
        q, k, v = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        more_k = self.tokens @ self.file[f"ms_adapter.{self.number}.to_k_ip.weight"].T
        more_v = self.tokens @ self.file[f"ms_adapter.{self.number}.to_v_ip.weight"].T
        width, found = q.shape[-1] // attn.heads, torch.zeros_like(q)
        each = torch.tensor(self.scale if isinstance(self.scale, list) else [self.scale] * subjects)
        factors = torch.cat([torch.ones(DUMMIES), each.repeat_interleave(TOKENS)])
        for row in range(rows):
            for head in range(attn.heads):
                part = slice(head * width, (head + 1) * width)
                words = (q[row, :, part] @ k[row, :, part].T * width**-0.5).softmax(-1)
                found[row, :, part] = words @ v[row, :, part]
                if row >= self.off:
                    shown = (q[row, :, part] @ more_k[:, part].T * width**-0.5 + (1 - allowed) * -10000.0).softmax(-1)
                    shown = torch.where(background[:, None], 0.0, shown) * factors
                    found[row, :, part] += shown @ more_v[:, part]
        return attn.to_out[0](found)


@torch.no_grad()
def theirs(kind: str, encoder: Any, words: list[str] | None = WORDS, scale: Any = 0.7, **settings: Any) -> Tensor:
    from transformers import CLIPImageProcessor

    pipe = BACKBONES[kind]()
    pipe.set_progress_bar_config(disable=True)
    file = tiny_ms_diffusion(pipe.unet)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixels = processor([one.resize((512, 512)) for one in PICTURES], return_tensors="pt").pixel_values
    states = encoder(pixels, output_hidden_states=True).hidden_states[-2]
    ids = pipe.tokenizer(words or WORDS, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    phrases = pipe.text_encoder(ids).pooler_output
    subjects = [published_tokens(file, s, b, p, bool(words)) for s, b, p in zip(states, BOXES, phrases, strict=True)]
    tokens = torch.cat([file["dummy_image_tokens"][0], *subjects])
    processors, number = {}, 0
    for name, processor in pipe.unet.attn_processors.items():
        cross = name.endswith("attn2.processor")
        processors[name] = Published(file, number, tokens, BOXES, scale, 1) if cross else processor
        number += 1
    pipe.unet.set_attn_processor(processors)
    drawn = {"prompt": "a cat and a red dog", "guidance_scale": 5.0, **DRAW, **settings}
    return pipe(**drawn, generator=torch.Generator().manual_seed(3)).images


def ours(kind: str, encoder: Any, settings: dict[str, Any] | None = None, **control: Any) -> Tensor:
    pipe = Pipeline.from_diffusers(BACKBONES[kind]())
    made = {"images": PICTURES, "boxes": BOXES, "words": WORDS, "scale": 0.7, "image_encoder": encoder, **control}
    drawn = {"prompt": "a cat and a red dog", "guidance_scale": 5.0, **DRAW, **(settings or {})}
    controls = [MSDiffusion(tiny_ms_diffusion(pipe.unet), **made)]
    return pipe(**drawn, controls=controls, generator=torch.Generator().manual_seed(3)).images


@pytest.mark.parametrize(
    ("kind", "control"),
    [
        ("sd1", {}),
        ("sdxl", {}),
        ("sd2", {}),
        ("sd1", {"words": None}),
        ("sd1", {"scale": [0.9, 0.3]}),
    ],
)
def test_latents_equal_the_published_equations(kind: str, control: dict[str, Any], encoder: Any) -> None:
    reference = theirs(kind, encoder, **control)
    plain = Pipeline.from_diffusers(BACKBONES[kind]())
    settings = {"prompt": "a cat and a red dog", "guidance_scale": 5.0, **DRAW}
    without = plain(**settings, generator=torch.Generator().manual_seed(3)).images
    mine = ours(kind, encoder, **control)
    assert torch.isfinite(reference).all()
    assert (mine - reference).abs().max() <= 1e-4 * reference.std()
    assert (mine - without).abs().max() > 0.05 * reference.std()


def test_the_training_attention_is_that_of_a_run(encoder: Any) -> None:
    """`grounded_attention` in the UNet of one row equals the published attention."""
    unet = BACKBONES["sd1"]().unet
    file = tiny_ms_diffusion(unet)
    model = ms_diffusion_from_tensors(file, unet)
    generator = torch.Generator().manual_seed(0)
    latents, words = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, LENGTH, 32, generator=generator)
    features, phrases = torch.randn(1, 2, 17, 32, generator=generator), torch.randn(1, 2, 32, generator=generator)
    with torch.no_grad():
        tokens = model.prompt(features, torch.tensor([BOXES]), phrases)
        with grounded_attention(unet, model, tokens, inside_boxes(BOXES, (16, 16))[None]):
            mine = unet(latents, 500, words).sample
        plain = unet(latents, 500, words).sample
        numbers = {name: n for n, name in enumerate(unet.attn_processors)}
        unet.set_attn_processor(
            {
                name: Published(file, numbers[name], tokens[0], BOXES, 1.0, 0) if "attn2" in name else processor
                for name, processor in unet.attn_processors.items()
            }
        )
        reference = unet(latents, 500, words).sample
    assert (mine - reference).abs().max() <= 1e-4 * reference.std()
    assert (plain - reference).abs().max() > 0.05 * reference.std()


# What every control promises.


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(BACKBONES["sd1"]())


@pytest.fixture(scope="module")
def folder(pipe: Pipeline, encoder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ms")
    save_file(tiny_ms_diffusion(pipe.unet), place / "ms_adapter.safetensors")
    encoder.save_pretrained(place / "image_encoder")
    return place


def control(folder: Path, **settings: Any) -> MSDiffusion:
    return MSDiffusion(**{"model": folder, "images": PICTURES, "boxes": BOXES, "words": WORDS, **settings})


def draw(pipe: Pipeline, *controls: Any, **settings: Any) -> Any:
    return pipe(**{"prompt": "a red cat", "seed": 5, **DRAW, **settings}, controls=list(controls))


@pytest.mark.parametrize("settings", [{"scale": 0.0}, {"scale": [0.0, 0.0]}, {"start": 0.9, "end": 0.95}])
def test_neutral_is_absence_bit_for_bit_and_free(pipe: Pipeline, folder: Path, settings: dict[str, Any]) -> None:
    plain, neutral = draw(pipe), draw(pipe, control(folder, **settings))
    assert torch.equal(plain.images, neutral.images)
    assert plain.manifest["cost"] == neutral.manifest["cost"]


def test_small_scale_is_close_to_absence_and_costs_no_rows(pipe: Pipeline, folder: Path) -> None:
    plain, small = draw(pipe), draw(pipe, control(folder, scale=1e-4))
    assert 0 < (plain.images - small.images).abs().max() < 1e-2 * plain.images.std()
    assert small.manifest["cost"] == plain.manifest["cost"]


def test_file_mapping_and_module_are_the_same(pipe: Pipeline, folder: Path, encoder: Any) -> None:
    expected = draw(pipe, control(folder)).images
    flat = tiny_ms_diffusion(pipe.unet)
    nested: dict[str, Any] = {"image_proj": {}, "ms_adapter": {}, "dummy_image_tokens": flat["dummy_image_tokens"]}
    for key, value in flat.items():
        group, _, rest = key.partition(".")
        if rest:
            nested[group][rest] = value
    for model in (nested, flat, ms_diffusion_from_tensors(flat, pipe.unet)):
        again = draw(pipe, control(folder, model=model, image_encoder=encoder)).images
        assert (again - expected).abs().max() < 1e-4 * expected.std()


def test_a_subject_changes_only_what_its_box_reaches_first(pipe: Pipeline, folder: Path) -> None:
    """In one layer: queries outside of a box get exactly what they got without it."""
    model = ms_diffusion_from_tensors(tiny_ms_diffusion(pipe.unet), pipe.unet)
    inside = inside_boxes([(0.0, 0.0, 0.5, 1.0), (0.26, 0.0, 0.74, 0.5)], (4, 4))
    assert inside[1].tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    bias, anywhere = model.seen(inside.flatten(1)[None])
    assert anywhere.view(4, 4).tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    free = (bias[0, 0] == 0).view(4, 4, -1)
    assert free[0, 0].tolist() == [False] * 4 + [True] * 3 + [False] * 3
    assert free[0, 1].tolist() == [False] * 4 + [True] * 6
    assert free[0, 3].tolist() == [True] * 4 + [False] * 6


def test_pictures_of_each_prompt(pipe: Pipeline, folder: Path) -> None:
    pairs = [[picture(0), picture(1)], [picture(2), picture(3)]]
    settings = {"prompt": ["cat", "dog"], "scheduler": "ddim"}
    together = draw(pipe, control(folder, images=pairs), **settings).images
    for i, prompt in enumerate(settings["prompt"]):
        alone = draw(pipe, control(folder, images=pairs[i]), prompt=prompt, seed=5 + i).images
        assert (together[i : i + 1] - alone).abs().max() < 1e-4 * max(1.0, alone.std().item())


def test_pictures_that_are_not_square(pipe: Pipeline, folder: Path) -> None:
    """Latents of 16 x 24 and an odd size."""
    for size in ({"height": 32, "width": 48}, {"height": 34, "width": 32}):
        drawn, plain = draw(pipe, control(folder), **size).images, draw(pipe, **size).images
        assert torch.isfinite(drawn).all()
        assert (drawn - plain).abs().max() > 1e-2


def test_boxes_follow_the_views_of_a_canvas(pipe: Pipeline, folder: Path) -> None:
    """One window that is the whole canvas changes nothing; with several, views in turns are views at once."""
    views = MultiDiffusion(window=8, stride=4)
    whole = MultiDiffusion(window=16, stride=16)
    alone = draw(pipe, control(folder)).images
    torch.testing.assert_close(draw(pipe, control(folder), whole).images, alone, atol=1e-4, rtol=1e-4)
    at_once = draw(pipe, control(folder), views).images
    in_turns = draw(pipe, control(folder), MultiDiffusion(window=8, stride=4, view_batch_size=2)).images
    torch.testing.assert_close(at_once, in_turns, atol=1e-4, rtol=1e-4)
    assert (at_once - draw(pipe, views).images).abs().max() > 1e-2


BAD_INPUT: dict[str, tuple[dict[str, Any], str]] = {
    "too few boxes": ({"boxes": BOXES[:1]}, "2 pictures for 1 boxes"),
    "nothing": ({"images": [], "boxes": [], "words": None}, "at least one"),
    "words": ({"words": ["cat"]}, "name for each"),
    "no word": ({"words": ["cat", " "]}, "name for each"),
    "scales": ({"scale": [1.0]}, "1 numbers for 2"),
    "empty box": ({"boxes": [BOXES[0], (0.5, 0.2, 0.5, 0.9)]}, "left < right"),
    "outside": ({"boxes": [BOXES[0], (0.5, 0.2, 1.1, 0.9)]}, "from 0 to 1"),
    "nan": ({"boxes": [BOXES[0], (0.5, 0.2, float("nan"), 0.9)]}, "boxes"),
    "missing": ({"images": ["nowhere.png", picture()]}, "does not exist"),
    "uneven": ({"images": [PICTURES, PICTURES[:1]]}, "one box for each"),
    "prompts": ({"images": [PICTURES, PICTURES]}, "2 prompts"),
    "one picture": ({"images": "nowhere.png"}, "images"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(pipe: Pipeline, folder: Path, case: str) -> None:
    settings, message = BAD_INPUT[case]
    with pytest.raises(InputError, match=message):
        draw(pipe, control(folder, **settings))


def test_bad_models(pipe: Pipeline, folder: Path, encoder: Any, tmp_path: Path) -> None:
    good = tiny_ms_diffusion(pipe.unet)
    latents = "image_proj.grounding_latents"
    other = torch.nn.Module()
    cases: list[tuple[Any, str]] = [
        ("ms_adapter.bin", "pickle"),
        (tmp_path, "one .safetensors file"),
        ({key: value for key, value in good.items() if key != latents}, "grounding_latents"),
        ({key: value for key, value in good.items() if key != "dummy_image_tokens"}, "dummy_image_tokens"),
        ({**good, "image_proj.latents": torch.zeros(1)}, "image_proj.latents"),
        ({**good, "image_proj.norm_out.bias": torch.zeros(7)}, "norm_out.bias"),
        ({key: value for key, value in good.items() if "ms_adapter.11" not in key}, "another base model"),
        (tiny_ms_diffusion(BACKBONES["sdxl"]().unet), "another base model"),
        ({**good, latents: "x"}, "tensors"),
        (other, "Module"),
    ]
    for model, message in cases:
        with pytest.raises(ModelError, match=message):
            draw(pipe, control(folder, model=model, image_encoder=encoder))
    with pytest.raises(ModelError, match="Give it too"):
        draw(pipe, control(folder, model=good))
    with pytest.raises(ModelError, match="CLIPVisionModelWithProjection"):
        draw(pipe, control(folder, image_encoder=pipe.unet))
