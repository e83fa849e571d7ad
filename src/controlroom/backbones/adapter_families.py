"""The kinds of files: which keys each has, what they belong to, and what shapes say of base model and form.

A key that only one kind has is its signature; patterns then say what each key of such a file belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from controlroom.backbones.bases import SD1, SD2, XL, base_of
from controlroom.backbones.file_header import Header
from controlroom.backbones.lora_files import SLOTS

_NORM = r"\.(weight|bias)"


@dataclass(frozen=True)
class Said:
    """What a family says of a file: its form, base, use and notes."""

    name: str
    base: str
    use: str
    control: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One kind of file.

    Attributes:
        kind: of `AdapterKind`.
        signature: a key that only this kind has, once at least.
        parts: name of a part -> pattern of its keys. The first that matches a whole key has it.
        says: what it is in particular.
    """

    kind: str
    signature: str
    parts: Mapping[str, str]
    says: Callable[[Header], Said]

    def has(self, header: Header) -> bool:
        """Whether a file has the signature."""
        pattern = re.compile(self.signature)
        return any(pattern.match(key) for key in header.shapes)


def words_width(header: Header, *parts: str) -> int | None:
    """Width of the words that a cross-attention layer of a whole network reads."""
    found = header.having("attn2.to_k.weight", *parts)
    return None if found is None else found[1]


# LoRA.

_DIALECTS = (
    ("PEFT", r"base_model\.model\."),
    ("kohya", r"lora_(unet|te\d?)_|bundle_emb\."),
    ("ComfyUI", r"(diffusion_model|text_encoders)\."),
    ("diffusers (old)", r".*\.processor\.to_(q|k|v|out)_lora\."),
    ("diffusers", r""),
)
_ENDS = "|".join(re.escape(end) for end in sorted(SLOTS, key=len, reverse=True))
_SLOT = rf"\.({_ENDS})"
_OLD = r"\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight"
_PEFT = r"(base_model\.model\.)?"
_TEXT_PATH = r"(text_model|encoder|text_projection)\b"
_UNET_PATH = r"(conv_in|conv_out|time_embedding|add_embedding|down_blocks|mid_block|up_blocks)\b"


def _lora(header: Header) -> Said:
    keys = list(header.shapes)
    dialect = next(name for name, pattern in _DIALECTS if any(re.match(pattern, key) for key in keys))
    forms = {
        "LoHa": ".hada_",
        "LoKr": ".lokr_",
        "DoRA": ("dora_scale", "lora_magnitude"),
        "LoCon": "lora_mid",
        "full differences": (".diff", ".diff_b"),
    }
    found = [
        form
        for form, marks in forms.items()
        if any(mark in key for key in keys for mark in ([marks] if isinstance(marks, str) else marks))
    ]
    two = any(re.match(r"lora_te2_|text_encoder_2\.|text_encoders\.clip_g|bundle_emb\..*clip_g", key) for key in keys)
    width = _lora_words(header)
    text = header.having("down.weight", "q_proj") or header.having("lora_A.weight", "q_proj")
    base = base_of(width) or (XL if two else "" if text is None else {768: SD1, 1024: SD2}.get(text[-1], ""))
    if any(key.startswith(("transformer.", "lora_transformer_")) for key in keys):
        base, width = "a transformer, which is none of controlroom's networks", None
    ranks = sorted(
        {shape[0] for key, shape in header.shapes.items() if re.search(r"lora[._](A|down)|down\.weight", key)}
    )
    notes = [f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"] if ranks else []
    if not any(key.endswith(".alpha") for key in keys) and "lora_adapter_metadata" not in header.metadata:
        notes.append("no alpha in the file; the rank is taken (a PEFT folder says it in adapter_config.json)")
    name = f"LoRA ({', '.join([dialect, *found])})"
    return Said(name, base, f"cr.LoRA({header.what!r})", "LoRA", tuple(notes))


def _lora_words(header: Header) -> int | None:
    """Width of the words that the changed layers read."""
    for key, shape in header.shapes.items():
        if "attn2" not in key or not re.search(r"to_[kv]", key) or len(shape) < 2:
            continue
        if re.search(r"(down|lora_A(\.default)?)\.weight$", key) or key.endswith(("hada_w1_b", ".diff")):
            return shape[1]
        if key.endswith("lokr_w1") and (second := header.shapes.get(key[:-1] + "2")):
            return shape[1] * second[1]
        if key.endswith("lokr_w1") and (second := header.shapes.get(key[:-1] + "2_b")):
            return shape[1] * second[1]
    return None


# Learned words.


def looks_like_words(header: Header) -> bool:
    """Whether it may be ``{token: [n, width]}``: no dots in the names, few rows, as wide as text encoders are."""
    shapes = header.shapes
    widths = {shape[-1] if shape else 0 for shape in shapes.values()}
    few = all("." not in key and len(shape) in (1, 2) and shape[0] <= 2048 for key, shape in shapes.items())
    usual = widths <= _TEXT_WIDTHS or (len(widths) == 1 and 32 <= max(widths) < 768)
    return few and usual and not set(shapes) & {"weight", "bias"}


_TEXT_WIDTHS = {768, 1024, 1280}


def _learned(header: Header) -> Said:
    keys = set(header.shapes)
    widths = {shape[-1] for shape in header.shapes.values()}
    form = "diffusers"
    if keys == {"emb_params"}:
        form = "kohya"
    elif keys & {"clip_l", "clip_g"}:
        form = "one for each text encoder" if len(keys) == 2 else "ComfyUI"
    elif any(key.startswith("string_to_param") for key in keys):
        form = "A1111"
    base = XL if "clip_g" in keys or 1280 in widths else {768: SD1, 1024: SD2}.get(max(widths), "")
    vectors = max(shape[0] if len(shape) > 1 else 1 for shape in header.shapes.values())
    named = form == "diffusers"
    word = next(iter(keys)) if named else "<word>"
    use = f"cr.TextualInversion({header.what!r}" + (")" if named else f", token={word!r})")
    return Said(f"learned word ({form})", base, use, "TextualInversion", (f"{vectors} vectors for {word!r}",))


# Adapters that read pictures.

_LAYER = r"layers\.\d+\.(0\.(norm[12]\.(weight|bias)|(to_q|to_kv|to_out)\.weight)|1\.(0\.(weight|bias)|[13]\.weight))"
_PLUS = rf"(latents|(proj_in|proj_out|norm_out){_NORM}|{_LAYER})"
_IMAGE_PROJ = rf"image_proj\.({_PLUS}|(proj|norm){_NORM}|proj\.[023]{_NORM}|perceiver_resampler\.{_PLUS})"


def _ip_adapter(header: Header) -> Said:
    shapes = header.shapes
    words = header.having("to_k_ip.weight") or header.having("to_v_ip.weight")
    base = base_of(words[1]) if words else ""
    layers = sum(key.endswith("to_k_ip.weight") for key in shapes)
    notes = [f"{layers} cross-attention layers"]
    reads = shapes.get("image_proj.proj_in.weight", (0, 0))[1]
    use = f"cr.IPAdapter({header.what!r}, image='picture.png')"
    if "image_proj.latents" in shapes:
        tokens = shapes["image_proj.latents"][1]
        notes.append(f"{tokens} tokens of features {reads} wide")
        # No image encoder gives features of 512; a face's identity has them.
        if reads == 512:
            face = f"cr.InstantID({str(Path(header.what).parent)!r}, image='face.png')"
            return Said("InstantID adapter", base, face, "InstantID", tuple(notes))
        form = "plus"
    elif any(".perceiver_resampler." in key for key in shapes):
        form, use = "FaceID-plus", f"cr.IPAdapter({header.what!r}, embeds=identity, image='face.png')"
    elif "image_proj.proj.3.weight" in shapes:
        form = "full face"
    elif "image_proj.proj.2.weight" in shapes:
        form, use = "FaceID", f"cr.IPAdapter({header.what!r}, embeds=identity)"
    else:
        form = "base"
    if any("_lora." in key for key in shapes):
        notes.append("changes the layers' own projections, in the whole run")
    if any(key.startswith("aggregator.") for key in shapes):
        notes.append("reads several pictures of one subject by attention between them")
    return Said(f"IP-Adapter ({form})", base, use, "IPAdapter", tuple(notes))


def _photomaker(header: Header) -> Said:
    version = "v2" if any(".qformer_perceiver." in key for key in header.shapes) else "v1"
    norm = header.having("fuse_module.layer_norm.weight")
    use = f"cr.PhotoMaker({header.what!r}, images=['face.png'])"
    return Said(f"PhotoMaker ({version})", base_of(norm[0] if norm else None), use, "PhotoMaker")


def _ms_diffusion(header: Header) -> Said:
    words = header.having("to_k_ip.weight")
    use = f"cr.MSDiffusion({header.what!r}, images=['cat.png'], phrases=['cat'], boxes=[(0, 0, 0.5, 1)])"
    return Said("MS-Diffusion", base_of(words[1] if words else None), use, "MSDiffusion")


# Adapters that read maps.


def _controlnet(header: Header) -> Said:
    original = any("input_hint_block." in key for key in header.shapes)
    prefix = "control_model." if any(key.startswith("control_model.") for key in header.shapes) else ""
    first = header.shapes.get("controlnet_cond_embedding.conv_in.weight") or header.shapes.get(
        f"{prefix}input_hint_block.0.weight"
    )
    notes = () if first is None else (f"reads {first[1]} channels of a condition",)
    if any(key.startswith(("model.diffusion_model.", "first_stage_model.")) for key in header.shapes):
        notes = (*notes, "also holds its whole base model, which the control does not need; convert leaves it out")
    form = "original layout" if original else "diffusers"
    use = f"cr.ControlNet({header.what!r}, image='map.png')"
    return Said(f"ControlNet ({form})", base_of(words_width(header, prefix)), use, "ControlNet", notes)


def _t2i(header: Header) -> Said:
    light = any(re.search(r"body\.\d+\.out_conv\.weight$", key) for key in header.shapes)
    theirs = any(".resnets." in key for key in header.shapes)
    name = "body.0.in_conv.weight" if light else "conv_in.weight"
    entry = header.shapes.get(f"adapter.{name}") or header.shapes.get(name)
    # A map is folded into 8 x 8 blocks for Stable Diffusion 1 and 2 (alike in shape), 16 x 16 for XL.
    base = {64: f"{SD1} or 2", 192: f"{SD1} or 2", 256: XL, 768: XL}.get(entry[1] if entry else 0, "")
    form = ("light, " if light else "") + ("diffusers" if theirs else "original layout")
    return Said(f"T2I-Adapter ({form})", base, f"cr.T2IAdapter({header.what!r}, image='map.png')", "T2IAdapter")


def _uni(header: Header) -> Said:
    parts = [p for p in ("local", "global") if any(key.startswith(f"{p}_adapter.") for key in header.shapes)]
    note = "the published layout; controlroom's Uni-ControlNet is trained anew and reads folders of its own"
    width = words_width(header, "local_adapter.") or words_width(header, "model.diffusion_model.")
    return Said(f"Uni-ControlNet ({' and '.join(parts)}, published)", base_of(width), "", "", (note,))


# Networks.

_UNET_KEYS = (
    r"(conv_in|time_embedding|time_proj|add_embedding|add_time_proj|class_embedding|encoder_hid_proj|down_blocks|"
    r"mid_block|up_blocks|conv_norm_out|conv_out|position_net)\..+"
)
_CHANNELS = {
    4: ("", ""),
    5: ("depth to image", "DepthToImage"),
    8: ("InstructPix2Pix", "InstructPix2Pix"),
    9: ("inpainting", "Inpaint"),
}
"""Input channels of a network -> what it is for, and the control that gives them."""


def reads(channels: int | None) -> tuple[str, str]:
    """What a network with that many input channels is for, and the control that gives them."""
    return _CHANNELS.get(channels or 4, (f"{channels} input channels", ""))


def _unet(header: Header) -> Said:
    entry = header.shapes.get("conv_in.weight")
    form, control = reads(entry[1] if entry else None)
    if any(key.startswith("position_net.") for key in header.shapes):
        form, control = "GLIGEN", "Gligen"
    base = base_of(words_width(header))
    if not any(key.startswith("conv_out.") for key in header.shapes):
        use = f"cr.AppearanceControl('picture.png', model={header.what!r})"
        return Said("reference network (diffusers)", base, use, "AppearanceControl")
    use = f"put it as unet/ into a model's folder: cr.Pipeline.from_pretrained(folder){used_with(control)}"
    return Said(f"UNet (diffusers{', ' if form else ''}{form})", base, use, control or "Pipeline")


def _part(name: str, folder: str) -> Callable[[Header], Said]:
    use = f"put it as {folder}/ into a model's folder: cr.Pipeline.from_pretrained(folder)"
    return lambda header: Said(name, "", use, "Pipeline")


def _checkpoint(header: Header) -> Said:
    entry = header.shapes.get("model.diffusion_model.input_blocks.0.0.weight")
    form, control = reads(entry[1] if entry else None)
    width = words_width(header, "model.diffusion_model.")
    use = f"cr.Pipeline.from_pretrained({header.what!r}){used_with(control)}"
    name = f"single-file checkpoint{f' ({form})' if form else ''}"
    missing = [
        part
        for part, prefixes in {
            "autoencoder": ("first_stage_model.",),
            "text encoder": ("cond_stage_model.", "conditioner."),
        }.items()
        if not any(key.startswith(prefixes) for key in header.shapes)
    ]
    notes = (f"without {' and '.join(missing)}: not a whole model",) if missing else ()
    return Said(name, base_of(width), use, control or "Pipeline", notes)


def used_with(control: str) -> str:
    """The end of a line that loads a network for a control."""
    return f", with cr.{control}" if control else ""


_SCHEDULE = (
    r"(betas|alphas_\w+|sqrt_\w+|log_one_\w+|posterior_\w+|lvlb_weights|logvar|scale_factor|denoiser\.\w+|"
    r"model_ema\..+|cond_stage_model\.logit_scale|model_sampling\..+)"
)
_WHOLE = {
    "of the UNet": r"model\.diffusion_model\..+",
    "of the autoencoder": r"first_stage_model\..+",
    "of the noise schedule and averages, which nothing needs": _SCHEDULE,
    "of the text encoders": r"(cond_stage_model|conditioner)\..+",
}
_LDM_NET = r"(time_embed|label_emb|input_blocks|middle_block)\..+"
_HINT = r"(input_hint_block|zero_convs|middle_block_out)\..+"
_BASE_PARTS = {f"{part} of its base": pattern for part, pattern in _WHOLE.items()}

WORDS = Family(
    "textual_inversion",
    r"(emb_params|clip_l|clip_g|string_to_param\.\*)$",
    {"of learned words": r"clip_l|clip_g|string_to_param\.\*|[^.]+"},
    _learned,
)

FAMILIES = (
    Family(
        "uni_controlnet",
        r"(local|global)_adapter\.",
        {"of the local adapter": r"local_adapter\..+", "of the global adapter": r"global_adapter\..+", **_BASE_PARTS},
        _uni,
    ),
    Family(
        "controlnet",
        r"(control_model\.)?input_hint_block\.|controlnet_cond_embedding\.",
        {
            "that embed the condition": (
                rf"controlnet_(cond_embedding|down_blocks|mid_block)\..+|(control_model\.)?{_HINT}"
            ),
            "of the copied encoder": rf"(control_model\.)?{_LDM_NET}|{_UNET_KEYS}",
            **_BASE_PARTS,
        },
        _controlnet,
    ),
    Family("checkpoint", r"model\.diffusion_model\.input_blocks\.", _WHOLE, _checkpoint),
    Family(
        "photomaker",
        r"id_encoder\.",
        {
            "of the image encoder": r"id_encoder\.(vision_model\..+|visual_projection(_2)?\.weight)",
            "of the fusion": r"id_encoder\.fuse_module\.(mlp1|mlp2|layer_norm)\..+",
            "of the identity resampler": r"id_encoder\.qformer_perceiver\..+",
            "of the UNet's LoRA": r"lora_weights\..+",
        },
        _photomaker,
    ),
    Family(
        "ms_diffusion",
        r"ms_adapter\.|dummy_image_tokens$|image_proj\.grounding_latents$",
        {
            "of the grounding resampler": (
                rf"image_proj\.(grounding_latents|latent_proj\.[02]{_NORM}|(latent_norm|attention_norm){_NORM}|{_PLUS})"
            ),
            "of the attention layers": r"ms_adapter\.\d+\.to_[kv]_ip\.weight",
            "of the background": r"dummy_image_tokens",
        },
        _ms_diffusion,
    ),
    Family(
        "ip_adapter",
        r"image_proj\.|ip_adapter\.\d",
        {
            "of the image projection": _IMAGE_PROJ,
            "of the attention layers": r"ip_adapter\.\d+\.to_[kv]_ip\.weight",
            "of changes to the layers": r"ip_adapter\.\d+\.to_(q|k|v|out)_lora\.(down|up)\.weight",
            "of the attention between pictures": r"aggregator\..+",
        },
        _ip_adapter,
    ),
    Family(
        "t2i_adapter",
        r"adapter\.(conv_in|body)\.|body\.\d+\.(in_conv|block1|body|out_conv|resnets)\.",
        {
            "of its blocks": r"(adapter\.)?body\.\d+\..+",
            "of its entry": r"(adapter\.)?conv_in\.(weight|bias)",
        },
        _t2i,
    ),
    Family(
        "lora",
        rf"bundle_emb\.|.*({_SLOT}|{_OLD})$",
        {
            "of the UNet": rf"(lora_unet_|unet\.|diffusion_model\.|{_PEFT}(unet\.)?{_UNET_PATH}).*({_SLOT}|{_OLD})",
            "of the text encoder": (
                rf"({_PEFT}{_TEXT_PATH}|lora_te1?_|te1\.|text_encoder\.|text_encoders\.clip_l\.).*{_SLOT}"
            ),
            "of the second text encoder": rf"(lora_te2_|te2\.|text_encoder_2\.|text_encoders\.clip_g\.).+{_SLOT}",
            "of a transformer": rf"(lora_transformer_|transformer\.).*{_SLOT}",
            "of learned words": r"bundle_emb\.(.+?)\.(string_to_param\.\*|clip_l|clip_g)",
        },
        _lora,
    ),
    Family("unet", r"(down_blocks|up_blocks)\.\d+\.(resnets|attentions)\.", {"of the network": _UNET_KEYS}, _unet),
    Family(
        "autoencoder",
        r"(encoder|decoder)\.conv_in\.",
        {"of the autoencoder": r"(encoder|decoder|quant_conv|post_quant_conv)\..+"},
        _part("autoencoder (diffusers)", "vae"),
    ),
    Family(
        "clip",
        r"((text_model|vision_model)\.)?embeddings\.(token|position|patch|class)_embedding",
        {
            # transformers 5 writes them without text_model. and vision_model.
            "of the encoder": (
                r"((text_model|vision_model)\.)?(embeddings|encoder|final_layer_norm|pre_layrnorm|post_layernorm)\..+"
            ),
            "of projections": r"(text_projection|visual_projection)\.weight|logit_scale",
        },
        _part("CLIP (transformers)", "text_encoder or image_encoder"),
    ),
    WORDS,
)
KNOWN = (
    "LoRAs (PEFT, diffusers, kohya, ComfyUI), learned words, IP-Adapters, InstantID, PhotoMaker, MS-Diffusion, "
    "ControlNets, T2I-Adapters, Uni-ControlNet, UNets and single-file checkpoints"
)
