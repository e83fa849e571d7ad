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
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from controlroom.backbones.loading import THEATRE
from controlroom.backbones.words import PromptTokens, prompt_tokens
from controlroom.controls.editing.from_inversion import FromInversion
from controlroom.controls.editing.image_to_image import ImageToImage
from controlroom.controls.editing.imagic import Imagic
from controlroom.controls.editing.instruct_pix2pix import InstructPix2Pix
from controlroom.controls.editing.masactrl import MasaCtrl
from controlroom.controls.editing.pix2pix_zero import Pix2PixZero
from controlroom.controls.editing.prompt_to_prompt import PromptToPrompt
from controlroom.controls.word_mask import WordMask
from controlroom.core.control import Control, describe
from controlroom.core.errors import InputError, ModelError
from controlroom.core.files import atomic_path, write_atomically
from controlroom.core.images import ImageSource, fit, load_image, load_mask
from controlroom.core.png import png_bytes
from controlroom.core.spec import RunSpec
from controlroom.sampling.inversion import invert
from controlroom.sampling.inverted import Inversion, NullText, Quality, read_inversion
from controlroom.sampling.inverted import Method as InversionMethod
from controlroom.sampling.inverted_pictures import read_pixels
from controlroom.training.recipes.imagic import ImagicSettings

if TYPE_CHECKING:
    from controlroom.core.result import RunResult
    from controlroom.sampling.pipeline import Pipeline

Method = Literal[
    "instruct_pix2pix", "prompt_to_prompt", "null_text", "masactrl", "pix2pix_zero", "imagic", "image_to_image"
]
METHODS: tuple[Method, ...] = get_args(Method)
INSTRUCTED = f"{THEATRE}/instruct_pix2pix"
INVERSIONS: dict[Method, InversionMethod] = {
    "prompt_to_prompt": "ddim",
    "null_text": "null_text",
    "masactrl": "ddim",
    "pix2pix_zero": "regularised",
}
"""Methods that start from an inversion of the picture, and which."""
POSE_WORDS = frozenset(
    "standing waving cheering spreading pointing walking running jumping sitting kicking dancing lying kneeling "
    "bending crouching sleeping leaning flying swimming turning turned facing looking raised raising lifted "
    "stretched folded crossed spread pose posture arm arms leg legs hand hands hips head wings tail bigger smaller "
    "larger taller wider thinner longer shorter rounder".split()
)
"""Words that ask for another pose or shape, which Prompt-to-Prompt would hold still."""
_MAX_RATIO = 4.0
_GUTTER = 8


class EditOptions(BaseModel):
    """Everything beside picture and words that an edit depends on.

    Raises:
        InputError: an unknown or ill-typed option.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), arbitrary_types_allowed=True)

    model: str = THEATRE
    """``theatre``, a folder, a hub id, or a ``.safetensors`` file."""
    method: Method | Literal["auto"] = "auto"
    mask: Any = None
    """White where the result may differ: a picture of the size of the one that is edited."""
    mask_words: str | tuple[str, ...] | None = None
    """Instead, words of what the result shows; the mask follows where the network reads them."""
    mask_threshold: float = Field(default=0.3, ge=0, lt=1)
    strength: float | None = Field(default=None, gt=0)
    """Share of the steps that is run, from the picture: less keeps more. Of ``imagic``: 0 the picture, 1 the words."""
    size: tuple[int, int] | None = None
    """Width and height in pixels; None: as many as the model was trained at, in the picture's proportions."""
    negative_prompt: str | None = None
    num_inference_steps: int = Field(default=50, ge=1, le=1000)
    guidance_scale: float = 7.5
    image_guidance_scale: float = Field(default=1.5, ge=0)
    """Of ``instruct_pix2pix``: how closely the result keeps to the picture."""
    inversion: str | None = None
    """File of the picture's inversion: read where it is there, else written, so that the result can be replayed."""
    null_text: NullText = NullText()
    fit: str | None = None
    """Of ``imagic``: folder of the fit, which takes long and can be stopped and continued."""
    imagic: ImagicSettings = ImagicSettings()

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise InputError(describe("The edit", error)) from error

    @property
    def words(self) -> tuple[str, ...]:
        """The words of the mask."""
        listed = (self.mask_words,) if isinstance(self.mask_words, str) else self.mask_words or ()
        return tuple(word.strip() for text in listed for word in text.split(","))


@dataclass(frozen=True)
class Words:
    """What was said: an instruction, or what the picture shows and shall show."""

    instruction: str | None = None
    source: str | None = None
    target: str | None = None


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
            prompt=_prompt(self.method, words),
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
        mask = options.mask
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
                return [start, _edit(self.method, source, target)]

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
    _check_options(method, chosen)
    picture = load_image(image)
    if chosen.mask is not None:
        _check_mask(chosen.mask, picture.size, image)
    pipe = _loaded(method, chosen) if pipeline is None else pipeline
    if method == "instruct_pix2pix":
        _check_instructed(pipe)
    _check_words(method, words, chosen, pipe)
    size = chosen.size or _size_for(picture.size, pipe)
    return EditPlan(pipe, chosen, image, fit(picture, *size, "stretch"), words, method, why, _stretched(picture, size))


def choose(words: Words, method: str = "auto") -> tuple[Method, str]:
    """What edits, and why.

    Raises:
        InputError: there is nothing to do, or the method needs other words.

    >>> choose(Words(source="a red cat", target="a blue cat"))
    ('prompt_to_prompt', "Prompt-to-Prompt on the DDIM inversion, word for word: 'red' becomes 'blue'")
    """
    for name, text in (("instruction", words.instruction), ("from", words.source), ("to", words.target)):
        if text is not None and not text.strip():
            raise InputError(f"The words of --{name} are empty. Say something, or leave it out.")
    if words.instruction is not None and (words.source is not None or words.target is not None):
        raise InputError("Give an instruction, or what the picture shows and shall show (--from, --to), not both.")
    if words.instruction is None and words.target is None:
        raise InputError(
            'There is nothing to do. Give --instruction "make the shirt red", or --from "a man wearing a green shirt" '
            '--to "a man wearing a red shirt".'
        )
    if method == "auto":
        return _chosen(words)
    if method not in METHODS:
        raise InputError(f"Unknown method {method!r}. Choose auto or one of {', '.join(METHODS)}.")
    if (words.instruction is not None) != (method == "instruct_pix2pix"):
        needs = "an instruction" if method == "instruct_pix2pix" else "what the picture shall show (--to)"
        raise InputError(f"The method {method} needs {needs}. Give it, or another --method.")
    if method in INVERSIONS and words.source is None:
        raise InputError(f"The method {method} inverts the picture: say what it shows (--from).")
    return method, f"{method}, as asked for"  # type: ignore[return-value]


def _chosen(words: Words) -> tuple[Method, str]:
    if words.instruction is not None:
        return "instruct_pix2pix", "InstructPix2Pix, since there is an instruction"
    assert words.target is not None
    if words.source is None:
        return "image_to_image", "image to image, since nothing says what the picture shows (--from)"
    old, new = words.source.casefold().split(), words.target.casefold().split()
    posed = [word for word in new if word.strip(",.;:!") in POSE_WORDS and word not in old]
    if posed:
        return "masactrl", f"MasaCtrl on the DDIM inversion, since {posed[0]!r} asks for another pose or shape"
    if len(old) != len(new):
        counts = f"the prompts have {len(old)} and {len(new)} words"
        return "prompt_to_prompt", f"Prompt-to-Prompt on the DDIM inversion, refining, since {counts}"
    swaps = [f"{a!r} becomes {b!r}" for a, b in zip(old, new, strict=True) if a != b]
    return "prompt_to_prompt", f"Prompt-to-Prompt on the DDIM inversion, word for word: {', '.join(swaps[:3])}"


def _prompt(method: Method, words: Words) -> str:
    """The prompt of the run, whose words a mask may name."""
    if method == "instruct_pix2pix":
        return words.instruction or ""
    return (words.source if method == "pix2pix_zero" else words.target) or ""


def _edit(method: Method, source: str, target: str) -> Control:
    if method == "masactrl":
        return MasaCtrl(source)
    if method == "pix2pix_zero":
        return Pix2PixZero([source], [target])
    return PromptToPrompt(source)


# What can be wrong.


def _check_options(method: Method, options: EditOptions) -> None:
    if options.mask is not None and options.mask_words is not None:
        raise InputError("Give a mask as a picture or as words, not both.")
    if options.mask_words is not None and not all(options.words):
        raise InputError(f"The words of the mask {options.mask_words!r} are empty in part. Separate them by commas.")
    if method == "imagic":
        if options.fit is None:
            raise InputError("imagic learns the picture first, which takes long: name the folder for that (--fit).")
        if options.mask is not None or options.mask_words is not None:
            raise InputError("imagic redraws the whole picture and takes no mask. Leave it out, or choose another.")
    if method == "instruct_pix2pix" and options.strength is not None:
        raise InputError(
            "strength is of methods that start from the picture. For instruct_pix2pix, guidance_scale says how much of "
            "the instruction is done and image_guidance_scale how much of the picture is kept."
        )
    if method != "imagic" and options.strength is not None and options.strength > 1:
        raise InputError(f"strength is {options.strength:g}; it is a share of the steps, above 0 and at most 1.")
    if method == "null_text" and options.guidance_scale <= 1:
        raise InputError("null_text learns embeddings for guidance. Give a guidance_scale above 1, or another method.")


def _check_mask(mask: Any, size: tuple[int, int], image: Any) -> None:
    read = load_mask(mask)
    name = repr(os.fspath(mask)) if isinstance(mask, str | os.PathLike) else "The mask"
    if read.shape[::-1] != size:
        what = repr(os.fspath(image)) if isinstance(image, str | os.PathLike) else "the picture"
        raise InputError(
            f"{name} is {read.shape[1]} x {read.shape[0]} pixels, {what} is {size[0]} x {size[1]}. Give a mask of the "
            "same size, white where the picture may change."
        )
    if not bool((read > 0).any()):
        raise InputError(f"{name} is black all over, so nothing would happen. Paint white where it may change.")


def _check_words(method: Method, words: Words, options: EditOptions, pipe: Pipeline) -> None:
    """The words of the mask are there, and two prompts differ in what the model reads and have something in common."""
    tokenizer = pipe.backbone.tokenizers()[0]
    read = prompt_tokens(tokenizer, _prompt(method, words))
    for word in options.words:
        try:
            read.find(word)
        except InputError as error:
            raise InputError(f"The mask's words are looked up in what the result is told. {error}") from error
    if words.source is None or words.target is None:
        return
    source, target = prompt_tokens(tokenizer, words.source), prompt_tokens(tokenizer, words.target)
    for prompt, other in ((source, target), (target, source)):
        for word in _changed(other, prompt):
            if not dict(prompt.words).get(word):
                prompt.find(word)
    if source.ids == target.ids:
        raise InputError(f"--from and --to are the same to this model: {words.target[:80]!r}. Change a word.")
    aligned = method in ("prompt_to_prompt", "null_text") and len(source.words) != len(target.words)
    if aligned and not set(source.ids[1:-1]) & set(target.ids[1:-1]):
        raise InputError(
            f"The prompts {words.source[:80]!r} and {words.target[:80]!r} cannot be aligned: they have no word in "
            "common. Say both in the same words but for what changes, or take --method image_to_image."
        )


def _changed(old: PromptTokens, new: PromptTokens) -> list[str]:
    """Words of the new prompt that are not in the old one at that place."""
    a, b = ([word for word, _ in prompt.words] for prompt in (old, new))
    blocks = SequenceMatcher(None, [w.casefold() for w in a], [w.casefold() for w in b], False).get_opcodes()
    return [word for kind, _, _, start, end in blocks if kind != "equal" for word in b[start:end]]


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


def _check_instructed(pipe: Pipeline) -> None:
    reads, latents = int(pipe.unet.config.in_channels), pipe.backbone.latent_channels
    if reads != 2 * latents:
        raise ModelError(
            f"{pipe.model!r} was not trained to follow instructions: its UNet reads {reads} channels, not "
            f"{2 * latents}. Say what the picture shows and shall show instead (--from, --to), or name an "
            "InstructPix2Pix model with --model, such as timbrooks/instruct-pix2pix."
        )


def _size_for(size: tuple[int, int], pipe: Pipeline) -> tuple[int, int]:
    """Width and height in the proportions of a picture, with the area that the model was trained at."""
    levels = len(pipe.unet.config.block_out_channels)
    step = pipe.backbone.pixels_per_latent * 2 ** (levels - 1)
    height, width = pipe.backbone.default_size
    ratio = float(np.clip(size[0] / size[1], 1 / _MAX_RATIO, _MAX_RATIO))
    side = (height * width) ** 0.5
    found = tuple(max(step, round(s / step) * step) for s in (side * ratio**0.5, side / ratio**0.5))
    return found[0], found[1]


def _stretched(picture: Image.Image, size: tuple[int, int]) -> tuple[str, ...]:
    by = (picture.width / picture.height) / (size[0] / size[1])
    if 0.9 < by < 1.1:
        return ()
    return (f"the picture of {picture.width} x {picture.height} pixels is stretched to {size[0]} x {size[1]}",)
