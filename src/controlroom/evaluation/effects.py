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
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from controlroom.core.errors import ControlRoomError, InputError, ModelError
from controlroom.core.files import write_text_atomically
from controlroom.evaluation.suites.attend_and_excite import COLOURS
from controlroom.evaluation.suites.combined import AHEAD, COMBINED, SEGA, made_name
from controlroom.evaluation.suites.editing import MADE, PSNR, REST
from controlroom.evaluation.suites.inversion import LOST
from controlroom.evaluation.suites.inverted_edits import again_arm
from controlroom.evaluation.suites.masactrl import ALIKE
from controlroom.evaluation.suites.pages import facts, number, page
from controlroom.evaluation.suites.pix2pix_zero import ZERO
from controlroom.evaluation.suites.prompt_to_prompt_real import METHODS, edited_arm
from controlroom.evaluation.suites.prompt_weighting import SHOWN
from controlroom.evaluation.suites.report import Cell, Report, read_report, summarise
from controlroom.evaluation.suites.right import RIGHT
from controlroom.evaluation.suites.self_guidance import RESIZED, SHIFTED
from controlroom.evaluation.suites.upscale import ALIKE as STRUCTURE
from controlroom.evaluation.suites.upscale import BICUBIC, DECIBELS, DISTANCE

REPORTS = Path("measured/effects")
"""Within the folder of the docs."""
CURVE = Path("measured/instruct_pix2pix.png")
"""Within the folder of the docs; `controlroom.evaluation.tradeoff` draws it."""
MISSING = "not measured yet"
SWEEP = "instruct_pix2pix_sweep"

HEADER = """\
<!-- Generated from docs/measured/effects/*.json by `python -m controlroom.evaluation.effects`. -->

# Effects

What each control does to pictures of [the theatre](theatre.md), against what is asked of it. All numbers are of
held-out cases, with 95 % intervals; `controlroom evaluate SUITE` measures one suite ([evaluation](evaluation.md)).
"Reached" is *yes* or *no* where the whole interval is on one side of what is asked, and says so where it is not; the
Fréchet distance has no interval. A control cannot draw what the theatre's checkpoint has not learned.

"""


@dataclass(frozen=True)
class Verdict:
    """The cells of a row: the arm, what it is compared with, the number of cases, and whether it is enough."""

    arm: str
    base: str
    n: int
    reached: str


class Rule(Protocol):
    """Reads a verdict out of a report; None where the report does not have its numbers."""

    def __call__(self, report: Report) -> Verdict | None: ...


def against(cell: Cell, least: float | None = None, most: float | None = None) -> str:
    """Whether a number is enough, and whether its interval leaves that open.

    >>> against(Cell(value=0.8, low=0.75, high=0.85, n=9), least=0.7)
    'yes'
    >>> against(Cell(value=0.8, low=0.65, high=0.9, n=9), least=0.7)
    'yes, within the error'
    >>> against(Cell(value=1.4, low=1.2, high=1.6, n=9), most=1.0)
    'no'
    """
    bound, sign = (least, 1.0) if least is not None else (most, -1.0)
    if bound is None or cell.value is None:
        return "–"
    value, low, high = (None if x is None else sign * (x - bound) for x in (cell.value, cell.low, cell.high))
    if sign < 0:
        low, high = high, low
    assert value is not None
    said = "yes" if value >= 0 else "no"
    if low is None or high is None:
        return said
    return said if low >= 0 or high < 0 else f"{said}, within the error"


@dataclass(frozen=True)
class Level:
    """A measure of an arm is at least, or at most, a number."""

    measure: str
    arm: str
    base: str | None = None
    least: float | None = None
    most: float | None = None

    def __call__(self, report: Report) -> Verdict | None:
        row = report.row(self.measure)
        if row is None or self.arm not in row.cells:
            return None
        cell = row.cells[self.arm]
        base = number(row, row.cells.get(self.base or "")) if self.base else "–"
        return Verdict(number(row, cell), _named(report, self.base, base), cell.n, against(cell, self.least, self.most))


@dataclass(frozen=True)
class Gain:
    """A measure of an arm is better than the suite's baseline, case by case, by at least a number."""

    measure: str
    arm: str
    least: float = 0.0

    def __call__(self, report: Report) -> Verdict | None:
        row = next((row for row in report.differences if row.measure == self.measure), None)
        levels = report.row(self.measure)
        if row is None or levels is None or self.arm not in row.cells or report.baseline is None:
            return None
        cell = row.cells[self.arm]
        base = number(levels, levels.cells.get(report.baseline))
        text = f"{number(levels, levels.cells.get(self.arm))}; by case {number(row, cell, signed=True)}"
        return Verdict(text, _named(report, report.baseline, base), cell.n, against(cell, least=self.least))


@dataclass(frozen=True)
class Joint:
    """A number of all cases together is at least a number."""

    measure: str
    least: float

    def __call__(self, report: Report) -> Verdict | None:
        row = next((row for row in report.derived if row.measure == self.measure), None)
        if row is None or "" not in row.cells:
            return None
        return Verdict(number(row, row.cells[""]), "–", row.cells[""].n, against(row.cells[""], self.least))


@dataclass(frozen=True)
class Rising:
    """A measure never falls from one drawn arm to the next; arms are numbers."""

    measure: str

    def __call__(self, report: Report) -> Verdict | None:
        row = report.row(self.measure)
        arms = [arm for arm in report.arms if _is_number(arm) and row is not None and arm in row.cells]
        if row is None or len(arms) < 2:
            return None
        cells = [row.cells[arm] for arm in arms]
        text = ", ".join(f"{arm}: {number(row, cell)}" for arm, cell in zip(arms, cells, strict=True))
        values = [cell.value or 0.0 for cell in cells]
        rises = all(first <= second for first, second in pairwise(values))
        reached = "yes" if rises and values[-1] > values[0] else "no"
        low, high = cells[0], cells[-1]
        if reached == "yes" and low.high is not None and high.low is not None and high.low <= low.high:
            reached += ", within the error"
        return Verdict(text, _named(report, report.baseline, number(row, row.cells.get("1"))), cells[0].n, reached)


@dataclass(frozen=True)
class NotWorse:
    """A measure that is better where it is lower, of whole sets and without an interval, is not above the base's."""

    measure: str
    arm: str
    base: str

    def __call__(self, report: Report) -> Verdict | None:
        row = report.row(self.measure)
        if row is None or not {self.arm, self.base} <= set(row.cells):
            return None
        cell, base = row.cells[self.arm], row.cells[self.base]
        reached = "–" if cell.value is None or base.value is None else "yes" if cell.value <= base.value else "no"
        return Verdict(number(row, cell), _named(report, self.base, number(row, base)), cell.n, reached)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _named(report: Report, arm: str | None, text: str) -> str:
    return text if arm is None or arm not in report.arms or text == "–" else f"{report.arms[arm]}: {text}"


@dataclass(frozen=True)
class Target:
    """A row of the table: a control, what is asked of it in words, the suite, and the rule."""

    control: str
    asked: str
    suite: str
    rule: Rule


def _edits(control: str, suite: str, arm: str, made: float | None, gain: Target) -> tuple[Target, Target]:
    least = "change made" if made is None else f"change made: at least {100 * made:.0f} %"
    return Target(control, least, suite, Level(MADE, arm, "reprompted", least=made)), gain


_OUTSIDE = "PSNR outside: above re-prompting"
_OUTSIDE_REAL = "PSNR outside: above inverting and re-prompting"
_UPSCALE = "strength 0.1"
TARGETS: tuple[Target, ...] = (
    Target(
        "Attend-and-Excite",
        "both objects in their colours: half of the failures repaired",
        "attend_and_excite",
        Joint("failures repaired (kinds and colours)", 0.5),
    ),
    Target(
        "Attend-and-Excite", "both objects in their colours", "attend_and_excite", Level(COLOURS, "with", "without")
    ),
    Target(
        "SEGA",
        "attribute appears: at least 70 %",
        "semantic_guidance",
        Level(MADE, "semantic_guidance", "reprompted", least=0.7),
    ),
    Target(
        "SEGA",
        "others unchanged: at least 90 %",
        "semantic_guidance",
        Level(REST, "semantic_guidance", "reprompted", least=0.9),
    ),
    *_edits(
        "Prompt-to-Prompt, swap",
        "prompt_to_prompt",
        "prompt_to_prompt",
        0.85,
        Target(
            "Prompt-to-Prompt, swap",
            "PSNR outside: at least 6 dB above re-prompting",
            "prompt_to_prompt",
            Gain(PSNR, "prompt_to_prompt", 6.0),
        ),
    ),
    *_edits(
        "Prompt-to-Prompt, refine",
        "prompt_to_prompt_refine",
        "prompt_to_prompt",
        None,
        Target("Prompt-to-Prompt, refine", _OUTSIDE, "prompt_to_prompt_refine", Gain(PSNR, "prompt_to_prompt")),
    ),
    Target(
        "Prompt-to-Prompt, re-weight",
        "rate of the attribute rises with the factor",
        "prompt_to_prompt_reweight",
        Rising(SHOWN),
    ),
    *(
        target
        for by, title in METHODS.items()
        for target in (
            Target(
                f"Prompt-to-Prompt on true pictures, {title}",
                "change made",
                "prompt_to_prompt_real",
                Level(MADE, edited_arm(by), again_arm(by)),
            ),
            Target(
                f"Prompt-to-Prompt on true pictures, {title}",
                _OUTSIDE_REAL if by == "null_text" else "PSNR outside",
                "prompt_to_prompt_real",
                Gain(PSNR, edited_arm(by)) if by == "null_text" else Level(PSNR, edited_arm(by), again_arm(by)),
            ),
        )
    ),
    *_edits(
        "InstructPix2Pix",
        "instruct_pix2pix",
        "instruct_pix2pix",
        0.8,
        Target(
            "InstructPix2Pix",
            "PSNR outside: at least 22 dB",
            "instruct_pix2pix",
            Level(PSNR, "instruct_pix2pix", "autoencoder", least=22.0),
        ),
    ),
    Target(
        "Null-text inversion",
        "within 1 dB of the autoencoder",
        "inversion",
        Level(LOST, "null_text", "ddim_guided", most=1.0),
    ),
    Target("Inversion, DDIM", "reconstruction", "inversion", Level(LOST, "ddim")),
    Target("Inversion, regularised", "reconstruction", "inversion", Level(LOST, "regularised")),
    Target(
        "Self-guidance",
        "shift within 10 % of the width: at least 70 %",
        "self_guidance",
        Level(SHIFTED, "self_guidance", "plain", least=0.7),
    ),
    Target(
        "Self-guidance",
        "size within 25 %: at least 70 %",
        "self_guidance",
        Level(RESIZED, "self_guidance", "plain", least=0.7),
    ),
    Target("Self-guidance", "the rest held still", "self_guidance", Level(REST, "self_guidance")),
    Target("Prompt weighting", "rate rises with the weight, 0.5 to 1.5", "prompt_weighting", Rising(SHOWN)),
    *_edits(
        "Pix2Pix-Zero",
        "pix2pix_zero",
        "pix2pix_zero",
        None,
        Target("Pix2Pix-Zero", _OUTSIDE, "pix2pix_zero", Gain(PSNR, "pix2pix_zero")),
    ),
    Target(
        "Pix2Pix-Zero on true pictures",
        "change made",
        "pix2pix_zero_real",
        Level(MADE, ZERO, again_arm("regularised")),
    ),
    Target("Pix2Pix-Zero on true pictures", _OUTSIDE_REAL, "pix2pix_zero_real", Gain(PSNR, ZERO)),
    *_edits(
        "MasaCtrl",
        "masactrl",
        "masactrl",
        None,
        Target("MasaCtrl", "identity kept: above re-prompting", "masactrl", Gain(ALIKE, "masactrl")),
    ),
    *_edits(
        "Imagic",
        "imagic",
        "alpha 1",
        None,
        Target("Imagic", _OUTSIDE, "imagic", Gain(PSNR, "alpha 1")),
    ),
    Target("Upscale", "SSIM: above bicubic", "upscale", Gain(STRUCTURE, _UPSCALE)),
    Target("Upscale", "PSNR: above bicubic", "upscale", Gain(DECIBELS, _UPSCALE)),
    Target("Upscale", "perceptual distance to the truth", "upscale", Level(DISTANCE, _UPSCALE, BICUBIC)),
    *(
        Target("Five controls combined", f"{kind} changed", "combined", Level(made_name(kind), COMBINED, SEGA))
        for kind in ("lower colour", "top colour")
    ),
    Target("Five controls combined", "both changes made", "combined", Level(MADE, COMBINED, "reprompted")),
    Target(
        "Five controls combined",
        "PSNR outside: above every single method that can do it",
        "combined",
        Joint(AHEAD, 0.0),
    ),
    *(
        target
        for arm, title in (("sag", "SAG"), ("pag", "PAG"), ("seg", "SEG"))
        for target in (
            Target(title, "Fréchet distance not worse", "guidance_methods", NotWorse("FID", arm, "plain")),
            Target(title, "attribute accuracy better", "guidance_methods", Gain(RIGHT, arm)),
        )
    ),
)
#: Suites in the order in which they are measured: those that take least time first.
MEASURED = (
    "instruct_pix2pix",
    "imagic",
    "prompt_to_prompt_refine",
    "prompt_to_prompt",
    "semantic_guidance",
    "masactrl",
    "self_guidance",
    SWEEP,
    "prompt_weighting",
    "guidance_methods",
    "prompt_to_prompt_reweight",
    "pix2pix_zero",
    "inversion",
    "attend_and_excite",
    "upscale",
    "combined",
    "pix2pix_zero_real",
    "prompt_to_prompt_real",
)


def effects_page(folder: Path) -> str:
    """The text of ``docs/effects.md``.

    Args:
        folder: of the docs; without reports every row says so.

    Raises:
        InputError: a file among the reports that is none, or is of another suite.
    """
    reports = {suite: _report(folder, suite) for suite in dict.fromkeys(target.suite for target in TARGETS)}
    lines = ["| control | asked for | measured | beside it | n | reached |", "|---|---|---|---|--:|---|"]
    lines += [_line(target, reports[target.suite]) for target in TARGETS]
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


def _line(target: Target, report: Report | None) -> str:
    verdict = None if report is None else target.rule(report)
    if report is None or verdict is None:
        cells = [MISSING, "", "", ""]
    else:
        count = str(verdict.n) if report.n == report.asked else f"{verdict.n} (stopped)"
        cells = [verdict.arm, verdict.base, count, verdict.reached]
    return "| " + " | ".join(text.replace("|", "\\|") for text in (target.control, target.asked, *cells)) + " |"


# Measuring.


@dataclass(frozen=True)
class Wish:
    """How the suites are run; None leaves a suite's own."""

    model: str | None = None
    n: int | None = None
    steps: int | None = None
    batch_size: int = 8
    minutes: float | None = None


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
    from controlroom.evaluation.suites.drawing import PipelineDrawer
    from controlroom.evaluation.suites.journal import Journal
    from controlroom.evaluation.suites.runner import run
    from controlroom.evaluation.suites.table import open_suite

    given = {"model": wish.model, "steps": wish.steps}
    opened = open_suite(suite, wish.n, {name: value for name, value in given.items() if value is not None})
    draw = PipelineDrawer(opened.settings.model, opened.weights)
    about = opened.about(draw.fingerprint)
    journal = Journal(work / f"{suite}.cases.jsonl", about)
    records = run(
        opened,
        draw,
        journal,
        1 if suite == "imagic" else wish.batch_size,
        None if wish.minutes is None else wish.minutes * 60,
        lambda now: print(f"{suite}: {now.done} of {now.n}", flush=True),
    )
    report = summarise(opened, records, about)
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
    parser.add_argument("--steps", type=int, default=20)
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
    raise SystemExit(main())
