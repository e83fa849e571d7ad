"""Whether a weight on a word makes its attribute more or less frequent: one word of a caption at five weights.

Captions are those of the suite ``captions``: one puppet with everything said. The word that is weighed takes turns
between the attributes that the checkpoint shows neither always nor never: hair colour, pattern of the top, kind of the
lower garment, and the hat. All weights of a caption are drawn from the same noise; the weight of 1 is the prompt alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from controlroom.controls.guidance.prompt_weighting import PromptWeighting
from controlroom.controls.prompt_notation import Dialect
from controlroom.core.errors import InputError
from controlroom.core.spec import RunSpec
from controlroom.data.theatre.attributes import attributes
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import Scene, sample_scene
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.evaluation.estimates import Estimate, mean
from controlroom.evaluation.extractor import content_hash
from controlroom.evaluation.extractors.theatre import theatre_reader
from controlroom.evaluation.suites.suite import Arm, Case, Derived, Measure, Shown, Suite, SuiteSettings, Table, Values
from controlroom.evaluation.theatre_quality import CORE_MIX, JUDGED
from controlroom.signals.readers import AttributeReader

SHOWN, OTHERS, TRUE = "weighted attribute shown", "other attributes right", "truth"
ATTRIBUTES = ("hair colour", "top pattern", "lower", "hat")
KNOWN = (*ATTRIBUTES, "hair length", "top colour")
FIRST_SCENE = 30_000


class WeighedSettings(SuiteSettings):
    """What is weighed, and how much."""

    weights: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5)
    attributes: tuple[str, ...] = ATTRIBUTES
    """Of which each caption weighs one, in turn."""

    def checked(self) -> list[float]:
        """The weights in their order.

        Raises:
            InputError: weights or attributes that cannot be used.
        """
        weights = sorted(set(self.weights))
        if 1.0 not in weights or len(weights) < 2 or weights[0] <= 0:
            raise InputError(f"weights are two or more above 0, and 1 among them; got {list(self.weights)}.")
        if not self.attributes or not set(self.attributes) <= set(KNOWN):
            raise InputError(f"attributes are some of {', '.join(KNOWN)}; got {list(self.attributes)}.")
        return weights


class Settings(WeighedSettings):
    """The notation too."""

    dialect: Dialect = "a1111"


@dataclass(frozen=True)
class Weighed:
    """A scene and the attribute whose word is weighed."""

    scene: Scene
    attribute: str


class WeightJudge:
    """Whether the weighed attribute is shown, and how many of the others are right."""

    def __init__(self, reader: AttributeReader) -> None:
        self.reader = reader
        label = f"theatre-attributes@{content_hash(reader)}"
        self.fingerprint = f"weighted attribute {label}"
        self.measures = (Measure(SHOWN, "share", extractor=label), Measure(OTHERS, extractor=label))

    def __call__(self, shown: Sequence[Shown[Weighed]]) -> Sequence[Values]:
        found: list[dict[str, dict[str, float | None]]] = [{} for _ in shown]
        for arm in shown[0].pictures:
            answers = self.reader.read([one.pictures[arm] for one in shown])
            for row, one, read in zip(found, shown, answers, strict=True):
                truth, weighed = attributes(one.case.truth.scene), one.case.truth.attribute
                others = [read[q] == truth[q] for q in JUDGED if q != weighed and truth[q] is not None]
                row[arm] = {SHOWN: float(read[weighed] == truth[weighed]), OTHERS: float(np.mean(others))}
        return found


def arm_of(weight: float) -> str:
    """Name of the arm of a weight."""
    return f"{weight:g}"


def weighed_scene(number: int, chosen: Sequence[str]) -> Weighed:
    """A held-out scene whose caption has a word for the attribute that is its turn."""
    attribute = chosen[number % len(chosen)]
    for attempt in range(1000):
        scene = sample_scene(FIRST_SCENE + number * 1000 + attempt, "held_out", CORE_MIX)
        if attributes(scene)[attribute] not in (None, "none", "plain") and full_caption(scene) != weighted(
            scene, attribute, 1.5, "a1111"
        ):
            return Weighed(scene, attribute)
    raise InputError(f"No caption says the {attribute}.")


def weighted(scene: Scene, attribute: str, weight: float, dialect: Dialect) -> str:
    """The full caption with the attribute's word in the notation; without its word, the caption.

    >>> from controlroom.evaluation.theatre_quality import scenes_of
    >>> weighted(scenes_of(CORE_MIX, 1)[0], "hair colour", 1.5, "a1111")  # doctest: +ELLIPSIS
    '...(...:1.5) hair...'
    """
    text = full_caption(scene)
    word, said = phrase(scene, attribute)
    if weight == 1 or text.count(f" {said}") != 1:
        return text
    noted = f"({word}:{weight:g})" if dialect == "a1111" else f"({word}){weight:g}"
    return text.replace(f" {said}", f" {said.replace(word, noted, 1)}")


def phrase(scene: Scene, attribute: str) -> tuple[str, str]:
    """The word that says an attribute of the puppet, and the words of the full caption around it."""
    one = scene.puppets[0].identity
    top = one.top.kind if one.top.pattern == "plain" else f"{one.top.pattern} {one.top.kind}"
    return {
        "hair colour": (one.hair_colour, f"{one.hair_colour} hair"),
        "hair length": (one.hair_length, f"{one.hair_length} {one.hair_colour} hair"),
        "top colour": (one.top.colour, f"{one.top.colour} {top}"),
        "top pattern": (one.top.pattern, top),
        "lower": (one.lower.kind, one.lower.kind),
        "hat": (one.hat, one.hat),
    }[attribute]


def build(settings: Settings, n: int, reader: AttributeReader | None = None) -> Suite[Weighed]:
    """The suite of ``n`` captions.

    Raises:
        InputError: weights or attributes that cannot be used.
        ModelError: the theatre's readers are not in this installation.
    """
    weights = settings.checked()

    def case(number: int) -> Case[Weighed]:
        found = weighed_scene(number, settings.attributes)
        plain = RunSpec(
            model=settings.model,
            prompt=full_caption(found.scene),
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            seed=settings.seed + number,
        )
        control = PromptWeighting(dialect=settings.dialect)
        specs = {
            arm_of(weight): plain
            if weight == 1
            else plain.model_copy(
                update={
                    "prompt": weighted(found.scene, found.attribute, weight, settings.dialect),
                    "controls": [control],
                }
            )
            for weight in weights
        }
        title = weighted(found.scene, found.attribute, weights[-1], "a1111")
        return Case(number, title, found, specs, {TRUE: lambda: render(found.scene)})

    one, (low, high) = arm_of(1.0), (arm_of(weights[0]), arm_of(weights[-1]))
    others = tuple(arm_of(weight) for weight in weights[:-1] if weight != 1)
    return Suite(
        name="prompt_weighting",
        title="Prompt weighting: the rate of an attribute by the weight of its word",
        n=n,
        settings=settings,
        arms=(
            *(Arm(arm_of(weight), f"weight {weight:g}" + " (no control)" * (weight == 1)) for weight in weights),
            Arm(TRUE, "true picture (reader)", known=True),
        ),
        case=case,
        judges=(WeightJudge(reader or theatre_reader()),),
        table=Table(
            rank=lambda values: (values[high][SHOWN] or 0.0, -(values[low][SHOWN] or 0.0), values[one][OTHERS] or 0.0),
            baseline=one,
            ours=high,
            others=others,
            derived=(rate_slope(weights, "weight"),),
            note="All weights of a caption are drawn from the same noise.",
        ),
        reference=TRUE,
        world=WORLD_VERSION,
    )


def rate_slope(weights: Sequence[float], what: str) -> Derived:
    """Mean over captions of the least-squares slope of being shown over the logarithm of the weight."""
    levels = np.log2(np.asarray(weights))
    centred = levels - levels.mean()

    def compute(rows: Sequence[Values]) -> Estimate:
        shown = [[row[arm_of(weight)][SHOWN] or 0.0 for weight in weights] for row in rows]
        return mean([float(centred @ np.asarray(each) / (centred @ centred)) for each in shown])

    return Derived(f"rise of the rate when the {what} doubles", "share", compute)
