"""The generated pages of ``docs/``: ``python -m controlroom.app.docs`` writes them, ``--check`` says if they are old.

`docs/systems.md` is the catalogue for readers. It is written from `controlroom.catalog` and never by hand.
`docs/effects.md` is the table of effects, from the reports in `docs/measured/effects`, by
`controlroom.evaluation.effects`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from controlroom.catalog import CONTROL_TYPES, FURTHER, SYSTEMS, Paper, System
from controlroom.catalog.pairs import combines
from controlroom.core.errors import ControlRoomError, InputError
from controlroom.core.files import write_text_atomically

HEADER = """\
<!-- Generated from src/controlroom/catalog/ by `make docs`. Change the catalogue, not this page. -->

# The systems

"""


def systems_page() -> str:
    """Return the text of ``docs/systems.md``: one table of all systems, then a section for each.

    >>> systems_page().splitlines()[2]
    '# The systems'
    """
    working = sum(system.status == "working" for system in SYSTEMS)
    lines = [
        f"{working} of {len(SYSTEMS)} systems work in this version; the others are planned, and say so. "
        "Every number in the column of effects was measured by this project, on its theatre, with the error of the "
        "readers beside it; a dash means not measured.",
        "",
        *_table(SYSTEMS),
        "Controls beside these:",
        "",
        *_table(FURTHER),
    ]
    for system in (*SYSTEMS, *FURTHER):
        lines += _section(system)
    return HEADER + "\n".join(lines).rstrip("\n") + "\n"


def _effects(folder: Path) -> str:
    from controlroom.evaluation.effects import effects_page

    return effects_page(folder)


PAGES: dict[str, Callable[[Path], str]] = {"systems.md": lambda _: systems_page(), "effects.md": _effects}
"""Page -> its text, for the folder of the docs."""


def _table(systems: tuple[System, ...]) -> list[str]:
    head = "| # | system | state | paper | what it does | measured effect |"
    return [head, "|--:|---|---|---|---|---|", *(_row(system) for system in systems), ""]


def _row(system: System) -> str:
    papers = ", ".join(f"[{paper.arxiv}]({paper.url})" for paper in system.papers if paper.arxiv) or "–"
    cells = [
        str(system.number),
        f"[{system.name}](#{_anchor(system)})",
        system.status,
        papers,
        system.does,
        system.effect or "–",
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _section(system: System) -> list[str]:
    neutral = system.neutral and f"`{system.neutral}`"
    planned = "" if system.status == "working" else " (planned)"
    facts: list[tuple[str, str | None]] = [
        ("State", system.status),
        ("Paper" if len(system.papers) == 1 else "Papers", "; ".join(map(_citation, system.papers)) or None),
        (f"Code{planned}", _paths(system.code)),
        (f"Recipe{planned}", _paths((system.recipe,) if system.recipe else ())),
        ("Signals", ", ".join(system.signals) or None),
        ("Backbones", ", ".join(system.backbones) or None),
        ("Public weights", system.weights_licence),
        ("Neutral setting", neutral or f"none: {system.no_neutral}"),
        (f"Proof{planned}", system.proof),
        ("Measured effect", system.effect or "not measured yet"),
        *((f"`{name}` combines with", combines(name)) for name in _types(system)),
    ]
    return [
        f'<a id="{_anchor(system)}"></a>',
        "",
        f"## {system.number}. {system.name}",
        "",
        system.does,
        "",
        *(f"- {name}: {value}" for name, value in facts if value),
        "",
    ]


def _types(system: System) -> list[str]:
    """The controls that are its own, by the names of run files."""
    if system.status != "working":
        return []
    return [name for name, path in CONTROL_TYPES.items() if path in system.code]


def _anchor(system: System) -> str:
    return system.key.replace("_", "-")


def _citation(paper: Paper) -> str:
    return f"{paper.title}, [arXiv {paper.arxiv}]({paper.url})" if paper.url else paper.title


def _paths(paths: tuple[str, ...]) -> str | None:
    return ", ".join(f"`{path}`" for path in paths) or None


def main(arguments: list[str] | None = None) -> int:
    """Write the pages, or with ``--check`` compare them; 0 when all is well, 1 for an old page, 2 for an error."""
    parser = argparse.ArgumentParser(prog="python -m controlroom.app.docs", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is not up to date")
    parser.add_argument("--folder", type=Path, default=Path("docs"), help="where the pages are (default: docs)")
    options = parser.parse_args(arguments)
    try:
        return _write_or_check(options.folder, check=options.check)
    except ControlRoomError as error:
        print(error, file=sys.stderr)
        return 2


def _write_or_check(folder: Path, *, check: bool) -> int:
    if not folder.is_dir():
        raise InputError(
            f"There is no folder {str(folder)!r}; run this at the root of the repository or give --folder."
        )
    old = []
    for name, page in PAGES.items():
        path, text = folder / name, page(folder)
        if path.is_file() and path.read_bytes() == text.encode("utf-8"):
            continue
        old.append(str(path))
        if not check:
            write_text_atomically(path, text)
            print(f"wrote {path}")
    if check and old:
        print(f"not up to date: {', '.join(old)}; run `make docs` and commit the result", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
