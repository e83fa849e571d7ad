"""The contract of a control: frozen settings and up to twelve optional hooks.

A control is a frozen pydantic model. Its fields are its Python arguments, its YAML keys, its command-line flags and its
form in the studio; its hooks are called by the engine. What a run remembers for it lives in the run: `prepare` returns
it, ``step.memory(self)`` gives it back. This module loads neither torch nor diffusers, so that a `RunSpec` can be read
from YAML anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, dataclass_transform

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer, field_validator
from pydantic import SerializerFunctionWrapHandler as Handler

from controlroom.core import inputs
from controlroom.core.branch import Branch, State, Views
from controlroom.core.claims import Claim
from controlroom.core.errors import InputError
from controlroom.core.sites import Site

if TYPE_CHECKING:
    import torch
    from pydantic._internal._model_construction import ModelMetaclass

    from controlroom.core.attention import AttentionCall, FeatureCall
    from controlroom.core.backbone import Backbone
    from controlroom.core.run import Run
    from controlroom.core.step import Step

    # pydantic declares the fields of every model as keyword-only; type checkers read here that a control's are not.
    @dataclass_transform(kw_only_default=False, frozen_default=True, field_specifiers=(Field,))
    class Positional(ModelMetaclass):
        """What type checkers take the metaclass of controls for."""
else:
    Positional = type(BaseModel)

Phase = Literal["main", "energy", "probe"]


@dataclass(frozen=True)
class Outline:
    """What is known of a run before it starts: enough to declare, without loading weights or encoding anything.

    Attributes:
        backbone: ``sd1``, ``sd2`` or ``sdxl``.
        images: number of pictures.
        steps: number of steps n.
        latent: channels, height and width of the latents.
        view: latent height and width of one view, where a control shows the network a large canvas through windows;
            sites have the sizes of a view then. None: the network sees the latents whole.
        input_channels: that the network reads, those of the latents among them; 0: not known.
        guided: whether there is an ``uncond`` branch.
        attention: attention sites in the order of execution.
        features: feature sites in the order of execution.
        prompts: the prompt of each picture ("" where embeddings were given).
    """

    backbone: str
    images: int
    steps: int
    latent: tuple[int, int, int]
    guided: bool
    attention: tuple[Site, ...]
    features: tuple[Site, ...]
    prompts: tuple[str, ...]
    view: tuple[int, int] | None = None
    input_channels: int = 0

    @property
    def hw(self) -> tuple[int, int]:
        """Latent height and width that the network sees of the picture."""
        return self.view or self.latent[1:]

    @property
    def text_branches(self) -> tuple[str, ...]:
        """The branches every run has, in the order of their rows."""
        return ("uncond", "cond") if self.guided else ("cond",)

    def sites(
        self,
        kind: str,
        places: tuple[str, ...] = ("down", "mid", "up"),
        min_index: int = 0,
        max_index: int | None = None,
        tokens: int | None = None,
        max_tokens: int | None = None,
    ) -> tuple[Site, ...]:
        """Sites of a kind; narrowed by place, order of execution, number of tokens (exactly or at most).

        Raises:
            InputError: none is left, so that the control would silently do nothing.
        """
        found = tuple(
            site
            for site in (*self.attention, *self.features)
            if site.kind == kind
            and site.place in places
            and site.index >= min_index
            and (max_index is None or site.index <= max_index)
            and (tokens is None or site.hw[0] * site.hw[1] == tokens)
            and (max_tokens is None or site.hw[0] * site.hw[1] <= max_tokens)
        )
        if not found:
            known = sorted({site.hw for site in (*self.attention, *self.features) if site.kind == kind})
            raise InputError(
                f"No {kind} layer of this network in {', '.join(places)} fits (index {min_index} to {max_index}, "
                f"tokens {tokens or max_tokens}); it has {kind} layers at {known}. Choose other layers or sizes."
            )
        return found

    def window(self, start: float, end: float) -> frozenset[int]:
        """Steps i of n with i/n >= start and (i+1)/n <= end: diffusers' rule."""
        return window_steps(self.steps, start, end)


def window_steps(n: int, start: float, end: float) -> frozenset[int]:
    """Steps i of n with i/n >= start and (i+1)/n <= end.

    Example:
        >>> sorted(window_steps(10, 0.2, 0.5))
        [2, 3, 4]
    """
    return frozenset(i for i in range(n) if i / n >= start and (i + 1) / n <= end)


@dataclass(frozen=True)
class Texts:
    """What the user says the pictures are, before a control has read it.

    Attributes:
        prompts: of each picture ("" where embeddings were given).
        negatives: negative prompt of each picture; None where none was given.
        embeds: what was given as embeddings instead: ``prompt``, ``negative_prompt``.
        seconds: what the second text encoder of Stable Diffusion XL is told apart: ``prompt``, ``negative_prompt``.
    """

    prompts: tuple[str, ...]
    negatives: tuple[str | None, ...]
    embeds: frozenset[str] = frozenset()
    seconds: frozenset[str] = frozenset()


@dataclass(frozen=True)
class EnergyNeed:
    """Passes with a gradient that a control needs before the main pass.

    Attributes:
        branches: branches run in the energy pass (with what they need).
        steps: steps with such a pass; None: those of the control's window.
        state: the latents that are descended on.
    """

    branches: tuple[str, ...] = ("cond",)
    steps: frozenset[int] | None = None
    state: str = "image"


@dataclass(frozen=True)
class Energy:
    """What a control answers to an energy pass.

    Attributes:
        loss: scalar or [rows], already times the step size: the engine moves the latents by minus its gradient. Rows
            that are done have 0. None: nothing to descend on in this round.
        again: ask for another pass from the latents moved so.
        into: ``latents``: moves them; ``prediction``: the gradient is added to the prediction of this step instead.
    """

    loss: torch.Tensor | None
    again: bool = False
    into: Literal["latents", "prediction"] = "latents"


@dataclass(frozen=True)
class Residuals:
    """What an auxiliary network adds inside the UNet, for some branches.

    Attributes:
        branches: branches in the order of the tensors' rows.
        down: one [rows, c, h, w] for each skip connection, as a ControlNet gives; empty: none.
        mid: [rows, c, h, w] for the middle block; None: none.
        intrablock: one for each down block, as a T2I-Adapter gives; empty: none.
    """

    branches: tuple[str, ...]
    down: tuple[torch.Tensor, ...] = ()
    mid: torch.Tensor | None = None
    intrablock: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class Declaration:
    """What a control tells the planner.

    Attributes:
        branches: rows it adds to the batch.
        states: latents it adds.
        claims: what it writes.
        attention: attention sites where its ``attention`` is called; no other layer is touched.
        features: sites where its ``feature`` is called.
        energy: gradient passes it needs.
        phases: passes in which its ``attention``, ``feature`` and ``side`` are called. ``main`` is the pass that
            predicts; ``energy`` has gradients; ``probe`` is another control's own ``step.forward``.
        views: how the picture's canvas is seen through windows. One control of a run at most.
        view_batch: views that go through the network at once; None: all.
        wrap: latent columns by which the picture is continued around its left and right edge for decoding.
        strength: share of the schedule that is run, as in image to image; None: all. One control of a run at most.
        channels: number of input channels it supplies beside the latents (``run.set_channels``).
        checkpoint: which checkpoint reads these channels, for the error when the loaded one does not.
        repeats: its ``finish`` may ask for the step to be run again, from the latents it leaves.
        notes: what it chose by itself, in sentences for the user; `explain` and the manifest show them.
        unguided: steps without guidance: the prediction with the prompt is the base combination, whoever else would
            make it, and branches of role ``uncond`` (and references only they read) do not run.
        keeps: branches that its ``guide`` reads, and that run at its steps also without guidance.
        rescale: how far guidance is rescaled at its steps (arXiv 2305.08891), 0 to 1; 0: not.
        probes: branches of one further pass that its ``guide`` or ``finish`` asks for at each step. Only counted.
        probe_passes: step -> number of such passes, where it is not one.
    """

    branches: tuple[Branch, ...] = ()
    states: tuple[State, ...] = ()
    claims: tuple[Claim, ...] = ()
    attention: tuple[Site, ...] = ()
    features: tuple[Site, ...] = ()
    energy: EnergyNeed | None = None
    phases: frozenset[Phase] = frozenset({"main", "energy", "probe"})
    views: Views | None = None
    view_batch: int | None = None
    wrap: int = 0
    strength: float | None = None
    channels: int = 0
    checkpoint: str = ""
    repeats: bool = False
    notes: tuple[str, ...] = ()
    unguided: frozenset[int] = frozenset()
    keeps: tuple[str, ...] = ()
    rescale: float = 0.0
    probes: tuple[str, ...] = ()
    probe_passes: Mapping[int, int] = field(default_factory=dict)


class Settings(BaseModel, metaclass=Positional):
    """Frozen settings: of a control, or of a part of one (an edit, a region).

    Positional arguments follow the order of the fields (without ``type``).

    Raises:
        InputError: an unknown or ill-typed setting.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, protected_namespaces=(), allow_inf_nan=False
    )

    def __init__(self, *args: Any, **settings: Any) -> None:
        names = [name for name in type(self).model_fields if name != "type"]
        if len(args) > len(names):
            raise InputError(f"{type(self).__name__} takes at most {len(names)} arguments, got {len(args)}.")
        for name, value in zip(names, args, strict=False):
            if name in settings:
                raise InputError(f"{type(self).__name__} got {name!r} twice, by position and by name.")
            settings[name] = value
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise InputError(describe(type(self).__name__, error)) from error


class Control(Settings):
    """Base of every control: override the hooks you need, leave the others.

    Fields ``scale``, ``start``, ``end`` and ``mask`` have their common meaning wherever a control declares them.

    Raises:
        InputError: an unknown or ill-typed setting.
    """

    by_views: ClassVar[bool] = False
    """Whether the hooks within a pass keep nothing of it, so that the views of a canvas may come in several passes."""

    type: str = Field(kw_only=True)
    """Name in the catalogue; each control narrows it: ``type: Literal["x"] = Field(default="x", kw_only=True)``."""

    @field_validator("*", mode="before")
    @classmethod
    def _decode(cls, value: Any) -> Any:
        return inputs.decode(value)

    @field_serializer("*", mode="wrap", when_used="json")
    def _encode(self, value: Any, handler: Handler) -> Any:
        return inputs.encode(value) if inputs.is_opaque(value) else handler(value)

    @property
    def label(self) -> str:
        """Name used in messages."""
        return type(self).__name__

    # Planning. Nothing is loaded here.

    def read(self, texts: Texts) -> Texts:
        """The words of the prompts, where they stand in a notation that this control reads, or come with it.

        First of all hooks, and also asked of a control that is dropped: everything else sees the words. What it wants
        to know later it can keep in prompts of a class of its own (`controlroom.backbones.words.PlacedPrompt`).
        """
        return texts

    def neutral(self, n: int) -> bool:
        """Whether the control would change nothing in a run of n steps; the planner then drops it.

        The default: ``scale`` is 0 (or all of a list or mapping are), or no step lies in its window.
        """
        scale = getattr(self, "scale", None)
        values = list(scale.values()) if isinstance(scale, dict) else scale
        if isinstance(values, list | tuple):
            silent = len(values) > 0 and all(isinstance(v, int | float) and v == 0 for v in values)
        else:
            silent = isinstance(values, int | float) and values == 0
        # Asked of the class, since a setting may be called so too (MultiDiffusion's size of a window).
        return silent or not type(self).window(self, n)

    def window(self, n: int) -> frozenset[int]:
        """Steps at which the control acts; from ``start`` and ``end`` where it has them."""
        return window_steps(n, getattr(self, "start", 0.0), getattr(self, "end", 1.0))

    def declare(self, outline: Outline) -> Declaration:
        """Branches, states, claims, sites and passes. Called once, before anything is loaded."""
        return Declaration()

    def reaches(self, branch: Branch) -> bool:
        """Whether a spatial or image-prompt control acts on a branch: not where it only supplies a reference."""
        return branch.purpose != "reference"

    # A run.

    def attach(self, backbone: Backbone) -> AbstractContextManager[Any] | None:
        """Change the network for the whole run (LoRA, new words): a context that puts everything back when it exits.

        What it gives on entering is ``run.attachment(self)``.
        """
        return None

    def remarks(self, backbone: Backbone) -> tuple[str, ...]:
        """What its files say that a user should know (keys read, what was assumed), in sentences; notes show them.

        Asked in a run after `attach`, and by ``explain`` before one: it may read files (kept with
        `controlroom.backbones.loading.keep`, so that the run need not read them again), and computes nothing.
        """
        return ()

    def weights(self, tag: str, backbone: Backbone) -> AbstractContextManager[None] | None:
        """Change the network for the passes of the branches whose ``weights`` are ``tag``."""
        return None

    def prepare(self, run: Run) -> Any:
        """Load weights, encode inputs, set conditions, pin states; once. What it returns is ``step.memory(self)``."""
        return None

    # A step, in this order.

    def before(self, step: Step) -> None:
        """First thing in an active step: set conditions or change states (``step.latents``)."""

    def energy(self, step: Step, round: int) -> Energy:
        """After energy pass number ``round`` of this step (from 0): the loss, from what ``attention`` read."""
        raise NotImplementedError(f"{self.label} declared an energy but has none")

    def side(self, step: Step) -> Residuals | tuple[Residuals, ...] | None:
        """Run an auxiliary network on ``step.inputs(...)``; the residuals go into the pass that follows.

        Several where branches of different sizes or text lengths cannot share a pass of the auxiliary network.
        """
        return None

    def attention(self, call: AttentionCall) -> None:
        """Record operations at one of the declared attention sites."""

    def feature(self, call: FeatureCall) -> torch.Tensor | None:
        """A new output of one of the declared feature sites, or None to leave it."""
        return None

    def combine(self, step: Step, state: str) -> torch.Tensor | None:
        """The base combination of ``step.eps`` for a state, instead of classifier-free guidance; None: not mine."""
        return None

    def guide(self, step: Step, state: str) -> torch.Tensor | None:
        """An addition to the combined prediction of a state; ``step.combined[state]`` is what it is so far."""
        return None

    def finish(self, step: Step) -> bool | None:
        """After the solver: blend or mask ``step.latents``. True asks to run the step again (declare ``repeats``)."""
        return None

    # After the last step.

    def develop(self, run: Run, pixels: torch.Tensor) -> torch.Tensor:
        """Change the decoded pictures [images, 3, height, width], -1 to 1; not where latents are asked for."""
        return pixels


def implements(control: Control, hook: str) -> bool:
    """Whether a control overrides a hook, so that the engine need not call the empty ones."""
    return getattr(type(control), hook) is not getattr(Control, hook)


def describe(name: str, error: ValidationError) -> str:
    """One paragraph for a user out of pydantic's report: field, what was wrong, what was given."""
    parts = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"]) or "settings"
        given = "" if item["type"] in ("missing",) else f", got {_short(item.get('input'))}"
        parts.append(f"{field}: {item['msg'][:1].lower()}{item['msg'][1:]}{given}")
    return f"{name} cannot be made: {'; '.join(parts)}."


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float | bool | list | tuple | dict | None) else str(type(value))
    return text if len(text) <= 80 else text[:77] + "..."
