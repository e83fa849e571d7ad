"""The autoencoder with its discriminator: each learns by its own loss alone, and the published balance of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from controlroom.app.cli import main
from controlroom.backbones.patch_discriminator import PatchDiscriminator
from controlroom.core.errors import InputError, ModelError
from controlroom.evaluation.extractors.theatre import TheatreFeatures
from controlroom.signals.readers import AttributeReader
from controlroom.training.randomness import StepRandom
from controlroom.training.recipes.autoencoder import AutoencoderRecipe, AutoencoderSettings
from tests.training.recipe_checks import check_learns, check_moves_only_what_trains, check_resumes, painted

SETTINGS = AutoencoderSettings(
    size=32, channels=(8, 8), layers=1, norm_groups=4, patch_channels=4, patch_layers=2, adversarial_from=1, flip=True
)


def maker(**changes: Any) -> Any:
    settings = SETTINGS.model_copy(update=changes)
    return lambda: settings.build(None, painted(), Path("unused"))


def test_both_networks_move_and_the_export_is_diffusers(tmp_path: Path) -> None:
    recipe = check_moves_only_what_trains(maker(), tmp_path / "run", learning_rate=1e-3, validate_every=2)
    assert isinstance(recipe, AutoencoderRecipe)
    folder = tmp_path / "run/weights"
    loaded: Any = AutoencoderKL.from_pretrained(folder)
    pixels, back = recipe.restored(2)
    with torch.no_grad():
        theirs = loaded.decode(loaded.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        latents = loaded.encode(recipe.shown.batch([0, 1, 2])).latent_dist.mean * loaded.config.scaling_factor
    assert torch.allclose(theirs, back, atol=1e-5)
    assert float(latents.std()) == pytest.approx(1.0, rel=1e-3)
    again = maker()()
    again.load(folder)
    for name, module in recipe.modules().items():
        other = again.modules()[name].state_dict()
        assert all(torch.equal(value, other[key]) for key, value in module.state_dict().items()), name
    with pytest.raises(ModelError, match="another size"):
        maker(channels=(8, 16))().load(folder)
    picture = recipe.preview(0)[0][1]
    assert picture.size == (64, 32)


def test_it_learns_and_continues(tmp_path: Path) -> None:
    check_learns(maker(adversarial_weight=0.0), tmp_path / "run", steps=40, learning_rate=3e-3)
    check_resumes(maker(), tmp_path, learning_rate=1e-3, ema_decay=0.9)


def test_each_network_has_its_own_loss() -> None:
    """What fools the discriminator moves the pictures alone; what teaches it moves it alone. Hinge by hand."""
    torch.manual_seed(0)
    critic = PatchDiscriminator(4, 2)
    real, made = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32, requires_grad=True)
    fooled = critic.fooled(made)
    assert fooled.item() == pytest.approx(critic(made).mean().item(), rel=1e-5)
    fooled.backward()
    assert made.grad is not None and made.grad.abs().max() > 0
    assert all(p.grad is None for p in critic.parameters())
    made.grad = None
    loss = critic.hinge(real, made)
    by_hand = 0.5 * ((1 - critic(real)).clamp_min(0).mean() + (1 + critic(made)).clamp_min(0).mean())
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)
    loss.backward()
    assert made.grad is None and all(p.grad is not None for p in critic.parameters())


def test_loss_is_the_published_one() -> None:
    recipe = maker(adversarial_from=5)()
    with torch.no_grad():
        recipe.spread.log_variance.fill_(0.3)
    batch, rng = recipe.batch([0, 1], 0), StepRandom(1, 0, [0, 1])
    early, late = recipe.loss(batch, 4, rng), recipe.loss(batch, 5, rng)
    with torch.no_grad():
        posterior = recipe.vae.encode(batch).latent_dist
        restored = recipe.vae.decode(posterior.mean + posterior.std * rng.normal("posterior", (4, 16, 16))).sample
        variance = torch.tensor(0.3)
        # Summed over everything, divided by the pictures, as in the published code.
        likelihood = ((restored - batch).abs() / variance.exp() + variance).sum() / len(batch)
        expected = likelihood + 1e-6 * posterior.kl().sum() / len(batch)
    assert early.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert "judged" not in early.parts
    weight, made, judged = (late.parts[key].item() for key in ("adversarial_weight", "made", "judged"))
    assert late.total.item() == pytest.approx(expected.item() + weight * made + judged, rel=1e-5)
    assert made == pytest.approx(-recipe.critic(restored).mean().item(), rel=1e-4)
    # The weight: half of the ratio of both gradients at the last layer.
    restored = recipe.vae.decode(recipe.vae.encode(batch).latent_dist.mean.detach()).sample
    last = recipe.vae.decoder.conv_out.weight
    parts = (restored - batch).abs().sum(), -recipe.critic(restored).mean()
    sizes = [torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in parts]
    assert recipe.balance(*parts).item() == pytest.approx((sizes[0] / (sizes[1] + 1e-4)).clamp(0, 1e4).item(), rel=1e-4)


def test_perceptual_error_reaches_the_network() -> None:
    torch.manual_seed(0)
    reader = AttributeReader({"hat": ["none", "cap"]}, 32, 8)
    recipe = maker(adversarial_weight=0.0)()
    recipe.see_with(TheatreFeatures(reader.requires_grad_(False)))
    batch, rng = recipe.batch([0, 1], 0), StepRandom(1, 0, [0, 1])
    found = recipe.loss(batch, 0, rng)
    assert found.parts["perceptual"] > 0
    recipe.distance = None
    values = batch[0].numel()
    plain = recipe.loss(batch, 0, rng).total
    assert found.total.item() == pytest.approx(plain.item() + values * found.parts["perceptual"].item(), rel=1e-4)
    restored = torch.zeros_like(batch, requires_grad=True)
    distance = TheatreFeatures(reader).distance(restored / 2 + 0.5, batch / 2 + 0.5)
    assert torch.autograd.grad(distance.sum(), restored)[0].abs().max() > 0


def test_patches_see_seventy_pixels() -> None:
    """The published receptive field, by where one verdict's gradient reaches. Without norms, which see everything."""
    critic = PatchDiscriminator(2, 3)
    for name, module in list(critic.layers.named_children()):
        if isinstance(module, nn.GroupNorm):
            setattr(critic.layers, name, nn.Identity())
    pixels = torch.randn(1, 3, 160, 160, requires_grad=True)
    verdicts = critic(pixels)
    middle = verdicts.shape[-1] // 2
    reached = torch.autograd.grad(verdicts[0, 0, middle, middle], pixels)[0][0].abs().sum(0) > 0
    assert int(reached.any(0).sum()) == int(reached.any(1).sum()) == 70


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"size": 33}, "no multiple of 2"),
        ({"channels": (8, 10)}, "no multiple of norm_groups"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        maker(**changes)()


def test_command_trains_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for picture in painted():
        picture.read().save(tmp_path / picture.name)
    line = ["train", "autoencoder", "--data", str(tmp_path), "--out", str(tmp_path / "run")]
    for change in ("size=32", "channels=[8, 8]", "norm_groups=4", "layers=1", "patch_channels=4", "train.threads=1"):
        line += ["--set", change]
    assert main([*line, "--set", "train.total_steps=2", "--set", "train.batch_size=2"]) == 0
    assert (tmp_path / "run/weights/config.json").is_file()
    assert main([*line, "--set", "perceptual=lpips"]) == 2
    assert "no perceptual distance" in capsys.readouterr().err
    assert main([*line, "--model", "theatre"]) == 2
    assert "leave 'theatre' out" in capsys.readouterr().err
