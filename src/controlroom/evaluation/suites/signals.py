"""How right the theatre's dense reader is: its own error, which stands beside every condition it re-reads.

Held-out scenes in every style. The reader sees the true picture, and the same through the autoencoder, as everything
that is drawn comes out of it; both are compared with the truth. Soft edges count as edges above one half.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.conditions import condition
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import Mix, Scene, sample_scene
from controlroom.data.theatre.vocabulary import STYLES, WORLD_VERSION
from controlroom.evaluation.condition_match import MATCHES, condition_match
from controlroom.evaluation.extractor import content_hash
from controlroom.evaluation.suites.inversion import AUTOENCODER, reconstructed
from controlroom.evaluation.suites.suite import Arm, Case, Measure, Shown, Suite, SuiteSettings, Table, Values
from controlroom.signals.dense_reader import DenseReader, DenseSignal, theatre_dense_reader
from controlroom.signals.normal import Normal
from controlroom.signals.signal import Signal

TRUE = "truth"
KINDS = ("depth", "normal", "segmentation", "soft_edge")
FIRST_SCENE = 40_000
"""Of the held-out scenes; the recipe's validation looks at the first few."""


class Settings(SuiteSettings):
    """Which scenes are shown."""

    style: Literal["", "flat", "sketch", "watercolour", "pixel", "neon"] = ""
    """Only scenes of this style; "": of all, in equal shares."""


class DenseJudge:
    """What the reader finds in every picture, against the truth of its scene."""

    def __init__(self, reader: DenseReader) -> None:
        label = f"theatre-dense@{content_hash(reader)}"
        depth = DenseSignal("depth", reader, recognise=False)
        self.signals: dict[str, Signal] = {
            "depth": depth,
            "normal": Normal(depth, recognise=False),
            "segmentation": DenseSignal("segmentation", reader, recognise=False),
            "soft_edge": DenseSignal("soft_edge", reader, recognise=False),
        }
        self.fingerprint = f"signals {label}"
        self.measures = tuple(
            Measure(
                f"{kind}: {MATCHES[kind]}",
                higher=kind != "normal",
                extractor=label,
                digits=1 if kind == "normal" else 3,
            )
            for kind in KINDS
        )

    def __call__(self, shown: Sequence[Shown[Scene]]) -> Sequence[Values]:
        found: list[Values] = []
        for one in shown:
            row: dict[str, dict[str, float | None]] = {}
            for arm, picture in one.pictures.items():
                row[arm] = {
                    measure.name: condition_match(
                        self.signals[kind](picture), condition(one.case.truth, kind, picture.width)
                    )
                    for kind, measure in zip(KINDS, self.measures, strict=True)
                }
            found.append(row)
        return found


def build(settings: Settings, n: int, reader: DenseReader | None = None) -> Suite[Scene]:
    """The suite of ``n`` held-out scenes.

    Raises:
        ModelError: the theatre's dense reader is not in this installation.
    """
    styles = (settings.style,) if settings.style else STYLES
    mixes = {style: Mix(styles={style: 1.0}) for style in styles}
    judge = DenseJudge(reader or theatre_dense_reader())

    def case(number: int) -> Case[Scene]:
        scene = sample_scene(FIRST_SCENE + number, "held_out", mixes[styles[number % len(styles)]])
        return Case(
            number,
            full_caption(scene),
            scene,
            {},
            {TRUE: lambda: render(scene)},
            {AUTOENCODER: lambda pipe: reconstructed(pipe, render(scene))},
        )

    def rank(values: Values) -> tuple[float, ...]:
        return tuple(values[TRUE][measure.name] or 0.0 for measure in (judge.measures[2], judge.measures[0]))

    return Suite(
        name="signals",
        title="What the dense reader finds in true pictures",
        n=n,
        settings=settings,
        arms=(Arm(TRUE, "true picture", known=True), Arm(AUTOENCODER, "through the autoencoder")),
        case=case,
        judges=(judge,),
        table=Table(rank=rank, note="Depth and normals, parts and soft edges of held-out scenes, against the truth."),
        reference=TRUE,
        world=WORLD_VERSION,
    )
