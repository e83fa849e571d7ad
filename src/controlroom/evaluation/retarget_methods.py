"""The ways of drawing a person in another pose that are measured against each other, and how each draws pairs.

All of them draw a pair from the same noise, with the same words, steps, guidance and pose ControlNet; what differs is
what keeps the person. Two references need no denoising: the true picture itself, whose numbers are the readers' own
error, and its reconstruction by the autoencoder, which shows what decoding alone loses.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from controlroom.backbones.loading import THEATRE, find_model
from controlroom.controls.personal.ip_adapter import IPAdapter
from controlroom.controls.pose.appearance import AppearanceControl
from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.controls.style.reference_only import ReferenceOnly
from controlroom.core.control import Control
from controlroom.core.errors import InputError, ModelError
from controlroom.core.inputs import file_hash
from controlroom.core.pose import Pose
from controlroom.core.spec import RunSpec
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.pairs import Pair, sample_pair
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import CANVAS, Scene
from controlroom.data.theatre.truth import keypoints
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.evaluation.theatre_quality import reconstructions
from controlroom.sampling.pipeline import Pipeline

#: Number of the first pair. Those before were looked at during training (`HELD_OUT_PAIRS` of its recipes).
FIRST_PAIR = 1000
TRUTH, RECONSTRUCTION = "truth", "reconstruction"
REFERENCES = (TRUTH, RECONSTRUCTION)
_BASE_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


class Trial(BaseModel):
    """Everything that a drawn picture depends on beside the method and the weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = THEATRE
    steps: int = Field(default=30, ge=1)
    guidance_scale: float = 3.5
    captions: bool = False
    """Words: a full caption of the target instead of none."""
    seed: int = 0
    """Of pair 0; pair i has ``seed + i``."""


@dataclass(frozen=True)
class Method:
    """A way of keeping the person beside the pose ControlNet.

    Attributes:
        title: of its column.
        keepers: sources of some pairs -> the controls that keep the person, for one run with a prompt for each.
        weights: models that it needs beside the ControlNet.
    """

    title: str
    keepers: Callable[[list[Image.Image]], list[Control]]
    weights: tuple[str, ...] = ()


def _each(sources: list[Image.Image]) -> list[list[Image.Image]]:
    """A reference of its own for each prompt."""
    return [[source] for source in sources]


POSE = f"{THEATRE}/pose"
METHODS: dict[str, Method] = {
    "appearance_control": Method(
        "AppearanceControl",
        lambda s: [AppearanceControl(image=_each(s), model=f"{THEATRE}/appearance")],
        (f"{THEATRE}/appearance",),
    ),
    "ip_adapter": Method(
        "IP-Adapter",
        lambda s: [IPAdapter(model=f"{THEATRE}/ip_adapter", image=_each(s))],
        (f"{THEATRE}/ip_adapter",),
    ),
    "reference_only": Method("reference-only", lambda s: [ReferenceOnly(image=_each(s))]),
    "controlnet": Method("ControlNet alone", lambda s: []),
}


def available(asked: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the methods to measure: those asked for, or all whose weights are here.

    Raises:
        InputError: an unknown name.
        ModelError: weights of one that was asked for, or the ControlNet's, are missing.
    """
    find_model(POSE, "pose ControlNet")
    found = []
    for name in METHODS if asked is None else dict.fromkeys(asked):
        if name not in METHODS:
            raise InputError(f"There is no method {name!r}. There are: {', '.join(METHODS)}.")
        try:
            for weights in METHODS[name].weights:
                find_model(weights, name)
        except ModelError:
            if asked is not None:
                raise
            continue
        found.append(name)
    return tuple(found)


def pair_number(number: int) -> Pair:
    """A held-out pair in one place."""
    return sample_pair(number, "held_out", moved=0.0)


def pose_of(scene: Scene) -> Pose:
    """The true pose of a scene's puppet, hidden joints as well, as the ControlNet was trained."""
    found = keypoints(scene)
    return Pose(found[:, :2], found[:, 2], CANVAS, CANVAS)


def draw(pipe: Pipeline, name: str, numbers: range, trial: Trial) -> list[Image.Image]:
    """Pictures of consecutive pairs by a method or a reference, RGB, of the theatre's size."""
    pairs = [pair_number(number) for number in numbers]
    if name in REFERENCES:
        true = [render(pair.target) for pair in pairs]
        return true if name == TRUTH else reconstructions(pipe.backbone.vae, true)
    result = pipe.run(spec_of(name, numbers, trial))
    size = (CANVAS, CANVAS)
    return [p if p.size == size else p.resize(size, Image.Resampling.LANCZOS) for p in result.images]


def spec_of(name: str, numbers: range, trial: Trial) -> RunSpec:
    """The run by which a method draws consecutive pairs."""
    pairs = [pair_number(number) for number in numbers]
    controls = METHODS[name].keepers([render(pair.source) for pair in pairs])
    return RunSpec(
        model=trial.model,
        prompt=[full_caption(pair.target) if trial.captions else "" for pair in pairs],
        controls=[*controls, ControlNet(model=POSE, image=[pose_of(pair.target) for pair in pairs])],
        num_inference_steps=trial.steps,
        guidance_scale=trial.guidance_scale,
        seed=trial.seed + numbers.start,
    )


def key_of(name: str, trial: Trial, readers: Sequence[Path]) -> str:
    """What a record of a method depends on, in 16 hexadecimal digits: settings, world, weights of model and readers."""
    model = Path(trial.model)
    parts = [find_model(f"{THEATRE}/{x}") if trial.model == THEATRE else model / x for x in _BASE_PARTS]
    places = parts + list(readers)
    places += [find_model(weights) for weights in (POSE, *METHODS[name].weights)] if name in METHODS else []
    settings: dict[str, Any] = {**trial.model_dump(), "method": name, "world": WORLD_VERSION, "first": FIRST_PAIR}
    settings["files"] = [
        [str(i), file.name, file_hash(file)] for i, place in enumerate(places) for file in _files(place)
    ]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _files(place: Path) -> list[Path]:
    found = [place] if place.is_file() else sorted(place.rglob("*"))
    return [file for file in found if file.suffix in (".safetensors", ".json", ".txt")]
