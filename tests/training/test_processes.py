"""Several processes: one run of torchrun with two on the CPU, and what each of them saw."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from controlroom.core.errors import InputError
from controlroom.training.checkpoint import load_checkpoint
from controlroom.training.loop import train
from controlroom.training.processes import Processes
from controlroom.training.stop import agreed
from tests.training.toy_recipe import ToyRecipe, toy_settings
from tests.training.two_processes import Plain

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    script = str(Path(__file__).with_name("two_processes.py"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*launcher, script, str(folder)], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return folder


def saw(out: Path, what: str) -> list[dict[str, Any]]:
    return [json.loads((out / f"rank-{rank}.json").read_text())[what] for rank in (0, 1)]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {f"{p.name}:{k}": v for p in checkpoint.glob("*.safetensors") for k, v in load_file(p).items()}


def test_two_processes_train_what_one_does(out: Path, tmp_path: Path) -> None:
    alone = Plain()
    one = train(alone, toy_settings(tmp_path))
    first, second = saw(out, "plain")
    assert first["step"] == second["step"] == 10 and first["hash"] == second["hash"] and second["exists"]
    assert [a + b for a, b in zip(first["seen"], second["seen"], strict=True)] == alone.seen
    assert all(len(batch) == 2 for batch in first["seen"])
    expected, made = tensors(one.checkpoint), tensors(Path(first["checkpoint"]))
    assert expected.keys() == made.keys()
    for key, value in expected.items():
        torch.testing.assert_close(made[key], value, rtol=1e-4, atol=1e-6, msg=key)
    losses = [(json.loads(line), json.loads(other)) for line, other in _steps(tmp_path, out / "plain")]
    assert len(losses) == 3 and all(a["loss"] == pytest.approx(b["loss"], rel=1e-5) for a, b in losses)


def _steps(*folders: Path) -> list[tuple[str, ...]]:
    lines = [[x for x in (f / "log.jsonl").read_text().splitlines() if '"event": "step"' in x] for f in folders]
    return list(zip(*lines, strict=True))


def test_parts_and_prefetch_too(out: Path) -> None:
    first, second = saw(out, "prefetched")
    assert first["hash"] == second["hash"] and all(len(batch) == 1 for batch in first["seen"])
    plain = tensors(Path(saw(out, "plain")[0]["checkpoint"]))
    for key, value in tensors(Path(first["checkpoint"])).items():
        torch.testing.assert_close(value, plain[key], rtol=1e-4, atol=1e-6, msg=key)


def test_resume_on_two_processes_is_bit_equal(out: Path) -> None:
    for a, b in zip(saw(out, "stopped"), saw(out, "resumed"), strict=True):  # only the second got the signal
        assert (a["reason"], a["step"], b["reason"], b["step"]) == ("SIGTERM", 5, "finished", 10)
    whole, resumed = saw(out, "whole"), saw(out, "resumed")
    assert len({one["hash"] for one in (*whole, *resumed)}) == 1
    left, right = tensors(Path(whole[0]["checkpoint"])), tensors(Path(resumed[0]["checkpoint"]))
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    assert load_checkpoint(Path(whole[0]["checkpoint"])).state["processes"] == 2


def test_the_time_box_of_one_stops_both(out: Path) -> None:
    first, second = saw(out, "time box")
    assert first["reason"] == second["reason"] == "time box" and first["step"] == second["step"] < 1000


def test_a_loss_of_one_that_is_not_finite_stops_both(out: Path) -> None:
    for one in saw(out, "diverged"):
        assert one["error"] == "DivergedError" and len(one["indices"]) == 2
        assert "step 3 (slots 30 to 31, data [point " in one["text"]
    record = json.loads((out / "diverged" / "diverged-step-00000003.json").read_text())
    assert record["slots"] == [30, 31] and record["names"] == [f"point {i}" for i in record["indices"]]
    assert record["value"] == "inf" and record["checkpoint"].endswith("step-00000003")
    assert '"event": "diverged"' in (out / "diverged" / "log.jsonl").read_text()


def test_parameters_that_one_process_reaches_move_in_both(out: Path) -> None:
    first, second = saw(out, "partly")
    assert first["hash"] == second["hash"]
    saved = load_checkpoint(Path(first["checkpoint"]))
    assert "net.5.weight|exp_avg" in saved.optimizer and "net.6.weight|exp_avg" not in saved.optimizer


@pytest.mark.parametrize(
    ("what", "error", "text"),
    [
        ("not a folder", "OutputError", "cannot be written"),
        ("unequal", "InputError", "cannot be shared equally by 2 processes"),
        ("drifting", "ModelError", "differ from process to process"),
    ],
)
def test_both_refuse(out: Path, what: str, error: str, text: str) -> None:
    for one in saw(out, what):
        assert one["error"] == error and text in one["text"]


def test_another_number_of_processes_goes_on_and_says_so(out: Path) -> None:
    broken = out / "broken"
    changed = toy_settings(broken, accumulate=2)
    train(ToyRecipe(), changed)  # finished there; here it is only looked at
    log = (broken / "log.jsonl").read_text()
    assert '"event": "processes"' in log and '"event": "accumulate"' in log


def test_one_process_needs_no_group(tmp_path: Path) -> None:
    one = Processes.joined("cpu")
    assert (one.main, one.world, one.device_name("cuda:1")) == (True, 1, "cuda:1")
    assert one.by_main(lambda: 3) == 3 and one.table([1.0]) == [[1.0]] and one.all_say("a") == ["a"]
    assert agreed(one, "SIGINT", due=True) == ("SIGINT", True) and agreed(one, None, due=False) == (None, False)
    assert not torch.distributed.is_initialized()
    with pytest.raises(InputError, match="Give a multiple of 4"):
        train(ToyRecipe(), toy_settings(tmp_path).model_copy(update={"accumulate": 4, "batch_size": 6}))
