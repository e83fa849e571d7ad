"""A mask in one run: a picture that stays as it is, or words whose mask is looked up anew at each step.

Where a mask is words, a control that acts before or inside the pass sees the maps of the steps so far: in its first
step there are none, and it acts everywhere. What was found last is in ``result.masks``, so that it can be shown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from controlroom.controls.condition_map import mask_map, resized_mask, rows_of, tokens_hw
from controlroom.controls.word_mask import WordMaps, WordMask
from controlroom.core.attention import AttentionCall
from controlroom.core.branch import IMAGE
from controlroom.core.control import Outline
from controlroom.core.errors import InputError
from controlroom.core.run import Run
from controlroom.core.sites import Site
from controlroom.core.step import Step

if TYPE_CHECKING:
    from controlroom.core.control import Control


class RunMask:
    """The mask of a control.

    Attributes:
        pixels: [images, 1, height, width] in [0, 1], as it is now.
    """

    def __init__(self, run: Run, label: str, pixels: torch.Tensor, words: WordMaps | None = None) -> None:
        self.pixels, self._run, self._label, self._words = pixels, run, label, words

    def attention(self, call: AttentionCall) -> None:
        """Read a layer, if the mask is words; for the control's ``attention``."""
        if self._words is not None:
            self._words.attention(call)

    def update(self) -> bool:
        """Look at the maps so far; whether the mask may have changed. For ``before`` or ``finish``."""
        if self._words is None or not self._words.seen:
            return False
        run = self._run
        mask = self._words.mask(run.latent_shape()[-2:])
        self.pixels = F.interpolate(mask, size=run.size).to(run.dtype)
        run.masks[self._label] = self.pixels
        return True

    def latents(self) -> torch.Tensor:
        """[images, 1, h, w]: at the size of the picture's latents."""
        height, width = self._run.latent_shape()[-2:]
        return resized_mask(self.pixels, (height, width))

    def rows(self, branches: tuple[str, ...]) -> torch.Tensor:
        """[rows, 1, H, W]: for the rows of branches of one size, through the views of the plan under way."""
        return torch.cat([rows_of(self.pixels, self._run, name) for name in branches])

    def tokens(self, branch: str, count: int) -> torch.Tensor:
        """[rows, count]: for the rows of a branch, at the size of a layer with that many tokens."""
        hw = tokens_hw(self._run.plan.hw_of(branch), count)
        return resized_mask(self.rows((branch,)), hw).flatten(1)


def run_mask(source: Any, run: Run, control: Control, name: str = "mask", beside: Any = None) -> RunMask:
    """Read the mask of a control: a picture, a list of one for each prompt, or a `WordMask`; in ``prepare``.

    ``beside`` is the picture that it was painted for, where that is stretched to the run's size; see `mask_map`.

    Raises:
        InputError: unreadable, black all over, a number that does not fit; words that are not in the prompts, words in
            a list, or words on a canvas that is seen through windows.
    """
    label = run.plan.controls[run.plan.indices[id(control)]].label
    if isinstance(source, WordMask):
        white = torch.ones(run.images, 1, *run.size, device=run.device, dtype=run.dtype)
        return RunMask(run, f"{label}.{name}", white, source.reader(run))
    if isinstance(source, list | tuple) and any(isinstance(item, WordMask) for item in source):
        raise InputError(
            f"{label}: the {name} is a list with words in it. One set of words serves all prompts: "
            f"{name}='words: red hat, shirt' takes those that a prompt has."
        )
    return RunMask(run, f"{label}.{name}", mask_map(source, run, name, beside))


def mask_sites(outline: Outline, *masks: Any) -> tuple[Site, ...]:
    """The layers that the words of masks are read from, for a declaration; none for pictures."""
    sites = {site.name: site for mask in masks if isinstance(mask, WordMask) for site in mask.sites(outline)}
    return tuple(sites.values())


def joined_sites(*groups: tuple[Site, ...]) -> tuple[Site, ...]:
    """Sites of several groups, each once."""
    return tuple({site.name: site for group in groups for site in group}.values())


class KeptPicture:
    """Holds the picture of a run to a given one outside of a mask: after each step it is that one, noised as far.

    As diffusers' inpainting with a network of four channels.

    Args:
        clean: scaled latents [images, C, h, w] of the picture that is kept.
        noise: of the same shape.
    """

    def __init__(self, mask: RunMask, clean: torch.Tensor, noise: torch.Tensor) -> None:
        self.mask, self._clean, self._noise = mask, clean, noise

    def finish(self, step: Step) -> None:
        """Put the picture back outside of the mask."""
        self.mask.update()
        latents, kept = step.latents[IMAGE], self._clean
        if step.t_next is not None:
            at = step.t_next.reshape(1).expand(latents.shape[0])
            kept = step.run.scheduler.add_noise(self._clean, self._noise, at)
        kept = kept.to(latents)
        step.latents[IMAGE] = kept + self.mask.latents().to(latents) * (latents - kept)
