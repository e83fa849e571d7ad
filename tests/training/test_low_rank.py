"""Trainable LoRA: against PEFT, and what it writes against the control and diffusers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import controlroom as cr
from controlroom.backbones.lora_files import load_lora, save_lora
from controlroom.core.errors import InputError, ModelError
from controlroom.training.base_model import BaseModel
from controlroom.training.low_rank import LowRankLayers, layers_ending
from tests.tiny import tiny_sd1

NOISY = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
STEP = torch.tensor([10, 700])


def filled(base: BaseModel, **settings: Any) -> LowRankLayers:
    """With values everywhere, so that every layer changes."""
    names = base.names()
    parts = settings.pop("parts", ("unet",))
    ends = settings.pop("ends", None)
    layers = layers_ending(names, parts=parts) if ends is None else layers_ending(names, ends, parts)
    made = LowRankLayers(names, layers, **settings)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for up in made.up:
            up.copy_(torch.randn(up.shape, generator=generator) * 0.2)
    return made


def predicted(base: BaseModel) -> torch.Tensor:
    return base.predict(NOISY, STEP, base.condition(["a cat"]))


def test_starts_as_the_base_model_and_off_is_the_base_model() -> None:
    base = BaseModel(cr.Pipeline.from_diffusers(tiny_sd1()))
    plain = predicted(base)
    names = base.names()
    with LowRankLayers(names, layers_ending(names)).attached():
        assert torch.equal(predicted(base), plain)
    layers = filled(base)
    with layers.attached():
        assert not torch.allclose(predicted(base), plain, atol=1e-3)
        with layers.off():
            assert torch.equal(predicted(base), plain)
    assert torch.equal(predicted(base), plain)


@pytest.mark.parametrize("dora", [False, True])
def test_equals_peft_with_the_same_factors(dora: bool) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    base = BaseModel(pipe)
    layers = filled(base, rank=3, alpha=6.0, dora=dora)
    with layers.attached():
        ours = predicted(base)
    unet = copy.deepcopy(pipe.unet)
    unet.add_adapter(LoraConfig(r=3, lora_alpha=6, use_dora=dora, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    modules = dict(unet.named_modules())
    with torch.no_grad():
        for number, (_, path) in enumerate(layers.layers):
            modules[path].lora_A["default"].weight.copy_(layers.down[number])
            modules[path].lora_B["default"].weight.copy_(layers.up[number])
    theirs = unet(NOISY, STEP, base.condition(["a cat", "a cat"]).tokens).sample
    assert float((ours - theirs).detach().abs().max()) < 1e-5 * float(theirs.detach().std()) + 1e-5


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
@pytest.mark.parametrize("dora", [False, True])
def test_what_it_writes_draws_the_same(tmp_path: Path, dialect: str, dora: bool) -> None:
    base = BaseModel(cr.Pipeline.from_diffusers(tiny_sd1()))
    ends = ("to_q", "to_v", "conv1", "proj_in") if not dora else ("to_q", "to_v", "proj_in")
    layers = filled(base, rank=2, alpha=1.0, dora=dora, ends=ends)
    with layers.attached():
        trained = predicted(base)
    path = save_lora(tmp_path / "anna.safetensors", layers.changes(), base.names(), dialect)  # type: ignore[arg-type]
    file = load_lora(path, base.names())
    again = LowRankLayers(base.names(), layers.layers, rank=2, dora=dora, seed=9)
    again.load(file.layers)
    with again.attached():
        assert torch.allclose(predicted(base), trained, atol=1e-5)


def test_gradient_goes_through_the_base_to_the_factors_alone() -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    base = BaseModel(pipe)
    layers = filled(base, parts=("unet", "text_encoder"))
    with layers.attached():
        base.predict(NOISY, STEP, base.condition(["a cat"], grad=True)).square().mean().backward()
    # Keys of padding that nothing sees have none; everything else moves.
    moved = [number for number, p in enumerate(layers.down) if p.grad is not None and bool(p.grad.abs().sum())]
    assert len(moved) == len(layers.layers)
    assert all(p.grad is None for p in base.unet.parameters())
    assert all(p.grad is None for p in pipe.unet.parameters())


def test_wrong_files_and_ranks_are_refused() -> None:
    base = BaseModel(cr.Pipeline.from_diffusers(tiny_sd1()))
    small, large = filled(base, rank=2), filled(base, rank=3)
    with pytest.raises(ModelError, match="rank 2"):
        small.load(large.changes())
    few = filled(base, ends=("to_q",))
    with pytest.raises(ModelError, match="other layers"):
        few.load(small.changes())
    with pytest.raises(InputError, match="at least 1"):
        LowRankLayers(base.names(), small.layers, rank=0)
    with pytest.raises(InputError, match="nothing would be trained"):
        layers_ending(base.names(), ("nonsense",))
