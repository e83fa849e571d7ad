"""What is asked of the controls of guidance and editing: rows of the table of effects."""

from __future__ import annotations

from controlroom.evaluation.effect_rules import Gain, Joint, Level, NotWorse, Rising, Target
from controlroom.evaluation.suites.attend_and_excite import COLOURS
from controlroom.evaluation.suites.combined import AHEAD, made_name
from controlroom.evaluation.suites.combined_jobs import COMBINED, SEGA
from controlroom.evaluation.suites.editing import MADE, PSNR, REST
from controlroom.evaluation.suites.inversion import LOST
from controlroom.evaluation.suites.inverted_edits import again_arm
from controlroom.evaluation.suites.masactrl import ALIKE
from controlroom.evaluation.suites.pix2pix_zero import ZERO
from controlroom.evaluation.suites.prompt_to_prompt_real import METHODS, edited_arm
from controlroom.evaluation.suites.prompt_weighting import SHOWN, arm_of
from controlroom.evaluation.suites.right import RIGHT
from controlroom.evaluation.suites.self_guidance import RESIZED, SHIFTED
from controlroom.evaluation.suites.upscale import ALIKE as STRUCTURE
from controlroom.evaluation.suites.upscale import BICUBIC, DECIBELS, DISTANCE

SWEEP = "instruct_pix2pix_sweep"


def _edits(control: str, suite: str, arm: str, made: float | None, gain: Target) -> tuple[Target, Target]:
    least = "change made" if made is None else f"change made: at least {100 * made:.0f} %"
    return Target(control, least, suite, Level(MADE, arm, "reprompted", least=made)), gain


_OUTSIDE = "PSNR outside: above re-prompting"
_OUTSIDE_REAL = "PSNR outside: above inverting and re-prompting"
_UPSCALE = "strength 0.1"
TARGETS: tuple[Target, ...] = (
    Target(
        "Attend-and-Excite",
        "both objects in their colours: half of the failures repaired",
        "attend_and_excite",
        Joint("failures repaired (kinds and colours)", 0.5),
    ),
    Target(
        "Attend-and-Excite", "both objects in their colours", "attend_and_excite", Level(COLOURS, "with", "without")
    ),
    Target(
        "SEGA",
        "attribute appears: at least 70 %",
        "semantic_guidance",
        Level(MADE, "semantic_guidance", "reprompted", least=0.7),
    ),
    Target(
        "SEGA",
        "others unchanged: at least 90 %",
        "semantic_guidance",
        Level(REST, "semantic_guidance", "reprompted", least=0.9),
    ),
    *_edits(
        "Prompt-to-Prompt, swap",
        "prompt_to_prompt",
        "prompt_to_prompt",
        0.85,
        Target(
            "Prompt-to-Prompt, swap",
            "PSNR outside: at least 6 dB above re-prompting",
            "prompt_to_prompt",
            Gain(PSNR, "prompt_to_prompt", 6.0),
        ),
    ),
    *_edits(
        "Prompt-to-Prompt, refine",
        "prompt_to_prompt_refine",
        "prompt_to_prompt",
        None,
        Target("Prompt-to-Prompt, refine", _OUTSIDE, "prompt_to_prompt_refine", Gain(PSNR, "prompt_to_prompt")),
    ),
    Target(
        "Prompt-to-Prompt, re-weight",
        "rate of the attribute rises with the factor",
        "prompt_to_prompt_reweight",
        Rising(SHOWN),
    ),
    *(
        Target(
            "Prompt-to-Prompt, re-weight",
            f"PSNR outside, factor {factor:g}",
            "prompt_to_prompt_reweight",
            Level(PSNR, arm_of(factor)),
        )
        for factor in (0.25, 4.0)
    ),
    *(
        target
        for by, title in METHODS.items()
        for target in (
            Target(
                f"Prompt-to-Prompt on true pictures, {title}",
                "change made",
                "prompt_to_prompt_real",
                Level(MADE, edited_arm(by), again_arm(by)),
            ),
            Target(
                f"Prompt-to-Prompt on true pictures, {title}",
                _OUTSIDE_REAL if by == "null_text" else "PSNR outside",
                "prompt_to_prompt_real",
                Gain(PSNR, edited_arm(by)) if by == "null_text" else Level(PSNR, edited_arm(by), again_arm(by)),
            ),
        )
    ),
    *_edits(
        "InstructPix2Pix",
        "instruct_pix2pix",
        "instruct_pix2pix",
        0.8,
        Target(
            "InstructPix2Pix",
            "PSNR outside: at least 22 dB",
            "instruct_pix2pix",
            Level(PSNR, "instruct_pix2pix", "autoencoder", least=22.0),
        ),
    ),
    Target(
        "Null-text inversion",
        "within 1 dB of the autoencoder",
        "inversion",
        Level(LOST, "null_text", "ddim_guided", most=1.0),
    ),
    Target("Inversion, DDIM", "reconstruction", "inversion", Level(LOST, "ddim")),
    Target("Inversion, regularised", "reconstruction", "inversion", Level(LOST, "regularised")),
    Target(
        "Self-guidance",
        "shift within 10 % of the width: at least 70 %",
        "self_guidance",
        Level(SHIFTED, "self_guidance", "plain", least=0.7),
    ),
    Target(
        "Self-guidance",
        "size within 25 %: at least 70 %",
        "self_guidance",
        Level(RESIZED, "self_guidance", "plain", least=0.7),
    ),
    Target("Self-guidance", "the rest held still", "self_guidance", Level(REST, "self_guidance")),
    Target("Prompt weighting", "rate rises with the weight, 0.5 to 1.5", "prompt_weighting", Rising(SHOWN)),
    *_edits(
        "Pix2Pix-Zero",
        "pix2pix_zero",
        "pix2pix_zero",
        None,
        Target("Pix2Pix-Zero", _OUTSIDE, "pix2pix_zero", Gain(PSNR, "pix2pix_zero")),
    ),
    Target(
        "Pix2Pix-Zero on true pictures",
        "change made",
        "pix2pix_zero_real",
        Level(MADE, ZERO, again_arm("regularised")),
    ),
    Target("Pix2Pix-Zero on true pictures", _OUTSIDE_REAL, "pix2pix_zero_real", Gain(PSNR, ZERO)),
    *_edits(
        "MasaCtrl",
        "masactrl",
        "masactrl",
        None,
        Target("MasaCtrl", "identity kept: above re-prompting", "masactrl", Gain(ALIKE, "masactrl")),
    ),
    Target("MasaCtrl", _OUTSIDE, "masactrl", Gain(PSNR, "masactrl")),
    *_edits(
        "Imagic",
        "imagic",
        "alpha 1",
        None,
        Target("Imagic", _OUTSIDE, "imagic", Gain(PSNR, "alpha 1")),
    ),
    Target("Upscale", "SSIM: above bicubic", "upscale", Gain(STRUCTURE, _UPSCALE)),
    Target("Upscale", "PSNR: above bicubic", "upscale", Gain(DECIBELS, _UPSCALE)),
    Target("Upscale", "perceptual distance to the truth", "upscale", Level(DISTANCE, _UPSCALE, BICUBIC)),
    *(
        Target("Five controls combined", f"{kind} changed", "combined", Level(made_name(kind), COMBINED, SEGA))
        for kind in ("lower colour", "top colour")
    ),
    Target("Five controls combined", "both changes made", "combined", Level(MADE, COMBINED, "reprompted")),
    Target(
        "Five controls combined",
        "PSNR outside: above every single method that can do it",
        "combined",
        Joint(AHEAD, 0.0),
    ),
    *(
        target
        for arm, title in (("sag", "SAG"), ("pag", "PAG"), ("seg", "SEG"))
        for target in (
            Target(title, "Fréchet distance not worse", "guidance_methods", NotWorse("FID", arm, "plain")),
            Target(title, "attribute accuracy better", "guidance_methods", Gain(RIGHT, arm)),
        )
    ),
)
#: Suites in the order in which they are measured: those that take least time first.
MEASURED = (
    "instruct_pix2pix",
    "imagic",
    "prompt_to_prompt_refine",
    "prompt_to_prompt",
    "semantic_guidance",
    "masactrl",
    "self_guidance",
    SWEEP,
    "prompt_weighting",
    "guidance_methods",
    "prompt_to_prompt_reweight",
    "pix2pix_zero",
    "inversion",
    "attend_and_excite",
    "upscale",
    "combined",
    "pix2pix_zero_real",
    "prompt_to_prompt_real",
)
