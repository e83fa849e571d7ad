"""Where a word is in a photograph, and which pixels it is: networks of transformers, from disk.

A zero-shot detector (OWL-ViT, arXiv 2205.06230; OWLv2; Grounding DINO, arXiv 2303.05499) and Segment Anything (arXiv
2304.02643), in the forms that `controlroom.data.entities` takes. Nothing is downloaded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from controlroom.signals.pretrained import load_pretrained


@dataclass(frozen=True)
class Detection:
    """Where something was found.

    Attributes:
        box: left, top, right and bottom, from 0 to 1 of the picture.
        score: how sure the detector is, 0 to 1.
    """

    box: tuple[float, float, float, float]
    score: float


class WordDetector:
    """Find a word in a picture.

    Args:
        folder: of a zero-shot detector as transformers saves it, or a hub id that is downloaded.
        device: where it computes.

    Raises:
        ModelError: it is not on this machine, a pickle, broken, or a network for something else.
    """

    def __init__(self, folder: str | os.PathLike[str], device: str = "cpu") -> None:
        self.network = load_pretrained(
            folder, "AutoModelForZeroShotObjectDetection", "a zero-shot detector", device, "AutoProcessor"
        )

    def __call__(self, picture: Image.Image, word: str) -> Detection | None:
        """The best detection of a word in an RGB picture; None: there is none."""
        processor, size = self.network.processor, [(picture.height, picture.width)]
        kind = self.network.model.config.model_type
        said = f"{word.lower().rstrip('.')}." if "dino" in kind else [[f"a photo of a {word.lower()}"]]
        inputs = processor(images=picture, text=said, return_tensors="pt")
        found = self.network(**inputs)
        # Of one word, every detection is of it: labels need not be read.
        (boxes,) = processor.post_process_grounded_object_detection(found, threshold=0.0, target_sizes=size)
        if not len(boxes["scores"]):
            return None
        best = int(boxes["scores"].argmax())
        sides = 2 * picture.size
        left, top, right, bottom = (
            min(max(x / side, 0.0), 1.0) for x, side in zip(boxes["boxes"][best].tolist(), sides, strict=True)
        )
        if not (left < right and top < bottom):
            return None
        return Detection((left, top, right, bottom), float(boxes["scores"][best]))


class BoxSegmenter:
    """Say which pixels in a box are the thing that it is around.

    Args:
        folder: of a Segment Anything model as transformers saves it, or a hub id that is downloaded.
        device: where it computes.

    Raises:
        ModelError: it is not on this machine, a pickle, broken, or a network for something else.
    """

    def __init__(self, folder: str | os.PathLike[str], device: str = "cpu") -> None:
        self.network = load_pretrained(folder, "SamModel", "Segment Anything", device, "AutoProcessor")

    @torch.no_grad()
    def __call__(self, picture: Image.Image, box: tuple[float, float, float, float]) -> NDArray[np.bool_]:
        """[height, width] of an RGB picture and a box from 0 to 1 of it."""
        pixels = [x * side for x, side in zip(box, 2 * picture.size, strict=True)]
        inputs = self.network.processor(images=picture, input_boxes=[[pixels]], return_tensors="pt")
        given = {name: value for name, value in inputs.items() if name in ("pixel_values", "input_boxes")}
        device = self.network.device
        found = self.network.model(**{name: v.to(device) for name, v in given.items()}, multimask_output=False)
        (masks,) = self.network.processor.post_process_masks(
            found.pred_masks.cpu(), inputs["original_sizes"], inputs["reshaped_input_sizes"]
        )
        return masks[0, 0].numpy()
