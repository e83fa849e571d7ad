"""What suites of edits share: held-out edits with their captions, the judge, and the arms beside a method's own.

A held-out edit of the theatre gives two captions, before and after. The source picture is drawn from the first; the
edit from the second, or from the first and something else, by the method, and by plain re-prompting, all from the same
noise. The attribute reader says whether the change was made and the rest kept; PSNR to the source is taken outside the
region that the edit is about, by keypoints. The truth of the same edit, rendered before and after, goes through the
same judge: its columns have the error of readers and region.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from controlroom.core.errors import InputError
from controlroom.core.spec import RunSpec
from controlroom.data.theatre.attributes import ABSENT, attributes
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.edits import KINDS, Edit, sample_edit
from controlroom.data.theatre.render import render
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.evaluation.extractor import content_hash
from controlroom.evaluation.extractors.theatre import theatre_reader
from controlroom.evaluation.metrics.background import background
from controlroom.evaluation.metrics.pixels import unit_pixels
from controlroom.evaluation.regions import PUPPET, Part, region_of
from controlroom.evaluation.retarget_judge import Judge as Readers
from controlroom.evaluation.suites.suite import (
    Arm,
    Case,
    Judge,
    Measure,
    Shown,
    Suite,
    SuiteSettings,
    Table,
    Values,
)
from controlroom.evaluation.theatre_quality import JUDGED
from controlroom.signals.readers import AttributeReader, KeypointReader

SOURCE, REPROMPTED, BEFORE, AFTER = "source", "reprompted", "before", "after"
MADE, REST, PSNR, L1 = "change made", "rest kept", "PSNR outside", "L1 outside"
SOURCE_RIGHT, HELD = "source as asked", "change held by the region"
CEILING = 60.0
"""dB at which PSNR is cut: that of rounding to bytes is 58.9."""
#: Kinds of edits (`data.theatre.edits.KINDS`) -> parts that they are about; others change the whole picture.
ABOUT: dict[str, tuple[Part, ...]] = {
    "top colour": ("top",),
    "top pattern": ("top",),
    "lower colour": ("lower",),
    "lower kind": ("lower",),
    "hair colour": ("hair",),
    "hat": ("hat",),
    "expression": ("hair",),
    "pose": PUPPET,
}
_WHOLE = 0.98
"""A region that covers this share of a picture leaves nothing to compare."""


def edit_number(number: int, kinds: Sequence[str], fits: Callable[[Edit], bool] = lambda edit: True) -> Edit:
    """A held-out edit of one puppet, alone, flat and from the front; kinds take turns.

    Raises:
        InputError: an unknown kind, or one that no such edit has.
    """
    known = [kind for kind in KINDS if not kind.startswith("prop")]
    if not kinds or not set(kinds) <= set(known):
        raise InputError(f"kinds are some of {', '.join(known)}; got {', '.join(kinds) or 'none'}.")
    chosen = kinds[number % len(kinds)]
    for attempt in range(10_000):
        edit = sample_edit(number * 10_000 + attempt, "held_out", chosen)
        scene = edit.before
        alone = len(scene.actors) == 1 and scene.style == "flat" and len(scene.puppets) == 1
        if alone and scene.puppets[0].view == "front" and fits(edit):
            return edit
    raise InputError(f"No edit of the kind {chosen!r} fits this suite.")


def changed_questions(edit: Edit) -> list[str]:
    """Questions whose true answers differ."""
    before, after = attributes(edit.before), attributes(edit.after)
    return [question for question in before if before[question] != after[question]]


def kept_questions(edit: Edit) -> list[str]:
    """Questions of quality, and those about props that are there, whose answers an edit must leave alone."""
    before, after = attributes(edit.before), attributes(edit.after)
    return [
        question
        for question, answer in before.items()
        if answer == after[question]
        and answer not in (None, ABSENT)
        and (question in JUDGED or question in {prop.kind for prop in edit.before.props})
    ]


def _as_told(read: Mapping[str, str], scene: Any, edit: Edit) -> bool:
    """Whether all that the edit changes is read as the scene has it."""
    truth = attributes(scene)
    return all(read[q] == truth[q] for q in changed_questions(edit) if truth[q] is not None)


@dataclass(frozen=True)
class Compared:
    """Arms that are compared with another one.

    Attributes:
        source: the arm before the edit.
        edited: arms after it.
        true: the source is the true picture of the scene before, so `Edit.changed` is known of it.
    """

    source: str
    edited: tuple[str, ...]
    true: bool = False


class EditJudge:
    """Was the change made, is the rest as it was, and are the pixels outside as they were.

    Args:
        attribute_reader, keypoint_reader: that look at the pictures.
        compared: which arms with which.
        true_region: outside means where the true pictures before and after do not differ, instead of around the bones.
            For sources that are true pictures.
    """

    def __init__(
        self,
        attribute_reader: AttributeReader,
        keypoint_reader: KeypointReader,
        compared: Sequence[Compared],
        true_region: bool = False,
    ) -> None:
        self.attribute_reader, self.keypoint_reader = attribute_reader, keypoint_reader
        self.compared, self.true_region = tuple(compared), true_region
        reads = f"theatre-attributes@{content_hash(attribute_reader)}"
        places = "" if true_region else f"theatre-keypoints@{content_hash(keypoint_reader)}"
        self.fingerprint = f"edits {reads} {places or 'true regions'}"
        held = () if true_region else (Measure(HELD, higher=None, extractor=places),)
        self.measures = (
            Measure(MADE, "share", extractor=reads),
            Measure(REST, extractor=reads),
            Measure(PSNR, extractor=places, digits=1),
            Measure(L1, higher=False, extractor=places, digits=4),
            Measure(SOURCE_RIGHT, "share", extractor=reads),
            *held,
        )

    def __call__(self, shown: Sequence[Shown[Edit]]) -> Sequence[Values]:
        found: list[dict[str, dict[str, float | None]]] = [{} for _ in shown]
        for group in self.compared:
            before = self._looked_at(shown, group.source)
            for row, one, (read, _) in zip(found, shown, before, strict=True):
                edit = one.case.truth
                row[group.source] = {SOURCE_RIGHT: float(_as_told(read, edit.before, edit))}
            for arm in group.edited:
                after = self._looked_at(shown, arm, edit_moves(shown))
                for row, one, first, second in zip(found, shown, before, after, strict=True):
                    region = self._region(one, group.source, first[1], second[1])
                    row[arm] = self._compare(one, group.source, arm, first[0], second[0], region)
                    if group.true and arm == group.edited[-1] and region is not None and not self.true_region:
                        changed = one.case.truth.changed(region.shape[0])
                        row[group.source][HELD] = float((changed & region).sum() / max(changed.sum(), 1))
        return found

    def _looked_at(
        self, shown: Sequence[Shown[Edit]], arm: str, places: bool = True
    ) -> list[tuple[dict[str, str], NDArray | None]]:
        pictures = [one.pictures[arm] for one in shown]
        read = self.attribute_reader.read(pictures)
        if self.true_region or not places:
            return [(answers, None) for answers in read]
        return list(zip(read, self.keypoint_reader.keypoints(pictures), strict=True))

    def _region(
        self, one: Shown[Edit], source: str, first: NDArray | None, second: NDArray | None
    ) -> NDArray[np.bool_] | None:
        """Where the edit may change pixels of the source; None where that is everywhere."""
        edit, size = one.case.truth, one.pictures[source].size
        if self.true_region:
            return edit.changed(size[1])
        if edit.kind not in ABOUT or first is None:
            return None
        region = region_of(first, ABOUT[edit.kind], size)
        if edit.kind == "pose" and second is not None:
            region |= region_of(second, PUPPET, size)
        return region

    @staticmethod
    def _compare(
        one: Shown[Edit],
        source: str,
        arm: str,
        read: Mapping[str, str],
        own: Mapping[str, str],
        region: NDArray[np.bool_] | None,
    ) -> dict[str, float | None]:
        edit = one.case.truth
        rest = kept_questions(edit)
        values: dict[str, float | None] = {
            MADE: float(_as_told(own, edit.after, edit)),
            REST: float(np.mean([own[question] == read[question] for question in rest])) if rest else None,
            PSNR: None,
            L1: None,
        }
        if region is not None and region.mean() < _WHOLE:
            before, after = (one.pictures[name] for name in (source, arm))
            first, second = (unit_pixels([picture]) for picture in (before, sized(after, before.size)))
            kept = background(first, second, torch.from_numpy(region)[None])
            values[PSNR], values[L1] = min(float(kept.psnr), CEILING), float(kept.l1)
        return values


def edit_moves(shown: Sequence[Shown[Edit]]) -> bool:
    """Whether any edit moves the puppet, so that keypoints of the edited picture are needed."""
    return any(one.case.truth.kind == "pose" for one in shown)


def sized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture at a size; itself where it has it."""
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def readers(
    attribute_reader: AttributeReader | None, keypoint_reader: KeypointReader | None
) -> tuple[AttributeReader, KeypointReader]:
    """Those that are given, or the theatre's.

    Raises:
        ModelError: the theatre's are not in this installation.
    """
    return attribute_reader or theatre_reader(), keypoint_reader or KeypointReader.load(Readers.folders()[1])


def both_captions(edit: Edit) -> str:
    """What a report says of an edit: the captions before and after."""
    return f"{full_caption(edit.before)} → {full_caption(edit.after)}"


def caption_specs(edit: Edit, settings: SuiteSettings, number: int) -> tuple[RunSpec, RunSpec]:
    """Runs of the captions before and after, from the same noise."""
    source = RunSpec(
        model=settings.model,
        prompt=full_caption(edit.before),
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        seed=settings.seed + number,
    )
    return source, source.model_copy(update={"prompt": full_caption(edit.after)})


Ours = Callable[[Edit, RunSpec, RunSpec], Mapping[str, RunSpec]]
"""The edit, and the runs of its captions before and after -> the method's own arms."""


def editing_suite(
    name: str,
    title: str,
    settings: SuiteSettings,
    n: int,
    edit: Callable[[int], Edit],
    arms: Sequence[Arm],
    ours: Ours,
    attribute_reader: AttributeReader | None,
    keypoint_reader: KeypointReader | None,
    per_prompt: frozenset[str] = frozenset(),
    judges: tuple[Judge[Edit], ...] = (),
    note: str = "",
) -> Suite[Edit]:
    """A suite of drawn sources: the method's arms beside re-prompting, and the truth.

    Args:
        name, title, settings, n: of the suite.
        edit: number -> edit.
        arms: the method's; the first is the one that differences and ranks are of.
        ours: draws them.
        attribute_reader, keypoint_reader: None: the theatre's.
        per_prompt: as in `Suite`.
        judges: beside `EditJudge`.
        note: what a reader must know beside what holds for all of them.

    Raises:
        ModelError: the theatre's readers are not in this installation.
    """
    names = tuple(arm.name for arm in arms)

    def case(number: int) -> Case[Edit]:
        found = edit(number)
        source, target = caption_specs(found, settings, number)
        specs = {SOURCE: source, REPROMPTED: target, **ours(found, source, target)}
        known = {BEFORE: lambda: render(found.before), AFTER: lambda: render(found.after)}
        return Case(number, both_captions(found), found, specs, known)

    groups = (Compared(SOURCE, (REPROMPTED, *names)), Compared(BEFORE, (AFTER,), true=True))
    return Suite(
        name=name,
        title=title,
        n=n,
        settings=settings,
        arms=(
            Arm(SOURCE, "source"),
            Arm(REPROMPTED, "re-prompted"),
            *arms,
            Arm(BEFORE, "true before (readers)", known=True),
            Arm(AFTER, "true after (readers)", known=True),
        ),
        case=case,
        judges=(EditJudge(*readers(attribute_reader, keypoint_reader), groups), *judges),
        table=Table(
            rank=lambda values: edit_rank(values, names[0]),
            baseline=REPROMPTED,
            ours=names[0],
            others=names[1:],
            note=f"PSNR (cut at {CEILING:.0f} dB) and L1 are to the source picture, outside the part that is edited. "
            "All are drawn from the same noise. The true columns have the error of readers and region."
            + (f" {note}" if note else ""),
        ),
        per_prompt=per_prompt,
        reference=SOURCE,
        world=WORLD_VERSION,
    )


def edit_rank(values: Values, arm: str) -> tuple[float, ...]:
    """Changes that were made before those that were not; then by how well the outside was kept."""
    own = values[arm]
    outside = own[PSNR]
    return own[MADE] or 0.0, 10 * (own[REST] or 0.0) if outside is None else outside
