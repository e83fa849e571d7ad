"""What an edit asks for, and which method does it: one simple rule, which tells why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from controlroom.backbones.loading import THEATRE
from controlroom.controls.editing.masactrl import MasaCtrl
from controlroom.controls.editing.pix2pix_zero import Pix2PixZero
from controlroom.controls.editing.prompt_to_prompt import PromptToPrompt
from controlroom.core.control import Control, describe
from controlroom.core.errors import InputError
from controlroom.sampling.inverted import Method as InversionMethod
from controlroom.sampling.inverted import NullText
from controlroom.training.recipes.imagic import ImagicSettings

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
    strength: float | None = Field(default=None, ge=0)
    """Share of the steps that is run, from the picture, above 0: less keeps more. Of ``imagic``: 0 the picture, 1 the
    words, more overdoes it (None: 1.2)."""
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
        raise InputError(
            f"The method {method} inverts the picture: say what it shows (--from). controlroom signal caption "
            "IMAGE suggests words."
        )
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


def prompt_of(method: Method, words: Words) -> str:
    """The prompt of the run, whose words a mask may name."""
    if method == "instruct_pix2pix":
        return words.instruction or ""
    return (words.source if method == "pix2pix_zero" else words.target) or ""


def control_of(method: Method, source: str, target: str) -> Control:
    """The control that edits a picture along its inversion."""
    if method == "masactrl":
        return MasaCtrl(source)
    if method == "pix2pix_zero":
        return Pix2PixZero([source], [target])
    return PromptToPrompt(source)
