"""Keypoints read back from an OpenPose skeleton that is already drawn.

A detector finds no person in a skeleton and returns black (easydiffusion issue 1515), so such a picture must be
recognised and read, not detected again. The colours say which limb is which: every joint has candidates (bright spots
of its hue, ends of the streaks of its limbs); the best choice of all at once is found exactly by dynamic programming on
the tree of limbs; then the points are refined until the skeleton drawn from them is the picture (Gauss-Newton). What is
not black with limbs in these colours is not a skeleton.

Own method. It follows the largest of several people and does not read hands and faces back.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from PIL import Image, ImageFilter

from controlroom.core.images import ImageSource, load_image
from controlroom.core.pose import LIMBS, NECK, Pose
from controlroom.signals.pose.paper import components
from controlroom.signals.pose.skeleton import draw_skeleton

_WORK_SIDE: Final = 320  # pixels of the longer side while reading
_DARK, _BRIGHT = 40, 70  # of 255: background and its JPEG noise, drawn things
_SHIFTED_HUE: Final = 0.4
_SAMPLES: Final = np.linspace(0.06, 0.94, 17)


def recognise_skeleton(source: ImageSource) -> Pose | None:
    """The pose of the largest person of a drawn skeleton, or None if the picture is not one.

    Args:
        source: as in `controlroom.core.images.load_image`; ControlNet's colours on black, of any size and thickness,
            also after JPEG compression or resizing.

    Returns:
        A pose on a canvas of the picture's size, with confidence 1 for each joint found; None for photographs,
        drawings, and skeletons of fewer than four limbs.

    Raises:
        InputError: the picture cannot be read.
    """
    picture = load_image(source)
    scale = _WORK_SIDE / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    if min(size) < 16:
        return None
    resample = Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.BOX
    pixels = np.asarray(picture.resize(size, resample), dtype=np.float32)
    hues = _hue_classes(pixels)
    if hues is None:
        return None
    near = [np.logical_or.reduce(_neighbours(hues == hue)) for hue in range(18)]
    points, there = _best_tree(pixels, hues, near)
    limbs = [limb for limb, (start, end) in enumerate(LIMBS) if there[start] and there[end]]
    if len(limbs) < 4:
        return None
    radius = _radius(points, limbs, hues)
    judged = [share for limb in limbs if (share := _covered(points, limb, near[limb], radius)) is not None]
    covered = sum(share > 0.6 for share in judged)
    if covered < max(2, 0.7 * len(judged)):
        return None
    explained = _explained(points, limbs, hues, radius)
    points, likeness = _refined(points, there, radius, pixels, hues)
    # Lines in many colours may happen to form a few limbs; then the rest of the picture gives it away. A whole skeleton
    # is one even if there are other people, or hands and a face over it.
    whole = covered >= 9 or (len(limbs) >= 14 and likeness > 0.9)
    if not (explained > 0.3 if whole else explained > 0.85 and likeness > 0.9):
        return None
    ratio = np.array([picture.width / size[0], picture.height / size[1]])
    return Pose(points * ratio, there.astype(float), picture.width, picture.height)


def _hue_classes(pixels: np.ndarray) -> np.ndarray | None:
    """int [H, W]: which of the 18 hues a drawn pixel has, -1 nothing is drawn, -2 what is has no hue (faces).

    None if too little is black or too little has a hue for a skeleton.
    """
    value, low = pixels.max(-1), pixels.min(-1)
    chroma = value - low
    drawn = value > _BRIGHT
    if (value < _DARK).mean() < 0.7 or not 20 <= drawn.sum():
        return None
    coloured = drawn & (chroma > 0.45 * value)
    if coloured.sum() < 0.4 * drawn.sum():
        return None
    red, green, blue = np.moveaxis(pixels, -1, 0)
    safe = np.maximum(chroma, 1e-6)
    sextant = np.where(
        value == red,
        ((green - blue) / safe) % 6,
        np.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hues = np.where(coloured, np.rint(sextant * 3).astype(int) % 18, np.where(drawn, -2, -1))
    counts = np.bincount(hues[hues >= 0], minlength=18)
    # A picture of one or two colours on black (neon letters, a logo) has no five limbs.
    return hues if (counts >= 4).sum() >= 5 else None


def _best_tree(pixels: np.ndarray, hues: np.ndarray, near: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Points [18, 2] and bool [18]: the choice of candidates that explains most of what is drawn."""
    streaks = [[np.array(c) + 0.5 for c in components(hues == limb) if len(c) >= 4] for limb in range(len(LIMBS))]
    candidates = [_candidates(joint, pixels, hues, streaks) for joint in range(18)]
    unit = max(hues.shape) * 0.08  # pixels of well covered limb that weigh as much as a bright spot
    choice: dict[int, np.ndarray] = {}

    def best(joint: int) -> np.ndarray:
        """For each candidate of ``joint``, and lastly for its absence, the score of the tree from there on."""
        points, spots = candidates[joint]
        total = np.append(spots, 0.0)
        for limb, (start, child) in enumerate(LIMBS):
            if start != joint:
                continue
            score = np.tile(best(child), (len(total), 1))
            score[:-1, :-1] += _support(points, candidates[child][0], near[limb]) / unit
            # A joint without the limb that leads to it is possible (its other end is outside), but rare.
            score[-1, :-1] -= 0.3
            choice[limb] = score.argmax(1)
            total += score.max(1)
        return total

    chosen = np.zeros(18, dtype=int)
    chosen[NECK] = best(NECK).argmax()
    for limb, (start, end) in enumerate(LIMBS):
        chosen[end] = choice[limb][chosen[start]]
    points, there = np.zeros((18, 2)), np.zeros(18, dtype=bool)
    for joint, index in enumerate(chosen):
        if index < len(candidates[joint][0]):
            points[joint], there[joint] = candidates[joint][0][index], True
    return points, there


def _candidates(
    joint: int, pixels: np.ndarray, hues: np.ndarray, streaks: list[list[np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Where ``joint`` may be: points [N, 2], and how much each looks like it, [N], -0.1 to 0.5 (0: it is absent)."""
    value = pixels.max(-1)
    full = float(np.percentile(value[hues >= 0], 97))  # what full intensity has become
    # JPEG shifts hues where colours lie close together.
    off = np.abs((hues - joint + 9) % 18 - 9)
    own = value * np.where(hues < 0, 0.0, np.where(off == 0, 1.0, np.where(off == 1, _SHIFTED_HUE, 0.0)))
    spot = np.mean(_neighbours(own), axis=0)
    points: list[np.ndarray] = []
    looks: list[float] = []
    rest = spot.copy()
    for _ in range(5):
        y, x = np.unravel_index(rest.argmax(), rest.shape)
        if rest[y, x] < 0.25 * full:
            break
        window = np.s_[max(y - 4, 0) : min(y + 5, len(own)), max(x - 4, 0) : min(x + 5, own.shape[1])]
        weight = np.clip(own[window] - 0.75 * own[window].max(), 0, None)
        ys, xs = np.mgrid[window]
        points.append(np.array([(weight * xs).sum(), (weight * ys).sum()]) / weight.sum() + 0.5)
        looks.append(float(np.clip((rest[y, x] / full - 0.55) / 0.3, 0, 1)) * 0.6 - 0.1)
        rest[window] = 0
    for limb, ends in enumerate(LIMBS):
        if joint in ends:
            for streak in streaks[limb][:2]:
                points.extend(_ends(streak))
                looks.extend((-0.1, -0.1))
    return np.array(points).reshape(-1, 2), np.array(looks)


def _ends(streak: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two ends of an elongated set of points [N, 2]; its tips taper and hide below joints, hence a pixel more."""
    centre = streak.mean(0)
    axis = np.linalg.eigh((streak - centre).T @ (streak - centre))[1][:, -1]
    along = (streak - centre) @ axis
    return centre + axis * (along.min() - 1), centre + axis * (along.max() + 1)


def _support(starts: np.ndarray, ends: np.ndarray, near: np.ndarray) -> np.ndarray:
    """[A, B]: pixels of the line from each start to each end that are drawn, less those that are not.

    The first few do not count: a joint's disc may have the hue of the limb that starts there.
    """
    if not (len(starts) and len(ends)):
        return np.zeros((len(starts), len(ends)))
    step = ends[None] - starts[:, None]
    points = starts[:, None, None] + step[:, :, None] * _SAMPLES[:, None]
    x = np.clip(points[..., 0].astype(int), 0, near.shape[1] - 1)
    y = np.clip(points[..., 1].astype(int), 0, near.shape[0] - 1)
    return (near[y, x].mean(-1) - 0.5) * 2 * np.maximum(np.linalg.norm(step, axis=-1) - 3, 0)


def _covered(points: np.ndarray, limb: int, near: np.ndarray, radius: float) -> float | None:
    """Share of a limb's line, between its joints, that is drawn in its hue; None for one too short to say."""
    start, end = (points[joint] for joint in LIMBS[limb])
    length = float(np.linalg.norm(end - start))
    if length < 3 * radius + 3:
        return None
    along = np.linspace(1.5 * radius / length, 1 - 1.5 * radius / length, 12)[:, None]
    x, y = np.clip(start + along * (end - start), 0, np.array(near.shape)[::-1] - 1).astype(int).T
    return float(near[y, x].mean())


def _neighbours(values: np.ndarray) -> list[np.ndarray]:
    """The 3 x 3 neighbours of every pixel, 0 outside."""
    padded, (height, width) = np.pad(values, 1), values.shape
    return [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]


def _radius(points: np.ndarray, limbs: list[int], hues: np.ndarray) -> float:
    """Half the width of a limb: what gives the ellipses of these lengths the area that is drawn."""
    length = sum(float(np.linalg.norm(points[end] - points[start])) for start, end in (LIMBS[limb] for limb in limbs))
    return float(np.clip((hues >= 0).sum() / (np.pi / 2 * max(length, 1.0)), 0.6, 12.0))


def _explained(points: np.ndarray, limbs: list[int], hues: np.ndarray, radius: float) -> float:
    """Share of the coloured pixels that lie on the limbs found."""
    ys, xs = np.nonzero(hues >= 0)
    drawn = np.stack([xs, ys], 1) + 0.5
    distance = np.full(len(drawn), np.inf)
    for start, end in (LIMBS[limb] for limb in limbs):
        along = points[end] - points[start]
        share = np.clip((drawn - points[start]) @ along / max(float(along @ along), 1e-9), 0, 1)
        distance = np.minimum(distance, np.linalg.norm(drawn - points[start] - share[:, None] * along, axis=1))
    return float((distance < 1.5 * radius + 2).mean())


def _refined(
    points: np.ndarray, there: np.ndarray, radius: float, pixels: np.ndarray, hues: np.ndarray
) -> tuple[np.ndarray, float]:
    """Points moved until the skeleton drawn from them is the picture: damped Gauss-Newton on the difference.

    At half size, which is several times faster and still good for a tenth of a pixel. Returned with how much of the
    picture, where the skeleton is, it explains (1 is all).
    """
    height, width = -(-pixels.shape[0] // 2), -(-pixels.shape[1] // 2)
    half = np.array([width / pixels.shape[1], height / pixels.shape[0]])
    which = np.flatnonzero(there)
    target = _softened(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).resize((width, height)))
    # The white dots of a face say nothing about what they cover.
    hidden = Image.fromarray(np.logical_or.reduce(_neighbours(hues == -2)).astype(np.uint8) * np.uint8(255))
    weight = 1 - np.asarray(hidden.resize((width, height)), np.float32)[..., None] / np.float32(255)

    def drawn(values: np.ndarray) -> np.ndarray:
        moved = np.zeros((18, 2))
        moved[which] = values[:-1].reshape(-1, 2)
        return weight * _softened(
            draw_skeleton(Pose(moved, there.astype(float), width, height), thickness=float(values[-1]))
        )

    values = np.append((points[which] * half).ravel(), radius * half.mean())
    target = weight * target
    now = drawn(values)
    error, damping, step = float(((target - now) ** 2).sum()), 1e-2, 0.5
    for _ in range(4):
        slope = (
            np.stack([drawn(values + step * unit) - now for unit in np.eye(len(values))]).reshape(len(values), -1)
            / step
        )
        touched = (slope != 0).any(0)
        slope, rest = slope[:, touched], (target - now).ravel()[touched]
        normal = slope @ slope.T
        change = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-3), slope @ rest)
        moved = values + np.clip(change, -2, 2)
        moved[-1] = np.clip(moved[-1], 0.3, 12)
        then = drawn(moved)
        new_error = float(((target - then) ** 2).sum())
        if new_error >= error:
            damping *= 10
            continue
        done = np.abs(moved - values).max() < 0.05
        values, now, error, damping = moved, then, new_error, damping / 3
        if done:
            break
    refined = points.copy()
    refined[which] = values[:-1].reshape(-1, 2) / half
    near = (now > 0.02).any(-1)
    likeness = 1 - float(((target - now)[near] ** 2).sum() / max((target[near] ** 2).sum(), 1e-9))
    return refined, likeness


def _softened(image: Image.Image) -> np.ndarray:
    """A little blurred, so that a point a few pixels off still feels where it should be; [H, W, 3] in [0, 1]."""
    return np.asarray(image.filter(ImageFilter.GaussianBlur(1.0)), np.float32) / np.float32(255)
