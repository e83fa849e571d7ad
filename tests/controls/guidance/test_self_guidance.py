"""Self-guidance against a loop that is written out, and what each edit does to its energy (arXiv 2306.00986)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from controlroom.controls.editing.masactrl import MasaCtrl
from controlroom.controls.editing.prompt_to_prompt import PromptToPrompt
from controlroom.controls.guidance.attend_and_excite import AttendAndExcite
from controlroom.controls.guidance.self_guidance import SelfGuidance
from controlroom.controls.object_edits import (
    CopyAppearance,
    CopyLayout,
    Goal,
    KeepAppearance,
    KeepShape,
    Move,
    Resize,
)
from controlroom.controls.object_energy import energy_of, grouped
from controlroom.core.errors import ConflictError, ControlRoomError, InputError
from controlroom.core.spec import RunSpec
from controlroom.sampling.pipeline import Pipeline
from controlroom.sampling.solver import alpha_bars, make_scheduler
from tests.sampling.test_engine_rest import Seen
from tests.tiny import BACKBONES, LENGTH

PROMPT, SOURCE = "a cat and a frog", "a dog and a frog"
A, CAT, AND, FROG = (1, 4), (2,), (3,), (5,)
"""Tokens of the words; the dog of the source stands where the cat is."""
DRAW: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "seed": 5, "scheduler": "ddim"}
GUIDED = {0, 2}
"""Of four steps: the first 3/16, then every second, and the last 1/32 never."""
TOLERANCE = 1e-4


def smooth(kind: str = "sd1") -> Any:
    """A miniature whose attention is not as steep as in other tests, so that a gradient says where to go."""
    pipe = BACKBONES[kind]()
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if ".to_q." in name or ".to_k." in name:
                parameter.mul_(0.5)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(smooth())


# The method, written plainly: quantities of one map [h, w], one pass after another, no batch.


def normal(m: torch.Tensor) -> torch.Tensor:
    return (m - m.min()) / (m.max() - m.min())


def outline(m: torch.Tensor) -> torch.Tensor:
    return normal(torch.sigmoid(10 * (normal(m) - 0.5)))


def centre(m: torch.Tensor) -> torch.Tensor:
    h, w = m.shape
    x = sum(m[:, j].sum() * (j + 0.5) / w for j in range(w)) / m.sum()
    y = sum(m[i].sum() * (i + 0.5) / h for i in range(h)) / m.sum()
    return torch.stack([x, y])


def look(maps: list[torch.Tensor], features: torch.Tensor) -> torch.Tensor:
    mean = outline(sum(maps) / len(maps)).detach()
    wide = F.interpolate(mean[None, None], size=features.shape[1:], mode="bilinear")[0, 0]
    return torch.stack([(wide * channel).sum() / wide.sum() for channel in features])


class Seen1:
    """What one pass shows: maps of the layers of 8x8 tokens, and the feature of the last resnet but one."""

    def __init__(self, maps: list[torch.Tensor], features: torch.Tensor) -> None:
        self.maps, self.features = maps, features

    def of(self, tokens: tuple[int, ...]) -> list[torch.Tensor]:
        return [sum(m[..., k] for k in tokens) / len(tokens) for m in self.maps]


def mean(values: list[torch.Tensor]) -> torch.Tensor:
    return sum(values) / len(values)  # type: ignore[return-value]


def outlines_apart(a: list[torch.Tensor], b: list[torch.Tensor], carry: Any = lambda m: m) -> torch.Tensor:
    return mean([(carry(outline(n)) - outline(m)).abs().mean() for m, n in zip(a, b, strict=True)])


def looks_apart(a: Seen1, b: Seen1, mine: tuple[int, ...], theirs: tuple[int, ...]) -> torch.Tensor:
    return (look(b.of(theirs), b.features) - look(a.of(mine), a.features)).abs().mean()


def moved_and_resized(a: Seen1, b: Seen1) -> torch.Tensor:
    shift = torch.tensor([0.2, -0.1])
    move = mean([(centre(n) + shift - centre(m)).abs().sum() for m, n in zip(a.of(CAT), b.of(CAT), strict=True)])
    size = mean([(0.6 - outline(m).mean()).abs() for m in a.of(FROG)])
    held = mean([outlines_apart(a.of(k), b.of(k)) for k in (A, AND)])
    looks = mean([looks_apart(a, b, k, k) for k in (CAT, FROG, A, AND)])
    return move + 2 * size + held + 0.1 * looks


def copied(a: Seen1, b: Seen1) -> torch.Tensor:
    layout = mean([outlines_apart(a.of(k), b.of(k)) for k in (A, AND, FROG)])
    return layout + 0.3 * looks_apart(a, b, CAT, CAT)


def carried(a: Seen1, b: Seen1) -> torch.Tensor:
    def carry(m: torch.Tensor) -> torch.Tensor:
        """Each pixel asks where it comes from, and mixes its four neighbours there."""
        h, w = m.shape
        cx, cy = centre(m).tolist()
        out = torch.zeros_like(m)
        for i in range(h):
            for j in range(w):
                x = cx + ((j + 0.5) / w - cx - 0.25) / 0.8
                y = cy + ((i + 0.5) / h - cy - 0.0) / 0.8
                u, v = x * w - 0.5, y * h - 0.5
                for ii in (int(v // 1), int(v // 1) + 1):
                    for jj in (int(u // 1), int(u // 1) + 1):
                        if 0 <= ii < h and 0 <= jj < w:
                            out[i, j] += (1 - abs(v - ii)) * (1 - abs(u - jj)) * m[ii, jj]
        return out

    return outlines_apart(a.of(CAT), b.of(CAT), lambda m: carry(m.detach()))


def placed(a: Seen1, b: Seen1) -> torch.Tensor:
    return mean([(torch.tensor([0.8, 0.3]) - centre(m)).abs().sum() for m in a.of(FROG)])


EDITS: dict[str, tuple[dict[str, Any], str, Callable[[Seen1, Seen1], torch.Tensor]]] = {
    "move, resize, hold": (
        {"edits": [Move("cat", (0.2, -0.1)), Resize("frog", to=0.6, weight=2.0)]},
        PROMPT,
        moved_and_resized,
    ),
    "copy from another prompt": (
        {"edits": [CopyLayout(), KeepAppearance("cat", 0.3, "dog")], "source": SOURCE},
        SOURCE,
        copied,
    ),
    "carry the outline": (
        {"edits": [KeepShape("cat", by=(0.25, 0.0), factor=0.8)], "hold": []},
        PROMPT,
        carried,
    ),
    "to a place": ({"edits": [Move("frog", to=(0.8, 0.3))], "hold": []}, "", placed),
}


def reference(name: str, kind: str, scale: float, scheduler: str = "ddim") -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of the picture and of the original, drawn one pass at a time."""
    _, source, energy = EDITS[name]
    pipe = smooth(kind).to(torch.float64)
    maps: list[torch.Tensor] = []
    features: list[torch.Tensor] = []

    def processor(attn: Any, hidden: Any, encoder_hidden_states: Any = None, attention_mask: Any = None) -> Any:
        context = hidden if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden), attn.to_k(context), attn.to_v(context)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        p = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        if encoder_hidden_states is not None and hidden.shape[1] == 64:
            maps.append(p[0].mean(0).reshape(8, 8, LENGTH))
        return attn.to_out[0]((p @ v).transpose(1, 2).flatten(2))

    class Plain:
        __call__ = staticmethod(processor)

    pipe.unet.set_attn_processor(Plain())
    pipe.unet.up_blocks[-1].resnets[-2].register_forward_hook(lambda m, i, out: features.append(out[0]))
    told: dict[str, tuple[torch.Tensor, torch.Tensor, Any, Any]] = {}
    for text in (PROMPT, source or PROMPT):
        if kind == "sdxl":
            c, _, pooled, _ = pipe.encode_prompt([text], device="cpu")
            ids = torch.tensor([[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]], dtype=torch.float64)
            both = [
                {"added_cond_kwargs": {"text_embeds": e, "time_ids": ids}} for e in (torch.zeros_like(pooled), pooled)
            ]
            told[text] = (torch.zeros_like(c), c, *both)
        else:
            c, u = pipe.encode_prompt([text], "cpu", 1, True)
            told[text] = (u, c, {}, {})

    def passed(z: torch.Tensor, t: Any, text: str, half: int) -> tuple[torch.Tensor, Seen1]:
        maps.clear(), features.clear()
        eps = pipe.unet(z, t, encoder_hidden_states=told[text][half], **told[text][half + 2]).sample
        return eps, Seen1(list(maps), features[0])

    solvers = [make_scheduler(pipe.scheduler, scheduler) for _ in range(2)]
    for solver in solvers:
        solver.set_timesteps(4)
    levels = alpha_bars(solvers[0], solvers[0].timesteps)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x = xo = x * solvers[0].init_noise_sigma
    for i, t in enumerate(solvers[0].timesteps):
        zs = [solver.scale_model_input(state, t) for solver, state in zip(solvers, (x, xo), strict=True)]
        with torch.no_grad():
            eu, _ = passed(zs[0], t, PROMPT, 0)
            ec, _ = passed(zs[0], t, PROMPT, 1)
            ou, _ = passed(zs[1], t, source or PROMPT, 0)
            oc, original = passed(zs[1], t, source or PROMPT, 1)
        eps, eps_o = eu + 7.5 * (ec - eu), ou + 7.5 * (oc - ou)
        if i in GUIDED:
            z = zs[0].detach().requires_grad_(True)
            _, found = passed(z, t, PROMPT, 1)
            (gradient,) = torch.autograd.grad(energy(found, original), z)
            step = scale * (1 - levels[i]) * gradient
            # ε = √ᾱ v + √(1−ᾱ) x, so a noise that is larger by this makes v larger by it over √ᾱ.
            eps = eps + (step / levels[i] ** 0.5 if kind == "sd2" else step)
        x = solvers[0].step(eps, t, x).prev_sample
        xo = solvers[1].step(eps_o, t, xo).prev_sample
    return x.detach(), xo.detach()


CASES = [
    *((name, "sd1", "ddim") for name in EDITS),
    ("move, resize, hold", "sd2", "ddim"),
    ("move, resize, hold", "sdxl", "ddim"),
    ("to a place", "sd1", "euler"),
    ("copy from another prompt", "sd2", "euler"),
]


@pytest.mark.parametrize(("name", "kind", "scheduler"), CASES)
def test_equals_the_loop_written_out(name: str, kind: str, scheduler: str) -> None:
    settings, source, _ = EDITS[name]
    # The network's rounding is multiplied where an L1 norm turns: float64, but for the maps, which are float32.
    pipe = Pipeline.from_diffusers(smooth(kind)).to(torch.float64)
    draw = {**DRAW, "scheduler": scheduler, "guidance_scale": 7.5}
    expected, original = reference(name, kind, 30.0, scheduler)
    result = pipe(PROMPT, controls=[SelfGuidance(**settings, scale=30.0)], **draw)
    assert (result.images - expected).abs().max() <= TOLERANCE * expected.std()
    assert (result.images - pipe(PROMPT, **draw).images).abs().max() > 1e-2 * expected.std()
    if source:
        assert (result.states["original"] - original).abs().max() <= TOLERANCE * original.std()
        alone = pipe(source, **draw).images
        assert (result.states["original"] - alone).abs().max() < 1e-8
    else:
        assert not result.states


FALLS: dict[str, tuple[dict[str, Any], float]] = {
    "move to": ({"edits": [Move("cat", to=(0.9, 0.5))]}, 300.0),
    "move by": ({"edits": [Move("cat", by=(0.3, 0.0))]}, 1000.0),
    "resize to": ({"edits": [Resize("cat", to=0.8)]}, 30.0),
    "resize by": ({"edits": [Resize("cat", by=0.5)]}, 30.0),
    "keep the outline, moved": ({"edits": [KeepShape("cat", by=(0.3, 0.0))]}, 300.0),
    "keep the look": ({"edits": [KeepAppearance("cat", 1.0, "dog")], "source": SOURCE}, 300.0),
    "copy the layout": ({"edits": [CopyLayout()], "source": "a red dog with a frog and a hat"}, 100.0),
    "copy the looks": ({"edits": [CopyAppearance(weight=1.0)], "source": "a red dog with a frog and a hat"}, 300.0),
}


def energies(pipe: Pipeline, control: SelfGuidance) -> list[float]:
    """The energy of every step, without its weight."""
    found: list[float] = []
    plain = SelfGuidance.energy

    def energy(self: SelfGuidance, step: Any, round: int) -> Any:
        answer = plain(self, step, round)
        assert answer.loss is not None and answer.into == "prediction"
        found.append(float(answer.loss.detach().sum()) / (self._scale(step.run.plan.outline) * (1 - step.alpha_bar)))
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SelfGuidance, "energy", energy)
        pipe(PROMPT, controls=[control], **{**DRAW, "num_inference_steps": 6})
    return found


@pytest.mark.parametrize("name", FALLS)
def test_the_energy_falls_along_the_run(pipe: Pipeline, name: str) -> None:
    settings, scale = FALLS[name]
    every: dict[str, Any] = {"hold": [], "every": 1, "rest": 0.0}
    guided, left = (energies(pipe, SelfGuidance(**settings, **every, scale=s)) for s in (scale, 1e-9))
    assert len(guided) == len(left) == 6
    assert guided[0] == pytest.approx(left[0], rel=1e-4), "nothing has happened before the first step"
    # Lower on the way than in the picture without guidance, and no higher at the end, where the weight has gone to 0.
    assert sum(guided[1:]) < 0.99 * sum(left[1:])
    assert guided[1] < left[1] and guided[-1] < 1.005 * left[-1]


def test_held_things_stay_nearer_to_where_they_are(pipe: Pipeline) -> None:
    """The same move twice: with the rest held, its outlines are closer to the original's."""
    rest = grouped([Goal("shape", 1 / 3, k, k) for k in (A, AND, FROG)], (LENGTH, LENGTH), torch.device("cpu"))
    plain = SelfGuidance.energy

    def others(**settings: Any) -> float:
        apart: list[float] = []

        def energy(self: SelfGuidance, step: Any, round: int) -> Any:
            found, original = (step.memory(self).reading(branch, 0) for branch in ("cond", "original/cond"))
            apart.append(float(energy_of(rest, found, original, 10.0).detach()))
            return plain(self, step, round)

        control = SelfGuidance([Move("cat", by=(0.3, 0.0), weight=30.0)], 30.0, every=1, rest=0.0, **settings)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SelfGuidance, "energy", energy)
            pipe(PROMPT, controls=[control], **{**DRAW, "num_inference_steps": 6})
        return sum(apart[1:])

    assert others(hold_shape=10.0, hold_appearance=0.0) < 0.9 * others(hold=[])


def test_a_given_picture_is_looked_at_at_every_level(pipe: Pipeline) -> None:
    """Its layout is taken over; it costs no row in the main passes, and no step of a solver."""
    picture = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1))
    control = SelfGuidance([CopyLayout(["cat", "frog"])], 300.0, image=picture, every=1, rest=0.0)
    spec = RunSpec(prompt=PROMPT, controls=[control], **DRAW)
    result, planned = pipe.run(spec), pipe.explain(spec)
    assert not result.states
    cost = result.manifest["cost"]
    assert cost == {"unet_rows": 4 * 2 + 4 * 2, "unet_passes": 8, "energy_passes": 4, "side_rows": 0, "side_passes": 0}
    assert (planned.rows, planned.energy_rows) == ((2,) * 4, (2,) * 4)
    guided, left = (energies(pipe, control.model_copy(update={"scale": scale})) for scale in (300.0, 1e-9))
    assert guided[-1] < 0.99 * left[-1]
    other = control.model_copy(update={"image": picture.flip(2)})
    assert (pipe(PROMPT, controls=[other], **DRAW).images - result.images).abs().max() > 1e-3
    said = pipe(PROMPT, controls=[control.model_copy(update={"source": "a red cat and a blue frog"})], **DRAW)
    assert (said.images - result.images).abs().max() > 1e-3


def test_one_picture_for_each_prompt(pipe: Pipeline) -> None:
    pictures = [torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    edits = [CopyLayout(["cat"])]
    prompts = [PROMPT, "a red cat"]
    together = pipe(prompts, controls=[SelfGuidance(edits, 100.0, image=pictures)], **DRAW)
    assert torch.isfinite(together.images).all()
    swapped = pipe(prompts, controls=[SelfGuidance(edits, 100.0, image=pictures[::-1])], **DRAW)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(together.images, swapped.images, strict=True))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_picture_of_a_batch_is_guided_on_its_own(backbone: str) -> None:
    pipe = Pipeline.from_diffusers(smooth(backbone)).to(torch.float64)
    prompts, sources = [PROMPT, "a red cat on the beach"], [SOURCE, "the red cat on a beach"]
    edits = [Move("cat", to=(0.8, 0.2)), KeepShape("frog"), Resize("beach", by=0.5)]
    together = pipe(prompts, controls=[SelfGuidance(edits, 10.0, source=sources)], **DRAW)
    for i, (prompt, source) in enumerate(zip(prompts, sources, strict=True)):
        mine = [edit for edit in edits if str(edit.words) in prompt]
        control = SelfGuidance(mine, 10.0, source=source)
        alone = pipe(prompt, controls=[control], **{**DRAW, "seed": 5 + i})
        assert (together.images[i] - alone.images[0]).abs().max() < 1e-4 * alone.images.std()


@pytest.mark.parametrize(
    ("n", "settings", "steps"),
    [
        (4, {}, [0, 2]),
        (16, {}, [0, 1, 2, 4, 6, 8, 10, 12, 14]),
        (50, {}, [*range(10), *range(10, 48, 2)]),
        (1, {}, []),
        (1, {"rest": 0.0}, [0]),
        (6, {"every": 1, "rest": 0.0}, [0, 1, 2, 3, 4, 5]),
        (6, {"every": 3, "dense": 0.0, "rest": 0.0}, [0, 3]),
        (10, {"start": 0.3, "end": 0.8}, [4, 6]),
        (10, {"dense": 1.0, "rest": 0.5}, [0, 1, 2, 3, 4]),
    ],
)
def test_the_steps_that_are_guided(n: int, settings: dict[str, Any], steps: list[int]) -> None:
    assert sorted(SelfGuidance([Move("cat", to=(0.5, 0.5))], **settings).window(n)) == steps


def test_the_scale_follows_the_size_of_the_latents(pipe: Pipeline) -> None:
    edits = [Move("cat", to=(0.9, 0.5))]
    for size, scale in ((32, 64.0), (24, 36.0)):
        draw = {**DRAW, "height": size, "width": size}
        derived = pipe(PROMPT, controls=[SelfGuidance(edits)], **draw)
        given = pipe(PROMPT, controls=[SelfGuidance(edits, scale)], **draw)
        assert torch.equal(derived.images, given.images)
        side = size // 2
        assert derived.manifest["notes"] == [f"SelfGuidance: scale {scale:g} for latents of {side}x{side}"]
        assert not given.manifest["notes"]


@pytest.mark.parametrize(
    "settings",
    [
        {"scale": 0.0},
        {"edits": []},
        {"edits": [Move("cat", to=(0.5, 0.5), weight=0.0), CopyLayout(weight=0.0)]},
        {"end": 0.1},
        {"rest": 1.0},
    ],
)
def test_neutral_is_absence_bit_for_bit_and_free(pipe: Pipeline, settings: dict[str, Any]) -> None:
    control = SelfGuidance(**{"edits": [Move("cat", by=(0.2, 0.0))], **settings})
    plain, result = pipe(PROMPT, **DRAW), pipe(PROMPT, controls=[control], **DRAW)
    assert torch.equal(plain.images, result.images)
    assert plain.manifest["cost"] == result.manifest["cost"]
    assert list(result.manifest["dropped"]) == ["SelfGuidance"]


def test_a_small_scale_is_close_to_absence(pipe: Pipeline) -> None:
    plain = pipe(PROMPT, **DRAW).images
    result = pipe(PROMPT, controls=[SelfGuidance([Move("cat", by=(0.2, 0.0))], 1e-4)], **DRAW).images
    assert 0 < (result - plain).abs().max() < 1e-3 * plain.std()


def test_cost_is_as_planned_and_ends_with_the_guidance_if_asked(pipe: Pipeline) -> None:
    edits = [Move("cat", by=(0.2, 0.0))]
    # The original runs in all four steps or in three, and in both energy passes.
    for keep, rows in ((True, 4 * 4 + 2 * 2), (False, 3 * 4 + 2 + 2 * 2)):
        spec = RunSpec(prompt=PROMPT, controls=[SelfGuidance(edits, keep_original=keep)], **DRAW)
        cost, planned = pipe.run(spec).manifest["cost"], pipe.explain(spec)
        assert cost["unet_rows"] == rows == sum(planned.rows) + sum(planned.energy_rows)
        assert cost["energy_passes"] == 2 == sum(planned.energy_passes)
    # Without anything to compare with, there is no original.
    alone = SelfGuidance([Move("cat", to=(0.5, 0.5))], hold=[])
    cost = pipe(PROMPT, controls=[alone], **DRAW).manifest["cost"]
    assert cost["unet_rows"] == 4 * 2 + 2


def test_looks_are_read_only_where_they_are_asked_for(pipe: Pipeline) -> None:
    outlined = SelfGuidance([KeepShape("cat")])
    looked = SelfGuidance([KeepAppearance("cat")])
    prepared = pipe.explain(RunSpec(prompt=PROMPT, controls=[outlined], **DRAW))
    assert prepared.claims == {"SelfGuidance": ("add prediction",)}
    outline = _outline(pipe)
    assert not outlined.declare(outline).features
    assert [site.name for site in looked.declare(outline).features] == ["up_blocks.1.resnets.0"]


def _outline(pipe: Pipeline) -> Any:
    from controlroom.sampling.execute import plan_run

    return plan_run(pipe.backbone, RunSpec(prompt=PROMPT, **DRAW)).plan.outline


def test_the_original_is_told_what_the_picture_is_told() -> None:
    pipe = Pipeline.from_diffusers(smooth("sdxl"))
    settings = {**DRAW, "clip_skip": 1, "original_size": (64, 64), "negative_prompt": "blue", "guidance_scale": 4.0}
    result = pipe(PROMPT, controls=[SelfGuidance([Move("cat", by=(0.2, 0.0))])], **settings)
    alone = pipe(PROMPT, **settings).images
    assert (result.states["original"] - alone).abs().max() < 1e-4 * alone.std()


def test_on_a_canvas_seen_through_windows(pipe: Pipeline) -> None:
    wide = {**DRAW, "width": 24, "height": 16}
    left, right = (
        pipe(PROMPT, controls=[Seen(), SelfGuidance([Move("cat", to=(x, 0.5))], 300.0, hold=[])], **wide).images
        for x in (0.1, 0.9)
    )
    assert torch.isfinite(left).all() and (left - right).abs().max() > 1e-3
    with pytest.raises(ConflictError, match=r"SelfGuidance.*Seen|Seen.*SelfGuidance"):
        pipe(PROMPT, controls=[Seen(), SelfGuidance([Move("cat", by=(0.1, 0.0))])], **wide)


def test_beside_other_controls_in_any_order(pipe: Pipeline) -> None:
    guide = SelfGuidance([Move("cat", by=(0.2, 0.0))], 30.0)
    excite = AttendAndExcite(words=["cat"], iterations=2, thresholds={0: 0.9}, step_size=1.0, refinements=3)
    for others in ([excite], [PromptToPrompt(SOURCE)], [MasaCtrl(SOURCE, 1, 1)], [excite, PromptToPrompt(SOURCE)]):
        alone = pipe(PROMPT, controls=others, **DRAW).images
        first = pipe(PROMPT, controls=[guide, *others], **DRAW)
        second = pipe(PROMPT, controls=[*others, guide], **DRAW).images
        assert (first.images - second).abs().max() < 1e-3 * second.std()
        assert (first.images - alone).abs().max() > 1e-3 * second.std()
    # Passes with a gradient are shared: step 0 has those of the refinement, steps 1 and 2 one each.
    shared = pipe(PROMPT, controls=[guide, excite], **DRAW).manifest["cost"]["energy_passes"]
    assert shared == pipe(PROMPT, controls=[excite], **DRAW).manifest["cost"]["energy_passes"] + 1


def test_no_trace_and_no_graph_is_left(pipe: Pipeline) -> None:
    memories: list[Any] = []
    plain = SelfGuidance.prepare

    def prepare(self: SelfGuidance, run: Any) -> Any:
        memories.append(plain(self, run))
        return memories[-1]

    before = pipe(PROMPT, **DRAW).images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SelfGuidance, "prepare", prepare)
        result = pipe(PROMPT, controls=[SelfGuidance([KeepAppearance("cat", 1.0, "dog")], source=SOURCE)], **DRAW)
    assert not memories[0].maps and not memories[0].features and not result.images.requires_grad
    assert torch.equal(before, pipe(PROMPT, **DRAW).images)


def test_settings_survive_a_file() -> None:
    control = SelfGuidance(
        [
            Move(["cat", "red hat"], by=(0.1, -0.2)),
            Move("frog", to=(0.5, 0.25), weight=2.0),
            Resize("cat", 1.5, source_words="dog"),
            Resize("hat", to=0.2),
            KeepShape("cat", (0.1, 0.0), 0.5),
            KeepAppearance("hat"),
            CopyLayout(),
            CopyAppearance(["cat"], source_words=["dog"]),
        ],
        12.0,
        hold=["beach"],
        source=["a", "b"],
    )
    assert SelfGuidance.model_validate_json(control.model_dump_json()) == control
    assert [type(edit) for edit in control.edits][:2] == [Move, Move]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"edits": [Move("zebra", to=(0.5, 0.5))]}, "'zebra' is not in the prompt 'a cat and a frog'"),
        ({"edits": [Move(["cat", "grog"], to=(0.5, 0.5))]}, "Did you mean 'frog'"),
        ({"edits": [KeepShape("cat")], "source": SOURCE}, "'cat' is not in the prompt 'a dog and a frog'"),
        ({"edits": [KeepShape("cat", source_words="hat")]}, "'hat' is not in the prompt"),
        ({"edits": [CopyLayout()], "source": "blue"}, "'a cat and a frog' and 'blue' have no word in common"),
        ({"edits": [Move("cat", by=(0.1, 0.0))], "hold": ["zebra"]}, "'zebra' is not in the prompt"),
        ({"edits": [Move("cat", by=(0.1, 0.0))], "source": ["a", "b"]}, "2 source prompts for 1"),
        ({"edits": [Move("cat", to=(0.1, 0.0))], "resolution": 5}, "resolution 5; there are 16, 8"),
        ({"edits": [KeepShape("cat")], "image": "no/such/file.png"}, "no/such/file.png"),
    ],
)
def test_what_does_not_fit_is_an_input_error(pipe: Pipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipe(PROMPT, controls=[SelfGuidance(**settings)], **DRAW)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SelfGuidance(),  # type: ignore[call-arg]
        lambda: SelfGuidance([Move("cat", to=(0.5, 0.5))], scale=-1.0),
        lambda: SelfGuidance([Move("cat", to=(0.5, 0.5))], every=0),
        lambda: SelfGuidance([Move("cat", to=(0.5, 0.5))], hold=[""]),
        lambda: SelfGuidance([Move("cat", to=(0.5, 0.5))], source=[]),
        lambda: SelfGuidance([{"type": "throw", "words": "cat"}]),  # type: ignore[list-item]
        lambda: SelfGuidance([{"type": "move", "words": "cat"}]),  # type: ignore[list-item]
        lambda: Move("cat"),
        lambda: Move("cat", by=(0.1, 0.0), to=(0.5, 0.5)),
        lambda: Move("cat", to=(1.5, 0.5)),
        lambda: Move("cat", by=(-1.5, 0.5)),
        lambda: Move("", to=(0.5, 0.5)),
        lambda: Move([], to=(0.5, 0.5)),
        lambda: Move(["cat", " "], to=(0.5, 0.5)),
        lambda: Move("cat", to=(0.5, 0.5), weight=-1.0),
        lambda: Resize("cat"),
        lambda: Resize("cat", by=0.0),
        lambda: Resize("cat", to=1.0),
        lambda: Resize("cat", 2.0, 0.5),
        lambda: KeepShape("cat", factor=0.0),
        lambda: KeepShape(["cat", "frog"], source_words="dog"),
        lambda: CopyLayout(source_words="dog"),
    ],
)
def test_ill_settings_are_input_errors(make: Callable[[], Any]) -> None:
    with pytest.raises(ControlRoomError):
        make()
