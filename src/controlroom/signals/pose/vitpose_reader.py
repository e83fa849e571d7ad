"""Keypoints of a photograph by ViTPose (Xu et al., arXiv 2204.12484) through transformers, from local folders.

A detector (RT-DETR, DETR, YOLOS: any that transformers loads and that knows a class ``person``) finds the people,
ViTPose the 17 COCO keypoints of the largest; the neck is the middle of the shoulders. Its processor needs SciPy
(extra ``signals``).
"""

from __future__ import annotations

import os

import numpy as np
import torch
from PIL import Image

from controlroom.core.errors import InputError, ModelError
from controlroom.core.pose import Pose
from controlroom.signals.pose.openpose_document import coco_to_openpose
from controlroom.signals.pretrained import load_pretrained


class VitPoseReader:
    """A `PoseReader` for photographs.

    Args:
        folder: of a ViTPose network with 17 keypoints.
        detector: folder of a detector of people; without one the whole picture is taken as the person.
        threshold: score below which a joint counts as not there.
        device: where they compute.

    Raises:
        ModelError: SciPy is not installed, or a folder does not hold such a network.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        detector: str | os.PathLike[str] | None = None,
        threshold: float = 0.3,
        device: str = "cpu",
    ) -> None:
        try:
            import scipy  # noqa: F401
        except ImportError as error:
            raise ModelError("ViTPose needs the package scipy: pip install 'controlroom[signals]'.") from error
        self.network = load_pretrained(folder, "VitPoseForPoseEstimation", "ViTPose", device)
        self.detector = None
        if detector is not None:
            self.detector = load_pretrained(detector, "AutoModelForObjectDetection", "a detector of people", device)
            labels = self.detector.model.config.id2label
            self._person = {number for number, name in labels.items() if str(name).lower() == "person"}
            if not self._person:
                raise ModelError(f"The detector {os.fspath(detector)!r} knows no class 'person'. Give another.")
        self.threshold = threshold

    def read(self, image: Image.Image) -> Pose:
        """The largest person of an RGB picture.

        Raises:
            InputError: no person was found.
            ModelError: the network does not give 17 keypoints.
        """
        picture = image.convert("RGB")
        boxes = [[self._largest(picture)]]
        inputs = self.network.processor(images=picture, boxes=boxes, return_tensors="pt")
        extra = {}
        if getattr(self.network.model.config.backbone_config, "num_experts", 1) > 1:
            extra["dataset_index"] = torch.zeros(1, dtype=torch.long)  # ViTPose+: 0 is COCO
        output = self.network(pixel_values=inputs["pixel_values"], **extra)
        ((found,),) = self.network.processor.post_process_pose_estimation(output, boxes=boxes)
        points, scores = (np.asarray(found[name].float().cpu(), float) for name in ("keypoints", "scores"))
        if points.shape != (17, 2):
            raise ModelError(f"The ViTPose network gave {len(points)} keypoints; expected 17, COCO's body.")
        scores = np.where(np.isfinite(scores) & (scores >= self.threshold), np.clip(scores, 0, 1), 0.0)
        if not scores.any():
            raise InputError("No joint of a person was found in the picture; give another, or a pose as JSON.")
        return Pose(*coco_to_openpose(np.nan_to_num(points), scores), image.width, image.height)

    def _largest(self, picture: Image.Image) -> list[float]:
        """Left, top, width, height of the largest person."""
        if self.detector is None:
            return [0.0, 0.0, float(picture.width), float(picture.height)]
        inputs = self.detector.processor(images=picture, return_tensors="pt")
        output = self.detector(**{name: inputs[name] for name in ("pixel_values", "pixel_mask") if name in inputs})
        (found,) = self.detector.processor.post_process_object_detection(
            output, threshold=0.5, target_sizes=[(picture.height, picture.width)]
        )
        people = [
            box.tolist()
            for box, label in zip(found["boxes"], found["labels"], strict=True)
            if int(label) in self._person
        ]
        if not people:
            raise InputError("No person was found in the picture; give one with a person, or a pose as JSON.")
        left, top, right, bottom = max(people, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
        return [left, top, right - left, bottom - top]
