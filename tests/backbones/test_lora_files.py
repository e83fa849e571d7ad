"""LoRA files of every tool: read into the same change of the weights as the tool itself makes; written for others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers as sgm_to_diffusers
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from controlroom.backbones.lora_files import load_lora, lora_from_tensors, save_lora
from controlroom.backbones.lora_layers import Hadamard, Kronecker, LayerChange, LowRank
from controlroom.backbones.lora_names import UNET, Names, original_paths
from controlroom.core.errors import ModelError
from tests.controls.loras import ATTENTION, TEXT, add_peft, randomise, saved_by_diffusers
from tests.tiny import tiny_sd1, tiny_sdxl, tiny_unet

GENERATOR = torch.Generator().manual_seed(0)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


def names_of(pipe: Any) -> Names:
    return Names(pipe.unet, pipe.text_encoder, getattr(pipe, "text_encoder_2", None))


def weights_after(names: Names, layers: Any) -> dict[Any, Tensor]:
    return {layer: change.dense(names.layers[layer].weight.detach()) for layer, change in layers.items()}


def assert_same(names: Names, first: Any, second: Any) -> None:
    """Two readings change the same weights by the same amounts."""
    assert first.keys() == second.keys()
    one, two = weights_after(names, first), weights_after(names, second)
    for layer, change in one.items():
        assert (change - two[layer]).abs().max() < 1e-5 * change.abs().max(), layer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of SD1 by diffusers: UNet and text encoder, alpha twice the rank."""
    pipe = tiny_sd1()
    add_peft(pipe.unet, [*ATTENTION, "conv1", "conv_shortcut"])
    add_peft(pipe.text_encoder, TEXT, seed=1)
    return saved_by_diffusers(pipe, tmp_path_factory.mktemp("diffusers"))


def test_original_names_are_those_that_diffusers_maps_back() -> None:
    unet = tiny_unet(
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    ours = {path: name for path, name in original_paths(unet).items() if ".attentions." in path}
    theirs = sgm_to_diffusers(
        {f"lora_unet_{name.replace('.', '_')}.lora_down.weight": noise(2, 2) for name in ours.values()}, unet.config
    )
    words = (("input_blocks", "down_blocks"), ("middle_block", "mid_block"), ("output_blocks", "up_blocks"))
    mapped = {key.removesuffix(".lora_down.weight") for key in theirs}
    for theirs_word, our_word in words:
        mapped = {key.replace(theirs_word, our_word) for key in mapped}
    assert mapped == {f"lora_unet_{path.replace('.', '_')}" for path in ours}
    assert ours["down_blocks.1.attentions.0.proj_in"] == "input_blocks.4.1.proj_in"
    assert original_paths(unet)["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.2.conv"
    assert len(set(original_paths(unet).values())) == len(original_paths(unet)) == len(Names(unet).layers)


def test_kohya_file_equals_the_diffusers_file_it_was_made_from(saved: Path, tmp_path: Path) -> None:
    names = names_of(tiny_sd1())
    ours = load_lora(saved, names)
    tensors = {
        key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): v for key, v in load_file(saved).items()
    }
    kohya: dict[str, Tensor] = {}
    for key, value in tensors.items():
        stem, _, end = key.partition(".lora_")
        part, _, path = stem.partition(".")
        name = f"lora_{'unet' if part == 'unet' else 'te'}_{path.replace('.', '_')}"
        kohya |= {f"{name}.lora_{end}": value, f"{name}.alpha": torch.tensor(6.0)}
    save_file(kohya, str(tmp_path / "kohya.safetensors"))
    read = load_lora(tmp_path / "kohya.safetensors", names)
    assert read.keys == len(kohya) and not read.notes
    assert_same(names, ours.layers, read.layers)


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
@pytest.mark.parametrize("make", [tiny_sd1, tiny_sdxl])
def test_what_is_written_draws_the_same_in_diffusers(make: Any, dialect: Any, tmp_path: Path) -> None:
    source = make()
    add_peft(source.unet, [*ATTENTION, "proj_in"])
    add_peft(source.text_encoder, TEXT, seed=1)
    if make is tiny_sdxl:
        add_peft(source.text_encoder_2, TEXT, seed=2, rank=2)
    file = saved_by_diffusers(source, tmp_path)
    names = names_of(make())
    read = load_lora(file, names)
    save_lora(tmp_path / "ours.safetensors", read.layers, names, dialect, {"ss_sd_model_name": "tiny"})
    assert_same(names, read.layers, load_lora(tmp_path / "ours.safetensors", names).layers)
    theirs = make()
    theirs.load_lora_weights(str(tmp_path / "ours.safetensors"))
    for pipe in (source, theirs):
        pipe.set_progress_bar_config(disable=True)
    draw = {"prompt": "a red cat", "num_inference_steps": 2, "output_type": "latent"}
    expected, found = (p(**draw, generator=torch.Generator().manual_seed(1)).images for p in (source, theirs))
    assert (found - expected).abs().max() < 1e-4 * expected.std()


def test_the_file_that_diffusers_converts_to_kohya_reads_the_same(saved: Path, tmp_path: Path) -> None:
    names = names_of(tiny_sd1())
    theirs = convert_state_dict_to_kohya({k: v for k, v in load_file(saved).items() if k.startswith("unet.")})
    back, _ = _convert_non_diffusers_lora_to_diffusers(dict(theirs))
    assert len(back) == len([k for k in theirs if "alpha" not in k])
    assert lora_from_tensors(theirs, names).layers.keys() == {k for k in load_lora(saved, names).layers if k[0] == UNET}


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora", "loha", "loha-core", "lokr", "lokr-core", "lokr-both"])
def test_equals_peft(kind: str, tmp_path: Path) -> None:
    """The folder that PEFT saves; the outputs of its layers, linear and convolutional."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.conv = nn.Linear(12, 8), nn.Conv2d(6, 8, 3, padding=1, stride=2)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.linear(x), self.conv(y)

    targets = ["linear", "conv"]
    config: Any = {
        "lora": LoraConfig(r=3, lora_alpha=5, target_modules=targets),
        "dora": LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_dora=True),
        "rslora": LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_rslora=True),
        "loha": LoHaConfig(r=3, alpha=5, target_modules=targets),
        "loha-core": LoHaConfig(r=3, alpha=5, target_modules=targets, use_effective_conv2d=True),
        "lokr": LoKrConfig(r=2, alpha=5, target_modules=targets),
        "lokr-core": LoKrConfig(r=2, alpha=5, target_modules=targets, use_effective_conv2d=True),
        "lokr-both": LoKrConfig(r=1, alpha=5, target_modules=targets, decompose_both=True),
    }[kind]
    model = get_peft_model(Net(), config)
    randomise(model, 2)
    model.save_pretrained(str(tmp_path))
    x, y = noise(2, 5, 12), noise(2, 6, 8, 8)
    expected = model(x, y)

    class Layers(Names):
        def __init__(self, net: Net) -> None:
            self.layers: Any = {(UNET, name): getattr(net, name) for name in targets}
            self._known = {name: (UNET, name) for name in targets}
            self.two = False

    net = Net()
    read = load_lora(tmp_path, Layers(net))
    assert read.keys == len(load_file(tmp_path / "adapter_model.safetensors"))
    from controlroom.backbones.lora_layers import Applied

    for name, given, wanted in (("linear", x, expected[0]), ("conv", y, expected[1])):
        layer = getattr(net, name)
        found = layer(given) + Applied.to(layer, read.layers[UNET, name])(given)
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max(), name


def test_comfy_and_old_diffusers_names(saved: Path) -> None:
    pipe = tiny_sd1()
    names = names_of(pipe)
    tensors = {key: value for key, value in load_file(saved).items() if key.startswith("unet.") and "attn" in key}
    expected = lora_from_tensors(tensors, names)
    original = original_paths(pipe.unet)
    comfy: dict[str, Tensor] = {}
    old: dict[str, Tensor] = {}
    for key, value in tensors.items():
        path, _, end = key.removeprefix("unet.").partition(".lora_")
        comfy[f"diffusion_model.{original[path]}.lora_{end}"] = value
        block, _, layer = path.rpartition(".attn")
        number, _, layer = layer.partition(".")
        which = "down" if end.startswith("A") else "up"
        old[f"{block}.attn{number}.processor.{layer.removesuffix('.0')}_lora.{which}.weight"] = value
    assert_same(names, expected.layers, lora_from_tensors(comfy, names).layers)
    assert_same(names, expected.layers, lora_from_tensors(old, names).layers)
    assert expected.notes and "alpha" in expected.notes[0]


def test_locon_core_and_lycoris_factors_in_closed_form() -> None:
    weight = noise(8, 6, 3, 3)
    down, core, up = noise(2, 6, 1, 1), noise(2, 2, 3, 3), noise(8, 2, 1, 1)
    found = LayerChange(LowRank(down, up, core, alpha=1.0)).dense(weight)
    wanted = torch.zeros(8, 6, 3, 3)
    for o in range(8):
        for i in range(6):
            for p in range(2):
                for q in range(2):
                    wanted[o, i] += 0.5 * up[o, p, 0, 0] * core[p, q] * down[q, i, 0, 0]
    assert torch.allclose(found, wanted, atol=1e-5)
    a1, b1, a2, b2 = noise(8, 2), noise(2, 54), noise(8, 2), noise(2, 54)
    found = LayerChange(Hadamard((a1, b1), (a2, b2), alpha=4.0)).dense(weight)
    assert torch.allclose(found.flatten(1), 2 * (a1 @ b1) * (a2 @ b2), atol=1e-4)
    first, second = noise(2, 3), noise(4, 2, 3, 3)
    found = LayerChange(Kronecker((first,), (second,), alpha=7.0)).dense(weight)
    assert torch.allclose(found[5, 3], first[1, 1] * second[1, 1], atol=1e-6)
    lengths = noise(8, 1, 1, 1).abs()
    found = LayerChange(LowRank(noise(2, 6, 3, 3), noise(8, 2, 1, 1)), lengths).dense(weight) + weight
    assert torch.allclose(found.flatten(1).norm(dim=1), lengths.flatten(), atol=1e-5)


def test_every_key_is_accounted_for(saved: Path) -> None:
    names = names_of(tiny_sd1())
    tensors = load_file(saved)
    read = lora_from_tensors(tensors, names)
    assert read.keys == len(tensors)
    assert f"{len(tensors)} of {len(tensors)} keys read: " in read.account and "of the text_encoder" in read.account
    for wrong, message in (
        ({"extra": noise(1)}, "'extra'"),
        ({"unet.down_blocks.7.attn1.to_q.lora_A.weight": noise(1, 1)}, r"down_blocks\.7"),
    ):
        with pytest.raises(ModelError, match=message):
            lora_from_tensors({**tensors, **wrong}, names)
    key = next(key for key in tensors if "lora_A" in key)
    with pytest.raises(ModelError, match="alone"):
        lora_from_tensors({k: v for k, v in tensors.items() if k != key}, names)
    with pytest.raises(ModelError, match=r"Stable Diffusion XL"):
        lora_from_tensors(
            {
                "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": noise(2, 2048),
                "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight": noise(16, 2),
            },
            names,
        )
    with pytest.raises(ModelError, match="IP-Adapter"):
        lora_from_tensors({"image_proj.proj.weight": noise(2, 2)}, names)
    with pytest.raises(ModelError, match="empty"):
        lora_from_tensors({}, names)


def test_metadata_of_what_is_written(saved: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    names = names_of(tiny_sd1())
    save_lora(tmp_path / "d.safetensors", load_lora(saved, names).layers, names, "diffusers")
    with safe_open(str(tmp_path / "d.safetensors"), framework="pt") as file:
        about = json.loads(file.metadata()["lora_adapter_metadata"])
    assert about["unet.lora_alpha"] == 6.0 and about["unet.r"] == 3
    with pytest.raises(ModelError, match="low-rank"):
        save_lora(tmp_path / "x.safetensors", {(UNET, "conv_in"): LayerChange(None, bias=noise(16))}, names)
    assert not (tmp_path / "x.safetensors").exists()
