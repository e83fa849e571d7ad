"""What a run gives back."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from controlroom.core.spec import RunSpec


@dataclass
class RunResult:
    """Pictures, latents and the manifest of a run.

    Attributes:
        images: list of `PIL.Image` (``pil``), array [B, H, W, 3] in [0, 1] (``np``), tensor [B, 3, H, W] in [0, 1]
            (``pt``), or the latents as the sampler left them (``latent``).
        latents: [B, C, h, w] as the sampler left them, not divided by the autoencoder's scaling factor.
        manifest: the run as data: ``spec``, ``cost``, ``seeds``, ``warnings``, ``dropped``, ``versions``, ``inputs``
            (hash of every input), ``replayable`` and, where it is false, ``reasons``.
        states: final latents of the other pictures that controls drew along, by name (``source`` of Prompt-to-Prompt);
            `Pipeline.decode` shows them.
        masks: where controls found the words of their masks at the last step: [images, 1, height, width] in [0, 1], by
            control (``FromInversion.mask``); `mask_picture` shows them.
        spec: the specification the run was made from, with the seed that was used.
        cancelled: the run was stopped before its last step.
    """

    images: Any
    latents: torch.Tensor
    manifest: dict[str, Any]
    spec: RunSpec | None = None
    cancelled: bool = False
    states: dict[str, torch.Tensor] = field(default_factory=dict)
    texts: list[dict[str, str]] = field(default_factory=list, repr=False)
    masks: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def mask_picture(self, name: str | None = None, index: int = 0) -> Image.Image:
        """A mask that was found by words, as a grey picture of the run's size.

        Args:
            name: which one; None: the only one.
            index: of which picture.

        Raises:
            InputError: there is none of that name.
        """
        from PIL import Image

        from controlroom.core.errors import InputError

        known = ", ".join(self.masks) or "none"
        if name not in self.masks and not (name is None and len(self.masks) == 1):
            raise InputError(f"This run found no mask {name!r} by words; it found: {known}.")
        mask = self.masks[name or next(iter(self.masks))][index, 0]
        return Image.fromarray((mask.float().clamp(0, 1) * 255).round().byte().cpu().numpy())

    def save(self, path: str | os.PathLike[str], index: int = 0) -> None:
        """Write picture ``index`` as PNG with its manifest, so that ``controlroom replay`` can draw it again.

        Raises:
            OutputError: the file could not be written.
            InputError: the images are not PIL images.
        """
        from PIL import Image

        from controlroom.core.errors import InputError
        from controlroom.core.png import save_png

        picture = self.images[index]
        if not isinstance(picture, Image.Image):
            raise InputError('RunResult.save needs PIL images; run with output_type="pil".')
        save_png(picture, path, self.texts[index] if index < len(self.texts) else None)
