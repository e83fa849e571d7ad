"""The suite of subjects: it runs from end to end with adapters of every kind, and counts what is there to count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from controlroom.backbones import loading
from controlroom.backbones.learned_words import LearnedWord, save_learned_words
from controlroom.core.errors import InputError, ModelError
from controlroom.data.theatre.attributes import attributes
from controlroom.data.theatre.render import render
from controlroom.data.theatre.subjects import score, theatre_subjects
from controlroom.evaluation.extractors.theatre import TheatreFeatures
from controlroom.evaluation.suites import subject
from controlroom.evaluation.suites.drawing import PipelineDrawer
from controlroom.evaluation.suites.journal import Journal
from controlroom.evaluation.suites.report import Report, summarise
from controlroom.evaluation.suites.runner import run
from controlroom.evaluation.suites.suite import Shown, Suite
from controlroom.evaluation.suites.table import open_suite
from controlroom.signals.readers import AttributeReader
from tests.controls.loras import tiny_lora
from tests.evaluation.suites.stage import Knows, write_stage
from tests.tiny import tiny_sd1
from tests.traces import traces

COUNT: dict[str, Any] = {"puppets": 2, "props": 1}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A theatre of miniatures, and adapters of all kinds of two subjects."""
    folder = write_stage(tmp_path_factory.mktemp("stage") / "theatre")
    names = [each.name for each in theatre_subjects(2, 1)]
    generator = torch.Generator().manual_seed(0)
    adapters = folder.parent / "adapters"
    for number, name in enumerate(names[:2]):
        dco, word = adapters / "dco-500" / name / "weights", adapters / "textual_inversion" / name
        for place in (dco, word):
            place.mkdir(parents=True)
            learned = LearnedWord("<subject>", (torch.randn(2, 32, generator=generator),))
            save_learned_words(place / "learned_word.safetensors", [learned])
        tiny_lora(dco / "lora.safetensors", tiny_sd1, seed=number)
        tiny_sd1(seed=3 + number).unet.save_pretrained(str(adapters / "dreambooth" / name / "weights/unet"))
    return folder


@pytest.fixture
def theatre(stage: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(loading, "theatre_folder", lambda: stage)
    return stage


def measured(suite: Suite[Any], drawer: Any, folder: Path) -> Report:
    about = suite.about(drawer.fingerprint)
    return summarise(suite, run(suite, drawer, Journal(folder / f"{suite.name}.cases.jsonl", about), 2), about)


def test_it_runs_on_the_stage_and_continues(theatre: Path, tmp_path: Path) -> None:
    settings = {**COUNT, "steps": 2, "adapters": str(theatre.parent / "adapters"), "subject_scales": [2.0, 3.0]}
    suite = open_suite("subject", 2, settings)
    methods = {"dco-500", "dreambooth", "textual_inversion", "dco-500 w2", "dco-500 w3"}
    drawer = PipelineDrawer("theatre", suite.weights)
    drawer.pipeline("a woman", num_inference_steps=1)  # transformers notes the first call in the module
    before = traces(drawer.pipeline)
    report = measured(suite, drawer, tmp_path)
    assert traces(drawer.pipeline) == before
    rows = {row.measure: row.cells for row in report.rows}
    plain = {"dco-500", "dreambooth", "textual_inversion"}
    more = {f"{method} {end}" for method in plain for end in ("again", "class")} | {"class", "class again"}
    assert set(rows[subject.KEPT]) == {*methods, *more, "own"}
    assert set(rows[subject.FOLLOWED]) == {*methods, *more}
    assert set(rows[subject.DIVERSITY]) == {*plain, "class"} and set(rows[subject.DRIFT]) == plain
    drift = {arm: rows[subject.DRIFT][arm].value or 0.0 for arm in plain}
    diversity = {arm: rows[subject.DIVERSITY][arm].value or 0.0 for arm in plain}
    # A word alone changes nothing of a prompt without it.
    assert drift["textual_inversion"] == 0.0 and drift["dreambooth"] > 0.0 and drift["dco-500"] > 0.0
    assert all(value > 0.0 for value in diversity.values())

    class Never:
        fingerprint = drawer.fingerprint

        def __call__(self, spec: Any) -> Any:
            raise AssertionError("a finished case was drawn again")

    assert measured(open_suite("subject", 2, settings), Never(), tmp_path).rows == report.rows


def test_cases_say_who_what_and_how(theatre: Path) -> None:
    adapters = str(theatre.parent / "adapters")
    suite = open_suite("subject", 4, {**COUNT, "adapters": adapters, "steps": 2, "word": "zz"})
    cases = [suite.case(number) for number in range(4)]
    assert [case.truth.subject.name for case in cases[:2]] == [case.truth.subject.name for case in cases[2:]]
    assert len({case.truth.prompt.text for case in cases}) == 4
    first = cases[0]
    who, text = first.truth.subject.class_words, first.truth.prompt.text
    assert first.specs["class"].prompt == first.specs["dco-500 class"].prompt == text.replace("{token}", who)
    assert first.specs["dco-500"].prompt == text.replace("{token}", f"<subject> {who}")
    assert first.specs["textual_inversion"].prompt == text.replace("{token}", "<subject>")
    assert set(first.made) == {"dreambooth", "dreambooth again", "dreambooth class"}
    assert [control.type for control in first.specs["dco-500 w3"].controls] == [
        "textual_inversion",
        "lora",
        "consistency_guidance",
    ]
    assert first.specs["dco-500 w3"].controls[-1].plain == first.specs["class"].prompt  # type: ignore[attr-defined]
    assert {spec.seed for arm, spec in first.specs.items() if not arm.endswith("again")} == {1000}
    alone = open_suite("subject", 2, COUNT)
    assert set(alone.case(0).specs) == {"class", "class again"} and alone.table.ours is None
    fewer = open_suite("subject", 1, {**COUNT, "adapters": adapters, "spread": False, "methods": ["textual_inversion"]})
    assert set(fewer.case(0).specs) == {"class", "textual_inversion"} and not fewer.case(0).made


def test_a_tuned_network_is_what_draws(theatre: Path) -> None:
    adapters = str(theatre.parent / "adapters")
    suite = open_suite(
        "subject", 1, {**COUNT, "adapters": adapters, "steps": 2, "methods": ["dreambooth"], "word": "zz"}
    )
    pipe, case = PipelineDrawer("theatre").pipeline, suite.case(0)
    parameters = [p.data_ptr() for p in pipe.unet.parameters()]
    found = case.made["dreambooth class"](pipe)
    assert [p.data_ptr() for p in pipe.unet.parameters()] == parameters
    plain = pipe.run(case.specs["class"]).images[0]
    pipe.unet.load_state_dict(tiny_sd1(seed=3).unet.state_dict())
    assert found.tobytes() == pipe.run(case.specs["class"]).images[0].tobytes() != plain.tobytes()


def test_judges_count_looks_and_words() -> None:
    one = theatre_subjects(1, 0)[0]
    asked = subject.Asked(one, one.prompts[0])
    knows: Any = Knows(one.scenes)
    arms = {arm: render(scene) for arm, scene in zip(("class", "lora", "own"), one.scenes, strict=False)}
    case: Any = type("Case", (), {"truth": asked})
    judge = subject.SubjectJudge.__new__(subject.SubjectJudge)
    judge.reader, judge.arms = knows, tuple(arms)
    (row,) = judge([Shown(case, arms)])
    for number, arm in enumerate(arms):
        said = {q: a for q, a in attributes(one.scenes[number]).items() if a is not None}
        kept, followed = score(one, asked.prompt, said)
        assert kept == 1.0 and row[arm][subject.KEPT] == 1.0
        assert row[arm][subject.FOLLOWED] == (None if arm == "own" else followed)
        assert row[arm][subject.BOTH] == (None if arm == "own" else float(followed == 1.0))


def test_distances_are_between_the_right_pictures() -> None:
    reader = AttributeReader({"place": ("beach", "room")}, size=32, width=8)
    features = TheatreFeatures(reader)
    judge = subject.SpreadJudge(features, ["lora"])
    same, other = Image.new("RGB", (32, 32), "red"), render(theatre_subjects(1, 0)[0].scenes[0])
    pictures = {"class": same, "class again": same, "lora": same, "lora again": other, "lora class": same}
    case: Any = None
    (row,) = judge([Shown(case, pictures)])
    assert row["class"] == {subject.DIVERSITY: 0.0, subject.DRIFT: None}
    assert row["lora"][subject.DRIFT] == 0.0 and (row["lora"][subject.DIVERSITY] or 0.0) > 0.0


def test_missing_adapters_are_named(theatre: Path, tmp_path: Path) -> None:
    adapters = str(theatre.parent / "adapters")
    for settings, error, said in (
        ({"adapters": str(tmp_path / "none")}, ModelError, "no adapters at"),
        ({"methods": ["dco"]}, InputError, "Methods need a folder"),
        ({"adapters": adapters, "methods": ["hypernetwork"]}, InputError, "No subject was trained by all"),
        ({"adapters": adapters, "subjects": ["nobody"]}, InputError, "no subject 'nobody'"),
        ({"adapters": adapters, "subjects": [theatre_subjects(2, 1)[2].name]}, ModelError, "holds no adapter"),
        ({"adapters": adapters, "scale": 0.0}, InputError, "scale"),
    ):
        with pytest.raises(error, match=said):
            open_suite("subject", 1, {**COUNT, **settings})
