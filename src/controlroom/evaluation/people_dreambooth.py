"""DreamBooth of every person of the suite ``people``, which then has its column: trained and measured by one command.

``python -m controlroom.evaluation.people_dreambooth --n 16`` trains on the nine pictures that the IP-Adapters of the
suite are shown, each person by itself, and measures all ways that are here on the same people. The published table has
DreamBooth beside them, without saying how long it was trained. Stopped, the same line goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from controlroom.core.errors import ControlRoomError, InputError
from controlroom.core.files import write_text_atomically
from controlroom.core.memory import keep_freed_memory
from controlroom.evaluation.subject_front import METHODS, WORD, Learned, Method, train_over_steps

if TYPE_CHECKING:
    from controlroom.evaluation.suites.report import Report

KINDS = ("dreambooth", "dreambooth_lora")


def train_people(kind: str, method: Method, steps: int, n: int, work: Path, model: str) -> Path:
    """Train the first ``n`` people of the suite.

    Args:
        kind: ``dreambooth`` (the network) or ``dreambooth_lora``.
        method: its settings and rate.
        steps: of each training.
        work: folder for everything; pictures of a class are drawn once, for all its people.
        model: that learns.

    Returns:
        The folder with ``PERSON/``, for the suite's setting ``dreambooth``.

    Raises:
        UnfinishedError: stopped; the same call goes on.
    """
    from controlroom.evaluation.suites.people import dreambooth_data, person_number
    from controlroom.sampling.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(model)
    adapters = work / "adapters" / f"{kind}-{steps}"
    for number in range(n):
        name, pictures = dreambooth_data(number)
        figure = person_number(number).scenes[0].puppets[0].identity.figure
        folder = work / "training"
        learned = Learned(name, figure, pictures, folder / name, folder / figure)
        train_over_steps(pipe, learned, kind, method, {steps: adapters / name})
        print(f"people: {number + 1} of {n}", flush=True)
    return adapters


def measure(adapters: Path, n: int, work: Path, model: str, drawing_steps: int) -> Report:
    """The suite of all ways that are here and of these adapters, from where it was stopped."""
    from controlroom.evaluation.suites.measuring import measured
    from controlroom.evaluation.suites.table import open_suite

    settings = {"model": model, "steps": drawing_steps, "dreambooth": str(adapters), "word": WORD}
    return measured(open_suite("people", n, settings), work / f"{adapters.name}.cases.jsonl")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and measure; 0 when all is well, 2 for an error."""
    parser = argparse.ArgumentParser(
        prog="python -m controlroom.evaluation.people_dreambooth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--method", choices=KINDS, default=KINDS[0])
    parser.add_argument("--steps", type=int, default=200, help="of each training (default: 200)")
    parser.add_argument("--rate", type=float, help="another learning rate")
    parser.add_argument("--n", type=int, default=16, help="people (default: 16)")
    parser.add_argument("--drawing-steps", type=int, default=20, help="of the solver")
    parser.add_argument("--model", default="theatre")
    parser.add_argument("--work", type=Path, default=Path("runs/people_dreambooth"))
    parser.add_argument("--output", type=Path, default=Path("docs/measured/people_dreambooth.json"))
    options = parser.parse_args(arguments)
    method = METHODS[options.method]
    try:
        if options.n < 1 or options.steps < 1:
            raise InputError(f"Say how many people and steps, at least 1; got {options.n} and {options.steps}.")
        if options.rate is not None:
            if not 0 < options.rate < float("inf"):
                raise InputError(f"A learning rate is a number above 0; got {options.rate}.")
            method = replace(method, rate=options.rate)
        adapters = train_people(options.method, method, options.steps, options.n, options.work, options.model)
        report = measure(adapters, options.n, options.work, options.model, options.drawing_steps)
        kept = report.model_copy(update={"picked": []})
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(options.output, kept.model_dump_json(indent=1) + "\n")
    except ControlRoomError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    raise SystemExit(main())
