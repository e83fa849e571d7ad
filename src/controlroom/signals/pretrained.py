"""The user's networks for photographs, from local folders in the layout of transformers. Nothing is downloaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from controlroom.backbones.loading import find_model
from controlroom.backbones.model_files import explained
from controlroom.core.errors import ModelError


@dataclass(frozen=True)
class Pretrained:
    """A network and what prepares pictures for it."""

    model: Any
    processor: Any
    device: torch.device

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Any:
        """The network's output for inputs of its processor."""
        return self.model(**{name: value.to(self.device) for name, value in inputs.items()})


def load_pretrained(
    folder: str | os.PathLike[str],
    auto_class: str,
    what: str,
    device: str = "cpu",
    processor: str = "AutoImageProcessor",
) -> Pretrained:
    """A network of transformers with its processor.

    Args:
        folder: with ``config.json``, ``preprocessor_config.json`` and ``.safetensors``; or a hub id that is downloaded.
        auto_class: class of transformers that loads it, such as ``AutoModelForDepthEstimation``.
        what: what is looked for, for messages, such as ``Depth Anything``.
        device: where it computes.
        processor: class of transformers that loads what prepares pictures.

    Raises:
        ModelError: it is not on this machine, a pickle, broken, or a network for something else.
    """
    place = find_model(folder, f"folder of {what}")
    if not Path(place).is_dir():
        raise ModelError(f"{os.fspath(folder)!r} is a file; {what} is a folder as transformers saves it. Give that.")
    import transformers

    name = f"{os.fspath(folder)} ({what})"
    options: dict[str, Any] = {} if processor == "AutoProcessor" else {"backend": "pil"}
    prepare = explained(
        name, lambda: getattr(transformers, processor).from_pretrained(place, local_files_only=True, **options)
    )
    model, report = explained(
        name,
        lambda: getattr(transformers, auto_class).from_pretrained(
            place, local_files_only=True, use_safetensors=True, output_loading_info=True
        ),
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{name} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]!r}: it is a network "
            "for something else, or was copied in part."
        )
    return Pretrained(model.eval().to(device), prepare, torch.device(device))
