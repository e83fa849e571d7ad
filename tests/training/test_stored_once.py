"""Tensors that two networks share are stored once, and transformers loads both as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from controlroom.backbones.completeness import check_keys
from controlroom.core.errors import ModelError
from controlroom.training.assemble import assemble
from controlroom.training.clip_vision import image_encoder_of
from controlroom.training.stored_once import INDEX, WEIGHTS, store_once, weight_files
from tests.training.theatre_parts import write_parts

Checkpoint = tuple[Path, dict[str, torch.Tensor], dict[str, torch.Tensor]]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """A checkpoint put together from a CLIP and the image encoder made of it, and what these two held."""
    parts = write_parts(tmp_path / "parts")
    runs = tmp_path / "runs"
    clip: Any = CLIPModel.from_pretrained(parts / "clip").half().float()
    clip.save_pretrained(runs / "clip/weights")
    tokenizer: Any = CLIPTokenizer.from_pretrained(parts / "clip/tokenizer")
    tokenizer.save_pretrained(runs / "clip/weights/tokenizer")
    encoder: Any = image_encoder_of(runs / "clip/weights").half().float()
    encoder.save_pretrained(runs / "ip_adapter/weights/image_encoder")
    assemble(runs, tmp_path / "out")
    return tmp_path / "out", dict(clip.state_dict()), dict(encoder.state_dict())


def equal(model: Any, held: dict[str, torch.Tensor]) -> bool:
    found = model.state_dict()
    return set(found) == set(held) and all(torch.equal(found[key].float(), held[key]) for key in held)


def test_both_networks_load_as_they_were(checkpoint: Checkpoint) -> None:
    out, clip, encoder = checkpoint
    assert not (out / "clip" / WEIGHTS).exists() and not (out / "ip_adapter/image_encoder" / WEIGHTS).exists()
    loaded: Any = CLIPModel.from_pretrained(out / "clip")
    assert equal(loaded, clip)
    assert equal(CLIPVisionModelWithProjection.from_pretrained(out / "ip_adapter/image_encoder"), encoder)
    text: Any = CLIPTextModel.from_pretrained(out / "text_encoder")
    assert all(
        torch.equal(value.float(), clip[f"text_model.{key.removeprefix('text_model.')}"])
        for key, value in text.state_dict().items()
    )


def test_nothing_is_stored_twice(checkpoint: Checkpoint) -> None:
    out, clip, _ = checkpoint
    files = {file for folder in ("clip", "ip_adapter/image_encoder") for file in weight_files(out / folder)}
    stored = sum(len(load_file(str(file))) for file in files)
    # The encoder's kernel of patches and its positions are its own.
    assert stored == len(clip) + 2


def test_again_changes_nothing(checkpoint: Checkpoint) -> None:
    out, _, _ = checkpoint
    before = (out / "clip" / INDEX).read_text()
    assert store_once(out / "clip", out / "text_encoder" / WEIGHTS) == []
    assert (out / "clip" / INDEX).read_text() == before


def test_newer_weights_take_the_place_of_those_in_parts(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """CLIP trained on and put together again: its new weights are loaded, and the encoder keeps its own."""
    out, clip, encoder = checkpoint
    newer: Any = CLIPModel.from_pretrained(tmp_path / "runs/clip/weights")
    with torch.no_grad():
        for parameter in newer.parameters():
            parameter.add_(0.5)
    newer.half().float().save_pretrained(tmp_path / "runs/clip/weights")
    assemble(tmp_path / "runs", out, only="clip")
    assert not (out / "clip" / WEIGHTS).exists()
    loaded: Any = CLIPModel.from_pretrained(out / "clip")
    assert equal(loaded, dict(newer.half().float().state_dict())) and not equal(loaded, clip)
    assert equal(CLIPVisionModelWithProjection.from_pretrained(out / "ip_adapter/image_encoder"), encoder)


def test_a_file_with_tensors_of_its_own_is_not_shared(checkpoint: Checkpoint) -> None:
    out, clip, _ = checkpoint
    other = out / "other.safetensors"
    save_file({"logit_scale": clip["logit_scale"].half(), "another": torch.zeros(1)}, str(other))
    assert store_once(out / "clip", other) == []


def test_a_missing_neighbour_is_named(checkpoint: Checkpoint) -> None:
    out, _, _ = checkpoint
    folder = out / "ip_adapter/image_encoder"
    model: Any = CLIPVisionModelWithProjection.from_pretrained(folder)
    check_keys(model, folder)
    (out / "clip/model-vision.safetensors").unlink()
    with pytest.raises(ModelError, match="model-vision.safetensors, which is not there"):
        check_keys(model, folder)
