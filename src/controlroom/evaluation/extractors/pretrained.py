"""The user's CLIP and DINO, from folders in the layout of transformers. Nothing is downloaded.

Pictures are prepared as the folder's ``preprocessor_config.json`` says, on Pillow: resized in bytes, cropped, scaled,
normalised; equal to transformers' own processor.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from controlroom.backbones.loading import find_model
from controlroom.backbones.model_files import explained, read_json
from controlroom.core.errors import ModelError
from controlroom.evaluation.extractor import content_hash
from controlroom.evaluation.metrics.pixels import as_pictures

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preparation:
    """From a picture to what a network reads.

    Attributes:
        resize: width and height, or the length of the shorter side.
        crop: side of the square in the middle; None: nothing is cut away.
        mean, std: of the channels, for values in [0, 1].
        resample: Pillow's number of the filter.
    """

    resize: int | tuple[int, int]
    crop: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int

    @classmethod
    def read(cls, folder: Path) -> Preparation:
        """Out of ``preprocessor_config.json``.

        Raises:
            ModelError: it is missing, broken, or of another kind.
        """
        data = read_json(folder / "preprocessor_config.json")
        crop: Any = data.get("crop_size")
        given: Any = data.get("size")
        size: dict[str, Any] = given if isinstance(given, dict) else {"shortest_edge": given}
        crop = crop.get("height") if isinstance(crop, dict) else crop
        try:
            edge = size.get("shortest_edge")
            resize = int(edge) if edge else (int(size["width"]), int(size["height"]))
            return cls(
                resize=resize,
                crop=int(crop) if crop and data.get("do_center_crop", True) else None,
                mean=tuple(map(float, data.get("image_mean", _CLIP_MEAN))),
                std=tuple(map(float, data.get("image_std", _CLIP_STD))),
                resample=int(data.get("resample", 3)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"{folder / 'preprocessor_config.json'} does not say how pictures are prepared (size, crop_size, "
                "image_mean, image_std, resample). Copy it again."
            ) from error

    def __call__(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, 3, h, w]."""
        mean, std = (np.array(values, np.float32) for values in (self.mean, self.std))
        rows = []
        for picture in as_pictures(images):
            sized = self._cropped(self._resized(picture))
            rows.append((np.asarray(sized, np.float32) / np.float32(255) - mean) / std)
        return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()

    def _resized(self, picture: Image.Image) -> Image.Image:
        size = self.resize
        if isinstance(size, int):
            short, long = sorted(picture.size)
            longer = int(size * long / short)
            size = (size, longer) if picture.width <= picture.height else (longer, size)
        return picture if picture.size == size else picture.resize(size, Image.Resampling(self.resample))

    def _cropped(self, picture: Image.Image) -> Image.Image:
        if self.crop is None:
            return picture
        left, top = (picture.width - self.crop) // 2, (picture.height - self.crop) // 2
        return picture.crop((left, top, left + self.crop, top + self.crop))


class ClipExtractor:
    """CLIP: pictures and texts in one space (arXiv 2103.00020)."""

    def __init__(self, model: Any, tokenizer: Any, preparation: Preparation, name: str = "clip") -> None:
        self.model, self.tokenizer, self.preparation = model, tokenizer, preparation
        self.name, self.hash = name, content_hash(model, asdict(preparation))

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        tokenizer: str | os.PathLike[str] | None = None,
        preparation: Preparation | None = None,
        name: str = "clip",
    ) -> ClipExtractor:
        """From a folder with ``model.safetensors``, or a hub id that has been downloaded.

        Args:
            folder: of the model.
            tokenizer: its folder; None: the model's.
            preparation: of pictures; None: as ``preprocessor_config.json`` says.
            name: in results.

        Raises:
            ModelError: not there, another kind of model, or keys missing.
        """
        from transformers import CLIPModel, CLIPTokenizer

        place = find_model(folder, "CLIP")
        _of_kind(place, ("clip",))
        model = _whole(CLIPModel, place)
        words: Any = CLIPTokenizer
        reader = explained(str(place), lambda: words.from_pretrained(tokenizer or place, local_files_only=True))
        return cls(model, reader, preparation or Preparation.read(place), name)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """[B, D] in the space shared with texts."""
        pixels = self.preparation(images).to(device=self.model.device, dtype=self.model.dtype)
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output).float()

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """[B, D] in the space shared with pictures; a text is cut where the network's positions end."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        ids = tokens.input_ids.to(self.model.device)
        return self.model.text_projection(self.model.text_model(input_ids=ids).pooler_output).float()


class DinoExtractor:
    """The class token of DINO (arXiv 2104.14294) or DINOv2 (2304.07193): vision transformers trained unlabelled."""

    KINDS = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")

    def __init__(self, model: Any, preparation: Preparation, name: str = "dino-cls") -> None:
        self.model, self.preparation = model, preparation
        self.name, self.hash = name, content_hash(model, asdict(preparation))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> DinoExtractor:
        """From a folder with ``model.safetensors``, or a hub id that has been downloaded.

        Raises:
            ModelError: not there, another kind of model, or keys missing.
        """
        from transformers import AutoModel

        place = find_model(folder, "DINO")
        kind = _of_kind(place, cls.KINDS)
        # DINO was saved without the pooler that a plain ViT would add with random weights.
        more: dict[str, Any] = {"add_pooling_layer": False} if kind == "vit" else {}
        return cls(_whole(AutoModel, place, **more), Preparation.read(place))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The class token after the last norm [B, D]."""
        pixels = self.preparation(images).to(device=self.model.device, dtype=self.model.dtype)
        return self.model(pixel_values=pixels).last_hidden_state[:, 0].float()


def _whole(kind: Any, folder: Path, **more: Any) -> Any:
    """A model for inference, none of whose weights were missing (transformers would fill those with noise)."""
    model, info = explained(
        str(folder),
        lambda: kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **more
        ),
    )
    wrong = [*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]
    if wrong:
        raise ModelError(f"{folder} lacks the weights {min(wrong)!r} in their shape. Copy it again.")
    return model.eval().requires_grad_(False)


def _of_kind(folder: Path, kinds: tuple[str, ...]) -> str:
    kind = str(read_json(folder / "config.json").get("model_type"))
    if kind not in kinds:
        raise ModelError(f"{folder} holds a model of type {kind!r}; expected {' or '.join(kinds)}.")
    return kind
