"""MasaCtrl against a transcription of the published equations that materialises probabilities (arXiv 2304.08465)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from controlroom.controls.editing.masactrl import MasaCtrl
from controlroom.core.attention import AttentionCall
from controlroom.core.branch import Branch
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import ConflictError, ControlRoomError, InputError
from controlroom.core.run import Run
from controlroom.core.spec import RunSpec
from controlroom.core.step import Step
from controlroom.sampling.pipeline import Pipeline
from controlroom.sampling.solver import SCHEDULERS
from tests.tiny import BACKBONES, tiny_sd1

DRAW: dict[str, Any] = {"num_inference_steps": 5, "output_type": "latent", "seed": 5}
SOURCE, PROMPT = "a red cat on the beach", "a red cat with a hat"
CAT = 3
"""Token of the cat in both prompts."""
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(tiny_sd1())


# The published method, written plainly: rows are [source uncond, target uncond, source cond, target cond], or the last
# two of them without guidance; layers have the number of their execution.


class Mutual:
    """Settings and what one pass has shown so far."""

    def __init__(self, step: int, layer: int, masks: Any = None, token: int | None = None, cut: float = 0.1) -> None:
        self.step, self.layer, self.masks, self.token, self.cut = step, layer, masks, token, cut
        self.now = 0
        self.maps: list[torch.Tensor] = []
        self.shares: list[float] = []

    def foreground(self, hw: tuple[int, int]) -> list[torch.Tensor] | None:
        """Masks of source and target, [h·w] each."""
        if self.masks is not None:
            return [F.interpolate(mask[None, None], hw).flatten() for mask in self.masks]
        if self.token is None or not self.maps:
            return None
        found = []
        for row in (-2, -1):
            each = torch.stack([attention[row].mean(0)[:, self.token] for attention in self.maps]).mean(0).reshape(8, 8)
            each = (each - each.min()) / (each.max() - each.min())
            found.append((F.interpolate(each[None, None], hw).flatten() >= self.cut).float())
        self.shares += [float(mask.mean()) for mask in found]
        return found


class Processor:
    def __init__(self, method: Mutual, number: int) -> None:
        self.method, self.number = method, number

    def __call__(self, attn: Any, hidden: Any, encoder_hidden_states: Any = None, attention_mask: Any = None) -> Any:
        context = hidden if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden), attn.to_k(context), attn.to_v(context)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        if attn.upcast_attention:
            q, k = q.float(), k.float()
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        p = logits.softmax(-1)
        method, out = self.method, p @ v
        if encoder_hidden_states is not None:
            if q.shape[2] == 8 * 8:
                method.maps.append(p)
        elif method.now >= method.step and self.number >= method.layer:
            side = int(q.shape[2] ** 0.5)
            masks = method.foreground((side, side))
            for target in range(1, len(q), 2):
                source = target - 1
                one = q[target] @ k[source].transpose(-1, -2) * q.shape[-1] ** -0.5
                if masks is None:
                    out[target] = one.softmax(-1) @ v[source]
                    continue
                keys, queries = masks
                front = one.masked_fill(keys == 0, torch.finfo(one.dtype).min).softmax(-1) @ v[source]
                back = one.masked_fill(keys == 1, torch.finfo(one.dtype).min).softmax(-1) @ v[source]
                out[target] = front * queries[:, None] + back * (1 - queries[:, None])
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


@torch.no_grad()
def published(method: Mutual, kind: str = "sd1", guidance: float = 7.5, **noise: Any) -> torch.Tensor:
    """Latents of the source and of the edited picture."""
    pipe = BACKBONES[kind]()
    names = list(pipe.unet.attn_processors)
    order = sorted(names, key=lambda name: ("down", "mid", "up").index(name.split("_")[0]))
    numbers = {name: [n for n in order if "attn1" in n].index(name) if "attn1" in name else -1 for name in names}
    pipe.unet.set_attn_processor({name: Processor(method, number) for name, number in numbers.items()})
    more: dict[str, Any] = {}
    if kind == "sdxl":
        conds, unconds, pooled, unpooled = pipe.encode_prompt([SOURCE, PROMPT], device="cpu")
        unconds, unpooled = torch.zeros_like(conds), torch.zeros_like(pooled)
        ids = torch.tensor([[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]]).repeat(4, 1)
        more["added_cond_kwargs"] = {"text_embeds": torch.cat([unpooled, pooled]), "time_ids": ids}
    else:
        conds, unconds = pipe.encode_prompt([SOURCE, PROMPT], "cpu", 1, True)
    text = torch.cat([unconds, conds]) if guidance > 1 else conds
    pipe.scheduler.set_timesteps(5)
    x = noise["latents"] if noise else torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    x = x.expand(2, -1, -1, -1)
    for number, t in enumerate(pipe.scheduler.timesteps):
        method.now, method.maps = number, []
        eps = pipe.unet(x.repeat(len(text) // 2, 1, 1, 1), t, encoder_hidden_states=text, **more).sample
        if guidance > 1:
            uncond, cond = eps.chunk(2)
            eps = uncond + guidance * (cond - uncond)
        x = pipe.scheduler.step(eps, t, x).prev_sample
    return x


def boxes() -> tuple[torch.Tensor, torch.Tensor]:
    """A source and a target mask in pixels."""
    source, target = torch.zeros(32, 32), torch.zeros(32, 32)
    source[4:20, 2:18] = 1
    target[8:28, 12:30] = 1
    return source, target


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"start_step": 2, "start_layer": 2}, {"step": 2, "layer": 2}),
    "every layer from the first step": ({"start_step": 0, "start_layer": 0}, {"step": 0, "layer": 0}),
    "published share of the layers": ({"start_step": 1}, {"step": 1, "layer": 4}),
    "given masks": (
        {"start_step": 1, "start_layer": 1, "source_mask": boxes()[0], "target_mask": boxes()[1]},
        {"step": 1, "layer": 1, "masks": boxes()},
    ),
    # The layer of 8x8 tokens that is read first stands in the middle: the first layer has no masks yet.
    "masks from words": (
        {"start_step": 1, "start_layer": 0, "words": "cat", "threshold": 0.4},
        {"step": 1, "layer": 0, "token": CAT, "cut": 0.4},
    ),
    "masks from a pair of words": (
        {"start_step": 0, "start_layer": 3, "words": (["red cat"], ["cat", "red"]), "threshold": 0.3, "resolution": 8},
        {"step": 0, "layer": 3, "token": slice(2, 4), "cut": 0.3},
    ),
}


def summed(method: Mutual) -> Mutual:
    """A phrase is the sum of its tokens."""
    if isinstance(method.token, slice):
        chosen = method.token

        class Summed(Mutual):
            def foreground(self, hw: tuple[int, int]) -> list[torch.Tensor] | None:
                kept = self.maps
                self.maps = [p[..., chosen].sum(-1, keepdim=True) for p in kept]
                self.token = 0
                try:
                    return super().foreground(hw)
                finally:
                    self.maps = kept

        method.__class__ = Summed
    return method


@pytest.mark.parametrize("name", CASES)
def test_equals_the_published_attention(pipe: Pipeline, name: str) -> None:
    settings, theirs = CASES[name]
    method = summed(Mutual(**theirs))
    expected = published(method)
    if "words" in settings:
        # A mask that is everywhere or nowhere would show nothing.
        assert method.shares and all(0.05 < share < 0.95 for share in method.shares), method.shares
    result = pipe(PROMPT, controls=[MasaCtrl(SOURCE, **settings)], **DRAW)
    assert (result.images - expected[1:]).abs().max() <= TOLERANCE * expected.std()
    assert (result.states["source"] - expected[:1]).abs().max() <= TOLERANCE * expected.std()
    assert (result.images - pipe(PROMPT, **DRAW).images).abs().max() > 0.01 * expected.std()


def test_masks_change_what_is_seen(pipe: Pipeline) -> None:
    masks = dict(zip(("source_mask", "target_mask"), boxes(), strict=True))
    plain, masked = (pipe(PROMPT, controls=[MasaCtrl(SOURCE, 1, 1, **m)], **DRAW).images for m in ({}, masks))
    assert (plain - masked).abs().max() > 0.01 * plain.std()


@pytest.mark.parametrize("words", [None, "cat"])
@pytest.mark.parametrize("kind", BACKBONES)
def test_equals_the_published_attention_on_every_backbone(kind: str, words: str | None) -> None:
    expected = published(Mutual(1, 2, token=None if words is None else CAT, cut=0.3), kind)
    control = MasaCtrl(SOURCE, start_step=1, start_layer=2, words=words, threshold=0.3)
    result = Pipeline.from_diffusers(BACKBONES[kind]())(PROMPT, controls=[control], guidance_scale=7.5, **DRAW)
    assert (result.images - expected[1:]).abs().max() <= TOLERANCE * expected.std()


def test_without_guidance_and_from_given_latents(pipe: Pipeline) -> None:
    """As with a photo: both pictures start from its inverted latents."""
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    expected = published(Mutual(1, 2), guidance=1.0, latents=latents)
    settings = {**DRAW, "guidance_scale": 1.0, "latents": latents}
    result = pipe(PROMPT, controls=[MasaCtrl(SOURCE, 1, 2)], **settings)
    assert (result.images - expected[1:]).abs().max() <= TOLERANCE * expected.std()
    assert result.manifest["cost"]["unet_rows"] == 5 * 2


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_source_picture_is_the_source_prompts_own(scheduler: str) -> None:
    pipe = Pipeline.from_diffusers(tiny_sd1()).to(torch.float64)
    settings = {**DRAW, "scheduler": scheduler, "num_inference_steps": 4}
    result = pipe(PROMPT, controls=[MasaCtrl(SOURCE, 0, 1, words="cat")], **settings)
    alone = pipe(SOURCE, **settings).images
    assert (result.states["source"] - alone).abs().max() < 1e-10
    assert (result.images - alone).abs().max() > 1e-3


def test_a_source_without_a_prompt(pipe: Pipeline) -> None:
    result = pipe("a cat", controls=[MasaCtrl("", 1, 1)], **DRAW)
    alone = pipe("", **DRAW).images
    assert (result.states["source"] - alone).abs().max() < 1e-4 * alone.std()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_picture_of_a_batch_is_edited_on_its_own(backbone: str) -> None:
    pipe = Pipeline.from_diffusers(BACKBONES[backbone]())
    prompts, sources = ["a cat", "a red frog on the beach"], ["a dog", "a frog"]
    masks = [boxes(), tuple(mask.flip(0) for mask in boxes())]
    settings = {**DRAW, "negative_prompt": "blue"}
    kinds: list[tuple[dict[str, Any], Any]] = [
        ({"words": ["dog", "cat", "frog"]}, lambda i: {"words": ([["dog"], ["frog"]][i], [["cat"], ["frog"]][i])}),
        (
            {"source_mask": [m[0] for m in masks], "target_mask": [m[1] for m in masks]},
            lambda i: {"source_mask": masks[i][0], "target_mask": masks[i][1]},
        ),
    ]
    for together_settings, alone_settings in kinds:
        control = MasaCtrl(sources, 1, 1, threshold=0.3, **together_settings)
        together = pipe(prompts, controls=[control], **settings)
        for i, (prompt, source) in enumerate(zip(prompts, sources, strict=True)):
            control = MasaCtrl(source, 1, 1, threshold=0.3, **alone_settings(i))
            alone = pipe(prompt, controls=[control], **{**settings, "seed": 5 + i})
            assert (together.images[i] - alone.images[0]).abs().max() < 1e-3 * alone.images.std()


def test_a_picture_of_any_shape(pipe: Pipeline) -> None:
    settings = {**DRAW, "height": 24, "width": 40}
    source, target = (torch.nn.functional.interpolate(box[None, None], (24, 40))[0, 0] for box in boxes())
    for more in ({"words": "cat"}, {"source_mask": source, "target_mask": target}):
        result = pipe(PROMPT, controls=[MasaCtrl(SOURCE, 1, 1, **more)], **settings)
        assert torch.isfinite(result.images).all()


def test_where_no_key_is_left_the_whole_source_is_seen(pipe: Pipeline) -> None:
    white, (_, target) = torch.ones(32, 32), boxes()
    # All of the source is foreground, so the target's foreground sees all of it, and so does its background.
    control = MasaCtrl(SOURCE, 1, 1, source_mask=white, target_mask=target)
    plain = pipe(PROMPT, controls=[MasaCtrl(SOURCE, 1, 1)], **DRAW).images
    assert (pipe(PROMPT, controls=[control], **DRAW).images - plain).abs().max() < 1e-4 * plain.std()


@pytest.mark.parametrize("start_step", [5, 50])
def test_neutral_is_absence_bit_for_bit_and_free(pipe: Pipeline, start_step: int) -> None:
    plain, result = pipe("a cat", **DRAW), pipe("a cat", controls=[MasaCtrl("a dog", start_step, 1)], **DRAW)
    assert torch.equal(plain.images, result.images)
    assert plain.manifest["cost"] == result.manifest["cost"]
    assert list(result.manifest["dropped"]) == ["MasaCtrl"]


def test_the_same_prompt_changes_nothing(pipe: Pipeline) -> None:
    plain = pipe("a cat", **DRAW).images
    result = pipe("a cat", controls=[MasaCtrl("a cat", 0, 0)], **DRAW).images
    assert (result - plain).abs().max() < 1e-4 * plain.std()


def test_cost_is_as_planned(pipe: Pipeline) -> None:
    spec = RunSpec(prompt=PROMPT, controls=[MasaCtrl(SOURCE, words="cat")], **DRAW)
    cost = pipe.run(spec).manifest["cost"]
    assert cost["unet_rows"] == 5 * 4 == sum(pipe.explain(spec).rows)
    assert cost["unet_passes"] == 5


@pytest.mark.parametrize(("layers", "start"), [(16, 10), (70, 44), (5, 3), (1, 1)])
def test_the_first_layer_is_at_the_published_share(layers: int, start: int) -> None:
    from controlroom.core.sites import Site

    sites = tuple(Site(f"layer.{i}", "self", "up", 0, i, (8, 8), 8) for i in range(layers))
    outline = Outline("sd1", 1, 50, (4, 16, 16), True, sites, (), ("a cat",))
    if start >= layers:
        with pytest.raises(InputError, match="start_layer"):
            MasaCtrl("a dog").declare(outline)
        return
    declaration = MasaCtrl("a dog").declare(outline)
    assert [site.index for site in declaration.attention] == list(range(start, layers))
    assert declaration.notes == (f"keys and values are the source's from self-attention layer {start} of {layers}",)
    assert MasaCtrl("a dog").window(50) == set(range(4, 50))
    assert not MasaCtrl("a dog", start_layer=0).declare(outline).notes


class Variant(Control):
    """A further branch that denoises the picture with words of its own, as semantic guidance has."""

    type: str = "variant"

    def declare(self, outline: Outline) -> Declaration:
        return Declaration(branches=(Branch("variant"), Branch("aside", purpose="reference")))

    def prepare(self, run: Run) -> None:
        for name in ("variant", "aside"):
            run.set_condition(name, run.conditions["cond"])

    def guide(self, step: Step, state: str) -> torch.Tensor | None:
        if state == "image":
            same = (step.eps["variant"] - step.eps["cond"]).abs().max()
            apart = (step.eps["aside"] - step.eps["cond"]).abs().max()
            step.run.rng("seen")  # the run is alive
            assert same < 1e-5
            assert (apart > 1e-4) == (step.i >= 1)
        return None


def test_variants_of_the_picture_are_answered_as_it_is(pipe: Pipeline) -> None:
    pipe(PROMPT, controls=[Variant(), MasaCtrl(SOURCE, 1, 1, words="cat")], **DRAW)


class Unguided(Control):
    """Tells ``uncond`` something else at every step, as null-text inversion does."""

    type: str = "unguided"

    def prepare(self, run: Run) -> None:
        other = run.encode_text("the night", negative=True)
        run.set_condition("uncond", lambda step: other)


def test_the_source_is_told_what_uncond_is_told_whoever_comes_first(pipe: Pipeline) -> None:
    expected = pipe(SOURCE, negative_prompt="the night", **DRAW).images
    for controls in ([Unguided(), MasaCtrl(SOURCE)], [MasaCtrl(SOURCE), Unguided()]):
        result = pipe(PROMPT, controls=controls, **DRAW)
        assert (result.states["source"] - expected).abs().max() < 1e-4 * expected.std()


class Rerouted(Control):
    """Takes keys from elsewhere."""

    type: str = "rerouted"

    def declare(self, outline: Outline) -> Declaration:
        from controlroom.core.claims import Claim

        sites = outline.sites("self")
        names = frozenset(site.name for site in sites)
        claim = Claim("k", "route", names, frozenset({"cond"}), source="uncond")
        return Declaration(attention=sites, claims=(claim,))

    def attention(self, call: AttentionCall) -> None:
        raise AssertionError("found before the run")


def test_another_route_is_a_conflict_that_names_both(pipe: Pipeline) -> None:
    from controlroom.controls.editing.prompt_to_prompt import PromptToPrompt

    for other in (Rerouted(), PromptToPrompt("a dog")):
        with pytest.raises(ConflictError, match=f"MasaCtrl.*{type(other).__name__}|{type(other).__name__}.*MasaCtrl"):
            pipe("a cat", controls=[MasaCtrl("a dog", 0, 0), other], **DRAW)


def test_settings_survive_a_file() -> None:
    control = MasaCtrl(["a cat", "a dog"], 3, 7, words=(["cat"], ["a dog"]), threshold=0.2, resolution=8)
    assert MasaCtrl.model_validate_json(control.model_dump_json()) == control
    default = MasaCtrl("a cat")
    assert (default.start_step, default.start_layer, default.threshold) == (4, None, 0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start_layer": 6}, "start_layer=6, but this network has 6 self-attention layers, 0 to 5"),
        ({"source": ["a", "b"]}, "2 source prompts for 1"),
        ({"words": "zebra"}, "'zebra' is not in the prompt"),
        ({"words": ["cat", "zebra"]}, "'zebra' is not in the prompt"),
        ({"words": "zat"}, "Did you mean 'hat'"),
        ({"words": "beach"}, "none of 'beach' is in 'a red cat with a hat'"),
        ({"words": (["hat"], ["hat"])}, "'hat' is not in the prompt 'a red cat on the beach'"),
        ({"words": "cat", "resolution": 5}, "resolution 5; there are 16, 8"),
        ({"source_mask": torch.zeros(32, 32), "target_mask": torch.ones(32, 32)}, "source_mask is black"),
        ({"source_mask": torch.ones(32, 32), "target_mask": "no/such/file.png"}, "no/such/file.png"),
    ],
)
def test_what_does_not_fit_is_an_input_error(pipe: Pipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipe(PROMPT, controls=[MasaCtrl(**{"source": SOURCE, "start_step": 0, **settings})], **DRAW)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"source": 7},
        {"source": []},
        {"source": "a", "start_step": -1},
        {"source": "a", "start_layer": -1},
        {"source": "a", "threshold": 0.0},
        {"source": "a", "threshold": 1.5},
        {"source": "a", "words": []},
        {"source": "a", "words": [""]},
        {"source": "a", "words": ([], ["a"])},
        {"source": "a", "source_mask": "m.png"},
        {"source": "a", "target_mask": "m.png"},
        {"source": "a", "source_mask": "m.png", "target_mask": "m.png", "words": "a"},
    ],
)
def test_ill_settings_are_input_errors(settings: dict[str, Any]) -> None:
    with pytest.raises(ControlRoomError):
        MasaCtrl(**settings)
