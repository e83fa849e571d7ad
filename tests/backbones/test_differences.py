"""A network stored as its difference from another is the network, to half a step of each output."""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from controlroom.backbones.controlnet import load_controlnet
from controlroom.backbones.convert import convert
from controlroom.backbones.differences import FILE, WHOLE, is_difference, load_unet, read_difference, write_difference
from controlroom.backbones.reference import load_writer, new_writer
from controlroom.core.errors import ModelError
from controlroom.training.assemble import assemble
from controlroom.training.instructed import widened
from tests.tiny import tiny_unet


@pytest.fixture
def tuned(tmp_path: Path) -> tuple[Path, Any]:
    """A checkpoint with a base and a copy of it that reads more channels, put together; and the copy."""
    base, runs = tiny_unet(0), tmp_path / "runs"
    copy: Any = widened(base, 4)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    for stage, unet in (("unet", base), ("instruct_pix2pix", copy)):
        unet.half().save_pretrained(runs / stage / "weights")
    assemble(runs, tmp_path / "out")
    return tmp_path / "out", copy.float()


def steps(value: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """The step of each output."""
    change = (value.float() - base.float()).flatten(1)
    return torch.maximum(change.square().mean(dim=1).sqrt() / 6, change.abs().amax(dim=1) / 127)


def test_every_weight_is_within_half_a_step(tuned: tuple[Path, Any]) -> None:
    out, copy = tuned
    folder = out / "instruct_pix2pix"
    assert is_difference(folder) and not (folder / WHOLE).exists()
    base, loaded = load_file(str(out / "unet" / WHOLE)), load_unet(folder).state_dict()
    counted = 0
    for key, value in copy.state_dict().items():
        if value.ndim < 2 or base[key].shape != value.shape:
            assert torch.equal(loaded[key], value), key  # whole
            continue
        error = (loaded[key] - value).flatten(1).abs().amax(dim=1)
        assert bool((error <= 0.5001 * steps(value, base[key]) + 1e-7).all()), key
        counted += 1
    assert counted > 20


def test_it_takes_less_than_half(tuned: tuple[Path, Any], tmp_path: Path) -> None:
    out, copy = tuned
    copy.half().save_pretrained(tmp_path / "whole")
    # Tiny layers have many outputs for their weights; each has its step.
    assert (out / "instruct_pix2pix" / FILE).stat().st_size < 0.5 * (tmp_path / "whole" / WHOLE).stat().st_size


def test_large_layers_take_a_third(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {"layer": torch.randn(256, 512)}
    save_file({"layer": weights["layer"] + 0.1 * torch.randn(256, 512)}, str(tmp_path / "base.safetensors"))
    (tmp_path / "tuned").mkdir()
    file = write_difference(tmp_path / "tuned", weights, tmp_path / "base.safetensors")
    assert file.stat().st_size < 256 * 512 * 2 / 3
    found = read_difference(tmp_path / "tuned")["layer"]
    assert (found - weights["layer"]).square().mean().sqrt() < 0.1 * 0.06  # far within one step


def test_an_output_that_did_not_change_stays(tmp_path: Path) -> None:
    weights = {"layer": torch.randn(8, 16)}
    save_file(weights, str(tmp_path / "base.safetensors"))
    (tmp_path / "same").mkdir()
    write_difference(tmp_path / "same", weights, tmp_path / "base.safetensors")
    assert torch.equal(read_difference(tmp_path / "same")["layer"], weights["layer"])


def test_a_controlnet_is_read_from_it(tmp_path: Path) -> None:
    unet: Any = tiny_unet(0)
    net: Any = ControlNetModel.from_unet(unet)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    unet.half().save_pretrained(tmp_path / "unet" / "weights")
    net.half().save_pretrained(tmp_path / "controlnet_multi" / "weights")
    assemble(tmp_path, tmp_path / "out")
    folder = tmp_path / "out" / "multi"
    assert is_difference(folder) and not (folder / WHOLE).exists()
    loaded = load_controlnet(folder, unet.float()).state_dict()
    for key, value in net.float().state_dict().items():
        assert torch.allclose(loaded[key], value, atol=0.002), key
    done = convert(folder, tmp_path / "plain")
    assert tmp_path / "plain" / WHOLE in done.files
    plain: Any = ControlNetModel.from_pretrained(tmp_path / "plain")
    assert all(torch.equal(value, loaded[key].half()) for key, value in plain.half().state_dict().items())


def test_precision_is_the_one_asked_for(tuned: tuple[Path, Any]) -> None:
    assert load_unet(tuned[0] / "instruct_pix2pix", torch.bfloat16).dtype == torch.bfloat16


def test_a_writer_of_references_is_read_from_it(tmp_path: Path) -> None:
    base: Any = tiny_unet(0)
    writer = new_writer(tiny_unet(1))
    base.save_pretrained(tmp_path / "unet")
    writer.save_pretrained(tmp_path / "appearance")
    whole = tmp_path / "appearance" / WHOLE
    write_difference(tmp_path / "appearance", load_file(str(whole)), tmp_path / "unet" / WHOLE)
    whole.unlink()
    loaded, known = load_writer(tmp_path / "appearance", base).state_dict(), base.state_dict()
    assert set(loaded) == set(writer.state_dict())
    for key, value in writer.state_dict().items():
        error = (loaded[key] - value).abs()
        allowed = 0.5001 * steps(value, known[key]).max() + 1e-6 if value.ndim > 1 else 1e-3
        assert error.max() <= allowed, key


def test_converted_it_loads_in_diffusers(tuned: tuple[Path, Any], tmp_path: Path) -> None:
    out, _ = tuned
    done = convert(out / "instruct_pix2pix", tmp_path / "plain")
    assert tmp_path / "plain" / WHOLE in done.files
    plain: Any = UNet2DConditionModel.from_pretrained(tmp_path / "plain")
    ours = load_unet(out / "instruct_pix2pix").half().state_dict()
    assert all(torch.equal(value.half(), ours[key]) for key, value in plain.state_dict().items())


def test_another_base_is_refused(tuned: tuple[Path, Any]) -> None:
    out, _ = tuned
    file = out / "unet" / WHOLE
    weights = load_file(str(file))
    weights["conv_in.bias"] += 1
    save_file(weights, str(file))
    with pytest.raises(ModelError, match="another version of"):
        read_difference(out / "instruct_pix2pix")
    file.unlink()
    with pytest.raises(ModelError, match="Copy the whole checkpoint"):
        read_difference(out / "instruct_pix2pix")


@pytest.mark.parametrize("content", [b"nothing", zlib.compress(bytes(10)), zlib.compress(bytes(10**7))])
def test_counts_that_do_not_fit_are_refused(tuned: tuple[Path, Any], content: bytes) -> None:
    file = tuned[0] / "instruct_pix2pix" / FILE
    with safe_open(str(file), "pt") as opened:
        about = opened.metadata()
    weights = load_file(str(file))
    key = next(key.removesuffix("::step") for key in weights if key.endswith("::step"))
    weights[key] = torch.frombuffer(bytearray(content), dtype=torch.uint8).clone()
    save_file(weights, str(file), about)
    with pytest.raises(ModelError, match="does not fit"):
        read_difference(file.parent)


def test_a_broken_file_is_refused(tuned: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tuned[0] / "instruct_pix2pix"
    weights = load_file(str(folder / FILE))
    save_file(weights, str(folder / FILE))
    with pytest.raises(ModelError, match="does not say which network"):
        read_difference(folder)
    (folder / FILE).write_bytes(b"nothing")
    with pytest.raises(ModelError):
        read_difference(folder)
    shutil.rmtree(folder)
    assert not is_difference(folder)
