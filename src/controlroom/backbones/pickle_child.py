"""Opens one pickle and writes its tensors as safetensors: a program of its own, for `controlroom.backbones.pickles`.

It imports nothing of controlroom. Before torch is loaded it gives up the network (a namespace of its own without one,
where the system allows that) and sets limits of memory, time and file size; then ``torch.load(weights_only=True)``
builds tensors and plain containers alone. What a pickle asks for beyond that ends the program. Arguments: pickle,
output, and the limits as JSON. It prints one JSON object.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
from typing import Any

_NEW_USER, _NEW_NET = 0x10000000, 0x40000000
_FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty")
_WRAPPERS = ("state_dict", "model", "module", "params_ema", "params")
"""Keys that wrap all the weights of a file."""
_TRAINING = ("optimizer_states", "optimizer", "lr_schedulers", "callbacks", "loops", "hyper_parameters")
"""What trainers keep beside the weights."""


def isolated() -> str:
    """Give up the network; how that was done."""
    try:
        unshare = ctypes.CDLL(None, use_errno=True).unshare
        if unshare(_NEW_USER | _NEW_NET) == 0 or unshare(_NEW_NET) == 0:
            return "namespace"
    except (AttributeError, OSError, TypeError):
        pass
    return "sockets"


def forbid() -> None:
    """Refuse sockets and programs from now on, whoever asks; nothing can take this back."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(_FORBIDDEN):
            raise PermissionError(f"{event} is not allowed while a pickle is open")

    sys.addaudithook(hook)


def limit(limits: dict[str, int]) -> None:
    """Limits of this process; memory is counted beyond what it has already."""
    try:
        import resource
    except ImportError:
        return

    wanted = [
        (resource.RLIMIT_CPU, limits["seconds"]),
        (resource.RLIMIT_FSIZE, limits["output"]),
        (resource.RLIMIT_CORE, 0),
    ]
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        wanted.append((resource.RLIMIT_AS, now + limits["memory"]))
    for kind, value in wanted:
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def flattened(content: Any, tensor: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors by their full names, and the plain values beside them.

    A mapping that wraps all weights is opened; what trainers keep beside it (states of optimisers) is left out.
    """
    plain: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    left: list[str] = []

    def holds(value: Any) -> bool:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        return isinstance(value, tensor) or any(holds(each) for each in inner)

    while isinstance(content, dict):
        left += [str(key) for key in content if key in _TRAINING]
        content = {key: value for key, value in content.items() if key not in _TRAINING}
        wrapper = next((key for key in _WRAPPERS if isinstance(content.get(key), dict)), None)
        rest = {key: value for key, value in content.items() if key != wrapper}
        if wrapper is None or any(holds(value) for value in rest.values()):
            break
        plain |= {str(key): value for key, value in rest.items() if isinstance(value, (str, int, float, bool))}
        content = content[wrapper]

    def walk(value: Any, name: str) -> None:
        if isinstance(value, tensor):
            if name in tensors:
                raise ValueError(f"two tensors are called {name!r}")
            tensors[name] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{name}.{key}" if name else str(key))
        elif isinstance(value, (list, tuple)) and any(isinstance(each, (dict, tensor)) for each in value):
            for index, inner in enumerate(value):
                walk(inner, f"{name}.{index}" if name else str(index))
        elif isinstance(value, (str, int, float, bool)):
            plain[name] = value
        elif value is not None:
            left.append(name)

    walk(content, "tensor" if isinstance(content, tensor) else "")
    return tensors, {"plain": plain, "left": left}


def owned(tensor: Any) -> Any:
    """A tensor with a storage of its own, as a file of safetensors wants it."""
    tensor = tensor.detach().to_dense()
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    if whole and tensor.data_ptr() not in _SEEN:
        _SEEN.add(tensor.data_ptr())
        return tensor
    return tensor.contiguous().clone()


_SEEN: set[int] = set()


def main(source: str, target: str, limits: dict[str, int]) -> dict[str, Any]:
    """Open the pickle; what is printed."""
    how = isolated()
    import torch
    from safetensors.torch import save_file

    limit(limits)
    forbid()
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
        tensors, about = flattened(content, torch.Tensor)
        if not tensors:
            return {"refused": "it holds no tensors", "isolation": how}
        save_file({key: owned(value) for key, value in tensors.items()}, target, {"format": "pt"})
    except MemoryError:
        return {"refused": "it needs more memory than such a file should", "isolation": how}
    except Exception as error:
        return {"refused": reason(error), "isolation": how}
    return {"isolation": how, "tensors": len(tensors), **about}


def reason(error: Exception) -> str:
    """Why a pickle was not opened, in a few words."""
    text = " ".join(str(error).split())
    found = re.search(r"GLOBAL ([\w.]+)", text)
    if found:
        return f"when it is opened it asks for {found[1]}, which weights do not need and which may run code"
    if "Weights only load failed" in text:
        return "it is not a file of weights alone, as torch.save writes it, and opening it any other way may run code"
    if "memory" in text.lower() or "allocate" in text.lower():
        return "it needs more memory than such a file should"
    return f"it cannot be read as weights ({type(error).__name__}: {text[:160]})"


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])), default=str), flush=True)
    # Whatever a library would do at its end is not needed.
    os._exit(0)
