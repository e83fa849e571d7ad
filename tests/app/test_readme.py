"""The first Python that a reader sees, run as it stands, beside the files that `make demo` leaves."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from controlroom.app.demo import draw_inputs

README = Path(__file__).parents[2] / "README.md"


def test_the_block_from_python_draws_the_person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [each for each in blocks if "anna_on_the_beach.png" in each]
    inputs = draw_inputs(tmp_path)
    Image.open(inputs.source).save(tmp_path / "anna.png")
    (tmp_path / "anna.pose.json").write_text(inputs.poses["json"].read_text())
    monkeypatch.chdir(tmp_path)
    exec(compile(block.replace("seed=7", "seed=7, num_inference_steps=4"), str(README), "exec"), {})
    with Image.open("anna_on_the_beach.png") as drawn:
        assert drawn.size == (128, 128) and drawn.text["controlroom"]
        assert np.asarray(drawn).std() > 20
