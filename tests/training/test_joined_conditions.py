"""Several kinds of condition of one picture: in order, found or given, kept where those of one kind are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from controlroom.core.errors import InputError
from controlroom.signals.canny import Canny
from controlroom.signals.scribble import Scribble
from controlroom.training.conditions import ConditionMaps, JoinedMaps
from controlroom.training.recipes.controlnet import ControlNetSettings
from controlroom.training.recipes.uni_controlnet import UniControlNetSettings
from tests.training import side_checks
from tests.training.scenery import conditioned, drawn, ramp, scenery

TWO = ("canny", "scribble")


def test_conditions_of_a_picture_are_those_of_each_kind_in_order(tmp_path: Path) -> None:
    """Of what is shown, mirrored too; found once for recipes of one kind and of several."""
    side_checks.maker(ControlNetSettings(kind="canny"), tmp_path, pictures=scenery(2), flip=True)()
    known = set((tmp_path / "maps").rglob("*.safetensors"))
    recipe = side_checks.maker(UniControlNetSettings(kinds=TWO), tmp_path, pictures=scenery(2), flip=True)()
    assert known < set((tmp_path / "maps").rglob("*.safetensors")) and len(known) == 4
    maps = recipe.batch([1, 3], 0).maps
    for row, seen in zip(maps, (drawn(1), ImageOps.mirror(drawn(1))), strict=True):
        expected = [np.asarray(signal(seen).picture, np.float32) / 255 for signal in (Canny(), Scribble())]
        assert np.array_equal(row.numpy(), np.concatenate(expected, -1).transpose(2, 0, 1))
        assert all(one.any() for one in expected)
    wide = side_checks.maker(UniControlNetSettings(kinds=TWO), tmp_path, pictures=scenery(2, (48, 32)))()
    batch = wide.batch([0, 1], 0)
    assert batch.maps.shape[-2:] == batch.shown.size and batch.shown.size[0] < batch.shown.size[1]


def test_a_map_that_is_given_is_of_one_kind(tmp_path: Path) -> None:
    def rows(**settings: Any) -> torch.Tensor:
        made = side_checks.maker(UniControlNetSettings(**settings), tmp_path, pictures=conditioned())()
        return made.batch([1], 0).maps[0]

    given = torch.from_numpy(np.asarray(ramp(1), np.float32) / 255).permute(2, 0, 1)
    edges = torch.from_numpy(np.asarray(Canny()(drawn(1)).picture, np.float32) / 255).permute(2, 0, 1)
    assert torch.equal(rows(kinds=("depth",)), given)
    assert torch.equal(rows(kinds=("canny", "depth"), given="depth"), torch.cat([edges, given]))
    with pytest.raises(InputError, match="conditioning_image, which is one map.*given='canny'"):
        rows(kinds=("canny", "depth"))
    with pytest.raises(InputError, match="Something is said of pose, which is not learned"):
        rows(kinds=TWO, given="pose")


def test_networks_of_signals_are_named_by_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, str | None, str | None]] = []

    def chosen(kind: str, model: str | None, detector: str | None) -> Any:
        asked.append((kind, model, detector))

        def signal(image: Image.Image) -> Any:
            if kind == "pose" and image.getpixel((8, 8)) != (255, 0, 0):
                raise InputError("There is nobody in the picture.")
            return type("Found", (), {"picture": Image.new("RGB", image.size, "white")})

        return signal

    monkeypatch.setattr("controlroom.training.conditions.choose_signal", chosen)
    models: dict[Any, str] = {"depth": "D", "pose": "P"}
    settings = UniControlNetSettings(kinds=("pose", "depth", "normal"), signal_models=models, detector="F")
    recipe = side_checks.maker(settings, tmp_path)()
    assert sorted(asked) == [("depth", "D", None), ("normal", "D", None), ("pose", "P", "F")]
    maps = recipe.batch([0, 1, 2], 0).maps
    assert maps[:, 3:].min() == 1 and [float(row.mean()) for row in maps[:, :3]] == [1.0, 0.0, 0.0], "nobody is no pose"
    with pytest.raises(InputError, match="no pose in any picture.*Leave it out of kinds"):
        side_checks.maker(UniControlNetSettings(kinds=("pose", "canny")), tmp_path, pictures=scenery(3)[1:])()


def test_a_run_of_one_kind_is_what_it_was(tmp_path: Path) -> None:
    """Fingerprint and files of maps as before there were several kinds, so that runs begun then resume."""
    recipe = side_checks.maker(ControlNetSettings(kind="canny"), tmp_path)()
    text = recipe.fingerprint().split(" ", 1)[1]
    assert text.endswith(
        '"flip":false,"prompt":null,"empty_prompts":0.5,"buckets":true,"seed":0,"kind":"canny","signal_model":null,'
        '"detector":null,"start_from":null}'
    )
    files = {path.name[:8] for path in (tmp_path / "maps").rglob("*.safetensors")}
    assert files == {"181684b2", "22cafd89", "560c1394"}
    one, joined = ConditionMaps(tmp_path, "canny"), JoinedMaps(tmp_path, ("canny",)).fill(recipe.shown)
    rows = [(0, False), (2, False)]
    assert torch.equal(one.rows(recipe.shown, rows), joined.rows(recipe.shown, rows))
    assert len(list((tmp_path / "maps").rglob("*.safetensors"))) == 3
