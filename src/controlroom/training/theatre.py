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
from typing import TYPE_CHECKING, Any, Literal

from controlroom.backbones.controlnet import CONDITION_KINDS
from controlroom.core.memory import keep_freed_memory
from controlroom.training.loop import train
from controlroom.training.recipe import Recipe
from controlroom.training.settings import TrainSettings

if TYPE_CHECKING:
    from controlroom.training.recipes.theatre_pose_controlnet import Learns

RUNS = Path("runs/theatre")
SCENES = 25_600
"""Scenes whose latents the UNet learns from, again and again with other captions."""
PAIRS = 8_000
"""Pairs of one puppet in two poses."""
ASSETS = Path(__file__).resolve().parent.parent / "assets" / "theatre"


def _autoencoder() -> Recipe[Any]:
    from controlroom.training.recipes.theatre_autoencoder import TheatreAutoencoder

    return TheatreAutoencoder()


def _clip() -> Recipe[Any]:
    from controlroom.training.recipes.theatre_clip import TheatreClip

    return TheatreClip(RUNS / "tokenizer")


def _attribute_reader() -> Recipe[Any]:
    from controlroom.training.recipes.theatre_readers import TheatreAttributeReader

    return TheatreAttributeReader(RUNS / "autoencoder/weights")


def _keypoint_reader() -> Recipe[Any]:
    from controlroom.training.recipes.theatre_readers import TheatreKeypointReader

    return TheatreKeypointReader()


def _dense_reader() -> Recipe[Any]:
    from controlroom.training.recipes.theatre_dense_reader import TheatreDenseReader

    return TheatreDenseReader(RUNS / "autoencoder/weights")


def _unet() -> Recipe[Any]:
    from controlroom.training.recipes.theatre_unet import TheatreUNet

    return TheatreUNet(RUNS / "autoencoder/weights", RUNS / "clip/weights", RUNS / "latents", scenes=SCENES)


def _trained_parts() -> tuple[Path, Path, Path]:
    """Folders of UNet, autoencoder and CLIP."""
    return RUNS / "unet/weights", RUNS / "autoencoder/weights", RUNS / "clip/weights"


def _appearance() -> Recipe[Any]:
    from controlroom.training.recipes.theatre_appearance import TheatreAppearance

    return TheatreAppearance(*_trained_parts(), RUNS / "latents", pairs=PAIRS)


def _pose() -> Recipe[Any]:
    from controlroom.training.recipes.theatre_pose_controlnet import TheatrePoseControlNet

    return TheatrePoseControlNet(*_trained_parts(), RUNS / "latents", pairs=PAIRS)


def _retarget(learns: Learns) -> Recipe[Any]:
    from controlroom.training.recipes.theatre_pose_controlnet import TheatrePoseControlNet

    pose, appearance = RUNS / "pose/weights", RUNS / "appearance/weights"
    if learns == "appearance":  # the writer alone goes on where the joint stage ended
        pose, appearance = RUNS / "retarget/weights/pose", RUNS / "retarget/weights/appearance"
    return TheatrePoseControlNet(
        *_trained_parts(),
        RUNS / "latents",
        pairs=PAIRS,
        controlnet_folder=pose,
        appearance_folder=appearance,
        learns=learns,
    )


def _controlnet(kind: str) -> Recipe[Any]:
    from controlroom.training.recipes.theatre_controlnet import TheatreControlNet

    return TheatreControlNet(*_trained_parts(), RUNS / "latents", kind, SCENES)


def _t2i_adapter(kind: str) -> Recipe[Any]:
    from controlroom.training.recipes.theatre_t2i_adapter import TheatreT2IAdapter

    return TheatreT2IAdapter(*_trained_parts(), RUNS / "latents", kind, SCENES)


def _uni(part: Literal["local", "global"]) -> Recipe[Any]:
    from controlroom.training.recipes.theatre_uni_controlnet import TheatreUniControlNet

    return TheatreUniControlNet(*_trained_parts(), RUNS / "latents", part, SCENES)


def _ip_adapter() -> Recipe[Any]:
    from controlroom.training.recipes.theatre_ip_adapter import TheatreIPAdapter

    return TheatreIPAdapter(*_trained_parts(), RUNS / "latents", pairs=PAIRS)


def _ip_adapter_multi(aggregate: Any) -> Recipe[Any]:
    from controlroom.training.recipes.theatre_ip_adapter_multi import theatre_ip_adapter_multi

    return theatre_ip_adapter_multi(*_trained_parts(), RUNS / "ip_adapter/weights", aggregate)


def _grouped(kind: Literal["ms_diffusion", "blip_subject"]) -> Recipe[Any]:
    from controlroom.data.theatre.groups import theatre_groups, theatre_subjects
    from controlroom.sampling.pipeline import Pipeline
    from controlroom.training.clip_vision import image_encoder_of
    from controlroom.training.objective import ObjectiveSettings
    from controlroom.training.recipes.blip_subject import BLIPSubjectRecipe, BLIPSubjectSettings
    from controlroom.training.recipes.ms_diffusion import MSDiffusionRecipe, MSDiffusionSettings

    pipe, encoder = Pipeline.from_pretrained("theatre"), image_encoder_of(RUNS / "clip/weights")
    objective, cache = ObjectiveSettings(min_snr_gamma=5.0), RUNS / "latents"
    if kind == "ms_diffusion":
        groups, held_out = theatre_groups(PAIRS), theatre_groups(16, "held_out")
        return MSDiffusionRecipe(pipe, encoder, groups, MSDiffusionSettings(objective=objective), held_out, cache)
    groups, held_out = theatre_subjects(PAIRS), theatre_subjects(16, "held_out")
    return BLIPSubjectRecipe(pipe, encoder, groups, BLIPSubjectSettings(objective=objective), held_out, cache)


def _faces(kind: Literal["instant_id", "photomaker"]) -> Recipe[Any]:
    from controlroom.training.recipes.theatre_faces import theatre_instant_id, theatre_photomaker
    from controlroom.training.recipes.theatre_ip_adapter_multi import theatre_pipeline

    unet, vae, clip = _trained_parts()
    make = theatre_instant_id if kind == "instant_id" else theatre_photomaker
    return make(theatre_pipeline(unet, vae, clip), clip)


def _kosmos(stage: Literal["language", "align", "instruct"]) -> Recipe[Any]:
    from controlroom.training.recipes import theatre_kosmos as kosmos
    from controlroom.training.recipes.theatre_ip_adapter_multi import theatre_pipeline

    pipe = theatre_pipeline(*_trained_parts())
    if stage == "language":
        return kosmos.theatre_kosmos_language(pipe, _trained_parts()[2])
    if stage == "align":
        return kosmos.theatre_kosmos_align(pipe, RUNS / "kosmos_language/weights")
    return kosmos.theatre_kosmos_g(pipe, RUNS / "kosmos_align/weights", cache_folder=RUNS / "latents")


def _unimo(stage: Literal["text", "instruct"]) -> Recipe[Any]:
    from controlroom.training.recipes import theatre_unimo as unimo
    from controlroom.training.recipes.theatre_ip_adapter_multi import theatre_pipeline

    pipe = theatre_pipeline(*_trained_parts())
    if stage == "text":
        return unimo.theatre_unimo_text(pipe, RUNS / "kosmos_language/weights", cache_folder=RUNS / "latents")
    return unimo.theatre_unimo_g(pipe, RUNS / "unimo_text/weights", cache_folder=RUNS / "latents")


def _instruct_pix2pix() -> Recipe[Any]:
    from controlroom.training.recipes.theatre_instruct_pix2pix import TheatreInstructPix2Pix

    return TheatreInstructPix2Pix(*_trained_parts(), RUNS / "latents", edits=PAIRS)


def _inpaint() -> Recipe[Any]:
    from controlroom.training.recipes.theatre_inpaint import TheatreInpaint

    return TheatreInpaint(*_trained_parts(), RUNS / "latents", scenes=SCENES)


def _depth2img() -> Recipe[Any]:
    from controlroom.training.recipes.theatre_depth2img import TheatreDepth2Img

    return TheatreDepth2Img(*_trained_parts(), RUNS / "latents", scenes=SCENES)


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
        _autoencoder,
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
        _clip,
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
    "attribute_reader": (_attribute_reader, _READER),
    "keypoint_reader": (_keypoint_reader, _READER),
    "dense_reader": (_dense_reader, _READER | {"batch_size": 16}),
    "unet": (
        _unet,
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
        _unet,
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
        _appearance,
        _CONTROL | {"total_samples": 300_000, "matrix_learning_rate": 0.004, "learning_rate": 4e-4},
    ),
    "pose": (_pose, _CONTROL | {"total_samples": 200_000, "matrix_learning_rate": 0.006, "learning_rate": 6e-4}),
    # Both networks ship; beside an appearance module that stays, the ControlNet or only its ends are compared with it.
    **{
        name: (
            partial(_retarget, learns),
            _CONTROL | {"total_samples": samples, "matrix_learning_rate": 0.004, "learning_rate": 4e-4},
        )
        for name, learns, samples in _RETARGET
    },
    # One network for all kinds of condition ships; those for one kind each are what it is measured against.
    **{
        f"controlnet_{kind}": (
            partial(_controlnet, kind),
            _CONTROL | {"total_samples": samples, "matrix_learning_rate": 0.006, "learning_rate": 6e-4},
        )
        for kind, samples in (("multi", 400_000), *((kind, 200_000) for kind in CONDITION_KINDS))
    },
    **{
        f"t2i_adapter_{kind}": (
            partial(_t2i_adapter, kind),
            _CONTROL | {"total_samples": 200_000, "matrix_learning_rate": 0.006, "learning_rate": 6e-4},
        )
        for kind in CONDITION_KINDS
    },
    "uni_local": (
        partial(_uni, "local"),
        _CONTROL | {"total_samples": 400_000, "matrix_learning_rate": 0.006, "learning_rate": 6e-4},
    ),
    "uni_global": (
        partial(_uni, "global"),
        _CONTROL | {"total_samples": 200_000, "matrix_learning_rate": 0.006, "learning_rate": 6e-4},
    ),
    "ip_adapter": (
        _ip_adapter,
        _CONTROL | {"total_samples": 200_000, "matrix_learning_rate": 0.006, "learning_rate": 6e-4},
    ),
    # Attention between pictures of one person, and the same further training for the other ways.
    **{
        f"ip_adapter_{name}": (
            partial(_ip_adapter_multi, aggregate),
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
        partial(_grouped, "ms_diffusion"),
        _CONTROL | {"total_samples": 100_000, "matrix_learning_rate": 0.006, "learning_rate": 6e-4},
    ),
    "blip_subject": (
        partial(_grouped, "blip_subject"),
        _CONTROL | {"total_samples": 60_000, "matrix_learning_rate": 0.006, "learning_rate": 6e-4},
    ),
    "instant_id": (
        partial(_faces, "instant_id"),
        _CONTROL | {"batch_size": 16, "total_samples": 64_000, "matrix_learning_rate": 0.002, "learning_rate": 2e-4},
    ),
    "photomaker": (
        partial(_faces, "photomaker"),
        _CONTROL | {"batch_size": 16, "total_samples": 48_000, "matrix_learning_rate": 0.003, "learning_rate": 3e-4},
    ),
    "kosmos_language": (
        partial(_kosmos, "language"),
        _CONTROL
        | {"validate_every": None, "total_samples": 48_000, "matrix_learning_rate": 0.01, "learning_rate": 1e-3},
    ),
    "kosmos_align": (
        partial(_kosmos, "align"),
        _CONTROL
        | {"validate_every": None, "total_samples": 64_000, "matrix_learning_rate": 0.01, "learning_rate": 1e-3},
    ),
    "kosmos_g": (
        partial(_kosmos, "instruct"),
        _CONTROL
        | {"total_samples": 32_000, "matrix_learning_rate": 0.003, "learning_rate": 3e-4, "validate_every": 500},
    ),
    "unimo_text": (
        partial(_unimo, "text"),
        _CONTROL
        | {"total_samples": 64_000, "matrix_learning_rate": 0.006, "learning_rate": 6e-4, "validate_every": 500},
    ),
    "unimo_g": (
        partial(_unimo, "instruct"),
        _CONTROL
        | {"total_samples": 48_000, "matrix_learning_rate": 0.003, "learning_rate": 3e-4, "validate_every": 500},
    ),
    "inpaint": (
        _inpaint,
        _CONTROL | {"total_samples": 200_000, "matrix_learning_rate": 0.003, "learning_rate": 3e-4},
    ),
    "depth2img": (
        _depth2img,
        _CONTROL | {"total_samples": 150_000, "matrix_learning_rate": 0.003, "learning_rate": 3e-4},
    ),
    "instruct_pix2pix": (
        _instruct_pix2pix,
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

        for path in assemble(RUNS, ASSETS):
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
        output_dir=arguments.output or RUNS / arguments.stage,
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
