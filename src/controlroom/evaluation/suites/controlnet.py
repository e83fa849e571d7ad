"""What a ControlNet holds: a condition is read again out of the picture that was drawn along it.

Held-out scenes of one puppet, each with one kind of condition; drawn without the control, with it, and with it and an
empty prompt, from the same noise. The true picture is read too: its column is what reading itself loses, which for
scribbles and straight lines is much. Poses are read by the theatre's keypoint network, depth, normals, parts and soft
edges by its dense reader, the others as in any picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from PIL import Image
from pydantic import Field

from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.core.errors import InputError
from controlroom.core.spec import RunSpec
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.conditions import condition
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import Scene, sample_scene
from controlroom.data.theatre.truth import keypoints
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.evaluation.condition_match import MATCHES, condition_match
from controlroom.evaluation.extractor import TextExtractor, content_hash
from controlroom.evaluation.extractors.theatre import theatre_clip
from controlroom.evaluation.metrics.pck import read_pck
from controlroom.evaluation.retarget_judge import Judge as PoseJudge
from controlroom.evaluation.suites.judges import PromptScore
from controlroom.evaluation.suites.suite import Arm, Case, Measure, Shown, Suite, SuiteSettings, Table, Values
from controlroom.evaluation.theatre_quality import CORE_MIX
from controlroom.signals.canny import Canny
from controlroom.signals.dense_reader import DenseReader, DenseSignal, theatre_dense_reader
from controlroom.signals.lines import Lines
from controlroom.signals.normal import Normal
from controlroom.signals.readers import KeypointReader
from controlroom.signals.scribble import Scribble
from controlroom.signals.signal import KINDS, Kind, Signal

WITHOUT, WITH, EMPTY, GUESS, TRUE = "without", "with", "empty", "guess", "truth"
FIRST_SCENE = 50_000
BLOCK = 8
"""Consecutive cases of one kind, which are drawn together."""
PCK = "PCK@0.2"


class Settings(SuiteSettings):
    """A network for one kind is measured with ``kind`` and ``network``."""

    network: str = "theatre/multi"
    """The ControlNet; ``{kind}`` in it stands for the kind, where each has its own."""
    kind: Kind | Literal["all"] = "all"
    """All: one after the other, in blocks of eight cases."""
    scale: float = Field(default=1.0, gt=0)
    guess: bool = False
    """Also draw empty prompts in guess mode."""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return KINDS if self.kind == "all" else (self.kind,)


def kind_of(number: int, kinds: Sequence[Kind]) -> Kind:
    """The kind of a case.

    >>> [kind_of(number, ("canny", "depth")) for number in (0, 7, 8, 16)]
    ['canny', 'canny', 'depth', 'canny']
    """
    return kinds[number // BLOCK % len(kinds)]


def measure_name(kind: Kind) -> str:
    """Of a kind's measure.

    >>> measure_name("pose"), measure_name("depth")
    ('pose: PCK@0.2', 'depth: rank correlation')
    """
    return f"{kind}: {PCK if kind == 'pose' else MATCHES[kind]}"


class ConditionJudge:
    """The condition of every case, read again out of its pictures and compared with the one that was given."""

    def __init__(self, kinds: Sequence[Kind], keypoint_reader: KeypointReader, dense_reader: DenseReader) -> None:
        self.kinds, self.keypoint_reader = tuple(kinds), keypoint_reader
        depth = DenseSignal("depth", dense_reader, recognise=False)
        self.signals: dict[str, Signal] = {
            "canny": Canny(recognise=False),
            "soft_edge": DenseSignal("soft_edge", dense_reader, recognise=False),
            "lines": Lines(recognise=False),
            "scribble": Scribble(recognise=False),
            "depth": depth,
            "normal": Normal(depth, recognise=False),
            "segmentation": DenseSignal("segmentation", dense_reader, recognise=False),
        }
        dense, points = (
            f"theatre-{name}@{content_hash(reader)}"
            for name, reader in (("dense", dense_reader), ("keypoints", keypoint_reader))
        )
        labels = dict.fromkeys(("soft_edge", "depth", "normal", "segmentation"), dense) | {"pose": points}
        self.fingerprint = f"conditions {','.join(self.kinds)} {dense} {points}"
        self.measures = tuple(
            Measure(
                measure_name(kind),
                higher=kind != "normal",
                extractor=labels.get(kind, ""),
                digits=1 if kind == "normal" else 3,
            )
            for kind in self.kinds
        )

    def __call__(self, shown: Sequence[Shown[tuple[Scene, Kind]]]) -> Sequence[Values]:
        found: list[Values] = []
        for one in shown:
            name = measure_name(one.case.truth[1])
            found.append({arm: {name: self.match(picture, *one.case.truth)} for arm, picture in one.pictures.items()})
        return found

    def match(self, picture: Image.Image, scene: Scene, kind: Kind) -> float:
        """How well the condition of a scene is found in a picture."""
        if kind == "pose":
            read = self.keypoint_reader.keypoints([picture])[0]
            return read_pck(read, keypoints(scene, size=picture.width), picture.size)
        return condition_match(self.signals[kind](picture), condition(scene, kind, picture.width))


def build(
    settings: Settings,
    n: int,
    keypoint_reader: KeypointReader | None = None,
    dense_reader: DenseReader | None = None,
    clip: TextExtractor | None = None,
) -> Suite[tuple[Scene, Kind]]:
    """The suite of ``n`` cases; eight kinds share them.

    Raises:
        InputError: a network for one kind where all are asked for.
        ModelError: the theatre's readers are not in this installation.
    """
    kinds = settings.kinds
    if len(kinds) > 1 and "{kind}" not in settings.network and not settings.network.endswith("multi"):
        raise InputError(
            f"The network {settings.network!r} would be given every kind of condition. Say its own (kind=…), or write "
            "{kind} where the names of eight differ."
        )

    def case(number: int) -> Case[tuple[Scene, Kind]]:
        kind, scene = kind_of(number, kinds), sample_scene(FIRST_SCENE + number, "held_out", CORE_MIX)
        plain = RunSpec(
            model=settings.model,
            prompt=full_caption(scene),
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            seed=settings.seed + number,
        )
        control = ControlNet(
            settings.network.format(kind=kind), [condition(scene, kind).picture], scale=settings.scale, kind=kind
        )
        ours = plain.model_copy(update={"controls": [control]})
        # Both branches are told the same, so that guidance would only cost.
        empty = ours.model_copy(update={"prompt": "", "guidance_scale": 1.0})
        specs = {WITHOUT: plain, WITH: ours, EMPTY: empty}
        if settings.guess:
            guess = control.model_copy(update={"guess_mode": True})
            specs[GUESS] = ours.model_copy(update={"prompt": "", "controls": [guess]})
        title = f"{kind}: {plain.prompt}"
        return Case(number, title, (scene, kind), specs, {TRUE: lambda: render(scene)})

    judge = ConditionJudge(
        kinds,
        keypoint_reader or KeypointReader.load(PoseJudge.folders()[1]),
        dense_reader or theatre_dense_reader(),
    )
    score = PromptScore(clip or theatre_clip(), {WITHOUT: WITHOUT, WITH: WITH, TRUE: WITH})

    def rank(values: Values) -> tuple[float, ...]:
        return tuple(
            (value if measure.higher else 1 - value / 90)
            for measure in judge.measures
            if (value := values[WITH].get(measure.name)) is not None
        )

    return Suite(
        name="controlnet",
        title="ControlNet: the condition, read again out of what was drawn",
        n=n,
        settings=settings,
        arms=(
            Arm(WITHOUT, "no control"),
            Arm(WITH, "ControlNet"),
            Arm(EMPTY, "empty prompt"),
            *((Arm(GUESS, "empty prompt, guess mode"),) if settings.guess else ()),
            Arm(TRUE, "true picture (readers)", known=True),
        ),
        case=case,
        judges=(judge, score),
        table=Table(
            rank=rank,
            baseline=WITHOUT,
            ours=WITH,
            others=(EMPTY, *((GUESS,) if settings.guess else ())),
            note="Every case has one kind of condition, so each row has its share of the cases. The true column is "
            "what is lost by reading alone.",
        ),
        per_prompt=frozenset({"controlnet.image"}),
        weights=tuple(dict.fromkeys(settings.network.format(kind=kind) for kind in kinds)),
        reference=TRUE,
        world=WORLD_VERSION,
    )
