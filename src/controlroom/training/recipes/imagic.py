"""Imagic's two stages (arXiv 2210.09276): words that reconstruct a picture, then a network that does so from them.

First the states of the wanted words are moved by Adam down the error of the predicted noise on the picture (500 steps
at 1e-3), with the network frozen; then the network is tuned on the same error with the learned words frozen (1000 steps
at 2e-6): the numbers of the community's pipeline for Stable Diffusion. The tuned network may instead see the wanted
words, as the paper tunes the models that enlarge. Deviations: the picture is the mean of the encoder's posterior; for
Stable Diffusion XL the pooled text is learned too; as an option the text encoder is tuned instead of its states; the
target follows what the network predicts (noise, v or the picture). The pipeline is only read: a float32 copy trains.
"""

from __future__ import annotations

import copy
import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from controlroom.backbones.base import Backbone
from controlroom.controls.editing.imagic import EMBEDDING, Imagic
from controlroom.controls.source_pixels import natural_pixels, stretched
from controlroom.core.branch import Condition
from controlroom.core.control import describe
from controlroom.core.errors import ControlRoomError, InputError, ModelError
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.checkpoint import storable
from controlroom.training.loop import TrainResult, train
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses
from controlroom.training.settings import TrainSettings

Stage = Literal["embedding", "text_encoder", "unet"]


class UnfinishedError(ControlRoomError):
    """A fit that was stopped before its end; the same call continues it."""


class ImagicSettings(BaseModel):
    """How a picture is fitted.

    Raises:
        InputError: an unknown or ill-typed setting.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    learn: Literal["embedding", "text_encoder"] = "embedding"
    """What reconstructs the picture first: the states of the words, or the encoder that makes them."""
    embedding_steps: PositiveInt = 500
    embedding_rate: PositiveFloat = 1e-3
    """Of Adam; for a text encoder something like 1e-5."""
    unet_steps: int = Field(default=1000, ge=0)
    """0: the network is not tuned; draw with ``network="base"``."""
    unet_rate: PositiveFloat = 2e-6
    unet_words: Literal["learned", "wanted"] = "learned"
    """What the network sees while it is tuned; ``wanted`` where it will enlarge, as in the paper."""
    size: tuple[int, int] | None = None
    """Height and width at which the words are learned; None: what the model was trained at."""
    unet_size: tuple[int, int] | None = None
    """Height and width at which the network is tuned; None: ``size``."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    checkpoint_every_seconds: PositiveFloat = 300.0
    stop_after_seconds: PositiveFloat | None = None
    """Stop with a checkpoint after so long."""

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise InputError(describe("ImagicSettings", error)) from error


class Words(nn.Module):
    """States of a text as parameters: ``tokens`` [1, length, width] and, for XL, ``pooled`` [1, width]."""

    def __init__(self, condition: Condition) -> None:
        super().__init__()
        self.tokens = nn.Parameter(condition.tokens.detach().float().clone())
        self.pooled: nn.Parameter | None = None
        if condition.pooled is not None:
            self.pooled = nn.Parameter(condition.pooled.detach().float().clone())

    def condition(self, time_ids: Tensor | None) -> Condition:
        """What the network is told."""
        return Condition(self.tokens, pooled=self.pooled, time_ids=time_ids)


@dataclass(frozen=True)
class Subject:
    """What is fitted: scaled latents [1, C, h, w] of the picture, its size in pixels, and the wanted words."""

    latents: Tensor
    size: tuple[int, int]
    prompt: str


class ImagicRecipe:
    """Recipe: one stage of Imagic.

    Args:
        backbone: with networks that may be trained, in float32.
        subject: the picture and the wanted words.
        stage: what learns.
        words: for the stage ``unet``, what the network sees, frozen; None: the wanted words.

    Exported are ``embedding.safetensors`` (of either first stage), or the UNet in diffusers' layout.
    """

    def __init__(self, backbone: Backbone, subject: Subject, stage: Stage, words: Words | None = None) -> None:
        self.name = f"imagic_{stage}"
        self.backbone, self.subject, self.stage = backbone, subject, stage
        with torch.no_grad():
            wanted = backbone.encode_text([subject.prompt], size=subject.size)
        self.time_ids = None if wanted.time_ids is None else wanted.time_ids.float()
        self.words = Words(wanted) if words is None else words
        encoders = {"text_encoder": backbone.text_encoder, "text_encoder_2": backbone.text_encoder_2}
        self.encoders = {name: encoder for name, encoder in encoders.items() if encoder is not None}
        for module in self.modules().values():
            module.requires_grad_(True)
        scheduler = backbone.scheduler
        self.alpha_bar: Tensor = scheduler.alphas_cumprod.float()
        self.target = str(scheduler.config.get("prediction_type", "epsilon"))

    def modules(self) -> dict[str, nn.Module]:
        if self.stage == "unet":
            return {"unet": self.backbone.unet}
        return dict(self.encoders) if self.stage == "text_encoder" else {"words": self.words}

    def frozen(self) -> dict[str, nn.Module]:
        return {"words": self.words} if self.stage == "unet" else {"unet": self.backbone.unet}

    def fingerprint(self) -> str:
        """The picture and the wanted words."""
        digest = hashlib.sha256(self.subject.latents.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
        return f"{digest} {self.subject.size} {self.subject.prompt!r} {self.target}"

    def condition(self) -> Condition:
        """What the network is told, with the gradient of what learns."""
        if self.stage == "text_encoder":
            return self.backbone.encode_text([self.subject.prompt], size=self.subject.size)
        return self.words.condition(self.time_ids)

    def batch(self, indices: Sequence[int], step: int) -> Tensor:
        """The picture, over and over."""
        return self.subject.latents.expand(len(indices), -1, -1, -1)

    def loss(self, batch: Tensor, step: int, rng: StepRandom) -> Losses:
        """Error of what the network predicts of the noised picture."""
        noise = rng.normal("noise", batch.shape[1:])
        t = rng.integers("timestep", 0, len(self.alpha_bar))
        alpha_bar = self.alpha_bar.to(t.device)[t][:, None, None, None]
        noisy = alpha_bar.sqrt() * batch + (1 - alpha_bar).sqrt() * noise
        condition = self.condition().expand(len(batch))
        predicted = self.backbone.predict(noisy, t, condition).float()
        target = noise
        if self.target == "v_prediction":
            target = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * batch
        elif self.target == "sample":
            target = batch
        error = (predicted - target).square().mean()
        return Losses(error, {"mse": error.detach()})

    def export(self, folder: Path) -> None:
        if self.stage == "unet":
            self.backbone.unet.save_pretrained(folder)
            return
        condition = self.condition()
        tensors = {"tokens": condition.tokens.detach().float()}
        if condition.pooled is not None:
            tensors["pooled"] = condition.pooled.detach().float()
        save_file(storable(tensors), str(folder / EMBEDDING.name), {"format": "pt", "prompt": self.subject.prompt})


def fit_imagic(
    pipe: Pipeline,
    image: Any,
    prompt: str,
    folder: str | os.PathLike[str],
    settings: ImagicSettings | None = None,
) -> Imagic:
    """Fit a picture, and return the control that draws edits of it. A call that was stopped continues where it was.

    Args:
        pipe: the model; it is only read.
        image: the picture: path, PIL picture, array or tensor.
        prompt: the wanted words: what the edited picture shows.
        folder: for checkpoints, ``log.jsonl`` and weights of both stages.
        settings: steps, rates, sizes.

    Raises:
        UnfinishedError: stopped by SIGTERM, Ctrl-C or `ImagicSettings.stop_after_seconds`; call again to continue.
        InputError: a picture or prompt that cannot be used.
        ModelError: a network that reads more than latents.
        ResumeError: the folder holds a fit of another picture, prompt or model, or with other settings.
    """
    chosen, started, folder = settings or ImagicSettings(), time.monotonic(), Path(folder)
    device = str(pipe.device)
    backbone, subject = _trainable(pipe), _subject(pipe, image, prompt, chosen.size)
    if chosen.learn == "text_encoder":
        encoders = {n: getattr(backbone, n) for n in ("text_encoder", "text_encoder_2")}
        backbone = replace(backbone, **{n: copy.deepcopy(e).float() for n, e in encoders.items() if e is not None})
    first = ImagicRecipe(backbone, subject, chosen.learn)
    steps, rate = chosen.embedding_steps, chosen.embedding_rate
    _finished(train(first, _settings(chosen, folder / "embedding", steps, rate, started, device)), "words", steps)
    if chosen.unet_steps:
        large = chosen.unet_size or chosen.size
        subject = subject if large == chosen.size else _subject(pipe, image, prompt, large)
        words = _learned(folder / EMBEDDING, backbone) if chosen.unet_words == "learned" else None
        second = ImagicRecipe(_trainable(pipe, backbone.unet), subject, "unet", words)
        steps, rate = chosen.unet_steps, chosen.unet_rate
        _finished(train(second, _settings(chosen, folder / "unet", steps, rate, started, device)), "network", steps)
    return Imagic(str(folder), network="tuned" if chosen.unet_steps else "base")


def _trainable(pipe: Pipeline, unet: Any = None) -> Backbone:
    """The pipeline's backbone with a float32 copy of its UNet, free of hooks."""
    reads, drawn = int(pipe.unet.config.in_channels), pipe.backbone.latent_channels
    if reads != drawn:
        raise ModelError(
            f"The network reads {reads} channels, not {drawn}: it edits or fills pictures. Fit the checkpoint that it "
            'was made from, and draw with network="base" and an instruction.'
        )
    if unet is None:
        from accelerate.hooks import remove_hook_from_module

        unet = remove_hook_from_module(copy.deepcopy(pipe.unet), recurse=True).to(pipe.device).float()
    return replace(pipe.backbone, unet=unet, kept={})


@torch.no_grad()
def _subject(pipe: Pipeline, image: Any, prompt: str, size: tuple[int, int] | None) -> Subject:
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError("Imagic needs the words that describe the edited picture; the prompt is empty.")
    step, (height, width) = pipe.backbone.pixels_per_latent, size or pipe.backbone.default_size
    if height < step or width < step or height % step or width % step:
        raise InputError(f"Height and width must be multiples of {step}, got {height} x {width}.")
    pictures = natural_pixels(image)
    if len(pictures) != 1 or len(pictures[0]) != 1:
        raise InputError("Imagic fits one picture. Call it for each.")
    pixels = stretched(pictures[0], (height, width)).to(pipe.device, pipe.dtype)
    return Subject(pipe.backbone.encode_picture(pixels).float(), (height, width), prompt)


def _learned(path: Path, backbone: Backbone) -> Words:
    stored = {name: tensor.to(backbone.device) for name, tensor in load_file(str(path)).items()}
    return Words(Condition(stored["tokens"], pooled=stored.get("pooled")))


def _settings(
    chosen: ImagicSettings, folder: Path, steps: int, rate: float, started: float, device: str
) -> TrainSettings:
    left = chosen.stop_after_seconds
    if left is not None:
        left = max(left - (time.monotonic() - started), 1e-3)
    return TrainSettings(
        output_dir=folder,
        seed=chosen.seed,
        device=device,
        total_steps=steps,
        batch_size=1,
        learning_rate=rate,
        weight_decay=0.0,  # AdamW without decay is Adam
        clip_grad_norm=None,
        keep_checkpoints=1,
        checkpoint_every_seconds=chosen.checkpoint_every_seconds,
        stop_after_seconds=left,
    )


def _finished(result: TrainResult, what: str, steps: int) -> None:
    if not result.finished:
        raise UnfinishedError(
            f"The fit of the {what} was stopped ({result.reason}) at step {result.step} of {steps}. "
            "Call again with the same arguments to continue."
        )
