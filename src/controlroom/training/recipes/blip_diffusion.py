"""BLIP-Diffusion's fit to one subject (Li et al., arXiv 2305.14720): a few steps after a subject encoder's guess.

The vectors of all pictures of the subject are averaged once and stay; the UNet learns to draw the pictures from "a
[subject] dog", 40 to 150 steps at 5e-6. What comes out draws the subject without a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from controlroom.backbones.image_encoder import clip_pixels
from controlroom.backbones.loading import find_model
from controlroom.backbones.lora_names import UNET
from controlroom.backbones.subject_reader import SubjectReader, load_subject_reader, told_with
from controlroom.controls.personal.blip_diffusion import CACHE, KEY
from controlroom.core.errors import InputError
from controlroom.data.pictures import Picture
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.checkpoint import storable
from controlroom.training.held_out import mean_over, spread_over
from controlroom.training.objective import Objective
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses
from controlroom.training.recipe_settings import EncodedSettings
from controlroom.training.shown import Shown, ShownBatch


class BLIPDiffusionSettings(EncodedSettings):
    """How a network is fitted to a subject."""

    loop: ClassVar[dict[str, Any]] = {"total_steps": 80, "batch_size": 3, "learning_rate": 5e-6}

    encoder: str = "theatre/blip_subject"
    """Folder, downloaded hub id or name of the theatre of the subject encoder."""
    subject: str = ""
    """The word for what is wanted of the pictures: "dog". Must be given."""
    flip: bool = False
    """Also show each picture mirrored."""

    def build(self, pipe: Pipeline, pictures: Sequence[Picture], folder: Path) -> BLIPDiffusionRecipe:
        reader = load_subject_reader(find_model(self.encoder, "subject encoder"), pipe.backbone)
        learned, held_out = self.sides(pictures)
        return BLIPDiffusionRecipe(pipe, reader, learned, self, held_out)


class BLIPDiffusionRecipe:
    """Recipe: the UNet, and the mean of a subject's vectors.

    Args:
        pipe: the model; it is only read.
        reader: a subject encoder, for the vectors.
        pictures: of the subject.
        settings: see `BLIPDiffusionSettings`.
        held_out: other pictures of it, for the error on the way.

    Exported are ``unet`` in diffusers' layout and the vectors, as `BLIPDiffusion` reads them.

    Raises:
        InputError: no word for the subject, no picture, or one that cannot be read.
    """

    name = "blip_diffusion"

    def __init__(
        self,
        pipe: Pipeline,
        reader: SubjectReader,
        pictures: Sequence[Picture],
        settings: BLIPDiffusionSettings,
        held_out: Sequence[Picture] = (),
    ) -> None:
        if not settings.subject.strip():
            raise InputError('BLIP-Diffusion needs the word for what is wanted of the pictures: subject = "dog".')
        self.settings = settings
        self.base = settings.networks(pipe, (UNET,))
        self.base.unet.requires_grad_(True)
        self.objective = Objective(self.base.backbone.scheduler, settings.objective)
        prompt = f"a {settings.subject}"
        self.shown = Shown(self.base, pictures, prompt, captions=False, size=settings.hw, flip=settings.flip)
        self.dataset_size: int | None = len(self.shown)
        few = spread_over(held_out, settings.validation_pictures)
        self._held_out = Shown(self.base, few, prompt, captions=False, size=self.shown.size).parts() if few else []
        side = reader.side
        square = [picture.read().resize((side, side), Image.Resampling.BICUBIC) for picture in pictures]
        with torch.no_grad():
            self.vectors: Tensor = reader(clip_pixels(square, side), [settings.subject] * len(square)).mean(0)[None]
            self.condition = told_with(self.base.backbone, [prompt], self.vectors, self.shown.size)

    def modules(self) -> dict[str, nn.Module]:
        return self.base.trained()

    def frozen(self) -> dict[str, nn.Module]:
        return self.base.frozen()

    def fingerprint(self) -> str:
        return f"{self.shown.fingerprint()} {self.settings.fingerprint()}"

    def names(self, indices: Sequence[int]) -> tuple[str, ...]:
        """Names of pictures, for messages."""
        return self.shown.batch(indices).names

    def batch(self, indices: Sequence[int], step: int) -> ShownBatch:
        return self.shown.batch(indices)

    def predict(self, noisy: Tensor, t: Tensor) -> Tensor:
        """What the network predicts beside the subject's vectors."""
        return self.base.predict(noisy, t, self.condition)

    @property
    def has_held_out(self) -> bool:
        """Whether there are pictures to measure on."""
        return bool(self._held_out)

    def validate(self, step: int) -> dict[str, float]:
        """Error on the held-out pictures, at fixed timesteps with the same noise every time."""
        device = self.base.device
        return mean_over(
            (len(part.names), {"held_out": self.objective.held_out(self.predict, part.latents.to(device), part.mask)})
            for part in self._held_out
        )

    def loss(self, batch: ShownBatch, step: int, rng: StepRandom) -> Losses:
        each = self.objective.loss(self.predict, batch.latents, rng, batch.mask)
        return Losses(each.mean(), {"mse": each.mean().detach()})

    def export(self, folder: Path) -> None:
        self.base.unet.save_pretrained(folder / UNET)
        (folder / CACHE).parent.mkdir(parents=True, exist_ok=True)
        about = {"format": "pt", "subject": self.settings.subject}
        save_file(storable({KEY: self.vectors}), str(folder / CACHE), about)

    def load(self, folder: Path) -> None:
        found = type(self.base.unet).from_pretrained(folder / UNET)
        self.base.unet.load_state_dict(found.state_dict())
        self.vectors = load_file(str(folder / CACHE))[KEY].to(self.base.device)
        with torch.no_grad():
            prompt = f"a {self.settings.subject}"
            self.condition = told_with(self.base.backbone, [prompt], self.vectors, self.shown.size)
