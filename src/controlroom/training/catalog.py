"""The recipes that `controlroom train` knows, in one explicit table; the module of one is imported when it is used."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import import_module

from controlroom.core.errors import InputError
from controlroom.training.recipe_settings import RecipeSettings


@dataclass(frozen=True)
class RecipeEntry:
    """A recipe by name.

    Attributes:
        name: on the command line.
        settings: ``module:Class`` of its settings, below ``controlroom.training.recipes``.
        summary: what it learns, in a line.
        makes: what comes out, and which control draws with it.
    """

    name: str
    settings: str
    summary: str
    makes: str

    def load(self) -> type[RecipeSettings]:
        """The class of its settings."""
        module, name = self.settings.split(":")
        found: type[RecipeSettings] = getattr(import_module(f"controlroom.training.recipes.{module}"), name)
        return found


RECIPES = (
    RecipeEntry(
        "lora",
        "lora:LoRASettings",
        "a person, thing or style from pictures with captions, as low-rank layers",
        "lora.safetensors for cr.LoRA",
    ),
    RecipeEntry(
        "dreambooth_lora",
        "dreambooth_lora:DreamBoothLoRASettings",
        "a subject from a few pictures, its class kept, as low-rank layers",
        "lora.safetensors for cr.LoRA",
    ),
    RecipeEntry(
        "dreambooth",
        "dreambooth:DreamBoothSettings",
        "a subject from a few pictures, its class kept, in the whole UNet",
        "unet/ in diffusers' layout",
    ),
    RecipeEntry(
        "textual_inversion",
        "textual_inversion:TextualInversionSettings",
        "vectors of a new word, from a few pictures",
        "learned_word.safetensors for cr.TextualInversion",
    ),
    RecipeEntry(
        "dco",
        "dco:DCOSettings",
        "a subject as low-rank layers that stay as near to the base model as they can",
        "lora.safetensors for cr.LoRA and cr.ConsistencyGuidance",
    ),
    RecipeEntry(
        "ip_adapter",
        "ip_adapter:IPAdapterSettings",
        "pictures as prompts (base, plus, face), from several pictures of each subject",
        "ip_adapter.safetensors for cr.IPAdapter",
    ),
    RecipeEntry(
        "ip_adapter_multi",
        "ip_adapter_multi:IPAdapterMultiSettings",
        "several pictures of one person as a prompt, by attention between them, from an IP-Adapter",
        "ip_adapter.safetensors for cr.IPAdapter",
    ),
    RecipeEntry(
        "instant_id",
        "instant_id:InstantIDSettings",
        "faces as prompts, with a ControlNet that is told who it is",
        "folder for cr.InstantID",
    ),
    RecipeEntry(
        "photomaker",
        "photomaker:PhotoMakerSettings",
        "people from one to four pictures each, fused into the word for them, with low-rank layers",
        "photomaker.safetensors for cr.PhotoMaker",
    ),
    RecipeEntry(
        "blip_diffusion",
        "blip_diffusion:BLIPDiffusionSettings",
        "a subject from a few pictures in a few steps, from a subject encoder's guess, in the whole UNet",
        "folder for cr.BLIPDiffusion",
    ),
    RecipeEntry(
        "blip_subject",
        "blip_subject:BLIPSubjectSettings",
        "a subject encoder, from pictures of subjects and other pictures of each, through the frozen network",
        "folder for cr.BLIPDiffusion, and for blip_diffusion",
    ),
    RecipeEntry(
        "ms_diffusion",
        "ms_diffusion:MSDiffusionSettings",
        "several subjects in boxes, from pictures of them and other pictures of each, beside the frozen network",
        "folder for cr.MSDiffusion",
    ),
    RecipeEntry(
        "ddpm",
        "ddpm:DDPMSettings",
        "a network of pixels from nothing, on pictures without words; the smallest example",
        "folder for diffusers' DDPMPipeline and controlroom.sampling.ddpm.DDPM",
    ),
    RecipeEntry(
        "autoencoder",
        "autoencoder:AutoencoderSettings",
        "an autoencoder from nothing: absolute, perceptual and adversarial error, a light KL term",
        "folder for diffusers' AutoencoderKL",
    ),
    RecipeEntry(
        "latent_diffusion",
        "latent_diffusion:LatentDiffusionSettings",
        "a new UNet in the latents of a model's autoencoder, from pictures with captions",
        "unet/ in diffusers' layout",
    ),
    RecipeEntry(
        "instruct_pix2pix",
        "instruct_pix2pix:InstructPix2PixSettings",
        "editing by instructions, from pictures before and after, in the whole UNet with further channels",
        "unet/ in diffusers' layout for cr.InstructPix2Pix",
    ),
    RecipeEntry(
        "controlnet",
        "controlnet:ControlNetSettings",
        "drawing along edges, depth, poses, ..., found in pictures or given beside them, by a copy of the encoder",
        "folder in diffusers' layout for cr.ControlNet",
    ),
    RecipeEntry(
        "t2i_adapter",
        "t2i_adapter:T2IAdapterSettings",
        "drawing along edges, depth, poses, ..., by a small network that reads nothing else",
        "folder in diffusers' layout for cr.T2IAdapter",
    ),
    RecipeEntry(
        "uni_controlnet",
        "uni_controlnet:UniControlNetSettings",
        "drawing along several kinds of condition with one adapter, or (part=global) after the content of a picture",
        "folder for cr.UniControlNet",
    ),
    RecipeEntry(
        "inpaint",
        "inpaint:InpaintSettings",
        "filling holes, in the whole UNet with five further channels: the mask, and what is around it",
        "unet/ in diffusers' layout for cr.Inpaint",
    ),
    RecipeEntry(
        "depth2img",
        "depth2img:Depth2ImgSettings",
        "drawing over a depth, in the whole UNet with one further channel",
        "unet/ in diffusers' layout for cr.DepthToImage",
    ),
    RecipeEntry(
        "kosmos_language",
        "kosmos_g:KosmosLanguageSettings",
        "KOSMOS-G, stage 1: a language model on pictures and their captions",
        "folder for kosmos_align",
    ),
    RecipeEntry(
        "kosmos_align",
        "kosmos_g:KosmosAlignSettings",
        "KOSMOS-G, stage 2: from the language model's states to the text encoder's, on captions",
        "folder for kosmos_g, and for cr.KosmosG",
    ),
    RecipeEntry(
        "kosmos_g",
        "kosmos_g:KosmosGSettings",
        "KOSMOS-G, stage 3: pictures of subjects between the words, through the frozen UNet",
        "folder for cr.KosmosG",
    ),
    RecipeEntry(
        "unimo_text",
        "unimo_g:UnimoTextSettings",
        "UNIMO-G, stage 1: keys and values that read a multimodal language model's states of captions",
        "folder for unimo_g, and for cr.UnimoG without pictures",
    ),
    RecipeEntry(
        "unimo_g",
        "unimo_g:UnimoGSettings",
        "UNIMO-G, stage 2: cut-outs of several entities between the words, their attention held to their places",
        "folder for cr.UnimoG",
    ),
)


_FROM_PYTHON = {
    "imagic": "It fits a single picture: fit_imagic(pipe, picture, prompt, folder), or controlroom edit with the "
    "method imagic.",
}
"""Methods that are not trained from a folder of pictures, and what to do."""


def recipe_entry(name: str) -> RecipeEntry:
    """The recipe of that name.

    Raises:
        InputError: there is none; the message names the nearest, or how the method is trained.
    """
    wanted = name.replace("-", "_").lower()
    for entry in RECIPES:
        if entry.name == wanted:
            return entry
    if wanted in _FROM_PYTHON:
        raise InputError(f"{wanted} is not trained from the command line. {_FROM_PYTHON[wanted]}")
    names = [entry.name for entry in RECIPES]
    near = difflib.get_close_matches(wanted, names, 1)
    hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(names)}."
    raise InputError(f"There is no recipe {name!r}. {hint}")
