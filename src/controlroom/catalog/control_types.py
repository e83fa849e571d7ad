"""The names that a run file may give a control, and the class of each, imported when it is asked for."""

from __future__ import annotations

import difflib
import importlib.util
from importlib import import_module
from typing import Any

from controlroom.core.errors import InputError

# The `type` of a control in a run file -> its class. One line for each control that can be named there.
CONTROL_TYPES: dict[str, str] = {
    "appearance_control": "controlroom.controls.pose.appearance:AppearanceControl",
    "attend_and_excite": "controlroom.controls.guidance.attend_and_excite:AttendAndExcite",
    "consistency_guidance": "controlroom.controls.guidance.consistency_guidance:ConsistencyGuidance",
    "blip_diffusion": "controlroom.controls.personal.blip_diffusion:BLIPDiffusion",
    "controlnet": "controlroom.controls.spatial.controlnet:ControlNet",
    "depth_to_image": "controlroom.controls.spatial.depth_to_image:DepthToImage",
    "cross_image_attention": "controlroom.controls.style.cross_image_attention:CrossImageAttention",
    "ctrl_x": "controlroom.controls.style.ctrl_x:CtrlX",
    "from_inversion": "controlroom.controls.editing.from_inversion:FromInversion",
    "gligen": "controlroom.controls.spatial.gligen:Gligen",
    "guidance_interval": "controlroom.controls.guidance.guidance_interval:GuidanceInterval",
    "guidance_rescale": "controlroom.controls.guidance.guidance_rescale:GuidanceRescale",
    "image_to_image": "controlroom.controls.editing.image_to_image:ImageToImage",
    "imagic": "controlroom.controls.editing.imagic:Imagic",
    "inpaint": "controlroom.controls.editing.inpaint:Inpaint",
    "instant_id": "controlroom.controls.personal.instant_id:InstantID",
    "instruct_pix2pix": "controlroom.controls.editing.instruct_pix2pix:InstructPix2Pix",
    "ip_adapter": "controlroom.controls.personal.ip_adapter:IPAdapter",
    "kosmos_g": "controlroom.controls.personal.kosmos_g:KosmosG",
    "lora": "controlroom.controls.personal.lora:LoRA",
    "masactrl": "controlroom.controls.editing.masactrl:MasaCtrl",
    "ms_diffusion": "controlroom.controls.regions.ms_diffusion:MSDiffusion",
    "multidiffusion": "controlroom.controls.regions.multidiffusion:MultiDiffusion",
    "perp_neg": "controlroom.controls.guidance.perp_neg:PerpNeg",
    "perturbed_attention_guidance": (
        "controlroom.controls.guidance.perturbed_attention_guidance:PerturbedAttentionGuidance"
    ),
    "photomaker": "controlroom.controls.personal.photomaker:PhotoMaker",
    "pix2pix_zero": "controlroom.controls.editing.pix2pix_zero:Pix2PixZero",
    "prompt_to_prompt": "controlroom.controls.editing.prompt_to_prompt:PromptToPrompt",
    "prompt_weighting": "controlroom.controls.guidance.prompt_weighting:PromptWeighting",
    "reference_only": "controlroom.controls.style.reference_only:ReferenceOnly",
    "regional_prompts": "controlroom.controls.regions.regional_prompts:RegionalPrompts",
    "self_attention_guidance": "controlroom.controls.guidance.self_attention_guidance:SelfAttentionGuidance",
    "self_guidance": "controlroom.controls.guidance.self_guidance:SelfGuidance",
    "semantic_guidance": "controlroom.controls.guidance.semantic_guidance:SemanticGuidance",
    "smoothed_energy_guidance": "controlroom.controls.guidance.smoothed_energy_guidance:SmoothedEnergyGuidance",
    "style_aligned": "controlroom.controls.style.style_aligned:StyleAligned",
    "t2i_adapter": "controlroom.controls.spatial.t2i_adapter:T2IAdapter",
    "uni_controlnet": "controlroom.controls.spatial.uni_controlnet:UniControlNet",
    "textual_inversion": "controlroom.controls.personal.textual_inversion:TextualInversion",
    "unimo_g": "controlroom.controls.personal.unimo_g:UnimoG",
    "upscale": "controlroom.controls.editing.upscale:Upscale",
}


def load(path: str) -> Any:
    """Import what a dotted path of the catalogue (``module:Name``) names.

    >>> load("controlroom.core.errors:InputError").__name__
    'InputError'
    """
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def control_class(type_name: str) -> type:
    """Return the class of the control that a run file calls ``type_name``.

    Raises:
        InputError: no control has that name (the message lists the nearest ones), or it is not in this version yet.
    """
    path = CONTROL_TYPES.get(type_name) if isinstance(type_name, str) else None
    if path is None:
        raise InputError(f"Unknown control type {shown(type_name)}. {suggestion(type_name, CONTROL_TYPES)}")
    # Only a file that is not there means "not yet"; an import that fails inside the file must be seen as what it is.
    if not _exists(path.partition(":")[0]):
        raise InputError(
            f"The control {type_name!r} is in the catalogue but not in this version of controlroom yet. "
            "Leave it out, or see docs/systems.md for what works."
        )
    return load(path)


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError as error:
        # A folder on the way is missing; any other missing module is a broken import of a file that exists.
        if error.name and module.startswith(error.name + "."):
            return False
        raise


def shown(name: object) -> str:
    """Text of something given, cut where it is long."""
    text = repr(name)
    return text if len(text) <= 60 else text[:57] + "..."


def suggestion(name: object, known: dict[str, Any]) -> str:
    """Name what was probably meant, whatever the case and the separators, or everything that is known."""

    def plain(text: str) -> str:
        return text.lower().replace("_", "").replace("-", "").replace(" ", "")

    names = {plain(each): each for each in known}
    near = difflib.get_close_matches(plain(name[:100]), names, n=3, cutoff=0.6) if isinstance(name, str) else []
    if near:
        return f"Did you mean {' or '.join(repr(names[each]) for each in near)}?"
    return f"Known are: {', '.join(sorted(known))}."
