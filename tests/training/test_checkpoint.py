"""Checkpoints are whole or not there, and what is broken is set aside."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from controlroom.core.errors import InputError, ModelError, OutputError
from controlroom.training import checkpoint as module
from controlroom.training.checkpoint import (
    ResumeError,
    checkpoints,
    load_checkpoint,
    newest_whole,
    problem_of,
    prune,
    save_checkpoint,
)
from controlroom.training.export import samples_seen, stamp
from controlroom.training.loop import train
from tests.training.toy_recipe import ToyRecipe, toy_settings


def write(folder: Path, step: int) -> Path:
    net = nn.Linear(3, 2)
    state = {"step": step}
    return save_checkpoint(folder, step, state, {"net": net}, {"net.weight": net.weight}, {"net.weight|step": net.bias})


def test_round_trip(tmp_path: Path) -> None:
    tied = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    tied["b"].weight = tied["a"].weight
    part = torch.arange(6.0)[2:4]  # a view into a larger memory
    path = save_checkpoint(tmp_path, 7, {"step": 7}, {"net": tied}, {"part": part}, {"scalar|step": torch.tensor(3.0)})
    loaded = load_checkpoint(path)
    assert path.name == "step-00000007" and loaded.state == {"step": 7}
    assert torch.equal(loaded.weights["net"]["b.weight"], tied.get_parameter("a.weight"))
    assert torch.equal(loaded.ema["part"], part) and loaded.optimizer["scalar|step"].shape == ()


def test_a_whole_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    before = (path / "manifest.json").read_bytes()
    assert write(tmp_path, 1) == path and (path / "manifest.json").read_bytes() == before
    (path / "ema.safetensors").unlink()
    assert write(tmp_path, 1) == path and problem_of(path) is None


@pytest.mark.parametrize("name", ["weights.net.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_any_damage_is_found_and_set_aside(tmp_path: Path, name: str, how: str) -> None:
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    file = bad / name
    data = bytearray(file.read_bytes())
    if how == "flip":
        data[len(data) // 3] ^= 0x80
        file.write_bytes(data)
    elif how == "truncate":
        file.write_bytes(data[:-5])
    else:
        file.unlink()
    found, notes = newest_whole(tmp_path)
    assert found == good and len(notes) == 1 and "step-00000002" in notes[0]
    assert (tmp_path / "step-00000002.broken").is_dir() and not bad.exists()


def test_a_crash_at_any_moment_of_writing_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies the folder before each system-level step of a save, as if power was lost there."""
    write(tmp_path / "run", 1)
    snapshots: list[Path] = []

    def snapshot() -> None:
        target = tmp_path / f"crash-{len(snapshots)}"
        shutil.copytree(tmp_path / "run", target)
        for file in target.glob("*.tmp/*"):  # and the file being written is cut at some byte
            with file.open("r+b") as opened:
                opened.truncate(random.Random(len(snapshots)).randint(0, file.stat().st_size))
        snapshots.append(target)

    save_file, hash_of, sync, rename = module.save_file, module.file_hash, module.sync, Path.rename
    monkeypatch.setattr(module, "save_file", lambda *a: (save_file(*a), snapshot()))
    monkeypatch.setattr(module, "file_hash", lambda p: (snapshot(), hash_of(p))[1])
    monkeypatch.setattr(module, "sync", lambda p: (snapshot(), sync(p)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (snapshot(), rename(self, to))[1])
    write(tmp_path / "run", 2)
    monkeypatch.undo()
    assert len(snapshots) > 10
    for folder in snapshots:
        found, notes = newest_whole(folder)
        assert found is not None and found.name in {"step-00000001", "step-00000002"} and not notes


def test_the_loop_falls_back_past_a_broken_checkpoint(tmp_path: Path) -> None:
    settings = toy_settings(tmp_path / "a", checkpoint_every_steps=3, keep_checkpoints=3)
    whole = train(ToyRecipe(), settings)
    expected = {p.name: p.read_bytes() for p in whole.checkpoint.glob("*.safetensors")}
    for path in checkpoints(tmp_path / "a")[-2:]:
        (path / "ema.safetensors").write_bytes(b"x")
    again = train(ToyRecipe(), settings)
    assert {p.name: p.read_bytes() for p in again.checkpoint.glob("*.safetensors")} == expected
    assert len(list((tmp_path / "a").glob("*.broken"))) == 2
    assert "broken checkpoint" in (tmp_path / "a" / "log.jsonl").read_text()


def test_prune_keeps_the_newest_and_only_if_it_is_whole(tmp_path: Path) -> None:
    paths = [write(tmp_path, step) for step in (1, 2, 3)]
    (paths[-1] / "state.json").write_text("{}")
    prune(tmp_path, 1)
    assert checkpoints(tmp_path) == paths
    write(tmp_path, 3)
    prune(tmp_path, 2)
    assert checkpoints(tmp_path) == paths[1:]


def test_a_full_disk_leaves_the_checkpoints_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = write(tmp_path, 1)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "sync", full)
    with pytest.raises(OutputError, match="No space left"):
        write(tmp_path, 2)
    assert problem_of(good) is None and [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_a_later_format_is_refused_not_set_aside(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ResumeError, match="format 2"):
        newest_whole(tmp_path)
    assert path.exists()


def test_stamp_changes_the_header_only(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    tensors = {"a": torch.randn(5, 3), "b": torch.arange(4)}
    for folder, samples in (("x", "12"), ("y", "345")):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "m.safetensors", metadata={"kept": "yes"})
        stamp(tmp_path / folder / "m.safetensors", {"samples": samples})
    with safe_open(tmp_path / "y" / "m.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "kept": "yes", "samples": "345"}
    assert all(torch.equal(v, tensors[k]) for k, v in load_file(tmp_path / "y" / "m.safetensors").items())
    assert samples_seen(tmp_path) == 345
    with pytest.raises(InputError, match="no safetensors"):
        samples_seen(tmp_path / "absent")
    (tmp_path / "x" / "m.safetensors").write_bytes(os.urandom(3))
    with pytest.raises(InputError, match="not a safetensors file"):
        samples_seen(tmp_path)
    (tmp_path / "y" / "m.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="m.bin' is a pickle"):
        samples_seen(tmp_path)
