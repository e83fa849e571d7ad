"""KOSMOS-G's stages on the theatre: captions of its scenes, then puppets and props known from other scenes.

The third stage sees one subject whose caption says nothing of its looks, and companies of two, half of whose captions
do. Loss weighted by min(SNR, 5) / SNR (arXiv 2303.09556), as all of the theatre's.
"""

from __future__ import annotations

from pathlib import Path

from controlroom.backbones.kosmos import load_kosmos
from controlroom.data.pictures import Picture
from controlroom.data.theatre import vocabulary as v
from controlroom.data.theatre.captions import training_caption
from controlroom.data.theatre.groups import theatre_groups, theatre_subjects
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import CANVAS, Dice, Scene, sample_scene
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.clip_vision import image_encoder_of
from controlroom.training.objective import ObjectiveSettings
from controlroom.training.recipes.kosmos_g import (
    KosmosAlignRecipe,
    KosmosGRecipe,
    KosmosGSettings,
    KosmosLanguageRecipe,
    KosmosLanguageSettings,
)

SIZES = KosmosLanguageSettings(
    width=192, layers=4, heads=4, image_tokens=16, length=192, aligner_layers=2, aligner_heads=4
)


def theatre_kosmos_language(
    pipe: Pipeline, clip_folder: Path, scenes: int = 6_000, settings: KosmosLanguageSettings = SIZES
) -> KosmosLanguageRecipe:
    """Stage 1 on so many scenes.

    Args:
        pipe: the theatre's model.
        clip_folder: of the theatre's CLIP.
        scenes: that are drawn, each with one caption; their states take 50 kilobytes each.
        settings: sizes.
    """
    pictures = [captioned_scene(seed) for seed in range(scenes)]
    return KosmosLanguageRecipe(pipe, image_encoder_of(clip_folder), pictures, settings)


def theatre_kosmos_align(pipe: Pipeline, start: Path, captions: int = 20_000) -> KosmosAlignRecipe:
    """Stage 2 on so many captions, half of them the short ones of stage 3.

    Args:
        pipe: the theatre's model.
        start: what stage 1 exported.
        captions: of scenes; none is drawn.
    """
    texts = [_caption(seed, sample_scene(seed)) for seed in range(captions // 2)]
    quarter = captions // 4
    groups = (*theatre_groups(captions - len(texts) - quarter), *theatre_subjects(quarter))
    texts += [group.picture.caption for group in groups]
    return KosmosAlignRecipe(pipe, load_kosmos(start, pipe.backbone), texts)


def theatre_kosmos_g(
    pipe: Pipeline, start: Path, groups: int = 6_000, cache_folder: Path | None = None
) -> KosmosGRecipe:
    """Stage 3: half of the pictures show one subject, half two.

    Args:
        pipe: the theatre's model.
        start: what stage 2 exported.
        groups: pictures.
        cache_folder: where latents and states are kept; None: in memory.
    """
    shown = (*theatre_subjects(groups // 2), *theatre_groups(groups - groups // 2))
    unseen = (*theatre_subjects(16, "held_out"), *theatre_groups(16, "held_out"))
    settings = KosmosGSettings(objective=ObjectiveSettings(min_snr_gamma=5.0))
    return KosmosGRecipe(pipe, load_kosmos(start, pipe.backbone), shown, settings, unseen, cache_folder)


def _caption(seed: int, scene: Scene) -> str:
    return training_caption(scene, Dice("kosmos", seed))


def captioned_scene(seed: int) -> Picture:
    """A scene with a caption, that of its seed."""
    scene, name, size = sample_scene(seed), f"kosmos {seed}", (CANVAS, CANVAS)
    return Picture(name, f"{v.WORLD_VERSION} {name}", size, lambda: render(scene), _caption(seed, scene))
