"""`Inversion`: what an inversion found, as an object that does not change and as one safetensors file.

The file holds the latents of every step, the embeddings of null-text optimisation where there are any, and, as JSON in
its metadata, everything else. It is enough to edit the picture again on another machine that has the same model.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BeforeValidator, Field, PlainSerializer

from controlroom.core import inputs
from controlroom.core.control import Settings
from controlroom.core.errors import InputError
from controlroom.core.files import write_atomically

Method = Literal["ddim", "regularised", "null_text"]

KEY = "controlroom_inversion"
_VERSION = 1
_LONGEST_HEADER = 100_000_000


class Regularisation(Settings):
    """How the noise of the regularised inversion is kept like noise (Pix2Pix-Zero, arXiv 2302.03027).

    Args:
        steps: rounds of descent at each step of the inversion.
        rolls: descents on the auto-correlation in each round.
        auto_correlation: their weight; 0: none.
        divergence: weight of the divergence from a standard normal distribution; 0: none.
    """

    steps: int = Field(default=5, ge=0)
    rolls: int = Field(default=5, ge=1)
    auto_correlation: float = Field(default=20.0, ge=0)
    divergence: float = Field(default=20.0, ge=0)


class NullText(Settings):
    """How the embedding without a prompt is optimised at each step (arXiv 2211.09794).

    Args:
        iterations: of Adam at each step, at most.
        learning_rate: at the first step; it falls by a hundredth of it at each step (by less where there are more than
            50 steps, so that half of it is left at the end).
        tolerance: mean squared error of the latents at which the first step stops.
        tolerance_growth: added to the tolerance at each further step.
    """

    iterations: int = Field(default=10, ge=0)
    learning_rate: float = Field(default=1e-2, gt=0)
    tolerance: float = Field(default=1e-5, ge=0)
    tolerance_growth: float = Field(default=2e-5, ge=0)


class InversionSettings(Settings):
    """Settings of an inversion, as `controlroom.sampling.inversion.invert` takes them."""

    method: Method = "ddim"
    num_inference_steps: int = Field(default=50, ge=1, le=1000)
    guidance_scale: float = 1.0
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    regularisation: Regularisation = Regularisation()
    null_text: NullText = NullText()


@dataclass(frozen=True)
class Quality:
    """How well the pictures come back: peak signal to noise ratio in dB, a number for each picture; more is closer.

    Attributes:
        picture: of the picture drawn from the noise, against the picture given.
        autoencoder: of the same, against the autoencoder's own reconstruction: what the inversion alone lost.
        ceiling: of the autoencoder's reconstruction, against the picture given: the best that any inversion can do.
    """

    picture: tuple[float, ...]
    autoencoder: tuple[float, ...]
    ceiling: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Inversion:
    """The noise that pictures came from, and the way there.

    Attributes:
        latents: [n + 1, B, C, h, w], on the CPU: 0 is the encoded picture, n the noise.
        timesteps: n timesteps, ascending; latents k are at the level of timesteps k − 1.
        uncond: [n, B, length, width] embeddings without a prompt for the steps of a run, the noisiest first; None
            unless null-text optimisation was asked for.
        prompts: what each picture was said to show.
        negative_prompts: what the branch without the prompt was told; None where nothing was.
        pictures: what to call each picture in a message: its path where it has one.
        settings: how it was made. ``guidance_scale`` is that of the inversion, or with null-text that of the runs it is
            made for.
        backbone: ``sd1``, ``sd2`` or ``sdxl``; model: the name it was loaded by.
        run: the run of the inversion (`RunSpec`) as JSON, with its controls.
        quality: how well the pictures come back; None where it was not measured.
        warnings: what to beware of.
        cost: rows that went through the UNet, passes of it.
        cancelled: it was stopped before its end, and cannot be drawn from.
    """

    latents: torch.Tensor
    timesteps: tuple[int, ...]
    prompts: tuple[str, ...]
    pictures: tuple[str, ...]
    settings: InversionSettings
    backbone: str
    model: str = ""
    negative_prompts: tuple[str | None, ...] = ()
    uncond: torch.Tensor | None = None
    run: str = "{}"
    quality: Quality | None = None
    warnings: tuple[str, ...] = ()
    cost: tuple[int, int] = (0, 0)
    cancelled: bool = False

    @property
    def steps(self) -> int:
        """Number of steps n."""
        return len(self.timesteps)

    @property
    def noise(self) -> torch.Tensor:
        """[B, C, h, w] latents that a run of diffusers (DDIM, as many steps) starts from."""
        return self.latents[-1]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, whole or not at all.

        Raises:
            InputError: a cancelled inversion.
            OutputError: the file could not be written.
        """
        if self.cancelled:
            raise InputError("This inversion was cancelled before its end; there is nothing to save. Invert again.")
        write_atomically(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The content of the file."""
        from safetensors.torch import save

        tensors = {"latents": self.latents.contiguous()}
        if self.uncond is not None:
            tensors["uncond"] = self.uncond.contiguous()
        quality = self.quality
        data = {
            "version": _VERSION,
            "timesteps": self.timesteps,
            "prompts": self.prompts,
            "negative_prompts": self.negative_prompts,
            "pictures": self.pictures,
            "settings": self.settings.model_dump(mode="json"),
            "backbone": self.backbone,
            "model": self.model,
            "run": self.run,
            "quality": None if quality is None else [quality.picture, quality.autoencoder, quality.ceiling],
            "warnings": self.warnings,
            "cost": self.cost,
        }
        return save(tensors, metadata={KEY: json.dumps(data, ensure_ascii=False)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: no such file, not an inversion, or a damaged one.
        """
        name = repr(os.fspath(path))
        try:
            with open(path, "rb") as file:
                data = file.read()
        except FileNotFoundError as error:
            raise InputError(f"{name} does not exist; give the file that an inversion was saved to.") from error
        except (OSError, ValueError) as error:
            raise InputError(f"{name} cannot be read ({error}); give the file of an inversion.") from error
        return cls.from_bytes(data, name)

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "The inversion") -> Self:
        """Read what `to_bytes` gave; ``name`` is what an error calls it.

        Raises:
            InputError: not an inversion, or a damaged one.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            tensors, header = load(data), _metadata(data)
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{name} is not a safetensors file, or is damaged ({reason}).") from error
        if KEY not in header:
            raise InputError(f"{name} is not an inversion of controlroom. Give a file that Inversion.save wrote.")
        try:
            found = cls._read(json.loads(header[KEY]), tensors)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise InputError(f"{name} is a damaged inversion ({error!r:.200}). Invert the picture again.") from error
        found._check(name)
        return found

    @classmethod
    def _read(cls, data: Any, tensors: dict[str, torch.Tensor]) -> Self:
        if data["version"] != _VERSION:
            raise ValueError(f"version {data['version']}, this program reads {_VERSION}")
        quality = data["quality"]
        return cls(
            latents=tensors["latents"],
            uncond=tensors.get("uncond"),
            timesteps=tuple(int(t) for t in data["timesteps"]),
            prompts=tuple(str(text) for text in data["prompts"]),
            negative_prompts=tuple(None if text is None else str(text) for text in data["negative_prompts"]),
            pictures=tuple(str(text) for text in data["pictures"]),
            settings=InversionSettings(**data["settings"]),
            backbone=str(data["backbone"]),
            model=str(data["model"]),
            run=str(data["run"]),
            quality=None if quality is None else Quality(*(tuple(float(x) for x in part) for part in quality)),
            warnings=tuple(str(text) for text in data["warnings"]),
            cost=(int(data["cost"][0]), int(data["cost"][1])),
        )

    def _check(self, name: str) -> None:
        latents, uncond, rows = self.latents, self.uncond, len(self.prompts)
        fits = latents.ndim == 5 and latents.is_floating_point() and tuple(latents.shape[:2]) == (self.steps + 1, rows)
        if fits and uncond is not None:
            fits = uncond.ndim == 4 and tuple(uncond.shape[:2]) == (self.steps, rows)
        if not fits or self.steps < 1 or len(self.pictures) != rows:
            raise InputError(
                f"{name} is a damaged inversion: its parts do not fit each other. Invert the picture again."
            )
        if not all(bool(torch.isfinite(part).all()) for part in (latents, uncond) if part is not None):
            raise InputError(f"{name} has values that are not finite. Invert the picture again.")


def _metadata(data: bytes) -> dict[str, str]:
    """Metadata of a safetensors file that was read."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return dict(header.get("__metadata__") or {})


def peek_inversion(value: Inversion | str | os.PathLike[str]) -> tuple[tuple[str, ...], bool]:
    """The prompts of an inversion and whether it has embeddings, without reading the tensors of its file.

    Raises:
        InputError: no such file, or not an inversion.
    """
    if isinstance(value, Inversion):
        return value.prompts, value.uncond is not None
    name = repr(os.fspath(value))
    try:
        with open(value, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            header = json.loads(file.read(length if length < _LONGEST_HEADER else 0))
        prompts = json.loads(header["__metadata__"][KEY])["prompts"]
        return tuple(str(text) for text in prompts), "uncond" in header
    except FileNotFoundError as error:
        raise InputError(f"{name} does not exist; give the file that an inversion was saved to.") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{name} is not an inversion of controlroom, or is damaged. Give a file that Inversion.save wrote."
        ) from error


def _decode(value: Any) -> Any:
    value = inputs.decode(value)
    if isinstance(value, bytes):
        return Inversion.from_bytes(value)
    if not isinstance(value, Inversion | str | os.PathLike):
        raise InputError(
            f"An inversion is what controlroom.invert gives, or the file it was saved to; got {value!r:.80}."
        )
    return value


def _encode(value: Any) -> Any:
    return inputs.encode(value.to_bytes() if isinstance(value, Inversion) else value)


InversionInput = Annotated[Any, BeforeValidator(_decode), PlainSerializer(_encode, when_used="json")]
"""An `Inversion`, or the path of its file; a setting that travels with a run, small ones inside it."""


def read_inversion(value: Inversion | str | os.PathLike[str]) -> Inversion:
    """The inversion that a setting names.

    Raises:
        InputError: it cannot be read, or was cancelled.
    """
    found = value if isinstance(value, Inversion) else Inversion.load(value)
    if found.cancelled:
        raise InputError("This inversion was cancelled before its end and cannot be drawn from. Invert again.")
    return found
