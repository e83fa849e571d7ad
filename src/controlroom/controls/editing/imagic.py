"""Imagic: edit a real picture by the words that describe the result (arXiv 2210.09276).

The idea: words are moved until the model reconstructs the picture from them, the network is tuned until it does so
well, and the picture is drawn from words between the learned ones and the wanted ones,
e = α e_wanted + (1 − α) e_learned.

`controlroom.training.recipes.imagic.fit_imagic` learns words and weights, once for a picture; this control draws with
them. Deviations: the wanted words are the prompt of the run, so that one fit serves several; Stable Diffusion XL's
pooled text is learned and interpolated along; an instruction may be joined (system 4 of the catalogue, with
InstructPix2Pix), as further tokens behind the interpolated ones.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator

from controlroom.backbones.loading import find_model, keep
from controlroom.backbones.model_files import read_safetensors
from controlroom.backbones.swapped_weights import read_weights, swapped
from controlroom.core.backbone import Backbone
from controlroom.core.branch import Condition
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import InputError, ModelError
from controlroom.core.run import Run
from controlroom.core.step import Step

EMBEDDING = Path("embedding/weights/embedding.safetensors")
"""The learned words, within the folder of a fit: ``tokens`` [1, length, width] and, for XL, ``pooled`` [1, width]."""
UNET = Path("unet/weights")
"""The tuned network, within the folder of a fit, in diffusers' layout."""


class Imagic(Control):
    """Draw the prompt as an edit of the picture that was fitted.

    Args:
        model: folder that `fit_imagic` wrote.
        alpha: 0 is the picture, 1 the prompt; beyond 1 it is overdone. A list: strengths to sweep, one for each
            picture of a prompt, over and over.
        network: ``tuned``: as it was tuned to the picture; ``base``: as it is.
        instruction: further words whose states are joined behind the interpolated ones.

    Raises:
        InputError: when the run is planned: a number of strengths that does not fit the pictures.
        ModelError: at the start of a run: no fit there, or one of another model.
    """

    type: Literal["imagic"] = Field(default="imagic", kw_only=True)
    model: Any
    alpha: float | list[float] = 1.2
    network: Literal["tuned", "base"] = "tuned"
    instruction: str | None = None

    @field_validator("alpha")
    @classmethod
    def _something(cls, value: float | list[float]) -> float | list[float]:
        if value == []:
            raise ValueError("an empty list")
        return value

    @property
    def _alphas(self) -> list[float]:
        return self.alpha if isinstance(self.alpha, list) else [self.alpha]

    def neutral(self, n: int) -> bool:
        """The prompt alone, drawn by the network as it is."""
        return self.network == "base" and self.instruction is None and all(alpha == 1 for alpha in self._alphas)

    def declare(self, outline: Outline) -> Declaration:
        if outline.images % len(self._alphas):
            raise InputError(
                f"{self.label} has {len(self._alphas)} strengths for {outline.images} pictures. Draw as many pictures "
                f"(num_images_per_prompt={len(self._alphas)})."
            )
        return Declaration(claims=(Claim("condition", "edit", branches=frozenset({"cond"})),))

    def attach(self, backbone: Backbone) -> AbstractContextManager[None] | None:
        """The tuned weights in the place of the network's own, for the run."""
        if self.network == "base":
            return None
        folder = self._folder() / UNET
        if not folder.is_dir():
            raise ModelError(f"{folder} is not there: the fit is not finished. Run it again, or use network='base'.")
        weights = keep(backbone, ("imagic",), folder, lambda: read_weights(folder, backbone.unet, "the network"))
        return swapped(backbone.unet, weights)

    def prepare(self, run: Run) -> None:
        """Tell ``cond`` the words between the learned ones and those of the prompt."""
        learned = self._learned(run)
        alphas = torch.tensor([self._alphas[i % len(self._alphas)] for i in range(run.images)])
        instruction = None if self.instruction is None else run.encode_text(self.instruction)
        wanted = run.conditions["cond"]
        if isinstance(wanted, Condition):
            run.set_condition("cond", _between(wanted, learned, alphas, instruction))
            return

        def at(step: Step) -> Condition:
            return _between(wanted(step), learned, alphas, instruction)

        run.set_condition("cond", at)

    def _folder(self) -> Path:
        return find_model(self.model, "Imagic fit")

    def _learned(self, run: Run) -> Condition:
        path = self._folder() / EMBEDDING
        if not path.is_file():
            raise ModelError(f"{path} is not there. Give the folder that fit_imagic wrote, when it is finished.")
        stored = read_safetensors(path)
        tokens, pooled = stored.get("tokens"), stored.get("pooled")
        width = run.backbone.unet.config.cross_attention_dim
        width = width if isinstance(width, int) else width[0]
        if tokens is None or tokens.ndim != 3 or tokens.shape[-1] != width:
            shape = None if tokens is None else list(tokens.shape)
            raise ModelError(f"{path} holds words of the shape {shape}; this model needs [1, length, {width}].")
        if (pooled is None) == (run.backbone.name == "sdxl"):
            raise ModelError(f"{path} was made with another model: pooled text belongs to Stable Diffusion XL alone.")
        place = {"device": run.device, "dtype": run.dtype}
        return Condition(tokens.to(**place), pooled=None if pooled is None else pooled.to(**place))


def _between(wanted: Condition, learned: Condition, alphas: torch.Tensor, instruction: Condition | None) -> Condition:
    """[images] strengths -> the condition of each image."""
    if wanted.tokens.shape[1] != learned.tokens.shape[1]:
        raise InputError(
            f"The prompt has {wanted.tokens.shape[1]} tokens, the learned words {learned.tokens.shape[1]}. Imagic "
            "needs a prompt of the usual length."
        )
    tokens = _mixed(wanted.tokens, learned.tokens, alphas)
    pooled = wanted.pooled
    if pooled is not None and learned.pooled is not None:
        pooled = _mixed(pooled, learned.pooled, alphas)
    rows = len(alphas)
    found = replace(wanted.expand(rows), tokens=tokens, pooled=pooled)
    if instruction is None:
        return found
    mask = found.mask
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(rows, instruction.tokens.shape[1])], dim=1)
    return replace(found, tokens=torch.cat([tokens, instruction.expand(rows).tokens], dim=1), mask=mask)


def _mixed(wanted: torch.Tensor, learned: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
    share = alphas.to(wanted).view(-1, *(1 for _ in wanted.shape[1:]))
    return share * wanted + (1 - share) * learned
