"""A network stored as its difference from another is the network, to half a step of each output."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

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
        change = (value - base[key].float()).flatten(1).abs().amax(dim=1)
        error = (loaded[key] - value).flatten(1).abs().amax(dim=1)
        assert bool((error <= 0.5001 * change / 127 + 1e-7).all()), key
        counted += 1
    assert counted > 20


def test_it_takes_little_more_than_half(tuned: tuple[Path, Any], tmp_path: Path) -> None:
    out, copy = tuned
    copy.half().save_pretrained(tmp_path / "whole")
    # Tiny layers have many outputs for their weights; each has its step.
    assert (out / "instruct_pix2pix" / FILE).stat().st_size < 0.75 * (tmp_path / "whole" / WHOLE).stat().st_size


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
    loaded = load_writer(tmp_path / "appearance", base).state_dict()
    assert set(loaded) == set(writer.state_dict())
    for key, value in writer.state_dict().items():
        assert torch.allclose(loaded[key], value, atol=1e-2), key  # two unlike networks: steps are wide


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
