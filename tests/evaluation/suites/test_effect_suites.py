"""The suites of effects: each runs from end to end on a theatre of miniatures, and counts what is there to count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from controlroom.backbones import loading
from controlroom.controls.editing.prompt_to_prompt import PromptToPrompt
from controlroom.controls.guidance.prompt_weighting import PromptWeighting
from controlroom.controls.guidance.semantic_guidance import SemanticGuidance
from controlroom.core.errors import InputError
from controlroom.data.theatre.attributes import attributes
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.edits import KINDS, sample_edit
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import Scene
from controlroom.data.theatre.truth import maps
from controlroom.evaluation.suites import editing
from controlroom.evaluation.suites import imagic as imagic_suite
from controlroom.evaluation.suites import instruct_pix2pix as instruct
from controlroom.evaluation.suites import inversion as inversion_suite
from controlroom.evaluation.suites import masactrl as masactrl_suite
from controlroom.evaluation.suites import pix2pix_zero as zero
from controlroom.evaluation.suites import prompt_to_prompt_refine as refine
from controlroom.evaluation.suites import prompt_to_prompt_reweight as reweight
from controlroom.evaluation.suites import prompt_weighting as weighting
from controlroom.evaluation.suites import self_guidance as selfg
from controlroom.evaluation.suites import semantic_guidance as sega
from controlroom.evaluation.suites.drawing import PipelineDrawer
from controlroom.evaluation.suites.journal import Journal
from controlroom.evaluation.suites.pages import markdown, page
from controlroom.evaluation.suites.report import Report, Row, summarise
from controlroom.evaluation.suites.runner import run
from controlroom.evaluation.suites.suite import Shown, Suite
from controlroom.evaluation.suites.table import open_suite
from tests.evaluation.suites.stage import Draws, Knows, write_stage
from tests.tiny import tiny_unet

SMALL: dict[str, dict[str, Any]] = {
    "guidance_methods": {"interval": (0.0, 0.5)},
    "prompt_weighting": {"weights": (0.5, 1.0, 1.5)},
    "semantic_guidance": {},
    "inversion": {"iterations": 1},
    "prompt_to_prompt_refine": {},
    "prompt_to_prompt_reweight": {"weights": (0.5, 1.0, 2.0)},
    "self_guidance": {},
    "masactrl": {},
    "pix2pix_zero": {},
    "instruct_pix2pix": {},
    "instruct_pix2pix_sweep": {"image_scales": (1.0, 2.0), "text_scales": (3.0,)},
    "imagic": {"embedding_steps": 2, "unet_steps": 2, "alphas": (1.0,)},
}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_stage(tmp_path_factory.mktemp("stage") / "theatre")
    tiny_unet(in_channels=8).save_pretrained(str(folder / "instruct_pix2pix"))
    return folder


@pytest.fixture
def theatre(stage: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(loading, "theatre_folder", lambda: stage)
    return stage


def measured(suite: Suite[Any], drawer: Any, folder: Path, batch_size: int = 4) -> Report:
    about = suite.about(drawer.fingerprint)
    journal = Journal(folder / f"{suite.name}.cases.jsonl", about)
    return summarise(suite, run(suite, drawer, journal, batch_size), about)


def value(rows: list[Row], measure: str, arm: str) -> float:
    found = next(row for row in rows if row.measure == measure).cells[arm].value
    assert found is not None
    return found


@pytest.mark.parametrize("name", SMALL)
def test_every_suite_runs_on_the_stage(theatre: Path, tmp_path: Path, name: str) -> None:
    settings = {"steps": 2, **SMALL[name]}
    suite = open_suite(name, 2, settings)
    drawer = PipelineDrawer("theatre", suite.weights)
    report = measured(suite, drawer, tmp_path, 2)
    assert report.n == 2 and len(report.picked) == 2
    arms = {arm.name for arm in suite.arms}
    assert all(set(one.thumbnails) == arms for one in report.picked)
    for arm in (suite.table.ours, suite.table.baseline):
        assert any(arm in row.cells for row in report.rows)
    assert report.differences and suite.table.ours in report.differences[0].cells
    assert name in page(report) and report.title in markdown(report)
    # What is there is not drawn again.
    again = measured(open_suite(name, 2, settings), _Never(drawer.fingerprint), tmp_path)
    assert again.rows == report.rows


class _Never:
    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint

    def __call__(self, spec: Any) -> Any:
        raise AssertionError("a finished case was drawn again")


# Edits.


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("prop")])
def test_true_edits_are_made_and_keep_the_rest(kind: str) -> None:
    """Truth through the judge: all made, all kept, and the region holds what changes."""
    edits = [editing.edit_number(number, (kind,)) for number in range(3)]
    knows: Any = Knows([scene for edit in edits for scene in (edit.before, edit.after)])
    groups = (editing.Compared("before", ("after", "lazy"), true=True), editing.Compared("after", ("before",)))
    judge = editing.EditJudge(knows, knows, groups[:1])
    shown: list[Any] = []
    for edit in edits:
        before, after = render(edit.before), render(edit.after)
        case: Any = type("Case", (), {"truth": edit})()
        shown.append(Shown(case, {"before": before, "after": after, "lazy": before}))
    for edit, row in zip(edits, judge(shown), strict=True):
        assert edit.kind == kind and row["after"][editing.MADE] == 1.0 and row["lazy"][editing.MADE] == 0.0
        assert row["after"][editing.REST] == row["lazy"][editing.REST] == 1.0
        assert row["before"][editing.SOURCE_RIGHT] == 1.0
        if kind in editing.ABOUT:
            assert row["lazy"][editing.PSNR] == editing.CEILING
            outside = row["after"][editing.PSNR]
            assert outside is not None and outside > 25
        else:
            assert row["after"][editing.PSNR] is None


def test_true_regions_are_where_the_truth_differs() -> None:
    edit = instruct.triple(KINDS.index("place"), KINDS)
    assert edit.kind == "place"
    knows: Any = Knows([edit.before, edit.after])
    judge = editing.EditJudge(
        knows, knows, [editing.Compared("before", ("after", "lazy"), true=True)], true_region=True
    )
    before, after = render(edit.before), render(edit.after)
    case: Any = type("Case", (), {"truth": edit})()
    (row,) = judge([Shown(case, {"before": before, "after": after, "lazy": before})])
    psnr = row["after"][editing.PSNR]
    assert psnr is not None and psnr > 30 and row["after"][editing.MADE] == 1.0 and row["lazy"][editing.MADE] == 0.0
    assert editing.HELD not in {measure.name for measure in judge.measures}


def test_props_are_judged_by_their_own_questions() -> None:
    edit = sample_edit(3, "held_out", "prop colour")
    (question,) = editing.changed_questions(edit)
    assert question in {prop.kind for prop in edit.before.props} and question not in editing.kept_questions(edit)
    assert "place" in editing.kept_questions(edit)
    with pytest.raises(InputError, match="kinds are some of"):
        editing.edit_number(0, ("nonsense",))


# Prompt weighting.


def test_a_rate_that_follows_the_weight_is_seen(tmp_path: Path) -> None:
    """Below 1 the weighed attribute is lost in every picture, above it is there; everything else stays."""
    n, settings = 4, weighting.Settings()
    cases = [weighting.weighed_scene(number, settings.attributes) for number in range(n)]
    pictures: dict[str, Scene] = {}
    for one in cases:
        other = _without(one)
        for weight in settings.weights:
            prompt = weighting.weighted(one.scene, one.attribute, weight, "a1111")
            assert (f":{weight:g})" in prompt) == (weight != 1)
            pictures[prompt] = other if weight < 1 else one.scene
    assert len(pictures) == n * len(settings.weights)
    reader: Any = Knows([*pictures.values()])
    drawer = Draws(lambda prompt, controlled, seed: render(pictures[prompt]))
    report = measured(weighting.build(settings, n, reader), drawer, tmp_path)
    assert [controlled for _, _, controlled in drawer.runs] == [True, True, False, True, True]
    assert [value(report.rows, weighting.SHOWN, arm) for arm in ("0.5", "0.75", "1", "1.25", "1.5")] == [0, 0, 1, 1, 1]
    assert value(report.rows, weighting.OTHERS, "0.5") == 1.0
    assert value(report.differences, weighting.SHOWN, "0.5") == -1.0
    (rise,) = report.derived
    assert (rise.cells[""].value or 0) > 0.5
    assert "weight 1 (no control)" in markdown(report)


def _without(one: weighting.Weighed) -> Scene:
    """The scene with another answer to the weighed question."""
    puppet = one.scene.puppets[0]
    identity = puppet.identity
    if one.attribute == "hair colour":
        identity = replace(identity, hair_colour="blue" if identity.hair_colour != "blue" else "black")
    elif one.attribute == "top pattern":
        identity = replace(identity, top=replace(identity.top, pattern="plain"))
    elif one.attribute == "lower":
        lower = "shorts" if identity.lower.kind != "shorts" else "trousers"
        identity = replace(identity, lower=replace(identity.lower, kind=lower))
    else:
        identity = replace(identity, hat="none")
    return replace(one.scene, actors=(replace(puppet, identity=identity),))


def test_weights_are_written_in_either_notation() -> None:
    from controlroom.controls.prompt_notation import parse
    from controlroom.controls.prompt_tree import words_of

    for number in range(12):
        one = weighting.weighed_scene(number, weighting.KNOWN)
        for dialect in ("a1111", "compel"):
            text = weighting.weighted(one.scene, one.attribute, 0.75, dialect)
            assert text != full_caption(one.scene) and words_of(parse(text, dialect)) == full_caption(one.scene)
    with pytest.raises(InputError, match="1 among them"):
        weighting.build(weighting.Settings(weights=(0.5, 2.0)), 1, Knows([]))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="attributes are some of"):
        weighting.build(weighting.Settings(attributes=("pose",)), 1, Knows([]))  # type: ignore[arg-type]


def test_reweighting_takes_the_words_of_the_attribute() -> None:
    knows: Any = Knows([])
    suite = reweight.build(reweight.Settings(), 4, knows, knows)
    for number in range(4):
        case = suite.case(number)
        (control,) = case.specs["4"].controls
        assert isinstance(control, PromptToPrompt) and control.source == [case.specs["1"].prompt]
        ((words, factor),) = (control.reweight or {}).items()
        assert words in str(case.specs["1"].prompt) and factor == 4.0 and not case.specs["1"].controls


# SEGA, Pix2Pix-Zero, Prompt-to-Prompt.


def test_concepts_name_what_changes() -> None:
    knows: Any = Knows([])
    suite = sega.build(sega.Settings(steps=20), 6, knows, knows)
    for number, kind in enumerate(sega.KINDS):
        case = suite.case(number)
        edit, spec = case.truth, case.specs["semantic_guidance"]
        assert edit.kind == kind and spec.prompt == full_caption(edit.before)
        (control,) = spec.controls
        assert isinstance(control, SemanticGuidance)
        first = control.edits[0]
        assert not first.reverse and first.prompt == sega.sentence(edit.after, kind) and first.warmup == 1
        assert all(word in full_caption(edit.after) for word in first.prompt.split() if word not in ("a", "an"))
        assert first.threshold == (0.5 if kind == "place" else 0.9)
        for away in control.edits[1:]:
            assert away.reverse and away.prompt == sega.sentence(edit.before, kind) != first.prompt
        assert (sega.concept(edit.after, kind) or "") in first.prompt
    (alone,) = sega.control(editing.edit_number(0, ("top colour",)), sega.Settings(take_away=False)).edits
    assert not alone.reverse


def test_sentences_of_a_direction_differ_in_one_word() -> None:
    edit = editing.edit_number(0, ("top colour",), zero.as_many_words)
    there, wanted = (zero.sentences(scene, edit.kind) for scene in (edit.before, edit.after))
    assert len(there) == len(wanted) == zero.SENTENCES and len(set(there)) > 0.9 * zero.SENTENCES
    for one, other in zip(there, wanted, strict=True):
        different = [pair for pair in zip(one.split(), other.split(), strict=True) if pair[0] != pair[1]]
        assert [pair for pair in different if pair[0] not in ("a", "an")] == [
            (attributes(edit.before)["top colour"], attributes(edit.after)["top colour"])
        ]
    places = {one.split().index(attributes(edit.before)["top colour"]) for one in there}
    assert len(places) >= 8  # the colour stands in many places, since a direction has a vector for each
    with pytest.raises(InputError, match="top colour"):
        zero.sentences(edit.before, "pose")


def test_refining_adds_a_word() -> None:
    knows: Any = Knows([])
    suite = refine.build(refine.Settings(), 3, knows, knows)
    for number in range(3):
        case = suite.case(number)
        before, after = (attributes(scene)["top pattern"] for scene in (case.truth.before, case.truth.after))
        first, second = (str(case.specs[arm].prompt).split() for arm in ("source", "prompt_to_prompt"))
        assert before == "plain" != after
        second.remove(str(after))
        assert second == first and case.specs["prompt_to_prompt"].controls[0].mode == "refine"  # type: ignore[attr-defined]


def test_poses_are_said_on_both_sides() -> None:
    knows: Any = Knows([])
    suite = masactrl_suite.build(masactrl_suite.Settings(steps=50), 3, sure(), knows)
    for number in range(3):
        case = suite.case(number)
        assert editing.changed_questions(case.truth) == ["pose"]
        assert case.specs["masactrl"].controls[0].start_step == 4  # type: ignore[attr-defined]


def sure() -> Any:
    from controlroom.signals.readers import AttributeReader
    from tests.evaluation.suites.stage import REAL

    return AttributeReader.load(REAL / "readers/attributes")


# Self-guidance.


def test_commands_take_turns_and_name_the_thing() -> None:
    settings = selfg.Settings()
    asked = [selfg.command(number, settings) for number in range(4)]
    assert [one.shift for one in asked] == [0.15, None, -0.15, None]
    assert [one.size for one in asked] == [None, 0.6, None, 1.6]
    for one in asked:
        caption, control = full_caption(one.scene), selfg.control(one, settings)
        assert one.thing in caption and one.scene.place in caption
        assert not {"small", "big"} & set(caption.split())
        assert control.hold == [one.scene.place] and control.edits[0].moves
        assert (control.hold_shape > 0) == (one.shift is not None)


def test_shifts_and_sizes_are_measured() -> None:
    scene = selfg.command(0, selfg.Settings()).scene
    thing = scene.props[0]

    def seen(**changes: Any) -> Any:
        return maps(replace(scene, actors=(replace(thing, **changes),))).mask(0)

    before = seen(x=60.0)
    change = selfg.moved(before, seen(x=72.8))
    assert change is not None and change == pytest.approx((0.1, 1.0), abs=0.01)
    grown = selfg.moved(before, seen(x=60.0, scale=thing.scale * 1.6**0.5))
    assert grown is not None and grown[1] == pytest.approx(1.6, abs=0.12)
    asked = selfg.Command(scene, shift=0.15)
    assert selfg.followed(asked, change)[selfg.SHIFTED] == 1.0
    assert selfg.followed(asked, (0.0, 1.0)) == {selfg.SHIFTED: 0.0, selfg.SHIFT: 0.15}
    assert selfg.followed(asked, None) == {selfg.SHIFTED: 0.0, selfg.SHIFT: None}
    larger = selfg.Command(scene, size=1.6)
    assert selfg.followed(larger, (0.0, 1.3))[selfg.RESIZED] == 1.0
    assert selfg.followed(larger, (0.0, 1.1))[selfg.RESIZED] == 0.0
    assert selfg.moved(before, np.zeros_like(before)) is None


# True pictures.


def test_inversion_loses_nothing_where_the_autoencoder_is_drawn() -> None:
    knows: Any = sure()
    suite = inversion_suite.build(inversion_suite.Settings(), 1, knows)
    case = suite.case(0)
    true = render(case.truth)
    worse = Image.fromarray(np.clip(np.asarray(true).astype(int) + 10, 0, 255).astype(np.uint8))
    pictures = dict.fromkeys(("autoencoder", *inversion_suite.WAYS), worse) | {"truth": true, "ddim": true}
    (row,) = inversion_suite.ReconstructionJudge()([Shown(case, pictures)])
    assert row["null_text"][inversion_suite.LOST] == 0.0
    lost = row["ddim"][inversion_suite.LOST]
    assert lost is not None and lost < -20
    assert inversion_suite.within([row]).mean == 1.0


def test_sweep_has_every_pair() -> None:
    knows: Any = Knows([])
    settings = instruct.Settings(image_scales=(2.0, 1.0), text_scales=(7.5,))
    suite = instruct.build_sweep(settings, 1, knows, knows)
    scales = [instruct.scales_of(arm.name) for arm in suite.arms]
    assert [pair for pair in scales if pair] == [(1.0, 7.5), (2.0, 7.5)]
    assert [instruct.triple(number).kind for number in range(len(KINDS))] == list(KINDS)
    with pytest.raises(InputError, match="kinds are some of"):
        instruct.triple(0, ("nonsense",))
    with pytest.raises(InputError, match="sweep"):
        instruct.build_sweep(instruct.Settings(text_scales=(1.0,)), 1, knows, knows)


def test_strengths_of_a_case_come_from_one_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[str] = []

    def fake(pipe: Any, picture: Any, spec: Any, settings: Any) -> dict[str, Image.Image]:
        fits.append(spec.prompt)
        return {imagic_suite.arm_of(alpha): picture for alpha in settings.alphas}

    monkeypatch.setattr(imagic_suite, "drawn", fake)
    knows: Any = Knows([])
    suite = imagic_suite.build(imagic_suite.Settings(alphas=(1.0, 0.5)), 2, knows, knows)
    case, pipe = suite.case(1), Any
    assert case.made["alpha 1"](pipe) is case.made["alpha 0.5"](pipe)  # type: ignore[arg-type]
    assert fits == [full_caption(case.truth.after)]


def test_weighting_controls_read_the_prompt() -> None:
    suite = weighting.build(weighting.Settings(dialect="compel"), 1, Knows([]))  # type: ignore[arg-type]
    (control,) = suite.case(0).specs["1.5"].controls
    assert isinstance(control, PromptWeighting) and control.dialect == "compel"
