"""Pix2Pix-Zero against diffusers' pipeline, and directions from sentences (arXiv 2302.03027)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMInverseScheduler
from diffusers.pipelines.deprecated.stable_diffusion_variants import (
    pipeline_stable_diffusion_pix2pix_zero as reference,
)

from controlroom.controls.edit_direction import EditDirection, edit_direction
from controlroom.controls.edit_sentences import read_sentences, sentences_about, sentences_from_model
from controlroom.controls.editing.from_inversion import FromInversion
from controlroom.controls.editing.pix2pix_zero import Pix2PixZero
from controlroom.controls.guidance.attend_and_excite import AttendAndExcite
from controlroom.core.control import Energy
from controlroom.core.errors import ControlRoomError, InputError, ModelError
from controlroom.core.spec import RunSpec
from controlroom.sampling.inversion import invert
from controlroom.sampling.pipeline import Pipeline
from tests.sampling.test_inversion import picture
from tests.tiny import BACKBONES, tiny_sd1, tiny_tokenizer

PROMPT = "a red cat on the beach"
DRAW: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent", "seed": 5, "scheduler": "ddim"}
CATS, DOGS = ["a cat", "a red cat", "the cat on the beach"], ["a dog", "a red dog"]


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(tiny_sd1())


def theirs_of(source: Any) -> Any:
    parts = {name: part for name, part in source.components.items() if name != "image_encoder"}
    theirs = reference.StableDiffusionPix2PixZeroPipeline(
        **parts,
        inverse_scheduler=DDIMInverseScheduler.from_config(source.scheduler.config),
        caption_generator=None,
        caption_processor=None,
        requires_safety_checker=False,
    )
    theirs.set_progress_bar_config(disable=True)
    return theirs


def edited(source: Any, scale: float, steps: int = 3, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of the source and of the edited picture, of diffusers' pipeline."""
    theirs = theirs_of(source)
    with torch.no_grad():
        embeds = [theirs.get_embeds(side) for side in (CATS, DOGS)]
    drawn: list[torch.Tensor] = []
    result = theirs(
        PROMPT,
        source_embeds=embeds[0],
        target_embeds=embeds[1],
        cross_attention_guidance_amount=scale,
        num_inference_steps=steps,
        output_type="latent",
        callback=lambda i, t, x: drawn.append(x),
        **{"generator": torch.Generator().manual_seed(5), **more},
    )
    return drawn[-1], result.images


def embeds_of(pipe: Pipeline) -> tuple[torch.Tensor, torch.Tensor]:
    direction = edit_direction(pipe, CATS, DOGS)
    return direction.source, direction.target


# On random weights maps are far apart, so a step of the size that real ones ask for moves far.
@pytest.mark.parametrize(("make", "scale"), [("sd1", 0.1), ("sd1", 0.5), ("sd2", 0.02)])
def test_equals_diffusers(make: str, scale: float) -> None:
    # A gradient through random weights multiplies rounding at each step: float64.
    source, steps = BACKBONES[make]().to(torch.float64), 3
    pipe = Pipeline.from_diffusers(BACKBONES[make]().to(torch.float64))
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    drawn, expected = edited(source, scale, steps, latents=start, negative_prompt="blue")
    control = Pix2PixZero(*embeds_of(pipe), scale)
    result = pipe(PROMPT, "blue", [control], latents=start, **DRAW)
    assert (result.images - expected).abs().max() <= 1e-4 * expected.std()
    assert (result.states["source"] - drawn).abs().max() <= 1e-4 * drawn.std()
    # Both the direction and the maps count.
    direction_alone = pipe(PROMPT, "blue", [Pix2PixZero(*embeds_of(pipe), 0.0, direction=1.0)], latents=start, **DRAW)
    assert (direction_alone.images - expected).abs().max() > 1e-2 * expected.std()
    assert (drawn - expected).abs().max() > 1e-2 * expected.std()
    cost = result.manifest["cost"]
    assert (cost["unet_rows"], cost["unet_passes"], cost["energy_passes"]) == (8 * steps, 2 * steps, steps)


def test_equals_diffusers_in_float32_and_with_a_seed(pipe: Pipeline) -> None:
    _, expected = edited(tiny_sd1(), 0.1)
    result = pipe(PROMPT, controls=[Pix2PixZero(*embeds_of(pipe))], **DRAW)
    assert (result.images - expected).abs().max() <= 1e-4 * expected.std()


def test_on_an_inverted_picture_equals_diffusers() -> None:
    """Regularised inversion, then the edit, with the prompt as negative prompt as the authors have it."""
    source = tiny_sd1().to(torch.float64)
    theirs = theirs_of(source)
    with torch.no_grad():
        clean = source.vae.encode(source.image_processor.preprocess(picture()).double()).latent_dist.mean * 0.18215
    noise = theirs.invert(
        PROMPT, image=clean, num_inference_steps=3, generator=torch.Generator().manual_seed(0)
    ).latents
    drawn, expected = edited(source, 0.1, latents=noise, negative_prompt=PROMPT)
    pipe = Pipeline.from_diffusers(tiny_sd1().to(torch.float64))
    found = invert(pipe, picture(), PROMPT, "regularised", 3, measure=False)
    control = Pix2PixZero(*embeds_of(pipe))
    result = pipe(PROMPT, PROMPT, [FromInversion(found, hold_source=False), control], **DRAW)
    assert (result.images - expected).abs().max() <= 1e-4 * expected.std()
    assert (result.states["source"] - drawn).abs().max() <= 1e-4 * drawn.std()
    held = pipe(PROMPT, PROMPT, [FromInversion(found), control], **DRAW)
    assert torch.equal(held.states["source"], found.latents[0])
    assert (held.images - result.images).abs().max() > 1e-3


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_picture_of_a_batch_is_edited_on_its_own(backbone: str) -> None:
    pipe = Pipeline.from_diffusers(BACKBONES[backbone]().to(torch.float64))
    direction = edit_direction(pipe, CATS, DOGS)
    assert (direction.pooled is None) == (backbone != "sdxl")
    prompts, settings = ["a cat", "a red cat on the beach"], {**DRAW, "num_inference_steps": 2}
    together = pipe(prompts, controls=[Pix2PixZero(direction, scale=0.05)], **settings)
    for i, prompt in enumerate(prompts):
        alone = pipe(prompt, controls=[Pix2PixZero(direction, scale=0.05)], **{**settings, "seed": 5 + i})
        assert (together.images[i] - alone.images[0]).abs().max() < 1e-4 * alone.images.std()
        source = pipe(prompt, **{**settings, "seed": 5 + i}).images
        assert (together.states["source"][i] - source[0]).abs().max() < 1e-6 * source.std()


def test_pooled_text_of_xl_moves_too() -> None:
    pipe = Pipeline.from_diffusers(BACKBONES["sdxl"]())
    direction = edit_direction(pipe, CATS, DOGS)
    both, tokens = (
        pipe(PROMPT, controls=[Pix2PixZero(*given, scale=0.05)], **DRAW).images
        for given in ((direction,), (direction.source, direction.target))
    )
    assert (both - tokens).abs().max() > 1e-3


def test_a_move_brings_the_maps_back(pipe: Pipeline) -> None:
    """The difference before the first move, and after it."""
    seen: list[float] = []
    plain = Pix2PixZero.energy

    def energy(self: Pix2PixZero, step: Any, round: int) -> Any:
        seen.append(float(sum(loss.detach().sum() for loss in step.memory(self).losses.values())))
        if round == 1:
            return Energy(None)
        return replace(plain(self, step, round), again=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pix2PixZero, "energy", energy)
        pipe(PROMPT, controls=[Pix2PixZero(*embeds_of(pipe), 0.02)], **{**DRAW, "num_inference_steps": 1})
    assert len(seen) == 2 and 0 < seen[1] < 0.97 * seen[0]


@pytest.mark.parametrize("scheduler", ["euler", "dpmpp_2m", "heun"])
def test_a_move_is_as_long_for_every_solver(pipe: Pipeline, scheduler: str) -> None:
    """In the network's input: Euler keeps latents 14 times as long as DPM++."""

    def move(name: str) -> torch.Tensor:
        found: list[torch.Tensor] = []
        plain = Pix2PixZero.energy

        def energy(self: Pix2PixZero, step: Any, round: int) -> Any:
            answer = plain(self, step, round)
            assert answer.loss is not None
            (gradient,) = torch.autograd.grad(answer.loss.sum(), step.latents["image"], retain_graph=True)
            found.append(step.scaled(gradient - step.offsets["cond"]))
            return answer

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Pix2PixZero, "energy", energy)
            settings = {**DRAW, "scheduler": name, "num_inference_steps": 50}
            stop = {"callback_on_step_end": lambda p, i, t, d: (p.cancel(), {})[1]}
            pipe(PROMPT, controls=[Pix2PixZero(*embeds_of(pipe))], **settings, **stop)
        return found[0]

    ours, base = move(scheduler), move("dpmpp_2m" if scheduler != "dpmpp_2m" else "unipc")
    assert base.norm() > 1e-4
    assert (ours - base).norm() < 0.05 * base.norm()


class TestNeutral:
    @pytest.mark.parametrize(
        "settings", [{"scale": 0.0}, {"direction": 0.0}, {"start": 1.0}, {"scale": 0.0, "direction": None}], ids=str
    )
    def test_neutral_is_absence_bit_for_bit_and_free(self, pipe: Pipeline, settings: dict[str, Any]) -> None:
        plain = pipe(PROMPT, **DRAW)
        result = pipe(PROMPT, controls=[Pix2PixZero(*embeds_of(pipe), **settings)], **DRAW)
        assert torch.equal(plain.images, result.images)
        assert plain.manifest["cost"] == result.manifest["cost"] and "Pix2PixZero" in result.manifest["dropped"]

    def test_a_small_scale_stays_close_to_absence(self, pipe: Pipeline) -> None:
        plain = pipe(PROMPT, **DRAW).images
        moved = [
            (pipe(PROMPT, controls=[Pix2PixZero(*embeds_of(pipe), scale)], **DRAW).images - plain).abs().max()
            for scale in (1e-4, 1e-2)
        ]
        assert moved[0] < 0.05 * plain.std() and moved[0] < 0.1 * moved[1]

    def test_things_that_are_the_same_have_no_direction(self, pipe: Pipeline) -> None:
        same = embeds_of(pipe)[0]
        plain = pipe(PROMPT, **DRAW).images
        result = pipe(PROMPT, controls=[Pix2PixZero(same, same)], **DRAW)
        assert (result.images - plain).abs().max() < 1e-4 * plain.std()

    def test_window(self, pipe: Pipeline) -> None:
        """Outside of it, what is told and where it goes are those of the plain run."""
        seen: dict[str, list[torch.Tensor]] = {"plain": [], "late": []}
        for name, controls in (("plain", []), ("late", [Pix2PixZero(*embeds_of(pipe), start=0.6)])):
            pipe(
                PROMPT,
                controls=controls,
                callback_on_step_end=lambda p, i, t, d, name=name: seen[name].append(d["latents"]) or {},
                **DRAW,
            )
        near = [bool((a - b).abs().max() < 1e-4) for a, b in zip(seen["plain"], seen["late"], strict=True)]
        assert near == [True, True, False]


def test_with_another_energy_in_the_same_pass(pipe: Pipeline) -> None:
    excited = AttendAndExcite(words=["cat"], iterations=2, thresholds={}, step_size=5.0)
    zero = Pix2PixZero(*embeds_of(pipe))
    drawn = [pipe(PROMPT, controls=controls, **DRAW) for controls in ([zero, excited], [excited, zero], [zero])]
    torch.testing.assert_close(drawn[0].images, drawn[1].images, atol=1e-4, rtol=1e-3)
    assert (drawn[0].images - drawn[2].images).abs().max() > 1e-2
    assert drawn[0].manifest["cost"]["energy_passes"] == 3


class TestDirection:
    def test_equals_diffusers(self, pipe: Pipeline) -> None:
        theirs = theirs_of(tiny_sd1())
        with torch.no_grad():
            expected = theirs.construct_direction(theirs.get_embeds(CATS), theirs.get_embeds(DOGS))
        found = edit_direction(pipe, CATS, DOGS)
        torch.testing.assert_close(found.tokens, expected, atol=1e-6, rtol=1e-5)
        assert found.counts == (3, 2) and found.backbone == "sd1"

    def test_sentences_embeddings_and_files_are_the_same_edit(self, pipe: Pipeline, tmp_path: Path) -> None:
        found = edit_direction(pipe, CATS, DOGS)
        found.save(tmp_path / "d.safetensors")
        each = [
            Pix2PixZero(CATS, DOGS),
            Pix2PixZero(found.source, found.target),
            Pix2PixZero(found),
            Pix2PixZero(tmp_path / "d.safetensors"),
            Pix2PixZero(str(tmp_path / "d.safetensors"), scale=0.1),
            Pix2PixZero(
                pipe.backbone.encode_text(CATS).tokens.detach(), pipe.backbone.encode_text(DOGS).tokens.detach()
            ),
        ]
        drawn = [pipe(PROMPT, controls=[control], **DRAW).images for control in each]
        for control, image in zip(each, drawn, strict=True):
            torch.testing.assert_close(image, drawn[0], atol=1e-5, rtol=1e-4)
            read = RunSpec.from_json(RunSpec(prompt=PROMPT, controls=[control], **DRAW).to_json())
            torch.testing.assert_close(pipe.run(read).images, image, atol=0, rtol=0)

    def test_file_of_xl_has_the_pooled_text(self, tmp_path: Path) -> None:
        found = edit_direction(Pipeline.from_diffusers(BACKBONES["sdxl"]()), "cat", "dog")
        found.save(tmp_path / "d.safetensors")
        read = EditDirection.load(tmp_path / "d.safetensors")
        assert read.pooled is not None and found.pooled is not None
        assert torch.equal(read.pooled, found.pooled) and torch.equal(read.tokens, found.tokens)
        assert (read.names, read.counts, read.backbone) == (("cat", "dog"), found.counts, "sdxl")

    def test_what_is_no_direction_says_so(self, pipe: Pipeline, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
        save_file(
            {f"{s}_embeds": torch.full((1, 16, 32), torch.nan) for s in ("source", "target")},
            tmp_path / "nan.safetensors",
        )
        (tmp_path / "text.safetensors").write_text("nothing of the kind")
        for name in ("other", "nan", "text", "missing"):
            with pytest.raises(InputError):
                EditDirection.load(tmp_path / f"{name}.safetensors")
        with pytest.raises(InputError, match="kind sdxl"):
            xl = Pipeline.from_diffusers(BACKBONES["sdxl"]())
            pipe(PROMPT, controls=[Pix2PixZero(edit_direction(xl, CATS, DOGS))], **DRAW)


class TestInput:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"source_embeds": None},
            {"source_embeds": torch.zeros(1, 16, 32)},
            {"source_embeds": CATS},
            {"source_embeds": [], "target_embeds": DOGS},
            {"source_embeds": CATS, "target_embeds": [1]},
            {"source_embeds": "d.safetensors", "target_embeds": DOGS},
            {"source_embeds": 7},
            {"source_embeds": CATS, "target_embeds": DOGS, "scale": -1.0},
        ],
        ids=str,
    )
    def test_bad_settings(self, settings: dict[str, Any]) -> None:
        with pytest.raises(InputError):
            Pix2PixZero(**settings)

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ((torch.zeros(1, 9, 32), torch.zeros(1, 9, 32)), "9, 32"),
            ((torch.zeros(1, 16, 32), torch.zeros(1, 16, 8)), "different shapes"),
            ((torch.zeros(16), torch.zeros(16)), "shape"),
            ((torch.full((16, 32), torch.nan), torch.zeros(16, 32)), "not finite"),
            (("missing.safetensors",), "missing.safetensors"),
        ],
        ids=str,
    )
    def test_what_does_not_fit(self, pipe: Pipeline, given: tuple[Any, ...], said: str) -> None:
        with pytest.raises(ControlRoomError, match=said):
            pipe(PROMPT, controls=[Pix2PixZero(*given)], **DRAW)


class TestSentences:
    def test_rules_are_the_same_for_every_word(self) -> None:
        cats, dogs = sentences_about("cat"), sentences_about("dog")
        assert len(cats) == len(set(cats)) >= 200
        assert [text.replace("cat", "dog") for text in cats] == dogs
        assert all("cat" in text for text in cats)
        assert sentences_about("an apple", 1) == ["an apple"] and sentences_about("The cat", 3) == cats[:3]

    @pytest.mark.parametrize("thing", ["", "  ", 7, None, "x" * 1000])
    def test_no_thing(self, thing: Any) -> None:
        with pytest.raises(InputError):
            sentences_about(thing)

    def test_of_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "cats.txt"
        path.write_text("# about cats\n\n a cat \na red cat\n", encoding="utf-8")
        assert read_sentences(path) == ["a cat", "a red cat"]
        path.write_text("# nothing\n")
        with pytest.raises(InputError, match="no sentence"):
            read_sentences(path)
        path.write_bytes(b"\xff\xfe\x00cat")
        with pytest.raises(InputError, match="UTF-8"):
            read_sentences(path)
        path.write_text("a cat\n" * 20_000)
        with pytest.raises(InputError, match="10000"):
            read_sentences(path)
        for missing in (tmp_path / "none.txt", tmp_path):
            with pytest.raises(InputError):
                read_sentences(missing)

    def test_of_a_language_model(self, tmp_path: Path) -> None:
        folder = tiny_language_model(tmp_path)
        torch.manual_seed(3)
        expected = torch.rand(1)
        torch.manual_seed(3)
        found = sentences_from_model(folder, "cat", 8, seed=1, new_tokens=6)
        assert torch.equal(torch.rand(1), expected)
        assert len(found) == len(set(found)) == 8
        assert all("cat" in text and "\n" not in text and text.isprintable() for text in found)
        assert found == sentences_from_model(folder, "cat", 8, seed=1, new_tokens=6)
        assert found != sentences_from_model(folder, "cat", 8, seed=2, new_tokens=6)
        with pytest.raises(ModelError, match="no causal language model"):
            sentences_from_model(tmp_path / "nowhere", "cat")


def tiny_language_model(folder: Path) -> Path:
    """A causal language model of random weights with the tiny tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(folder / "writer")
    tokenizer.save_pretrained(folder / "writer")
    return folder / "writer"
