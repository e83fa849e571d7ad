"""A whole model in one ``.safetensors`` file, in the original layout of Stable Diffusion 1, 2 or XL.

diffusers converts it. Such a file holds weights only; configurations and tokenizers come from a folder.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch

from controlroom.backbones.model_files import PICKLES, explained, failure, read_safetensors
from controlroom.core.errors import ModelError


def load_single_file(path: Path, dtype: torch.dtype | None = None, config: Path | None = None) -> Any:
    """The diffusers pipeline in one file.

    Args:
        path: the file.
        dtype: precision; None: float32.
        config: folder in diffusers' layout with configurations and tokenizers; None: those of the hub repository that
            diffusers takes the file for, which must have been downloaded: nothing is fetched here.

    Raises:
        ModelError: broken, incomplete, or its configurations are not on this machine.
    """
    import diffusers
    from safetensors import safe_open

    if path.suffix != ".safetensors":
        raise ModelError(f"{path} is not a .safetensors file. Give one, or a folder in diffusers' layout.")

    def keys() -> set[str]:
        with safe_open(str(path), framework="pt") as content:
            return set(content.keys())

    names = explained(str(path), keys)
    xl = any(name.startswith("conditioner.embedders.1.") for name in names)
    base = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    more: dict[str, Any] = {} if xl else {"safety_checker": None, "requires_safety_checker": False}
    if config is None:
        config = _downloaded_config(path)
    check_config(config)
    more |= {"config": str(config), "local_files_only": True}
    lacking = (
        "or belongs to another kind of model than it was loaded as. Copy it again, or give the folder of its "
        "configurations (config=…)."
    )
    try:
        pipeline = base.from_single_file(str(path), dtype=dtype or torch.float32, **more)
    except NotImplementedError as error:
        # diffusers makes every part without memory, and fills in what the file has.
        raise ModelError(f"{path} lacks weights of the UNet or the autoencoder, {lacking}") from error
    except Exception as error:
        raise failure(str(path), error) from error
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        module = getattr(pipeline, part, None)
        for name, parameter in module.named_parameters() if module is not None else ():
            if parameter.is_meta:
                raise ModelError(f"{path} lacks weights of the {part}, the first is {name!r}, {lacking}")
    return pipeline


def check_config(folder: Path) -> None:
    """A folder with what a single file lacks: ``model_index.json``, and no pickle that would be read in its place.

    Raises:
        ModelError: it has none, or a part of which there is only a pickle.
    """
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"{folder} has no model_index.json; give a folder in diffusers' layout as config.")
    for part in folder.iterdir():
        names = [file.name for file in part.iterdir()] if part.is_dir() else []
        pickles = [name for name in names if name.endswith(PICKLES)]
        if pickles and not any(name.endswith(".safetensors") for name in names):
            raise ModelError(
                f"{part} has only {pickles[0]}, a pickle, which is never opened. Take it out, or make a .safetensors "
                "file of it with controlroom convert."
            )


def _downloaded_config(path: Path) -> Path:
    """The configurations of the hub repository that diffusers takes a file for, where they have been downloaded.

    diffusers would look for them itself, and fetch them even where it is told to keep to local files.

    Raises:
        ModelError: they have not been.
    """
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository = fetch_diffusers_config(read_safetensors(path))["pretrained_model_name_or_path"]
    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except LocalEntryNotFoundError as error:
        file, folder = shlex.quote(str(path)), shlex.quote(str(path.with_suffix("")))
        raise ModelError(
            f"{path} holds weights only, and the configurations and tokenizers that belong to them are not on this "
            f"machine; nothing is downloaded for a file. Where a folder in diffusers' layout has them, make this one "
            f"too (controlroom convert {file} -o {folder} --base FOLDER) or give it in Python (config=…); or fetch "
            f"them once: hf download {repository} --include '*.json' '*.txt'"
        ) from error
