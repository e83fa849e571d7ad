"""The Inception network of FID against numbers that torch-fidelity's own code gave."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from controlroom.core.errors import InputError, ModelError
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import sample_scene
from controlroom.evaluation.extractor import Classifier, Distance, TextExtractor, label_of
from controlroom.evaluation.extractors import inception
from controlroom.evaluation.extractors.inception import FidInception, _clean, _legacy

# `FeatureExtractorInceptionV3` of torch-fidelity (commit 5e211a9) with the weights of `weights` and the pictures of
# `pictures`: every 400th of its features "2048", every 250th of its "logits_unbiased", of both pictures in turn.
FEATURES = [
    [0.09996, 0.01363, 0.00824, 0.30565, 0.03192, 0.29584],
    [0.09597, 0.01374, 0.00779, 0.30065, 0.02911, 0.2957],
]
LOGITS = [[0.7587, -0.7451, 0.5485, -0.6501, -1.0295], [0.7594, -0.7463, 0.5536, -0.6519, -1.0349]]


def weights(net: FidInception) -> dict[str, Tensor]:
    """Numbers that depend on nothing but the names and shapes of the published file."""
    found = {}
    for key, value in net.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue  # files saved by old versions have none
        seed = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16)
        drawn = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
        if key.endswith("running_var"):
            found[key] = 1 + 0.1 * drawn.abs()
        elif key.endswith("bn.weight"):
            found[key] = 1 + 0.1 * drawn
        elif value.ndim > 1:
            found[key] = drawn * (2 / value[0].numel()) ** 0.5
        else:
            found[key] = 0.1 * drawn
    return found


def pictures() -> Tensor:
    drawn = torch.randint(0, 256, (2, 3, 64, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return drawn.float() / 255


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(weights(FidInception()), path)
    return path


def test_equals_torch_fidelity(file: Path) -> None:
    net = FidInception.load(file)
    # Inception v3 without its second head: 21,785,568 before a classifier of 1008 classes.
    assert sum(parameter.numel() for parameter in net.parameters()) == 21_785_568 + 1008 * 2049
    features = net.features(pictures())
    torch.testing.assert_close(features[:, ::400], torch.tensor(FEATURES), atol=2e-5, rtol=0)
    logits = features @ net.fc.weight.T
    torch.testing.assert_close(logits[:, ::250], torch.tensor(LOGITS), atol=2e-4, rtol=0)
    assert isinstance(net, Classifier) and not isinstance(net, Distance | TextExtractor)
    clean = FidInception.load(file, "clean")
    assert label_of(net).startswith("inception-legacy@") and label_of(clean).startswith("inception-clean@")
    assert net.hash != clean.hash


def test_other_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {key: torch.empty(value.shape, device="meta") for key, value in FidInception().state_dict().items()}
    less = {key: value for key, value in tensors.items() if key != "Mixed_7c.branch_pool.bn.running_var"}
    for given, said in (
        ({**tensors, "fc.weight": torch.zeros(1000, 2048)}, r"fc\.weight.*1000"),  # torchvision's
        ({**tensors, "AuxLogits.fc.weight": torch.zeros(1)}, "AuxLogits"),
        (less, "lacks 'Mixed_7c"),
    ):
        monkeypatch.setattr(inception, "read_tensors", lambda path, what, given=given: given)
        with pytest.raises(ModelError, match=said):
            FidInception.load("weights.pth")
    with pytest.raises(InputError, match="legacy or clean"):
        FidInception("bilinear")  # type: ignore[arg-type]


def test_resizing() -> None:
    """TensorFlow 1 places output i at i * in / 299, without half a pixel; clean is Pillow's."""
    line = torch.arange(4.0).view(1, 1, 1, 4)
    sized = _legacy(line, 3)[0, 0, 0]
    assert sized[0] == 0 and sized[-1] == 3
    assert float(sized[100]) == pytest.approx(100 * 4 / 299)
    assert float(sized[280]) == 3.0  # beyond the last pixel there is only itself
    picture = np.array(render(sample_scene(0), 500).resize((500, 620)))
    found = _clean(torch.from_numpy(picture).permute(2, 0, 1)[None])[0]
    expected = np.asarray(Image.fromarray(picture).resize((299, 299), Image.Resampling.BICUBIC), np.float32)
    assert np.abs(found.permute(1, 2, 0).numpy() - expected).max() < 1.5  # Pillow rounds bytes twice
    # Without antialiasing a picture of half the size is another one.
    noise = torch.randint(0, 256, (1, 3, 600, 500), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert float((_legacy(_legacy(noise.float(), 2), 3) - _clean(noise)).abs().mean()) > 10
