"""Draws the pictures of ``docs/controls``: ``.venv/bin/python tools/draw_controls.py [NAME ...]``.

A strip for each control that runs on what ships with the theatre: what is given, what is drawn without the control, and
with it, from the same noise. 20 steps, guidance 5 and seed 7 where a function says nothing else. ControlNet,
MultiDiffusion and InstructPix2Pix have larger pictures of their own.
"""

# ruff: noqa: D103 - a function is the control that it is called after.

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import controlroom as cr
from controlroom.controls.personal.lora import LoRA
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.conditions import condition
from controlroom.data.theatre.edits import sample_edit
from controlroom.data.theatre.render import render
from controlroom.evaluation.retarget_methods import pose_of
from controlroom.evaluation.suites.ctrl_x import Settings as CtrlXLayers
from controlroom.evaluation.suites.ctrl_x import two_number
from controlroom.evaluation.suites.inpaint import mask_of

PUPPET = "a woman with red hair wearing a green sweater, waving, in the city"
FOLDER = Path(__file__).resolve().parent.parent / "docs" / "pictures" / "controls"
SIDE, GAP, LABEL = 128, 4, 14

Panels: TypeAlias = "list[tuple[str, Image.Image]]"


class Artist:
    """The theatre's model, with the settings that all pictures share."""

    def __init__(self, model: str = "theatre") -> None:
        self.pipe = cr.Pipeline.from_pretrained(model)
        self.plain: dict[str, Image.Image] = {}

    def run(self, words: str | list[str], *controls: cr.Control, **settings: Any) -> cr.RunResult:
        shared = {"num_inference_steps": 20, "guidance_scale": 5.0, "seed": 7}
        return self.pipe(words, controls=controls, **{**shared, **settings})

    def __call__(self, words: str, *controls: cr.Control, **settings: Any) -> Image.Image:
        if controls:
            return self.run(words, *controls, **settings).images[0]
        key = f"{words} {settings}"
        self.plain[key] = self.plain.get(key) or self.run(words, **settings).images[0]
        return self.plain[key]

    def both(self, words: str, *controls: cr.Control, **settings: Any) -> Panels:
        """Without the controls and with them."""
        return [("without", self(words, **settings)), ("with", self(words, *controls, **settings))]

    def edit(self, words: str, control: cr.Control) -> Panels:
        """The source picture that the control draws along, the new words alone, and the edit."""
        result = self.run(words, control)
        return [
            ("source", self.pipe.decode(result.states["source"])[0]),
            ("without", self(words)),
            ("with", result.images[0]),
        ]


# Guidance.


def attend_and_excite(draw: Artist) -> Panels:
    both = cr.AttendAndExcite(words=["chair", "ball"], iterations=10, thresholds={0: 0.05, 4: 0.5, 8: 0.8})
    return draw.both("a blue chair and a red ball in the snow", both)


def guidance_interval(draw: Artist) -> Panels:
    control = cr.GuidanceInterval(guidance_start=0.19, guidance_end=0.93)
    return draw.both(PUPPET, control, guidance_scale=10)


def guidance_rescale(draw: Artist) -> Panels:
    return draw.both(PUPPET, cr.GuidanceRescale(0.7), guidance_scale=12)


def perp_neg(draw: Artist) -> Panels:
    words, negative = "a woman wearing a shirt, on the beach", "a red shirt"
    return [
        ("without", draw(words)),
        ("as negative_prompt", draw(words, negative_prompt=negative)),
        ("with", draw(words, cr.PerpNeg([negative]))),
    ]


def perturbed_attention_guidance(draw: Artist) -> Panels:
    return draw.both(PUPPET, cr.PerturbedAttentionGuidance(3.0, layers=["mid"]))


def prompt_weighting(draw: Artist) -> Panels:
    text = "a woman with (blue:{}) hair wearing a red shirt, on the beach"
    return [(f"weight {w}", draw(text.format(w), cr.PromptWeighting())) for w in ("0.0", "1.0", "1.5")]


def self_attention_guidance(draw: Artist) -> Panels:
    return draw.both(PUPPET, cr.SelfAttentionGuidance(0.75))


def self_guidance(draw: Artist) -> Panels:
    move = cr.Move(["woman", "hair", "shirt", "trousers"], by=(0.15, 0.0))
    control = cr.SelfGuidance([move], scale=1000, resolution=8, hold=["beach"])
    return draw.both("a woman with red hair wearing a green shirt and black trousers, on the beach", control)


def semantic_guidance(draw: Artist) -> Panels:
    edits = [
        cr.SemanticEdit("a woman wearing a red shirt", scale=8, warmup=1, threshold=0.9),
        cr.SemanticEdit("a woman wearing a green shirt", reverse=True, scale=8, warmup=1, threshold=0.9),
    ]
    return draw.both("a woman wearing a green shirt, on the beach", cr.SemanticGuidance(edits))


def smoothed_energy_guidance(draw: Artist) -> Panels:
    return draw.both(PUPPET, cr.SmoothedEnergyGuidance(3.0))


# Editing.


def image_to_image(draw: Artist) -> Panels:
    given = render(sample_edit(0, "held_out", "place").before)
    words = "a woman on the beach at night"
    return [("given", given), *draw.both(words, cr.ImageToImage(given, strength=0.7))]


def inpaint(draw: Artist) -> Panels:
    edit = sample_edit(0, "held_out", "top colour")
    given, hole = render(edit.before), mask_of(edit, 2)
    shown = Image.fromarray(np.where(hole[..., None], 255, np.asarray(given)).astype(np.uint8))
    control, words = cr.Inpaint(given, hole.astype(float)), full_caption(edit.after)
    nine = Artist("theatre/inpaint")(words, control)
    return [("given", given), ("masked", shown), ("four channels", draw(words, control)), ("nine channels", nine)]


def depth_to_image(draw: Artist) -> Panels:
    edit = sample_edit(0, "held_out", "place")
    given, words = render(edit.before), full_caption(edit.after)
    depth = np.asarray(condition(edit.before, "depth").values)
    with_depth = Artist("theatre/depth2img")(words, cr.DepthToImage(given, depth, strength=0.9))
    return [("given", given), ("without", draw(words, cr.ImageToImage(given, strength=0.9))), ("with", with_depth)]


def inversion(draw: Artist) -> Panels:
    edit = sample_edit(0, "held_out", "top colour")
    given, words = render(edit.before), "a woman"
    panels = [("given", given)]
    for method in ("ddim", "null_text"):
        found = cr.invert(
            draw.pipe,
            given,
            words,
            method=method,
            num_inference_steps=20,
            guidance_scale=5.0 if method == "null_text" else None,
            measure=False,
        )
        panels.append((method, draw(words, cr.FromInversion(found), scheduler="ddim")))
    return panels


def masactrl(draw: Artist) -> Panels:
    looks = "a woman with red hair wearing a green shirt and blue trousers"
    control = cr.MasaCtrl(f"{looks}, standing, on the beach", start_step=2)
    return draw.edit(f"{looks}, waving, on the beach", control)


def pix2pix_zero(draw: Artist) -> Panels:
    places = ("on the beach", "in the forest", "in the city", "in a room", "at night", "in the snow")

    def said(colour: str) -> list[str]:
        return [f"a {who} wearing a {colour} shirt {place}" for who in ("woman", "man") for place in places]

    control = cr.Pix2PixZero(said("green"), said("red"), scale=0.1)
    return draw.both("a woman wearing a green shirt on the beach", control)


def prompt_to_prompt(draw: Artist) -> Panels:
    words = "a woman wearing a {} shirt, on the beach"
    control = cr.PromptToPrompt(words.format("green"), local_blend=["shirt"], blend_resolution=16)
    return draw.edit(words.format("blue"), control)


def upscale(draw: Artist) -> Panels:
    words = "a woman with red hair on the beach"
    small = draw(words)
    large = [("without", draw(words, height=256, width=256))]
    large += [("with", draw(words, cr.Upscale(small, strength=0.4), height=256, width=256))]
    return [("given", small), *large]


# Pictures as prompts.


def appearance(draw: Artist) -> Panels:
    two = two_number(0)
    person, pose = render(two.appearance), cr.ControlNet("theatre/pose", pose_of(two.structure))
    words, keep = f"a {two.appearance.puppets[0].identity.figure}", cr.AppearanceControl(person)
    return [("given", person), ("without", draw(words, pose)), ("with", draw(words, keep, pose))]


def ip_adapter(draw: Artist) -> Panels:
    person = render(two_number(0).appearance)
    words = f"a {two_number(0).appearance.puppets[0].identity.figure} on the beach"
    return [("given", person), *draw.both(words, cr.IPAdapter("theatre/ip_adapter", image=person))]


def reference_only(draw: Artist) -> Panels:
    person = render(two_number(0).appearance)
    words = f"a {two_number(0).appearance.puppets[0].identity.figure} on the beach"
    return [("given", person), *draw.both(words, cr.ReferenceOnly(person))]


def ctrl_x(draw: Artist) -> Panels:
    two, layers = two_number(0), CtrlXLayers()
    structure, look = render(two.structure), render(two.appearance)
    control = cr.CtrlX(
        structure,
        look,
        structure_features=list(layers.structure_features),
        structure_attention=list(layers.structure_attention),
        appearance_attention=list(layers.appearance_attention),
    )
    words = f"a {two.appearance.puppets[0].identity.figure}"
    panels = draw.both(words, control, scheduler="ddim", eta=1.0)
    return [("given: structure", structure), ("given: appearance", look), *panels]


def cross_image_attention(draw: Artist) -> Panels:
    two = two_number(0)
    structure, look = render(two.structure), render(two.appearance)
    words = f"a {two.appearance.puppets[0].identity.figure}"
    panels = draw.both(words, cr.CrossImageAttention(structure, look), scheduler="ddim", guidance_scale=1.0)
    return [("given: structure", structure), ("given: appearance", look), *panels]


def style_aligned(draw: Artist) -> Panels:
    words = ["a watercolour painting of a woman wearing a red skirt", "a man wearing a green shirt, waving"]
    alone, together = draw.run(words).images, draw.run(words, cr.StyleAligned()).images
    return [("the set's first", together[0]), ("without", alone[1]), ("with", together[1])]


# Regions.


def regional_prompts(draw: Artist) -> Panels:
    control = cr.RegionalPrompts(("a green cat", "a red ball"), ratios="1,1", base_ratio=0.3)
    return draw.both("a green cat and a red ball", control)


# What was learned; here it is computed from the model instead.


def textual_inversion(draw: Artist) -> Panels:
    known = "woman with red hair wearing a blue striped shirt"
    backbone = draw.pipe.backbone
    ids = backbone.tokenizers()[0](known, add_special_tokens=False, return_tensors="pt").input_ids[0]
    vectors = backbone.text_encoder.get_input_embeddings().weight[ids].detach()
    word = cr.TextualInversion({"<anna>": vectors})
    return [
        ("without: “woman”", draw("a woman on the beach")),
        ("with: “<anna>”", draw("a <anna> on the beach", word)),
        ("with: at night", draw("a <anna> at night", word)),
    ]


def red_is_blue(draw: Artist) -> LoRA:
    """A LoRA without training: keys and values of "red" become those of "blue", other words stay (least squares).

    Rank 4 in every cross-attention layer.
    """
    words = "a {} wearing a {} {}"
    wanted = [(who, thing) for who in ("woman", "man") for thing in ("shirt", "sweater", "skirt", "shorts")]
    old, new = (
        torch.cat([_states(draw, words.format(who, colour, thing)) for who, thing in wanted])
        for colour in ("red", "blue")
    )
    kept = torch.cat(
        [_states(draw, words.format(who, c, thing)) for who, thing in wanted for c in ("green", "yellow", "black")]
    )
    seen = old.T @ old + kept.T @ kept + 0.1 * torch.eye(old.shape[1])
    change = torch.linalg.solve(seen, old.T @ (new - old)).T  # [width, width]: what is added to the words' states
    u, s, v = torch.linalg.svd(change)
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in draw.pipe.unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            key = "lora_unet_" + name.replace(".", "_")
            tensors[f"{key}.lora_down.weight"] = v[:4].contiguous()
            tensors[f"{key}.lora_up.weight"] = layer.weight.detach().float() @ (u[:, :4] * s[:4])
    return cr.LoRA(tensors)


def _states(draw: Artist, words: str) -> torch.Tensor:
    with torch.no_grad():
        return draw.pipe.backbone.encode_text([words]).tokens[0].float()


def lora(draw: Artist) -> Panels:
    learned, words = red_is_blue(draw), "a woman wearing a red shirt and green trousers, on the beach"
    half = learned.model_copy(update={"scale": 0.5})
    return [("without", draw(words)), ("scale 0.5", draw(words, half)), ("with", draw(words, learned))]


DRAWN: tuple[Callable[[Artist], Panels], ...] = (
    *(attend_and_excite, guidance_interval, guidance_rescale, perp_neg, perturbed_attention_guidance),
    *(prompt_weighting, self_attention_guidance, self_guidance, semantic_guidance, smoothed_energy_guidance),
    *(depth_to_image, image_to_image, inpaint, inversion, masactrl, pix2pix_zero, prompt_to_prompt, upscale),
    *(appearance, ip_adapter, reference_only, ctrl_x, cross_image_attention, style_aligned),
    *(regional_prompts, textual_inversion, lora),
)


def strip(panels: Panels) -> Image.Image:
    """Pictures side by side, each under its label."""
    width = sum(picture.width for _, picture in panels) + GAP * (len(panels) - 1)
    page = Image.new("RGB", (width, LABEL + max(picture.height for _, picture in panels)), "white")
    pen, font, x = ImageDraw.Draw(page), ImageFont.load_default(11), 0
    for label, picture in panels:
        pen.text((x + picture.width / 2, 0), label, "black", font, anchor="ma")
        page.paste(picture.convert("RGB"), (x, LABEL))
        x += picture.width + GAP
    return page


def main(names: list[str]) -> int:
    """Draw those controls, or all; 2 for a name that none has."""
    known = {one.__name__: one for one in DRAWN}
    if unknown := [name for name in names if name not in known]:
        print(f"There is no picture of {', '.join(unknown)}; there are {', '.join(sorted(known))}.", file=sys.stderr)
        return 2
    FOLDER.mkdir(parents=True, exist_ok=True)
    artist = Artist()
    for name in names or known:
        path = FOLDER / f"{name}.png"
        page = strip(known[name](artist))
        page.quantize(128 if page.width < 600 else 64, Image.Quantize.MEDIANCUT).save(path, optimize=True)
        print(f"{path} {path.stat().st_size / 1000:.0f} kB", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
