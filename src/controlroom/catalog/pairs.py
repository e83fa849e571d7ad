"""Which controls cannot stand in one run, and why: what the test of every pair found, as data.

The contract tests run every pair of controls on small networks; the run is refused, with both names, exactly where this
table says so. Everything that is not named here runs together.
"""

from __future__ import annotations

from controlroom.catalog.control_types import CONTROL_TYPES

_START = ("cross_image_attention", "depth_to_image", "from_inversion", "image_to_image", "inpaint", "upscale")
_BESIDE = ("masactrl", "pix2pix_zero", "prompt_to_prompt")
_LAYOUT = ("cross_image_attention", "ctrl_x")
_BASE = ("consistency_guidance", "instruct_pix2pix", "perp_neg")
_TOLD = ("kosmos_g", "prompt_weighting", "unimo_g")
_WORDS = ("blip_diffusion", "imagic")
_ONCE = (
    "guidance_interval",
    "guidance_rescale",
    "multidiffusion",
    "perturbed_attention_guidance",
    "photomaker",
    "reference_only",
    "regional_prompts",
    "self_guidance",
    "semantic_guidance",
    "smoothed_energy_guidance",
    "style_aligned",
)

REFUSED: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("both choose where the run starts", _START, _START),
    ("both draw a source picture beside", _BESIDE, _BESIDE),
    ("both draw a structure picture beside", _LAYOUT, _LAYOUT),
    ("both own the base combination", _BASE, _BASE),
    (
        "one owns all that the network is told",
        _TOLD,
        (*_TOLD, *_WORDS, "photomaker", "pix2pix_zero", "textual_inversion"),
    ),
    ("both change the same words' states", _WORDS, _WORDS),
    ("each reads the prompt in a way of its own", ("blip_diffusion",), ("photomaker",)),
    ("both say which picture's keys are read", _LAYOUT, ("masactrl", "prompt_to_prompt")),
    (
        "windows read nothing of a whole picture beside",
        ("multidiffusion",),
        (*_LAYOUT, *_BESIDE, "reference_only", "self_guidance", "style_aligned"),
    ),
    ("both own the further input channels", ("depth_to_image",), ("instruct_pix2pix",)),
    ("values are mixed where keys are added", ("prompt_to_prompt",), ("uni_controlnet",)),
    ("both replace the output of cross-attention", ("regional_prompts",), ("unimo_g",)),
    *(("once in a run", (name,), (name,)) for name in _ONCE),
)
"""Why, and the controls on both sides: each of the first with each of the second."""


def refused(first: str, second: str) -> str | None:
    """Why two controls cannot stand in one run; None where they run together.

    Args:
        first, second: types of controls, in any order, also the same twice.

    >>> refused("instruct_pix2pix", "perp_neg")
    'both own the base combination'
    >>> refused("controlnet", "ip_adapter") is None
    True
    """
    for why, left, right in REFUSED:
        if (first in left and second in right) or (second in left and first in right):
            return why
    return None


def not_beside(name: str) -> dict[str, str]:
    """The controls that cannot stand beside one, itself included if it can be there only once, each with the reason.

    >>> not_beside("multidiffusion")["multidiffusion"]
    'once in a run'
    """
    return {other: why for other in CONTROL_TYPES if (why := refused(name, other)) is not None}


def combines(name: str) -> str:
    """What a control combines with, in a sentence; with its usual settings.

    Args:
        name: type of the control.

    >>> combines("controlnet")
    'every other control, and itself'
    """
    without: dict[str, list[str]] = {}
    others = not_beside(name)
    itself = others.pop(name, None) is None
    for other, why in others.items():
        without.setdefault(why, []).append(other)
    if not without:
        return "every other control" + (", and itself" if itself else "; once in a run")
    said = "; ".join(f"{', '.join(f'`{each}`' for each in group)} ({why})" for why, group in without.items())
    return ("every other control, and itself, but " if itself else "every other control (once in a run) but ") + said
