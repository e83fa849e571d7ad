"""A pipeline as something that trains: what is shared, what is copied, and that the pipeline stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

import controlroom as cr
from controlroom.core.errors import InputError, ModelError
from controlroom.training.base_model import BaseModel
from tests.tiny import tiny_sd1, tiny_sd2, tiny_sdxl

NOISY = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
STEP = torch.tensor([10, 700])


def test_what_trains_is_a_copy_and_the_rest_is_shared() -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    flags = [p.requires_grad for p in pipe.unet.parameters()]
    base = BaseModel(pipe, trains=["text_encoder"])
    assert set(base.trained()) == {"text_encoder"} and set(base.frozen()) == {"unet", "vae"}
    theirs, ours = next(pipe.unet.parameters()), next(base.unet.parameters())
    assert theirs is not ours and theirs.data_ptr() == ours.data_ptr() and not ours.requires_grad
    assert (
        next(pipe.backbone.text_encoder.parameters()).data_ptr()
        != next(base.backbone.text_encoder.parameters()).data_ptr()
    )
    assert [p.requires_grad for p in pipe.unet.parameters()] == flags
    assert type(pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor).__name__ != "AttnProcessor"


@pytest.mark.parametrize("make", [tiny_sd1, tiny_sd2, tiny_sdxl])
def test_predicts_as_the_network_does(make: Any) -> None:
    pipe = cr.Pipeline.from_diffusers(make())
    base = BaseModel(pipe)
    condition = base.condition(["a cat"])
    ours = base.predict(NOISY, STEP, condition)
    more = pipe.backbone.added_conditions(condition.expand(2))
    theirs = pipe.unet(
        NOISY, STEP, encoder_hidden_states=condition.expand(2).tokens, added_cond_kwargs=more, return_dict=False
    )[0]
    assert float((ours - theirs).abs().max()) < 1e-5


def test_latents_are_those_of_the_autoencoder() -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    base = BaseModel(pipe)
    pictures = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue", "white")]
    found = base.latents(pictures)
    assert found.shape == (3, 4, 16, 16) and found.dtype == torch.float32
    pixels = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    expected = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    assert torch.allclose(found[:1], expected, atol=1e-5)
    with pytest.raises(InputError, match="multiples of 2"):
        base.latents(pictures, (31, 32))


def test_previews_draw_with_the_training_weights() -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    base = BaseModel(pipe, trains=["unet"])
    base.unet.train()
    settings: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, "output_type": "latent"}
    before = pipe("a cat", **settings).images
    with base.drawing() as drawing:
        assert torch.allclose(drawing("a cat", **settings).images, before, atol=1e-3)
        with torch.no_grad():
            base.unet.conv_out.weight.mul_(2)
        assert not torch.allclose(drawing("a cat", **settings).images, before, atol=1e-2)
    assert base.unet.training and torch.equal(pipe("a cat", **settings).images, before)


def test_networks_that_edit_are_refused() -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1(in_channels=8))
    with pytest.raises(ModelError, match="8 channels"):
        BaseModel(pipe)
    with pytest.raises(ModelError, match="text_encoder_2"):
        BaseModel(cr.Pipeline.from_diffusers(tiny_sd1()), trains=["text_encoder_2"])
