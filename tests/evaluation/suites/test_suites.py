"""The suites themselves: right cases, and the numbers that pictures of known content must give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from controlroom.backbones import loading
from controlroom.controls.editing.prompt_to_prompt import PromptToPrompt
from controlroom.controls.guidance.attend_and_excite import AttendAndExcite
from controlroom.core.errors import InputError, ModelError
from controlroom.data.theatre.attributes import attributes
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import CANVAS, Scene
from controlroom.evaluation import retarget_methods
from controlroom.evaluation.metrics.agreement import ALL
from controlroom.evaluation.retarget_judge import Judge
from controlroom.evaluation.retarget_methods import FIRST_PAIR, METHODS, Trial, draw, pair_number
from controlroom.evaluation.retarget_report import MEASURES
from controlroom.evaluation.suites import attend_and_excite as excite
from controlroom.evaluation.suites import captions, editing, retarget
from controlroom.evaluation.suites import prompt_to_prompt as p2p
from controlroom.evaluation.suites.drawing import PipelineDrawer
from controlroom.evaluation.suites.journal import Journal
from controlroom.evaluation.suites.pages import markdown, page
from controlroom.evaluation.suites.report import Report, Row, summarise
from controlroom.evaluation.suites.runner import run
from controlroom.evaluation.suites.suite import Shown, Suite
from controlroom.evaluation.suites.table import SUITES, open_suite, settings_of
from controlroom.evaluation.theatre_quality import (
    CORE_MIX,
    TWO_OBJECTS,
    caption_quality,
    combination_quality,
    scenes_of,
    two_object_quality,
)
from controlroom.sampling.pipeline import Pipeline
from controlroom.signals.readers import AttributeReader
from tests.controls.nets import tiny_controlnet, tiny_image_encoder, tiny_ip_adapter
from tests.evaluation.suites.stage import Draws, Knows, Words, write_stage
from tests.tiny import tiny_unet


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_stage(tmp_path_factory.mktemp("stage") / "theatre")
    tiny_controlnet(tiny_unet(), conditioning_embedding_out_channels=(4, 8)).save_pretrained(str(folder / "pose"))
    tiny_unet(seed=5).save_pretrained(str(folder / "appearance"))
    (folder / "ip_adapter").mkdir()
    save_file(tiny_ip_adapter(tiny_unet()), str(folder / "ip_adapter/ip_adapter.safetensors"))
    tiny_image_encoder().save_pretrained(folder / "ip_adapter/image_encoder")
    return folder


@pytest.fixture
def theatre(stage: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(loading, "theatre_folder", lambda: stage)
    return stage


def measured(suite: Suite[Any], drawer: Any, folder: Path, batch_size: int = 3) -> Report:
    about = suite.about(drawer.fingerprint)
    journal = Journal(folder / f"{suite.name}.cases.jsonl", about)
    return summarise(suite, run(suite, drawer, journal, batch_size), about)


def values(rows: list[Row], measure: str, arm: str) -> float | None:
    cell = next(row for row in rows if row.measure == measure).cells.get(arm)
    return None if cell is None else cell.value


# Attend-and-Excite.


def test_attend_and_excite_counts_what_was_repaired(tmp_path: Path) -> None:
    """Without: every second picture lacks the second object. With: every fourth."""
    n = 8
    scenes = scenes_of(TWO_OBJECTS, n, excite.FIRST_SCENE)
    lone = [replace(scene, actors=scene.actors[:1]) for scene in scenes]
    of = {full_caption(scene): i for i, scene in enumerate(scenes)}
    assert len(of) == n

    def picture(prompt: str, controlled: bool, seed: int) -> Image.Image:
        i = of[prompt]
        assert seed == 1000 + i
        return render(lone[i] if i % (4 if controlled else 2) == 0 else scenes[i])

    reader: Any = Knows([*scenes, *lone])
    drawer = Draws(picture)
    report = measured(excite.build(excite.Settings(), n, reader, Words()), drawer, tmp_path)
    assert [(count, controlled) for count, _, controlled in drawer.runs[:2]] == [(3, False), (3, True)]
    for measure in (excite.KINDS, excite.COLOURS):
        assert values(report.rows, measure, "without") == 0.5
        assert values(report.rows, measure, "with") == 0.75
        assert values(report.rows, measure, "truth") == 1.0
        assert values(report.differences, measure, "with") == 0.25
    derived = {row.measure: row.cells[""] for row in report.derived}
    repaired, kept = derived["failures repaired (both kinds)"], derived["successes kept (both kinds)"]
    assert (repaired.value, repaired.n) == (0.5, 4) and (kept.value, kept.n) == (1.0, 4)
    assert report.picked[0].place == "worst" and report.picked[0].number % 4 == 0
    assert "failures repaired" in markdown(report) and "→" not in report.picked[0].title


def test_attend_and_excite_cases() -> None:
    reader: Any = Knows([])
    suite = excite.build(excite.Settings(steps=50), 3, reader, Words())
    for number in range(3):
        case = suite.case(number)
        base, ours = case.specs["without"], case.specs["with"]
        assert (base.prompt, base.seed, base.num_inference_steps) == (full_caption(case.truth), 1000 + number, 50)
        assert base.controls == [] and ours.model_copy(update={"controls": []}) == base
        (control,) = ours.controls
        assert isinstance(control, AttendAndExcite)
        assert control.words == [[prop.kind for prop in case.truth.props]] and len(case.truth.props) == 2
        # The paper's own numbers at its own number of steps.
        assert control.iterations == 25 and control.thresholds == {0: 0.05, 10: 0.5, 20: 0.8}
    (scaled,) = excite.build(excite.Settings(steps=20), 1, reader, Words()).case(0).specs["with"].controls
    assert isinstance(scaled, AttendAndExcite)
    assert scaled.iterations == 10 and scaled.thresholds == {0: 0.05, 4: 0.5, 8: 0.8}


def test_wrong_colours_and_missing_kinds_are_two_things() -> None:
    (scene,) = scenes_of(TWO_OBJECTS, 1, excite.FIRST_SCENE)
    colours = [prop.colour for prop in scene.props]
    other = next(c for c in ("red", "green", "blue") if c not in colours)
    first, second = scene.props
    painted = replace(scene, actors=(replace(first, colour=other), second))
    reader: Any = Knows([scene, painted])
    case = excite.build(excite.Settings(), 1, reader, Words()).case(0)
    (found,) = excite.TwoObjects(reader)([Shown(case, {"with": render(painted), "without": render(scene)})])
    assert found["with"] == {excite.KINDS: 1.0, excite.COLOURS: 0.0}
    assert found["without"] == {excite.KINDS: 1.0, excite.COLOURS: 1.0}


# Prompt-to-Prompt.

GROUPS = (
    editing.Compared("source", ("reprompted", "prompt_to_prompt")),
    editing.Compared("before", ("after",), true=True),
)


def test_edits_swap_one_word() -> None:
    kinds = set()
    for number in range(30):
        edit = p2p.edit_number(number)
        kinds.add(edit.kind)
        before, after = full_caption(edit.before).split(), full_caption(edit.after).split()
        changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
        assert len(before) == len(after) and 1 <= len([c for c in changed if c[0] not in ("a", "an")]) == 1
        truth, edited = attributes(edit.before), attributes(edit.after)
        assert {question for question in truth if truth[question] != edited[question]} == {edit.kind}
        assert (truth[edit.kind], edited[edit.kind]) == [c for c in changed if c[0] not in ("a", "an")][0]
    assert kinds == set(p2p.COLOURS)
    assert {p2p.edit_number(number, "hair colour").kind for number in range(3)} == {"hair colour"}


def test_prompt_to_prompt_cases() -> None:
    knows: Any = Knows([])
    suite = p2p.build(p2p.Settings(cross_replace=0.8), 2, knows, knows)
    for number in range(2):
        case = suite.case(number)
        source, target, ours = (case.specs[arm] for arm in ("source", "reprompted", "prompt_to_prompt"))
        assert source.prompt == full_caption(case.truth.before) and target.prompt == full_caption(case.truth.after)
        assert source.seed == target.seed == ours.seed == 1000 + number and target.controls == []
        (control,) = ours.controls
        assert isinstance(control, PromptToPrompt)
        assert control.source == [source.prompt] and control.cross_replace == 0.8 and ours.prompt == target.prompt
        assert case.title == f"{source.prompt} → {target.prompt}"
    with pytest.raises(InputError, match="cross_replace"):
        p2p.Settings(cross_replace=2.0)


def test_prompt_to_prompt_tells_an_edit_from_another_picture(tmp_path: Path) -> None:
    """Source: the true picture before. Prompt-to-Prompt makes the change; re-prompting also moves to another place."""
    n = 6
    edits = [p2p.edit_number(number) for number in range(n)]
    places = {"beach": "forest"}
    moved = [replace(edit.after, place=places.get(edit.after.place, "beach")) for edit in edits]
    pictures: dict[tuple[str, bool], Scene] = {}
    for edit, elsewhere in zip(edits, moved, strict=True):
        pictures[full_caption(edit.before), False] = edit.before
        pictures[full_caption(edit.after), False] = elsewhere
        pictures[full_caption(edit.after), True] = edit.after
    knows: Any = Knows([*pictures.values()])
    drawer = Draws(lambda prompt, controlled, seed: render(pictures[prompt, controlled]))
    report = measured(p2p.build(p2p.Settings(), n, knows, knows), drawer, tmp_path)

    def found(measure: str, arm: str) -> float:
        value = values(report.rows, measure, arm)
        assert value is not None
        return value

    assert (
        found(editing.MADE, "prompt_to_prompt")
        == found(editing.MADE, "reprompted")
        == found(editing.MADE, "after")
        == 1.0
    )
    assert found(editing.REST, "prompt_to_prompt") == 1.0
    assert found(editing.REST, "reprompted") == pytest.approx(8 / 9)
    assert found(editing.PSNR, "prompt_to_prompt") == found(editing.PSNR, "after") > 40
    assert found(editing.PSNR, "reprompted") < 25
    assert found(editing.L1, "prompt_to_prompt") < 0.002 < 0.05 < found(editing.L1, "reprompted")
    assert found(editing.SOURCE_RIGHT, "source") == found(editing.SOURCE_RIGHT, "before") == 1.0
    assert found(editing.HELD, "before") > 0.98
    assert values(report.rows, editing.MADE, "source") is None
    difference = values(report.differences, editing.PSNR, "prompt_to_prompt")
    assert difference is not None and difference > 15
    html = page(report)
    assert "Prompt-to-Prompt minus re-prompted" in html and "→" in html


def test_an_edit_that_changes_nothing_is_not_made() -> None:
    edit = p2p.edit_number(0)
    knows: Any = Knows([edit.before, edit.after])
    case = p2p.build(p2p.Settings(), 1, knows, knows).case(0)
    before, after = render(edit.before), render(edit.after)
    shown = Shown(
        case, {"source": before, "reprompted": after, "prompt_to_prompt": before, "before": before, "after": after}
    )
    (found,) = editing.EditJudge(knows, knows, GROUPS)([shown])
    lazy = found["prompt_to_prompt"]
    assert (
        lazy[editing.MADE] == 0.0
        and lazy[editing.REST] == 1.0
        and lazy[editing.PSNR] == editing.CEILING
        and lazy[editing.L1] == 0.0
    )
    assert found["reprompted"][editing.MADE] == 1.0


# Captions.


@pytest.mark.parametrize("name", ["captions", "two_objects"])
def test_caption_suites_give_the_numbers_of_theatre_quality(tmp_path: Path, name: str) -> None:
    """Same scenes, same noise, same questions, on pictures of which some show another scene."""
    n = 8
    mix, first = (CORE_MIX, 10_000) if name == "captions" else (TWO_OBJECTS, 20_000)
    scenes, others = scenes_of(mix, n, first), scenes_of(mix, n, first + 500)
    of = {full_caption(scene): i for i, scene in enumerate(scenes)}
    seeds: list[int] = []

    def picture(prompt: str, controlled: bool, seed: int) -> Image.Image:
        seeds.append(seed)
        i = of[prompt]
        return render(others[i] if i % 3 == 0 else scenes[i])

    reader: Any = Knows([*scenes, *others])
    build = captions.build if name == "captions" else captions.build_two_objects
    report = measured(build(captions.Settings(), n, reader, Words()), Draws(picture), tmp_path)
    assert seeds == list(range(1000, 1000 + n))
    quality = caption_quality if name == "captions" else two_object_quality
    expected = quality(lambda texts, seed: [picture(t, False, seed + i) for i, t in enumerate(texts)], reader, n, 5)
    assert seeds[n:] == seeds[:n]
    for question, estimate in expected.items():
        row = report.row(question)
        assert row is not None
        assert row.cells["drawn"].value == pytest.approx(estimate.mean) and row.cells["drawn"].n == estimate.n
        assert row.cells["drawn"].low == pytest.approx(estimate.low)
        assert row.cells["truth"].value == 1.0
    assert report.row("CLIP score") is not None
    sets = {row.measure: row for row in report.rows if row.measure in ("KID", "FID")}
    assert set(sets) == {"KID", "FID"} and all(set(row.cells) == {"drawn"} for row in sets.values())
    assert all(row.extractor.startswith("theatre-attributes@") for row in sets.values())
    if name == "captions":
        assert values(report.rows, ALL, "truth") == 1.0


@pytest.mark.parametrize("kept", [True, False])
def test_combinations_are_right_together_or_not(kept: bool) -> None:
    """A drawer that shows what it is told, and one that gives every second picture another scene's looks."""
    n = 9
    scenes, plain = scenes_of(CORE_MIX, n, 30_000, "combination"), scenes_of(CORE_MIX, n, 40_000)
    of = {full_caption(scene): scene for scene in (*scenes, *plain)}
    wrong = scenes_of(CORE_MIX, 1, 50_000)[0]

    def draw(texts: Any, seed: int) -> list[Image.Image]:
        return [render(of[text] if kept or i % 2 == 0 else wrong) for i, text in enumerate(texts)]

    reader: Any = Knows([*scenes, *plain, wrong])
    found = combination_quality(draw, reader, n, n)
    assert (found["together"].mean == found["apart"].mean == 1.0) if kept else found["together"].mean < 0.7
    assert found["place"].n == found["together"].n == n


# Retargeting.


def test_retarget_suite_gives_the_verdicts_of_the_command(theatre: Path, tmp_path: Path) -> None:
    n = 3
    judge = Judge.load()
    suite = retarget.build(retarget.Settings(model=str(theatre), steps=2), n, judge)
    assert [arm.name for arm in suite.arms] == ["source", *METHODS, "truth"]
    drawer = PipelineDrawer(str(theatre), suite.weights)
    report = measured(suite, drawer, tmp_path, 2)
    pipe, trial = Pipeline.from_pretrained(str(theatre)), Trial(model=str(theatre), steps=2)
    pairs = [pair_number(FIRST_PAIR + number) for number in range(n)]
    for name in METHODS:
        parts = [range(FIRST_PAIR, FIRST_PAIR + 2), range(FIRST_PAIR + 2, FIRST_PAIR + 3)]
        drawn = [picture for part in parts for picture in draw(pipe, name, part, trial)]
        verdicts = judge(drawn, pairs, range(FIRST_PAIR, FIRST_PAIR + n), name, "")
        for measure in MEASURES:
            expected = [v for v in (verdict.value(measure) for verdict in verdicts) if v is not None]
            assert values(report.rows, measure, name) == pytest.approx(np.mean(expected))
    assert values(report.rows, "distance", "truth") == 0.0 and values(report.rows, "ssim", "truth") == pytest.approx(1)
    assert [row.measure for row in report.differences] == list(MEASURES)
    assert report.baseline == "ip_adapter" and report.ours == "appearance_control"
    assert "retarget" in page(report)


def test_retarget_leaves_out_what_is_not_there(theatre: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge: Any = Judge.load()
    only = retarget.build(retarget.Settings(methods=("controlnet",)), 1, judge)
    assert [arm.name for arm in only.arms] == ["source", "controlnet", "truth"] and only.table.baseline is None
    assert only.weights == ("theatre/pose",)
    monkeypatch.setattr(
        retarget_methods,
        "METHODS",
        {**METHODS, "ip_adapter": replace(METHODS["ip_adapter"], weights=("theatre/gone",))},
    )
    assert "ip_adapter" not in [arm.name for arm in retarget.build(retarget.Settings(), 1, judge).arms]
    with pytest.raises(ModelError, match="gone"):
        retarget.build(retarget.Settings(methods=("ip_adapter",)), 1, judge)


# The table.


def test_every_suite_opens_with_the_theatre_of_the_installation(theatre: Path) -> None:
    for name in SUITES:
        suite = open_suite(name, 2)
        assert suite.name == name and suite.n == 2
        first, second = suite.case(0), suite.case(1)
        assert set(first.specs) | set(first.known) | set(first.made) == {arm.name for arm in suite.arms}
        assert first.title != second.title
        assert {spec.num_images for spec in first.specs.values()} <= {1}
        for make in first.known.values():
            side = CANVAS * 2 if name == "upscale" else CANVAS
            assert make().size == (side, side)
        about = suite.about("fake")
        assert about == open_suite(name, 7).about("fake") != open_suite(name, 2, {"steps": 3}).about("fake")
        assert {"model", "steps", "guidance_scale", "seed"} <= set(settings_of(name))


def test_readers_belong_to_a_measurement(theatre: Path) -> None:
    import torch

    torch.manual_seed(1)
    other = AttributeReader(loading_answers(), size=32, width=8)
    suites = [excite.build(excite.Settings(), 1, reader, Words()) for reader in (None, other)]
    assert suites[0].about("fake")["judges"] != suites[1].about("fake")["judges"]
    assert suites[0].measures[0].extractor != suites[1].measures[0].extractor


def loading_answers() -> Any:
    from controlroom.data.theatre.attributes import ANSWERS

    return ANSWERS


def test_wrong_names_and_settings() -> None:
    with pytest.raises(InputError, match="Did you mean 'prompt_to_prompt'"):
        open_suite("prompt-to-prompt")
    with pytest.raises(InputError, match="There are: attend_and_excite"):
        settings_of("nothing like it")
    with pytest.raises(InputError, match="at least one case"):
        open_suite("captions", 0)
    with pytest.raises(InputError, match="step_size"):
        open_suite("attend_and_excite", 1, {"step_size": 0})
    with pytest.raises(InputError, match="nonsense"):
        open_suite("attend_and_excite", 1, {"nonsense": 1})


def test_every_suite_has_its_row_in_the_docs() -> None:
    text = (Path(__file__).parents[3] / "docs/evaluation.md").read_text()
    named = "".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    assert [name for name in SUITES if f"`{name}`" not in named] == []
