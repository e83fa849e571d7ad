"""Further input channels of a network (a picture, a mask, a depth), as each branch of a run gets them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from controlroom.controls.condition_map import tiled
from controlroom.core.branch import IMAGE
from controlroom.core.errors import InputError
from controlroom.core.run import Run


def set_all_channels(run: Run, channels: torch.Tensor, name: str) -> None:
    """Give every branch of a run the same further channels [images or 1, c, h, w]."""
    for branch in run.plan.branches:
        run.set_channels(branch, channels_of(channels, run, branch, name))


def channels_of(channels: torch.Tensor, run: Run, branch: str, name: str) -> torch.Tensor:
    """[rows, c, h, w] for a branch; one that looks at other latents than the picture's may differ in size and number.

    Raises:
        InputError: it has another number of pictures, and those given differ; ``name`` is the control's, for the text.
    """
    plan = run.plan
    if plan.branches[branch].state == IMAGE:
        return channels
    rows, hw = plan.rows_of(branch), plan.hw_of(branch)
    if channels.shape[0] > rows:
        if not bool((channels == channels[:1]).all()):
            raise InputError(f"The branch {branch!r} has {rows} pictures, {name} {channels.shape[0]} others.")
        channels = channels[:1]
    channels = tiled(channels, rows, branch)
    if tuple(channels.shape[-2:]) == hw:
        return channels
    return F.interpolate(channels, size=hw, mode="bilinear", antialias=True)
