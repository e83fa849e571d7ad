"""controlroom: one denoising loop, every control.

Names are loaded when they are first used (PEP 562), so that ``import controlroom`` costs milliseconds and loads neither
torch nor diffusers. To publish a name, add it to ``_EXPORTS`` and to the block for type checkers; a test holds the two
together.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from controlroom.catalog.control_types import control_class as control_class
    from controlroom.controls.edit_direction import EditDirection as EditDirection
    from controlroom.controls.edit_direction import edit_direction as edit_direction
    from controlroom.controls.editing.from_inversion import FromInversion as FromInversion
    from controlroom.controls.editing.image_to_image import ImageToImage as ImageToImage
    from controlroom.controls.editing.imagic import Imagic as Imagic
    from controlroom.controls.editing.inpaint import Inpaint as Inpaint
    from controlroom.controls.editing.instruct_pix2pix import InstructPix2Pix as InstructPix2Pix
    from controlroom.controls.editing.masactrl import MasaCtrl as MasaCtrl
    from controlroom.controls.editing.pix2pix_zero import Pix2PixZero as Pix2PixZero
    from controlroom.controls.editing.prompt_to_prompt import PromptToPrompt as PromptToPrompt
    from controlroom.controls.editing.upscale import Upscale as Upscale
    from controlroom.controls.guidance.attend_and_excite import AttendAndExcite as AttendAndExcite
    from controlroom.controls.guidance.consistency_guidance import ConsistencyGuidance as ConsistencyGuidance
    from controlroom.controls.guidance.guidance_interval import GuidanceInterval as GuidanceInterval
    from controlroom.controls.guidance.guidance_rescale import GuidanceRescale as GuidanceRescale
    from controlroom.controls.guidance.perp_neg import PerpNeg as PerpNeg
    from controlroom.controls.guidance.perturbed_attention_guidance import (
        PerturbedAttentionGuidance as PerturbedAttentionGuidance,
    )
    from controlroom.controls.guidance.prompt_weighting import PromptWeighting as PromptWeighting
    from controlroom.controls.guidance.self_attention_guidance import SelfAttentionGuidance as SelfAttentionGuidance
    from controlroom.controls.guidance.self_guidance import SelfGuidance as SelfGuidance
    from controlroom.controls.guidance.semantic_guidance import SemanticEdit as SemanticEdit
    from controlroom.controls.guidance.semantic_guidance import SemanticGuidance as SemanticGuidance
    from controlroom.controls.guidance.smoothed_energy_guidance import SmoothedEnergyGuidance as SmoothedEnergyGuidance
    from controlroom.controls.object_edits import CopyAppearance as CopyAppearance
    from controlroom.controls.object_edits import CopyLayout as CopyLayout
    from controlroom.controls.object_edits import KeepAppearance as KeepAppearance
    from controlroom.controls.object_edits import KeepShape as KeepShape
    from controlroom.controls.object_edits import Move as Move
    from controlroom.controls.object_edits import Resize as Resize
    from controlroom.controls.personal.blip_diffusion import BLIPDiffusion as BLIPDiffusion
    from controlroom.controls.personal.instant_id import InstantID as InstantID
    from controlroom.controls.personal.ip_adapter import IPAdapter as IPAdapter
    from controlroom.controls.personal.kosmos_g import KosmosG as KosmosG
    from controlroom.controls.personal.lora import LoRA as LoRA
    from controlroom.controls.personal.photomaker import PhotoMaker as PhotoMaker
    from controlroom.controls.personal.textual_inversion import TextualInversion as TextualInversion
    from controlroom.controls.personal.unimo_g import UnimoG as UnimoG
    from controlroom.controls.pose.appearance import AppearanceControl as AppearanceControl
    from controlroom.controls.region import Region as Region
    from controlroom.controls.regions.ms_diffusion import MSDiffusion as MSDiffusion
    from controlroom.controls.regions.multidiffusion import MultiDiffusion as MultiDiffusion
    from controlroom.controls.regions.regional_prompts import RegionalPrompts as RegionalPrompts
    from controlroom.controls.spatial.controlnet import ControlNet as ControlNet
    from controlroom.controls.spatial.depth_to_image import DepthToImage as DepthToImage
    from controlroom.controls.spatial.gligen import Gligen as Gligen
    from controlroom.controls.spatial.t2i_adapter import T2IAdapter as T2IAdapter
    from controlroom.controls.spatial.uni_controlnet import LocalConditions as LocalConditions
    from controlroom.controls.spatial.uni_controlnet import UniControlNet as UniControlNet
    from controlroom.controls.style.cross_image_attention import CrossImageAttention as CrossImageAttention
    from controlroom.controls.style.ctrl_x import CtrlX as CtrlX
    from controlroom.controls.style.reference_only import ReferenceOnly as ReferenceOnly
    from controlroom.controls.style.style_aligned import StyleAligned as StyleAligned
    from controlroom.controls.word_mask import WordMask as WordMask
    from controlroom.core.control import Control as Control
    from controlroom.core.errors import ConflictError as ConflictError
    from controlroom.core.errors import ControlRoomError as ControlRoomError
    from controlroom.core.errors import InputError as InputError
    from controlroom.core.errors import ModelError as ModelError
    from controlroom.core.errors import OutputError as OutputError
    from controlroom.core.result import RunResult as RunResult
    from controlroom.core.spec import RunSpec as RunSpec
    from controlroom.sampling.inversion import invert as invert
    from controlroom.sampling.inverted import Inversion as Inversion
    from controlroom.sampling.inverted import NullText as NullText
    from controlroom.sampling.inverted import Regularisation as Regularisation
    from controlroom.sampling.pipeline import Pipeline as Pipeline
    from controlroom.sampling.pipeline import execute as execute
    from controlroom.sampling.pipeline import explain as explain
    from controlroom.sampling.pipeline import replay as replay
    from controlroom.tasks.edit import edit as edit
    from controlroom.tasks.edit_method import EditOptions as EditOptions
    from controlroom.tasks.enhance import EnhanceOptions as EnhanceOptions
    from controlroom.tasks.enhance import enhance as enhance
    from controlroom.tasks.plan_regions import PlannerSettings as PlannerSettings
    from controlroom.tasks.plan_regions import RegionPlan as RegionPlan
    from controlroom.tasks.plan_regions import plan_regions as plan_regions
    from controlroom.tasks.retarget import RetargetOptions as RetargetOptions
    from controlroom.tasks.retarget import retarget as retarget
    from controlroom.tasks.stylise import StyliseOptions as StyliseOptions
    from controlroom.tasks.stylise import stylise as stylise
    from controlroom.training.recipes.imagic import ImagicSettings as ImagicSettings
    from controlroom.training.recipes.imagic import fit_imagic as fit_imagic

# Public name -> the module that defines it. One line for each, in the order of the alphabet within a room.
_EXPORTS: dict[str, str] = {
    # core
    "BLIPDiffusion": "controlroom.controls.personal.blip_diffusion",
    "ConflictError": "controlroom.core.errors",
    "Control": "controlroom.core.control",
    "ControlRoomError": "controlroom.core.errors",
    "InputError": "controlroom.core.errors",
    "ModelError": "controlroom.core.errors",
    "OutputError": "controlroom.core.errors",
    "RunResult": "controlroom.core.result",
    "RunSpec": "controlroom.core.spec",
    # sampling
    "Pipeline": "controlroom.sampling.pipeline",
    "execute": "controlroom.sampling.pipeline",
    "explain": "controlroom.sampling.pipeline",
    "replay": "controlroom.sampling.pipeline",
    "Inversion": "controlroom.sampling.inverted",
    "NullText": "controlroom.sampling.inverted",
    "Regularisation": "controlroom.sampling.inverted",
    "invert": "controlroom.sampling.inversion",
    # controls
    "AppearanceControl": "controlroom.controls.pose.appearance",
    "AttendAndExcite": "controlroom.controls.guidance.attend_and_excite",
    "ConsistencyGuidance": "controlroom.controls.guidance.consistency_guidance",
    "ControlNet": "controlroom.controls.spatial.controlnet",
    "DepthToImage": "controlroom.controls.spatial.depth_to_image",
    "CopyAppearance": "controlroom.controls.object_edits",
    "CopyLayout": "controlroom.controls.object_edits",
    "EditDirection": "controlroom.controls.edit_direction",
    "CrossImageAttention": "controlroom.controls.style.cross_image_attention",
    "CtrlX": "controlroom.controls.style.ctrl_x",
    "FromInversion": "controlroom.controls.editing.from_inversion",
    "Gligen": "controlroom.controls.spatial.gligen",
    "GuidanceInterval": "controlroom.controls.guidance.guidance_interval",
    "GuidanceRescale": "controlroom.controls.guidance.guidance_rescale",
    "IPAdapter": "controlroom.controls.personal.ip_adapter",
    "ImageToImage": "controlroom.controls.editing.image_to_image",
    "Imagic": "controlroom.controls.editing.imagic",
    "Inpaint": "controlroom.controls.editing.inpaint",
    "InstantID": "controlroom.controls.personal.instant_id",
    "InstructPix2Pix": "controlroom.controls.editing.instruct_pix2pix",
    "KeepAppearance": "controlroom.controls.object_edits",
    "KeepShape": "controlroom.controls.object_edits",
    "KosmosG": "controlroom.controls.personal.kosmos_g",
    "LoRA": "controlroom.controls.personal.lora",
    "LocalConditions": "controlroom.controls.spatial.uni_controlnet",
    "MasaCtrl": "controlroom.controls.editing.masactrl",
    "Move": "controlroom.controls.object_edits",
    "MSDiffusion": "controlroom.controls.regions.ms_diffusion",
    "MultiDiffusion": "controlroom.controls.regions.multidiffusion",
    "PerpNeg": "controlroom.controls.guidance.perp_neg",
    "PerturbedAttentionGuidance": "controlroom.controls.guidance.perturbed_attention_guidance",
    "PhotoMaker": "controlroom.controls.personal.photomaker",
    "Pix2PixZero": "controlroom.controls.editing.pix2pix_zero",
    "PromptToPrompt": "controlroom.controls.editing.prompt_to_prompt",
    "PromptWeighting": "controlroom.controls.guidance.prompt_weighting",
    "ReferenceOnly": "controlroom.controls.style.reference_only",
    "Region": "controlroom.controls.region",
    "RegionalPrompts": "controlroom.controls.regions.regional_prompts",
    "Resize": "controlroom.controls.object_edits",
    "SelfAttentionGuidance": "controlroom.controls.guidance.self_attention_guidance",
    "SelfGuidance": "controlroom.controls.guidance.self_guidance",
    "SemanticEdit": "controlroom.controls.guidance.semantic_guidance",
    "SemanticGuidance": "controlroom.controls.guidance.semantic_guidance",
    "SmoothedEnergyGuidance": "controlroom.controls.guidance.smoothed_energy_guidance",
    "StyleAligned": "controlroom.controls.style.style_aligned",
    "T2IAdapter": "controlroom.controls.spatial.t2i_adapter",
    "UniControlNet": "controlroom.controls.spatial.uni_controlnet",
    "UnimoG": "controlroom.controls.personal.unimo_g",
    "TextualInversion": "controlroom.controls.personal.textual_inversion",
    "Upscale": "controlroom.controls.editing.upscale",
    "WordMask": "controlroom.controls.word_mask",
    "edit_direction": "controlroom.controls.edit_direction",
    # training
    "ImagicSettings": "controlroom.training.recipes.imagic",
    "fit_imagic": "controlroom.training.recipes.imagic",
    # tasks
    "EditOptions": "controlroom.tasks.edit_method",
    "EnhanceOptions": "controlroom.tasks.enhance",
    "PlannerSettings": "controlroom.tasks.plan_regions",
    "RegionPlan": "controlroom.tasks.plan_regions",
    "RetargetOptions": "controlroom.tasks.retarget",
    "StyliseOptions": "controlroom.tasks.stylise",
    "edit": "controlroom.tasks.edit",
    "enhance": "controlroom.tasks.enhance",
    "plan_regions": "controlroom.tasks.plan_regions",
    "retarget": "controlroom.tasks.retarget",
    "stylise": "controlroom.tasks.stylise",
    # catalogue
    "control_class": "controlroom.catalog.control_types",
}


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it, once."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'controlroom' has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
