"""The log of a run: a plain line on stderr for people, a line of JSON in `log.jsonl` for everything else."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO


class Progress:
    """Collects numbers step by step and reports their mean since the last report."""

    def __init__(self, path: Path, total_steps: int, batch_size: int, stream: TextIO | None = None) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._stream = stream if stream is not None else sys.stderr
        self._total_steps = total_steps
        self._batch_size = batch_size
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._steps = 0
        self._since = time.monotonic()

    def add(self, values: Mapping[str, float]) -> None:
        """Take in the numbers of one step; a name need not be in every step."""
        self._steps += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def report(self, step: int, samples: int, learning_rate: float) -> dict[str, float]:
        """Print and store the means since the last report, and start anew. Returns the means."""
        now = time.monotonic()
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        per_second = self._steps / max(now - self._since, 1e-9)
        left = (self._total_steps - step) / max(per_second, 1e-9)
        rate = per_second * self._batch_size
        self._write({"event": "step", "step": step, "samples": samples, "learning_rate": learning_rate,
                     "samples_per_second": round(rate, 3), **means})  # fmt: skip
        numbers = "  ".join(f"{name} {value:.5g}" for name, value in means.items())
        self._print(
            f"step {step}/{self._total_steps}  samples {samples}  {numbers}  lr {learning_rate:.3g}  "
            f"{rate:.1f} samples/s  {_duration(left)} left"
        )
        self._sums, self._counts, self._steps, self._since = {}, {}, 0, now
        return means

    def event(self, name: str, text: str, **values: float | str) -> None:
        """Something that is not a step: resume, checkpoint, validation, stop."""
        self._write({"event": name, **values})
        self._print(f"{name}: {text}")

    def close(self) -> None:
        self._file.close()

    def _write(self, record: Mapping[str, float | str | int]) -> None:
        self._file.write(json.dumps({"time": round(time.time(), 3), **record}) + "\n")
        self._file.flush()

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(min(seconds, 359_999)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
