"""KOSMOS-G against its published computation, written out here with weights alone, and what it promises.

Sequences are put together token by token, every layer is plain functions with its probabilities materialised, and the
loop is a run of the same latents with what the network should be told.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from controlroom.backbones.image_encoder import clip_pixels
from controlroom.backbones.kosmos import FILE, KosmosReader, find_kosmos, load_kosmos
from controlroom.backbones.multimodal import sequences
from controlroom.backbones.words import prompt_tokens
from controlroom.controls.personal.ip_adapter import IPAdapter
from controlroom.controls.personal.kosmos_g import InterleavedPrompt, KosmosG
from controlroom.controls.personal.textual_inversion import TextualInversion
from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.core.errors import ConflictError, InputError, ModelError
from controlroom.sampling.pipeline import Pipeline
from tests.controls.loras import tiny_word
from tests.controls.nets import tiny_controlnet, tiny_image_encoder, tiny_ip_adapter, tiny_kosmos
from tests.tiny import BACKBONES, tiny_sd1, tiny_tokenizer

PROMPT = "a red <image> on the <image> beach"
DRAW: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent", "seed": 5}


def picture(seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((40, 32), Image.Resampling.BICUBIC)


# The published computation.


class Weights:
    """Weights below a name."""

    def __init__(self, state: dict[str, Tensor], prefix: str = "") -> None:
        self.state, self.prefix = state, prefix

    def at(self, name: str) -> Weights:
        return Weights(self.state, f"{self.prefix}{name}.")

    def __getitem__(self, name: str) -> Tensor:
        return self.state[self.prefix + name]

    def linear(self, x: Tensor, name: str) -> Tensor:
        found = x @ self[f"{name}.weight"].T
        return found + self[f"{name}.bias"] if f"{self.prefix}{name}.bias" in self.state else found

    def norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self[f"{name}.weight"] + self[f"{name}.bias"]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, hidden: Tensor | None = None) -> Tensor:
    """[L, w] each -> [L, w], head by head."""
    width, parts = q.shape[-1] // heads, []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = q[:, part] @ k[:, part].T / width**0.5
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        parts.append(scores.softmax(-1) @ v[:, part])
    return torch.cat(parts, dim=-1)


def torch_attention(w: Weights, x: Tensor, read: Tensor, heads: int) -> Tensor:
    """With the joined matrices of torch's layers."""
    matrices, biases = w["in_proj_weight"].chunk(3), w["in_proj_bias"].chunk(3)
    q, k, v = (y @ m.T + b for y, m, b in zip((x, read, read), matrices, biases, strict=True))
    return w.linear(attend(q, k, v, heads), "out_proj")


def feed(w: Weights, x: Tensor) -> Tensor:
    return w.linear(torch.nn.functional.gelu(w.linear(x, "linear1")), "linear2")


def reading(w: Weights, x: Tensor, layers: int, heads: int) -> Tensor:
    for number in range(layers):
        layer = w.at(f"layers.{number}")
        y = layer.norm(x, "norm1")
        x = x + torch_attention(layer.at("self_attn"), y, y, heads)
        x = x + feed(layer, layer.norm(x, "norm2"))
    return w.norm(x, "norm")


def writing(w: Weights, x: Tensor, read: Tensor, layers: int, heads: int) -> Tensor:
    for number in range(layers):
        layer = w.at(f"layers.{number}")
        y = layer.norm(x, "norm1")
        x = x + torch_attention(layer.at("self_attn"), y, y, heads)
        x = x + torch_attention(layer.at("multihead_attn"), layer.norm(x, "norm2"), read, heads)
        x = x + feed(layer, layer.norm(x, "norm3"))
    return w.norm(x, "norm")


def turned(x: Tensor, heads: int) -> Tensor:
    """Rotary positions."""
    length, width = x.shape[0], x.shape[1] // heads
    angles = torch.arange(length)[:, None] * 10000 ** (-torch.arange(0, width, 2) / width)[None]
    parts = []
    for head in x.split(width, dim=-1):
        first, second = head[:, : width // 2], head[:, width // 2 :]
        cos, sin = angles.cos(), angles.sin()
        parts.append(torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1))
    return torch.cat(parts, dim=-1)


def language(w: Weights, x: Tensor, layers: int, heads: int) -> Tensor:
    def rms(y: Tensor, scale: Tensor) -> Tensor:
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale

    later = torch.ones(len(x), len(x)).triu(1).bool()
    for number in range(layers):
        layer = w.at(f"layers.{number}")
        y = rms(x, layer["input_layernorm.weight"])
        q, k, v = (layer.linear(y, f"self_attn.{name}_proj") for name in "qkv")
        x = x + layer.linear(attend(turned(q, heads), turned(k, heads), v, heads, later), "self_attn.o_proj")
        y = rms(x, layer["post_attention_layernorm.weight"])
        gate = layer.linear(y, "mlp.gate_proj")
        x = x + layer.linear(gate * gate.sigmoid() * layer.linear(y, "mlp.up_proj"), "mlp.down_proj")
    return rms(x, w["norm.weight"])


def seen_by(w: Weights, states: Tensor, heads: int, eye_heads: int) -> Tensor:
    """States of a picture [L, reads] -> its vectors."""
    block = w.at("eye.block")
    y = block.norm(states, "layer_norm1")
    q, k, v = (block.linear(y, f"self_attn.{name}_proj") for name in "qkv")
    states = states + block.linear(attend(q, k, v, eye_heads), "self_attn.out_proj")
    y = block.linear(block.norm(states, "layer_norm2"), "mlp.fc1")
    states = states + block.linear(y * (1.702 * y).sigmoid(), "mlp.fc2")
    states = w.at("eye").norm(states, "norm")
    own = w.at("connector")
    read = torch.cat([own.linear(states, "dense"), own["queries"]])
    return torch_attention(own.at("attention"), own["queries"], read, heads)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """With start and end."""
    return tokenizer(text).input_ids


def language_states(reader: KosmosReader, said: str, pictures: list[Image.Image]) -> Tensor:
    """[M, width] of one text, put together token by token."""
    w, shape = Weights(reader.model.state_dict()), reader.model.shape
    table, rest = w["language.embed_tokens.weight"], list(pictures)
    vectors = [table[ids_of(tiny_tokenizer(), "")[0]]]
    for word in said.split():
        if word != "<image>":
            vectors += [table[i] for i in ids_of(tiny_tokenizer(), word)[1:-1]]
            continue
        pixels = clip_pixels([rest.pop(0)], 32)
        states = reader.image_encoder(pixels, output_hidden_states=True).hidden_states[-2][0]
        own = seen_by(w, states, shape.heads, shape.eye_heads)
        vectors += [table[shape.words], *own, table[shape.words + 1]]
    return language(w.at("language"), torch.stack(vectors), shape.layers, shape.heads)


def aligned(reader: KosmosReader, states: Tensor) -> Tensor:
    w, shape = Weights(reader.model.state_dict(), "aligner.encoder."), reader.model.shape
    read = w.linear(states, "proj_in") + w["positions"][: len(states)]
    read = reading(w.at("reader"), read, shape.aligner_layers, shape.aligner_heads)
    return writing(w.at("writer"), w["queries"], read, shape.aligner_layers, shape.aligner_heads)


@torch.no_grad()
def published(reader: KosmosReader, said: str, pictures: list[Image.Image]) -> Tensor:
    return aligned(reader, language_states(reader, said, pictures))


# The network.


@pytest.fixture(scope="module")
def source() -> Any:
    return tiny_sd1()


@pytest.fixture(scope="module")
def pipe(source: Any) -> Pipeline:
    return Pipeline.from_diffusers(source)


@pytest.fixture(scope="module")
def reader(source: Any) -> KosmosReader:
    return tiny_kosmos(source)


def test_what_is_told_equals_the_published_computation(reader: KosmosReader) -> None:
    pictures = [picture(1), picture(2), picture(3)]
    texts = [PROMPT, "the <image> dog", "night"]
    with torch.no_grad():
        told = reader(tiny_tokenizer(), texts, clip_pixels(pictures, 32))
    expected = [published(reader, PROMPT, pictures[:2]), published(reader, texts[1], pictures[2:])]
    expected.append(published(reader, "night", []))
    for row, wanted in zip(told, expected, strict=True):
        assert (row - wanted).abs().max() < 1e-4 * wanted.std()
    assert (told[0] - published(reader, PROMPT, pictures[1::-1])).abs().max() > 1e-2 * told.std()


@torch.no_grad()
def test_the_two_losses_of_alignment_equal_the_published(reader: KosmosReader) -> None:
    texts, target = ["a red cat on the beach", "dog"], torch.randn(2, 16, 32)
    read = sequences(tiny_tokenizer(), texts, reader.model.shape)
    there, back, found = reader.model.aligner.losses(reader.model.states(read), read.seen, target)
    w, shape = Weights(reader.model.state_dict(), "aligner.decoder."), reader.model.shape
    for row, text in enumerate(texts):
        states = language_states(reader, text, [])
        clip = aligned(reader, states)
        assert (found[row] - clip).abs().max() < 1e-4 * clip.std()
        assert there[row] == pytest.approx(float((clip - target[row]).square().mean()), rel=1e-4)
        if len(states) < read.ids.shape[1]:
            continue  # the way back sees how long the longest text is
        written = writing(w.at("writer"), w["queries"][: len(states)], clip, shape.aligner_layers, shape.aligner_heads)
        read_again = reading(
            w.at("reader"), written + w["positions"][: len(states)], shape.aligner_layers, shape.aligner_heads
        )
        again = w.linear(read_again, "proj_out")
        wanted = float((again - states).square().mean()) * 16 / len(states)
        assert back[row] == pytest.approx(wanted, rel=1e-3)


def test_files_say_everything_and_are_read_completely(reader: KosmosReader, pipe: Pipeline, tmp_path: Path) -> None:
    reader.save(tmp_path)
    again = find_kosmos(str(tmp_path), pipe.backbone)
    assert again.model.shape == reader.model.shape
    for key, value in reader.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
    assert find_kosmos(str(tmp_path), pipe.backbone) is again
    stored = load_file(tmp_path / FILE)
    about = {"kosmos_g": reader.model.shape.model_dump_json()}
    first = next(iter(stored))

    def refused(message: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        save_file(tensors, tmp_path / FILE, metadata or about)
        with pytest.raises(ModelError, match=message):
            load_kosmos(tmp_path, pipe.backbone)

    refused("nothing reads, such as 'more'", {**stored, "more": torch.zeros(1)})
    refused(f"lacks '{first}'", {k: v for k, v in stored.items() if k != first})
    refused("has ", {**stored, first: torch.zeros(3)})
    refused("does not say the sizes", stored, {"format": "pt"})
    save_file(stored, tmp_path / FILE, about)
    (tmp_path / "image_encoder/config.json").unlink()
    with pytest.raises(ModelError, match="image_encoder"):
        load_kosmos(tmp_path, pipe.backbone)
    with pytest.raises(ModelError, match=FILE):
        find_kosmos(str(tmp_path / "image_encoder"), pipe.backbone)
    with pytest.raises(ModelError, match="another base model"):
        find_kosmos(tiny_kosmos(BACKBONES["sdxl"]()), pipe.backbone)
    with pytest.raises(ModelError, match="wide"):
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        config = CLIPVisionConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, image_size=16)
        KosmosReader(reader.model, CLIPVisionModelWithProjection(config))


# The control.


def draw(pipe: Pipeline, *controls: Any, prompt: Any = PROMPT, **settings: Any) -> Any:
    return pipe(prompt, controls=list(controls), **{**DRAW, **settings})


@pytest.mark.parametrize("negative", [None, "a blue hat"])
def test_a_run_equals_one_that_is_told_the_published_states(
    pipe: Pipeline, reader: KosmosReader, negative: str | None
) -> None:
    pictures = [picture(1), picture(2)]
    run = draw(pipe, KosmosG(reader, pictures), negative_prompt=negative).images
    told = published(reader, PROMPT, pictures)[None]
    null = published(reader, negative or "", [])[None]
    expected = pipe(prompt_embeds=told, negative_prompt_embeds=null, **DRAW).images
    assert (run - expected).abs().max() < 1e-4 * expected.std()
    assert (run - draw(pipe, prompt="a red on the beach").images).abs().max() > 1e-2


def test_several_prompts_with_pictures_of_their_own(pipe: Pipeline, reader: KosmosReader) -> None:
    prompts, lists = [PROMPT, "<image> <image> dog"], [[picture(1), picture(2)], [picture(3), picture(1)]]
    both = draw(pipe, KosmosG(reader, lists), prompt=prompts).images
    told = torch.stack([published(reader, *pair) for pair in zip(prompts, lists, strict=True)])
    null = published(reader, "", [])[None].repeat(2, 1, 1)
    expected = pipe(prompt_embeds=told, negative_prompt_embeds=null, **DRAW).images
    assert (both - expected).abs().max() < 1e-4 * expected.std()
    before = draw(pipe, KosmosG(reader, lists[1]), prompt="dog").images
    assert torch.equal(before, draw(pipe, KosmosG(reader, lists[1]), prompt=prompts[1]).images)


def test_neutral_is_absence_and_small_scales_are_close(pipe: Pipeline, reader: KosmosReader) -> None:
    words = "a red cat"
    plain = draw(pipe, prompt=words)
    for silent in (KosmosG(reader, picture(1), 0.0), KosmosG(reader), KosmosG(reader, [])):
        found = draw(pipe, silent, prompt=words)
        assert torch.equal(found.images, plain.images) and found.manifest["cost"] == plain.manifest["cost"]
    shown = draw(pipe, KosmosG(reader, picture(1), 0.0), prompt="a red <image> cat").images
    assert torch.equal(shown, plain.images)
    small, whole = (draw(pipe, KosmosG(reader, picture(1), s), prompt=words) for s in (1e-4, 1.0))
    assert 0 < (small.images - plain.images).abs().max() < 1e-2 * plain.images.std()
    assert (whole.images - plain.images).abs().max() > 1e-2
    assert whole.manifest["cost"] == plain.manifest["cost"]


def test_with_others(pipe: Pipeline, source: Any, reader: KosmosReader) -> None:
    kosmos = KosmosG(reader, [picture(1), picture(2)])
    net = ControlNet(tiny_controlnet(source.unet), picture(3))
    adapter = IPAdapter(tiny_ip_adapter(source.unet), picture(4), image_encoder=tiny_image_encoder())
    every = draw(pipe, kosmos, net, adapter).images
    for some in ([kosmos, net], [kosmos, adapter], [net, adapter]):
        assert (every - draw(pipe, *some, prompt=PROMPT if kosmos in some else "a red").images).abs().max() > 1e-3
    with pytest.raises(ConflictError, match="KosmosG"):
        draw(pipe, kosmos, TextualInversion(tiny_word(source), token="ed"))


def test_words_are_where_they_would_be_if_pictures_were_words() -> None:
    found = prompt_tokens(tiny_tokenizer(), InterleavedPrompt.of(PROMPT))
    assert str(found.text) == "a red on the beach"
    assert found.find("red") == ((2,),) and found.find("on the") == ((4, 5),) and found.find("beach") == ((7,),)


def test_bad_input(pipe: Pipeline, reader: KosmosReader) -> None:
    kosmos = KosmosG(reader, picture(1))
    with pytest.raises(InputError, match="2 times <image>, and there are 1 pictures"):
        draw(pipe, kosmos)
    with pytest.raises(InputError, match="0 pictures"):
        draw(pipe, KosmosG(reader))
    with pytest.raises(InputError, match="as text"):
        pipe(prompt_embeds=torch.randn(1, 16, 32), controls=[kosmos], **DRAW)
    with pytest.raises(InputError, match="60"):
        draw(pipe, kosmos, prompt="<image> " + "cat " * 70)
    with pytest.raises(ModelError):
        draw(pipe, KosmosG("nowhere", picture(1)), prompt="<image>")
