"""Personal controls together: two subjects in two regions, words with SEGA, a LoRA with image prompt and ControlNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file

import controlroom as cr
from controlroom.backbones.lora_files import load_lora
from controlroom.backbones.lora_names import Names
from tests.controls.guidance.references import SMALL, close, semantic
from tests.controls.loras import tiny_lora
from tests.controls.nets import tiny_controlnet, tiny_image_encoder, tiny_ip_adapter
from tests.tiny import BACKBONES, PIXELS, tiny_sd1
from tests.traces import traces

STEPS = 3
DRAW: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "latent", "seed": 4}
PROMPT = "a <anna> and <ben> on the beach"


def vectors(seed: int) -> torch.Tensor:
    return torch.randn(2, 32, generator=torch.Generator().manual_seed(seed))


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    tiny_lora(folder / "anna.safetensors", tiny_sd1)
    tiny_lora(folder / "ben.safetensors", tiny_sd1, seed=9)
    save_file({"<anna>": vectors(0)}, str(folder / "anna-word.safetensors"))
    save_file({"<ben>": vectors(1)}, str(folder / "ben-word.safetensors"))
    return folder


@pytest.fixture(scope="module")
def pipe() -> cr.Pipeline:
    return cr.Pipeline.from_diffusers(tiny_sd1())


def walk(pipe: Any, controls: list[Any], led_by: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    """Latents after each step; with ``led_by`` every step starts from what another run had there."""
    found: list[torch.Tensor] = []

    def keep(_: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        found.append(tensors["latents"].clone())
        return {} if led_by is None else {"latents": led_by[i]}

    pipe(PROMPT, controls=controls, callback_on_step_end=keep, **DRAW)
    return found


def test_two_subjects_in_two_regions_are_each_its_own_at_every_step(folder: Path, pipe: cr.Pipeline) -> None:
    """Two LoRAs and two words. From the same latents, each half steps to where its LoRA alone would lead it."""
    left = Image.new("L", (PIXELS, PIXELS), 0)
    left.paste(255, (0, 0, PIXELS // 2, PIXELS))
    words = [cr.TextualInversion(str(folder / f"{name}-word.safetensors")) for name in ("anna", "ben")]
    masks = {"anna": left, "ben": ImageOps.invert(left)}
    loras = [cr.LoRA(str(folder / f"{name}.safetensors"), mask=mask) for name, mask in masks.items()]
    before = traces(pipe)
    both = walk(pipe, [*words, *loras])
    alone = {name: walk(pipe, [*words, cr.LoRA(str(folder / f"{name}.safetensors"))], led_by=both) for name in masks}
    plain = walk(pipe, words, led_by=both)
    half = both[0].shape[-1] // 2
    for i, found in enumerate(both):
        expected = torch.cat([alone["anna"][i][..., :half], alone["ben"][i][..., half:]], -1)
        assert close(found, expected), i
        assert not close(alone["anna"][i], alone["ben"][i], 1e-3) and not close(found, plain[i], 1e-3)
    # In any order; one of scale 0 leaves the other alone, bit for bit.
    assert close(walk(pipe, [*loras[::-1], *words[::-1]])[-1], both[-1])
    none = cr.LoRA(str(folder / "ben.safetensors"), 0.0, mask=masks["ben"])
    assert torch.equal(walk(pipe, [*words, loras[0], none])[-1], walk(pipe, [*words, loras[0]])[-1])
    assert traces(pipe) == before


def test_a_region_that_nobody_has_stays_the_base(folder: Path, pipe: cr.Pipeline) -> None:
    corner = Image.new("L", (PIXELS, PIXELS), 0)
    corner.paste(255, (0, 0, PIXELS // 2, PIXELS // 2))
    words = [cr.TextualInversion(str(folder / f"{name}-word.safetensors")) for name in ("anna", "ben")]
    found = walk(pipe, [*words, cr.LoRA(str(folder / "anna.safetensors"), mask=corner)])
    plain = walk(pipe, words, led_by=found)
    half = found[0].shape[-1] // 2
    for one, other in zip(found, plain, strict=True):
        assert close(one[..., half:, :], other[..., half:, :])
        assert close(one[..., :half, half:], other[..., :half, half:])
        assert not close(one[..., :half, :half], other[..., :half, :half], 1e-3)


def test_a_learned_word_is_a_concept_of_semantic_guidance() -> None:
    """diffusers' SEGA with the word loaded by diffusers."""
    source = tiny_sd1()
    word = vectors(0)[:1]
    source.load_textual_inversion({"<anna>": word}, token="<anna>")
    more = {"editing_prompt": ["<anna>"], "edit_warmup_steps": 1, "edit_guidance_scale": 4.0, "edit_threshold": 0.8}
    expected = semantic(source, "a cat and a <anna>", 5, num_inference_steps=4, **more)
    ours = cr.Pipeline.from_diffusers(tiny_sd1())
    controls = [
        cr.TextualInversion({"<anna>": word}),
        cr.SemanticGuidance(edits=[cr.SemanticEdit("<anna>", warmup=1, scale=4.0, threshold=0.8)]),
    ]
    settings: dict[str, Any] = {**SMALL, "num_inference_steps": 4, "seed": 5, "scheduler": "ddim"}
    found = ours("a cat and a <anna>", controls=controls, **settings).images
    assert close(found, expected)
    assert close(ours("a cat and a <anna>", controls=controls[::-1], **settings).images, expected)
    assert not close(ours("a cat and a <anna>", controls=controls[:1], **settings).images, expected, 1e-2)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_lora_with_image_prompt_and_controlnet(kind: str, tmp_path: Path) -> None:
    """The same as image prompt and ControlNet on a network whose weights hold the LoRA."""
    make = BACKBONES[kind]
    file = tiny_lora(tmp_path / "anna.safetensors", make)
    tuned: Any = make()
    names = Names(tuned.unet, tuned.text_encoder, getattr(tuned, "text_encoder_2", None))
    with torch.no_grad():
        for layer, change in load_lora(file, names).layers.items():
            names.layers[layer].weight += 0.7 * change.dense(names.layers[layer].weight)
    plain = make().unet
    tiny_controlnet(plain).save_pretrained(tmp_path / "pose")
    faces = cr.IPAdapter(tiny_ip_adapter(plain), picture(0), image_encoder=tiny_image_encoder())
    pose = cr.ControlNet(str(tmp_path / "pose"), picture(1))
    settings: dict[str, Any] = {**DRAW, "prompt": "a red cat"}
    expected = cr.Pipeline.from_diffusers(tuned)(controls=[faces, pose], **settings).images
    pipe = cr.Pipeline.from_diffusers(make())
    lora = cr.LoRA(str(file), 0.7)
    pipe(**settings)  # transformers notes the first call in the module
    before = traces(pipe)
    for controls in ([lora, faces, pose], [pose, lora, faces]):
        assert close(pipe(controls=controls, **settings).images, expected, 2e-4)
    for missing in range(3):
        rest = [control for i, control in enumerate((lora, faces, pose)) if i != missing]
        assert not close(pipe(controls=rest, **settings).images, expected, 1e-2)
    # Those at scale 0 are not there.
    quiet = [lora, faces.model_copy(update={"scale": 0.0}), pose.model_copy(update={"scale": 0.0})]
    assert torch.equal(pipe(controls=quiet, **settings).images, pipe(controls=[lora], **settings).images)
    assert traces(pipe) == before
