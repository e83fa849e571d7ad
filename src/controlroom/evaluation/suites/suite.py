"""A suite as a typed object: cases to draw, judges that look at them, and the table they end in.

A case is one question (a caption, an edit, a pair) that several *arms* answer: without the control, with it, by another
prompt. All arms of a case share what the comparison must not depend on, the noise above all. Arms that need no drawing
(the theatre's true picture) are `known`; judges look at them alike, so a judge's own error stands beside every number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from controlroom.core.control import describe
from controlroom.core.errors import InputError
from controlroom.core.spec import RunSpec
from controlroom.evaluation.estimates import Estimate

if TYPE_CHECKING:
    from controlroom.sampling.pipeline import Pipeline

Truth = TypeVar("Truth")
Kind = Literal["share", "number"]
Values = Mapping[str, Mapping[str, float | None]]
"""Arm -> measure -> value; None where a measure has no answer. Shares are 0 or 1."""


class SuiteSettings(BaseModel):
    """What every suite can be told; a suite adds its own.

    Raises:
        InputError: an unknown or ill-typed setting; the message names it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    later: ClassVar[frozenset[str]] = frozenset()
    """Settings that came when there were journals already, which were measured with their defaults."""

    model: str = "theatre"
    """A folder, a hub id that has been downloaded, or ``theatre``."""
    steps: int = Field(default=25, ge=1, le=1000)
    guidance_scale: float = 5.0
    seed: int = Field(default=1000, ge=0)
    """Of the noise of case 0; case i has ``seed + i``."""

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise InputError(describe("The suite", error)) from error

    def account(self) -> dict[str, Any]:
        """As plain data, for the account of a measurement; `later` settings only where they are not the default."""
        fields = type(self).model_fields
        unsaid = {name for name in self.later if getattr(self, name) == fields[name].default}
        return self.model_dump(mode="json", exclude=unsaid)


@dataclass(frozen=True)
class Measure:
    """A number that a judge gives.

    Attributes:
        name: its row of the table.
        kind: ``share`` of cases (values are 0 or 1), or ``number``.
        higher: whether higher is better; None: neither is.
        extractor: label of the network it was measured with; "" for none.
        digits: after the point, of a number.
    """

    name: str
    kind: Kind = "number"
    higher: bool | None = True
    extractor: str = ""
    digits: int = 3


@dataclass(frozen=True)
class Arm:
    """One way of answering every case.

    Attributes:
        name: its key.
        title: its column.
        known: it is not drawn; the case knows its picture.
    """

    name: str
    title: str
    known: bool = False


@dataclass(frozen=True)
class Case(Generic[Truth]):
    """One question.

    Attributes:
        number: from 0; its noise is that of ``seed + number``.
        title: what the report says of it.
        truth: what judges compare with.
        specs: drawn arm -> run that draws it, of one picture.
        known: known arm -> its picture, made when it is looked at.
        made: drawn arm that takes more than one run (an inversion, a fit) -> what makes its picture with the model.
    """

    number: int
    title: str
    truth: Truth
    specs: Mapping[str, RunSpec]
    known: Mapping[str, Callable[[], Image.Image]] = field(default_factory=dict)
    made: Mapping[str, Callable[[Pipeline], Image.Image]] = field(default_factory=dict)


@dataclass(frozen=True)
class Shown(Generic[Truth]):
    """A case with the pictures of all its arms."""

    case: Case[Truth]
    pictures: Mapping[str, Image.Image]


class Judge(Protocol[Truth]):
    """Looks at the pictures of cases, one by one.

    Attributes:
        measures: that it gives.
        fingerprint: of everything that its verdict depends on: weights, thresholds.
    """

    fingerprint: str

    @property
    def measures(self) -> Sequence[Measure]: ...

    def __call__(self, shown: Sequence[Shown[Truth]]) -> Sequence[Values]:
        """Values of each case."""
        ...


class SetJudge(Protocol):
    """Compares all pictures of an arm with all of a reference: FID, KID, IS. Its vectors are kept with each case.

    Attributes:
        name: its key among the vectors of a case.
        reference: arm to compare with.
        measures: that it gives.
        fingerprint: of everything that its verdict depends on.
    """

    name: str
    reference: str
    fingerprint: str

    @property
    def measures(self) -> Sequence[Measure]: ...

    def vectors(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Float32 [N, D]: what `compare` needs to know of each picture."""
        ...

    def compare(self, drawn: Tensor, reference: Tensor) -> dict[str, Estimate]:
        """Measure -> value; NaN bounds where it has no interval, and no entry where there are too few pictures."""
        ...


@dataclass(frozen=True)
class Derived:
    """A number of all cases together that no judge gives, such as the share of failures that were repaired."""

    name: str
    kind: Kind
    compute: Callable[[Sequence[Values]], Estimate]


@dataclass(frozen=True)
class Table:
    """How results are shown.

    Attributes:
        baseline, ours: arms whose difference is shown, case by case; None: no differences.
        others: further arms whose difference to the baseline is shown.
        derived: further rows.
        rank: how good a case is for the arm that matters, best last; it chooses the pictures that are shown.
        note: what a reader must know.
    """

    rank: Callable[[Values], tuple[float, ...]]
    baseline: str | None = None
    ours: str | None = None
    derived: tuple[Derived, ...] = ()
    note: str = ""
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suite(Generic[Truth]):
    """A measurement.

    Attributes:
        name: on the command line, and of its files.
        title: what is measured, in one sentence.
        n: number of cases.
        settings: of the drawing.
        arms: in the order of their columns.
        case: number -> case. Cases do not depend on ``n``, so more can be added to what is there.
        judges: of single cases.
        table: how results are shown.
        set_judges: of whole sets.
        per_prompt: fields of controls that are lists with an entry for each prompt, as ``attend_and_excite.words``;
            such runs of consecutive cases are drawn together.
        weights: models that are drawn with beside the base, by name.
        reference: known or drawn arm that other arms' pictures may be compared with; None: there is none.
        world: version of what cases are made of.
    """

    name: str
    title: str
    n: int
    settings: SuiteSettings
    arms: tuple[Arm, ...]
    case: Callable[[int], Case[Truth]]
    judges: tuple[Judge[Truth], ...]
    table: Table
    set_judges: tuple[SetJudge, ...] = ()
    per_prompt: frozenset[str] = frozenset()
    weights: tuple[str, ...] = ()
    reference: str | None = None
    world: str = ""

    def __post_init__(self) -> None:
        every = [measure.name for judge in (*self.judges, *self.set_judges) for measure in judge.measures]
        twice = sorted({name for name in every if every.count(name) > 1})
        if twice:
            raise InputError(f"The suite {self.name!r} has two measures of the name {', '.join(twice)}. Rename one.")

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Of all judges of single cases, in their order."""
        return tuple(measure for judge in self.judges for measure in judge.measures)

    @property
    def compared(self) -> tuple[str, ...]:
        """Drawn arms beside the reference: what is compared with it."""
        return tuple(arm.name for arm in self.arms if not arm.known and arm.name != self.reference)

    def about(self, drawer: str) -> dict[str, Any]:
        """Everything that a case's result depends on, as plain data: what a stopped run must agree with.

        Args:
            drawer: fingerprint of what draws.
        """
        first = self.case(0)
        specs = json.dumps({arm: spec.to_data() for arm, spec in sorted(first.specs.items())}, sort_keys=True)
        return {
            "suite": self.name,
            "settings": self.settings.account(),
            "arms": [arm.name for arm in self.arms],
            "world": self.world,
            "first case": hashlib.sha256(f"{first.title}\n{specs}".encode()).hexdigest()[:16],
            "model": drawer,
            "judges": sorted(judge.fingerprint for judge in (*self.judges, *self.set_judges)),
        }


def fingerprint(about: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of `Suite.about`."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
