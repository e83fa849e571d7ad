"""Files of PhotoMaker (Li et al., arXiv 2312.04461): an encoder of identities, and a LoRA of the UNet.

``id_encoder.*`` is CLIP's image encoder with its projection (two for Stable Diffusion XL, one for each text encoder)
and the fuse module; version 2 also has ``qformer_perceiver.*``, which makes two tokens for each picture of a face's
vector and of the encoder's states. ``lora_weights.*`` is a LoRA in any dialect. Sizes are inferred from the shapes;
what shapes do not say (heads of the image encoder, its activation) is CLIP's, unless the metadata says otherwise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from controlroom.backbones.loading import find_model, keep
from controlroom.backbones.lora_files import lora_from_tensors
from controlroom.backbones.lora_layers import LayerChange
from controlroom.backbones.lora_names import Layer, Names
from controlroom.backbones.model_files import pickle_refused, read_metadata, read_safetensors
from controlroom.core.backbone import Backbone
from controlroom.core.errors import ModelError

FILE = "photomaker.safetensors"
METADATA = "controlroom.photomaker"
_ENCODER, _LORA = "id_encoder.", "lora_weights."
_HEAD, _PERCEIVER_HEAD = 64, 128


class _MLP(nn.Module):
    """Norm, two layers, and what it was given beside them."""

    def __init__(self, into: int, out: int, residual: bool) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(into)
        self.fc1, self.fc2 = nn.Linear(into, out), nn.Linear(out, out)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        found = self.fc2(F.gelu(self.fc1(self.layernorm(x))))
        return found + x if self.residual else found


class FuseModule(nn.Module):
    """The state of a class word and an identity [n, width] each -> the state that stands for that person."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp1, self.mlp2 = _MLP(2 * width, width, False), _MLP(width, width, True)
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, word: Tensor, identity: Tensor) -> Tensor:
        """Row by row."""
        return self.layer_norm(self.mlp2(self.mlp1(torch.cat([word, identity], dim=-1)) + word))


class Perceiver(nn.Module):
    """Tokens attend to an image encoder's states and to each other, in heads of 128."""

    def __init__(self, reads: int, width: int, inner: int, feed: int, depth: int) -> None:
        super().__init__()
        self.proj_in, self.proj_out = nn.Linear(reads, width), nn.Linear(width, width)
        self.norm_out = nn.LayerNorm(width)
        blocks = [nn.ModuleList([_Reading(width, inner), _feed_forward(width, feed)]) for _ in range(depth)]
        self.layers = nn.ModuleList(blocks)

    def forward(self, tokens: Tensor, states: Tensor) -> Tensor:
        states = self.proj_in(states)
        for block in self.layers:
            read, feed = block.children()
            tokens = tokens + read(states, tokens)
            tokens = tokens + feed(tokens)
        return self.norm_out(self.proj_out(tokens))


class _Reading(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.heads = max(1, inner // _PERCEIVER_HEAD)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, states: Tensor, tokens: Tensor) -> Tensor:
        states, tokens = self.norm1(states), self.norm2(tokens)
        k, v = self.to_kv(torch.cat([states, tokens], dim=1)).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.to_q(tokens), k, v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _feed_forward(width: int, hidden: int) -> nn.Sequential:
    first, last = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)
    return nn.Sequential(nn.LayerNorm(width), first, nn.GELU(), last)


class QFormerPerceiver(nn.Module):
    """A face's vector [n, reads] and an image encoder's states [n, length, …] -> tokens [n, tokens, width]."""

    def __init__(self, reads: int, hidden: int, width: int, tokens: int, perceiver: Perceiver) -> None:
        super().__init__()
        self.reads, self.width, self.tokens = reads, width, tokens
        self.token_proj = nn.Sequential(nn.Linear(reads, hidden), nn.GELU(), nn.Linear(hidden, tokens * width))
        self.token_norm = nn.LayerNorm(width)
        self.perceiver_resampler = perceiver

    def forward(self, vectors: Tensor, states: Tensor) -> Tensor:
        """Tokens of each picture."""
        tokens = self.token_norm(self.token_proj(vectors).unflatten(-1, (self.tokens, self.width)))
        return tokens + self.perceiver_resampler(tokens, states)


class IDEncoder(nn.Module):
    """Pictures of a person -> tokens that are fused into the class word.

    Attributes:
        config: of CLIP's image encoder.
        tokens: for each picture.
        reads: width of the face's vector that version 2 needs; None: version 1, which needs none.
        width: of the tokens, that of the text's states.
    """

    def __init__(self, config: Any, widths: tuple[int, ...], perceiver: QFormerPerceiver | None = None) -> None:
        super().__init__()
        from transformers import CLIPVisionModelWithProjection

        self.config = config
        whole: Any = CLIPVisionModelWithProjection(config)
        self.vision_model = whole.vision_model
        inner = int(config.hidden_size)
        self.visual_projection = nn.Linear(inner, widths[0], bias=False)
        if len(widths) > 1:
            self.visual_projection_2 = nn.Linear(inner, widths[1], bias=False)
        self.widths, self.width = widths, sum(widths)
        self.fuse_module = FuseModule(self.width)
        if perceiver is not None:
            self.qformer_perceiver = perceiver
        self.tokens = 1 if perceiver is None else perceiver.tokens
        self.reads = None if perceiver is None else perceiver.reads

    def identities(self, pixels: Tensor, vectors: Tensor | None = None) -> Tensor:
        """Tokens [n, tokens, width] of pictures [n, 3, S, S], and of the faces' vectors [n, reads] for version 2."""
        seen = self.vision_model(pixels.to(self.visual_projection.weight.dtype))
        if self.reads is not None:
            if vectors is None:
                raise ModelError("PhotoMaker version 2 needs the faces' vectors.")
            return self.qformer_perceiver(vectors.to(seen[0].dtype), seen[0])
        return self.projected(seen[1])

    def projected(self, pooled: Tensor) -> Tensor:
        """[n, 1, width] out of what the image encoder says of whole pictures [n, its width]; version 1."""
        parts = [self.visual_projection(pooled)]
        if len(self.widths) > 1:
            parts.append(self.visual_projection_2(pooled))
        return torch.cat(parts, dim=-1)[:, None]

    def fused(self, states: Tensor, identities: Tensor, places: list[int]) -> Tensor:
        """States of a prompt [length, width], where each of ``places`` has become one of the identities [n, width]."""
        index = torch.tensor(places, device=states.device)
        found = self.fuse_module(states[index].to(identities.dtype), identities)
        return states.index_copy(0, index, found.to(states.dtype))


class PhotoMakerModel(nn.Module):
    """A PhotoMaker: its encoder, and the tensors of its LoRA.

    Attributes:
        encoder: see `IDEncoder`.
        lora: as in a LoRA's file; empty: none.
    """

    def __init__(self, encoder: IDEncoder, lora: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.encoder = encoder
        self.held = nn.Module()
        for key, value in lora.items():
            # Names of buffers have no dots.
            self.held.register_buffer(key.replace(".", "/"), value)

    @property
    def lora(self) -> dict[str, Tensor]:
        """Key in the LoRA's file -> tensor."""
        return {key.replace("/", "."): value for key, value in self.held.named_buffers()}

    def changes(self, names: Names) -> Mapping[Layer, LayerChange]:
        """What its LoRA changes.

        Raises:
            ModelError: made for another base model.
        """
        return lora_from_tensors(self.lora, names, "PhotoMaker's LoRA").layers if self.lora else {}

    def tensors(self) -> dict[str, Tensor]:
        """With the keys of a published file."""
        own = {_ENCODER + key: value for key, value in self.encoder.state_dict().items()}
        return own | {_LORA + key: value for key, value in self.lora.items()}

    def metadata(self) -> dict[str, str]:
        """What the shapes do not say."""
        config = self.encoder.config
        about = {"heads": int(config.num_attention_heads), "hidden_act": str(config.hidden_act)}
        return {METADATA: json.dumps(about)}

    def save(self, path: Path) -> None:
        """Write it as a ``.safetensors`` file, in float32."""
        from safetensors.torch import save_file

        tensors = {key: value.detach().float().cpu().contiguous().clone() for key, value in self.tensors().items()}
        save_file(tensors, str(path), {"format": "pt", **self.metadata()})


def find_photomaker(model: Any, backbone: Backbone) -> PhotoMakerModel:
    """The PhotoMaker of a file or folder, a mapping with a file's keys, or as it is given; for this base model.

    Raises:
        ModelError: no such file, a pickle, keys that are missing or left over, or made for another base model.
    """
    if isinstance(model, PhotoMakerModel):
        found = model
    elif isinstance(model, Mapping):
        found = photomaker_from_tensors(model)
    else:
        path = photomaker_file(model)
        found = keep(backbone, ("photomaker",), path, lambda: load_photomaker(path))
    widths = backbone.text_widths()
    if found.encoder.widths != widths:
        raise ModelError(
            f"This PhotoMaker was made for another base model: its projections are {found.encoder.widths} wide, this "
            f"model's text encoders {widths}. Use the one for this model."
        )
    if not isinstance(model, PhotoMakerModel):
        found.encoder.to(device=backbone.device, dtype=backbone.dtype).eval().requires_grad_(False)
    return found


def photomaker_file(model: Any) -> Path:
    """The file that a path, folder or hub id names.

    Raises:
        ModelError: there is none, or it is a pickle.
    """
    path = find_model(model, "PhotoMaker")
    if path.is_file():
        return path
    files, pickles = sorted(path.glob("*.safetensors")), sorted(path.glob("photomaker*.bin"))
    if not files and pickles:
        raise pickle_refused(str(pickles[0]), "PhotoMaker")
    if len(files) != 1:
        raise ModelError(f"{path} should hold one .safetensors file of a PhotoMaker; it has {len(files)}. Name it.")
    return files[0]


def load_photomaker(path: Path) -> PhotoMakerModel:
    """The PhotoMaker in a ``.safetensors`` file.

    Raises:
        ModelError: as `find_photomaker`.
    """
    return photomaker_from_tensors(read_safetensors(path), str(path), read_metadata(path))


def tokens_per_picture(model: Any) -> int:
    """Tokens that each picture becomes, without loading the weights.

    Raises:
        ModelError: no such file, or not a PhotoMaker.
    """
    if isinstance(model, PhotoMakerModel):
        return model.encoder.tokens
    if isinstance(model, Mapping):
        return _tokens({key: tuple(value.shape) for key, value in _flat(model).items()})
    from safetensors import safe_open

    with safe_open(str(photomaker_file(model)), framework="pt") as content:
        keys = [key for key in content.keys() if ".qformer_perceiver.token_" in key]
        return _tokens({key: tuple(content.get_slice(key).get_shape()) for key in keys})


def _tokens(shapes: Mapping[str, tuple[int, ...]]) -> int:
    prefix = f"{_ENCODER}qformer_perceiver.token_"
    if f"{prefix}proj.2.bias" not in shapes:
        return 1
    return shapes[f"{prefix}proj.2.bias"][0] // shapes[f"{prefix}norm.weight"][0]


def photomaker_from_tensors(
    tensors: Mapping[str, Any], what: str = "the PhotoMaker", metadata: Mapping[str, str] | None = None
) -> PhotoMakerModel:
    """The PhotoMaker in a mapping with a file's keys, flat or in two groups, in whatever order.

    Raises:
        ModelError: keys that are missing or left over, or shapes that do not fit each other.
    """
    flat = _flat(tensors)
    strange = [key for key in flat if not key.startswith((_ENCODER, _LORA))]
    own = {key.removeprefix(_ENCODER): value for key, value in flat.items() if key.startswith(_ENCODER)}
    lora = {key.removeprefix(_LORA): value for key, value in flat.items() if key.startswith(_LORA)}
    if strange or not own:
        problem = f"nothing reads {strange[0]!r}" if strange else "it has no id_encoder"
        raise ModelError(f"{what} is not a PhotoMaker: {problem}. Expected id_encoder.* and lora_weights.*.")
    # Older files hold the numbers of the positions, which are 0, 1, 2, …
    own.pop("vision_model.embeddings.position_ids", None)
    encoder = _encoder_for({key: tuple(value.shape) for key, value in own.items()}, what, metadata or {})
    expected = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    missing, left = sorted(set(expected) - set(own)), sorted(set(own) - set(expected))
    if missing or left:
        raise ModelError(
            f"{what} does not fit: {len(missing)} weights are missing (first: {next(iter(missing), 'none')}), "
            f"{len(left)} are unknown (first: {next(iter(left), 'none')}). Copy it again."
        )
    for key, shape in expected.items():
        if tuple(own[key].shape) != shape:
            raise ModelError(f"{what} has {key!r} as {list(own[key].shape)}; the rest of it asks for {list(shape)}.")
    encoder.load_state_dict(own)
    return PhotoMakerModel(encoder.eval().requires_grad_(False), lora)


def _encoder_for(shapes: Mapping[str, tuple[int, ...]], what: str, metadata: Mapping[str, str]) -> IDEncoder:
    """An encoder of these sizes; its weights are not filled in."""
    from transformers import CLIPVisionConfig

    try:
        told = json.loads(metadata.get(METADATA, "{}"))
        vision = "vision_model."
        hidden, _, patch, _ = shapes[f"{vision}embeddings.patch_embedding.weight"]
        side = math.isqrt(shapes[f"{vision}embeddings.position_embedding.weight"][0] - 1)
        layers = 1 + max(int(k.split(".")[3]) for k in shapes if k.startswith(f"{vision}encoder.layers."))
        widths = [shapes["visual_projection.weight"][0]]
        if "visual_projection_2.weight" in shapes:
            widths.append(shapes["visual_projection_2.weight"][0])
        config = CLIPVisionConfig(
            hidden_size=hidden,
            intermediate_size=shapes[f"{vision}encoder.layers.0.mlp.fc1.weight"][0],
            num_attention_heads=int(told.get("heads", max(1, hidden // _HEAD))),
            num_hidden_layers=layers,
            patch_size=patch,
            image_size=side * patch,
            projection_dim=widths[0],
            hidden_act=str(told.get("hidden_act", "quick_gelu")),
        )
        return IDEncoder(config, tuple(widths), _perceiver_for(shapes))
    except (KeyError, ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        raise ModelError(f"{what} is not a PhotoMaker that is known ({type(error).__name__}: {error}).") from error


def _perceiver_for(shapes: Mapping[str, tuple[int, ...]]) -> QFormerPerceiver | None:
    prefix = "qformer_perceiver."
    own = {key.removeprefix(prefix): value for key, value in shapes.items() if key.startswith(prefix)}
    if not own:
        return None
    (hidden, reads), width = own["token_proj.0.weight"], own["token_norm.weight"][0]
    inside = "perceiver_resampler."
    depth = 1 + max(int(key.split(".")[2]) for key in own if key.startswith(f"{inside}layers."))
    perceiver = Perceiver(
        own[f"{inside}proj_in.weight"][1],
        width,
        own[f"{inside}layers.0.0.to_q.weight"][0],
        own[f"{inside}layers.0.1.1.weight"][0],
        depth,
    )
    return QFormerPerceiver(reads, hidden, width, own["token_proj.2.weight"][0] // width, perceiver)


def _flat(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        nested = value.items() if isinstance(value, Mapping) else [(None, value)]
        for inner, tensor in nested:
            if not isinstance(tensor, Tensor):
                raise ModelError(f"A PhotoMaker holds tensors; {key!r} is a {type(tensor).__name__}.")
            found[str(key) if inner is None else f"{key}.{inner}"] = tensor
    return found
