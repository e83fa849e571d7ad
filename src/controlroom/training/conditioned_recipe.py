"""What recipes share that teach a model to draw along something beside the words: edges, depth, what is around a hole.

Each shows the user's own pictures with a tensor beside them, half of them without words as ControlNet's authors did
(arXiv 2302.05543), so that what is to be drawn is read from the condition where the words say nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from controlroom.backbones.loading import find_model
from controlroom.core.branch import Condition
from controlroom.core.control import Control, Residuals
from controlroom.core.errors import ModelError
from controlroom.data.pictures import Picture
from controlroom.sampling.pipeline import Pipeline
from controlroom.signals.signal import Kind
from controlroom.training.base_model import BaseModel
from controlroom.training.buckets import BucketOrder
from controlroom.training.conditions import ConditionMaps, Conditions, Places, Row
from controlroom.training.held_out import mean_over
from controlroom.training.objective import Noised, Objective
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses, Recipe
from controlroom.training.shown import Shown, ShownBatch
from controlroom.training.shown_recipe import ShownSettings, without_words


class ConditionedSettings(ShownSettings):
    """What the settings of these recipes share."""

    prompt: str | None = None
    """Words for pictures without a caption."""
    empty_prompts: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of samples without words."""
    buckets: bool = True
    """Whether pictures keep their shape, each batch of one; otherwise the middle of ``size`` is cut out."""
    seed: int = Field(default=0, ge=0)
    """Of new layers' weights."""

    def build(self, pipe: Pipeline, pictures: Sequence[Picture], folder: Path | None) -> Recipe[Any]:
        """As every recipe's; without a folder no condition is kept on disk."""
        raise NotImplementedError

    def sources(
        self, pipe: Pipeline, pictures: Sequence[Picture], trains: Collection[str] = ()
    ) -> tuple[BaseModel, Shown, Shown | None]:
        """The model, of which ``trains`` moves; what is learned from; what is held out."""
        base = self.networks(pipe, trains)
        return base, *self.shown(base, pictures, self.prompt, buckets=self.buckets)

    def rehearsal(self, pipe: Pipeline, pictures: Sequence[Picture], folder: Path) -> Recipe[Any]:
        """A look at what a training would need writes nothing."""
        return self.build(pipe, pictures, None)


@dataclass(frozen=True)
class ConditionedBatch:
    """``shown`` as it is, and ``maps`` [B, c, H, W]: what stands beside the latents."""

    shown: ShownBatch
    maps: Tensor


SettingsT = TypeVar("SettingsT", bound=ConditionedSettings)


class ConditionedRecipe(Generic[SettingsT]):
    """Base of such a recipe; the method says what is beside the latents, what trains, and what is written.

    Args:
        base: the model.
        shown: the pictures.
        settings: of the method.
        held_out: pictures that the error is measured on, on the way; None: none.
    """

    name: str = ""

    def __init__(self, base: BaseModel, shown: Shown, settings: SettingsT, held_out: Shown | None = None) -> None:
        self.base, self.shown, self.settings, self.held_out = base, shown, settings, held_out
        self.objective = Objective(base.backbone.scheduler, settings.objective)
        self._places = Places(shown)

    def maps(self, shown: Shown, rows: Sequence[Row], step: int) -> Tensor:
        """[B, c, H, W]: what stands beside these pictures."""
        raise NotImplementedError

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition, maps: Tensor) -> Tensor:
        """What the network predicts, told and shown this."""
        raise NotImplementedError

    def controls(self, row: Row) -> list[Control]:
        """What draws along the condition of a picture, for a preview."""
        raise NotImplementedError

    def dropped(self, maps: Tensor, rng: StepRandom) -> Tensor:
        """What of the conditions a step shows: all of them, unless the method leaves some out."""
        return maps

    def draw(self, latents: Tensor, rng: StepRandom) -> Noised:
        """Noise levels and noise of a step."""
        return self.objective.draw(latents, rng)

    # -- what the loop asks --

    def frozen(self) -> dict[str, nn.Module]:
        """The networks that stay."""
        return self.base.frozen()

    def fingerprint(self) -> str:
        """Data and settings, so that another training is not taken for this one."""
        return f"{self.shown.fingerprint()} {self.settings.fingerprint()}"

    def names(self, indices: Sequence[int]) -> tuple[str, ...]:
        """Names of pictures, for messages."""
        return self.shown.batch(indices).names

    def batch_order(self, batch_size: int, seed: int, first_slot: int) -> BucketOrder:
        """Batches of one size."""
        return self.shown.order(batch_size, seed, first_slot)

    def batch(self, indices: Sequence[int], step: int) -> ConditionedBatch:
        """The pictures of these numbers with their conditions."""
        shown, rows = self.shown.batch(indices), [self._places[index] for index in indices]
        return ConditionedBatch(shown, self.maps(self.shown, rows, step).to(shown.latents.device))

    def loss(self, batch: ConditionedBatch, step: int, rng: StepRandom) -> Losses:
        shown = without_words(batch.shown, self.settings.empty_prompts, rng)
        condition = self.base.condition(shown.prompts, shown.size)
        drawn = self.draw(shown.latents, rng)
        predicted = self.predict(drawn.latents, drawn.t, condition, self.dropped(batch.maps, rng))
        return Losses((self.objective.errors(predicted, drawn, shown.mask) * drawn.weight).mean())

    @property
    def has_held_out(self) -> bool:
        """Whether there are pictures to measure on."""
        return self.held_out is not None

    def validate(self, step: int) -> dict[str, float]:
        """Error on the held-out pictures, at fixed timesteps with the same noise and conditions every time."""
        if self.held_out is None:
            return {}
        numbers = {picture.name: number for number, picture in enumerate(self.held_out.pictures)}
        found = []
        for part in self.held_out.parts():
            maps = self.maps(self.held_out, [(numbers[name], False) for name in part.names], 0).to(self.base.device)
            condition = self.base.condition(part.prompts, part.size)
            found.append((len(part.names), self.errors(part, condition, maps)))
        return mean_over(found)

    def errors(self, part: ShownBatch, condition: Condition, maps: Tensor) -> dict[str, float]:
        """What is measured of held-out pictures."""
        latents = part.latents.to(self.base.device)
        error = self.objective.held_out(lambda x, t: self.predict(x, t, condition, maps), latents, part.mask)
        return {"held_out": error}

    def preview(self, step: int) -> list[tuple[str, Image.Image]]:
        """The prompts of the settings, each along the condition of another picture, from the same noise every time."""
        if not self.settings.previews:
            return []
        found: list[tuple[str, Image.Image]] = []
        with self.base.drawing() as pipe:
            for number, prompt in enumerate(self.settings.previews):
                row = (number % len(self.shown.pictures), False)
                height, width = self.shown.crops[row[0]].bucket.size
                more: dict[str, Any] = {"num_inference_steps": self.settings.preview_steps, "seed": number}
                drawn = pipe(prompt, controls=self.controls(row), height=height, width=width, **more)
                found.append((prompt, drawn.images[0]))
        return found


def weights_at(start_from: str | None, what: str) -> Path | None:
    """Where the weights to go on from are."""
    return None if start_from is None else find_model(start_from, what)


class SideSettings(ConditionedSettings):
    """Of a network beside the frozen UNet that reads one kind of condition."""

    kind: Kind | None = None
    """What is found in each picture; not needed where pictures have a ``conditioning_image`` of their own."""
    signal_model: str | None = None
    """Network of the signal, for depth, normals, segmentation and poses: ``theatre`` or a folder."""
    detector: str | None = None
    """What finds the people of a pose, for networks of photographs."""
    start_from: str | None = None
    """Weights to go on from: a folder, a file, a name of the theatre. None: as the method begins."""

    def conditions(self, folder: Path | None) -> ConditionMaps:
        """Where conditions of pictures come from."""
        return ConditionMaps(folder, self.kind, self.signal_model, self.detector)

    def found(self, what: str) -> Path | None:
        """Where the weights to go on from are."""
        return weights_at(self.start_from, what)


class SideRecipe(ConditionedRecipe[SettingsT]):
    """Base of a recipe of one network beside the frozen UNet.

    Args:
        base: the model, all of it frozen.
        shown: the pictures.
        settings: of the method.
        conditions: of the pictures.
        net: what trains.
        held_out: pictures that the error is measured on, on the way; None: none.

    Raises:
        InputError: no conditions of the pictures; see `ConditionMaps.fill`.
    """

    def __init__(
        self,
        base: BaseModel,
        shown: Shown,
        settings: SettingsT,
        conditions: Conditions,
        net: Any,
        held_out: Shown | None = None,
    ) -> None:
        super().__init__(base, shown, settings, held_out)
        self.conditions = conditions.fill(shown)
        if held_out is not None:
            conditions.fill(held_out)
        self.net: Any = nn.Module.to(net, base.device).float().requires_grad_(True)

    def modules(self) -> dict[str, nn.Module]:
        return {self.name: self.net}

    def maps(self, shown: Shown, rows: Sequence[Row], step: int) -> Tensor:
        return self.conditions.rows(shown, rows)

    def errors(self, part: ShownBatch, condition: Condition, maps: Tensor) -> dict[str, float]:
        """With the conditions, and of the UNet alone, which does not see them."""
        latents = part.latents.to(self.base.device)
        alone = self.objective.held_out(lambda x, t: self.base.predict(x, t, condition), latents, part.mask)
        return {**super().errors(part, condition, maps), "unet_alone": alone}

    def residuals(self, noisy: Tensor, t: Tensor, condition: Condition, maps: Tensor) -> Residuals:
        """What the network adds inside the UNet."""
        raise NotImplementedError

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition, maps: Tensor) -> Tensor:
        """What the frozen network predicts with what the other one adds."""
        told = condition.expand(len(noisy))
        found, dtype = self.residuals(noisy, t, told, maps), self.base.unet.dtype
        mid = None if found.mid is None else found.mid.to(dtype)
        down, inner = (tuple(x.to(dtype) for x in part) for part in (found.down, found.intrablock))
        return self.base.predict(noisy, t, told, Residuals(found.branches, down, mid, inner))

    def take(self, net: Any, name: Path) -> None:
        """Go on from the weights of another network of the same shape.

        Raises:
            ModelError: it has another.
        """
        own, other = self.net.state_dict(), net.state_dict()
        wrong = next((key for key in own if key not in other or own[key].shape != other[key].shape), None)
        if wrong is not None or len(own) != len(other):
            raise ModelError(
                f"{name} has layers of another shape ({wrong or 'more of them'}). Give it as the setting start_from of "
                "the recipe, which takes the shape over."
            )
        self.net.load_state_dict(other)
