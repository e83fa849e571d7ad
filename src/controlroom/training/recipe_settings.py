"""What every recipe's settings share, so that one command trains any of them from a file."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from controlroom.core.control import describe
from controlroom.core.errors import InputError
from controlroom.training.objective import ObjectiveSettings

if TYPE_CHECKING:
    from controlroom.data.pictures import Picture
    from controlroom.sampling.pipeline import Pipeline
    from controlroom.training.base_model import BaseModel as TrainedModel
    from controlroom.training.recipe import Recipe


class RecipeSettings(BaseModel):
    """Settings of a recipe; `build` makes the recipe for a model and pictures.

    Raises:
        InputError: an unknown or ill-typed setting.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    loop: ClassVar[Mapping[str, Any]] = {}
    """Fields of `TrainSettings` that differ from its defaults: the method's published numbers."""
    needs_model: ClassVar[bool] = True
    """Whether it starts from a model; those that do not take None for ``pipe``."""

    size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None
    """Side, or height and width, in pixels; None: what the model was trained at."""
    objective: ObjectiveSettings = ObjectiveSettings()
    """Prediction, weights, noise offset, timesteps."""

    aside: ClassVar[frozenset[str]] = frozenset()
    """Settings that what is learned does not depend on, or that only say where data is."""

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise InputError(describe(type(self).__name__, error)) from error

    @property
    def hw(self) -> tuple[int, int] | None:
        """Height and width."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def fingerprint(self) -> str:
        """All settings that a resumed run must share."""
        return self.model_dump_json(exclude=set(self.aside))

    def read(self, data: str) -> Sequence[Picture]:
        """What is learned from, out of a folder: pictures with captions; a recipe of other data says so here.

        Raises:
            InputError: it cannot be read.
        """
        from controlroom.data.kohya_folder import training_pictures

        return training_pictures(data)

    @abstractmethod
    def build(self, pipe: Pipeline, pictures: Sequence[Picture], folder: Path) -> Recipe[Any]:
        """The recipe for a model.

        Args:
            pipe: the model; only read.
            pictures: what is learned from.
            folder: where the run writes; jobs that come before it (pictures of the class) may write there.
        """

    def rehearsal(self, pipe: Pipeline, pictures: Sequence[Picture], folder: Path) -> Recipe[Any]:
        """As `build`, for a look at what a training would need: a recipe with jobs before it leaves them out here."""
        return self.build(pipe, pictures, folder)


class ValidatedSettings(RecipeSettings):
    """Settings of a recipe that measures its error on pictures it does not learn from."""

    aside: ClassVar[frozenset[str]] = frozenset({"validation", "validation_pictures"})

    validation: str | None = None
    """Data like that of the training, on which the error is measured every ``validate_every`` steps; None: none."""
    validation_pictures: PositiveInt = 32
    """As many of them at most, from all over the set."""

    @property
    def holds_out(self) -> bool:
        """Whether something is held out."""
        return self.validation is not None

    def sides(self, pictures: Sequence[Picture]) -> tuple[Sequence[Picture], Sequence[Picture]]:
        """Pictures that are learned from, and held-out ones.

        Raises:
            InputError: ``validation`` cannot be read.
        """
        return pictures, () if self.validation is None else self.read(self.validation)


class EncodedSettings(ValidatedSettings):
    """Settings of a recipe that shows pictures as latents of a model's autoencoder."""

    aside: ClassVar[frozenset[str]] = ValidatedSettings.aside | {"cache"}

    cache: str | None = None
    """Folder where encoded pictures and prompts are kept, which several runs may share; None: nowhere. On the command
    line it is ``cache`` in the run's folder if nothing is said, and nowhere for an empty name."""

    def networks(self, pipe: Pipeline, trains: Collection[str] = ()) -> TrainedModel:
        """The model, keeping what it encodes where ``cache`` says; see `BaseModel`."""
        from controlroom.training.base_model import BaseModel

        return BaseModel(pipe, trains, Path(self.cache) if self.cache else None)


def check_levels(channels: Sequence[int], norm_groups: int, size: tuple[int, int]) -> None:
    """Whether a network of these levels, each of half the side of the one before, fits pictures and norms.

    Args:
        channels: of each level.
        norm_groups: that the channels of each are divided into.
        size: height and width in pixels.

    Raises:
        InputError: sides that cannot be halved as often, or channels that do not fit the groups.
    """
    height, width = size
    halved = 2 ** (len(channels) - 1)
    if height % halved or width % halved:
        raise InputError(
            f"{len(channels)} levels halve the sides {len(channels) - 1} times; {height} x {width} is no multiple of "
            f"{halved}."
        )
    wrong = [count for count in channels if count % norm_groups]
    if wrong:
        raise InputError(f"channels has {wrong[0]}, which is no multiple of norm_groups, {norm_groups}.")
