"""GLIGEN against diffusers' pipeline, and what every control promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionGLIGENPipeline

from controlroom.controls.regions.multidiffusion import MultiDiffusion
from controlroom.controls.spatial.gligen import Gligen
from controlroom.core.control import Control
from controlroom.core.errors import InputError, ModelError
from controlroom.sampling.pipeline import Pipeline
from tests.controls.nets import gated_unet
from tests.tiny import BACKBONES, tiny_sd1

DRAW: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent"}
PHRASES = ["a red hat", "dog"]
BOXES = [(0.1, 0.0, 0.5, 0.4), (0.4, 0.5, 1.0, 1.0)]


def gated(kind: str = "sd1") -> Any:
    source = BACKBONES[kind]()
    source.unet = gated_unet(source.unet)
    return source


@pytest.fixture(scope="module")
def source() -> Any:
    return gated()


@pytest.fixture(scope="module")
def pipe(source: Any) -> Pipeline:
    return Pipeline.from_diffusers(source)


def draw(pipe: Pipeline, *controls: Control, **settings: Any) -> Any:
    return pipe(**{"prompt": "a red cat", "seed": 5, **DRAW, **settings}, controls=list(controls))


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@pytest.mark.parametrize(
    ("beta", "settings"),
    [
        (0.3, {}),
        (0.5, {"prompt": ["a red cat", "dog"]}),
        (1.0, {}),
        (0.0, {}),
        (1.0, {"guidance_scale": 1.0}),
    ],
)
def test_latents_equal_diffusers(kind: str, beta: float, settings: dict[str, Any]) -> None:
    source = gated(kind)
    reference = StableDiffusionGLIGENPipeline(
        **{k: v for k, v in source.components.items() if k not in ("image_encoder", "feature_extractor")},
        feature_extractor=None,
        requires_safety_checker=False,
    )
    reference.set_progress_bar_config(disable=True)
    settings = {"prompt": "a red cat", **DRAW, **settings}
    theirs = reference(
        **settings,
        gligen_phrases=PHRASES,
        gligen_boxes=[list(box) for box in BOXES],
        gligen_scheduled_sampling_beta=beta,
        generator=torch.Generator().manual_seed(3),
    ).images
    # The pipeline leaves the gated layers switched off; a run of ours leaves them as they are.
    fusers = [module for name, module in source.unet.named_modules() if name.endswith(".fuser")]
    assert beta == 1.0 or not any(fuser.enabled for fuser in fusers)
    states = [fuser.enabled for fuser in fusers]
    pipe = Pipeline.from_diffusers(source)
    ours = pipe(**settings, controls=[Gligen(PHRASES, BOXES, beta)], generator=torch.Generator().manual_seed(3)).images
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.std()
    assert [fuser.enabled for fuser in fusers] == states
    without = pipe(**settings, generator=torch.Generator().manual_seed(3)).images
    assert (beta == 0.0) == bool((ours - without).abs().max() < 0.02 * theirs.std())


@pytest.mark.parametrize("settings", [{"scale": 0.0}, {"scheduled_sampling_beta": 0.2}, {"end": 0.0}, {"start": 0.3}])
def test_neutral_is_absence_bit_for_bit_and_free(pipe: Pipeline, settings: dict[str, Any]) -> None:
    without, neutral = draw(pipe), draw(pipe, Gligen(PHRASES, BOXES, **settings))
    assert torch.equal(without.images, neutral.images)
    assert without.manifest["cost"] == neutral.manifest["cost"]


def test_small_scale_is_close_to_absence(pipe: Pipeline) -> None:
    without = draw(pipe).images
    little = draw(pipe, Gligen(PHRASES, BOXES, 1.0, scale=1e-4)).images
    assert 0 < (little - without).abs().max() < 1e-2 * without.std()


def test_window_lies_within_the_share_of_the_steps(pipe: Pipeline) -> None:
    assert Gligen(PHRASES, BOXES, 0.8, start=0.2, end=0.7).window(10) == {2, 3, 4, 5, 6}
    assert Gligen(PHRASES, BOXES, 0.5, start=0.2, end=0.7).window(10) == {2, 3, 4}
    late, whole = (draw(pipe, Gligen(PHRASES, BOXES, 1.0, start=start)).images for start in (0.5, 0.0))
    assert not torch.equal(late, whole) and not torch.equal(late, draw(pipe).images)


def test_costs_no_row_and_no_pass(pipe: Pipeline) -> None:
    assert draw(pipe, Gligen(PHRASES, BOXES, 1.0)).manifest["cost"] == draw(pipe).manifest["cost"]


def test_mask_confines_it(pipe: Pipeline) -> None:
    full = draw(pipe, Gligen(PHRASES, BOXES, 1.0)).images
    white = draw(pipe, Gligen(PHRASES, BOXES, 1.0, mask=torch.ones(32, 32))).images
    assert torch.equal(full, white)
    left, seen = torch.zeros(32, 32), []
    left[:, :16] = 1

    class Spy(Gligen):
        def feature(self, call: Any) -> Any:
            found = super().feature(call)
            if found is not None:
                seen.append((call.site.hw, found - call.hidden))
            return found

    draw(pipe, Spy(PHRASES, BOXES, 1.0, mask=left))
    for (height, width), change in seen:
        change = change.unflatten(1, (height, width))
        assert change[:, :, width // 2 :].abs().max() == 0 < change[:, :, : width // 2].abs().max()


def test_views_have_the_boxes_as_they_lie_in_them(pipe: Pipeline) -> None:
    """One window over the whole picture is no window; in a wide canvas a box is in the windows that show it."""
    seen: dict[int, torch.Tensor] = {}

    class Spy(Gligen):
        def _boxes(self, run: Any, viewed: bool) -> Any:
            boxes, there = super()._boxes(run, viewed)
            if viewed:
                seen[len(boxes)] = torch.cat([boxes[:, 0], there[:, :1]], dim=-1)
            return boxes, there

    # Latents of 16 x 32, windows of 16 x 16 every 8 columns: at 0, 8 and 16.
    control = Spy(["dog"], [(0.25, 0.5, 0.5, 1.0)], 1.0)
    draw(pipe, control, MultiDiffusion(window=16, stride=8), width=64, num_inference_steps=1)
    (found,) = seen.values()
    expected = torch.tensor([[0.5, 0.5, 1.0, 1.0, 1.0], [0.0, 0.5, 0.5, 1.0, 1.0]])
    torch.testing.assert_close(found[:2], expected)
    assert float(found[2, 4]) == 0


def test_gated_layers_are_no_attention_sites(pipe: Pipeline) -> None:
    """Their attention runs inside this control alone; others would wait for it, or count one layer too many."""
    plain = Pipeline.from_diffusers(tiny_sd1())
    assert pipe.backbone.attention_sites((16, 16)) == plain.backbone.attention_sites((16, 16))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"boxes": BOXES[:1]}, "2 phrases for 1 boxes"),
        ({"phrases": [], "boxes": []}, "0 phrases"),
        ({"phrases": ["x"] * 31, "boxes": [BOXES[0]] * 31}, "1 to 30"),
        ({"boxes": [(0.5, 0.0, 0.5, 1.0), BOXES[1]]}, "'a red hat' is"),
        ({"boxes": [(0.0, 0.0, 64.0, 64.0), BOXES[1]]}, "from 0 to 1"),
        ({"boxes": [(0.0, 0.0, 1.0), BOXES[1]]}, "boxes"),
        ({"phrases": ["hat", " "]}, "none of them empty"),
    ],
)
def test_bad_boxes_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Gligen(**{"phrases": PHRASES, "boxes": BOXES, **settings})


def test_a_network_without_gates_is_refused() -> None:
    with pytest.raises(ModelError, match="no gated layers"):
        draw(Pipeline.from_diffusers(tiny_sd1()), Gligen(PHRASES, BOXES))
    source = tiny_sd1()
    source.unet = gated_unet(source.unet, attention_type="gated-text-image")
    with pytest.raises(ModelError, match="pictures in boxes"):
        draw(Pipeline.from_diffusers(source), Gligen(PHRASES, BOXES))
