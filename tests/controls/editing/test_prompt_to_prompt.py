"""Prompt-to-Prompt against a transcription of the published edit that materialises probabilities (arXiv 2208.01626)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from controlroom.backbones.words import prompt_tokens
from controlroom.controls.editing.prompt_to_prompt import PromptToPrompt
from controlroom.controls.word_alignment import align, replacement
from controlroom.core.errors import ConflictError, ControlRoomError, InputError
from controlroom.core.spec import RunSpec
from controlroom.sampling.pipeline import Pipeline
from controlroom.sampling.solver import SCHEDULERS
from tests.tiny import BACKBONES, LENGTH, tiny_sd1, tiny_tokenizer

DRAW: dict[str, Any] = {"num_inference_steps": 5, "output_type": "latent", "seed": 5}
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(tiny_sd1())


# The published edit, written plainly: the batch is [source uncond, target uncond, source cond, target cond].


class Edit:
    """Edits probabilities of the conditional half, as the published controller does."""

    def __init__(self, steps: int, cross: torch.Tensor, self_steps: range, replace: Any, blend: Any = None) -> None:
        self.step, self.steps = 0, steps
        self.cross, self.self_steps, self.replace, self.blend = cross, self_steps, replace, blend
        self.maps: list[torch.Tensor] = []
        self.shares: list[float] = []

    def __call__(self, p: torch.Tensor, cross: bool) -> torch.Tensor:
        """p [4, heads, queries, keys]."""
        p = p.clone()
        if cross:
            alpha = self.cross[self.step]
            p[3] = self.replace(p[2], p[3]) * alpha + (1 - alpha) * p[3]
            if p.shape[2] == 8 * 8:
                self.maps.append(p[2:])
        elif self.step in self.self_steps and p.shape[2] <= 16 * 16:
            p[3] = p[2]
        return p

    def after(self, x: torch.Tensor) -> torch.Tensor:
        self.step += 1
        if self.blend is None:
            return x
        words, threshold = self.blend
        maps = torch.cat([m.reshape(2, -1, 8, 8, LENGTH) for m in self.maps], dim=1)
        maps = (maps * words[:, None, None, None, :]).sum(-1).mean(1, keepdim=True)
        mask = F.interpolate(F.max_pool2d(maps, (3, 3), (1, 1), padding=(1, 1)), size=x.shape[2:])
        mask = mask / mask.max(2, keepdims=True)[0].max(3, keepdims=True)[0]
        mask = mask.gt(threshold)
        mask = (mask[:1] + mask[1:]).float()
        self.shares.append(mask.mean().item())
        return x[:1] + mask * (x - x[:1])


class Processor:
    def __init__(self, edit: Edit) -> None:
        self.edit = edit

    def __call__(self, attn: Any, hidden: Any, encoder_hidden_states: Any = None, attention_mask: Any = None) -> Any:
        context = hidden if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden), attn.to_k(context), attn.to_v(context)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        p = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        p = self.edit(p, encoder_hidden_states is not None)
        return attn.to_out[0]((p @ v).transpose(1, 2).flatten(2))


@torch.no_grad()
def published(source: str, prompt: str, edit: Edit, steps: int = 5, seed: int = 5) -> torch.Tensor:
    """Latents of the source and of the edited picture."""
    pipe = tiny_sd1()
    pipe.unet.set_attn_processor(Processor(edit))
    conds, unconds = pipe.encode_prompt([source, prompt], "cpu", 1, True)
    text = torch.cat([unconds, conds])
    pipe.scheduler.set_timesteps(steps)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)).expand(2, -1, -1, -1)
    for t in pipe.scheduler.timesteps:
        eps = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=text).sample
        uncond, cond = eps.chunk(2)
        x = pipe.scheduler.step(uncond + 7.5 * (cond - uncond), t, x).prev_sample
        x = edit.after(x)
    return x


def schedule(share: float, steps: int = 5) -> torch.Tensor:
    alpha = torch.zeros(steps + 1, LENGTH)
    alpha[: int(share * (steps + 1))] = 1
    return alpha


def at(*places: int) -> torch.Tensor:
    found = torch.zeros(LENGTH)
    found[list(places)] = 1
    return found


def times(factors: dict[int, float]) -> torch.Tensor:
    found = torch.ones(LENGTH)
    for place, factor in factors.items():
        found[place] = factor
    return found


def swap(matrix: torch.Tensor) -> Any:
    return lambda base, own: torch.einsum("hpw,wn->hpn", base, matrix)


def gather(mapper: list[int], kept: torch.Tensor) -> Any:
    return lambda base, own: base[:, :, mapper] * kept + own * (1 - kept)


def spread(old: range, new: range) -> torch.Tensor:
    """The published mapper of one swapped word, with every word behind it at its own counterpart."""
    matrix = torch.zeros(LENGTH, LENGTH)
    for i in range(old.start):
        matrix[i, i] = 1
    for i in old:
        for j in new:
            matrix[i, j] = 1 / len(new)
    for step in range(LENGTH - max(old.stop, new.stop)):
        matrix[old.stop + step, new.stop + step] = 1
    return matrix


# "a zebra" -> "a cat": five letters and one token. "a cat on the beach" -> "a red cat on the beach at night".
CASES: dict[str, tuple[str, str, dict[str, Any], Any]] = {
    "replace": (
        "a red cat on the beach",
        "a red dog on the beach",
        {},
        lambda: Edit(5, schedule(0.4), range(2), swap(torch.eye(LENGTH))),
    ),
    "replace all steps": (
        "a red cat on the beach",
        "a blue dog on the beach",
        {"cross_replace": 1.0, "self_replace": 1.0},
        lambda: Edit(5, schedule(1.0), range(5), swap(torch.eye(LENGTH))),
    ),
    "replace a word of several tokens": (
        "a zebra on the beach",
        "a cat on the beach",
        {"cross_replace": 0.8, "self_replace": 0.0},
        lambda: Edit(5, schedule(0.8), range(0), swap(spread(range(2, 7), range(2, 3)))),
    ),
    "replace by a word of several tokens": (
        "a cat on the beach",
        "a zebra on the beach",
        {"cross_replace": 0.8, "self_replace": (0.2, 0.6)},
        lambda: Edit(5, schedule(0.8), range(1, 3), swap(spread(range(2, 3), range(2, 7)))),
    ),
    "refine": (
        "a cat on the beach",
        "a red cat on the beach with a hat",
        {"cross_replace": 0.8},
        lambda: Edit(
            5,
            schedule(0.8),
            range(2),
            gather([0, 1, -1, 2, 3, 4, 5, -1, -1, -1, 6, 11, 12, 13, 14, 15], 1 - at(2, 7, 8, 9)),
        ),
    ),
    "reweight": (
        "a red cat on the beach",
        "a red cat on the beach",
        {"cross_replace": 0.8, "reweight": {"red": 4.0, "beach": -1.0}},
        lambda: Edit(
            5,
            schedule(0.8),
            range(2),
            lambda base, own: base * times({2: 4.0, 6: -1.0}),
        ),
    ),
    "refine and reweight": (
        "a cat",
        "a red cat",
        {"cross_replace": 1.0, "self_replace": 0.0, "reweight": {"red": 3.0}},
        lambda: Edit(
            5,
            schedule(1.0),
            range(0),
            lambda base, own: gather([0, 1, -1, 2, 3, *range(5, 16)], 1 - at(2))(base, own) * times({2: 3.0}),
        ),
    ),
    "words at their own steps": (
        "a red cat on the beach",
        "a red dog on the beach",
        {"cross_replace": {"default_": 0.8, "dog": (0.2, 0.4)}, "self_replace": 0.0},
        lambda: Edit(5, per_word(), range(0), swap(torch.eye(LENGTH))),
    ),
    "local blend": (
        "a red cat on the beach",
        "a red dog on the beach",
        {"local_blend": ["cat", "dog"], "blend_threshold": 0.85},
        lambda: Edit(5, schedule(0.4), range(2), swap(torch.eye(LENGTH)), (torch.stack([at(3), at(3)]), 0.85)),
    ),
    "local blend, all together": (
        "a cat on the beach",
        "a zebra on the beach",
        {
            "local_blend": (["cat"], ["zebra"]),
            "blend_threshold": 0.85,
            "cross_replace": 0.6,
            "reweight": {"zebra": 2.0},
        },
        lambda: Edit(
            5,
            schedule(0.6),
            range(2),
            lambda base, own: (
                swap(spread(range(2, 3), range(2, 7)))(base, own) * times(dict.fromkeys(range(2, 7), 2.0))
            ),
            (torch.stack([at(2), at(2, 3, 4, 5, 6)]), 0.85),
        ),
    ),
}


def per_word() -> torch.Tensor:
    alpha = schedule(0.8)
    alpha[:, 3] = 0
    alpha[int(0.2 * 6) : int(0.4 * 6), 3] = 1
    return alpha


@pytest.mark.parametrize("name", CASES)
def test_equals_the_published_edit_of_probabilities(pipe: Pipeline, name: str) -> None:
    source, prompt, settings, edit = CASES[name]
    reference = edit()
    expected = published(source, prompt, reference)
    # A mask that is everywhere or nowhere would show nothing.
    assert all(0.05 < share < 0.95 for share in reference.shares), reference.shares
    result = pipe(prompt, controls=[PromptToPrompt(source, **settings)], **DRAW)
    assert (result.images - expected[1:]).abs().max() <= TOLERANCE * expected.std()
    assert (result.states["source"] - expected[:1]).abs().max() <= TOLERANCE * expected.std()
    plain = pipe(prompt, **DRAW).images
    assert (result.images - plain).abs().max() > 0.01 * plain.std()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_source_picture_is_the_source_prompts_own(scheduler: str) -> None:
    # Four rows in a batch are not rounded as two; in float64 no more than that is left.
    pipe = Pipeline.from_diffusers(tiny_sd1()).to(torch.float64)
    settings = {**DRAW, "scheduler": scheduler, "num_inference_steps": 4}
    alone = pipe("a dog", **settings).images
    result = pipe("a cat", controls=[PromptToPrompt("a dog", local_blend=["dog", "cat"])], **settings)
    assert (result.states["source"] - alone).abs().max() < 1e-10
    assert (result.images - alone).abs().max() > 1e-3


def test_no_edit_reaches_the_source_picture(pipe: Pipeline) -> None:
    edits: list[tuple[str, dict[str, Any]]] = [
        ("a cat", {}),
        ("a cat", {"cross_replace": 1.0, "self_replace": 0.2, "reweight": {"cat": 9.0}}),
        ("a red frog", {"cross_replace": 0.0, "self_replace": 1.0, "local_blend": (["dog"], ["frog"])}),
    ]
    drawn = [pipe(p, controls=[PromptToPrompt("a dog", **more)], **DRAW).states["source"] for p, more in edits]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_picture_of_a_batch_is_edited_on_its_own(backbone: str) -> None:
    pipe = Pipeline.from_diffusers(BACKBONES[backbone]())
    prompts, sources = ["a cat", "a red frog on the beach"], ["a dog", "a frog on the beach"]
    settings = {**DRAW, "negative_prompt": "blue"}
    more: dict[str, Any] = {"cross_replace": 0.6, "self_replace": 0.6, "local_blend": ["dog", "cat", "frog"]}
    together = pipe(prompts, controls=[PromptToPrompt(sources, **more)], **settings)
    for i, (prompt, source) in enumerate(zip(prompts, sources, strict=True)):
        words = [word for word in more["local_blend"] if word in f"{prompt} {source}"]
        control = PromptToPrompt(source, **{**more, "local_blend": words})
        alone = pipe(prompt, controls=[control], **{**settings, "seed": 5 + i})
        assert (together.images[i] - alone.images[0]).abs().max() < 1e-3 * alone.images.std()
        source_alone = pipe(source, **{**settings, "seed": 5 + i}).images
        assert (together.states["source"][i] - source_alone[0]).abs().max() < 1e-4 * source_alone.std()


def test_one_source_for_several_pictures(pipe: Pipeline) -> None:
    result = pipe("a cat", controls=[PromptToPrompt("a dog")], num_images_per_prompt=2, **DRAW)
    assert result.states["source"].shape == result.images.shape
    assert result.manifest["notes"] == ["PromptToPrompt: replace since the source has 2 words and the prompt 2"]


@pytest.mark.parametrize("more", [{}, {"reweight": {"cat": 5.0}}, {"cross_replace": {"default_": 0.0, "cat": 0.1}}])
def test_neutral_is_absence_bit_for_bit_and_free(pipe: Pipeline, more: dict[str, Any]) -> None:
    control = PromptToPrompt("a dog", **{"cross_replace": 0.0, "self_replace": 0.0, **more})
    plain, result = pipe("a cat", **DRAW), pipe("a cat", controls=[control], **DRAW)
    assert torch.equal(plain.images, result.images)
    assert plain.manifest["cost"] == result.manifest["cost"]
    assert list(result.manifest["dropped"]) == ["PromptToPrompt"]


def test_the_same_prompt_changes_nothing(pipe: Pipeline) -> None:
    plain = pipe("a cat", **DRAW).images
    result = pipe("a cat", controls=[PromptToPrompt("a cat", 1.0, 1.0)], **DRAW).images
    assert (result - plain).abs().max() < 1e-4 * plain.std()


def test_cost_is_as_planned_and_ends_with_the_edit_if_asked(pipe: Pipeline) -> None:
    for keep, rows in ((True, 5 * 4), (False, 2 * 4 + 3 * 2)):
        spec = RunSpec(prompt="a cat", controls=[PromptToPrompt("a dog", keep_source=keep)], **DRAW)
        spec = spec.model_copy(update={"num_inference_steps": 5})
        cost = pipe.run(spec).manifest["cost"]
        assert cost["unet_rows"] == rows == sum(pipe.explain(spec).rows)
        assert cost["unet_passes"] == 5
    kept, left = (
        pipe("a cat", controls=[PromptToPrompt("a dog", keep_source=k)], **DRAW).images for k in (True, False)
    )
    assert (kept - left).abs().max() < 1e-4 * kept.std()


def test_without_guidance(pipe: Pipeline) -> None:
    result = pipe("a cat", controls=[PromptToPrompt("a dog")], guidance_scale=1.0, **DRAW)
    assert result.manifest["cost"]["unet_rows"] == 5 * 2
    alone = pipe("a dog", guidance_scale=1.0, **DRAW).images
    assert (result.states["source"] - alone).abs().max() < 1e-4 * alone.std()


def test_source_is_told_what_the_picture_is_told() -> None:
    pipe = Pipeline.from_diffusers(BACKBONES["sdxl"]())
    settings = {**DRAW, "clip_skip": 1, "original_size": (64, 64), "crops_coords_top_left": (3, 5)}
    result = pipe("a cat", controls=[PromptToPrompt("a dog")], **settings)
    alone = pipe("a dog", **settings).images
    assert (result.states["source"] - alone).abs().max() < 1e-4 * alone.std()


def test_source_can_be_looked_at(pipe: Pipeline) -> None:
    result = pipe("a cat", controls=[PromptToPrompt("a dog")], **DRAW)
    pictures = pipe.decode(result.states["source"])
    expected = pipe("a dog", **{**DRAW, "output_type": "pil"}).images
    assert pictures[0].size == (32, 32)
    assert np.abs(np.asarray(pictures[0], int) - np.asarray(expected[0], int)).max() <= 1
    with pytest.raises(InputError, match="latents"):
        pipe.decode(torch.zeros(3))


def test_explain_says_which_mode_was_chosen(pipe: Pipeline) -> None:
    controls = [PromptToPrompt("a dog on the beach")]
    text = str(pipe.explain(RunSpec(prompt="a cat", controls=controls, num_inference_steps=5)))
    assert "refine since the source has 5 words and the prompt 2" in text
    assert "source/cond" in text


def test_settings_survive_a_file(pipe: Pipeline) -> None:
    control = PromptToPrompt(
        "a dog", {"cat": (0.0, 0.5)}, 0.2, {"cat": 2.0}, (["dog"], ["cat"]), self_tokens=64, mode="replace"
    )
    assert PromptToPrompt.model_validate_json(control.model_dump_json()) == control


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("a cat", {"source": "a dog", "reweight": {"zebra": 2.0}}, "'zebra' is not in the prompt 'a cat'"),
        ("a cat", {"source": "a dog", "local_blend": ["kat"]}, "Did you mean 'cat'"),
        ("a cat", {"source": "a dog", "local_blend": ["cat"]}, "no word of local_blend is in 'a dog'"),
        ("a cat", {"source": "a dog", "cross_replace": {"frog": 0.5}}, "'frog'"),
        ("a cat", {"source": "a red dog", "mode": "replace"}, "3 words"),
        ("", {"source": "a dog"}, "as text"),
        ("a cat", {"source": ["a dog", "a frog"]}, "2 source prompts for 1"),
        ("a cat", {"source": "a dog", "blend_resolution": 5, "local_blend": ["dog", "cat"]}, "resolution 5"),
        ("a cat", {"source": "a dog", "self_tokens": 3}, "fits"),
        ("a cat " * 10 + "frog", {"source": "a dog", "reweight": {"frog": 2.0}}, "behind the first 14"),
    ],
)
def test_what_does_not_fit_is_an_input_error(
    pipe: Pipeline, prompt: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        pipe(prompt, controls=[PromptToPrompt(**settings)], **DRAW)


@pytest.mark.parametrize(
    "settings",
    [
        {"cross_replace": 1.5},
        {"self_replace": (0.5, 0.2)},
        {"reweight": {"cat": float("nan")}},
        {"local_blend": []},
        {"local_blend": ["cat", ""]},
        {"source": ""},
        {"mode": "magic"},
        {"blend_threshold": 1.0},
    ],
)
def test_ill_settings_are_input_errors(settings: dict[str, Any]) -> None:
    with pytest.raises(ControlRoomError):
        PromptToPrompt(**{"source": "a dog", **settings})


def test_two_of_them_are_a_conflict(pipe: Pipeline) -> None:
    with pytest.raises(ConflictError, match="PromptToPrompt 2"):
        pipe("a cat", controls=[PromptToPrompt("a dog"), PromptToPrompt("a frog")], **DRAW)


def test_alignment_of_tokens() -> None:
    assert align([1, 2, 3], [1, 2, 3]) == [0, 1, 2]
    assert align([1, 2, 3], [8, 1, 2, 9, 3]) == [None, 0, 1, None, 2]
    assert align([1, 2, 3, 4], [1, 4]) == [0, 3]
    # Of two that are crossed only one can correspond; the published preference is the target's first.
    assert align([1, 2], [2, 1]) == [1, None]
    assert align([], [1, 2]) == [None, None]


def test_words_behind_a_swap_keep_their_counterpart() -> None:
    tokenizer = tiny_tokenizer()
    old, new = prompt_tokens(tokenizer, "a cat on the beach"), prompt_tokens(tokenizer, "a zebra on the beach")
    matrix = replacement(old, new).matrix
    for word in ("a", "on", "the", "beach"):
        ((i,),), ((j,),) = old.find(word), new.find(word)
        assert matrix[:, j].argmax() == i and matrix[i, j] == 1
    torch.testing.assert_close(matrix[2, 2:7], torch.full((5,), 0.2))
    # Every source map is handed on once, as long as both prompts last.
    assert matrix.sum(1).max() == 1
