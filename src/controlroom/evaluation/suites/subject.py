"""Subject fidelity against prompt fidelity: what adapters of one subject each keep of it, and follow of the words.

A case is a subject of the theatre's DreamBench under one of its 25 prompts. Every method that was trained on it
(``ADAPTERS/METHOD/SUBJECT/``: a LoRA, a learned word, a tuned network, or several of these) draws it from the same
noise; the attribute reader says which share of the looks is the subject's, of what the prompt leaves alone, and which
share of what the prompt asks for is there. Methods may be the same one at several steps of its training (``dco-500``):
their points make the front.

Diversity is the perceptual distance of two pictures under one prompt, from two noises. Language drift is that of the
class, under the same prompt and from the same noise, drawn with and without the adapter; the share of the subject's
looks in the adapter's picture of the class says what of it was forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from pydantic import Field

from controlroom.controls.guidance.consistency_guidance import ConsistencyGuidance
from controlroom.core.errors import InputError, ModelError
from controlroom.core.spec import RunSpec
from controlroom.data.subjects import named
from controlroom.data.theatre.render import render
from controlroom.data.theatre.subjects import SubjectPrompt, TheatreSubject, score, theatre_subjects
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.evaluation.extractor import content_hash, label_of
from controlroom.evaluation.extractors.theatre import TheatreFeatures, theatre_reader
from controlroom.evaluation.metrics.pixels import unit_pixels
from controlroom.evaluation.suites.subject_adapters import Adapter, Networks
from controlroom.evaluation.suites.suite import Arm, Case, Measure, Shown, Suite, SuiteSettings, Table, Values
from controlroom.signals.readers import AttributeReader

if TYPE_CHECKING:
    from controlroom.sampling.pipeline import Pipeline

WORDS, OWN = "class", "own"
KEPT, FOLLOWED, BOTH = "subject kept", "prompt followed", "both"
DIVERSITY, DRIFT = "diversity", "class drift"
AGAIN, CLASS = " again", " class"
"""Ends of arms: the same prompt from another noise; the class, drawn with the adapter."""
_OTHER_NOISE = 500_000


class Settings(SuiteSettings):
    """Which adapters, and what they call their subject."""

    adapters: str = ""
    """Folder of ``METHOD/SUBJECT/`` (or ``METHOD/SUBJECT/weights/``, as trainings leave it); none: the class alone."""
    methods: tuple[str, ...] = ()
    """Of the folder; none: all of it."""
    subjects: tuple[str, ...] = ()
    """Names of the theatre's DreamBench; none: those that every method was trained on."""
    puppets: int = Field(default=20, ge=0)
    props: int = Field(default=10, ge=0)
    """How many of each the theatre's DreamBench has, as they were drawn for training."""
    word: str = "sks"
    """Name of the subject where no word was learned."""
    phrase: str = "{word} {class}"
    """What stands in prompts for it, for networks and LoRAs;"""
    learned_phrase: str = "{word}"
    """and where a learned word is all there is."""
    scale: float = Field(default=1.0, gt=0)
    """Of LoRAs."""
    guided: tuple[str, ...] = ("dco",)
    """Methods that are drawn with consistency guidance as well (``dco`` also means ``dco-500``)."""
    subject_scales: tuple[float, ...] = (3.0,)
    """Of consistency guidance."""
    spread: bool = True
    """Also diversity and drift, for two more pictures of each method."""


@dataclass(frozen=True)
class Asked:
    """A subject under a prompt."""

    subject: TheatreSubject
    prompt: SubjectPrompt


class SubjectJudge:
    """Shares of looks that are the subject's, and of what was asked."""

    def __init__(self, reader: AttributeReader, arms: Sequence[str]) -> None:
        self.reader, self.arms = reader, tuple(arms)
        label = f"theatre-attributes@{content_hash(reader)}"
        self.fingerprint = f"subject {label}"
        self.label = label
        self.measures = (
            Measure(KEPT, extractor=label),
            Measure(FOLLOWED, extractor=label),
            Measure(BOTH, "share", extractor=label),
        )

    def __call__(self, shown: Sequence[Shown[Asked]]) -> Sequence[Values]:
        found: list[dict[str, dict[str, float | None]]] = [{} for _ in shown]
        for arm in self.arms:
            answers = self.reader.read([one.pictures[arm] for one in shown])
            for row, one, read in zip(found, shown, answers, strict=True):
                said = {question: answer for question, answer in read.items() if answer is not None}
                row[arm] = self.judged(one.case.truth, arm, said)
        return found

    def judged(self, asked: Asked, arm: str, said: Mapping[str, str]) -> dict[str, float | None]:
        """Values of one picture of which the reader says this."""
        kept, followed = score(asked.subject, asked.prompt, said)
        if arm == OWN:  # another picture of the subject: only its looks can be right
            return {KEPT: kept, FOLLOWED: None, BOTH: None}
        return {KEPT: kept, FOLLOWED: followed, BOTH: float(kept == followed == 1.0)}


class SpreadJudge:
    """Distance of two pictures under one prompt, and of the class's pictures with and without an adapter."""

    def __init__(self, features: TheatreFeatures, methods: Sequence[str]) -> None:
        self.features, self.methods = features, tuple(methods)
        label = label_of(features)
        self.fingerprint = f"spread {label}"
        self.measures = (Measure(DIVERSITY, extractor=label), Measure(DRIFT, higher=False, extractor=label))

    def __call__(self, shown: Sequence[Shown[Asked]]) -> Sequence[Values]:
        found: list[Values] = []
        for one in shown:
            row: dict[str, dict[str, float | None]] = {}
            for arm in (WORDS, *self.methods):
                drift = None if arm == WORDS else self._distance(one, arm + CLASS, WORDS)
                row[arm] = {DIVERSITY: self._distance(one, arm, arm + AGAIN), DRIFT: drift}
            found.append(row)
        return found

    def _distance(self, one: Shown[Asked], first: str, second: str) -> float:
        pixels = [unit_pixels([one.pictures[arm]]) for arm in (first, second)]
        return float(self.features.distance(*pixels))


@lru_cache(maxsize=2)
def _theatre(puppets: int, props: int) -> dict[str, TheatreSubject]:
    return {subject.name: subject for subject in theatre_subjects(puppets, props)}


def adapters_of(settings: Settings) -> tuple[dict[str, TheatreSubject], dict[str, dict[str, Adapter]]]:
    """The subjects, and method -> subject -> what it learned.

    Raises:
        InputError: an unknown subject, or none that all methods were trained on.
        ModelError: no such folder or method, or one that was not trained on a subject.
    """
    folder, known = Path(settings.adapters), _theatre(settings.puppets, settings.props)
    methods = settings.methods
    if settings.adapters and not folder.is_dir():
        raise ModelError(f"There are no adapters at {folder}. Train some, or name another folder.")
    if settings.adapters and not methods:
        methods = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != "."))
    if bool(settings.adapters) != bool(methods):
        raise InputError("Methods need a folder of adapters, and the folder methods in it: --set adapters=FOLDER.")
    trained = {method: {p.name for p in (folder / method).glob("*") if p.is_dir()} for method in methods}
    common = set(known).intersection(*trained.values())
    names = settings.subjects or tuple(name for name in known if name in common)
    strange = [name for name in names if name not in known]
    if strange:
        raise InputError(f"The theatre's DreamBench has no subject {strange[0]!r}. It has: {', '.join(known)}.")
    if not names:
        raise InputError(f"No subject was trained by all of the methods of {folder}: {', '.join(methods) or 'none'}.")
    found = {method: {name: Adapter.at(folder / method / name) for name in names} for method in methods}
    return {name: known[name] for name in names}, found


def build(
    settings: Settings,
    n: int,
    reader: AttributeReader | None = None,
    asks: Callable[[TheatreSubject], Sequence[SubjectPrompt]] | None = None,
    judge: type[SubjectJudge] = SubjectJudge,
) -> Suite[Asked]:
    """The suite of ``n`` prompts, subjects in turn.

    Args:
        settings: which adapters.
        n: number of cases.
        reader: of attributes; None: the theatre's.
        asks: what is asked of a subject; None: the prompts of the theatre's DreamBench.
        judge: of single pictures.

    Raises:
        InputError, ModelError: as `adapters_of`; the theatre's readers are not in this installation.
    """
    subjects, trained = adapters_of(settings)
    reader = reader or theatre_reader()
    networks = Networks()
    guided = {
        f"{method} w{scale:g}": (method, scale)
        for method in trained
        for scale in settings.subject_scales
        if method.split("-")[0] in settings.guided and all(each.lora for each in trained[method].values())
    }

    def case(number: int) -> Case[Asked]:
        place = number % len(subjects)
        subject = list(subjects.values())[place]
        # Subjects begin at different prompts, so that few cases see many.
        prompts = subject.prompts if asks is None else asks(subject)
        prompt = prompts[(number // len(subjects) + 7 * place) % len(prompts)]
        plain = named(prompt.text, subject.class_words)
        base = RunSpec(
            model=settings.model,
            prompt=plain,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            seed=settings.seed + number,
        )
        other = base.model_copy(update={"seed": settings.seed + number + _OTHER_NOISE})
        specs: dict[str, RunSpec] = {WORDS: base}
        made: dict[str, Callable[[Pipeline], Image.Image]] = {}
        if settings.spread:
            specs[WORDS + AGAIN] = other
        for method, by_subject in trained.items():
            adapter = by_subject[subject.name]
            told = {"prompt": named(prompt.text, adapter.words(settings, subject.class_words))}
            controls = adapter.controls(settings)
            own: dict[str, RunSpec] = {method: base.model_copy(update={**told, "controls": controls})}
            if settings.spread:
                own[method + AGAIN] = other.model_copy(update={**told, "controls": controls})
                own[method + CLASS] = base.model_copy(update={"controls": controls})
            for arm, (whose, scale) in guided.items():
                if whose == method:
                    guidance = ConsistencyGuidance(plain, subject_scale=scale)
                    own[arm] = base.model_copy(update={**told, "controls": [*controls, guidance]})
            if adapter.networks:
                made |= {arm: networks.drawing(adapter, spec) for arm, spec in own.items()}
            else:
                specs |= own
        scene = subject.scenes[number % len(subject.scenes)]
        title = f"{subject.name}: {prompt.text}"
        return Case(number, title, Asked(subject, prompt), specs, {OWN: lambda: render(scene)}, made)

    methods = [*trained, *guided]
    extra = [arm + end for arm in trained for end in (AGAIN, CLASS)] if settings.spread else []
    extra = [WORDS + AGAIN, *extra] if settings.spread else extra
    arms = [WORDS, *methods, *extra]
    titles = {WORDS: "the class, no adapter", OWN: "another picture of the subject (reader)"}
    titles |= {arm: f"{whose}, consistency guidance {scale:g}" for arm, (whose, scale) in guided.items()}
    titles |= {arm + AGAIN: f"{titles.get(arm, arm)}, other noise" for arm in (WORDS, *trained)}
    titles |= {arm + CLASS: f"{arm}, asked for the class" for arm in trained}
    judges: list[Any] = [judge(reader, [*arms, OWN])]
    if settings.spread:
        judges.append(SpreadJudge(TheatreFeatures(reader), list(trained)))
    first = next(iter(methods), WORDS)

    def rank(values: Values) -> tuple[float, ...]:
        return values[first][BOTH] or 0.0, (values[first][KEPT] or 0.0) + (values[first][FOLLOWED] or 0.0)

    return Suite(
        name="subject",
        title="One subject: what adapters keep of it, and follow of the words",
        n=n,
        settings=settings,
        arms=(*(Arm(arm, titles.get(arm, arm)) for arm in arms), Arm(OWN, titles[OWN], known=True)),
        case=case,
        judges=tuple(judges),
        table=Table(
            rank=rank,
            baseline=WORDS if methods else None,
            ours=first if methods else None,
            others=tuple(methods[1:]),
            note="All arms of a case are drawn from the same noise. The looks that are kept are those that the prompt "
            "leaves alone; what the class alone has of them is chance. Where an adapter is asked for the class, the "
            "share that is kept is what of the class it has overwritten.",
        ),
        weights=tuple(sorted({str(a.place) for by_subject in trained.values() for a in by_subject.values()})),
        world=WORLD_VERSION,
    )
