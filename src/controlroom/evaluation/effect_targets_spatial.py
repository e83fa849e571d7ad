"""What is asked of the controls of structure, appearance, style and regions: rows of the table of effects."""

from __future__ import annotations

from controlroom.evaluation.effect_rules import Gain, Joint, Level, Rising, Target
from controlroom.evaluation.suites import ctrl_x, depth2img, inpaint, panorama, regions, style_aligned, stylise
from controlroom.evaluation.suites.controlnet import EMPTY, SIZE, WITH, WITHOUT, measure_name
from controlroom.evaluation.suites.editing import MADE, PSNR
from controlroom.evaluation.suites.interpolation import OF_SECOND
from controlroom.signals.signal import KINDS

_ABLATED = {
    stylise.HALF: "half precision",
    stylise.SOLVER: "UniPC, few steps",
    stylise.ESTIMATED: "estimated depth",
    stylise.NO_WORDS: "no words",
    stylise.NO_DEPTH: "no depth",
    stylise.TASK: "as the task does it",
}
_DEPTH = "depth: rank correlation"


def _along(control: str, suite: str) -> tuple[Target, ...]:
    """How far each kind of condition is held, with words and without; and what that takes."""
    rows = [
        target
        for kind in KINDS
        for target in (
            Target(
                f"{control}, {kind.replace('_', ' ')}",
                f"{measure_name(kind).partition(': ')[2]}, read again" + (": at least 0.9" if kind == "pose" else ""),
                suite,
                Level(measure_name(kind), WITH, WITHOUT, least=0.9 if kind == "pose" else None),
            ),
            Target(
                f"{control}, {kind.replace('_', ' ')}",
                "the same with an empty prompt",
                suite,
                Level(measure_name(kind), EMPTY, WITHOUT),
            ),
        )
    ]
    return (*rows, Target(control, SIZE, suite, Joint(SIZE)))


TARGETS: tuple[Target, ...] = (
    *_along("ControlNet", "controlnet"),
    *_along("ControlNet for one kind", "controlnet_single"),
    *_along("Uni-ControlNet", "uni_controlnet"),
    *_along("T2I-Adapter", "t2i_adapter"),
    *(
        target
        for arm, title in _ABLATED.items()
        for target in (
            Target(f"ControlNet img2img, {title}", "depth kept", "stylise", Level(_DEPTH, arm, stylise.FULL)),
            Target(
                f"ControlNet img2img, {title}", "attributes right", "stylise", Level(stylise.RIGHT, arm, stylise.FULL)
            ),
        )
    ),
    Target("Depth to image", "depth kept", "depth2img", Level(depth2img.KEPT, depth2img.DEPTH, depth2img.IMAGE)),
    Target("Depth to image", "change made", "depth2img", Level(depth2img.MADE, depth2img.DEPTH, depth2img.IMAGE)),
    Target("Inpainting, nine channels", "change made", "inpaint", Level(MADE, inpaint.READS, inpaint.BLENDED)),
    Target("Inpainting, nine channels", "PSNR outside", "inpaint", Level(PSNR, inpaint.READS, inpaint.BLENDED)),
    *(
        target
        for arm, title in (
            (ctrl_x.OURS, "Ctrl-X"),
            (ctrl_x.STRUCTURE_ALONE, "Ctrl-X, structure alone"),
            (ctrl_x.CROSS, "Cross-image attention"),
            (ctrl_x.REFERENCE, "Reference-only"),
        )
        for target in (
            Target(title, "structure kept", "ctrl_x", Level(ctrl_x.IOU, arm, ctrl_x.ADAPTER)),
            Target(title, "appearance taken", "ctrl_x", Level(ctrl_x.COLOURS, arm, ctrl_x.ADAPTER)),
        )
    ),
    Target(
        "StyleAligned",
        "one style in a set: at least 30 points above independent runs",
        "style_aligned",
        Gain(style_aligned.SAME, style_aligned.OURS, 0.3),
    ),
    Target(
        "StyleAligned",
        "prompts still followed",
        "style_aligned",
        Level(style_aligned.FOLLOWED, style_aligned.OURS, style_aligned.ALONE),
    ),
    Target(
        "MultiDiffusion, 4:1",
        "seam (1: none)",
        "panorama",
        Level(panorama.SEAM, panorama.MULTI, panorama.WINDOWED),
    ),
    Target(
        "MultiDiffusion, 4:1",
        "puppets in each width",
        "panorama",
        Level(panorama.PUPPETS, panorama.MULTI, panorama.PLAIN),
    ),
    Target(
        "Regions, MultiDiffusion",
        "attribute in the right region: at least 85 %",
        "regions",
        Level(regions.EACH, regions.MULTI, regions.WITHOUT, least=0.85),
    ),
    Target(
        "Regions, RPG",
        "attribute in the right region: at least 85 %",
        "regions",
        Level(regions.EACH, regions.ATTENTION, regions.WITHOUT, least=0.85),
    ),
    *(
        Target(
            f"RPG, three objects, {form}",
            "all right: at least 25 points above the base model",
            "rpg",
            Gain(regions.RIGHT, arm, 0.25),
        )
        for arm, form in (
            (regions.ATTENTION, "attention"),
            (regions.LATENTS, "latents, cropped"),
            (regions.RESIZED, "latents, resized"),
        )
    ),
    Target(
        "IP-Adapter, from one person to another",
        "looks of the second rise with its share",
        "interpolation",
        Rising(OF_SECOND),
    ),
)
#: Suites in the order in which they are measured.
MEASURED = (
    "regions",
    "rpg",
    "style_aligned",
    "panorama",
    "ctrl_x",
    "controlnet",
    "controlnet_single",
    "uni_controlnet",
    "t2i_adapter",
    "depth2img",
    "inpaint",
    "stylise",
    "interpolation",
)
