"""Each control against the diffusers pipeline of its method: ``python -m benchmarks.controls``.

The same components, auxiliary networks, prompt, noise and steps; interleaved pairs; the median of their ratios (at most
1.03 is asked for). Prompt-to-Prompt and AppearanceControl have no pipeline there: they are timed against a run without
controls, beside the number of UNet rows, which says what to expect.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

import controlroom as cr
from benchmarks import models, timing
from benchmarks.bench import Bench, Pair
from benchmarks.peers import PARITY
from controlroom.catalog import control_class
from tests.tiny import tiny_unet

SOURCE = "a cat and a frog on the beach"


def prompt_to_prompt(bench: Bench) -> Any:
    return control_class("prompt_to_prompt")(source=SOURCE)


def appearance_control(bench: Bench) -> Any:
    model = tiny_unet(seed=1) if bench.name == "tiny" else bench.source.unet
    return control_class("appearance_control")(image=bench.picture, model=model)


ALONE: dict[str, Callable[[Bench], Any]] = {
    "prompt_to_prompt": prompt_to_prompt,
    "appearance_control": appearance_control,
}
"""Controls without a pipeline in diffusers, by type."""


def main() -> None:
    """Time what was asked for and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=models.NAMES, default=["theatre", "sd15"])
    names = [*PARITY, *ALONE]
    parser.add_argument("--controls", nargs="+", choices=names, default=names, metavar="TYPE", help="default: all")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=None, help="default: 20; 4 for sd15 and the miniature")
    parser.add_argument("--quick", action="store_true", help="only the miniature and five pairs, to see that it runs")
    options = parser.parse_args()
    pairs = 5 if options.quick else options.pairs
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n\n{timing.HEADER}", flush=True)
    for name in ["tiny"] if options.quick else options.models:
        if not models.available(name):
            print(f"| {name} | – | not in this installation | | | | | |", flush=True)
            continue
        bench = Bench(name, options.steps or (20 if name == "theatre" else 4))
        for key, prepare in PARITY.items():
            if key in options.controls:
                print(against_diffusers(bench, key, prepare, pairs), flush=True)
        for key, make in ALONE.items():
            if key in options.controls:
                print(against_none(bench, key, make, pairs), flush=True)


def against_diffusers(bench: Bench, key: str, prepare: Callable[[Bench], Pair], pairs: int) -> str:
    try:
        title, ours, theirs = prepare(bench)
    except cr.ControlRoomError as error:
        return f"| {key} | – | {error} | | | | | |"
    gap = float((ours("latent") - theirs("latent")).abs().max())
    return timing.row(f"{title}, {bench.name}", "its diffusers pipeline", timing.compare(ours, theirs, pairs), gap)


def against_none(bench: Bench, key: str, make: Callable[[Bench], Any], pairs: int) -> str:
    try:
        control = make(bench)
    except cr.ControlRoomError as error:
        return f"| {key} | – | {error} | | | | | |"
    found = timing.compare(bench.controlled(control), bench.plain, pairs)
    rows = bench.rows(control)
    plain = 2 * bench.steps
    return timing.row(f"{key}, {bench.name}", f"no control ({rows} rows for {plain})", found)


if __name__ == "__main__":
    main()
