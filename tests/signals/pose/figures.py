"""Random people for tests: free joint angles, all joints on the canvas."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from controlroom.core.pose import Pose


def random_pose(rng: np.random.Generator, size: int = 256) -> Pose:
    s = size * rng.uniform(0.14, 0.24)  # the torso
    lean = rng.normal(0, 0.25)
    down = np.array([np.sin(lean), np.cos(lean)])
    right = np.array([-down[1], down[0]])
    p = np.zeros((18, 2))
    shoulder = rng.uniform(0.25, 0.4)
    p[2], p[5] = (right * shoulder + down * 0.05) * s, (-right * shoulder + down * 0.05) * s
    p[8], p[11] = (down + right * 0.25) * s, (down - right * 0.25) * s
    for first, side, length in ((2, -1, 0.55), (5, 1, 0.55), (8, -1, 0.7), (11, 1, 0.7)):
        upper = rng.uniform(-0.3, 2.9) if first < 8 else rng.uniform(-0.2, 1.2)
        lower = upper + rng.uniform(-1.6, 1.6)
        p[first + 1] = p[first] + np.array([side * np.sin(upper), np.cos(upper)]) * length * s
        p[first + 2] = p[first + 1] + np.array([side * np.sin(lower), np.cos(lower)]) * length * s
    p[0] = -down * 0.45 * s + rng.normal(0, 0.04 * s, 2)
    p[14], p[15] = p[0] + (right * 0.14 - down * 0.13) * s, p[0] + (-right * 0.14 - down * 0.13) * s
    p[16], p[17] = p[0] + (right * 0.32 - down * 0.05) * s, p[0] + (-right * 0.32 - down * 0.05) * s
    margin = 0.04 * size
    low, high = p.min(0) - margin, p.max(0) + margin
    shrink = min(1.0, float((size / (high - low)).min()))
    p, low, high = p * shrink, low * shrink, high * shrink
    p += -low + rng.uniform(0, 1, 2) * (size - (high - low))
    return Pose(p, np.ones(18), size, size)


def without(pose: Pose, joints: list[int]) -> Pose:
    confidence = pose.confidence.copy()
    confidence[joints] = 0
    return Pose(pose.keypoints, confidence, pose.width, pose.height)


# Hands, elbows, pelvis, knees and feet of a figure with a head of radius 30 at (200, 80); the viewer's left first.
STICK = {
    "neck": (200, 130),
    "pelvis": (200, 240),
    "elbows": ((140, 170), (260, 110)),
    "hands": ((110, 230), (300, 60)),
    "knees": ((160, 310), (235, 300)),
    "feet": ((150, 380), (240, 380)),
}


def draw_stick_figure(width: int = 5, ink: str = "black", paper: str = "white") -> Image.Image:
    sheet = Image.new("RGB", (400, 420), paper)
    pen = ImageDraw.Draw(sheet)
    pen.ellipse((170, 50, 230, 110), outline=ink, width=width)
    pen.line([(200, 110), STICK["pelvis"]], fill=ink, width=width)
    for side in (0, 1):
        arm = [STICK["neck"], STICK["elbows"][side], STICK["hands"][side]]
        leg = [STICK["pelvis"], STICK["knees"][side], STICK["feet"][side]]
        for line in (arm, leg):
            pen.line(line, fill=ink, width=width, joint="curve")
    return sheet
