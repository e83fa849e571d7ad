"""MS-Diffusion (Wang et al., arXiv 2406.07209): several subjects in boxes, learned beside a frozen network.

A grounding resampler, and keys and values in every cross-attention that start as copies of the words', learn to denoise
pictures of several subjects out of a picture, a name and a box of each. The pictures of the subjects, the words, or
both are left out of one sample in twenty each (a subject's picture is then zero pixels, as in the published trainer);
name and box of one in ten, in whose place learned queries stand. The tokens of the background are not trained: as
published, nothing of them is ever shown.

Deviations: subjects are shown in another scene, where the published data cuts them out of video frames; boxes follow
the network's own sizes, also for pictures that are not square.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from pydantic import Field, PositiveInt
from safetensors.torch import save_file
from torch import Tensor, nn

from controlroom.backbones.image_encoder import check_image_encoder, clip_pixels, image_features
from controlroom.backbones.ms_diffusion import (
    GroundingResampler,
    MSDiffusionModel,
    grounded_attention,
    load_ms_diffusion,
)
from controlroom.controls.regions.ms_diffusion import pooled_words
from controlroom.core.branch import Condition
from controlroom.data.groups import Group
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.base_model import BaseModel as Networks
from controlroom.training.checkpoint import storable
from controlroom.training.grouped import EncodedGroups, GroupBatch, GroupSettings
from controlroom.training.held_out import mean_over
from controlroom.training.objective import Objective
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses

FILE = "ms_adapter.safetensors"
DROPOUT = (0.85, 0.05, 0.05, 0.05)
"""Shares of samples with both, without the subjects' pictures, without words, without either."""
UNGROUNDED = 0.1
"""Share of samples whose names and boxes are not told."""
_SQUARE = 512


class MSDiffusionSettings(GroupSettings):
    """Sizes of what learns; the defaults are the published ones but for the width, which is the image encoder's.

    Rate and batch are the published trainer's, the number of steps is not.
    """

    loop: ClassVar[dict[str, Any]] = {"total_steps": 100_000, "batch_size": 8, "learning_rate": 1e-4}

    tokens: PositiveInt = 16
    """Of each subject."""
    depth: PositiveInt = 4
    """Layers of the resampler."""
    width: PositiveInt | None = None
    """Of the resampler; None: that of the image encoder's states (1280 in the published model)."""
    seed: int = Field(default=6, ge=0)
    """Of the resampler's first weights."""

    def build(self, pipe: Pipeline, pictures: Sequence[Any], folder: Path) -> MSDiffusionRecipe:
        learned, held_out = self.groups(pictures)
        encoder = self.encoder_for(pipe)
        return MSDiffusionRecipe(pipe, encoder, learned, self, held_out, self.cache_folder, exact=True)


class MSDiffusionRecipe:
    """Recipe: MS-Diffusion for any Stable Diffusion 1, 2 or XL model.

    Args:
        pipe: the model; it is only read.
        image_encoder: a `CLIPVisionModelWithProjection`, frozen.
        groups: pictures with their subjects.
        settings: see `MSDiffusionSettings`.
        held_out: groups that are never trained on, for `validate`.
        cache_folder: where latents and features are kept; None: in memory.
        exact: whether they are kept in float32, so that a run is the same bit for bit; otherwise in half precision.

    Exported are ``ms_adapter.safetensors`` with the published keys, and the image encoder beside it.

    Raises:
        InputError: no groups, or a picture without a caption.
    """

    name = "ms_diffusion"

    def __init__(
        self,
        pipe: Pipeline,
        image_encoder: Any,
        groups: Sequence[Group],
        settings: MSDiffusionSettings | None = None,
        held_out: Sequence[Group] = (),
        cache_folder: Path | None = None,
        exact: bool = False,
    ) -> None:
        check_image_encoder(image_encoder)
        self.settings = settings or MSDiffusionSettings()
        self.base = Networks(pipe)
        self.encoder: Any = image_encoder.eval().requires_grad_(False)
        self.objective = Objective(self.base.backbone.scheduler, self.settings.objective)
        size = self.settings.hw
        self.shown = EncodedGroups(self.base, groups, self.features, self.encoder, size, cache_folder, exact)
        self.unseen = EncodedGroups(self.base, held_out, self.features, self.encoder, size) if held_out else None
        self.dataset_size: int | None = len(self.shown)
        words = sorted({subject.word for group in (*groups, *held_out) for subject in group.subjects})
        found = pooled_words(self.base.backbone, words).float()
        self._phrases = dict(zip(words, found, strict=True))
        reads = int(image_encoder.config.hidden_size)
        resampler = self._resampler(reads, self.settings.width or reads, found.shape[1])
        self.model = MSDiffusionModel.for_unet(self.base.unet, resampler).to(self.base.device)
        self.model.requires_grad_(True).dummy_image_tokens.requires_grad_(False)
        side = int(image_encoder.config.image_size)
        self.no_picture = self._features(torch.zeros(1, 3, side, side))[0]

    def _resampler(self, reads: int, width: int, phrase: int) -> GroundingResampler:
        torch.manual_seed(self.settings.seed)
        inner = width if width < 64 else math.ceil(width / 64) * 64
        out = int(self.base.unet.config.cross_attention_dim)
        tokens, depth = self.settings.tokens, self.settings.depth
        return GroundingResampler(reads, width, out, tokens, depth, inner, 4 * width, phrase)

    def modules(self) -> dict[str, nn.Module]:
        return {"ms_diffusion": self.model}

    def frozen(self) -> dict[str, nn.Module]:
        return {**self.base.frozen(), "image_encoder": self.encoder}

    def fingerprint(self) -> str:
        """Pictures, words and boxes; sizes; what is left out how often."""
        shape = f"{self.settings.own()} {DROPOUT} {UNGROUNDED}"
        return f"{self.shown.fingerprint()} {shape} {self.objective.settings.model_dump_json()}"

    def names(self, indices: Sequence[int]) -> tuple[str, ...]:
        """Names of pictures, for messages."""
        return self.shown.names(indices)

    @torch.no_grad()
    def _features(self, pixels: Tensor) -> Tensor:
        """[n, length, reads], float32."""
        return image_features(self.encoder, pixels, states=True).float()

    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """[n, length, reads] of pictures of subjects, as a run's."""
        square = [picture.resize((_SQUARE, _SQUARE), Image.Resampling.BICUBIC) for picture in pictures]
        return self._features(clip_pixels(square, int(self.encoder.config.image_size)))

    def batch(self, indices: Sequence[int], step: int) -> GroupBatch:
        return self.shown.batch(indices)

    def phrases(self, batch: GroupBatch) -> Tensor:
        """[B, subjects, width]: what the subjects are called; zeros where a picture has fewer."""
        rows = [[self._phrases[word] for word in words] for words in batch.words]
        blank = torch.zeros_like(next(iter(self._phrases.values())))
        most = batch.boxes.shape[1]
        return torch.stack([torch.stack([*row, *[blank] * (most - len(row))]) for row in rows]).to(batch.boxes)

    def predict(
        self, batch: GroupBatch, noisy: Tensor, t: Tensor, condition: Condition, grounded: Tensor | None = None
    ) -> Tensor:
        """What the frozen network predicts with subjects beside the words; ``grounded`` [B] as in the resampler."""
        tokens = self.model.prompt(batch.features, batch.boxes, self.phrases(batch), grounded)
        with grounded_attention(self.base.unet, self.model, tokens, batch.inside):
            return self.base.predict(noisy, t, condition)

    def loss(self, batch: GroupBatch, step: int, rng: StepRandom) -> Losses:
        left_out = rng.choice("left out", DROPOUT)
        grounded = rng.choice("grounding", (1 - UNGROUNDED, UNGROUNDED)) == 0
        hidden = (left_out % 2 == 1)[:, None, None, None]
        features = torch.where(hidden, self.no_picture.to(batch.features), batch.features)
        prompts = ["" if silent else words for silent, words in zip(left_out >= 2, batch.prompts, strict=True)]
        condition = self.base.condition(prompts, self.shown.size)
        told = replace(batch, features=features)

        def predict(noisy: Tensor, t: Tensor) -> Tensor:
            return self.predict(told, noisy, t, condition, grounded)

        each = self.objective.loss(predict, batch.latents, rng)
        return Losses(each.mean(), {"mse": each.mean().detach()})

    @property
    def has_held_out(self) -> bool:
        """Whether there is something to measure on."""
        return self.unseen is not None

    def validate(self, step: int) -> dict[str, float]:
        """Error on held-out groups with their subjects, and with zero pixels in their place."""
        if self.unseen is None:
            return {}
        return mean_over((len(batch.prompts), self._errors(batch)) for batch in self.unseen.parts())

    def _errors(self, batch: GroupBatch) -> dict[str, float]:
        blank = self.no_picture.to(batch.features).expand_as(batch.features)
        return {"held_out": self.error(batch), "without_pictures": self.error(replace(batch, features=blank))}

    def error(self, batch: GroupBatch) -> float:
        """Unweighted error of pictures at four noise levels, with the same noise every time."""
        condition = self.base.condition(batch.prompts, self.shown.size)
        return self.objective.held_out(lambda noisy, t: self.predict(batch, noisy, t, condition), batch.latents)

    def export(self, folder: Path) -> None:
        save_file(storable(self.model.state_dict()), str(folder / FILE), {"format": "pt"})
        self.encoder.save_pretrained(folder / "image_encoder")

    def load(self, folder: Path) -> None:
        self.model.load_state_dict(load_ms_diffusion(folder / FILE, self.base.unet).state_dict())
