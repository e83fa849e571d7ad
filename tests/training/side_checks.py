"""What every recipe of a network beside the frozen UNet must show: that a run sees what the training saw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import controlroom as cr
from controlroom.core.control import Control
from controlroom.training.conditioned_recipe import ConditionedSettings
from tests.tiny import BACKBONES, tiny_sd1
from tests.training.scenery import scenery

DRAW: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 4.0}
SIZE = {"height": 32, "width": 32}


def maker(
    settings: ConditionedSettings, folder: Path, backbone: str = "sd1", pictures: Any = None, **changes: Any
) -> Callable[[], Any]:
    """Builds the recipe of these settings on a miniature, for small pictures."""
    pipe = cr.Pipeline.from_diffusers(BACKBONES[backbone]())
    changed = type(settings)(**{**dict(settings), **changes})
    return lambda: changed.build(pipe, pictures or scenery(), folder)


def check_predicts_as_a_run(
    recipe: Any, control: Control, backbone: str = "sd1", differs: float = 1e-2, without_words: float = 1.0
) -> None:
    """What the recipe predicts of its first picture's conditions is what the engine predicts with ``control``.

    Args:
        differs: at least so much, in standard deviations, from what the UNet predicts alone.
        without_words: factor of the conditions that the branch without words sees.
    """
    batch = recipe.batch([0], 0)
    pipe = cr.Pipeline.from_diffusers(BACKBONES[backbone]())
    seen: list[torch.Tensor] = []
    handle = pipe.unet.register_forward_hook(lambda m, a, o: seen.extend([a[0], a[1], o[0]]))
    settings: dict[str, Any] = {**DRAW, **SIZE, "num_inference_steps": 1, "negative_prompt": ""}
    pipe(batch.shown.prompts[0], controls=[control], seed=3, **settings)
    handle.remove()
    noisy, t, expected = seen  # rows: without words, with words
    condition = recipe.base.condition(["", batch.shown.prompts[0]])
    maps = torch.cat([without_words * batch.maps, batch.maps])
    with torch.no_grad():
        found = recipe.predict(noisy, t.expand(2), condition, maps)
        without = recipe.base.predict(noisy, t.expand(2), condition)
    assert (found - expected).abs().max() < 1e-4 * expected.std()
    assert (without - expected).abs().max() > differs * expected.std()


def check_draws(weights: Control, seed: int = 4) -> torch.Tensor:
    """Latents of a run of two steps with a control, which it changes."""
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    found = pipe("a cat", controls=[weights], seed=seed, **SIZE, **DRAW).images
    plain = pipe("a cat", seed=seed, **SIZE, **DRAW).images
    assert (found - plain).abs().max() > 1e-3 * found.std()
    return found


def check_goes_on(recipe: Any, make: Callable[..., Callable[[], Any]], weights: Path) -> None:
    """From what it exported: by the loop, or with its shape, as the setting start_from."""
    again, taken = make()(), make(start_from=str(weights))()
    again.load(weights)
    for key, value in recipe.net.state_dict().items():
        assert torch.equal(value, again.net.state_dict()[key]) and torch.equal(value, taken.net.state_dict()[key])
    assert all(p.requires_grad for p in taken.net.parameters())
