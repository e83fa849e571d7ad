"""Suites of subjects with something else: a style, a view, another person; DreamBooth among several pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from controlroom.backbones import loading
from controlroom.core.errors import InputError, ModelError
from controlroom.data.theatre import vocabulary as v
from controlroom.data.theatre.attributes import attributes
from controlroom.data.theatre.render import render
from controlroom.data.theatre.subjects import theatre_subjects
from controlroom.evaluation.suites import interpolation, people, subject_style, subject_views
from controlroom.evaluation.suites.drawing import PipelineDrawer
from controlroom.evaluation.suites.measuring import measured
from controlroom.evaluation.suites.report import Report
from controlroom.evaluation.suites.subject import BOTH, FOLLOWED, KEPT, OWN, Asked
from controlroom.evaluation.suites.suite import Shown
from controlroom.evaluation.suites.table import open_suite
from tests.controls.loras import tiny_lora
from tests.controls.nets import tiny_image_encoder, tiny_ip_adapter
from tests.evaluation.suites.stage import Knows, write_stage
from tests.tiny import tiny_sd1

PUPPETS = 4


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A theatre of miniatures, LoRAs of its people and of a style, an IP-Adapter, DreamBooth's networks."""
    folder = write_stage(tmp_path_factory.mktemp("stage") / "theatre")
    for number, one in enumerate(theatre_subjects(PUPPETS, 0)):
        place = folder.parent / "adapters/dreambooth_lora" / one.name
        place.mkdir(parents=True)
        tiny_lora(place / "lora.safetensors", tiny_sd1, seed=number)
    tiny_lora(folder.parent / "style.safetensors", tiny_sd1, seed=20)
    (folder / "ip_adapter").mkdir()
    save_file(tiny_ip_adapter(tiny_sd1().unet), str(folder / "ip_adapter/ip_adapter.safetensors"))
    tiny_image_encoder().save_pretrained(folder / "ip_adapter/image_encoder")
    person = folder.parent / "dreambooth" / people.person_number(0).name
    tiny_sd1(seed=3).unet.save_pretrained(str(person / "weights/unet"))
    other = folder.parent / "dreambooth" / people.person_number(1).name
    tiny_sd1(seed=4).unet.save_pretrained(str(other / "weights/unet"))
    return folder


@pytest.fixture
def theatre(stage: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(loading, "theatre_folder", lambda: stage)
    return stage


def cells(report: Report, measure: str) -> dict[str, float | None]:
    row = report.row(measure)
    assert row is not None
    return {arm: cell.value for arm, cell in row.cells.items()}


# A style.


def styled(stage: Path, **more: Any) -> dict[str, Any]:
    given = {"adapters": str(stage.parent / "adapters"), "style_lora": str(stage.parent / "style.safetensors")}
    return {"puppets": PUPPETS, "props": 0, "steps": 2, **given, **more}


def test_subject_and_style_are_drawn_alone_added_and_merged(theatre: Path, tmp_path: Path) -> None:
    suite = open_suite("subject_style", 2, styled(theatre, scale=0.7, style_scale=0.4))
    case = suite.case(0)
    words, own, style, added = (case.specs[arm] for arm in ("words", "subject", "style", "added"))
    assert words.prompt == style.prompt and own.prompt == added.prompt and "sks" in str(own.prompt)
    assert v.STYLE_PHRASES["watercolour"] in str(words.prompt) and {s.seed for s in case.specs.values()} == {1000}
    assert [control.scale for control in added.controls] == [0.7, 0.4]  # type: ignore[attr-defined]
    assert added.controls == [*own.controls, *style.controls]
    report = measured(suite, tmp_path / "cases.jsonl")
    # The merged file is the sum of both: the same picture but for the rounding to bytes.
    merged = cells(report, subject_style.SAME)
    assert set(merged) == {"merged"} and (merged["merged"] or 0.0) > 50
    assert set(cells(report, subject_style.STYLE)) == {"words", "subject", "style", "added", "merged"}
    assert set(cells(report, KEPT)) == {"words", "subject", "style", "added", "merged", OWN}
    pipe = PipelineDrawer("theatre").pipeline
    pictures = {arm: pipe.run(case.specs[arm]).images[0].tobytes() for arm in case.specs}
    assert len(set(pictures.values())) == 4


def test_style_is_judged_by_what_it_leaves_to_be_seen() -> None:
    one = theatre_subjects(1, 0)[0]
    settings = subject_style.Settings(style="pixel", style_words="sks style")
    prompt = subject_style.prompts_of(settings)[0]
    assert prompt.text == f"a {{token}} {v.PLACE_PHRASES['beach']}, sks style"
    assert "top pattern" not in one.keeps(prompt) and "top colour" in one.keeps(prompt)
    knows: Any = Knows(one.scenes)
    judge = subject_style.StyledJudge.__new__(subject_style.StyledJudge)
    judge.reader, judge.arms = knows, ("added",)
    case: Any = type("Case", (), {"truth": Asked(one, prompt)})
    (row,) = judge([Shown(case, {"added": render(one.scenes[0])})])
    place = attributes(one.scenes[0])["place"]
    assert row["added"][KEPT] == 1.0 and row["added"][subject_style.STYLE] == 0.0
    assert row["added"][subject_style.PLACE] == float(place == "beach")


def test_what_cannot_be_merged_is_refused(theatre: Path, tmp_path: Path) -> None:
    alone = open_suite("subject_style", 1)
    assert [arm.name for arm in alone.arms] == ["words", OWN] and alone.table.ours is None
    for more, said in (
        ({"style": "flat"}, "no style"),
        ({"style_lora": ""}, "both kinds"),
        ({"adapters": str(theatre.parent / "networks")}, "not a LoRA alone"),
    ):
        place = theatre.parent / "networks/dreambooth" / theatre_subjects(1, 0)[0].name / "unet"
        place.mkdir(parents=True, exist_ok=True)
        with pytest.raises(InputError, match=said):
            open_suite("subject_style", 1, styled(theatre, **more))


# Views.


def test_views_are_asked_for_and_counted_by_themselves(theatre: Path, tmp_path: Path) -> None:
    settings = {"puppets": 1, "steps": 2, "adapters": str(theatre.parent / "adapters")}
    suite = open_suite("subject_views", 2, settings)
    texts = [str(suite.case(number).specs["dreambooth_lora"].prompt) for number in range(12)]
    assert len(set(texts)) == 12
    assert all(sum(phrase in text for text in texts) == 3 for phrase in v.VIEW_PHRASES.values())
    case = suite.case(2)
    assert case.truth.prompt.view == "back" and "expression" not in case.truth.subject.keeps(case.truth.prompt)
    report = measured(suite, tmp_path / "cases.jsonl")
    views = [suite.case(number).truth.prompt.view for number in range(2)]
    for view in v.VIEWS:
        found = cells(report, subject_views.kept_from(view))
        assert set(found) == ({"class", "dreambooth_lora", OWN} if view in views else set())
        assert set(cells(report, subject_views.seen_from(view))) == (set(found) - {OWN})
    assert set(cells(report, BOTH)) == set(cells(report, FOLLOWED)) == {"class", "dreambooth_lora"}


# Between two people.


@pytest.mark.parametrize("by", ["features", "scales", "loras"])
def test_one_person_becomes_another(theatre: Path, tmp_path: Path, by: str) -> None:
    settings = {"puppets": PUPPETS, "steps": 2, "by": by, "shares": [0.0, 0.5, 1.0]}
    settings |= {"adapters": str(theatre.parent / "adapters")} if by == "loras" else {}
    suite = open_suite("interpolation", 2, settings)
    case = suite.case(0)
    assert case.truth.first.class_words == case.truth.second.class_words and case.truth.first != case.truth.second
    report = measured(suite, tmp_path / "cases.jsonl")
    assert set(cells(report, interpolation.OF_SECOND)) == {"the first", "0", "0.5", "1", "the second"}
    pipe = PipelineDrawer("theatre").pipeline
    drawn = {
        arm: (case.made[arm](pipe) if arm in case.made else pipe.run(case.specs[arm]).images[0]).tobytes()
        for arm in ("0", "0.5", "1")
    }
    assert len(set(drawn.values())) == 3
    if by == "features":  # at the ends it is the one picture, and nothing of the other
        scaled = open_suite("interpolation", 2, {**settings, "by": "scales"}).case(0)
        assert all(pipe.run(scaled.specs[end]).images[0].tobytes() == drawn[end] for end in ("0", "1"))


def test_looks_of_the_two_are_told_apart() -> None:
    pair = interpolation.Pair(*theatre_subjects(2, 0))
    knows: Any = Knows(pair.scenes)
    judge = interpolation.PairJudge(knows)
    case: Any = type("Case", (), {"truth": pair})
    (row,) = judge([Shown(case, {"a": render(pair.scenes[0]), "b": render(pair.scenes[1])})])
    names = (interpolation.OF_FIRST, interpolation.OF_SECOND, interpolation.OF_ONE)
    assert [row["a"][name] for name in names] == [1.0, 0.0, 1.0]
    assert [row["b"][name] for name in names] == [0.0, 1.0, 1.0]


def test_pairs_that_cannot_be_are_refused(theatre: Path) -> None:
    for more, said in (
        ({"by": "loras"}, "belong together"),
        ({"puppets": 1}, "no two people"),
        ({"shares": [0.5]}, "shares"),
        ({"shares": [0.5, 0.2]}, "shares"),
    ):
        with pytest.raises(InputError, match=said):
            open_suite("interpolation", 1, more)


# DreamBooth among ways of reading pictures.


def test_dreambooth_is_one_of_the_ways(theatre: Path, tmp_path: Path) -> None:
    settings = {"steps": 2, "ways": ["single", "dreambooth"], "dreambooth": str(theatre.parent / "dreambooth")}
    suite = open_suite("people", 2, settings)
    case = suite.case(0)
    assert "dreambooth" in case.made and set(case.specs) == {"words", "single"}
    report = measured(suite, tmp_path / "cases.jsonl")
    assert set(cells(report, people.AGREES)) == {"words", "single", "dreambooth", "truth"}
    pipe = PipelineDrawer("theatre").pipeline
    assert case.made["dreambooth"](pipe).tobytes() != pipe.run(case.specs["words"]).images[0].tobytes()
    name, pictures = people.dreambooth_data(0)
    assert name == case.truth.name and len(pictures) == 9 and all("{token}" in one.caption for one in pictures)
    with pytest.raises(ModelError, match="holds no adapter"):
        open_suite("people", 3, settings)
    assert "dreambooth" not in people.Settings().account() and "word" not in people.Settings().account()
