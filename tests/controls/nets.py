"""Tiny auxiliary networks with random weights for the miniature pipelines of `tests.tiny`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel

from tests.tiny import LENGTH


def tiny_controlnet(unet: Any, seed: int = 7, strength: float = 0.3, **settings: Any) -> ControlNetModel:
    """A ControlNet for a miniature: halves its condition once, as the miniature autoencoders do.

    Convolutions that start at zero are random here, or nothing would be seen of it.
    """
    torch.manual_seed(seed)
    settings = {"conditioning_embedding_out_channels": (8, 16), "load_weights_from_unet": False, **settings}
    net = ControlNetModel.from_unet(unet, **settings).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.startswith(
                ("controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding.conv_out")
            ):
                parameter.normal_(0.0, strength)
    return net


def tiny_image_encoder(seed: int = 11) -> Any:
    """A CLIP image encoder of two layers: 17 states of width 32, features of width 24, pictures of 32 pixels."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=37,
        projection_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    return CLIPVisionModelWithProjection(config).eval()


def tiny_ip_adapter(unet: Any, kind: str = "base", seed: int = 13, tokens: int = 4) -> dict[str, torch.Tensor]:
    """Random tensors of an IP-Adapter's file for a miniature, named as in the published files."""
    width = unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(seed)

    def matrix(out: int, into: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(out, into, generator=generator) * gain / into**0.5

    def norm(name: str, size: int) -> dict[str, torch.Tensor]:
        ones = 1 + 0.3 * torch.randn(size, generator=generator)
        return {f"{name}.weight": ones, f"{name}.bias": 0.3 * torch.randn(size, generator=generator)}

    def linear(name: str, out: int, into: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": matrix(out, into), f"{name}.bias": torch.randn(out, generator=generator)}

    image: dict[str, torch.Tensor] = {}
    if kind == "base":
        image = {**linear("proj", tokens * width, 24), **norm("norm", width)}
    elif kind == "full":
        image = {**linear("proj.0", 32, 32), **linear("proj.2", width, 32), **norm("proj.3", width)}
    elif kind == "faceid":
        image = {**linear("proj.0", 20, 10), **linear("proj.2", tokens * width, 20), **norm("norm", width)}
    elif kind == "plus":
        hidden = 48
        image = {
            "latents": torch.randn(1, tokens, hidden, generator=generator),
            **linear("proj_in", hidden, 32),
            **linear("proj_out", width, hidden),
            **norm("norm_out", width),
        }
        for i in range(4):
            image |= {**norm(f"layers.{i}.0.norm1", hidden), **norm(f"layers.{i}.0.norm2", hidden)}
            image |= {
                f"layers.{i}.0.to_q.weight": matrix(128, hidden),
                f"layers.{i}.0.to_kv.weight": matrix(256, hidden),
            }
            image |= {f"layers.{i}.0.to_out.weight": matrix(hidden, 128), **norm(f"layers.{i}.1.0", hidden)}
            image |= {f"layers.{i}.1.1.weight": matrix(4 * hidden, hidden)}
            image |= {f"layers.{i}.1.3.weight": matrix(hidden, 4 * hidden)}
    found = {f"image_proj.{key}": value for key, value in image.items()}
    number = 1
    for number_of_layer, name in enumerate(unet.attn_processors):
        layer = unet.get_submodule(name.removesuffix(".processor"))
        inner = layer.to_q.weight.shape[0]
        if not name.endswith("attn1.processor"):
            for part in ("k", "v"):
                found[f"ip_adapter.{number}.to_{part}_ip.weight"] = matrix(inner, width, 1.5)
            number += 2
        if kind == "faceid":
            for part, linear_layer in (
                ("q", layer.to_q),
                ("k", layer.to_k),
                ("v", layer.to_v),
                ("out", layer.to_out[0]),
            ):
                key = f"ip_adapter.{number_of_layer}.to_{part}_lora"
                found[f"{key}.down.weight"] = matrix(3, linear_layer.in_features)
                found[f"{key}.up.weight"] = matrix(linear_layer.out_features, 3, 0.2)
    return found


def tiny_imagic(unet: Any, pooled: bool, folder: Path, seed: int = 17) -> Path:
    """A fit as `fit_imagic` leaves it in its folder, with random words and the weights of ``unet``."""
    from safetensors.torch import save_file

    from controlroom.controls.editing.imagic import EMBEDDING, UNET

    generator = torch.Generator().manual_seed(seed)
    words = {"tokens": torch.randn(1, LENGTH, unet.config.cross_attention_dim, generator=generator)}
    if pooled:
        words["pooled"] = torch.randn(1, 32, generator=generator)
    (folder / EMBEDDING).parent.mkdir(parents=True)
    save_file(words, str(folder / EMBEDDING), {"format": "pt"})
    unet.save_pretrained(folder / UNET)
    return folder


def tiny_t2i_adapter(unet: Any, seed: int = 19, light: bool = False, in_channels: int = 3, gain: float = 3.0) -> Any:
    """A T2I-Adapter for a miniature; an XL one where the first block of the UNet has no attention."""
    from diffusers import T2IAdapter

    from controlroom.backbones.t2i_adapter import feature_slots

    torch.manual_seed(seed)
    slots = feature_slots(unet, (16, 16))
    xl = slots[0][1] != (16, 16)
    widths = [width for width, _ in slots]
    if xl and len(widths) < 4:
        widths = widths[:2]
    net = T2IAdapter(
        in_channels=in_channels,
        channels=widths[:-1] if light else widths,
        num_res_blocks=2,
        downscale_factor=4 if xl else 2,
        adapter_type="light_adapter" if light else "full_adapter_xl" if xl else "full_adapter",
    ).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith(("conv_in.weight", "block2.weight", "out_conv.weight")):
                parameter.mul_(gain)
    return net


def tiny_uni_adapters(unet: Any, seed: int = 23, kinds: tuple[str, ...] = ("canny", "depth", "pose")) -> dict[str, Any]:
    """Both adapters of a Uni-ControlNet for a miniature; what starts at zero is random here."""
    from controlroom.backbones.uni_controlnet import GlobalAdapter, new_local_adapter

    torch.manual_seed(seed)
    levels = len(unet.config.block_out_channels)
    local = new_local_adapter(unet, kinds, (8,), (8, 16, 16)[:levels], 1).eval()
    with torch.no_grad():
        for name, parameter in local.named_parameters():
            if name.startswith(("zero", "features.zero")) or ".norm_in." in name or ".norm_out." in name:
                parameter.normal_(0.0, 0.3)
    return {"local": local, "global": GlobalAdapter(24, int(unet.config.cross_attention_dim)).eval()}


def write_uni_controlnet(unet: Any, folder: Path) -> Path:
    """The folder of a Uni-ControlNet for a miniature, with its image encoder."""
    from controlroom.backbones.uni_controlnet import save_adapter

    for part, net in tiny_uni_adapters(unet).items():
        save_adapter(net, folder / part)
    tiny_image_encoder().save_pretrained(folder / "global/image_encoder")
    return folder


def gated_unet(unet: Any, seed: int = 29, attention_type: str = "gated") -> Any:
    """The same UNet with GLIGEN's gated layers; without boxes it draws what it drew."""
    torch.manual_seed(seed)
    net = type(unet).from_config(unet.config, attention_type=attention_type).eval()
    net.load_state_dict(unet.state_dict(), strict=False)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith(("alpha_attn", "alpha_dense")):
                parameter.fill_(0.7)
            if name.startswith("position_net.null"):
                parameter.normal_()
    return net


def tiny_ms_diffusion(unet: Any, seed: int = 31, tokens: int = 3) -> dict[str, torch.Tensor]:
    """Random tensors of a file of MS-Diffusion for a miniature: states of width 32, phrases of width 32."""
    from controlroom.backbones.ms_diffusion import GroundingResampler, MSDiffusionModel

    torch.manual_seed(seed)
    projection = GroundingResampler(32, 48, int(unet.config.cross_attention_dim), tokens, 2, 128, 96, 32)
    model = MSDiffusionModel.for_unet(unet, projection)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif ".to_k_ip." in name or ".to_v_ip." in name:
                parameter.normal_(0.0, 1.5 / parameter.shape[1] ** 0.5)
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def tiny_instant_id(unet: Any, seed: int = 31, tokens: int = 6) -> tuple[dict[str, torch.Tensor], ControlNetModel]:
    """The two parts of an InstantID for a miniature, random: an adapter that reads vectors of 32, and IdentityNet."""
    return tiny_ip_adapter(unet, "plus", seed, tokens), tiny_controlnet(unet, seed)


def write_instant_id(unet: Any, folder: Path) -> Path:
    """The folder of an InstantID for a miniature."""
    from safetensors.torch import save_file

    adapter, net = tiny_instant_id(unet)
    folder.mkdir(parents=True)
    save_file(adapter, str(folder / "ip-adapter.safetensors"))
    net.save_pretrained(folder / "ControlNetModel")
    return folder


def tiny_subject_reader(width: int = 32, queries: int = 3, seed: int = 37) -> Any:
    """A BLIP-Diffusion subject encoder for a miniature whose words are as wide, with `tiny_image_encoder`."""
    from controlroom.backbones.subject_encoder import EncoderShape, SubjectEncoder
    from controlroom.backbones.subject_reader import SubjectReader
    from tests.tiny import tiny_tokenizer

    torch.manual_seed(seed)
    former = {
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "encoder_hidden_size": 32,
        "vocab_size": 200,
        "max_position_embeddings": LENGTH,
    }
    shape = EncoderShape.model_validate({"qformer_config": former, "num_query_tokens": queries})
    encoder = SubjectEncoder(shape).eval().requires_grad_(False)
    return SubjectReader(encoder, tiny_tokenizer(), tiny_image_encoder())


def write_subject_reader(pipe: Any, folder: Path) -> Path:
    """The folder of a subject encoder for a miniature."""
    from controlroom.backbones.subject_reader import save_subject_reader

    encoders = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
    width = sum(each.get_input_embeddings().weight.shape[1] for each in encoders if each is not None)
    save_subject_reader(tiny_subject_reader(width), folder)
    return folder


def tiny_photomaker(pipe: Any, version: int = 1, seed: int = 37) -> Any:
    """A PhotoMaker for a miniature, random: pictures of 32 pixels; version 2 reads faces of 10 numbers."""
    from transformers import CLIPVisionConfig

    from controlroom.backbones.photomaker import IDEncoder, Perceiver, PhotoMakerModel, QFormerPerceiver

    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=37,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=32,
        patch_size=8,
    )
    texts = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
    widths = tuple(int(text.config.hidden_size) for text in texts if text is not None)
    width = sum(widths)
    perceiver = None
    if version == 2:
        perceiver = QFormerPerceiver(10, 20, width, 2, Perceiver(64, width, 128, 2 * width, 2))
    encoder = IDEncoder(config, widths, perceiver).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in encoder.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        elif not name.startswith("vision_model"):
            parameter.copy_(1.5 * torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    lora: dict[str, torch.Tensor] = {}
    for name in pipe.unet.attn_processors:
        layer = pipe.unet.get_submodule(name.removesuffix(".processor"))
        for part in ("q", "k", "v", "out"):
            linear = layer.to_out[0] if part == "out" else getattr(layer, f"to_{part}")
            key = f"unet.{name}.to_{part}_lora"
            lora[f"{key}.down.weight"] = 0.1 * torch.randn(2, linear.in_features, generator=generator)
            lora[f"{key}.up.weight"] = 0.3 * torch.randn(linear.out_features, 2, generator=generator)
    return PhotoMakerModel(encoder, lora)


def tiny_kosmos(pipe: Any, seed: int = 41) -> Any:
    """A KOSMOS-G for a miniature, random, with `tiny_image_encoder`; what it gives is as wide as the words' states."""
    from controlroom.backbones.kosmos import new_kosmos
    from controlroom.sampling.pipeline import Pipeline

    sizes = {"width": 32, "layers": 2, "heads": 4, "image_tokens": 3, "length": 60, "aligner_layers": 1}
    reader = new_kosmos(tiny_image_encoder(), Pipeline.from_diffusers(pipe).backbone, seed, aligner_heads=4, **sizes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in reader.model.named_parameters():
            gain = 0.3 if parameter.ndim == 1 or name.startswith("language.embed") else 0.1
            parameter.add_(gain * torch.randn(parameter.shape, generator=generator))
    return reader.eval().requires_grad_(False)


def tiny_unimo(pipe: Any, seed: int = 43) -> Any:
    """A UNIMO-G for a miniature, random, with the language model of `tiny_kosmos`."""
    from controlroom.backbones.unimo import new_unimo
    from controlroom.sampling.pipeline import Pipeline

    reader = new_unimo(tiny_kosmos(pipe), Pipeline.from_diffusers(pipe).backbone, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in ("prompt", "visual", "layers"):
            for parameter in reader.model.parts()[part].parameters():
                gain = 0.3 if parameter.ndim == 1 else 0.5 / parameter.shape[1] ** 0.5
                parameter.add_(gain * torch.randn(parameter.shape, generator=generator))
    return reader.eval().requires_grad_(False)
