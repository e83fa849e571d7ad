"""``controlroom evaluate``: a suite drawn and judged, with intervals, and continued where it was stopped."""

from __future__ import annotations

import json as json_module
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from controlroom.core.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from controlroom.evaluation.suites.report import Compared, Report
    from controlroom.evaluation.suites.runner import Progress


def evaluate(
    suite: Annotated[
        str | None, typer.Argument(help="Name of a suite; none: list them.", metavar="SUITE", show_default=False)
    ] = None,
    n: Annotated[int | None, typer.Option("--n", "-n", min=1, help="Cases. Default: the suite's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Solver steps. Default: the suite's.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the suite's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Case i is drawn from seed + i. Default: the suite's.")] = None,
    model: Annotated[
        str | None, typer.Option(help="theatre, a folder, or a hub id that has been downloaded. Default: theatre.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting of the suite's own; repeatable.")
    ] = None,
    extractor: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND=PATH",
            help="One more network that looks on: clip=FOLDER, dino=FOLDER, inception=FILE, lpips-alex=TRUNK,HEADS. "
            "Repeatable.",
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out", "-o", help="JSON file; .md, .html, .cases.jsonl are written beside it. Default: SUITE.json."
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="JSON file of an earlier report of the suite to compare with.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=256, help="Cases that are drawn together.")] = 8,
    minutes: Annotated[float | None, typer.Option(min=0, help="Stop after so long; run again to continue.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, without its pictures.")] = False,
) -> None:
    """Measure a suite: draw its cases, judge them, write numbers with intervals as JSON, Markdown and one HTML page.

    Finished cases are kept: the same command again continues, and a larger -n adds to what is there.
    """
    if suite is None:
        _list(json)
        return
    from controlroom.app import output, runs
    from controlroom.evaluation.suites.drawing import PipelineDrawer
    from controlroom.evaluation.suites.journal import Journal
    from controlroom.evaluation.suites.judges import with_extractor
    from controlroom.evaluation.suites.report import compare, read_report, summarise
    from controlroom.evaluation.suites.runner import run
    from controlroom.evaluation.suites.table import open_suite, settings_of

    settings_of(suite)  # an unknown suite is said first
    target = output.destination(f"{suite}.json" if out is None else out, ".json", "a JSON file")
    before = None if against is None else read_report(Path(against))
    given: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale, "seed": seed, "model": model}
    chosen = {name: value for name, value in given.items() if value is not None} | _settings(settings or [])
    runs.quiet_libraries()
    opened = open_suite(suite, n, chosen)
    for text in extractor or []:
        from controlroom.evaluation.extractors.choose import open_extractor

        opened = with_extractor(opened, open_extractor(text))
    draw = PipelineDrawer(opened.settings.model, opened.weights)
    about = opened.about(draw.fingerprint)
    if before is not None:
        # Two extractors are found out before the hours, not after.
        compare(summarise(opened, [], about), before)
    journal = Journal(target.with_suffix(".cases.jsonl"), about)
    try:
        with _shown() as progress:
            records = run(opened, draw, journal, batch_size, None if minutes is None else minutes * 60, progress)
    except KeyboardInterrupt:
        runs.notes().print(f"stopped; finished cases are in {journal.path}; run again to continue", markup=False)
        raise typer.Exit(130) from None
    report = summarise(opened, records, about)
    compared = compare(report, before) if before is not None else []
    files = _write(target, report, compared)
    if json:
        data = report.model_dump(mode="json", exclude={"picked"}) | {"files": [str(file) for file in files]}
        data["against"] = [one.model_dump(mode="json", exclude={"row"}) for one in compared]
        typer.echo(json_module.dumps(data, ensure_ascii=False))
        return
    from controlroom.evaluation.suites.pages import markdown

    typer.echo(markdown(report, compared))
    typer.echo("\n".join(str(file) for file in files))


def _list(json: bool) -> None:
    from controlroom.evaluation.suites.table import SUITES

    if json:
        rows = [{"suite": name, "n": entry.n, "does": entry.does} for name, entry in SUITES.items()]
        typer.echo(json_module.dumps(rows, ensure_ascii=False))
        return
    width = max(map(len, SUITES))
    typer.echo("\n".join(f"{name:<{width}}  {entry.n:>4}  {entry.does}" for name, entry in SUITES.items()))


def _settings(given: list[str]) -> dict[str, Any]:
    """``NAME=VALUE`` with the value read as JSON where it is some, else as text.

    Raises:
        InputError: no ``=``.

    >>> _settings(["cross_replace=0.8", "kind=top colour", "captions=true"])
    {'cross_replace': 0.8, 'kind': 'top colour', 'captions': True}
    """
    found: dict[str, Any] = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise InputError(f"--set takes NAME=VALUE, got {text[:80]!r}.")
        try:
            found[name.strip()] = json_module.loads(value)
        except (ValueError, RecursionError):
            found[name.strip()] = value
    return found


@contextmanager
def _shown() -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal, a line for each batch elsewhere; both on standard error."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    from controlroom.app import runs

    console = runs.notes()
    columns = (TextColumn("cases"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("cases", total=None, left="")

        def progress(now: Progress) -> None:
            left = "" if now.seconds_left is None else f"{_time(now.seconds_left)} left"
            bar.update(task, total=now.n, completed=now.done, left=left)
            if not console.is_terminal:
                console.print(f"{now.done} of {now.n} cases{left and f', {left}'}", markup=False)

        yield progress


def _time(seconds: float) -> str:
    """In the unit that says most.

    >>> _time(12.4), _time(300), _time(9000)
    ('12 s', '5 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _write(target: Path, report: Report, compared: list[Compared]) -> tuple[Path, ...]:
    from controlroom.core.files import write_text_atomically
    from controlroom.evaluation.suites.pages import markdown, page

    table, site = target.with_suffix(".md"), target.with_suffix(".html")
    write_text_atomically(target, report.model_dump_json(indent=1) + "\n")
    write_text_atomically(table, markdown(report, compared))
    write_text_atomically(site, page(report, compared))
    return target, table, site
