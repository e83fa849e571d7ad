"""Judges that any suite can use: with a text, with a reference picture, and of whole sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from controlroom.core.errors import InputError
from controlroom.evaluation.estimates import Estimate
from controlroom.evaluation.extractor import Classifier, Distance, Extractor, TextExtractor, label_of
from controlroom.evaluation.metrics.accumulators import Moments
from controlroom.evaluation.metrics.clip_score import clip_score
from controlroom.evaluation.metrics.fid import fid
from controlroom.evaluation.metrics.inception_score import inception_score
from controlroom.evaluation.metrics.kid import kid
from controlroom.evaluation.metrics.pixels import in_batches, unit_pixels
from controlroom.evaluation.metrics.similarity import similarity
from controlroom.evaluation.suites.suite import Measure, SetJudge, Shown, Suite, Values


class PromptScore:
    """CLIP score of every picture with the case's prompt.

    Args:
        clip: pictures and texts in one space.
        prompts: arm -> arm whose prompt is its own; known arms have none. Arms that are not here are left out.
        name: of the measure.
    """

    def __init__(self, clip: TextExtractor, prompts: dict[str, str], name: str = "CLIP score") -> None:
        self.clip, self.prompts = clip, prompts
        self.fingerprint = f"{name} {label_of(clip)}"
        self.measures = (Measure(name, extractor=label_of(clip), digits=2),)

    def __call__(self, shown: Sequence[Shown[Any]]) -> Sequence[Values]:
        found: list[dict[str, dict[str, float | None]]] = [{} for _ in shown]
        for arm, source in self.prompts.items():
            texts = [str(one.case.specs[source].prompt) for one in shown]
            pictures = in_batches(self.clip.features, [one.pictures[arm] for one in shown])
            scores = clip_score(pictures, self.clip.text_features(texts))
            for row, score in zip(found, scores.tolist(), strict=True):
                row[arm] = {self.measures[0].name: score}
        return found


class LikenessScore:
    """Cosine similarity of every picture to the case's reference picture: DINO score, identity score."""

    def __init__(self, extractor: Extractor, reference: str, arms: Sequence[str], name: str = "similarity") -> None:
        self.extractor, self.reference, self.arms = extractor, reference, tuple(arms)
        self.fingerprint = f"{name} {label_of(extractor)} to {reference}"
        self.measures = (Measure(name, extractor=label_of(extractor)),)

    def __call__(self, shown: Sequence[Shown[Any]]) -> Sequence[Values]:
        name = self.measures[0].name
        true = in_batches(self.extractor.features, [one.pictures[self.reference] for one in shown])
        found: list[dict[str, dict[str, float | None]]] = [{} for _ in shown]
        for arm in self.arms:
            own = in_batches(self.extractor.features, [one.pictures[arm] for one in shown])
            for row, value in zip(found, similarity(own, true).tolist(), strict=True):
                row[arm] = {name: value}
        return found


class DistanceScore:
    """Perceptual distance of every picture to the case's reference picture, resized to it where it must be."""

    def __init__(self, distance: Distance, reference: str, arms: Sequence[str], name: str = "distance") -> None:
        self.distance, self.reference, self.arms = distance, reference, tuple(arms)
        self.fingerprint = f"{name} {label_of(distance)} to {reference}"
        self.measures = (Measure(name, higher=False, extractor=label_of(distance)),)

    def __call__(self, shown: Sequence[Shown[Any]]) -> Sequence[Values]:
        name = self.measures[0].name
        found: list[Values] = []
        for one in shown:
            true = one.pictures[self.reference]
            row: dict[str, dict[str, float | None]] = {}
            for arm in self.arms:
                picture = one.pictures[arm]
                if picture.size != true.size:
                    picture = picture.resize(true.size, Image.Resampling.LANCZOS)
                row[arm] = {name: float(self.distance.distance(unit_pixels([picture]), unit_pixels([true])))}
            found.append(row)
        return found


class SetDistance:
    """KID and FID of an arm's pictures to the reference arm's; with a classifier's weights also IS.

    FID of fewer pictures than its features have numbers is given all the same (see `fid`: it is too high then).

    Args:
        extractor: what the pictures are seen with.
        reference: arm to compare with.
        suffix: of the measures' names, where a suite has several such judges.
    """

    SPLITS = 10

    def __init__(self, extractor: Extractor, reference: str, suffix: str = "") -> None:
        self.extractor, self.reference, self.suffix = extractor, reference, suffix
        self.name = label_of(extractor)
        self.fingerprint = f"sets {self.name} against {reference}"
        self._classifier = extractor if isinstance(extractor, Classifier) else None
        label = self.name
        self.measures = [Measure(f"KID{suffix}", higher=False, extractor=label, digits=4)]
        self.measures += [Measure(f"FID{suffix}", higher=False, extractor=label, digits=2)]
        self.measures += [Measure(f"IS{suffix}", extractor=label, digits=2)] if self._classifier else []

    @torch.no_grad()
    def vectors(self, pictures: Sequence[Image.Image]) -> Tensor:
        features = in_batches(self.extractor.features, pictures).float()
        if self._classifier is None:
            return torch.cat([torch.tensor([[features.shape[1]]]).expand(len(features), 1), features], dim=1)
        logits = in_batches(self._classifier.logits, pictures).float()
        # The first number says where the logits begin.
        return torch.cat([torch.full((len(features), 1), float(features.shape[1])), features, logits], dim=1)

    def compare(self, drawn: Tensor, reference: Tensor) -> dict[str, Estimate]:
        if not len(drawn):
            return {}
        width = 1 + int(drawn[0, 0])
        own, true = (rows[:, 1:width].double() for rows in (drawn, reference))
        found: dict[str, Estimate] = {}
        if min(len(own), len(true)) >= 3:
            found[f"KID{self.suffix}"] = kid(own, true)
            found[f"FID{self.suffix}"] = _alone(fid(_moments(own), _moments(true)), len(own))
        if self._classifier is not None and len(drawn) >= self.SPLITS:
            mean, deviation = inception_score(drawn[:, width:], self.SPLITS)
            # Ten parts' spread stands in the place of an interval: 1.96 standard errors of their mean.
            half = 1.959964 * deviation / math.sqrt(self.SPLITS - 1)
            found[f"IS{self.suffix}"] = Estimate(mean=mean, low=mean - half, high=mean + half, n=len(drawn))
        return found


def _moments(features: Tensor) -> Moments:
    found = Moments()
    found.add(features)
    return found


def _alone(value: float, n: int) -> Estimate:
    return Estimate(mean=value, low=math.nan, high=math.nan, n=n)


def with_extractor(suite: Suite[Any], extractor: Any) -> Suite[Any]:
    """The suite with one more network looking on: what it can say depends on what it is.

    Raises:
        InputError: the suite has no reference that its pictures could be compared with.
    """
    from dataclasses import replace

    if isinstance(extractor, TextExtractor):
        drawn = {arm.name: arm.name for arm in suite.arms if not arm.known}
        score = PromptScore(extractor, drawn, f"CLIP score ({extractor.name})")
        return replace(suite, judges=(*suite.judges, score))
    if suite.reference is None:
        raise InputError(
            f"The suite {suite.name!r} has no reference pictures that {extractor.name!r} could compare with."
        )
    if isinstance(extractor, Classifier):
        judge: SetJudge = SetDistance(extractor, suite.reference, f" ({extractor.name})")
        return replace(suite, set_judges=(*suite.set_judges, judge))
    if isinstance(extractor, Distance):
        scored: Any = DistanceScore(extractor, suite.reference, suite.compared, extractor.name)
    elif isinstance(extractor, Extractor):
        scored = LikenessScore(extractor, suite.reference, suite.compared, extractor.name)
    else:
        raise InputError(f"{type(extractor).__name__} is no extractor: it has no name, hash and features.")
    return replace(suite, judges=(*suite.judges, scored))
