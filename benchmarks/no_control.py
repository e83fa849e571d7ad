"""A run without controls against diffusers' own pipeline: ``python -m benchmarks.no_control``.

The same components, prompt, noise and steps; interleaved pairs; the median of their ratios (at most 1.03 is asked for).
"""

from __future__ import annotations

import argparse

import torch

import controlroom as cr
from benchmarks import models, timing

PROMPT = "a cat with a red hat on the beach"


def measure(name: str, pairs: int, steps: int) -> str:
    """The line of one model."""
    theirs = models.pipeline(name)
    ours = cr.Pipeline.from_diffusers(theirs)
    size = models.pixels(name)

    def run(pipe: object, output: str = "pil") -> torch.Tensor:
        return pipe(  # type: ignore[operator]
            PROMPT,
            height=size,
            width=size,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(1),
            output_type=output,
        ).images

    gap = float((run(ours, "latent") - run(theirs, "latent")).abs().max())
    found = timing.compare(lambda: run(ours), lambda: run(theirs), pairs)
    return timing.row(f"{name}, {size} px, {steps} steps", "StableDiffusionPipeline", found, gap)


def main() -> None:
    """Time what was asked for and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=models.NAMES, default=["theatre", "sd15"])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=None, help="default: 20, and 4 for sd15")
    parser.add_argument("--quick", action="store_true", help="only the miniature, to see that it runs")
    options = parser.parse_args()
    chosen = ["tiny"] if options.quick else options.models
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n\n{timing.HEADER}", flush=True)
    for name in chosen:
        if not models.available(name):
            print(f"| {name} | – | not in this installation | | | | | |", flush=True)
            continue
        print(measure(name, options.pairs, options.steps or (4 if name == "sd15" else 20)), flush=True)


if __name__ == "__main__":
    main()
