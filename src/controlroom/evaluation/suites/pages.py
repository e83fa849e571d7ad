"""A report as Markdown, and as one HTML page that needs nothing beside it."""

from __future__ import annotations

import html
from collections.abc import Sequence

from controlroom.evaluation.suites.report import Cell, Compared, Report, Row

_NONE = "–"


def number(row: Row, cell: Cell | None, signed: bool = False) -> str:
    """A cell in words: percent for shares, the interval in brackets where there is one.

    >>> row = Row(measure="m", kind="share", higher=True, extractor="", digits=3, cells={})
    >>> number(row, Cell(value=0.5, low=0.25, high=0.75, n=4))
    '50.0 % [25.0, 75.0]'
    >>> number(row.model_copy(update={"kind": "number", "digits": 1}), Cell(value=3.04, low=None, high=None, n=4), True)
    '+3.0'
    """
    if cell is None or cell.value is None:
        return _NONE
    share = row.kind == "share"
    factor, digits = (100, 1) if share else (1, row.digits)
    plus = "+" if signed else ""
    text = f"{factor * cell.value:{plus}.{digits}f}{(' points' if signed else ' %') if share else ''}"
    if cell.low is None or cell.high is None:
        return text
    return f"{text} [{factor * cell.low:{plus}.{digits}f}, {factor * cell.high:{plus}.{digits}f}]"


def name_of(row: Row) -> str:
    """The measure with an arrow to where it is better."""
    return row.measure + ("" if row.higher is None else " ↑" if row.higher else " ↓")


def tables(report: Report, against: Sequence[Compared] = ()) -> list[tuple[str, list[str], list[list[str]]]]:
    """Heading, heads of the columns and rows of every table of a report."""
    arms = [arm for arm in report.arms if any(arm in row.cells for row in report.rows)]
    found = [
        (
            "",
            ["", *(report.arms[arm] for arm in arms)],
            [[name_of(row), *(number(row, row.cells.get(arm)) for arm in arms)] for row in report.rows],
        )
    ]
    if report.differences and report.ours and report.baseline:
        differing = [arm for arm in report.arms if any(arm in row.cells for row in report.differences)]
        alone = differing == [report.ours]
        first = report.arms[report.ours] if alone else "Difference"
        heading = f"{first} {'minus' if alone else 'to'} {report.arms[report.baseline]}, case by case"
        rows = [
            [name_of(row), *(number(row, row.cells.get(arm), True) for arm in differing)] for row in report.differences
        ]
        found.append((heading, ["", *(["difference"] if alone else [report.arms[arm] for arm in differing])], rows))
    if report.derived:
        rows = [[name_of(row), number(row, row.cells.get("")), str(_n(row))] for row in report.derived]
        found.append(("Of all cases together", ["", "", "of"], rows))
    if against:
        rows = [
            [
                f"{name_of(one.row)}, {report.arms.get(one.arm, one.arm)}",
                number(one.row, one.before),
                number(one.row, one.now),
                "yes" if one.clear else "no",
            ]
            for one in against
        ]
        found.append(("Against the other report", ["", "there", "here", "intervals apart"], rows))
    return found


def _n(row: Row) -> int:
    return row.cells[""].n if "" in row.cells else 0


def facts(report: Report) -> list[str]:
    """What a number of this report depends on, a line for each fact."""
    settings = ", ".join(f"{key} {value}" for key, value in report.about.get("settings", {}).items())
    labels = sorted({row.extractor for row in report.rows if row.extractor})
    done = f"{report.n} cases" if report.n == report.asked else f"{report.n} of {report.asked} cases"
    lines = [
        f"{done}; 95 % intervals in brackets (Wilson's for shares, bootstrap for means, jackknife for KID).",
        f"{settings}; weights {report.about.get('model', _NONE)}; measurement {report.fingerprint}.",
    ]
    if labels:
        lines.append(f"Measured with {', '.join(labels)}; numbers of other extractors cannot be compared with these.")
    return [*lines, report.note] if report.note else lines


def markdown(report: Report, against: Sequence[Compared] = ()) -> str:
    """The report as Markdown, without pictures."""
    lines = [f"## {report.title}", "", *(_cell(fact) + "  " for fact in facts(report)), ""]
    lines[-2] = lines[-2].rstrip()
    for heading, heads, rows in tables(report, against):
        lines += [f"**{heading}**", ""] if heading else []
        lines += ["| " + " | ".join(map(_cell, heads)) + " |", "|---" * len(heads) + "|"]
        lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows] + [""]
    lines.append(f"Made by `controlroom evaluate {report.suite}`.")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .8rem; text-align: left; white-space: nowrap; }
th { background: var(--soft); font-weight: 600; }
td { font-variant-numeric: tabular-nums; }
.facts { color: color-mix(in srgb, currentColor 70%, transparent); }
.case { border-top: 1px solid var(--line); padding: 1rem 0; }
.arms { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; width: 12rem; }
figure img { width: 100%; height: auto; border-radius: 4px; image-rendering: auto; background: var(--soft); }
figcaption { font-size: .85rem; overflow-wrap: anywhere; }
figcaption b { display: block; }
"""


def page(report: Report, against: Sequence[Compared] = ()) -> str:
    """One HTML page with the tables and the worst, the median and the best case; its pictures lie in it."""
    e = html.escape
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{e(report.suite)} – controlroom</title>",
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{e(report.title)}</h1>",
        *(f'<p class="facts">{e(fact)}</p>' for fact in facts(report)),
    ]
    for heading, heads, rows in tables(report, against):
        parts += [f"<h2>{e(heading)}</h2>"] if heading else []
        parts.append("<table><thead><tr>" + "".join(f"<th>{e(head)}</th>" for head in heads) + "</tr></thead><tbody>")
        parts += ["<tr>" + "".join(f"<td>{e(cell)}</td>" for cell in row) + "</tr>" for row in rows]
        parts.append("</tbody></table>")
    rows = {row.measure: row for row in report.rows}
    for case in report.picked:
        parts.append(f'<section class="case"><h2>The {e(case.place)} case</h2><p>{e(case.title)}</p><div class="arms">')
        for arm, title in report.arms.items():
            if arm in case.thumbnails:
                parts.append(_figure(title, case.thumbnails[arm], case.values.get(arm, {}), rows))
        parts.append("</div></section>")
    parts.append(f"<p>Made by <code>controlroom evaluate {e(report.suite)}</code>.</p></body></html>")
    return "\n".join(parts) + "\n"


def _figure(title: str, picture: str, values: dict[str, float | None], rows: dict[str, Row]) -> str:
    listed = "".join(
        f"<br>{html.escape(name)}: {html.escape(_value(rows[name], value))}"
        for name, value in values.items()
        if value is not None and name in rows
    )
    return (
        f'<figure><img alt="{html.escape(title)}" src="data:image/webp;base64,{html.escape(picture)}">'
        f"<figcaption><b>{html.escape(title)}</b>{listed.removeprefix('<br>')}</figcaption></figure>"
    )


def _value(row: Row, value: float) -> str:
    return ("yes" if value > 0 else "no") if row.kind == "share" else f"{value:.{row.digits}f}"
