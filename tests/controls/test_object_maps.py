"""Quantities of things and their energies: closed forms of values and gradients, and what happens on drawn maps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from controlroom.controls import object_maps
from controlroom.controls.object_edits import Goal
from controlroom.controls.object_energy import Reading, energy_of, grouped
from tests.sampling.test_engine_rest import Windows

SHARP = 10.0


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blob(x: float, y: float, radius: float, height: int = 16, width: int = 16) -> torch.Tensor:
    """A round thing: [height, width], 1 in its middle."""
    rows = (torch.arange(height, dtype=torch.float64) + 0.5) / height
    columns = (torch.arange(width, dtype=torch.float64) + 0.5) / width
    apart = (rows[:, None] - y) ** 2 + (columns[None] - x) ** 2
    return torch.exp(-apart / (2 * radius**2))


# The quantities, written out pixel by pixel.


def by_hand(a: np.ndarray) -> dict[str, Any]:
    height, width = a.shape
    total = sum(a[i, j] for i in range(height) for j in range(width))
    x = sum(a[i, j] * (j + 0.5) / width for i in range(height) for j in range(width)) / total
    y = sum(a[i, j] * (i + 0.5) / height for i in range(height) for j in range(width)) / total
    flat = (a - a.min()) / (a.max() - a.min())
    soft = 1 / (1 + np.exp(-SHARP * (flat - 0.5)))
    soft = (soft - soft.min()) / (soft.max() - soft.min())
    return {"centroid": (x, y), "shape": soft, "size": soft.mean(), "total": total}


def test_values_written_out() -> None:
    maps = noise(3, 5, 7)
    for index, one in enumerate(maps):
        expected = by_hand(one.numpy())
        np.testing.assert_allclose(object_maps.centroid(maps)[index], expected["centroid"], rtol=1e-12)
        np.testing.assert_allclose(object_maps.shape(maps)[index], expected["shape"], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(object_maps.size(maps)[index], expected["size"], rtol=1e-12)


def test_look_written_out() -> None:
    features, shapes = noise(4, 6, 8), noise(2, 6, 8, seed=1)
    found = object_maps.appearance(features, shapes)
    for n in range(2):
        for c in range(4):
            weighed = sum(float(shapes[n, i, j] * features[c, i, j]) for i in range(6) for j in range(8))
            assert float(found[n, c]) == pytest.approx(weighed / float(shapes[n].sum()), rel=1e-12)
    # Shapes of coarser layers are brought to the features' size: constant ones stay what they are.
    coarse = object_maps.appearance(features, torch.ones(1, 3, 4, dtype=torch.float64))
    torch.testing.assert_close(coarse[0], features.mean((1, 2)))


# Gradients of the energies in closed form, against those of the graph.


def gradient(goal: Goal, own: torch.Tensor, original: torch.Tensor | None = None) -> np.ndarray:
    """d energy / d map of the thing's token, out of one layer whose second token is the thing."""
    maps = torch.stack([noise(*own.shape, seed=9), own], dim=-1)[None].requires_grad_(True)
    other = None
    if original is not None:
        other = Reading((torch.stack([noise(*own.shape, seed=8), original], dim=-1)[None],))
    groups = grouped([goal], (2, 2), torch.device("cpu"))
    value = energy_of(groups, Reading((maps,)), other, SHARP)
    (found,) = torch.autograd.grad(value, maps)
    assert not found[..., 0].any(), "only the thing's own token is asked"
    return found[0, ..., 1].numpy()


def d_shape(a: np.ndarray, outer: np.ndarray) -> np.ndarray:
    """Σ_i outer_i · dS_i/dA_j.

    The least and the greatest of A stay the least and greatest of the sigmoid, where it is σ(∓s/2) whatever A is, so
    only the first normalisation moves with them: dN_i/dA_j = (δ_ij − δ_j,min (1 − N_i) − δ_j,max N_i) / (max − min).
    """
    n = (a - a.min()) / (a.max() - a.min())
    sigma = 1 / (1 + np.exp(-SHARP * (n - 0.5)))
    low, high = 1 / (1 + math.exp(SHARP / 2)), 1 / (1 + math.exp(-SHARP / 2))
    inner = outer * SHARP * sigma * (1 - sigma) / (high - low)
    found = inner.copy()
    found[np.unravel_index(a.argmin(), a.shape)] -= (inner * (1 - n)).sum()
    found[np.unravel_index(a.argmax(), a.shape)] -= (inner * n).sum()
    return found / (a.max() - a.min())


def d_centroid(a: np.ndarray, wanted: tuple[float, float]) -> np.ndarray:
    """Σ over x, y of −sign(wanted − c) · (p − c) / ΣA."""
    height, width = a.shape
    (x, y), total = by_hand(a)["centroid"], a.sum()
    columns, rows = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return -(np.sign(wanted[0] - x) * (columns - x) + np.sign(wanted[1] - y) * (rows - y)) / total


def test_gradient_of_the_centre() -> None:
    own, original = noise(5, 7, seed=1), noise(5, 7, seed=2)
    found = gradient(Goal("centroid", 2.0, (1,), to=(0.9, 0.1)), own)
    np.testing.assert_allclose(found, 2 * d_centroid(own.numpy(), (0.9, 0.1)), rtol=1e-9)
    x, y = by_hand(original.numpy())["centroid"]
    found = gradient(Goal("centroid", 1.0, (1,), (1,), by=(-0.4, 0.3)), own, original)
    np.testing.assert_allclose(found, d_centroid(own.numpy(), (x - 0.4, y + 0.3)), rtol=1e-9)


def test_gradient_of_the_size() -> None:
    own, original = noise(5, 7, seed=1), noise(5, 7, seed=2)
    size, other = (by_hand(maps.numpy())["size"] for maps in (own, original))
    each = np.full((5, 7), 1 / 35)
    for goal, wanted in (
        (Goal("size", 3.0, (1,), to=(0.9,)), 0.9),
        (Goal("size", 3.0, (1,), to=(0.1,)), 0.1),
        (Goal("size", 3.0, (1,), (1,), factor=0.4), 0.4 * other),
    ):
        found = gradient(goal, own, original)
        expected = -3 * np.sign(wanted - size) * d_shape(own.numpy(), each)
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-12)


def test_gradient_of_the_outline() -> None:
    own, original = noise(5, 7, seed=1), noise(5, 7, seed=2)
    wanted, mine = (by_hand(maps.numpy())["shape"] for maps in (original, own))
    found = gradient(Goal("shape", 0.5, (1,), (1,)), own, original)
    np.testing.assert_allclose(found, 0.5 * d_shape(own.numpy(), -np.sign(wanted - mine) / 35), rtol=1e-8, atol=1e-12)


def test_gradient_of_the_look() -> None:
    own, original = noise(5, 7, seed=1), noise(5, 7, seed=2)
    features, other = noise(3, 5, 7, seed=3).requires_grad_(True), noise(3, 5, 7, seed=4)
    maps = own[None, ..., None].clone().requires_grad_(True)
    groups = grouped([Goal("appearance", 2.0, (0,), (0,))], (1, 1), torch.device("cpu"))
    value = energy_of(groups, Reading((maps,), features), Reading((original[None, ..., None],), other), SHARP)
    # The outline under which it is read has no gradient.
    found, none = torch.autograd.grad(value, [features, maps], allow_unused=True)
    assert none is None
    under, beside = (by_hand(part.numpy())["shape"] for part in (own, original))
    plain = features.detach().numpy()
    look = (plain * under).sum((1, 2)) / under.sum()
    wanted = (other.numpy() * beside).sum((1, 2)) / beside.sum()
    expected = -2 * np.sign(wanted - look)[:, None, None] / 3 * under / under.sum()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)
    assert float(value.detach()) == pytest.approx(2 * np.abs(wanted - look).mean(), rel=1e-9)


# Carrying outlines.


def test_carried_by_whole_pixels_is_a_shift() -> None:
    shapes = torch.zeros(2, 8, 8, dtype=torch.float64)
    shapes[0, 2:4, 3:6] = 1
    shapes[1, 5:7, 1:3] = 1
    by, factor = torch.tensor([[0.25, 0.125], [0.0, -0.5]]), torch.ones(2)
    found = object_maps.carried(shapes, by, factor)
    torch.testing.assert_close(found[0], shapes[0].roll((1, 2), (0, 1)), atol=1e-6, rtol=0)
    torch.testing.assert_close(found[1], shapes[1].roll(-4, 0), atol=1e-6, rtol=0)
    torch.testing.assert_close(object_maps.carried(shapes, torch.zeros(2, 2), torch.ones(2)), shapes, atol=1e-6, rtol=0)


def test_carried_out_of_the_picture_is_lost() -> None:
    shapes = torch.zeros(1, 8, 8, dtype=torch.float64)
    shapes[0, 3:5, 6:8] = 1
    found = object_maps.carried(shapes, torch.tensor([[0.125, 0.0]]), torch.ones(1))
    assert float(found.sum()) == pytest.approx(2.0, abs=1e-5)
    assert not object_maps.carried(shapes, torch.tensor([[0.5, 0.0]]), torch.ones(1)).any()


def test_resized_about_its_own_middle() -> None:
    thing = blob(0.35, 0.6, 0.08, 32, 32)[None]
    for factor in (0.5, 1.5):
        found = object_maps.carried(thing, torch.zeros(1, 2), torch.tensor([factor]))
        torch.testing.assert_close(object_maps.centroid(found), object_maps.centroid(thing), atol=1e-2, rtol=0)
        assert float(found.sum() / thing.sum()) == pytest.approx(factor**2, rel=0.05)


# On drawn maps: descending on the energy does what was asked.


def descended(goals: list[Goal], start: torch.Tensor, original: torch.Tensor | None, steps: int = 300) -> Any:
    """Logits [h, w, L] that walk down the energy; the losses, and the maps at the end."""
    logits = start.log().float().requires_grad_(True)
    groups = grouped(goals, (start.shape[-1],) * 2, torch.device("cpu"))
    other = None if original is None else Reading((original[None].float(),))
    solver = torch.optim.Adam([logits], lr=0.05)
    losses = []
    for _ in range(steps):
        loss = energy_of(groups, Reading((logits.softmax(-1)[None],)), other, SHARP)
        solver.zero_grad()
        loss.backward()
        solver.step()
        losses.append(float(loss.detach()))
    return losses, logits.softmax(-1).detach()


def words(*things: torch.Tensor) -> torch.Tensor:
    """[h, w, 1 + things]: attention to the background's word, then to each thing's."""
    maps = torch.stack([torch.full_like(things[0], 0.3), *things], dim=-1)
    return maps / maps.sum(-1, keepdim=True)


def test_moved_resized_and_held() -> None:
    start = words(blob(0.3, 0.3, 0.12), blob(0.7, 0.7, 0.1))
    before = [object_maps.centroid(start[..., i]) for i in (1, 2)]
    size = float(object_maps.size(start[..., 1]))
    goals = [
        Goal("centroid", 1.0, (1,), (1,), by=(0.3, 0.1)),
        Goal("size", 1.0, (1,), (1,), factor=1.5),
        Goal("shape", 1.0, (2,), (2,)),
    ]
    losses, found = descended(goals, start, start)
    assert losses[-1] < 0.1 * losses[0]
    wanted = before[0] + torch.tensor([0.3, 0.1])
    torch.testing.assert_close(object_maps.centroid(found[..., 1]).double(), wanted, atol=0.03, rtol=0)
    assert float(object_maps.size(found[..., 1])) == pytest.approx(1.5 * size, rel=0.1)
    torch.testing.assert_close(object_maps.centroid(found[..., 2]).double(), before[1], atol=0.03, rtol=0)
    assert float((object_maps.shape(found[..., 2]) - object_maps.shape(start[..., 2])).abs().mean()) < 0.02


def test_brought_to_a_place_and_a_size_without_an_original() -> None:
    start = words(blob(0.3, 0.3, 0.15))
    goals = [Goal("centroid", 1.0, (1,), to=(0.6, 0.4)), Goal("size", 1.0, (1,), to=(0.4,))]
    losses, found = descended(goals, start, None)
    assert losses[-1] < 0.1 * losses[0]
    torch.testing.assert_close(object_maps.centroid(found[..., 1]), torch.tensor([0.6, 0.4]), atol=0.03, rtol=0)
    assert float(object_maps.size(found[..., 1])) == pytest.approx(0.4, abs=0.03)


def test_carried_outline_arrives() -> None:
    start, goal = words(blob(0.3, 0.5, 0.1)), Goal("shape", 1.0, (1,), (1,), by=(0.375, 0.0))
    losses, found = descended([goal], start, start)
    assert losses[-1] < 0.25 * losses[0]
    wanted = object_maps.shape(start[..., 1]).roll(6, 1)
    assert float((object_maps.shape(found[..., 1]) - wanted).abs().mean()) < 0.03


def test_several_tokens_are_one_thing_and_layers_are_averaged() -> None:
    maps = noise(2, 5, 5, 4).float()
    layers = Reading((maps[:1], maps[1:]))
    goals = [Goal("centroid", 1.0, (1, 3), to=(0.2, 0.8))]
    found = energy_of(grouped(goals, (4, 4), torch.device("cpu")), layers, None, SHARP)
    centres = [object_maps.centroid((each[..., 1] + each[..., 3]) / 2) for each in maps]
    expected = sum((torch.tensor([0.2, 0.8]) - centre).abs().sum() for centre in centres) / 2
    torch.testing.assert_close(found, expected)
    # Goals of one kind stand side by side, wanted and compared ones alike; weights add up.
    mixed = [*goals, Goal("centroid", 0.5, (2,), (0,), by=(0.1, 0.0))]
    more = energy_of(grouped(mixed, (4, 4), torch.device("cpu")), layers, layers, SHARP)
    pairs = [(object_maps.centroid(each[..., 2]), object_maps.centroid(each[..., 0])) for each in maps]
    apart = sum((b + torch.tensor([0.1, 0.0]) - a).abs().sum() for a, b in pairs) / 2
    torch.testing.assert_close(more, expected + 0.5 * apart)


def test_the_original_has_no_gradient() -> None:
    maps, other = (noise(1, 5, 5, 2, seed=seed).float().requires_grad_(True) for seed in (0, 1))
    groups = grouped([Goal("shape", 1.0, (1,), (1,))], (2, 2), torch.device("cpu"))
    value = energy_of(groups, Reading((maps,)), Reading((other,)), SHARP)
    found, none = torch.autograd.grad(value, [maps, other], allow_unused=True)
    assert found.any() and none is None


def test_a_map_that_shows_nothing_has_a_bounded_gradient() -> None:
    maps = torch.full((1, 4, 4, 2), 0.25) + 1e-7 * noise(1, 4, 4, 2).float()
    maps.requires_grad_(True)
    goals = [Goal("size", 1.0, (1,), to=(0.5,)), Goal("centroid", 1.0, (1,), to=(0.9, 0.9))]
    value = energy_of(grouped(goals, (2, 2), torch.device("cpu")), Reading((maps,)), None, SHARP)
    (found,) = torch.autograd.grad(value, maps)
    assert torch.isfinite(found).all() and float(found.abs().max()) < 1e5


def test_windows_are_put_together_on_the_canvas() -> None:
    """A thing in the right window is on the right of the canvas."""
    canvas = blob(0.8, 0.4, 0.08, 8, 12).float()
    maps = Windows().split(canvas[None, None])[:, 0, :, :, None]
    reading = Reading((maps,), views=Windows())
    (found,) = reading.things(torch.ones(1, 1))
    torch.testing.assert_close(found[0], canvas)
    torch.testing.assert_close(object_maps.centroid(found)[0], object_maps.centroid(canvas))
