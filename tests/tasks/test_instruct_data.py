"""The data factory of InstructPix2Pix: what it draws and keeps, that it continues, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import controlroom as cr
from controlroom.app.cli import main
from controlroom.core.errors import InputError
from controlroom.data.caption_edits import CaptionEdit, caption_edits, theatre_caption_edits
from controlroom.data.edited_pictures import edited_pictures
from controlroom.evaluation.metrics.direction import directional_similarity
from controlroom.sampling.pipeline import Pipeline
from controlroom.tasks import instruct_data
from controlroom.tasks.instruct_data import (
    InstructDataOptions,
    Similarities,
    best_samples,
    drawn_with,
    make_instruct_data,
)
from tests.tiny import tiny_sd1

EDITS = (
    CaptionEdit("a red cat", "make it a dog", "a red dog", "line 1"),
    CaptionEdit("a cat on the beach", "give it a hat", "a cat with a hat on the beach", "line 2"),
)
OPTIONS = InstructDataOptions(
    model="tiny", samples=3, keep=2, steps=2, text_similarity=-1, image_similarity=-1, direction=-1, seed=4
)


class Clip:
    """Mean colours in a 4x4 grid, and texts as noise of their own: no network, and not constant."""

    name, hash = "grid", "00"

    def features(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, 4).flatten(1) - 0.4

    def text_features(self, texts: Sequence[str]) -> Tensor:
        return torch.stack([torch.randn(48, generator=torch.Generator().manual_seed(sum(map(ord, t)))) for t in texts])


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(tiny_sd1())


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_sample_is_prompt_to_prompt_with_what_was_drawn(pipe: Pipeline) -> None:
    options = OPTIONS.model_copy(update={"keep": 3})
    best = best_samples(pipe, Clip(), EDITS[0], 5, options)
    assert len(best) == 3 and {sample.seed for sample in best} == {drawn_with(5, k, options)[0] for k in range(3)}
    directions = [sample.found.direction for sample in best]
    assert directions == sorted(directions, reverse=True) and len(set(directions)) == 3
    for sample in best:
        assert 0.1 <= sample.share <= 0.9 and 7.5 <= sample.guidance <= 15
        settings: dict[str, Any] = {
            "num_inference_steps": 2, "guidance_scale": sample.guidance, "seed": sample.seed
        }  # fmt: skip
        plain = pipe("a red cat", **settings).images[0]
        control = cr.PromptToPrompt("a red cat", cross_replace=sample.share, self_replace=sample.share)
        edited = pipe("a red dog", controls=[control], **settings).images[0]
        assert np.abs(np.asarray(sample.before, int) - np.asarray(plain, int)).max() <= 1
        assert np.array_equal(np.asarray(sample.after), np.asarray(edited))
        clip = Clip()
        seen = [
            clip.features(torch.from_numpy(np.asarray(p, np.float32) / 255).permute(2, 0, 1)[None])[0].double()
            for p in (sample.before, sample.after)
        ]
        words = clip.text_features(["a red cat", "a red dog"]).double()
        unit = [one / one.norm() for one in (*seen, *words)]
        expected = (
            unit[0] @ unit[2],
            unit[1] @ unit[3],
            unit[0] @ unit[1],
            (unit[1] - unit[0]) @ (unit[3] - unit[2]) / (unit[1] - unit[0]).norm() / (unit[3] - unit[2]).norm(),
        )
        found = (sample.found.before, sample.found.after, sample.found.image, sample.found.direction)
        assert found == pytest.approx([float(value) for value in expected], abs=1e-5)


def test_draws_are_spread_over_their_bounds_and_differ() -> None:
    options = OPTIONS.model_copy(update={"samples": 100})
    drawn = np.array([drawn_with(number, k, options) for number in range(3) for k in range(100)])
    assert len(set(drawn[:, 0])) == 300
    assert 0.1 <= drawn[:, 1].min() < 0.15 and 0.85 < drawn[:, 1].max() <= 0.9
    assert drawn[:, 1].mean() == pytest.approx(0.5, abs=0.05) and drawn[:, 2].mean() == pytest.approx(11.25, abs=0.5)
    assert 7.5 <= drawn[:, 2].min() and drawn[:, 2].max() <= 15


@pytest.mark.parametrize("low", ["before", "after", "image", "direction"])
def test_each_filter_counts(low: str) -> None:
    good = Similarities(0.2, 0.2, 0.7, 0.2)
    assert good.passes(InstructDataOptions())  # the published thresholds, which pass themselves
    assert not replace(good, **{low: getattr(good, low) - 0.01}).passes(InstructDataOptions())


def test_stopped_and_continued_is_unbroken(
    tmp_path: Path, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = make_instruct_data(EDITS, tmp_path / "whole", OPTIONS, Clip(), pipe)
    assert (whole.captions, whole.pairs, whole.drawn) == (2, 4, 2)
    pairs = edited_pictures(whole.folder)
    assert [pair.caption for pair in pairs] == ["make it a dog"] * 2 + ["give it a hat"] * 2
    assert pairs[2].name == "0002/after.png" and pairs[2].before.name == "0002/before.png"
    assert pairs[0].size == (32, 32)
    row = json.loads((whole.folder / "metadata.jsonl").read_text().splitlines()[0])
    assert row["edited"] == "a red dog" and row["direction"] >= -1 and 0.1 <= row["share"] <= 0.9

    def killed(*given: Any) -> Any:
        raise KeyboardInterrupt

    broken = tmp_path / "broken"
    make_instruct_data(EDITS[:1], broken, OPTIONS, Clip(), pipe)
    with monkeypatch.context() as patch:
        patch.setattr(instruct_data, "write_text_atomically", killed)  # pictures are there, the note is not
        with pytest.raises(KeyboardInterrupt):
            make_instruct_data(EDITS, broken, OPTIONS, Clip(), pipe)
    assert (broken / "0002/after.png").is_file() and len(edited_pictures(broken)) == 2
    rest = make_instruct_data(EDITS, broken, OPTIONS, Clip(), pipe)
    assert rest.drawn == 1 and files(broken) == files(tmp_path / "whole")
    again = make_instruct_data(EDITS, broken, OPTIONS, Clip())  # nothing is left, so no model is loaded
    assert again.drawn == 0 and again.pairs == 4
    assert "captions 2 of 2: 2 pairs kept" in capsys.readouterr().err


def test_nothing_may_pass(tmp_path: Path, pipe: Pipeline) -> None:
    strict = OPTIONS.model_copy(update={"direction": 1.0})
    made = make_instruct_data(EDITS, tmp_path / "none", strict, Clip(), pipe)
    assert made.captions == 2 and made.pairs == 0
    with pytest.raises(InputError, match="lists nothing"):
        edited_pictures(made.folder)


def test_what_does_not_fit_is_named(tmp_path: Path, pipe: Pipeline) -> None:
    folder = tmp_path / "job"
    make_instruct_data(EDITS[:1], folder, OPTIONS, Clip(), pipe)
    with pytest.raises(InputError, match="another steps"):
        make_instruct_data(EDITS, folder, OPTIONS.model_copy(update={"steps": 3}), Clip(), pipe)
    with pytest.raises(InputError, match="line 2 differ"):
        make_instruct_data(EDITS[1:], folder, OPTIONS, Clip(), pipe)
    with pytest.raises(InputError, match="no captions"):
        make_instruct_data([], folder, OPTIONS, Clip(), pipe)
    with pytest.raises(InputError, match="--clip"):
        make_instruct_data(EDITS, folder, OPTIONS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="something else"):
        make_instruct_data(EDITS, tmp_path / "other", OPTIONS, Clip(), pipe)
    (folder / "done/000000.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        make_instruct_data(EDITS, folder, OPTIONS, Clip(), pipe)
    for wrong in ({"share": (0.9, 0.1)}, {"guidance": (0.5, 3)}, {"samples": 0}, {"unknown": 1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            InstructDataOptions(**wrong)


def test_captions_of_files_and_of_the_theatre(tmp_path: Path) -> None:
    file = tmp_path / "captions.jsonl"
    file.write_text(
        '{"caption": "a cat", "instruction": "make it a dog", "edited": "a dog"}\n\n'
        '{"input": "a cat ", "edit": "add a hat", "output": "a cat with a hat"}\n'
    )
    first, second = caption_edits(file)
    assert (first.caption, first.instruction, first.edited) == ("a cat", "make it a dog", "a dog")
    assert (second.caption, second.edited) == ("a cat", "a cat with a hat") and "line 3" in second.where
    for text, said in (
        ("", "is empty"),
        ("{", "not JSON"),
        ('{"caption": "a"}', "'instruction' is missing"),
        ('{"caption": "a", "instruction": "b", "edited": " a"}', "nothing would change"),
        ('{"caption": 3, "instruction": "b", "edited": "a"}', "'caption' is 3"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=said):
            caption_edits(file)
    with pytest.raises(InputError, match="cannot be read"):
        caption_edits(tmp_path / "missing.jsonl")
    drawn = theatre_caption_edits(3)
    assert len(drawn) == 3 and all(edit.caption != edit.edited and edit.instruction for edit in drawn)
    assert theatre_caption_edits(2, ["top colour"])[0].instruction.split()[0] in ("make", "change", "turn")
    for wrong in (lambda: theatre_caption_edits(0), lambda: theatre_caption_edits(1, ["hats"])):
        with pytest.raises(InputError):
            wrong()


def test_directional_similarity() -> None:
    rng = np.random.default_rng(0)
    a, b, c, d = (torch.from_numpy(rng.normal(size=(3, 5))) for _ in range(4))
    found = directional_similarity(a, b * 7, c, d)
    for row in range(3):
        x, y, u, v = (one[row].numpy() / np.linalg.norm(one[row].numpy()) for one in (a, b, c, d))
        assert float(found[row]) == pytest.approx((y - x) @ (v - u) / np.linalg.norm(y - x) / np.linalg.norm(v - u))
    assert directional_similarity(a, a, c, d).tolist() == [0.0] * 3
    with pytest.raises(InputError, match="four times"):
        directional_similarity(a, b, c, torch.ones(3, 4))


def test_the_command_draws_the_theatre(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["instruct-data", "theatre", "-o", str(tmp_path / "pairs"), "--count", "1", "--samples", "1"]
    line += ["--steps", "2", "--text-similarity", "-1", "--image-similarity", "-1", "--direction", "-1"]
    assert main([*line, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["captions"] == told["pairs"] == told["drawn"] == 1
    assert edited_pictures(tmp_path / "pairs")[0].size == (128, 128)
    assert main([*line, "--steps", "3"]) == 2 and "another steps" in capsys.readouterr().err
    assert main(["instruct-data", str(tmp_path / "none.jsonl"), "-o", str(tmp_path / "x")]) == 2
    assert "none.jsonl" in capsys.readouterr().err
