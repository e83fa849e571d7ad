"""What the machine has and does well: its devices, whether bfloat16 is faster, and how its memory is best kept.

Measured on the theatre's UNet: on a processor without bfloat16 instructions (AVX512-BF16 or AMX) autocast is half as
fast as float32, on one with them 1.3 times faster; with glibc's defaults every large tensor is returned to the system
and faulted in again, which costs a third of a training step on a virtual machine.
"""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from typing import Any

import torch
from torch import Tensor

from controlroom.core.errors import InputError

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 faster than in float32."""
    if device.type != "cpu":
        return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16") or known.get("bf16"))


def usable_device(name: str) -> torch.device:
    """The device of that name. Raises InputError if there is no such kind of device, or none of it here."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"The device {name!r} cannot be used here ({reason}). Give cpu, cuda, cuda:0 or mps."
        ) from error
    return device


def moved(batch: Any, device: torch.device) -> Any:
    """A batch on a device: tensors, and dataclasses, tuples, lists and mappings that hold some; the rest as it is."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        values = {f.name: moved(getattr(batch, f.name), device) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(batch, **values)
    if isinstance(batch, list | tuple):
        return type(batch)([moved(item, device) for item in batch])
    if isinstance(batch, dict):
        return {name: moved(item, device) for name, item in batch.items()}
    return batch


def keep_freed_memory() -> bool:
    """Tell glibc to keep memory that tensors free, for the next ones. Returns whether it was told.

    For a process whose only work is this (training, the command line): the memory goes back to the system when it
    ends. Elsewhere than on Linux with glibc this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # One arena, since those of threads are limited to 64 MB and hand larger pieces back at once.
    wanted = ((_M_MMAP_THRESHOLD, 1 << 30), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 1 << 27), (_M_ARENA_MAX, 1))
    told = [mallopt(what, value) for what, value in wanted]
    return all(told)
