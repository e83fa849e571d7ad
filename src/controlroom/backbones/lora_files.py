"""Files of LoRAs and their relatives: every dialect read into one form, every key accounted for; and written.

Read: PEFT (folder or keys), diffusers old and new, kohya (with alpha, DoRA, LoCon, LoHa, LoKr, full differences),
ComfyUI. Which one it is, is told from the keys, never from the file's name. Written: diffusers', with its
metadata, and kohya's, with alpha.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from controlroom.backbones.bases import base_of
from controlroom.backbones.lora_dialects import SECOND_TEXT, kohya_parts, low_rank_parts, peft_config
from controlroom.backbones.lora_layers import Applied, Factors, Full, Hadamard, Kronecker, LayerChange, LowRank
from controlroom.backbones.lora_names import PARTS, TEXT, TEXT_2, UNET, Layer, Names
from controlroom.backbones.model_files import explained, read_json, read_metadata, read_safetensors
from controlroom.core.errors import ModelError
from controlroom.core.files import atomic_path

Dialect = Literal["diffusers", "kohya"]

SLOTS = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "core",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "dora_scale": "magnitude",
    "lora_magnitude_vector": "lengths",
    "lora_magnitude_vector.weight": "lengths",
    "lora_magnitude_vector.default.weight": "lengths",
    "alpha": "alpha",
    "diff": "diff",
    "diff_b": "diff_b",
    **{f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
"""End of a key -> what it holds."""
_PEFT = "base_model.model."
_OLD = re.compile(r"(.*)\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight")
_WORD = re.compile(r"bundle_emb\.(.+?)\.(string_to_param\.\*|clip_l|clip_g)")
_ENCODERS = ("string_to_param.*", "clip_l", "clip_g")
"""Ends of the keys of a learned word, in the order of the text encoders."""


@dataclass(frozen=True)
class LoRAFile:
    """What a file holds, in the names of one model.

    Attributes:
        layers: part and path of a layer -> its change.
        words: learned words that came along (kohya's ``bundle_emb``): word -> vectors for each text encoder.
        keys: number of keys in the file; all of them were read.
        notes: what was assumed, in sentences.
    """

    layers: Mapping[Layer, LayerChange]
    words: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    keys: int = 0
    notes: tuple[str, ...] = ()

    @property
    def account(self) -> str:
        """How many keys changed how many layers of which part."""
        parts: dict[str, int] = {}
        for part, _ in self.layers:
            parts[part] = parts.get(part, 0) + 1
        found = [f"{parts[part]} layers of the {part}" for part in PARTS if part in parts]
        found += [f"the word {word!r}" for word in self.words]
        return f"{self.keys} of {self.keys} keys read: {', '.join(found)}"


def load_lora(path: Path, names: Names) -> LoRAFile:
    """The LoRA in a ``.safetensors`` file, or in the folder that PEFT or diffusers saved.

    Raises:
        ModelError: broken, of another kind, a key that nothing reads, or made for another model.
    """
    file, config = lora_source(path)
    return lora_from_tensors(read_safetensors(file), names, str(file), config or None, read_metadata(file))


def lora_source(path: Path) -> tuple[Path, dict[str, Any]]:
    """The file of a LoRA, which may lie in a folder, and PEFT's configuration by part where it is beside it.

    Raises:
        ModelError: the folder has no such file, or several.
    """
    if not path.is_dir():
        return path, peft_beside(path)
    known = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
    found = [path / name for name in known if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise ModelError(f"{path} holds {len(found)} .safetensors files; name the one of the LoRA.")
    return found[0], peft_beside(found[0])


def peft_beside(file: Path) -> dict[str, Any]:
    """PEFT's configuration beside its file, by part; empty where there is none."""
    config = file.with_name("adapter_config.json")
    if not file.name.startswith("adapter_model.") or not config.is_file():
        return {}
    # PEFT keeps one network in a folder, and does not say which.
    return {f"{part}.{key}": value for part in PARTS for key, value in read_json(config).items()}


def lora_from_tensors(
    tensors: Mapping[str, Tensor],
    names: Names,
    what: str = "the LoRA",
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> LoRAFile:
    """The LoRA in a mapping with the keys of a file.

    Args:
        tensors: any dialect.
        names: those of the model that it is for.
        what: it is, for messages.
        config: PEFT's configuration, its keys after ``unet.`` or ``text_encoder.``; None: what the metadata says.
        metadata: of the file, where diffusers keeps it.

    Raises:
        ModelError: as `load_lora`.
    """
    config = config or _config_in(metadata or {}, what)
    found: dict[Layer, dict[str, Tensor]] = {}
    words: dict[str, dict[str, Tensor]] = {}
    unread: list[str] = []
    second = _of_second_text(tensors, names, config)
    for key, value in sorted(tensors.items()):
        word = _WORD.fullmatch(key)
        if word:
            words.setdefault(word[1], {})[word[2]] = value
            continue
        name, slot = _split(key)
        layer = None if slot is None else names.find(name.removeprefix(_PEFT))
        if second and layer is not None and layer[0] == TEXT and key.startswith(_PEFT):
            layer = (TEXT_2, layer[1])
        if layer is None or slot is None:
            unread.append(key)
        else:
            found.setdefault(layer, {})[slot] = value
    if (not found and not words) or unread:
        raise ModelError(_unread(unread, len(tensors), tensors, names, what))
    notes: list[str] = []
    layers: dict[Layer, LayerChange] = {}
    without_alpha = 0
    for layer, slots in found.items():
        alpha = _alpha(layer, slots, config)
        try:
            whole = 0 if "alpha" in slots else int(config.get(f"{layer[0]}.r") or 0)
            change = _change(slots, alpha, whole)
            Applied.to(names.layers[layer], change)
        except ModelError as error:
            raise ModelError(f"{what} does not fit this model at {'.'.join(layer)}: {error}.{_maker(found)}") from error
        layers[layer] = change
        without_alpha += alpha is None and not isinstance(change.factors, Full)
    if without_alpha:
        notes.append(f"{what} says no alpha for {without_alpha} layers; their rank was taken, as diffusers does.")
    learned = {word: tuple(parts[end] for end in _ENCODERS if end in parts) for word, parts in words.items()}
    return LoRAFile(layers, learned, len(tensors), tuple(notes))


def save_lora(
    path: str | os.PathLike[str],
    layers: Mapping[Layer, LayerChange],
    names: Names,
    dialect: Dialect = "diffusers",
    metadata: Mapping[str, str] | None = None,
    words: Mapping[str, tuple[Tensor, ...]] | None = None,
) -> Path:
    """Write a file that diffusers (``load_lora_weights``), or kohya's tools, ComfyUI and A1111 read.

    Args:
        path: the ``.safetensors`` file.
        layers: changes; diffusers' files only hold those of low rank.
        names: those of the model.
        dialect: keys of ``diffusers`` (PEFT's factors, alpha in the metadata) or ``kohya`` (alpha beside the factors).
        metadata: more of it, text.
        words: learned words that come along, which only kohya's files can hold.

    Raises:
        ModelError: a change that is not of low rank, for diffusers.
    """
    from safetensors.torch import save_file

    path = Path(path)
    tensors: dict[str, Tensor] = {}
    for layer, change in layers.items():
        part, inner = layer
        if dialect == "kohya":
            name, parts = names.kohya(layer), kohya_parts(change)
        else:
            name = f"{part}.{inner}" if part == UNET else f"{part}.text_model.{inner}"
            parts = low_rank_parts(layer, change)
        tensors |= {f"{name}.{end}": value.detach().cpu().contiguous().clone() for end, value in parts.items()}
    about = {"format": "pt", **(metadata or {})}
    if dialect == "diffusers":
        found: dict[str, Any] = {}
        for part in dict.fromkeys(part for part, _ in layers):
            own = peft_config({path: change for (p, path), change in layers.items() if p == part})
            found |= {f"{part}.{key}": value for key, value in own.items()}
        about["lora_adapter_metadata"] = json.dumps(found, sort_keys=True)
    else:
        tensors |= _bundled(words or {})
        about = {"ss_network_module": "networks.lora", **about}
    with atomic_path(path) as beside:
        save_file(tensors, str(beside), about)
    return path


def _bundled(words: Mapping[str, tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """Learned words under kohya's keys."""
    found: dict[str, Tensor] = {}
    for word, vectors in words.items():
        ends = _ENCODERS[:1] if len(vectors) == 1 else _ENCODERS[1:]
        found |= {
            f"bundle_emb.{word}.{end}": each.detach().cpu().contiguous().clone()
            for end, each in zip(ends, vectors, strict=True)
        }
    return found


def _of_second_text(tensors: Mapping[str, Tensor], names: Names, config: Mapping[str, Any]) -> bool:
    """Whether PEFT's file is that of the second text encoder, whose paths are those of the first.

    PEFT writes the class of its network where it knows it; else widths tell.
    """
    kind = (config.get(f"{TEXT}.auto_mapping") or {}).get("base_model_class")
    if kind is not None or not names.two:
        return names.two and kind == SECOND_TEXT
    for key, value in tensors.items():
        name, slot = _split(key)
        if key.startswith(_PEFT) and slot == "down" and value.ndim == 2:
            layer = names.find(name.removeprefix(_PEFT))
            if layer is not None and layer[0] == TEXT:
                first, other = names.layers[layer], names.layers.get((TEXT_2, layer[1]))
                return value.shape[1] != first.weight.shape[1] and other is not None
    return False


def _split(key: str) -> tuple[str, str | None]:
    """Name of the layer, and what the key holds of it (None: unknown)."""
    old = _OLD.fullmatch(key)
    if old:
        return f"{old[1]}.{'to_out.0' if old[2] == 'to_out' else old[2]}", old[3]
    parts = key.split(".")
    for length in (3, 2, 1):
        end = ".".join(parts[-length:])
        if end in SLOTS and len(parts) > length:
            return ".".join(parts[:-length]), SLOTS[end]
    return key, None


def _alpha(layer: Layer, slots: Mapping[str, Tensor], config: Mapping[str, Any]) -> float | None:
    if "alpha" in slots:
        return float(slots["alpha"])
    part, path = layer
    pattern = config.get(f"{part}.alpha_pattern") or {}
    # PEFT takes the ends of paths, and regular expressions, for patterns.
    for end, value in pattern.items():
        if path == end or path.endswith("." + end) or re.fullmatch(rf"(.*\.)?({end})", path):
            return float(value)
    alpha = config.get(f"{part}.lora_alpha", config.get(f"{part}.alpha"))
    if alpha is None:
        return None
    if config.get(f"{part}.use_rslora"):
        return float(alpha) * float(slots["down"].shape[0]) ** 0.5
    return float(alpha)


def _change(slots: Mapping[str, Tensor], alpha: float | None, whole: int) -> LayerChange:
    names = set(slots) - {"alpha", "magnitude", "lengths", "diff_b"}
    factors: Factors | None
    if names in ({"down", "up"}, {"down", "up", "core"}):
        factors = LowRank(slots["down"], slots["up"], slots.get("core"), alpha)
    elif names in (_HADA, _HADA | {"hada_t1", "hada_t2"}):
        cores = (slots["hada_t1"], slots["hada_t2"]) if "hada_t1" in slots else None
        first, second = (slots["hada_w1_a"], slots["hada_w1_b"]), (slots["hada_w2_a"], slots["hada_w2_b"])
        factors = Hadamard(first, second, cores, alpha)
    elif names and all(name.startswith("lokr_") for name in names):
        sides = [
            tuple(slots[f"lokr_w{i}{end}"] for end in ("", "_a", "_b") if f"lokr_w{i}{end}" in slots) for i in "12"
        ]
        if not all(len(side) == (1 if f"lokr_w{i}" in slots else 2) for i, side in zip("12", sides, strict=True)):
            raise ModelError(f"it has {', '.join(sorted(names))} alone")
        factors = Kronecker(sides[0], sides[1], slots.get("lokr_t2"), alpha, whole)
    elif names == {"diff"}:
        factors = Full(slots["diff"])
    elif not names and "diff_b" in slots:
        factors = None
    else:
        raise ModelError(f"it has {', '.join(sorted(slots))} alone")
    # PEFT keeps the lengths of a convolution's outputs as [1, out, 1, 1], LyCORIS those of inputs as [1, in, 1, 1].
    magnitude = slots["lengths"].flatten() if "lengths" in slots else slots.get("magnitude")
    return LayerChange(factors, magnitude, slots.get("diff_b"))


_HADA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}


def _config_in(metadata: Mapping[str, str], what: str) -> dict[str, Any]:
    """diffusers' configuration, out of a file's metadata."""
    config = explained(what, lambda: json.loads(metadata.get("lora_adapter_metadata", "{}")))
    return config if isinstance(config, dict) else {}


def _unread(unread: list[str], total: int, tensors: Mapping[str, Tensor], names: Names, what: str) -> str:
    if not total:
        return f"{what} is empty."
    joined = " ".join(unread[:50])
    if "image_proj" in joined or "ip_adapter." in joined:
        return f"{what} is an IP-Adapter. Use cr.IPAdapter({what!r})."
    if len(unread) == total and all(tensors[key].ndim <= 2 and "." not in key for key in unread):
        return f"{what} looks like learned words. Use cr.TextualInversion({what!r})."
    if any(_split(key)[1] is not None for key in unread):
        meant = _maker({(UNET, key): {"down": value} for key, value in tensors.items() if _split(key)[1] == "down"})
        two = any("te2_" in key or "text_encoder_2" in key for key in unread)
        hint = meant or (" It has a second text encoder, as Stable Diffusion XL has." if two and not names.two else "")
        return (
            f"{what} does not fit this model: {len(unread)} of its {total} keys are for layers that it does not have, "
            f"such as {unread[0]!r}.{hint} Use the model that it was made for."
        )
    return (
        f"{what} is not a LoRA that can be read: {len(unread)} of its {total} keys are unknown, such as {unread[0]!r}. "
        "Known are PEFT, diffusers, kohya (LoRA, LoCon, LoHa, LoKr, DoRA, full) and ComfyUI."
    )


def _maker(found: Mapping[Layer, Mapping[str, Tensor]]) -> str:
    """The model whose text is as wide as the file's, as a sentence; "" where it cannot be told."""
    for (part, path), slots in found.items():
        if part != TEXT and "attn2" in path and ("to_k" in path or "to_v" in path) and "down" in slots:
            width = int(slots["down"].shape[1]) if slots["down"].ndim > 1 else 0
            return f" It was made for {base_of(width)}."
    return ""
