"""IP-Adapter against diffusers' pipelines with `load_ip_adapter`, and what every control promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from controlroom.backbones.image_projection import LinearProjection
from controlroom.backbones.ip_adapter import IPAdapterModel, adapter_from_tensors, layer_numbers
from controlroom.controls.personal.ip_adapter import IPAdapter
from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.core.errors import InputError, ModelError
from controlroom.sampling.pipeline import Pipeline
from tests.controls.nets import tiny_controlnet, tiny_image_encoder, tiny_ip_adapter
from tests.tiny import BACKBONES

DRAW: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}


def picture(seed: int = 0, size: tuple[int, int] = (50, 40)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def half(left: bool, size: int = 32) -> torch.Tensor:
    mask = torch.zeros(size, size)
    mask[:, : size // 2] = 1
    return mask if left else 1 - mask


@pytest.fixture(scope="module")
def encoder() -> Any:
    return tiny_image_encoder()


def nested(file: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in file.items():
        group, _, rest = key.partition(".")
        found[group][rest] = value
    return found


def theirs(kind: str, variant: str, encoder: Any, scale: Any, **settings: Any) -> torch.Tensor:
    from transformers import CLIPImageProcessor

    pipe = BACKBONES[kind]()
    pipe.set_progress_bar_config(disable=True)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pipe.register_modules(image_encoder=encoder, feature_extractor=processor)
    file = nested(tiny_ip_adapter(pipe.unet, variant))
    pipe.load_ip_adapter(file, subfolder="", weight_name="", image_encoder_folder=None)
    pipe.set_ip_adapter_scale(scale)
    settings = {"prompt": "a red cat", "guidance_scale": 7.5, **DRAW, **settings}
    return pipe(**settings, generator=torch.Generator().manual_seed(3)).images


def ours(kind: str, variant: str, encoder: Any, settings: dict[str, Any] | None = None, **control: Any) -> torch.Tensor:
    pipe = Pipeline.from_diffusers(BACKBONES[kind]())
    adapter = IPAdapter(tiny_ip_adapter(pipe.unet, variant), image_encoder=encoder, **control)
    drawn = {"prompt": "a red cat", "guidance_scale": 7.5, **DRAW, **(settings or {})}
    return pipe(**drawn, controls=[adapter], generator=torch.Generator().manual_seed(3)).images


def without(kind: str, **settings: Any) -> torch.Tensor:
    pipe = Pipeline.from_diffusers(BACKBONES[kind]())
    drawn = {"prompt": "a red cat", "guidance_scale": 7.5, **DRAW, **settings}
    return pipe(**drawn, generator=torch.Generator().manual_seed(3)).images


def check(mine: torch.Tensor, reference: torch.Tensor, plain: torch.Tensor) -> None:
    assert torch.isfinite(reference).all()
    assert (mine - reference).abs().max() <= 1e-4 * reference.std()
    assert (mine - plain).abs().max() > 0.05 * reference.std()


@pytest.mark.parametrize("variant", ["base", "plus", "full"])
@pytest.mark.parametrize("kind", BACKBONES)
def test_latents_equal_diffusers(kind: str, variant: str, encoder: Any) -> None:
    reference = theirs(kind, variant, encoder, 0.7, ip_adapter_image=picture())
    check(ours(kind, variant, encoder, image=picture(), scale=0.7), reference, without(kind))


@pytest.mark.parametrize("variant", ["base", "plus"])
def test_two_pictures_are_joined(variant: str, encoder: Any) -> None:
    pictures = [picture(0), picture(1, (33, 64))]
    reference = theirs("sd1", variant, encoder, 1.0, ip_adapter_image=[pictures])
    check(ours("sd1", variant, encoder, image=pictures), reference, without("sd1"))


@pytest.mark.parametrize("variant", ["base", "plus"])
@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_mask(variant: str, size: tuple[int, int], encoder: Any) -> None:
    mask = torch.zeros(1, 1, *size)
    mask[..., 6:24, 4:22] = 1
    settings = {"height": size[0], "width": size[1]}
    reference = theirs(
        "sd1",
        variant,
        encoder,
        0.9,
        ip_adapter_image=picture(),
        cross_attention_kwargs={"ip_adapter_masks": [mask]},
        **settings,
    )
    check(
        ours("sd1", variant, encoder, settings, image=picture(), scale=0.9, mask=mask),
        reference,
        without("sd1", **settings),
    )


@pytest.mark.parametrize("scales", [[0.8, 0.8], [0.9, 0.4]])
def test_a_mask_and_a_scale_for_each_picture(scales: list[float], encoder: Any) -> None:
    pictures, masks = [picture(0), picture(1)], torch.stack([half(True), half(False)])[None]
    reference = theirs(
        "sd1",
        "base",
        encoder,
        [scales],
        ip_adapter_image=[pictures],
        cross_attention_kwargs={"ip_adapter_masks": [masks]},
    )
    mine = ours("sd1", "base", encoder, image=pictures, scale=scales, mask=[half(True), half(False)])
    check(mine, reference, without("sd1"))
    assert torch.equal(mine, ours("sd1", "base", encoder, image=pictures, scale=scales, mask=masks))


@pytest.mark.parametrize(
    ("kind", "scale"),
    [
        ("sd1", {"up": {"block_0": [0.0, 1.0]}}),
        ("sd1", {"down": 0.5, "mid": 0.3, "up": [0.2, 0.9]}),
        ("sd1", {"down": {"block_0": [1.0]}, "mid": [0.5]}),
        ("sdxl", {"down": {"block_1": 0.7}, "up": {"block_0": [0.0, 1.0]}}),
    ],
)
def test_scales_by_layer(kind: str, scale: dict[str, Any], encoder: Any) -> None:
    reference = theirs(kind, "base", encoder, scale, ip_adapter_image=picture())
    check(ours(kind, "base", encoder, image=picture(), scale=scale), reference, without(kind))
    assert torch.equal(
        ours(kind, "base", encoder, image=picture(), scale=scale),
        ours(kind, "base", encoder, image=picture(), scale=[scale]),
    )


@pytest.mark.parametrize("variant", ["base", "plus"])
def test_features_made_before(variant: str, encoder: Any) -> None:
    shape = (2, 2, 24) if variant == "base" else (2, 2, 17, 32)
    embeds = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    reference = theirs("sd1", variant, encoder, 1.0, ip_adapter_image_embeds=[embeds])
    check(ours("sd1", variant, encoder, embeds=embeds), reference, without("sd1"))
    assert torch.equal(ours("sd1", variant, encoder, embeds=[embeds]), ours("sd1", variant, encoder, embeds=embeds))
    unguided = {"guidance_scale": 1.0}
    reference = theirs("sd1", variant, encoder, 1.0, ip_adapter_image_embeds=[embeds[1:]], **unguided)
    for given in (embeds, embeds[1:], embeds[1]):
        check(ours("sd1", variant, encoder, unguided, embeds=given), reference, without("sd1", **unguided))


def test_faceid_with_its_changes_to_the_layers(encoder: Any) -> None:
    pytest.importorskip("peft")
    embeds = torch.randn(2, 1, 10, generator=torch.Generator().manual_seed(1))
    embeds[0] = 0
    reference = theirs("sd1", "faceid", encoder, 0.8, ip_adapter_image_embeds=[embeds])
    mine = ours("sd1", "faceid", encoder, embeds=embeds[1], scale=0.8)
    check(mine, reference, without("sd1"))
    pipe = Pipeline.from_diffusers(BACKBONES["sd1"]())
    bare = {key: value for key, value in tiny_ip_adapter(pipe.unet, "faceid").items() if "_lora" not in key}
    settings = {"guidance_scale": 7.5, **DRAW, "generator": torch.Generator().manual_seed(3)}
    changed = pipe("a red cat", controls=[IPAdapter(bare, embeds=embeds[1], scale=0.8)], **settings).images
    assert (mine - changed).abs().max() > 0.05 * mine.std()


def test_batch_and_several_images_of_a_prompt(encoder: Any) -> None:
    settings = {"prompt": ["a red cat", "dog"], "num_images_per_prompt": 2}
    reference = theirs("sd1", "plus", encoder, 1.0, ip_adapter_image=picture(), **settings)
    check(ours("sd1", "plus", encoder, settings, image=picture()), reference, without("sd1", **settings))


def test_pixels_already_normalised(encoder: Any) -> None:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    reference = theirs("sd1", "base", encoder, 1.0, ip_adapter_image=[pixels])
    check(ours("sd1", "base", encoder, image=pixels), reference, without("sd1"))


def test_window_is_that_of_a_scale_set_step_by_step(encoder: Any) -> None:
    """diffusers has no window; a callback that sets the scale after each step is the same."""

    def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe.set_ip_adapter_scale(0.8 if 0.25 <= (i + 1) / 4 and (i + 2) / 4 <= 0.75 else 0.0)
        return tensors

    settings = {"num_inference_steps": 4}
    reference = theirs(
        "sd1", "base", encoder, 0.0, ip_adapter_image=picture(), callback_on_step_end=callback, **settings
    )
    mine = ours("sd1", "base", encoder, settings, image=picture(), scale=0.8, start=0.25, end=0.75)
    check(mine, reference, without("sd1", **settings))


def test_with_a_controlnet(encoder: Any) -> None:
    """Both in one run against diffusers' pipeline with both."""
    from diffusers import StableDiffusionControlNetPipeline
    from transformers import CLIPImageProcessor

    plain = BACKBONES["sd1"]()
    net = tiny_controlnet(plain.unet)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    parts = {**plain.components, "image_encoder": encoder, "feature_extractor": processor}
    pipe = StableDiffusionControlNetPipeline(**parts, controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    file = tiny_ip_adapter(pipe.unet, "plus")
    pipe.load_ip_adapter(nested(file), subfolder="", weight_name="", image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.6)
    condition = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    settings = {"prompt": "a red cat", "guidance_scale": 7.5, **DRAW}
    generator = torch.Generator().manual_seed(3)
    reference = pipe(image=condition, ip_adapter_image=picture(), generator=generator, **settings).images
    controls = [ControlNet(net, condition), IPAdapter(file, picture(), scale=0.6, image_encoder=encoder)]
    for order in (controls, controls[::-1]):
        mine = Pipeline.from_diffusers(BACKBONES["sd1"]())
        drawn = mine(**settings, controls=order, generator=torch.Generator().manual_seed(3)).images
        assert (drawn - reference).abs().max() <= 1e-4 * reference.std()


def test_a_run_is_written_read_and_drawn_again(pipe: Pipeline, folder: Path, tmp_path: Path) -> None:
    from controlroom.sampling.pipeline import replay

    control = IPAdapter(folder / "base.safetensors", [picture()], scale={"up": 0.7}, mask=[Image.new("L", (4, 4), 200)])
    result = pipe("cat", controls=[control], num_inference_steps=2, seed=5)
    result.images[0].save(tmp_path / "cat.png")
    assert replay(tmp_path / "cat.png", pipe).tobytes() == result.images[0].tobytes()


# What every control promises.


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(BACKBONES["sd1"]())


@pytest.fixture(scope="module")
def folder(pipe: Pipeline, encoder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ip")
    for variant in ("base", "plus"):
        save_file(tiny_ip_adapter(pipe.unet, variant), place / f"{variant}.safetensors")
    encoder.save_pretrained(place / "image_encoder")
    return place


def draw(pipe: Pipeline, *controls: IPAdapter, **settings: Any) -> Any:
    return pipe(**{"prompt": "a red cat", "seed": 5, **DRAW, **settings}, controls=list(controls))


@pytest.mark.parametrize(
    "settings",
    [{"scale": 0.0}, {"scale": {"up": {"block_0": [0.0, 0.0]}}}, {"scale": [0.0]}, {"start": 0.9, "end": 0.95}],
)
def test_neutral_is_absence_bit_for_bit_and_free(pipe: Pipeline, folder: Path, settings: dict[str, Any]) -> None:
    plain, neutral = draw(pipe), draw(pipe, IPAdapter(folder / "base.safetensors", picture(), **settings))
    assert torch.equal(plain.images, neutral.images)
    assert plain.manifest["cost"] == neutral.manifest["cost"]
    assert list(neutral.manifest["dropped"]) == ["IPAdapter"]


def test_small_scale_is_close_to_absence_and_costs_no_rows(pipe: Pipeline, folder: Path) -> None:
    plain, small = draw(pipe), draw(pipe, IPAdapter(folder / "base.safetensors", picture(), scale=1e-4))
    assert 0 < (plain.images - small.images).abs().max() < 1e-2 * plain.images.std()
    assert small.manifest["cost"] == plain.manifest["cost"]


def test_file_and_encoder_beside_it(pipe: Pipeline, folder: Path, encoder: Any) -> None:
    for variant in ("base", "plus"):
        file = folder / f"{variant}.safetensors"
        given = IPAdapter(tiny_ip_adapter(pipe.unet, variant), picture(), image_encoder=encoder)
        expected = draw(pipe, given).images
        kept: set[int] = set()
        model = adapter_from_tensors(tiny_ip_adapter(pipe.unet, variant), pipe.unet)
        for adapter in (
            IPAdapter(str(file), picture()),
            IPAdapter(file, picture(), image_encoder=folder / "image_encoder"),
            IPAdapter(model, picture(), image_encoder=encoder),
        ):
            # Weights from a file lie elsewhere in memory, which can change the last bit of a sum.
            assert (draw(pipe, adapter).images - expected).abs().max() < 1e-4 * expected.std()
            kept.add(len(pipe.backbone.kept))
        assert len(kept) == 1, "loaded once"


def test_pooling_one_picture_given_several_times_is_that_picture(pipe: Pipeline, folder: Path) -> None:
    file, one, other = folder / "plus.safetensors", picture(), picture(1)
    alone = draw(pipe, IPAdapter(file, one)).images
    for how in ("average", "max"):
        same = draw(pipe, IPAdapter(file, [one, one, one], aggregate=how)).images
        assert (same - alone).abs().max() < 1e-4 * alone.std()
        assert (draw(pipe, IPAdapter(file, [one, other], aggregate=how)).images - alone).abs().max() > 1e-3


def test_pictures_of_each_prompt(pipe: Pipeline, folder: Path) -> None:
    file, pictures = folder / "base.safetensors", [[picture(0), picture(1)], [picture(2), picture(3)]]
    settings = {"prompt": ["cat", "dog"], "scheduler": "ddim"}
    together = draw(pipe, IPAdapter(file, pictures), **settings).images
    for i, prompt in enumerate(settings["prompt"]):
        alone = draw(pipe, IPAdapter(file, pictures[i]), prompt=prompt, seed=5 + i).images
        assert (together[i : i + 1] - alone).abs().max() < 1e-4 * max(1.0, alone.std().item())


def test_two_adapters_add_up_and_order_does_not_matter(pipe: Pipeline, folder: Path) -> None:
    a = IPAdapter(folder / "base.safetensors", picture(), scale=0.5)
    b = IPAdapter(folder / "plus.safetensors", picture(1), scale=0.5, mask=half(True))
    both, other_way = draw(pipe, a, b).images, draw(pipe, b, a).images
    torch.testing.assert_close(both, other_way, atol=1e-4, rtol=1e-4)
    assert (both - draw(pipe, a).images).abs().max() > 1e-3


def test_mask_confines(pipe: Pipeline, folder: Path) -> None:
    """White is no mask; two halves of one picture's mask are not the same."""
    file = folder / "base.safetensors"
    full = draw(pipe, IPAdapter(file, picture())).images
    white = draw(pipe, IPAdapter(file, picture(), mask=Image.new("L", (8, 8), 255))).images
    torch.testing.assert_close(full, white, atol=1e-5, rtol=1e-5)
    left, right = (draw(pipe, IPAdapter(file, picture(), mask=half(x))).images for x in (True, False))
    assert (left - right).abs().max() > 1e-3


@pytest.mark.parametrize("variant", ["plus", "faceid"])
def test_no_trace(variant: str, encoder: Any) -> None:
    source = BACKBONES["sd1"]()
    pipe = Pipeline.from_diffusers(source)
    file = tiny_ip_adapter(pipe.unet, variant)

    def traces() -> list[Any]:
        found: list[Any] = [(name, id(p), p._version, p.requires_grad) for name, p in pipe.unet.named_parameters()]
        found += [(id(layer.processor)) for layer in pipe.unet.modules() if hasattr(layer, "processor")]
        found += [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in pipe.unet.named_modules()]
        found += [(name, id(p), p._version, p.requires_grad) for name, p in encoder.named_parameters()]
        return [*found, sorted(file), [t._version for t in file.values()]]

    before = traces()
    given: dict[str, Any] = {"image": picture()} if variant == "plus" else {"embeds": torch.ones(1, 10)}
    drawn = draw(pipe, IPAdapter(file, image_encoder=encoder, **given)).images
    assert traces() == before
    assert (drawn - draw(pipe).images).abs().max() > 1e-3
    with pytest.raises(InputError):
        draw(pipe, IPAdapter(file, image_encoder=encoder, mask=torch.zeros(4, 4), **given))
    assert traces() == before


def test_a_new_adapter_starts_as_the_text(pipe: Pipeline) -> None:
    """What training starts from: the file it would save holds the text's keys and values, and loads again."""
    model = IPAdapterModel.for_unet(pipe.unet, LinearProjection(24, 32, 4))
    again = adapter_from_tensors(model.state_dict(), pipe.unet)
    for name, number in layer_numbers(pipe.unet).items():
        layer = pipe.unet.get_submodule(name)
        tokens = torch.randn(1, 4, 32)
        k, v = again.keys_and_values(number, tokens)
        torch.testing.assert_close(k, layer.to_k(tokens))
        torch.testing.assert_close(v, layer.to_v(tokens))
    assert list(layer_numbers(pipe.unet).values()) == [1, 3, 5, 7, 9, 11]


BAD_INPUT: dict[str, tuple[dict[str, Any], str]] = {
    "neither": ({"image": None}, "one of them"),
    "both": ({"embeds": torch.zeros(1, 24)}, "one of them"),
    "missing": ({"image": "nowhere.png"}, "does not exist"),
    "empty": ({"image": []}, "empty"),
    "uneven": ({"image": [[picture()], [picture(), picture()]]}, "as many pictures"),
    "prompts": ({"image": [[picture()], [picture()]]}, "2 prompts"),
    "kind": ({"image": 3}, "cannot be read"),
    "narrow": ({"image": Image.new("RGB", (2000, 2))}, "narrow"),
    "nan": ({"image": torch.full((3, 32, 32), float("nan"))}, "finite"),
    "embeds shape": ({"image": None, "embeds": torch.zeros(3, 1, 24)}, "shape"),
    "embeds width": ({"image": None, "embeds": torch.zeros(1, 9)}, "shape"),
    "embeds kind": ({"image": None, "embeds": "x"}, "tensor"),
    "embeds nan": ({"image": None, "embeds": torch.full((1, 24), float("inf"))}, "finite"),
    "black mask": ({"mask": torch.zeros(8, 8)}, "black"),
    "mask number": ({"mask": [torch.ones(8, 8)] * 3}, "3 masks for 1"),
    "scale number": ({"scale": [0.5, 0.5, 0.5]}, "3 numbers for 1"),
    "scale place": ({"scale": {"middle": 1.0}}, "middle"),
    "scale block": ({"scale": {"up": {"block_7": 1.0}}}, "block_7"),
    "scale length": ({"scale": {"up": {"block_0": [1.0, 1.0, 1.0]}}}, "3 numbers for up.block_0"),
    "scale kind": ({"scale": {"up": "much"}}, "must be a number"),
    "scale empty": ({"scale": {}}, "scale"),
    "scale nan": ({"scale": float("nan")}, "scale"),
    "aggregate": ({"aggregate": "sum"}, "aggregate"),
    "unknown": ({"weight": 1.0}, "weight"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(pipe: Pipeline, folder: Path, case: str) -> None:
    settings, message = BAD_INPUT[case]
    with pytest.raises(InputError, match=message):
        draw(pipe, IPAdapter(**{"model": folder / "base.safetensors", "image": picture(), **settings}))


def test_bad_models(pipe: Pipeline, folder: Path, encoder: Any, tmp_path: Path) -> None:
    good = tiny_ip_adapter(pipe.unet)
    first = next(key for key in good if key.startswith("ip_adapter."))
    short = {key: value for key, value in good.items() if not key.startswith("ip_adapter.11.")}
    faceid = tiny_ip_adapter(pipe.unet, "faceid")
    alone = tmp_path / "alone.safetensors"
    save_file(good, alone)
    other = tmp_path / "other"
    other.mkdir()
    save_file({**good, "image_proj.proj.weight": torch.zeros(128, 99)}, other / "ip_adapter.safetensors")
    encoder.save_pretrained(other / "image_encoder")
    cases: list[tuple[Any, str]] = [
        ("ip-adapter_sd15.bin", "pickle"),
        ("h94/IP-Adapter/models/ip-adapter_sd15.safetensors", "not been downloaded"),
        (folder, "one .safetensors file"),
        (alone, "no .*image_encoder"),
        (other, "99 wide"),
        (good, "image_encoder, or embeds"),
        ({**good, "extra": torch.zeros(1)}, "'extra'"),
        ({**good, "ip_adapter.1.to_q_ip.weight": torch.zeros(1, 1)}, "to_q_ip"),
        ({**good, "image_proj.other": torch.zeros(1)}, "image_proj.other"),
        ({**good, "aggregator.to_v.weight": torch.eye(24)}, "cannot be left out"),
        ({**good, "image_proj.norm.bias": torch.zeros(7)}, "image_proj.norm.bias"),
        ({**good, first: torch.zeros(3)}, "expected a matrix"),
        ({**good, first: torch.zeros(3, 32)}, "another base model"),
        ({key: value for key, value in good.items() if not key.startswith("image_proj")}, "lacks"),
        ({**good, **{"image_proj.perceiver_resampler.proj_in.weight": torch.zeros(1, 1)}}, "perceiver"),
        (short, "5 cross-attention layers, this model 6"),
        ({**faceid, "ip_adapter.0.to_q_lora.down.weight": torch.zeros(3, 99)}, "does not fit"),
        (tiny_ip_adapter(BACKBONES["sdxl"]().unet), "another base model"),
        ({**good, first: "x"}, "tensors"),
        (pipe.unet, "UNet2DConditionModel"),
    ]
    for model, message in cases:
        with pytest.raises(ModelError, match=message):
            draw(pipe, IPAdapter(model, picture()))
    with pytest.raises(InputError, match="identity"):
        draw(pipe, IPAdapter(faceid, picture(), image_encoder=encoder))
    with pytest.raises(ModelError, match="CLIPVisionModelWithProjection"):
        draw(pipe, IPAdapter(good, picture(), image_encoder=pipe.unet))


def test_positions_are_those_of_the_design() -> None:
    names = [name for name in IPAdapter.model_fields if name != "type"]
    assert names[:5] == ["model", "image", "embeds", "scale", "mask"]
