"""The two adapters of Uni-ControlNet (Zhao et al., arXiv 2305.16322), and their files. Written from the paper.

The local adapter is a copy of the UNet's encoder that reads conditions, joined on channels, at every resolution: the
first residual block of a level normalises what it has and denormalises it with features of the conditions (FDN), and
what the copy finds is added to the UNet's skip connections through convolutions that start at zero. The global adapter
turns a picture's CLIP feature into further tokens of the text.

A folder holds ``local`` and ``global``, or one of them, each with ``config.json`` and ``model.safetensors``; beside the
global adapter lies the ``image_encoder`` whose features it reads. Deviations from the paper: a condition that is absent
is zero, but the convolutions that denormalise start without a bias, so that the copy starts as the encoder it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from controlroom.backbones.model_files import explained, read_json, read_safetensors
from controlroom.core.errors import ModelError
from controlroom.core.files import atomic_path, write_text_atomically

KINDS = ("canny", "soft_edge", "lines", "scribble", "depth", "normal", "segmentation", "pose")
"""Local conditions that a control has settings for; an adapter knows some or all of them."""
LOCAL, GLOBAL, ENCODER = "local", "global", "image_encoder"
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D")


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Features(nn.Module):
    """Joined conditions [B, C, H, W] -> one feature for each level of the UNet, each through a convolution from zero.

    Args:
        channels: of the joined conditions.
        first: widths while the picture is brought near to the latents' size, halved between them.
        widths: of the features, one for each level; the first step halves once more, to the latents' size.
        halvings: how often the autoencoder halves a picture's sides.
    """

    def __init__(self, channels: int, first: Sequence[int], widths: Sequence[int], halvings: int) -> None:
        super().__init__()
        if len(first) != halvings:
            raise ModelError(f"{len(first)} widths for {halvings} halvings; give one for each.")
        layers: list[nn.Module] = [nn.Conv2d(channels, first[0], 3, padding=1), nn.SiLU()]
        for before, width in pairwise(first):
            layers += [nn.Conv2d(before, width, 3, padding=1, stride=2), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
        self.first = nn.Sequential(*layers)
        before = [first[-1], *widths[:-1]]
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, stride=2), nn.SiLU())
            for a, b in zip(before, widths, strict=True)
        )
        self.zero = nn.ModuleList(_zero(nn.Conv2d(width, width, 3, padding=1)) for width in widths)

    def forward(self, conditions: torch.Tensor) -> list[torch.Tensor]:
        """One feature for each level."""
        h, found = self.first(conditions), []
        for level, zero in zip(self.levels, self.zero, strict=True):
            h = level(h)
            found.append(zero(h))
        return found


class Denormalisation(nn.Module):
    """FDN after the norm: normalised · (1 + γ(feature)) + β(feature)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.gamma = nn.Conv2d(width, channels, 3, padding=1)
        self.beta = nn.Conv2d(width, channels, 3, padding=1)
        for layer in (self.gamma, self.beta):
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, normalised: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        """Denormalised features of the same shape."""
        return normalised * (1 + self.gamma(feature)) + self.beta(feature)


class DenormalisedResnet(nn.Module):
    """A residual block of diffusers with both of its norms denormalised by a feature."""

    def __init__(self, resnet: Any, width: int) -> None:
        super().__init__()
        self.resnet = resnet
        self.norm_in = Denormalisation(resnet.norm1.num_channels, width)
        self.norm_out = Denormalisation(resnet.norm2.num_channels, width)

    def forward(self, x: torch.Tensor, emb: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        """[B, c, h, w] -> [B, c', h, w]."""
        block: Any = self.resnet
        h = block.conv1(F.silu(self.norm_in(block.norm1(x), feature)))
        h = h + block.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = block.conv2(block.dropout(F.silu(self.norm_out(block.norm2(h), feature))))
        return h + (x if block.conv_shortcut is None else block.conv_shortcut(x))


class LocalAdapter(nn.Module):
    """The UNet's encoder with conditions injected at each level.

    Attributes:
        settings: ``kinds`` in the order of their channels, ``first`` and ``widths`` of `Features`, ``halvings``.
    """

    def __init__(
        self, unet: Any, kinds: Sequence[str], first: Sequence[int], widths: Sequence[int], halvings: int
    ) -> None:
        """Take the encoder out of ``unet``, which is not to be used any more; see `for_unet`."""
        super().__init__()
        _check_unet(unet, len(widths))
        self.settings = {
            "kinds": list(kinds),
            "first": list(first),
            "widths": list(widths),
            "halvings": halvings,
            "latent_channels": int(unet.config.out_channels),
        }
        self.conv_in, self.time_proj, self.time_embedding = unet.conv_in, unet.time_proj, unet.time_embedding
        self.add_time_proj = getattr(unet, "add_time_proj", None)
        self.add_embedding = getattr(unet, "add_embedding", None)
        self.down_blocks, self.mid_block = unet.down_blocks, unet.mid_block
        self.features = Features(3 * len(kinds), first, widths, halvings)
        for block, width in zip(self.down_blocks, widths, strict=True):
            block.resnets[0] = DenormalisedResnet(block.resnets[0], width)
        skips = _skip_widths(unet)
        self.zero = nn.ModuleList(_zero(nn.Conv2d(width, width, 1)) for width in skips)
        self.zero_mid = _zero(nn.Conv2d(skips[-1], skips[-1], 1))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Conditions in the order of their channels, three each."""
        return tuple(self.settings["kinds"])  # type: ignore[arg-type]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return self.conv_in.weight.dtype

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        conditions: torch.Tensor,
        added: dict[str, torch.Tensor] | None = None,
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """What is added to the skip connections, and to the middle.

        Args:
            sample: [B, c, h, w] noisy latents as the UNet gets them.
            timestep: scalar or [B].
            context: [B, length, width] words, with the global adapter's tokens if there are any.
            conditions: [B, 3 * kinds, H, W] in pixels; absent ones are zero.
            added: Stable Diffusion XL's pooled words and sizes.
        """
        t = timestep.reshape(-1).expand(sample.shape[0])
        emb = self.time_embedding(self.time_proj(t).to(sample.dtype))
        if self.add_embedding is not None and added is not None:
            sizes = self.add_time_proj(added["time_ids"].flatten()).reshape(sample.shape[0], -1)  # type: ignore[misc]
            emb = emb + self.add_embedding(torch.cat([added["text_embeds"], sizes.to(emb.dtype)], dim=-1))
        h = self.conv_in(sample)
        skips = [h]
        for block_, feature in zip(self.down_blocks, self.features(conditions), strict=True):
            block: Any = block_
            attentions = getattr(block, "attentions", None)
            for index, resnet in enumerate(block.resnets):
                h = resnet(h, emb, feature) if index == 0 else resnet(h, emb)
                if attentions is not None:
                    h = attentions[index](h, encoder_hidden_states=context, return_dict=False)[0]
                skips.append(h)
            for sampler in block.downsamplers or ():
                h = sampler(h)
                skips.append(h)
        h = self.mid_block(h, emb, encoder_hidden_states=context)
        return tuple(zero(x) for zero, x in zip(self.zero, skips, strict=True)), self.zero_mid(h)


class GlobalAdapter(nn.Module):
    """A picture's feature [B, reads] -> tokens [B, tokens, width]: two feed-forward layers with norms before them."""

    def __init__(self, reads: int, width: int, tokens: int = 4) -> None:
        super().__init__()
        self.settings = {"reads": reads, "width": width, "tokens": tokens}
        self.norm1, self.norm2 = nn.LayerNorm(reads), nn.LayerNorm(2 * reads)
        self.ff1, self.ff2 = _FeedForward(reads, 2 * reads), _FeedForward(2 * reads, tokens * width)

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        """Tokens of each picture; a feature of zeros stands for no picture."""
        h = self.ff2(self.norm2(self.ff1(self.norm1(feature))))
        return h.unflatten(-1, (self.settings["tokens"], self.settings["width"]))


class _FeedForward(nn.Module):
    """A gated layer four times as wide."""

    def __init__(self, reads: int, gives: int) -> None:
        super().__init__()
        self.gate, self.out = nn.Linear(reads, 8 * reads), nn.Linear(4 * reads, gives)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.gate(x).chunk(2, dim=-1)
        return self.out(value * F.gelu(gate))


def _check_unet(unet: Any, levels: int) -> None:
    kinds = [type(block).__name__ for block in unet.down_blocks]
    if any(kind not in _BLOCKS for kind in kinds) or type(unet.mid_block).__name__ != "UNetMidBlock2DCrossAttn":
        raise ModelError(f"Uni-ControlNet copies the encoder of Stable Diffusion; this network has {', '.join(kinds)}.")
    if len(kinds) != levels:
        raise ModelError(
            f"This Uni-ControlNet was made for another base model: it has {levels} levels, this model {len(kinds)}. "
            "Use the one for this model."
        )


def _skip_widths(unet: Any) -> list[int]:
    """Channels of the skip connections: of the first convolution, each residual block, each downsampler."""
    widths = [int(unet.config.block_out_channels[0])]
    for block, width in zip(unet.down_blocks, unet.config.block_out_channels, strict=True):
        widths += [int(width)] * (len(block.resnets) + len(block.downsamplers or ()))
    return widths


def new_local_adapter(
    unet: Any, kinds: Sequence[str], first: Sequence[int], widths: Sequence[int], halvings: int
) -> LocalAdapter:
    """An adapter to be trained: a copy of the UNet's encoder, which adds nothing yet.

    Args:
        unet: the network it will control; left as it is.
        kinds: conditions it shall know, in the order of their channels.
        first, widths, halvings: of `Features`. Published, for Stable Diffusion 1: (32, 64, 128) and
            (192, 256, 384, 512), with 3.
    """
    net = LocalAdapter(_like(unet, int(unet.config.out_channels)), kinds, first, widths, halvings)
    own = net.state_dict()
    for key, value in unet.state_dict().items():
        # The first residual block of each level lies one deeper.
        for name in (key, key.replace(".resnets.0.", ".resnets.0.resnet.")):
            if name in own and own[name].shape == value.shape:
                own[name] = value.detach().clone()
    net.load_state_dict(own)
    return net


def _like(unet: Any, in_channels: int) -> Any:
    # As an argument: what stands in the configuration as a default would be read as one.
    # The gated layers of a GLIGEN network are not copied: adapters are made beside networks without them.
    return type(unet).from_config(unet.config, in_channels=in_channels, attention_type="default")


def save_adapter(net: LocalAdapter | GlobalAdapter, folder: Path) -> None:
    """Write an adapter into the folder ``local`` or ``global`` of a Uni-ControlNet."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"_class_name": type(net).__name__, **net.settings}, indent=2)
    write_text_atomically(folder / _CONFIG, text + "\n")
    tensors = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
    with atomic_path(folder / _WEIGHTS) as beside:
        save_file(tensors, str(beside), {"format": "pt"})


def part_folder(folder: Path, part: str) -> Path:
    """Where an adapter lies in the folder of a Uni-ControlNet.

    Raises:
        ModelError: it has none.
    """
    if not (folder / part).is_dir():
        raise ModelError(f"{folder} has no {part} adapter. It should hold the folders {LOCAL} and {GLOBAL}.")
    return folder / part


def load_local_adapter(folder: Path, unet: Any) -> LocalAdapter:
    """The adapter in a folder ``local``, for ``unet``, in its precision, on its device, not learning.

    Raises:
        ModelError: keys missing or left over, or made for another base model.
    """
    config = _config(folder, "LocalAdapter")
    try:
        arguments = (config["kinds"], config["first"], config["widths"], int(config["halvings"]))
        channels = int(config["latent_channels"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder / _CONFIG} lacks {error}. Copy it again.") from error
    unknown = [kind for kind in arguments[0] if kind not in KINDS]
    if unknown:
        raise ModelError(f"{folder / _CONFIG} names the condition {unknown[0]!r}; known are {', '.join(KINDS)}.")
    with torch.device("meta"):
        net = explained(str(folder), lambda: LocalAdapter(_like(unet, channels), *arguments))
    return _filled(net, folder, unet)


def load_global_adapter(folder: Path, unet: Any) -> GlobalAdapter:
    """The adapter in a folder ``global``, as `load_local_adapter`."""
    config = _config(folder, "GlobalAdapter")
    try:
        arguments = (int(config["reads"]), int(config["width"]), int(config["tokens"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder / _CONFIG} lacks {error}. Copy it again.") from error
    with torch.device("meta"):
        net = GlobalAdapter(*arguments)
    check_global_adapter(net, unet, str(folder))
    return _filled(net, folder, unet)


def check_global_adapter(net: GlobalAdapter, unet: Any, name: str) -> None:
    """Its tokens are as wide as the text's.

    Raises:
        ModelError: they are not.
    """
    width = unet.config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    if net.settings["width"] != width:
        raise ModelError(
            f"The global adapter {name} was made for another base model: its tokens are {net.settings['width']} wide, "
            f"this model's text {width}. Use the one for this model."
        )


def check_local_adapter(net: LocalAdapter, unet: Any, halvings: int, name: str) -> None:
    """Its encoder is that of the UNet.

    Raises:
        ModelError: made for another base model.
    """
    expected = _skip_widths(unet)
    found = [layer.weight.shape[0] for layer in net.zero]  # type: ignore[union-attr]
    problem = "" if found == expected else f"its skip connections are {found}, this model's {expected}"
    if net.settings["halvings"] != halvings:
        problem = f"it halves its conditions {net.settings['halvings']} times, this model its pictures {halvings}"
    if problem:
        raise ModelError(f"The Uni-ControlNet {name} was made for another base model: {problem}. Use the one for it.")


def _config(folder: Path, kind: str) -> dict[str, Any]:
    config = read_json(folder / _CONFIG)
    if config.get("_class_name") != kind:
        raise ModelError(f"{folder} holds a {config.get('_class_name')}; expected the {kind} of a Uni-ControlNet.")
    return config


def _filled(net: Any, folder: Path, unet: Any) -> Any:
    """An adapter on no device with the weights of its folder."""
    tensors, own = read_safetensors(folder / _WEIGHTS), net.state_dict()
    for key, value in own.items():
        if key not in tensors:
            raise ModelError(f"{folder} does not fit this model: it lacks {key!r}. Use the one for this model.")
        if tensors[key].shape != value.shape:
            raise ModelError(
                f"{folder} was made for another base model: its {key} is {list(tensors[key].shape)}, this model needs "
                f"{list(value.shape)}. Use the one for this model."
            )
    left = [key for key in tensors if key not in own]
    if left:
        raise ModelError(f"{folder} has {len(left)} weights that nothing reads, such as {left[0]!r}.")
    net.load_state_dict(tensors, assign=True)
    return net.to(device=unet.device, dtype=unet.dtype).eval().requires_grad_(False)
