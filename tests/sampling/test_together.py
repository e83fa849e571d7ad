"""The first five controls in one run: any order, any of them neutral, batches, windows, and no trace."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from controlroom.controls.editing.prompt_to_prompt import PromptToPrompt
from controlroom.controls.guidance.attend_and_excite import AttendAndExcite
from controlroom.controls.personal.ip_adapter import IPAdapter
from controlroom.controls.pose.appearance import AppearanceControl
from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.core.control import Control
from controlroom.sampling.pipeline import Pipeline
from tests.controls.nets import tiny_controlnet, tiny_image_encoder, tiny_ip_adapter
from tests.tiny import BACKBONES
from tests.traces import traces

PROMPT = "a red cat"
DRAW: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent", "seed": 5, "height": 16, "width": 16}
NAMES = ("controlnet", "ip_adapter", "prompt_to_prompt", "attend_and_excite", "appearance_control")
NEUTRAL: dict[str, dict[str, Any]] = {
    "controlnet": {"scale": 0.0},
    "ip_adapter": {"scale": 0.0},
    "prompt_to_prompt": {"cross_replace": 0.0, "self_replace": 0.0},
    "attend_and_excite": {"step_size": 0.0},
    "appearance_control": {"scale": 0.0},
}
# Each control is moved from every place to another one.
ORDERS = ((0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2, 4, 1, 0, 3), (3, 0, 4, 2, 1))


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((16, 16), Image.Resampling.BICUBIC)


class Stage:
    """A miniature with what the five controls need, in float64: gradients of random weights multiply rounding."""

    def __init__(self, kind: str) -> None:
        plain, dtype = BACKBONES[kind](), torch.float64
        self.pipe = Pipeline.from_diffusers(plain).to(dtype)
        self.net = tiny_controlnet(plain.unet).to(dtype)
        self.writer = BACKBONES[kind](seed=9).unet.to(dtype)
        self.encoder = tiny_image_encoder().to(dtype)
        self.adapter = tiny_ip_adapter(plain.unet)

    @property
    def nets(self) -> tuple[Any, ...]:
        return self.net, self.writer, self.encoder

    def control(self, name: str, seed: int = 0, **settings: Any) -> Control:
        """One of the five; ``seed`` chooses its picture or its source."""
        make: dict[str, Callable[..., Control]] = {
            "controlnet": lambda **s: ControlNet(**{"model": self.net, "image": picture(seed), **s}),
            "ip_adapter": lambda **s: IPAdapter(
                **{"model": self.adapter, "image": picture(seed + 10), "image_encoder": self.encoder, **s}
            ),
            "prompt_to_prompt": lambda **s: PromptToPrompt(
                **{"source": "a green dog", "cross_replace": 0.7, "self_replace": 0.7, **s}
            ),
            "attend_and_excite": lambda **s: AttendAndExcite(
                **{"words": ["cat"], "iterations": 2, "thresholds": {1: 0.6}, "refinements": 2, "step_size": 5.0, **s}
            ),
            "appearance_control": lambda **s: AppearanceControl(
                **{"model": self.writer, "image": picture(seed + 20), **s}
            ),
        }
        return make[name](**settings)

    def five(self, order: tuple[int, ...] = ORDERS[0], **changed: dict[str, Any]) -> list[Control]:
        return [self.control(NAMES[i], **changed.get(NAMES[i], {})) for i in order]

    def draw(self, controls: list[Control], prompt: Any = PROMPT, **settings: Any) -> Any:
        return self.pipe(prompt, controls=controls, **{**DRAW, **settings})


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    return {kind: Stage(kind) for kind in BACKBONES}


@pytest.fixture(scope="module")
def all_five(stages: dict[str, Stage]) -> dict[str, Any]:
    return {kind: stage.draw(stage.five()) for kind, stage in stages.items()}


@pytest.mark.parametrize("order", ORDERS[1:])
@pytest.mark.parametrize("kind", BACKBONES)
def test_order_of_the_list_does_not_matter(kind: str, order: tuple[int, ...], stages: Any, all_five: Any) -> None:
    expected = all_five[kind]
    result = stages[kind].draw(stages[kind].five(order))
    assert torch.isfinite(expected.images).all()
    assert (result.images - expected.images).abs().max() <= 1e-7 * expected.images.std()
    assert (result.states["source"] - expected.states["source"]).abs().max() <= 1e-7
    assert result.manifest["cost"] == expected.manifest["cost"]


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("name", NAMES)
def test_each_acts_among_the_others_and_neutral_is_absent(kind: str, name: str, stages: Any, all_five: Any) -> None:
    stage: Stage = stages[kind]
    index = NAMES.index(name)
    others = [control for i, control in enumerate(stage.five()) if i != index]
    without = stage.draw(others)
    assert (without.images - all_five[kind].images).abs().max() > 1e-3 * without.images.std()
    # Beyond the first miniature one place is enough: dropping a control does not depend on the network.
    for place in (0, 2, 4) if kind == "sd1" else (1,):
        listed = [*others[:place], stage.control(name, **NEUTRAL[name]), *others[place:]]
        result = stage.draw(listed)
        assert torch.equal(result.images, without.images)
        assert result.manifest["cost"] == without.manifest["cost"]
        assert list(result.manifest["dropped"]) == [type(listed[place]).__name__]


@pytest.mark.parametrize("kind", BACKBONES)
def test_cost_is_as_planned(kind: str, stages: Any, all_five: Any) -> None:
    """Four rows a step in one pass (the picture and its source), energy passes of one row, the bank read once."""
    cost = all_five[kind].manifest["cost"]
    energies = cost["energy_passes"]
    # Steps 0 and 1, and at most two more rounds of the refinement at step 1 and the move behind it.
    assert 2 <= energies <= 4
    assert cost["unet_rows"] == 3 * 4 + energies
    assert cost["unet_passes"] == 3 + energies
    assert cost["side_rows"] == cost["unet_rows"] + 1
    assert cost["side_passes"] == cost["unet_passes"] + 1


@pytest.mark.parametrize("kind", BACKBONES)
def test_image_of_a_batch_equals_it_alone(kind: str, stages: Any) -> None:
    stage: Stage = stages[kind]
    prompts, sources, seeds = ["a red cat", "a blue frog"], ["a green dog", "a red dog"], (0, 1)
    words = [["cat"], ["frog"]]

    def five(rows: slice) -> list[Control]:
        pictures = [[picture(seed + number) for seed in seeds[rows]] for number in (0, 10, 20)]
        return stage.five(
            controlnet={"image": pictures[0]},
            ip_adapter={"image": [[one] for one in pictures[1]]},
            appearance_control={"image": [[one] for one in pictures[2]]},
            prompt_to_prompt={"source": sources[rows]},
            attend_and_excite={"words": words[rows]},
        )

    together = stage.draw(five(slice(0, 2)), prompts).images
    assert (together[0] - together[1]).abs().max() > 0.1
    for i in range(2):
        alone = stage.draw(five(slice(i, i + 1)), prompts[i], seed=DRAW["seed"] + i).images
        assert (together[i : i + 1] - alone).abs().max() <= 1e-7 * alone.std()


HOOKS = {
    "controlnet": ("prepare", "side"),
    "ip_adapter": ("prepare", "attention"),
    "prompt_to_prompt": ("prepare", "attention"),
    "attend_and_excite": ("before", "attention", "energy"),
    "appearance_control": ("prepare", "attention"),
}
FAILURES = ["nothing", "callback", *(f"{name}.{hook}" for name, hooks in HOOKS.items() for hook in hooks)]


@pytest.mark.parametrize("fail", FAILURES)
def test_no_trace(fail: str, stages: dict[str, Stage], monkeypatch: pytest.MonkeyPatch) -> None:
    # Every way of failing on one of the miniatures, and the way through and the deepest hook on all.
    kinds = list(BACKBONES) if fail in ("nothing", "attend_and_excite.energy") else ["sd1"]
    for kind in kinds:
        stage = stages[kind]
        stage.pipe.unet.requires_grad_(True)
        stage.pipe.unet.down_blocks[0].requires_grad_(False)
        controls = stage.five()
        stage.draw([])  # transformers prepares an encoder when it is first used
        before = traces(stage.pipe, *stage.nets)

        def broken(*args: Any) -> Any:
            raise RuntimeError("broken")

        with monkeypatch.context() as patch:
            name, _, hook = fail.partition(".")
            if hook:
                patch.setattr(type(controls[NAMES.index(name)]), hook, broken)
            callback = broken if fail == "callback" else None
            if fail == "nothing":
                stage.draw(controls)
            else:
                with pytest.raises(RuntimeError, match="broken"):
                    stage.draw(controls, callback_on_step_end=callback)
        after = traces(stage.pipe, *stage.nets)
        assert [(a, b) for a, b in zip(before, after, strict=True) if a != b] == []


def test_a_run_after_five_controls_is_the_run_before(stages: dict[str, Stage], all_five: Any) -> None:
    stage = stages["sd1"]
    plain = stage.draw([]).images
    again = stage.draw(stage.five())
    assert torch.equal(again.images, all_five["sd1"].images)
    assert torch.equal(stage.draw([]).images, plain)


def test_windows_that_do_not_meet_take_turns(stages: dict[str, Stage]) -> None:
    """Where all controls are over, rows and passes are those of a plain run."""
    stage = stages["sd1"]
    controls = stage.five(
        controlnet={"end": 0.5},
        ip_adapter={"start": 0.5},
        prompt_to_prompt={"cross_replace": 0.3, "self_replace": 0.3, "keep_source": False},
        attend_and_excite={"iterations": 1, "thresholds": {}},
        appearance_control={"start": 0.25, "end": 0.75},
    )
    cost = stage.draw(controls, num_inference_steps=4).manifest["cost"]
    assert cost == {
        "unet_rows": 4 * 2 + 2 + 1,
        "unet_passes": 4 + 1,
        "energy_passes": 1,
        "side_rows": (4 + 2) + 1 + 1,
        "side_passes": 2 + 1 + 1,
    }


def test_all_five_with_several_solvers(stages: dict[str, Stage]) -> None:
    stage = stages["sd1"]
    found = [stage.draw(stage.five(), scheduler=name).images for name in ("euler", "euler_a", "dpmpp_2m", "unipc")]
    assert all(torch.isfinite(images).all() for images in found)
    assert all(not torch.equal(a, b) for a, b in pairwise(found))
