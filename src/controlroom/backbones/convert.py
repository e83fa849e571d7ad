"""From one file of weights to another: out of pickles, between dialects of LoRAs, from single files to folders.

Outputs stay what they were: a converted file draws what the original draws. Nothing is written before all of it is
read, and what is written appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from controlroom.backbones.adapter_files import AdapterKind, recognise_header
from controlroom.backbones.differences import is_difference, stored_whole
from controlroom.backbones.file_header import header_of
from controlroom.backbones.learned_words import check_word
from controlroom.backbones.lora_dialects import save_peft
from controlroom.backbones.lora_files import LoRAFile, lora_from_tensors, lora_source, peft_beside, save_lora
from controlroom.backbones.model_files import PICKLES, read_metadata, read_safetensors
from controlroom.backbones.pickles import open_pickle
from controlroom.backbones.standard_models import empty_names, empty_parts
from controlroom.core.errors import InputError, ModelError, OutputError
from controlroom.core.files import atomic_path

Dialect = Literal["diffusers", "kohya", "peft"]
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Source:
    """A file that was read.

    Attributes:
        path: of it.
        tensors: by their names.
        metadata: text beside them.
        plain: texts and numbers of a pickle.
        config: PEFT's configuration of a LoRA, by part.
        notes: what the user should know.
        pickled: whether it was a pickle.
    """

    path: Path
    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str]
    plain: Mapping[str, Any]
    config: Mapping[str, Any]
    notes: tuple[str, ...]
    pickled: bool


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        files: files or folders.
        kind: what it is; None: nothing that controlroom knows, copied key by key.
        notes: what was left out or assumed.
    """

    files: tuple[Path, ...]
    kind: AdapterKind | None
    notes: tuple[str, ...]


def convert(
    source: Path,
    target: Path,
    to: Dialect | None = None,
    base: str | os.PathLike[str] | None = None,
) -> Converted:
    """Convert a file.

    Args:
        source: a pickle, a ``.safetensors`` file, a folder of PEFT, or one whose network is stored as a difference.
        target: a ``.safetensors`` file; a folder for a ControlNet or a whole model in diffusers' layout, and for PEFT.
        to: dialect of a LoRA; None: the keys stay as they are.
        base: folder of the base model in diffusers' layout, for configurations that the shapes do not tell.

    Raises:
        ModelError: it cannot be read, or not be written in that form.
        InputError: nothing to convert.
        OutputError: the target cannot be written, or is there and no file.
    """
    folder = to == "peft" or target.suffix != SUFFIX
    check_target(target, folder)
    if is_difference(source):
        if to is not None or not folder:
            raise InputError(f"{source} holds a network as a difference, which becomes a folder. Leave --to out.")
        return Converted(
            tuple(stored_whole(source, target)), None, (f"the difference was added to its base: {source}",)
        )
    read = read_source(source)
    kind, notes = _recognised(read)
    if kind is None:
        _as_file(read.tensors, target, read, folder)
        return Converted((target,), None, notes)
    if kind.kind == "lora":
        return _lora(read, kind, target, to, base, notes)
    if to is not None:
        raise InputError(f"--to is for LoRAs; {source} is {kind.name}. Leave it out.")
    if kind.kind == "controlnet" and folder:
        return _controlnet(read, kind, target, base, notes)
    if kind.kind == "checkpoint" and folder:
        return _checkpoint(read, kind, target, base, notes)
    if not read.pickled:
        more = ", or a folder as OUT" if kind.kind in ("controlnet", "checkpoint") else ""
        raise InputError(f"{source} is a .safetensors file already ({kind.name}): nothing to convert{more}.")
    tensors: Mapping[str, torch.Tensor] = read.tensors
    if kind.kind == "textual_inversion":
        tensors = _word(read)
    elif kind.kind == "controlnet":
        tensors = _without_base(read.tensors)
    _as_file(tensors, target, read, folder)
    return Converted((target,), kind, notes)


def check_target(target: Path, folder: bool) -> None:
    """Whether something can be written there, before anything is read.

    Raises:
        OutputError: it cannot.
    """
    if not target.parent.is_dir():
        raise OutputError(f"Cannot write {str(target)!r}: the folder {str(target.parent)!r} does not exist. Create it.")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OutputError(f"Cannot write {str(target)!r}: no permission in {str(target.parent)!r}.")
    if target.is_dir() if not folder else target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{str(target)!r} is there already. Choose another name.")


def read_source(path: Path) -> Source:
    """Read a file, or the folder of a LoRA.

    Raises:
        ModelError: it cannot be read, or is refused.
    """
    if path.suffix.lower() in PICKLES and not path.is_dir():
        found = open_pickle(path)
        notes = (
            [] if found.isolated else ["the system allowed no process without network; sockets were refused instead"]
        )
        if found.left:
            notes.append(f"left out, since no weights: {', '.join(found.left[:6])}{', …' * (len(found.left) > 6)}")
        return Source(path, found.tensors, {}, found.plain, peft_beside(path), tuple(notes), True)
    if not path.exists():
        raise ModelError(f"There is no file {str(path)!r}. Check the path.")
    if path.is_dir():
        file, config = lora_source(path)
    elif path.suffix == SUFFIX:
        file, config = path, peft_beside(path)
    else:
        raise ModelError(f"{str(path)!r} is neither a pickle ({', '.join(PICKLES)}) nor a .safetensors file.")
    return Source(path, read_safetensors(file), read_metadata(file), {}, config, (), False)


def _recognised(read: Source) -> tuple[AdapterKind | None, tuple[str, ...]]:
    """What it is. A pickle of weights that controlroom does not know is still made into safetensors."""
    try:
        return recognise_header(header_of(read.tensors, str(read.path), read.metadata)), read.notes
    except ModelError as error:
        if not read.pickled:
            raise
        return None, (*read.notes, f"converted key by key; {error}")


def _as_file(tensors: Mapping[str, torch.Tensor], target: Path, read: Source, folder: bool) -> None:
    from safetensors.torch import save_file

    if folder:
        raise OutputError(f"{str(target)!r} should end with {SUFFIX}: {read.path} becomes one file.")
    about = {str(key): str(value) for key, value in read.plain.items() if len(str(value)) <= 1000}
    if read.config:
        about["lora_adapter_metadata"] = json.dumps(read.config, sort_keys=True)
    whole = {key: value.contiguous() for key, value in tensors.items()}
    with atomic_path(target) as beside:
        save_file(whole, str(beside), {**about, **read.metadata, "format": "pt"})


def _word(read: Source) -> dict[str, torch.Tensor]:
    """A1111's pickle as ``{token: vectors}``, which diffusers reads too; other forms stay as they are."""
    vectors = read.tensors.get("string_to_param.*")
    if vectors is None:
        return dict(read.tensors)
    name = str(read.plain.get("name") or read.path.stem)
    check_word(name)
    return {name: vectors}


def _without_base(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A ControlNet alone, without the base model that was published in the same file."""
    own = {key: value for key, value in tensors.items() if key.startswith("control_model.")}
    return own or dict(tensors)


def _lora(
    read: Source, kind: AdapterKind, target: Path, to: Dialect | None, base: Any, notes: tuple[str, ...]
) -> Converted:
    if to is None:
        if not read.pickled:
            raise InputError(f"{read.path} is a .safetensors file already ({kind.name}). Say which dialect: --to.")
        _as_file(read.tensors, target, read, target.suffix != SUFFIX)
        return Converted((target,), kind, notes)
    names = empty_names(kind.base, base)
    file: LoRAFile = lora_from_tensors(read.tensors, names, str(read.path), read.config or None, read.metadata)
    notes = (*notes, file.account, *file.notes)
    if to == "peft":
        with _whole_folder(target) as beside:
            written = save_peft(beside, file.layers)
        files = tuple(target / folder.relative_to(beside) for folder in written.values())
        words = target
    else:
        if target.suffix != SUFFIX:
            raise OutputError(f"{str(target)!r} should end with {SUFFIX}.")
        about = {key: text for key, text in read.metadata.items() if key not in ("format", "lora_adapter_metadata")}
        save_lora(target, file.layers, names, to, about, file.words if to == "kohya" else None)
        files, words = (target,), target.parent
    if to == "kohya" or not file.words:
        return Converted(files, kind, notes)
    # Only kohya's files can hold learned words beside a LoRA.
    more = tuple(_beside(words, target, word, vectors) for word, vectors in file.words.items())
    listed = ", ".join(path.name for path in more)
    said = f"the learned words lie beside it, since only kohya's files hold them: {listed}"
    return Converted((*files, *more), kind, (*notes, said))


def _beside(folder: Path, target: Path, word: str, vectors: tuple[torch.Tensor, ...]) -> Path:
    from safetensors.torch import save_file

    plain = "".join(c for c in word if c.isalnum() or c in "-_") or "word"
    path = folder / f"{target.stem}.{plain}{SUFFIX}"
    names = (word,) if len(vectors) == 1 else ("clip_l", "clip_g")
    tensors = {name: value.contiguous() for name, value in zip(names, vectors, strict=True)}
    with atomic_path(path) as beside:
        save_file(tensors, str(beside), {"format": "pt", "word": word})
    return path


def _controlnet(read: Source, kind: AdapterKind, target: Path, base: Any, notes: tuple[str, ...]) -> Converted:
    from controlroom.backbones.controlnet import controlnet_from_tensors

    unet = empty_parts(kind.base, base)["unet"]
    net = controlnet_from_tensors(_without_base(read.tensors), unet, str(read.path))
    # In the precision that most of the file has.
    most = max(kind.header.dtypes, key=lambda name: kind.header.dtypes[name])
    with _whole_folder(target) as beside:
        net.to(getattr(torch, most)).save_pretrained(beside)
    dropped = len(read.tensors) - len(_without_base(read.tensors))
    more = (f"{dropped} keys of its base model were left out",) if dropped else ()
    return Converted((target,), kind, (*notes, *more))


def _checkpoint(read: Source, kind: AdapterKind, target: Path, base: Any, notes: tuple[str, ...]) -> Converted:
    import tempfile

    from controlroom.backbones.loading import theatre_folder
    from controlroom.backbones.single_file import load_single_file

    config = None if base is None else theatre_folder() if os.fspath(base) == "theatre" else Path(base)
    with tempfile.TemporaryDirectory(prefix="controlroom-convert-", dir=target.parent) as scratch:
        file = read.path
        if read.pickled:
            file = Path(scratch) / f"model{SUFFIX}"
            _as_file(read.tensors, file, read, False)
        most = max(kind.header.dtypes, key=lambda name: kind.header.dtypes[name])
        pipeline = load_single_file(file, getattr(torch, most), config)
        with _whole_folder(target) as beside:
            pipeline.save_pretrained(beside)
    return Converted((target,), kind, notes)


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A folder beside its place that becomes ``target`` when the block ends, or disappears."""
    beside = target.with_name(f".{secrets.token_hex(6)}.part")
    beside.mkdir()
    try:
        yield beside
        if target.is_dir():
            target.rmdir()  # empty, as was checked
        os.replace(beside, target)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise OutputError(f"Cannot write {str(target)!r}: {error.strerror or error}. Nothing was written.") from error
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
