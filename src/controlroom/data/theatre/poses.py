"""The puppet's skeleton: joint angles, named poses, and where the joints lie (forward kinematics).

The puppets are paper: limbs turn in the plane of the picture. Angles are degrees from hanging straight down, positive
away from the body; the elbow's and knee's angle adds to that of the upper limb. Keypoints follow OpenPose-18.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from controlroom.data.theatre.scene import Dice, Puppet

FREE: Final = "free"

# Bone lengths in canvas pixels at scale 1.
TORSO, UPPER_ARM, FOREARM, THIGH, SHIN = 28.0, 14.5, 14.0, 16.5, 17.0
HEAD_RADIUS, HEAD_ABOVE_NECK, SHOE = 13.0, 15.5, 3.0
SHOULDERS: Final = {"woman": 9.5, "man": 11.5}
HIPS: Final = {"woman": 7.0, "man": 6.0}

(NOSE, NECK, R_SHOULDER, R_ELBOW, R_WRIST, L_SHOULDER, L_ELBOW, L_WRIST, R_HIP) = range(9)
(R_KNEE, R_ANKLE, L_HIP, L_KNEE, L_ANKLE, R_EYE, L_EYE, R_EAR, L_EAR) = range(9, 18)

Point = tuple[float, float]


@dataclass(frozen=True)
class JointAngles:
    """Right and left are the puppet's own: its right arm is on the left of a picture that shows its front."""

    right_shoulder: float = 10.0
    right_elbow: float = 0.0
    left_shoulder: float = 10.0
    left_elbow: float = 0.0
    right_hip: float = 6.0
    right_knee: float = 0.0
    left_hip: float = 6.0
    left_knee: float = 0.0
    torso: float = 0.0  # leaning, positive to the right of the picture
    head: float = 0.0
    hop: float = 0.0  # pixels above the ground

    def mirrored(self) -> JointAngles:
        return replace(
            self,
            right_shoulder=self.left_shoulder,
            right_elbow=self.left_elbow,
            left_shoulder=self.right_shoulder,
            left_elbow=self.right_elbow,
            right_hip=self.left_hip,
            right_knee=self.left_knee,
            left_hip=self.right_hip,
            left_knee=self.right_knee,
            torso=-self.torso,
            head=-self.head,
        )


_NAMED: Final[dict[str, JointAngles]] = {
    "standing": JointAngles(12, 0, 12, 0, 6, 0, 6, 0),
    "waving": JointAngles(135, 35, 12, 0, 7, 0, 7, 0, head=-4),
    "cheering": JointAngles(152, 12, 152, 12, 9, 0, 9, 0),
    "spreading": JointAngles(90, 0, 90, 0, 8, 0, 8, 0),
    "akimbo": JointAngles(52, -105, 52, -105, 10, 0, 10, 0),
    "pointing": JointAngles(90, 0, 12, 0, 7, 0, 7, 0),
    "walking": JointAngles(38, 12, 30, 18, 26, -6, 30, -42, torso=-3),
    "running": JointAngles(62, 80, 66, -88, 52, -8, 40, -98, torso=-8),
    "jumping": JointAngles(128, 20, 128, 20, 48, -82, 48, -82, hop=15),
    "sitting": JointAngles(30, -22, 30, -22, 78, -74, 78, -74),
    "kicking": JointAngles(70, 10, 60, 10, 86, 0, 4, 0, torso=8),
    "dancing": JointAngles(160, -40, 52, -105, 46, -92, 7, 0, torso=5),
}


def named_pose(name: str, dice: Dice, jitter: float = 5.0) -> JointAngles:
    """A named pose as one evening's actor holds it: each angle a little off, either side leading."""
    pose = _NAMED[name]
    if dice.chance(0.5):
        pose = pose.mirrored()
    shaken = {part: getattr(pose, part) + dice.normal(jitter) for part in _LIMBS}
    return replace(pose, **shaken, torso=pose.torso + dice.normal(2.0), head=pose.head + dice.normal(3.0))


_LIMBS: Final = (
    "right_shoulder",
    "right_elbow",
    "left_shoulder",
    "left_elbow",
    "right_hip",
    "right_knee",
    "left_hip",
    "left_knee",
)


def free_pose(dice: Dice) -> JointAngles:
    """Any pose a paper puppet can hold without tangling its limbs."""

    def arm() -> tuple[float, float]:
        shoulder = dice.between(0, 165)
        return shoulder, dice.between(max(-120, -shoulder - 40), min(110, 190 - shoulder))

    def leg() -> tuple[float, float]:
        hip = dice.between(2, 62) if dice.chance(0.6) else dice.between(2, 16)
        return hip, dice.between(-hip - 45, 12)

    (rs, re), (ls, le), (rh, rk), (lh, lk) = arm(), arm(), leg(), leg()
    return JointAngles(rs, re, ls, le, rh, rk, lh, lk, torso=dice.between(-10, 10), head=dice.between(-9, 9))


def _step(start: Point, degrees: float, length: float, side: float) -> Point:
    """Go ``length`` from ``start``; 0 degrees is down, positive turns towards ``side`` (-1 left, +1 right)."""
    turn = math.radians(degrees)
    return start[0] + side * math.sin(turn) * length, start[1] + math.cos(turn) * length


def joints(puppet: Puppet) -> list[Point]:
    """OpenPose-18 keypoints of the puppet in canvas pixels, whether or not they can be seen."""
    angles, s, figure = puppet.angles, puppet.scale, puppet.identity.figure
    narrow = 0.35 if puppet.view == "side" else 1.0
    # The puppet's right is on the left of the picture, unless we see its back.
    right = 1.0 if puppet.view == "back" else -1.0
    lean = math.radians(angles.torso)
    across = (math.cos(lean), math.sin(lean))
    up = (math.sin(lean), -math.cos(lean))

    def local(x: float, y: float) -> Point:
        return x * across[0] + y * up[0], x * across[1] + y * up[1]

    points: list[Point] = [(0.0, 0.0)] * 18
    points[NECK] = local(0, TORSO * s)
    for side, shoulder, hip in ((right, R_SHOULDER, R_HIP), (-right, L_SHOULDER, L_HIP)):
        points[shoulder] = local(side * SHOULDERS[figure] * narrow * s, (TORSO - 2.5) * s)
        points[hip] = local(side * HIPS[figure] * narrow * s, 0)
    arms = ((right, R_SHOULDER, angles.right_shoulder, angles.right_elbow),)
    arms += ((-right, L_SHOULDER, angles.left_shoulder, angles.left_elbow),)
    for side, shoulder, first, bend in arms:
        points[shoulder + 1] = _step(points[shoulder], first, UPPER_ARM * s, side)
        points[shoulder + 2] = _step(points[shoulder + 1], first + bend, FOREARM * s, side)
    legs = ((right, R_HIP, angles.right_hip, angles.right_knee), (-right, L_HIP, angles.left_hip, angles.left_knee))
    for side, hip, first, bend in legs:
        points[hip + 1] = _step(points[hip], first, THIGH * s, side)
        points[hip + 2] = _step(points[hip + 1], first + bend, SHIN * s, side)
    centre, turn = _head(points[NECK], puppet)
    for index, (x, y) in _face_joints(puppet, right).items():
        points[index] = _turned(centre, turn, x * HEAD_RADIUS * s, y * HEAD_RADIUS * s)
    if puppet.view == "above":
        points = [_from_above(point) for point in points]
    lowest = max(points[R_ANKLE][1], points[L_ANKLE][1]) + SHOE * s
    lift = puppet.ground - lowest - angles.hop * s
    return [(x + puppet.x, y + lift) for x, y in points]


def _from_above(point: Point) -> Point:
    """Seen from above, what is higher is nearer: taller, so drawn larger, and everything is foreshortened."""
    x, y = point
    nearer = 1.0 + max(-y, -40.0) * 0.0045
    return x * nearer, y * 0.66


def _head(neck: Point, puppet: Puppet) -> tuple[Point, float]:
    turn = math.radians(puppet.angles.torso * 0.5 + puppet.angles.head)
    distance = HEAD_ABOVE_NECK * puppet.scale
    return (neck[0] + math.sin(turn) * distance, neck[1] - math.cos(turn) * distance), turn


def head(puppet: Puppet, points: list[Point]) -> tuple[Point, float, float]:
    """Centre, radius and turn (radians) of the head, from `joints`."""
    neck = points[NECK]
    if puppet.view != "above":
        centre, turn = _head(neck, puppet)
        return centre, HEAD_RADIUS * puppet.scale, turn
    turn = math.radians(puppet.angles.torso * 0.5 + puppet.angles.head)
    distance = HEAD_ABOVE_NECK * puppet.scale * 0.66
    radius = HEAD_RADIUS * puppet.scale * 1.08
    return (neck[0] + math.sin(turn) * distance, neck[1] - math.cos(turn) * distance), radius, turn


def _turned(centre: Point, turn: float, x: float, y: float) -> Point:
    return (
        centre[0] + x * math.cos(turn) - y * math.sin(turn),
        centre[1] + x * math.sin(turn) + y * math.cos(turn),
    )


def _face_joints(puppet: Puppet, right: float) -> dict[int, Point]:
    """Nose, eyes and ears in head radii from the centre of the head."""
    if puppet.view == "side":
        f = puppet.facing
        return {
            NOSE: (0.95 * f, 0.12),
            R_EYE: (0.48 * f, -0.12),
            L_EYE: (0.48 * f, -0.12),
            R_EAR: (-0.18 * f, 0.05),
            L_EAR: (-0.18 * f, 0.05),
        }
    low = 0.3 if puppet.view == "above" else 0.0
    return {
        NOSE: (0.0, 0.2 + low),
        R_EYE: (0.4 * right, -0.1 + low),
        L_EYE: (-0.4 * right, -0.1 + low),
        R_EAR: (0.96 * right, 0.05 + low * 0.5),
        L_EAR: (-0.96 * right, 0.05 + low * 0.5),
    }


def fit_to_canvas(puppet: Puppet, margin: float = 5.0, canvas: float = 128.0) -> Puppet:
    """Shift the puppet sideways, and shrink it if need be, so that all of it is on the canvas."""
    for _ in range(8):
        points = joints(puppet)
        (_, head_y), radius, _ = head(puppet, points)
        xs = [x for x, _ in points]
        left, right = min(xs) - margin, max(xs) + margin
        head_room = head_y - radius * (1.75 if puppet.identity.hat == "top hat" else 1.35)
        top = min(head_room, min(y for _, y in points) - margin)
        if right - left > canvas or top < 0:
            puppet = replace(puppet, scale=puppet.scale * 0.95)
        elif left < 0:
            puppet = replace(puppet, x=puppet.x - left)
        elif right > canvas:
            puppet = replace(puppet, x=puppet.x - (right - canvas))
        else:
            return puppet
    return puppet
