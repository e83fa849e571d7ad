"""From what a person has to the tensors that spatial controls read: condition maps, masks, and their rows for a branch.

A picture is stretched to the picture's size and taken as it is (diffusers' rule for ControlNet's conditions). A tensor
or float array is used untouched: values below 0 have a meaning to some networks. A pose (a `Pose`, OpenPose JSON as
file, text or mapping) is drawn as a skeleton, whole, with its proportions kept.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops

from controlroom.core.branch import IMAGE
from controlroom.core.errors import InputError
from controlroom.core.images import fit, load_image, load_mask
from controlroom.core.pose import Pose
from controlroom.core.run import Run

_LIMIT = 1e4
_STRETCH = 1.05
"""How far the proportions of a mask may be from the picture's: sides are rounded to what the network can draw."""


def condition_map(source: Any, run: Run, channels: int = 3) -> torch.Tensor:
    """Read what a spatial control is conditioned on.

    Args:
        source: picture (path, bytes, PIL, uint8 array), map (float tensor or array ``[C, H, W]`` or ``[H, W]``, with a
            leading batch dimension or without), pose, or a list of these, one for each prompt or image.
        run: gives size, number of images, device and precision.
        channels: that the network reads; a map of one channel is repeated.

    Returns:
        [images, channels, height, width] in pixels of the run.

    Raises:
        InputError: unreadable, values that are not finite, other channels, or a number that does not fit the images.
    """
    parts = [_one(item, run.size) for item in _listed(source)]
    rows = []
    for part in parts:
        if part.shape[1] == 1 and channels != 1:
            part = part.expand(-1, channels, -1, -1)
        if part.shape[1] != channels:
            raise InputError(f"The condition has {part.shape[1]} channels; this network reads {channels}.")
        rows.append(part)
    return for_images(torch.cat(rows), run, "condition").to(device=run.device, dtype=run.dtype)


def storable(source: Any) -> Any:
    """A condition as a run can be written down with it: poses as OpenPose documents; for a control's validator.

    Raises:
        ValueError: None.
    """
    if isinstance(source, list | tuple):
        return [storable(item) for item in source]
    if isinstance(source, Pose):
        from controlroom.signals.pose.openpose_json import openpose_json

        return openpose_json(source)
    if source is None:
        raise ValueError("expected a condition map or a pose")
    return source


def mask_map(source: Any, run: Run, name: str = "mask", beside: Any = None) -> torch.Tensor:
    """Read a mask: [images, 1, height, width] in [0, 1], in pixels of the run.

    Args:
        source: the mask, or a list of them.
        run: gives the size.
        name: what to call it in an error.
        beside: the picture that the mask was painted for, where that is stretched to the run's size too: its
            proportions are right as well.

    Raises:
        InputError: unreadable, of other proportions than the picture, a number that does not fit the images, or black
            all over: it would undo its control.
    """
    height, width = run.size
    rows = []
    for item in _listed(source):
        batched = isinstance(item, np.ndarray | torch.Tensor) and item.ndim == 4
        for each in item if batched else [item]:
            called = f"The {name} {os.fspath(each)!r}" if isinstance(each, str | os.PathLike) else f"The {name}"
            own = load_mask(each)
            if not bool((own > 0).any()):
                raise InputError(f"{called} is black all over, so nothing would happen. Paint white where it may act.")
            _check_proportions(own.shape, run.size, beside, called)
            rows.append(torch.from_numpy(load_mask(each, (width, height)).copy())[None, None])
    return for_images(torch.cat(rows), run, name).to(device=run.device, dtype=run.dtype)


def _check_proportions(own: tuple[int, ...], size: tuple[int, int], beside: Any, called: str) -> None:
    """A mask is not stretched to other proportions, in which it would lie elsewhere. Raises InputError.

    Args:
        own: height and width of the mask.
        size: of the run.
        beside: a picture that it may belong to.
        called: the mask, for the message.
    """

    def alike(other: tuple[int, int]) -> bool:
        ratio = own[1] * other[0] / (own[0] * other[1])
        return 1 / _STRETCH <= ratio <= _STRETCH

    if alike(size):
        return
    listed = beside if isinstance(beside, list | tuple) else [] if beside is None else [beside]
    for picture in listed:
        if isinstance(picture, str | bytes | os.PathLike | Image.Image):
            width, height = load_image(picture).size
            if alike((height, width)):
                return
    raise InputError(
        f"{called} is {own[1]} x {own[0]} pixels and the picture {size[1]} x {size[0]}, which has other proportions, "
        "so it would be stretched. Give a mask in the proportions of the picture."
    )


def for_images(x: torch.Tensor, run: Run, name: str) -> torch.Tensor:
    """One row for each image: a single one serves all; as many as prompts are repeated for each prompt's images."""
    if run.images % x.shape[0]:
        raise InputError(f"There are {x.shape[0]} {name}s for {run.images} images. Give one, or one for each prompt.")
    return x.repeat_interleave(run.images // x.shape[0], dim=0)


def rows_of(x: torch.Tensor, run: Run, branch: str) -> torch.Tensor:
    """Rows of a branch out of [images, C, H, W]: through the views of the canvas, in the size of the branch's state.

    Raises:
        InputError: the branch has another number of pictures, and the rows differ.
    """
    plan, factor = run.plan, run.backbone.pixels_per_latent
    if plan.views is not None and plan.branches[branch].state == IMAGE:
        return plan.views.split(x, factor)
    rows = plan.rows_of(branch)
    if x.shape[0] != rows:
        if rows > x.shape[0] and rows % x.shape[0] == 0:
            x = x.repeat(rows // x.shape[0], 1, 1, 1)
        elif bool((x == x[:1]).all()):
            x = x[:1].expand(rows, -1, -1, -1)
        else:
            raise InputError(f"The branch {branch!r} has {rows} pictures, the control {x.shape[0]} different ones.")
    size = tuple(side * factor for side in plan.hw_of(branch))
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", antialias=True)


def tiled(x: torch.Tensor, rows: int, branch: str) -> torch.Tensor:
    """Rows for a branch out of one row for all, or one for each image; those repeat for each view of the canvas.

    Raises:
        InputError: the branch has another number of pictures, and the rows differ.
    """
    if x.shape[0] in (1, rows):
        return x
    if rows % x.shape[0]:
        raise InputError(f"The branch {branch!r} has {rows} pictures, the control was given {x.shape[0]}.")
    return x.repeat(rows // x.shape[0], *(1 for _ in x.shape[1:]))


def resized_mask(mask: torch.Tensor, hw: tuple[int, int]) -> torch.Tensor:
    """[rows, 1, H, W] -> [rows, 1, h, w]: the share of each coarse pixel that is white."""
    return mask if tuple(mask.shape[-2:]) == hw else F.interpolate(mask.float(), size=hw, mode="area").to(mask.dtype)


def tokens_hw(latent: tuple[int, int], queries: int) -> tuple[int, int]:
    """Height and width of a layer with that many queries: the latents' halved, rounded up, until they fit.

    >>> tokens_hw((17, 16), 72)
    (9, 8)
    """
    height, width = latent
    while height * width > queries:
        height, width = (height + 1) // 2, (width + 1) // 2
    if height * width != queries:
        raise ValueError(f"{queries} queries do not come from latents of {latent[0]} x {latent[1]} by halving")
    return height, width


def is_pose(source: Any) -> bool:
    """Whether a source is a pose rather than a picture."""
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        if not isinstance(text, str) or text.lower().endswith(".json"):
            return isinstance(text, str)
        if text.lstrip()[:1] in ("{", "["):
            from controlroom.signals.pose.source import is_json

            return is_json(text)  # the name of a picture may begin so too
        return False
    return isinstance(source, Pose | Mapping)


def _listed(source: Any) -> list[Any]:
    if isinstance(source, Sequence) and not isinstance(source, str | bytes):
        if not source:
            raise InputError("The list of pictures is empty. Give one, or one for each prompt.")
        return list(source)
    return [source]


def _one(source: Any, size: tuple[int, int]) -> torch.Tensor:
    """[rows, C, height, width], float32, on the CPU."""
    height, width = size
    if is_pose(source):
        return _pixels(_drawn(source, width, height))
    if isinstance(source, np.ndarray) and source.ndim >= 2:
        # Arrays have their channels last, as everywhere else.
        source = torch.from_numpy(np.ascontiguousarray(source if source.ndim == 2 else np.moveaxis(source, -1, -3)))
    if isinstance(source, torch.Tensor):
        return _tensor(source, size)
    return _pixels(fit(load_image(source), width, height, "stretch"))


def _tensor(source: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if not 2 <= source.ndim <= 4 or source.numel() == 0 or source.is_complex():
        raise InputError(f"A condition of shape {list(source.shape)} is none; expected [C, H, W] or [B, C, H, W].")
    maps = source.detach().cpu()
    maps = maps.float() / 255 if maps.dtype == torch.uint8 else maps.float()
    while maps.ndim < 4:
        maps = maps[None]
    if not bool(torch.isfinite(maps).all()) or float(maps.abs().max()) > _LIMIT:
        raise InputError("The condition has values that are not finite, or huge. Expected 0 to 1 (or -1 to 1).")
    return maps if tuple(maps.shape[-2:]) == size else F.interpolate(maps, size=size)


def _pixels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture, np.float32) / np.float32(255)).permute(2, 0, 1)[None].contiguous()


def _drawn(source: Any, width: int, height: int) -> Image.Image:
    """Everybody in a pose document, drawn over each other."""
    from controlroom.signals.pose.openpose_json import read_document
    from controlroom.signals.pose.skeleton import draw_skeleton

    people: list[Pose] = []
    if isinstance(source, Pose):
        people.append(source)
    else:
        people.extend(pose for pose in read_document(source).people if pose is not None)
    if not people:
        raise InputError("There is nobody in the pose. Give one with keypoints.")
    drawn = [draw_skeleton(pose.fitted(width, height)) for pose in people]
    picture = drawn[0]
    for other in drawn[1:]:
        picture = ImageChops.lighter(picture, other)
    return picture
