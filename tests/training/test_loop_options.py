"""What the loop may be asked for besides: parts of a batch, recomputing, previews, TensorBoard, names of samples."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from controlroom.core.errors import InputError
from controlroom.training.checkpoint import file_hash
from controlroom.training.loop import DivergedError, train
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses
from controlroom.training.recompute import offering, recomputes, recomputing
from tests.tiny import tiny_text_encoder, tiny_unet
from tests.training.toy_recipe import ToyRecipe, toy_settings


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {f"{p.name}:{k}": v for p in checkpoint.glob("*.safetensors") for k, v in load_file(p).items()}


def assert_same(a: Path, b: Path) -> None:
    left, right = tensors(a), tensors(b)
    assert left and left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# -- parts of a batch -------------------------------------------------------------------------------------------------


class Plain(ToyRecipe):
    """Nothing that depends on the size of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net[1], self.net[2] = torch.nn.Identity(), torch.nn.Identity()


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_batch_in_parts_is_the_same_step(tmp_path: Path, prefetch: bool) -> None:
    whole, parted = Plain(), Plain()
    a = train(whole, toy_settings(tmp_path / "a", clip_grad_norm=0.1))
    b = train(parted, toy_settings(tmp_path / "b", clip_grad_norm=0.1, accumulate=2, prefetch=prefetch))
    assert a.step == b.step and a.samples == b.samples and len(parted.seen) == 2 * len(whole.seen)
    assert [first + second for first, second in zip(parted.seen[::2], parted.seen[1::2], strict=True)] == whole.seen
    left, right = tensors(a.checkpoint), tensors(b.checkpoint)
    for key, value in left.items():
        torch.testing.assert_close(right[key], value, rtol=1e-4, atol=1e-6, msg=key)
    assert b.losses["error"] == pytest.approx(a.losses["error"], rel=1e-4)


def test_a_batch_in_parts_resumes_bit_equal(tmp_path: Path) -> None:
    changes = {"schedule": "constant", "accumulate": 2}
    whole = train(ToyRecipe(), toy_settings(tmp_path / "a", **changes))
    train(ToyRecipe(), toy_settings(tmp_path / "b", **changes, total_steps=3))
    assert_same(whole.checkpoint, train(ToyRecipe(), toy_settings(tmp_path / "b", **changes)).checkpoint)


def test_parts_must_be_equal(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="no multiple of accumulate"):
        toy_settings(tmp_path, accumulate=3)


# -- checkpoints from before these options ----------------------------------------------------------------------------


def test_a_checkpoint_of_before_goes_on(tmp_path: Path) -> None:
    """Earlier versions wrote neither processes nor numbers of the optimizer, and knew fewer settings."""
    settings = toy_settings(tmp_path / "b", schedule="constant")
    whole = train(ToyRecipe(), toy_settings(tmp_path / "a", schedule="constant"))
    stopped = train(ToyRecipe(), settings.model_copy(update={"total_steps": 4}))
    path = stopped.checkpoint / "state.json"
    state = json.loads(path.read_text())
    del state["processes"], state["optimizer_numbers"]
    for name in ("accumulate", "gradient_checkpointing", "schedule_cycles", "schedule_power", "log_to"):
        del state["settings"][name]
    assert not {"schedule_cycles", "schedule_power", "accumulate"} & set(state["identity"])
    path.write_text(json.dumps(state))
    manifest = json.loads((stopped.checkpoint / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"sha256": file_hash(path), "size": path.stat().st_size}
    (stopped.checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert_same(whole.checkpoint, train(ToyRecipe(), settings).checkpoint)


# -- recomputing ------------------------------------------------------------------------------------------------------


class Painting(ToyRecipe):
    """A tiny UNet learns, through a text encoder that learns too."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = tiny_unet()
        self.words = tiny_text_encoder()
        self.passes = 0
        self.unet.mid_block.resnets[1].register_forward_pre_hook(lambda *_: self._passed())

    def _passed(self) -> None:
        self.passes += 1

    def modules(self) -> dict[str, torch.nn.Module]:
        return {"unet": self.unet, "words": self.words}

    def frozen(self) -> dict[str, torch.nn.Module]:
        return {}

    def batch(self, indices, step: int) -> torch.Tensor:
        return torch.tensor([[index, index + 1, 3] for index in indices])

    def loss(self, batch: torch.Tensor, step: int, rng: StepRandom) -> Losses:
        noise = rng.normal("noise", (4, 8, 8))
        hidden = self.words(batch).last_hidden_state
        return Losses((self.unet(noise, torch.tensor(5), hidden).sample - noise.roll(1, 0)).square().mean())

    def export(self, folder: Path) -> None:
        save_file({"a": torch.zeros(1)}, folder / "a.safetensors")


def test_recomputing_gives_the_same_weights(tmp_path: Path) -> None:
    keeping, again = Painting(), Painting()
    changes = {"total_steps": 2, "batch_size": 2}
    a = train(keeping, toy_settings(tmp_path / "a", **changes))
    b = train(again, toy_settings(tmp_path / "b", **changes, gradient_checkpointing=True))
    assert (keeping.passes, again.passes) == (2, 4)
    assert_same(a.checkpoint, b.checkpoint)
    assert not recomputes(again.unet) and not recomputes(again.words)


def test_what_can_recompute_is_found_within(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = Painting()
    holder = torch.nn.ModuleDict({"inner": torch.nn.ModuleList([recipe.unet]), "other": torch.nn.Linear(2, 2)})
    assert offering(holder) == [recipe.unet] and offering(torch.nn.Linear(2, 2)) == []
    recipe.unet.enable_gradient_checkpointing()
    with recomputing([holder, recipe.words]) as count:
        assert count == 1 and recomputes(recipe.words)
    assert recomputes(recipe.unet) and not recomputes(recipe.words)
    train(ToyRecipe(), toy_settings(tmp_path, total_steps=1, gradient_checkpointing=True))
    assert "no module can recompute" in capsys.readouterr().err


# -- previews ---------------------------------------------------------------------------------------------------------


class Drawing(ToyRecipe):
    """Draws with every global generator there is."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[tuple[float, float, float]] = []

    def preview(self, step: int) -> list[tuple[str, Image.Image]]:
        assert not self.net.training and not torch.is_grad_enabled()
        self.drawn.append((float(torch.rand(())), float(np.random.random()), random.random()))
        return [("a cat/in a hat", Image.new("RGB", (4, 3), (step, 0, 0))), ("plain", Image.new("L", (2, 2)))]


def test_previews_do_not_disturb_the_run(tmp_path: Path) -> None:
    recipe = Drawing()
    np.random.seed(4)
    random.seed(4)
    expected = (np.random.random(), random.random())
    np.random.seed(4)
    random.seed(4)
    a = train(recipe, toy_settings(tmp_path / "a", preview_every=4))
    b = train(ToyRecipe(), toy_settings(tmp_path / "b"))
    assert_same(a.checkpoint, b.checkpoint)
    assert (np.random.random(), random.random()) == expected
    assert len(recipe.drawn) == 2 and recipe.drawn[0] == recipe.drawn[1]
    names = sorted(path.name for path in (tmp_path / "a" / "previews").iterdir())
    assert names == [
        "step-00000004-a-cat-in-a-hat.png",
        "step-00000004-plain.png",
        "step-00000008-a-cat-in-a-hat.png",
        "step-00000008-plain.png",
    ]
    with Image.open(tmp_path / "a" / "previews" / names[2]) as picture:
        assert picture.size == (4, 3) and picture.getpixel((0, 0)) == (8, 0, 0)
    assert '"event": "previews"' in (tmp_path / "a" / "log.jsonl").read_text()


# -- logs -------------------------------------------------------------------------------------------------------------


def test_tensorboard_has_the_numbers_of_the_log(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Both(Drawing):
        def validate(self, step: int) -> dict[str, float]:
            return {"distance": step / 2}

    changes = {"schedule": "constant", "log_to": ("jsonl", "tensorboard"), "validate_every": 4, "preview_every": 4}
    train(Both(), toy_settings(tmp_path, **changes, total_steps=4))
    train(Both(), toy_settings(tmp_path, **changes, total_steps=8))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    shown = {event.step: event.value for event in board.Scalars("train/loss")}
    assert shown == {line["step"]: pytest.approx(line["loss"], rel=1e-6) for line in steps} and len(shown) == 2
    assert [(e.step, e.value) for e in board.Scalars("validation/distance")] == [(4, 2.0), (8, 4.0)]
    assert {"train/learning_rate", "train/gradient_norm"} <= set(board.Tags()["scalars"])
    assert board.Tags()["images"] == ["preview/a cat/in a hat", "preview/plain"]


def test_a_missing_tensorboard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        train(ToyRecipe(), toy_settings(tmp_path, log_to=("tensorboard",)))
    train(ToyRecipe(), toy_settings(tmp_path / "none", log_to=()))
    assert not (tmp_path / "none" / "log.jsonl").exists()


# -- not finite -------------------------------------------------------------------------------------------------------


class Bad(Plain):
    """One sample makes the loss, or only its gradient, not finite."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def names(self, indices) -> list[str]:
        return [f"{index}.png" for index in indices]

    def loss(self, batch, step, rng):
        losses = super().loss(batch, step, rng)
        if 15 not in rng.slots:
            return losses
        if self.where == "loss":
            return Losses(losses.total * float("nan"))
        return Losses(losses.total.detach() + torch.sqrt(losses.total - losses.total.detach()))


@pytest.mark.parametrize(("where", "slots"), [("loss", [14, 15]), ("gradient", [12, 13, 14, 15])])
def test_what_was_not_finite_is_named(tmp_path: Path, where: str, slots: list[int]) -> None:
    recipe = Bad(where)
    settings = toy_settings(tmp_path, accumulate=2, checkpoint_every_steps=2)
    with pytest.raises(DivergedError, match=rf"step 3 \(slots {slots[0]} to 15, data \[\d.png, ") as caught:
        train(recipe, settings)
    record = json.loads((tmp_path / "diverged-step-00000003.json").read_text())
    assert record["slots"] == slots and record["indices"] == list(caught.value.indices)
    assert record["names"] == [f"{index}.png" for index in record["indices"]]
    assert record["checkpoint"].endswith("step-00000002") and not (tmp_path / "step-00000003").exists()
    again = train(Plain(), settings)  # without what was wrong it goes on from there
    assert again.finished
    assert_same(again.checkpoint, train(Plain(), settings.model_copy(update={"output_dir": tmp_path / "b"})).checkpoint)
