"""Structure of one picture, appearance of another: Ctrl-X beside other ways to the same.

Two held-out puppets: one stands as the picture shall, the other looks as it shall. The words say only who it is. Every
arm draws from the same noise. Structure is judged by the joints and the parts that are read again, appearance by the
attribute reader's colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from pydantic import Field

from controlroom.backbones.loading import THEATRE, find_model
from controlroom.controls.personal.ip_adapter import IPAdapter
from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.controls.style.cross_image_attention import CrossImageAttention
from controlroom.controls.style.ctrl_x import CtrlX
from controlroom.controls.style.reference_only import ReferenceOnly
from controlroom.core.control import Control
from controlroom.core.errors import ModelError
from controlroom.core.spec import RunSpec
from controlroom.data.theatre.attributes import attributes
from controlroom.data.theatre.captions import article
from controlroom.data.theatre.conditions import condition
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import CANVAS, Scene
from controlroom.data.theatre.truth import keypoints
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.evaluation.condition_match import condition_match
from controlroom.evaluation.extractor import content_hash
from controlroom.evaluation.extractors.theatre import theatre_reader
from controlroom.evaluation.metrics.pck import read_pck
from controlroom.evaluation.retarget_judge import Judge
from controlroom.evaluation.retarget_methods import pair_number, pose_of
from controlroom.evaluation.suites.suite import Arm, Case, Measure, Shown, Suite, SuiteSettings, Table, Values
from controlroom.signals.dense_reader import DenseReader, DenseSignal, theatre_dense_reader
from controlroom.signals.readers import AttributeReader, KeypointReader

PLAIN, OURS, STRUCTURE_ALONE, CROSS, REFERENCE, ADAPTER = (
    "plain",
    "ctrl_x",
    "ctrl_x_structure",
    "cross_image_attention",
    "reference_only",
    "controlnet_ip_adapter",
)
STRUCTURE, APPEARANCE = "structure", "appearance"
PCK, IOU, COLOURS = "PCK@0.2 of the structure", "parts of the structure, IoU", "colours of the appearance"
QUESTIONS = ("top colour", "lower colour", "hair colour", "skin")
FIRST = 2000
"""Number of the first pair."""


class Settings(SuiteSettings):
    """Those of Ctrl-X are the published ones but for its layers.

    The published layers see a quarter of the latents' size. Of the theatre's latents that is 4 x 4, where no pose can
    be told from another: there the decoder's last block stands for its first.
    """

    structure_features: tuple[str, ...] = ("up_blocks.3.resnets.0",)
    structure_attention: tuple[str, ...] = ("up_blocks.3.attentions.0", "up_blocks.3.attentions.1")
    appearance_attention: tuple[str, ...] = (
        "up_blocks.2.attentions.1",
        "up_blocks.2.attentions.2",
        "up_blocks.3.attentions.0",
        "up_blocks.3.attentions.1",
    )
    """Empty: the control's own."""
    structure_schedule: float = Field(default=0.6, ge=0, le=1)
    appearance_schedule: float = Field(default=0.6, ge=0, le=1)
    recurrences: int = Field(default=2, ge=0, le=10)
    eta: float = Field(default=1.0, ge=0, le=1)
    """Of DDIM in the arms of Ctrl-X."""
    strength: float = Field(default=0.68, gt=0, le=1)
    """Of cross-image attention."""


@dataclass(frozen=True)
class Two:
    """Who stands as it shall, and who looks as it shall."""

    structure: Scene
    appearance: Scene


def two_number(number: int) -> Two:
    """Two held-out puppets of one figure, alone, flat and from the front."""
    appearance = pair_number(FIRST + 1000 * number).source
    for attempt in range(1, 1000):
        structure = pair_number(FIRST + 1000 * number + attempt).source
        if structure.puppets[0].identity.figure == appearance.puppets[0].identity.figure:
            return Two(structure, appearance)
    raise AssertionError("no second puppet was found")


class TwoJudge:
    """Whose structure, and whose appearance."""

    def __init__(self, looks: AttributeReader, places: KeypointReader, dense: DenseReader) -> None:
        self.looks, self.places = looks, places
        self.parts = DenseSignal("segmentation", dense, recognise=False)
        reads, points = f"theatre-attributes@{content_hash(looks)}", f"theatre-keypoints@{content_hash(places)}"
        maps = f"theatre-dense@{content_hash(dense)}"
        self.fingerprint = f"structure and appearance {reads} {points} {maps}"
        self.measures = (
            Measure(PCK, extractor=points),
            Measure(IOU, extractor=maps),
            Measure(COLOURS, extractor=reads),
        )

    def __call__(self, shown: Sequence[Shown[Two]]) -> Sequence[Values]:
        found: list[dict[str, dict[str, float | None]]] = [{} for _ in shown]
        for arm in shown[0].pictures:
            pictures = [one.pictures[arm] for one in shown]
            points, answers = self.places.keypoints(pictures), self.looks.read(pictures)
            for row, one, own, read, picture in zip(found, shown, points, answers, pictures, strict=True):
                structure, truth = one.case.truth.structure, attributes(one.case.truth.appearance)
                asked = [question for question in QUESTIONS if truth[question] is not None]
                scale = np.array([CANVAS / picture.width, CANVAS / picture.height, 1.0])
                row[arm] = {
                    PCK: read_pck(own * scale, keypoints(structure), (CANVAS, CANVAS)),
                    IOU: condition_match(self.parts(picture), condition(structure, "segmentation", picture.width)),
                    COLOURS: float(np.mean([read[question] == truth[question] for question in asked])),
                }
        return found


def build(
    settings: Settings,
    n: int,
    looks: AttributeReader | None = None,
    places: KeypointReader | None = None,
    dense: DenseReader | None = None,
) -> Suite[Two]:
    """The suite of ``n`` pairs of pictures; the arm of ControlNet and IP-Adapter if their weights are here.

    Raises:
        ModelError: the theatre's readers are not in this installation.
    """
    weights = tuple(f"{THEATRE}/{name}" for name in ("pose", "ip_adapter"))
    weights = weights if all(_here(name) for name in weights) else ()

    def case(number: int) -> Case[Two]:
        two = two_number(number)
        structure, appearance = render(two.structure), render(two.appearance)
        base = RunSpec(
            model=settings.model,
            prompt=article(two.appearance.puppets[0].identity.figure),
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            scheduler="ddim",
            seed=settings.seed + number,
        )

        def with_(*controls: Control, **changed: float) -> RunSpec:
            return base.model_copy(update={"controls": list(controls), **changed})

        def ctrl_x(look: list[Image.Image] | None) -> RunSpec:
            control = CtrlX(
                [structure],
                look,
                structure_features=list(settings.structure_features) or None,
                structure_attention=list(settings.structure_attention) or None,
                appearance_attention=list(settings.appearance_attention) or None,
                structure_schedule=settings.structure_schedule,
                appearance_schedule=settings.appearance_schedule,
                recurrence=(0.1, 0.5, settings.recurrences),
            )
            return with_(control, eta=settings.eta)

        specs = {
            PLAIN: base,
            OURS: ctrl_x([appearance]),
            STRUCTURE_ALONE: ctrl_x(None),
            CROSS: with_(CrossImageAttention([structure], [appearance], settings.strength), guidance_scale=1.0),
            REFERENCE: with_(ReferenceOnly([[appearance]])),
        }
        if weights:
            net, adapter = ControlNet(weights[0], [pose_of(two.structure)]), IPAdapter(weights[1], [[appearance]])
            specs[ADAPTER] = with_(net, adapter)
        known = {STRUCTURE: lambda: structure, APPEARANCE: lambda: appearance}
        return Case(number, f"{base.prompt}, pair {number}", two, specs, known)

    def rank(values: Values) -> tuple[float, ...]:
        return (values[OURS][COLOURS] or 0.0) + (values[OURS][PCK] or 0.0), values[OURS][IOU] or 0.0

    reader = places or KeypointReader.load(Judge.folders()[1])
    return Suite(
        name="ctrl_x",
        title="The structure of one picture and the appearance of another",
        n=n,
        settings=settings,
        arms=(
            Arm(STRUCTURE, "structure (readers)", known=True),
            Arm(APPEARANCE, "appearance (readers)", known=True),
            Arm(PLAIN, "words alone"),
            Arm(OURS, "Ctrl-X"),
            Arm(STRUCTURE_ALONE, "Ctrl-X, structure alone"),
            Arm(CROSS, "cross-image attention"),
            Arm(REFERENCE, "reference-only"),
            *([Arm(ADAPTER, "pose ControlNet + IP-Adapter")] if weights else []),
        ),
        case=case,
        judges=(TwoJudge(looks or theatre_reader(), reader, dense or theatre_dense_reader()),),
        table=Table(
            rank=rank,
            baseline=ADAPTER if weights else PLAIN,
            ours=OURS,
            others=(CROSS, REFERENCE),
            note="All from the same noise; the words say only who it is. ControlNet is given the true pose.",
        ),
        per_prompt=frozenset(
            {
                *(
                    f"{kind}.{field}"
                    for kind in ("ctrl_x", "cross_image_attention")
                    for field in (STRUCTURE, APPEARANCE)
                ),
                *(f"{kind}.image" for kind in ("reference_only", "controlnet", "ip_adapter")),
            }
        ),
        weights=weights,
        reference=APPEARANCE,
        world=WORLD_VERSION,
    )


def _here(name: str) -> bool:
    try:
        find_model(name)
    except ModelError:
        return False
    return True
