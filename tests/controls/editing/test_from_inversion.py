"""Runs that start from an inverted picture, alone and under the controls that edit; masks by words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from controlroom.controls.editing.from_inversion import FromInversion
from controlroom.controls.editing.image_to_image import ImageToImage
from controlroom.controls.editing.masactrl import MasaCtrl
from controlroom.controls.editing.prompt_to_prompt import PromptToPrompt
from controlroom.controls.word_mask import WordMaps, WordMask, read_mask
from controlroom.core.errors import ConflictError, InputError
from controlroom.core.spec import RunSpec
from controlroom.sampling.inversion import invert
from controlroom.sampling.inverted import Inversion, NullText
from controlroom.sampling.pipeline import Pipeline
from tests.controls.editing.test_prompt_to_prompt import Edit, Processor, schedule, swap
from tests.sampling.test_inversion import gentle_sd1, picture
from tests.tiny import BACKBONES, LENGTH, tiny_sd1
from tests.traces import traces

SOURCE, PROMPT = "a red cat on the beach", "a red dog on the beach"
DRAW: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent", "seed": 5, "scheduler": "ddim"}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(gentle_sd1())


@pytest.fixture(scope="module")
def plain(pipe: Pipeline) -> Inversion:
    return invert(pipe, picture(), SOURCE, num_inference_steps=3, measure=False)


@pytest.fixture(scope="module")
def null(pipe: Pipeline) -> Inversion:
    return invert(pipe, picture(), SOURCE, "null_text", 3, 4.0, null_text=NullText(iterations=5), min_db=-99)


def test_it_is_the_noise_of_the_inversion(pipe: Pipeline, plain: Inversion) -> None:
    for scale in (1.0, 5.0):
        ours = pipe(PROMPT, controls=[FromInversion(plain)], guidance_scale=scale, **DRAW).images
        assert torch.equal(ours, pipe(PROMPT, latents=plain.noise, guidance_scale=scale, **DRAW).images)


def test_with_its_embeddings_it_ends_where_the_optimisation_ended(pipe: Pipeline, null: Inversion) -> None:
    """The picture measured by the inversion is the one that a run draws."""
    result = pipe(SOURCE, controls=[FromInversion(null)], guidance_scale=4.0, **{**DRAW, "output_type": "pt"})
    own = pipe.decode(null.latents[0], "pt")
    db = float(-10 * torch.log10((result.images - own).square().mean()))
    assert null.quality is not None and null.quality.autoencoder[0] == pytest.approx(db, abs=0.01)
    # They change from step to step, and count.
    assert null.uncond is not None and not torch.equal(null.uncond[0], null.uncond[2])
    without = pipe(SOURCE, latents=null.noise, guidance_scale=4.0, **{**DRAW, "output_type": "pt"}).images
    assert float(-10 * torch.log10((without - own).square().mean())) < db


@torch.no_grad()
def published(found: Inversion, edit: Edit, scale: float) -> torch.Tensor:
    """Null-text editing: Prompt-to-Prompt from inverted noise, with the embeddings of each step. [source, edited]."""
    source = gentle_sd1().to(torch.float64)
    source.unet.set_attn_processor(Processor(edit))
    conds, _ = source.encode_prompt([SOURCE, PROMPT], "cpu", 1, True)
    source.scheduler.set_timesteps(3)
    x = found.noise.expand(2, -1, -1, -1)
    assert found.uncond is not None
    for t, uncond in zip(source.scheduler.timesteps, found.uncond, strict=True):
        text = torch.cat([uncond.expand(2, -1, -1), conds])
        eps_u, eps_c = source.unet(torch.cat([x, x]), t, encoder_hidden_states=text).sample.chunk(2)
        x = source.scheduler.step(eps_u + scale * (eps_c - eps_u), t, x).prev_sample
        x = edit.after(x)
    return x


class TestPromptToPrompt:
    @pytest.mark.parametrize("first", [True, False])
    def test_equals_published_null_text_editing(self, first: bool) -> None:
        pipe = Pipeline.from_diffusers(gentle_sd1().to(torch.float64))
        found = invert(pipe, picture(), SOURCE, "null_text", 3, 4.0, null_text=NullText(iterations=3), min_db=-99)
        edit = Edit(3, schedule(0.7, 3).double(), range(2), swap(torch.eye(LENGTH).double()))
        expected = published(found, edit, 4.0)
        start = FromInversion(found, hold_source=False)
        control = PromptToPrompt(SOURCE, cross_replace=0.7, self_replace=0.7)
        controls = [start, control] if first else [control, start]
        result = pipe(PROMPT, controls=controls, guidance_scale=4.0, **DRAW)
        assert (result.images - expected[1:]).abs().max() <= 1e-4 * expected.std()
        assert (result.states["source"] - expected[:1]).abs().max() <= 1e-4 * expected.std()
        alone = pipe(PROMPT, controls=[start], guidance_scale=4.0, **DRAW).images
        assert (result.images - alone).abs().max() > 1e-2 * expected.std()

    @pytest.mark.parametrize("kind", ["ddim", "null_text"])
    def test_the_source_is_the_picture(self, pipe: Pipeline, plain: Inversion, null: Inversion, kind: str) -> None:
        found = plain if kind == "ddim" else null
        result = pipe(PROMPT, controls=[FromInversion(found), PromptToPrompt(SOURCE)], guidance_scale=4.0, **DRAW)
        assert torch.equal(result.states["source"], found.latents[0])
        assert (result.images - found.latents[0]).abs().max() > 1e-2

    def test_the_blend_takes_the_picture_where_the_words_are_not(self, pipe: Pipeline, plain: Inversion) -> None:
        edit = PromptToPrompt(SOURCE, local_blend=(["cat"], ["dog"]), blend_threshold=0.9)
        result = pipe(PROMPT, controls=[FromInversion(plain), edit], **DRAW).images
        same = (result == plain.latents[0]).all(1)
        assert 0.05 < float(same.float().mean()) < 0.95


def test_other_controls_that_draw_a_source_along(pipe: Pipeline, plain: Inversion) -> None:
    masa = MasaCtrl(SOURCE, start_step=1, start_layer=2)
    result = pipe(PROMPT, controls=[FromInversion(plain), masa], **DRAW)
    assert torch.equal(result.states["source"], plain.latents[0])
    drawn = pipe(PROMPT, controls=[FromInversion(plain, hold_source=False), masa], **DRAW)
    assert not torch.equal(drawn.states["source"], plain.latents[0])


class TestStrength:
    def test_starts_at_the_recorded_level(self, pipe: Pipeline) -> None:
        found = invert(pipe, picture(), SOURCE, num_inference_steps=4, measure=False)
        settings = {**DRAW, "num_inference_steps": 4, "guidance_scale": 1.0}
        for strength, first in ((0.25, 3), (0.5, 2), (1.0, 0)):
            result = pipe(SOURCE, controls=[FromInversion(found, strength)], **settings)
            assert result.manifest["cost"]["unet_passes"] == 4 - first
            scheduler = tiny_sd1().scheduler
            scheduler.set_timesteps(4)
            x = found.latents[4 - first]
            with torch.no_grad():
                cond, _ = pipe.to_diffusers().encode_prompt(SOURCE, "cpu", 1, False)
                for t in scheduler.timesteps[first:]:
                    x = scheduler.step(pipe.unet(x, t, cond).sample, t, x).prev_sample
            assert torch.equal(result.images, x)

    def test_embeddings_are_those_of_the_last_steps(self, pipe: Pipeline, null: Inversion) -> None:
        seen: list[torch.Tensor] = []
        pipe(
            SOURCE,
            controls=[FromInversion(null, 0.7)],
            guidance_scale=4.0,
            callback_on_step_end=lambda p, i, t, d: seen.append(d["negative_prompt_embeds"]) or {},
            callback_on_step_end_tensor_inputs=["latents", "negative_prompt_embeds"],
            **DRAW,
        )
        assert null.uncond is not None
        assert [torch.equal(a, b) for a, b in zip(seen, null.uncond[1:], strict=True)] == [True, True]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_pictures_and_images_in_batches(backbone: str) -> None:
    pipe = Pipeline.from_diffusers(BACKBONES[backbone]())
    sources, prompts = ["a cat", "a dog"], ["a red cat", "a red dog"]
    found = invert(pipe, [picture(), picture(1)], sources, "null_text", 2, null_text=NullText(iterations=2), min_db=-99)
    settings = {**DRAW, "num_inference_steps": 2}
    result = pipe(prompts, controls=[FromInversion(found), PromptToPrompt(sources)], **settings)
    assert torch.equal(result.states["source"], found.latents[0])
    twice = pipe(prompts, controls=[FromInversion(found)], num_images_per_prompt=2, **settings).images
    assert torch.equal(twice[0], twice[1]) and not torch.equal(twice[1], twice[2])
    with pytest.raises(InputError, match="2 inverted pictures for 1 images"):
        pipe("a cat", controls=[FromInversion(found)], **settings)


class TestMask:
    def test_outside_it_is_the_picture(self, pipe: Pipeline, plain: Inversion) -> None:
        mask = np.zeros((32, 32), np.uint8)
        mask[8:24, 8:24] = 255
        result = pipe(PROMPT, controls=[FromInversion(plain, mask=mask)], **DRAW).images
        same = (result == plain.latents[0]).all(1)[0]
        assert same.sum() == 16 * 16 - 8 * 8 and not same[4:12, 4:12].any()

    def test_by_words(self, pipe: Pipeline, plain: Inversion) -> None:
        """Against the maps of the word, read here and averaged over layers and steps."""
        seen: list[torch.Tensor] = []
        whole = FromInversion(plain, mask=WordMask(["dog"], threshold=0.9))
        kept = WordMaps.mask

        def mask(self: WordMaps, hw: Any) -> torch.Tensor:
            seen.append(kept(self, hw))
            return seen[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(WordMaps, "mask", mask)
            result = pipe(PROMPT, controls=[whole], **DRAW).images
        assert len(seen) == 3 and all(0.02 < float(m.mean()) < 0.98 for m in seen)
        outside = seen[-1][0, 0] == 0
        assert torch.equal(result[0][:, outside], plain.latents[0][0][:, outside])
        assert (result[0][:, ~outside] - plain.latents[0][0][:, ~outside]).abs().max() > 1e-3
        everywhere = pipe(PROMPT, controls=[FromInversion(plain, mask=WordMask(["dog"], threshold=0.0))], **DRAW).images
        assert not torch.equal(everywhere, result)

    def test_maps_are_those_of_the_first_step(self, pipe: Pipeline, plain: Inversion) -> None:
        """The first mask, with probabilities materialised."""
        maps: list[torch.Tensor] = []

        class Reading:
            def __call__(self, attn: Any, hidden: Any, encoder_hidden_states: Any = None, **more: Any) -> Any:
                context = hidden if encoder_hidden_states is None else encoder_hidden_states
                q, k, v = attn.to_q(hidden), attn.to_k(context), attn.to_v(context)
                q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
                p = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
                if encoder_hidden_states is not None and hidden.shape[1] == 8 * 8:
                    maps.append((p[..., 2] + p[..., 3]).mean(1).reshape(1, 1, 8, 8))
                return attn.to_out[0]((p @ v).transpose(1, 2).flatten(2))

        source = gentle_sd1()
        source.unet.set_attn_processor(Reading())
        source.scheduler.set_timesteps(3)
        with torch.no_grad():
            cond, _ = source.encode_prompt(PROMPT, "cpu", 1, False)
            source.unet(plain.noise, source.scheduler.timesteps[0], cond)
        total = torch.stack(maps).sum(0)
        wide = F.interpolate(F.max_pool2d(total, 3, 1, 1), size=(16, 16))
        expected = (wide > 0.9 * wide.max()).float()
        found: list[torch.Tensor] = []
        kept = WordMaps.mask
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(WordMaps, "mask", lambda self, hw: found.append(kept(self, hw)) or found[-1])
            pipe(PROMPT, controls=[FromInversion(plain, mask=WordMask("red dog", threshold=0.9))], **DRAW)
        assert torch.equal(found[0], expected) and 0 < expected.mean() < 1

    def test_is_written_in_words(self) -> None:
        assert read_mask("words: red hat, shirt") == WordMask(("red hat", "shirt"))
        assert read_mask({"words": ["hat"], "threshold": 0.5}) == WordMask(["hat"], threshold=0.5)
        assert read_mask("hat.png") == "hat.png" and read_mask(None) is None
        for bad in ("words:", "words: a,,b", {"words": []}, {"words": ["a"], "threshold": 1.0}, {"word": ["a"]}):
            with pytest.raises(InputError):
                read_mask(bad)

    def test_word_that_is_not_there_is_named(self, pipe: Pipeline, plain: Inversion) -> None:
        with pytest.raises(InputError, match="frog"):
            pipe(PROMPT, controls=[FromInversion(plain, mask="words: frog")], **DRAW)


class TestRun:
    @pytest.mark.parametrize("kind", ["path", "memory"])
    def test_travels_with_the_run(self, pipe: Pipeline, plain: Inversion, kind: str, tmp_path: Path) -> None:
        path = tmp_path / "anna.safetensors"
        plain.save(path)
        control = FromInversion(str(path) if kind == "path" else plain, mask="words: dog")
        spec = RunSpec(prompt=PROMPT, controls=[control], **DRAW)
        expected = pipe.run(spec)
        assert any(SOURCE in note for note in expected.manifest["notes"])
        for read in (RunSpec.from_json(spec.to_json()), RunSpec.from_yaml(spec.to_yaml())):
            assert torch.equal(pipe.run(read).images, expected.images)
        if kind == "path":
            assert str(path) in str(expected.manifest["inputs"])

    def test_no_trace(self, null: Inversion) -> None:
        pipe = Pipeline.from_diffusers(gentle_sd1())
        controls = [FromInversion(null, mask="words: dog"), PromptToPrompt(SOURCE)]
        pipe(PROMPT, guidance_scale=4.0, **DRAW)
        before = traces(pipe)
        pipe(PROMPT, controls=controls, guidance_scale=4.0, **DRAW)
        assert traces(pipe) == before
        with pytest.raises(ZeroDivisionError):
            pipe(PROMPT, controls=controls, guidance_scale=4.0, callback_on_step_end=lambda *_: 1 // 0, **DRAW)
        assert traces(pipe) == before

    def test_another_guidance_than_the_embeddings_is_a_warning(self, pipe: Pipeline, null: Inversion) -> None:
        with pytest.warns(UserWarning, match="guidance_scale=4; with 9"):
            pipe(SOURCE, controls=[FromInversion(null)], guidance_scale=9.0, **DRAW)
        pipe(SOURCE, controls=[FromInversion(null)], guidance_scale=1.0, **DRAW)

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"num_inference_steps": 4}, "num_inference_steps=3"),
            ({"scheduler": "euler"}, 'scheduler="ddim"'),
            ({"eta": 0.5}, "eta=0.5"),
            ({"height": 16, "width": 16}, "height=32, width=32"),
            ({"latents": torch.zeros(1, 4, 16, 16)}, "latents"),
        ],
        ids=str,
    )
    def test_what_does_not_fit(self, pipe: Pipeline, plain: Inversion, settings: dict[str, Any], said: str) -> None:
        with pytest.raises(InputError, match=said):
            pipe(PROMPT, controls=[FromInversion(plain)], **{**DRAW, **settings})

    def test_another_backbone(self, plain: Inversion) -> None:
        with pytest.raises(InputError, match="kind sd1"):
            Pipeline.from_diffusers(BACKBONES["sdxl"]())(PROMPT, controls=[FromInversion(plain)], **DRAW)

    def test_two_starts_are_named(self, pipe: Pipeline, plain: Inversion) -> None:
        with pytest.raises(ConflictError, match=r"FromInversion.*ImageToImage"):
            pipe(PROMPT, controls=[FromInversion(plain), ImageToImage(picture())], **DRAW)

    def test_no_inversion(self, pipe: Pipeline, tmp_path: Path) -> None:
        for bad in (None, 7, torch.zeros(1)):
            with pytest.raises(InputError):
                FromInversion(bad)
        (tmp_path / "text.safetensors").write_text("nothing of the kind")
        for path in (tmp_path / "missing.safetensors", tmp_path / "text.safetensors", tmp_path):
            with pytest.raises(InputError):
                pipe(PROMPT, controls=[FromInversion(path)], **DRAW)
        half = invert(pipe, picture(), SOURCE, num_inference_steps=2, on_progress=lambda done, total: pipe.cancel())
        with pytest.raises(InputError, match="cancelled"):
            pipe(PROMPT, controls=[FromInversion(half)], **{**DRAW, "num_inference_steps": 2})
