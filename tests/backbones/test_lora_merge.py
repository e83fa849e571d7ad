"""Merged LoRAs: the sum of the changes, exactly; what has no such sum is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import controlroom as cr
from controlroom.backbones.lora_files import load_lora, save_lora
from controlroom.backbones.lora_layers import Full, LayerChange, LowRank
from controlroom.backbones.lora_merge import merge_loras
from controlroom.backbones.lora_names import Layer, Names
from controlroom.core.errors import InputError, ModelError
from tests.controls.loras import ATTENTION, TEXT, add_peft, saved_by_diffusers
from tests.tiny import tiny_sd1, tiny_sdxl

DRAW: dict[str, Any] = {"prompt": "a red cat", "num_inference_steps": 2, "output_type": "latent", "seed": 3}


def names_of(pipe: Any) -> Names:
    return Names(pipe.unet, pipe.text_encoder, getattr(pipe, "text_encoder_2", None))


def made(make: Any, folder: Path, targets: list[str], rank: int, alpha: int, seed: int, text: bool) -> Path:
    pipe = make()
    add_peft(pipe.unet, targets, rank, alpha, seed)
    if text:
        add_peft(pipe.text_encoder, TEXT, rank, alpha, seed + 1)
    return saved_by_diffusers(pipe, folder)


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
@pytest.mark.parametrize("make", [tiny_sd1, tiny_sdxl])
def test_equals_both_together(tmp_path: Path, make: Any, dialect: Any) -> None:
    subject = made(make, tmp_path / "subject", [*ATTENTION, "conv1", "proj_in"], 3, 6, 0, True)
    style = made(make, tmp_path / "style", ["to_q", "conv1", "ff.net.0.proj"], 2, 1, 5, False)
    names = names_of(make())
    layers = [load_lora(path, names).layers for path in (subject, style)]
    scales = [0.8, -0.5]
    merged = merge_loras(layers, scales)
    assert set(merged) == set(layers[0]) | set(layers[1]) and len(merged) > max(map(len, layers))
    ranks = set()
    for layer, change in merged.items():
        weight = names.layers[layer].weight
        shares = [(scale, each[layer]) for scale, each in zip(scales, layers, strict=True) if layer in each]
        expected = sum(scale * part.dense(weight) for scale, part in shares)
        assert isinstance(expected, torch.Tensor) and isinstance(change.factors, LowRank)
        assert (change.dense(weight) - expected).abs().max() < 1e-6 * expected.abs().max()
        assert change.factors.rank == sum(part.factors.rank for _, part in shares if part.factors is not None)
        ranks.add(change.factors.rank)
    assert ranks == {2, 3, 5}
    pipe = cr.Pipeline.from_diffusers(make())
    together = pipe(controls=[cr.LoRA(str(subject), 0.8), cr.LoRA(str(style), -0.5)], **DRAW).images
    path = save_lora(tmp_path / "both.safetensors", merged, names, dialect)
    found = pipe(controls=[cr.LoRA(str(path))], **DRAW).images
    assert (found - together).abs().max() < 1e-4 * together.std()
    assert (together - pipe(controls=[cr.LoRA(str(subject), 0.8)], **DRAW).images).abs().max() > 0.01 * together.std()
    peer = make()
    peer.set_progress_bar_config(disable=True)
    peer.load_lora_weights(str(tmp_path), weight_name=path.name)
    noise = torch.randn(together.shape, generator=torch.Generator().manual_seed(1))
    same: dict[str, Any] = {"latents": noise, "num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "latent"}
    theirs = peer("a red cat", **same).images
    ours = pipe("a red cat", controls=[cr.LoRA(str(subject), 0.8), cr.LoRA(str(style), -0.5)], **same).images
    assert (ours - theirs).abs().max() < 1e-3 * theirs.std()


def change(seed: int, rank: int = 2, alpha: float | None = None, kernel: tuple[int, ...] = ()) -> LayerChange:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, 6, *kernel, generator=generator)
    return LayerChange(LowRank(down, torch.randn(5, rank, *(1 for _ in kernel), generator=generator), None, alpha))


LAYER: Layer = ("unet", "mid_block.to_q")


def test_cores_kernels_and_biases() -> None:
    weight = torch.zeros(5, 6, 3, 3)
    core = LowRank(torch.randn(2, 6, 1, 1), torch.randn(5, 2, 1, 1), torch.randn(2, 2, 3, 3), 1.0)
    tucker, plain = LayerChange(core, bias=torch.ones(5)), change(1, 3, 6.0, (3, 3))
    both = merge_loras([{LAYER: tucker}, {LAYER: plain}], [2.0, 3.0])[LAYER]
    expected = 2.0 * tucker.dense(weight) + 3.0 * plain.dense(weight)
    assert torch.allclose(both.dense(weight), expected, rtol=1e-5, atol=1e-5)
    assert both.bias is not None and torch.equal(both.bias, torch.full((5,), 2.0))
    linear, pixels = torch.zeros(5, 6), change(2, 2, None, (1, 1))
    both = merge_loras([{LAYER: change(3)}, {LAYER: pixels}])[LAYER]
    assert torch.allclose(both.dense(linear), change(3).dense(linear) + pixels.dense(linear), atol=1e-6)
    # One alone, and one of scale 0: nothing else changes.
    alone = merge_loras([{LAYER: change(3, alpha=1.0)}, {LAYER: plain}], [1.0, 0.0])[LAYER]
    assert torch.allclose(alone.dense(linear), change(3, alpha=1.0).dense(linear), atol=1e-6)


def test_adding_factors_instead_would_be_another_change() -> None:
    weight = torch.zeros(5, 6)
    first, second = change(1), change(2)
    expected = first.dense(weight) + second.dense(weight)
    merged = merge_loras([{LAYER: first}, {LAYER: second}])[LAYER].dense(weight)
    assert isinstance(first.factors, LowRank) and isinstance(second.factors, LowRank)
    summed = (first.factors.up + second.factors.up) @ (first.factors.down + second.factors.down)
    assert (merged - expected).norm() < 1e-6 * expected.norm() and (summed - expected).norm() > 0.5 * expected.norm()


def test_what_has_no_sum_is_refused() -> None:
    plain = {LAYER: change(1)}
    for wrong, said in (
        (LayerChange(change(2).factors, torch.ones(5)), "mid_block.to_q is of a DoRA"),
        (LayerChange(Full(torch.ones(5, 6))), "of the kind Full"),
        (LayerChange(LowRank(torch.randn(2, 7), torch.randn(5, 2))), "different shapes"),
    ):
        with pytest.raises(ModelError, match=said):
            merge_loras([plain, {LAYER: wrong}])
    for loras, scales, said in (
        ([plain, plain], [1.0], "1 scales for 2"),
        ([], None, "nothing to merge"),
        ([plain], [0.0], "nothing to merge"),
    ):
        with pytest.raises(InputError, match=said):
            merge_loras(loras, scales)
