"""What the machine has and does well: its devices, and whether bfloat16 is faster.

Measured on the theatre's UNet: on a processor without bfloat16 instructions (AVX512-BF16 or AMX) autocast is half as
fast as float32, on one with them 1.3 times faster.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from controlroom.core.errors import InputError


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
