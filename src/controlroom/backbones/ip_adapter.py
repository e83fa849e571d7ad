"""Files of IP-Adapters (Ye et al., arXiv 2308.06721): read, checked against the UNet, written.

A file holds ``image_proj.*`` and ``ip_adapter.N.to_{k,v}_ip.weight``; N counts the UNet's attention processors in
diffusers' order (down, up, mid), where cross-attention has the odd numbers. FaceID files also hold
``ip_adapter.N.to_{q,k,v,out}_lora.{down,up}.weight`` for every N; those that read several pictures by attention
``aggregator.*`` and how to use it, in the metadata. `IPAdapterModel` is named so that its state dictionary *is* the
file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from controlroom.backbones.bases import base_of
from controlroom.backbones.image_aggregator import (
    Aggregate,
    AggregatorSettings,
    PictureAttention,
    aggregated,
    attention_from,
)
from controlroom.backbones.image_encoder import encoder_width, load_image_encoder
from controlroom.backbones.image_projection import ImageProjection, projection_for
from controlroom.backbones.loading import find_model
from controlroom.backbones.model_files import read_metadata, read_safetensors
from controlroom.core.backbone import Backbone
from controlroom.core.errors import ModelError

_IMAGE, _LAYERS, _AGGREGATOR = "image_proj.", "ip_adapter.", "aggregator."
_LAYER_KEY = re.compile(r"(\d+)\.(to_(?:k|v)_ip|to_(?:q|k|v|out)_lora\.(?:down|up))\.weight")


class IPAdapterModel(nn.Module):
    """An image projection, and keys and values for each cross-attention layer.

    Attributes:
        image_proj: features -> tokens.
        ip_adapter: number of the attention processor -> its layers.
        aggregator: attention between the pictures of a prompt; None: it has none.
        aggregate: what becomes of several pictures unless a run says otherwise.
    """

    def __init__(
        self,
        image_proj: ImageProjection,
        layers: Mapping[str, nn.Module],
        aggregator: PictureAttention | None = None,
        aggregate: Aggregate = "tokens",
    ) -> None:
        super().__init__()
        self.image_proj = image_proj
        self.ip_adapter = nn.ModuleDict(layers)
        if aggregator is not None and aggregator.width != image_proj.reads:
            raise ModelError(
                f"The attention between pictures reads features {aggregator.width} wide, the projection those "
                f"{image_proj.reads} wide."
            )
        self.aggregator = aggregator
        self.aggregate: Aggregate = aggregate

    @classmethod
    def for_unet(cls, unet: Any, image_proj: ImageProjection, rank: int | None = None, seed: int = 0) -> IPAdapterModel:
        """An adapter to be trained: keys and values start as the copies of the text's, as in the paper's code.

        Args:
            unet: whose layers they belong to.
            image_proj: features -> tokens.
            rank: of the changes to the layers' own projections, as FaceID has them; they start at 0. None: none.
            seed: of these changes.

        Raises:
            ModelError: the tokens are not as wide as the text's.
        """
        layers: dict[str, nn.Module] = {}
        modules = dict(unet.named_modules())
        for name, number in layer_numbers(unet).items():
            k, v = modules[name].to_k.weight, modules[name].to_v.weight
            if k.shape[1] != image_proj.width:
                raise ModelError(f"The tokens are {image_proj.width} wide, this model's text {k.shape[1]}.")
            layer = nn.ModuleDict({"to_k_ip": _linear(k.shape), "to_v_ip": _linear(v.shape)})
            layer.load_state_dict({"to_k_ip.weight": k.detach(), "to_v_ip.weight": v.detach()})
            layers[str(number)] = layer
        found = cls(image_proj, layers)
        if rank is not None:
            found.add_low_rank(unet, rank, seed)
        return found

    def add_low_rank(self, unet: Any, rank: int, seed: int = 0) -> None:
        """Changes to the projections of every attention layer, as FaceID has them; they start at nothing.

        Args:
            unet: whose layers they belong to.
            rank: of each change, at most what the layer allows.
            seed: of the first values.
        """
        generator = torch.Generator().manual_seed(seed)
        for number in range(len(_layers(unet))):
            key = str(number)
            if key not in self.ip_adapter:
                self.ip_adapter[key] = nn.ModuleDict()
            layer: Any = self.ip_adapter[key]
            for part in ("to_q", "to_k", "to_v", "to_out"):
                layer[f"{part}_lora"] = _low_rank_pair(_adapted(unet, number, part), rank, generator)

    def tokens(self, features: torch.Tensor, how: Aggregate | None = None) -> torch.Tensor:
        """Features of a prompt's pictures [rows, pictures, …] -> tokens [rows, groups, length, width].

        There is a group for each picture, or one where the pictures were made one.

        Args:
            features: of the pictures.
            how: None: as the adapter was trained.

        Raises:
            ModelError: attention is asked for, and there is none.
        """
        how = how or self.aggregate
        one = aggregated(features, how, self.aggregator)
        found = self.image_proj(one.flatten(0, 1)).unflatten(0, one.shape[:2])
        return found if how == "tokens" else found.flatten(1, 2)[:, None]

    def metadata(self) -> dict[str, str]:
        """What a file must say beside the tensors."""
        if self.aggregator is not None:
            return self.aggregator.settings.to_metadata()
        return {} if self.aggregate == "tokens" else AggregatorSettings(aggregate=self.aggregate).to_metadata()

    def keys_and_values(self, number: int, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[rows, length, width] -> keys and values [rows, length, heads * head width] of a layer."""
        layer: Any = self.ip_adapter[str(number)]
        return layer["to_k_ip"](tokens), layer["to_v_ip"](tokens)

    @property
    def adapts_attention(self) -> bool:
        """Whether it changes the layers' own projections too (FaceID)."""
        return any("lora" in key for key in self.ip_adapter.state_dict())


def layer_numbers(unet: Any) -> dict[str, int]:
    """Module path of each cross-attention layer -> its number in a file: odd, in the order down, up, mid."""
    return {name: 2 * k + 1 for k, name in enumerate(name for name in _layers(unet) if not name.endswith("attn1"))}


def _layers(unet: Any) -> list[str]:
    """Module paths of the self- and cross-attention layers, without GLIGEN's gated ones, which no file numbers."""
    return [name.removesuffix(".processor") for name in unet.attn_processors if ".fuser." not in name]


def load_ip_adapter(path: Path, unet: Any) -> IPAdapterModel:
    """The adapter in a ``.safetensors`` file, in the UNet's precision, on its device, not learning.

    Raises:
        ModelError: broken, keys missing or left over, or made for another base model.
    """
    settings = AggregatorSettings.from_metadata(read_metadata(path), str(path))
    return adapter_from_tensors(read_safetensors(path), unet, str(path), settings)


def save_ip_adapter(model: IPAdapterModel, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the adapter as a ``.safetensors`` file with the published keys, in float32."""
    from safetensors.torch import save_file

    tensors = {key: value.detach().float().cpu().contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, str(path), {"format": "pt", **model.metadata(), **(metadata or {})})


def adapter_from_tensors(
    tensors: Mapping[str, Any], unet: Any, name: str = "the IP-Adapter", settings: AggregatorSettings | None = None
) -> IPAdapterModel:
    """The adapter in a mapping with the keys of a file, flat or nested as diffusers takes it.

    Args:
        tensors: the file's.
        unet: that it is for.
        name: for messages.
        settings: how its aggregator is used, out of the file's metadata; None: it says nothing.

    Raises:
        ModelError: as `load_ip_adapter`.
    """
    flat = flat_tensors(tensors, "An IP-Adapter")
    image = {key.removeprefix(_IMAGE): value for key, value in flat.items() if key.startswith(_IMAGE)}
    layers = {key.removeprefix(_LAYERS): value for key, value in flat.items() if key.startswith(_LAYERS)}
    between = {key.removeprefix(_AGGREGATOR): value for key, value in flat.items() if key.startswith(_AGGREGATOR)}
    strange = [key for key in flat if not key.startswith((_IMAGE, _LAYERS, _AGGREGATOR))]
    strange += [_LAYERS + key for key in layers if not _LAYER_KEY.fullmatch(key)]
    if not image or not layers or strange:
        problem = f"it also has {strange[0]!r}" if strange and image and layers else "it lacks image_proj or ip_adapter"
        raise ModelError(f"{name} is not an IP-Adapter: {problem}. Give a file with image_proj.* and ip_adapter.*.")
    projection = projection_for({key: tuple(value.shape) for key, value in image.items()})
    built: dict[str, dict[str, Any]] = {}
    for key, value in layers.items():
        number, _, part = key.removesuffix(".weight").partition(".")
        if value.ndim != 2:
            raise ModelError(f"{name} has {_LAYERS}{key} as {list(value.shape)}; expected a matrix.")
        built.setdefault(number, {})[part] = _linear(value.shape)
    aggregator = attention_from(between, settings, name)
    layers_of = {number: _tree(parts) for number, parts in built.items()}
    model = IPAdapterModel(projection, layers_of, aggregator, "tokens" if settings is None else settings.aggregate)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key, shape in expected.items():
        if key not in flat:
            raise ModelError(f"{name} lacks {key!r}. Copy it again.")
        if tuple(flat[key].shape) != shape:
            raise ModelError(f"{name} has {key!r} as {list(flat[key].shape)}; the rest of it asks for {list(shape)}.")
    left = [key for key in flat if key not in expected]
    if left:
        raise ModelError(f"{name} has {len(left)} weights that nothing reads, such as {left[0]!r}.")
    check_adapter(model, unet, name)
    model.load_state_dict(flat)
    return model.to(device=unet.device, dtype=unet.dtype).eval().requires_grad_(False)


def check_adapter(model: IPAdapterModel, unet: Any, name: str = "the IP-Adapter") -> None:
    """Its layers are those of the UNet, in number and shape.

    Raises:
        ModelError: it was made for another base model.
    """
    modules, numbers = dict(unet.named_modules()), layer_numbers(unet)
    shapes = {key: tuple(value.shape) for key, value in model.ip_adapter.state_dict().items()}
    carriers = {key.partition(".")[0] for key in shapes if "_ip." in key}
    wanted = {str(number) for number in numbers.values()}
    problem = ""
    if carriers != wanted:
        problem = f"it has {len(carriers)} cross-attention layers, this model {len(wanted)}"
    width = unet.config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    # Stable Diffusion 1 and 2 differ in this alone.
    if model.image_proj.width != width and not problem:
        problem = f"its tokens are {model.image_proj.width} wide, this model's words {width}"
    for layer, number in numbers.items() if not problem else ():
        for part in ("k", "v"):
            inner = getattr(modules[layer], f"to_{part}").weight.shape[0]
            if shapes.get(f"{number}.to_{part}_ip.weight") != (inner, model.image_proj.width):
                found = shapes.get(f"{number}.to_{part}_ip.weight")
                problem = problem or f"its layer {number} is {found}, this model's {(inner, model.image_proj.width)}"
    for key, shape in shapes.items():
        if "_lora" in key and not problem:
            linear = _adapted(unet, int(key.partition(".")[0]), key.split(".")[1].removesuffix("_lora"))
            fits = linear is not None and shape[1 if ".down." in key else 0] == (
                linear.in_features if ".down." in key else linear.out_features
            )
            problem = "" if fits else f"its {key} does not fit"
    if problem:
        made = base_of(model.image_proj.width)
        raise ModelError(f"{name} was made for another base model, {made}: {problem}. Use the one for this model.")


def adapter_file(path: Path) -> Path:
    """The adapter's file: the path itself, or the one in a folder.

    Raises:
        ModelError: the folder has none, or several.
    """
    if path.is_file():
        return path
    files = sorted(path.glob("*.safetensors"))
    named = [file for file in files if file.stem.replace("-", "_") == "ip_adapter"]
    if len(named or files) != 1:
        found = ", ".join(file.name for file in files) or "none (a .bin is a pickle, which is never opened)"
        raise ModelError(f"{path} should hold one .safetensors file of an IP-Adapter; it has {found}. Name the file.")
    return (named or files)[0]


def find_image_encoder(
    given: str | os.PathLike[str] | None, adapter: Path | None, projection: ImageProjection, backbone: Backbone
) -> Any:
    """The image encoder that was given, or lies beside an adapter and fits it.

    Published adapters have theirs in ``image_encoder`` beside the file; those of SDXL that read the smaller encoder use
    the one of ``models/``.

    Raises:
        ModelError: none is there, or none gives features as wide as the adapter reads.
    """
    if given is not None:
        return load_image_encoder(find_model(given, "image encoder"), backbone)
    if adapter is None:
        raise ModelError("An IP-Adapter given in memory has no image encoder beside it. Give image_encoder, or embeds.")
    near = [adapter.parent, adapter.parent.parent, adapter.parent.parent / "models"]
    folders = [place / "image_encoder" for place in near]
    there = [folder for folder in folders if (folder / "config.json").is_file()]
    for folder in there:
        if encoder_width(folder, projection.states) == projection.reads:
            return load_image_encoder(folder, backbone)
    problem = f"the one in {there[0]} gives features of another width" if there else f"there is no {folders[0]}"
    raise ModelError(
        f"{adapter} needs an image encoder whose features are {projection.reads} wide; {problem}. Give it."
    )


@contextmanager
def adapted_attention(model: IPAdapterModel, unet: Any) -> Iterator[None]:
    """Add a FaceID adapter's low-rank changes to the layers' own projections; on the way out they are as before."""
    handles = []
    try:
        for number, parts in model.ip_adapter.items():
            for name, pair in parts.named_children():
                if name.endswith("_lora"):
                    linear = _adapted(unet, int(number), name.removesuffix("_lora"))
                    assert linear is not None
                    handles.append(linear.register_forward_hook(_low_rank(pair)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _low_rank(pair: Any) -> Any:
    def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        changed = pair["up"](pair["down"](inputs[0].to(pair["down"].weight.dtype)))
        return output + changed.to(output.dtype)

    return hook


def _adapted(unet: Any, number: int, part: str) -> Any:
    layers = _layers(unet)
    if number >= len(layers):
        return None
    layer = unet.get_submodule(layers[number])
    return layer.to_out[0] if part == "to_out" else getattr(layer, part)


def flat_tensors(tensors: Mapping[str, Any], what: str) -> dict[str, torch.Tensor]:
    """Tensors of a file by their full keys, out of a mapping that may be nested once.

    Raises:
        ModelError: something in it is no tensor.
    """
    found: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        nested = value.items() if isinstance(value, Mapping) else [(None, value)]
        for inner, tensor in nested:
            if not isinstance(tensor, torch.Tensor):
                raise ModelError(f"{what} holds tensors; {key!r} is a {type(tensor).__name__}.")
            found[str(key) if inner is None else f"{key}.{inner}"] = tensor
    return found


def _low_rank_pair(linear: Any, rank: int, generator: torch.Generator) -> nn.ModuleDict:
    """``down``, drawn with deviation 1 / rank, and ``up``, which is zero."""
    into, out = linear.in_features, linear.out_features
    inner = min(rank, into, out)
    down, up = _linear((inner, into)), _linear((out, inner))
    with torch.no_grad():
        down.weight.copy_(torch.randn(inner, into, generator=generator) / inner)
        up.weight.zero_()
    return nn.ModuleDict({"down": down, "up": up})


def _linear(shape: Any) -> nn.Linear:
    return nn.Linear(int(shape[1]), int(shape[0]), bias=False)


def _tree(parts: Mapping[str, nn.Module]) -> nn.ModuleDict:
    """``{"to_k_ip": …, "to_k_lora.down": …}`` as modules within modules."""
    groups: dict[str, Any] = {}
    for name, module in parts.items():
        first, _, rest = name.partition(".")
        if rest:
            groups.setdefault(first, {})[rest] = module
        else:
            groups[first] = module
    return nn.ModuleDict(
        {name: nn.ModuleDict(part) if isinstance(part, dict) else part for name, part in groups.items()}
    )
