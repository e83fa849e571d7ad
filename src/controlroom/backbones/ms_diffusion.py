"""MS-Diffusion's networks and files (Wang et al., arXiv 2406.07209): a grounding resampler, and masked attention.

A file holds ``image_proj.*`` (the resampler), ``ms_adapter.N.to_{k,v}_ip.weight`` (N as in IP-Adapter's files: the
UNet's attention processors in the order down, up, mid) and ``dummy_image_tokens``. `MSDiffusionModel` is named so that
its state dictionary *is* the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from controlroom.backbones.image_projection import ImageProjection, resampled, resampler_layers
from controlroom.backbones.ip_adapter import flat_tensors, layer_numbers
from controlroom.backbones.model_files import read_safetensors
from controlroom.core.errors import ModelError

FREQUENCIES = 8
"""Of the Fourier features of a box in every published file; the files do not say."""
_TEMPERATURE = 100.0
HIDDEN = -10_000.0
"""Added to the logits of tokens that a query must not see, as in the published code."""
Box = tuple[float, float, float, float]


class GroundingResampler(ImageProjection):
    """[n, length, reads] -> [n, tokens, width]: queries made of a phrase and its box attend to a picture's states.

    Attributes:
        phrase: width of a phrase's embedding.
        tokens: of each subject.
    """

    states = True

    def __init__(
        self, reads: int, hidden: int, width: int, tokens: int, depth: int, inner: int, feed: int, phrase: int
    ) -> None:
        super().__init__()
        self.reads, self.width, self.phrase, self.tokens = reads, width, phrase, tokens
        grounding = phrase + 8 * FREQUENCIES
        self.grounding_latents = nn.Parameter(torch.randn(1, tokens, hidden) / hidden**0.5)
        first, last = nn.Linear(grounding, 2 * grounding), nn.Linear(2 * grounding, hidden * tokens)
        self.latent_proj = nn.Sequential(first, nn.GELU(), last)
        self.latent_norm = nn.LayerNorm(hidden)
        self.proj_in = nn.Linear(reads, hidden)
        self.attention_norm = nn.LayerNorm(hidden)
        self.proj_out = nn.Linear(hidden, width)
        self.norm_out = nn.LayerNorm(width)
        self.layers = resampler_layers(hidden, depth, inner, feed)

    def forward(self, features: Tensor, boxes: Tensor, phrases: Tensor, grounded: Tensor | None = None) -> Tensor:
        """Tokens of each subject.

        Args:
            features: [n, length, reads], states of the image encoder.
            boxes: [n, 4], left, top, right and bottom, 0 to 1.
            phrases: [n, phrase], pooled embeddings of what the subjects are called.
            grounded: [n], where False the learned queries stand in for box and phrase; None: nowhere.
        """
        queries = self.latent_proj(torch.cat([phrases, _fourier(boxes).to(phrases)], dim=-1))
        queries = self.latent_norm(queries.unflatten(-1, (self.tokens, -1)))
        if grounded is not None:
            queries = torch.where(grounded[:, None, None], queries, self.grounding_latents)
        found = resampled(self.layers, self.proj_in(features), queries)
        return self.norm_out(self.proj_out(self.attention_norm(found)))


def _fourier(boxes: Tensor) -> Tensor:
    """[n, 4] -> [n, 64]: for each frequency the four sines, then the four cosines."""
    bands = _TEMPERATURE ** (torch.arange(FREQUENCIES, device=boxes.device) / FREQUENCIES)
    angles = boxes.float()[:, None, :] * bands[:, None]
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


class MSDiffusionModel(nn.Module):
    """A grounding resampler, keys and values for each cross-attention layer, and the background's tokens.

    Attributes:
        image_proj: states of a picture, a phrase and a box -> tokens.
        ms_adapter: number of the attention processor -> its layers.
        dummy_image_tokens: [1, count, width]: what queries outside of all boxes attend to. Nothing of it is shown there
            (the published code sets it to zero), so these tokens are never trained; they are part of the file.
    """

    def __init__(self, image_proj: GroundingResampler, layers: Mapping[str, nn.Module], dummies: int = 4) -> None:
        super().__init__()
        self.image_proj = image_proj
        self.ms_adapter = nn.ModuleDict(layers)
        self.dummy_image_tokens = nn.Parameter(torch.randn(1, dummies, image_proj.width))

    @classmethod
    def for_unet(cls, unet: Any, image_proj: GroundingResampler) -> MSDiffusionModel:
        """One to be trained: keys and values start as the copies of the text's, as in the published trainer.

        Raises:
            ModelError: the tokens are not as wide as the text's.
        """
        layers: dict[str, nn.Module] = {}
        for name, number in layer_numbers(unet).items():
            attention = unet.get_submodule(name)
            if attention.to_k.in_features != image_proj.width:
                raise ModelError(
                    f"The tokens are {image_proj.width} wide, this model's text {attention.to_k.in_features}."
                )
            parts = {"to_k_ip": _copied(attention.to_k.weight), "to_v_ip": _copied(attention.to_v.weight)}
            layers[str(number)] = nn.ModuleDict(parts)
        return cls(image_proj, layers)

    def keys_and_values(self, number: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[rows, length, width] -> keys and values [rows, length, heads * head width] of a layer."""
        layer: Any = self.ms_adapter[str(number)]
        return layer["to_k_ip"](tokens), layer["to_v_ip"](tokens)

    def prompt(self, features: Tensor, boxes: Tensor, phrases: Tensor, grounded: Tensor | None = None) -> Tensor:
        """All tokens of a picture, the background's first.

        Args:
            features: [rows, subjects, length, reads].
            boxes: [rows, subjects, 4].
            phrases: [rows, subjects, phrase].
            grounded: [rows]; where False box and phrase are not told. None: they are told.

        Returns:
            [rows, dummies + subjects * tokens, width]
        """
        rows, subjects = features.shape[:2]
        told = None if grounded is None else grounded.repeat_interleave(subjects)
        found = self.image_proj(features.flatten(0, 1), boxes.flatten(0, 1), phrases.flatten(0, 1), told)
        found = found.unflatten(0, (rows, subjects)).flatten(1, 2)
        return torch.cat([self.dummy_image_tokens.expand(rows, -1, -1), found], dim=1)

    def seen(self, inside: Tensor) -> tuple[Tensor, Tensor]:
        """What each query may see, and where anything is added.

        Args:
            inside: [rows, subjects, queries], 1 where a query lies in a subject's box, else 0.

        Returns:
            Bias of the logits [rows, 1, queries, dummies + subjects * tokens]; and [rows, queries], 1 in any box.
        """
        own = inside.transpose(1, 2).repeat_interleave(self.image_proj.tokens, dim=-1)
        anywhere = inside.amax(dim=1)
        dummies = (1 - anywhere)[..., None].expand(-1, -1, self.dummy_image_tokens.shape[1])
        return (1 - torch.cat([dummies, own], dim=-1))[:, None] * HIDDEN, anywhere


def inside_boxes(boxes: Sequence[Box], hw: tuple[int, int]) -> Tensor:
    """[subjects, h, w]: 1 in every cell that a box touches."""
    height, width = hw
    found = torch.zeros(len(boxes), height, width)
    for mask, (left, top, right, bottom) in zip(found, boxes, strict=True):
        # Products such as 0.7 * 10 miss a whole number by their rounding.
        rows = slice(math.floor(top * height + 1e-6), math.ceil(bottom * height - 1e-6))
        mask[rows, math.floor(left * width + 1e-6) : math.ceil(right * width - 1e-6)] = 1
    return found


def coarse(inside: Tensor, hw: tuple[int, int]) -> Tensor:
    """[rows, subjects, H, W] -> [rows, subjects, h * w]: a coarse cell is inside where any of its pixels is."""
    return F.adaptive_max_pool2d(inside.float(), hw).flatten(2)


# Files.


def load_ms_diffusion(path: Path, unet: Any) -> MSDiffusionModel:
    """The model in a ``.safetensors`` file, in the UNet's precision, on its device, not learning.

    Raises:
        ModelError: broken, keys missing or left over, or made for another base model.
    """
    return ms_diffusion_from_tensors(read_safetensors(path), unet, str(path))


def ms_diffusion_from_tensors(tensors: Mapping[str, Any], unet: Any, name: str = "the mapping") -> MSDiffusionModel:
    """The model in a mapping with the keys of a file, flat or nested as the published ``.bin`` has it.

    Raises:
        ModelError: as `load_ms_diffusion`.
    """
    flat = flat_tensors(tensors, "A file of MS-Diffusion")
    shapes = {key: tuple(value.shape) for key, value in flat.items()}
    try:
        model = _model_for(shapes)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        found = ", ".join(sorted(shapes)[:4]) or "nothing"
        raise ModelError(
            f"{name} is not a file of MS-Diffusion: {error} is missing or has a strange shape (it has {found}). Give "
            "one with image_proj.*, ms_adapter.* and dummy_image_tokens."
        ) from None
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key, shape in expected.items():
        if shapes.get(key) != shape:
            there = "lacks" if key not in shapes else f"has {list(shapes[key])} for"
            raise ModelError(f"{name} {there} {key!r}; the rest of it asks for {list(shape)}.")
    left = [key for key in flat if key not in expected]
    if left:
        raise ModelError(f"{name} has {len(left)} weights that nothing reads, such as {left[0]!r}.")
    check_ms_diffusion(model, unet, name)
    model.load_state_dict(flat)
    return model.to(device=unet.device, dtype=unet.dtype).eval().requires_grad_(False)


def _model_for(shapes: Mapping[str, tuple[int, ...]]) -> MSDiffusionModel:
    """A model whose parameters have these shapes; its weights are not filled in."""
    image = {key.removeprefix("image_proj."): shape for key, shape in shapes.items() if key.startswith("image_proj.")}
    (hidden, reads), (_, tokens, _) = image["proj_in.weight"], image["grounding_latents"]
    depth = 1 + max(int(key.split(".")[1]) for key in image if key.startswith("layers."))
    inner, feed = image["layers.0.0.to_q.weight"][0], image["layers.0.1.1.weight"][0]
    phrase = image["latent_proj.0.weight"][1] - 8 * FREQUENCIES
    if phrase < 1:
        raise ValueError("latent_proj.0.weight")
    width = image["proj_out.weight"][0]
    projection = GroundingResampler(reads, hidden, width, tokens, depth, inner, feed, phrase)
    layers: dict[str, nn.ModuleDict] = {}
    for key, shape in shapes.items():
        group, _, rest = key.partition(".")
        number, _, part = rest.removesuffix(".weight").partition(".")
        if group == "ms_adapter" and part in ("to_k_ip", "to_v_ip"):
            out, into = shape
            layers.setdefault(number, nn.ModuleDict())[part] = nn.Linear(into, out, bias=False)
    return MSDiffusionModel(projection, layers, shapes["dummy_image_tokens"][1])


def check_ms_diffusion(model: MSDiffusionModel, unet: Any, name: str = "the model") -> None:
    """Its layers are those of the UNet, in number and shape.

    Raises:
        ModelError: it was made for another base model.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for layer, number in layer_numbers(unet).items():
        for part in ("k", "v"):
            weight = getattr(unet.get_submodule(layer), f"to_{part}").weight
            expected[f"{number}.to_{part}_ip.weight"] = tuple(weight.shape)
    found = {key: tuple(value.shape) for key, value in model.ms_adapter.state_dict().items()}
    if found != expected:
        wrong = next(iter(sorted(set(found.items()) ^ set(expected.items()))))[0]
        raise ModelError(
            f"{name} was made for another base model: its ms_adapter.{wrong} is {found.get(wrong)}, this model's "
            f"{expected.get(wrong)}. Use the one for this model."
        )


def model_file(path: Path) -> Path:
    """The model's file: the path itself, or the only ``.safetensors`` in a folder.

    Raises:
        ModelError: the folder has none, or several.
    """
    if path.is_file():
        return path
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none (a .bin is a pickle, which is never opened)"
        raise ModelError(f"{path} should hold one .safetensors file of MS-Diffusion; it has {found}. Name the file.")
    return files[0]


# Training.


@contextmanager
def grounded_attention(unet: Any, model: MSDiffusionModel, tokens: Tensor, inside: Tensor) -> Iterator[None]:
    """Let the cross-attentions of ``unet`` attend to subjects in their boxes beside the words, with gradients.

    Equal to the engine's stream at scale 1. Afterwards the processors are as before.

    Args:
        unet: the reader.
        model: gives keys and values.
        tokens: [rows, dummies + subjects * tokens, width], from `MSDiffusionModel.prompt`.
        inside: [rows, subjects, h, w] at the size of the latents, 1 where a box is.
    """
    layers = [(unet.get_submodule(name), number) for name, number in layer_numbers(unet).items()]
    before = [layer.processor for layer, _ in layers]
    at_size: dict[int, tuple[Tensor, Tensor]] = {}
    try:
        for layer, number in layers:
            layer.processor = _Grounded(model, number, tokens, inside, at_size)
        yield
    finally:
        for (layer, _), processor in zip(layers, before, strict=True):
            layer.processor = processor


class _Grounded:
    """Cross-attention to words, plus that to subjects. Explicit: on a CPU it trains faster than SDPA."""

    def __init__(
        self,
        model: MSDiffusionModel,
        number: int,
        tokens: Tensor,
        inside: Tensor,
        at_size: dict[int, tuple[Tensor, Tensor]],
    ) -> None:
        self.model, self.number, self.tokens, self.inside, self.at_size = model, number, tokens, inside, at_size

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **named: Any
    ) -> Tensor:
        queries = hidden_states.shape[1]
        if queries not in self.at_size:
            height, width = self.inside.shape[-2:]
            while height * width > queries:
                height, width = (height + 1) // 2, (width + 1) // 2
            self.at_size[queries] = self.model.seen(coarse(self.inside, (height, width)))
        bias, anywhere = self.at_size[queries]
        q = _heads(attn.to_q(hidden_states), attn.heads)
        words = _attended(attn, q, attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        subjects = _attended(attn, q, *self.model.keys_and_values(self.number, self.tokens), bias)
        out = words + subjects * anywhere[:, None, :, None].to(subjects)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


def _attended(attn: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    k, v = _heads(k, attn.heads), _heads(v, attn.heads)
    logits = (q @ k.transpose(-1, -2) * attn.scale).float()
    return (logits if bias is None else logits + bias).softmax(-1).to(v.dtype) @ v


def _heads(x: Tensor, heads: int) -> Tensor:
    """[rows, length, heads * width] -> [rows, heads, length, width]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _copied(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.load_state_dict({"weight": weight.detach()})
    return linear
