"""Claims: what cannot hold together is an error that names both; what only has an order is a warning."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import Field

from controlroom.core.claims import Claim, Claimant, check_claims
from controlroom.core.control import Control, Outline, window_steps
from controlroom.core.errors import ConflictError, InputError
from controlroom.core.sites import Site


class Anything(Control):
    type: Literal["anything"] = Field(default="anything", kw_only=True)
    scale: float | list[float] | dict[str, float] = 1.0
    start: float = 0.0
    end: float = 1.0


def claimant(label: str, *claims: Claim, steps: range = range(10)) -> Claimant:
    return Claimant(Anything(), label, frozenset(steps), claims)


A, B = frozenset({"layer.a"}), frozenset({"layer.b"})


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (Claim("k", "route", A, source="x"), Claim("k", "route", A, source="y")),
        (Claim("k", "route", source="x"), Claim("k", "route", A, source="y")),
        (Claim("out", "replace", A), Claim("out", "replace", A)),
        (Claim("v", "mix", A), Claim("v", "mix", A)),
        (Claim("v", "mix", A), Claim("k", "extend", A)),
        (Claim("base", "own"), Claim("base", "own")),
        (Claim("channels", "own"), Claim("channels", "own")),
        (Claim("views", "own"), Claim("views", "own")),
        (Claim("latents", "set"), Claim("latents", "descend")),
    ],
)
def test_conflicts_name_both_and_a_remedy(one: Claim, two: Claim) -> None:
    for first, second in ((one, two), (two, one)):
        with pytest.raises(ConflictError, match=r"Alpha and Beta cannot run together.*[Rr]emove one of them"):
            check_claims([claimant("Alpha", first), claimant("Beta", second)])


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (Claim("out", "stream", A), Claim("out", "stream", A)),
        (Claim("skip", "add"), Claim("skip", "add")),
        (Claim("prediction", "add"), Claim("prediction", "add")),
        (Claim("k", "route", A, source="x"), Claim("k", "route", B, source="y")),
        (Claim("k", "route", A, source="x"), Claim("q", "route", A, source="y")),
        (Claim("k", "route", A, frozenset({"cond"}), source="x"), Claim("k", "route", A, frozenset({"u"}), source="y")),
        (Claim("latents", "descend"), Claim("latents", "descend")),
    ],
)
def test_what_commutes_or_does_not_meet_is_silent(one: Claim, two: Claim) -> None:
    assert check_claims([claimant("Alpha", one), claimant("Beta", two)]) == ()


def test_windows_that_do_not_meet_are_no_conflict() -> None:
    route = [Claim("k", "route", A, source=name) for name in "xy"]
    early, late = claimant("Alpha", route[0], steps=range(5)), claimant("Beta", route[1], steps=range(5, 10))
    assert check_claims([early, late]) == ()
    with pytest.raises(ConflictError, match="steps 4 to 4"):
        check_claims([early, claimant("Beta", route[1], steps=range(4, 10))])


@pytest.mark.parametrize(
    ("one", "two", "text"),
    [
        (Claim("q", "affine", A), Claim("q", "route", A, source="x"), "changed first and routed"),
        (Claim("out", "identity", A), Claim("out", "stream", A), "identity comes last"),
        (Claim("latents", "blend"), Claim("views", "own"), "whole canvas"),
        (Claim("k", "route", A, source="x"), Claim("k", "route", A, source="x"), "they agree"),
    ],
)
def test_orders_that_matter_are_warnings(one: Claim, two: Claim, text: str) -> None:
    (warning,) = check_claims([claimant("Alpha", one), claimant("Beta", two)])
    assert text in warning and "Alpha" in warning and "Beta" in warning


@pytest.mark.parametrize("n", [1, 7, 10, 50])
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.2, 0.8), (0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (0.3, 0.31)])
def test_window_is_diffusers_rule(n: int, start: float, end: float) -> None:
    keep = [1.0 - float(i / n < start or (i + 1) / n > end) for i in range(n)]
    assert window_steps(n, start, end) == {i for i in range(n) if keep[i]}


@pytest.mark.parametrize(
    ("settings", "neutral"),
    [
        ({}, False),
        ({"scale": 0}, True),
        ({"scale": 1e-4}, False),
        ({"scale": [0.0, 0.0]}, True),
        ({"scale": [0.0, 1.0]}, False),
        ({"scale": {"up": 0.0}}, True),
        ({"start": 1.0}, True),
        ({"start": 0.4, "end": 0.45}, True),
    ],
)
def test_neutral(settings: dict, neutral: bool) -> None:
    assert Anything(**settings).neutral(10) is neutral


def test_sites_that_are_not_there_are_an_error() -> None:
    site = Site("mid", "self", "mid", 0, 4, (8, 8), 32)
    outline = Outline("sd1", 1, 10, (4, 16, 16), True, (site,), (), ("cat",))
    assert outline.sites("self", min_index=4) == (site,)
    assert outline.sites("self", max_tokens=64) == outline.sites("self", tokens=64) == (site,)
    for narrowed in ({"min_index": 5}, {"places": ("up",)}, {"tokens": 256}, {"max_tokens": 63}, {"max_index": 3}):
        with pytest.raises(InputError, match="Choose other layers"):
            outline.sites("self", **narrowed)  # type: ignore[arg-type]
