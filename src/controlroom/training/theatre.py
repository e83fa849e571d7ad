"""Trains the theatre's models, one stage at a time: ``python -m controlroom.training.theatre STAGE``.

Each stage is a recipe with its settings; `docs/theatre.md` says how the shipped weights were made with them. A stage
resumes where it was stopped; the weights it exports go to ``runs/theatre/STAGE/weights``, and ``assemble`` copies them,
halved, into the package's checkpoint. The order is autoencoder, clip, attribute_reader, keypoint_reader, unet, then the
controls' own models.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from controlroom.training.loop import train
from controlroom.training.recipe import Recipe
from controlroom.training.settings import TrainSettings

RUNS = Path("runs/theatre")
ASSETS = Path(__file__).resolve().parent.parent / "assets" / "theatre"


def _autoencoder() -> Recipe[Any]:
    from controlroom.training.recipes.theatre_autoencoder import TheatreAutoencoder

    return TheatreAutoencoder()


def _clip() -> Recipe[Any]:
    from controlroom.training.recipes.theatre_clip import TheatreClip

    return TheatreClip(RUNS / "tokenizer")


def _attribute_reader() -> Recipe[Any]:
    from controlroom.training.recipes.theatre_readers import TheatreAttributeReader

    return TheatreAttributeReader()


def _keypoint_reader() -> Recipe[Any]:
    from controlroom.training.recipes.theatre_readers import TheatreKeypointReader

    return TheatreKeypointReader()


def _unet() -> Recipe[Any]:
    from controlroom.training.recipes.theatre_unet import TheatreUNet

    return TheatreUNet(RUNS / "autoencoder/weights", RUNS / "clip/weights", RUNS / "latents")


def _trained_parts() -> tuple[Path, Path, Path]:
    """Folders of UNet, autoencoder and CLIP."""
    return RUNS / "unet/weights", RUNS / "autoencoder/weights", RUNS / "clip/weights"


def _appearance() -> Recipe[Any]:
    from controlroom.training.recipes.theatre_appearance import TheatreAppearance

    return TheatreAppearance(*_trained_parts(), RUNS / "latents")


def _pose() -> Recipe[Any]:
    from controlroom.training.recipes.theatre_pose_controlnet import TheatrePoseControlNet

    return TheatrePoseControlNet(*_trained_parts(), RUNS / "latents")


def _retarget() -> Recipe[Any]:
    from controlroom.training.recipes.theatre_pose_controlnet import TheatrePoseControlNet

    return TheatrePoseControlNet(
        *_trained_parts(),
        RUNS / "latents",
        controlnet_folder=RUNS / "pose/weights",
        appearance_folder=RUNS / "appearance/weights",
    )


def _ip_adapter() -> Recipe[Any]:
    from controlroom.training.recipes.theatre_ip_adapter import TheatreIPAdapter

    return TheatreIPAdapter(*_trained_parts(), RUNS / "latents")


STAGES: dict[str, tuple[Callable[[], Recipe[Any]], dict[str, Any]]] = {
    "autoencoder": (
        _autoencoder,
        {
            "batch_size": 8,
            "optimizer": "muon",
            "matrix_learning_rate": 0.012,
            "total_steps": 2700,
            "learning_rate": 6e-4,
            "schedule": "cosine",
            "final_fraction": 0.02,
            "warmup_steps": 100,
            "weight_decay": 0.0,
            "betas": (0.9, 0.99),
            "ema_decay": 0.995,
            "mixed_precision": "bf16",
            "validate_every": 500,
        },
    ),
    "clip": (
        _clip,
        {
            "batch_size": 128,
            "optimizer": "muon",
            "matrix_learning_rate": 0.01,
            "total_steps": 270,
            "learning_rate": 1e-3,
            "schedule": "cosine",
            "final_fraction": 0.02,
            "warmup_steps": 50,
            "weight_decay": 0.02,
            "betas": (0.9, 0.98),
            "ema_decay": 0.99,
            "mixed_precision": "bf16",
            "validate_every": 100,
        },
    ),
    "attribute_reader": (
        _attribute_reader,
        {
            "batch_size": 32,
            "optimizer": "muon",
            "matrix_learning_rate": 0.01,
            "total_steps": 1500,
            "learning_rate": 1e-3,
            "schedule": "cosine",
            "final_fraction": 0.02,
            "warmup_steps": 100,
            "weight_decay": 0.02,
            "ema_decay": 0.995,
            "mixed_precision": "bf16",
            "validate_every": 400,
        },
    ),
    "keypoint_reader": (
        _keypoint_reader,
        {
            "batch_size": 32,
            "optimizer": "muon",
            "matrix_learning_rate": 0.01,
            "total_steps": 1500,
            "learning_rate": 1e-3,
            "schedule": "cosine",
            "final_fraction": 0.02,
            "warmup_steps": 100,
            "weight_decay": 0.02,
            "ema_decay": 0.995,
            "mixed_precision": "bf16",
            "validate_every": 400,
        },
    ),
    "unet": (
        _unet,
        {
            "batch_size": 32,
            "total_samples": 1_000_000,
            "optimizer": "muon",
            "matrix_learning_rate": 0.01,
            "learning_rate": 8e-4,
            "schedule": "constant",
            "warmup_steps": 100,
            "weight_decay": 0.01,
            "betas": (0.9, 0.99),
            "ema_decay": 0.998,
            "mixed_precision": "bf16",
            "export_with_checkpoint": True,
        },
    ),
    "appearance": (
        _appearance,
        {
            "batch_size": 32,
            "total_samples": 300_000,
            "learning_rate": 3e-4,
            "schedule": "constant",
            "warmup_steps": 200,
            "weight_decay": 0.01,
            "betas": (0.9, 0.99),
            "ema_decay": 0.999,
            "mixed_precision": "bf16",
            "validate_every": 500,
        },
    ),
    "pose": (
        _pose,
        {
            "batch_size": 32,
            "total_samples": 200_000,
            "learning_rate": 5e-4,
            "schedule": "constant",
            "warmup_steps": 200,
            "weight_decay": 0.01,
            "betas": (0.9, 0.99),
            "ema_decay": 0.999,
            "mixed_precision": "bf16",
            "validate_every": 500,
        },
    ),
    "retarget": (
        _retarget,
        {
            "batch_size": 32,
            "total_samples": 200_000,
            "learning_rate": 2e-4,
            "schedule": "cosine",
            "warmup_steps": 100,
            "weight_decay": 0.01,
            "betas": (0.9, 0.99),
            "ema_decay": 0.999,
            "mixed_precision": "bf16",
            "validate_every": 500,
        },
    ),
    "ip_adapter": (
        _ip_adapter,
        {
            "batch_size": 32,
            "total_samples": 200_000,
            "learning_rate": 5e-4,
            "schedule": "constant",
            "warmup_steps": 200,
            "weight_decay": 0.01,
            "betas": (0.9, 0.99),
            "ema_decay": 0.999,
            "mixed_precision": "bf16",
            "validate_every": 500,
        },
    ),
}


def main() -> None:
    """Train the stage named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*sorted(STAGES), "assemble"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=None, help="stop after so long, with a checkpoint")
    parser.add_argument("--steps", type=int, default=None, help="instead of the stage's number of steps")
    parser.add_argument("--start-from", type=Path, default=None, help="exported weights to continue from")
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.stage == "assemble":
        from controlroom.training.assemble import assemble

        for path in assemble(RUNS, ASSETS):
            print(path)
        return
    make, values = STAGES[arguments.stage]
    values = dict(values)
    if arguments.steps is not None:
        values.pop("total_samples", None)
        values["total_steps"] = arguments.steps
    settings = TrainSettings(
        output_dir=arguments.output or RUNS / arguments.stage,
        threads=arguments.threads,
        stop_after_seconds=None if arguments.minutes is None else arguments.minutes * 60,
        start_from=arguments.start_from,
        prefetch=True,
        **values,
    )
    train(make(), settings)


if __name__ == "__main__":
    main()
