"""What draws the cases of a suite: a pipeline, one batch for consecutive cases."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from controlroom.backbones.loading import THEATRE, find_model
from controlroom.core.control import Control, Settings
from controlroom.core.errors import InputError
from controlroom.core.inputs import file_hash
from controlroom.core.spec import RunSpec

if TYPE_CHECKING:
    from controlroom.sampling.pipeline import Pipeline

_BASE_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
_HASHED = (".safetensors", ".json", ".txt")


class Drawer(Protocol):
    """Draws runs.

    Attributes:
        fingerprint: of everything beside the run that its pictures depend on.
    """

    fingerprint: str

    def __call__(self, spec: RunSpec) -> Sequence[Image.Image]:
        """One picture for each prompt."""
        ...


class PipelineDrawer:
    """Draws with a model, which is loaded when the first picture is.

    Args:
        model: ``theatre``, a folder, a ``.safetensors`` file, or a hub id that has been downloaded.
        weights: further models that the runs name; they belong to the fingerprint.

    Raises:
        ModelError: nothing there.
    """

    def __init__(self, model: str, weights: Sequence[str] = ()) -> None:
        self.model = model
        self.fingerprint = weights_hash(model, weights)

    @cached_property
    def pipeline(self) -> Pipeline:
        """The loaded model."""
        from controlroom.sampling.pipeline import Pipeline

        return Pipeline.from_pretrained(self.model)

    def __call__(self, spec: RunSpec) -> Sequence[Image.Image]:
        """One picture for each prompt."""
        return self.pipeline.run(spec).images


def pipeline_of(draw: Drawer) -> Pipeline:
    """The model that a drawer draws with, for pictures that take more than one run.

    Raises:
        InputError: it has none.
    """
    found = getattr(draw, "pipeline", None)
    if found is None:
        raise InputError(f"{type(draw).__name__} draws single runs only; give a PipelineDrawer.")
    return found


def weights_hash(model: str, weights: Sequence[str] = ()) -> str:
    """16 hexadecimal digits over the files of a model's parts and of further models.

    Raises:
        ModelError: one of them is not there.
    """
    if model == THEATRE:
        # Its folder also holds the readers, which draw nothing.
        places = [find_model(f"{THEATRE}/{part}") for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")]
    else:
        place = find_model(model)
        parts = [place / part for part in _BASE_PARTS if (place / part).is_dir()]
        places = parts or [place]
    places += [find_model(name) for name in weights]
    digest = hashlib.sha256()
    for index, place in enumerate(places):
        for file in _files(place):
            digest.update(f"{index} {file.name} {file_hash(file)}\n".encode())
    return digest.hexdigest()[:16]


def _files(place: Path) -> list[Path]:
    found = [place] if place.is_file() else sorted(place.rglob("*"))
    return [file for file in found if file.suffix in _HASHED]


def together(specs: Sequence[RunSpec], per_prompt: frozenset[str]) -> RunSpec | None:
    """One run for the pictures of several: image i has seed + i. None if they do not fit into one.

    They fit if their seeds follow each other and they differ in nothing but prompts and the fields of controls that are
    lists with an entry for each prompt.

    Args:
        specs: runs of one prompt each.
        per_prompt: those fields, as ``type.field``; fields of settings whose own fields are such lists count as well.

    Example:
        >>> runs = [RunSpec(prompt=word, seed=7 + i) for i, word in enumerate(("cat", "dog"))]
        >>> together(runs, frozenset()).prompt
        ['cat', 'dog']
        >>> together(runs[::-1], frozenset()) is None
        True
    """
    first = specs[0]
    if len(specs) == 1:
        return first
    changing = {"prompt": "", "controls": [], "seed": None}
    plain = [spec.model_copy(update=changing) for spec in specs]
    seeds = [spec.seed for spec in specs]
    if first.seed is None or seeds != list(range(first.seed, first.seed + len(specs))):
        return None
    if not all(_same(spec, plain[0]) for spec in plain) or any(isinstance(spec.prompt, list) for spec in specs):
        return None
    columns = list(zip(*(spec.controls for spec in specs), strict=False))
    if any(len(spec.controls) != len(columns) for spec in specs):
        return None
    joined = [_joined(column, per_prompt) for column in columns]
    if any(control is None for control in joined):
        return None
    prompts = [spec.prompt for spec in specs]
    return first.model_copy(update={"prompt": prompts, "controls": joined})


def _joined(controls: Sequence[Control], per_prompt: frozenset[str]) -> Control | None:
    """One control for all prompts, or None."""
    first: Any = controls[0]
    if any(type(control) is not type(first) for control in controls):
        return None
    changed: dict[str, Any] = {}
    for name in type(first).model_fields:
        values = [getattr(control, name) for control in controls]
        if f"{first.type}.{name}" in per_prompt:
            changed[name] = _listed(values)
            if changed[name] is None:
                return None
        elif not all(_same(value, values[0]) for value in values):
            return None
    return first.model_copy(update=changed)


def _listed(values: Sequence[Any]) -> Any:
    """One list of all entries, or settings whose fields are such lists; None where they are neither."""
    if all(isinstance(value, list) for value in values):
        return [item for value in values for item in value]
    first = values[0]
    if not isinstance(first, Settings) or any(type(value) is not type(first) for value in values):
        return None
    columns = {name: [getattr(value, name) for value in values] for name in type(first).model_fields}
    given = {name: _listed(column) for name, column in columns.items() if not all(item is None for item in column)}
    return None if None in given.values() else type(first)(**given)


def _same(first: Any, second: Any) -> bool:
    """Whether two settings are equal; tensors, which do not say, are equal only to themselves."""
    try:
        return first is second or bool(first == second)
    except (RuntimeError, ValueError):
        return False
