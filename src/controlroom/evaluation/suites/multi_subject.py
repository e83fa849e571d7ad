"""Two puppets in one picture, each known from a picture of its own: are both right, and in their places?

Held-out companies of the theatre: a scene of two puppets with its boxes, and each puppet alone elsewhere. The caption
says who is where, and nothing of their looks; these must come from MS-Diffusion, from two IP-Adapters with masks, or
from two LoRAs in regions. Each of them runs if its weights are given. The full caption, which says the looks, is what
words alone can do. The attribute reader looks at what is in each box by itself; the true pictures give its own error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from controlroom.controls.personal.ip_adapter import IPAdapter
from controlroom.controls.personal.lora import LoRA
from controlroom.controls.regions.ms_diffusion import MSDiffusion
from controlroom.core.control import Control
from controlroom.core.errors import InputError
from controlroom.core.spec import RunSpec
from controlroom.data.theatre import vocabulary as v
from controlroom.data.theatre.attributes import puppet_attributes
from controlroom.data.theatre.captions import article, full_caption
from controlroom.data.theatre.groups import TWO_PUPPETS, Company, sample_company, short_caption
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import CANVAS
from controlroom.evaluation.extractor import content_hash
from controlroom.evaluation.extractors.theatre import theatre_reader
from controlroom.evaluation.retarget_judge import IDENTITY
from controlroom.evaluation.suites.suite import Arm, Case, Measure, Shown, Suite, SuiteSettings, Table, Values
from controlroom.signals.readers import AttributeReader

WITHOUT, WORDS, TRUE = "without", "words", "truth"
MS, ADAPTERS, LORAS = "ms_diffusion", "ip_adapters", "loras"
EACH, BOTH, APART = "identity in its box", "both in their colours", "nearer to itself than to the other"
COLOURS = ("hair colour", "top colour", "lower colour")
FIRST_COMPANY = 60_000
_MARGIN = 0.03
Box = tuple[float, float, float, float]


class Settings(SuiteSettings):
    """Where the weights lie; an arm without weights does not run."""

    ms_diffusion: str = ""
    """Model of MS-Diffusion: a path or a name of the theatre."""
    ip_adapter: str = ""
    """An IP-Adapter."""
    loras: str = ""
    """Folder with a LoRA of each puppet: ``0-0.safetensors`` is the first puppet of case 0, ``0-1`` the second."""
    lora_name: str = "{word}"
    """What a puppet was called when its LoRA learned: ``sks {word}``."""
    ms_scale: float = 1.0
    adapter_scale: float = 0.8
    lora_scale: float = 1.0


class InBoxes:
    """Whose looks are in each box."""

    def __init__(self, reader: AttributeReader) -> None:
        self.reader = reader
        label = f"theatre-attributes@{content_hash(reader)}"
        self.fingerprint = f"boxes {_MARGIN} {label}"
        self.measures = (
            Measure(EACH, extractor=label),
            Measure(BOTH, "share", extractor=label),
            Measure(APART, extractor=label),
        )

    def __call__(self, shown: Sequence[Shown[Company]]) -> Sequence[Values]:
        found: list[dict[str, dict[str, float | None]]] = [{} for _ in shown]
        for arm in shown[0].pictures:
            parts = [alone(one.pictures[arm], box) for one in shown for box in one.case.truth.boxes]
            answers = self.reader.read(parts)
            for index, (row, one) in enumerate(zip(found, shown, strict=True)):
                read = answers[2 * index : 2 * index + 2]
                truth = [puppet_attributes(puppet) for puppet in one.case.truth.scene.puppets]
                own = [_agreement(read[side], truth[side]) for side in (0, 1)]
                other = [_agreement(read[side], truth[1 - side]) for side in (0, 1)]
                colours = all(read[side][q] == truth[side][q] for side in (0, 1) for q in COLOURS)
                apart = [float(a > b) for a, b in zip(own, other, strict=True)]
                row[arm] = {EACH: sum(own) / 2, BOTH: float(colours), APART: sum(apart) / 2}
        return found


def _agreement(read: Mapping[str, str | None], truth: Mapping[str, str | None]) -> float:
    """Share of questions about who it is that are answered alike."""
    asked = [question for question in IDENTITY if truth.get(question) is not None]
    return sum(read[question] == truth[question] for question in asked) / len(asked)


def alone(picture: Image.Image, box: Box) -> Image.Image:
    """What is in a box, as large as a picture shows one puppet; beside it the box's edges go on."""
    width, height = picture.size
    left, top = max(0.0, box[0] - _MARGIN) * width, max(0.0, box[1] - _MARGIN) * height
    right, bottom = min(1.0, box[2] + _MARGIN) * width, min(1.0, box[3] + _MARGIN) * height
    part = np.asarray(picture.convert("RGB").crop((round(left), round(top), round(right), round(bottom))))
    side = max(part.shape[:2])
    more = [(side - length) // 2 for length in part.shape[:2]]
    rest = [side - length - first for length, first in zip(part.shape[:2], more, strict=True)]
    square = np.pad(part, ((more[0], rest[0]), (more[1], rest[1]), (0, 0)), mode="edge")
    return Image.fromarray(square).resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)


def company_of(number: int) -> Company:
    """The held-out company of a case."""
    return sample_company(FIRST_COMPANY + number, "held_out", TWO_PUPPETS)


def box_mask(box: Box) -> Image.Image:
    """White in a box, at the theatre's size."""
    mask = Image.new("L", (CANVAS, CANVAS), 0)
    left, top, right, bottom = (round(side * CANVAS) for side in box)
    mask.paste(255, (left, top, right, bottom))
    return mask


def _controls(settings: Settings, company: Company, number: int, arm: str) -> list[Control]:
    pictures = [render(scene) for scene in company.alone]
    masks = [box_mask(box) for box in company.boxes]
    if arm == MS:
        boxes, words = list(company.boxes), list(company.words)
        return [MSDiffusion(settings.ms_diffusion, pictures, boxes, words, settings.ms_scale)]
    if arm == ADAPTERS:
        return [IPAdapter(settings.ip_adapter, pictures, scale=settings.adapter_scale, mask=masks)]
    if arm == LORAS:
        files = [Path(settings.loras) / f"{number}-{side}.safetensors" for side in (0, 1)]
        return [LoRA(str(f), settings.lora_scale, mask=mask) for f, mask in zip(files, masks, strict=True)]
    return []


def _prompt(settings: Settings, company: Company, arm: str) -> str:
    if arm == WORDS:
        return full_caption(company.scene)
    if arm == LORAS:
        names = [article(settings.lora_name.format(word=word)) for word in company.words]
        return f"{' and '.join(names)} {v.PLACE_PHRASES[company.scene.place]}"
    return short_caption(company.scene)


_TITLES = {
    WITHOUT: "who is where, by words",
    WORDS: "looks by words too",
    MS: "MS-Diffusion",
    ADAPTERS: "two IP-Adapters with masks",
    LORAS: "two LoRAs in regions",
}


def build(settings: Settings, n: int, reader: AttributeReader | None = None) -> Suite[Company]:
    """The suite of ``n`` companies.

    Raises:
        InputError: a folder of LoRAs that has none for a case.
        ModelError: the theatre's readers are not in this installation.
    """
    given = {MS: settings.ms_diffusion, ADAPTERS: settings.ip_adapter, LORAS: settings.loras}
    arms = [WITHOUT, WORDS, *(arm for arm, weights in given.items() if weights)]
    if settings.loras:
        names = [f"{number}-{side}.safetensors" for number in range(n) for side in (0, 1)]
        missing = [name for name in names if not (Path(settings.loras) / name).is_file()]
        if missing:
            raise InputError(f"{settings.loras} lacks {missing[0]}: every case needs a LoRA of each of its puppets.")
    ours = arms[2] if len(arms) > 2 else WORDS

    def case(number: int) -> Case[Company]:
        company = company_of(number)
        base = RunSpec(
            model=settings.model,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            seed=settings.seed + number,
        )
        specs = {
            arm: base.model_copy(
                update={
                    "prompt": _prompt(settings, company, arm),
                    "controls": _controls(settings, company, number, arm),
                }
            )
            for arm in arms
        }
        return Case(number, short_caption(company.scene), company, specs, {TRUE: lambda: render(company.scene)})

    def rank(values: Values) -> tuple[float, ...]:
        return values[ours][BOTH] or 0.0, values[ours][EACH] or 0.0

    return Suite(
        name="multi_subject",
        title="Two puppets in one picture, each from a picture of its own",
        n=n,
        settings=settings,
        arms=(*(Arm(arm, _TITLES[arm]) for arm in arms), Arm(TRUE, "true picture (reader)", known=True)),
        case=case,
        judges=(InBoxes(reader or theatre_reader()),),
        table=Table(
            rank=rank,
            baseline=WITHOUT,
            ours=ours,
            others=tuple(arm for arm in arms if arm not in (WITHOUT, ours)),
            note="All arms of a case are drawn from the same noise. The reader's own error is in the column of the "
            "true picture. An arm whose weights were not given is not in the table.",
        ),
        reference=TRUE,
        world=v.WORLD_VERSION,
    )
