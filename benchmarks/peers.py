"""Controls beside diffusers' pipelines of the same methods, with the same arguments: both draw the same latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import models
from benchmarks.bench import Bench, Pair, peer, widened
from controlroom.backbones.ip_adapter import adapter_from_tensors
from controlroom.backbones.t2i_adapter import feature_slots
from controlroom.catalog import control_class
from controlroom.controls.edit_direction import edit_direction
from controlroom.controls.guidance.semantic_guidance import SemanticEdit
from tests.controls.nets import gated_unet, tiny_controlnet, tiny_image_encoder, tiny_ip_adapter

EXCITED = [2, 5]
"""Positions of cat and dog."""
GUIDED: dict[str, Any] = {"guidance_scale": 7.5}
"""Ours by default; not every pipeline of diffusers has the same."""


def controlnet(bench: Bench) -> Pair:
    from diffusers import StableDiffusionControlNetPipeline

    net = _two_controlnets(bench)[0]
    theirs = peer(StableDiffusionControlNetPipeline, bench.source, controlnet=net)
    ours = control_class("controlnet")(model=net, image=bench.picture)
    return bench.pair("ControlNet", [ours], theirs, image=bench.picture)


def controlnet_multi(bench: Bench) -> Pair:
    """Two ControlNets at once."""
    from diffusers import MultiControlNetModel, StableDiffusionControlNetPipeline

    nets = _two_controlnets(bench)
    theirs = peer(StableDiffusionControlNetPipeline, bench.source, controlnet=MultiControlNetModel(nets))
    ours = [control_class("controlnet")(model=net, image=bench.picture) for net in nets]
    return bench.pair("ControlNet, two", ours, theirs, image=[bench.picture] * 2)


def controlnet_img2img(bench: Bench) -> Pair:
    """ControlNet from a picture, as `controlroom stylise` draws."""
    from diffusers import StableDiffusionControlNetImg2ImgPipeline

    net = _two_controlnets(bench)[0]
    theirs = peer(StableDiffusionControlNetImg2ImgPipeline, bench.source, controlnet=net)
    ours = [
        control_class("image_to_image")(image=bench.picture, strength=0.8),
        control_class("controlnet")(model=net, image=bench.picture),
    ]
    given = {"image": bench.picture, "control_image": bench.picture, "strength": 0.8, **GUIDED}
    return bench.pair("ControlNet img2img", ours, theirs, controlnet_conditioning_scale=1.0, **given)


def _two_controlnets(bench: Bench) -> list[Any]:
    widths = (16,) * len(bench.source.vae.config.block_out_channels)
    return [tiny_controlnet(bench.source.unet, seed, conditioning_embedding_out_channels=widths) for seed in (7, 8)]


def t2i_adapter(bench: Bench) -> Pair:
    from diffusers import StableDiffusionAdapterPipeline, T2IAdapter

    torch.manual_seed(19)
    side = models.pixels(bench.name) // bench.factor
    widths = [width for width, _ in feature_slots(bench.source.unet, (side, side))]
    net = T2IAdapter(channels=widths, num_res_blocks=2, downscale_factor=bench.factor, adapter_type="full_adapter")
    net.eval()
    theirs = peer(StableDiffusionAdapterPipeline, bench.source, adapter=net)
    ours = control_class("t2i_adapter")(model=net, image=bench.picture)
    return bench.pair("T2I-Adapter", [ours], theirs, image=bench.picture, **GUIDED)


def gligen(bench: Bench) -> Pair:
    """Phrases in boxes in every step, so that short runs have them too."""
    from diffusers import StableDiffusionGLIGENPipeline

    source, ours = bench.with_unet(gated_unet(bench.source.unet))
    phrases, boxes = ["a cat", "dog"], [[0.1, 0.0, 0.5, 0.4], [0.4, 0.5, 1.0, 1.0]]
    given = {"gligen_phrases": phrases, "gligen_boxes": boxes, "gligen_scheduled_sampling_beta": 1.0}
    control = control_class("gligen")(phrases, [tuple(box) for box in boxes], 1.0)
    return bench.pair("GLIGEN", [control], peer(StableDiffusionGLIGENPipeline, source), ours=ours, **given, **GUIDED)


def ip_adapter(bench: Bench) -> Pair:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPImageProcessor

    # Of its own, since diffusers writes its adapter into the UNet.
    theirs = peer(StableDiffusionPipeline, models.pipeline(bench.name))
    encoder, file = tiny_image_encoder(), tiny_ip_adapter(bench.source.unet)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    theirs.register_modules(image_encoder=encoder, feature_extractor=processor)
    nested: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in file.items():
        group, _, rest = key.partition(".")
        nested[group][rest] = value
    theirs.load_ip_adapter(nested, subfolder="", weight_name="", image_encoder_folder=None)
    # Loaded before, as theirs is.
    adapter = adapter_from_tensors(file, bench.ours.backbone.unet)
    ours = control_class("ip_adapter")(model=adapter, image=bench.picture, image_encoder=encoder)
    return bench.pair("IP-Adapter", [ours], theirs, ip_adapter_image=bench.picture)


def image_to_image(bench: Bench) -> Pair:
    from diffusers import StableDiffusionImg2ImgPipeline

    theirs = peer(StableDiffusionImg2ImgPipeline, bench.source)
    ours = control_class("image_to_image")(image=bench.picture, strength=0.8)
    return bench.pair("img2img", [ours], theirs, sized=False, image=bench.picture, strength=0.8, **GUIDED)


def inpaint(bench: Bench) -> Pair:
    """A UNet of four channels: the known part is put back after each step."""
    from diffusers import StableDiffusionInpaintPipeline

    theirs = peer(StableDiffusionInpaintPipeline, bench.source)
    hole = np.zeros((bench.picture.height, bench.picture.width), np.uint8)
    hole[:, : bench.picture.width // 2] = 255
    mask = Image.fromarray(hole)
    ours = control_class("inpaint")(image=bench.picture, mask=mask, strength=1.0)
    given = {"image": bench.picture, "mask_image": mask, "strength": 1.0}
    return bench.pair("inpainting", [ours], theirs, **given, **GUIDED)


def instruct_pix2pix(bench: Bench) -> Pair:
    from diffusers import StableDiffusionInstructPix2PixPipeline

    source, ours = bench.with_unet(widened(bench.source.unet, 8))
    control = control_class("instruct_pix2pix")(image=bench.picture, image_guidance_scale=1.5)
    theirs = peer(StableDiffusionInstructPix2PixPipeline, source)
    given = {"image": bench.picture, "image_guidance_scale": 1.5}
    return bench.pair("InstructPix2Pix", [control], theirs, ours=ours, sized=False, **given, **GUIDED)


def depth_to_image(bench: Bench) -> Pair:
    """The depth is given on both sides: there is no estimator in a run of ours."""
    from diffusers import StableDiffusionDepth2ImgPipeline

    source, ours = bench.with_unet(widened(bench.source.unet, 5))
    depth = torch.randn(1, 24, 24, generator=torch.Generator().manual_seed(2))
    control = control_class("depth_to_image")(bench.picture, depth, 0.8)
    theirs = peer(StableDiffusionDepth2ImgPipeline, source, depth_estimator=None, feature_extractor=None)
    # It reads the size of the result off a list of pictures.
    given = {"image": [bench.picture], "depth_map": depth, "strength": 0.8}
    return bench.pair("depth2img", [control], theirs, ours=ours, sized=False, **given, **GUIDED)


def pix2pix_zero(bench: Bench) -> Pair:
    """From noise: theirs draws the source first and then the edit, ours both at once."""
    from diffusers import DDIMInverseScheduler, StableDiffusionPix2PixZeroPipeline

    # Of its own, since it leaves its processors in the UNet.
    theirs = peer(
        StableDiffusionPix2PixZeroPipeline,
        models.pipeline(bench.name),
        inverse_scheduler=DDIMInverseScheduler.from_config(bench.source.scheduler.config),
        caption_generator=None,
        caption_processor=None,
    )
    found = edit_direction(bench.ours, ["a cat", "a red cat"], ["a dog", "a red dog"])
    ours = control_class("pix2pix_zero")(found.source, found.target, 0.1)
    given = {"source_embeds": found.source, "target_embeds": found.target, "cross_attention_guidance_amount": 0.1}
    return bench.pair("Pix2Pix-Zero", [ours], theirs, **given, **GUIDED)


def attend_and_excite(bench: Bench) -> Pair:
    from diffusers import StableDiffusionAttendAndExcitePipeline

    theirs = peer(StableDiffusionAttendAndExcitePipeline, bench.source)
    resolution = models.pixels(bench.name) // bench.factor // 2
    thresholds = {0: 0.05, 10: 0.5, 20: 0.8}
    kind = control_class("attend_and_excite")
    ours = kind(indices=EXCITED, resolution=resolution, iterations=25, thresholds=thresholds)
    given = {"max_iter_to_alter": 25, "thresholds": thresholds, "attn_res": (resolution, resolution)}
    return bench.pair("Attend-and-Excite", [ours], theirs, token_indices=EXCITED, **given)


def perturbed_attention_guidance(bench: Bench) -> Pair:
    from diffusers import StableDiffusionPAGPipeline

    # Of its own, since it writes its processors into the UNet; so does the one of SAG.
    theirs = peer(StableDiffusionPAGPipeline, models.pipeline(bench.name), pag_applied_layers=["mid"])
    ours = control_class("perturbed_attention_guidance")(scale=3.0, layers=["mid"])
    return bench.pair("PAG", [ours], theirs, pag_scale=3.0, **GUIDED)


def self_attention_guidance(bench: Bench) -> Pair:
    from diffusers import StableDiffusionSAGPipeline

    theirs = peer(StableDiffusionSAGPipeline, models.pipeline(bench.name))
    return bench.pair("SAG", [control_class("self_attention_guidance")(0.75)], theirs, sag_scale=0.75, **GUIDED)


def semantic_guidance(bench: Bench) -> Pair:
    """One concept added and one removed, both from the first step on, so that short runs have them too."""
    from diffusers import SemanticStableDiffusionPipeline

    theirs = peer(SemanticStableDiffusionPipeline, bench.source)
    edits = [SemanticEdit("a red hat", warmup=0), SemanticEdit("a dog", reverse=True, warmup=0)]
    given = {
        "editing_prompt": [edit.prompt for edit in edits],
        "reverse_editing_direction": [edit.reverse for edit in edits],
        "edit_guidance_scale": [edit.scale for edit in edits],
        "edit_warmup_steps": [edit.warmup for edit in edits],
        "edit_threshold": [edit.threshold for edit in edits],
    }
    return bench.pair("SEGA, two concepts", [control_class("semantic_guidance")(edits)], theirs, **given, **GUIDED)


def multidiffusion(bench: Bench) -> Pair:
    """A panorama of 2:1, all windows of a step at once; theirs one by one, with windows of the model's size too."""
    from diffusers import StableDiffusionPanoramaPipeline

    factor = bench.factor
    window = models.pixels(bench.name) // factor
    stride = max(1, window // 8)

    class Panorama(StableDiffusionPanoramaPipeline):
        def get_views(self, panorama_height: int, panorama_width: int, *given: Any, **named: Any) -> Any:
            size = (8 * panorama_height // factor, 8 * panorama_width // factor)
            return super().get_views(*size, window_size=window, stride=stride)

    theirs = peer(Panorama, bench.source)
    ours = control_class("multidiffusion")(window=window, stride=stride)
    width = 2 * bench.arguments["width"]
    return (
        "MultiDiffusion, 2:1",
        lambda output="pil": bench.run(bench.ours, output, width=width, controls=[ours]),
        lambda output="pil": bench.run(theirs, output, width=width),
    )


PARITY: dict[str, Callable[[Bench], Pair]] = {
    "multidiffusion": multidiffusion,
    "controlnet": controlnet,
    "controlnet_multi": controlnet_multi,
    "controlnet_img2img": controlnet_img2img,
    "t2i_adapter": t2i_adapter,
    "gligen": gligen,
    "ip_adapter": ip_adapter,
    "image_to_image": image_to_image,
    "inpaint": inpaint,
    "instruct_pix2pix": instruct_pix2pix,
    "depth_to_image": depth_to_image,
    "pix2pix_zero": pix2pix_zero,
    "attend_and_excite": attend_and_excite,
    "perturbed_attention_guidance": perturbed_attention_guidance,
    "self_attention_guidance": self_attention_guidance,
    "semantic_guidance": semantic_guidance,
}
"""Type of a control, as a run file has it, or a name for several of them -> the pair."""
