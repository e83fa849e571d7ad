"""The suites of several pictures of a person: they run from end to end, and count what is there to count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from controlroom.backbones import loading
from controlroom.backbones.image_aggregator import AggregatorSettings, PictureAttention
from controlroom.backbones.ip_adapter import adapter_from_tensors, save_ip_adapter
from controlroom.controls.personal.ip_adapter import IPAdapter
from controlroom.core.errors import InputError, ModelError
from controlroom.data.theatre.attributes import ANSWERS
from controlroom.data.theatre.people import looks, side_of
from controlroom.data.theatre.render import render
from controlroom.evaluation.metrics.inception_score import inception_score
from controlroom.evaluation.metrics.pixels import unit_pixels
from controlroom.evaluation.suites import people
from controlroom.evaluation.suites.drawing import PipelineDrawer, together
from controlroom.evaluation.suites.journal import Journal
from controlroom.evaluation.suites.report import Report, summarise
from controlroom.evaluation.suites.runner import run
from controlroom.evaluation.suites.suite import Shown, Suite
from controlroom.evaluation.suites.table import open_suite
from controlroom.signals.readers import AttributeReader
from tests.controls.nets import tiny_image_encoder, tiny_ip_adapter
from tests.evaluation.suites.stage import Knows, write_stage
from tests.tiny import tiny_sd1


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A theatre of miniatures with all its IP-Adapters."""
    folder = write_stage(tmp_path_factory.mktemp("stage") / "theatre")
    unet = tiny_sd1().unet
    for seed, name in enumerate(("", "_attention", "_single", "_max", "_average")):
        place = folder / f"ip_adapter{name}"
        place.mkdir()
        adapter = adapter_from_tensors(tiny_ip_adapter(unet, seed=seed), unet)
        if name == "_attention":
            adapter.aggregator = PictureAttention(24, AggregatorSettings())
        save_ip_adapter(adapter, place / "ip_adapter.safetensors")
        tiny_image_encoder().save_pretrained(place / "image_encoder")
    return folder


@pytest.fixture
def theatre(stage: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(loading, "theatre_folder", lambda: stage)
    return stage


def measured(suite: Suite[Any], drawer: Any, folder: Path) -> Report:
    about = suite.about(drawer.fingerprint)
    return summarise(suite, run(suite, drawer, Journal(folder / f"{suite.name}.cases.jsonl", about), 2), about)


def test_it_runs_on_the_stage_and_continues(theatre: Path, tmp_path: Path) -> None:
    settings = {"steps": 2, "ways": ["single", "average", "attention", "max_more"]}
    suite = open_suite("people", 3, settings)
    drawer = PipelineDrawer("theatre", suite.weights)
    report = measured(suite, drawer, tmp_path)
    row = next(row for row in report.rows if row.measure == people.AGREES)
    assert set(row.cells) == {"words", "single", "average", "attention", "max_more", "truth"}
    sets = {row.measure for row in report.rows if "words" in row.cells and "truth" not in row.cells}
    assert {"KID", "FID", "likeness"} <= sets
    assert report.differences and set(report.differences[0].cells) == {"attention", "average", "max_more"}

    class Never:
        fingerprint = drawer.fingerprint

        def __call__(self, spec: Any) -> Any:
            raise AssertionError("a finished case was drawn again")

    assert measured(open_suite("people", 3, settings), Never(), tmp_path).rows == report.rows


def test_identity_by_the_number_of_pictures(theatre: Path, tmp_path: Path) -> None:
    suite = open_suite("people_numbers", 2, {"steps": 2, "ways": ["attention 1", "attention 9", "average 2"]})
    assert suite.table.ours == "attention 9"
    case = suite.case(0)
    shown = {}
    for arm in ("attention 1", "attention 9", "average 2"):
        (control,) = case.specs[arm].controls
        assert isinstance(control, IPAdapter)
        shown[arm] = len(control.image[0])
    assert shown == {"attention 1": 1, "attention 9": 9, "average 2": 2}
    report = measured(suite, PipelineDrawer("theatre", suite.weights), tmp_path)
    assert report.n == 2


def test_people_are_held_out_and_captions_say_nothing_of_their_looks() -> None:
    found = [people.person_number(number) for number in range(3)]
    assert found[2] == people.people("held_out", 3, 10)[2]
    assert len({looks(person.identity) for person in found}) == 3
    suite = people.build(people.Settings(adapter=".", ways=("single",)), 1, _reader())
    for number, person in enumerate(found):
        assert side_of(person.identity) == "held_out" and len(person.scenes) == 10
        words = str(suite.case(number).specs["words"].prompt)
        assert not set(words.split()) & {"hair", "skin", person.identity.top.colour, person.identity.top.kind}
    pair = [suite.case(number).specs["single"] for number in range(2)]
    joined = together(pair, suite.per_prompt)
    assert joined is not None and [len(one) for one in joined.controls[0].image] == [1, 1]  # type: ignore[attr-defined]


def _reader() -> AttributeReader:
    torch.manual_seed(0)
    return AttributeReader(ANSWERS, size=32, width=8).eval()


def test_the_judge_counts_the_person_and_the_words() -> None:
    one, other = people.person_number(0), people.person_number(1)
    knows: Any = Knows([*one.scenes, *other.scenes])
    judge = people.PeopleJudge(knows, ("truth", "elsewhere", "else"))
    suite = people.build(people.Settings(adapter=".", ways=("single",)), 1, _reader())
    pictures = {"truth": one.scenes[-1], "elsewhere": one.scenes[0], "else": other.scenes[-1]}
    assert one.scenes[0].place != one.scenes[-1].place
    (found,) = judge([Shown(suite.case(0), {arm: render(scene) for arm, scene in pictures.items()})])
    assert all(found["truth"][name] == 1.0 for name in (*people.PARTS, people.ALL, people.TOLD))
    assert found["elsewhere"][people.AGREES] == 1.0 and (found["elsewhere"][people.TOLD] or 0.0) < 1
    assert (found["else"][people.AGREES] or 0.0) < 1 and found["else"][people.ALL] == 0.0


def test_the_score_asks_for_hair_and_top_together() -> None:
    reader = _reader()
    features = people.PeopleFeatures(reader)
    pictures = unit_pixels([Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "white")] * 4)
    logits = features.logits(pictures)
    hair, top = (len(ANSWERS[question]) for question in people.CLASSES)
    assert logits.shape == (12, hair * top)
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(12))
    read = reader(
        torch.nn.functional.interpolate(pictures, (32, 32), mode="bicubic", antialias=True).clamp(0, 1) * 2 - 1
    )
    p = read["hair colour"][1].softmax(0)[2] * read["top colour"][1].softmax(0)[3]
    torch.testing.assert_close(logits[1].exp()[2 * top + 3], p, atol=1e-5, rtol=1e-3)
    # The marginal is that of the pictures: alike pictures of one class have the score 1, whatever the class.
    assert inception_score(logits[:1].expand(20, -1))[0] == pytest.approx(1.0)


def test_what_is_not_here_is_left_out_unless_it_is_asked_for(theatre: Path) -> None:
    names = [arm.name for arm in open_suite("people", 1).arms]
    assert names == ["words", *(name for name in people.WAYS if name != "dreambooth"), "truth"]
    names = [arm.name for arm in open_suite("people", 1, {"max_more": "theatre/nowhere"}).arms]
    assert "max_more" not in names and "average_more" in names
    with pytest.raises(ModelError, match="nowhere"):
        open_suite("people", 1, {"max_more": "theatre/nowhere", "ways": ["max_more"]})
    with pytest.raises(InputError, match="'sum'"):
        open_suite("people", 1, {"ways": ["sum"]})
