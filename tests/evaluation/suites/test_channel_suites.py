"""The suites of inpainting and of depth to image: right cases, and the numbers that known pictures must give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from controlroom.backbones import loading
from controlroom.controls.editing.inpaint import Inpaint
from controlroom.data.theatre.attributes import attributes
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.conditions import condition
from controlroom.data.theatre.paint import Part
from controlroom.data.theatre.render import render
from controlroom.evaluation.suites import depth2img, editing, inpaint
from controlroom.evaluation.suites.drawing import PipelineDrawer
from controlroom.evaluation.suites.journal import Journal
from controlroom.evaluation.suites.pages import page
from controlroom.evaluation.suites.report import summarise
from controlroom.evaluation.suites.runner import run
from controlroom.evaluation.suites.suite import Shown, Suite
from controlroom.evaluation.suites.table import SUITES, open_suite
from controlroom.sampling.pipeline import Pipeline
from controlroom.signals.dense_reader import DenseReader
from tests.evaluation.suites.stage import Knows, write_stage
from tests.tiny import tiny_unet


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_stage(tmp_path_factory.mktemp("stage") / "theatre")
    tiny_unet(in_channels=9).save_pretrained(str(folder / "inpaint"))
    tiny_unet(in_channels=5).save_pretrained(str(folder / "depth2img"))
    return folder


@pytest.fixture
def theatre(stage: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(loading, "theatre_folder", lambda: stage)
    return stage


def dense_reader() -> DenseReader:
    torch.manual_seed(0)
    return DenseReader([part.name.lower() for part in Part], size=64, width=8).eval()


def opened(name: str) -> Suite[Any]:
    if name == "inpaint":
        return open_suite(name, 2, {"steps": 2})
    return depth2img.build(depth2img.Settings(steps=2), 2, dense_reader())


@pytest.mark.parametrize("name", ["inpaint", "depth2img"])
def test_suite_runs_on_the_stage(theatre: Path, tmp_path: Path, name: str) -> None:
    suite = opened(name)
    drawer = PipelineDrawer("theatre", suite.weights)
    about = suite.about(drawer.fingerprint)
    report = summarise(suite, run(suite, drawer, Journal(tmp_path / "cases.jsonl", about), 2), about)
    assert report.n == 2 and {arm.name for arm in suite.arms} == set(report.picked[0].thumbnails)
    assert report.differences and suite.table.ours in report.differences[0].cells
    assert suite.name == name and name in page(report) and name in SUITES


@pytest.mark.parametrize("name", ["inpaint", "depth2img"])
def test_networks_load_by_the_theatres_name(theatre: Path, name: str) -> None:
    pipe = Pipeline.from_pretrained(f"theatre/{name}")
    assert pipe.unet.config.in_channels == {"inpaint": 9, "depth2img": 5}[name]
    edit = editing.edit_number(0, depth2img.KINDS)
    picture = render(edit.before)
    control: Any = Inpaint(picture, inpaint.mask_of(edit, 2))
    if name == "depth2img":
        control = depth2img.DepthToImage(picture, condition(edit.before, "depth"))
    drawn = pipe("a woman", controls=[control], num_inference_steps=2, height=64, width=64, output_type="latent")
    assert torch.isfinite(drawn.images).all()


def test_holes_hold_what_changes_and_truth_is_all_right() -> None:
    edits = [editing.edit_number(number, tuple(inpaint.MASKED)) for number in range(6)]
    knows: Any = Knows([scene for edit in edits for scene in (edit.before, edit.after)])
    suite = inpaint.build(inpaint.Settings(), 6, knows, knows)
    for number in range(6):
        case = suite.case(number)
        edit = case.truth
        changed, mask = edit.changed(), inpaint.mask_of(edit, 2)
        assert (changed & mask).sum() >= 0.98 * changed.sum() > 0 and mask.mean() < 0.4
        assert set(case.made) >= {inpaint.READS, inpaint.PASTED, inpaint.BLENDED}
        assert case.title == full_caption(edit.after)
        before, after = render(edit.before), render(edit.after)
        pictures = {arm.name: before for arm in suite.arms} | {inpaint.READS: after, editing.AFTER: after}
        (found,) = suite.judges[0]([Shown(case, pictures)])
        assert found[inpaint.READS][editing.MADE] == 1.0 and found[inpaint.BLENDED][editing.MADE] == 0.0
        # Where the true pictures do not differ they are not quite equal: antialiased borders.
        outside = found[inpaint.READS][editing.PSNR]
        assert outside is not None and outside > 35


def test_depth_is_read_again_and_colours_are_told() -> None:
    edit = editing.edit_number(0, depth2img.KINDS)
    knows: Any = Knows([edit.before, edit.after])
    suite = depth2img.build(depth2img.Settings(), 1, dense_reader(), knows)
    case = suite.case(0)
    assert np.array_equal(condition(edit.before, "depth").values, condition(edit.after, "depth").values)
    before, after = render(edit.before), render(edit.after)
    pictures = {arm.name: before for arm in suite.arms} | {depth2img.DEPTH: after, depth2img.TRUE: after}
    judge: Any = suite.judges[0]
    judge.signal = lambda picture: condition(edit.before, "depth", picture.width)
    (found,) = judge([Shown(case, pictures)])
    assert found[depth2img.DEPTH] == {depth2img.KEPT: pytest.approx(1.0), depth2img.MADE: 1.0, depth2img.RIGHT: 1.0}
    assert found[depth2img.IMAGE][depth2img.MADE] == 0.0 and found[depth2img.IMAGE][depth2img.RIGHT] < 1.0
    assert attributes(edit.after)[edit.kind] != attributes(edit.before)[edit.kind]
