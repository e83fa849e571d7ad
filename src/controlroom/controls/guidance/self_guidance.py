"""Self-guidance: where a thing is, how large, of what outline and look (arXiv 2306.00986).

The idea: cross-attention shows where the word of a thing is, and features what it looks like, so what is asked of a
thing is an energy of these, and its gradient joins the guidance. With A the map of a thing at a layer (mean over
heads), S its soft threshold, Ψ a feature map and L1 norms,

    centre = Σ p A / Σ A,   size = mean S,   outline = S,   look = Σ S Ψ / Σ S,
    energy = Σ of weight · |wanted − found|, a mean over layers and over the things of an edit,
    prediction += scale · (1 − ᾱ) · ∂energy/∂latents.

What is wanted is a number, or what the original picture shows at the same step: one that is drawn along from the same
noise without the energy, or a given picture, noised to the step's level. What is not asked to move is held as it is
there. As published, the energy acts at each of the first 3/16 of the steps, then at every second, not at the end.

Conventions: the published equation weighs with σ = √(1 − ᾱ), the public code for Stable Diffusion with 1 − ᾱ, the
published demonstration with 1; here it is 1 − ᾱ. The gradient is the one with respect to the network's input and joins
the noise, whatever the solver keeps and the network predicts. Maps are those of one resolution, by default the one
that shows things best, where the public code takes all layers. The look is compared channel by channel, as published
(the public code takes one mean of all), under outlines without a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator

from controlroom.backbones.words import PromptTokens, prompt_tokens
from controlroom.controls.drawn_along import DrawnAlong, source_prompts
from controlroom.controls.object_edits import Edit, Goal, Quantity, check_words, goals, pairs, places, shared
from controlroom.controls.object_energy import Group, Reading, energy_of, grouped
from controlroom.controls.source_pixels import for_each_image, source_pixels
from controlroom.core.attention import AttentionCall, FeatureCall
from controlroom.core.branch import Branch, State, Views
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Energy, EnergyNeed, Outline, window_steps
from controlroom.core.run import Run
from controlroom.core.sites import Site, nearest_size
from controlroom.core.step import Step

ORIGINAL = DrawnAlong("original")
Pictures = list[tuple[PromptTokens, PromptTokens]]
"""Prompt of each picture, and that of its original."""


class SelfGuidance(Control):
    """Move, resize, keep and copy things that are named by words of the prompt.

    The original picture, where one is drawn along, is in ``result.states["original"]`` (latents; ``pipe.decode`` shows
    them).

    Args:
        edits: what is asked: `Move`, `Resize`, `KeepShape`, `KeepAppearance`, `CopyLayout`, `CopyAppearance`.
        scale: weight of all energies together; 0 is the absence of the control. None: a quarter of the number of latent
            pixels (1024 at 64x64), since each of them moves a thing the less the more there are.
        start, end: share of the steps between which it acts.
        source: prompt of the original picture; None: the run's own, so that the original is the picture without this
            control. A list has one for each picture, or one for each prompt.
        image: instead of drawing the original along, a picture that ``source`` describes, noised to each step's level.
            A list has one for each prompt.
        hold: with an edit that moves or resizes: words of the things that are held as they are in the original; None:
            every other word that both prompts have. What is moved keeps its look. An empty list: nothing is held.
        hold_shape, hold_appearance: weights of holding outlines and looks.
        dense: share of the steps, from the first, of which each is guided.
        every: behind them, each step whose number this divides.
        rest: share of the steps, at the end, that are never guided.
        resolution: shorter side in tokens of the layers whose attention is read; None: a quarter of the latents' side
            (16 for Stable Diffusion at 64x64 latents), or the nearest there is.
        sharpness: of the soft threshold.
        keep_original: draw the original to its end; without it its rows end with the last guided step.

    Raises:
        InputError: a setting out of its range; at planning, a resolution that no layer has; at the start, words that
            are not in a prompt, each named, and a picture that cannot be read.
        ConflictError: when the run is planned: an edit that compares with the original, beside a control that shows the
            canvas through views.
    """

    type: Literal["self_guidance"] = Field(default="self_guidance", kw_only=True)
    edits: Sequence[Annotated[Edit, Field(discriminator="type")]]
    scale: float | None = Field(default=None, ge=0)
    start: float = Field(default=0.0, ge=0, le=1)
    end: float = Field(default=1.0, ge=0, le=1)
    source: str | list[str] | None = None
    image: Any = None
    hold: list[str] | None = None
    hold_shape: float = Field(default=1.0, ge=0)
    hold_appearance: float = Field(default=0.1, ge=0)
    dense: float = Field(default=3 / 16, ge=0, le=1)
    every: int = Field(default=2, ge=1)
    rest: float = Field(default=1 / 32, ge=0, le=1)
    resolution: int | None = Field(default=None, ge=1)
    sharpness: float = Field(default=10.0, gt=0)
    keep_original: bool = True

    @field_validator("source", "hold")
    @classmethod
    def _something(cls, value: Any, info: Any) -> Any:
        if isinstance(value, list) and ((info.field_name == "source" and not value) or any(not x for x in value)):
            raise ValueError("an empty text or list")
        return value

    # Planning.

    def neutral(self, n: int) -> bool:
        """The scale or all weights are 0, or no step is guided."""
        return super().neutral(n) or all(edit.weight == 0 for edit in self.edits)

    def window(self, n: int) -> frozenset[int]:
        """The guided steps."""
        within = window_steps(n, self.start, min(self.end, 1 - self.rest))
        return frozenset(i for i in within if i < self.dense * n or i % self.every == 0)

    @property
    def _acting(self) -> list[Edit]:
        return [edit for edit in self.edits if edit.weight > 0]

    @property
    def _holds(self) -> bool:
        """Whether anything is held: only where something moves, the rest has a place to stay at."""
        return self.hold != [] and max(self.hold_shape, self.hold_appearance) > 0 and any(e.moves for e in self._acting)

    @property
    def _compares(self) -> bool:
        """Whether there is an original."""
        return self._holds or any(edit.goal.relative for edit in self._acting)

    @property
    def _looks(self) -> bool:
        """Whether features are read."""
        held = self._holds and self.hold_appearance > 0
        return held or any(edit.goal.quantity == "appearance" for edit in self._acting)

    def declare(self, outline: Outline) -> Declaration:
        """Energy passes over ``cond`` and the original; layers of one resolution and a feature map are read."""
        steps = self.window(outline.steps)
        states: tuple[State, ...] = ()
        branches: tuple[Branch, ...] = ()
        if self._compares and self.image is not None:
            # Needed by the energy alone: at no step does the main pass run it.
            states = (State(ORIGINAL.state, "pinned"),)
            branches = (
                Branch(ORIGINAL.cond, ORIGINAL.state, purpose="reference", read_by=("cond",), steps=frozenset()),
            )
        elif self._compares:
            until = None if self.keep_original else frozenset(range(max(steps, default=-1) + 1))
            states, branches = ORIGINAL.states(), ORIGINAL.branches(outline, ("cond",), until)
        if self.source is not None:
            source_prompts(self.source, outline.prompts, self.label)
        note = f"scale {self._scale(outline):g} for latents of {outline.latent[1]}x{outline.latent[2]}"
        sites = outline.sites("cross")
        hw = nearest_size(sites, outline.hw, self.resolution)
        read = ("cond", ORIGINAL.cond) if self._compares else ("cond",)
        return Declaration(
            states=states,
            branches=branches,
            attention=tuple(site for site in sites if site.hw == hw),
            features=(self._feature_site(outline),) if self._looks else (),
            energy=EnergyNeed(read, steps),
            claims=(Claim("prediction", "add"),),
            phases=frozenset({"energy"}),
            notes=() if self.scale is not None else (note,),
        )

    def _scale(self, outline: Outline) -> float:
        return outline.latent[1] * outline.latent[2] / 4 if self.scale is None else self.scale

    @staticmethod
    def _feature_site(outline: Outline) -> Site:
        """The last resnet but one of the decoder."""
        return outline.sites("resnet", places=("up",))[-2:][0]

    # A run.

    def prepare(self, run: Run) -> _Memory:
        """Tell and pin the original; the goals of every picture."""
        sources = list(run.prompts)
        if self.source is not None:
            sources = source_prompts(self.source, run.prompts, self.label)
        if self._compares:
            ORIGINAL.tell(run, None if self.source is None else sources)
            if self.image is not None:
                pixels = for_each_image(source_pixels(self.image, run), run)
                run.pin(ORIGINAL.state, run.backbone.encode_picture(pixels))
        tokenizer = run.backbone.tokenizers()[0]
        texts = zip(run.prompts, sources, strict=True)
        pictures = [(prompt_tokens(tokenizer, prompt), prompt_tokens(tokenizer, source)) for prompt, source in texts]
        self._check_words(pictures)
        found = [
            grouped(self._goals(*picture), (picture[0].length, picture[1].length), run.device) for picture in pictures
        ]
        return _Memory(tuple(found), run.plan.views)

    def _check_words(self, pictures: Pictures) -> None:
        for edit in self._acting:
            check_words(edit, pictures, self.label)
        for word in self.hold or [] if self._holds else []:
            if not any(word in prompt and word in original for prompt, original in pictures):
                pictures[0][0].find(word)
                pictures[0][1].find(word)

    def _goals(self, prompt: PromptTokens, original: PromptTokens) -> list[Goal]:
        """What is asked of the things in one picture, and what is held."""
        found = [goal for edit in self._acting for goal in goals(edit, prompt, original)]
        if not self._holds:
            return found
        named = {pair for edit in self._acting for pair in pairs(edit, prompt, original)}
        moved = {pair for edit in self._acting if edit.moves for pair in pairs(edit, prompt, original)}
        taken = {place for word, _ in named for place in places(prompt, word)}
        words = self.hold if self.hold is not None else list(dict.fromkeys(word for word, _ in prompt.words))
        others = [(w, w) for w in words if w in prompt and w in original and not taken & set(places(prompt, w))]
        kept: tuple[tuple[Quantity, float, list[tuple[str, str]]], ...] = (
            ("shape", self.hold_shape, others),
            ("appearance", self.hold_appearance, [*sorted(moved), *others]),
        )
        for quantity, weight, held in kept:
            if weight > 0:
                each = [Goal(quantity, weight, places(prompt, word), places(original, o)) for word, o in held]
                found += shared([goal for goal in each if goal.places and goal.original])
        return found

    # A step.

    def before(self, step: Step) -> None:
        """Every step reads anew."""
        memory: _Memory = step.memory(self)
        memory.forget()
        memory.answered = False

    def attention(self, call: AttentionCall) -> None:
        """Read the maps of the picture and of the original."""
        memory: _Memory = call.step.memory(self)
        for branch in ("cond", ORIGINAL.cond):
            if branch in call and not memory.answered:
                call.read(branch, memory.sink(branch, call.site))

    def feature(self, call: FeatureCall) -> None:
        """Keep the features of both."""
        memory: _Memory = call.step.memory(self)
        for branch in ("cond", ORIGINAL.cond):
            if branch in call and not memory.answered:
                hidden = call.hidden[call.rows(branch)]
                memory.features[branch] = hidden.to(torch.promote_types(hidden.dtype, torch.float32))

    def energy(self, step: Step, round: int) -> Energy:
        """The energies of every picture, weighed so that their gradient is what joins the prediction."""
        memory: _Memory = step.memory(self)
        if step.alpha_bar <= 0:
            # Nothing but noise: a prediction of v says nothing about it.
            return Energy(None)
        losses = []
        for index, groups in enumerate(memory.groups):
            found = memory.reading("cond", index)
            assert found is not None
            losses.append(energy_of(groups, found, memory.reading(ORIGINAL.cond, index), self.sharpness))
        loss = torch.stack(losses)
        memory.forget()
        # In further rounds of the step, which other controls ask for, there is nothing to read.
        memory.answered = True
        # The engine's gradient is the latents'; the input is shorter by this factor, and its gradient longer.
        scaled = float(step.scaled(torch.ones((), device=loss.device, dtype=torch.float32)))
        weight = self._scale(step.run.plan.outline) * (1 - step.alpha_bar) / scaled
        return Energy(weight * _of_noise(step) * loss, into="prediction")


@dataclass
class _Memory:
    """Goals of each picture; of the step under way: branch -> layer -> maps [rows, h, w, L], branch -> features."""

    groups: tuple[tuple[Group, ...], ...]
    views: Views | None
    maps: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    features: dict[str, torch.Tensor] = field(default_factory=dict)
    answered: bool = False

    def forget(self) -> None:
        """Let go of the graph."""
        self.maps.clear()
        self.features.clear()

    def sink(self, branch: str, site: Site) -> Callable[[torch.Tensor], None]:
        """Takes probabilities [rows, heads, h·w, L]."""

        def keep(probabilities: torch.Tensor) -> None:
            self.maps.setdefault(branch, {})[site.name] = probabilities.mean(1).unflatten(1, site.hw)

        return keep

    def reading(self, branch: str, index: int) -> Reading | None:
        """What was read of one picture; None of a branch that was not there."""
        if branch not in self.maps:
            return None
        # Rows of views follow each other view by view.
        maps = tuple(each[index :: len(self.groups)] for each in self.maps[branch].values())
        features = self.features.get(branch)
        views = self.views if branch == "cond" else None
        return Reading(maps, None if features is None else features[index], views)


def _of_noise(step: Step) -> float:
    """How much the prediction changes with the noise that it stands for, the network's input being what it is."""
    kind = step.run.scheduler.config.prediction_type
    if kind == "epsilon":
        return 1.0
    return (1.0 if kind == "v_prediction" else -((1 - step.alpha_bar) ** 0.5)) / step.alpha_bar**0.5
