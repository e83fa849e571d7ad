"""The suites of ControlNet and of stylising: right cases, and the numbers that known pictures must give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from controlroom.backbones import loading
from controlroom.backbones.controlnet import MULTI_CHANNELS
from controlroom.core.errors import InputError
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.conditions import condition
from controlroom.data.theatre.paint import Part
from controlroom.data.theatre.render import render
from controlroom.evaluation.suites import controlnet, stylise
from controlroom.evaluation.suites.controlnet import BLOCK, EMPTY, GUESS, SIZE, TRUE, WITH, WITHOUT, measure_name
from controlroom.evaluation.suites.drawing import PipelineDrawer, together
from controlroom.evaluation.suites.journal import Journal
from controlroom.evaluation.suites.pages import page
from controlroom.evaluation.suites.report import Report, Row, summarise
from controlroom.evaluation.suites.runner import run
from controlroom.evaluation.suites.suite import Shown, Suite
from controlroom.evaluation.suites.table import open_suite
from controlroom.signals.dense_reader import DenseReader
from controlroom.signals.signal import KINDS
from tests.controls.nets import tiny_controlnet, tiny_t2i_adapter, tiny_uni_adapters, write_uni_controlnet
from tests.evaluation.suites.stage import Knows, Words, write_stage
from tests.tiny import tiny_unet


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_stage(tmp_path_factory.mktemp("stage") / "theatre")
    tiny_controlnet(
        tiny_unet(), conditioning_embedding_out_channels=(4, 8), conditioning_channels=MULTI_CHANNELS
    ).save_pretrained(str(folder / "multi"))
    return folder


@pytest.fixture
def theatre(stage: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(loading, "theatre_folder", lambda: stage)
    return stage


def dense_reader() -> DenseReader:
    torch.manual_seed(0)
    return DenseReader([part.name.lower() for part in Part], size=64, width=8).eval()


def measured(suite: Suite[Any], drawer: Any, folder: Path) -> Report:
    about = suite.about(drawer.fingerprint)
    return summarise(suite, run(suite, drawer, Journal(folder / "cases.jsonl", about), 2), about)


def value(rows: list[Row], measure: str, arm: str) -> float | None:
    cell = next(row for row in rows if row.measure == measure).cells.get(arm)
    return None if cell is None else cell.value


def test_cases_share_noise_and_words_and_are_drawn_in_blocks() -> None:
    knows: Any = Knows([])
    suite = controlnet.build(controlnet.Settings(guess=True, scale=0.7), 200, knows, dense_reader(), Words())
    assert [arm.name for arm in suite.arms] == [WITHOUT, WITH, EMPTY, GUESS, TRUE]
    for number in (0, BLOCK, 7 * BLOCK + 1, 8 * BLOCK):
        case = suite.case(number)
        scene, kind = case.truth
        assert kind == KINDS[number // BLOCK % 8] and kind in case.title
        plain, ours, empty, guess = (case.specs[arm] for arm in (WITHOUT, WITH, EMPTY, GUESS))
        assert plain.prompt == ours.prompt == full_caption(scene) and empty.prompt == guess.prompt == ""
        assert {spec.seed for spec in case.specs.values()} == {1000 + number} and plain.controls == []
        control: Any = ours.controls[0]
        assert (control.model, control.kind, control.scale) == ("theatre/multi", kind, 0.7)
        assert control.image[0].tobytes() == condition(scene, kind).picture.tobytes()
        assert empty.guidance_scale == 1.0 and guess.guidance_scale == plain.guidance_scale
        assert guess.controls[0].guess_mode and not control.guess_mode  # type: ignore[attr-defined]
    joined = together([suite.case(number).specs[WITH] for number in range(BLOCK)], suite.per_prompt)
    assert joined is not None and len(joined.controls[0].image) == BLOCK  # type: ignore[attr-defined]
    own = controlnet.Settings(network="runs/controlnet_{kind}/weights")
    names = controlnet.build(own, 8, knows, dense_reader(), Words()).weights
    assert names[0] == "runs/controlnet_canny/weights" and len(set(names)) == 8
    with pytest.raises(InputError, match="every kind"):
        controlnet.build(controlnet.Settings(network="theatre/pose"), 8, knows, dense_reader(), Words())
    only = controlnet.build(controlnet.Settings(network="theatre/pose", kind="pose"), 8, knows, dense_reader(), Words())
    assert only.case(9).truth[1] == "pose" and [m.name for m in only.judges[0].measures] == ["pose: PCK@0.2"]


def test_judge_tells_the_condition_from_another_scene() -> None:
    """The true picture matches as reading allows, that of another scene less, for every kind."""
    settings = controlnet.Settings()
    plain: Any = Knows([])
    scenes = [controlnet.build(settings, 8, plain, dense_reader(), Words()).case(8 * i).truth[0] for i in range(9)]
    knows: Any = Knows(scenes)
    suite = controlnet.build(settings, 8, knows, dense_reader(), Words())
    judge = suite.judges[0]
    for place, kind in enumerate(KINDS):
        case = suite.case(place * BLOCK)
        shown = Shown(case, {WITH: render(case.truth[0]), WITHOUT: render(scenes[place + 1])})
        (found,) = judge([shown])
        right, wrong = (found[arm][measure_name(kind)] for arm in (WITH, WITHOUT))
        assert right is not None and wrong is not None
        # The dense reader here is random: what it reads differs, but is no better for the truth.
        if kind in ("canny", "lines", "scribble", "pose"):
            assert right > wrong, kind
        if kind in ("canny", "pose"):
            assert right == 1.0
    assert [measure.higher for measure in judge.measures].count(False) == 1


def test_controlnet_suite_runs(theatre: Path, tmp_path: Path) -> None:
    settings = controlnet.Settings(model=str(theatre), steps=2, kind="depth")
    suite = controlnet.build(settings, 2, clip=Words())
    report = measured(suite, PipelineDrawer(str(theatre), suite.weights), tmp_path)
    assert suite.weights == ("theatre/multi",) and report.n == 2
    name = measure_name("depth")
    found = {arm: value(report.rows, name, arm) for arm in (WITHOUT, WITH, EMPTY, TRUE)}
    assert all(number is not None and -1 <= number <= 1 for number in found.values())
    assert found[WITH] != found[WITHOUT] and found[WITH] != found[EMPTY]
    assert {arm for row in report.differences for arm in row.cells} >= {WITH, EMPTY}
    assert "ControlNet" in page(report)


def stored(folder: Path, unet: Any, kind: str) -> str:
    """A T2I-Adapter and a ControlNet for one kind; their weights by kind."""
    for name, net in (
        ("t2i_adapter", tiny_t2i_adapter(unet)),
        ("controlnet", tiny_controlnet(unet, conditioning_embedding_out_channels=(4, 8))),
    ):
        net.save_pretrained(str(folder / f"{name}_{kind}"))
    return str(folder)


def test_other_ways_of_control_are_measured_on_the_same_cases(theatre: Path, tmp_path: Path) -> None:
    unet = tiny_unet()
    place = stored(tmp_path, unet, "depth")
    write_uni_controlnet(unet, tmp_path / "uni")
    sizes = {
        "t2i_adapter": tiny_t2i_adapter(unet),
        "controlnet_single": tiny_controlnet(unet, conditioning_embedding_out_channels=(4, 8)),
        "uni_controlnet": tiny_uni_adapters(unet)["local"],
    }
    networks = {
        "t2i_adapter": f"{place}/t2i_adapter_{{kind}}",
        "controlnet_single": f"{place}/controlnet_{{kind}}",
        "uni_controlnet": f"{place}/uni",
    }
    plain = open_suite("controlnet", 2, {"kind": "depth", "steps": 2}).case(0)
    for name, network in networks.items():
        suite = open_suite(name, 2, {"kind": "depth", "steps": 2, "network": network})
        case = suite.case(0)
        assert suite.name == name and case.specs[WITHOUT] == plain.specs[WITHOUT]
        assert together([suite.case(number).specs[WITH] for number in range(2)], suite.per_prompt) is not None
        report = measured(suite, PipelineDrawer(str(theatre), suite.weights), tmp_path / name)
        held = [value(report.rows, measure_name("depth"), arm) for arm in (WITHOUT, WITH, EMPTY)]
        assert report.suite == name and None not in held and held[0] != held[1] != held[2]
        (row,) = [row for row in report.derived if row.measure == SIZE]
        count = sum(p.numel() for p in sizes[name].parameters())
        assert row.cells[""].value == pytest.approx(count / 1e6, abs=1e-9) and row.cells[""].n == 1
    joined: Any = together([suite.case(number).specs[WITH] for number in range(2)], suite.per_prompt)
    assert len(joined.controls[0].images.depth) == 2 and set(joined.controls[0].images.given) == {"depth"}


def test_what_is_not_there_has_no_size_and_what_cannot_be_is_refused(theatre: Path) -> None:
    whole = open_suite("controlnet", 1, {"kind": "depth"})
    net = tiny_controlnet(tiny_unet(), conditioning_embedding_out_channels=(4, 8), conditioning_channels=MULTI_CHANNELS)
    count = sum(p.numel() for p in net.parameters())
    assert controlnet.parameters_of(whole.settings).mean == pytest.approx(count / 1e6)  # type: ignore[arg-type]
    assert controlnet.parameters_of(controlnet.T2IAdapterSettings(network="nowhere/{kind}")).n == 0
    for name, given, said in (
        ("t2i_adapter", {"network": "theatre/multi"}, "every kind"),
        ("uni_controlnet", {"guess": True}, "guess"),
        ("controlnet", {"method": "gligen"}, "method"),
    ):
        with pytest.raises(InputError, match=said):
            open_suite(name, 1, given)


def test_journals_of_before_there_were_methods_stay_valid() -> None:
    """The account has no word of a setting that nobody could give then."""
    assert controlnet.Settings().account() == {
        "model": "theatre",
        "steps": 25,
        "guidance_scale": 5.0,
        "seed": 1000,
        "network": "theatre/multi",
        "kind": "all",
        "scale": 1.0,
        "guess": False,
    }
    assert controlnet.Settings(method="uni_controlnet").account()["method"] == "uni_controlnet"
    assert controlnet.T2IAdapterSettings().account()["method"] == "t2i_adapter"


def test_stylise_arms_change_one_thing_each(theatre: Path) -> None:
    suite = stylise.build(stylise.Settings(few_steps=10), 4, dense_reader(), Knows([]))  # type: ignore[arg-type]
    case = suite.case(1)
    assert case.truth.style == "watercolour" and case.known[stylise.TRUE]().tobytes() == render(case.truth).tobytes()
    full = case.specs[stylise.FULL]
    assert (full.scheduler, full.num_inference_steps) == ("ddim", 50)
    start, control = full.controls
    for arm, spec in case.specs.items():
        changed = {name for name in type(spec).model_fields if getattr(spec, name) != getattr(full, name)}
        expected = {
            stylise.FULL: set(),
            stylise.SOLVER: {"scheduler", "num_inference_steps"},
            stylise.ESTIMATED: {"controls"},
            stylise.NO_WORDS: {"prompt"},
            stylise.NO_DEPTH: {"controls"},
        }[arm]
        assert changed == expected, arm
    assert case.specs[stylise.NO_DEPTH].controls == [start]
    estimated: Any = case.specs[stylise.ESTIMATED].controls[1]
    assert isinstance(estimated.image[0], Image.Image)
    assert estimated.image[0].tobytes() != control.image[0].tobytes()  # type: ignore[attr-defined]
    assert set(case.made) == {stylise.HALF, stylise.TASK}


def test_stylise_suite_runs(theatre: Path, tmp_path: Path) -> None:
    settings = stylise.Settings(model=str(theatre), steps=3, few_steps=3)
    suite = stylise.build(settings, 2)
    report = measured(suite, PipelineDrawer(str(theatre), suite.weights), tmp_path)
    psnr = {arm: value(report.rows, stylise.SAME, arm) for arm in (stylise.HALF, stylise.NO_DEPTH, stylise.TASK)}
    half, none, task = psnr[stylise.HALF], psnr[stylise.NO_DEPTH], psnr[stylise.TASK]
    assert half is not None and none is not None and task is not None
    assert half > none and half > 30 and half > task
    assert value(report.rows, stylise.SAME, stylise.FULL) is None
    assert value(report.rows, "depth: rank correlation", stylise.TRUE) is not None
