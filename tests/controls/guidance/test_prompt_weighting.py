"""Weighted prompts against plain transcriptions, against diffusers' pipelines that get the transcription's embeddings,
and against numbers that the library Compel gave.

A1111's code is not read here and cannot be shipped (AGPL); its published rule is transcribed: each token's state times
its weight, each chunk back to its mean, chunks side by side, AND as u + g·Σ wᵢ (cᵢ − u).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest
import torch
from pydantic import Field

from controlroom.backbones.words import PromptTokens, prompt_tokens
from controlroom.controls.editing.prompt_to_prompt import PromptToPrompt
from controlroom.controls.guidance.attend_and_excite import AttendAndExcite
from controlroom.controls.guidance.prompt_weighting import PromptWeighting
from controlroom.core.branch import Branch, Condition
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import ConflictError, InputError
from controlroom.core.run import Run
from controlroom.core.spec import RunSpec
from controlroom.core.step import Step
from controlroom.sampling.execute import opened_run
from controlroom.sampling.pipeline import Pipeline
from tests.tiny import BACKBONES, LENGTH, tiny_sd1, tiny_sdxl

DRAW: dict[str, Any] = {
    "num_inference_steps": 3, "output_type": "latent", "seed": 5, "height": 16, "width": 16, "scheduler": "ddim",
}  # fmt: skip


def filled(encoder: Any) -> Any:
    """Weights by a formula: the same in every version of torch, and a mean that is not zero."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(encoder.named_parameters())):
            values = torch.sin(0.7 * torch.arange(parameter.numel(), dtype=torch.float64) + number).view_as(parameter)
            norm = "norm" in name and name.endswith("weight")
            parameter.copy_((1.0 if norm else 0.0) + (0.1 if parameter.ndim == 1 else 0.3) * values)
    return encoder


@pytest.fixture(scope="module")
def plains() -> dict[str, Any]:
    found = {kind: make() for kind, make in BACKBONES.items()}
    for plain in found.values():
        for encoder in encoders(plain):
            filled(encoder)
    return found


@pytest.fixture(scope="module")
def pipes(plains: dict[str, Any]) -> dict[str, Pipeline]:
    return {kind: Pipeline.from_diffusers(plain) for kind, plain in plains.items()}


@pytest.fixture(scope="module")
def pipe(pipes: dict[str, Pipeline]) -> Pipeline:
    return pipes["sd1"]


def encoders(plain: Any) -> list[Any]:
    return [e for e in (plain.text_encoder, getattr(plain, "text_encoder_2", None)) if e is not None]


@contextmanager
def opened(pipe: Pipeline, *controls: Control, **settings: Any) -> Iterator[Run]:
    spec = RunSpec(controls=list(controls), **{**DRAW, **settings})
    with torch.no_grad(), opened_run(cast(Any, pipe.backbone), spec) as (run, _):
        yield run


def told(pipe: Pipeline, prompt: Any, branch: str = "cond", i: int = 0, **settings: Any) -> Condition:
    """What a branch is told at step i, with the settings of the control."""
    run_settings = {key: settings.pop(key) for key in ("negative_prompt", "clip_skip") if key in settings}
    with opened(pipe, PromptWeighting(**settings), prompt=prompt, **run_settings) as run:
        source = run.conditions[branch]
        return source if isinstance(source, Condition) else source(cast(Step, SimpleNamespace(i=i)))


Weighed = list[tuple[str, float]]
"""Words with their weights: one chunk."""


def rows(plain: Any, chunk: Weighed) -> tuple[list[int], list[float]]:
    """Ids and weights of a chunk, written out."""
    tokenizer = plain.tokenizer
    ids, weights = [tokenizer.bos_token_id], [1.0]
    for text, weight in chunk:
        for token in tokenizer(text, add_special_tokens=False).input_ids:
            ids.append(token)
            weights.append(weight)
    ids.append(tokenizer.eos_token_id)
    return ids + [tokenizer.pad_token_id] * (LENGTH - len(ids)), weights + [1.0] * (LENGTH - len(weights))


def states_of(plain: Any, encoder: Any, ids: list[int], mask: list[int] | None = None) -> torch.Tensor:
    """[1, 16, C] as each backbone takes them: the last states, or for Stable Diffusion XL those before."""
    out = encoder(
        torch.tensor([ids]),
        attention_mask=None if mask is None else torch.tensor([mask]),
        output_hidden_states=True,
    )
    return out.hidden_states[-2] if hasattr(plain, "text_encoder_2") else out.last_hidden_state


@torch.no_grad()
def a1111(plain: Any, chunks: list[Weighed]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A1111's states [1, 16 · chunks, C] of all encoders, and the pooled embedding of the first chunk."""
    joined = []
    for chunk in chunks:
        ids, weights = rows(plain, chunk)
        parts = []
        for encoder in encoders(plain):
            states = states_of(plain, encoder, ids)
            mean = states.mean()
            states = torch.stack([states[0, place] * weight for place, weight in enumerate(weights)])[None]
            parts.append(states * (mean / states.mean()))
        joined.append(torch.cat(parts, dim=-1))
    return torch.cat(joined, dim=1), pooled_of(plain, chunks[0])


def pooled_of(plain: Any, chunk: Weighed) -> torch.Tensor | None:
    if not hasattr(plain, "text_encoder_2"):
        return None
    return plain.text_encoder_2(torch.tensor([rows(plain, chunk)[0]])).text_embeds


@torch.no_grad()
def compel(plain: Any, chunk: Weighed) -> torch.Tensor:
    """Compel's states of one chunk: from the empty prompt, averaged with those without what weighs less than 1."""
    ids, weights = rows(plain, chunk)
    empty_ids, _ = rows(plain, [])
    parts = []
    for encoder in encoders(plain):
        empty = states_of(plain, encoder, empty_ids)
        shares, found, place = [1.0], [], 1
        masks: list[list[int]] = [[1] * LENGTH]
        for text, weight in chunk:
            count = len(plain.tokenizer(text, add_special_tokens=False).input_ids)
            if weight < 1:
                masks.append([0 if place <= at < place + count else 1 for at in range(LENGTH)])
                shares.append(math.tan((1 - max(weight, 1e-5)) * math.pi / 2))
            place += count
        for mask in masks:
            states = states_of(plain, encoder, ids, mask)
            found.append(empty + (states - empty) * torch.tensor(weights)[None, :, None])
        parts.append(sum(share * each for share, each in zip(shares, found, strict=True)) / sum(shares))
    return torch.cat(parts, dim=-1)


def close(ours: torch.Tensor, theirs: torch.Tensor, limit: float = 1e-4) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < limit * theirs.std()


# A prompt, and what it says: chunks of words with weights.
CHUNKS: dict[str, list[Weighed]] = {
    "a (red:1.5) cat": [[("a", 1.0), ("red", 1.5), ("cat", 1.0)]],
    "((a red)) [cat] on (the beach:0.3)": [[("a red", 1.21), ("cat", 1 / 1.1), ("on", 1.0), ("the beach", 0.3)]],
    "a (red:-1) cat": [[("a", 1.0), ("red", -1.0), ("cat", 1.0)]],
    "a (red:1.5) cat BREAK a [dog]": [
        [("a", 1.0), ("red", 1.5), ("cat", 1.0)],
        [("a", 1.0), ("dog", 1 / 1.1)],
    ],
    "a (cat with a hat:1.2), a red dog with a blue hat on the beach": [
        [("a", 1.0), ("cat with a hat", 1.2), (",", 1.0)],
        [("a red dog with a blue hat on the beach", 1.0)],
    ],
}
NEGATIVE = "(night:1.4), blue"
NEGATED: Weighed = [("night", 1.4), (", blue", 1.0)]


class TestA1111:
    @pytest.mark.parametrize("prompt", CHUNKS)
    @pytest.mark.parametrize("kind", BACKBONES)
    def test_states(self, kind: str, prompt: str, plains: dict[str, Any], pipes: dict[str, Pipeline]) -> None:
        condition = told(pipes[kind], prompt)
        tokens, pooled = a1111(plains[kind], CHUNKS[prompt])
        close(condition.tokens, tokens)
        assert (condition.pooled is None) == (pooled is None)
        if condition.pooled is not None and pooled is not None:
            close(condition.pooled, pooled)

    @pytest.mark.parametrize("prompt", [next(iter(CHUNKS)), list(CHUNKS)[-1]])
    @pytest.mark.parametrize("kind", BACKBONES)
    def test_pictures(self, kind: str, prompt: str, plains: dict[str, Any], pipes: dict[str, Pipeline]) -> None:
        """diffusers' own pipeline, given the transcription's embeddings, draws the same."""
        plain, chunks = plains[kind], CHUNKS[prompt]
        tokens, pooled = a1111(plain, chunks)
        negative, negative_pooled = a1111(plain, [NEGATED, *[[]] * (len(chunks) - 1)])
        more = (
            {} if pooled is None else {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": negative_pooled}
        )
        plain.set_progress_bar_config(disable=True)
        theirs = plain(
            prompt_embeds=tokens,
            negative_prompt_embeds=negative,
            num_inference_steps=3,
            guidance_scale=7.5,
            output_type="latent",
            height=16,
            width=16,
            generator=torch.Generator().manual_seed(5),
            **more,
        ).images
        result = pipes[kind](prompt, NEGATIVE, controls=[PromptWeighting()], **DRAW)
        close(result.images, theirs)
        assert result.manifest["cost"]["unet_passes"] == 3
        assert result.manifest["cost"]["unet_rows"] == 6

    def test_clip_skip(self, plains: dict[str, Any], pipe: Pipeline) -> None:
        condition = told(pipe, "a (red:1.5) cat", clip_skip=1)
        ids, weights = rows(plains["sd1"], CHUNKS["a (red:1.5) cat"][0])
        with torch.no_grad():
            encoder = plains["sd1"].text_encoder
            hidden = encoder(torch.tensor([ids]), output_hidden_states=True).hidden_states[-2]
            states = getattr(encoder, "text_model", encoder).final_layer_norm(hidden)
            weighed = states * torch.tensor(weights)[:, None]
            close(condition.tokens, weighed * states.mean() / weighed.mean())

    def test_a_mean_of_rounding_is_not_brought_back(self) -> None:
        """A last norm without a bias leaves the mean of rounding errors; a quotient of two of them says nothing."""
        plain = tiny_sd1()
        condition = told(Pipeline.from_diffusers(plain), "a (red:1.5) cat")
        ids, weights = rows(plain, CHUNKS["a (red:1.5) cat"][0])
        with torch.no_grad():
            close(condition.tokens, states_of(plain, plain.text_encoder, ids) * torch.tensor(weights)[:, None])

    def test_the_prompt_without_words_fills_up(self, plains: dict[str, Any], pipes: dict[str, Pipeline]) -> None:
        empty, _ = a1111(plains["sd1"], [[], []])
        close(told(pipes["sd1"], "a BREAK b", "uncond", negative_prompt="").tokens, empty)
        # Stable Diffusion XL is told zeros where no negative prompt is given, and stays so.
        with opened(pipes["sdxl"], PromptWeighting(), prompt="a BREAK b") as run:
            uncond = run.conditions["uncond"]
            assert isinstance(uncond, Condition) and run.filling is not None
            tokens = run.filling("uncond", uncond).tokens
            assert tokens.shape[1] == 2 * LENGTH and not tokens.any()


# What compel 2.5.1 gave, with torch 2.13 and transformers 5.23, for `Compel(tokenizer=tiny_tokenizer(),
# text_encoder=filled(tiny_text_encoder()), truncate_long_prompts=False, returned_embeddings_type=...)(prompt)`:
# channels 0 and 13 of the tokens 1, 2, 4, 8 and of the last but one, and the standard deviation of all; first of the
# last states, then of the states before them, which Stable Diffusion XL takes.
COMPEL: dict[str, tuple[str, str]] = {
    "a red++ cat with a hat": (
        "-1.87780 0.62317 1.28172 -1.21813 -1.55142 0.94335 -1.76038 0.78862 -0.91569 0.13851 1.01192",
        "-1.25539 -0.24395 2.71863 -1.98914 -0.71354 0.40606 -0.98393 -0.51782 -0.76234 -0.53728 1.33462",
    ),
    "a red- cat with a hat": (
        "-1.87780 0.62317 0.56188 -0.67430 -1.55318 0.95483 -1.76038 0.78862 -0.91569 0.13851 0.98250",
        "-1.25539 -0.24395 1.94755 -1.21433 -0.71354 0.40606 -0.98393 -0.51782 -0.76234 -0.53728 1.29878",
    ),
    "a (red cat)1.3 and (a hat)0.6": (
        "-1.87780 0.62317 1.49071 -1.37602 1.26255 -0.95776 -1.76722 0.64953 -0.09734 0.94651 1.03586",
        "-1.25539 -0.24395 2.94250 -2.21408 2.37504 -1.28053 -0.98393 -0.51782 0.12921 0.26890 1.39852",
    ),
    "((red)1.2 cat)0.8 on the beach": (
        "-0.39812 -0.07386 0.20604 -0.72490 -0.46516 -0.44165 -1.56774 0.96466 -0.70393 0.92067 0.97106",
        "-1.73492 0.89546 0.68942 -0.86343 -1.38561 0.40061 -0.98333 -0.52975 -0.64619 -0.39819 1.36388",
    ),
    "a (red)0.5 cat, a (green)0.3 hat": (
        "-1.87780 0.62317 -0.36695 0.02742 -1.26657 0.11555 -1.69836 0.92418 -0.40723 0.99529 0.92886",
        "-1.25539 -0.24395 0.95260 -0.21459 -1.17191 1.58647 -1.14343 0.03945 -0.35076 -0.09109 1.15950",
    ),
    '("a red cat", "a blue dog").blend(0.7, 0.3)': (
        "-1.87780 0.62317 0.66381 -0.76992 -1.52690 0.30177 -1.70785 0.86987 -0.29698 0.89378 0.98367",
        "-1.25539 -0.24395 2.17009 -1.52314 -1.57120 1.56064 -0.98393 -0.51782 -0.10230 -0.02116 1.35504",
    ),
    '("a red++ cat", "a blue dog").blend(1, -0.4, no_normalize)': (
        "-1.12668 0.37390 1.13778 -0.98465 -0.87552 -0.07457 -1.02471 0.52192 0.20776 0.63840 0.65370",
        "-0.75323 -0.14637 1.87504 -1.32494 -1.55231 0.80236 -0.59036 -0.31069 0.38607 0.54879 0.88288",
    ),
    '("a red cat", "a blue dog").and(1, 0.5)': (
        "-1.87780 0.62317 0.79408 -0.84973 -1.50589 0.16954 -1.70785 0.86987 -0.42985 0.86544 0.97214",
        "-1.25539 -0.24395 2.19629 -1.46427 -1.88651 1.49131 -0.98393 -0.51782 -0.25938 -0.18667 1.33811",
    ),
}


class TestCompel:
    @pytest.mark.parametrize("prompt", COMPEL)
    def test_states_are_those_of_the_library(self, prompt: str, pipes: dict[str, Pipeline]) -> None:
        for kind, row in zip(("sd1", "sdxl"), COMPEL[prompt], strict=True):
            *numbers, deviation = map(float, row.split())
            tokens = told(pipes[kind], prompt, dialect="compel").tokens[:, :, :32]
            places = [1, 2, 4, 8, tokens.shape[1] - 2]
            theirs = torch.tensor(numbers).view(5, 2)
            assert (tokens[0, places][:, [0, 13]] - theirs).abs().max() < 1e-4
            assert float(tokens.std()) == pytest.approx(deviation, abs=1e-4)

    @pytest.mark.parametrize("kind", BACKBONES)
    def test_states_of_every_encoder(self, kind: str, plains: dict[str, Any], pipes: dict[str, Pipeline]) -> None:
        prompt: Weighed = [("a", 1.0), ("red", 0.4), ("cat", 1.3), ("hat", 0.0)]
        condition = told(pipes[kind], "a (red)0.4 (cat)1.3 (hat)0", dialect="compel")
        close(condition.tokens, compel(plains[kind], prompt))
        if (pooled := pooled_of(plains[kind], prompt)) is not None and condition.pooled is not None:
            close(condition.pooled, pooled)

    def test_the_pooled_embedding_of_a_blend_is_the_average(
        self, plains: dict[str, Any], pipes: dict[str, Any]
    ) -> None:
        condition = told(pipes["sdxl"], '("a red cat", "a blue dog").blend(3, 1)', dialect="compel")
        first, second = (pooled_of(plains["sdxl"], [(text, 1.0)]) for text in ("a red cat", "a blue dog"))
        assert condition.pooled is not None and first is not None and second is not None
        close(condition.pooled, 0.75 * first + 0.25 * second)

    def test_notation_and_weighting_can_be_mixed(self, plains: dict[str, Any], pipe: Pipeline) -> None:
        words: Weighed = [("a", 1.0), ("red", 1.3), ("cat", 1.0)]
        mixed = told(pipe, "a (red:1.3) cat", weighting="compel").tokens
        close(mixed, compel(plains["sd1"], words))
        assert torch.equal(told(pipe, "a (red)1.3 cat", dialect="compel").tokens, mixed)
        close(
            told(pipe, "a (red)1.3 cat", dialect="compel", weighting="a1111").tokens, a1111(plains["sd1"], [words])[0]
        )


@torch.no_grad()
def drawn(plain: Any, texts: list[list[tuple[str, float]]], guidance: float) -> torch.Tensor:
    """A plain loop: at each step a list of prompts with weights; u + g·Σ w (c − u)."""
    plain.scheduler.set_timesteps(len(texts))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)) * plain.scheduler.init_noise_sigma
    uncond, _ = a1111(plain, [[]])
    for t, parts in zip(plain.scheduler.timesteps, texts, strict=True):
        u = plain.unet(latents, t, uncond).sample
        total = u.clone()
        for text, weight in parts:
            total += guidance * weight * (plain.unet(latents, t, a1111(plain, [[(text, 1.0)]])[0]).sample - u)
        latents = plain.scheduler.step(total, t, latents).prev_sample
    return latents


class TestOverTheSteps:
    @pytest.mark.parametrize("kind", ["sd1", "sd2"])
    def test_and(self, kind: str, plains: dict[str, Any], pipes: dict[str, Pipeline]) -> None:
        prompt = "a red cat :1.2 AND a dog :0.5 AND night :-0.3"
        parts = [("a red cat", 1.2), ("a dog", 0.5), ("night", -0.3)]
        result = pipes[kind](prompt, controls=[PromptWeighting()], guidance_scale=4.0, **DRAW)
        close(result.images, drawn(plains[kind], [parts] * 3, 4.0))
        assert result.manifest["cost"] == {
            "unet_rows": 12, "unet_passes": 3, "energy_passes": 0, "side_rows": 0, "side_passes": 0,
        }  # fmt: skip

    def test_schedules(self, plains: dict[str, Any], pipe: Pipeline) -> None:
        texts = ["a red cat", "a red dog", "a blue dog"]
        expected = drawn(plains["sd1"], [[(text, 1.0)] for text in texts], 7.5)
        close(pipe("a [red:blue:0.7] [cat:dog:1]", controls=[PromptWeighting()], **DRAW).images, expected)

    def test_turns(self, plains: dict[str, Any], pipe: Pipeline) -> None:
        texts = ["a cat", "a dog", "a cat"]
        expected = drawn(plains["sd1"], [[(text, 1.0)] for text in texts], 7.5)
        close(pipe("a [cat|dog]", controls=[PromptWeighting()], **DRAW).images, expected)

    def test_and_with_a_schedule(self, plains: dict[str, Any], pipe: Pipeline) -> None:
        texts = [[("a cat", 1.0), ("night", 0.5)], [("a cat", 1.0), ("beach", 0.5)], [("a cat", 1.0), ("beach", 0.5)]]
        result = pipe("a cat AND [night:beach:1] :0.5", controls=[PromptWeighting()], **DRAW)
        close(result.images, drawn(plains["sd1"], texts, 7.5))

    def test_and_without_guidance_is_the_weighted_mean(self, plains: dict[str, Any], pipe: Pipeline) -> None:
        # Weights that add up to 1 are the mean at a guidance of 1.
        result = pipe("a cat :0.75 AND a dog :0.25", controls=[PromptWeighting()], guidance_scale=1.0, **DRAW)
        close(result.images, drawn(plains["sd1"], [[("a cat", 0.75), ("a dog", 0.25)]] * 3, 1.0))
        doubled = pipe("a cat :1.5 AND a dog :0.5", controls=[PromptWeighting()], guidance_scale=1.0, **DRAW)
        close(doubled.images, result.images)
        none = pipe("a cat :1 AND a dog :-1", controls=[PromptWeighting()], guidance_scale=1.0, **DRAW)
        close(none.images, pipe("a cat", guidance_scale=1.0, **DRAW).images)

    def test_a_schedule_of_weights_and_of_negative_prompts(self, pipe: Pipeline) -> None:
        for i, expected in enumerate(["(cat:1.5)", "cat", "cat"]):
            found = told(pipe, "a [(cat:1.5):cat:1]", i=i).tokens
            assert torch.allclose(found, told(pipe, f"a {expected}").tokens, atol=1e-6)
        for i, expected in enumerate(["night", "beach"]):
            found = told(pipe, "a cat", "uncond", i, negative_prompt="[night:beach:1]").tokens
            with opened(pipe, prompt="a cat", negative_prompt=expected) as run:
                uncond = run.conditions["uncond"]
                assert isinstance(uncond, Condition) and torch.allclose(found, uncond.tokens, atol=1e-6)


class TestScale:
    def test_without_notation_nothing_changes(self, pipes: dict[str, Pipeline]) -> None:
        for dialect in ("a1111", "compel"):
            for pipe in pipes.values():
                result = pipe("a red cat", "night", controls=[PromptWeighting(dialect=dialect)], **DRAW)
                assert torch.equal(result.images, pipe("a red cat", "night", **DRAW).images)

    @pytest.mark.parametrize(
        ("dialect", "prompt", "words"),
        [
            ("a1111", "a (red:1.6) [cat]", "a red cat"),
            ("a1111", "a red cat :1.3 AND a dog :0.5", "a red cat"),
            ("compel", "a red++ cat-", "a red cat"),
            ("compel", '("a red cat", "a dog").blend(1, 2)', "a red cat"),
        ],
    )
    def test_towards_0_it_fades_into_the_words(self, dialect: Any, prompt: str, words: str, pipe: Pipeline) -> None:
        plain = pipe(words, **DRAW)
        off = pipe(prompt, controls=[PromptWeighting(dialect=dialect, scale=0)], **DRAW)
        assert torch.equal(off.images, plain.images)
        assert off.manifest["cost"] == plain.manifest["cost"]
        assert off.manifest["dropped"] == {"PromptWeighting": "its scale is 0"}
        faint = pipe(prompt, controls=[PromptWeighting(dialect=dialect, scale=1e-4)], **DRAW)
        full = pipe(prompt, controls=[PromptWeighting(dialect=dialect)], **DRAW)
        distance = (full.images - plain.images).abs().max()
        assert 0 < (faint.images - plain.images).abs().max() < 2e-3 * distance

    def test_it_interpolates_weights(self, pipe: Pipeline) -> None:
        half = told(pipe, "a (red:1.5) (cat:0.4)", scale=0.5).tokens
        assert torch.allclose(half, told(pipe, "a (red:1.25) (cat:0.7)").tokens, atol=1e-6)
        more = told(pipe, "a (red:1.5) cat", scale=2).tokens
        assert torch.allclose(more, told(pipe, "a (red:2) cat").tokens, atol=1e-6)


class TestText:
    def test_comes_with_the_control_or_with_the_run(self, pipe: Pipeline) -> None:
        expected = pipe("a (red:1.5) cat", "(night:1.2)", controls=[PromptWeighting()], **DRAW).images
        for prompt in ("", "a red cat"):
            control = PromptWeighting("a (red:1.5) cat", negative="(night:1.2)")
            assert torch.equal(pipe(prompt, controls=[control], **DRAW).images, expected)

    def test_each_picture_has_its_own(self, pipe: Pipeline) -> None:
        texts = ["a (red:1.5) cat", "a cat AND a dog :0.5", "a cat BREAK night", "a [cat|dog]"]
        control = PromptWeighting()
        result = pipe(texts, controls=[control], **DRAW)
        assert torch.equal(pipe([""] * 4, controls=[PromptWeighting(texts)], **DRAW).images, result.images)
        for index in range(4):
            # Beside another, which makes it as many chunks.
            pair = pipe([texts[index], "a BREAK b"], controls=[control], **{**DRAW, "seed": 5 + index}).images[:1]
            close(pair, result.images[index : index + 1])

    def test_the_recorded_line_is_as_written(self, pipe: Pipeline) -> None:
        prompts = ["a (red:1.5) cat", "a [dog]"]
        result = pipe(prompts, "(night:1.2)", controls=[PromptWeighting()], num_images_per_prompt=2, **DRAW)
        lines = [text["parameters"].splitlines()[:2] for text in result.texts]
        assert lines == [[prompt, "Negative prompt: (night:1.2)"] for prompt in prompts for _ in range(2)]


class Told(Control):
    """A branch with a text of its own, or what ``cond`` is told when it is asked."""

    type: Literal["told"] = Field(default="told", kw_only=True)
    text: str | None = None
    seen: list[Any] = Field(default_factory=list)

    def declare(self, outline: Outline) -> Declaration:
        return Declaration(branches=(Branch("told"),))

    def prepare(self, run: Run) -> None:
        run.set_condition("told", run.conditions["cond"] if self.text is None else run.encode_text(self.text))

    def guide(self, step: Step, state: str) -> None:
        self.seen.append((step.condition("told").tokens, step.condition("cond").tokens))


class TestOthers:
    @pytest.mark.parametrize("first", [True, False])
    def test_texts_of_others_are_filled_up_and_share_the_pass(self, first: bool, pipe: Pipeline) -> None:
        other, control = Told(text="a dog"), PromptWeighting()
        result = pipe("a BREAK b", controls=[control, other] if first else [other, control], **DRAW)
        assert result.manifest["cost"]["unet_passes"] == 3
        with opened(pipe, prompt="") as run:
            expected = torch.cat([run.encode_text("a dog").tokens, run.encode_text("").tokens], dim=1)
        assert all(torch.allclose(tokens, expected, atol=1e-6) for tokens, _ in other.seen)

    @pytest.mark.parametrize("first", [True, False])
    def test_who_passes_on_what_cond_is_told_gets_the_weights(self, first: bool, pipe: Pipeline) -> None:
        other, control = Told(), PromptWeighting()
        pipe("a (red:1.5) cat", controls=[control, other] if first else [other, control], **DRAW)
        assert other.seen and all(torch.equal(*pair) for pair in other.seen)

    @pytest.mark.parametrize(
        ("dialect", "prompt", "word", "places"),
        [
            ("a1111", "a (red:1.3) cat", "cat", ((3,),)),
            ("a1111", "a (red cat:1.3), a [cat]", "cat", ((3,), (6,))),
            ("a1111", "a (red:1.3) BREAK zed cat", "cat", ((LENGTH + 4,),)),
            ("a1111", "a (red:1.3) BREAK zed cat", "zed", (tuple(range(LENGTH + 1, LENGTH + 4)),)),
            ("a1111", "a cat with a hat, a red dog with a blue hat on the beach", "dog", ((LENGTH + 3,),)),
            ("a1111", "a cat AND a red dog", "cat", ((2,),)),
            ("a1111", "a [(cat:1.3):cat:1]", "cat", ((2,),)),
            ("compel", "a red++ cat", "red cat", ((2, 3),)),
            ("compel", '("a cat", "a dog").and()', "dog", ((LENGTH + 2,),)),
        ],
    )
    def test_words_are_found_at_their_tokens(
        self, dialect: Any, prompt: str, word: str, places: Any, pipe: Pipeline
    ) -> None:
        with opened(pipe, PromptWeighting(dialect=dialect), prompt=prompt) as run:
            found: PromptTokens = prompt_tokens(run.backbone.tokenizers()[0], run.prompts[0])
            assert found.find(word) == places
            source = run.conditions["cond"]
            assert isinstance(source, Condition) or "[" in prompt
            if isinstance(source, Condition):
                assert found.length == source.tokens.shape[1]

    def test_attend_and_excite_by_word(self, pipe: Pipeline) -> None:
        settings: dict[str, Any] = {"iterations": 2, "thresholds": {}, "step_size": 5.0}
        for order in (1, -1):
            by_word, by_index = (
                pipe(
                    "a (red:1.5) cat",
                    controls=[AttendAndExcite(**settings, **which), PromptWeighting()][::order],
                    **DRAW,
                )
                for which in ({"words": ["cat"]}, {"indices": [3]})
            )
            assert torch.equal(by_word.images, by_index.images)
        # In the second chunk; without the control the prompt has none, and the word is not read.
        long = "a red cat with a hat and a blue cat with a hat, a frog"
        found = pipe(long, controls=[AttendAndExcite(words=["frog"], **settings), PromptWeighting()], **DRAW)
        assert not torch.equal(found.images, pipe(long, controls=[PromptWeighting()], **DRAW).images)
        with pytest.raises(InputError, match="behind the first 14 tokens"):
            pipe(long, controls=[AttendAndExcite(words=["frog"], **settings)], **DRAW)

    def test_prompt_to_prompt(self, pipe: Pipeline) -> None:
        edit = PromptToPrompt("a green dog", cross_replace={"default_": 1.0, "cat": 0.3})
        plain = pipe("a red cat", controls=[edit], **DRAW)
        for order in (1, -1):
            even = pipe("a (red:1) cat", controls=[edit, PromptWeighting()][::order], **DRAW)
            close(even.images, plain.images)
        weighted = pipe("a (red:1.5) cat", controls=[edit, PromptWeighting()], **DRAW)
        assert (weighted.images - plain.images).abs().max() > 1e-3
        # The source has no weights.
        close(weighted.states["source"], plain.states["source"])

    def test_conflicts_are_named(self, pipe: Pipeline) -> None:
        edit = PromptToPrompt("a green dog", mode="refine")
        for controls in ([edit, PromptWeighting()], [PromptWeighting(), edit]):
            with pytest.raises(ConflictError, match="PromptWeighting and PromptToPrompt cannot run together"):
                pipe("a red BREAK cat", controls=controls, **DRAW)
        excite = AttendAndExcite(words=["cat"], iterations=1, thresholds={})
        for prompt, dialect, why in [
            ("a [red:blue:1] cat", "a1111", "character 3 changes from step to step"),
            ("a ([red|blue]:1.2) cat", "a1111", "character 4 changes"),
            ('("a cat", "a dog").blend(1, 1)', "compel", "a blend of several prompts"),
        ]:
            with pytest.raises(InputError, match=f"PromptWeighting reads it: .*{why}"):
                pipe(prompt, controls=[excite, PromptWeighting(dialect=cast(Any, dialect))], **DRAW)
        with pytest.raises(InputError, match="'dog' is not in the prompt 'a cat'"):
            pipe("a cat AND a dog", controls=[AttendAndExcite(words=["dog"]), PromptWeighting()], **DRAW)
        with pytest.raises(ConflictError, match="PromptWeighting 1 and PromptWeighting 2 cannot run together"):
            pipe("a (cat)", controls=[PromptWeighting(), PromptWeighting()], **DRAW)


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "run", "message"),
        [
            ({}, {"prompt": "a (red cat"}, r"prompt: .*character 3 .*never closed"),
            ({}, {"prompt": "a", "negative_prompt": "b)"}, r"negative prompt: .*character 2 .*closes nothing"),
            ({}, {"prompt": "a", "negative_prompt": "b AND c"}, "AND combines prompts"),
            ({"text": "a (red)"}, {"prompt": "a blue"}, "'a blue' has other words than .* 'a red'"),
            ({"text": ["a", "b"]}, {"prompt": ""}, "2 texts for 1 pictures"),
            ({"text": []}, {"prompt": ""}, "0 texts"),
            ({"negative": "a (red)"}, {"prompt": "a", "negative_prompt": "b"}, "'b' has other words"),
            ({}, {"prompt_embeds": torch.zeros(1, LENGTH, 32)}, "prompt_embeds was given"),
            ({}, {"prompt": "a", "prompt_2": "b"}, "Leave prompt_2 out"),
            ({}, {"prompt": "a" * 20_001}, "20001 characters"),
            ({}, {"prompt": "((((a:900):900)))"}, "multiply to"),
        ],
    )
    def test_says_what_to_do(self, settings: dict[str, Any], run: dict[str, Any], message: str, pipe: Pipeline) -> None:
        with pytest.raises(InputError, match=message):
            pipe(controls=[PromptWeighting(**settings)], **run, **DRAW)

    def test_settings(self) -> None:
        for settings in ({"dialect": "invoke"}, {"scale": -1.0}, {"weighting": "mean"}, {"text": 3}):
            with pytest.raises(InputError, match=next(iter(settings))):
                PromptWeighting(**cast(Any, settings))


def test_the_second_text_encoder_gets_the_second_prompt() -> None:
    """The engine's encoding, which goes through token ids since there are controls that give them."""
    plain = tiny_sdxl()
    backbone = Pipeline.from_diffusers(plain).backbone
    with torch.no_grad():
        both = backbone.encode_text(["a cat"], second=["a dog"]).tokens
        cat, dog = (backbone.encode_text([text]).tokens for text in ("a cat", "a dog"))
    assert torch.equal(both, torch.cat([cat[..., :32], dog[..., 32:]], dim=-1))
    first = Pipeline.from_diffusers(tiny_sd1()).backbone
    with torch.no_grad():
        assert torch.equal(first.encode_text(["a cat"], second=["a dog"]).tokens, first.encode_text(["a cat"]).tokens)
