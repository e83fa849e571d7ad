"""The folders of kohya's trainers (sd-scripts): ``10_sks dog/`` holds pictures of "sks dog" shown ten times an epoch.

The caption of a picture is the first line of the ``.caption`` or ``.txt`` beside it, else the folder's name without
the number. `training_pictures` reads such a folder or a plain one, whichever it is given.
"""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from controlroom.core.errors import InputError
from controlroom.data.image_folder import image_folder, metadata_file
from controlroom.data.picture_files import (
    existing_folder,
    mask_of,
    note_of_copies,
    picture_of,
    pictures_in,
    subfolders,
    text_of,
)
from controlroom.data.pictures import Picture

_NAME = re.compile(r"(\d+)_(.*\S.*)")
_CAPTION_ENDINGS = (".caption", ".txt")


@dataclass(frozen=True)
class Concept:
    """What a folder's name says: how often its pictures are shown an epoch, and of what they are.

    ``words`` is "sks dog" in ``10_sks dog``.
    """

    repeats: int
    words: str

    @property
    def class_words(self) -> str:
        """What it is an instance of: "dog" of "sks dog"; a single word is its own class."""
        return self.words.partition(" ")[2].strip() or self.words


def concept_of(name: str) -> Concept | None:
    """What the name of a folder says, or None if it is not one of kohya's."""
    match = _NAME.fullmatch(name)
    return Concept(int(match[1]), " ".join(match[2].split())) if match else None


def kohya_folder(path: str | os.PathLike[str]) -> tuple[Picture, ...]:
    """Pictures of every ``REPEATS_words`` subfolder; ``subject`` is the words.

    Subfolders of other names, and those shown zero times, are left out with a warning, as kohya's trainers do.

    Raises:
        InputError: no such folder, no such subfolder, no picture in any, or one that cannot be read.
    """
    root = existing_folder(path, "a folder with subfolders such as '10_sks dog'")
    notes: list[str] = []
    pictures: list[Picture] = []
    named = 0
    for folder in subfolders(root):
        concept = concept_of(folder.name)
        named += concept is not None
        if concept is None or concept.repeats < 1:
            why = "its name is not REPEATS_words" if concept is None else "it is shown zero times"
            notes.append(f"The folder {folder.name!r} is left out: {why}.")
            continue
        files = pictures_in(folder)
        if not files:
            notes.append(f"There is no picture in {str(folder)!r}.")
        for file in files:
            caption = _first_line(file)
            words = concept.words if caption is None else caption
            pictures.append(picture_of(file, root, words, mask_of(file, root), concept.repeats, concept.words))
    if not named:
        raise InputError(
            f"{str(root)!r} has no subfolder such as '10_sks dog' (repeats, an underscore, what it shows)."
        )
    if not pictures:
        raise InputError(f"There is no picture to train on in {str(root)!r}. {' '.join(notes)}".rstrip())
    loose = pictures_in(root)
    if loose:
        notes.append(f"{len(loose)} pictures directly in {str(root)!r} are left out; move them into a subfolder.")
    copies = note_of_copies(pictures)
    for note in (*notes, *([copies] if copies else [])):
        warnings.warn(note, stacklevel=2)
    return tuple(pictures)


def is_kohya_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder has subfolders of kohya's names with pictures in them, and no metadata.

    Raises:
        InputError: no such folder; pictures beside such subfolders, so that it could be either.
    """
    root = existing_folder(path, "a folder of training pictures")
    if metadata_file(root) is not None:
        return False
    found = [folder for folder in subfolders(root) if concept_of(folder.name) and pictures_in(folder)]
    loose = pictures_in(root)
    if found and loose:
        raise InputError(
            f"{str(root)!r} holds {len(loose)} pictures beside folders such as {found[0].name!r}. Move them into one "
            "of the folders, or give the folder that is meant."
        )
    return bool(found)


def training_pictures(path: str | os.PathLike[str]) -> tuple[Picture, ...]:
    """Pictures of a folder, of kohya's layout if its subfolders have such names, else as `image_folder` reads it.

    Raises:
        InputError: as `kohya_folder` and `image_folder`, or it could be either.
    """
    return kohya_folder(path) if is_kohya_folder(path) else image_folder(path)


def _first_line(picture: Path) -> str | None:
    for ending in _CAPTION_ENDINGS:
        file = picture.with_suffix(ending)
        if file.is_file():
            return text_of(file).strip().partition("\n")[0].strip()
    return None
