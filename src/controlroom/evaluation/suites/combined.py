"""Several edits of one picture at once, each by the method that suits it, beside every method that could do it alone.

A held-out scene of one puppet is asked for two changes or more. The source picture is drawn from the caption before,
with the scene's true pose (ControlNet) and a picture of the same person elsewhere (IP-Adapter where its weights are,
else AppearanceControl), which is looked up only outside the parts that are to change. The combined run adds to that,
from the same noise: Prompt-to-Prompt swaps some words, confined to the edited parts by its local blend; SEGA makes the
other changes by concepts; Attend-and-Excite strengthens the words that are new.

Every peer has one method for all changes, and pose and person held as in the source: prompting again, Prompt-to-Prompt
(with and without local blend), SEGA. Prompting again without the person, and with words alone, stand beside; and
InstructPix2Pix on the source picture, where there are weights. Since the pose is the scene's, the true parts say where
the picture may change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image

from controlroom.backbones.loading import find_model
from controlroom.controls.editing.instruct_pix2pix import InstructPix2Pix
from controlroom.core.spec import RunSpec
from controlroom.data.theatre.attributes import attributes
from controlroom.data.theatre.render import render
from controlroom.data.theatre.truth import keypoints
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.evaluation.estimates import Estimate, mean
from controlroom.evaluation.extractor import content_hash
from controlroom.evaluation.metrics.background import background
from controlroom.evaluation.metrics.pck import read_pck
from controlroom.evaluation.metrics.pixels import unit_pixels
from controlroom.evaluation.suites import editing
from controlroom.evaluation.suites.combined_jobs import (
    BLENDED,
    COMBINED,
    POSED,
    SEGA,
    SWAPPED,
    WORDS,
    Job,
    Settings,
    holder,
    is_there,
    job_number,
    runs,
)
from controlroom.evaluation.suites.editing import (
    AFTER,
    BEFORE,
    CEILING,
    L1,
    MADE,
    PSNR,
    REPROMPTED,
    REST,
    SOURCE,
    SOURCE_RIGHT,
)
from controlroom.evaluation.suites.instruct_pix2pix import INSTRUCTED, editor
from controlroom.evaluation.suites.suite import (
    Arm,
    Case,
    Derived,
    Measure,
    Shown,
    Suite,
    Table,
    Values,
)
from controlroom.sampling.pipeline import Pipeline
from controlroom.signals.readers import AttributeReader, KeypointReader

POSE_HELD, AHEAD = "pose held (PCK@0.2)", "PSNR outside above every single method that can do it"
ABLE = 0.5
"""A peer can do the job at all if it makes all changes in at least this share of the cases."""


class JobJudge:
    """Which changes were made, is the rest as it was, is the pose the commanded one, and are the pixels outside kept.

    Args:
        attribute_reader, keypoint_reader: that look at the pictures.
        kinds: of the changes.
        drawn: arms that are compared with the source; the true picture after is compared with the one before.
    """

    def __init__(
        self,
        attribute_reader: AttributeReader,
        keypoint_reader: KeypointReader,
        kinds: Sequence[str],
        drawn: Sequence[str],
    ) -> None:
        self.attribute_reader, self.keypoint_reader = attribute_reader, keypoint_reader
        self.kinds, self.drawn = tuple(kinds), tuple(drawn)
        reads = f"theatre-attributes@{content_hash(attribute_reader)}"
        places = f"theatre-keypoints@{content_hash(keypoint_reader)}"
        self.fingerprint = f"jobs {','.join(self.kinds)} {reads} {places}"
        self.measures = (
            Measure(MADE, "share", extractor=reads),
            *(Measure(made_name(kind), "share", extractor=reads) for kind in self.kinds),
            Measure(REST, extractor=reads),
            Measure(PSNR, digits=1),
            Measure(L1, higher=False, digits=4),
            Measure(POSE_HELD, extractor=places),
            Measure(SOURCE_RIGHT, "share", extractor=reads),
        )

    def __call__(self, shown: Sequence[Shown[Job]]) -> Sequence[Values]:
        found: list[dict[str, dict[str, float | None]]] = [{} for _ in shown]
        groups = [(SOURCE, arm) for arm in self.drawn] + [(BEFORE, AFTER)]
        read = {
            arm: self.attribute_reader.read([one.pictures[arm] for one in shown])
            for arm in dict.fromkeys(arm for group in groups for arm in group)
        }
        for arm in read:
            points = self.keypoint_reader.keypoints([one.pictures[arm] for one in shown])
            for row, one, own in zip(found, shown, points, strict=True):
                size = one.pictures[arm].size
                row[arm] = {POSE_HELD: read_pck(own, keypoints(one.case.truth.whole.before, size=size[0]), size)}
        for source, arm in groups:
            for number, (row, one) in enumerate(zip(found, shown, strict=True)):
                row[arm] |= self._compared(one, source, arm, read[source][number], read[arm][number])
        for source in (SOURCE, BEFORE):
            for row, one, answers in zip(found, shown, read[source], strict=True):
                truth = attributes(one.case.truth.whole.before)
                asked = editing.changed_questions(one.case.truth.whole)
                row[source][SOURCE_RIGHT] = float(all(answers[question] == truth[question] for question in asked))
        return found

    def _compared(
        self, one: Shown[Job], source: str, arm: str, first: Mapping[str, str], second: Mapping[str, str]
    ) -> dict[str, float | None]:
        job = one.case.truth
        truth = attributes(job.whole.after)
        made = {part.kind: all(second[q] == truth[q] for q in editing.changed_questions(part)) for part in job.parts}
        rest = editing.kept_questions(job.whole)
        before, after = one.pictures[source], editing.sized(one.pictures[arm], one.pictures[source].size)
        region = torch.from_numpy(job.region(before.size))[None]
        kept = background(unit_pixels([before]), unit_pixels([after]), region)
        return {
            MADE: float(all(made.values())),
            **{made_name(kind): float(right) for kind, right in made.items()},
            REST: float(np.mean([second[question] == first[question] for question in rest])) if rest else None,
            PSNR: min(float(kept.psnr), CEILING),
            L1: float(kept.l1),
        }


def made_name(kind: str) -> str:
    """Name of the measure of one change.

    >>> made_name("top colour")
    'top colour made'
    """
    return f"{kind} made"


def instructed(pipe: Pipeline, job: Job, source: RunSpec, settings: Settings) -> Image.Image:
    """The source picture by InstructPix2Pix, told all changes at once."""
    picture = pipe.run(source).images[0]
    control = InstructPix2Pix(picture, image_guidance_scale=settings.image_guidance_scale)
    changed = {
        "prompt": job.whole.instruction,
        "guidance_scale": settings.text_guidance_scale,
        "controls": [control],
    }
    return editor(pipe, settings.instructed).run(source.model_copy(update=changed)).images[0]


def build(
    settings: Settings,
    n: int,
    attribute_reader: AttributeReader | None = None,
    keypoint_reader: KeypointReader | None = None,
) -> Suite[Job]:
    """The suite of ``n`` jobs.

    Raises:
        InputError: kinds of changes that do not fit.
        ModelError: the theatre's readers are not in this installation, or the ControlNet is not there.
    """
    find_model(settings.pose, "pose ControlNet")
    held, with_instruction = holder(settings), is_there(settings.instructed)
    keeps = {"ip_adapter": (settings.ip_adapter,), "appearance_control": (settings.appearance,)}.get(held, ())
    titles = {
        COMBINED: "all together",
        REPROMPTED: "re-prompted",
        SWAPPED: "Prompt-to-Prompt",
        BLENDED: "Prompt-to-Prompt, local blend",
        SEGA: "SEGA",
        **({INSTRUCTED: "InstructPix2Pix"} if with_instruction else {}),
        POSED: "re-prompted, pose alone",
        WORDS: "re-prompted, words alone",
    }
    peers = tuple(arm for arm in titles if arm != COMBINED)

    def case(number: int) -> Case[Job]:
        job = job_number(number, settings)
        specs = runs(job, number, settings, held)
        made = {INSTRUCTED: lambda pipe: instructed(pipe, job, specs[SOURCE], settings)} if with_instruction else {}
        title = f"{specs[SOURCE].prompt} → {specs[REPROMPTED].prompt}"
        known = {BEFORE: lambda: render(job.whole.before), AFTER: lambda: render(job.whole.after)}
        return Case(number, title, job, specs, known, made)

    readers = editing.readers(attribute_reader, keypoint_reader)
    person = {"ip_adapter": "IP-Adapter", "appearance_control": "AppearanceControl"}.get(held, "nothing")
    return Suite(
        name="combined",
        title="Several edits at once: SEGA, Prompt-to-Prompt, Attend-and-Excite, ControlNet and a reference in one run",
        n=n,
        settings=settings,
        arms=(
            Arm(SOURCE, "source"),
            *(Arm(arm, title) for arm, title in titles.items()),
            Arm(BEFORE, "true before (readers)", known=True),
            Arm(AFTER, "true after (readers)", known=True),
        ),
        case=case,
        judges=(JobJudge(*readers, settings.kinds, tuple(titles)),),
        table=Table(
            rank=lambda values: editing.edit_rank(values, COMBINED),
            baseline=REPROMPTED,
            ours=COMBINED,
            others=tuple(arm for arm in peers if arm != REPROMPTED),
            derived=(
                Derived(AHEAD, "number", lambda rows: ahead(rows, peers)),
                *(
                    Derived(f"PSNR outside above {titles[arm]}", "number", lambda rows, arm=arm: above(rows, arm))
                    for arm in peers
                ),
            ),
            note=f"Changes: {', '.join(settings.words)} by Prompt-to-Prompt, {', '.join(settings.concepts)} by SEGA. "
            f"The person is held by {person}. PSNR (cut at {CEILING:.0f} dB) and L1 are to the source picture, outside "
            "the true parts. All are drawn from the same noise. A peer that makes all changes in less than "
            f"{100 * ABLE:.0f} % of the cases cannot do the job.",
        ),
        per_prompt=frozenset(
            {
                "controlnet.image",
                "appearance_control.image",
                "appearance_control.mask",
                "prompt_to_prompt.source",
            }
        ),
        weights=(settings.pose, *keeps, *((settings.instructed,) if with_instruction else ())),
        reference=SOURCE,
        world=WORLD_VERSION,
    )


def above(rows: Sequence[Values], arm: str) -> Estimate:
    """dB by which the combined run keeps the outside better than an arm, case by case."""
    return mean([(row[COMBINED][PSNR] or 0.0) - (row[arm][PSNR] or 0.0) for row in rows])


def ahead(rows: Sequence[Values], peers: Sequence[str]) -> Estimate:
    """The same beside the best of the peers that can do the job at all; NaN where none can."""
    able = [arm for arm in peers if rows and np.mean([row[arm][MADE] or 0.0 for row in rows]) >= ABLE]
    return min((above(rows, arm) for arm in able), key=lambda found: found.mean, default=mean([]))
