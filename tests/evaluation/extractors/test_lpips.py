"""LPIPS against torchmetrics' own network, fed the same random trunk and the published heads that it ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics.functional.image.lpips as reference
from torch import nn

from controlroom.core.errors import InputError, ModelError
from controlroom.evaluation.extractors.choose import open_extractor
from controlroom.evaluation.extractors.files import read_tensors
from controlroom.evaluation.extractors.lpips import LpipsDistance

HEADS = Path(reference.__file__).parent / "lpips_models"


def random_trunk(name: Any, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = LpipsDistance(name).layers
    with torch.no_grad():
        for parameter in layers.parameters():
            if parameter.ndim > 1:
                nn.init.kaiming_normal_(parameter)
    return layers


def save_trunk(layers: nn.Sequential, path: Path) -> Path:
    """As torchvision does, with a classifier behind it."""
    tensors = {f"features.{key}": value for key, value in layers.state_dict().items()}
    torch.save({**tensors, "classifier.1.weight": torch.zeros(2, 2)}, path)
    return path


@pytest.mark.parametrize("name", ["alex", "squeeze", "vgg"])
def test_equals_torchmetrics(name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = random_trunk(name)
    monkeypatch.setattr(reference, "_get_tv_model_features", lambda *given: trunk)
    theirs = reference._LPIPS(net=name)
    ours = LpipsDistance.load(name, save_trunk(trunk, tmp_path / "trunk.pth"), HEADS / f"{name}.pth")
    first, second = (torch.rand(2, 3, 40, 48, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    with torch.no_grad():
        expected = theirs(first, second, normalize=True).flatten()
    found = ours.distance(first, second)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert expected.min() > 0.01
    assert torch.equal(ours.distance(first, first), torch.zeros(2))
    assert ours.features(first).shape == (2, sum(len(head) for head in ours.heads))
    assert ours.name == f"lpips-{name}" and len(ours.hash) == 16


def test_from_a_line_and_its_hash(tmp_path: Path) -> None:
    paths = [save_trunk(random_trunk("alex", seed), tmp_path / f"{seed}.pth") for seed in (0, 1)]
    found = [open_extractor(f"lpips-alex={path},{HEADS / 'alex.pth'}") for path in (*paths, paths[0])]
    assert found[0].hash == found[2].hash != found[1].hash
    other = {key: value + 1 for key, value in read_tensors(HEADS / "alex.pth", "heads").items()}
    torch.save({"state_dict": other}, tmp_path / "heads.pth")
    assert LpipsDistance.load("alex", paths[0], tmp_path / "heads.pth").hash != found[0].hash
    for line, error, said in (
        ("lpips-alex=one.pth", InputError, "takes two"),
        ("lpips-resnet=a,b", InputError, "no trunk 'resnet'"),
        ("lpips", InputError, "KIND=PATH"),
        ("clap=/somewhere", InputError, "kind of extractor 'clap'"),
        (f"lpips-vgg={paths[0]},{HEADS / 'vgg.pth'}", ModelError, "lacks"),
        (f"lpips-alex={paths[0]},{HEADS / 'squeeze.pth'}", ModelError, "heads for 'alex'"),
        (f"lpips-alex={tmp_path / 'no.pth'},x.pth", ModelError, "nothing is downloaded"),
    ):
        with pytest.raises(error, match=said):
            open_extractor(line)


def test_a_torch_file_runs_no_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"a": Trap()}, tmp_path / "trap.pth")
    torch.save(random_trunk("alex"), tmp_path / "network.pth")
    torch.save({"a": 3}, tmp_path / "number.pth")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 not all of it")
    (tmp_path / "text.txt").write_text("a")
    for name in ("trap.pth", "network.pth", "number.pth", "cut.pth", "text.txt"):
        with pytest.raises(ModelError, match=name):
            read_tensors(tmp_path / name, "weights")
    assert not (tmp_path / "sprung").exists()
