"""UNIMO-G against its computation written out, and what it promises.

What the network is told is put together token by token from weights alone; a run is compared with one of a pipeline
whose UNet *has* the keys and values, and is given these tokens as embeddings.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from controlroom.backbones.image_encoder import clip_pixels
from controlroom.backbones.ip_adapter import layer_numbers
from controlroom.backbones.unimo import FILE, UnimoReader, find_unimo, load_unimo
from controlroom.controls.personal.ip_adapter import IPAdapter
from controlroom.controls.personal.kosmos_g import KosmosG
from controlroom.controls.personal.textual_inversion import TextualInversion
from controlroom.controls.personal.unimo_g import UnimoG
from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.controls.word_mask import WordMask
from controlroom.core.errors import ConflictError, InputError, ModelError
from controlroom.sampling.pipeline import Pipeline
from tests.controls.loras import tiny_word
from tests.controls.nets import tiny_controlnet, tiny_image_encoder, tiny_ip_adapter, tiny_kosmos, tiny_unimo
from tests.controls.personal.test_kosmos_g import Weights, attend, language_states, picture
from tests.tiny import BACKBONES, tiny_sd1, tiny_tokenizer

PROMPT = "a red <image> on the <image> beach"
DRAW: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent", "seed": 5}


# The computation.


def looks(reader: UnimoReader, shown: Image.Image) -> Tensor:
    """[L, reads]: CLIP's states of a picture, its last block being the eye."""
    w, heads = Weights(reader.model.state_dict(), "eye."), reader.model.shape.eye_heads
    states = reader.image_encoder(clip_pixels([shown], 32), output_hidden_states=True).hidden_states[-2][0]
    block = w.at("block")
    y = block.norm(states, "layer_norm1")
    q, k, v = (block.linear(y, f"self_attn.{name}_proj") for name in "qkv")
    states = states + block.linear(attend(q, k, v, heads), "self_attn.out_proj")
    y = block.linear(block.norm(states, "layer_norm2"), "mlp.fc1")
    return w.norm(states + block.linear(y * (1.702 * y).sigmoid(), "mlp.fc2"), "norm")


@torch.no_grad()
def written_out(reader: UnimoReader, said: str, pictures: list[Image.Image]) -> Tensor:
    """[L, width] that cross-attention is told: the text's states, then those of each picture."""
    w: Any = Weights(reader.model.state_dict())
    states: Any = reader  # has the same language model as a KOSMOS-G
    tokens = [w.norm(w.linear(language_states(states, said, pictures), "prompt.0"), "prompt.1")]
    tokens += [w.norm(w.linear(looks(reader, shown), "visual.0"), "visual.1") for shown in pictures]
    return torch.cat(tokens)


def trained(source: Any, reader: UnimoReader) -> Pipeline:
    """A pipeline whose UNet has the keys and values of UNIMO-G."""
    changed = copy.deepcopy(source)
    for name, number in layer_numbers(changed.unet).items():
        for part in ("to_k", "to_v"):
            weight = reader.model.state_dict()[f"layers.{number}.{part}.weight"]
            changed.unet.get_submodule(f"{name}.{part}").weight.data.copy_(weight)
    return Pipeline.from_diffusers(changed)


@pytest.fixture(scope="module")
def source() -> Any:
    return tiny_sd1()


@pytest.fixture(scope="module")
def pipe(source: Any) -> Pipeline:
    return Pipeline.from_diffusers(source)


@pytest.fixture(scope="module")
def reader(source: Any) -> UnimoReader:
    return tiny_unimo(source)


@torch.no_grad()
def test_what_the_network_is_told_equals_the_computation_written_out(reader: UnimoReader) -> None:
    pictures = [picture(i) for i in range(3)]
    texts = [PROMPT, "a <image> hat", "night"]
    told = reader(tiny_tokenizer(), texts, clip_pixels(pictures, 32))
    shown = (pictures[:2], pictures[2:], [])
    for row, (text, its) in enumerate(zip(texts, shown, strict=True)):
        wanted = written_out(reader, text, its)
        assert (told.tokens[row][told.seen[row]] - wanted).abs().max() < 1e-4 * wanted.std()
        # Where each picture is: its vectors behind <image>, and its states behind the text.
        vectors, states, length = reader.model.shape.image_tokens, 17, len(wanted) - 17 * len(its)
        starts = [i for i, word in enumerate(text.split()) if word == "<image>"]
        for number, at in enumerate(starts):
            first = 1 + at + 1 + number * (vectors + 1)
            found = told.pictures[row, number][told.seen[row]].nonzero().flatten().tolist()
            behind = length + number * states
            assert found == [*range(first, first + vectors), *range(behind, behind + states)]
        assert not told.pictures[row, len(its) :].any()
    assert float(told.bias()[2, 0, 0, -1]) < -1000 and not told.bias()[0].any()


# The control.


def draw(pipe: Pipeline, *controls: Any, prompt: Any = PROMPT, **settings: Any) -> Any:
    return pipe(prompt, controls=list(controls), **{**DRAW, **settings})


def test_a_run_equals_one_of_a_network_with_its_keys_and_values(
    pipe: Pipeline, source: Any, reader: UnimoReader
) -> None:
    pictures, own = [picture(1), picture(2)], trained(source, reader)
    told = written_out(reader, PROMPT, pictures)[None]
    # What is told with and without pictures must be as long as the other in a pipeline of embeddings.
    for negative in ("cat " * (told.shape[1] - 1), None):
        guided = {} if negative else {"guidance_scale": 1.0}
        run = draw(pipe, UnimoG(reader, pictures), negative_prompt=negative, **guided).images
        null = {"negative_prompt_embeds": written_out(reader, negative, [])[None]} if negative else {}
        expected = own(prompt_embeds=told, **null, **guided, **DRAW).images
        assert (run - expected).abs().max() < 1e-4 * expected.std()
    words = draw(pipe, UnimoG(reader), prompt="a red cat", negative_prompt="the blue hat").images
    both = [written_out(reader, text, [])[None] for text in ("a red cat", "the blue hat")]
    expected = own(prompt_embeds=both[0], negative_prompt_embeds=both[1], **DRAW).images
    assert (words - expected).abs().max() < 1e-4 * expected.std()
    assert (words - draw(pipe, prompt="a red cat", negative_prompt="the blue hat").images).abs().max() > 1e-2


def test_several_prompts_with_pictures_of_their_own(pipe: Pipeline, reader: UnimoReader) -> None:
    prompts, lists = [PROMPT, "<image> <image> dog"], [[picture(1), picture(2)], [picture(3), picture(1)]]
    both = draw(pipe, UnimoG(reader, lists), prompt=prompts).images
    for row, (prompt, its) in enumerate(zip(prompts, lists, strict=True)):
        alone = draw(pipe, UnimoG(reader, its), prompt=prompt, seed=DRAW["seed"] + row).images[0]
        assert (both[row] - alone).abs().max() < 1e-4 * alone.std()
    before = draw(pipe, UnimoG(reader, lists[1]), prompt="dog").images
    assert torch.equal(before, draw(pipe, UnimoG(reader, lists[1]), prompt=prompts[1]).images)
    other = draw(pipe, UnimoG(reader, lists[1][::-1]), prompt=prompts[1]).images
    assert (before - other).abs().max() > 1e-3


def test_neutral_is_absence_and_small_scales_are_close(pipe: Pipeline, reader: UnimoReader) -> None:
    words, shown = "a red cat", "a red <image> cat"
    plain = draw(pipe, prompt=words)
    for silent in (UnimoG(reader, picture(1), 0.0), UnimoG(reader, picture(1), start=1.0)):
        found = draw(pipe, silent, prompt=shown)
        assert torch.equal(found.images, plain.images) and found.manifest["cost"] == plain.manifest["cost"]
    small, whole = (draw(pipe, UnimoG(reader, picture(1), s), prompt=shown) for s in (1e-4, 1.0))
    assert 0 < (small.images - plain.images).abs().max() < 1e-2 * plain.images.std()
    assert (whole.images - plain.images).abs().max() > 1e-2
    assert whole.manifest["cost"] == plain.manifest["cost"]


def test_windows_and_masks(pipe: Pipeline, reader: UnimoReader) -> None:
    shown = {"prompt": "a red <image> cat", "guidance_scale": 1.0}
    whole = draw(pipe, UnimoG(reader, picture(1)), **shown).images
    early = draw(pipe, UnimoG(reader, picture(1), end=0.5), **shown).images
    plain = draw(pipe, prompt="a red cat", guidance_scale=1.0).images
    assert (early - whole).abs().max() > 1e-3 and (early - plain).abs().max() > 1e-3
    white = draw(pipe, UnimoG(reader, picture(1), mask=np.ones((16, 16))), **shown).images
    assert torch.equal(white, whole)
    left = np.zeros((16, 16))
    left[:, :8] = 1
    half = draw(pipe, UnimoG(reader, picture(1), mask=left), **shown).images
    by_words = draw(pipe, UnimoG(reader, picture(1), mask=WordMask("cat", 0.98)), **shown).images
    for found in (half, by_words):
        assert (found - whole).abs().max() > 1e-3 and (found - plain).abs().max() > 1e-3


def test_with_others(pipe: Pipeline, source: Any, reader: UnimoReader) -> None:
    unimo = UnimoG(reader, [picture(1), picture(2)])
    net = ControlNet(tiny_controlnet(source.unet), picture(3))
    adapter = IPAdapter(tiny_ip_adapter(source.unet), picture(4), image_encoder=tiny_image_encoder())
    every = draw(pipe, unimo, net, adapter).images
    for some in ([unimo, net], [unimo, adapter], [net, adapter]):
        assert (every - draw(pipe, *some, prompt=PROMPT if unimo in some else "a red").images).abs().max() > 1e-3
    for other in (TextualInversion(tiny_word(source), token="ed"), KosmosG(tiny_kosmos(source), [picture(1)] * 2)):
        with pytest.raises(ConflictError, match="UnimoG"):
            draw(pipe, unimo, other)


def test_files_say_everything_and_are_read_completely(reader: UnimoReader, pipe: Pipeline, tmp_path: Path) -> None:
    reader.save(tmp_path)
    again = find_unimo(str(tmp_path), pipe.backbone)
    assert again.model.shape == reader.model.shape
    for key, value in reader.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
    assert find_unimo(str(tmp_path), pipe.backbone) is again
    other = Pipeline.from_diffusers(BACKBONES["sdxl"]()).backbone
    for wrong in (reader, str(tmp_path)):
        with pytest.raises(ModelError, match="another base model"):
            find_unimo(wrong, other)
    stored = load_file(tmp_path / FILE)
    about = {"unimo_g": reader.model.shape.model_dump_json()}
    for message, tensors, metadata in (
        ("nothing reads, such as 'more'", {**stored, "more": torch.zeros(1)}, about),
        ("lacks 'prompt.0.weight'", {k: v for k, v in stored.items() if k != "prompt.0.weight"}, about),
        ("does not say the sizes of a UNIMO-G", stored, {"format": "pt"}),
    ):
        save_file(tensors, tmp_path / FILE, metadata)
        with pytest.raises(ModelError, match=message):
            load_unimo(tmp_path, pipe.backbone)
    with pytest.raises(ModelError, match=FILE):
        find_unimo(str(tmp_path / "image_encoder"), pipe.backbone)


def test_bad_input(pipe: Pipeline, reader: UnimoReader) -> None:
    unimo = UnimoG(reader, picture(1))
    with pytest.raises(InputError, match="2 times <image>, and there are 1 pictures"):
        draw(pipe, unimo)
    with pytest.raises(InputError, match="0 pictures"):
        draw(pipe, UnimoG(reader))
    with pytest.raises(InputError, match="as text"):
        pipe(prompt_embeds=torch.randn(1, 16, 32), controls=[UnimoG(reader)], **DRAW)
    with pytest.raises(InputError, match="60"):
        draw(pipe, unimo, prompt="<image> " + "cat " * 70)
    with pytest.raises(ModelError):
        draw(pipe, UnimoG("nowhere", picture(1)), prompt="<image>")
