"""The suite of the dense reader: it runs from end to end on miniatures, and a reader that knows the truth is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from controlroom.backbones import loading
from controlroom.core.errors import InputError
from controlroom.data.theatre.scene import Scene
from controlroom.evaluation.suites import signals
from controlroom.evaluation.suites.drawing import PipelineDrawer
from controlroom.evaluation.suites.journal import Journal
from controlroom.evaluation.suites.pages import markdown
from controlroom.evaluation.suites.report import summarise
from controlroom.evaluation.suites.runner import run
from controlroom.evaluation.suites.suite import Shown
from controlroom.evaluation.suites.table import open_suite
from controlroom.signals.dense_reader import DenseReader, DenseReading
from controlroom.training.recipes.theatre_dense_reader import CLASSES, dense_truth
from tests.evaluation.suites.stage import write_stage


def test_it_runs_on_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = write_stage(tmp_path / "theatre")
    torch.manual_seed(0)
    DenseReader(CLASSES, width=8).save(stage / "readers/dense")
    monkeypatch.setattr(loading, "theatre_folder", lambda: stage)
    suite = open_suite("signals", 2, {"style": "flat"})
    drawer = PipelineDrawer("theatre", suite.weights)
    about = suite.about(drawer.fingerprint)
    report = summarise(suite, run(suite, drawer, Journal(tmp_path / "cases.jsonl", about), 2), about)
    assert report.n == 2
    rows = {row.measure: row.cells for row in report.rows}
    assert set(rows["depth: rank correlation"]) == {signals.TRUE, signals.AUTOENCODER}
    assert "segmentation: mean IoU" in rows and "soft_edge: edge F1" in rows
    assert "dense reader" in markdown(report)


class Right(DenseReader):
    """Knows the scene it is asked about."""

    def __init__(self, scene: Scene) -> None:
        super().__init__(CLASSES, width=8)
        self.scene = scene

    def read(self, pictures: Any, batch_size: int = 32) -> list[DenseReading]:
        truth = dense_truth([self.scene])
        return [DenseReading(truth.depth[0].numpy(), truth.parts[0].float().numpy(), truth.edges[0].numpy())]


def test_a_right_reader_is_found_right() -> None:
    suite = signals.build(signals.Settings(), 5, DenseReader(CLASSES, width=8))
    for number in (0, 4):
        case = suite.case(number)
        judge = signals.DenseJudge(Right(case.truth))
        (values,) = judge([Shown(case, {signals.TRUE: case.known[signals.TRUE]()})])
        assert list(values[signals.TRUE].values()) == pytest.approx([1, 0, 1, 1], abs=0.05)
    assert {suite.case(number).truth.style for number in range(5)} == {"flat", "sketch", "watercolour", "pixel", "neon"}


def test_unknown_styles_are_refused() -> None:
    with pytest.raises(InputError, match="style"):
        open_suite("signals", 2, {"style": "oil"})
