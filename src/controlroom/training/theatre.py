"""Trains the theatre's models, one stage at a time: ``python -m controlroom.training.theatre STAGE``.

Each stage is a recipe with its settings; `docs/theatre.md` says how the shipped weights were made with them. A stage
resumes where it was stopped; the weights it exports go to ``runs/theatre/STAGE/weights``, and ``assemble`` copies them,
halved, into the package's checkpoint. The order is autoencoder, clip, attribute_reader, keypoint_reader, unet, then the
controls' own models.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlroom.backbones.controlnet import CONDITION_KINDS
from controlroom.core.memory import keep_freed_memory
from controlroom.training import theatre_makers as makers
from controlroom.training.loop import train
from controlroom.training.recipe import Recipe
from controlroom.training.settings import TrainSettings

if TYPE_CHECKING:
    from controlroom.training.recipes.theatre_pose_controlnet import Learns

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "theatre"
_RETARGET: tuple[tuple[str, Learns, int], ...] = (
    ("retarget", "both", 200_000),
    ("retarget_appearance", "appearance", 100_000),
    ("retarget_pose", "pose", 100_000),
    ("retarget_pose_blocks", "pose_blocks", 100_000),
)
#: What the stages share; each says what it has of its own.
_COMMON: dict[str, Any] = {
    "batch_size": 32,
    "optimizer": "muon",
    "schedule": "constant",
    "warmup_steps": 50,
    "weight_decay": 0.01,
    "betas": (0.9, 0.99),
    "mixed_precision": "auto",
    "channels_last": True,
}
_READER: dict[str, Any] = _COMMON | {
    "matrix_learning_rate": 0.01,
    "total_steps": 1500,
    "learning_rate": 1e-3,
    "schedule": "cosine",
    "final_fraction": 0.02,
    "warmup_steps": 100,
    "weight_decay": 0.02,
    "betas": (0.9, 0.999),
    "ema_decay": 0.995,
    "validate_every": 400,
}
_CONTROL: dict[str, Any] = _COMMON | {"ema_decay": 0.995, "validate_every": 200, "export_with_checkpoint": True}

STAGES: dict[str, tuple[Callable[[], Recipe[Any]], dict[str, Any]]] = {
    "autoencoder": (
        makers.autoencoder,
        _COMMON
        | {
            "batch_size": 8,
            "matrix_learning_rate": 0.012,
            "total_steps": 2700,
            "learning_rate": 6e-4,
            "schedule": "cosine",
            "final_fraction": 0.02,
            "warmup_steps": 100,
            "weight_decay": 0.0,
            "ema_decay": 0.995,
            "validate_every": 500,
        },
    ),
    "clip": (
        makers.clip,
        _COMMON
        | {
            "batch_size": 128,
            "matrix_learning_rate": 0.01,
            "total_steps": 270,
            "learning_rate": 1e-3,
            "schedule": "cosine",
            "final_fraction": 0.02,
            "weight_decay": 0.02,
            "betas": (0.9, 0.98),
            "ema_decay": 0.99,
            "validate_every": 100,
        },
    ),
    "attribute_reader": (makers.attribute_reader, _READER),
    "keypoint_reader": (makers.keypoint_reader, _READER),
    "dense_reader": (makers.dense_reader, _READER | {"batch_size": 16}),
    "unet": (
        makers.unet,
        _COMMON
        | {
            "total_samples": 1_000_000,
            "matrix_learning_rate": 0.01,
            "learning_rate": 8e-4,
            "warmup_steps": 100,
            "ema_decay": 0.998,
            "export_with_checkpoint": True,
        },
    ),
    # The last leg, from what `unet` made (--start-from): the rate falls to nothing, which settles the weights.
    "unet_end": (
        makers.unet,
        _COMMON
        | {
            "total_samples": 144_000,
            "matrix_learning_rate": 0.01,
            "learning_rate": 8e-4,
            "schedule": "linear",
            "ema_decay": 0.995,
            "export_with_checkpoint": True,
        },
    ),
    "appearance": (
        makers.appearance,
        _CONTROL | {"total_samples": 300_000, "matrix_learning_rate": 0.004, "learning_rate": 4e-4},
    ),
    "pose": (makers.pose, _CONTROL | {"total_samples": 200_000, "matrix_learning_rate": 0.006, "learning_rate": 6e-4}),
    # Both networks ship; beside an appearance module that stays, the ControlNet or only its ends are compared with it.
    **{
        name: (
            partial(makers.retarget, learns),
            _CONTROL | {"total_samples": samples, "matrix_learning_rate": 0.004, "learning_rate": 4e-4},
        )
        for name, learns, samples in _RETARGET
    },
    # One network for all kinds of condition ships; those for one kind each are what it is measured against.
    **{
        f"controlnet_{kind}": (
            partial(makers.controlnet, kind),
            _CONTROL | {"total_samples": samples, "matrix_learning_rate": 0.006, "learning_rate": 6e-4},
        )
        for kind, samples in (("multi", 400_000), *((kind, 200_000) for kind in CONDITION_KINDS))
    },
    **{
        f"t2i_adapter_{kind}": (
            partial(makers.t2i_adapter, kind),
            _CONTROL | {"total_samples": 200_000, "matrix_learning_rate": 0.006, "learning_rate": 6e-4},
        )
        for kind in CONDITION_KINDS
    },
    "uni_local": (
        partial(makers.uni, "local"),
        _CONTROL | {"total_samples": 400_000, "matrix_learning_rate": 0.006, "learning_rate": 6e-4},
    ),
    "uni_global": (
        partial(makers.uni, "global"),
        _CONTROL | {"total_samples": 200_000, "matrix_learning_rate": 0.006, "learning_rate": 6e-4},
    ),
    "ip_adapter": (
        makers.ip_adapter,
        _CONTROL | {"total_samples": 200_000, "matrix_learning_rate": 0.006, "learning_rate": 6e-4},
    ),
    # Attention between pictures of one person, and the same further training for the other ways.
    **{
        f"ip_adapter_{name}": (
            partial(makers.ip_adapter_multi, aggregate),
            _CONTROL | {"total_samples": 16_000, "matrix_learning_rate": 0.003, "learning_rate": 3e-4},
        )
        for name, aggregate in (
            ("attention", "attention"),
            ("single", "tokens"),
            ("max", "max"),
            ("average", "average"),
        )
    },
    "ms_diffusion": (
        partial(makers.grouped, "ms_diffusion"),
        _CONTROL | {"total_samples": 100_000, "matrix_learning_rate": 0.006, "learning_rate": 6e-4},
    ),
    "blip_subject": (
        partial(makers.grouped, "blip_subject"),
        _CONTROL | {"total_samples": 60_000, "matrix_learning_rate": 0.006, "learning_rate": 6e-4},
    ),
    "instant_id": (
        partial(makers.faces, "instant_id"),
        _CONTROL | {"batch_size": 16, "total_samples": 64_000, "matrix_learning_rate": 0.002, "learning_rate": 2e-4},
    ),
    "photomaker": (
        partial(makers.faces, "photomaker"),
        _CONTROL | {"batch_size": 16, "total_samples": 48_000, "matrix_learning_rate": 0.003, "learning_rate": 3e-4},
    ),
    "kosmos_language": (
        partial(makers.kosmos, "language"),
        _CONTROL
        | {"validate_every": None, "total_samples": 48_000, "matrix_learning_rate": 0.01, "learning_rate": 1e-3},
    ),
    "kosmos_align": (
        partial(makers.kosmos, "align"),
        _CONTROL
        | {"validate_every": None, "total_samples": 64_000, "matrix_learning_rate": 0.01, "learning_rate": 1e-3},
    ),
    "kosmos_g": (
        partial(makers.kosmos, "instruct"),
        _CONTROL
        | {"total_samples": 32_000, "matrix_learning_rate": 0.003, "learning_rate": 3e-4, "validate_every": 500},
    ),
    "unimo_text": (
        partial(makers.unimo, "text"),
        _CONTROL
        | {"total_samples": 64_000, "matrix_learning_rate": 0.006, "learning_rate": 6e-4, "validate_every": 500},
    ),
    "unimo_g": (
        partial(makers.unimo, "instruct"),
        _CONTROL
        | {"total_samples": 48_000, "matrix_learning_rate": 0.003, "learning_rate": 3e-4, "validate_every": 500},
    ),
    "inpaint": (
        makers.inpaint,
        _CONTROL | {"total_samples": 200_000, "matrix_learning_rate": 0.003, "learning_rate": 3e-4},
    ),
    "depth2img": (
        makers.depth2img,
        _CONTROL | {"total_samples": 150_000, "matrix_learning_rate": 0.003, "learning_rate": 3e-4},
    ),
    "instruct_pix2pix": (
        makers.instruct_pix2pix,
        _CONTROL | {"total_samples": 200_000, "matrix_learning_rate": 0.003, "learning_rate": 3e-4},
    ),
}


def main() -> None:
    """Train the stage named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*sorted(STAGES), "assemble"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps")
    parser.add_argument("--minutes", type=float, default=None, help="stop after so long, with a checkpoint")
    parser.add_argument("--steps", type=int, default=None, help="instead of the stage's number of steps")
    parser.add_argument("--schedule", choices=("constant", "linear"), help="linear: the rate falls to nothing")
    parser.add_argument("--start-from", type=Path, default=None, help="exported weights to continue from")
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.stage == "assemble":
        from controlroom.training.assemble import assemble

        for path in assemble(makers.RUNS, ASSETS):
            print(path)
        return
    make, values = STAGES[arguments.stage]
    values = dict(values)
    if arguments.steps is not None:
        values.pop("total_samples", None)
        values["total_steps"] = arguments.steps
    if arguments.schedule is not None:
        values["schedule"] = arguments.schedule
    settings = TrainSettings(
        output_dir=arguments.output or makers.RUNS / arguments.stage,
        threads=arguments.threads,
        device=arguments.device,
        stop_after_seconds=None if arguments.minutes is None else arguments.minutes * 60,
        start_from=arguments.start_from,
        prefetch=True,
        **values,
    )
    keep_freed_memory()
    train(make(), settings)


if __name__ == "__main__":
    main()
