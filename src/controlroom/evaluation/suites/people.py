"""Several pictures of a person as a prompt: does self-attention between them keep the person better?

The published table (IP-Adapter from one picture, with the maximum and the average over nine, and with self-attention,
on Labeled Faces in the Wild) rebuilt on the theatre's LFW. A case is a held-out person with ten pictures: nine are the
prompt, and the tenth is drawn from its caption, which says what the person does and where, but nothing of their looks.
Two sides: as published, where only self-attention was trained further, and all given the same further training.

The attribute reader says whose hair, skin and garments are in the picture; FID, KID and IS are of the reader's features
and answers. IS takes the marginal p(y) over the drawn pictures, not a uniform one, with y the hair's and the top's
colour. The second suite has the identity from 1, 2, 4 and 9 pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from controlroom.backbones.image_aggregator import PICTURES, Aggregate
from controlroom.backbones.loading import THEATRE, find_model
from controlroom.controls.personal.ip_adapter import IPAdapter
from controlroom.core.errors import InputError, ModelError
from controlroom.core.spec import RunSpec
from controlroom.data.pictures import Picture
from controlroom.data.theatre.attributes import attributes, read_caption
from controlroom.data.theatre.people import Person, people, subject_caption
from controlroom.data.theatre.render import render
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.evaluation.extractor import content_hash
from controlroom.evaluation.extractors.theatre import TheatreFeatures, TheatreIdentity, signed, theatre_reader
from controlroom.evaluation.retarget_judge import IDENTITY
from controlroom.evaluation.suites.judges import LikenessScore, SetDistance
from controlroom.evaluation.suites.subject_adapters import Adapter, Networks
from controlroom.evaluation.suites.suite import Arm, Case, Measure, Shown, Suite, SuiteSettings, Table, Values
from controlroom.signals.readers import AttributeReader

TRUE, WORDS = "truth", "words"
AGREES, HAIR, SKIN, GARMENTS, ALL, TOLD = "identity", "hair", "skin", "garments", "all of identity", "words followed"
#: Measures of identity -> questions whose answers they are the mean of.
PARTS: dict[str, tuple[str, ...]] = {
    AGREES: IDENTITY,
    HAIR: ("hair colour", "hair length"),
    SKIN: ("skin",),
    GARMENTS: ("top", "top colour", "top pattern", "lower", "lower colour", "hat"),
}
SAID = ("place", "pose", "expression")
"""Questions that captions answer."""
CLASSES = ("hair colour", "top colour")
"""Questions whose joint answer is the class that IS asks for."""


@dataclass(frozen=True)
class Way:
    """One way of reading a person's pictures.

    Attributes:
        title: of its column.
        weights: setting that names its adapter.
        aggregate: what becomes of the pictures; None: it was trained on them, each person by itself.
        pictures: how many it is shown.
    """

    title: str
    weights: str
    aggregate: Aggregate | None
    pictures: int = PICTURES


WAYS: dict[str, Way] = {
    "single": Way("IP-Adapter, one picture", "adapter", "tokens", 1),
    "joined": Way("tokens of nine joined", "adapter", "tokens"),
    "max": Way("maximum", "adapter", "max"),
    "average": Way("average", "adapter", "average"),
    "attention": Way("self-attention", "attention", "attention"),
    "single_more": Way("one picture, trained further", "single_more", "tokens", 1),
    "max_more": Way("maximum, trained further", "max_more", "max"),
    "average_more": Way("average, trained further", "average_more", "average"),
    "dreambooth": Way("DreamBooth on the nine", "dreambooth", None),
}
NUMBERS = (1, 2, 4, 9)
BY_NUMBER: dict[str, Way] = {
    f"{name} {number}": Way(f"{WAYS[name].title}, {number}", WAYS[name].weights, WAYS[name].aggregate, number)
    for name in ("attention", "average", "average_more")
    for number in NUMBERS
}


class Settings(SuiteSettings):
    """Which adapters, and how strongly they act."""

    scale: float = Field(default=1.0, gt=0)
    ways: tuple[str, ...] = ()
    """Arms; none: all whose weights are here."""
    adapter: str = f"{THEATRE}/ip_adapter"
    attention: str = f"{THEATRE}/ip_adapter_attention"
    single_more: str = f"{THEATRE}/ip_adapter_single"
    max_more: str = f"{THEATRE}/ip_adapter_max"
    average_more: str = f"{THEATRE}/ip_adapter_average"

    later: ClassVar[frozenset[str]] = frozenset({"dreambooth", "word", "phrase", "learned_phrase"})
    dreambooth: str = ""
    """Folder of what DreamBooth learned of each person's nine pictures: ``PERSON/`` with ``lora.safetensors`` or
    ``unet/``, or ``PERSON/weights/``, as trainings leave it (`dreambooth_data` gives the pictures); none: left out."""
    word: str = "sks"
    """What a person was called there,"""
    phrase: str = "{word} {class}"
    """with the class;"""
    learned_phrase: str = "{word}"
    """and where a learned word is all there is."""


@lru_cache(maxsize=4)
def _block(size: int) -> tuple[Person, ...]:
    return people("held_out", size, PICTURES + 1)


def person_number(number: int) -> Person:
    """A held-out person with ten scenes; the last one is to be drawn."""
    return _block(64 * (number // 64 + 1))[number]


class PeopleJudge:
    """Is it the person, and does the picture follow the words: shares of questions answered as the truth has it."""

    def __init__(self, reader: AttributeReader, arms: Sequence[str]) -> None:
        self.reader, self.arms = reader, tuple(arms)
        label = f"theatre-attributes@{content_hash(reader)}"
        self.fingerprint = f"people {label}"
        self.measures = (
            *(Measure(name, extractor=label) for name in PARTS),
            Measure(ALL, "share", extractor=label),
            Measure(TOLD, extractor=label),
        )

    def __call__(self, shown: Sequence[Shown[Person]]) -> Sequence[Values]:
        found: list[dict[str, dict[str, float | None]]] = [{} for _ in shown]
        for arm in self.arms:
            answers = self.reader.read([one.pictures[arm] for one in shown])
            for row, one, read in zip(found, shown, answers, strict=True):
                row[arm] = _agreement(read, one.case.truth)
        return found


def _agreement(read: Mapping[str, str | None], person: Person) -> dict[str, float | None]:
    truth = attributes(person.scenes[-1])
    values = {name: _right(read, truth, questions) for name, questions in PARTS.items()}
    # Of the words only what the caption says: it leaves out neutral moods and poses without a name.
    told = _right(read, read_caption(_caption(person)), SAID)
    return {**values, ALL: float(values[AGREES] == 1.0), TOLD: told}


def _right(read: Mapping[str, str | None], truth: Mapping[str, str | None], questions: Sequence[str]) -> float | None:
    """Share of the questions with an answer that are read so."""
    right = [read[question] == truth[question] for question in questions if truth[question] is not None]
    return float(np.mean(right)) if right else None


def _caption(person: Person) -> str:
    scene = person.scenes[-1]
    return subject_caption(scene, scene.puppets[0].identity.figure)


class PeopleFeatures(TheatreFeatures):
    """The reader's features, and for IS the logits of a person's hair and top together."""

    def __init__(self, reader: AttributeReader) -> None:
        super().__init__(reader)
        self.name = "theatre-people"

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """[B, classes]: log-probabilities of every pair of answers."""
        found = self.reader(signed(images, self.reader.size))
        first, second = (found[question].log_softmax(1) for question in CLASSES)
        return (first[:, :, None] + second[:, None]).flatten(1)


def build(settings: Settings, n: int, reader: AttributeReader | None = None) -> Suite[Person]:
    """The published table, on ``n`` people.

    Raises:
        InputError: an unknown way.
        ModelError: the readers, or weights of a way that was asked for, are missing.
    """
    title = "One person from several pictures: maximum, average, self-attention"
    return _suite("people", title, settings, n, WAYS, reader)


def build_numbers(settings: Settings, n: int, reader: AttributeReader | None = None) -> Suite[Person]:
    """Identity from 1, 2, 4 and 9 pictures, on ``n`` people.

    Raises:
        InputError: an unknown way.
        ModelError: as `build`.
    """
    title = "One person from 1, 2, 4 and 9 pictures"
    return _suite("people_numbers", title, settings, n, BY_NUMBER, reader)


def available(settings: Settings, ways: dict[str, Way]) -> dict[str, Way]:
    """The ways that are asked for, or all whose weights are here.

    Raises:
        InputError: an unknown way.
        ModelError: weights of one that was asked for are missing, or of all.
    """
    strange = [name for name in settings.ways if name not in ways]
    if strange:
        raise InputError(f"There is no way {strange[0]!r} of reading pictures. There are: {', '.join(ways)}.")
    if settings.ways:
        for name in settings.ways:
            find_model(getattr(settings, ways[name].weights), "IP-Adapter")
        return {name: ways[name] for name in settings.ways}
    found = {name: way for name, way in ways.items() if _is_here(getattr(settings, way.weights))}
    if not found:
        raise ModelError(
            f"None of the adapters is here, such as {settings.adapter}. Train the stage ip_adapter, or name one: "
            "--set adapter=FOLDER."
        )
    return found


def _is_here(name: str) -> bool:
    try:
        return bool(name) and bool(find_model(name, "IP-Adapter"))
    except ModelError:
        return False


def _suite(
    name: str, title: str, settings: Settings, n: int, ways: dict[str, Way], reader: AttributeReader | None
) -> Suite[Person]:
    chosen = available(settings, ways)
    reader = reader or theatre_reader()
    tuned = _tuned(settings, n) if "dreambooth" in chosen else {}
    networks = Networks()

    def case(number: int) -> Case[Person]:
        person = person_number(number)
        caption = _caption(person)
        drawn = RunSpec(
            model=settings.model,
            prompt=caption,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            seed=settings.seed + number,
        )
        looks: list[Image.Image] = [render(scene) for scene in person.scenes[:PICTURES]]
        specs: dict[str, Any] = {WORDS: drawn}
        made: dict[str, Any] = {}
        for arm, way in chosen.items():
            if way.aggregate is None:
                adapter, who = tuned[person.name], person.scenes[0].puppets[0].identity.figure
                words = subject_caption(person.scenes[-1], adapter.words(settings, who))
                spec = drawn.model_copy(update={"prompt": words, "controls": adapter.controls(settings)})
                if adapter.networks:
                    made[arm] = networks.drawing(adapter, spec)
                else:
                    specs[arm] = spec
                continue
            control = IPAdapter(
                getattr(settings, way.weights),
                [looks[: way.pictures]],
                scale=settings.scale,
                aggregate=way.aggregate,
            )
            specs[arm] = drawn.model_copy(update={"controls": [control]})
        known = {TRUE: lambda: render(person.scenes[-1])}
        return Case(number, f"{person.name}: {caption}", person, specs, known, made)

    first = next((arm for arm in chosen if arm.startswith("attention")), next(iter(chosen)))
    if name == "people_numbers" and f"attention {PICTURES}" in chosen:
        first = f"attention {PICTURES}"
    base = next((arm for arm in chosen if arm != first), WORDS)
    rest = tuple(arm for arm in chosen if arm not in (first, base))
    arms = (WORDS, *chosen, TRUE)
    return Suite(
        name=name,
        title=title,
        n=n,
        settings=settings,
        arms=(
            Arm(WORDS, "words alone"),
            *(Arm(arm, way.title) for arm, way in chosen.items()),
            Arm(TRUE, "true picture (reader)", known=True),
        ),
        case=case,
        judges=(
            PeopleJudge(reader, arms),
            LikenessScore(TheatreIdentity(reader), TRUE, (WORDS, *chosen), "likeness"),
        ),
        table=Table(
            rank=lambda values: (values[first][AGREES] or 0.0, values[first][TOLD] or 0.0),
            baseline=base,
            ours=first,
            others=rest,
            note="All arms of a person are drawn from the same noise and caption, which says nothing of their looks. "
            "The reader's own error is in the column of the true picture. IS is of the hair's and the top's colour, "
            "with the marginal of the drawn pictures.",
        ),
        set_judges=(SetDistance(PeopleFeatures(reader), TRUE),),
        per_prompt=frozenset({"ip_adapter.image"}),
        weights=tuple(sorted({getattr(settings, way.weights) for way in chosen.values()})),
        reference=TRUE,
        world=WORLD_VERSION,
    )


def dreambooth_data(number: int) -> tuple[str, list[Picture]]:
    """Name of a person of the suite, and the nine pictures that are shown of them, captioned without their looks.

    Captions hold ``{token}`` where the person's words go.
    """
    person = person_number(number)
    return person.name, list(person.pictures("subject")[:PICTURES])


def _tuned(settings: Settings, n: int) -> dict[str, Adapter]:
    """Person -> what was learned of them.

    Raises:
        ModelError: it is missing of one of the cases.
    """
    names = [person_number(number).name for number in range(n)]
    return {name: Adapter.at(Path(settings.dreambooth) / name) for name in names}
