"""The condition that ControlNets for inpainting read (control_v11p_sd15_inpaint): the picture, and -1 where it is to be
drawn anew.

It is a tensor, because a picture has no values below 0; `ControlNet` takes it as it is.
"""

from __future__ import annotations

import numpy as np
import torch

from controlroom.core.errors import InputError
from controlroom.core.images import ImageSource, fit, load_image, load_mask

HOLE = -1.0
"""Value of the pixels to be drawn, in every channel."""


def inpaint_condition(image: ImageSource, mask: ImageSource, size: tuple[int, int] | None = None) -> torch.Tensor:
    """[3, H, W]: the picture in [0, 1], and `HOLE` where the mask is white (above one half).

    Args:
        image: the picture.
        mask: white where it is to be drawn anew; stretched to the picture.
        size: width and height of the run; None: the picture's own.

    Raises:
        InputError: a picture or mask that cannot be read, or a mask that is white nowhere.
    """
    picture = load_image(image)
    picture = picture if size is None else fit(picture, *size, "stretch")
    hole = load_mask(mask, picture.size) > 0.5
    if not hole.any():
        raise InputError("The mask is white nowhere, so nothing would be drawn anew. Paint that part white.")
    pixels = torch.from_numpy(np.asarray(picture, np.float32) / np.float32(255)).permute(2, 0, 1).contiguous()
    return pixels.masked_fill(torch.from_numpy(hole), HOLE)
