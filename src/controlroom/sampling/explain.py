"""What a run will do, printed before it: branches, rows, passes, claims, and which control reaches which branch."""

from __future__ import annotations

from dataclasses import dataclass

from controlroom.core.backbone import Backbone
from controlroom.core.control import implements
from controlroom.core.errors import ControlRoomError
from controlroom.core.plan import Plan


@dataclass(frozen=True)
class Explanation:
    """A plan as data and, with ``str``, as text.

    Attributes:
        rows: rows of the UNet's passes at each step, the main ones and those that additions ask for; passes: their
            number at each step.
        energy_passes: passes with a gradient at each step, at least (controls may ask for more); energy_rows: theirs.
        branches: name, state, rows, steps.
        reach: control -> branches that it acts on.
        claims: control -> what it writes.
        dropped: control -> why it changes nothing.
        warnings: orders that matter.
        notes: what controls chose by themselves, and what their files say.
    """

    rows: tuple[int, ...]
    passes: tuple[int, ...]
    energy_passes: tuple[int, ...]
    branches: tuple[tuple[str, str, int, str], ...]
    reach: dict[str, tuple[str, ...]]
    claims: dict[str, tuple[str, ...]]
    dropped: dict[str, str]
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()
    energy_rows: tuple[int, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.rows)} steps, {sum(self.rows)} UNet rows in {sum(self.passes)} passes"]
        if any(self.energy_passes):
            lines[0] += f", and at least {sum(self.energy_rows)} in {sum(self.energy_passes)} passes with a gradient"
        lines.append("branches:")
        lines += [f"  {name}: {rows} rows of {state}, steps {steps}" for name, state, rows, steps in self.branches]
        if self.reach:
            lines.append("controls reach:")
            lines += [f"  {label}: {', '.join(names) or 'no branch'}" for label, names in self.reach.items()]
        if any(self.claims.values()):
            lines.append("claims:")
            lines += [f"  {label}: {', '.join(items)}" for label, items in self.claims.items() if items]
        lines += [f"dropped: {label}, {why}" for label, why in self.dropped.items()]
        lines += [f"warning: {text}" for text in self.warnings]
        lines += [f"note: {text}" for text in self.notes]
        return "\n".join(lines)


def explain_plan(plan: Plan, backbone: Backbone | None = None) -> Explanation:
    """Read a plan; with the network also the files that its controls name, where they have something to say."""
    remarks: tuple[str, ...] = ()
    try:
        remarks = () if backbone is None else plan.remarks(backbone)
    except ControlRoomError as error:
        remarks = (f"the run would stop here: {error}",)
    rows, passes, energies, energy_rows = [], [], [], []
    for i in range(plan.n):
        layouts = [*plan.passes(plan.running(i))]
        asked = [entry for entry in plan.active(i) for _ in range(entry.declaration.probe_passes.get(i, 1))]
        for entry in asked:
            layouts += plan.passes(plan.closure(entry.declaration.probes))
        rows.append(sum(layout.total for layout in layouts))
        passes.append(len(layouts))
        needs = [e.declaration.energy for e in plan.active(i) if e.declaration.energy is not None]
        due = [need for need in needs if need.steps is None or i in need.steps]
        # One pass serves all controls that need a gradient.
        names = dict.fromkeys(name for need in due for name in need.branches)
        carried = plan.passes(plan.closure(tuple(names))) if due else ()
        energies.append(len(carried))
        energy_rows.append(sum(layout.total for layout in carried))
    branches = tuple(
        (name, branch.state, plan.rows_of(name), _range([i for i in range(plan.n) if name in plan.running(i)]))
        for name, branch in plan.branches.items()
    )
    reach, claims = {}, {}
    for entry in plan.controls:
        acts = any(implements(entry.control, hook) for hook in ("side", "attention", "feature"))
        if acts:
            named = frozenset().union(*(claim.branches for claim in entry.declaration.claims), frozenset())
            found = tuple(
                name
                for name, branch in plan.branches.items()
                if (name in named if named else entry.control.reaches(branch))
            )
            reach[entry.label] = found
        claims[entry.label] = tuple(
            dict.fromkeys(
                f"{claim.operation} {claim.operand}"
                + (f" at {len(claim.sites)} layers" if claim.sites else "")
                + (f" from {claim.source}" if claim.source else "")
                for claim in entry.declaration.claims
            )
        )
    return Explanation(
        rows=tuple(rows),
        passes=tuple(passes),
        energy_passes=tuple(energies),
        branches=branches,
        reach=reach,
        claims=claims,
        dropped=dict(plan.dropped),
        warnings=plan.warnings,
        notes=(*plan.notes, *remarks),
        energy_rows=tuple(energy_rows),
    )


def _range(steps: list[int]) -> str:
    if not steps:
        return "none"
    if steps == list(range(steps[0], steps[-1] + 1)):
        return f"{steps[0]} to {steps[-1]}"
    return ", ".join(str(i) for i in steps)
