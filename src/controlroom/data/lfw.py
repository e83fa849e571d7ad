"""Labeled Faces in the Wild and anything of its layout (``Name/Name_0001.jpg``), and people split apart.

Huang et al., "Labeled Faces in the Wild", 2007. The split that personalisation is measured with takes people of whom
there are at least ten pictures, two thirds of them to train on, and shows nobody on both sides.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence

from controlroom.core.errors import InputError
from controlroom.data.image_folder import CAPTION_ENDINGS, metadata_file
from controlroom.data.picture_files import caption_beside, existing_folder, picture_of, pictures_in, subfolders
from controlroom.data.pictures import Picture, by_subject

_LAYOUT = "a folder of people with pictures such as 'Ann_Veneman/Ann_Veneman_0001.jpg'"
_NUMBER = re.compile(r"(.+)_(\d{4,})")


def lfw(path: str | os.PathLike[str], caption: str = "a photo of a person") -> tuple[Picture, ...]:
    """Pictures of everyone, by name and number; ``subject`` is the name, with its underscores.

    Args:
        path: the folder of people.
        caption: of every picture; the set has none.

    Raises:
        InputError: no such folder, no picture of that layout, or one that cannot be read.
    """
    root = existing_folder(path, _LAYOUT)
    found = []
    for folder in subfolders(root):
        for file in pictures_in(folder):
            match = _NUMBER.fullmatch(file.stem)
            if match and match[1] == folder.name:
                found.append(picture_of(file, root, caption, subject=folder.name))
    if not found:
        raise InputError(f"There is nobody in {str(root)!r}; expected {_LAYOUT}.")
    return tuple(found)


def is_lfw(path: str | os.PathLike[str]) -> bool:
    """Whether a folder has that layout: folders whose pictures all have their name and a number, without captions.

    Raises:
        InputError: no such folder.
    """
    root = existing_folder(path, _LAYOUT)
    found = [(folder, file) for folder in subfolders(root) for file in pictures_in(folder)]
    if not found or pictures_in(root) or metadata_file(root) is not None:
        return False
    named = (_NUMBER.fullmatch(file.stem) for _, file in found)
    if not all(match and match[1] == folder.name for match, (folder, _) in zip(named, found, strict=True)):
        return False
    return all(caption_beside(file, CAPTION_ENDINGS) is None for _, file in found)


def people_with(pictures: Sequence[Picture], minimum: int) -> tuple[Picture, ...]:
    """Pictures of people of whom there are at least so many.

    Raises:
        InputError: there is nobody.
    """
    enough = {name for name, its in by_subject(pictures).items() if len(its) >= minimum}
    if not enough:
        raise InputError(f"Nobody has {minimum} pictures or more. Lower the minimum.")
    return tuple(picture for picture in pictures if picture.subject in enough)


def people_split(
    pictures: Sequence[Picture], minimum: int = 10, share: float = 2 / 3, seed: int = 0
) -> tuple[tuple[Picture, ...], tuple[Picture, ...]]:
    """Pictures to train on and held-out ones, of different people.

    Who is on which side depends on the names and the seed only, not on the order of the pictures.

    Args:
        pictures: with ``subject``.
        minimum: people with fewer pictures are left out.
        share: of the people that are trained on.
        seed: of the split.

    Raises:
        InputError: fewer than two people with that many pictures, or a share that leaves a side empty.
    """
    everyone = {name: its for name, its in by_subject(pictures).items() if len(its) >= minimum}
    if len(everyone) < 2:
        raise InputError(
            f"{len(everyone)} people have {minimum} pictures or more; expected at least two. Lower the minimum."
        )
    if not 0 < share < 1:
        raise InputError(f"A share of {share:g} leaves one side empty; expected more than 0 and less than 1.")
    drawn = sorted(everyone, key=lambda name: (hashlib.sha256(f"{seed} {name}".encode()).digest(), name))
    count = min(max(1, round(share * len(drawn))), len(drawn) - 1)
    train = set(drawn[:count])
    kept = [picture for picture in pictures if picture.subject in everyone]
    return (
        tuple(picture for picture in kept if picture.subject in train),
        tuple(picture for picture in kept if picture.subject not in train),
    )
