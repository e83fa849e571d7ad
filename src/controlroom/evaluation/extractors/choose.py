"""Extractors by a line of text, as the command line gives them: ``KIND=PATH``."""

from __future__ import annotations

from typing import Any

from controlroom.core.errors import InputError
from controlroom.evaluation.extractor import Distance

KINDS = {
    "clip": "FOLDER: CLIP score of each picture with its prompt",
    "dino": "FOLDER: similarity to the suite's reference picture",
    "inception": "FILE: FID, KID and IS against the suite's reference pictures (inception-clean: with antialiasing)",
    "lpips-alex": "TRUNK,HEADS: distance to the suite's reference picture (also lpips-vgg, lpips-squeeze)",
}


def open_distance(text: str) -> Distance:
    """The perceptual distance that a line names: ``theatre``, or LPIPS as in `open_extractor`.

    Raises:
        InputError: not such a line.
        ModelError: the weights are not there, or not what they are given for.
    """
    if text == "theatre":
        from controlroom.evaluation.extractors.theatre import TheatreFeatures, theatre_reader

        return TheatreFeatures(theatre_reader())
    if not text.startswith("lpips-"):
        raise InputError(f"{text!r} is no perceptual distance. Give theatre, or lpips-vgg=TRUNK.pth,HEADS.pth.")
    return open_extractor(text)


def open_extractor(text: str) -> Any:
    """The extractor that a line names.

    Raises:
        InputError: not such a line.
        ModelError: the weights are not there, or not what they are given for.
    """
    kind, _, path = text.partition("=")
    if not path:
        raise InputError(f"{text!r} is no extractor; expected KIND=PATH with one of {', '.join(KINDS)}.")
    if kind == "clip":
        from controlroom.evaluation.extractors.pretrained import ClipExtractor

        return ClipExtractor.load(path)
    if kind == "dino":
        from controlroom.evaluation.extractors.pretrained import DinoExtractor

        return DinoExtractor.load(path)
    if kind in ("inception", "inception-clean"):
        from controlroom.evaluation.extractors.inception import FidInception

        return FidInception.load(path, "clean" if kind.endswith("clean") else "legacy")
    if kind.startswith("lpips-"):
        from controlroom.evaluation.extractors.lpips import LpipsDistance

        trunk, comma, heads = path.partition(",")
        if not comma:
            raise InputError(f"{text!r} names one file; LPIPS takes two: {kind}=TRUNK.pth,HEADS.pth.")
        return LpipsDistance.load(kind.removeprefix("lpips-"), trunk, heads)  # type: ignore[arg-type]
    raise InputError(f"There is no kind of extractor {kind!r}. There are: {', '.join(KINDS)}.")
