"""LoRA (Hu et al., arXiv 2106.09685) on pictures with captions: a person, a thing or a style as a small file.

Low-rank layers beside the attention of the frozen UNet, and of the text encoders where asked, learn to denoise the
pictures from their captions. Deviation from the trainers people use: nothing is cropped at random, and the file
always says its alpha.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from controlroom.backbones.lora_files import load_lora, save_lora
from controlroom.backbones.lora_names import PARTS, UNET
from controlroom.data.pictures import Picture
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.base_model import BaseModel
from controlroom.training.buckets import BucketOrder
from controlroom.training.low_rank import ATTENTION, LowRankLayers, layers_ending
from controlroom.training.prior import subject_loss
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses
from controlroom.training.shown import Shown
from controlroom.training.shown_recipe import Batch, ShownRecipe, ShownSettings, without_words

FILE = "lora.safetensors"


class LoRASettings(ShownSettings):
    """How a LoRA is trained."""

    loop: ClassVar[dict[str, Any]] = {"total_steps": 1500, "batch_size": 1, "learning_rate": 1e-4}

    prompt: str | None = None
    """Words for pictures without a caption."""
    rank: PositiveInt = 16
    alpha: PositiveFloat | None = None
    """Strength is alpha / rank; None: the rank."""
    dora: bool = False
    """Also learn the length of each output's weights (arXiv 2402.09353)."""
    layers: tuple[str, ...] = ATTENTION
    """Ends of the paths of layers that learn."""
    text_encoders: bool = False
    """Whether the text encoders learn as well."""
    without_words: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of samples without words, so that guidance keeps its meaning in long trainings; 0.1."""
    buckets: bool = True
    """Whether pictures keep their shape, each batch of one; otherwise the middle of ``size`` is cut out."""
    file_format: Literal["diffusers", "kohya"] = "diffusers"

    def build(self, pipe: Pipeline, pictures: Sequence[Picture], folder: Path) -> LoRARecipe:
        base = self.networks(pipe)
        shown, held_out = self.shown(base, pictures, self.prompt, buckets=self.buckets)
        return LoRARecipe(base, shown, self, held_out=held_out)


class LoRARecipe(ShownRecipe[LoRASettings]):
    """Recipe: low-rank layers on pictures with captions.

    Args:
        base: the model, all of it frozen.
        shown: the pictures.
        settings: see `LoRASettings`.
        beside: pictures of the class, shown beside those of the subject; None: none.
        class_weight: how much errors on the class count.
        held_out: pictures that the error is measured on; None: none.

    Exported is ``lora.safetensors``.
    """

    name = "lora"

    def __init__(
        self,
        base: BaseModel,
        shown: Shown,
        settings: LoRASettings,
        beside: Shown | None = None,
        class_weight: float = 1.0,
        held_out: Shown | None = None,
    ) -> None:
        super().__init__(base, shown, settings, beside, held_out)
        self.class_weight = class_weight
        names = base.names()
        parts = PARTS if settings.text_encoders else (UNET,)
        chosen = layers_ending(names, settings.layers, parts)
        self.adapter = LowRankLayers(names, chosen, settings.rank, settings.alpha, settings.dora)

    def modules(self) -> dict[str, nn.Module]:
        return {"lora": self.adapter}

    def batch_order(self, batch_size: int, seed: int, first_slot: int) -> BucketOrder:
        """Batches of one size."""
        return self.shown.order(batch_size, seed, first_slot)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the block, the model draws with what was learned."""
        with self.adapter.attached():
            yield

    def predict(self, noisy: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
        """What the adapted network predicts."""
        scale = self.base.backbone.pixels_per_latent
        size = (noisy.shape[-2] * scale, noisy.shape[-1] * scale)
        with self.attached():
            condition = self.base.condition(prompts, size, grad=self.settings.text_encoders)
            return self.base.predict(noisy, t, condition)

    def loss(self, batch: Batch, step: int, rng: StepRandom) -> Losses:
        subject, beside = batch
        subject = without_words(subject, self.settings.without_words, rng)
        return subject_loss(self.objective, self.predict, subject, beside, rng, self.class_weight)

    def export(self, folder: Path) -> None:
        about = {"ss_base_model": self.base.model, "prompt": self.settings.prompt or ""}
        names = self.base.names()
        save_lora(folder / FILE, self.adapter.changes(), names, self.settings.file_format, about)

    def load(self, folder: Path) -> None:
        self.adapter.load(load_lora(folder / FILE, self.base.names()).layers)
