"""Inpainting: draw a part of a picture anew and keep the rest.

Two ways, and the network says which. One that was trained for it reads the mask and the latents of the picture without
the masked part as five further channels (latent diffusion, arXiv 2112.10752, as Stable Diffusion's inpainting
checkpoints). Any other network draws a whole picture, of which after every step the known part is put back, noised to
the step's level (RePaint's conditioning, arXiv 2201.09865, without its resampling).

As in diffusers' pipelines, draw for draw. Deviations: with one generator for each image, each draws its own sample of
the encoder's posterior (there the first draws for all); pictures of several prompts with several images each stay with
their prompts. Masks by words are ours: a row of the given picture, noised to each step's level, reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator

from controlroom.controls.input_channels import set_all_channels
from controlroom.controls.noised_start import sampled_latents
from controlroom.controls.source_pixels import check_count, for_each_image, natural_pixels, source_pixels
from controlroom.controls.word_mask import MaskInput, WordMaps, WordMask
from controlroom.core.attention import AttentionCall
from controlroom.core.branch import IMAGE, Branch, State
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import InputError
from controlroom.core.images import load_mask
from controlroom.core.random import draw
from controlroom.core.run import Run
from controlroom.core.step import Step

# The given picture, noised to each step's level, where the words of a mask are read.
GIVEN = "inpaint/given"


@dataclass
class _Memory:
    """What a run knows.

    Attributes:
        known: scaled latents of the picture [images, C, h, w]; None where nothing needs them.
        noise: [images, C, h, w] of the start, which also noises what is put back.
        pixels: the picture [images, 3, H, W] in [-1, 1].
        mask: [images, 1, H, W] in {0, 1}; None while words have not been read.
        words: reads them.
    """

    known: torch.Tensor | None
    noise: torch.Tensor
    pixels: torch.Tensor
    mask: torch.Tensor | None = None
    words: WordMaps | None = None


class Inpaint(Control):
    """Draw the white part of a mask anew.

    Args:
        image: the picture, stretched to the size of the run: path, PIL picture, array or tensor. A list: one for each
            prompt.
        mask: white (at least half) where it is drawn anew, in the size of the picture or of the run. A list: one for
            each prompt. ``"words: red hat"`` or a `WordMask`: where the given picture shows these words of the prompt.
        strength: above 0, at most 1: share of the steps that is run, from the picture noised that far. 1 starts from
            noise alone.
        paste: put the known pixels back into the decoded picture, bit for bit. Where the mask ends, a seam may show.

    Raises:
        ModelError: when the run is planned: the network reads other channels than pictures or inpainting have.
        InputError: when the run is planned: a strength that leaves no step, latents given to the call; at the start of
            a run: a picture or mask that cannot be read or does not fit, a mask of another size, or black all over.
    """

    type: Literal["inpaint"] = Field(default="inpaint", kw_only=True)
    image: Any
    mask: MaskInput = Field(default=None, validate_default=True)
    strength: float = Field(default=1.0, gt=0, le=1)
    paste: bool = False

    @field_validator("image", "mask")
    @classmethod
    def _something(cls, value: Any) -> Any:
        if value is None:
            raise ValueError("expected a picture, and a mask that is white where it is drawn anew")
        return value

    def declare(self, outline: Outline) -> Declaration:
        reads = _reads_masks(outline)
        words = self.mask if isinstance(self.mask, WordMask) else None
        return Declaration(
            strength=self.strength,
            channels=outline.latent[0] + 1 if reads else 0,
            checkpoint="an inpainting checkpoint" if reads else "",
            claims=() if reads else (Claim("latents", "blend"),),
            states=(State(GIVEN, "pinned"),) if words else (),
            branches=(Branch(GIVEN, GIVEN, purpose="reference"),) if words else (),
            attention=words.sites(outline) if words else (),
            notes=("the network reads the mask",) if reads else ("the known part is put back after every step",),
        )

    # A run.

    def prepare(self, run: Run) -> _Memory:
        """Encode, draw and set the start in the order in which diffusers draws."""
        pixels = source_pixels(self.image, run)
        mask = None if isinstance(self.mask, WordMask) else self._read_mask(run)
        reads = _reads_masks(run.plan.outline)
        words = self.mask.reader(run, GIVEN) if isinstance(self.mask, WordMask) else None
        known = None
        if not reads or self.strength < 1 or words is not None:
            known = for_each_image(sampled_latents(run, pixels), run)
        noise = draw(run.streams.main, run.latent_shape(), run.device, run.dtype)
        run.set_initial(IMAGE, self._start(run, known, noise))
        memory = _Memory(known, noise, for_each_image(pixels, run), None, words)
        if words is not None:
            assert known is not None
            run.set_condition(GIVEN, lambda step: step.condition("cond"))
            run.pin(GIVEN, known, noise)
            if reads:
                self._show(run, memory, torch.ones_like(memory.pixels[:, :1]))
            return memory
        assert mask is not None
        memory.mask = for_each_image(mask, run)
        rows = max(len(mask), len(pixels))
        masked = _repeated(pixels, rows, run) * (_repeated(mask, rows, run) < 0.5)
        if reads:
            self._set_channels(run, memory.mask, for_each_image(sampled_latents(run, masked), run))
        else:
            # Encoded there and not used; what is drawn for it moves the noise of the steps.
            _draw_for(run, len(masked))
        return memory

    def _start(self, run: Run, known: torch.Tensor | None, noise: torch.Tensor) -> torch.Tensor:
        if self.strength == 1 or known is None:
            return noise * run.scheduler.init_noise_sigma
        return run.scheduler.add_noise(known, noise, run.timesteps[:1].repeat(noise.shape[0]))

    def _read_mask(self, run: Run) -> torch.Tensor:
        """[rows, 1, height, width] in {0, 1}."""
        listed = list(self.mask) if isinstance(self.mask, list | tuple) else [self.mask]
        if any(isinstance(item, WordMask) for item in listed):
            raise InputError(f"{self.label}: words cannot stand in a list of masks. Give words that serve all prompts.")
        sizes = {run.size, *(tuple(part.shape[-2:]) for part in natural_pixels(self.image))}
        rows = []
        for item in listed:
            batched = isinstance(item, np.ndarray | torch.Tensor) and item.ndim == 4
            for each in item if batched else [item]:
                rows.append(self._one_mask(each, sizes, run))
        mask = torch.cat(rows)
        check_count(len(mask), run, "mask")
        return mask.to(device=run.device, dtype=run.dtype)

    def _one_mask(self, source: Any, sizes: set[tuple[int, int]], run: Run) -> torch.Tensor:
        own = load_mask(source)
        if own.shape not in sizes:
            known = " or ".join(f"{height} x {width}" for height, width in sorted(sizes))
            raise InputError(
                f"{self.label}: the mask is {own.shape[0]} x {own.shape[1]} (height x width), expected {known}: the "
                "size of the picture, or of the run."
            )
        height, width = run.size
        white = torch.from_numpy((load_mask(source, (width, height)) >= 0.5).astype(np.float32))
        if not bool(white.any()):
            raise InputError(f"{self.label}: the mask is black all over. Paint white what shall be drawn anew.")
        return white[None, None]

    def _set_channels(self, run: Run, mask: torch.Tensor, masked: torch.Tensor) -> None:
        small = F.interpolate(mask, size=run.latent_shape()[-2:])
        set_all_channels(run, torch.cat([small.to(masked), masked], dim=1), self.label)

    def _show(self, run: Run, memory: _Memory, mask: torch.Tensor) -> None:
        """Tell the network a mask that was found by words; without drawing."""
        memory.mask = mask
        masked = run.backbone.encode_picture(memory.pixels * (mask < 0.5))
        self._set_channels(run, mask, masked)

    # A step.

    def before(self, step: Step) -> None:
        """Tell the network where the words are."""
        memory: _Memory = step.memory(self)
        if memory.words is not None and step.i > 0 and _reads_masks(step.run.plan.outline):
            self._show(step.run, memory, _found(memory.words, step.run, step.run.size))

    def attention(self, call: AttentionCall) -> None:
        """Read the maps of the mask's words in the row of the given picture."""
        words = call.step.memory(self).words
        if words is not None:
            words.attention(call)

    def finish(self, step: Step) -> None:
        """Put the known part back, as noisy as the next step expects it."""
        memory: _Memory = step.memory(self)
        run, latents = step.run, step.latents[IMAGE]
        hw = latents.shape[-2:]
        if memory.words is not None:
            run.masks[f"{self.label}.mask"] = found = _found(memory.words, run, hw)
            memory.mask = _found(memory.words, run, run.size)
        else:
            assert memory.mask is not None
            found = F.interpolate(memory.mask, size=tuple(hw))
        if _reads_masks(run.plan.outline):
            return
        assert memory.known is not None
        known = memory.known
        if step.t_next is not None:
            known = run.scheduler.add_noise(known, memory.noise, step.t_next.reshape(1))
        found = found.to(latents)
        step.latents[IMAGE] = (1 - found) * known + found * latents

    def develop(self, run: Run, pixels: torch.Tensor) -> torch.Tensor:
        """Put the known pixels back."""
        memory: _Memory = run.memory(self)
        if not self.paste or memory.mask is None:
            return pixels
        return torch.where(memory.mask.to(pixels) >= 0.5, pixels, memory.pixels.to(pixels))


def _reads_masks(outline: Outline) -> bool:
    """Whether the network has the channels of inpainting checkpoints: latents, mask, latents of what is known."""
    return outline.input_channels == 2 * outline.latent[0] + 1


def _found(words: WordMaps, run: Run, hw: Sequence[int]) -> torch.Tensor:
    """[images, 1, h, w] in {0, 1}: where the words are, by the steps so far; everywhere before the first."""
    if not words.seen:
        return torch.ones(run.images, 1, *hw, device=run.device, dtype=run.dtype)
    mask = words.mask((int(hw[0]), int(hw[1]))).to(run.dtype)
    return for_each_image(mask, run)


def _repeated(x: torch.Tensor, rows: int, run: Run) -> torch.Tensor:
    """One row for all stays; others that are fewer than ``rows`` are repeated for the images of their prompt."""
    if len(x) in (1, rows):
        return x
    return x.repeat_interleave(rows // len(x), dim=0) if rows % len(x) == 0 else for_each_image(x, run)


def _draw_for(run: Run, rows: int) -> None:
    """Draw what a sample of the encoder's posterior of that many pictures takes."""
    shape = run.latent_shape()
    shared = isinstance(run.streams.main, torch.Generator)
    draw(run.streams.main, (rows, *shape[1:]) if shared else shape, run.device, run.dtype)
