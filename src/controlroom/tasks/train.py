"""Training as a task: a recipe by name, settings from a file, pictures from a folder -> a run that can be continued."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from controlroom.core.control import describe
from controlroom.core.errors import InputError
from controlroom.training.catalog import RecipeEntry, recipe_entry
from controlroom.training.held_out import nothing_held_out
from controlroom.training.recipe_settings import EncodedSettings, RecipeSettings, ValidatedSettings
from controlroom.training.settings import TrainSettings

if TYPE_CHECKING:
    from controlroom.sampling.pipeline import Pipeline
    from controlroom.training.loop import TrainResult
    from controlroom.training.recipe import Recipe

_MAX_CONFIG_BYTES = 1 << 20
_TABLES = ("recipe", "model", "data", "settings", "train")


@dataclass(frozen=True)
class TrainingPlan:
    """A training, resolved: everything that decides what comes out.

    Attributes:
        entry: the recipe.
        model: what is trained on; "" for a recipe that makes its own.
        data: folder of pictures.
        settings: of the recipe.
        loop: of the loop.
    """

    entry: RecipeEntry
    model: str
    data: str
    settings: RecipeSettings
    loop: TrainSettings

    def prepare(self, rehearsal: bool = False) -> tuple[Pipeline | None, Recipe[Any]]:
        """Load the model and the pictures, and make the recipe (which may draw pictures of a class first).

        The model is None for a recipe that makes its own.

        Args:
            rehearsal: for an estimate: nothing is drawn and nothing is written.
        """
        from controlroom.sampling.pipeline import Pipeline
        from controlroom.training.recipe import Compares

        settings = self.settings
        if rehearsal and isinstance(settings, EncodedSettings):
            settings = settings.model_copy(update={"cache": None})
        # Before anything is encoded into the run's folder.
        every = self.loop.validate_every
        if isinstance(settings, EncodedSettings) and not settings.holds_out and every is not None:
            raise nothing_held_out(self.entry.name, every)
        pictures = settings.read(self.data)
        pipe: Any = None
        if settings.needs_model:
            pipe = Pipeline.from_pretrained(self.model)
            if self.loop.device != "cpu":
                pipe.to(self.loop.device)
        make = settings.rehearsal if rehearsal else settings.build
        recipe = make(pipe, pictures, self.loop.output_dir)
        if isinstance(recipe, Compares) and recipe.perceptual is not None:
            from controlroom.evaluation.extractors.choose import open_distance

            recipe.see_with(open_distance(recipe.perceptual))
        return pipe, recipe

    def run(self) -> TrainResult:
        """Train, or go on where it was stopped."""
        from controlroom.training.loop import train

        return train(self.prepare()[1], self.loop)

    def resolved(self) -> dict[str, Any]:
        """The plan as plain data, as a configuration file would say it."""
        # What a file leaves out is the default, so None is left out as well: TOML has no such value.
        return {
            "recipe": self.entry.name,
            **({"model": self.model} if self.model else {}),
            "data": self.data,
            "settings": self.settings.model_dump(mode="json", exclude_none=True),
            "train": self.loop.model_dump(mode="json", exclude_none=True),
        }


def plan_training(
    recipe: str | None,
    config: str | Path | None = None,
    data: str | None = None,
    model: str | None = None,
    out: str | Path | None = None,
    changes: Sequence[str] = (),
) -> TrainingPlan:
    """Resolve a training: defaults, then the file, then what is given here.

    Args:
        recipe: its name; None: as the file says.
        config: TOML file with ``recipe``, ``model``, ``data`` and the tables ``[settings]`` and ``[train]``.
        data: folder of pictures.
        model: what to train on; ``theatre`` by default.
        out: where the run writes; ``runs/RECIPE`` by default.
        changes: ``name=value`` pairs: ``rank=8``, ``train.total_steps=200``, ``objective.min_snr_gamma=5``.

    Raises:
        InputError: an unknown recipe or setting, a value that does not fit, a file that is not TOML, no data, or a
            model for a recipe that makes its own.
    """
    found = {} if config is None else read_config(Path(config))
    name = recipe or found.get("recipe")
    if name is None:
        raise InputError("Which recipe? Name it, or give a configuration with recipe = 'lora'.")
    entry = recipe_entry(str(name))
    if recipe is not None and "recipe" in found and recipe_entry(found["recipe"]) is not entry:
        raise InputError(f"The configuration is for {found['recipe']!r}, not {recipe!r}.")
    kind = entry.load()
    settings, asked = dict(found.get("settings", {})), dict(found.get("train", {}))
    for change in changes:
        path, value = parse_change(change)
        target, keys = (asked, path[1:]) if path[0] == "train" else (settings, path)
        if not keys:
            raise InputError(f"{change!r} names no setting; write train.NAME=VALUE.")
        for key in keys[:-1]:
            inner = target.get(key, {})
            if not isinstance(inner, dict):
                raise InputError(
                    f"{change!r} is a setting within {key!r}, which is {inner!r:.60}. Give one of the two."
                )
            target[key] = dict(inner)
            target = target[key]
        target[keys[-1]] = value
    loop = {"output_dir": f"runs/{entry.name}", **kind.loop, **asked}
    if out is not None:
        loop["output_dir"] = str(out)
    if "total_samples" in asked:
        loop.pop("total_steps", None)
    chosen = data if data is not None else found.get("data")
    if chosen is None:
        raise InputError("Which pictures? Give --data FOLDER, or data = 'FOLDER' in the configuration.")
    try:
        checked = TrainSettings.model_validate(loop)
    except ValidationError as error:
        raise InputError(describe("train", error)) from error
    model = model or found.get("model")
    if model and not kind.needs_model:
        raise InputError(f"{entry.name} makes a model of its own; leave {str(model)!r} out.")
    start = str(model or "theatre") if kind.needs_model else ""
    from controlroom.training.shown_recipe import ShownSettings

    own = kind(**settings)
    if isinstance(own, EncodedSettings) and "cache" not in settings:
        own = own.model_copy(update={"cache": str(checked.output_dir / "cache")})
    watched = {
        "preview_every": isinstance(own, ShownSettings) and bool(own.previews),
        "validate_every": isinstance(own, ValidatedSettings) and own.holds_out,
    }
    if checked.total_steps is not None:
        tenth = max(1, checked.total_steps // 10)
        missing = {name: tenth for name, on in watched.items() if on and getattr(checked, name) is None}
        checked = checked.model_copy(update=missing)
    return TrainingPlan(entry, start, str(chosen), own, checked)


def read_config(path: Path) -> Mapping[str, Any]:
    """A training's configuration.

    Raises:
        InputError: no such file, not TOML, or something in it that no training has.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise InputError(
            f"{str(path)!r} cannot be read ({error.strerror}). Give the TOML file of a training."
        ) from error
    if len(text) > _MAX_CONFIG_BYTES:
        raise InputError(f"{str(path)!r} is larger than a megabyte, which no configuration is. Check the path.")
    try:
        found = tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{str(path)!r} is not TOML: {error}.") from error
    for key, value in found.items():
        if key not in _TABLES:
            raise InputError(f"{str(path)!r} has {key!r}; known are {', '.join(_TABLES)}.")
        if (key in ("settings", "train")) != isinstance(value, dict):
            raise InputError(f"{key!r} of {str(path)!r} should be {'a table' if key in _TABLES[3:] else 'text'}.")
    return found


def parse_change(change: str) -> tuple[list[str], Any]:
    """``a.b=value`` -> (["a", "b"], value); values are TOML's, and what is none of these is text."""
    name, equals, text = change.partition("=")
    if not equals or not name.strip():
        raise InputError(f"{change!r} is not NAME=VALUE.")
    try:
        value = tomllib.loads(f"v = {text.strip()}")["v"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    return name.strip().split("."), value
