"""A pose as data: OpenPose-18 keypoints in pixels on a canvas, with optional face and hands.

Coordinates are continuous: x runs from 0 at the left edge of the picture to ``width`` at its right edge, so the centre
of the first pixel is 0.5, and scaling a picture by s multiplies every coordinate by s. Right and left are the person's
own.

Source of the order and names: OpenPose (Cao et al., arXiv 1812.08008), as ControlNet uses it; PCK: Yang and Ramanan,
"Articulated Human Detection with Flexible Mixtures of Parts" (2013), here normalised by the torso.

Example:
    >>> points = np.zeros((18, 2)); points[1], points[8], points[11] = (64, 40), (58, 80), (70, 80)
    >>> pose = Pose(points, (points.sum(1) > 0).astype(float), 128, 128)
    >>> pose.torso_length(), pose.scaled(256, 256).torso_length()
    (40.0, 80.0)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from controlroom.core.errors import InputError
from controlroom.core.images import FitMode, placement

JOINTS: Final = (
    *("nose", "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist"),
    *("right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle"),
    *("right_eye", "left_eye", "right_ear", "left_ear"),
)
NOSE, NECK, R_SHOULDER, R_ELBOW, R_WRIST, L_SHOULDER, L_ELBOW, L_WRIST, R_HIP = range(9)
R_KNEE, R_ANKLE, L_HIP, L_KNEE, L_ANKLE, R_EYE, L_EYE, R_EAR, L_EAR = range(9, 18)

# In the order in which ControlNet draws and colours them.
LIMBS: Final[tuple[tuple[int, int], ...]] = (
    *((NECK, R_SHOULDER), (NECK, L_SHOULDER), (R_SHOULDER, R_ELBOW), (R_ELBOW, R_WRIST)),
    *((L_SHOULDER, L_ELBOW), (L_ELBOW, L_WRIST), (NECK, R_HIP), (R_HIP, R_KNEE), (R_KNEE, R_ANKLE)),
    *((NECK, L_HIP), (L_HIP, L_KNEE), (L_KNEE, L_ANKLE), (NECK, NOSE)),
    *((NOSE, R_EYE), (R_EYE, R_EAR), (NOSE, L_EYE), (L_EYE, L_EAR)),
)
_SIDES: Final = (0, 1, 5, 6, 7, 2, 3, 4, 11, 12, 13, 8, 9, 10, 15, 14, 17, 16)
# iBUG-68 with its sides swapped, then the two pupils.
_FACE_SIDES: Final = (
    *(*range(16, -1, -1), *range(26, 16, -1), *range(27, 31), *range(35, 30, -1)),
    *(45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40),
    *(54, 53, 52, 51, 50, 49, 48, 59, 58, 57, 56, 55, 64, 63, 62, 61, 60, 67, 66, 65, 69, 68),
)
FACE_POINTS, HAND_POINTS = 70, 21
# Far outside any picture, yet safe to compute with.
MAX_COORDINATE = 1e6


@dataclass(frozen=True, eq=False)
class Keypoints:
    """Points and how sure their reader was: ``points`` float64 [N, 2] (x, y) in pixels, ``confidence`` [N] in [0, 1].

    A point with confidence 0 is not there; its coordinates are set to 0. The arrays cannot be written to.

    Raises:
        InputError: wrong shapes, values that are not finite or too large, a confidence outside [0, 1].
    """

    points: np.ndarray
    confidence: np.ndarray

    def __post_init__(self) -> None:
        try:
            points = np.array(self.points, dtype=np.float64)
            confidence = np.array(self.confidence, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"Keypoints must be numbers; {error}.") from error
        if points.ndim != 2 or points.shape[1] != 2 or confidence.shape != points.shape[:1]:
            raise InputError(
                f"Keypoints have shape {list(points.shape)} and confidences {list(confidence.shape)}; "
                "expected [N, 2] and [N]."
            )
        if not (np.isfinite(confidence).all() and (confidence >= 0).all() and (confidence <= 1).all()):
            raise InputError("A keypoint's confidence is not a number from 0 to 1.")
        points[confidence == 0] = 0.0
        if not np.isfinite(points).all() or (np.abs(points) > MAX_COORDINATE).any():
            raise InputError(f"A keypoint's coordinate is not a finite number within {MAX_COORDINATE:g} pixels.")
        points += 0.0  # -0.0 becomes 0.0
        points.flags.writeable = confidence.flags.writeable = False
        object.__setattr__(self, "points", points)
        object.__setattr__(self, "confidence", confidence)

    def __len__(self) -> int:
        return len(self.points)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Keypoints):
            return NotImplemented
        same = np.array_equal(self.points, other.points)
        return same and np.array_equal(self.confidence, other.confidence)

    def __hash__(self) -> int:
        return hash((self.points.tobytes(), self.confidence.tobytes()))

    @property
    def visible(self) -> np.ndarray:
        """bool [N]: which points are there."""
        return self.confidence > 0

    def moved(self, scale: tuple[float, float], shift: tuple[float, float]) -> Keypoints:
        """Every point times ``scale``, plus ``shift``."""
        return Keypoints(self.points * np.asarray(scale, float) + np.asarray(shift, float), self.confidence)

    def reordered(self, order: tuple[int, ...]) -> Keypoints:
        """Point i of the result is point ``order[i]``."""
        return Keypoints(self.points[list(order)], self.confidence[list(order)])


@dataclass(frozen=True)
class Pose:
    """One person on a canvas.

    Attributes:
        keypoints: float64 [18, 2], (x, y) in pixels, in the order of `JOINTS`; may lie outside the canvas.
        confidence: float64 [18] in [0, 1]; 0 means the joint is not there.
        width: of the canvas, in pixels.
        height: of the canvas, in pixels.
        face: 70 keypoints in iBUG order and the pupils, or None.
        right_hand: 21 keypoints, or None.
        left_hand: 21 keypoints, or None.

    Raises:
        InputError: anything that is not as above.
    """

    keypoints: np.ndarray
    confidence: np.ndarray
    width: int
    height: int
    face: Keypoints | None = None
    right_hand: Keypoints | None = None
    left_hand: Keypoints | None = None

    def __post_init__(self) -> None:
        body = Keypoints(self.keypoints, self.confidence)
        if len(body) != len(JOINTS):
            raise InputError(f"A pose has {len(JOINTS)} keypoints in OpenPose order; got {len(body)}.")
        for name, size in (("width", self.width), ("height", self.height)):
            if isinstance(size, bool) or not isinstance(size, int | np.integer) or not 1 <= size <= 65535:
                raise InputError(f"The {name} of a pose's canvas is {size!r}; expected a whole number from 1 to 65535.")
            object.__setattr__(self, name, int(size))
        parts = (("face", FACE_POINTS), ("right_hand", HAND_POINTS), ("left_hand", HAND_POINTS))
        for name, count in parts:
            part = getattr(self, name)
            if part is not None and (not isinstance(part, Keypoints) or len(part) != count):
                raise InputError(f"The {name} of a pose must be {count} Keypoints or None; got {part!r:.100}.")
        object.__setattr__(self, "keypoints", body.points)
        object.__setattr__(self, "confidence", body.confidence)

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Pose) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[object, ...]:
        return (self.width, self.height, self.body, self.face, self.right_hand, self.left_hand)

    @property
    def body(self) -> Keypoints:
        """The 18 keypoints with their confidence."""
        return Keypoints(self.keypoints, self.confidence)

    @property
    def visible(self) -> np.ndarray:
        """bool [18]: which joints are there."""
        return self.confidence > 0

    @property
    def has_torso(self) -> bool:
        """Whether the neck and at least one hip are there."""
        return bool(self.visible[NECK] and (self.visible[R_HIP] or self.visible[L_HIP]))

    def bounding_box(self) -> tuple[float, float, float, float]:
        """``(left, top, right, bottom)`` of the joints that are there, in pixels.

        Raises:
            InputError: no joint is there.
        """
        if not self.visible.any():
            raise InputError("The pose has no keypoints; at least one is needed.")
        points = self.keypoints[self.visible]
        (left, top), (right, bottom) = points.min(0), points.max(0)
        return float(left), float(top), float(right), float(bottom)

    def torso_length(self) -> float:
        """Distance in pixels from the neck to the midpoint of the hips (to the one hip, if only one is there).

        Raises:
            InputError: the neck or both hips are not there, or lie on one point.
        """
        if not self.has_torso:
            missing = "neck" if not self.visible[NECK] else "hips"
            raise InputError(
                f"The pose has no torso: its {missing} are missing. Expected the neck and at least one hip."
            )
        hips = [joint for joint in (R_HIP, L_HIP) if self.visible[joint]]
        length = float(np.linalg.norm(self.keypoints[NECK] - self.keypoints[hips].mean(0)))
        if length < 1e-6:
            raise InputError("The pose has no torso: its neck and hips lie on one point.")
        return length

    def scaled(self, width: int, height: int) -> Pose:
        """The same pose on a canvas of another size; stretched if the proportions differ."""
        return self.fitted(width, height, "stretch")

    def fitted(self, width: int, height: int, mode: FitMode = "pad") -> Pose:
        """The pose where it lies after `controlroom.core.images.fit` has been applied to its picture."""
        scale_x, scale_y, left, top = placement((self.width, self.height), width, height, mode)
        return self._moved((scale_x, scale_y), (left, top), int(width), int(height))

    def translated(self, dx: float, dy: float) -> Pose:
        """Shifted by ``dx`` pixels to the right and ``dy`` down."""
        return self._moved((1.0, 1.0), (dx, dy), self.width, self.height)

    def mirrored(self) -> Pose:
        """As in a mirror: flipped from left to right, and what was the right hand is the left one."""
        flipped = self._moved((-1.0, 1.0), (self.width, 0.0), self.width, self.height)
        return flipped.sides_swapped()

    def sides_swapped(self) -> Pose:
        """The same points with the person's left and right exchanged (a stick figure shows its front or its back)."""
        body = self.body.reordered(_SIDES)
        face = None if self.face is None else self.face.reordered(_FACE_SIDES)
        hands = {"right_hand": self.left_hand, "left_hand": self.right_hand}
        return replace(self, keypoints=body.points, confidence=body.confidence, face=face, **hands)

    def _moved(self, scale: tuple[float, float], shift: tuple[float, float], width: int, height: int) -> Pose:
        def part(points: Keypoints | None) -> Keypoints | None:
            return None if points is None else points.moved(scale, shift)

        body = self.body.moved(scale, shift)
        parts = (part(self.face), part(self.right_hand), part(self.left_hand))
        return Pose(body.points, body.confidence, width, height, *parts)


def pck(predicted: Pose, truth: Pose, threshold: float = 0.2) -> float:
    """Percentage of correct keypoints as a share in [0, 1]; higher is better.

    A joint is right if it lies within ``threshold`` torso lengths (neck to midpoint of the hips, of ``truth``) of the
    true one. Counted over the joints that ``truth`` has; one that ``predicted`` lacks is wrong, one that only it has is
    not counted.

    Raises:
        InputError: the canvases differ (scale one first), ``truth`` has no torso, or the threshold is not positive.
    """
    if (predicted.width, predicted.height) != (truth.width, truth.height):
        raise InputError(
            f"The poses are on canvases of {predicted.width} x {predicted.height} and {truth.width} x {truth.height} "
            "pixels; bring one to the other's with scaled()."
        )
    if not threshold > 0:
        raise InputError(f"The threshold of PCK is {threshold!r}; expected a positive share of the torso.")
    distance = np.linalg.norm(predicted.keypoints - truth.keypoints, axis=1)
    right = (distance <= threshold * truth.torso_length()) & predicted.visible
    return float(right[truth.visible].mean())
