"""One model with what every control is timed on, and the pipelines of diffusers that it is timed against."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import controlroom as cr
from benchmarks import models

PROMPT = "a cat and a dog on the beach"
Call = Callable[..., Any]
Pair = tuple[str, Call, Call]
"""Title, this engine, diffusers; both draw when they are called."""


def peer(kind: type, source: Any, **more: Any) -> Any:
    """A pipeline of diffusers with the parts of another one that it takes, and some of its own; silent."""
    known = inspect.signature(kind).parameters
    parts = {name: part for name, part in source.components.items() if name in known}
    if "requires_safety_checker" in known:
        parts["requires_safety_checker"] = False
    made = kind(**{**parts, **more})
    made.set_progress_bar_config(disable=True)
    return made


def widened(unet: Any, channels: int) -> Any:
    """The same network, of the same tensors, that reads more channels; what it reads of those is random."""
    with torch.device("meta"):
        made = type(unet).from_config(unet.config, in_channels=channels)
    weight = unet.conv_in.weight.detach()
    more = torch.randn(
        weight.shape[0], channels - weight.shape[1], *weight.shape[2:], generator=torch.Generator().manual_seed(0)
    )
    wide = torch.cat([weight, weight.std() * more], dim=1)
    made.load_state_dict({**unet.state_dict(), "conv_in.weight": wide}, assign=True)
    return made.eval()


class Bench:
    """One model with what every control needs.

    Attributes:
        source: diffusers pipeline.
        ours: the same components.
        arguments: of a call, on both sides.
        picture: RGB, of the size that is drawn.
        factor: pixels of a latent.
    """

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps = name, steps
        self.source = models.pipeline(name)
        self.ours = cr.Pipeline.from_diffusers(self.source)
        self.factor = self.ours.backbone.pixels_per_latent
        size = models.pixels(name)
        noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        self.picture = Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)
        self.arguments: dict[str, Any] = {"prompt": PROMPT, "height": size, "width": size, "num_inference_steps": steps}

    def run(self, pipe: Any, output: str = "pil", sized: bool = True, **more: Any) -> Any:
        """One call with noise of its own generator; some pipelines have the size from a picture alone."""
        arguments = {key: value for key, value in self.arguments.items() if sized or key not in ("height", "width")}
        generator = torch.Generator().manual_seed(1)
        return pipe(**{**arguments, **more}, generator=generator, output_type=output).images

    def pair(
        self, title: str, controls: list[Any], theirs: Any, *, ours: Any = None, sized: bool = True, **given: Any
    ) -> Pair:
        """Runs of the controls, and of a pipeline of diffusers with what it is given."""
        ours = ours or self.ours
        return (
            title,
            lambda output="pil": self.run(ours, output, controls=controls),
            lambda output="pil": self.run(theirs, output, sized, **given),
        )

    def with_unet(self, unet: Any) -> tuple[Any, Any]:
        """diffusers' pipeline and ours with another UNet."""
        source = peer(StableDiffusionPipeline, self.source, unet=unet)
        return source, cr.Pipeline.from_diffusers(source)

    def controlled(self, control: Any) -> Call:
        return lambda output="pil": self.run(self.ours, output, controls=[control])

    def plain(self, output: str = "pil") -> Any:
        return self.run(self.ours, output)

    def rows(self, control: Any) -> int:
        """UNet rows of a run with a control."""
        result = self.ours(**self.arguments, controls=[control], seed=1)
        return int(result.manifest["cost"]["unet_rows"] + result.manifest["cost"]["side_rows"])
