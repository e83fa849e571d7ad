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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from safetensors.torch import save_file
from torch import Tensor, nn

from controlroom.backbones.image_encoder import check_image_encoder, clip_pixels, image_features
from controlroom.backbones.ms_diffusion import (
    GroundingResampler,
    MSDiffusionModel,
    grounded_attention,
    inside_boxes,
    load_ms_diffusion,
)
from controlroom.controls.regions.ms_diffusion import pooled_words
from controlroom.core.branch import Condition
from controlroom.core.errors import InputError
from controlroom.data.groups import Group, groups_fingerprint
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.base_model import BaseModel as Networks
from controlroom.training.checkpoint import storable
from controlroom.training.latent_cache import LatentCache, cache_key
from controlroom.training.objective import Objective, ObjectiveSettings
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses

FILE = "ms_adapter.safetensors"
DROPOUT = (0.85, 0.05, 0.05, 0.05)
"""Shares of samples with both, without the subjects' pictures, without words, without either."""
UNGROUNDED = 0.1
"""Share of samples whose names and boxes are not told."""
_SQUARE = 512


class MSDiffusionSettings(BaseModel):
    """Sizes of what learns; the defaults are the published ones but for the width, which is the image encoder's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: PositiveInt = 16
    """Of each subject."""
    depth: PositiveInt = 4
    """Layers of the resampler."""
    width: PositiveInt | None = None
    """Of the resampler; None: that of the image encoder's states (1280 in the published model)."""
    seed: int = Field(default=6, ge=0)
    """Of the resampler's first weights."""


@dataclass(frozen=True)
class GroupBatch:
    """What a step shows; a picture of fewer subjects has boxes of zeros for the others, which are then never seen.

    Attributes:
        latents: [B, C, h, w], scaled.
        prompts: B texts.
        features: [B, subjects, length, reads].
        boxes: [B, subjects, 4].
        phrases: [B, subjects, phrase].
        inside: [B, subjects, h, w], 1 in the boxes.
    """

    latents: Tensor
    prompts: tuple[str, ...]
    features: Tensor
    boxes: Tensor
    phrases: Tensor
    inside: Tensor


class MSDiffusionRecipe:
    """Recipe: MS-Diffusion for any Stable Diffusion 1, 2 or XL model.

    Args:
        pipe: the model; it is only read.
        image_encoder: a `CLIPVisionModelWithProjection`, frozen.
        groups: pictures with their subjects.
        settings: sizes of what learns.
        objective: of the loss; None: the plain error, as published.
        held_out: groups that are never trained on, for `validate`.
        size: height and width of the pictures; None: the model's own.
        cache_folder: where latents and features are kept; None: in memory.

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
        objective: ObjectiveSettings | None = None,
        held_out: Sequence[Group] = (),
        size: tuple[int, int] | None = None,
        cache_folder: Path | None = None,
    ) -> None:
        silent = [group.picture.name for group in groups if not group.picture.caption]
        if not groups or silent:
            raise InputError(f"{silent[0]} has no caption." if silent else "There is no picture to train on.")
        check_image_encoder(image_encoder)
        self.settings = settings or MSDiffusionSettings()
        self.base = Networks(pipe)
        self.encoder: Any = image_encoder.eval().requires_grad_(False)
        self.size = size or self.base.backbone.default_size
        self.objective = Objective(self.base.backbone.scheduler, objective)
        self.groups, self.held_out = tuple(groups), tuple(held_out)
        self.dataset_size: int | None = len(self.groups)
        words = sorted({s.word for group in (*self.groups, *self.held_out) for s in group.subjects})
        self._word_rows = {word: row for row, word in enumerate(words)}
        self._phrases = pooled_words(self.base.backbone, words).float()
        reads = int(image_encoder.config.hidden_size)
        width = self.settings.width or reads
        self.model = MSDiffusionModel.for_unet(self.base.unet, self._resampler(reads, width)).to(self.base.device)
        self.model.requires_grad_(True).dummy_image_tokens.requires_grad_(False)
        side = int(image_encoder.config.image_size)
        self._no_picture = self._features(torch.zeros(1, 3, side, side))[0]
        self._shown = _Encoded(self, self.groups, cache_folder)
        self._unseen = _Encoded(self, self.held_out, None) if self.held_out else None

    def _resampler(self, reads: int, width: int) -> GroundingResampler:
        torch.manual_seed(self.settings.seed)
        inner = width if width < 64 else math.ceil(width / 64) * 64
        out = int(self.base.unet.config.cross_attention_dim)
        tokens, depth = self.settings.tokens, self.settings.depth
        return GroundingResampler(reads, width, out, tokens, depth, inner, 4 * width, self._phrases.shape[1])

    def modules(self) -> dict[str, nn.Module]:
        return {"ms_diffusion": self.model}

    def frozen(self) -> dict[str, nn.Module]:
        return {**self.base.frozen(), "image_encoder": self.encoder}

    def fingerprint(self) -> str:
        """Pictures, words and boxes; sizes; what is left out how often."""
        shape = f"{self.settings.model_dump_json()} {self.size} {DROPOUT} {UNGROUNDED}"
        return f"{groups_fingerprint(self.groups)} {shape} {self.objective.settings.model_dump_json()}"

    @torch.no_grad()
    def _features(self, pixels: Tensor) -> Tensor:
        """[n, length, reads], float32."""
        return image_features(self.encoder, pixels, states=True).float()

    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """[n, length, reads] of pictures of subjects, as a run's."""
        square = [picture.resize((_SQUARE, _SQUARE), Image.Resampling.BICUBIC) for picture in pictures]
        return self._features(clip_pixels(square, int(self.encoder.config.image_size)))

    def batch(self, indices: Sequence[int], step: int) -> GroupBatch:
        return self._shown.batch(indices)

    def predict(
        self, batch: GroupBatch, noisy: Tensor, t: Tensor, condition: Condition, grounded: Tensor | None = None
    ) -> Tensor:
        """What the frozen network predicts with subjects beside the words; ``grounded`` [B] as in the resampler."""
        tokens = self.model.prompt(batch.features, batch.boxes, batch.phrases, grounded)
        with grounded_attention(self.base.unet, self.model, tokens, batch.inside):
            return self.base.predict(noisy, t, condition)

    def loss(self, batch: GroupBatch, step: int, rng: StepRandom) -> Losses:
        left_out = rng.choice("left out", DROPOUT)
        grounded = rng.choice("grounding", (1 - UNGROUNDED, UNGROUNDED)) == 0
        hidden = (left_out % 2 == 1)[:, None, None, None]
        features = torch.where(hidden, self._no_picture.to(batch.features), batch.features)
        prompts = ["" if silent else words for silent, words in zip(left_out >= 2, batch.prompts, strict=True)]
        condition = self.base.condition(prompts, self.size)
        told = GroupBatch(batch.latents, batch.prompts, features, batch.boxes, batch.phrases, batch.inside)

        def predict(noisy: Tensor, t: Tensor) -> Tensor:
            return self.predict(told, noisy, t, condition, grounded)

        each = self.objective.loss(predict, batch.latents, rng)
        return Losses(each.mean(), {"mse": each.mean().detach()})

    def validate(self, step: int) -> dict[str, float]:
        """Error on held-out groups with their subjects, and with zero pixels in their place."""
        if self._unseen is None:
            return {}
        batch = self._unseen.batch(range(len(self.held_out)))
        condition = self.base.condition(batch.prompts, self.size)
        blank = self._no_picture.to(batch.features).expand_as(batch.features)
        found: dict[str, float] = {}
        for name, features in (("held_out", batch.features), ("without_pictures", blank)):
            told = GroupBatch(batch.latents, batch.prompts, features, batch.boxes, batch.phrases, batch.inside)
            predict: Callable[[Tensor, Tensor], Tensor] = lambda x, t, b=told: self.predict(b, x, t, condition)  # noqa: E731
            found[name] = self.objective.held_out(predict, batch.latents)
        return found

    def export(self, folder: Path) -> None:
        save_file(storable(self.model.state_dict()), str(folder / FILE), {"format": "pt"})
        self.encoder.save_pretrained(folder / "image_encoder")

    def load(self, folder: Path) -> None:
        self.model.load_state_dict(load_ms_diffusion(folder / FILE, self.base.unet).state_dict())


class _Encoded:
    """Groups as a network reads them: latents of the pictures, features of the subjects, made once."""

    def __init__(self, recipe: MSDiffusionRecipe, groups: Sequence[Group], cache_folder: Path | None) -> None:
        self.recipe, self.groups = recipe, groups
        self.subjects = [subject for group in groups for subject in group.subjects]
        self.first = [0]
        for group in groups:
            self.first.append(self.first[-1] + len(group.subjects))
        self._latents = self._kept(self._encode, len(groups), cache_folder, "vae", recipe.base.vae)
        self._features = self._kept(self._describe, len(self.subjects), cache_folder, "encoder", recipe.encoder)

    def _encode(self, slots: Sequence[int]) -> Tensor:
        pictures = [self.groups[slot].picture.read() for slot in slots]
        return self.recipe.base.latents(pictures, self.recipe.size).cpu()

    def _describe(self, slots: Sequence[int]) -> Tensor:
        found = self.recipe.features([self.subjects[slot].picture.read() for slot in slots])
        return found[..., None].cpu()

    def _kept(
        self, make: Callable[[Sequence[int]], Tensor], count: int, folder: Path | None, part: str, module: nn.Module
    ) -> Callable[[Sequence[int]], Tensor]:
        """A function that reads rows which ``make`` made once."""
        if folder is None:
            whole = torch.cat([make(range(i, min(i + 64, count))) for i in range(0, count, 64)])
            return lambda rows: whole[list(rows)]
        key = cache_key({part: module}, groups_fingerprint(self.groups), f"groups {part} {self.recipe.size}")
        cache = LatentCache(folder, key, count, tuple(make([0]).shape[1:])).build(make)  # type: ignore[arg-type]
        return lambda rows: cache.read(list(rows))

    def batch(self, indices: Sequence[int]) -> GroupBatch:
        """Groups of these numbers, filled up to as many subjects as the largest has."""
        recipe = self.recipe
        device = recipe.base.device
        groups = [self.groups[index] for index in indices]
        latents = self._latents(indices).float().to(device)
        height, width = latents.shape[-2:]
        most = max(len(group.subjects) for group in groups)
        length, reads = recipe._no_picture.shape
        features = torch.zeros(len(groups), most, length, reads)
        boxes, inside = torch.zeros(len(groups), most, 4), torch.zeros(len(groups), most, height, width)
        phrases = torch.zeros(len(groups), most, recipe._phrases.shape[1])
        for row, (index, group) in enumerate(zip(indices, groups, strict=True)):
            count = len(group.subjects)
            features[row, :count] = self._features(range(self.first[index], self.first[index] + count))[..., 0].float()
            boxes[row, :count] = torch.tensor([subject.box for subject in group.subjects])
            inside[row, :count] = inside_boxes([subject.box for subject in group.subjects], (height, width))
            rows = [recipe._word_rows[subject.word] for subject in group.subjects]
            phrases[row, :count] = recipe._phrases[rows].cpu()
        prompts = tuple(group.picture.caption for group in groups)
        return GroupBatch(latents, prompts, *(x.to(device) for x in (features, boxes, phrases, inside)))
