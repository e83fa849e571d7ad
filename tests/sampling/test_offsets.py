"""A branch that is shown other latents than its state's, for one step."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from controlroom.core.control import Control
from controlroom.core.step import Step
from controlroom.sampling.pipeline import Pipeline
from tests.tiny import tiny_sd1

DRAW: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent", "seed": 5, "height": 16, "width": 16}


class Aside(Control):
    """Shows the prompt's branch brighter latents in the first step."""

    type: Literal["aside"] = Field(default="aside", kw_only=True)

    def before(self, step: Step) -> None:
        if step.i == 0:
            step.offsets["cond"] = torch.full_like(step.latents["image"], 0.5)


def test_one_branch_is_moved_and_the_solver_is_not() -> None:
    pipe = Pipeline.from_diffusers(tiny_sd1())
    result = pipe("a cat", controls=[Aside()], **DRAW).images
    source: Any = tiny_sd1()
    source.scheduler.set_timesteps(3)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        cond, uncond = source.encode_prompt("a cat", "cpu", 1, True)
        for i, t in enumerate(source.scheduler.timesteps):
            shown = torch.cat([x, x + 0.5 if i == 0 else x])
            eps_u, eps_c = source.unet(shown, t, torch.cat([uncond, cond])).sample.chunk(2)
            x = source.scheduler.step(eps_u + 7.5 * (eps_c - eps_u), t, x).prev_sample
    assert (result - x).abs().max() < 1e-5 * x.std()
    assert (result - pipe("a cat", **DRAW).images).abs().max() > 1e-2 * x.std()


def test_in_the_units_of_the_solver() -> None:
    """Euler keeps latents that are scaled for the network: so is what is added."""
    pipe = Pipeline.from_diffusers(tiny_sd1())
    seen: list[torch.Tensor] = []

    class Seen(Aside):
        def before(self, step: Step) -> None:
            plain = step.sample("cond")
            super().before(step)
            seen.append((step.sample("cond") - plain) / step.scaled(torch.ones(())))
            assert torch.equal(step.sample("uncond"), plain)

    pipe("a cat", controls=[Seen()], scheduler="euler", **DRAW)
    torch.testing.assert_close(seen[0], torch.full_like(seen[0], 0.5))
    assert not seen[1].any()
