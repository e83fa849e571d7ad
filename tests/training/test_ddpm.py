"""DDPM: the objective and both samplers against the paper's equations and diffusers; what moves; exact resume."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler
from PIL import Image
from torch import Tensor, nn

from controlroom.app.cli import main
from controlroom.core.errors import InputError, ModelError
from controlroom.data.pictures import Picture
from controlroom.sampling.ddpm import DDPM
from controlroom.tasks.train import plan_training
from controlroom.training.loop import train
from controlroom.training.objective import ObjectiveSettings
from controlroom.training.randomness import StepRandom
from controlroom.training.recipes.ddpm import DDPMRecipe, DDPMSettings
from tests.training.recipe_checks import check_learns, check_moves_only_what_trains, check_resumes, loop, painted

SETTINGS = DDPMSettings(
    size=16, channels=(8, 16), layers=1, attention=(8,), norm_groups=4, dropout=0.0, timesteps=20, flip=True
)


def maker(**changes: Any) -> Any:
    settings = SETTINGS.model_copy(update=changes)
    return lambda: settings.build(None, painted(), Path("unused"))


def gradient() -> Picture:
    """Dark on the left, light on the right."""
    row = np.linspace(0, 255, 32).astype(np.uint8)
    picture = Image.fromarray(np.repeat(row[None], 32, 0)).convert("RGB")
    return Picture("gradient.png", "gradient", (32, 32), lambda: picture, repeats=2)


def test_the_network_moves_and_the_export_is_a_pipeline_of_diffusers(tmp_path: Path) -> None:
    recipe = check_moves_only_what_trains(maker(), tmp_path / "run", learning_rate=1e-3)
    assert isinstance(recipe, DDPMRecipe) and not recipe.frozen()
    folder = tmp_path / "run" / "weights"
    ours = DDPM.from_pretrained(folder)
    theirs: Any = DDPMPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    assert ours.shape == (3, 16, 16)
    for steps in (20, 5):
        generators = [torch.Generator().manual_seed(4 + i) for i in range(2)]
        expected = theirs(batch_size=2, generator=generators, num_inference_steps=steps, output_type="np").images
        found = (ours.pixels(2, seed=4, steps=steps) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        assert np.abs(found - expected).max() < 1e-5 and expected.std() > 0.05
    pictures = theirs(batch_size=1, generator=torch.Generator().manual_seed(5), num_inference_steps=20).images
    assert np.array_equal(np.asarray(pictures[0]), np.asarray(ours(2, seed=4)[1]))  # alone as in a batch

    implicit: Any = DDIMPipeline(theirs.unet, theirs.scheduler)
    implicit.set_progress_bar_config(disable=True)
    for eta in (0.0, 0.7):
        one = torch.Generator().manual_seed(9)
        expected = implicit(generator=one, num_inference_steps=5, eta=eta, output_type="np").images
        found = ours.pixels(seed=9, steps=5, solver="ddim", eta=eta)
        found = (found / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        assert np.abs(found - expected).max() < 1e-5

    again = maker()()
    again.load(folder)
    assert all(torch.equal(v, recipe.unet.state_dict()[k]) for k, v in again.unet.state_dict().items())
    with pytest.raises(ModelError, match="another size"):
        maker(channels=(8, 24))().load(folder)


def test_it_learns_and_continues(tmp_path: Path) -> None:
    check_learns(maker(), tmp_path / "run", steps=40, learning_rate=3e-3)
    check_resumes(maker(dropout=0.1), tmp_path, learning_rate=1e-3, ema_decay=0.9)


def test_the_loss_is_the_papers() -> None:
    """Equation 14, written out: the squared error of the noise in x_t of each picture, all timesteps alike."""
    recipe = maker()()
    batch, rng = recipe.batch([0, 1, 2], 0), StepRandom(5, 0, [7, 8, 9])
    noise, t = rng.normal("noise", (3, 16, 16)), rng.integers("timestep", 0, 20)
    betas = np.linspace(1e-4, 0.02, 20)
    expected = 0.0
    with torch.no_grad():
        for row in range(3):
            bar = float(np.prod(1 - betas[: int(t[row]) + 1]))
            noisy = bar**0.5 * batch[row] + (1 - bar) ** 0.5 * noise[row]
            told = recipe.unet(noisy[None], t[row : row + 1]).sample[0]
            expected += float(((told - noise[row]) ** 2).mean()) / 3
        assert float(recipe.loss(batch, 0, rng).total) == pytest.approx(expected, rel=1e-5)


def test_pictures_lie_between_minus_one_and_one_and_are_mirrored() -> None:
    recipe = SETTINGS.build(None, [gradient(), *painted()], Path("unused"))
    assert recipe.dataset_size == 10  # one is shown twice, and each mirrored
    batch = recipe.batch([0, 1, 5, 2], 0)
    assert batch.shape == (4, 3, 16, 16) and -1 <= batch.min() < -0.9 and 0.9 < batch.max() <= 1
    assert torch.equal(batch[0], batch[1]) and torch.equal(batch[2], batch[0].flip(-1))
    assert batch[0, 0, 0, 0] < batch[0, 0, 0, -1]
    assert recipe.names([0, 5, 2]) == ("gradient.png", "gradient.png", "red.png")


class Exact(nn.Module):
    """The best there is for numbers of a normal distribution: E[ε | x_t], in closed form."""

    def __init__(self, mean: float, std: float, alpha_bar: Tensor) -> None:
        super().__init__()
        self.mean, self.std, self.alpha_bar = mean, std, alpha_bar
        self.config = SimpleNamespace(sample_size=64, in_channels=3)
        self.none = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor) -> SimpleNamespace:
        bar = self.alpha_bar[int(t)]
        variance = bar * self.std**2 + 1 - bar
        return SimpleNamespace(sample=(1 - bar).sqrt() * (x - bar.sqrt() * self.mean) / variance)


@pytest.mark.parametrize(("solver", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0)])
def test_with_the_exact_network_the_exact_distribution_is_drawn(solver: Any, eta: float) -> None:
    scheduler = DDPMScheduler(clip_sample=False)
    model = DDPM(Exact(0.3, 0.2, scheduler.alphas_cumprod), scheduler)
    drawn = model.pixels(2, steps=1000, solver=solver, eta=eta)
    # The posterior's variance is a lower bound of the true one: a thousand steps fall short by a fortieth.
    assert float(drawn.mean()) == pytest.approx(0.3, abs=0.01) and float(drawn.std()) == pytest.approx(0.2, abs=0.007)


def test_ancestral_sampling_draws_from_the_posteriors() -> None:
    """Algorithm 2 with the mean of q(x_{t−1} | x_t, x_0), equations 6 and 7, at the network's guess of x_0."""
    betas = torch.linspace(1e-4, 0.02, 12, dtype=torch.float64)
    bars = (1 - betas).cumprod(0)
    scheduler = DDPMScheduler(num_train_timesteps=12, clip_sample=False)
    network = Exact(0.1, 0.5, scheduler.alphas_cumprod)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 3, 64, 64, generator=generator).double()
    for t in reversed(range(12)):
        eps = network(x.float(), torch.tensor(t)).sample.double()
        clean = (x - (1 - bars[t]).sqrt() * eps) / bars[t].sqrt()
        before = bars[t - 1] if t else torch.tensor(1.0)
        x = (before.sqrt() * betas[t] * clean + (1 - betas[t]).sqrt() * (1 - before) * x) / (1 - bars[t])
        if t:
            spread = ((1 - before) / (1 - bars[t]) * betas[t]).sqrt()
            x = x + spread * torch.randn(1, 3, 64, 64, generator=generator)
    torch.testing.assert_close(DDPM(network, scheduler).pixels(seed=3).double(), x, atol=1e-4, rtol=0)


def test_a_schedule_that_ends_in_noise_is_learned_and_written(tmp_path: Path) -> None:
    objective = ObjectiveSettings(prediction="v_prediction", zero_terminal_snr=True)
    recipe = maker(objective=objective)()
    assert float(recipe.objective.alpha_bar[-1]) == 0.0
    train(recipe, loop(tmp_path, total_steps=1))
    model = DDPM.from_pretrained(tmp_path / "weights")
    assert model.scheduler.config.prediction_type == "v_prediction"
    assert float(model.scheduler.alphas_cumprod[-1]) < 1e-6
    assert model(steps=4)[0].size == (16, 16)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no picture"):
        SETTINGS.build(None, [], tmp_path)
    with pytest.raises(InputError, match="17 x 17 is no multiple of 2"):
        SETTINGS.model_copy(update={"size": 17}).network()
    with pytest.raises(InputError, match="channels has 10"):
        SETTINGS.model_copy(update={"channels": (8, 10)}).network()
    with pytest.raises(ModelError, match="does not hold a DDPM"):
        DDPM.from_pretrained(tmp_path)
    model = maker()().model()
    for wrong, said in (
        ({"steps": 21}, "1 to 20"),
        ({"count": 0}, "at least one picture"),
        ({"eta": 0.5}, "is for ddim"),
        ({"solver": "euler"}, "choose ddpm or ddim"),
    ):
        with pytest.raises(InputError, match=said):
            model.pixels(**wrong)


def test_the_command_trains_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for picture in painted():
        picture.read().save(tmp_path / picture.name)
    changes = ["size=16", "channels=[8, 16]", "norm_groups=4", "layers=1", "timesteps=20"]
    changes += ["train.total_steps=2", "train.batch_size=2", "train.threads=1", "train.preview_every=2"]
    line = ["train", "ddpm", "-d", str(tmp_path), "-o", str(tmp_path / "run")]
    line += [part for change in changes for part in ("--set", change)]
    assert main([*line, "--dry-run", "--json"]) == 0
    assert "model" not in json.loads(capsys.readouterr().out)
    assert main(line) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert len(DDPM.from_pretrained(folder)(2, steps=2, solver="ddim")) == 2
    assert len(list((tmp_path / "run/previews").glob("*.png"))) == 4
    with pytest.raises(InputError, match="makes a model of its own"):
        plan_training("ddpm", data=str(tmp_path), model="theatre")
