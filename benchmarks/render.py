"""How long the theatre takes for a scene: ``python -m benchmarks.render``, beside Pillow drawing one ellipse as large.

One thread. Sampling decides what a scene shows, rendering draws it at twice the size and shrinks it, the truth is its
keypoints, boxes, depth and parts. Pillow's ellipse at twice the size, shrunk, is what no scene can be below.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from PIL import Image, ImageDraw

from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import CANVAS, sample_scene
from controlroom.data.theatre.truth import keypoints, maps


def ellipse() -> Image.Image:
    """One shape, drawn and shrunk as scenes are."""
    large = Image.new("RGB", (2 * CANVAS, 2 * CANVAS), "white")
    ImageDraw.Draw(large).ellipse((40, 40, 200, 200), fill="red", outline="black", width=4)
    return large.resize((CANVAS, CANVAS), Image.Resampling.BOX)


def milliseconds(work: Callable[[int], object], count: int) -> float:
    """Median over numbered pieces of work."""
    taken: list[float] = []
    for number in range(count):
        begun = time.perf_counter()
        work(number)
        taken.append(1000 * (time.perf_counter() - begun))
    return statistics.median(taken)


def measure(count: int) -> dict[str, float]:
    """Milliseconds a scene, by what is done."""
    scenes = [sample_scene(number) for number in range(count)]
    people = [scene for scene in scenes if scene.puppets]
    return {
        "sample": milliseconds(sample_scene, count),
        "render": milliseconds(lambda number: render(scenes[number]), count),
        "truth": milliseconds(lambda number: (keypoints(people[number]), maps(people[number])), len(people)),
        "one ellipse": milliseconds(lambda number: ellipse(), count),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=500, help="scenes")
    for name, value in measure(parser.parse_args().n).items():
        print(f"{name}: {value:.2f} ms")


if __name__ == "__main__":
    main()
