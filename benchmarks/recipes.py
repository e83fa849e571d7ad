"""What a step of every recipe takes on the theatre, and all its steps: ``python -m benchmarks.recipes``.

Each recipe of `controlroom train` is trained for a few steps with its default settings on pictures of the theatre's
people, in a folder that is thrown away. A recipe that needs other data or weights is named with what it asks for. With
``--write`` the table goes to ``docs/measured/recipes.md`` and ``recipes.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlroom.core.errors import ControlRoomError
from controlroom.core.files import write_text_atomically

if TYPE_CHECKING:
    from controlroom.data.pictures import Picture

PAGE = Path(__file__).resolve().parent.parent / "docs" / "measured" / "recipes.md"
PERSONALISE = "personalise"
"""Not a recipe, but DreamBooth-LoRA with the settings that `controlroom personalise` chooses."""
_SUBJECT = {"prompt": "a sks woman", "class_prompt": "a woman", "class_count": 4, "class_steps": 2}
#: Recipe -> settings without which it does not run, or would leave out a part of its work.
NEEDED: dict[str, dict[str, Any]] = {
    "dreambooth": _SUBJECT,
    "dreambooth_lora": _SUBJECT,
    "dco": {"prompt": "a sks woman"},
    "controlnet": {"kind": "canny"},
}


@dataclass(frozen=True)
class Timed:
    """A recipe's time.

    Attributes:
        recipe: its name.
        batch: pictures of a step.
        total: steps that it takes by default; None: it has no such number.
        seconds: of a step, the median; None: it could not be timed.
        low, high: quartiles.
        steps: that were timed.
        why: it could not be timed.
    """

    recipe: str
    batch: int | None = None
    total: int | None = None
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    steps: int = 0
    why: str = ""

    @property
    def whole(self) -> float | None:
        """Seconds of all its steps; jobs before them (pictures of the class, caches) are not in it."""
        return None if self.seconds is None or self.total is None else self.seconds * self.total


def pictures_shown() -> tuple[Picture, ...]:
    """Five pictures each of two people, captioned with where they are and what they do."""
    from controlroom.data.theatre.people import theatre_people

    return theatre_people("held_out", 2, 5, "class")


def timed(name: str, steps: int, threads: int, model: str = "theatre", limit: float | None = None) -> Timed:
    """Train a recipe for a few steps; the first one, which also makes caches, does not count.

    Args:
        name: of a recipe, or `PERSONALISE`.
        steps: that count.
        threads: of torch.
        model: what is trained on.
        limit: begin no step after so many seconds.
    """
    from controlroom.training.loop import train

    with tempfile.TemporaryDirectory(prefix="recipe-") as place:
        folder = Path(place) / "run"
        try:
            settings, loop = _plan(name, folder, model)
            short = loop.model_copy(
                update={
                    "total_steps": steps + 1,
                    "total_samples": None,
                    "threads": threads,
                    "stop_after_seconds": limit,
                    "checkpoint_every_seconds": None,
                    "log_every": 1,
                }
            )
            train(settings.build(_pipeline(model) if settings.needs_model else None, pictures_shown(), folder), short)
        except ControlRoomError as error:
            return Timed(name, why=str(error).partition(". ")[0])
        each = _seconds(folder / "log.jsonl")
    if not each:
        return Timed(name, loop.batch_size, loop.total_steps, why="two steps take longer than the limit")
    low, median, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
    return Timed(name, loop.batch_size, loop.total_steps, median, low, high, len(each))


def _pipeline(model: str) -> Any:
    from controlroom.sampling.pipeline import Pipeline

    return Pipeline.from_pretrained(model)


def _plan(name: str, folder: Path, model: str) -> tuple[Any, Any]:
    """Settings of the recipe and of its loop."""
    from controlroom.training.catalog import recipe_entry
    from controlroom.training.settings import TrainSettings

    if name == PERSONALISE:
        from controlroom.tasks.personalise import PersonaliseOptions, resolved

        options = PersonaliseOptions(model=model, class_word="woman")
        settings, loop = resolved(_pipeline(model), len(pictures_shown()), folder, options)
        return settings.model_copy(update={"class_count": 4, "class_steps": 2}), loop
    kind = recipe_entry(name).load()
    settings = kind(**NEEDED.get(name, {}))
    return settings, TrainSettings(**{"total_steps": 1000, **kind.loop, "output_dir": folder})


def _seconds(log: Path) -> list[float]:
    """Seconds of each step but the first."""
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    times = [record["time"] for record in records if record["event"] == "step"]
    return [after - before for before, after in pairwise(times)]


def table(rows: Sequence[Timed], threads: int) -> str:
    """The page.

    >>> rows = [Timed("lora", 4, 1000, 1.5, 1.4, 1.7, 5), Timed("unimo_g", why="No cut-outs")]
    >>> table(rows, 2).splitlines()[8]
    '| `lora` | 4 | 1.50 | 1.40 – 1.70 | 1000 | 25 min |'
    >>> table(rows, 2).splitlines()[-1]
    '- `unimo_g`: No cut-outs.'
    """
    lines = [
        "<!-- Written by `python -m benchmarks.recipes --write`. -->",
        "",
        "# Times of the recipes",
        "",
        f"On the theatre (128 px), {threads} threads, with each recipe's default settings: median of a few steps with "
        "quartiles. Pictures of a class, caches and measurements come on top.",
        "",
        "| recipe | batch | seconds a step | quartiles | steps by default | together |",
        "|---|--:|--:|---|--:|--:|",
    ]
    for row in rows:
        if row.seconds is not None:
            cells = (f"`{row.recipe}`", row.batch, f"{row.seconds:.2f}", f"{row.low:.2f} – {row.high:.2f}")
            lines.append(f"| {' | '.join(map(str, cells))} | {row.total or '–'} | {_duration(row.whole)} |")
    refused = [row for row in rows if row.seconds is None]
    if refused:
        lines += ["", "Not timed here, since they ask for other data or weights:", ""]
        lines += [f"- `{row.recipe}`: {row.why.rstrip('.')}." for row in refused]
    return "\n".join(lines) + "\n"


def _duration(seconds: float | None) -> str:
    """In words.

    >>> _duration(90), _duration(5400), _duration(None)
    ('2 min', '1.5 h', '–')
    """
    if seconds is None:
        return "–"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def main(arguments: Sequence[str] | None = None) -> int:
    """Time recipes and print the table; 0 when it is there, 2 for an unknown recipe."""
    from controlroom.training.catalog import RECIPES

    known = [PERSONALISE, *(entry.name for entry in RECIPES)]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=__doc__)
    parser.add_argument("recipes", nargs="*", help="default: all")
    parser.add_argument("--steps", type=int, default=5, help="that count, of each (default: 5)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for each recipe (default: 300)")
    parser.add_argument("--model", default="theatre")
    parser.add_argument("--write", action="store_true", help="also write the page and its JSON")
    parser.add_argument("--output", type=Path, default=PAGE, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    strange = [name for name in options.recipes if name not in known]
    if strange or options.steps < 1:
        parser.error(f"no recipe {strange[0]!r}; known: {', '.join(known)}" if strange else "--steps is at least 1")
    rows = []
    for name in options.recipes or known:
        rows.append(timed(name, options.steps, options.threads, options.model, options.limit))
        print(f"{name}: {rows[-1].why or f'{rows[-1].seconds:.2f} s a step'}", flush=True)
    page = table(rows, options.threads)
    print(page)
    if options.write:
        data = {"threads": options.threads, "rows": [asdict(row) | {"whole": row.whole} for row in rows]}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(options.output.with_suffix(".json"), json.dumps(data, indent=1) + "\n")
        write_text_atomically(options.output, page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
