"""When to stop early and when to save: signals, the time box and the checkpoint clock, asked once a step."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from controlroom.core.errors import OutputError
from controlroom.training.processes import Processes

_REASONS = (None, "time box", "SIGTERM", "SIGINT")


class StopRequest:
    """Holds the reason to stop after the current step, or None."""

    def __init__(self, stop_after_seconds: float | None) -> None:
        self._deadline = None if stop_after_seconds is None else time.monotonic() + stop_after_seconds
        self._signal: str | None = None

    @property
    def reason(self) -> str | None:
        if self._signal is not None:
            return self._signal
        return "time box" if self._deadline is not None and time.monotonic() >= self._deadline else None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM and SIGINT ask for a clean stop; a second SIGINT interrupts at once. Handlers are put back after."""
        if threading.current_thread() is not threading.main_thread():  # Python only lets the main thread listen
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number).name


class Clock:
    """Says when a checkpoint is due, by seconds, by steps, or both. It never influences what is learned."""

    def __init__(self, seconds: float | None, steps: int | None) -> None:
        self._seconds, self._steps = seconds, steps
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        by_time = self._seconds is not None and time.monotonic() - self._last >= self._seconds
        return by_time or (self._steps is not None and step % self._steps == 0)

    def reset(self) -> None:
        self._last = time.monotonic()


def agreed(processes: Processes, reason: str | None, due: bool) -> tuple[str | None, bool]:
    """What all processes do next: stop if one has a reason to, save if the main process finds it due."""
    rows = processes.table([_REASONS.index(reason), due])
    return _REASONS[int(max(row[0] for row in rows))], bool(rows[0][1])


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; a killed process lets go by itself. Raises OutputError if another run trains there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error}. Give another folder.") from error
    with file:
        if sys.platform != "win32":  # Windows has no such lock; there two runs in one folder are not noticed
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                text = f"Another process is at work in {folder}. Stop it, or give another folder."
                raise OutputError(text) from error
        yield
