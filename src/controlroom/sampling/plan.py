"""The planner: asks every control what it needs, drops those that change nothing, and checks them against each other.

Nothing is loaded or computed here, so `explain` can print a plan before a run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from controlroom.core.branch import IMAGE, Branch, State
from controlroom.core.claims import Claim, Claimant, check_claims
from controlroom.core.control import Control, Declaration, Outline, implements
from controlroom.core.errors import ConflictError, InputError, ModelError
from controlroom.core.plan import Plan, PlannedControl


def make_plan(
    outline: Outline,
    controls: Sequence[Control],
    in_channels: int,
    steps_for: Callable[[float], int] | None = None,
) -> Plan:
    """Plan a run.

    Args:
        outline: what is known before it.
        controls: in the caller's order.
        in_channels: input channels of the UNet.
        steps_for: strength -> number of steps, for controls that run a share of the schedule.

    Raises:
        ConflictError: two controls that cannot run together.
        InputError: a control that fits nothing in this network, or a run without steps.
        ModelError: the network wants input channels that no control supplies.
    """
    labels = _labels(controls)
    kept = [(control, label) for control, label in zip(controls, labels, strict=True)]
    strength, declarations = None, _declare(kept, outline)
    for (_, label), declaration in zip(kept, declarations, strict=True):
        if declaration.strength is not None:
            if strength is not None:
                raise ConflictError(f"{label} and another control both choose a share of the schedule. Keep one.")
            strength = declaration.strength
    if strength is not None:
        if steps_for is None:
            raise InputError("This run has a fixed schedule; a control with a strength cannot change it.")
        outline = replace(outline, steps=steps_for(strength))
        if outline.steps < 1:
            raise InputError(f"strength={strength} leaves no step to run. Raise strength or num_inference_steps.")
    dropped = tuple((label, _why(control, outline.steps)) for control, label in kept if control.neutral(outline.steps))
    gone = {label for label, _ in dropped}
    acting = [entry for entry in kept if entry[1] not in gone]
    planned = tuple(
        PlannedControl(control, label, declaration, control.window(outline.steps))
        for (control, label), declaration in zip(acting, _declare(acting, outline), strict=True)
    )
    if strength is not None and not any(entry.declaration.strength is not None for entry in planned):
        strength = None
    return _assemble(outline, planned, dropped, in_channels, strength)


def _declare(entries: Sequence[tuple[Control, str]], outline: Outline) -> list[Declaration]:
    return [Declaration() if control.neutral(outline.steps) else control.declare(outline) for control, _ in entries]


def _labels(controls: Sequence[Control]) -> list[str]:
    """Class names; with a number where there are several of one kind."""
    if len({id(control) for control in controls}) != len(controls):
        raise InputError("The same control object stands in the list twice. Make two of it.")
    totals, seen = Counter(control.label for control in controls), Counter()
    labels = []
    for control in controls:
        seen[control.label] += 1
        labels.append(f"{control.label} {seen[control.label]}" if totals[control.label] > 1 else control.label)
    return labels


def _why(control: Control, n: int) -> str:
    if not control.window(n):
        return f"no step of {n} lies in its window"
    return "its scale is 0" if hasattr(control, "scale") else "it changes nothing"


def _assemble(
    outline: Outline,
    planned: tuple[PlannedControl, ...],
    dropped: tuple[tuple[str, str], ...],
    in_channels: int,
    strength: float | None,
) -> Plan:
    states = {IMAGE: State(IMAGE)}
    branches: dict[str, Branch] = {}
    owners: dict[str, int] = {}
    if outline.guided:
        branches["uncond"] = Branch("uncond", role="uncond", purpose="picture")
    branches["cond"] = Branch("cond", role="cond", purpose="picture")
    for index, entry in enumerate(planned):
        for state in entry.declaration.states:
            _add(states, state.name, state, entry.label, "state")
        for branch in entry.declaration.branches:
            _add(branches, branch.name, branch, entry.label, "branch")
            owners[branch.name] = index
    views = next((entry.declaration.views for entry in planned if entry.declaration.views is not None), None)
    plan = Plan(
        outline=outline,
        controls=planned,
        dropped=dropped,
        states=states,
        branches=branches,
        owners=owners,
        warnings=check_claims([_claimant(entry) for entry in planned]),
        views=views,
        strength=strength,
        channels=sum(entry.declaration.channels for entry in planned),
    )
    _check_branches(plan)
    _check_channels(plan, in_channels)
    return plan


def _add(table: dict, name: str, value: State | Branch, label: str, what: str) -> None:
    if name in table:
        raise ConflictError(
            f"{label} declares the {what} {name!r}, which exists already. Remove one of the two controls."
        )
    table[name] = value


def _claimant(entry: PlannedControl) -> Claimant:
    """A control's claims, and those that follow from what it declares."""
    declaration, claims = entry.declaration, list(entry.declaration.claims)
    if declaration.views is not None:
        claims.append(Claim("views", "own"))
    if declaration.strength is not None:
        claims.append(Claim("schedule", "own"))
    if declaration.channels:
        claims.append(Claim("channels", "own"))
    if implements(entry.control, "combine"):
        claims.append(Claim("base", "own"))
    return Claimant(entry.control, entry.label, entry.steps, tuple(claims))


def _check_branches(plan: Plan) -> None:
    for name, branch in plan.branches.items():
        if branch.state not in plan.states:
            raise InputError(f"Branch {name!r} reads the state {branch.state!r}, which no control declares.")
        for need in branch.needs:
            if need not in plan.branches:
                raise InputError(
                    f"Branch {name!r} needs the branch {need!r}, which this run does not have"
                    + (" (guidance_scale is at most 1)." if need.endswith("uncond") else ".")
                )
        pairs = [(name, need) for need in branch.needs]
        pairs += [(reader, name) for reader in branch.read_by if reader in plan.branches]
        for reader, read in pairs:
            weights = plan.branches[reader].weights, plan.branches[read].weights
            if plan.hw_of(reader) != plan.hw_of(read) or weights[0] != weights[1]:
                raise ConflictError(
                    f"Branch {reader!r} reads features of {read!r}, but they are of different sizes or weights and "
                    "cannot share a pass. Use pictures of one size, and no views of the canvas beside them."
                )
    for entry in plan.controls:
        energy = entry.declaration.energy
        missing = [] if energy is None else [b for b in energy.branches if b not in plan.branches]
        if missing:
            raise InputError(f"{entry.label} needs the branches {missing}, which this run does not have.")


def _check_channels(plan: Plan, in_channels: int) -> None:
    have = plan.outline.latent[0] + plan.channels
    if have != in_channels:
        hint = (
            "It is a checkpoint for inpainting, editing or depth: add the control it belongs to (Inpaint, "
            "InstructPix2Pix, DepthToImage)."
            if have < in_channels
            else "Load the checkpoint that this control belongs to."
        )
        raise ModelError(f"The network reads {in_channels} channels, the run supplies {have}. {hint}")
