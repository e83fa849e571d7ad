"""Entities of pictures, cut out: what multimodal prompts are made of (UNIMO-G, arXiv 2401.13388).

A detector finds the words of a caption in its picture, a segmenter says which pixels of the box are the entity, and the
entity is cut out onto white. Both are given: any callables of these types, such as `controlroom.signals.entities` has
for networks on disk; the theatre knows the truth.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from controlroom.core.errors import InputError
from controlroom.data.groups import Box, Group, PlacedSubject
from controlroom.data.pictures import Picture, by_subject
from controlroom.signals.entities import Detection

Mask = NDArray[np.bool_]
WHITE = (255, 255, 255)


Detector = Callable[[Image.Image, str], Detection | None]
"""A picture and a word -> the best detection; None: it is not there."""
Segmenter = Callable[[Image.Image, Box], Mask]
"""A picture and a box -> [height, width], True where the thing in the box is seen."""


@dataclass(frozen=True)
class Entity:
    """Something in a picture.

    Attributes:
        word: what it is called.
        box: where it is, from 0 to 1.
        mask: [height, width], True where it is seen.
    """

    word: str
    box: Box
    mask: Mask

    def read_mask(self) -> Image.Image:
        """The mask as a picture, white where the entity is."""
        return Image.fromarray(self.mask.astype(np.uint8) * 255)


def find_entities(
    picture: Image.Image, words: Sequence[str], detector: Detector, segmenter: Segmenter, least: float = 0.2
) -> tuple[Entity, ...]:
    """The entities of a picture, one for each word that is found in it.

    Args:
        picture: RGB.
        words: what is looked for.
        detector, segmenter: see there.
        least: score below which a detection does not count.

    Raises:
        InputError: the segmenter's mask has another size than the picture.
    """
    found = []
    for word in words:
        detection = detector(picture, word)
        if detection is None or detection.score < least:
            continue
        mask = np.asarray(segmenter(picture, detection.box), dtype=np.bool_)
        if mask.shape != (picture.height, picture.width):
            raise InputError(
                f"The segmenter gave a mask of {list(mask.shape)} for a picture of {picture.width} x {picture.height}; "
                "expected [height, width]."
            )
        if mask.any():
            found.append(Entity(word, detection.box, mask))
    return tuple(found)


def cut_out(picture: Image.Image, mask: Image.Image, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """What is white in the mask on a plain background: a square that just holds it.

    Raises:
        InputError: another size, or a mask that is black all over.
    """
    if mask.size != picture.size:
        raise InputError(f"The mask is {mask.size}, the picture {picture.size}; expected the same size.")
    inside = mask.convert("L").getbbox()
    if inside is None:
        raise InputError("The mask is black all over: there is nothing to cut out.")
    left, top, right, bottom = inside
    side = max(right - left, bottom - top)
    found = Image.new("RGB", (side, side), background)
    place = ((side - (right - left)) // 2, (side - (bottom - top)) // 2)
    found.paste(picture.convert("RGB").crop(inside), place, mask.convert("L").crop(inside))
    return found


def cut_out_of(picture: Picture) -> Picture:
    """A picture whose content is what its mask says counts.

    Raises:
        InputError: it has no mask.
    """
    read_mask = picture.read_mask
    if read_mask is None:
        raise InputError(f"{picture.name} has no mask, so nothing can be cut out of it. Give one, or a segmenter.")
    name = f"cut out of {picture.name}"
    read = lambda: cut_out(picture.read(), read_mask())  # noqa: E731
    return replace(picture, name=name, content=f"{picture.content} cut out", read=read, read_mask=None)


def cut_from_target(group: Group) -> Group:
    """The group with its subjects cut out of the very picture that they are in, as published: a copy would do.

    Raises:
        InputError: a subject without a mask.
    """
    subjects = []
    for number, subject in enumerate(group.subjects):
        name = f"{group.picture.name} subject {number}"
        seen = replace(group.picture, name=name, content=f"{group.picture.content} {number}", caption="")
        subjects.append(replace(subject, picture=cut_out_of(replace(seen, read_mask=subject.read_mask))))
    return replace(group, subjects=tuple(subjects))


# Photographs.


def entity_groups(
    pictures: Sequence[Picture],
    words: Sequence[str],
    detector: Detector,
    segmenter: Segmenter,
    same_picture: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> tuple[Group, ...]:
    """Pictures whose captions name entities that are found in them, each entity known from its cut-out.

    Args:
        pictures: with captions; those of one ``subject`` show the same things.
        words: for entities, such as ``["dog", "ball"]``; looked for in the pictures whose captions have them.
        detector, segmenter: see there; each picture is looked at once.
        same_picture: cut the entities out of the very picture, as published. Otherwise they come out of the next
            picture of the subject that shows them; where none does, the picture does not know the entity.
        report: gets how many pictures are done, and how many there are.

    Raises:
        InputError: no words, or no picture with an entity is left.
    """
    if not words:
        raise InputError('The words of the captions for entities are missing: words = ["dog", "ball"].')
    found: dict[str, tuple[Entity, ...]] = {}
    for number, picture in enumerate(pictures):
        named = [word for word in words if re.search(rf"\b{re.escape(word)}\b", picture.caption, re.IGNORECASE)]
        found[picture.name] = find_entities(picture.read(), named, detector, segmenter) if named else ()
        if report is not None:
            report(number + 1, len(pictures))
    groups = []
    for its in by_subject(pictures).values():
        for number, picture in enumerate(its):
            others = [picture] if same_picture else [*its[number + 1 :], *its[:number]]
            subjects = []
            for entity in found[picture.name]:
                known = next(((p, e) for p in others for e in found[p.name] if e.word == entity.word), None)
                if known is not None:
                    subjects.append(PlacedSubject(entity.word, entity.box, _cut(*known), entity.read_mask))
            if subjects:
                groups.append(Group(picture, tuple(subjects)))
    if not groups:
        where = "in it" if same_picture else "in it and in another picture of its subject"
        raise InputError(
            f"None of {len(pictures)} pictures has a caption with one of {', '.join(map(repr, words))} that is found "
            f"{where}. Check captions and words."
        )
    return tuple(groups)


def masked_groups(pictures: Sequence[Picture], words: Sequence[str], same_picture: bool = False) -> tuple[Group, ...]:
    """Pictures of one entity each, whose masks (where they have any) say where it is.

    Args:
        pictures: with captions; at least two of each subject, unless ``same_picture``.
        words: the one word of the captions for the entity.
        same_picture: cut the entity out of the very picture, which then needs its mask. Otherwise it is known from the
            next picture of the subject, cut out where that has a mask.

    Raises:
        InputError: not one word; a subject of one picture; a picture without a mask that is needed.
    """
    if len(words) != 1:
        raise InputError(
            'One word of the captions for the entity is needed where no detector looks for it: words = ["dog"].'
        )
    groups = []
    for subject, its in by_subject(pictures).items():
        if len(its) < 2 and not same_picture:
            raise InputError(f"There is one picture of {subject or 'the subject'!r}; it takes two to know it from.")
        for number, picture in enumerate(its):
            other = picture if same_picture else its[(number + 1) % len(its)]
            known = cut_out_of(other) if same_picture or other.read_mask is not None else other
            box = _box_of(picture.read_mask().convert("L")) if picture.read_mask is not None else (0.0, 0.0, 1.0, 1.0)
            groups.append(Group(picture, (PlacedSubject(words[0], box, known, picture.read_mask),)))
    return tuple(groups)


def _cut(picture: Picture, entity: Entity) -> Picture:
    """The entity cut out of its picture."""
    mask = hashlib.sha256(np.packbits(entity.mask).tobytes()).hexdigest()
    content = f"{picture.content} {entity.word} {mask}"
    name = f"{entity.word} of {picture.name}"
    return cut_out_of(replace(picture, name=name, content=content, caption="", read_mask=entity.read_mask))


def _box_of(mask: Image.Image) -> Box:
    inside = mask.getbbox()
    if inside is None:
        raise InputError("A mask is black all over: its picture shows nothing. Leave the picture out.")
    width, height = mask.size
    left, top, right, bottom = inside
    return (left / width, top / height, right / width, bottom / height)
