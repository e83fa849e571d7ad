"""Run every Python snippet of the documentation: ``python tools/check_snippets.py README.md docs``.

The blocks of a page that open with three backticks and ``python`` run in their order and share one namespace; each page
runs in an interpreter and an empty folder of its own. ``<!-- no-run -->`` on the line above a block leaves it out (a
blank line between is allowed); it is still compiled, so that it is at least Python. Other languages are not looked at.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^(?P<indent> {0,3})(?P<ticks>`{3,}|~{3,})\s*(?P<language>[\w+-]*)")
NO_RUN = "<!-- no-run -->"
TIMEOUT_S = 600

# Runs in the page's own interpreter: padding with empty lines makes a traceback show the line of the page.
RUNNER = """
import json, sys
page, blocks = json.load(sys.stdin)
sys.argv = [page]
namespace = {"__name__": "__main__"}
for line, code in blocks:
    exec(compile("\\n" * line + code, page, "exec"), namespace)
"""


@dataclass(frozen=True)
class Block:
    """A Python block of a page: the number of lines before its first one, its text, and whether to run it."""

    line: int
    code: str
    run: bool


class PageError(Exception):
    """A page that cannot be read as it was meant: a block without an end, or one that is not Python."""


def python_blocks(text: str) -> list[Block]:
    """Return the Python blocks of a page of Markdown, in their order.

    Raises:
        PageError: a block has no end.

    >>> python_blocks("hello\\n```python\\nx = 1\\n```\\n")
    [Block(line=2, code='x = 1\\n', run=True)]
    """
    blocks: list[Block] = []
    lines = text.splitlines()
    last_text = ""
    at = 0
    while at < len(lines):
        fence = FENCE.match(lines[at])
        if fence is None:
            last_text = lines[at].strip() or last_text
            at += 1
            continue
        end = re.compile(rf"^ {{0,3}}{re.escape(fence['ticks'])}{fence['ticks'][0]}*\s*$")
        start = at + 1
        at = next((i for i in range(start, len(lines)) if end.match(lines[i])), len(lines))
        if at == len(lines):
            raise PageError(f"line {start}: the block that opens here has no end")
        if fence["language"].lower() in ("python", "py"):
            indent = len(fence["indent"])
            body = [line[min(indent, len(line) - len(line.lstrip(" "))) :] for line in lines[start:at]]
            blocks.append(Block(start, "".join(line + "\n" for line in body), last_text != NO_RUN))
        last_text = ""
        at += 1
    return blocks


def check_page(page: Path) -> str | None:
    """Run the blocks of one page; None if all went well, else what went wrong."""
    try:
        blocks = python_blocks(page.read_text(encoding="utf-8"))
        for block in blocks:
            compile("\n" * block.line + block.code, str(page), "exec")
    except (PageError, SyntaxError) as error:
        return f"{page}: {error}"
    run = [(block.line, block.code) for block in blocks if block.run]
    if not run:
        return None
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = subprocess.run(
                [sys.executable, "-c", RUNNER],
                input=json.dumps([str(page), run]),
                cwd=folder,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            return f"{page}: took longer than {TIMEOUT_S} s"
    return None if result.returncode == 0 else f"{page}: a snippet failed\n{result.stdout}"


def pages_of(paths: list[Path]) -> list[Path]:
    """Return the Markdown files that are meant by files and folders."""
    return [page for path in paths for page in (sorted(path.rglob("*.md")) if path.is_dir() else [path])]


def checked(page: Path) -> str | None:
    """What is wrong with a page; None: nothing."""
    return check_page(page) if page.is_file() else f"{page}: there is no such file"


def main(arguments: list[str] | None = None) -> int:
    """Check all pages; 0 when every snippet ran, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", type=Path, nargs="+", help="Markdown files, or folders of them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="pages at once (default: all cores)")
    options = parser.parse_args(arguments)
    failed = 0
    pages = pages_of(options.paths)
    with ThreadPoolExecutor(max(options.jobs, 1)) as pool:
        for problem in pool.map(checked, pages):
            if problem:
                failed += 1
                print(problem, file=sys.stderr)
    print(f"snippets: {len(pages)} pages, {failed} with a snippet that fails")
    return 1 if failed or not pages else 0


if __name__ == "__main__":
    raise SystemExit(main())
