"""T2I-Adapter against diffusers' pipelines, its files, and what every control promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    MultiAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionXLAdapterPipeline,
)
from PIL import Image
from safetensors.torch import save_file

from controlroom.backbones.t2i_adapter import feature_slots
from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.controls.spatial.t2i_adapter import T2IAdapter
from controlroom.controls.word_mask import WordMask
from controlroom.core.branch import Branch, State
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import InputError, ModelError
from controlroom.core.run import Run
from controlroom.sampling.pipeline import Pipeline
from tests.controls.nets import tiny_controlnet, tiny_t2i_adapter
from tests.tiny import BACKBONES, tiny_sd1, tiny_sdxl

DRAW: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent"}
REFERENCES = {
    "sd1": StableDiffusionAdapterPipeline,
    "sd2": StableDiffusionAdapterPipeline,
    "sdxl": StableDiffusionXLAdapterPipeline,
}


def picture(seed: int = 0, size: tuple[int, int] = (32, 32)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def mapped(seed: int = 0, rows: int = 1, channels: int = 3) -> torch.Tensor:
    return torch.rand(rows, channels, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def plain() -> Any:
    return tiny_sd1()


def three_levels() -> Any:
    """A light adapter's last feature is as wide as the one before, so it needs two levels of one width."""
    return tiny_sd1(
        block_out_channels=(16, 32, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D",) * 3,
    )


@pytest.fixture(scope="module")
def pipe(plain: Any) -> Pipeline:
    return Pipeline.from_diffusers(plain)


@pytest.fixture(scope="module")
def net(plain: Any) -> Any:
    return tiny_t2i_adapter(plain.unet)


def both(source: Any, controls: list[T2IAdapter], kind: str = "sd1", **settings: Any) -> tuple[Any, Any]:
    """Latents of this engine and of diffusers' pipeline for the same adapters."""
    nets: Any = [control.model for control in controls]
    many = len(nets) > 1
    parts = {k: v for k, v in source.components.items() if k not in ("image_encoder", "feature_extractor")}
    extra = {} if kind == "sdxl" else {"feature_extractor": None, "requires_safety_checker": False}
    reference = REFERENCES[kind](**parts, **extra, adapter=MultiAdapter(nets) if many else nets[0])
    reference.set_progress_bar_config(disable=True)
    settings = {"prompt": "a red cat", "guidance_scale": 7.5, "height": 32, "width": 32, **DRAW, **settings}
    images, scales = [control.image for control in controls], [control.scale for control in controls]
    end = {} if controls[0].end == 1 else {"adapter_conditioning_factor": controls[0].end}
    theirs = reference(
        **settings,
        **end,
        image=images if many else images[0],
        adapter_conditioning_scale=scales if many else scales[0],
        generator=torch.Generator().manual_seed(3),
    ).images
    generator = torch.Generator().manual_seed(3)
    result = Pipeline.from_diffusers(source)(**settings, controls=controls, generator=generator)
    return result.images, theirs


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    assert torch.isfinite(theirs).all()
    return bool((ours - theirs).abs().max() <= 1e-4 * theirs.std())


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize(
    "settings", [{}, {"scale": 0.6}, {"image": picture(1, (48, 40))}], ids=["plain", "scale", "picture"]
)
def test_latents_equal_diffusers(kind: str, settings: dict[str, Any]) -> None:
    source = BACKBONES[kind]()
    adapter = tiny_t2i_adapter(source.unet)
    ours, theirs = both(source, [T2IAdapter(**{"model": adapter, "image": mapped(), **settings})], kind)
    assert close(ours, theirs)
    without = Pipeline.from_diffusers(source)("a red cat", generator=torch.Generator().manual_seed(3), **DRAW).images
    assert (ours - without).abs().max() > 0.05 * theirs.std()


@pytest.mark.parametrize("end", [0.25, 0.5, 0.8])
def test_window_is_the_conditioning_factor(end: float) -> None:
    source = tiny_sdxl()
    assert close(*both(source, [T2IAdapter(tiny_t2i_adapter(source.unet), mapped(), end=end)], "sdxl"))


def test_xl_with_a_feature_for_the_middle_equals_diffusers() -> None:
    """Three levels as the real Stable Diffusion XL: the fourth feature goes into the middle block."""
    source = tiny_sdxl(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 4),
        transformer_layers_per_block=1,
    )
    adapter = tiny_t2i_adapter(source.unet)
    assert len(adapter.config.channels) == 4
    ours, theirs = both(source, [T2IAdapter(adapter, mapped())], "sdxl")
    assert close(ours, theirs)
    with torch.no_grad():
        for parameter in adapter.adapter.body[3].parameters():
            parameter.zero_()
    other, _ = both(source, [T2IAdapter(adapter, mapped())], "sdxl")
    assert (other - ours).abs().max() > 1e-3 * theirs.std()


def test_light_adapter_of_one_channel_equals_diffusers() -> None:
    source = three_levels()
    adapter = tiny_t2i_adapter(source.unet, light=True, in_channels=1)
    assert close(*both(source, [T2IAdapter(adapter, mapped(channels=1), 0.8)]))
    assert close(*both(source, [T2IAdapter(adapter, picture(2).convert("L"))]))


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_batches_equal_diffusers(plain: Any, net: Any, guidance: float) -> None:
    settings = {"prompt": ["a red cat", "dog"], "guidance_scale": guidance}
    assert close(*both(plain, [T2IAdapter(net, mapped(rows=2))], **settings))


def test_several_equal_diffusers_multi_adapter(plain: Any, net: Any) -> None:
    controls = [T2IAdapter(net, mapped(0), 0.7), T2IAdapter(tiny_t2i_adapter(plain.unet, seed=3), mapped(1), 1.2)]
    assert close(*both(plain, controls))


def draw(pipe: Pipeline, *controls: Control, **settings: Any) -> Any:
    return pipe(**{"prompt": "a red cat", "seed": 5, **DRAW, **settings}, controls=list(controls))


def test_runs_once_for_a_run(pipe: Pipeline, net: Any) -> None:
    cost = draw(pipe, T2IAdapter(net, mapped()), T2IAdapter(net, mapped(1), end=0.5)).manifest["cost"]
    assert (cost["side_passes"], cost["side_rows"]) == (2, 2)
    assert (cost["unet_passes"], cost["unet_rows"]) == (4, 8)


@pytest.mark.parametrize("settings", [{"scale": 0.0}, {"start": 0.9, "end": 0.95}])
def test_neutral_is_absence_bit_for_bit_and_free(pipe: Pipeline, net: Any, settings: dict[str, Any]) -> None:
    without, neutral = draw(pipe), draw(pipe, T2IAdapter(net, mapped(), **settings))
    assert torch.equal(without.images, neutral.images)
    assert without.manifest["cost"] == neutral.manifest["cost"]


def test_small_scale_is_close_to_absence(pipe: Pipeline, net: Any) -> None:
    without = draw(pipe).images
    assert (draw(pipe, T2IAdapter(net, mapped(), 1e-4)).images - without).abs().max() < 1e-2 * without.std()


def test_mask_confines_the_features(pipe: Pipeline, net: Any) -> None:
    full = draw(pipe, T2IAdapter(net, mapped())).images
    assert torch.equal(full, draw(pipe, T2IAdapter(net, mapped(), mask=torch.ones(32, 32))).images)
    left, seen = torch.zeros(32, 32), []
    left[:, :16] = 1

    class Spy(T2IAdapter):
        def side(self, step: Any) -> Any:
            seen.extend(super().side(step))
            return tuple(seen[-1:])

    draw(pipe, Spy(net, mapped(), mask=left))
    for feature in seen[0].intrablock:
        width = feature.shape[-1]
        assert feature[..., width // 2 :].abs().max() == 0
        assert feature[..., : width // 2].abs().max() > 0


def test_each_picture_has_its_own_map_and_mask(pipe: Pipeline, net: Any) -> None:
    maps, masks = [mapped(0)[0], picture(1)], [torch.ones(32, 32), torch.eye(32)]
    settings = {"prompt": ["cat", "dog"]}
    together = draw(pipe, T2IAdapter(net, maps, mask=masks), **settings).images
    for i, prompt in enumerate(settings["prompt"]):
        alone = draw(pipe, T2IAdapter(net, maps[i], mask=masks[i]), prompt=prompt, seed=5 + i).images
        assert (together[i : i + 1] - alone).abs().max() < 1e-4 * max(1.0, alone.std().item())


def test_mask_by_words_follows_the_picture(pipe: Pipeline, net: Any) -> None:
    result = draw(pipe, T2IAdapter(net, mapped(), mask=WordMask("cat", threshold=0.95)))
    full, found = draw(pipe, T2IAdapter(net, mapped())), result.masks["T2IAdapter.mask"]
    assert 0 < found.mean() < 1
    assert (result.images - full.images).abs().max() > 1e-3
    assert result.manifest["cost"]["side_passes"] == 1


class Other(Control):
    """A variant of another size, and a reference."""

    type: Any = "other"

    def declare(self, outline: Outline) -> Declaration:
        states = (State("small", hw=(8, 8)), State("reference", "pinned", rows=1))
        branches = (Branch("small", "small", "cond"), Branch("reference", "reference", purpose="reference"))
        return Declaration(states=states, branches=branches)

    def prepare(self, run: Run) -> None:
        tokens = run.encode_text("a dog")
        run.set_condition("small", tokens)
        run.set_condition("reference", tokens)
        run.pin("reference", torch.zeros(1, 4, 16, 16))


def test_branches_of_other_sizes_have_their_own_features_and_references_none(pipe: Pipeline, net: Any) -> None:
    result = draw(pipe, T2IAdapter(net, picture(), mask=torch.eye(32)), Other())
    assert (result.manifest["cost"]["side_passes"], result.manifest["cost"]["side_rows"]) == (2, 2)
    alone = draw(pipe, T2IAdapter(net, picture(), mask=torch.eye(32))).images
    assert (result.images - alone).abs().max() < 1e-4 * alone.std()


def test_beside_a_controlnet_both_act(pipe: Pipeline, plain: Any, net: Any) -> None:
    other = tiny_controlnet(plain.unet)
    together = draw(pipe, T2IAdapter(net, mapped()), ControlNet(other, mapped(1))).images
    for single in (T2IAdapter(net, mapped()), ControlNet(other, mapped(1))):
        assert (together - draw(pipe, single).images).abs().max() > 1e-3


def published(net: Any) -> dict[str, torch.Tensor]:
    """The keys of the published files: blocks counted through all levels, or ``body.i.body.j`` in light adapters."""
    light, depth, found = net.config.adapter_type == "light_adapter", net.config.num_res_blocks, {}
    for key, value in net.adapter.state_dict().items():
        parts = key.split(".")
        if light and "resnets" in parts:
            parts[2] = "body"
        elif "resnets" in parts:
            parts = ["body", str(int(parts[1]) * depth + int(parts[3])), *parts[4:]]
        elif not light and "body" in parts:
            parts[1] = str(int(parts[1]) * depth)
        found[".".join(parts)] = value.contiguous()
    return found


@pytest.mark.parametrize("kind", ["full", "light", "xl"])
def test_loaded_from_folder_and_files_of_both_key_schemes(kind: str, tmp_path: Path) -> None:
    source = {"full": tiny_sd1, "light": three_levels, "xl": tiny_sdxl}[kind]()
    pipe, net = Pipeline.from_diffusers(source), tiny_t2i_adapter(source.unet, light=kind == "light")
    net.save_pretrained(tmp_path / "net")
    expected = draw(pipe, T2IAdapter(net, mapped())).images
    save_file(dict(net.state_dict()), tmp_path / "diffusers.safetensors")
    original = published(net)
    assert ("body.1.in_conv.weight" if kind == "light" else "body.2.in_conv.weight") in original
    assert not any("resnets" in key or key.startswith("adapter.") for key in original)
    save_file(original, tmp_path / "published.safetensors")
    whole = "net/diffusion_pytorch_model.safetensors"
    for place in ("net", whole, "diffusers.safetensors", "published.safetensors"):
        assert torch.equal(draw(pipe, T2IAdapter(tmp_path / place, mapped())).images, expected), place
    kept = len(pipe.backbone.kept)
    draw(pipe, T2IAdapter(str(tmp_path / "net"), mapped()))
    assert len(pipe.backbone.kept) == kept


def test_public_shapes_fit_public_networks() -> None:
    """The features of the published adapters, at 512 and 1024 pixels, are where the real UNets take them."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        sd1 = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        sdxl = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        )
    sizes = [(320, (64, 64)), (640, (32, 32)), (1280, (16, 16)), (1280, (8, 8))]
    assert feature_slots(sd1, (64, 64)) == sizes
    assert feature_slots(sdxl, (128, 128)) == [(320, (64, 64)), (640, (64, 64)), (1280, (32, 32)), (1280, (32, 32))]


def test_errors_name_what_is_wrong(pipe: Pipeline, plain: Any, net: Any, tmp_path: Path) -> None:
    other = tiny_sd1(block_out_channels=(8, 16))
    foreign = tiny_t2i_adapter(other.unet)
    foreign.save_pretrained(tmp_path / "foreign")
    save_file(published(foreign), tmp_path / "foreign.safetensors")
    broken = published(net)
    broken.pop("body.3.block1.bias")
    save_file(broken, tmp_path / "broken.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "not.safetensors")
    for model, said in (
        (foreign, "features are 8 x 16 x 16, 16 x 8 x 8, this model takes 16 x 16 x 16, 32 x 8 x 8"),
        (tmp_path / "foreign", "made for another base model"),
        (tmp_path / "foreign.safetensors", "made for another base model"),
        (tiny_t2i_adapter(tiny_sdxl().unet), "made for another base model"),
        (tmp_path / "broken.safetensors", "1 weights are missing.*body.1.resnets.1.block1.bias"),
        (tmp_path / "not.safetensors", "not a T2I-Adapter"),
        (MultiAdapter([net, net]), "as several controls"),
        (plain.unet, "UNet2DConditionModel"),
        ("nowhere/at/all", "no T2I-Adapter|not been downloaded"),
        (7, "int"),
    ):
        with pytest.raises(ModelError, match=said):
            draw(pipe, T2IAdapter(model, mapped()))
    one = tiny_t2i_adapter(plain.unet, in_channels=1)
    for control, said in (
        (T2IAdapter(net, torch.zeros(3, 16, 16)), "16 x 16, the run draws 32 x 32"),
        (T2IAdapter(net, np.zeros((32, 16, 3), np.float32)), "32 x 16"),
        (T2IAdapter(net, torch.zeros(4, 32, 32)), "4 channels; this network reads 3"),
        (T2IAdapter(one, picture()), "has colours"),
        (T2IAdapter(net, "nowhere.png"), "nowhere.png"),
        (T2IAdapter(net, [mapped()[0]] * 3), "3 conditions for 1 images"),
        (T2IAdapter(net, []), "empty"),
        (T2IAdapter(net, mapped(), mask=torch.zeros(32, 32)), "black all over"),
    ):
        with pytest.raises(InputError, match=said):
            draw(pipe, control)
    with pytest.raises(InputError, match="condition map"):
        T2IAdapter(net, None)
    source = tiny_sdxl()
    with pytest.raises(InputError, match="multiples of 4"):
        draw(Pipeline.from_diffusers(source), T2IAdapter(tiny_t2i_adapter(source.unet), picture()), height=34)
