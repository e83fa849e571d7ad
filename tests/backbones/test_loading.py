"""A checkpoint loads whole, or one error names what is missing; no pickle is opened."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from controlroom.backbones import loading
from controlroom.controls.editing.instruct_pix2pix import InstructPix2Pix
from controlroom.core.errors import ModelError
from controlroom.sampling.pipeline import Pipeline
from tests.tiny import BACKBONES, tiny_sd1, tiny_unet

DRAW: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "seed": 1}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_sd1().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("backbone", BACKBONES)
def test_folder_round_trip(backbone: str, tmp_path: Path) -> None:
    pipe = BACKBONES[backbone]()
    pipe.save_pretrained(tmp_path)
    loaded = Pipeline.from_pretrained(tmp_path)
    assert loaded.backbone.name == backbone
    for name, value in pipe.unet.state_dict().items():
        assert torch.equal(value, loaded.unet.state_dict()[name])
    # Loaded tensors are aligned otherwise in memory, which moves the last bit.
    ours, theirs = (p("a cat", **DRAW).images for p in (loaded, Pipeline.from_diffusers(pipe)))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_dtype_under_both_names(saved: Path) -> None:
    assert Pipeline.from_pretrained(saved, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert Pipeline.from_pretrained(saved, torch_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_components_are_used_as_they_are() -> None:
    theirs = tiny_sd1()
    ours = Pipeline.from_diffusers(theirs)
    assert ours.unet is theirs.unet and ours.to_diffusers() is theirs


def drop_key(part: str, key: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (path,) = (folder / part).glob("*.safetensors")
        weights = load_file(path)
        found = [name for name in weights if name.endswith(key)]
        assert found
        del weights[found[0]]
        save_file(weights, path, metadata={"format": "pt"})

    return damage


def to_pickle(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))


def other_tokenizer(folder: Path) -> None:
    for path in (folder / "tokenizer").glob("tokenizer.json"):
        path.unlink()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({f"{i}</w>": i for i in range(400)}))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f / "text_encoder"), "no text_encoder/"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "no tokenizer/"),
        (lambda f: [p.unlink() for p in (f / "tokenizer").iterdir()], "neither vocab.json"),
        (lambda f: (f / "vae" / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "unet" / "config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "no weights"),
        (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b""), "cut off"),
        (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 99), "cannot be loaded"),
        (to_pickle, "pickle"),
        (drop_key("text_encoder", "token_embedding.weight"), "token_embedding"),
        (drop_key("unet", "conv_in.weight"), "conv_in"),
        (drop_key("vae", "post_quant_conv.bias"), "post_quant_conv"),
        (other_tokenizer, "tokens"),
        (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
    ],
)
def test_a_missing_part_is_named(saved: Path, tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    damage(folder)
    with pytest.raises(ModelError, match=message):
        Pipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.ckpt", "model.PT", "a/b.bin", "./none", "/no/such/model", "none.safetensors"])
def test_pickles_and_nothing_are_refused(name: str) -> None:
    with pytest.raises(ModelError):
        Pipeline.from_pretrained(name)


def test_a_broken_single_file_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x" * 1000)
    with pytest.raises(ModelError, match="cannot be loaded"):
        Pipeline.from_pretrained(path)


@pytest.mark.parametrize("missing", ["unet", "vae", "scheduler", "text_encoder", "tokenizer"])
def test_from_diffusers_names_the_missing_component(missing: str) -> None:
    pipe = tiny_sd1()
    parts = {name: getattr(pipe, name) for name in ("unet", "vae", "scheduler", "text_encoder", "tokenizer")}
    with pytest.raises(ModelError, match=missing if missing != "unet" else "UNet2DConditionModel"):
        Pipeline.from_diffusers(SimpleNamespace(**{**parts, missing: None}))


def test_ip_adapter_of_diffusers_must_be_unloaded_first() -> None:
    pipe = tiny_sd1()
    pipe.unet = tiny_unet()
    pipe.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    with pytest.raises(ModelError, match="unload_ip_adapter"):
        Pipeline.from_diffusers(pipe)


class TestTheatreWithAnotherNetwork:
    @pytest.fixture
    def theatre(self, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        folder = tmp_path / "theatre"
        shutil.copytree(saved, folder)
        monkeypatch.setattr(loading, "theatre_folder", lambda: folder)
        return folder

    def test_follows_instructions_with_all_other_parts_of_the_theatre(self, theatre: Path) -> None:
        tiny_unet(seed=7, in_channels=8).save_pretrained(theatre / "instruct_pix2pix")
        pipe, plain = (Pipeline.from_pretrained(name) for name in ("theatre/instruct_pix2pix", "theatre"))
        assert pipe.model == "theatre/instruct_pix2pix" and pipe.unet.config.in_channels == 8
        for part in ("vae", "text_encoder"):
            ours, theirs = (getattr(p.to_diffusers(), part).state_dict() for p in (pipe, plain))
            assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
        own = tiny_unet(seed=7, in_channels=8).state_dict()
        assert all(torch.equal(value, own[name]) for name, value in pipe.unet.state_dict().items())
        pictures = [torch.full((3, 32, 32), value) for value in (0.2, 0.8)]
        drawn = [pipe("a red hat", controls=[InstructPix2Pix(picture)], **DRAW).images for picture in pictures]
        assert torch.isfinite(drawn[0]).all() and not torch.equal(*drawn)
        assert Pipeline.from_pretrained("theatre/instruct_pix2pix", dtype=torch.bfloat16).dtype == torch.bfloat16

    def test_what_is_not_there_or_no_model_is_named(self, theatre: Path) -> None:
        tiny_unet(seed=5).save_pretrained(theatre / "appearance")
        for name, said in (
            ("theatre/instruct_pix2pix", "has no 'theatre/instruct_pix2pix'. It has: appearance"),
            ("theatre/appearance", "'theatre/appearance' is a part of the theatre that a control takes"),
            ("theatre/vae", "'theatre/vae' is a part of the theatre"),
            ("theatre/../theatre/unet", "has no"),
        ):
            with pytest.raises(ModelError, match=re.escape(said)):
                Pipeline.from_pretrained(name)
        tiny_unet(seed=7, in_channels=8).save_pretrained(theatre / "instruct_pix2pix")
        drop_key("instruct_pix2pix", "conv_in.weight")(theatre)
        with pytest.raises(ModelError, match=r"instruct_pix2pix lacks the weights 'conv_in\.weight'"):
            Pipeline.from_pretrained("theatre/instruct_pix2pix")
