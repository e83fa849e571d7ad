"""What a run gives back."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

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
