"""What every control of the catalogue promises, alone and with every other one.

A control that lands adds its line to `SETTINGS`, `NEUTRAL` and `ARGUMENTS`; everything here then holds for it too.
Weights lie in files and pictures are small, so that each setting can be written down and read again.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file

from controlroom.catalog import CONTROL_TYPES, FURTHER, SYSTEMS, control_class, load
from controlroom.catalog.pairs import refused
from controlroom.controls.object_edits import Move
from controlroom.core.control import Control
from controlroom.core.errors import ConflictError, InputError
from controlroom.core.spec import RunSpec
from controlroom.sampling.inversion import invert
from controlroom.sampling.pipeline import Pipeline
from tests.controls.loras import tiny_lora, tiny_word
from tests.controls.nets import (
    gated_unet,
    tiny_controlnet,
    tiny_image_encoder,
    tiny_imagic,
    tiny_ip_adapter,
    tiny_kosmos,
    tiny_ms_diffusion,
    tiny_photomaker,
    tiny_t2i_adapter,
    tiny_unimo,
    write_instant_id,
    write_subject_reader,
    write_uni_controlnet,
)
from tests.tiny import BACKBONES
from tests.traces import traces

DRAW: dict[str, Any] = {
    "prompt": "a red cat",
    "num_inference_steps": 2,
    "output_type": "latent",
    "seed": 5,
    "height": 16,
    "width": 16,
}


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((16, 16), Image.Resampling.BICUBIC)


SETTINGS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "appearance_control": lambda folder: {"image": picture(0), "model": str(folder / "writer")},
    "attend_and_excite": lambda folder: {"words": ["cat"], "iterations": 1, "thresholds": {}, "step_size": 5.0},
    "consistency_guidance": lambda folder: {"plain": "a green dog", "subject_scale": 2.0},
    "blip_diffusion": lambda folder: {"model": str(folder / "subject"), "image": picture(16), "subject": "dog"},
    "controlnet": lambda folder: {"model": str(folder / "controlnet"), "image": picture(1)},
    "depth_to_image": lambda folder: {"image": picture(11), "depth": picture(12), "strength": 1.0},
    "cross_image_attention": lambda folder: {
        "structure": picture(8),
        "appearance": picture(9),
        "strength": 1.0,
        "attention_start": 0.0,
        "structure_every": 0,
    },
    "ctrl_x": lambda folder: {"structure": picture(8), "appearance": picture(9), "structure_schedule": 1.0},
    "from_inversion": lambda folder: {"inversion": str(folder / "inversion.safetensors")},
    "gligen": lambda folder: {
        "phrases": ["dog"],
        "boxes": [(0.1, 0.1, 0.6, 0.6)],
        "scheduled_sampling_beta": 1.0,
    },
    "guidance_interval": lambda folder: {"guidance_end": 0.5},
    "guidance_rescale": lambda folder: {"scale": 0.7},
    "image_to_image": lambda folder: {"image": picture(4), "strength": 1.0},
    "imagic": lambda folder: {"model": str(folder / "imagic"), "alpha": 0.6},
    "inpaint": lambda folder: {"image": picture(13), "mask": np.eye(16)},
    "instant_id": lambda folder: {
        "model": str(folder / "instant_id"),
        "face_embeds": [0.1 * i for i in range(32)],
        "keypoints": [[5.0, 5.0], [10.0, 5.5], [7.5, 8.0], [5.5, 10.5], [9.5, 11.0]],
    },
    "instruct_pix2pix": lambda folder: {"image": picture(5)},
    "ip_adapter": lambda folder: {
        "model": str(folder / "ip_adapter.safetensors"),
        "image": picture(2),
        "image_encoder": str(folder / "image_encoder"),
    },
    "kosmos_g": lambda folder: {"model": str(folder / "kosmos"), "images": [picture(18)]},
    "lora": lambda folder: {"model": str(folder / "lora.safetensors"), "scale": 0.8},
    "ms_diffusion": lambda folder: {
        "model": str(folder / "ms_diffusion.safetensors"),
        "images": [picture(14), picture(15)],
        "boxes": [(0.0, 0.1, 0.6, 0.9), (0.5, 0.3, 1.0, 1.0)],
        "words": ["cat", "red hat"],
        "image_encoder": str(folder / "image_encoder"),
    },
    "multidiffusion": lambda folder: {"window": 4, "stride": 2},
    "perp_neg": lambda folder: {"negatives": ["a blue hat", "night"], "scale": [1.0, 0.5]},
    "perturbed_attention_guidance": lambda folder: {"layers": ["mid", "up_blocks.0"]},
    "masactrl": lambda folder: {"source": "a green dog", "start_step": 0, "start_layer": 2},
    "photomaker": lambda folder: {
        "model": str(folder / "photomaker.safetensors"),
        "images": [picture(16), picture(17)],
        "word": "cat",
    },
    "pix2pix_zero": lambda folder: {"source_embeds": ["a cat"], "target_embeds": ["a dog", "the dog"]},
    "prompt_to_prompt": lambda folder: {"source": "a green dog", "cross_replace": 0.5, "self_replace": 0.5},
    "prompt_weighting": lambda folder: {"text": "a (red:1.6) cat"},
    "reference_only": lambda folder: {"image": picture(3), "reference_adain": True},
    "regional_prompts": lambda folder: {"regions": ["a blue dog", "a hat"], "ratios": "1;1", "base_ratio": 0.3},
    "self_attention_guidance": lambda folder: {},
    "self_guidance": lambda folder: {"edits": [Move("cat", by=(0.2, 0.0))], "scale": 100.0},
    "semantic_guidance": lambda folder: {
        "edits": [{"prompt": "a hat", "warmup": 0}, {"prompt": "a dog", "reverse": True, "warmup": 1}]
    },
    "smoothed_energy_guidance": lambda folder: {"layers": "up", "sigma": 2.0},
    "style_aligned": lambda folder: {"reference": picture(8), "prompt": "a blue dog"},
    "t2i_adapter": lambda folder: {"model": str(folder / "t2i_adapter"), "image": picture(10)},
    "unimo_g": lambda folder: {"model": str(folder / "unimo"), "images": [picture(18), picture(19)]},
    "uni_controlnet": lambda folder: {
        "model": str(folder / "uni_controlnet"),
        "images": {"pose": picture(11), "depth": picture(12)},
        "content": picture(13),
    },
    "textual_inversion": lambda folder: {"model": str(folder / "word.safetensors"), "token": "ed"},
    "upscale": lambda folder: {"image": picture(6).resize((8, 8)), "strength": 1.0},
}
"""Type of a control -> settings with which it acts, of what lies in a folder made by `files`."""

NEUTRAL: dict[str, dict[str, Any]] = {
    "cross_image_attention": {"scale": 0.0},
    "ctrl_x": {"structure": None, "appearance": None},
    "appearance_control": {"scale": 0.0},
    "attend_and_excite": {"step_size": 0.0},
    "consistency_guidance": {"end": 0.0},
    "blip_diffusion": {"scale": 0.0},
    "controlnet": {"scale": 0.0},
    "gligen": {"scale": 0.0},
    "guidance_interval": {"guidance_start": 0.0, "guidance_end": 1.0},
    "guidance_rescale": {"scale": 0.0},
    "imagic": {"alpha": 1.0, "network": "base"},
    "instant_id": {"scale": 0.0},
    "ip_adapter": {"scale": 0.0},
    "kosmos_g": {"scale": 0.0},
    "lora": {"scale": 0.0},
    "ms_diffusion": {"scale": 0.0},
    "perp_neg": {"scale": 0.0},
    "perturbed_attention_guidance": {"scale": 0.0},
    "masactrl": {"start_step": 2},
    "photomaker": {"scale": 0.0},
    "pix2pix_zero": {"scale": 0.0},
    "prompt_to_prompt": {"cross_replace": 0.0, "self_replace": 0.0},
    "prompt_weighting": {"scale": 0.0},
    "reference_only": {"scale": 0.0},
    "regional_prompts": {"base_ratio": 1.0},
    "self_attention_guidance": {"scale": 0.0},
    "self_guidance": {"scale": 0.0},
    "semantic_guidance": {"edits": []},
    "smoothed_energy_guidance": {"scale": 0.0},
    "style_aligned": {"scale": 0.0},
    "t2i_adapter": {"scale": 0.0},
    "uni_controlnet": {"scale": 0.0},
    "unimo_g": {"scale": 0.0},
}

NEVER_NEUTRAL = (
    "depth_to_image",
    "from_inversion",
    "image_to_image",
    "inpaint",
    "instruct_pix2pix",
    "multidiffusion",
    "textual_inversion",
    "upscale",
)
"""Controls that start from or look at a picture in any case."""

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "appearance_control": ("image", "model", "scale"),
    "attend_and_excite": ("indices", "words", "iterations", "thresholds", "step_size"),
    "consistency_guidance": ("plain", "subject_scale", "text_scale", "start", "end"),
    "blip_diffusion": ("model", "image", "subject", "target", "scale"),
    "controlnet": ("model", "image", "scale", "start", "end", "mask", "guess_mode"),
    "depth_to_image": ("image", "depth", "strength"),
    "cross_image_attention": ("structure", "appearance"),
    "ctrl_x": ("structure", "appearance"),
    "from_inversion": ("inversion", "strength"),
    "gligen": ("phrases", "boxes", "scheduled_sampling_beta"),
    "guidance_interval": ("guidance_start", "guidance_end"),
    "guidance_rescale": ("scale", "start", "end"),
    "image_to_image": ("image", "strength"),
    "imagic": ("model", "alpha"),
    "inpaint": ("image", "mask", "strength"),
    "instruct_pix2pix": ("image", "image_guidance_scale"),
    "instant_id": ("model", "face_embeds", "keypoints", "controlnet", "scale", "identity_scale", "mask"),
    "ip_adapter": ("model", "image", "embeds", "scale", "mask"),
    "lora": ("model", "scale"),
    "ms_diffusion": ("model", "images", "boxes", "words", "scale", "start", "end"),
    "multidiffusion": ("window", "stride", "circular", "regions"),
    "perp_neg": ("negatives", "scale", "start", "end"),
    "perturbed_attention_guidance": ("scale", "layers"),
    "masactrl": ("source", "start_step", "start_layer"),
    "kosmos_g": ("model", "images", "scale"),
    "photomaker": ("model", "images", "trigger", "scale", "start", "end", "word"),
    "pix2pix_zero": ("source_embeds", "target_embeds", "scale"),
    "prompt_to_prompt": ("source", "cross_replace", "self_replace", "reweight", "local_blend"),
    "prompt_weighting": ("text", "dialect", "negative", "scale"),
    "reference_only": ("image", "style_fidelity"),
    "regional_prompts": ("regions", "ratios", "base_ratio", "form"),
    "self_attention_guidance": ("scale",),
    "self_guidance": ("edits", "scale"),
    "semantic_guidance": ("edits", "momentum_scale", "momentum_beta"),
    "smoothed_energy_guidance": ("scale", "layers"),
    "style_aligned": ("reference", "scale"),
    "t2i_adapter": ("model", "image", "scale", "start", "end", "mask"),
    "textual_inversion": ("model", "token"),
    "uni_controlnet": ("model", "images", "content", "scale", "local_scale", "global_scale"),
    "unimo_g": ("model", "images", "scale", "start", "end", "mask"),
    "upscale": ("image", "strength"),
}
"""Positional arguments that checks from outside rely on (DESIGN.md, section 9)."""

OF_GUIDANCE = ("consistency_guidance", "guidance_interval", "guidance_rescale", "perp_neg")
"""Controls of classifier-free guidance itself: a run without it is an error that says so."""

CHANNELS: dict[str, int] = {"depth_to_image": 5, "instruct_pix2pix": 8}
"""Controls for networks of other input channels than the latents', which draw nothing without them."""

OTHERWISE: dict[str, dict[str, Any]] = {
    "depth_to_image": {"image": picture(9)},
    "instruct_pix2pix": {"image": picture(9)},
}
"""What such a control is set to where a run with it is compared with another."""

TYPES = sorted(SETTINGS)


class Stage:
    """A miniature and the folder with its files."""

    def __init__(self, kind: str, folder: Path, channels: int = 4, gated: bool = False) -> None:
        plain = BACKBONES[kind]()
        self.folder = folder
        self.drawn: dict[str, Any] = {}
        source = BACKBONES[kind]() if channels == 4 else BACKBONES[kind](in_channels=channels)
        if gated:
            source.unet = gated_unet(source.unet)
        self.pipe = Pipeline.from_diffusers(source)
        tiny_controlnet(plain.unet).save_pretrained(folder / "controlnet")
        tiny_t2i_adapter(plain.unet).save_pretrained(folder / "t2i_adapter")
        write_uni_controlnet(plain.unet, folder / "uni_controlnet")
        write_instant_id(plain.unet, folder / "instant_id")
        tiny_photomaker(plain).save(folder / "photomaker.safetensors")
        tiny_kosmos(plain).save(folder / "kosmos")
        tiny_unimo(plain).save(folder / "unimo")
        other = BACKBONES[kind](seed=9, in_channels=channels).unet
        tiny_imagic(gated_unet(other) if gated else other, kind == "sdxl", folder / "imagic")
        BACKBONES[kind](seed=9).unet.save_pretrained(folder / "writer")
        tiny_image_encoder().save_pretrained(folder / "image_encoder")
        save_file(tiny_ip_adapter(plain.unet), str(folder / "ip_adapter.safetensors"))
        write_subject_reader(plain, folder / "subject")
        save_file(tiny_ms_diffusion(plain.unet), str(folder / "ms_diffusion.safetensors"))
        tiny_lora(folder / "lora.safetensors", BACKBONES[kind])
        save_file(tiny_word(plain), str(folder / "word.safetensors"))
        size = {"height": DRAW["height"], "width": DRAW["width"], "num_inference_steps": DRAW["num_inference_steps"]}
        inverted = invert(Pipeline.from_diffusers(plain), picture(7), DRAW["prompt"], measure=False, **size)
        inverted.save(folder / "inversion.safetensors")

    def control(self, name: str, **settings: Any) -> Control:
        found = control_class(name)(**{**SETTINGS[name](self.folder), **settings})
        assert isinstance(found, Control)
        return found

    def draw(self, *controls: Control, **settings: Any) -> Any:
        return self.pipe(controls=list(controls), **{**DRAW, **settings})

    def alone(self, name: str) -> Any:
        """What a control draws by itself, with its usual settings; drawn once."""
        if name not in self.drawn:
            self.drawn[name] = self.draw(self.control(name)).images
        return self.drawn[name]

    def draw_without(self, name: str, **settings: Any) -> Any:
        """A run that one with the control differs from."""
        others = [self.control(name, **OTHERWISE[name])] if name in OTHERWISE else []
        return self.draw(*others, **settings)


class Stages:
    """Miniatures, made when they are first asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self.factory, self.made = factory, {}

    def of(self, kind: str, *names: str) -> Stage:
        """The one whose network has the channels and layers for these controls."""
        key = (kind, max([4, *(CHANNELS.get(name, 4) for name in names)]), "gligen" in names)
        if key not in self.made:
            self.made[key] = Stage(kind, self.factory.mktemp(kind), key[1], key[2])
        return self.made[key]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    return Stages(tmp_path_factory)


@pytest.fixture
def stage(request: pytest.FixtureRequest, stages: Stages) -> Stage:
    given = request.node.callspec.params
    return stages.of("sd1", *(given[key] for key in ("name", "first", "second") if key in given))


@pytest.fixture(scope="module")
def plain(stages: Stages) -> Any:
    return stages.of("sd1").draw()


def test_every_working_control_is_held_to_this() -> None:
    working = {path for entry in (*SYSTEMS, *FURTHER) if entry.status == "working" for path in entry.code}
    classes = {value for path in working if isinstance(value := load(path), type) and issubclass(value, Control)}
    assert classes == {control_class(name) for name in SETTINGS}
    assert set(CONTROL_TYPES) >= set(SETTINGS)
    assert set(SETTINGS) == {*NEUTRAL, *NEVER_NEUTRAL} == set(ARGUMENTS)


@pytest.mark.parametrize("name", TYPES)
class TestSettings:
    def test_names_and_order_of_arguments(self, name: str) -> None:
        fields = [field for field in control_class(name).model_fields if field != "type"]
        assert tuple(fields[: len(ARGUMENTS[name])]) == ARGUMENTS[name]

    def test_written_and_read_again_it_draws_the_same(self, name: str, stage: Stage) -> None:
        control = stage.control(name)
        spec = RunSpec(controls=[control], **DRAW)
        expected = stage.pipe.run(spec).images
        for read in (RunSpec.from_json(spec.to_json()), RunSpec.from_yaml(spec.to_yaml())):
            assert type(read.controls[0]) is type(control)
            assert read.to_data() == spec.to_data()
            assert torch.equal(stage.pipe.run(read).images, expected)

    def test_unknown_setting_is_refused_by_name(self, name: str, stage: Stage) -> None:
        settings = SETTINGS[name](stage.folder)
        with pytest.raises(InputError, match="strenght"):
            control_class(name)(**settings, strenght=1.0)
        with pytest.raises(InputError, match="strenght"):
            RunSpec.from_data({"controls": [{"type": name, **settings, "strenght": 1.0}]})
        with pytest.raises(InputError, match="at most"):
            control_class(name)(*range(100))

    def test_values_that_make_no_sense_are_refused_by_name(self, name: str, stage: Stage) -> None:
        fields = control_class(name).model_fields
        bad: dict[str, list[Any]] = {"start": [-0.1, 1.1, "soon"], "end": [-0.1, 1.1], "scale": [float("nan"), "x"]}
        for field in bad.keys() & fields.keys():
            for value in bad[field]:
                with pytest.raises(InputError, match=field):
                    stage.control(name, **{field: value})
        with pytest.raises(InputError, match="type"):
            stage.control(name, type="another")

    def test_common_settings_have_their_common_meaning(self, name: str) -> None:
        fields = control_class(name).model_fields
        assert ("start" in fields) == ("end" in fields)
        defaults = {"start": 0.0, "end": 1.0, "mask": None}
        for field in defaults.keys() & fields.keys():
            assert fields[field].default == defaults[field]

    def test_settings_are_frozen(self, name: str, stage: Stage) -> None:
        control = stage.control(name)
        with pytest.raises(ValidationError, match="frozen"):
            setattr(control, ARGUMENTS[name][0], 1)


def check_absent(result: Any, plain: Any, control: Control) -> None:
    assert torch.equal(result.images, plain.images)
    assert result.manifest["cost"] == plain.manifest["cost"]
    assert list(result.manifest["dropped"]) == [type(control).__name__]


@pytest.mark.parametrize("name", TYPES)
class TestRun:
    @pytest.mark.parametrize("kind", BACKBONES)
    def test_acts_on_every_backbone_at_the_planned_cost(self, name: str, kind: str, stages: Stages) -> None:
        stage = stages.of(kind, name)
        spec = RunSpec(controls=[stage.control(name)], **DRAW)
        result, planned = stage.pipe.run(spec), stage.pipe.explain(spec)
        assert torch.isfinite(result.images).all()
        assert (result.images - stage.draw_without(name).images).abs().max() > 1e-3
        cost = result.manifest["cost"]
        assert sum(planned.rows) + sum(planned.energy_rows) == cost["unet_rows"]
        assert sum(planned.passes) + sum(planned.energy_passes) == cost["unet_passes"]
        assert sum(planned.energy_passes) == cost["energy_passes"]

    def test_neutral_is_absence_bit_for_bit_and_free(self, name: str, stage: Stage, plain: Any) -> None:
        if name in NEVER_NEUTRAL:
            assert not stage.control(name).neutral(2)
            return
        control = stage.control(name, **NEUTRAL[name])
        check_absent(stage.draw(control), plain, control)

    def test_no_trace(self, name: str, stage: Stage) -> None:
        def broken(*args: Any) -> Any:
            raise RuntimeError("broken")

        stage.draw_without(name)
        stage.pipe.unet.requires_grad_(True)
        stage.pipe.unet.mid_block.requires_grad_(False)
        before = traces(stage.pipe)
        stage.draw(stage.control(name))
        assert traces(stage.pipe) == before
        with pytest.raises(RuntimeError, match="broken"):
            stage.draw(stage.control(name), callback_on_step_end=broken)
        assert traces(stage.pipe) == before

    def test_runs_without_guidance(self, name: str, stage: Stage) -> None:
        if name in OF_GUIDANCE:
            with pytest.raises(InputError, match="guidance_scale is at most 1"):
                stage.draw(stage.control(name), guidance_scale=1.0)
            return
        alone = stage.draw_without(name, guidance_scale=1.0)
        result = stage.draw(stage.control(name), guidance_scale=1.0)
        assert torch.isfinite(result.images).all()
        assert not torch.equal(result.images, alone.images)


@pytest.mark.parametrize("window", [(0.0, 0.0), (1.0, 1.0), (0.3, 0.7), (0.8, 0.2)])
@pytest.mark.parametrize("name", [name for name in TYPES if "start" in control_class(name).model_fields])
def test_empty_window_is_absence_bit_for_bit_and_free(
    name: str, window: tuple[float, float], stage: Stage, plain: Any
) -> None:
    control = stage.control(name, start=window[0], end=window[1])
    check_absent(stage.draw(control), plain, control)


@pytest.mark.parametrize(("first", "second"), list(combinations_with_replacement(TYPES, 2)))
def test_every_pair_runs_or_names_both(first: str, second: str, stage: Stage) -> None:
    controls = [stage.control(first), stage.control(second)]
    labels = [type(control).__name__ for control in controls]
    if first == second:
        labels = [f"{labels[0]} 1", f"{labels[0]} 2"]
    refusals = 0
    for pair in (controls, controls[::-1]):
        try:
            result = stage.draw(*pair)
        except ConflictError as error:
            assert all(label in str(error) for label in labels), str(error)
            refusals += 1
            continue
        assert torch.isfinite(result.images).all()
        needed = [control for control in pair if control.type in CHANNELS]
        singles = [stage.alone(control.type) for control in needed or pair]
        if first == second == "textual_inversion":
            continue  # a word told twice is the word
        # Both act: together they are neither of them alone.
        assert all(not torch.equal(result.images, single) for single in singles)
    # One order is enough: BLIPDiffusion's prompt can be read by PhotoMaker, but not the other way round.
    assert (refusals > 0) == (refused(first, second) is not None)
