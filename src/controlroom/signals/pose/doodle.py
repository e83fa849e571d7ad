"""Keypoints of a stick figure without any weights: thin its lines to a tree and name the tree's parts.

The head is the roundest loop; below it the ink is thinned (Zhang and Suen, 1984) to lines one pixel wide; shortest
paths from the neck to the four ends are the limbs; where the two that stay together longest part is the pelvis; an
elbow or knee is where a limb bends most. Where the drawing is no such tree (limbs that cross, touch the head or are not
drawn) it says so and refuses, since a wrong pose costs more than a redrawn doodle; a trained keypoint reader can do
those.

A stick figure does not say which side is left: the person is taken to face the viewer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image

from controlroom.core.errors import InputError
from controlroom.core.pose import L_ELBOW, L_KNEE, NECK, R_ELBOW, R_KNEE, Pose
from controlroom.signals.pose.paper import components, eroded, ink_of, thickened

_CONFIDENCE: Final = 0.6
_REMEDY: Final = (
    "Draw a stick figure of dark lines on plain paper: a round head, a body, two arms and two legs that do not touch "
    "each other or the head. Or give a trained reader, or the pose as JSON."
)

Point = tuple[int, int]
Path = list[Point]


@dataclass(frozen=True)
class _Head:
    centre: np.ndarray  # (x, y)
    radius: float  # to the middle of its line


class DoodleReader:
    """A `PoseReader` for stick figures."""

    def read(self, image: Image.Image) -> Pose:
        """The keypoints of the stick figure in an RGB picture, each with confidence 0.6.

        Raises:
            InputError: it is not sure; the message says what was missing.
        """
        ink = ink_of(image)
        # Unsteady strokes leave gaps of a pixel or two.
        ink = _without_specks(eroded(np.pad(thickened(np.pad(ink, 4), 2), 1), 2)[5:-5, 5:-5] | ink)
        lines = _thinned(ink)
        if lines.sum() < 30:
            raise _unsure("there is too little ink")
        width = float(ink.sum() / lines.sum())
        head = _find_head(ink, width)
        start, tree = _body_lines(ink, head, width)
        limbs = _limbs(tree, start, width)
        points = _named(head, start, *limbs)
        scale = np.array([image.width / ink.shape[1], image.height / ink.shape[0]])
        return Pose(points * scale, np.full(18, _CONFIDENCE), image.width, image.height)


def _unsure(reason: str) -> InputError:
    return InputError(f"The doodle cannot be read for sure: {reason}. {_REMEDY}")


def _without_specks(ink: np.ndarray) -> np.ndarray:
    """Ink without what is much smaller than the figure: eyes and a mouth, dust."""
    parts = [np.array(part) for part in components(ink)]
    extents = [float(np.ptp(part, axis=0).max()) for part in parts]
    clean = np.zeros_like(ink)
    for part, extent in zip(parts, extents, strict=True):
        if extent > 0.2 * max(extents):
            clean[part[:, 1], part[:, 0]] = True
    return clean


def _thinned(mask: np.ndarray) -> np.ndarray:
    """Lines one pixel wide in the middle of the strokes (Zhang and Suen's parallel thinning)."""
    mask = np.pad(mask, 1)
    while True:
        before = mask.sum()
        for phase in (0, 1):
            # Neighbours clockwise from the one above.
            shifts = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))
            p = [np.roll(mask, (-dy, -dx), (0, 1)) for dy, dx in shifts]
            count = np.sum(p, axis=0)
            turns = np.sum([~p[i] & p[(i + 1) % 8] for i in range(8)], axis=0)
            if phase == 0:
                free = ~(p[0] & p[2] & p[4]) & ~(p[2] & p[4] & p[6])
            else:
                free = ~(p[0] & p[2] & p[6]) & ~(p[0] & p[4] & p[6])
            mask = mask & ~((count >= 2) & (count <= 6) & (turns == 1) & free)
        if mask.sum() == before:
            return mask[1:-1, 1:-1]


def _find_head(ink: np.ndarray, width: float) -> _Head:
    """The roundest loop, also one that does not quite close."""
    best, found = 0.72, None
    for gap in range(5):
        closed = thickened(ink, gap)
        for hole in components(~closed, diagonal=False):
            points = np.array(hole, float)
            if len(hole) < 30 or points.min() == 0 or (points.max(0) == np.array(ink.shape[::-1]) - 1).any():
                continue
            centre = points.mean(0)
            reach = np.linalg.norm(points - centre, axis=1).max() + 0.5
            round_ = len(hole) / (np.pi * reach**2)
            if round_ > best + 0.02 * gap:
                radius = float(np.sqrt(len(hole) / np.pi)) + gap + width / 2
                best, found = round_, _Head(centre, radius)
        if found is not None:
            return found
    raise _unsure("no round head was found")


def _body_lines(ink: np.ndarray, head: _Head, width: float) -> tuple[Point, dict[Point, list[Point]]]:
    """The thin lines of the body without the head, as neighbours by pixel, and the pixel nearest to the head."""
    rows, columns = np.mgrid[: ink.shape[0], : ink.shape[1]]
    away = np.hypot(columns - head.centre[0], rows - head.centre[1])
    body = ink & (away > head.radius + 0.75 * width + 1)
    parts = components(body)
    total = sum(len(part) for part in parts)
    if not parts or len(parts[0]) < 0.8 * total or len(parts[0]) < 4 * head.radius * width * 0.5:
        raise _unsure("below the head the figure is not in one piece")
    only = np.zeros_like(ink)
    x, y = np.array(parts[0]).T
    only[y, x] = True
    rows, columns = np.nonzero(_thinned(only))
    pixels = set(zip(columns.tolist(), rows.tolist(), strict=True))
    tree = {pixel: _near(pixel, pixels) for pixel in pixels}
    start = min(pixels, key=lambda pixel: away[pixel[1], pixel[0]])
    if away[start[1], start[0]] > head.radius * 1.8 + 2 * width:
        raise _unsure("the body does not begin at the head")
    return start, tree


def _near(pixel: Point, pixels: set[Point]) -> list[Point]:
    """Neighbours; a diagonal one only where no straight step leads to it, so that corners make no loops."""
    x, y = pixel
    near = [step for step in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)) if step in pixels]
    for dx, dy in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        if (x + dx, y + dy) in pixels and (x + dx, y) not in pixels and (x, y + dy) not in pixels:
            near.append((x + dx, y + dy))
    return near


def _limbs(tree: dict[Point, list[Point]], start: Point, width: float) -> tuple[Path, list[Path], list[Path]]:
    """The spine, the two arms from where they leave it, the two legs from the pelvis."""
    edges = sum(len(near) for near in tree.values()) // 2
    if edges > len(tree) + 2:  # a thinned crossing makes tiny loops; a loop of limbs is told by the paths below
        raise _unsure("its lines cross")
    paths = _paths_to_ends(tree, start, spur=max(6.0, 1.5 * width))
    reached = set().union(*paths) if paths else set()
    if len(reached) < 0.85 * len(tree):
        raise _unsure("its limbs cross or form loops")
    if len(paths) != 4:
        raise _unsure(f"it has {len(paths)} limbs instead of 4")
    shared = {(i, j): _shared(paths[i], paths[j]) for i in range(4) for j in range(i)}
    (one, two), stem = max(shared.items(), key=lambda item: item[1])
    arms = [index for index in range(4) if index not in (one, two)]
    roots = [max(_shared(paths[arm], paths[leg]) for leg in (one, two)) for arm in arms]
    if max(roots) > 0.6 * stem:
        raise _unsure("its arms cannot be told from its legs")
    spine = paths[one][:stem]
    return (
        spine,
        [paths[arm][root - 1 :] for arm, root in zip(arms, roots, strict=True)],
        [paths[leg][stem - 1 :] for leg in (one, two)],
    )


def _shared(one: Path, two: Path) -> int:
    """How many pixels two paths have in common from their start."""
    for count, (a, b) in enumerate(zip(one, two, strict=False)):
        if a != b:
            return count
    return min(len(one), len(two))


def _paths_to_ends(tree: dict[Point, list[Point]], start: Point, spur: float) -> list[Path]:
    """Shortest paths from ``start`` to the ends of the lines, without spurs shorter than ``spur`` pixels."""
    before: dict[Point, Point | None] = {start: None}
    front = [start]
    for pixel in front:  # breadth first; grows while it is walked
        for near in tree[pixel]:
            if near not in before:
                before[near] = pixel
                front.append(near)
    ends = [pixel for pixel in front if pixel != start and len(tree[pixel]) == 1]
    paths = []
    for end in ends:
        path, here = [], end
        while here is not None:
            path.append(here)
            here = before[here]
        paths.append(path[::-1])
    # Longest first: what a shorter one adds to those is a limb or a spur.
    kept: list[Path] = []
    for path in sorted(paths, key=len, reverse=True):
        own = len(path) - max((_shared(path, other) for other in kept), default=0)
        if own > spur:
            kept.append(path)
    if len(kept) > 4:  # feet and hands: of two ends close together the longer path stays
        longest = max(len(path) for path in kept)
        kept = [path for path in kept if _own(path, kept) > 0.15 * longest]
    return kept


def _own(path: Path, others: list[Path]) -> int:
    return len(path) - max((_shared(path, other) for other in others if other is not path), default=0)


def _named(head: _Head, start: Point, spine: Path, arms: list[Path], legs: list[Path]) -> np.ndarray:
    """The 18 keypoints [18, 2] from the parts of the figure."""
    pelvis = np.array(spine[-1], float) + 0.5
    root = np.mean([arm[0] for arm in arms], axis=0) + 0.5
    centre = head.centre + 0.5
    top = np.array(start, float) + 0.5
    # The neck is a little above where the arms leave the body, and never inside the head.
    neck = root + (top - root) * 0.4
    torso = float(np.linalg.norm(pelvis - neck))
    lengths = [float(np.linalg.norm(np.diff(np.array(limb), axis=0), axis=1).sum()) for limb in (*arms, *legs)]
    if not 0.6 * head.radius < torso < 9 * head.radius:
        raise _unsure("its body is too short or too long for its head")
    if max(lengths[:2]) > 3 * min(lengths[:2]) or max(lengths[2:]) > 3 * min(lengths[2:]):
        raise _unsure("its limbs are of very different lengths")
    if min(lengths) < 0.25 * torso or max(lengths) > 4 * torso:
        raise _unsure("a limb is too short or too long for its body")
    down = (pelvis - neck) / torso
    right = np.array([-down[1], down[0]])  # of a person who faces the viewer
    up_head = (centre - neck) / max(float(np.linalg.norm(centre - neck)), 1e-6)
    head_right = np.array([up_head[1], -up_head[0]])
    points = np.zeros((18, 2))
    points[NECK], points[0] = neck, centre - 0.15 * head.radius * up_head
    for joint, side, out, up in ((14, 1, 0.4, 0.1), (15, -1, 0.4, 0.1), (16, 1, 0.95, -0.05), (17, -1, 0.95, -0.05)):
        points[joint] = centre + head.radius * (side * out * head_right + up * up_head)
    for limbs, joints, origin, reach in (
        (arms, (R_ELBOW, L_ELBOW), neck + 0.06 * torso * down, 0.33),
        (legs, (R_KNEE, L_KNEE), pelvis, 0.23),
    ):
        sides = [float(((np.array(limb) + 0.5 - origin) @ right).mean()) for limb in limbs]
        ordered = [limbs[index] for index in np.argsort(sides)[::-1]]
        for limb, joint, side in zip(ordered, joints, (1, -1), strict=True):
            points[joint - 1] = origin + side * reach * torso * right
            points[joint], points[joint + 1] = _bend(limb)
    return points


def _bend(limb: Path) -> tuple[np.ndarray, np.ndarray]:
    """Where a limb bends most (its middle, if it is straight) and where it ends."""
    points = np.array(limb, float) + 0.5
    start, end = points[0], points[-1]
    along = np.append(0, np.linalg.norm(np.diff(points, axis=0), axis=1).cumsum())
    share = along / along[-1]
    chord = end - start
    length = float(np.linalg.norm(chord))
    middle = points[np.abs(share - 0.5).argmin()]
    if length < 1e-6:
        return middle, end
    off = np.abs(chord[0] * (points[:, 1] - start[1]) - chord[1] * (points[:, 0] - start[0])) / length
    off[(share < 0.25) | (share > 0.75)] = -1
    return (points[off.argmax()] if off.max() > 0.08 * along[-1] else middle), end
