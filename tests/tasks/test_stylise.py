"""Stylising: what run is built, what depth it is drawn along, what is written, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from controlroom.app.cli import main
from controlroom.backbones import loading
from controlroom.backbones.controlnet import MULTI_CHANNELS
from controlroom.controls.editing.image_to_image import ImageToImage
from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.core.errors import InputError, ModelError
from controlroom.data.theatre.conditions import condition
from controlroom.data.theatre.paint import Part
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import sample_scene
from controlroom.sampling.pipeline import Pipeline, replay
from controlroom.signals.dense_reader import DenseReader
from controlroom.signals.signal import SignalMap
from controlroom.tasks.stylise import StyliseOptions, plan_stylise, proportioned, stylise
from tests.controls.nets import tiny_controlnet
from tests.tasks.theatre import write_theatre
from tests.tiny import tiny_unet

FEW = StyliseOptions(num_inference_steps=4)
SCENE = sample_scene(5, "held_out")


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The theatre with a ControlNet for all kinds and a reader of depth."""
    folder = write_theatre(tmp_path_factory.mktemp("assets") / "theatre")
    tiny_controlnet(
        tiny_unet(), conditioning_embedding_out_channels=(4, 8), conditioning_channels=MULTI_CHANNELS
    ).save_pretrained(str(folder / "multi"))
    torch.manual_seed(0)
    DenseReader([part.name.lower() for part in Part], size=64, width=8).save(folder / "readers/dense")
    return folder


@pytest.fixture(scope="module")
def pipeline(assets: Path) -> Pipeline:
    return Pipeline.from_pretrained(str(assets))


def depth(seed: int = 5) -> Image.Image:
    return condition(sample_scene(seed, "held_out"), "depth").picture


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


class Estimates:
    """Finds a depth that it was told."""

    kind: Any = "depth"

    def __init__(self) -> None:
        self.seen: list[Image.Image] = []

    def __call__(self, image: Image.Image) -> SignalMap:
        self.seen.append(image)
        return condition(SCENE, "depth")


def test_a_run_from_the_picture_along_its_depth(theatre: Path, pipeline: Pipeline) -> None:
    reader, source = Estimates(), render(SCENE)
    drawn = stylise(source, "a cat", seed=1, options=FEW, reader=reader, pipeline=pipeline)
    assert [one.tobytes() for one in reader.seen] == [source.tobytes()]
    start, control = drawn.plan.spec.controls
    assert isinstance(start, ImageToImage) and start.strength == 0.8
    assert isinstance(control, ControlNet) and control.kind == "depth" and control.model == "theatre/multi"
    assert drawn.plan.spec.scheduler == "unipc"
    assert drawn.manifest["cost"]["side_passes"] == drawn.manifest["cost"]["unet_passes"] == 3  # 0.8 of 4 steps
    assert drawn.image.size == (32, 32) and drawn.depth is not None and same(drawn.depth, depth())
    by_hand = stylise(source, "a cat", depth=depth(), seed=1, options=FEW, pipeline=pipeline)
    assert same(by_hand.image, drawn.image)
    for changed in (
        stylise(source, "a cat", depth=depth(6), seed=1, options=FEW, pipeline=pipeline),
        stylise(source, "a dog", depth=depth(), seed=1, options=FEW, pipeline=pipeline),
        stylise(render(sample_scene(6)), "a cat", depth=depth(), seed=1, options=FEW, pipeline=pipeline),
    ):
        assert not same(changed.image, drawn.image)


def test_without_depth_it_is_image_to_image(theatre: Path, pipeline: Pipeline) -> None:
    options = FEW.model_copy(update={"depth_scale": 0.0})
    drawn = stylise(render(SCENE), "a cat", seed=1, options=options, pipeline=pipeline)
    assert drawn.depth is None and drawn.manifest["cost"]["side_passes"] == 0
    plain = pipeline(
        "a cat",
        controls=[ImageToImage(render(SCENE), 0.8)],
        seed=1,
        num_inference_steps=4,
        guidance_scale=options.guidance_scale,
        scheduler="unipc",
    )
    assert same(drawn.image, plain.images[0])
    assert drawn.save("plain.png") == (Path("plain.png"),)


def test_command_writes_picture_and_depth_that_draw_it_again(
    theatre: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    render(SCENE).save("town.png")
    words = ["--prompt", "a cat", "--seed", "3", "--steps", "4"]
    assert main(["stylise", "town.png", *words, "-o", "out.png", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["files"] == ["out.png", "out.depth.png"] and printed["size"] == [32, 32]
    assert printed["depth"] == {"source": "estimated", "file": "out.depth.png"} and printed["replayable"]
    assert main(["stylise", "town.png", *words, "--depth", "out.depth.png", "-o", "second.png"]) == 0
    first, second = (np.asarray(Image.open(name)) for name in ("out.png", "second.png"))
    assert np.array_equal(first, second)
    before = Path("out.depth.png").read_bytes()
    assert main(["stylise", "town.png", *words, "--depth", "out.depth.png", "-o", "out.png"]) == 0
    assert Path("out.depth.png").read_bytes() == before
    replay("out.png").save("again.png")
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("missing.png",), "missing.png"),
        (("town.png", "--depth", "colours.png"), "colours"),
        (("town.png", "--depth", "colours.png", "--depth-model", "x"), "Leave --depth"),
        (("town.png", "--strength", "0"), "strength"),
        (("town.png", "--controlnet", "theatre/nothing"), "theatre"),
        (("town.png", "--depth-model", "nowhere"), "nowhere"),
        (("town.png", "--size", "33"), "33"),
    ],
)
def test_mistakes_are_one_line(
    theatre: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    render(SCENE).save("town.png")
    render(SCENE).save("colours.png")
    assert main(["stylise", *arguments, "--prompt", "a cat", "--steps", "4", "-o", "out.png"]) == 2
    error = capsys.readouterr().err
    assert said in error and "\n" not in error.strip() and not Path("out.png").exists()


def test_the_picture_itself_is_never_written_over(theatre: Path, capsys: pytest.CaptureFixture[str]) -> None:
    render(SCENE).save("town.png")
    assert main(["stylise", "town.png", "--prompt", "a cat", "-o", "town.png"]) == 2
    assert "picture itself" in capsys.readouterr().err


def test_size_keeps_proportions_and_options_are_checked(theatre: Path, pipeline: Pipeline) -> None:
    wide = Image.new("RGB", (200, 100), (10, 90, 10))
    plan = plan_stylise(wide, "a cat", depth=Image.new("RGB", (200, 100)), options=FEW, pipeline=pipeline)
    assert (plan.spec.width, plan.spec.height) == (44, 24) == proportioned((200, 100), (32, 32), 4)
    with pytest.raises(InputError, match="stylising"):
        StyliseOptions(strength=2.0)


def test_what_is_missing_is_named(theatre: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loading, "theatre_folder", lambda: tmp_path / "empty")
    with pytest.raises(ModelError, match="no 'theatre/multi'"):
        plan_stylise(render(SCENE), "a cat")
