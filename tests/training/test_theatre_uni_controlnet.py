"""The recipe of Uni-ControlNet on tiny networks: what is left out, what a run predicts, that the exports act."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from controlroom.backbones.uni_controlnet import KINDS
from controlroom.controls.spatial.uni_controlnet import UniControlNet
from controlroom.core.errors import InputError
from controlroom.data.theatre.conditions import condition
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import sample_scene
from controlroom.training.assemble import PARTS, assemble
from controlroom.training.loop import train
from controlroom.training.randomness import StepRandom
from controlroom.training.recipes.theatre_uni_controlnet import TheatreUniControlNet
from controlroom.training.settings import TrainSettings
from controlroom.training.side_networks import kept
from controlroom.training.theatre import STAGES
from tests.training.theatre_parts import pipeline

TWO = ("canny", "depth")


def make(parts: Path, part: Any, kinds: tuple[str, ...] = TWO) -> TheatreUniControlNet:
    return TheatreUniControlNet(
        parts / "unet", parts / "vae", parts / "clip", parts / "cache", part, scenes=4, kinds=kinds
    )


def awake(recipe: TheatreUniControlNet) -> None:
    """What starts at zero is random, so that something is seen of it."""
    with torch.no_grad():
        for name, parameter in recipe.adapter.named_parameters():
            if "zero" in name:
                parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(len(name)))


def test_conditions_are_left_out_as_published() -> None:
    found = kept(StepRandom(0, 0, range(20_000)), 3)
    assert set(found.unique().tolist()) == {0.0, 1.0}
    counts = found.sum(1)
    # All kept: 0.1 + 0.8 / 8; all left out likewise; each one kept: 0.1 + 0.8 / 2.
    assert float((counts == 3).float().mean()) == pytest.approx(0.2, abs=0.01)
    assert float((counts == 0).float().mean()) == pytest.approx(0.2, abs=0.01)
    assert found.mean(0).tolist() == pytest.approx([0.5] * 3, abs=0.012)
    assert float((found[:, 0] * found[:, 1]).mean()) == pytest.approx(0.1 + 0.8 / 4, abs=0.01)


@pytest.mark.parametrize("part", ["local", "global"])
def test_training_predicts_what_a_run_predicts(part: Any, parts: Path) -> None:
    """One step without guidance: the recipe's prediction is the engine's, on the scene's maps or picture."""
    recipe, scene, seen = make(parts, part), sample_scene(1), []
    awake(recipe)
    batch, unet = recipe.batch([1], 0), recipe.scenes.unet
    handle = unet.register_forward_hook(lambda m, a, o: seen.extend([a[0], a[1], o[0]]))
    words = recipe.scenes.conditioner.tokenizer.decode(batch.ids[0], skip_special_tokens=True)
    images: dict[str, Any] = {kind: condition(scene, kind).picture for kind in TWO} if part == "local" else {}
    control = UniControlNet(
        {part: recipe.adapter.eval()},
        images,
        render(scene) if part == "global" else None,
        image_encoder=recipe.encoder,
    )
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent", "seed": 3}
    pipeline(parts, unet)(words, controls=[control], **settings)
    handle.remove()
    given, t, expected = seen
    with torch.no_grad():
        found = recipe.predict(batch, given, t.expand(1))
        without = recipe.scenes.alone(batch, given, t.expand(1))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - without).abs().max() > 1e-3


def test_loss_zeroes_the_channels_of_what_is_left_out(parts: Path) -> None:
    recipe = make(parts, "local")
    awake(recipe)
    batch, rng = recipe.batch([0, 1, 2, 3], 0), StepRandom(0, 0, range(4))
    keep = kept(rng, 2)
    assert 0 < float(keep.mean()) < 1
    dropped = recipe.dropped(batch, rng)
    for row in range(4):
        for number in range(2):
            channels = slice(3 * number, 3 * number + 3)
            assert torch.equal(dropped.maps[row, channels], keep[row, number] * batch.maps[row, channels])
    noise, t = rng.normal("noise", (4, 16, 16)), rng.integers("timestep", 0, 1000)
    bar, expected = recipe.scenes.objective.alpha_bar[t].reshape(4, 1, 1, 1), 0.0
    with torch.no_grad():
        noisy = bar.sqrt() * batch.latents + (1 - bar).sqrt() * noise
        each = (recipe.predict(dropped, noisy, t) - noise).square().mean(dim=(1, 2, 3))
        for row in range(4):
            snr = float(bar[row] / (1 - bar[row]))
            expected += float(each[row]) * min(snr, 5.0) / snr / 4
        assert float(recipe.loss(batch, 0, rng).total) == pytest.approx(expected, rel=1e-4)


def test_both_stages_train_and_the_exports_act_together(parts: Path, tmp_path: Path) -> None:
    for part in ("local", "global"):
        recipe = make(parts, part)
        before = {k: p.detach().clone() for k, p in recipe.adapter.named_parameters()}
        _, values = STAGES[f"uni_{part}"]
        short = {**values, "total_steps": 3, "batch_size": 2, "validate_every": 3, "warmup_steps": 0}
        short.pop("total_samples")
        result = train(recipe, TrainSettings(output_dir=tmp_path / f"uni_{part}", **short))
        still = [k for k, p in recipe.adapter.named_parameters() if torch.equal(before[k], p)]
        # Norms that the copy has and FDN uses move too; nothing of it stays behind.
        assert still == []
        assert not any(p.requires_grad for module in recipe.frozen().values() for p in module.parameters())
        log = (tmp_path / f"uni_{part}/log.jsonl").read_text()
        assert "held_out" in log and "unet_alone" in log and ("held_out_depth" in log) is (part == "local")
        again = make(parts, part)
        again.load(result.weights)
    assert (PARTS["uni_local"], PARTS["uni_global"]) == ("uni_controlnet/local", "uni_controlnet/global")
    for part in ("local", "global"):
        assemble(tmp_path, tmp_path / "assets", f"uni_{part}")
    pipe = pipeline(parts, UNet2DConditionModel.from_pretrained(parts / "unet"))
    settings = {"num_inference_steps": 2, "output_type": "latent", "seed": 3}
    drawn = []
    for index in (0, 1):
        scene = sample_scene(index)
        images = {"canny": condition(scene, "canny").picture}
        control = UniControlNet(str(tmp_path / "assets/uni_controlnet"), images, render(scene))
        drawn.append(pipe("", controls=[control], **settings).images)
    assert torch.isfinite(drawn[0]).all() and not torch.equal(drawn[0], drawn[1])


def test_knows_all_eight_unless_told_and_refuses_others(parts: Path) -> None:
    assert make(parts, "local", KINDS).adapter.kinds == KINDS
    with pytest.raises(InputError, match="canny, soft_edge"):
        make(parts, "local", ("hed",))
    with pytest.raises(InputError, match="part"):
        make(parts, "both")
