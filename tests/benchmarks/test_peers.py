"""What is timed draws the same on both sides, or the times would compare different work."""

from __future__ import annotations

import pytest
import torch

from benchmarks.bench import Bench, widened
from benchmarks.peers import PARITY


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench("tiny", 2)


@pytest.mark.parametrize("key", PARITY)
def test_both_sides_draw_the_same_and_not_what_no_control_draws(key: str, bench: Bench) -> None:
    _, ours, theirs = PARITY[key](bench)
    found, expected = ours("latent"), theirs("latent")
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-3
    plain = bench.plain("latent")
    assert plain.shape != found.shape or (found - plain).abs().max() > 1e-2
    # Nothing that one side leaves in the network changes the other side.
    assert torch.equal(ours("latent"), found)


def test_a_widened_network_shares_its_tensors(bench: Bench) -> None:
    unet = bench.source.unet
    wide = widened(unet, 8)
    assert wide.config.in_channels == 8
    assert wide.conv_out.weight.data_ptr() == unet.conv_out.weight.data_ptr()
    assert torch.equal(wide.conv_in.weight[:, :4], unet.conv_in.weight)
