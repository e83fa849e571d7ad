"""The theatre's CLIP as an image encoder of its own, that reads pictures as every other CLIP does.

The theatre's CLIP was trained on pixels x in [-1, 1]; image prompts give every encoder CLIP's own normalisation,
x' = ((x + 1) / 2 - mean) / std. The difference is affine, so it goes into the weights: the patches' kernel is scaled by
2 std, and what the constant 2 mean - 1 gives is added to the positions of the patches. The features are the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import CLIPModel, CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from controlroom.backbones.image_encoder import load_image_encoder
from controlroom.backbones.loading import THEATRE, find_model
from controlroom.core.errors import ModelError

if TYPE_CHECKING:
    from controlroom.sampling.pipeline import Pipeline


def image_encoder_for(pipe: Pipeline, folder: str | None, reader: str) -> Any:
    """The image encoder in a folder; None: that of the theatre, for its own model.

    Args:
        pipe: the model that is trained on.
        folder: of a `CLIPVisionModelWithProjection`.
        reader: what reads it, for the message.

    Raises:
        ModelError: there is none, or none is named for another model than the theatre's.
    """
    if folder is not None:
        return load_image_encoder(find_model(folder, "image encoder"), pipe.backbone)
    if pipe.model != THEATRE:
        raise ModelError(f"{reader} needs an image encoder. Name the folder of one: image_encoder=….")
    return image_encoder_of(find_model(f"{THEATRE}/clip", "CLIP"))


def image_encoder_of(clip_folder: Path) -> CLIPVisionModelWithProjection:
    """Image tower and projection of a CLIP that was trained on pixels in [-1, 1], for CLIP's normalisation.

    Args:
        clip_folder: of the theatre's CLIP, in transformers' layout.
    """
    clip: Any = CLIPModel.from_pretrained(clip_folder)
    config = clip.config.vision_config
    config.projection_dim = clip.config.projection_dim
    encoder = CLIPVisionModelWithProjection(config)
    encoder.vision_model.load_state_dict(clip.vision_model.state_dict())
    encoder.visual_projection.load_state_dict(clip.visual_projection.state_dict())
    _renormalise(encoder)
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def _renormalise(encoder: Any) -> None:
    embeddings: Any = encoder.vision_model.embeddings
    kernel: nn.Parameter = embeddings.patch_embedding.weight  # [width, 3, patch, patch], without a bias
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    constant = (kernel * (2 * mean - 1)).sum(dim=(1, 2, 3))
    kernel.mul_(2 * std)
    embeddings.position_embedding.weight[1:].add_(constant)  # 0 is the class token, which sees no pixels
