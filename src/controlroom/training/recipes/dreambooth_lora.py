"""DreamBooth with a LoRA: a few pictures of a subject, named by a rare word, and its class kept (arXiv 2208.12242).

As DreamBooth, but low-rank layers beside the frozen network learn instead of the network: a file of a few megabytes.
Deviation from the trainers people use: the pictures of the class are drawn by a job that can be continued.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, PositiveInt, field_validator

from controlroom.core.errors import InputError
from controlroom.data.pictures import Picture
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.base_model import BaseModel
from controlroom.training.class_pictures import class_pictures
from controlroom.training.recipes.lora import LoRARecipe, LoRASettings
from controlroom.training.shown import Shown


class DreamBoothLoRASettings(LoRASettings):
    """How a subject is learned as a LoRA."""

    loop: ClassVar[dict[str, Any]] = {"total_steps": 500, "batch_size": 4, "learning_rate": 1e-4}

    rank: PositiveInt = 4
    buckets: bool = False
    """Must stay off: subject and class are shown in one pass, so all pictures are of one size."""
    class_prompt: str | None = None
    """Names the class ("a photo of a dog"), whose looks are kept; None: no pictures of the class are shown."""
    class_count: PositiveInt = 200
    """Pictures of the class."""
    class_weight: float = Field(default=1.0, ge=0.0)
    """How much errors on the class count."""
    class_steps: PositiveInt = 50
    """Solver steps of each picture of the class."""

    @field_validator("buckets")
    @classmethod
    def _one_size(cls, value: bool) -> bool:
        if value:
            raise ValueError("subject and class are shown in one pass, so all pictures are of one size; leave it out")
        return value

    def build(self, pipe: Pipeline, pictures: Sequence[Picture], folder: Path | None) -> DreamBoothLoRA:
        base = self.networks(pipe)
        shown, beside, held_out = subject_and_class(pipe, base, pictures, self, folder)
        return DreamBoothLoRA(base, shown, self, beside, self.class_weight, held_out)

    def rehearsal(self, pipe: Pipeline, pictures: Sequence[Picture], folder: Path) -> DreamBoothLoRA:
        return self.build(pipe, pictures, None)


class DreamBoothLoRA(LoRARecipe):
    """Recipe: low-rank layers on a subject and its class. Exported is ``lora.safetensors``."""

    name = "dreambooth_lora"


def subject_and_class(
    pipe: Pipeline, base: BaseModel, pictures: Sequence[Picture], settings: Any, folder: Path | None
) -> tuple[Shown, Shown | None, Shown | None]:
    """Pictures of the subject, all under the one prompt, of its class, drawn if they are not there, and held-out ones.

    Args:
        pipe: the untrained model, which draws the class.
        base: its networks.
        pictures: of the subject; their captions count only where no prompt is given.
        settings: those of DreamBooth or DreamBooth-LoRA.
        folder: the class goes to ``class/`` in it; None: nothing is drawn, and the subject stands in for its class.

    Raises:
        InputError: no prompt, and pictures without captions.
    """
    if settings.prompt is None and not all(p.caption for p in pictures):
        raise InputError("The subject needs a name in a prompt, such as prompt = 'a photo of sks dog'.")
    shown, held_out = settings.shown(base, pictures, settings.prompt, captions=settings.prompt is None)
    if settings.class_prompt is None:
        return shown, None, held_out
    drawn = pictures
    if folder is not None:
        drawn = class_pictures(
            pipe, settings.class_prompt, settings.class_count, folder / "class", shown.size, settings.class_steps
        )
    return shown, Shown(base, drawn, settings.class_prompt, size=shown.size), held_out
