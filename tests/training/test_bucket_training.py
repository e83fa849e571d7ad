"""Folder, buckets and cache in the loop: a run that was stopped and resumed is bit-equal to an unbroken one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from controlroom.data.kohya_folder import training_pictures
from controlroom.data.pictures import fingerprint
from controlroom.training.buckets import BucketOrder, Buckets
from controlroom.training.loop import train
from controlroom.training.picture_cache import PictureCache, PictureLatents
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses
from controlroom.training.settings import TrainSettings
from tests.data.folders import paint, paint_mask
from tests.tiny import tiny_vae

BATCH = 2


class Denoise:
    """Predicts the noise in latents of whatever size; counts only what the mask shows."""

    name = "denoise_folder"

    def __init__(self, folder: Path, cache: Path) -> None:
        self.pictures, self.buckets = training_pictures(folder), Buckets(32, 8)
        self.cache = PictureCache(cache, tiny_vae())
        self.order = BucketOrder.of(self.pictures, self.buckets, BATCH, seed=4)
        self.sizes: list[tuple[int, int]] = []
        torch.manual_seed(0)
        self.net = nn.Conv2d(4, 4, 3, padding=1)

    def modules(self) -> dict[str, nn.Module]:
        return {"net": self.net}

    def frozen(self) -> dict[str, nn.Module]:
        return {"vae": self.cache.vae}

    def fingerprint(self) -> str:
        return fingerprint(self.pictures)

    def batch(self, indices: Sequence[int], step: int) -> PictureLatents:
        shown = [self.pictures[index] for index in self.order.indices(indices)]
        return self.cache.read([(picture, self.buckets.crop(picture)) for picture in shown])

    def loss(self, batch: PictureLatents, step: int, rng: StepRandom) -> Losses:
        self.sizes.append(batch.size)
        shape = batch.mean.shape[1:]
        noise = rng.normal("noise", shape)
        error = self.net(batch.latents(rng.normal("posterior", shape)) + noise) - noise
        return Losses((error.square() * batch.mask).mean())

    def export(self, folder: Path) -> None:
        save_file(self.net.state_dict(), folder / "net.safetensors")


@pytest.mark.parametrize("ahead", [False, True])
def test_resumed_is_unbroken(tmp_path: Path, ahead: bool) -> None:
    folder = tmp_path / "set"
    for number, size in enumerate(((40, 40), (30, 30), (64, 20), (66, 21), (20, 60))):
        paint(folder / f"{1 + number % 2}_thing {number % 2}" / f"{number}.png", (number * 50, 90, 20), size)
    paint_mask(folder / "1_thing 0" / "mask" / "0.png", (20, 20))

    def run(name: str, steps: int) -> Denoise:
        recipe = Denoise(folder, tmp_path / "cache")
        settings = TrainSettings(
            output_dir=tmp_path / name, seed=4, total_steps=steps, batch_size=BATCH, learning_rate=1e-2, prefetch=ahead
        )
        assert train(recipe, settings).finished
        return recipe

    whole = run("whole", 9)
    assert whole.order.steps_per_epoch == 5 and len(set(whole.sizes)) == 3
    first = run("broken", 3)
    shutil.rmtree(tmp_path / "cache")  # deleted in between: made again, to the same bits
    second = run("broken", 9)
    assert first.sizes + second.sizes == whole.sizes
    both = [load_file(tmp_path / name / "weights" / "net.safetensors") for name in ("whole", "broken")]
    assert all(torch.equal(both[0][key], both[1][key]) for key in both[0])
