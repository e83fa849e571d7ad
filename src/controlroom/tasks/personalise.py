"""A few photos of someone or something -> an adapter that draws them, and pictures that show how well.

DreamBooth with a LoRA under settings that fit the model's size; see `training.recipes.dreambooth_lora`.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from controlroom.core.control import describe
from controlroom.core.errors import InputError
from controlroom.core.files import atomic_path

if TYPE_CHECKING:
    from PIL import Image

    from controlroom.data.pictures import Picture
    from controlroom.sampling.pipeline import Pipeline
    from controlroom.training.loop import TrainResult

Kind = Literal["person", "thing", "style"]

# UNets below this many parameters are small models such as the theatre's, which learn at larger rates in fewer steps.
_SMALL = 50_000_000
# Of the solver, for the contact sheet.
_STEPS = 25
_NAME = re.compile(r"[\w.-]+")
_PROMPTS: dict[str, tuple[str, ...]] = {
    "person": ("{}", "{} on the beach", "{} in the forest", "{} in the city at night"),
    "thing": ("{}", "{} on the beach", "{} on a table", "{} in the snow"),
    "style": ("a woman, {}", "a house, {}", "a cat, {}", "a tree, {}"),
}


class PersonaliseOptions(BaseModel):
    """How a subject is learned.

    Raises:
        InputError: an unknown or ill-typed option.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "theatre"
    kind: Kind = "person"
    class_word: str | None = None
    """What it is one of: woman, dog, backpack; None: ``person``, ``thing`` or ``style``."""
    word: str = "sks"
    """The rare word that will stand for it."""
    steps: PositiveInt | None = None
    """None: by the model and the number of photos."""
    learning_rate: PositiveFloat | None = None
    rank: PositiveInt = 16
    batch_size: PositiveInt | None = None
    class_count: int | None = Field(default=None, ge=0)
    """Pictures of the class shown beside; 0: none; None: by the model."""
    size: PositiveInt | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)
    device: str = "cpu"
    prompts: tuple[str, ...] = ()
    """Of the contact sheet, ``{}`` stands for the subject; (): some that fit its kind."""

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise InputError(describe("personalise", error)) from error

    @property
    def subject(self) -> str:
        """What stands for the subject in a prompt: "sks woman"."""
        return f"{self.word} {self.class_word or self.kind}"


@dataclass(frozen=True)
class Personalised:
    """What came out.

    Attributes:
        adapter: ``NAME.safetensors``, for `cr.LoRA`.
        run: ``NAME.yaml``, a run with the adapter, to draw with and to change.
        rows: of a contact sheet, titled pictures: some photos; then, for each prompt, one picture without the adapter
            and three with it.
        subject: how to call it in a prompt.
        result: how the training ended.
    """

    adapter: Path
    run: Path
    rows: list[list[tuple[str, Image.Image]]]
    subject: str
    result: TrainResult


def personalise(photos: str, name: str, folder: str | Path, options: PersonaliseOptions | None = None) -> Personalised:
    """Learn who or what is on some photos; a call that was stopped continues.

    Args:
        photos: folder with at least one picture of the subject, alone if possible.
        name: of the adapter; letters, digits, dots and lines.
        folder: for the training, the adapter and a run with it.
        options: None: all by the model.

    Raises:
        InputError: photos or options that cannot be used.
        UnfinishedError: stopped by SIGTERM or Ctrl-C before its end; call again to continue.
    """
    from controlroom.data.kohya_folder import training_pictures
    from controlroom.sampling.pipeline import Pipeline
    from controlroom.training.loop import train
    from controlroom.training.recipes.imagic import UnfinishedError

    options, folder = options or PersonaliseOptions(), Path(folder)
    if not _NAME.fullmatch(name) or name.startswith("."):
        raise InputError(f"The name {name!r} becomes a file's; use letters, digits, '.', '-' and '_'.")
    pictures = training_pictures(photos)
    pipe = Pipeline.from_pretrained(options.model)
    if options.device != "cpu":
        pipe.to(options.device)
    settings, loop = resolved(pipe, len(pictures), folder / "training", options)
    result = train(settings.build(pipe, pictures, folder / "training"), loop)
    if not result.finished:
        raise UnfinishedError(
            f"The training was stopped ({result.reason}) at step {result.step} of {loop.total_steps}. Run it again to "
            "continue."
        )
    adapter = folder / f"{name}.safetensors"
    with atomic_path(adapter) as beside:
        shutil.copyfile(result.weights / "lora.safetensors", beside)
    run = folder / f"{name}.yaml"
    spec = {
        "model": options.model,
        "prompt": options.subject,
        "controls": [{"type": "lora", "model": str(adapter.resolve())}],
    }
    with atomic_path(run) as beside:
        beside.write_text(yaml.safe_dump(spec, sort_keys=False, allow_unicode=True))
    return Personalised(adapter, run, shown_beside(pipe, adapter, pictures, options), options.subject, result)


def resolved(pipe: Pipeline, photos: int, folder: Path, options: PersonaliseOptions) -> tuple[Any, Any]:
    """Settings of the recipe and of the loop that fit the model and the number of photos."""
    from controlroom.training.low_rank import ATTENTION
    from controlroom.training.recipes.dreambooth_lora import DreamBoothLoRASettings
    from controlroom.training.settings import TrainSettings

    small = sum(p.numel() for p in pipe.unet.parameters()) < _SMALL
    batch = options.batch_size or (4 if small else 1)
    # About a hundred looks at each photo, and never so few that nothing is learned nor so many that only they are.
    steps = options.steps or (300 if small else min(1500, max(400, 100 * photos)))
    count = options.class_count if options.class_count is not None else (32 if small else 100)
    of_class = {"person": "a {}", "thing": "a {}", "style": "{}"}[options.kind]
    settings = DreamBoothLoRASettings(
        prompt=options.subject,
        class_prompt=of_class.format(options.class_word or options.kind) if count else None,
        class_count=max(count, 1),
        class_steps=20 if small else 30,
        rank=options.rank,
        size=options.size,
        # Small models have few layers to spare.
        layers=(*ATTENTION, "conv1", "conv2", "ff.net.0.proj", "ff.net.2") if small else ATTENTION,
    )
    rate = options.learning_rate or (2e-3 if small else 1e-4)
    loop = TrainSettings(
        output_dir=folder,
        seed=options.seed,
        device=options.device,
        total_steps=steps,
        batch_size=batch,
        learning_rate=rate,
        schedule="cosine",
        warmup_steps=min(20, math.ceil(steps / 10)),
        weight_decay=0.01,
        mixed_precision="auto",
        log_every=20,
    )
    return settings, loop


def shown_beside(
    pipe: Pipeline, adapter: Path, photos: Sequence[Picture], options: PersonaliseOptions
) -> list[list[tuple[str, Image.Image]]]:
    """Rows of titled pictures: photos; below, for each prompt, one without the adapter and three with it."""
    from controlroom.controls.personal.lora import LoRA

    rows: list[list[tuple[str, Image.Image]]] = [[(p.name, p.read()) for p in photos[:4]]]
    for prompt in options.prompts or _PROMPTS[options.kind]:
        # Other braces are the user's own.
        words = prompt.replace("{}", options.subject)
        plain = pipe(words.replace(f"{options.word} ", ""), seed=1, num_inference_steps=_STEPS).images
        row = [("without", plain[0])]
        for seed in (1, 2, 3):
            drawn = pipe(words, seed=seed, num_inference_steps=_STEPS, controls=[LoRA(str(adapter))])
            row.append((words, drawn.images[0]))
        rows.append(row)
    return rows
