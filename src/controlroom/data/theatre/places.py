"""The backdrops: nine places, each recognisable by its colours alone and a little different every evening."""

from __future__ import annotations

from controlroom.data.theatre import vocabulary as v
from controlroom.data.theatre.paint import GROUND_DEPTH, Paper, Part, shade
from controlroom.data.theatre.scene import Dice

SKY_DEPTH, BACKDROP_DEPTH = 10, 60
WHITE: v.RGB = (250, 250, 252)


def draw_place(paper: Paper, place: str, seed: int) -> float:
    """List the shapes of ``place``; returns the y of the horizon."""
    dice = Dice("place", seed)
    paper.actor = 0
    horizon = _HORIZONS[place] + dice.between(-3, 3)
    sky, ground = _COLOURS[place]
    paper.part, paper.depth = Part.SKY, SKY_DEPTH
    paper.rectangle(-64, -64, 192, 192, sky, False)
    paper.part, paper.depth = Part.BACKDROP, BACKDROP_DEPTH
    if place in _BEHIND:
        _BEHIND[place](paper, dice, horizon)
    paper.part, paper.depth = Part.GROUND, GROUND_DEPTH
    paper.rectangle(-64, horizon, 192, 192, ground, False)
    if place in _BEFORE:
        _BEFORE[place](paper, dice, horizon)
    return horizon


_COLOURS: dict[str, tuple[v.RGB, v.RGB]] = {
    "beach": ((132, 206, 236), (238, 218, 162)),
    "forest": ((190, 226, 196), (84, 140, 64)),
    "city": ((168, 186, 208), (108, 106, 112)),
    "snow": ((202, 214, 238), (250, 251, 255)),
    "room": ((236, 214, 186), (166, 112, 74)),
    "desert": ((250, 206, 140), (226, 168, 92)),
    "stage": ((112, 18, 36), (150, 96, 54)),
    "night": ((34, 38, 104), (62, 82, 92)),
    "studio": ((232, 232, 234), (200, 200, 204)),
}
_HORIZONS = {
    "beach": 88,
    "forest": 90,
    "city": 96,
    "snow": 88,
    "room": 92,
    "desert": 84,
    "stage": 94,
    "night": 94,
    "studio": 92,
}


def _beach(paper: Paper, dice: Dice, horizon: float) -> None:
    x = dice.pick([20.0, 106.0]) + dice.between(-6, 6)
    paper.ellipse((x, 20), 10, 10, (255, 232, 92), False)
    paper.rectangle(-64, horizon - 18, 192, horizon + 2, (36, 124, 200), False)


def _forest(paper: Paper, dice: Dice, horizon: float) -> None:
    for index in range(5):
        x = -2 + index * 33 + dice.between(-6, 6)
        top, wide = dice.between(14, 34), dice.between(15, 19)
        paper.rectangle(x - 3, horizon - 16, x + 3, horizon + 4, (100, 66, 40), False)
        paper.polygon([(x, top), (x + wide, horizon - 10), (x - wide, horizon - 10)], (34, 102, 56), False)


def _city(paper: Paper, dice: Dice, horizon: float) -> None:
    x = -6.0
    while x < 132:
        wide, top = dice.pick([22.0, 27.0]), dice.between(14, 54)
        wall = dice.pick([(124, 132, 150), (96, 104, 126), (142, 128, 132)])
        paper.rectangle(x, top, x + wide, horizon + 2, wall, False)
        for row in range(int((horizon - top) / 14)):
            for column in range(int(wide / 10)):
                left, high = x + 4 + column * 10, top + 5 + row * 14
                paper.rectangle(left, high, left + 5, high + 7, (250, 226, 132), False)
        x += wide + 1


def _snow(paper: Paper, dice: Dice, horizon: float) -> None:
    for x in (dice.between(10, 40), dice.between(84, 118)):
        top, wide = dice.between(28, 46), dice.between(36, 46)
        paper.polygon([(x, top), (x + wide, horizon + 2), (x - wide, horizon + 2)], (150, 170, 206), False)
        paper.polygon([(x, top), (x + wide * 0.3, top + 17), (x - wide * 0.3, top + 17)], WHITE, False)


def _snowflakes(paper: Paper, dice: Dice, horizon: float) -> None:
    paper.part, paper.depth = Part.SKY, SKY_DEPTH
    for _ in range(12):
        paper.ellipse((dice.between(2, 126), dice.between(2, horizon - 4)), 1.9, 1.9, WHITE, False)


def _room(paper: Paper, dice: Dice, horizon: float) -> None:
    x = dice.pick([22.0, 100.0]) + dice.between(-4, 4)
    paper.rectangle(x - 17, 14, x + 17, 52, (250, 250, 246), False)
    paper.rectangle(x - 14, 17, x - 1.5, 49, (150, 208, 244), False)
    paper.rectangle(x + 1.5, 17, x + 14, 49, (150, 208, 244), False)
    paper.rectangle(-64, horizon - 5, 192, horizon, (250, 244, 234), False)


def _rug(paper: Paper, dice: Dice, horizon: float) -> None:
    paper.ellipse((64, 117), 50, 9, dice.pick([(180, 70, 76), (74, 104, 164), (98, 136, 96)]), False)


def _desert(paper: Paper, dice: Dice, horizon: float) -> None:
    paper.ellipse((dice.between(20, 108), 24), 12, 12, (255, 246, 196), False)
    paper.ellipse((dice.between(10, 50), horizon + 12), 60, 26, (214, 150, 80), False)
    paper.ellipse((dice.between(90, 120), horizon + 14), 55, 24, (206, 142, 74), False)


def _cactus(paper: Paper, dice: Dice, horizon: float) -> None:
    paper.part, paper.depth = Part.BACKDROP, BACKDROP_DEPTH + 30
    x = dice.pick([12.0, 116.0]) + dice.between(-4, 4)
    green = (58, 128, 74)
    paper.limb([(x, horizon + 6), (x, horizon - 30)], 4, green, False)
    paper.limb([(x, horizon - 10), (x + 9, horizon - 12), (x + 9, horizon - 24)], 2.8, green, False)
    paper.limb([(x, horizon - 6), (x - 9, horizon - 8), (x - 9, horizon - 18)], 2.8, green, False)


def _curtains(paper: Paper, dice: Dice, horizon: float) -> None:
    paper.ellipse((64 + dice.between(-6, 6), 60), 46, 62, (164, 44, 58), False)
    for side in (0, 1):
        edge = dice.between(13, 17)
        for fold in range(2):
            left = fold * edge if side == 0 else 128 - (fold + 1) * edge
            tone = (196, 34, 52) if (fold + side) % 2 == 0 else (156, 20, 40)
            paper.rectangle(left, -2, left + edge, horizon + 4, tone, False)
    paper.rectangle(-64, -64, 192, 11, (196, 34, 52), False)
    paper.rectangle(-64, 9, 192, 12.5, (240, 196, 84), False)


def _boards(paper: Paper, dice: Dice, horizon: float) -> None:
    paper.line([(-64, horizon + 1), (192, horizon + 1)], 2.5, shade((150, 96, 54), 0.7))
    paper.line([(-64, horizon + 15), (192, horizon + 15)], 1.5, shade((150, 96, 54), 0.75))


def _night(paper: Paper, dice: Dice, horizon: float) -> None:
    x = dice.pick([20.0, 106.0]) + dice.between(-6, 6)
    paper.ellipse((x, 20), 10, 10, (246, 242, 204), False)
    for _ in range(10):
        paper.ellipse((dice.between(2, 126), dice.between(2, horizon - 10)), 1.4, 1.4, (255, 255, 255), False)


_BEHIND = {
    "beach": _beach,
    "forest": _forest,
    "city": _city,
    "snow": _snow,
    "room": _room,
    "desert": _desert,
    "stage": _curtains,
    "night": _night,
}
_BEFORE = {"snow": _snowflakes, "room": _rug, "desert": _cactus, "stage": _boards}
