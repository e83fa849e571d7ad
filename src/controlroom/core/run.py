"""A run: what lives from its first step to its last.

Controls get it in ``prepare`` and as ``step.run``. It holds the conditions, the latents' origin, the randomness and the
memory of every control; nothing of it outlives the run, and nothing of a run is stored anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from controlroom.core.backbone import Backbone
from controlroom.core.branch import IMAGE, Condition, ConditionSource, Layout
from controlroom.core.control import Control
from controlroom.core.plan import Plan
from controlroom.core.random import Streams

if TYPE_CHECKING:
    from controlroom.core.step import Step

StateSource = Callable[["Step"], torch.Tensor]
Filling = Callable[[str, Condition], Condition]
"""Branch and its condition -> the condition with as many tokens as the run's texts have."""
Forward = Callable[["Step", tuple[str, ...], str], dict[str, torch.Tensor]]


@dataclass
class Cost:
    """What a run spent.

    Attributes:
        unet_rows: rows that went through the UNet, all passes together.
        unet_passes: forward passes of the UNet.
        energy_passes: those of them that carried a gradient.
        side_rows: rows through auxiliary networks.
        side_passes: forward passes of auxiliary networks.
    """

    unet_rows: int = 0
    unet_passes: int = 0
    energy_passes: int = 0
    side_rows: int = 0
    side_passes: int = 0

    def as_dict(self) -> dict[str, int]:
        """For the manifest."""
        return asdict(self)


@dataclass(frozen=True)
class Guidance:
    """Settings of the base combination."""

    scale: float = 7.5
    rescale: float = 0.0


@dataclass
class Run:
    """State of one run.

    Attributes:
        backbone: the network.
        plan: what will happen.
        streams: randomness by name.
        schedulers: one for each solver state, by name.
        timesteps: [n].
        guidance: classifier-free guidance.
        prompts: prompt of each image.
        negative_prompts: negative prompt of each image; None where none was given.
        size: height and width of the picture in pixels.
        eta: of DDIM.
        clip_skip: layers of CLIP that every prompt of the run leaves out at the end.
        cost: what was spent so far.
        remarks: what files of controls say.
        masks: what controls found by themselves where they were given words: name ->
            [images, 1, height, width] in [0, 1].
    """

    backbone: Backbone
    plan: Plan
    streams: Streams
    schedulers: dict[str, Any]
    timesteps: torch.Tensor
    guidance: Guidance
    prompts: tuple[str, ...]
    negative_prompts: tuple[str | None, ...]
    size: tuple[int, int]
    eta: float = 0.0
    clip_skip: int | None = None
    cost: Cost = field(default_factory=Cost)
    conditions: dict[str, ConditionSource] = field(default_factory=dict)
    initial: dict[str, torch.Tensor] = field(default_factory=dict)
    sources: dict[str, StateSource] = field(default_factory=dict)
    channels: dict[str, torch.Tensor] = field(default_factory=dict)
    filling: Filling | None = None
    remarks: tuple[str, ...] = ()
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    memories: dict[int, Any] = field(default_factory=dict)
    attached: dict[int, Any] = field(default_factory=dict)
    forward: Forward | None = None
    _packed: dict[tuple[tuple[str, ...], int], Condition] = field(default_factory=dict, repr=False)
    _reach: dict[tuple[int, str], bool] = field(default_factory=dict, repr=False)

    @property
    def images(self) -> int:
        """Number of pictures."""
        return self.plan.outline.images

    @property
    def n(self) -> int:
        """Number of steps."""
        return self.plan.n

    # Asked for many times in a step, and each answer of the network walks through all its modules: 2 ms.
    @cached_property
    def device(self) -> torch.device:
        """Where the network runs."""
        return self.backbone.device

    @cached_property
    def dtype(self) -> torch.dtype:
        """Precision of the network."""
        return self.backbone.dtype

    @property
    def scheduler(self) -> Any:
        """Scheduler of the picture."""
        return self.schedulers[IMAGE]

    def latent_shape(self, state: str = IMAGE) -> tuple[int, int, int, int]:
        """[rows, channels, height, width] of a state."""
        entry = self.plan.states[state]
        channels, height, width = self.plan.outline.latent
        height, width = entry.hw or (height, width)
        return (self.images if entry.rows is None else entry.rows, channels, height, width)

    # What `prepare` sets.

    def set_condition(self, branch: str, condition: ConditionSource) -> None:
        """What a branch is told: a condition, or a function of the step that gives it."""
        self.conditions[branch] = condition
        self._packed.clear()

    def fill_texts(self, filling: Filling) -> None:
        """Fill up what every branch is told, whenever it is set: texts of different lengths cannot share a pass."""
        self.filling = filling
        self._packed.clear()

    def set_initial(self, state: str, latents: torch.Tensor) -> None:
        """Latents a solver state starts from, as the solver has them (instead of noise)."""
        self.initial[state] = latents

    def pin(self, state: str, clean: torch.Tensor, noise: torch.Tensor | None = None) -> None:
        """Hold a pinned state at ``clean`` latents noised to each step's level.

        ``noise`` stays the same for all steps; None: from the stream named after the state.
        """
        drawn = self.noise(state, clean.shape) if noise is None else noise
        self.sources[state] = lambda step: step.noised(clean, drawn)

    def derive(self, state: str, source: StateSource) -> None:
        """Give a pinned or derived state by a function of the step."""
        self.sources[state] = source

    def set_channels(self, branch: str, channels: torch.Tensor) -> None:
        """[images or 1, c, h, w] joined to a branch's latents as further input channels (after scaling).

        Every branch needs them, those of other controls too: go through ``run.plan.branches``.
        """
        self.channels[branch] = channels

    # What controls need.

    def reaches(self, control: Control, branch: str) -> bool:
        """Whether a spatial or image-prompt control acts on a branch."""
        key = (id(control), branch)
        if key not in self._reach:
            self._reach[key] = control.reaches(self.plan.branches[branch])
        return self._reach[key]

    def memory(self, control: Control) -> Any:
        """What the control's ``prepare`` returned."""
        return self.memories[self.plan.indices[id(control)]]

    def attachment(self, control: Control) -> Any:
        """What the context of the control's ``attach`` gave on entering."""
        return self.attached[self.plan.indices[id(control)]]

    def noise(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """Standard normal noise from the stream ``name``, row i from image i; see `Streams`."""
        return self.streams.normal(name, shape, self.device, self.dtype)

    def rng(self, name: str) -> list[torch.Generator]:
        """Generators of the stream ``name``, one for each image."""
        return self.streams.stream(name)

    def encode_text(self, prompts: Sequence[str] | str, negative: bool = False) -> Condition:
        """Condition of one row for each prompt; a single prompt is repeated for every image."""
        texts = [prompts] * self.images if isinstance(prompts, str) else list(prompts)
        return self.backbone.encode_text(texts, negative=negative, size=self.size, clip_skip=self.clip_skip)

    def packed(self, step: Step, layout: Layout) -> Condition:
        """Conditions of a pass joined row by row; kept while they stay the same."""
        if all(isinstance(self.conditions.get(name), Condition) for name in layout.names):
            key = (layout.names, layout.total)
            if key not in self._packed:
                self._packed[key] = _join([step.condition(name) for name in layout.names])
            return self._packed[key]
        return _join([step.condition(name) for name in layout.names])


def _join(parts: list[Condition]) -> Condition:
    if len(parts) == 1:
        return parts[0]
    mask = None
    if any(part.mask is not None for part in parts):
        masks = [p.tokens.new_ones(p.tokens.shape[:2]) if p.mask is None else p.mask for p in parts]
        mask = torch.cat([m.to(parts[0].tokens.dtype) for m in masks])
    pooled = [part.pooled for part in parts if part.pooled is not None]
    time_ids = [part.time_ids for part in parts if part.time_ids is not None]
    return Condition(
        tokens=torch.cat([part.tokens for part in parts]),
        mask=mask,
        pooled=torch.cat(pooled) if pooled else None,
        time_ids=torch.cat(time_ids) if time_ids else None,
    )
