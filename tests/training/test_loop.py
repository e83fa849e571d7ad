"""The loop: exact resume, clean stops, refusals, and what moves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from controlroom.core.errors import ModelError, OutputError
from controlroom.training.checkpoint import ResumeError, checkpoints, modules_hash
from controlroom.training.export import samples_seen
from controlroom.training.loop import DivergedError, train
from controlroom.training.randomness import DataOrder, StepRandom, slots_of
from controlroom.training.recipe import Losses
from tests.training.toy_recipe import ToyRecipe, toy_settings


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    found = {f"{p.name}:{k}": v for p in checkpoint.glob("*.safetensors") for k, v in load_file(p).items()}
    assert any("ema" in k for k in found) and any("exp_avg_sq" in k for k in found)
    return found


def assert_same(a: Path, b: Path) -> None:
    left, right = tensors_of(a), tensors_of(b)
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key


class Stopping(ToyRecipe):
    """Sends itself a signal during a step."""

    def __init__(self, at: int, number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.at, self.number = at, number

    def loss(self, batch, step, rng):
        if step == self.at:
            os.kill(os.getpid(), self.number)
        return super().loss(batch, step, rng)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("prefetch", [False, True])
def test_resumed_run_is_bit_equal(tmp_path: Path, precision: str, prefetch: bool) -> None:
    changes = {"mixed_precision": precision, "prefetch": prefetch}
    whole, first, second = ToyRecipe(), Stopping(at=4), ToyRecipe()
    a = train(whole, toy_settings(tmp_path / "a", **changes))
    stopped = train(first, toy_settings(tmp_path / "b", **changes))
    assert (stopped.step, stopped.reason, stopped.resumable) == (5, "SIGTERM", True)
    torch.rand(7)  # the global generator must not matter
    b = train(second, toy_settings(tmp_path / "b", **changes))
    assert a.finished and b.finished and a.step == b.step == 10
    assert_same(a.checkpoint, b.checkpoint)
    assert torch.equal(whole.noise[-1], second.noise[-1]) and whole.seen[5:10] == second.seen[:5]
    assert (a.weights / "net.safetensors").read_bytes() == (b.weights / "net.safetensors").read_bytes()


class Convolving(ToyRecipe):
    """A convolution and its transpose instead of the linear layers."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = torch.nn.Sequential(
                torch.nn.Conv2d(6, 8, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(8, 6, 3)
            )

    def loss(self, batch, step, rng):
        noise = rng.normal("noise", (6, 5, 5))
        error = (self.net(batch[:, :, None, None] + noise) - noise[..., 1:-1, 1:-1]).square().mean()
        return Losses(error, {"error": error.detach()})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_channels_last_trains_the_same_weights(tmp_path: Path, optimizer: str) -> None:
    plain = train(Convolving(), toy_settings(tmp_path / "a", optimizer=optimizer))
    recipe = Convolving()
    stopping = toy_settings(tmp_path / "b", optimizer=optimizer, channels_last=True, export_with_checkpoint=True)
    last = train(recipe, stopping.model_copy(update={"checkpoint_every_steps": 3}))
    assert recipe.net[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not recipe.net[0].weight.is_contiguous()
    left, right = load_file(plain.weights / "net.safetensors"), load_file(last.weights / "net.safetensors")
    for name, value in left.items():
        assert torch.allclose(value, right[name], atol=1e-5), name


def test_resume_after_sigkill_is_bit_equal(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("toy_recipe.py")), str(tmp_path / "killed"), "30", "0.05"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(checkpoints(tmp_path / "killed")) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 2 <= int(checkpoints(tmp_path / "killed")[-1].name[5:]) < 30
    killed = train(ToyRecipe(), toy_settings(tmp_path / "killed", total_steps=30))
    whole = train(ToyRecipe(), toy_settings(tmp_path / "whole", total_steps=30))
    assert_same(killed.checkpoint, whole.checkpoint)
    assert not list((tmp_path / "killed").glob("*.tmp"))


def test_sigterm_from_outside_saves_and_exits(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("toy_recipe.py")), str(tmp_path), "2000", "0.02"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 60
    while not checkpoints(tmp_path) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    out, _ = process.communicate(timeout=30)
    reason, step, resumable = out.split()[1:]
    assert (process.returncode, reason, resumable) == (0, "SIGTERM", "True")
    assert checkpoints(tmp_path)[-1].name == f"step-{int(step):08d}"


def test_time_box_stops_with_a_checkpoint(tmp_path: Path) -> None:
    result = train(ToyRecipe(pause=0.02), toy_settings(tmp_path, total_steps=100_000, stop_after_seconds=0.2))
    assert (result.reason, result.resumable) == ("time box", True) and 0 < result.step < 100
    assert result.checkpoint.is_dir() and samples_seen(result.weights) == result.step * 4


def test_handlers_and_threads_and_randomness_are_put_back(tmp_path: Path) -> None:
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    train(ToyRecipe(), toy_settings(tmp_path))
    assert torch.equal(torch.rand(3), expected)
    assert signal.getsignal(signal.SIGTERM) is handler and torch.get_num_threads() == threads


def test_only_declared_modules_move(tmp_path: Path) -> None:
    recipe = ToyRecipe()
    frozen, trained = modules_hash(recipe.frozen()), {k: v.clone() for k, v in recipe.net.named_parameters()}
    train(recipe, toy_settings(tmp_path))
    assert modules_hash(recipe.frozen()) == frozen
    assert all(not torch.equal(trained[k], v) for k, v in recipe.net.named_parameters())


def test_a_frozen_module_that_moves_is_found(tmp_path: Path) -> None:
    class Leaking(ToyRecipe):
        def after_step(self, step: int) -> None:
            self.fixed.weight.add_(1e-3)

    with pytest.raises(ModelError, match="moved"):
        train(Leaking(), toy_settings(tmp_path))
    assert not checkpoints(tmp_path)


def test_it_learns_and_exports_the_average(tmp_path: Path) -> None:
    recipe = ToyRecipe()
    result = train(recipe, toy_settings(tmp_path, total_steps=200, log_every=50))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    assert [line["step"] for line in steps] == [50, 100, 150, 200]
    assert steps[-1]["loss"] < 0.85 * steps[0]["loss"] and result.losses["loss"] == steps[-1]["loss"]
    exported = load_file(result.weights / "net.safetensors")
    ema = load_file(result.checkpoint / "ema.safetensors")
    assert torch.equal(exported["0.weight"], ema["net.0.weight"])
    weight = recipe.net.get_parameter("0.weight")
    assert torch.equal(weight, load_file(result.checkpoint / "weights.net.safetensors")["0.weight"])
    assert not torch.equal(exported["0.weight"], weight)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_not_finite_stops_before_the_step(tmp_path: Path, where: str) -> None:
    class Diverging(ToyRecipe):
        def loss(self, batch, step, rng):
            losses = super().loss(batch, step, rng)
            if step == 7:
                before.update({k: v.detach().clone() for k, v in self.net.named_parameters()})
                bad = losses.total * float("nan")
                if where == "gradient":  # finite loss, infinite gradient
                    bad = losses.total.detach() + torch.sqrt(losses.total - losses.total.detach())
                return Losses(bad)
            return losses

    before: dict[str, torch.Tensor] = {}
    recipe = Diverging()
    with pytest.raises(DivergedError, match=r"step 7 \(slots 28 to 31") as caught:
        train(recipe, toy_settings(tmp_path, checkpoint_every_steps=3))
    assert where in str(caught.value)
    assert all(torch.equal(before[k], v) for k, v in recipe.net.named_parameters())
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000003", "step-00000006"]


def test_changed_settings_are_refused(tmp_path: Path) -> None:
    train(Stopping(at=4), toy_settings(tmp_path))
    with pytest.raises(ResumeError, match=r"learning_rate: 0.01 in the checkpoint, 0.02 now"):
        train(ToyRecipe(), toy_settings(tmp_path, learning_rate=2e-2))
    with pytest.raises(ResumeError, match="steps: 10"):  # the cosine knows its length
        train(ToyRecipe(), toy_settings(tmp_path, total_steps=20))
    other = ToyRecipe()
    torch.nn.init.zeros_(other.fixed.weight)
    with pytest.raises(ResumeError, match="frozen weights"):
        train(other, toy_settings(tmp_path))
    with pytest.raises(ResumeError, match="resume is off"):
        train(ToyRecipe(), toy_settings(tmp_path), resume=False)
    wider = ToyRecipe()
    wider.net[4] = torch.nn.Linear(8, 6, bias=False)
    with pytest.raises(
        ResumeError, match=r"shapes of net.4.bias: \[6\] in the checkpoint, None now; trained: net.4.bias"
    ):
        train(wider, toy_settings(tmp_path))
    assert train(ToyRecipe(), toy_settings(tmp_path, log_every=1, keep_checkpoints=1)).finished


def test_a_constant_rate_may_be_extended(tmp_path: Path) -> None:
    parts = [
        train(ToyRecipe(), toy_settings(tmp_path / "a", schedule="constant", total_steps=steps)) for steps in (4, 6)
    ]
    assert [(part.finished, part.step) for part in parts] == [(True, 4), (True, 6)]
    whole = train(ToyRecipe(), toy_settings(tmp_path / "b", schedule="constant", total_steps=6))
    assert_same(parts[-1].checkpoint, whole.checkpoint)


def test_validation_and_export_on_the_way_change_nothing(tmp_path: Path) -> None:
    class Validating(ToyRecipe):
        def validate(self, step: int) -> dict[str, float]:
            assert not self.net.training and not torch.is_grad_enabled()
            averages.append(self.net.get_parameter("0.weight").clone())
            return {"random": float(torch.rand(()))}

    averages: list[torch.Tensor] = []
    changes = {"validate_every": 5, "checkpoint_every_steps": 2, "export_with_checkpoint": True}
    a = train(Validating(), toy_settings(tmp_path / "a", **changes))
    b = train(ToyRecipe(), toy_settings(tmp_path / "b"))
    assert_same(a.checkpoint, b.checkpoint)
    assert len(averages) == 2
    assert torch.equal(averages[-1], load_file(b.weights / "net.safetensors")["0.weight"])


def test_a_recipe_may_correct_its_weights(tmp_path: Path) -> None:
    class Pinned(ToyRecipe):
        def after_step(self, step: int) -> None:
            self.net.get_parameter("0.bias").zero_()

    result = train(Pinned(), toy_settings(tmp_path))
    saved = load_file(result.checkpoint / "weights.net.safetensors")
    assert not saved["0.bias"].any() and saved["4.bias"].any()


def test_start_from_continues_the_sample_counter(tmp_path: Path) -> None:
    first = train(ToyRecipe(), toy_settings(tmp_path / "a"))
    assert samples_seen(first.weights) == 40

    class Endless(ToyRecipe):
        def __init__(self) -> None:
            super().__init__()
            self.dataset_size = None  # an index is then a slot

    recipe = Endless()
    settings = toy_settings(tmp_path / "b", start_from=first.weights, total_steps=None, total_samples=50)
    result = train(recipe, settings)
    assert (result.step, result.samples) == (3, 52) and recipe.seen[0] == [40, 41, 42, 43]
    again = train(Endless(), settings)  # finished already: nothing more to do
    assert again.finished and again.samples == 52


def test_start_from_that_changes_what_is_frozen_is_refused_before_the_first_step(tmp_path: Path) -> None:
    first = train(ToyRecipe(), toy_settings(tmp_path / "a"))

    class Overwrites(ToyRecipe):
        def load(self, folder: Path) -> None:
            super().load(folder)
            self.fixed.weight.data.add_(1)

    recipe = Overwrites()
    with pytest.raises(ModelError, match="changed a frozen module"):
        train(recipe, toy_settings(tmp_path / "b", start_from=first.weights))
    assert not recipe.seen and not (tmp_path / "b" / "weights").exists()


def test_each_epoch_shows_everything_once(tmp_path: Path) -> None:
    recipe = ToyRecipe()
    train(recipe, toy_settings(tmp_path))
    shown = [i for batch in recipe.seen for i in batch]
    epochs = [shown[0:10], shown[10:20], shown[20:30], shown[30:40]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len({tuple(e) for e in epochs}) == 4


def test_a_step_equals_the_published_equations(tmp_path: Path) -> None:
    """Clip by global norm, AdamW with decoupled decay and bias correction, average with warm-up: written out here."""
    changes = {"total_steps": 6, "clip_grad_norm": 0.3, "weight_decay": 0.1, "schedule": "linear", "ema_decay": 0.3}
    settings = toy_settings(tmp_path, **changes)
    recipe, twin = ToyRecipe(), ToyRecipe()
    for net in (recipe.net, twin.net):
        net[1] = torch.nn.Identity()  # after it a bias has no gradient but rounding, which Adam magnifies
        net[2] = torch.nn.Identity()  # dropout is seeded by the loop
    train(recipe, settings)
    order = DataOrder(settings.seed, 10)
    values = list(twin.net.parameters())
    first, second = [torch.zeros_like(p) for p in values], [torch.zeros_like(p) for p in values]
    average = [p.detach().clone() for p in values]
    for step, rate in enumerate([0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025]):
        slots = range(4 * step, 4 * step + 4)
        loss = twin.loss(twin.batch(order.indices(slots), step), step, StepRandom(settings.seed, step, slots)).total
        gradients = torch.autograd.grad(loss, values)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        assert norm > 0.3  # so that clipping is seen
        decay = min(0.3, (1 + step) / (10 + step))
        for p, g, m, v, a in zip(values, gradients, first, second, average, strict=True):
            g = g * 0.3 / norm
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            corrected = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            p.data.copy_(p.data * (1 - rate * 0.1) - rate * corrected)
            a.copy_(decay * a + (1 - decay) * p.data)
    for p, q in zip(recipe.net.parameters(), values, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    exported = load_file(tmp_path / "weights" / "net.safetensors")
    for (name, _), a in zip(twin.net.named_parameters(), average, strict=True):
        torch.testing.assert_close(exported[name], a, rtol=1e-4, atol=1e-5)


def test_slots_of_a_step_do_not_depend_on_the_number_of_processes() -> None:
    for world in (1, 2, 4):
        shares = [slot for rank in range(world) for slot in slots_of(3, 8, 100, rank, world)]
        assert shares == list(range(124, 132))


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    class Nested(ToyRecipe):
        def loss(self, batch, step, rng):
            train(ToyRecipe(), toy_settings(tmp_path))
            return super().loss(batch, step, rng)

    with pytest.raises(OutputError, match="Another process is at work"):
        train(Nested(), toy_settings(tmp_path))


def test_masters_are_float32_and_something_trains(tmp_path: Path) -> None:
    half, still = ToyRecipe(), ToyRecipe()
    half.net.bfloat16()
    with pytest.raises(ModelError, match="float32"):
        train(half, toy_settings(tmp_path))
    still.net.requires_grad_(False)
    with pytest.raises(ModelError, match="trains nothing"):
        train(still, toy_settings(tmp_path))
