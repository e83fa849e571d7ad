"""From one person to another: do the looks of the second come as its share rises, and those of the first go?

Two of the theatre's held-out people of one figure, of whom each is known from a picture (IP-Adapter) or from a LoRA. A
picture is drawn at each share of the second, from the same noise and words: with the mean of both pictures' features,
with both pictures attended to by these scales, or with both LoRAs at these scales. Only questions are counted that the
two answer differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import field_validator

from controlroom.backbones.image_encoder import clip_pixels, image_features
from controlroom.backbones.ip_adapter import adapter_file, find_image_encoder, load_ip_adapter
from controlroom.backbones.loading import THEATRE, find_model
from controlroom.controls.personal.ip_adapter import IPAdapter
from controlroom.core.errors import InputError
from controlroom.core.spec import RunSpec
from controlroom.data.theatre import vocabulary as v
from controlroom.data.theatre.attributes import attributes
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import Scene
from controlroom.data.theatre.subjects import TheatreSubject
from controlroom.evaluation.extractor import content_hash
from controlroom.evaluation.extractors.theatre import theatre_reader
from controlroom.evaluation.retarget_judge import IDENTITY
from controlroom.evaluation.suites import subject
from controlroom.evaluation.suites.subject import adapters_of
from controlroom.evaluation.suites.subject_adapters import loras_of
from controlroom.evaluation.suites.suite import Arm, Case, Measure, Shown, Suite, Table, Values
from controlroom.signals.readers import AttributeReader

if TYPE_CHECKING:
    from controlroom.sampling.pipeline import Pipeline

FIRST, SECOND = "the first", "the second"
OF_FIRST, OF_SECOND, OF_ONE = "looks of the first", "looks of the second", "looks of one of them"


class Settings(subject.Settings):
    """``adapters`` are of one method and LoRAs, and only read with ``by="loras"``."""

    props: int = 0
    spread: bool = False
    by: Literal["features", "scales", "loras"] = "features"
    """What is interpolated: the features of pictures, the scales of pictures, or those of LoRAs."""
    ip_adapter: str = f"{THEATRE}/ip_adapter"
    shares: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Of the second person."""

    @field_validator("shares")
    @classmethod
    def _from_one_to_another(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(value) < 2 or list(value) != sorted(set(value)) or value[0] < 0 or value[-1] > 1:
            raise ValueError("expected two or more rising numbers from 0 to 1")
        return value


@dataclass(frozen=True)
class Pair:
    """Two people of one figure, each in a scene of their own."""

    first: TheatreSubject
    second: TheatreSubject

    @property
    def scenes(self) -> tuple[Scene, Scene]:
        return self.first.scenes[0], self.second.scenes[0]


class PairJudge:
    """Whose looks they are, of those that the two do not share."""

    def __init__(self, reader: AttributeReader) -> None:
        self.reader = reader
        label = f"theatre-attributes@{content_hash(reader)}"
        self.fingerprint = f"interpolation {label}"
        self.measures = (
            Measure(OF_FIRST, higher=None, extractor=label),
            Measure(OF_SECOND, extractor=label),
            Measure(OF_ONE, extractor=label),
        )

    def __call__(self, shown: Sequence[Shown[Pair]]) -> Sequence[Values]:
        found: list[dict[str, dict[str, float | None]]] = [{} for _ in shown]
        for arm in shown[0].pictures:
            answers = self.reader.read([one.pictures[arm] for one in shown])
            for row, one, read in zip(found, shown, answers, strict=True):
                row[arm] = _shares(read, *(attributes(scene) for scene in one.case.truth.scenes))
        return found


def _shares(
    read: Mapping[str, str | None], first: Mapping[str, str | None], second: Mapping[str, str | None]
) -> dict[str, float | None]:
    """Shares of the differing questions that are answered as of the one, of the other, of either."""
    asked = [q for q in IDENTITY if None not in (first[q], second[q]) and first[q] != second[q]]
    if not asked:
        return {OF_FIRST: None, OF_SECOND: None, OF_ONE: None}
    one, other = (float(np.mean([read[q] == truth[q] for q in asked])) for truth in (first, second))
    return {OF_FIRST: one, OF_SECOND: other, OF_ONE: one + other}


class _Features:
    """Draws with the mean of the features of two pictures."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.of = cache(self._of)

    def _of(self, pipe: Pipeline) -> tuple[Any, bool]:
        """The image encoder, and whether the adapter reads its states."""
        file = adapter_file(find_model(self.settings.ip_adapter, "IP-Adapter"))
        projection = load_ip_adapter(file, pipe.backbone.unet).image_proj
        return find_image_encoder(None, file, projection, pipe.backbone), projection.states

    def drawing(self, spec: RunSpec, pictures: Sequence[Image.Image], share: float) -> Callable[[Pipeline], Any]:
        """What draws a run at a share of the second picture."""

        def draw(pipe: Pipeline) -> Image.Image:
            encoder, states = self.of(pipe)
            with torch.no_grad():
                first, second = image_features(encoder, clip_pixels(pictures, encoder.config.image_size), states)
            embeds = torch.lerp(first.float(), second.float(), share)[None].cpu()
            control = IPAdapter(self.settings.ip_adapter, embeds=embeds, scale=self.settings.scale)
            return pipe.run(spec.model_copy(update={"controls": [control]})).images[0]

        return draw


def build(settings: Settings, n: int, reader: AttributeReader | None = None) -> Suite[Pair]:
    """The suite of ``n`` pairs.

    Raises:
        InputError: LoRAs are asked for and not given (or of several methods), or there are no two people of one figure.
        ModelError: adapters, or the theatre's readers, that are not there.
    """
    if (settings.by == "loras") != bool(settings.adapters):
        raise InputError("LoRAs of people and by=loras belong together: --set by=loras --set adapters=FOLDER.")
    subjects, trained = adapters_of(settings)
    loras = loras_of(trained, words=False)
    pairs = [Pair(a, b) for a, b in combinations(subjects.values(), 2) if a.class_words == b.class_words]
    if not pairs:
        raise InputError("There are no two people of one figure to go between; take more of them: puppets=20.")
    features = _Features(settings)
    arms = [f"{share:g}" for share in settings.shares]

    def case(number: int) -> Case[Pair]:
        # Neighbours in the list share a person; a stride that shares no factor with most lengths mixes them.
        pair = pairs[(17 if len(pairs) % 17 else 1) * number % len(pairs)]
        place = v.PLACE_PHRASES[v.PLACES[number % len(v.PLACES)]]
        who = pair.first.class_words
        base = RunSpec(
            model=settings.model,
            prompt=f"a {who} {place}",
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            seed=settings.seed + number,
        )
        pictures = [render(scene) for scene in pair.scenes]
        specs: dict[str, RunSpec] = {}
        made: dict[str, Callable[[Pipeline], Any]] = {}
        for arm, share in zip(arms, settings.shares, strict=True):
            scales = [settings.scale * (1 - share), settings.scale * share]
            if settings.by == "features":
                made[arm] = features.drawing(base, pictures, share)
            elif settings.by == "scales":
                control = IPAdapter(settings.ip_adapter, pictures, scale=scales)
                specs[arm] = base.model_copy(update={"controls": [control]})
            else:
                both = [loras[one.name] for one in (pair.first, pair.second)]
                controls = [
                    control
                    for adapter, scale in zip(both, scales, strict=True)
                    for control in adapter.controls(settings.model_copy(update={"scale": scale}))
                ]
                words = f"a {both[0].words(settings, who)} {place}"
                specs[arm] = base.model_copy(update={"prompt": words, "controls": controls})
        known = {name: (lambda shown=shown: shown) for name, shown in zip((FIRST, SECOND), pictures, strict=True)}
        title = f"{pair.first.name} to {pair.second.name}, {place}"
        return Case(number, title, pair, specs, known, made)

    def rank(values: Values) -> tuple[float, ...]:
        return values[arms[-1]][OF_SECOND] or 0.0, values[arms[0]][OF_FIRST] or 0.0

    weights = sorted(str(one.place) for one in loras.values()) if settings.by == "loras" else [settings.ip_adapter]
    return Suite(
        name="interpolation",
        title="From one person to another",
        n=n,
        settings=settings,
        arms=(
            Arm(FIRST, "picture of the first", known=True),
            *(Arm(arm, f"{share:.0%} of the second") for arm, share in zip(arms, settings.shares, strict=True)),
            Arm(SECOND, "picture of the second", known=True),
        ),
        case=case,
        judges=(PairJudge(reader or theatre_reader()),),
        table=Table(
            rank=rank,
            baseline=arms[0],
            ours=arms[-1],
            others=tuple(arms[1:-1]),
            note="All shares of a pair are drawn from the same noise and words, which say nothing of looks. Only "
            "questions count that the two answer differently; their own pictures have the reader's error.",
        ),
        weights=tuple(weights),
        world=v.WORLD_VERSION,
    )
