"""What the engine asks of a network; `controlroom.backbones` fulfils it for Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import torch

    from controlroom.core.branch import Condition, Layout
    from controlroom.core.control import Residuals
    from controlroom.core.sites import Site


class Backbone(Protocol):
    """A denoising network with its text encoders and its autoencoder."""

    name: ClassVar[str]
    """``sd1``, ``sd2`` or ``sdxl``."""
    unet: Any
    """`UNet2DConditionModel`, used as it is."""
    vae: Any
    """`AutoencoderKL`."""
    scheduler: Any
    """The scheduler whose configuration runs start from; a run works on copies."""
    kept: dict[tuple[Any, ...], Any]
    """What controls loaded from files, kept for the next run."""

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the network."""
        ...

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along one side of a latent pixel, 8 for Stable Diffusion."""
        ...

    @property
    def latent_channels(self) -> int:
        """Channels of the latents, 4 for Stable Diffusion."""
        ...

    def tokenizers(self) -> tuple[Any, ...]:
        """CLIP tokenizers in the order in which their states are joined."""
        ...

    def encode_text(
        self,
        prompts: Sequence[str],
        negative: bool = False,
        size: tuple[int, int] | None = None,
        clip_skip: int | None = None,
        second: Sequence[str] | None = None,
    ) -> Condition:
        """Condition of one row for each prompt; ``negative`` for the branch without the prompt, ``size`` in pixels."""
        ...

    def encode_ids(
        self,
        ids: Sequence[torch.Tensor],
        negative: bool = False,
        size: tuple[int, int] | None = None,
        clip_skip: int | None = None,
        keep: torch.Tensor | None = None,
    ) -> Condition:
        """Condition of token ids [rows, 77], one tensor for each tokenizer; ``keep`` [rows, 77] is 0 where hidden."""
        ...

    def text_widths(self) -> tuple[int, ...]:
        """Width of each text encoder's states, in the order in which they are joined."""
        ...

    def encode_picture(self, pixels: torch.Tensor, generator: Any = None) -> torch.Tensor:
        """[B, 3, H, W] in [-1, 1] -> scaled latents; the mean of the posterior, or a sample with ``generator``."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the sampler has them -> [B, 3, H, W] in [-1, 1], not clamped."""
        ...

    def attention_sites(self, hw: tuple[int, int]) -> tuple[Site, ...]:
        """Attention sites in the order of execution, for latents of that size."""
        ...

    def feature_sites(self, hw: tuple[int, int]) -> tuple[Site, ...]:
        """Feature sites in the order of execution, for latents of that size."""
        ...

    def added_conditions(self, condition: Condition) -> dict[str, torch.Tensor] | None:
        """What the UNet (and a ControlNet) is told beside the text, under diffusers' names; None: nothing."""
        ...

    def predict(
        self, sample: torch.Tensor, timestep: Any, condition: Condition, residuals: Residuals | None, layout: Layout
    ) -> torch.Tensor:
        """One forward of the UNet: [rows, channels, h, w], in the parameterisation it was trained in."""
        ...
