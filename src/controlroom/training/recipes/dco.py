"""Direct Consistency Optimization (Lee et al., arXiv 2402.12004): learn a subject or a style, and stay near the model.

A LoRA learns to denoise the pictures better than the model it started from, and no more than that: with the errors ℓθ
of the adapted and ℓφ of the untouched network on the same noise and timestep, the loss of a sample is
−log σ(−β (ℓθ − ℓφ)), whose gradient fades once the adapted network is better by a few 1/β. What the model knew stays,
so that several of these LoRAs add up. The untouched network is told plain words in the place of the subject's.
Deviation from the published code: the loss is of each sample, as the paper has it, where the code averages the errors
of the batch first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from controlroom.backbones.lora_files import load_lora, save_lora
from controlroom.backbones.lora_names import PARTS, UNET
from controlroom.data.pictures import Picture
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.base_model import BaseModel
from controlroom.training.learned_word import NewWord
from controlroom.training.low_rank import ATTENTION, LowRankLayers, layers_ending
from controlroom.training.own_rate import OwnRate
from controlroom.training.prompt_templates import with_word
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses
from controlroom.training.shown import Shown
from controlroom.training.shown_recipe import Batch, ShownRecipe, ShownSettings

FILE = "lora.safetensors"


class DCOSettings(ShownSettings):
    """How a subject is learned. For a style the authors take rank 64, 1000 steps and a noise offset of 0.1."""

    loop: ClassVar[dict[str, Any]] = {
        "total_steps": 2000,
        "batch_size": 1,
        "learning_rate": 5e-5,
        "weight_decay": 1e-4,
    }

    prompt: str | None = None
    """Words for pictures without a caption, with {}, {token} or the word itself: "a photo of a {} dog"."""
    word: str = "sks"
    """What the subject is called: a rare word, or with ``vectors`` a new one, like <anna>."""
    plain: str = ""
    """What stands in the place of the word for the untouched network: nothing, or other words."""
    beta: PositiveFloat = 1000.0
    """How soon being better than the untouched network is enough; of the mean squared error."""
    rank: PositiveInt = 32
    alpha: PositiveFloat | None = None
    """Strength is alpha / rank; None: the rank."""
    layers: tuple[str, ...] = ATTENTION
    """Ends of the paths of layers that learn."""
    text_encoders: bool = False
    """Whether the text encoders learn as well."""
    vectors: int = Field(default=0, ge=0)
    """Vectors of a new word that is learned along; 0: the word is one that the model knows. Their length is held."""
    initial: str | None = None
    """What a new word starts from; None: random vectors."""
    text_rate: float = Field(default=0.1, gt=0.0, le=1.0)
    """Learning rate of text encoders and new word, as a share of the run's: 5e-6 of 5e-5."""
    file_format: Literal["diffusers", "kohya"] = "diffusers"

    def build(self, pipe: Pipeline, pictures: Sequence[Picture], folder: Path) -> DCORecipe:
        base = self.networks(pipe)
        shown, held_out = self.shown(base, pictures, self.prompt)
        return DCORecipe(base, shown, self, held_out)


class DCORecipe(ShownRecipe[DCOSettings]):
    """Recipe: a LoRA that is better than its base, by no more than needed.

    Args:
        base: the model, all of it frozen.
        shown: the pictures; their prompts have ``{}``, ``{token}`` or the word where the subject is named.
        settings: see `DCOSettings`.
        held_out: pictures that the error is measured on; None: none.

    Exported are ``lora.safetensors`` and, of a new word, ``learned_word.safetensors``.

    Raises:
        InputError: a new word that the model knows already.
    """

    name = "dco"

    def __init__(self, base: BaseModel, shown: Shown, settings: DCOSettings, held_out: Shown | None = None) -> None:
        super().__init__(base, shown, settings, held_out=held_out)
        self.dataset_size: int | None = len(shown)
        names = base.names()
        chosen = layers_ending(names, settings.layers, PARTS if settings.text_encoders else (UNET,))
        self.adapter = LowRankLayers(names, chosen, settings.rank, settings.alpha)
        self.word = NewWord(base, settings.word, settings.vectors, settings.initial) if settings.vectors else None
        slow = [] if self.word is None else list(self.word.parameters())
        for factors in (self.adapter.down, self.adapter.up):
            slow += [factor for (part, _), factor in zip(chosen, factors, strict=True) if part != UNET]
        self._slow = OwnRate(slow, settings.text_rate)

    def modules(self) -> dict[str, nn.Module]:
        words = {} if self.word is None else {"word": self.word}
        return {"lora": self.adapter, **words}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the block, the model draws with what was learned."""
        with ExitStack() as stack:
            stack.enter_context(self.adapter.attached())
            if self.word is not None:
                stack.enter_context(self.word.known())
            yield

    def told(self, prompt: str) -> str:
        return with_word(prompt, self.settings.word)

    def named_and_plain(self, prompts: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Prompts with the subject's word, and plain ones for the untouched network."""
        word, plain = self.settings.word, self.settings.plain
        named = tuple(self.told(text) for text in prompts)
        if not word:
            return named, named
        return named, tuple(" ".join(text.replace(word, plain).split()) for text in named)

    def predict(self, noisy: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
        """What the adapted network predicts."""
        with self.attached():
            grad = self.settings.text_encoders or self.word is not None
            condition = self.base.condition(prompts, self.shown.size, grad=grad)
            return self.base.predict(noisy, t, condition)

    def loss(self, batch: Batch, step: int, rng: StepRandom) -> Losses:
        shown, _ = batch
        self._slow.before()
        drawn = self.objective.draw(shown.latents, rng)
        named, plain = self.named_and_plain(shown.prompts)

        def errors(predicted: Tensor) -> Tensor:
            return self.objective.errors(predicted, drawn, shown.mask) * drawn.weight

        with torch.no_grad():
            told = self.base.condition(plain, self.shown.size)
            reference = errors(self.base.predict(drawn.latents, drawn.t, told))
        own = errors(self.predict(drawn.latents, drawn.t, named))
        each = -F.logsigmoid(-self.settings.beta * (own - reference))
        parts = {"subject": own.detach().mean(), "reference": reference.mean()}
        return Losses(each.mean(), {**parts, "better": (own.detach() < reference).float().mean()})

    def after_step(self, step: int) -> None:
        """Text encoders and word move at their own rate; the word keeps its length."""
        self._slow.after()
        if self.word is not None:
            self.word.retract()

    def export(self, folder: Path) -> None:
        about = {"ss_base_model": self.base.model, "prompt": self.settings.prompt or "", "word": self.settings.word}
        names = self.base.names()
        save_lora(folder / FILE, self.adapter.changes(), names, self.settings.file_format, about)
        if self.word is not None:
            self.word.save(folder)

    def load(self, folder: Path) -> None:
        self.adapter.load(load_lora(folder / FILE, self.base.names()).layers)
        if self.word is not None:
            self.word.load(folder)
