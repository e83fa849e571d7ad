"""What recipes that learn a subject or a style from pictures share: their data, names for messages, and previews."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar

from PIL import Image
from pydantic import PositiveInt
from torch import Tensor, nn

from controlroom.data.pictures import Picture
from controlroom.training.base_model import BaseModel
from controlroom.training.held_out import mean_over, spread_over
from controlroom.training.objective import Objective
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe_settings import EncodedSettings
from controlroom.training.shown import Shown, ShownBatch

Batch = tuple[ShownBatch, ShownBatch | None]
"""Pictures of the subject, and those of its class that are shown beside them."""


class ShownSettings(EncodedSettings):
    """What the settings of these recipes share."""

    aside: ClassVar[frozenset[str]] = EncodedSettings.aside | {"previews", "preview_steps"}

    flip: bool = False
    """Also show each picture mirrored."""
    previews: tuple[str, ...] = ()
    """Prompts to draw on the way, ten times or every ``preview_every`` steps of the loop."""
    preview_steps: PositiveInt = 20
    """Solver steps of each."""

    def shown(
        self,
        base: BaseModel,
        pictures: Sequence[Picture],
        prompt: str | None,
        captions: bool = True,
        buckets: bool = False,
    ) -> tuple[Shown, Shown | None]:
        """What is learned from and what is held out, under the same words; see `Shown`."""
        learned, held_out = self.sides(pictures)
        own = Shown(base, learned, prompt, captions, self.hw, self.flip, buckets)
        if not held_out:
            return own, None
        few = spread_over(held_out, self.validation_pictures)
        return own, Shown(base, few, prompt, captions, own.size, buckets=buckets)


def without_words(shown: ShownBatch, share: float, rng: StepRandom) -> ShownBatch:
    """The batch with this share of its prompts left empty."""
    if not share:
        return shown
    left_out = (rng.uniform("words") < share).tolist()
    return replace(shown, prompts=tuple("" if out else p for p, out in zip(shown.prompts, left_out, strict=True)))


SettingsT = TypeVar("SettingsT", bound=ShownSettings)


class ShownRecipe(Generic[SettingsT]):
    """Base of a recipe over `Shown` pictures; the method says what trains, what the loss is, and what is written.

    Args:
        base: the model.
        shown: pictures of the subject or style.
        settings: of the method.
        beside: pictures of the class, shown beside them; None: none.
        held_out: pictures that the error is measured on, on the way; None: none.
    """

    def __init__(
        self,
        base: BaseModel,
        shown: Shown,
        settings: SettingsT,
        beside: Shown | None = None,
        held_out: Shown | None = None,
    ) -> None:
        self.held_out = held_out
        self.base, self.shown, self.settings, self.beside = base, shown, settings, beside
        self.objective = Objective(base.backbone.scheduler, settings.objective)

    def frozen(self) -> dict[str, nn.Module]:
        """The networks that stay."""
        return self.base.frozen()

    def fingerprint(self) -> str:
        """Data and settings, so that another training is not taken for this one."""
        beside = "" if self.beside is None else f" beside {self.beside.fingerprint()}"
        return f"{self.shown.fingerprint()}{beside} {self.settings.fingerprint()}"

    def names(self, indices: Sequence[int]) -> tuple[str, ...]:
        """Names of pictures, for messages."""
        return self.shown.batch(indices).names

    def batch(self, indices: Sequence[int], step: int) -> Batch:
        """The pictures of these numbers, and as many of the class."""
        return self.shown.batch(indices), None if self.beside is None else self.beside.beside(step, len(indices))

    def attached(self) -> AbstractContextManager[Any]:
        """Within the block, the model draws with what was learned."""
        return nullcontext()

    def told(self, prompt: str) -> str:
        """A prompt as the model is told it: with the subject's word."""
        return prompt

    @abstractmethod
    def predict(self, noisy: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
        """What the network predicts of latents [B, C, h, w] at timesteps [B], under prompts as it is told them."""

    @property
    def has_held_out(self) -> bool:
        """Whether there are pictures to measure on."""
        return self.held_out is not None

    def validate(self, step: int) -> dict[str, float]:
        """Error on the held-out pictures, at fixed timesteps with the same noise every time."""
        if self.held_out is None:
            return {}
        return mean_over((len(part.names), {"held_out": self._error(part)}) for part in self.held_out.parts())

    def _error(self, shown: ShownBatch) -> float:
        prompts = [self.told(prompt) for prompt in shown.prompts]
        latents = shown.latents.to(self.base.device)
        return self.objective.held_out(lambda noisy, t: self.predict(noisy, t, prompts), latents, shown.mask)

    def preview(self, step: int) -> list[tuple[str, Image.Image]]:
        """The prompts of the settings, each from the same noise every time."""
        if not self.settings.previews:
            return []
        height, width = self.shown.size
        with self.attached(), self.base.drawing() as pipe:
            return [
                (
                    prompt,
                    pipe(
                        self.told(prompt),
                        seed=number,
                        num_inference_steps=self.settings.preview_steps,
                        height=height,
                        width=width,
                    ).images[0],
                )
                for number, prompt in enumerate(self.settings.previews)
            ]
