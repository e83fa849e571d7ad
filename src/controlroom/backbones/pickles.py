"""Tensors out of a pickle, opened in another process: without network, with limits, as weights alone.

The only place where controlroom opens pickles, and only ``controlroom convert`` asks for it. Whatever the file does,
the process that it does it in ends; this one reads the safetensors that came out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from controlroom.backbones import pickle_child
from controlroom.backbones.model_files import read_safetensors
from controlroom.core.errors import ModelError

_GB = 1 << 30
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "OMP_NUM_THREADS", "SYSTEMROOT", "TMPDIR")


@dataclass(frozen=True)
class Unpickled:
    """What a pickle held.

    Attributes:
        tensors: by their full names; what was nested is joined with dots.
        plain: texts and numbers beside them.
        left: names of what is neither, and of what trainers keep (states of optimisers); left out.
        isolated: whether the process had no network at all; False: the system did not allow that, and sockets were
            refused.
    """

    tensors: dict[str, torch.Tensor]
    plain: dict[str, Any] = field(default_factory=dict)
    left: tuple[str, ...] = ()
    isolated: bool = True


def open_pickle(path: Path, seconds: int = 600) -> Unpickled:
    """The tensors in a ``.bin``, ``.pt``, ``.pth`` or ``.ckpt`` file.

    Args:
        path: the file.
        seconds: after which it is given up.

    Raises:
        ModelError: it asks for more than weights, is broken, or needs more memory or time than such a file should.
    """
    if not path.is_file():
        raise ModelError(f"There is no file {str(path)!r}. Check the path.")
    size = path.stat().st_size
    # Read, and serialised; the output is as large as the weights.
    limits = {"memory": 4 * size + _GB, "seconds": seconds, "output": 2 * size + (64 << 20)}
    with tempfile.TemporaryDirectory(prefix="controlroom-convert-") as folder:
        target = Path(folder) / "tensors.safetensors"
        script = str(Path(pickle_child.__file__).resolve())
        command = [sys.executable, "-I", script, str(path.resolve()), str(target), json.dumps(limits)]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                timeout=seconds,
                stdin=subprocess.DEVNULL,
                cwd=folder,
                # No secrets of the user's environment.
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise _refused(path, f"it was not open after {seconds} seconds") from error
        said = _said(done.stdout)
        if said is None:
            signal = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
            raise _refused(path, f"the process that opened it ended with {signal} (memory, time or a broken file)")
        if "refused" in said:
            raise _refused(path, str(said["refused"]))
        tensors = read_safetensors(target)
    return Unpickled(tensors, dict(said["plain"]), tuple(said["left"]), said["isolation"] == "namespace")


def _said(output: bytes) -> dict[str, Any] | None:
    """What the process printed last."""
    try:
        found = json.loads(output.decode("utf-8", "replace").strip().splitlines()[-1])
    except (ValueError, IndexError):
        return None
    return found if isinstance(found, dict) and ("refused" in found or "plain" in found) else None


def _refused(path: Path, why: str) -> ModelError:
    return ModelError(
        f"{str(path)!r} is refused: {why}. Nothing was written and nothing of it was run. Get the .safetensors file "
        "from whoever made it."
    )
