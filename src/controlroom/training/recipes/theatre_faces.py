"""The theatre's InstantID and PhotoMaker: heads of its LFW, read by the theatre's CLIP.

Faces are where the ground truth has them; the vector of a face is the CLIP's feature of the head that is cut out there,
of another picture of the person. Captions say what a person does and where, and nothing of their looks. Deviations from
the published training: words and faces are left out of one sample in ten each, so that guidance keeps its meaning with
so small a model; loss weighted by min(SNR, 5) / SNR (arXiv 2303.09556), as all of the theatre's.
"""

from __future__ import annotations

from pathlib import Path

from controlroom.data.theatre.faces import points_of_people
from controlroom.data.theatre.people import people as people_of
from controlroom.data.theatre.people import theatre_people
from controlroom.sampling.pipeline import Pipeline
from controlroom.signals.face import head_crop
from controlroom.training.base_model import BaseModel
from controlroom.training.clip_vision import image_encoder_of
from controlroom.training.faces import encoded_faces
from controlroom.training.objective import ObjectiveSettings
from controlroom.training.recipes.instant_id import InstantIDRecipe, InstantIDSettings
from controlroom.training.recipes.photomaker import PhotoMakerRecipe, PhotoMakerSettings
from controlroom.training.shown import Shown

HELD_OUT_PEOPLE = 8


def theatre_instant_id(
    pipe: Pipeline, clip_folder: Path, people: int = 300, pictures: int = 10, settings: InstantIDSettings | None = None
) -> InstantIDRecipe:
    """The recipe on the theatre's people.

    Args:
        pipe: the theatre.
        clip_folder: its CLIP.
        people: that are learned from.
        pictures: of each.
        settings: None: a resampler as wide as the theatre's text.
    """
    settings = settings or InstantIDSettings(
        width=192, heads=3, without_words=0.1, without_face=0.1, objective=ObjectiveSettings(min_snr_gamma=5.0)
    )
    base, encoder = BaseModel(pipe), image_encoder_of(clip_folder)
    points = points_of_people(people_of("train", people, pictures)) | points_of_people(
        people_of("held_out", HELD_OUT_PEOPLE, 2)
    )
    learned = theatre_people("train", people, pictures, "class")
    held_out = theatre_people("held_out", HELD_OUT_PEOPLE, 2, "class")
    faces = encoded_faces(learned, lambda picture, image: points[picture.name], encoder)
    others = encoded_faces(held_out, lambda picture, image: points[picture.name], encoder)
    return InstantIDRecipe(
        base, Shown(base, learned), settings, faces, encoder, list(zip(held_out, others, strict=True))
    )


def theatre_photomaker(
    pipe: Pipeline, clip_folder: Path, people: int = 300, pictures: int = 10, settings: PhotoMakerSettings | None = None
) -> PhotoMakerRecipe:
    """The recipe on the theatre's people; the encoder is shown their heads.

    Args:
        pipe: the theatre.
        clip_folder: its CLIP.
        people: that are learned from.
        pictures: of each.
        settings: None: a LoRA of rank 16.
    """
    settings = settings or PhotoMakerSettings(rank=16, objective=ObjectiveSettings(min_snr_gamma=5.0))
    base, points = BaseModel(pipe), points_of_people(people_of("train", people, pictures))
    points |= points_of_people(people_of("held_out", HELD_OUT_PEOPLE, 2))
    shown = Shown(base, theatre_people("train", people, pictures, "class"))
    encoder = image_encoder_of(clip_folder)
    return PhotoMakerRecipe(
        base,
        shown,
        settings,
        encoder,
        lambda picture: head_crop(picture.read(), points[picture.name]),
        theatre_people("held_out", HELD_OUT_PEOPLE, 2, "class"),
    )
