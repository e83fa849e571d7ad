"""ControlNet against diffusers' pipelines, and what every control promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    MultiControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from PIL import Image
from safetensors.torch import save_file

from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.core.branch import Branch, State
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import ControlRoomError, InputError, ModelError
from controlroom.core.run import Run
from controlroom.sampling.pipeline import Pipeline
from tests.controls.nets import tiny_controlnet
from tests.tiny import BACKBONES

DRAW: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent"}
REFERENCES = {
    "sd1": StableDiffusionControlNetPipeline,
    "sd2": StableDiffusionControlNetPipeline,
    "sdxl": StableDiffusionXLControlNetPipeline,
}


def picture(seed: int = 0, size: tuple[int, int] = (32, 32)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def mapped(seed: int = 0, rows: int = 1) -> torch.Tensor:
    return torch.rand(rows, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def plain() -> Any:
    return BACKBONES["sd1"]()


@pytest.fixture(scope="module")
def pipe(plain: Any) -> Pipeline:
    return Pipeline.from_diffusers(plain)


@pytest.fixture(scope="module")
def net(plain: Any) -> ControlNetModel:
    return tiny_controlnet(plain.unet)


def both(source: Any, controls: list[ControlNet], kind: str = "sd1", **settings: Any) -> tuple[Any, Any]:
    """Latents of this engine and of diffusers' pipeline for the same nets."""
    nets: Any = [control.model for control in controls]
    many = len(nets) > 1
    parts = {name: part for name, part in source.components.items() if name != "image_encoder"}
    reference = REFERENCES[kind](**parts, controlnet=MultiControlNetModel(nets) if many else nets[0])
    reference.set_progress_bar_config(disable=True)
    settings = {"prompt": "a red cat", "guidance_scale": 7.5, **DRAW, **settings}

    def each(name: str) -> Any:
        values = [getattr(control, name) for control in controls]
        return values if many else values[0]

    theirs = reference(
        **settings,
        image=each("image"),
        controlnet_conditioning_scale=each("scale"),
        control_guidance_start=each("start"),
        control_guidance_end=each("end"),
        guess_mode=controls[0].guess_mode,
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
    "settings",
    [
        {},
        {"scale": 0.6},
        {"guess_mode": True},
        {"start": 0.25, "end": 0.75},
        {"image": picture(1, (48, 40))},
        {"image": mapped()[..., ::2, ::4]},
    ],
    ids=["plain", "scale", "guess", "window", "picture", "another size"],
)
def test_latents_equal_diffusers(kind: str, settings: dict[str, Any]) -> None:
    source = BACKBONES[kind]()
    net = tiny_controlnet(source.unet)
    control = ControlNet(**{"model": net, "image": mapped(), **settings})
    # Of a picture of another size, diffusers would take the size.
    ours, theirs = both(source, [control], kind, height=32, width=32)
    assert close(ours, theirs)
    without = Pipeline.from_diffusers(source)("a red cat", generator=torch.Generator().manual_seed(3), **DRAW).images
    assert (ours - without).abs().max() > 0.05 * theirs.std()


@pytest.mark.parametrize("guess", [False, True])
def test_several_equal_diffusers_multi(plain: Any, net: ControlNetModel, guess: bool) -> None:
    other = tiny_controlnet(plain.unet, seed=8)
    controls = [
        ControlNet(net, mapped(0), 0.7, 0.0, 0.5, guess_mode=guess),
        ControlNet(other, mapped(1), 1.2, 0.25, 1.0, guess_mode=guess),
    ]
    assert close(*both(plain, controls))


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("guess", [False, True])
def test_batch_and_no_guidance(plain: Any, net: ControlNetModel, guidance: float, guess: bool) -> None:
    control = ControlNet(net, mapped(0, rows=2), guess_mode=guess)
    settings = {"prompt": ["a red cat", "dog"], "num_images_per_prompt": 2, "guidance_scale": guidance}
    assert close(*both(plain, [control], **settings))


def test_pooled_condition_equals_diffusers(plain: Any) -> None:
    net = tiny_controlnet(plain.unet)
    net.register_to_config(global_pool_conditions=True)
    assert close(*both(plain, [ControlNet(net, mapped())]))
    with pytest.raises(InputError, match="mask"):
        Pipeline.from_diffusers(plain)("cat", controls=[ControlNet(net, mapped(), mask=torch.ones(32, 32))], **DRAW)


def draw(pipe: Pipeline, *controls: Control, **settings: Any) -> Any:
    return pipe(**{"prompt": "a red cat", "seed": 5, **DRAW, **settings}, controls=list(controls))


@pytest.mark.parametrize("settings", [{"scale": 0.0}, {"start": 0.9, "end": 0.95}, {"start": 1.0}])
def test_neutral_is_absence_bit_for_bit_and_free(pipe: Pipeline, net: ControlNetModel, settings: dict) -> None:
    without, neutral = draw(pipe), draw(pipe, ControlNet(net, mapped(), **settings))
    assert torch.equal(without.images, neutral.images)
    assert without.manifest["cost"] == neutral.manifest["cost"]


def test_small_scale_is_close_to_absence(pipe: Pipeline, net: ControlNetModel) -> None:
    without = draw(pipe).images
    assert (draw(pipe, ControlNet(net, mapped(), 1e-4)).images - without).abs().max() < 1e-2 * without.std()


def test_cost_is_one_packed_pass_for_each_net_and_step(pipe: Pipeline, net: ControlNetModel) -> None:
    cost = draw(pipe, ControlNet(net, mapped()), ControlNet(net, mapped(1), end=0.5)).manifest["cost"]
    assert (cost["side_passes"], cost["side_rows"]) == (4 + 2, 2 * (4 + 2))
    assert (cost["unet_passes"], cost["unet_rows"]) == (4, 8)
    guess = draw(pipe, ControlNet(net, mapped(), guess_mode=True)).manifest["cost"]
    assert (guess["side_passes"], guess["side_rows"]) == (4, 4)


def test_mask_confines_the_residuals(pipe: Pipeline, net: ControlNetModel) -> None:
    """White is no mask; halves differ; the residuals of a black part are exactly zero at every resolution."""
    full = draw(pipe, ControlNet(net, mapped())).images
    white = draw(pipe, ControlNet(net, mapped(), mask=torch.ones(32, 32))).images
    assert torch.equal(full, white)
    left = torch.zeros(32, 32)
    left[:, :16] = 1
    halves = [draw(pipe, ControlNet(net, mapped(), mask=m)).images for m in (left, 1 - left)]
    assert (halves[0] - halves[1]).abs().max() > 1e-3

    seen: list[Any] = []

    class Spy(ControlNet):
        def side(self, step: Any) -> Any:
            seen.extend(super().side(step))
            return tuple(seen[-1:])

    draw(pipe, Spy(net, mapped(), mask=left))
    for residual in (*seen[0].down, seen[0].mid):
        width = residual.shape[-1]
        assert residual[..., width // 2 :].abs().max() == 0
        assert residual[..., : width // 2].abs().max() > 0


def test_each_picture_has_its_own_map_and_mask(pipe: Pipeline, net: ControlNetModel) -> None:
    maps = [mapped(0)[0], mapped(1)[0]]
    masks = [torch.ones(32, 32), torch.eye(32)]
    settings = {"prompt": ["cat", "dog"], "scheduler": "ddim"}
    together = draw(pipe, ControlNet(net, maps, mask=masks), **settings).images
    for i, prompt in enumerate(settings["prompt"]):
        alone = draw(pipe, ControlNet(net, maps[i], mask=masks[i]), prompt=prompt, seed=5 + i).images
        assert (together[i : i + 1] - alone).abs().max() < 1e-4 * max(1.0, alone.std().item())


class Other(Control):
    """A variant of another size and text length, and a reference."""

    type: Any = "other"

    def declare(self, outline: Outline) -> Declaration:
        states = (State("small", hw=(8, 8)), State("reference", "pinned", rows=1))
        branches = (Branch("small", "small", "cond"), Branch("reference", "reference", purpose="reference"))
        return Declaration(states=states, branches=branches)

    def prepare(self, run: Run) -> None:
        tokens = run.encode_text("a dog")
        from dataclasses import replace

        run.set_condition("small", replace(tokens, tokens=torch.cat([tokens.tokens, tokens.tokens], 1)))
        run.set_condition("reference", replace(tokens, tokens=tokens.tokens[:1]))
        run.pin("reference", torch.zeros(1, 4, 16, 16))


def test_branches_of_other_sizes_have_their_own_pass_and_references_none(pipe: Pipeline, net: ControlNetModel) -> None:
    result = draw(pipe, ControlNet(net, picture(), mask=torch.eye(32)), Other())
    assert (result.manifest["cost"]["side_passes"], result.manifest["cost"]["side_rows"]) == (8, 12)
    alone = draw(pipe, ControlNet(net, picture(), mask=torch.eye(32))).images
    assert (result.images - alone).abs().max() < 1e-4 * alone.std()


def test_loaded_from_folder_and_file(pipe: Pipeline, plain: Any, net: ControlNetModel, tmp_path: Path) -> None:
    net.save_pretrained(tmp_path / "net")
    expected = draw(pipe, ControlNet(net, mapped())).images
    assert torch.equal(draw(pipe, ControlNet(tmp_path / "net", mapped())).images, expected)
    kept = len(pipe.backbone.kept)
    assert torch.equal(draw(pipe, ControlNet(str(tmp_path / "net"), mapped())).images, expected)
    assert len(pipe.backbone.kept) == kept
    save_file(dict(net.state_dict()), tmp_path / "one.safetensors")
    assert torch.equal(draw(pipe, ControlNet(tmp_path / "one.safetensors", mapped())).images, expected)
    whole = tmp_path / "net" / "diffusion_pytorch_model.safetensors"
    assert torch.equal(draw(pipe, ControlNet(whole, mapped())).images, expected)


def pose_document() -> dict[str, Any]:
    flat: list[float] = []
    for i in range(18):
        flat += [4 + 24 * ((i * 7) % 18) / 18, 4 + 24 * i / 18, 1]
    return {"people": [{"pose_keypoints_2d": flat}], "canvas_width": 32, "canvas_height": 32}


def test_pose_is_drawn(pipe: Pipeline, net: ControlNetModel, tmp_path: Path) -> None:
    from controlroom.signals.pose.openpose_json import read_openpose
    from controlroom.signals.pose.skeleton import draw_skeleton

    document = pose_document()
    path = tmp_path / "pose.json"
    path.write_text(json.dumps(document))
    pose = read_openpose(path)
    expected = draw(pipe, ControlNet(net, draw_skeleton(pose))).images
    for given in (path, str(path), document, json.dumps(document), pose, [pose]):
        assert torch.equal(draw(pipe, ControlNet(net, given)).images, expected)
    twice = {**document, "people": document["people"] * 2}
    assert torch.equal(draw(pipe, ControlNet(net, twice)).images, expected)


def test_a_run_with_a_pose_can_be_written_and_read(net: ControlNetModel) -> None:
    from controlroom.signals.pose.openpose_json import read_openpose

    control = ControlNet("theatre/pose", read_openpose(pose_document()), mask=Image.new("L", (4, 4), 255))
    again = ControlNet(**json.loads(control.model_dump_json()))
    assert again.image == control.image
    assert again.mask.size == (4, 4)


def test_network_is_left_as_it_was(plain: Any) -> None:
    net = tiny_controlnet(plain.unet)
    before = {name: (id(p), p._version, p.requires_grad, p.grad) for name, p in net.named_parameters()}
    draw(Pipeline.from_diffusers(plain), ControlNet(net, mapped(), mask=torch.eye(32)))
    assert before == {name: (id(p), p._version, p.requires_grad, p.grad) for name, p in net.named_parameters()}
    assert not any(module._forward_hooks for module in net.modules())


BAD_INPUT: dict[str, tuple[dict[str, Any], str]] = {
    "missing picture": ({"image": "nowhere.png"}, "does not exist"),
    "missing pose": ({"image": "nowhere.json"}, "nowhere.json"),
    "nobody": ({"image": {"people": []}}, "nobody"),
    "nan": ({"image": torch.full((3, 32, 32), float("nan"))}, "finite"),
    "channels": ({"image": torch.zeros(5, 32, 32)}, "channels"),
    "shape": ({"image": torch.zeros(32)}, "shape"),
    "number": ({"image": [picture(), picture(1), picture(2)]}, "3 conditions for 1"),
    "empty list": ({"image": []}, "empty"),
    "kind": ({"image": 3}, "cannot be read"),
    "none": ({"image": None}, "condition map"),
    "black mask": ({"mask": torch.zeros(8, 8)}, "black"),
    "mask number": ({"mask": [torch.ones(8, 8)] * 2}, "2 masks for 1"),
    "scale": ({"scale": float("inf")}, "scale"),
    "window": ({"start": -1.0}, "start"),
    "unknown": ({"strength": 1.0}, "strength"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(pipe: Pipeline, net: ControlNetModel, case: str) -> None:
    settings, message = BAD_INPUT[case]
    with pytest.raises(InputError, match=message):
        draw(pipe, ControlNet(**{"model": net, "image": mapped(), **settings}))


def test_bad_models(pipe: Pipeline, plain: Any, tmp_path: Path) -> None:
    xl = BACKBONES["sdxl"]()
    wrong = tmp_path / "wrong.safetensors"
    save_file({"a": torch.zeros(1)}, wrong)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    tiny_controlnet(xl.unet).save_pretrained(tmp_path / "xl")
    save_file(dict(tiny_controlnet(xl.unet).state_dict()), tmp_path / "xl.safetensors")
    cases: list[tuple[Any, str]] = [
        ("nowhere/at/all", "not been downloaded"),
        ("./nowhere", "no ControlNet at"),
        ("theatre/nothing", "theatre"),
        ("theatre/../..", "theatre"),
        ("net.bin", "pickle"),
        (tmp_path, "cannot be loaded"),
        (wrong, "not a ControlNet"),
        (broken, "cannot be loaded"),
        (tmp_path / "xl", "another base model"),
        (tmp_path / "xl.safetensors", "another base model"),
        (tiny_controlnet(xl.unet), "another base model"),
        (plain.unet, "ControlNetModel"),
        (7, "int"),
        (tiny_controlnet(plain.unet, conditioning_embedding_out_channels=(8, 8, 16)), "shrinks its condition"),
    ]
    for model, message in cases:
        with pytest.raises(ModelError, match=message):
            draw(pipe, ControlNet(model, mapped()))


def test_positions_are_those_of_the_design() -> None:
    names = [name for name in ControlNet.model_fields if name != "type"]
    assert names == ["model", "image", "scale", "start", "end", "mask", "guess_mode", "kind"]
    assert issubclass(InputError, ControlRoomError)
