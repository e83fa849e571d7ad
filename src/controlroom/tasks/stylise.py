"""Stylising: a picture drawn anew as words say, with its geometry kept (ControlNet img2img with estimated depth).

Only builds a run: `ImageToImage` (SDEdit, arXiv 2108.01073) starts from the picture, a depth ControlNet (arXiv
2302.05543) holds what is near and far, and UniPC (arXiv 2302.04867) needs few steps. The depth map is written beside
the result, can be edited and given again: the same file gives the same picture.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from controlroom.backbones.loading import THEATRE, find_model
from controlroom.controls.editing.image_to_image import ImageToImage
from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.core.control import describe
from controlroom.core.errors import InputError
from controlroom.core.files import atomic_path, write_atomically
from controlroom.core.images import ImageSource, load_image
from controlroom.core.png import png_bytes
from controlroom.core.spec import RunSpec
from controlroom.signals.choose import choose_signal
from controlroom.signals.signal import Signal

if TYPE_CHECKING:
    from controlroom.core.result import RunResult
    from controlroom.sampling.pipeline import Pipeline

_GREY = 10  # spread of the channels that a compressed grey picture may have, of 255


class StyliseOptions(BaseModel):
    """Everything beside picture, depth and words that a stylised picture depends on.

    Raises:
        InputError: an unknown or ill-typed option.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), arbitrary_types_allowed=True)

    model: str = THEATRE
    """``theatre``, a folder, a hub id, or a ``.safetensors`` file."""
    controlnet: Any = f"{THEATRE}/multi"
    """A ControlNet for depth, or for several kinds."""
    depth_model: str | None = None
    """Folder of a network that estimates depth (Depth Anything, DPT, ZoeDepth); None: the theatre's."""
    strength: float = Field(default=0.8, gt=0, le=1)
    """How far the picture may go: the share of the steps that is run. 1 keeps little but the geometry."""
    depth_scale: float = Field(default=1.0, ge=0)
    """How strongly the depth counts; 0: not at all."""
    size: tuple[int, int] | None = None
    """Width and height in pixels; None: the picture's proportions, as many pixels as the model was trained at."""
    negative_prompt: str | None = None
    num_inference_steps: int = Field(default=20, ge=1)
    """Of the whole schedule; the share ``strength`` of them is run."""
    guidance_scale: float = 5.0
    scheduler: str | None = "unipc"

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise InputError(describe("The stylising", error)) from error


@dataclass(frozen=True)
class StylisePlan:
    """A stylising that is ready to run.

    Attributes:
        spec: the run.
        pipeline: the model it runs on.
        source: the picture, RGB, of the size it came in.
        depth: map that the ControlNet reads, RGB, near is bright; None if it does not count.
        given: the file that the depth came from; it is never written over.
    """

    spec: RunSpec
    pipeline: Pipeline
    source: Image.Image
    depth: Image.Image | None
    given: Path | None = None

    def finished(self, run: RunResult) -> StyliseResult:
        """The result out of what the run of `spec` gave."""
        return StyliseResult(run.images[0], self.depth, run.manifest, run.texts[0], self)


@dataclass(frozen=True)
class StyliseResult:
    """What stylising gives.

    Attributes:
        image: the picture.
        depth: map it was drawn along.
        manifest: of the run.
        text: of the PNG, so that ``controlroom replay`` draws it again.
        plan: what was run.
    """

    image: Image.Image
    depth: Image.Image | None
    manifest: dict[str, Any]
    text: dict[str, str]
    plan: StylisePlan

    def save(self, path: str | os.PathLike[str]) -> tuple[Path, ...]:
        """Write the PNG, and the depth beside it (``NAME.depth.png``): both, or neither.

        A file that the depth itself came from is left as it is, and a device (``/dev/stdout``) gets the PNG alone.

        Returns:
            The paths of the PNG and of the depth, as far as they exist.

        Raises:
            OutputError: a file could not be written.
        """
        picture = Path(path)
        content, beside = png_bytes(self.image, self.text), depth_beside(picture)
        device = picture.exists() and not picture.is_file() and not picture.is_dir()
        if device or self.depth is None:
            write_atomically(picture, content)
            return (picture,)
        if self.plan.given is not None and beside.exists() and beside.samefile(self.plan.given):
            write_atomically(picture, content)
            return picture, beside
        with atomic_path(picture) as first, atomic_path(beside) as second:
            first.write_bytes(content)
            second.write_bytes(png_bytes(self.depth, {}))
        return picture, beside


def depth_beside(picture: Path) -> Path:
    """Where the depth of a result is written: ``town.png`` -> ``town.depth.png``."""
    return picture.with_name(f"{picture.stem}.depth.png")


def plan_stylise(
    image: ImageSource,
    prompt: str,
    *,
    depth: ImageSource | None = None,
    seed: int | None = None,
    options: StyliseOptions | None = None,
    reader: Signal | None = None,
    pipeline: Pipeline | None = None,
) -> StylisePlan:
    """Find the depth, and build the run; nothing is drawn yet.

    Args:
        image: the picture; see `load_image`.
        prompt: what the result shows, and in which style.
        depth: a depth map, near is bright; None: it is estimated.
        seed: of the noise; None: drawn.
        options: everything else.
        reader: estimates depth; None: ``options.depth_model``.
        pipeline: the loaded model; None: ``options.model`` is loaded.

    Raises:
        InputError: a picture or map that cannot be used.
        ModelError: weights that are missing or do not fit.
    """
    options = options or StyliseOptions()
    picture = load_image(image)
    if isinstance(options.controlnet, str | os.PathLike) and options.depth_scale:
        find_model(options.controlnet, "depth ControlNet")
    found = _depth(picture, depth, reader, options)
    if pipeline is None:
        from controlroom.sampling.pipeline import Pipeline

        pipeline = Pipeline.from_pretrained(options.model)
    backbone = pipeline.backbone
    multiple = backbone.pixels_per_latent * 2 ** (len(backbone.unet.config.block_out_channels) - 1)
    width, height = options.size or proportioned(picture.size, backbone.default_size, multiple)
    # A file is named, so that the PNG carries its name and hash; a picture in memory travels in the PNG.
    start: Any = os.fspath(image) if isinstance(image, str | os.PathLike) else picture
    controls: list[Any] = [ImageToImage(image=start, strength=options.strength)]
    if found is not None:
        controls.append(ControlNet(options.controlnet, found, scale=options.depth_scale, kind="depth"))
    spec = RunSpec(
        model=pipeline.model or options.model,
        prompt=prompt,
        negative_prompt=options.negative_prompt,
        controls=controls,
        width=width,
        height=height,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        scheduler=options.scheduler,
        seed=seed,
    )
    return StylisePlan(spec, pipeline, picture, found, _file_of(depth))


def stylise(
    image: ImageSource,
    prompt: str,
    *,
    depth: ImageSource | None = None,
    seed: int | None = None,
    options: StyliseOptions | None = None,
    reader: Signal | None = None,
    pipeline: Pipeline | None = None,
) -> StyliseResult:
    """The picture drawn anew as words say, with its geometry kept; arguments and errors as in `plan_stylise`."""
    plan = plan_stylise(image, prompt, depth=depth, seed=seed, options=options, reader=reader, pipeline=pipeline)
    return plan.finished(plan.pipeline.run(plan.spec))


def proportioned(size: tuple[int, int], trained: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Width and height with about the proportions of ``size`` and the area of ``trained``, in multiples.

    >>> proportioned((1920, 1080), (512, 512), 64), proportioned((300, 300), (128, 128), 64)
    ((704, 384), (128, 128))
    """
    area, ratio = trained[0] * trained[1], size[0] / size[1]
    sides = ((area * ratio) ** 0.5, (area / ratio) ** 0.5)
    width, height = (max(multiple, round(side / multiple) * multiple) for side in sides)
    return width, height


def _depth(
    picture: Image.Image, given: ImageSource | None, reader: Signal | None, options: StyliseOptions
) -> Image.Image | None:
    """The map, or None if it does not count.

    Raises:
        InputError: what was given is no depth map.
    """
    if options.depth_scale == 0:
        return None
    if given is None:
        return (reader or choose_signal("depth", options.depth_model))(picture).picture
    depth = load_image(given)
    spread = float(np.percentile(np.ptp(np.asarray(depth.convert("RGB"), np.int16), axis=-1), 99))
    if spread > _GREY:
        raise InputError("The depth map has colours. Give a grey one, near is bright, or leave it out.")
    return depth


def _file_of(source: ImageSource | None) -> Path | None:
    """The file that a map was given as, if it was one."""
    if not isinstance(source, str | os.PathLike):
        return None
    try:
        return Path(source) if Path(source).is_file() else None
    except (OSError, ValueError):
        return None
