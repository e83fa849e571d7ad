"""What is measured of a picture of a person in another pose, against the true one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict

from controlroom.backbones.loading import THEATRE, find_model
from controlroom.data.theatre.attributes import attributes
from controlroom.data.theatre.pairs import Pair
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import CANVAS
from controlroom.data.theatre.truth import keypoints
from controlroom.evaluation.metrics.pck import read_pck
from controlroom.evaluation.metrics.perceptual import extractor_hash, perceptual_distance
from controlroom.evaluation.metrics.ssim import ssim
from controlroom.signals.readers import AttributeReader, KeypointReader, pixels_of

#: What makes a puppet the same one.
IDENTITY = (
    "top",
    "top colour",
    "top pattern",
    "lower",
    "lower colour",
    "hair colour",
    "hair length",
    "skin",
    "hat",
)
KEPT = (*IDENTITY, "place")


class Verdict(BaseModel):
    """Measures of one picture.

    Attributes:
        key: of everything that it depends on; see `retarget_methods.key_of`.
        method: that drew it.
        pair: its number.
        pck: share of joints within a fifth of the torso, in [0, 1].
        ssim: structural similarity to the true picture, at most 1.
        distance: perceptual distance to the true picture, in [0, 4].
        kept: attribute -> whether it is read as it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    method: str
    pair: int
    pck: float
    ssim: float
    distance: float
    kept: dict[str, bool]

    def value(self, measure: str) -> float | None:
        """A measure as a number; None where it has no truth (a hidden attribute)."""
        if measure in ("pck", "ssim", "distance"):
            return float(getattr(self, measure))
        if measure == "all of these":
            return float(all(right for question, right in self.kept.items() if question in IDENTITY))
        return None if measure not in self.kept else float(self.kept[measure])


class Judge:
    """The theatre's readers, which look at pictures of any method alike."""

    def __init__(self, attribute_reader: AttributeReader, keypoint_reader: KeypointReader) -> None:
        self.attribute_reader, self.keypoint_reader = attribute_reader, keypoint_reader
        self.extractor = extractor_hash(attribute_reader)

    @staticmethod
    def folders() -> tuple[Path, Path]:
        """Where the theatre's readers lie: of attributes, of keypoints."""
        places = ("attributes", "keypoints")
        first, second = (find_model(f"{THEATRE}/readers/{place}", "reader") for place in places)
        return first, second

    @classmethod
    def load(cls) -> Judge:
        """The theatre's.

        Raises:
            ModelError: a reader is missing or broken.
        """
        attribute_reader, keypoint_reader = cls.folders()
        return cls(AttributeReader.load(attribute_reader), KeypointReader.load(keypoint_reader))

    @torch.no_grad()
    def __call__(
        self, pictures: Sequence[Image.Image], pairs: Sequence[Pair], numbers: Sequence[int], method: str, key: str
    ) -> list[Verdict]:
        """Measure pictures of pairs, of the theatre's size."""
        true = [render(pair.target) for pair in pairs]
        drawn, wanted = (pixels_of(p, CANVAS) for p in (pictures, true))
        likeness = ssim(drawn, wanted, data_range=2.0)
        size = self.attribute_reader.size
        features = self.attribute_reader.features
        distance = perceptual_distance(pixels_of(pictures, size), pixels_of(true, size), features)
        points, answers = self.keypoint_reader.keypoints(pictures), self.attribute_reader.read(pictures)
        found = []
        for row, pair in enumerate(pairs):
            truth = attributes(pair.target)
            found.append(
                Verdict(
                    key=key,
                    method=method,
                    pair=numbers[row],
                    pck=read_pck(points[row], keypoints(pair.target), (CANVAS, CANVAS)),
                    ssim=float(likeness[row]),
                    distance=float(distance[row]),
                    kept={q: answers[row][q] == truth[q] for q in KEPT if truth[q] is not None},
                )
            )
        return found
