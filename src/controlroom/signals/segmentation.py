"""What is where in a photograph, by a network of transformers such as SegFormer (arXiv 2105.15203).

A network of 150 classes is taken to know ADE20K's and drawn in its colours, which ControlNet's segmentation nets were
trained on; any other in colours of its own.
"""

from __future__ import annotations

import os
from typing import Literal

import numpy as np
from PIL import Image

from controlroom.signals.palette import ADE20K, palette_picture, spread_palette
from controlroom.signals.pretrained import load_pretrained
from controlroom.signals.recognise import recognise_segmentation
from controlroom.signals.signal import SignalMap


class TransformersSegmentation:
    """Semantic segmentation by a network in a local folder.

    Args:
        folder: of the network, or a hub id that has been downloaded.
        device: where it computes.
        recognise: pass on a picture that already is a segmentation in the network's colours.

    Attributes:
        classes: name of each class, by number.

    Raises:
        ModelError: no network for segmentation is there.
    """

    kind: Literal["segmentation"] = "segmentation"

    def __init__(self, folder: str | os.PathLike[str], device: str = "cpu", recognise: bool = True) -> None:
        what = "a segmentation network"
        self.network = load_pretrained(folder, "AutoModelForSemanticSegmentation", what, device)
        names = self.network.model.config.id2label
        self.classes = tuple(str(names[number]) for number in sorted(names))
        self.palette = ADE20K if len(self.classes) == len(ADE20K) else spread_palette(len(self.classes))
        self.recognise = recognise

    def __call__(self, image: Image.Image) -> SignalMap:
        if self.recognise and (found := recognise_segmentation(image, self.palette)) is not None:
            return SignalMap(self.kind, found, palette_picture(found, self.palette), recognised=True)
        inputs = self.network.processor(images=image.convert("RGB"), return_tensors="pt")
        output = self.network(pixel_values=inputs["pixel_values"])
        size = (image.height, image.width)
        (labels,) = self.network.processor.post_process_semantic_segmentation(output, target_sizes=[size])
        values = labels.cpu().numpy().astype(np.float32)
        return SignalMap(self.kind, values, palette_picture(values, self.palette))
