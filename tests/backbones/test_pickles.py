"""Pickles are opened as weights alone, in a process without network and with limits; what asks for more is refused."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from controlroom.backbones import pickle_child
from controlroom.backbones.pickles import open_pickle
from controlroom.core.errors import ModelError


class Command:
    """What runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_nested_weights_become_flat(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    content = {
        "image_proj": {"proj.weight": shared.half(), "norm.weight": torch.ones(3, dtype=torch.bfloat16)},
        "ip_adapter": {"1.to_k_ip.weight": shared.T, "1.to_v_ip.weight": shared},
        "name": "anna",
        "step": 7,
        "optimizer_states": [{"exp_avg": torch.zeros(2)}],
    }
    torch.save(content, tmp_path / "ip.bin")
    found = open_pickle(tmp_path / "ip.bin")
    assert set(found.tensors) == {
        *("image_proj.proj.weight", "image_proj.norm.weight"),
        *("ip_adapter.1.to_k_ip.weight", "ip_adapter.1.to_v_ip.weight"),
    }
    assert torch.equal(found.tensors["ip_adapter.1.to_k_ip.weight"], shared.T)
    assert found.tensors["image_proj.norm.weight"].dtype == torch.bfloat16
    assert found.plain == {"name": "anna", "step": 7} and found.left == ("optimizer_states",)


@pytest.mark.parametrize("zipped", [True, False])
def test_wrapped_weights_are_opened(zipped: bool, tmp_path: Path) -> None:
    weights = {"model.diffusion_model.out.2.weight": torch.ones(2, 2)}
    content = {"state_dict": weights, "epoch": 3, "callbacks": {"a": 1}, "lr_schedulers": []}
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    found = open_pickle(tmp_path / "x.ckpt")
    assert list(found.tensors) == list(weights) and found.plain == {"epoch": 3}
    torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    assert set(open_pickle(tmp_path / "net.pth").tensors) == {"weight", "bias"}


def test_one_that_runs_a_command_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "was-run"
    content = {"state_dict": {"weight": torch.ones(1)}, "more": Command(f"touch {mark}")}
    torch.save(content, tmp_path / "evil.ckpt")
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps(Command(f"touch {mark}")))
    for name, why in (("evil.ckpt", r"asks for (posix|os)\.system"), ("bare.pkl", "not a file of weights alone")):
        with pytest.raises(ModelError, match=rf"is refused: .*{why}.*nothing of it was run") as error:
            open_pickle(tmp_path / name)
        assert "\n" not in str(error.value)
    assert not mark.exists()
    # The command is a real one: an open process runs it.
    assert pickle.loads((tmp_path / "bare.pkl").read_bytes()) == 0 and mark.exists()


def test_one_that_would_fill_the_memory_or_is_none_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1).expand(1 << 38)}, tmp_path / "bomb.pt")
    assert (tmp_path / "bomb.pt").stat().st_size < 4096
    (tmp_path / "text.bin").write_text("hello")
    torch.save({"a": 1}, tmp_path / "empty.pth")
    for name, said in (("bomb.pt", "memory"), ("text.bin", "cannot be read"), ("empty.pth", "no tensors")):
        with pytest.raises(ModelError, match=said):
            open_pickle(tmp_path / name)
    with pytest.raises(ModelError, match="no file"):
        open_pickle(tmp_path / "lost.bin")


@pytest.mark.parametrize("namespace", [True, False])
def test_no_network_and_no_programs_in_that_process(namespace: bool, tmp_path: Path) -> None:
    """With a namespace of its own, and where the system refuses one (here by a double), with sockets refused."""
    script = f"""
import socket, subprocess, sys
sys.path.insert(0, {str(Path(pickle_child.__file__).parent)!r})
import pickle_child
if not {namespace}:
    pickle_child.ctypes.CDLL = lambda *_, **__: (_ for _ in ()).throw(OSError("not here"))
how = pickle_child.isolated()
def tried(call):
    try:
        call()
    except OSError as error:
        return type(error).__name__
    return "worked"
port = int(sys.argv[1])
print(how)
if how == "namespace":
    print(tried(lambda: socket.create_connection(("127.0.0.1", port), timeout=2)))
pickle_child.forbid()
print(tried(lambda: socket.create_connection(("127.0.0.1", port), timeout=2)))
print(tried(lambda: subprocess.run(["true"])))
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        done = subprocess.run([sys.executable, "-c", script, port], capture_output=True, text=True, check=True)
    how, *tries = done.stdout.split()
    assert how == ("namespace" if namespace else "sockets") or not namespace or how == "sockets"
    assert tries[-2:] == ["PermissionError", "PermissionError"]
    assert "worked" not in tries
