"""A subject and a style that were learned apart, in one picture: does one take from the other?

A LoRA of one of the theatre's subjects and a LoRA of a style draw the same prompt from the same noise: each alone, both
added in a run, and both merged into one file by concatenation (`backbones.lora_merge`), which is the same sum. Without
interference both together keep as much of the subject as its LoRA alone, and are in the style as often as its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from pydantic import Field

from controlroom.backbones.added_layers import names_of
from controlroom.backbones.loading import find_model
from controlroom.backbones.lora_files import load_lora, save_lora
from controlroom.backbones.lora_merge import merge_loras
from controlroom.controls.personal.lora import LoRA
from controlroom.core.control import Control
from controlroom.core.errors import InputError
from controlroom.core.spec import RunSpec
from controlroom.data.subjects import TOKEN, named
from controlroom.data.theatre import vocabulary as v
from controlroom.data.theatre.render import render
from controlroom.data.theatre.subjects import SubjectPrompt
from controlroom.evaluation.extractors.theatre import theatre_reader
from controlroom.evaluation.metrics.pixels import unit_pixels
from controlroom.evaluation.metrics.psnr import psnr
from controlroom.evaluation.suites import subject
from controlroom.evaluation.suites.subject import KEPT, OWN, Asked, SubjectJudge, adapters_of
from controlroom.evaluation.suites.subject_adapters import Adapter, loras_of
from controlroom.evaluation.suites.suite import Arm, Case, Measure, Shown, Suite, Table, Values
from controlroom.signals.readers import AttributeReader

if TYPE_CHECKING:
    from controlroom.sampling.pipeline import Pipeline

WORDS, SUBJECT, STYLED, ADDED, MERGED = "words", "subject", "style", "added", "merged"
STYLE, PLACE, SAME = "style as asked", "place as asked", "PSNR to both added"
CEILING = 60.0
"""dB at which PSNR is cut."""
_TITLES = {
    WORDS: "the class, no LoRA",
    SUBJECT: "LoRA of the subject",
    STYLED: "LoRA of the style",
    ADDED: "both added",
    MERGED: "both merged into one",
    OWN: "another picture of the subject (reader)",
}


class Settings(subject.Settings):
    """The folder of adapters has one method, whose adapters are LoRAs."""

    spread: bool = False
    style_lora: str = ""
    """What learned the style: a file, or a folder with one."""
    style: str = "watercolour"
    """Which style of the theatre that is, for the reader."""
    style_words: str = ""
    """What it was called when it learned ("sks style"); "": as the theatre's captions call it."""
    style_scale: float = Field(default=1.0, gt=0)


class StyledJudge(SubjectJudge):
    """Looks, style and place; and whether merging is adding."""

    def __init__(self, reader: AttributeReader, arms: Sequence[str]) -> None:
        super().__init__(reader, arms)
        self.fingerprint = f"styled {self.fingerprint}"
        shares = (Measure(name, "share", extractor=self.label) for name in (STYLE, PLACE))
        self.measures = (*self.measures, *shares, Measure(SAME, digits=1))

    def judged(self, asked: Asked, arm: str, said: Mapping[str, str]) -> dict[str, float | None]:
        found = super().judged(asked, arm, said)
        if arm == OWN:
            return {**found, STYLE: None, PLACE: None}
        right = {question: float(said.get(question) == answer) for question, answer in asked.prompt.asks.items()}
        return {**found, STYLE: right["style"], PLACE: right["place"]}

    def __call__(self, shown: Sequence[Shown[Asked]]) -> Sequence[Values]:
        found = [dict(row) for row in super().__call__(shown)]
        for row, one in zip(found, shown, strict=True):
            if MERGED in one.pictures:
                merged, added = (unit_pixels([one.pictures[arm]]) for arm in (MERGED, ADDED))
                row[MERGED] = {**row[MERGED], SAME: min(float(psnr(merged, added)), CEILING)}
        return found


def prompts_of(settings: Settings) -> tuple[SubjectPrompt, ...]:
    """The style in each place."""
    words = settings.style_words or v.STYLE_PHRASES[settings.style]
    return tuple(
        SubjectPrompt(f"a {TOKEN} {phrase}, {words}", {"style": settings.style, "place": place}, style=settings.style)
        for place, phrase in v.PLACE_PHRASES.items()
    )


class _Merging:
    """Merges each subject's LoRA with the style's once, into files that go when the suite does."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = tempfile.TemporaryDirectory(prefix="merged-")
        self.file = cache(self._file)

    def _file(self, pipe: Pipeline, own: Path) -> str:
        names = names_of(pipe.backbone)
        paths = own, find_model(self.settings.style_lora, "LoRA")
        layers = [load_lora(path, names).layers for path in paths]
        target = Path(self.folder.name) / f"{len(list(Path(self.folder.name).iterdir()))}.safetensors"
        return str(save_lora(target, merge_loras(layers, (self.settings.scale, self.settings.style_scale)), names))

    def draw(self, pipe: Pipeline, adapter: Adapter, spec: RunSpec) -> Image.Image:
        """The picture of a run, with both as one LoRA."""
        assert adapter.lora is not None
        words = [control for control in adapter.controls(self.settings) if not isinstance(control, LoRA)]
        merged = LoRA(self.file(pipe, adapter.lora))
        return pipe.run(spec.model_copy(update={"controls": [*words, merged]})).images[0]


def build(settings: Settings, n: int, reader: AttributeReader | None = None) -> Suite[Asked]:
    """The suite of ``n`` prompts, subjects in turn. Without both kinds of LoRA only words are measured.

    Raises:
        InputError: several methods, adapters that are no LoRAs, one kind without the other, or an unknown style.
        ModelError: as those of the suite ``subject``.
    """
    _check(settings)
    subjects, trained = adapters_of(settings)
    by_subject = loras_of(trained)
    merging, prompts = _Merging(settings), prompts_of(settings)
    drawn = (WORDS, *((SUBJECT, STYLED, ADDED, MERGED) if by_subject else ()))

    def case(number: int) -> Case[Asked]:
        one = list(subjects.values())[number % len(subjects)]
        prompt = prompts[(number // len(subjects) + 7 * (number % len(subjects))) % len(prompts)]
        base = RunSpec(
            model=settings.model,
            prompt=named(prompt.text, one.class_words),
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            seed=settings.seed + number,
        )
        specs, made = {WORDS: base}, {}
        if by_subject:
            adapter = by_subject[one.name]
            own = adapter.controls(settings)
            style: Control = LoRA(settings.style_lora, settings.style_scale)
            told = base.model_copy(update={"prompt": named(prompt.text, adapter.words(settings, one.class_words))})
            specs[SUBJECT] = told.model_copy(update={"controls": own})
            specs[STYLED] = base.model_copy(update={"controls": [style]})
            specs[ADDED] = told.model_copy(update={"controls": [*own, style]})
            made[MERGED] = lambda pipe: merging.draw(pipe, adapter, told)
        scene = one.scenes[number % len(one.scenes)]
        title = f"{one.name}: {prompt.text}"
        return Case(number, title, Asked(one, prompt), specs, {OWN: lambda: render(scene)}, made)

    ours = MERGED if by_subject else WORDS

    def rank(values: Values) -> tuple[float, ...]:
        return values[ours][STYLE] or 0.0, values[ours][KEPT] or 0.0

    return Suite(
        name="subject_style",
        title="A subject and a style that were learned apart",
        n=n,
        settings=settings,
        arms=(*(Arm(arm, _TITLES[arm]) for arm in drawn), Arm(OWN, _TITLES[OWN], known=True)),
        case=case,
        judges=(StyledJudge(reader or theatre_reader(), (*drawn, OWN)),),
        table=Table(
            rank=rank,
            baseline=SUBJECT if by_subject else None,
            ours=MERGED if by_subject else None,
            others=(STYLED, ADDED) if by_subject else (),
            note="All arms of a case are drawn from the same noise, and told the style. The looks that are asked for "
            f"are those that the style leaves to be seen. PSNR is cut at {CEILING:.0f} dB.",
        ),
        weights=tuple(sorted({str(a.place) for a in by_subject.values()} | {settings.style_lora} - {""})),
        world=v.WORLD_VERSION,
    )


def _check(settings: Settings) -> None:
    if settings.style not in v.STYLES or settings.style == "flat":
        known = ", ".join(style for style in v.STYLES if style != "flat")
        raise InputError(f"The theatre has no style {settings.style!r} that could be asked for; it has {known}.")
    if bool(settings.style_lora) != bool(settings.adapters):
        raise InputError("Give both kinds of LoRA: --set adapters=FOLDER (of the subjects) and --set style_lora=FILE.")
