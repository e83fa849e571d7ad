"""What the machine is asked."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from controlroom.core.errors import InputError
from controlroom.training import hardware


@pytest.mark.parametrize(("known", "fast"), [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({}, False)])
def test_bfloat16_is_used_only_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, known: dict[str, bool], fast: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert hardware.fast_bfloat16(torch.device("cpu")) is fast


@pytest.mark.parametrize("name", ["cuda:77", "toaster", ""])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(InputError, match=f"'{name}' cannot be used"):
        hardware.usable_device(name)


@dataclass(frozen=True)
class Batch:
    pixels: torch.Tensor
    parts: tuple[torch.Tensor, ...]
    names: list[str]


def test_batches_move_with_all_that_they_hold() -> None:
    """`meta` stands for another device: a machine of tests has only one."""
    batch = Batch(torch.zeros(2, 3), (torch.ones(1),), ["a", "b"])
    there = hardware.moved(batch, torch.device("meta"))
    assert there.pixels.device.type == there.parts[0].device.type == "meta"
    assert there.names == ["a", "b"] and there.pixels.shape == (2, 3)
