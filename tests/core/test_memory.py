"""Keeping memory works where it can."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_freed_memory_is_kept() -> None:
    """A tensor's memory, freed and asked for again, is not faulted in anew."""
    code = """
import resource, sys, torch
from controlroom.core.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12): torch.ones(16_000_000)
before = faults()
for _ in range(5): torch.ones(16_000_000)
print(faults() - before)
"""
    counted = [
        int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True).stdout)
        for how in ("plain", "kept")
    ]
    assert counted[1] < counted[0] / 10
