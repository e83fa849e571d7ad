"""Editing a picture by words: by an instruction, or from the words it shows to the words it shall show.

Only builds runs. The method is chosen by one simple rule, which is told (`EditPlan.why`): an instruction is followed by
InstructPix2Pix (arXiv 2211.09800); two descriptions are edited by Prompt-to-Prompt (arXiv 2208.01626), or by MasaCtrl
(arXiv 2304.08465) where a pose or shape is asked for, on the picture's DDIM inversion; a target alone is drawn over the
picture (SDEdit, arXiv 2108.01073). Whatever can be wrong with words, mask and picture is found before anything is
inverted.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from controlroom.backbones.loading import THEATRE
from controlroom.controls.editing.from_inversion import FromInversion
from controlroom.controls.editing.image_to_image import ImageToImage
from controlroom.controls.editing.imagic import Imagic
from controlroom.controls.editing.instruct_pix2pix import InstructPix2Pix
from controlroom.controls.word_mask import WordMask
from controlroom.core.control import Control
from controlroom.core.errors import InputError, ModelError
from controlroom.core.files import atomic_path, write_atomically
from controlroom.core.images import ImageSource, fit, load_image, load_mask
from controlroom.core.png import png_bytes
from controlroom.core.spec import RunSpec
from controlroom.sampling.inversion import invert
from controlroom.sampling.inverted import Inversion, Quality, read_inversion
from controlroom.sampling.inverted_pictures import read_pixels
from controlroom.tasks.edit_checks import check_instructed, check_mask, check_options, check_words
from controlroom.tasks.edit_method import (
    INSTRUCTED,
    INVERSIONS,
    EditOptions,
    Method,
    Words,
    choose,
    control_of,
    prompt_of,
)

if TYPE_CHECKING:
    from controlroom.core.result import RunResult
    from controlroom.sampling.pipeline import Pipeline

_MAX_RATIO = 4.0
_GUTTER = 8


@dataclass(frozen=True)
class EditPlan:
    """An edit that is ready to run: words, mask and picture fit each other.

    Attributes:
        pipeline: the model it runs on.
        options: as given.
        image: the picture as it was given.
        before: the picture, RGB, at the size of the result.
        words: what was said.
        method: what edits.
        why: the reason, one sentence.
        notes: what a person should know, one sentence each.
    """

    pipeline: Pipeline
    options: EditOptions
    image: ImageSource
    before: Image.Image
    words: Words
    method: Method
    why: str
    notes: tuple[str, ...] = ()

    @property
    def inverts(self) -> bool:
        """Whether the run starts from an inversion of the picture."""
        return self.method in INVERSIONS

    def invert(self, on_progress: Callable[[int, int], Any] | None = None) -> Inversion | None:
        """Find the picture's noise, or read it from the file of the options; None for a method that needs none.

        Raises:
            InputError: it diverged, with the picture's name; a file of another picture, prompt or method.
        """
        if not self.inverts:
            return None
        options, method = self.options, INVERSIONS[self.method]
        if options.inversion is not None and os.path.exists(options.inversion):
            return self._read(options.inversion, method)
        return invert(
            self.pipeline,
            self.image,
            self.words.source or "",
            method,
            options.num_inference_steps,
            options.guidance_scale if method == "null_text" else None,
            negative_prompt=options.negative_prompt,
            height=self.before.height,
            width=self.before.width,
            mode="stretch",
            null_text=options.null_text,
            on_progress=on_progress,
        )

    def _read(self, path: str, method: str) -> Inversion:
        found = read_inversion(path)
        if found.prompts != (self.words.source,) or found.settings.method != method:
            raise InputError(
                f"{path!r} is the {found.settings.method} inversion with the prompt {', '.join(found.prompts)!r}; this "
                f"edit needs {method} with {self.words.source!r}. Give another file, which will be written."
            )
        size = (self.before.height, self.before.width)
        backbone = self.pipeline.backbone
        pixels = read_pixels([self.image], size, "stretch").to(backbone.device, backbone.dtype)
        with torch.no_grad():
            own = backbone.encode_picture(pixels).cpu().float()
        stored = found.latents[0].float()
        if own.shape != stored.shape or float((own - stored).abs().mean()) > 0.02 * float(own.std()):
            raise InputError(f"{path!r} is the inversion of another picture. Give another file, which will be written.")
        return found

    def fitted(self) -> None:
        """Fit the picture, for ``imagic`` (where it was not yet); nothing for other methods.

        Raises:
            UnfinishedError: it was stopped; the same call continues it.
        """
        if self.method == "imagic":
            from controlroom.training.recipes.imagic import fit_imagic

            assert self.options.fit is not None and self.words.target is not None
            size = {"size": (self.before.height, self.before.width)}
            settings = self.options.imagic.model_copy(update=size)
            fit_imagic(self.pipeline, self.image, self.words.target, self.options.fit, settings)

    def spec(self, inversion: Inversion | str | None = None, seed: int | None = None) -> RunSpec:
        """The run.

        Args:
            inversion: what `invert` gave, or its file.
            seed: of the noise, where there is any.
        """
        options, words = self.options, self.words
        return RunSpec(
            model=self.pipeline.model,
            prompt=prompt_of(self.method, words),
            negative_prompt=options.negative_prompt,
            controls=self._controls(inversion),
            height=self.before.height,
            width=self.before.width,
            num_inference_steps=options.num_inference_steps,
            scheduler="ddim" if self.inverts else None,
            guidance_scale=options.guidance_scale,
            seed=seed,
        )

    def _controls(self, inversion: Inversion | str | None) -> list[Control]:
        options, source, target = self.options, self.words.source or "", self.words.target or ""
        mask = self._mask()
        if options.words:
            mask = WordMask(options.words, threshold=options.mask_threshold)
        match self.method:
            case "instruct_pix2pix":
                return [InstructPix2Pix(self.image, options.image_guidance_scale, mask=mask)]
            case "image_to_image":
                return [ImageToImage(self.image, 0.8 if options.strength is None else options.strength, mask=mask)]
            case "imagic":
                return [Imagic(options.fit, 1.2 if options.strength is None else options.strength)]
            case _:
                start = FromInversion(inversion, 1.0 if options.strength is None else options.strength, mask=mask)
                return [start, control_of(self.method, source, target)]

    def _mask(self) -> Any:
        """The mask as it was given; stretched with the picture where that was."""
        given, size = self.options.mask, self.before.size
        if given is None or not _stretched(load_image(self.image), size, 1.04):
            return given
        return Image.fromarray(np.rint(load_mask(given, size) * 255).astype(np.uint8), "L")

    def finished(self, run: RunResult, inversion: Inversion | None = None) -> EditResult:
        """The result out of what the run of `spec` gave."""
        return EditResult(
            image=run.images[0],
            before=self.before,
            mask=run.mask_picture() if self.options.words else None,
            manifest=run.manifest,
            text=run.texts[0],
            quality=None if inversion is None else inversion.quality,
            notes=(*self.notes, *(() if inversion is None else inversion.warnings)),
            plan=self,
        )


@dataclass(frozen=True)
class EditResult:
    """What an edit gives.

    Attributes:
        image: the edited picture.
        before: the picture that was given, at that size.
        mask: where the words of the mask were found, white; None without words.
        manifest: of the run.
        text: of the PNG, so that ``controlroom replay`` draws it again.
        quality: how well the inverted picture comes back without an edit; None for methods that invert nothing.
        notes: what a person should know, one sentence each.
        plan: what was run.
    """

    image: Image.Image
    before: Image.Image
    mask: Image.Image | None
    manifest: dict[str, Any]
    text: dict[str, str]
    quality: Quality | None
    notes: tuple[str, ...]
    plan: EditPlan

    @property
    def before_after(self) -> Image.Image:
        """The picture, and beside it the edited one."""
        sheet = Image.new("RGB", (self.before.width * 2 + _GUTTER, self.before.height), (255, 255, 255))
        sheet.paste(self.before, (0, 0))
        sheet.paste(self.image, (self.before.width + _GUTTER, 0))
        return sheet

    def save(self, path: str | os.PathLike[str]) -> tuple[Path, ...]:
        """Write the PNG, beside it the before/after picture and the mask that was found by words: all, or none.

        A device (``/dev/stdout``) gets the picture alone.

        Returns:
            The paths that were written.

        Raises:
            OutputError: a file could not be written.
        """
        picture = Path(path)
        content = png_bytes(self.image, self.text)
        if picture.exists() and not picture.is_file() and not picture.is_dir():
            write_atomically(picture, content)
            return (picture,)
        pair, mask = beside(picture)
        contents = {picture: content, pair: png_bytes(self.before_after)}
        if self.mask is not None:
            contents[mask] = png_bytes(self.mask)
        with ExitStack() as stack:
            for file, data in contents.items():
                stack.enter_context(atomic_path(file)).write_bytes(data)
        return tuple(contents)


def beside(picture: Path) -> tuple[Path, Path]:
    """Where before/after and mask are written: ``red.png`` -> ``red.before_after.png``, ``red.mask.png``."""
    return picture.with_name(f"{picture.stem}.before_after.png"), picture.with_name(f"{picture.stem}.mask.png")


def edit(
    image: ImageSource,
    instruction: str | None = None,
    *,
    source: str | None = None,
    target: str | None = None,
    seed: int | None = None,
    options: EditOptions | None = None,
    pipeline: Pipeline | None = None,
    on_progress: Callable[[int, int], Any] | None = None,
) -> EditResult:
    """Edit a picture by words.

    Args:
        image: path, bytes, PIL picture, array or tensor.
        instruction: what to do ("make the shirt red").
        source: or: what the picture shows.
        target: what it shall show.
        seed: of the noise, where there is any; None: drawn.
        options: method, mask, steps and the rest.
        pipeline: a loaded model; None: the one of the options is loaded.
        on_progress: called with the steps of the inversion that are done, and all of them.

    Raises:
        InputError: words, mask or picture that cannot be used; the message names them.
        ModelError: no such model, or one that cannot follow instructions.
    """
    plan = plan_edit(image, instruction, source=source, target=target, options=options, pipeline=pipeline)
    plan.fitted()
    inversion = plan.invert(on_progress)
    kept = keep_inversion(plan, inversion)
    return plan.finished(plan.pipeline.run(plan.spec(kept, seed)), inversion)


def keep_inversion(plan: EditPlan, inversion: Inversion | None) -> Inversion | str | None:
    """Write the inversion where the options ask for it; what the run is to start from."""
    path = plan.options.inversion
    if inversion is None or path is None:
        return inversion
    if not os.path.exists(path):
        inversion.save(path)
    return path


def plan_edit(
    image: ImageSource,
    instruction: str | None = None,
    *,
    source: str | None = None,
    target: str | None = None,
    options: EditOptions | None = None,
    pipeline: Pipeline | None = None,
) -> EditPlan:
    """Choose the method and check words, mask and picture; nothing is inverted or drawn yet. See `edit`."""
    chosen = options or EditOptions()
    words = Words(instruction, source, target)
    method, why = choose(words, chosen.method)
    check_options(method, chosen)
    picture = load_image(image)
    if chosen.mask is not None:
        check_mask(chosen.mask, picture.size, image)
    pipe = _loaded(method, chosen) if pipeline is None else pipeline
    if method == "instruct_pix2pix":
        check_instructed(pipe)
    check_words(method, words, chosen, pipe)
    size = chosen.size or size_for(picture.size, pipe)
    return EditPlan(pipe, chosen, image, fit(picture, *size, "stretch"), words, method, why, _stretched(picture, size))


def _loaded(method: Method, options: EditOptions) -> Pipeline:
    from controlroom.sampling.pipeline import Pipeline

    if method != "instruct_pix2pix" or options.model != THEATRE:
        return Pipeline.from_pretrained(options.model)
    try:
        return Pipeline.from_pretrained(INSTRUCTED)
    except ModelError as error:
        raise ModelError(
            f"Instructions need a model that was trained to follow them. {error} Say what the picture shows and shall "
            "show instead (--from, --to), or name an InstructPix2Pix model with --model, such as "
            "timbrooks/instruct-pix2pix."
        ) from error


def size_for(size: tuple[int, int], pipe: Pipeline) -> tuple[int, int]:
    """Width and height in the proportions of a picture, with the area that the model was trained at."""
    levels = len(pipe.unet.config.block_out_channels)
    step = pipe.backbone.pixels_per_latent * 2 ** (levels - 1)
    height, width = pipe.backbone.default_size
    ratio = float(np.clip(size[0] / size[1], 1 / _MAX_RATIO, _MAX_RATIO))
    side = (height * width) ** 0.5
    found = tuple(max(step, round(s / step) * step) for s in (side * ratio**0.5, side / ratio**0.5))
    return found[0], found[1]


def _stretched(picture: Image.Image, size: tuple[int, int], bearable: float = 1.1) -> tuple[str, ...]:
    by = (picture.width / picture.height) / (size[0] / size[1])
    if 1 / bearable < by < bearable:
        return ()
    return (f"the picture of {picture.width} x {picture.height} pixels is stretched to {size[0]} x {size[1]}",)
