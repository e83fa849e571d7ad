"""The jobs of the suite ``combined``: a scene asked for several changes, and each way of making them as a run.

Each change swaps one colour word. Prompt-to-Prompt makes some, confined to the edited parts by its local blend; SEGA
makes the others by concepts; Attend-and-Excite strengthens the words that are new; ControlNet has the true pose, and
the person comes from a picture elsewhere, looked up only outside the parts that are to change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from controlroom.backbones.loading import THEATRE, find_model
from controlroom.controls.editing.prompt_to_prompt import PromptToPrompt
from controlroom.controls.guidance.attend_and_excite import AttendAndExcite
from controlroom.controls.guidance.semantic_guidance import SemanticEdit, SemanticGuidance
from controlroom.controls.personal.ip_adapter import IPAdapter
from controlroom.controls.pose.appearance import AppearanceControl
from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.core.control import Control
from controlroom.core.errors import InputError, ModelError
from controlroom.core.spec import RunSpec
from controlroom.data.theatre import vocabulary as v
from controlroom.data.theatre.attributes import attributes
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.edits import Edit, further_edit
from controlroom.data.theatre.pairs import appearance
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import Dice, Scene
from controlroom.data.theatre.truth import keypoints
from controlroom.evaluation.regions import Part, region_of
from controlroom.evaluation.retarget_methods import pose_of
from controlroom.evaluation.suites import editing
from controlroom.evaluation.suites.editing import (
    REPROMPTED,
    SOURCE,
)
from controlroom.evaluation.suites.prompt_to_prompt import COLOURS, as_many_words
from controlroom.evaluation.suites.semantic_guidance import sentence
from controlroom.evaluation.suites.suite import (
    SuiteSettings,
)

COMBINED, SWAPPED, BLENDED, SEGA = "combined", "prompt_to_prompt", "prompt_to_prompt_local", "semantic_guidance"
POSED, WORDS = "controlnet", "words"
Held = Literal["auto", "ip_adapter", "appearance_control", "none"]


class Settings(SuiteSettings):
    """Which changes by which method, and how strongly each acts."""

    words: tuple[str, ...] = ("lower colour",)
    """Kinds of changes that Prompt-to-Prompt makes;"""
    concepts: tuple[str, ...] = ("top colour",)
    """and those that SEGA makes: colours."""
    held: Held = "auto"
    """What holds the person; auto: IP-Adapter where it is, else AppearanceControl."""
    pose: str = f"{THEATRE}/pose"
    ip_adapter: str = f"{THEATRE}/ip_adapter"
    appearance: str = f"{THEATRE}/appearance"
    instructed: str = f"{THEATRE}/instruct_pix2pix"
    """InstructPix2Pix; the arm is left out where it is not."""
    cross_replace: float = Field(default=0.4, ge=0, le=1)
    self_replace: float = Field(default=0.8, ge=0, le=1)
    """Of Prompt-to-Prompt wherever it acts, as in the suite ``prompt_to_prompt``: peers are at their best."""
    blend_threshold: float = Field(default=0.3, ge=0, lt=1)
    blend_resolution: int | None = 16
    """Of the layers that say where the edited parts are: the theatre's finest; at a quarter of its latents' 16x16 the
    words are everywhere. None: the control's own choice."""
    scale: float = Field(default=8.0, gt=0)
    """Of SEGA's concepts where it is alone, as in the suite ``semantic_guidance``;"""
    confined_scale: float = Field(default=10.0, gt=0)
    """and where the local blend confines what it does, which bears more."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    threshold: float = Field(default=0.9, ge=0, le=1)
    moved: float = Field(default=0.25, gt=0, le=1)
    """Share of the steps before which Attend-and-Excite moves the latents;"""
    step_size: float = Field(default=20.0, ge=0)
    reached: float = Field(default=0.5, ge=0, le=1)
    """the attention that its words must reach in the first of them;"""
    refinements: int = Field(default=5, ge=1, le=200)
    """by so many moves at most."""
    text_guidance_scale: float = Field(default=7.5, gt=1)
    image_guidance_scale: float = Field(default=1.5, ge=0)
    """Of InstructPix2Pix."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of all changes, in the order in which they are made."""
        return (*self.words, *self.concepts)


@dataclass(frozen=True)
class Job:
    """Several changes of one scene.

    Attributes:
        parts: one after the other.
        reference: the same person elsewhere, as before the changes.
    """

    parts: tuple[Edit, ...]
    reference: Scene

    @property
    def whole(self) -> Edit:
        """All changes as one."""
        kinds = " and ".join(part.kind for part in self.parts)
        said = " and ".join(part.instruction for part in self.parts)
        return Edit(self.parts[0].before, said, self.parts[-1].after, kinds)

    def upto(self, count: int) -> Scene:
        """The scene after so many of the changes."""
        return self.parts[count - 1].after if count else self.parts[0].before

    def region(self, size: tuple[int, int]) -> NDArray[np.bool_]:
        """[height, width]: the parts that change, around the true bones, and every pixel that truly changes."""
        points = keypoints(self.whole.before, size=size[0])
        parts: list[Part] = [part for edit in self.parts for part in editing.ABOUT[edit.kind]]
        return region_of(points, parts, size) | self.whole.changed(size[0])


def job_number(number: int, settings: Settings) -> Job:
    """A held-out job; each of its changes swaps one word.

    Raises:
        InputError: kinds that are no colours, or none, or one twice.
    """
    kinds = settings.kinds
    if not settings.words or not settings.concepts or len(set(kinds)) < len(kinds) or not set(kinds) <= set(COLOURS):
        raise InputError(
            f"words and concepts share {', '.join(COLOURS)} between them, at least one each; got "
            f"words={settings.words!r}, concepts={settings.concepts!r}."
        )
    for attempt in range(1000):
        parts = [editing.edit_number(number * 1000 + attempt, kinds[:1], as_many_words)]
        for kind in kinds[1:]:
            found = further_edit(parts[-1], number * 1000 + attempt, kind, "held_out")
            if found is None or not as_many_words(found):
                break
            parts.append(found)
        if len(parts) == len(kinds) and _told_apart(parts):
            dice = Dice("combined", number, attempt)
            one = parts[0].before.puppets[0].identity
            elsewhere = dice.pick(tuple(place for place in v.PLACES if place != parts[0].before.place))
            return Job(tuple(parts), appearance(one, dice, elsewhere, int(dice.unit() * 2**31), free=0.0))
    raise InputError(f"No scene was found that changes in {', '.join(kinds)}.")


def _told_apart(parts: Sequence[Edit]) -> bool:
    """Whether each new colour is one that nothing else of the puppet has, so that it is a word of its own."""
    before, after = (attributes(scene) for scene in (parts[0].before, parts[-1].after))
    worn = [before[kind] for kind in COLOURS] + [parts[0].before.puppets[0].identity.hat_colour]
    new = [after[part.kind] for part in parts]
    return len(set(new)) == len(new) and not set(new) & set(worn)


def is_there(name: str) -> bool:
    """Whether the weights of that name are on this machine."""
    try:
        find_model(name)
    except ModelError:
        return False
    return True


def holder(settings: Settings) -> Held:
    """What holds the person: as asked, or what there is."""
    if settings.held != "auto":
        return settings.held
    if is_there(settings.ip_adapter):
        return "ip_adapter"
    return "appearance_control" if is_there(settings.appearance) else "none"


def pose_control(job: Job, settings: Settings) -> Control:
    """The scene's true pose."""
    return ControlNet(settings.pose, [pose_of(job.whole.before)], kind="pose")


def person_control(job: Job, settings: Settings, held: Held) -> list[Control]:
    """The person from a picture elsewhere, where nothing is to change."""
    if held == "none":
        return []
    picture = render(job.reference)
    kept = Image.fromarray(np.where(job.region(picture.size), 0, 255).astype(np.uint8))
    if held == "ip_adapter":
        return [IPAdapter(settings.ip_adapter, [[picture]], mask=kept)]
    return [AppearanceControl([[picture]], settings.appearance, mask=[kept])]


def swap(job: Job, settings: Settings, blend: bool) -> PromptToPrompt:
    """Prompt-to-Prompt from the caption before; with ``blend`` confined to the parts that are edited."""
    words = edited_words(job)
    return PromptToPrompt(
        source=[full_caption(job.whole.before)],
        cross_replace=settings.cross_replace,
        self_replace=settings.self_replace,
        mode="replace",
        local_blend=(words, words) if blend else None,
        blend_threshold=settings.blend_threshold,
        blend_resolution=settings.blend_resolution,
        keep_source=blend,
    )


def edited_words(job: Job) -> list[str]:
    """What the parts are called that are to change.

    >>> edited_words(job_number(0, Settings()))
    ['shorts', 'sweater']
    """
    one = job.whole.before.puppets[0].identity
    names = {"top colour": one.top.kind, "lower colour": one.lower.kind, "hair colour": "hair"}
    return [names[part.kind] for part in job.parts]


def concepts(parts: Sequence[Edit], settings: Settings, scale: float) -> SemanticGuidance:
    """SEGA's: what is wanted is added, what was there is taken away."""
    warmup = round(settings.warmup * settings.steps)
    said = [(scene, part.kind, away) for part in parts for scene, away in ((part.after, False), (part.before, True))]
    return SemanticGuidance(
        [
            SemanticEdit(
                prompt=sentence(scene, kind) or "",
                reverse=away,
                scale=scale,
                warmup=warmup,
                threshold=settings.threshold,
            )
            for scene, kind, away in said
        ]
    )


def strengthened(job: Job, settings: Settings) -> AttendAndExcite:
    """Attend-and-Excite on the new words of the prompt."""
    after = attributes(job.whole.after)
    words = [str(after[kind]) for kind in settings.words]
    return AttendAndExcite(
        words=[words],
        iterations=max(1, round(settings.moved * settings.steps)),
        thresholds={0: settings.reached},
        step_size=settings.step_size,
        refinements=settings.refinements,
    )


def runs(job: Job, number: int, settings: Settings, held: Held) -> dict[str, RunSpec]:
    """Every arm that one run draws, all from one noise."""
    source, target = editing.caption_specs(job.whole, settings, number)
    conditions = [pose_control(job, settings), *person_control(job, settings, held)]
    swapped = full_caption(job.upto(len(settings.words)))
    sega = concepts(job.parts[len(settings.words) :], settings, settings.confined_scale)

    def run(prompt: str | list[str], *controls: Control) -> RunSpec:
        return target.model_copy(update={"prompt": prompt, "controls": [*conditions, *controls]})

    together = [swap(job, settings, blend=True), sega, strengthened(job, settings)]
    return {
        SOURCE: run(source.prompt),
        COMBINED: run(swapped, *together),
        REPROMPTED: run(target.prompt),
        SWAPPED: run(target.prompt, swap(job, settings, blend=False)),
        BLENDED: run(target.prompt, swap(job, settings, blend=True)),
        SEGA: run(source.prompt, concepts(job.parts, settings, settings.scale)),
        POSED: target.model_copy(update={"controls": conditions[:1]}),
        WORDS: target,
    }
