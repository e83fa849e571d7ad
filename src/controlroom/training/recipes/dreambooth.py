"""DreamBooth (Ruiz et al., arXiv 2208.12242): a few pictures of a subject teach the whole network its rare name.

The UNet, and the text encoder where asked, learn the subject's pictures under a prompt with a rare word; pictures of
its class, drawn by the untrained model, are shown beside them, so that the class and the variety within it stay.
Deviation: the published weights of 1 for both; timesteps and weights of errors are settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from controlroom.backbones.lora_names import TEXT, TEXT_2, UNET
from controlroom.data.pictures import Picture
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.base_model import BaseModel
from controlroom.training.prior import subject_loss
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses
from controlroom.training.recipes.dreambooth_lora import subject_and_class
from controlroom.training.shown import Shown
from controlroom.training.shown_recipe import Batch, ShownRecipe, ShownSettings


class DreamBoothSettings(ShownSettings):
    """How a network learns a subject."""

    loop: ClassVar[dict[str, Any]] = {"total_steps": 800, "batch_size": 1, "learning_rate": 5e-6}

    prompt: str | None = None
    """Names the subject by a rare word: "a photo of sks dog"; None: the pictures' captions."""
    class_prompt: str | None = None
    """Names the class ("a photo of a dog"), whose looks are kept; None: no pictures of the class are shown."""
    class_count: PositiveInt = 200
    class_weight: float = Field(default=1.0, ge=0.0)
    class_steps: PositiveInt = 50
    text_encoders: bool = False
    """Whether the text encoders learn as well."""

    def build(self, pipe: Pipeline, pictures: Sequence[Picture], folder: Path | None) -> DreamBooth:
        parts = [UNET]
        if self.text_encoders:
            parts += [name for name in (TEXT, TEXT_2) if getattr(pipe.backbone, name) is not None]
        base = self.networks(pipe, parts)
        shown, beside, held_out = subject_and_class(pipe, base, pictures, self, folder)
        return DreamBooth(base, shown, self, beside, held_out)

    def rehearsal(self, pipe: Pipeline, pictures: Sequence[Picture], folder: Path) -> DreamBooth:
        return self.build(pipe, pictures, None)


class DreamBooth(ShownRecipe[DreamBoothSettings]):
    """Recipe: the whole UNet on a subject and its class.

    Args:
        base: the model, with what trains.
        shown: pictures of the subject.
        settings: see `DreamBoothSettings`.
        beside: pictures of its class; None: none.
        held_out: pictures that the error is measured on; None: none.

    Exported are the folders ``unet`` (and ``text_encoder``) in diffusers' layout.
    """

    name = "dreambooth"

    def __init__(
        self,
        base: BaseModel,
        shown: Shown,
        settings: DreamBoothSettings,
        beside: Shown | None = None,
        held_out: Shown | None = None,
    ) -> None:
        super().__init__(base, shown, settings, beside, held_out)
        self.dataset_size: int | None = len(shown)
        for module in base.trained().values():
            module.requires_grad_(True)

    def modules(self) -> dict[str, nn.Module]:
        return self.base.trained()

    def predict(self, noisy: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
        """What the network predicts."""
        condition = self.base.condition(prompts, self.shown.size, grad=self.settings.text_encoders)
        return self.base.predict(noisy, t, condition)

    def loss(self, batch: Batch, step: int, rng: StepRandom) -> Losses:
        subject, beside = batch
        return subject_loss(self.objective, self.predict, subject, beside, rng, self.settings.class_weight)

    def export(self, folder: Path) -> None:
        for name, module in self.base.trained().items():
            module.save_pretrained(folder / name)

    def load(self, folder: Path) -> None:
        for name, module in self.base.trained().items():
            module.load_state_dict(type(module).from_pretrained(folder / name).state_dict())
