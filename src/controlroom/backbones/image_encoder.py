"""CLIP's image encoder: from pictures to the features that image prompts are made of.

Radford et al., arXiv 2103.00020. Pictures are prepared as CLIP was trained: shorter side to the encoder's size
(bicubic), middle square, channels normalised. Equal to transformers' `CLIPImageProcessor` on Pillow, without its
dependence on whether torchvision is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from controlroom.backbones.completeness import check_keys
from controlroom.backbones.loading import keep
from controlroom.backbones.model_files import explained, read_json
from controlroom.core.backbone import Backbone
from controlroom.core.errors import ModelError

_MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)
_STD = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)


def load_image_encoder(folder: Path, backbone: Backbone) -> Any:
    """A `CLIPVisionModelWithProjection` in the backbone's precision, on its device; kept for the next run.

    Raises:
        ModelError: not there, another kind of model, or keys missing.
    """

    def load() -> Any:
        from transformers import CLIPVisionModelWithProjection

        model = explained(
            str(folder),
            lambda: CLIPVisionModelWithProjection.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True
            ),
        )
        check_keys(model, folder)
        encoder: Any = model
        return encoder.to(device=backbone.device, dtype=backbone.dtype).eval().requires_grad_(False)

    return keep(backbone, ("image_encoder",), folder, load)


def check_image_encoder(encoder: Any) -> None:
    """It is a CLIP image encoder with its projection.

    Raises:
        ModelError: it is not.
    """
    config = getattr(encoder, "config", None)
    if not hasattr(encoder, "visual_projection") or getattr(config, "image_size", None) is None:
        raise ModelError(
            f"The image encoder is a {type(encoder).__name__}; expected a CLIPVisionModelWithProjection or its folder."
        )


def encoder_width(folder: Path, states: bool) -> int:
    """Width of the features of an encoder in a folder: of its states, or of the space shared with text.

    Raises:
        ModelError: its configuration cannot be read.
    """
    config = read_json(folder / "config.json")
    return int(config.get("hidden_size", 768) if states else config.get("projection_dim", 512))


def clip_pixels(pictures: Sequence[Image.Image], side: int) -> torch.Tensor:
    """RGB pictures -> [n, 3, side, side] as CLIP's image encoder reads them."""
    rows = []
    for picture in pictures:
        short, long = sorted(picture.size)
        longer = int(side * long / short)
        width, height = (side, longer) if picture.width <= picture.height else (longer, side)
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - side) // 2, (height - side) // 2
        square = np.asarray(resized, np.float32)[top : top + side, left : left + side] / np.float32(255)
        rows.append((square - _MEAN) / _STD)
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()


def image_features(encoder: Any, pixels: torch.Tensor, states: bool) -> torch.Tensor:
    """Features of [n, 3, side, side]: [n, width] in the space shared with text, or states of the last layer but one.

    Args:
        encoder: CLIP's image encoder.
        pixels: from `clip_pixels`.
        states: [n, 1 + patches, width] before the last layer, instead of one vector for each picture.
    """
    pixels = pixels.to(device=encoder.device, dtype=encoder.dtype)
    if states:
        return encoder(pixels, output_hidden_states=True).hidden_states[-2]
    return encoder(pixels).image_embeds
