"""The batches of a run in order, the next one made in a thread while this one trains, if asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Made = TypeVar("Made")


@contextmanager
def batches_ahead(make: Callable[[int], Made], steps: range, prefetch: bool) -> Iterator[Iterator[Made]]:
    """Batches of the steps in order; with `prefetch`, the next one is made in a thread meanwhile."""
    if not prefetch:
        yield map(make, steps)
        return
    with ThreadPoolExecutor(1, "batch") as pool:

        def ahead() -> Iterator[Made]:
            waiting = None
            for step in steps:
                current = pool.submit(make, step) if waiting is None else waiting
                result = current.result()
                waiting = pool.submit(make, step + 1) if step + 1 in steps else None
                yield result

        yield ahead()
