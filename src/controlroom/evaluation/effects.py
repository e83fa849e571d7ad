"""The table of effects: ``python -m controlroom.evaluation.effects`` writes ``docs/effects.md`` from measured reports.

Every row of the table is a number that is asked for, the suite that measures it, and whether it is reached. The reports
lie in ``docs/measured/effects``; what has none is "not measured yet". With ``--measure`` the suites are run first, each
from where it was stopped, so that one command makes all of them again after a better checkpoint.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from controlroom.core.errors import ControlRoomError, InputError, ModelError
from controlroom.core.files import write_text_atomically
from controlroom.core.memory import keep_freed_memory
from controlroom.evaluation import effect_targets, effect_targets_spatial
from controlroom.evaluation.effect_rules import Target
from controlroom.evaluation.effect_targets import SWEEP
from controlroom.evaluation.suites.pages import facts, page
from controlroom.evaluation.suites.report import Report, read_report

STEPS = 20
"""Of suites without a number of their own, where the caller asks for none."""
#: Heading -> rows under it.
SECTIONS = {
    "Guidance and editing": effect_targets.TARGETS,
    "Structure, appearance, style and regions": effect_targets_spatial.TARGETS,
}
MEASURED = (*effect_targets.MEASURED, *effect_targets_spatial.MEASURED)
REPORTS = Path("measured/effects")
"""Within the folder of the docs."""
CURVE = Path("measured/instruct_pix2pix.png")
"""Within the folder of the docs; `controlroom.evaluation.tradeoff` draws it."""
MISSING = "not measured yet"
BEFORE = "†"
"""Beside the number of cases, where other weights were measured than those that are installed."""

HEADER = """\
<!-- Generated from docs/measured/effects/*.json by `python -m controlroom.evaluation.effects`. -->

# Effects

What each control does to pictures of [the theatre](theatre.md), against what is asked of it. All numbers are of
held-out cases, with 95 % intervals; `controlroom evaluate SUITE` measures one suite ([evaluation](evaluation.md)).
"Reached" is *yes* or *no* where the whole interval is on one side of what is asked, and says so where it is not; the
Fréchet distance has no interval. A control cannot draw what the theatre's checkpoint has not learned.

"""


def effects_page(folder: Path) -> str:
    """The text of ``docs/effects.md``.

    Args:
        folder: of the docs; without reports every row says so.

    Raises:
        InputError: a file among the reports that is none, or is of another suite.
    """
    rows = [target for targets in SECTIONS.values() for target in targets]
    reports = {suite: _report(folder, suite) for suite in dict.fromkeys(target.suite for target in rows)}
    before = {suite for suite, report in reports.items() if report is not None and not is_of_these_weights(report)}
    lines: list[str] = []
    for title, targets in SECTIONS.items():
        lines += ["", f"## {title}", ""] if lines else [f"## {title}", ""]
        lines += ["| control | asked for | measured | beside it | n | reached |", "|---|---|---|---|--:|---|"]
        lines += [_line(target, reports[target.suite], target.suite in before) for target in targets]
    if before:
        lines += ["", f"{BEFORE} measured with weights before those that are installed now."]
    if (folder / CURVE).is_file():
        lines += ["", f"![InstructPix2Pix: consistency against edit, image and text guidance swept]({CURVE})"]
    found = [report for report in reports.values() if report is not None]
    if found:
        lines += ["", "## What the numbers depend on", ""]
        lines += [f"- **{report.title}** (`{report.suite}`). {' '.join(facts(report))}" for report in found]
    return HEADER + "\n".join(lines) + "\n"


def _report(folder: Path, suite: str) -> Report | None:
    path = folder / REPORTS / f"{suite}.json"
    if not path.is_file():
        return None
    found = read_report(path)
    if found.suite != suite:
        raise InputError(f"{path} is a report of {found.suite!r}. Give each report the name of its suite.")
    return found


def is_of_these_weights(report: Report) -> bool:
    """Whether the models that were measured are those that are installed."""
    from controlroom.evaluation.suites.drawing import weights_hash

    try:
        found = weights_hash(report.about["settings"]["model"], report.weights)
    except (KeyError, ModelError):
        return False
    return found == report.about.get("model")


def _line(target: Target, report: Report | None, before: bool) -> str:
    verdict = None if report is None else target.rule(report)
    if report is None or verdict is None:
        cells = [MISSING, "", "", ""]
    else:
        count = str(verdict.n) if report.n == report.asked else f"{verdict.n} (stopped)"
        count += f" {BEFORE}" if before else ""
        cells = [verdict.arm, verdict.base, count, verdict.reached]
    return "| " + " | ".join(text.replace("|", "\\|") for text in (target.control, target.asked, *cells)) + " |"


# Measuring.


@dataclass(frozen=True)
class Wish:
    """How the suites are run; None leaves a suite's own.

    Attributes:
        steps: of the solver; None: `STEPS`, or the suite's own where that is not every suite's default.
    """

    model: str | None = None
    n: int | None = None
    steps: int | None = None
    batch_size: int = 8
    minutes: float | None = None


def steps_of(suite: str, asked: int | None) -> int:
    """Steps to draw a suite with.

    >>> steps_of("stylise", None), steps_of("masactrl", None), steps_of("stylise", 10)
    (50, 20, 10)
    """
    from controlroom.evaluation.suites.suite import SuiteSettings
    from controlroom.evaluation.suites.table import settings_of

    if asked is not None:
        return asked
    own = settings_of(suite)["steps"]
    return STEPS if own == SuiteSettings().steps else own


def measure(suite: str, folder: Path, work: Path, wish: Wish) -> Report:
    """Run a suite from where it was stopped, and write its report without pictures, and its page with them.

    Args:
        suite: name of the table of suites.
        folder: of the docs.
        work: for journals and pages, which are not kept in the repository.
        wish: how.

    Raises:
        ModelError: weights that are not there.
        InputError: the journal is of another measurement.
    """
    from controlroom.evaluation.suites.measuring import measured
    from controlroom.evaluation.suites.table import open_suite

    given = {"model": wish.model, "steps": steps_of(suite, wish.steps)}
    opened = open_suite(suite, wish.n, {name: value for name, value in given.items() if value is not None})
    together = 1 if suite == "imagic" else wish.batch_size
    report = measured(opened, work / f"{suite}.cases.jsonl", together, wish.minutes)
    write_text_atomically(work / f"{suite}.html", page(report))
    kept = report.model_copy(update={"picked": []})
    (folder / REPORTS).mkdir(parents=True, exist_ok=True)
    write_text_atomically(folder / REPORTS / f"{suite}.json", kept.model_dump_json(indent=1) + "\n")
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, after measuring if asked; 0 when all is well, 1 if a suite could not be measured."""
    parser = argparse.ArgumentParser(
        prog="python -m controlroom.evaluation.effects",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, default=Path("docs"), help="where the docs are (default: docs)")
    parser.add_argument("--measure", nargs="*", metavar="SUITE", help="measure these suites first; none named: all")
    parser.add_argument("--work", type=Path, default=Path("runs/effects"), help="for journals and pages with pictures")
    parser.add_argument("--model")
    parser.add_argument("--n", type=int)
    parser.add_argument("--steps", type=int, help=f"default: {STEPS}, or a suite's own")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--minutes", type=float, help="begin no batch after so many minutes, of all suites together")
    options = parser.parse_args(arguments)
    failed = False
    try:
        if not options.folder.is_dir():
            raise InputError(f"There is no folder {str(options.folder)!r}; run this at the root of the repository.")
        if options.measure is not None:
            failed = _measure_all(options)
        write_text_atomically(options.folder / "effects.md", effects_page(options.folder))
        print(f"wrote {options.folder / 'effects.md'}")
    except ControlRoomError as error:
        print(error, file=sys.stderr)
        return 2
    return 1 if failed else 0


def _measure_all(options: argparse.Namespace) -> bool:
    """Whether a suite could not be measured; it is named, and the others go on."""
    begun, failed = time.monotonic(), False
    for suite in options.measure or MEASURED:
        left = None
        if options.minutes is not None:
            left = options.minutes - (time.monotonic() - begun) / 60
            if left <= 0:
                break
        try:
            report = measure(
                suite,
                options.folder,
                options.work,
                Wish(options.model, options.n, options.steps, options.batch_size, left),
            )
        except ModelError as error:
            print(f"{suite}: {error}", file=sys.stderr)
            failed = True
            continue
        if suite == SWEEP and report.n:
            from controlroom.evaluation.tradeoff import draw_curve

            draw_curve(report).save(options.folder / CURVE)
    return failed


if __name__ == "__main__":
    keep_freed_memory()
    raise SystemExit(main())
