"""Claims: what a control writes, stated before the run, so that two that cannot both hold are found before step one.

A claim says at which sites, in which rows, at which steps, which operand is written, and how. Operations that commute
(streams, residuals, additions) never clash. Those that cannot both hold raise `ConflictError` naming both controls;
those whose order matters are warnings. Nothing is ever skipped silently.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from controlroom.core.errors import ConflictError

if TYPE_CHECKING:
    from controlroom.core.control import Control

Operand = Literal[
    "input",
    "q",
    "k",
    "v",
    "out",
    "feature",
    "skip",
    "condition",
    "base",
    "guidance",
    "prediction",
    "rescale",
    "latents",
    "channels",
    "views",
    "schedule",
]
"""What is written: attention input, queries, keys, values, output; a feature map; skip connections; what a
branch is told; the base combination of predictions; whether there is guidance; the prediction itself; how far it is
rescaled; the latents; the UNet's input channels; the views of the canvas; the share of the schedule that is run."""

Operation = Literal[
    "edit", "affine", "route", "extend", "mix", "stream", "replace", "identity", "add", "own", "descend", "blend", "set"
]


@dataclass(frozen=True)
class Claim:
    """One thing a control writes.

    Attributes:
        operand: what is written.
        operation: how. ``own`` excludes any other writer of the operand; ``route`` excludes another source;
            ``replace``, ``mix`` and ``set`` exclude their like; ``descend`` is a gradient step on the latents.
        sites: names of sites; empty: the operand is not at a site, or all of them.
        branches: rows; empty: all.
        steps: steps; None: those of the control's window.
        source: branch that a route takes the operand from. Two routes from one source agree.
    """

    operand: Operand
    operation: Operation
    sites: frozenset[str] = frozenset()
    branches: frozenset[str] = frozenset()
    steps: frozenset[int] | None = None
    source: str | None = None


@dataclass(frozen=True)
class Claimant:
    """A control with the steps at which it is active and its claims."""

    control: Control
    label: str
    steps: frozenset[int]
    claims: tuple[Claim, ...]


_EXCLUSIVE = {("route", "route"), ("replace", "replace"), ("mix", "mix"), ("set", "set"), ("edit", "edit")}
# Cannot be carried out together although neither replaces the other.
_INCOMPATIBLE = {
    ("extend", "mix"): "a matrix over the layer's own values says nothing about joined ones",
}
# Both hold, but the result depends on which comes first; the engine's order is the one of the text.
_ORDERED = {
    ("affine", "route"): "queries, keys and values are changed first and routed then",
    ("affine", "extend"): "what is joined has been changed before",
    ("edit", "extend"): "what is joined is taken from the edited input if its control comes later in the list",
    ("identity", "route"): "the identity comes last and overrides the routing",
    ("identity", "stream"): "the identity comes last and overrides the stream",
    ("identity", "extend"): "the identity comes last and overrides the joined keys",
    ("mix", "replace"): "the values are mixed first and the stream replaces their sum then",
    ("blend", "descend"): "the descent comes before the step, the blend after it",
    ("blend", "own"): "the blend works on the whole canvas, not on its views",
    ("extend", "route"): "the routed keys and values replace the branch's own; the joined ones stay",
}


def check_claims(claimants: Sequence[Claimant]) -> tuple[str, ...]:
    """Warnings for orders that matter.

    Raises:
        ConflictError: two controls whose claims cannot both hold; the message names both and says what to change.
    """
    warnings: list[str] = []
    for index, first in enumerate(claimants):
        for second in claimants[index + 1 :]:
            for a in first.claims:
                for b in second.claims:
                    warning = _check_pair(first, a, second, b)
                    if warning and warning not in warnings:
                        warnings.append(warning)
    return tuple(warnings)


def _check_pair(first: Claimant, a: Claim, second: Claimant, b: Claim) -> str | None:
    if not _meet(a.sites, b.sites) or not _meet(a.branches, b.branches):
        return None
    steps = (first.steps if a.steps is None else a.steps) & (second.steps if b.steps is None else b.steps)
    if not steps:
        return None
    pair = (min(a.operation, b.operation), max(a.operation, b.operation))
    if a.operand == b.operand:
        reason = None
        if "own" in pair and (pair == ("own", "own") or a.operand != "views"):
            reason = "only one of them can own it"
        elif pair == ("route", "route") and a.source == b.source:
            return f"{first.label} and {second.label} both take {a.operand} from {a.source!r}; they agree."
        elif pair == ("descend", "set"):
            reason = "one of them sets it and the other descends on it"
        elif pair in _EXCLUSIVE:
            reason = "each would replace what the other wrote"
        if reason is not None:
            raise ConflictError(_conflict(first, a, second, b, steps, reason))
    if pair in _INCOMPATIBLE and _same_layer(a, b):
        raise ConflictError(_conflict(first, a, second, b, steps, _INCOMPATIBLE[pair]))
    if pair in _ORDERED and (_same_layer(a, b) or "latents" in (a.operand, b.operand)):
        return f"{first.label} ({a.operation} {a.operand}) with {second.label} ({b.operation} {b.operand}): " + (
            _ORDERED[pair] + "."
        )
    return None


def _conflict(first: Claimant, a: Claim, second: Claimant, b: Claim, steps: Iterable[int], reason: str) -> str:
    steps = sorted(steps)
    where = f" at {len(a.sites & b.sites)} shared layers" if a.sites and b.sites else ""
    remedies = ["remove one of them"]
    if a.operand not in ("condition", "base", "channels", "views"):
        remedies.insert(0, "give them windows that do not meet (start, end)")
    if a.sites or b.sites:
        remedies.insert(0, "give them different layers")
    return (
        f"{first.label} and {second.label} cannot run together: {first.label} wants to {a.operation} the {a.operand}, "
        f"{second.label} to {b.operation} the {b.operand},{where} in steps {steps[0]} to {steps[-1]}; {reason}. "
        f"{', or '.join(remedies).capitalize()}."
    )


def _same_layer(a: Claim, b: Claim) -> bool:
    attention = {"input", "q", "k", "v", "out"}
    return a.operand in attention and b.operand in attention


def _meet(a: frozenset[str], b: frozenset[str]) -> bool:
    return not a or not b or bool(a & b)
