"""A whole model in one ``.safetensors`` file, in the original layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from controlroom.core.errors import ModelError
from controlroom.sampling.pipeline import Pipeline
from tests.ldm import ldm_checkpoint
from tests.tiny import tiny_sd1

DRAW: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt", "seed": 5, "height": 16, "width": 16}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return ldm_checkpoint(tiny_sd1(seed=4))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same shape and other weights: only its configurations and its tokenizer may be used."""
    folder = tmp_path_factory.mktemp("config")
    tiny_sd1(seed=8).save_pretrained(folder)
    for file in folder.glob("*/*.safetensors"):
        file.unlink()
    return folder


@pytest.fixture
def file(weights: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(weights, str(path))
    return path


def test_draws_what_the_pipeline_draws(file: Path, config: Path) -> None:
    expected = Pipeline.from_diffusers(tiny_sd1(seed=4))("a red cat", **DRAW).images
    pipe = Pipeline.from_pretrained(file, config=config)
    assert pipe.dtype == torch.float32
    assert torch.equal(pipe("a red cat", **DRAW).images, expected)
    half = Pipeline.from_pretrained(file, torch_dtype=torch.bfloat16, config=config)
    assert half.dtype == half.vae.dtype == torch.bfloat16
    assert (half("a red cat", **DRAW).images.float() - expected).abs().mean() < 0.05


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.out.2.weight",
        "model.diffusion_model.middle_block.1.proj_in.weight",
        "first_stage_model.decoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    ],
)
def test_a_key_that_is_missing(key: str, file: Path, config: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file({name: value for name, value in weights.items() if name != key}, str(file))
    with pytest.raises(ModelError, match="lacks weights"):
        Pipeline.from_pretrained(file, config=config)


def test_configurations_that_are_not_there(
    file: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ModelError, match=r"hf download stable-diffusion-v1-5/stable-diffusion-v1-5 "):
        Pipeline.from_pretrained(file)
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        Pipeline.from_pretrained(file, config=tmp_path)
    other = tmp_path / "other"
    shutil.copytree(config, other)
    (other / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="never opened"):
        Pipeline.from_pretrained(file, config=other)


def test_nothing_is_downloaded_for_a_file(file: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool | None] = []
    there = False

    def snapshot(repository: str, local_files_only: bool | None = None, **rest: Any) -> str:
        asked.append(local_files_only)
        if not there:
            raise LocalEntryNotFoundError("not here")
        return str(config)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("diffusers.loaders.single_file.snapshot_download", snapshot)
    with pytest.raises(ModelError, match=r"controlroom convert .* --base FOLDER.*hf download"):
        Pipeline.from_pretrained(file)
    assert asked == [True]
    there = True
    # What was downloaded before is used.
    assert Pipeline.from_pretrained(file).backbone.name == "sd1"
    assert asked == [True, True]


def test_weights_of_another_shape(file: Path, config: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file({**weights, "model.diffusion_model.out.2.weight": torch.zeros(4, 8, 3, 3)}, str(file))
    with pytest.raises(ModelError, match="cannot be loaded"):
        Pipeline.from_pretrained(file, config=config)
    save_file({"unknown": torch.zeros(1)}, str(file))
    with pytest.raises(ModelError):
        Pipeline.from_pretrained(file, config=config)
    file.write_bytes(b"\x10\0\0\0\0\0\0\0{broken")
    with pytest.raises(ModelError, match="cannot be loaded"):
        Pipeline.from_pretrained(file, config=config)
