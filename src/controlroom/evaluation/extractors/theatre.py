"""The theatre's own networks as extractors: the default where no weights can be downloaded.

They know the theatre's world and nothing else; their numbers say nothing of photographs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from controlroom.backbones.loading import THEATRE, find_model
from controlroom.evaluation.extractor import content_hash
from controlroom.evaluation.extractors.pretrained import ClipExtractor, Preparation
from controlroom.evaluation.metrics.perceptual import perceptual_distance
from controlroom.evaluation.retarget_judge import IDENTITY
from controlroom.signals.readers import AttributeReader

_HALF = (0.5, 0.5, 0.5)


def signed(images: Tensor, size: int) -> Tensor:
    """Pixels in [0, 1] -> what the readers read: in [-1, 1], of their size."""
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return images * 2 - 1


class TheatreFeatures:
    """The attribute reader's feature maps: their means over all places [B, D], and a perceptual distance in them."""

    def __init__(self, reader: AttributeReader) -> None:
        self.reader = reader
        self.name, self.hash = "theatre-attributes", content_hash(reader)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Means of the two deepest stages: what is there, whatever its place."""
        return torch.cat([m.mean(dim=(2, 3)) for m in self.reader.features(signed(images, self.reader.size))[-2:]], 1)

    def distance(self, first: Tensor, second: Tensor) -> Tensor:
        """`perceptual_distance` over all stages, in [0, 4]."""
        size = self.reader.size
        return perceptual_distance(signed(first, size), signed(second, size), self.reader.features)


class TheatreIdentity:
    """Who a puppet is: the reader's probabilities of the answers to the nine questions of identity.

    Those of each question are scaled to length one, so that the cosine of two pictures is the mean over the questions
    of how much the answers agree.
    """

    def __init__(self, reader: AttributeReader) -> None:
        self.reader = reader
        self.name, self.hash = "theatre-identity", content_hash(reader)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """[B, answers], of length one."""
        logits = self.reader(signed(images, self.reader.size))
        parts = [F.normalize(logits[question].softmax(dim=1), dim=1) for question in IDENTITY]
        return torch.cat(parts, dim=1) / len(IDENTITY) ** 0.5


def theatre_reader() -> AttributeReader:
    """The theatre's attribute reader.

    Raises:
        ModelError: it is not in this installation.
    """
    return AttributeReader.load(find_model(f"{THEATRE}/readers/attributes", "reader")).requires_grad_(False)


def theatre_clip() -> ClipExtractor:
    """The theatre's CLIP.

    Raises:
        ModelError: it is not in this installation.
    """
    folder = find_model(f"{THEATRE}/clip", "CLIP")
    # Trained on pictures in [-1, 1] of its own size.
    preparation = Preparation(resize=(128, 128), crop=None, mean=_HALF, std=_HALF, resample=3)
    return ClipExtractor.load(folder, folder / "tokenizer", preparation, "theatre-clip")
