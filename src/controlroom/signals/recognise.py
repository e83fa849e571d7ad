"""Is a picture already a map? Then it is taken as it is: edges of edges are twice as many and mean nothing.

Each test knows what makes its map unlike a photograph: strokes are two values, thin, and few; soft edges are grey
ridges on black; depth is grey and smooth; normals have unit length; a segmentation has flat areas in its palette's
colours. They stand the JPEG a map may have been saved as. Skeletons are recognised in `signals.pose.skeleton_reader`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from controlroom.signals.filters import Mask, Plane, neighbour, thickened
from controlroom.signals.palette import Palette

_GREY = 10  # spread of the channels that a compressed grey picture may have, of 255


def recognise_strokes(image: Image.Image, thickest: int = 2) -> Plane | None:
    """Thin white strokes on black, values [H, W] 0 or 1; black on white is turned round. None for other pictures.

    ``thickest``: strokes thinner than twice this number of pixels, at 512, count as thin.
    """
    grey = _grey(image)
    if grey is None:
        return None
    if (grey > 127).mean() > 0.5:
        grey = 255 - grey
    white = grey > 127
    if not 0 < white.mean() < 0.35 or ((grey > 60) & (grey < 195)).mean() > 0.02:
        return None
    return white.astype(np.float32) if _thin(white, thickest) else None


def recognise_soft_edges(image: Image.Image) -> Plane | None:
    """Grey ridges on black, values [H, W] in [0, 1], or None."""
    grey = _grey(image)
    if grey is None or grey.max() < 100:
        return None
    between = (grey > 24) & (grey < 200)
    if (grey < 24).mean() < 0.5 or between.mean() < 0.01 or not _thin(grey > 0.5 * grey.max(), 6):
        return None
    return grey / np.float32(255)


def recognise_depth(image: Image.Image) -> Plane | None:
    """A smooth grey relief, values [H, W] in [0, 1], or None."""
    grey = _grey(image)
    if grey is None or np.percentile(grey, 98) - np.percentile(grey, 2) < 40 or min(grey.shape) < 16:
        return None
    if recognise_soft_edges(image) is not None or recognise_strokes(image) is not None:
        return None
    inner = np.s_[1:-1, 1:-1]
    bend = np.abs(4 * grey - sum(neighbour(grey, dy, dx) for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0))))[inner]
    many = len(np.unique(grey.astype(np.uint8))) >= 3
    return grey / np.float32(255) if many and (bend <= 1).mean() > 0.57 else None


def recognise_normals(image: Image.Image) -> NDArray[np.float32] | None:
    """Colours that are unit vectors towards the viewer, as normals [H, W, 3], or None."""
    colours = np.asarray(image.convert("RGB"), np.float32) / np.float32(127.5) - 1
    length = np.linalg.norm(colours, axis=-1)
    if (np.abs(length - 1) < 0.06).mean() < 0.9 or (colours[..., 2] > -0.05).mean() < 0.98:
        return None
    turned = colours * np.array([-1, 1, 1], np.float32)
    return turned / np.maximum(length, 1e-6)[..., None]


def recognise_segmentation(image: Image.Image, palette: Palette) -> NDArray[np.float32] | None:
    """Flat areas in the colours of ``palette`` [classes, 3], as class numbers [H, W], or None."""
    pixels = np.asarray(image.convert("RGB"), np.int32)
    codes, inverse = np.unique(pixels @ np.array([65536, 256, 1], np.int32), return_inverse=True)
    colours = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1)
    labels, distance = np.zeros(len(colours), np.int64), np.zeros(len(colours))
    for start in range(0, len(colours), 4096):
        part = slice(start, start + 4096)
        off = np.abs(colours[part, None] - palette[None].astype(np.int32)).max(-1)
        labels[part], distance[part] = off.argmin(1), off.min(1)
    label = labels[inverse].reshape(pixels.shape[:2])
    if (distance[inverse] <= 16).mean() < 0.95:
        return None
    flat = (label[:, 1:] == label[:, :-1]).mean() > 0.9 and (label[1:] == label[:-1]).mean() > 0.9
    return label.astype(np.float32) if flat and len(np.unique(label)) > 1 else None


def _grey(image: Image.Image) -> Plane | None:
    """[H, W] from 0 to 255 of a picture without colours, else None."""
    pixels = np.asarray(image.convert("RGB"), np.int16)
    if np.percentile(np.ptp(pixels, axis=-1), 99) > _GREY:
        return None
    return pixels.mean(-1, dtype=np.float32)


def _thin(mask: Mask, thickest: int) -> bool:
    """Whether hardly anything of ``mask`` is thicker than twice ``thickest`` pixels of a picture of 512."""
    steps = max(1, round(thickest * min(mask.shape) / 512))
    inside = ~thickened(~mask, steps)
    return bool(inside.sum() < 0.06 * mask.sum())
