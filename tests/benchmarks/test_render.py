"""The benchmark of the theatre's drawing measures every part."""

from __future__ import annotations

from benchmarks.render import measure


def test_every_part_takes_time() -> None:
    found = measure(3)
    assert list(found) == ["sample", "render", "truth", "one ellipse"]
    assert all(value > 0 for value in found.values())
