"""What can be wrong with an edit's options, mask, words and model; found before anything is inverted."""

from __future__ import annotations

import os
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

from controlroom.backbones.words import PromptTokens, prompt_tokens
from controlroom.core.errors import InputError, ModelError
from controlroom.core.images import load_mask
from controlroom.tasks.edit_method import INVERSIONS, EditOptions, Method, Words, prompt_of

if TYPE_CHECKING:
    from controlroom.sampling.pipeline import Pipeline


def check_options(method: Method, options: EditOptions) -> None:
    """They go together and are of this method. Raises InputError."""
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
    if method != "imagic" and options.strength is not None and not 0 < options.strength <= 1:
        raise InputError(f"strength is {options.strength:g}; it is a share of the steps, above 0 and at most 1.")
    _check_belongs(method, options)
    if method == "null_text" and options.guidance_scale <= 1:
        raise InputError("null_text learns embeddings for guidance. Give a guidance_scale above 1, or another method.")


def _check_belongs(method: Method, options: EditOptions) -> None:
    """No option was given that this method would ignore. Raises InputError."""
    inverting = ", ".join(INVERSIONS)
    of_others = {
        "image_guidance_scale": (method == "instruct_pix2pix", "of instruct_pix2pix"),
        "fit": (method == "imagic", "of imagic"),
        "inversion": (method in INVERSIONS, f"of methods that invert the picture ({inverting})"),
        "mask_threshold": (options.mask_words is not None, "of a mask by words (mask_words)"),
    }
    for name, (taken, whose) in of_others.items():
        if not taken and name in options.model_fields_set and getattr(options, name) is not None:
            here = "there is none" if name == "mask_threshold" else f"the method here is {method}"
            raise InputError(f"{name} is {whose}, and {here}. Leave --{name.replace('_', '-')} out.")


def check_mask(mask: Any, size: tuple[int, int], image: Any) -> None:
    """It is of the picture's size, width and height, and not black all over. Raises InputError."""
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


def check_words(method: Method, words: Words, options: EditOptions, pipe: Pipeline) -> None:
    """The words of the mask are there, and two prompts differ in what the model reads and have something in common.

    Raises:
        InputError: they do not.
    """
    tokenizer = pipe.backbone.tokenizers()[0]
    read = prompt_tokens(tokenizer, prompt_of(method, words))
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


def check_instructed(pipe: Pipeline) -> None:
    """The model reads a picture beside its latents. Raises ModelError."""
    reads, latents = int(pipe.unet.config.in_channels), pipe.backbone.latent_channels
    if reads != 2 * latents:
        raise ModelError(
            f"{pipe.model!r} was not trained to follow instructions: its UNet reads {reads} channels, not "
            f"{2 * latents}. Say what the picture shows and shall show instead (--from, --to), or name an "
            "InstructPix2Pix model with --model, such as timbrooks/instruct-pix2pix."
        )
