"""UNIMO-G's stages on the theatre: captions of its scenes, then puppets and props known from other scenes.

The theatre knows where everything is, so the truth takes the place of detector and segmenter: every second entity is
cut out of its other scene, the others are shown with it, so that both sorts of pictures serve as prompts. Loss weighted
by min(SNR, 5) / SNR (arXiv 2303.09556), as all of the theatre's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from controlroom.backbones.kosmos import load_kosmos
from controlroom.backbones.unimo import load_unimo
from controlroom.data.entities import cut_from_target, cut_out_of
from controlroom.data.groups import Group
from controlroom.data.theatre.groups import theatre_groups, theatre_subjects
from controlroom.data.theatre.scene import Dice, Split
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.objective import ObjectiveSettings
from controlroom.training.recipes.theatre_kosmos import captioned_scene
from controlroom.training.recipes.unimo_g import UnimoGRecipe, UnimoGSettings, UnimoTextRecipe, UnimoTextSettings

_OBJECTIVE = ObjectiveSettings(min_snr_gamma=5.0)


def theatre_unimo_text(
    pipe: Pipeline, language: Path, scenes: int = 12_000, cache_folder: Path | None = None
) -> UnimoTextRecipe:
    """Stage 1 on so many pictures: half are any scenes, half are those of stage 2 with their short captions.

    Args:
        pipe: the theatre's model.
        language: what `kosmos_language` exported.
        scenes: that are drawn.
        cache_folder: where latents are kept; None: in memory.
    """
    held_out = [group.picture for group in _groups(32, "held_out")]
    groups = _groups(scenes - scenes // 2)
    pictures = [*map(captioned_scene, range(scenes // 2)), *(group.picture for group in groups)]
    reader, settings = load_kosmos(language, pipe.backbone), UnimoTextSettings(objective=_OBJECTIVE)
    return UnimoTextRecipe(pipe, reader, pictures, settings, held_out, cache_folder)


def theatre_unimo_g(
    pipe: Pipeline, start: Path, groups: int = 6_000, cache_folder: Path | None = None, from_target: bool = False
) -> UnimoGRecipe:
    """Stage 2: half of the pictures show one entity, half two.

    Args:
        pipe: the theatre's model.
        start: what stage 1 exported.
        groups: pictures.
        cache_folder: where latents and states are kept; None: in memory.
        from_target: cut all entities out of the very picture, as published, and not out of another scene.
    """
    shown = known_from(_groups(groups), from_target)
    unseen = known_from(_groups(32, "held_out"))
    settings = UnimoGSettings(objective=_OBJECTIVE, same_picture=from_target)
    return UnimoGRecipe(pipe, load_unimo(start, pipe.backbone), shown, settings, unseen, cache_folder)


def known_from(groups: Sequence[Group], from_target: bool = False) -> tuple[Group, ...]:
    """Groups whose entities are known from cut-outs: every second one of another scene, or all of the target."""
    if from_target:
        return tuple(map(cut_from_target, groups))
    found = []
    for group in groups:
        dice = Dice("unimo", group.picture.name)
        subjects = (replace(s, picture=cut_out_of(s.picture)) if dice.chance(0.5) else s for s in group.subjects)
        found.append(replace(group, subjects=tuple(subjects)))
    return tuple(found)


def _groups(count: int, split: Split = "train") -> tuple[Group, ...]:
    """Half of one subject, half of two."""
    return (*theatre_subjects(count // 2, split), *theatre_groups(count - count // 2, split))
