"""Energies of things in a picture: how far what attention and features show is from what is wanted (arXiv 2306.00986).

Every term is an L1 distance: of centres the sum over x and y, of outlines the mean over the map, of looks the mean over
channels. Terms of maps are averaged over the layers; the look is read under the outline of the layers' mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from controlroom.controls import object_maps
from controlroom.controls.object_edits import Goal, Quantity
from controlroom.core.branch import Views


@dataclass(frozen=True)
class Reading:
    """What a pass has shown of one picture.

    Attributes:
        maps: of each layer, attention probabilities [views, h, w, L], averaged over the heads.
        features: [channels, h, w]; None where they were not read.
        views: how the picture is seen through windows, if so; else there is one view.
    """

    maps: tuple[torch.Tensor, ...]
    features: torch.Tensor | None = None
    views: Views | None = None

    def things(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Maps of things, layer by layer: [n, h, w], out of weights of tokens [n, L]."""
        found = []
        for maps in self.maps:
            # Beside longer prompts, what a branch is told is filled up at its end.
            weights = F.pad(tokens.to(maps), (0, maps.shape[-1] - tokens.shape[-1]))
            each = torch.einsum("vhwl,nl->vnhw", maps, weights)
            if self.views is not None:
                # Windows are put together at the size of the latents.
                each = F.interpolate(each, size=self.views.hw, mode="bilinear", align_corners=False)
                each = self.views.merge(each)
            found.append(each[0])
        return found

    def detached(self) -> Reading:
        """The same without a gradient."""
        features = None if self.features is None else self.features.detach()
        return Reading(tuple(maps.detach() for maps in self.maps), features, self.views)


@dataclass(frozen=True)
class Group:
    """Goals of one quantity in one picture, side by side.

    Attributes:
        quantity: the quantity.
        own, original: [n, L] each, weights of tokens in the prompt and in the original's; 0 where nothing is compared.
        weight: [n] of each term.
        absolute: [n] whether ``to`` is wanted, and not what the original has.
        to: [n, 2]; of a size, the first.
        by, factor: [n, 2] and [n], how what the original has is changed.
        compares: whether a goal needs the original.
        carries: whether an outline is moved or resized.
    """

    quantity: Quantity
    own: torch.Tensor
    original: torch.Tensor
    weight: torch.Tensor
    absolute: torch.Tensor
    to: torch.Tensor
    by: torch.Tensor
    factor: torch.Tensor
    compares: bool
    carries: bool


def grouped(goals: Sequence[Goal], lengths: tuple[int, int], device: torch.device) -> tuple[Group, ...]:
    """Goals of one picture side by side by their quantity.

    Args:
        goals: of one picture.
        lengths: of its prompt and of that of the original, in tokens with padding.
        device: of the maps.
    """
    made = []
    quantities: dict[Quantity, None] = {goal.quantity: None for goal in goals}
    for quantity in quantities:
        some = [goal for goal in goals if goal.quantity == quantity]
        made.append(
            Group(
                quantity=quantity,
                own=torch.stack([_mean(goal.places, lengths[0]) for goal in some]).to(device),
                original=torch.stack([_mean(goal.original, lengths[1]) for goal in some]).to(device),
                weight=torch.tensor([goal.weight for goal in some], device=device),
                absolute=torch.tensor([not goal.relative for goal in some], device=device),
                to=torch.tensor([(*goal.to, 0.0, 0.0)[:2] for goal in some], device=device),
                by=torch.tensor([goal.by for goal in some], device=device),
                factor=torch.tensor([goal.factor for goal in some], device=device),
                compares=any(goal.relative for goal in some),
                carries=any(goal.by != (0.0, 0.0) or goal.factor != 1.0 for goal in some),
            )
        )
    return tuple(made)


def energy_of(groups: Sequence[Group], found: Reading, original: Reading | None, sharpness: float) -> torch.Tensor:
    """Scalar: the sum of all terms of one picture, with a gradient for what was found.

    Args:
        groups: what is wanted.
        found: of the picture.
        original: of the picture it is compared with; None: no goal compares.
        sharpness: of the soft threshold.
    """
    total = torch.zeros((), device=found.maps[0].device)
    fixed = None if original is None else original.detached()
    for group in groups:
        own = found.things(group.own)
        others: list[torch.Tensor | None] = [None] * len(own)
        if group.compares:
            assert fixed is not None, "a goal compares with the original, which was not read"
            others = [*fixed.things(group.original)]
        if group.quantity == "appearance":
            assert fixed is not None
            terms = _look_apart(found, own, sharpness, fixed, [maps for maps in others if maps is not None])
        else:
            each = [_apart(group, mine, other, sharpness) for mine, other in zip(own, others, strict=True)]
            terms = torch.stack(each).mean(0)
        total = total + (group.weight * terms).sum()
    return total


def _apart(group: Group, own: torch.Tensor, original: torch.Tensor | None, sharpness: float) -> torch.Tensor:
    """[n]: distance of a quantity of maps [n, h, w] from what is wanted of it."""
    if group.quantity == "shape":
        assert original is not None
        wanted = object_maps.shape(original, sharpness)
        if group.carries:
            wanted = object_maps.carried(wanted, group.by, group.factor)
        return (wanted - object_maps.shape(own, sharpness)).abs().mean((1, 2))
    if group.quantity == "centroid":
        found, wanted = object_maps.centroid(own), group.to
        if original is not None:
            wanted = torch.where(group.absolute[:, None], wanted, object_maps.centroid(original) + group.by)
        return (wanted - found).abs().sum(1)
    found, wanted = object_maps.size(own, sharpness), group.to[:, 0]
    if original is not None:
        wanted = torch.where(group.absolute, wanted, group.factor * object_maps.size(original, sharpness))
    return (wanted - found).abs()


def _look_apart(
    found: Reading, own: list[torch.Tensor], sharpness: float, original: Reading, others: list[torch.Tensor]
) -> torch.Tensor:
    """[n]: distance of looks. The outlines they are read under have no gradient: things are not to move for it."""
    looks = []
    for reading, maps in ((found, own), (original, others)):
        assert reading.features is not None
        outlines = object_maps.shape(torch.stack(maps).mean(0).detach(), sharpness)
        looks.append(object_maps.appearance(reading.features, outlines))
    return (looks[1] - looks[0]).abs().mean(1)


def _mean(tokens: Sequence[int], length: int) -> torch.Tensor:
    """[L] weights with which the maps of some tokens are averaged."""
    weights = torch.zeros(length)
    weights[list(tokens)] = 1 / max(len(tokens), 1)
    return weights
