"""What recipes of image prompts share (IP-Adapter, arXiv 2308.06721): a picture is learned from others of its subject.

The pictures of a set are grouped by their subject. What a sample's prompt shows are other pictures of it, in other
scenes, never the picture itself or a crop of it; the picture, its words or both are left out by a joint table, so that
guidance keeps its meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from controlroom.backbones.image_aggregator import chosen_pictures
from controlroom.backbones.image_encoder import check_image_encoder, clip_pixels, image_features
from controlroom.backbones.image_projection import ImageProjection
from controlroom.backbones.image_prompt_attention import prompted
from controlroom.backbones.ip_adapter import IPAdapterModel, adapted_attention, load_ip_adapter, save_ip_adapter
from controlroom.core.branch import Condition
from controlroom.core.errors import InputError, ModelError
from controlroom.data.pictures import Picture, by_subject
from controlroom.training.base_model import BaseModel
from controlroom.training.clip_vision import image_encoder_for
from controlroom.training.faces import StoredFaces
from controlroom.training.held_out import in_parts, mean_over, spread_over
from controlroom.training.objective import Objective
from controlroom.training.people import PeopleSettings
from controlroom.training.randomness import StepRandom, seed_of
from controlroom.training.recipe import Losses
from controlroom.training.shown import Shown, ShownBatch

if TYPE_CHECKING:
    from controlroom.sampling.pipeline import Pipeline

FILE = "ip_adapter.safetensors"
ENCODER = "image_encoder"
#: Shares of samples with both, without the picture, without words, without either.
DROPOUT = (0.85, 0.05, 0.05, 0.05)


class ImagePromptSettings(PeopleSettings):
    """What every recipe of image prompts can be told."""

    loop: ClassVar[dict[str, Any]] = {
        "total_steps": 20_000,
        "batch_size": 8,
        "learning_rate": 1e-4,
        "weight_decay": 0.01,
    }

    aside: ClassVar[frozenset[str]] = PeopleSettings.aside | {"faces"}

    image_encoder: str | None = None
    """Folder of CLIP's image encoder, which reads the pictures (of a face: only the face); None: the theatre's."""
    dropout: tuple[float, float, float, float] = DROPOUT
    """Shares of samples with both, without the picture, without words, without either."""
    seed: int = Field(default=0, ge=0)
    """Of first weights, and of which pictures are shown together."""
    faces: str | None = None
    """Folder with the vector of each picture's face by a recogniser (`training.faces`), instead of an image encoder."""
    with_encoder: bool = True
    """Whether the image encoder is written beside the adapter, where the control looks for it."""

    @field_validator("dropout")
    @classmethod
    def _shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if min(value) < 0 or not sum(value) > 0:
            raise ValueError(f"shares are not negative, and one of them is more than 0; got {value}")
        return value

    @model_validator(mode="after")
    def _one_encoder(self) -> Self:
        if self.faces is not None and self.image_encoder is not None:
            raise ValueError("pictures are read by an image encoder or known by their faces' vectors; give one of them")
        return self

    def encoder_for(self, pipe: Pipeline) -> Any:
        """The image encoder that was named, or the vectors of faces.

        Raises:
            ModelError: there is none.
        """
        if self.faces is not None:
            return StoredFaces(Path(self.faces))
        return image_encoder_for(pipe, self.image_encoder, "An IP-Adapter")


@dataclass(frozen=True)
class PromptedBatch:
    """``shown``, and features of the pictures that are their prompts [B, pictures, …]."""

    shown: ShownBatch
    features: Tensor


class ImagePromptRecipe:
    """A recipe whose adapter learns to say pictures of a subject; recipes derive from it.

    Args:
        base: the model, all of it frozen.
        shown: the pictures.
        settings: see `ImagePromptSettings`.
        encoder: `CLIPVisionModelWithProjection`; for a face's identity also a `FaceEncoder`, or `StoredFaces`.
        adapter: what learns.
        count: number of pictures of a prompt.
        itself: whether a picture is its own prompt, as IP-Adapter was published.
        held_out: pictures of other subjects, on which errors are measured on the way.

    Raises:
        InputError: pictures without a subject, or a subject with one picture only.
        ModelError: the encoder is none, or gives features of another width.
    """

    name = "image_prompts"

    def __init__(
        self,
        base: BaseModel,
        shown: Shown,
        settings: ImagePromptSettings,
        encoder: Any,
        adapter: IPAdapterModel,
        count: int = 1,
        itself: bool = False,
        held_out: Sequence[Picture] = (),
    ) -> None:
        self.base, self.shown, self.settings, self.encoder = base, shown, settings, encoder
        self.adapter = adapter.float().requires_grad_(True)
        self.dataset_size: int | None = len(shown)
        self.objective = Objective(base.backbone.scheduler, settings.objective)
        self.count, self.itself = count, itself
        self.others = {} if itself else others_of(shown.pictures)
        self._numbers = {picture.name: number for number, picture in enumerate(shown.pictures)}
        projection: ImageProjection = adapter.image_proj
        self.states = projection.states
        # States are large: they are made for each batch. Vectors are kept.
        self._features = self._encoded(shown.pictures[:1] if self.states else shown.pictures)
        if self._features.shape[-1] != projection.reads:
            raise ModelError(
                f"The encoder's features are {self._features.shape[-1]} wide, the adapter reads {projection.reads}. "
                "Give the encoder that belongs to it."
            )
        self.null = self._nothing()
        self._held_out = self._held_out_of(held_out)

    def modules(self) -> dict[str, nn.Module]:
        return {"ip_adapter": self.adapter}

    def frozen(self) -> dict[str, nn.Module]:
        encoder = {ENCODER: self.encoder} if isinstance(self.encoder, nn.Module) else {}
        return {**self.base.frozen(), **encoder}

    def fingerprint(self) -> str:
        subjects = [picture.subject for picture in self.shown.pictures]
        what = type(self.encoder).__name__
        if isinstance(self.encoder, StoredFaces):
            what += f" {float(self._features.double().sum()):.6f}"
        return f"{self.shown.fingerprint()} {subjects} {what} {self.count} {self.settings.fingerprint()}"

    def names(self, indices: Sequence[int]) -> tuple[str, ...]:
        """Names of pictures, for messages."""
        return self.shown.batch(indices).names

    # -- which pictures are a prompt, and what the encoder says of them --

    def prompt_of(self, number: int, step: int) -> list[int]:
        """Numbers of the pictures that picture ``number`` is learned from at a step.

        Where its subject has more others than are asked for, they change from step to step; where it has fewer, all
        and some of them again.
        """
        if self.itself:
            return [number] * self.count
        others = self.others[number]
        seed = seed_of(self.settings.seed, number, f"prompt {step}")
        if len(others) > self.count:
            generator = torch.Generator().manual_seed(seed)
            return [others[i] for i in torch.randperm(len(others), generator=generator)[: self.count].tolist()]
        return [others[i] for i in chosen_pictures(len(others), self.count, seed)]

    def _encoded(self, pictures: Sequence[Picture]) -> Tensor:
        """[n, width], or states [n, length, width]; float32, on the CPU."""
        embed = getattr(self.encoder, "embed", None)
        stored = isinstance(self.encoder, StoredFaces)
        if self.states and (stored or embed is not None):
            raise ModelError("A face encoder gives one vector; this adapter reads the states of an image encoder.")
        if stored:
            return self.encoder.vectors(pictures)
        if embed is not None:
            rows = [np.asarray(embed(picture.read()), np.float32).reshape(-1) for picture in pictures]
            return torch.from_numpy(np.stack(rows))
        check_image_encoder(self.encoder)
        side, found = int(self.encoder.config.image_size), []
        with torch.no_grad():
            for i in range(0, len(pictures), 32):
                pixels = clip_pixels([picture.read() for picture in pictures[i : i + 32]], side)
                found.append(image_features(self.encoder, pixels, self.states).float().cpu())
        return torch.cat(found)

    def _nothing(self) -> Tensor:
        """[1, …]: what the encoder says where there is no picture, as in a run's branch without words."""
        if not self.states:
            return torch.zeros(1, self._features.shape[1])
        side = int(self.encoder.config.image_size)
        with torch.no_grad():
            return image_features(self.encoder, torch.zeros(1, 3, side, side), states=True).float().cpu()

    def _features_of(self, sets: Sequence[Sequence[int]]) -> Tensor:
        """[rows, pictures, …]"""
        if not self.states:
            return self._features[torch.tensor(sets)]
        return self._seen(self.shown.pictures, sets)

    def _seen(self, pictures: Sequence[Picture], sets: Sequence[Sequence[int]]) -> Tensor:
        """[rows, pictures, …] of pictures that are encoded for it."""
        numbers = sorted({number for one in sets for number in one})
        made = self._encoded([pictures[number] for number in numbers])
        places = {number: place for place, number in enumerate(numbers)}
        return made[torch.tensor([[places[number] for number in one] for one in sets])]

    def batch(self, indices: Sequence[int], step: int) -> PromptedBatch:
        shown = self.shown.batch(indices)
        sets = [self.prompt_of(self._numbers[name], step) for name in shown.names]
        return PromptedBatch(shown, self._features_of(sets))

    # -- what is learned --

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition, features: Tensor) -> Tensor:
        """What the frozen network predicts beside image prompts of these features [B, pictures, …]."""
        tokens = self.adapter.tokens(features).flatten(1, 2)
        changes = adapted_attention(self.adapter, self.base.unet) if self.adapter.adapts_attention else nullcontext()
        with prompted(self.base.unet, self.adapter, tokens), changes:
            return self.base.predict(noisy, t, condition)

    def loss(self, batch: PromptedBatch, step: int, rng: StepRandom) -> Losses:
        shown, left_out = batch.shown, rng.choice("left out", self.settings.dropout)
        features = self.without(batch.features, left_out % 2 == 1)
        words = (left_out >= 2).tolist()
        prompts = tuple("" if out else text for text, out in zip(shown.prompts, words, strict=True))
        condition = self.base.condition(prompts, self.shown.size)
        errors = self.objective.loss(
            lambda noisy, t: self.predict(noisy, t, condition, features), shown.latents, rng, shown.mask
        )
        return Losses(errors.mean())

    def without(self, features: Tensor, rows: Tensor) -> Tensor:
        """Features with nothing in these rows [B]."""
        null = self.null.to(features).unsqueeze(1).expand_as(features)
        return torch.where(rows.to(features.device).reshape(-1, *(1 for _ in features.shape[1:])), null, features)

    # -- measured, written, read --

    def _held_out_of(self, pictures: Sequence[Picture]) -> list[PromptedBatch]:
        numbers, found = range(len(pictures)), list[PromptedBatch]()
        others = {number: [number] for number in numbers} if self.itself else others_of(pictures)
        for part in in_parts(spread_over(numbers, self.settings.validation_pictures)):
            few = [pictures[number] for number in part]
            (shown,) = Shown(self.base, few, self.settings.prompt, size=self.shown.size).parts()
            chosen = [chosen_pictures(len(others[number]), self.count, 0) for number in part]
            sets = [[others[number][i] for i in own] for number, own in zip(part, chosen, strict=True)]
            found.append(PromptedBatch(shown, self._seen(pictures, sets)))
        return found

    @property
    def has_held_out(self) -> bool:
        """Whether there are pictures to measure on."""
        return bool(self._held_out)

    def validate(self, step: int) -> dict[str, float]:
        """Error on held-out subjects without words, with their pictures as prompts and with none."""
        return mean_over((len(batch.features), self._errors(batch)) for batch in self._held_out)

    def _errors(self, batch: PromptedBatch) -> dict[str, float]:
        latents = batch.shown.latents.to(self.base.device)
        condition = self.base.condition([""], self.shown.size)
        features = batch.features.to(latents)
        nothing = self.without(features, torch.ones(len(features), dtype=torch.bool))
        seen, unseen = (
            self.objective.held_out(lambda noisy, t, told=told: self.predict(noisy, t, condition, told), latents)
            for told in (features, nothing)
        )
        return {"held_out": seen, "without_picture": unseen}

    def export(self, folder: Path) -> None:
        save_ip_adapter(self.adapter, folder / FILE)
        if self.settings.with_encoder and isinstance(self.encoder, nn.Module):
            saved: Any = self.encoder
            saved.save_pretrained(folder / ENCODER)

    def load(self, folder: Path) -> None:
        self.adapter.load_state_dict(load_ip_adapter(folder / FILE, self.base.unet).state_dict())


def others_of(pictures: Sequence[Picture]) -> dict[int, list[int]]:
    """Number of each picture -> those of the other pictures of its subject.

    Raises:
        InputError: pictures without a subject, or a subject with one picture only.
    """
    numbers: dict[str, list[int]] = {}
    for number, picture in enumerate(pictures):
        numbers.setdefault(picture.subject, []).append(number)
    if "" in numbers:
        raise InputError(
            f"{pictures[numbers[''][0]].name} does not say whom or what it shows. Put the pictures of each subject "
            'into a folder of their own, or learn each picture from itself (reference="same").'
        )
    for subject, its in by_subject(pictures).items():
        if len(its) < 2:
            raise InputError(
                f"There is one picture of {subject!r}; the others of a subject are its prompt. Give more, or leave out "
                "who has fewer: least_pictures=2."
            )
    return {number: [other for other in own if other != number] for own in numbers.values() for number in own}
