"""Imagic's control: the condition between learned and wanted words, and the network's weights for a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from controlroom.controls.editing.image_to_image import ImageToImage
from controlroom.controls.editing.imagic import EMBEDDING, Imagic
from controlroom.controls.editing.instruct_pix2pix import InstructPix2Pix
from controlroom.core.errors import ConflictError, InputError, ModelError
from controlroom.core.spec import RunSpec
from controlroom.sampling.pipeline import Pipeline
from tests.controls.nets import tiny_imagic
from tests.tiny import BACKBONES, tiny_sd1, tiny_unet
from tests.traces import traces

DRAW: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent", "seed": 5}
TOLERANCE = 1e-4


class Case:
    """A miniature, another of other weights, and a fit of these with random words."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.plain, self.tuned = kind, BACKBONES[kind](), BACKBONES[kind](seed=9)
        self.pipe = Pipeline.from_diffusers(self.plain)
        self.folder = tiny_imagic(self.tuned.unet, kind == "sdxl", folder)
        self.words = load_file(str(self.folder / EMBEDDING))

    def by_hand(self, prompt: str, alpha: float, tuned: bool, seed: int = 5) -> torch.Tensor:
        """diffusers' own pipeline, given the interpolated embedding."""
        found = self.plain.encode_prompt(
            prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        given: dict[str, Any] = {"prompt_embeds": found[0], "negative_prompt_embeds": found[1]}
        given["prompt_embeds"] = alpha * found[0] + (1 - alpha) * self.words["tokens"]
        if self.kind == "sdxl":
            given["pooled_prompt_embeds"] = alpha * found[2] + (1 - alpha) * self.words["pooled"]
            given["negative_pooled_prompt_embeds"] = found[3]
        unet = (self.tuned if tuned else self.plain).unet
        pipe = type(self.plain)(**{**self.plain.components, "unet": unet})
        pipe.set_progress_bar_config(disable=True)
        more = {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": 7.5}
        return pipe(**given, **more, generator=torch.Generator().manual_seed(seed)).images


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {kind: Case(kind, tmp_path_factory.mktemp(kind)) for kind in BACKBONES}


@pytest.fixture(scope="module")
def case(cases: dict[str, Case]) -> Case:
    return cases["sd1"]


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.std()


@pytest.mark.parametrize("tuned", [True, False])
@pytest.mark.parametrize("kind", BACKBONES)
def test_draws_from_the_words_between(kind: str, tuned: bool, cases: dict[str, Case]) -> None:
    case = cases[kind]
    control = Imagic(str(case.folder), 0.7, "tuned" if tuned else "base")
    found = case.pipe("a red cat", controls=[control], **DRAW)
    close(found.images, case.by_hand("a red cat", 0.7, tuned))
    assert (found.images - case.by_hand("a red cat", 1.0, tuned)).abs().max() > 1e-2
    assert found.manifest["cost"]["unet_rows"] == 2 * 3


def test_a_sweep_in_one_call(case: Case) -> None:
    alphas = [0.0, 0.5, 1.0, 1.5]
    generators = [torch.Generator().manual_seed(5) for _ in alphas]
    settings = {key: value for key, value in DRAW.items() if key != "seed"}
    control = Imagic(str(case.folder), alphas)
    found = case.pipe("a cat", controls=[control], num_images_per_prompt=4, generator=generators, **settings).images
    for image, alpha in zip(found, alphas, strict=True):
        close(image[None], case.by_hand("a cat", alpha, True))
    # Two prompts: each is swept.
    control = Imagic(str(case.folder), [0.5, 1.5])
    both = case.pipe(["a cat", "a dog"], controls=[control], num_images_per_prompt=2, **DRAW)
    for i, (prompt, alpha) in enumerate([("a cat", 0.5), ("a cat", 1.5), ("a dog", 0.5), ("a dog", 1.5)]):
        close(both.images[i : i + 1], case.by_hand(prompt, alpha, True, seed=5 + i))


def test_neutral_is_absence_and_near_it_is_near(case: Case) -> None:
    plain = case.pipe("a cat", **DRAW)
    absent = case.pipe("a cat", controls=[Imagic(str(case.folder), 1.0, "base")], **DRAW)
    assert torch.equal(plain.images, absent.images)
    assert list(absent.manifest["dropped"]) == ["Imagic"]
    near = case.pipe("a cat", controls=[Imagic(str(case.folder), 1 - 1e-4, "base")], **DRAW).images
    assert 0 < (near - plain.images).abs().max() < 0.01 * plain.images.std()


def test_no_trace_is_left_after_success_and_failure(case: Case) -> None:
    case.pipe("a cat", **DRAW)
    before = traces(case.pipe)
    control = Imagic(str(case.folder))
    case.pipe("a cat", controls=[control], **DRAW)
    assert traces(case.pipe) == before

    def broken(*args: Any) -> Any:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        case.pipe("a cat", controls=[control], callback_on_step_end=broken, **DRAW)
    with pytest.raises(InputError):
        case.pipe("a cat", controls=[control, ImageToImage("no.png")], **DRAW)
    assert traces(case.pipe) == before


@pytest.mark.parametrize(("prompt", "instruction"), [("a cat", "a red hat"), ("make the hat red", None)])
@torch.no_grad()
def test_joined_with_an_instruction(tmp_path: Path, prompt: str, instruction: str | None) -> None:
    """Words of a fit with a network of four channels, drawn by InstructPix2Pix's of eight.

    The instruction stands behind the interpolated words, or is itself what the learned words are interpolated to.
    """
    folder = tiny_imagic(tiny_unet(9), False, tmp_path / "fit")
    plain = tiny_sd1(in_channels=8)
    pipe = Pipeline.from_diffusers(plain)
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    controls = [InstructPix2Pix(pixels), Imagic(str(folder), 0.7, "base", instruction=instruction)]
    found = pipe(prompt, controls=controls, **{**DRAW, "num_inference_steps": 1})
    learned = load_file(str(folder / EMBEDDING))["tokens"]
    wanted, empty = (plain.encode_prompt(text, "cpu", 1, False)[0] for text in (prompt, ""))
    joined = 0.7 * wanted + 0.3 * learned
    if instruction is not None:
        joined = torch.cat([joined, plain.encode_prompt(instruction, "cpu", 1, False)[0]], dim=1)
    seen = plain.vae.encode(pixels * 2 - 1).latent_dist.mode()
    plain.scheduler.set_timesteps(1)
    x, t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5)), plain.scheduler.timesteps[0]
    rows = [(joined, seen), (empty, seen), (empty, torch.zeros_like(seen))]
    words, seeing, blind = (plain.unet(torch.cat([x, c], 1), t, e).sample for e, c in rows)
    eps = blind + 7.5 * (words - seeing) + 1.5 * (seeing - blind)
    close(found.images, plain.scheduler.step(eps, t, x).prev_sample)


def test_given_embeddings_are_the_wanted_words(case: Case) -> None:
    embeds = case.plain.encode_prompt("a red cat", "cpu", 1, False)[0]
    found = case.pipe(prompt_embeds=embeds, controls=[Imagic(str(case.folder), 0.7)], **DRAW).images
    close(found, case.by_hand("a red cat", 0.7, True))


def test_half_precision_weights_follow_the_network(case: Case) -> None:
    pipe = Pipeline.from_diffusers(tiny_sd1()).to(torch.float64)
    found = pipe("a cat", controls=[Imagic(str(case.folder), 0.7)], **DRAW).images
    assert found.dtype == torch.float64
    assert pipe.unet.dtype == torch.float64


def test_bad_input_is_told(case: Case, cases: dict[str, Case], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="alpha"):
        Imagic(str(case.folder), [])
    with pytest.raises(InputError, match="network"):
        Imagic(str(case.folder), network="half")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="3 strengths for 2 pictures.*num_images_per_prompt=3"):
        case.pipe(["a cat", "a dog"], controls=[Imagic(str(case.folder), [0.1, 0.2, 0.3])], **DRAW)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(case.folder / "embedding", unfinished / "embedding")
    shutil.copytree(case.folder / "unet", tmp_path / "wordless/unet")
    broken = tmp_path / "broken"
    shutil.copytree(case.folder, broken)
    (broken / EMBEDDING).write_bytes(b"no tensors")
    for folder, said in (
        (tmp_path / "nowhere", "no Imagic fit at"),
        (unfinished, "not finished"),
        (tmp_path / "wordless", "embedding.safetensors is not there"),
        (broken, "embedding.safetensors"),
        (cases["sdxl"].folder, "does not fit this model"),
    ):
        with pytest.raises(ModelError, match=said):
            case.pipe("a cat", controls=[Imagic(str(folder))], **DRAW)
    with pytest.raises(ModelError, match=r"\[1, 16, 64\].*needs \[1, length, 32\]"):
        case.pipe("a cat", controls=[Imagic(str(cases["sdxl"].folder), network="base")], **DRAW)
    with pytest.raises(InputError, match="5 tokens, the learned words 16"):
        case.pipe(prompt_embeds=torch.zeros(1, 5, 32), controls=[Imagic(str(case.folder))], guidance_scale=1.0, **DRAW)
    with pytest.raises(ConflictError, match="Imagic 1 and Imagic 2"):
        case.pipe("a cat", controls=[Imagic(str(case.folder)), Imagic(str(case.folder), 0.5)], **DRAW)


def test_written_down_and_drawn_again(case: Case) -> None:
    spec = RunSpec(prompt="a cat", controls=[Imagic(str(case.folder), [0.5, 1.0])], num_images_per_prompt=2, **DRAW)
    assert torch.equal(case.pipe.run(spec).images, case.pipe.run(RunSpec.from_json(spec.to_json())).images)
