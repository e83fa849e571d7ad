"""The plan of a run: which controls act, which branches and states exist, and which rows go into which pass.

Everything here is known before the run; `controlroom.sampling.plan` builds it and ``explain`` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from controlroom.core.backbone import Backbone
from controlroom.core.branch import IMAGE, Branch, Layout, State, Views, ViewsPart
from controlroom.core.control import Control, Declaration, Outline


@dataclass(frozen=True)
class PlannedControl:
    """A control that acts in the run."""

    control: Control
    label: str
    declaration: Declaration
    steps: frozenset[int]


@dataclass(frozen=True)
class Plan:
    """What will happen.

    Attributes:
        outline: what the controls were told.
        controls: those that act, in the caller's order.
        dropped: label and reason of those that would change nothing.
        states: by name; ``image`` first.
        branches: by name, in the order of their rows.
        owners: name of a branch -> index of the control that declared it; absent for ``uncond`` and ``cond``.
        warnings: orders that matter.
        views: how the canvas is seen, or None.
        strength: share of the schedule that is run.
        channels: input channels that a control supplies.
    """

    outline: Outline
    controls: tuple[PlannedControl, ...]
    dropped: tuple[tuple[str, str], ...]
    states: dict[str, State]
    branches: dict[str, Branch]
    owners: dict[str, int]
    warnings: tuple[str, ...] = ()
    views: Views | None = None
    strength: float | None = None
    channels: int = 0
    _layouts: dict[frozenset[str], tuple[Layout, ...]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def wrap(self) -> int:
        """Latent columns by which the picture is continued around its edges for decoding."""
        return max((entry.declaration.wrap for entry in self.controls), default=0)

    @cached_property
    def parts(self) -> tuple[Plan, ...]:
        """The plan for some of the views at a time, in their order; only itself where all go through at once."""
        batch = next((e.declaration.view_batch for e in self.controls if e.declaration.view_batch is not None), None)
        if self.views is None or batch is None or batch >= self.views.count:
            return (self,)
        starts = range(0, self.views.count, batch)
        sizes = [min(batch, self.views.count - start) for start in starts]
        views = [ViewsPart(self.views, start, size) for start, size in zip(starts, sizes, strict=True)]
        return tuple(replace(self, views=part, _layouts={}) for part in views)

    def passes(self, names: tuple[str, ...]) -> tuple[Layout, ...]:
        """Passes for these branches, those over a part of the views each for itself."""
        if len(self.parts) == 1:
            return self.layouts(names)
        seen = tuple(name for name in names if self.branches[name].state == IMAGE)
        rest = tuple(name for name in names if name not in seen)
        return (*(layout for part in self.parts for layout in part.layouts(seen)), *self.layouts(rest))

    @property
    def notes(self) -> tuple[str, ...]:
        """What controls chose by themselves, each with the label of its control."""
        return tuple(f"{entry.label}: {note}" for entry in self.controls for note in entry.declaration.notes)

    def remarks(self, backbone: Backbone) -> tuple[str, ...]:
        """What the files of the controls say, each with the label of its control.

        Raises:
            ModelError: one cannot be read.
        """
        return tuple(f"{entry.label}: {text}" for entry in self.controls for text in entry.control.remarks(backbone))

    @property
    def n(self) -> int:
        """Number of steps."""
        return self.outline.steps

    @cached_property
    def indices(self) -> dict[int, int]:
        """Identity of a control -> its index in `controls`."""
        return {id(entry.control): index for index, entry in enumerate(self.controls)}

    def active(self, i: int) -> tuple[PlannedControl, ...]:
        """Controls whose window holds step i, in the caller's order."""
        return tuple(entry for entry in self.controls if i in entry.steps)

    def rows_of(self, branch: str) -> int:
        """Number of rows of a branch: those of its state, times the views of the canvas."""
        state = self.states[self.branches[branch].state]
        rows = self.outline.images if state.rows is None else state.rows
        return rows * self.views.count if self.views is not None and state.name == IMAGE else rows

    def hw_of(self, branch: str) -> tuple[int, int]:
        """Latent height and width of a branch's rows."""
        state = self.states[self.branches[branch].state]
        if self.views is not None and state.name == IMAGE:
            return self.views.hw
        return state.hw or self.outline.latent[1:]

    def network_of(self, branch: str) -> tuple[int | None, str]:
        """The weights a branch runs with: a tag means what the control that declared the branch says."""
        weights = self.branches[branch].weights
        return (None if weights == "base" else self.owners[branch]), weights

    def label_of(self, branch: str) -> str | None:
        """Label of the control that declared a branch; None for those of every run."""
        return self.controls[self.owners[branch]].label if branch in self.owners else None

    @cached_property
    def unguided(self) -> frozenset[int]:
        """Steps at which the prediction with the prompt is not guided."""
        return frozenset().union(*(entry.declaration.unguided for entry in self.controls))

    def rescale(self, i: int) -> float:
        """How far a control asks to rescale guidance at step i; 0: none does, or there is no guidance."""
        asked = [entry.declaration.rescale for entry in self.active(i)]
        return max(asked, default=0.0) if i not in self.unguided else 0.0

    def running(self, i: int) -> tuple[str, ...]:
        """Branches that run at step i, in the order of their rows."""
        names = tuple(name for name in self.branches if self._runs(name, i))
        if i not in self.unguided:
            return names
        # Nobody asks for predictions without the prompt, except who says so, nor for references only they read.
        kept = [name for entry in self.active(i) for name in entry.declaration.keeps if name in names]
        wanted = set(self.closure(tuple(name for name in names if name in kept or not self._guides(name))))
        return tuple(name for name in names if name in wanted or wanted & set(self.branches[name].read_by))

    def _guides(self, name: str) -> bool:
        """Whether a branch serves nothing but guidance: it is without the prompt, or only such branches read it."""
        branch = self.branches[name]
        readers = [self.branches[reader].role for reader in branch.read_by if reader in self.branches]
        return branch.role == "uncond" or (branch.role == "extra" and bool(readers) and set(readers) == {"uncond"})

    def _runs(self, name: str, i: int) -> bool:
        branch = self.branches[name]
        if branch.steps is not None:
            return i in branch.steps
        owner = self.owners.get(name)
        solved = self.states[branch.state].advance == "solver" and branch.state != IMAGE
        return owner is None or solved or i in self.controls[owner].steps

    def closure(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The branches and all that they need, in the order of their rows."""
        wanted = set(names)
        frontier = list(names)
        while frontier:
            for need in self.branches[frontier.pop()].needs:
                if need not in wanted:
                    wanted.add(need)
                    frontier.append(need)
        return tuple(name for name in self.branches if name in wanted)

    def layouts(self, names: tuple[str, ...]) -> tuple[Layout, ...]:
        """Passes for these branches: one for each pair of weights and latent size, rows as static slices."""
        key = frozenset(names)
        if key not in self._layouts:
            groups: dict[tuple[tuple[int | None, str], tuple[int, int]], list[str]] = {}
            for name in self.branches:
                if name in key:
                    groups.setdefault((self.network_of(name), self.hw_of(name)), []).append(name)
            packs = (Layout((name, self.rows_of(name)) for name in group) for group in groups.values())
            self._layouts[key] = tuple(packs)
        return self._layouts[key]
