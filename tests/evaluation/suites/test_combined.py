"""The suites of combined edits, of edits of true pictures through inversion, and of enlarging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from controlroom.backbones import loading
from controlroom.core.errors import InputError
from controlroom.data.theatre.attributes import attributes
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.edits import further_edit, sample_edit
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import is_held_out_combination
from controlroom.evaluation.suites import combined, combined_jobs, editing, inverted_edits, upscale
from controlroom.evaluation.suites import pix2pix_zero_real as zero
from controlroom.evaluation.suites import prompt_to_prompt_real as real
from controlroom.evaluation.suites.drawing import PipelineDrawer, together
from controlroom.evaluation.suites.journal import Journal
from controlroom.evaluation.suites.pages import page
from controlroom.evaluation.suites.report import Report, summarise
from controlroom.evaluation.suites.runner import run
from controlroom.evaluation.suites.suite import Shown, Suite
from controlroom.evaluation.suites.table import open_suite
from tests.controls.nets import tiny_controlnet
from tests.evaluation.suites.stage import Knows, write_stage
from tests.tiny import tiny_unet


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_stage(tmp_path_factory.mktemp("stage") / "theatre")
    pose = tiny_controlnet(tiny_unet(), conditioning_embedding_out_channels=(4, 8))
    pose.save_pretrained(str(folder / "pose"))
    tiny_unet(seed=5).save_pretrained(str(folder / "appearance"))
    tiny_unet(in_channels=8).save_pretrained(str(folder / "instruct_pix2pix"))
    return folder


@pytest.fixture
def theatre(stage: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(loading, "theatre_folder", lambda: stage)
    return stage


def measured(suite: Suite[Any], drawer: Any, folder: Path) -> Report:
    about = suite.about(drawer.fingerprint)
    return summarise(suite, run(suite, drawer, Journal(folder / "cases.jsonl", about), 2), about)


SMALL: dict[str, dict[str, Any]] = {
    # Random networks have their layers elsewhere, and nothing to reach.
    "combined": {"blend_resolution": None, "reached": 0.0, "moved": 0.5},
    "prompt_to_prompt_real": {"iterations": 1},
    "pix2pix_zero_real": {},
    "upscale": {"size": 32, "strengths": (0.5, 1.0)},
}


@pytest.mark.parametrize("name", SMALL)
def test_every_suite_runs_on_the_stage(theatre: Path, tmp_path: Path, name: str) -> None:
    suite = open_suite(name, 2, {"steps": 2, **SMALL[name]})
    report = measured(suite, PipelineDrawer("theatre", suite.weights), tmp_path)
    assert report.n == 2 and name in page(report)
    arms = {arm.name for arm in suite.arms}
    assert all(set(one.thumbnails) == arms for one in report.picked)
    assert report.differences and suite.table.ours in report.differences[0].cells
    for row in report.rows:
        assert row.cells, row.measure


# Several changes at once.


def test_further_edits_change_one_thing_more() -> None:
    edit = sample_edit(3, "held_out", "top colour")
    found = further_edit(edit, 3, "hair colour", "held_out")
    assert found is not None and found.before == edit.after and found.kind == "hair colour"
    before, after = attributes(edit.before), attributes(found.after)
    assert {question for question in before if before[question] != after[question]} == {"top colour", "hair colour"}
    assert found == further_edit(edit, 3, "hair colour", "held_out") and not is_held_out_combination(found.after)
    alone = editing.edit_number(0, ("top colour",))
    assert further_edit(alone, 0, "prop removed", "held_out") is None


def test_jobs_ask_for_every_change_in_words_of_its_own() -> None:
    settings = combined_jobs.Settings()
    for number in range(4):
        job = combined_jobs.job_number(number, settings)
        assert [part.kind for part in job.parts] == ["lower colour", "top colour"]
        assert set(editing.changed_questions(job.whole)) == {"top colour", "lower colour"}
        assert all(part.instruction in job.whole.instruction for part in job.parts)
        first, second = (full_caption(scene).split() for scene in (job.whole.before, job.whole.after))
        pairs = [pair for pair in zip(first, second, strict=True) if pair[0] != pair[1]]
        assert len([pair for pair in pairs if pair[0] not in ("a", "an")]) == 2
        assert job.reference.puppets[0].identity == job.whole.before.puppets[0].identity
        assert job.reference.place != job.whole.before.place
        region = job.region((128, 128))
        assert (region | ~job.whole.changed()).all() and 0.05 < region.mean() < 0.5
    for words, concepts in ((("lower colour",), ()), (("place",), ("top colour",)), (("top colour",), ("top colour",))):
        with pytest.raises(InputError, match="words and concepts"):
            combined_jobs.job_number(0, combined_jobs.Settings(words=words, concepts=concepts))


def test_arms_share_noise_and_differ_in_their_method() -> None:
    knows: Any = Knows([])
    suite = combined.build(combined_jobs.Settings(steps=20, held="appearance_control"), 2, knows, knows)
    case = suite.case(0)
    job = case.truth
    assert {spec.seed for spec in case.specs.values()} == {1000}
    names = {arm: [control.type for control in spec.controls] for arm, spec in case.specs.items()}
    both = ["controlnet", "appearance_control"]
    every = [*both, "prompt_to_prompt", "semantic_guidance", "attend_and_excite"]
    assert names[combined.SOURCE] == names[combined.REPROMPTED] == both and names[combined_jobs.COMBINED] == every
    assert names[combined_jobs.WORDS] == [] and names[combined_jobs.POSED] == ["controlnet"]
    assert names[combined_jobs.SWAPPED] == names[combined_jobs.BLENDED] == [*both, "prompt_to_prompt"]
    # Words are swapped only where Prompt-to-Prompt is to do it; the concept does the rest.
    prompts = {arm: spec.prompt for arm, spec in case.specs.items()}
    assert prompts[combined_jobs.COMBINED] == full_caption(job.upto(1)) != prompts[combined.REPROMPTED]
    assert prompts[combined.REPROMPTED] == prompts[combined_jobs.SWAPPED] == full_caption(job.whole.after)
    assert prompts[combined_jobs.SEGA] == prompts[combined.SOURCE] == full_caption(job.whole.before)
    controls: list[Any] = list(case.specs[combined_jobs.COMBINED].controls)
    assert len(controls[3].edits) == 2 and len(case.specs[combined_jobs.SEGA].controls[2].edits) == 4  # type: ignore[attr-defined]
    assert controls[4].words == [[attributes(job.whole.after)["lower colour"]]]
    mask = np.asarray(controls[1].mask[0])
    assert np.array_equal(mask == 0, job.region((128, 128)))
    two = [suite.case(number).specs for number in range(2)]
    for arm in (combined.SOURCE, combined.REPROMPTED, combined_jobs.SWAPPED):
        joined = together([specs[arm] for specs in two], suite.per_prompt)
        assert joined is not None and len(joined.prompt) == 2, arm


def test_jobs_are_judged_change_by_change() -> None:
    settings = combined_jobs.Settings()
    job = combined_jobs.job_number(0, settings)
    before, half, after = (render(job.upto(count)) for count in range(3))
    knows: Any = Knows([job.upto(count) for count in range(3)])
    judge = combined.JobJudge(knows, knows, settings.kinds, ("half", "all"))
    case: Any = type("Case", (), {"truth": job})()
    pictures = {"source": before, "half": half, "all": after, "before": before, "after": after}
    (row,) = judge([Shown(case, pictures)])
    assert row["half"][combined.made_name("lower colour")] == 1.0 and row["half"][editing.MADE] == 0.0
    assert row["half"][combined.made_name("top colour")] == 0.0 and row["all"][editing.MADE] == 1.0
    assert row["all"][editing.REST] == 1.0 and row["source"][editing.SOURCE_RIGHT] == 1.0
    assert row["all"][editing.PSNR] == editing.CEILING and row["after"][combined.POSE_HELD] == 1.0
    grey = Image.blend(after, Image.new("RGB", after.size), 0.2)
    knows.known[grey.tobytes()] = job.whole.after
    (worse,) = judge([Shown(case, {**pictures, "all": grey})])
    psnr = worse["all"][editing.PSNR]
    assert psnr is not None and psnr < 25 and worse["all"][editing.MADE] == 1.0


def test_peers_that_cannot_do_the_job_do_not_count() -> None:
    def row(ours: float, able: float, unable: float) -> Any:
        values = {combined_jobs.COMBINED: (1.0, ours), "able": (1.0, able), "unable": (0.0, unable)}
        return {arm: {editing.MADE: made, editing.PSNR: psnr} for arm, (made, psnr) in values.items()}

    rows = [row(30.0, 25.0, 40.0), row(32.0, 29.0, 40.0)]
    assert combined.above(rows, "able").mean == 4.0 and combined.above(rows, "unable").mean == -9.0
    assert combined.ahead(rows, ("able", "unable")).mean == 4.0
    assert combined.ahead(rows, ("unable",)).n == 0


def test_the_person_is_held_by_what_there_is(theatre: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert combined_jobs.holder(combined_jobs.Settings()) == "appearance_control"
    assert combined_jobs.holder(combined_jobs.Settings(appearance="theatre/nothing")) == "none"
    assert combined_jobs.holder(combined_jobs.Settings(ip_adapter=str(theatre / "appearance"))) == "ip_adapter"
    suite = combined.build(combined_jobs.Settings(), 1)
    assert suite.weights == ("theatre/pose", "theatre/appearance", "theatre/instruct_pix2pix")
    assert "instruct_pix2pix" in {arm.name for arm in suite.arms}
    without = combined.build(combined_jobs.Settings(instructed="theatre/nothing"), 1)
    assert "instruct_pix2pix" not in {arm.name for arm in without.arms}


# True pictures.


def test_one_inversion_serves_all_arms_of_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, float | None]] = []

    def fake(pipe: Any, picture: Any, prompt: str, method: str, steps: int, scale: float | None, **more: Any) -> str:
        asked.append((method, prompt, scale))
        return "inverted"

    drawn: list[Any] = []

    class Pipe:
        def run(self, spec: Any) -> Any:
            drawn.append(spec)
            return type("Result", (), {"images": [f"picture {len(drawn)}"]})()

    monkeypatch.setattr(inverted_edits, "invert", fake)
    monkeypatch.setattr(inverted_edits, "FromInversion", lambda found, hold_source: (found, hold_source))
    knows: Any = Knows([])
    pipe: Any = Pipe()
    suite = real.build(real.Settings(hold_source=False), 1, knows, knows)
    case = suite.case(0)
    before, after = full_caption(case.truth.before), full_caption(case.truth.after)
    for method in real.METHODS:
        for arm in (real.edited_arm(method), inverted_edits.again_arm(method)):
            case.made[arm](pipe)
    assert asked == [("null_text", before, 5.0), ("ddim", before, None)]
    assert [spec.prompt for spec in drawn] == [after] * 4 and all(spec.scheduler == "ddim" for spec in drawn)
    assert [len(spec.controls) for spec in drawn] == [2, 1, 2, 1]
    assert drawn[0].controls[0] == ("inverted", False) and drawn[0].controls[1].source == [before]
    drawn.clear()
    case = zero.build(zero.Settings(), 1, knows, knows).case(0)
    for arm in ("pix2pix_zero", inverted_edits.again_arm("regularised")):
        case.made[arm](pipe)
    assert asked[2:] == [("regularised", before, None)]
    # The direction needs no words: only the peer is told the change.
    assert [(spec.prompt, len(spec.controls)) for spec in drawn] == [(before, 2), (after, 1)]


def test_real_edits_are_compared_with_inverting_and_prompting_again() -> None:
    knows: Any = Knows([])
    for suite, base in (
        (real.build(real.Settings(), 1, knows, knows), "reprompted null_text"),
        (zero.build(zero.Settings(), 1, knows, knows), "reprompted regularised"),
    ):
        assert suite.table.baseline == base and base in {arm.name for arm in suite.arms}
        assert set(suite.table.others) <= {arm.name for arm in suite.arms}
        case = suite.case(1)
        assert case.truth.kind == "lower colour" and set(case.specs) == {"reprompted"}


# Enlarging.


def test_enlarged_pictures_are_judged_at_their_size() -> None:
    from controlroom.evaluation.extractors.theatre import theatre_reader

    suite = upscale.build(upscale.Settings(strengths=(0.3,)), 2, theatre_reader())
    case = suite.case(0)
    true, bicubic = case.known[upscale.TRUE](), case.known[upscale.BICUBIC]()
    spec = case.specs["strength 0.3"]
    control: Any = spec.controls[0]
    guided = case.specs[upscale.GUIDED]
    assert (spec.guidance_scale, guided.guidance_scale) == (1.0, 5.0) and guided.controls == spec.controls
    assert true.size == bicubic.size == (256, 256) and (spec.height, spec.width) == (256, 256)
    assert control.image[0].tobytes() == render(case.truth).tobytes() and control.strength == 0.3
    joined = together([suite.case(number).specs["strength 0.3"] for number in range(2)], suite.per_prompt)
    assert joined is not None and len(joined.controls[0].image) == 2  # type: ignore[attr-defined]
    pictures = {upscale.TRUE: true, upscale.BICUBIC: bicubic, upscale.AUTOENCODER: true, "strength 0.3": true}
    pictures[upscale.GUIDED] = bicubic
    found = [judge([Shown(case, pictures)])[0] for judge in suite.judges]
    assert found[0][upscale.AUTOENCODER] == {upscale.ALIKE: pytest.approx(1.0), upscale.DECIBELS: editing.CEILING}
    likeness, distance = found[0][upscale.BICUBIC][upscale.ALIKE], found[1][upscale.BICUBIC][upscale.DISTANCE]
    assert likeness is not None and 0.5 < likeness < 0.99
    assert distance is not None and distance > 0.01 and found[1]["strength 0.3"][upscale.DISTANCE] == 0.0
    with pytest.raises(InputError, match="strengths"):
        upscale.Settings(strengths=(0.0,))
