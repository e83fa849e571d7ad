"""The suites by name: one explicit table, which loads nothing until a suite is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

from controlroom.core.errors import InputError

if TYPE_CHECKING:
    from controlroom.evaluation.suites.suite import Suite


@dataclass(frozen=True)
class Entry:
    """A suite of the table.

    Attributes:
        does: what it measures.
        n: cases unless said otherwise.
        module: where it is built, with the settings that it takes as ``Settings``.
        build: function in it.
        settings: class of its settings in it.
    """

    does: str
    n: int
    module: str
    build: str = "build"
    settings: str = "Settings"


_HERE = "controlroom.evaluation.suites"
SUITES: dict[str, Entry] = {
    "attend_and_excite": Entry(
        "two-object captions without and with Attend-and-Excite", 250, f"{_HERE}.attend_and_excite"
    ),
    "prompt_to_prompt": Entry(
        "one colour word swapped, by Prompt-to-Prompt and by re-prompting", 200, f"{_HERE}.prompt_to_prompt"
    ),
    "guidance_methods": Entry("plain guidance, SAG, PAG, SEG, rescale and interval", 200, f"{_HERE}.guidance_methods"),
    "prompt_weighting": Entry("the rate of an attribute by the weight of its word", 200, f"{_HERE}.prompt_weighting"),
    "semantic_guidance": Entry(
        "an attribute changed by SEGA's concepts, and by re-prompting", 200, f"{_HERE}.semantic_guidance"
    ),
    "inversion": Entry("how well a picture comes back from its inversion", 200, f"{_HERE}.inversion"),
    "prompt_to_prompt_refine": Entry(
        "words added, by Prompt-to-Prompt and by re-prompting", 200, f"{_HERE}.prompt_to_prompt_refine"
    ),
    "prompt_to_prompt_reweight": Entry(
        "the rate of an attribute by the factor on its words", 200, f"{_HERE}.prompt_to_prompt_reweight"
    ),
    "self_guidance": Entry("a puppet shifted and resized by self-guidance", 200, f"{_HERE}.self_guidance"),
    "masactrl": Entry("another pose, by MasaCtrl and by re-prompting", 200, f"{_HERE}.masactrl"),
    "pix2pix_zero": Entry("one colour changed along a direction, and by re-prompting", 200, f"{_HERE}.pix2pix_zero"),
    "combined": Entry(
        "several edits at once by several methods in one run, and by each alone", 200, f"{_HERE}.combined"
    ),
    "prompt_to_prompt_real": Entry(
        "one colour word swapped in true pictures, through two inversions", 200, f"{_HERE}.prompt_to_prompt_real"
    ),
    "pix2pix_zero_real": Entry(
        "one colour of true pictures changed along a direction", 200, f"{_HERE}.pix2pix_zero_real"
    ),
    "upscale": Entry("small pictures enlarged, beside scenes rendered large", 200, f"{_HERE}.upscale"),
    "instruct_pix2pix": Entry("instructions on true pictures", 200, f"{_HERE}.instruct_pix2pix"),
    "instruct_pix2pix_sweep": Entry(
        "the same at every pair of image and text guidance", 50, f"{_HERE}.instruct_pix2pix", "build_sweep"
    ),
    "imagic": Entry("true pictures fitted and edited by a caption", 12, f"{_HERE}.imagic"),
    "controlnet": Entry(
        "eight kinds of condition, read again out of what was drawn along them", 1600, f"{_HERE}.controlnet"
    ),
    "controlnet_single": Entry(
        "the same with a ControlNet for each kind", 1600, f"{_HERE}.controlnet", "build_single", "SingleSettings"
    ),
    "t2i_adapter": Entry(
        "the same with a T2I-Adapter for each kind", 1600, f"{_HERE}.controlnet", "build", "T2IAdapterSettings"
    ),
    "uni_controlnet": Entry(
        "the same with one Uni-ControlNet", 1600, f"{_HERE}.controlnet", "build", "UniControlNetSettings"
    ),
    "stylise": Entry("what each part of stylising costs, in one ablation", 200, f"{_HERE}.stylise"),
    "inpaint": Entry("a part of a true picture in another colour, the rest kept", 200, f"{_HERE}.inpaint"),
    "depth2img": Entry("depth kept and words followed, beside image to image", 200, f"{_HERE}.depth2img"),
    "panorama": Entry("panoramas of 4:1 at once, in windows, and by MultiDiffusion", 200, f"{_HERE}.panorama"),
    "regions": Entry("two objects left and right, without and with regions", 200, f"{_HERE}.regions"),
    "rpg": Entry("three objects, without and with regional prompts", 200, f"{_HERE}.regions", "build_rpg"),
    "multi_subject": Entry("two puppets in one picture, each from a picture of its own", 200, f"{_HERE}.multi_subject"),
    "ctrl_x": Entry("structure of one picture, appearance of another, in five ways", 200, f"{_HERE}.ctrl_x"),
    "style_aligned": Entry("one style for a set, without and with StyleAligned", 200, f"{_HERE}.style_aligned"),
    "captions": Entry("what pictures show of what their captions say", 500, f"{_HERE}.captions"),
    "two_objects": Entry("whether both objects of a caption are there", 250, f"{_HERE}.captions", "build_two_objects"),
    "signals": Entry("what the dense reader finds in true pictures", 500, f"{_HERE}.signals"),
    "people": Entry("one person from nine pictures, by maximum, average and self-attention", 300, f"{_HERE}.people"),
    "people_numbers": Entry("one person from 1, 2, 4 and 9 pictures", 200, f"{_HERE}.people", "build_numbers"),
    "subject": Entry("one subject: what adapters keep of it, and follow of the words", 300, f"{_HERE}.subject"),
    "subject_views": Entry("one subject from views that words ask for", 300, f"{_HERE}.subject_views"),
    "subject_style": Entry(
        "LoRAs of a subject and of a style: alone, added, and merged into one", 200, f"{_HERE}.subject_style"
    ),
    "interpolation": Entry("from one person to another, share by share", 100, f"{_HERE}.interpolation"),
    "retarget": Entry("one puppet in the pose of another picture", 300, f"{_HERE}.retarget"),
}


def open_suite(name: str, n: int | None = None, settings: Mapping[str, Any] | None = None) -> Suite[Any]:
    """A suite with its judges.

    Args:
        name: of the table.
        n: number of cases; None: the table's.
        settings: name -> value; see the suite's ``Settings``.

    Raises:
        InputError: an unknown suite or setting, or a value that does not fit.
        ModelError: weights that its judges need are not there.
    """
    entry = _entry(name)
    count = entry.n if n is None else n
    if count < 1:
        raise InputError(f"A suite has at least one case; got {count}.")
    module = import_module(entry.module)
    return getattr(module, entry.build)(getattr(module, entry.settings)(**dict(settings or {})), count)


def settings_of(name: str) -> dict[str, Any]:
    """Setting -> default value of a suite.

    Raises:
        InputError: an unknown suite.
    """
    entry = _entry(name)
    return getattr(import_module(entry.module), entry.settings)().model_dump()


def _entry(name: str) -> Entry:
    if name in SUITES:
        return SUITES[name]
    near = get_close_matches(name, SUITES, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise InputError(f"There is no suite {name[:80]!r}.{hint} There are: {', '.join(SUITES)}.")
