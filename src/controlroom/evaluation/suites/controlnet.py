"""What a condition holds: it is read again out of the picture that was drawn along it.

Held-out scenes of one puppet, each with one kind of condition; drawn without the control, with it, and with it and an
empty prompt, from the same noise. The true picture is read too: its column is what reading itself loses, which for
scribbles and straight lines is much. Poses are read by the theatre's keypoint network, depth, normals, parts and soft
edges by its dense reader, the others as in any picture.

The same cases measure four ways of control: one ControlNet for all kinds, a ControlNet or a T2I-Adapter for each, and
one Uni-ControlNet, each with the number of parameters of what was used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

from PIL import Image
from pydantic import Field

from controlroom.backbones.differences import header_of_difference, is_difference
from controlroom.backbones.file_header import read_header
from controlroom.backbones.loading import find_model
from controlroom.backbones.uni_controlnet import LOCAL
from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.controls.spatial.t2i_adapter import T2IAdapter
from controlroom.controls.spatial.uni_controlnet import LocalConditions, UniControlNet
from controlroom.core.control import Control
from controlroom.core.errors import InputError, ModelError
from controlroom.core.spec import RunSpec
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.conditions import condition
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import Scene, sample_scene
from controlroom.data.theatre.truth import keypoints
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.evaluation.condition_match import MATCHES, condition_match
from controlroom.evaluation.estimates import Estimate
from controlroom.evaluation.extractor import TextExtractor, content_hash
from controlroom.evaluation.extractors.theatre import theatre_clip
from controlroom.evaluation.metrics.pck import read_pck
from controlroom.evaluation.retarget_judge import Judge as PoseJudge
from controlroom.evaluation.suites.judges import PromptScore
from controlroom.evaluation.suites.suite import (
    Arm,
    Case,
    Derived,
    Measure,
    Shown,
    Suite,
    SuiteSettings,
    Table,
    Values,
)
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
SIZE = "parameters of all networks, millions"
Method = Literal["controlnet", "t2i_adapter", "uni_controlnet"]
_TITLES: dict[Method, str] = {
    "controlnet": "ControlNet",
    "t2i_adapter": "T2I-Adapter",
    "uni_controlnet": "Uni-ControlNet",
}


class Settings(SuiteSettings):
    """A network for one kind is measured with ``kind`` and ``network``."""

    later: ClassVar[frozenset[str]] = frozenset({"method"})
    method: Method = "controlnet"
    network: str = "theatre/multi"
    """Its weights; ``{kind}`` in it stands for the kind, where each has its own."""
    kind: Kind | Literal["all"] = "all"
    """All: one after the other, in blocks of eight cases."""
    scale: float = Field(default=1.0, gt=0)
    guess: bool = False
    """Also draw empty prompts in guess mode."""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return KINDS if self.kind == "all" else (self.kind,)

    @property
    def networks(self) -> tuple[str, ...]:
        """Weights of all kinds, each once."""
        return tuple(dict.fromkeys(self.network.format(kind=kind) for kind in self.kinds))


class SingleSettings(Settings):
    """A ControlNet for each kind, as the stages ``controlnet_KIND`` of the theatre's training leave them."""

    network: str = "runs/theatre/controlnet_{kind}/weights"


class T2IAdapterSettings(Settings):
    """A T2I-Adapter for each kind, as the stages ``t2i_adapter_KIND`` leave them."""

    later: ClassVar[frozenset[str]] = frozenset()
    method: Method = "t2i_adapter"
    network: str = "runs/theatre/t2i_adapter_{kind}/weights"


class UniControlNetSettings(Settings):
    """One network that was trained on several conditions at once; it is given one."""

    later: ClassVar[frozenset[str]] = frozenset()
    method: Method = "uni_controlnet"
    network: str = "theatre/uni_controlnet"


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


def control_of(settings: Settings, picture: Image.Image, kind: Kind) -> Control:
    """What draws along a condition."""
    network, scale = settings.network.format(kind=kind), settings.scale
    if settings.method == "t2i_adapter":
        return T2IAdapter(network, [picture], scale=scale)
    if settings.method == "uni_controlnet":
        return UniControlNet(network, LocalConditions(**{kind: [picture]}), scale=scale)
    return ControlNet(network, [picture], scale=scale, kind=kind)


def parameters_of(settings: Settings) -> Estimate:
    """Millions of parameters of all networks that the cases need, and how many these are; none where they are missing.

    Of a Uni-ControlNet only the local adapter counts, which alone is used here.
    """
    try:
        found = [_parameters(find_model(name), settings.method) for name in settings.networks]
    except ModelError:
        return Estimate(mean=math.nan, low=math.nan, high=math.nan, n=0)
    return Estimate(mean=sum(found) / 1e6, low=math.nan, high=math.nan, n=len(found))


def _parameters(place: Path, method: Method) -> int:
    """Numbers in the weights of one network, told from the files' headers."""
    place = place / LOCAL if method == "uni_controlnet" else place
    if is_difference(place):
        return header_of_difference(place).parameters
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    return sum(read_header(file).parameters for file in files)


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
        InputError: a network for one kind where all are asked for, or guess mode of another method.
        ModelError: the theatre's readers are not in this installation.
    """
    _check(settings)
    kinds, title = settings.kinds, _TITLES[settings.method]

    def case(number: int) -> Case[tuple[Scene, Kind]]:
        kind, scene = kind_of(number, kinds), sample_scene(FIRST_SCENE + number, "held_out", CORE_MIX)
        plain = RunSpec(
            model=settings.model,
            prompt=full_caption(scene),
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            seed=settings.seed + number,
        )
        control = control_of(settings, condition(scene, kind).picture, kind)
        ours = plain.model_copy(update={"controls": [control]})
        # Both branches are told the same, so that guidance would only cost.
        empty = ours.model_copy(update={"prompt": "", "guidance_scale": 1.0})
        specs = {WITHOUT: plain, WITH: ours, EMPTY: empty}
        if settings.guess:
            guess = control.model_copy(update={"guess_mode": True})
            specs[GUESS] = ours.model_copy(update={"prompt": "", "controls": [guess]})
        return Case(number, f"{kind}: {plain.prompt}", (scene, kind), specs, {TRUE: lambda: render(scene)})

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
        name=settings.method,
        title=f"{title}: the condition, read again out of what was drawn",
        n=n,
        settings=settings,
        arms=(
            Arm(WITHOUT, "no control"),
            Arm(WITH, title),
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
            derived=(Derived(SIZE, "number", lambda _: parameters_of(settings)),),
            note="Every case has one kind of condition, so each row has its share of the cases. The true column is "
            "what is lost by reading alone.",
        ),
        per_prompt=frozenset({"controlnet.image", "t2i_adapter.image", "uni_controlnet.images"}),
        weights=settings.networks,
        reference=TRUE,
        world=WORLD_VERSION,
    )


def build_single(settings: SingleSettings, n: int) -> Suite[tuple[Scene, Kind]]:
    """The same with a ControlNet for each kind.

    Raises:
        InputError, ModelError: as `build`.
    """
    title = "A ControlNet for each kind: the condition, read again out of what was drawn"
    return replace(build(settings, n), name="controlnet_single", title=title)


def _check(settings: Settings) -> None:
    """Raises InputError: one network for one kind would be given all, or guess mode where there is none."""
    for_all = settings.method == "uni_controlnet" or (
        settings.method == "controlnet" and settings.network.endswith("multi")
    )
    if len(settings.kinds) > 1 and "{kind}" not in settings.network and not for_all:
        raise InputError(
            f"The network {settings.network!r} would be given every kind of condition. Say its own (kind=…), or write "
            "{kind} where the names of eight differ."
        )
    if settings.guess and settings.method != "controlnet":
        raise InputError(f"Only a ControlNet has a guess mode; leave guess out with method={settings.method}.")
