"""What a file is, told from the names and shapes of its tensors, never from its own name.

`recognise` knows every kind that a control or a pipeline takes. Each tensor of a file belongs to a part of that kind,
or the file is refused with what was left over; the base model is told by shapes. Only headers are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from controlroom.backbones.adapter_families import (
    FAMILIES,
    KNOWN,
    WORDS,
    looks_like_words,
    reads,
    used_with,
    words_width,
)
from controlroom.backbones.bases import base_of
from controlroom.backbones.differences import FILE, header_of_difference, is_difference
from controlroom.backbones.file_header import Header, read_header
from controlroom.backbones.model_files import read_json
from controlroom.core.errors import ModelError


@dataclass(frozen=True)
class AdapterKind:
    """What a file or folder is.

    Attributes:
        kind: ``lora``, ``textual_inversion``, ``ip_adapter``, ``instant_id``, ``photomaker``, ``ms_diffusion``,
            ``controlnet``, ``t2i_adapter``, ``uni_controlnet``, ``unet``, ``autoencoder``, ``clip``, ``checkpoint`` or
            ``pipeline``.
        name: the kind and its form, as people call them.
        base: the model it is for; "" where the shapes do not tell.
        groups: part -> number of its keys; every key is in one.
        control: name of the control or class that takes it; "" for none.
        use: how, in one line of Python.
        notes: what else the shapes say.
        header: names, shapes and metadata.
    """

    kind: str
    name: str
    base: str
    groups: Mapping[str, int]
    control: str
    use: str
    notes: tuple[str, ...] = ()
    header: Header = field(default_factory=lambda: Header({}), repr=False)

    @property
    def keys(self) -> int:
        """Number of keys; all are accounted for."""
        return len(self.header.shapes)

    @property
    def account(self) -> str:
        """How many keys belong to what."""
        return f"{self.keys} of {self.keys} keys known: " + ", ".join(f"{n} {part}" for part, n in self.groups.items())


def recognise(path: Path, what: str | None = None) -> AdapterKind:
    """What a ``.safetensors`` file or a folder is.

    Args:
        path: of it.
        what: it is called in messages and in the line that uses it; None: its path.

    Raises:
        ModelError: nothing there, a pickle, broken, or unknown; the message lists keys that nothing reads.
    """
    what = what or str(path)
    if path.name == FILE and path.is_file():  # it means something only in its folder
        path = path.parent
    return _folder(path, what) if path.is_dir() else recognise_header(replace(read_header(path), what=what))


def recognise_header(header: Header) -> AdapterKind:
    """What a file with these tensors is.

    Raises:
        ModelError: empty or unknown; the message lists keys that nothing reads.
    """
    if not header.shapes:
        raise ModelError(f"{header.what} is empty: it holds no tensors. Copy it again.")
    family = next((each for each in FAMILIES if each.has(header)), None)
    if family is None:
        if not looks_like_words(header):
            raise ModelError(
                f"{header.what} is no file that controlroom knows: nothing reads its {len(header.shapes)} keys, "
                f"{_listed(list(header.shapes))}. Known are {KNOWN}."
            )
        family = WORDS
    patterns = {part: re.compile(pattern) for part, pattern in family.parts.items()}
    groups: dict[str, int] = {}
    left: list[str] = []
    for key in header.shapes:
        part = next((part for part, pattern in patterns.items() if pattern.fullmatch(key)), None)
        if part is None:
            left.append(key)
        else:
            groups[part] = groups.get(part, 0) + 1
    try:
        said = family.says(header)
    except IndexError as error:
        raise ModelError(
            f"{header.what} has the keys of {_article(family.kind)}, but one of its tensors has another number of axes "
            "than there. Copy it again."
        ) from error
    if left:
        raise ModelError(
            f"{header.what} looks like {_article(said.name)}, but nothing reads {len(left)} of its "
            f"{len(header.shapes)} keys: {_listed(left)}. Take a file without them."
        )
    ordered = {part: groups[part] for part in family.parts if part in groups}
    return AdapterKind(family.kind, said.name, said.base, ordered, said.control, said.use, said.notes, header)


def _listed(keys: list[str]) -> str:
    return ", ".join(map(repr, sorted(keys)[:4])) + (", …" if len(keys) > 4 else "")


def _article(name: str) -> str:
    return f"{'an' if name[:1] in 'AEIOU' and not name.startswith('Uni') else 'a'} {name}"


# Folders.


def _folder(path: Path, what: str) -> AdapterKind:
    index = path / "model_index.json"
    if index.is_file():
        return _pipeline(path, read_json(index), what)
    parts = [part for part in ("local", "global") if (path / part / "config.json").is_file()]
    if parts and not (path / "config.json").is_file():
        return _uni_folder(path, parts, what)
    files = sorted(path.glob("*.safetensors"))
    plain = [file for file in files if not re.search(r"\.(fp16|bf16|non_ema)\.", file.name)] or files
    if len(plain) != 1:
        deeper = sorted(p.name for p in path.iterdir() if p.is_dir())
        more = f" and the folders {', '.join(deeper[:4])}" if deeper else ""
        raise ModelError(
            f"{path} holds {len(plain)} .safetensors files{more}, and no model_index.json. Name the file or folder in "
            "it."
        )
    header = header_of_difference(path) if is_difference(path) else read_header(plain[0])
    found = recognise_header(replace(header, what=what))
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    expected = {"ControlNetModel": "controlnet", "T2IAdapter": "t2i_adapter", "UNet2DConditionModel": "unet"}
    kind = expected.get(str(config.get("_class_name")), found.kind)
    if kind != found.kind:
        raise ModelError(f"{path} says that it is a {config['_class_name']}, but holds {_article(found.name)}.")
    notes = tuple(note for note in found.notes if "adapter_config" not in note or not _says_alpha(path))
    return replace(found, notes=notes)


def _says_alpha(path: Path) -> bool:
    config = read_json(path / "adapter_config.json") if (path / "adapter_config.json").is_file() else {}
    return "lora_alpha" in config or "alpha" in config


def _pipeline(path: Path, index: Mapping[str, object], what: str) -> AdapterKind:
    name = str(index.get("_class_name", "a pipeline"))
    parts = [part for part, entry in index.items() if isinstance(entry, list) and entry[-1] is not None]
    shapes: dict[str, tuple[int, ...]] = {}
    groups: dict[str, int] = {}
    dtypes: dict[str, int] = {}
    for part in parts:
        for file in sorted((path / part).glob("*.safetensors")) if (path / part).is_dir() else ():
            if re.search(r"\.(fp16|bf16|non_ema)\.", file.name):
                continue
            found = read_header(file)
            read = {f"{part}.{key}": shape for key, shape in found.shapes.items()}
            dtypes = _added(dtypes, found.dtypes)
            groups[f"of the {part}"] = groups.get(f"of the {part}", 0) + len(read)
            shapes |= read
    header = Header(shapes, dtypes, what=what)
    entry = shapes.get("unet.conv_in.weight")
    form, control = reads(entry[1] if entry and len(entry) > 1 else None)
    said = f"folder of diffusers ({name}{', ' if form else ''}{form})"
    use = f"cr.Pipeline.from_pretrained({what!r}){used_with(control)}"
    notes = (f"parts: {', '.join(parts)}",)
    return AdapterKind(
        "pipeline", said, base_of(words_width(header, "unet.")), groups, control or "Pipeline", use, notes, header
    )


def _uni_folder(path: Path, parts: list[str], what: str) -> AdapterKind:
    shapes: dict[str, tuple[int, ...]] = {}
    groups: dict[str, int] = {}
    notes: list[str] = []
    dtypes: dict[str, int] = {}
    for part in parts:
        config, weights = read_json(path / part / "config.json"), read_header(path / part / "model.safetensors")
        shapes |= {f"{part}.{key}": shape for key, shape in weights.shapes.items()}
        groups[f"of the {part} adapter"] = len(weights.shapes)
        dtypes = _added(dtypes, weights.dtypes)
        if part == "local":
            notes.append(f"knows {', '.join(map(str, config.get('kinds', [])))}")
    header = Header(shapes, dtypes, what=what)
    use = f"cr.UniControlNet({what!r}, images={{'canny': 'edges.png'}})"
    base = base_of(words_width(header, "local."))
    return AdapterKind(
        "uni_controlnet",
        f"Uni-ControlNet ({' and '.join(parts)})",
        base,
        groups,
        "UniControlNet",
        use,
        tuple(notes),
        header,
    )


def _added(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    return {kind: first.get(kind, 0) + second.get(kind, 0) for kind in (*first, *second)}
