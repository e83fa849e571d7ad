"""The writer's bank is what the self-attentions are given; its files; reading with gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors.torch import load_file, save_file

from controlroom.backbones.reference import (
    ReferenceWriter,
    check_writer,
    joined,
    load_writer,
    new_writer,
    self_attention_layers,
)
from controlroom.core.errors import ModelError
from tests.tiny import BACKBONES, tiny_unet


class Recorder(AttnProcessor2_0):
    """Keeps what the layer is given: written for this test only."""

    def __init__(self, kept: dict[str, torch.Tensor], name: str) -> None:
        super().__init__()
        self.kept, self.name = kept, name

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        self.kept[self.name] = hidden_states.clone()
        return super().__call__(attn, hidden_states, *args, **named)


def recorded(unet: Any, *inputs: Any, **named: Any) -> dict[str, torch.Tensor]:
    """What every self-attention of a whole forward pass is given."""
    kept: dict[str, torch.Tensor] = {}
    before = unet.attn_processors
    unet.set_attn_processor(
        {
            name: Recorder(kept, name.removesuffix(".processor")) if "attn1" in name else processor
            for name, processor in before.items()
        }
    )
    with torch.no_grad():
        unet(*inputs, **named)
    unet.set_attn_processor(before)
    return kept


def inputs(kind: str, rows: int = 2, size: tuple[int, int] = (16, 16)) -> tuple[Any, Any, Any, Any]:
    unet = BACKBONES[kind]().unet
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(rows, 4, *size, generator=draw)
    tokens = torch.randn(rows, 16, unet.config.cross_attention_dim, generator=draw)
    added = None
    if kind == "sdxl":
        ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]]).repeat(rows, 1)
        added = {"text_embeds": torch.randn(rows, 32, generator=draw), "time_ids": ids}
    return unet, latents, tokens, added


@pytest.mark.parametrize("kind", BACKBONES)
def test_bank_is_what_the_layers_are_given(kind: str) -> None:
    unet, latents, tokens, added = inputs(kind, size=(16, 24))
    expected = recorded(unet, latents, 7, encoder_hidden_states=tokens, added_cond_kwargs=added)
    with torch.no_grad():
        bank = ReferenceWriter(unet, self_attention_layers(unet)).encode(latents, tokens, 7, added)
    assert set(bank) == set(expected)
    for name, value in bank.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("kind", BACKBONES)
def test_pruned_copy_gives_the_same_bank_and_nothing_of_it_is_dead(kind: str) -> None:
    unet, latents, tokens, added = inputs(kind, rows=1)
    layers = self_attention_layers(unet)
    writer = new_writer(unet)
    assert self_attention_layers(unet) == layers, "the original stays whole"
    bank = ReferenceWriter(writer, layers).encode(latents, tokens, 0, added)
    with torch.no_grad():
        expected = ReferenceWriter(unet, layers).encode(latents, tokens, 0, added)
    assert all(torch.equal(bank[name], expected[name]) for name in layers)
    assert sum(p.numel() for p in writer.parameters()) < sum(p.numel() for p in unet.parameters())
    sum(value.square().sum() for value in bank.values()).backward()  # type: ignore[union-attr]
    idle = [name for name, p in writer.named_parameters() if p.grad is None]
    assert idle == [], "every weight that is kept takes part"


def test_writer_stops_and_leaves_no_hook() -> None:
    unet, latents, tokens, _ = inputs("sd1", rows=1)
    layers = self_attention_layers(unet)
    ran = []
    handles = [unet.get_submodule(n).register_forward_hook(lambda *_: ran.append(1)) for n in (layers[2], "conv_out")]
    ReferenceWriter(unet, layers[:3]).encode(latents, tokens)
    assert ran == []
    ReferenceWriter(unet, layers[:4]).encode(latents, tokens)
    assert ran == [1]
    for handle in handles:
        handle.remove()
    with pytest.raises(RuntimeError):
        ReferenceWriter(unet, layers).encode(latents, tokens[..., :3])
    assert not [name for name, module in unet.named_modules() if module._forward_pre_hooks or module._forward_hooks]


def test_layers_must_be_there() -> None:
    with pytest.raises(ModelError, match="lacks 1 of the 1"):
        ReferenceWriter(tiny_unet(), ["up_blocks.9.attn1"])
    with pytest.raises(ModelError):
        ReferenceWriter(tiny_unet(), [])


@pytest.mark.parametrize("kind", BACKBONES)
def test_pruned_folder_whole_folder_and_file_load(kind: str, tmp_path: Path) -> None:
    unet, latents, tokens, added = inputs(kind, rows=1)
    layers = self_attention_layers(unet)
    new_writer(unet).save_pretrained(tmp_path / "pruned")
    unet.save_pretrained(tmp_path / "whole")
    file = tmp_path / "pruned" / "diffusion_pytorch_model.safetensors"
    assert file.stat().st_size < (tmp_path / "whole" / file.name).stat().st_size
    with torch.no_grad():
        expected = ReferenceWriter(unet, layers).encode(latents, tokens, 0, added)
        for path in (tmp_path / "pruned", tmp_path / "whole", file):
            writer = load_writer(path, unet)
            assert not any(p.requires_grad or p.is_meta for p in writer.parameters())
            bank = ReferenceWriter(writer, layers).encode(latents, tokens, 0, added)
            assert all(torch.equal(bank[name], expected[name]) for name in layers)


def test_broken_files_are_model_errors(tmp_path: Path) -> None:
    unet = tiny_unet()
    folder = tmp_path / "writer"
    new_writer(unet).save_pretrained(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    whole = load_file(file)

    def refused(match: str, path: Path = folder) -> None:
        with pytest.raises(ModelError, match=match):
            load_writer(path, unet)

    save_file({k: v for k, v in whole.items() if k != "conv_in.weight"}, file)
    refused("1 weights are missing .*conv_in.weight")
    save_file({**whole, "extra": torch.zeros(1)}, file)
    refused("1 are unknown .*extra")
    save_file({**whole, "conv_in.bias": torch.zeros(3)}, file)
    refused("conv_in.bias")
    file.write_bytes(b"no tensors")
    refused("cannot be loaded")
    file.unlink()
    refused("no .safetensors")
    (folder / "config.json").write_text("{")
    refused("cannot be loaded")
    (folder / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    refused("ControlNetModel")


def test_other_base_models_are_refused() -> None:
    unet = tiny_unet()
    for other, match in (
        (tiny_unet(block_out_channels=(32, 32)), "norm1"),
        (tiny_unet(cross=64), "cross_attention_dim"),
        (torch.nn.Linear(2, 2), "Linear"),
        (BACKBONES["sdxl"]().unet, "another base model"),
    ):
        with pytest.raises(ModelError, match=match):
            check_writer(other, unet, "it")
    check_writer(tiny_unet(in_channels=9), unet, "it")


def test_joined_is_attention_over_both_and_carries_gradients() -> None:
    unet, latents, tokens, _ = inputs("sd1")
    unet.requires_grad_(False)
    before = unet.attn_processors
    draw = torch.Generator().manual_seed(2)
    shapes = {name: value.shape for name, value in recorded(unet, latents, 5, encoder_hidden_states=tokens).items()}
    bank = {n: torch.randn(1, 7, s[2], generator=draw).requires_grad_() for n, s in shapes.items()}
    with joined(unet, bank):
        got = unet(latents, 5, encoder_hidden_states=tokens).sample
    assert unet.attn_processors == before
    got.square().sum().backward()
    assert all(b.grad is not None and b.grad.abs().max() > 0 for b in bank.values())

    class Beside(AttnProcessor2_0):
        def __init__(self, more: torch.Tensor) -> None:
            self.more = more

        def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
            both = torch.cat([hidden_states, self.more.expand(2, -1, -1)], dim=1)
            return super().__call__(attn, hidden_states, both)

    for name, value in bank.items():
        unet.get_submodule(name).processor = Beside(value.detach())
    with torch.no_grad():
        expected = unet(latents, 5, encoder_hidden_states=tokens).sample
    torch.testing.assert_close(got.detach(), expected, atol=1e-5, rtol=1e-5)
    unet.set_attn_processor(AttnProcessor2_0())
    with torch.no_grad(), joined(unet, bank, keep=torch.tensor([True, False])):
        some = unet(latents, 5, encoder_hidden_states=tokens).sample
    torch.testing.assert_close(some[:1], expected[:1], atol=1e-5, rtol=1e-5)
    plain = UNet2DConditionModel.from_config(unet.config)
    plain.load_state_dict(unet.state_dict())
    with torch.no_grad():
        without = plain(latents, 5, encoder_hidden_states=tokens).sample
    assert (without - expected).abs().max() > 1e-2
    torch.testing.assert_close(some[1:], without[1:], atol=1e-5, rtol=1e-5)
