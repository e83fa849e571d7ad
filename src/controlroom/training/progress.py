"""The log of a run: a plain line on stderr for people, a line of JSON in `log.jsonl` for programs, TensorBoard.

A killed run and its resume write to the same files. Steps that were lost and taken again are in `log.jsonl` twice, with
the same numbers; TensorBoard hides the first.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL.Image import Image

from controlroom.core.errors import InputError


class Progress:
    """Collects numbers step by step and reports their mean since the last report."""

    def __init__(
        self,
        folder: Path | None,
        total_steps: int,
        batch_size: int,
        log_to: Sequence[str] = ("jsonl",),
        step: int = 0,
        stream: TextIO | None = None,
    ) -> None:
        """`folder` is that of the run, or None for a process that says nothing; `step` is the one it starts at.

        Raises InputError if TensorBoard is asked for and not installed.
        """
        self._board = _tensorboard(folder, step) if folder is not None and "tensorboard" in log_to else None
        jsonl = folder is not None and "jsonl" in log_to
        self._file = (folder / "log.jsonl").open("a", encoding="utf-8") if folder is not None and jsonl else None
        self._stream = None if folder is None else stream if stream is not None else sys.stderr
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
        self._plot("train", step, {**means, "learning_rate": learning_rate, "samples_per_second": rate})
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

    def validation(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers that the recipe measured."""
        numbers = "  ".join(f"{name} {value:.5g}" for name, value in values.items())
        self.event("validation", f"step {step}  {numbers}", step=step, **values)
        self._plot("validation", step, values)

    def previews(self, step: int, pictures: Sequence[tuple[str, Image]], paths: Sequence[Path]) -> None:
        """Pictures that the recipe drew, and where they lie."""
        self.event("previews", ", ".join(path.name for path in paths), step=step)
        if self._board is not None:
            for name, picture in pictures:
                pixels = np.asarray(picture.convert("RGB"))
                self._board.add_image(f"preview/{name}", pixels, step, dataformats="HWC")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def _plot(self, group: str, step: int, values: Mapping[str, float]) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{group}/{name}", value, step)

    def _write(self, record: Mapping[str, float | str | int]) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"time": round(time.time(), 3), **record}) + "\n")
            self._file.flush()

    def _print(self, line: str) -> None:
        if self._stream is not None:
            print(line, file=self._stream, flush=True)


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise InputError(
            f"log_to names tensorboard, which is not installed ({error}). Install it (pip install tensorboard), or "
            "log to jsonl alone."
        ) from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)  # what a killed run wrote after is hidden


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(min(seconds, 359_999)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
