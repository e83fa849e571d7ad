"""InstructPix2Pix (Brooks et al., arXiv 2211.09800): a model learns to edit pictures by instructions.

The UNet gets as many further input channels as the latents have, whose weights start at zero, and is tuned whole to
denoise the picture after an instruction from the instruction and the latents of the picture before. Picture,
instruction or both are left out of a sample in twenty each, as published; the picture's latents are the mode of the
posterior, not scaled by the autoencoder's factor. Deviation from diffusers' trainer: the bias of the first convolution
is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import UNet2DConditionModel
from pydantic import Field, model_validator
from torch import Tensor, nn

from controlroom.backbones.lora_names import UNET
from controlroom.controls.editing.instruct_pix2pix import unscaled
from controlroom.core.errors import InputError
from controlroom.data.edited_pictures import EditedPicture, edited_pictures
from controlroom.data.pictures import Picture
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.base_model import BaseModel
from controlroom.training.held_out import mean_over, spread_over
from controlroom.training.instructed import left_out, widen
from controlroom.training.objective import Objective
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses
from controlroom.training.recipe_settings import EncodedSettings
from controlroom.training.shown import Shown, ShownBatch


class InstructPix2PixSettings(EncodedSettings):
    """How a model learns to follow instructions. The authors show 1024 pictures of 256 pixels a step, 10 000 times."""

    loop: ClassVar[dict[str, Any]] = {
        "total_steps": 15_000,
        "batch_size": 16,
        "learning_rate": 5e-5,
        "ema_decay": 0.9999,
    }

    without_picture: float = Field(default=0.05, ge=0.0, le=1.0)
    """Share of samples that are not shown the picture before."""
    without_words: float = Field(default=0.05, ge=0.0, le=1.0)
    """Share of samples that are not told the instruction."""
    without_both: float = Field(default=0.05, ge=0.0, le=1.0)
    flip: bool = False
    """Also show each pair mirrored; not where instructions speak of left and right."""

    @model_validator(mode="after")
    def _shares(self) -> InstructPix2PixSettings:
        if sum(self.left_out) > 1.0:
            raise ValueError("without_picture, without_words and without_both are more than all samples together")
        return self

    @property
    def left_out(self) -> tuple[float, float, float]:
        """Shares without the picture, without the words, without both."""
        return self.without_picture, self.without_words, self.without_both

    def read(self, data: str) -> Sequence[Picture]:
        return edited_pictures(data)

    def build(self, pipe: Pipeline, pictures: Sequence[Picture], folder: Path) -> InstructPix2PixRecipe:
        learned, held_out = (_pairs(side) for side in self.sides(pictures))
        return InstructPix2PixRecipe(self.networks(pipe, (UNET,)), learned, self, held_out)


def _pairs(pictures: Sequence[Picture]) -> list[EditedPicture]:
    """Raises InputError for a picture with none before it."""
    for picture in pictures:
        if not isinstance(picture, EditedPicture):
            raise InputError(
                f"{picture.name} has no picture before it. Read the set with data.edited_pictures.edited_pictures."
            )
    return [picture for picture in pictures if isinstance(picture, EditedPicture)]


@dataclass(frozen=True)
class EditBatch:
    """``before`` [B, C, h, w], not scaled; ``after`` with latents, instructions, mask and names."""

    before: Tensor
    after: ShownBatch


class InstructPix2PixRecipe:
    """Recipe: editing by instructions.

    Args:
        base: the model, whose UNet trains; it gets the further channels here.
        pairs: pictures before and after.
        settings: see `InstructPix2PixSettings`.
        held_out: other pairs, for the error on the way.

    Exported is the folder ``unet`` in diffusers' layout; with the other parts of the model it draws under
    `cr.InstructPix2Pix`, and in diffusers' pipelines of that name.

    Raises:
        InputError: no pair, one that cannot be read, or one without an instruction.
        ModelError: the UNet reads more than latents already.
    """

    name = "instruct_pix2pix"

    def __init__(
        self,
        base: BaseModel,
        pairs: Sequence[EditedPicture],
        settings: InstructPix2PixSettings,
        held_out: Sequence[EditedPicture] = (),
    ) -> None:
        self.base, self.settings = base, settings
        self.before, self.after = self._shown(pairs, settings.flip)
        few = spread_over(held_out, settings.validation_pictures)
        self._held_out = self._parts(*self._shown(few, False)) if few else []
        self.dataset_size: int | None = len(self.after)
        widen(base, base.backbone.latent_channels)
        base.unet.requires_grad_(True)
        self.objective = Objective(base.backbone.scheduler, settings.objective)
        self.shares = (1.0 - sum(settings.left_out), *settings.left_out)

    def _shown(self, pairs: Sequence[EditedPicture], flip: bool) -> tuple[Shown, Shown]:
        """Pictures before, and after with the instructions."""
        befores, size = [pair.before for pair in pairs], self.settings.hw
        before = Shown(self.base, befores, "", captions=False, size=size, flip=flip)
        return before, Shown(self.base, pairs, size=size, flip=flip)

    def _parts(self, before: Shown, after: Shown) -> list[EditBatch]:
        both = zip(before.parts(), after.parts(), strict=True)
        return [EditBatch(unscaled(one.latents, self.base.vae.config), other) for one, other in both]

    def modules(self) -> dict[str, nn.Module]:
        return self.base.trained()

    def frozen(self) -> dict[str, nn.Module]:
        return self.base.frozen()

    def fingerprint(self) -> str:
        return f"{self.after.fingerprint()} {self.before.fingerprint()} {self.settings.fingerprint()}"

    def names(self, indices: Sequence[int]) -> tuple[str, ...]:
        """Names of pictures after, for messages."""
        return self.after.batch(indices).names

    def batch(self, indices: Sequence[int], step: int) -> EditBatch:
        before = unscaled(self.before.batch(indices).latents, self.base.vae.config)
        return EditBatch(before, self.after.batch(indices))

    def predict(self, noisy: Tensor, t: Tensor, before: Tensor, prompts: Sequence[str]) -> Tensor:
        """What the network says of the noisy picture after, seeing the picture before and told the instructions."""
        condition = self.base.condition(prompts, self.after.size)
        return self.base.predict(torch.cat([noisy, before], dim=1), t, condition)

    def loss(self, batch: EditBatch, step: int, rng: StepRandom) -> Losses:
        no_picture, no_words = left_out(rng, self.shares)
        before = batch.before.masked_fill(no_picture[:, None, None, None], 0.0)
        told = zip(batch.after.prompts, no_words.tolist(), strict=True)
        prompts = ["" if out else words for words, out in told]

        def predict(noisy: Tensor, t: Tensor) -> Tensor:
            return self.predict(noisy, t, before, prompts)

        return Losses(self.objective.loss(predict, batch.after.latents, rng, batch.after.mask).mean())

    @property
    def has_held_out(self) -> bool:
        """Whether there are pictures to measure on."""
        return bool(self._held_out)

    def validate(self, step: int) -> dict[str, float]:
        """Error on held-out pairs: seeing the picture before, and with nothing in its place."""
        return mean_over((len(batch.before), self._errors(batch)) for batch in self._held_out)

    def _errors(self, batch: EditBatch) -> dict[str, float]:
        before, after = batch.before.to(self.base.device), batch.after
        return {
            name: self.objective.held_out(
                lambda noisy, t, seen=seen: self.predict(noisy, t, seen, after.prompts),
                after.latents.to(self.base.device),
                after.mask,
            )
            for name, seen in {"held_out": before, "without_picture": torch.zeros_like(before)}.items()
        }

    def export(self, folder: Path) -> None:
        self.base.unet.save_pretrained(folder / UNET)

    def load(self, folder: Path) -> None:
        self.base.unet.load_state_dict(UNet2DConditionModel.from_pretrained(folder / UNET).state_dict())
