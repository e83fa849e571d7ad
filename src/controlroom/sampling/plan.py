"""The planner: asks every control what it needs, drops those that change nothing, and checks them against each other.

Nothing is loaded or computed here, so `explain` can print a plan before a run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from controlroom.core.branch import IMAGE, Branch, State
from controlroom.core.claims import Claim, Claimant, check_claims
from controlroom.core.control import Control, Declaration, Outline, implements
from controlroom.core.errors import ConflictError, InputError, ModelError
from controlroom.core.plan import Plan, PlannedControl
from controlroom.core.sites import Site


def make_plan(
    outline: Outline,
    controls: Sequence[Control],
    in_channels: int,
    steps_for: Callable[[float], int] | None = None,
    sites_for: Callable[[tuple[int, int]], tuple[tuple[Site, ...], tuple[Site, ...]]] | None = None,
) -> Plan:
    """Plan a run.

    Args:
        outline: what is known before it.
        controls: in the caller's order.
        in_channels: input channels of the UNet.
        steps_for: strength -> number of steps, for controls that run a share of the schedule.
        sites_for: latent size -> attention and feature sites, for controls that show the network a part of the canvas.

    Raises:
        ConflictError: two controls that cannot run together.
        InputError: a control that fits nothing in this network, or a run without steps.
        ModelError: the network wants input channels that no control supplies.
    """
    labels = _labels(controls)
    kept = [(control, label) for control, label in zip(controls, labels, strict=True)]
    declarations = _declare(kept, outline)
    views = _only(kept, declarations, "views", "choose how the canvas is seen")
    if views is not None and sites_for is not None:
        attention, features = sites_for(views.hw)
        outline = replace(outline, view=views.hw, attention=attention, features=features)
    strength = _only(kept, declarations, "strength", "choose a share of the schedule")
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
        PlannedControl(control, label, declaration, type(control).window(control, outline.steps))
        for (control, label), declaration in zip(acting, _declare(acting, outline), strict=True)
    )
    for what, chosen in (("strength", strength), ("views", views)):
        if chosen is not None and not any(getattr(entry.declaration, what) is not None for entry in planned):
            raise InputError(
                f"With {outline.steps} steps to run no step lies in the window of the control that chose the {what}. "
                "Widen its window, or remove it."
            )
    return _assemble(outline, planned, dropped, in_channels, strength)


def _declare(entries: Sequence[tuple[Control, str]], outline: Outline) -> list[Declaration]:
    return [Declaration() if control.neutral(outline.steps) else control.declare(outline) for control, _ in entries]


def _only(entries: Sequence[tuple[Control, str]], declarations: Sequence[Declaration], what: str, verb: str) -> Any:
    """What at most one control may declare; None where none does."""
    found = [
        (label, value)
        for (_, label), declaration in zip(entries, declarations, strict=True)
        if (value := getattr(declaration, what)) is not None
    ]
    if len(found) > 1:
        raise ConflictError(f"{' and '.join(label for label, _ in found)} cannot run together: they {verb}. Keep one.")
    return found[0][1] if found else None


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
    if not type(control).window(control, n):
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
    holders: dict[tuple[str, str], str] = {}
    if outline.guided:
        branches["uncond"] = Branch("uncond", role="uncond", purpose="picture")
    branches["cond"] = Branch("cond", role="cond", purpose="picture")
    for index, entry in enumerate(planned):
        for state in entry.declaration.states:
            _add(states, state.name, state, entry.label, "state", holders)
        for branch in entry.declaration.branches:
            _add(branches, branch.name, branch, entry.label, "branch", holders)
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
    _check_views(plan)
    _check_channels(plan, in_channels)
    return plan


def _add(table: dict, name: str, value: Any, label: str, what: str, holders: dict[tuple[str, str], str]) -> None:
    """Enter a state or branch under its name; ``holders`` says which control a name is taken by."""
    if name in table:
        holder = holders.get((what, name))
        if holder is None:
            raise ConflictError(f"{label} declares the {what} {name!r}, which every run has. Remove the control.")
        raise ConflictError(
            f"{holder} and {label} cannot run together: both declare the {what} {name!r}. Remove one of them."
        )
    table[name] = value
    holders[what, name] = label


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
            if plan.hw_of(reader) != plan.hw_of(read) or plan.network_of(reader) != plan.network_of(read):
                labels = {plan.label_of(reader), plan.label_of(read)} - {None}
                labels |= {e.label for e in plan.controls if e.declaration.views is not None}
                raise ConflictError(
                    f"Branch {reader!r} reads features of {read!r}, but they are of different sizes or weights and "
                    f"cannot share a pass ({', '.join(sorted(map(str, labels)))}). Use pictures of one size, and no "
                    "views of the canvas beside them."
                )
    for entry in plan.controls:
        energy = entry.declaration.energy
        missing = [] if energy is None else [b for b in energy.branches if b not in plan.branches]
        if missing:
            raise InputError(f"{entry.label} needs the branches {missing}, which this run does not have.")


def _check_views(plan: Plan) -> None:
    """Views in several passes are for controls that keep nothing of a pass."""
    owner = next((entry for entry in plan.controls if entry.declaration.view_batch is not None), None)
    if owner is None or len(plan.parts) == 1:
        return
    for entry in plan.controls:
        inside = any(implements(entry.control, hook) for hook in ("attention", "feature", "side"))
        if inside and not entry.control.by_views:
            raise ConflictError(
                f"{owner.label} and {entry.label} cannot run together with view_batch_size="
                f"{owner.declaration.view_batch}: {entry.label} works on all views of the canvas at once. Leave "
                "view_batch_size out, or use larger windows or strides."
            )


def _check_channels(plan: Plan, in_channels: int) -> None:
    have = plan.outline.latent[0] + plan.channels
    if have == in_channels:
        return
    named = [e for e in plan.controls if e.declaration.channels and e.declaration.checkpoint]
    if named:
        hint = " ".join(f"{e.label} needs {e.declaration.checkpoint}." for e in named)
    elif have < in_channels:
        hint = (
            "It is a checkpoint for inpainting, editing or depth: add the control it belongs to (Inpaint, "
            "InstructPix2Pix, DepthToImage)."
        )
    else:
        hint = "Load the checkpoint that this control belongs to."
    raise ModelError(f"The network reads {in_channels} channels, the run supplies {have}. {hint}")
