"""What the theatre knows about a picture it has drawn: parts, actors, depth, edges, boxes, keypoints.

Everything is a function of the scene, in the pixels of a picture of the asked size. Maps are drawn without
anti-aliasing, so that every pixel has one label.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from controlroom.data.theatre import paint, poses
from controlroom.data.theatre.paint import GROUND_DEPTH, Part, Point
from controlroom.data.theatre.places import BACKDROP_DEPTH
from controlroom.data.theatre.render import camera, shapes
from controlroom.data.theatre.scene import CANVAS, Puppet, Scene

Map = NDArray[np.uint8]


@dataclass(frozen=True)
class Maps:
    """``part`` holds `Part` labels, ``actor`` 0 or 1 + index of the actor, ``depth`` 0 (far) to 255 (near). [h, w]."""

    part: Map
    actor: Map
    depth: Map

    def mask(self, actor: int, *parts: Part) -> NDArray[np.bool_]:
        """Where ``actor`` (its index in the scene) is seen; only these of its parts, if any are named."""
        own = self.actor == actor + 1
        return own & np.isin(self.part, [int(part) for part in parts]) if parts else own


def maps(scene: Scene, size: int = CANVAS) -> Maps:
    """Part, actor and depth of every pixel."""
    view, scale = camera(scene), size / CANVAS
    # The three maps are the three channels of one drawing.
    image, draw = paint.blank("RGB", size)
    ramp_from: float | None = None
    for shape in shapes(scene):
        if shape.fill == (0, 0, 0):
            continue  # a shadow is no object
        depth = shape.depth
        if depth == GROUND_DEPTH:
            depth = 1
            if shape.form == "polygon" and ramp_from is None:
                ramp_from = view.to_picture(shape.points[0])[1] * scale
        label = (int(shape.part), shape.actor, min(max(depth, 0), 255))
        paint.fill_shape(draw, shape, label, label if shape.outlined else None, view, scale)
    part, actor, depth_map = (np.ascontiguousarray(channel) for channel in np.moveaxis(np.asarray(image), -1, 0))
    if ramp_from is not None:
        rows = np.clip((np.arange(size) - ramp_from) / max(size - ramp_from, 1), 0, 1)
        ramp = (BACKDROP_DEPTH + 20 + rows * 120).astype(np.uint8)
        depth_map = np.where((depth_map == 1), ramp[:, None], depth_map)
    return Maps(part, actor, depth_map)


def edges(scene: Scene, size: int = CANVAS) -> Map:
    """Borders between parts and between actors: 255 on a border, else 0. One pixel thick."""
    found = maps(scene, size)
    label = found.part.astype(np.int32) + 32 * found.actor.astype(np.int32)
    border = np.zeros_like(label, dtype=bool)
    border[:, 1:] |= label[:, 1:] != label[:, :-1]
    border[1:, :] |= label[1:, :] != label[:-1, :]
    return border.astype(np.uint8) * 255


def boxes(scene: Scene, size: int = CANVAS) -> list[tuple[float, float, float, float] | None]:
    """Left, top, right, bottom of what is seen of each actor, in pixels; None for one that is hidden."""
    actor = maps(scene, size).actor
    found: list[tuple[float, float, float, float] | None] = []
    for index in range(len(scene.actors)):
        ys, xs = np.nonzero(actor == index + 1)
        if len(xs) == 0:
            found.append(None)
        else:
            found.append((float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)))
    return found


def keypoints(scene: Scene, index: int | None = None, size: int = CANVAS) -> NDArray[np.float32]:
    """OpenPose-18 keypoints of one puppet (the first unless ``index`` names an actor): [18, 3] of x, y, visibility.

    Visibility is 1 for seen, 0.5 for hidden by something nearer or by the puppet itself, 0 for outside the picture.
    """
    if index is None:
        index = next(i for i, actor in enumerate(scene.actors) if isinstance(actor, Puppet))
    puppet = scene.actors[index]
    assert isinstance(puppet, Puppet), f"actor {index} is a {puppet.kind}, not a puppet"
    view, scale = camera(scene), size / CANVAS
    points = [view.to_picture(point) for point in poses.joints(puppet)]
    actor = maps(scene, CANVAS).actor
    hidden_face = _hidden_face(puppet)
    found = np.zeros((18, 3), dtype=np.float32)
    for joint, (x, y) in enumerate(points):
        if not (0 <= x < CANVAS and 0 <= y < CANVAS):
            visible = 0.0
        elif joint in hidden_face or actor[int(y), int(x)] not in (index + 1,):
            visible = 0.5
        else:
            visible = 1.0
        found[joint] = (x * scale, y * scale, visible)
    return found


def _hidden_face(puppet: Puppet) -> tuple[int, ...]:
    if puppet.view == "back":
        return (poses.NOSE, poses.R_EYE, poses.L_EYE)
    if puppet.view == "side":
        return (poses.L_EYE, poses.L_EAR) if puppet.facing > 0 else (poses.R_EYE, poses.R_EAR)
    return ()


def face_keypoints(scene: Scene, index: int = 0, size: int = CANVAS) -> NDArray[np.float32]:
    """The 70 face keypoints of OpenPose (jaw 17, brows 10, nose 9, eyes 12, mouth 20, pupils 2): [70, 3].

    They follow the expression. Visibility is 0 for a face that is turned away.
    """
    puppet = scene.actors[index]
    assert isinstance(puppet, Puppet), f"actor {index} is a {puppet.kind}, not a puppet"
    points = poses.joints(puppet)
    centre, radius, turn = poses.head(puppet, points)
    view, scale = camera(scene), size / CANVAS
    found = np.zeros((70, 3), dtype=np.float32)
    if puppet.view == "back":
        return found
    for number, (x, y) in enumerate(_face(puppet)):
        dx, dy = x * radius, y * radius
        canvas = (
            centre[0] + dx * math.cos(turn) - dy * math.sin(turn),
            centre[1] + dx * math.sin(turn) + dy * math.cos(turn),
        )
        px, py = view.to_picture(canvas)
        inside = 0 <= px < CANVAS and 0 <= py < CANVAS
        found[number] = (px * scale, py * scale, 1.0 if inside else 0.0)
    return found


def _face(puppet: Puppet) -> list[Point]:
    """The 70 points in head radii from the head's centre, from left to right of the picture as OpenPose orders them."""
    mood = puppet.expression
    low = 0.3 if puppet.view == "above" else 0.0
    jaw = [(math.cos(math.pi * (1 - i / 16)), 0.05 + 0.95 * math.sin(math.pi * i / 16)) for i in range(17)]
    outer, inner = {
        "neutral": (-0.42, -0.42),
        "smiling": (-0.42, -0.48),
        "surprised": (-0.56, -0.6),
        "frowning": (-0.54, -0.26),
    }[mood]
    brows: list[Point] = []
    for side in (-1, 1):
        row = [(side * (0.64 - 0.44 * i / 4), outer + (inner - outer) * i / 4 + low) for i in range(5)]
        brows += row if side < 0 else row[::-1]
    nose = [(0.0, -0.05 + 0.08 * i + low) for i in range(4)] + [(-0.1 + 0.05 * i, 0.24 + low) for i in range(5)]
    eye_x, eye_y = (0.27, 0.3) if mood == "surprised" else (0.2, 0.22)
    eyes: list[Point] = []
    for side in (-1, 1):
        for corner in (180, 240, 300, 0, 60, 120):
            turn = math.radians(corner)
            eyes.append((0.4 * side + eye_x * math.cos(turn), -0.1 + low + eye_y * math.sin(turn)))
    y = 0.52 + low * 0.8
    wide, lift, tall = {
        "neutral": (0.26, 0.0, 0.08),
        "smiling": (0.5, -0.12, 0.3),
        "surprised": (0.26, 0.06, 0.32),
        "frowning": (0.42, 0.06, 0.1),
    }[mood]
    bend = {"smiling": -0.06, "frowning": 0.14}.get(mood, 0.0)  # how much lower the corners are than the middle

    def ring(count: int, share: float) -> list[Point]:
        ring_points: list[Point] = []
        for i in range(count):
            turn = math.pi + 2 * math.pi * i / count
            x = wide * share * math.cos(turn)
            ring_points.append((x, y + lift + tall * share * math.sin(turn) + bend * (x / wide) ** 2))
        return ring_points

    pupils = [(-0.4, -0.08 + low), (0.4, -0.08 + low)]
    points = [*jaw, *brows, *nose, *eyes, *ring(12, 1.0), *ring(8, 0.6), *pupils]
    if puppet.view == "side":  # a profile: the far half folds behind the near one
        return [(puppet.facing * (0.55 + 0.42 * x * puppet.facing), y) for x, y in points]
    return points
