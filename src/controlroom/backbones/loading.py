"""Loading a checkpoint, and checking that it is whole.

diffusers and transformers load a missing tokenizer as two tokens and a text encoder with missing keys as noise, and say
nothing. Here every component, every key and every vocabulary is checked, and no pickle is ever opened.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from controlroom.backbones.base import Backbone, execution_device
from controlroom.backbones.completeness import check_folder, check_keys
from controlroom.backbones.differences import load_unet
from controlroom.backbones.model_files import PICKLES, explained, pickle_refused, read_json
from controlroom.backbones.sd1 import StableDiffusion1
from controlroom.backbones.sd2 import StableDiffusion2
from controlroom.backbones.sdxl import StableDiffusionXL
from controlroom.backbones.single_file import load_single_file
from controlroom.core.backbone import Backbone as CoreBackbone
from controlroom.core.errors import ModelError

THEATRE = "theatre"


def theatre_folder() -> Path:
    """Folder of the embedded checkpoint."""
    return Path(__file__).resolve().parent.parent / "assets" / "theatre"


def find_model(model: str | os.PathLike[str], what: str = "model") -> Path:
    """Where something that a control names lies on this machine: a folder, or a ``.safetensors`` file.

    Nothing is downloaded: a run may have been written by somebody else, and drawing a picture again must not fetch
    what it names.

    Args:
        model: a path; a name of the theatre such as ``theatre/pose``; a hub id that has been downloaded, with or
            without a path inside (``h94/IP-Adapter/models/ip-adapter_sd15.safetensors``).
        what: what is looked for, for the message.

    Raises:
        ModelError: nothing there, or a pickle.
    """
    name = os.fspath(model)
    if not isinstance(name, str) or not name or "\0" in name or len(name) > 4096:
        raise ModelError(f"{str(name)[:80]!r} does not name a {what}. Give a path, a hub id or a name of the theatre.")
    if name.lower().endswith(PICKLES):
        raise pickle_refused(name, what)
    parts = name.split("/")
    if parts[0] == THEATRE and len(parts) > 1 and not os.path.exists(name):
        place = theatre_folder().joinpath(*parts[1:])
        if ".." in parts or not os.path.exists(place):
            known = sorted(
                p.name for p in theatre_folder().glob("*") if p.is_dir() and not p.name.startswith((".", "_"))
            )
            raise ModelError(
                f"The theatre of this installation has no {name!r}. It has: {', '.join(known) or 'nothing'}."
            )
        return place
    path = Path(name).expanduser()
    try:
        if path.is_dir() or (path.is_file() and path.suffix == ".safetensors"):
            return path
        if path.is_file():
            raise ModelError(f"{name!r} is not a .safetensors file. Give one, or a folder in diffusers' layout.")
    except OSError as error:
        raise ModelError(f"{name!r} cannot be read: {error.strerror}.") from error
    if len(parts) < 2 or "" in parts or parts[0] in (".", "..", "~") or "\\" in name:
        raise ModelError(f"There is no {what} at {name!r}. Check the path.")
    return _find_downloaded(parts, name, what)


def _find_downloaded(parts: list[str], name: str, what: str) -> Path:
    from huggingface_hub import snapshot_download

    repository = "/".join(parts[:2])
    try:
        folder = Path(snapshot_download(repository, local_files_only=True))
    except Exception as error:
        raise ModelError(
            f"There is no {what} at {name!r}, and {repository!r} has not been downloaded. Check the path, or download "
            f"it with: hf download {repository}"
        ) from error
    place = folder.joinpath(*parts[2:])
    if ".." in parts or not os.path.exists(place):
        raise ModelError(f"{repository!r} was downloaded, but has no {'/'.join(parts[2:])!r}. Check the name.")
    return place


def keep(backbone: CoreBackbone, key: tuple[Any, ...], path: Path, load: Callable[[], Any]) -> Any:
    """What ``load`` gives, loaded once for as long as the backbone lives and the file stays the same.

    Args:
        backbone: holds what was loaded; its device and precision are part of the key.
        key: what is loaded.
        path: file or folder it is loaded from.
        load: loads it.
    """
    files = sorted(path.glob("**/*")) if path.is_dir() else [path]
    stamp = tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.is_file())
    full = (*key, str(path), str(backbone.device), str(backbone.dtype))
    held = backbone.kept.get(full)
    if held is None or held[0] != stamp:
        held = backbone.kept[full] = (stamp, load())
    return held[1]


def check_device(module: Any, device: torch.device, what: str) -> None:
    """A module that was given is where the network runs; it is not moved, since it is the caller's.

    Raises:
        ModelError: it is elsewhere.
    """
    there = execution_device(module)
    if there.type != device.type or (there.index or 0) != (device.index or 0):
        raise ModelError(
            f"The {what} is on {there}, the pipeline on {device}. Bring it there with .to({str(device)!r})."
        )


def backbone_from_components(source: Any) -> Backbone:
    """A backbone over the components of a loaded diffusers pipeline; nothing is copied.

    Raises:
        ModelError: not a Stable Diffusion 1, 2 or XL pipeline, or a component is missing.
    """
    unet = getattr(source, "unet", None)
    if unet is None or type(unet).__name__ != "UNet2DConditionModel":
        raise ModelError(
            f"{type(source).__name__} has no UNet2DConditionModel. Load a Stable Diffusion 1, 2 or XL pipeline."
        )
    for part in ("vae", "scheduler"):
        if getattr(source, part, None) is None:
            raise ModelError(f"{type(source).__name__} has no {part}. Load the whole pipeline.")
    parts: dict[str, Any] = {"unet": unet, "vae": source.vae, "scheduler": source.scheduler}
    for part in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"):
        parts[part] = getattr(source, part, None)
    kind = _kind(unet, parts)
    needed = ("text_encoder_2", "tokenizer_2") if kind is StableDiffusionXL else ("text_encoder", "tokenizer")
    for part in needed:
        if parts[part] is None:
            raise ModelError(f"{type(source).__name__} has no {part}. Load the whole pipeline.")
    config = getattr(source, "config", {})
    backbone = kind(**parts, zero_empty_negative=bool(config.get("force_zeros_for_empty_prompt", True)))
    check_vocabularies(backbone)
    return backbone


def _kind(unet: Any, parts: dict[str, Any]) -> type[Backbone]:
    if getattr(unet.config, "addition_embed_type", None) == "text_time" or parts["text_encoder_2"] is not None:
        return StableDiffusionXL
    width = unet.config.cross_attention_dim
    width = width[0] if isinstance(width, list | tuple) else width
    predicts_v = parts["scheduler"].config.get("prediction_type") == "v_prediction"
    if width == 1024 or predicts_v or getattr(unet.config, "upcast_attention", False):
        return StableDiffusion2
    return StableDiffusion1


def check_vocabularies(backbone: Backbone) -> None:
    """Every id a tokenizer can give must have a row in its text encoder.

    Raises:
        ModelError: a tokenizer is empty, larger than its encoder, or does not know where a text ends.
    """
    pairs = [("tokenizer", backbone.tokenizer, backbone.text_encoder)]
    pairs.append(("tokenizer_2", backbone.tokenizer_2, backbone.text_encoder_2))
    for name, tokenizer, encoder in pairs:
        if tokenizer is None or encoder is None:
            continue
        size, rows = len(tokenizer), encoder.get_input_embeddings().weight.shape[0]
        if size <= 2:
            raise ModelError(
                f"The {name} knows {size} tokens: its vocabulary file is missing or empty. Restore vocab.json and "
                "merges.txt (or tokenizer.json) in its folder."
            )
        if size > rows:
            raise ModelError(
                f"The {name} has {size} tokens, its text encoder {rows} rows: they do not belong together. Use the "
                "tokenizer that came with the text encoder."
            )
        if tokenizer.eos_token_id is None:
            raise ModelError(f"The {name} has no end-of-text token. Restore its tokenizer_config.json.")


def load_backbone(
    model: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    revision: str | None = None,
    config: str | os.PathLike[str] | None = None,
) -> tuple[Backbone, Any]:
    """Load a checkpoint: the backbone and the diffusers pipeline that holds its components.

    Args:
        model: ``theatre``, a folder in diffusers' layout, a hub id, or a single ``.safetensors`` file; or
            ``theatre/instruct_pix2pix``, the theatre with that network.
        dtype: precision; None: float32.
        variant: files of a variant, e.g. ``fp16``.
        revision: branch, tag or commit on the hub.
        config: for a single file, the folder in diffusers' layout with its configurations and tokenizers; None: those
            of the hub repository that diffusers takes it for, which must have been downloaded.

    Raises:
        ModelError: nothing there, a part or key is missing, or only pickles are.
    """
    name = os.fspath(model)
    path = theatre_folder() if name == THEATRE else Path(name)
    if name.lower().endswith(PICKLES):
        raise pickle_refused(name, "model")
    if name == THEATRE and not (path / "model_index.json").is_file():
        raise ModelError(f"The theatre's checkpoint is not in this installation ({path}). Reinstall the package.")
    if name.startswith(f"{THEATRE}/") and not os.path.exists(path):
        pipeline = _load_theatre_with(name, dtype)
    elif os.path.isdir(path):  # false for a name that is too long, where Path raises
        check_folder(path, variant)
        pipeline = _load_folder(path, dtype, variant)
    elif os.path.isfile(path):
        pipeline = load_single_file(path, dtype, None if config is None else Path(config))
    elif name.endswith(".safetensors") or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"There is no model at {name!r}. Check the path.")
    else:
        pipeline = _load_hub(name, dtype, variant, revision)
    return backbone_from_components(pipeline), pipeline


def _load_theatre_with(name: str, dtype: torch.dtype | None) -> Any:
    """The theatre with another network in the place of its own: one that reads further input channels."""
    folder, whole = find_model(name), theatre_folder()
    check_folder(whole)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    own = read_json(whole / "unet" / "config.json")["in_channels"]
    if config.get("_class_name") != "UNet2DConditionModel" or config.get("in_channels", own) <= own:
        raise ModelError(f"{name!r} is a part of the theatre that a control takes, not a model. Give {THEATRE!r}.")
    pipeline = _load_folder(whole, dtype, None)
    pipeline.register_modules(unet=load_unet(folder, dtype))
    return pipeline


def _load_folder(folder: Path, dtype: torch.dtype | None, variant: str | None) -> Any:
    import diffusers

    kind = str(read_json(folder / "model_index.json").get("_class_name", ""))
    base = diffusers.StableDiffusionXLPipeline if "XL" in kind else diffusers.StableDiffusionPipeline
    if kind == "BlipDiffusionPipeline":
        return _load_blip_diffusion(folder, dtype)
    pipeline = explained(
        str(folder),
        lambda: (
            base.from_pretrained(
                str(folder),
                torch_dtype=dtype or torch.float32,
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
                safety_checker=None,
                requires_safety_checker=False,
            )
            if base is diffusers.StableDiffusionPipeline
            else base.from_pretrained(
                str(folder),
                torch_dtype=dtype or torch.float32,
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
            )
        ),
    )
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        module = getattr(pipeline, part, None)
        if module is not None:
            check_keys(module, folder / part, variant)
    return pipeline


def _load_blip_diffusion(folder: Path, dtype: torch.dtype | None) -> Any:
    """BLIP-Diffusion's model as any other: its text encoder is of a class of its own, with CLIP's weights.

    What reads subjects, ``qformer``, is loaded by the control.
    """
    import diffusers
    from transformers import CLIPTextModel, CLIPTokenizer

    told: dict[str, Any] = {"torch_dtype": dtype or torch.float32, "use_safetensors": True, "local_files_only": True}

    def load() -> Any:
        index = read_json(folder / "model_index.json")
        scheduler: Any = getattr(diffusers, index["scheduler"][1])
        encoder: Any = CLIPTextModel.from_pretrained(
            str(folder / "text_encoder"), dtype=told["torch_dtype"], use_safetensors=True, local_files_only=True
        )
        return diffusers.StableDiffusionPipeline(
            vae=diffusers.AutoencoderKL.from_pretrained(str(folder / "vae"), **told),
            text_encoder=encoder,
            tokenizer=CLIPTokenizer.from_pretrained(str(folder / "tokenizer"), local_files_only=True),
            unet=diffusers.UNet2DConditionModel.from_pretrained(str(folder / "unet"), **told),
            scheduler=scheduler.from_pretrained(str(folder / "scheduler")),
            safety_checker=None,  # type: ignore[arg-type]
            feature_extractor=None,  # type: ignore[arg-type]
            requires_safety_checker=False,
        )

    pipeline = explained(str(folder), load)
    for part in ("unet", "vae", "text_encoder"):
        check_keys(getattr(pipeline, part).eval(), folder / part)
    return pipeline


def _load_hub(name: str, dtype: torch.dtype | None, variant: str | None, revision: str | None) -> Any:
    import diffusers

    def load() -> Any:
        folder = diffusers.DiffusionPipeline.download(
            name,
            variant=variant,
            revision=revision,
            use_safetensors=True,
        )
        check_folder(Path(folder), variant)
        return _load_folder(Path(folder), dtype, variant)

    return explained(name, load)
