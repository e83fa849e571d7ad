"""How well retargeting keeps pose and person: ``python -m controlroom.evaluation.retarget_quality``.

On held-out pairs of the theatre (one puppet in two poses), the source is drawn in the target's pose by the trained
appearance module, IP-Adapter, reference-only, and the pose ControlNet alone, all from the same noise. The theatre's
readers then say whether the pose and the person are the target's; their own error on true pictures stands beside.

Beside the JSON file there are a table (``.md``), the worst, median and best pair (``.png``), and a line for each
picture (``.pairs.jsonl``): a run that was stopped continues there, and a line that other settings or weights gave is
never used.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from controlroom.core.errors import ControlRoomError
from controlroom.core.files import atomic_path, write_text_atomically
from controlroom.data.theatre.render import render
from controlroom.evaluation.lines import Lines
from controlroom.evaluation.retarget_judge import Judge, Verdict
from controlroom.evaluation.retarget_methods import (
    FIRST_PAIR,
    METHODS,
    REFERENCES,
    Trial,
    available,
    draw,
    key_of,
    pair_number,
    pose_of,
)
from controlroom.evaluation.retarget_report import Summary, falls_short, markdown, sheet, summarise, worst_median_best
from controlroom.sampling.pipeline import Pipeline
from controlroom.signals.pose.skeleton import draw_skeleton


def measure(
    pipe: Pipeline,
    judge: Judge,
    keys: dict[str, str],
    n: int,
    trial: Trial,
    lines: Lines[Verdict],
    batch_size: int = 8,
    seconds: float | None = None,
) -> dict[str, list[Verdict]]:
    """Draw and judge what is not yet in ``lines``, for pairs `FIRST_PAIR` to ``FIRST_PAIR + n - 1``.

    Args:
        pipe: the model.
        judge: the readers.
        keys: method or reference -> `key_of` it.
        n: number of pairs.
        trial: settings of the drawing.
        lines: where verdicts are kept.
        batch_size: pairs in one run.
        seconds: stop before the next batch after so long.

    Returns:
        Method or reference -> verdicts of the pairs that all of them have, in order.
    """
    names = {key: name for name, key in keys.items()}
    done = {(names[v.key], v.pair): v for v in lines.read() if v.key in names}
    numbers = range(FIRST_PAIR, FIRST_PAIR + n)
    parts = [numbers[start : start + batch_size] for start in range(0, n, batch_size)]
    jobs = [(part, name) for part in parts for name in keys if any((name, i) not in done for i in part)]
    # References are drawn in no time, so only the others say how long it takes.
    drawn, wanted = 0, sum(len(part) for part, name in jobs if name not in REFERENCES)
    begun = time.monotonic()
    for part, name in jobs:
        spent = time.monotonic() - begun
        if seconds is not None and spent > seconds:
            print(f"stopped after {spent:.0f} s; run again to continue", flush=True)
            break
        pairs = [pair_number(number) for number in part]
        found = judge(draw(pipe, name, part, trial), pairs, part, name, keys[name])
        new = [verdict for verdict in found if (name, verdict.pair) not in done]
        lines.append(new)
        done.update({(name, verdict.pair): verdict for verdict in new})
        if name not in REFERENCES:
            drawn += len(part)
            left = (time.monotonic() - begun) / drawn * (wanted - drawn)
            print(f"{drawn} of {wanted} pictures, {left:.0f} s left", flush=True)
    whole = [number for number in numbers if all((name, number) in done for name in keys)]
    return {name: [done[name, number] for number in whole] for name in keys}


def contact_sheet(pipe: Pipeline, names: Sequence[str], rows: Sequence[Verdict], trial: Trial) -> Image.Image:
    """The pairs on which the first method is worst, in the middle, and best; drawn again, from the same noise."""
    found = []
    for title, number in zip(("worst", "median", "best"), worst_median_best(rows), strict=False):
        pair = pair_number(number)
        skeleton = draw_skeleton(pose_of(pair.target))
        cells = [("source", render(pair.source)), ("pose", skeleton), ("truth", render(pair.target))]
        alone = range(number, number + 1)
        cells += [(METHODS[name].title, draw(pipe, name, alone, trial)[0]) for name in names if name not in REFERENCES]
        found.append((f"{title}\n{number}", cells))
    return sheet(found)


def write(output: Path, summary: Summary, picture: Image.Image | None) -> None:
    """The JSON file, and the table and the contact sheet beside it."""
    write_text_atomically(output, summary.model_dump_json(indent=1) + "\n")
    write_text_atomically(output.with_suffix(".md"), markdown(summary))
    if picture is not None:
        with atomic_path(output.with_suffix(".png")) as beside:
            picture.save(beside)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=300, help="pairs")
    parser.add_argument("--methods", nargs="+", default=None, metavar="NAME", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--model", default=Trial().model)
    parser.add_argument("--steps", type=int, default=Trial().steps)
    parser.add_argument("--guidance-scale", type=float, default=Trial().guidance_scale)
    parser.add_argument("--captions", action="store_true", help="a full caption of the target instead of no words")
    parser.add_argument("--seed", type=int, default=Trial().seed)
    parser.add_argument("--batch-size", type=int, default=8, help="pairs in one run")
    parser.add_argument("--minutes", type=float, default=None, help="stop after so long; run again to continue")
    parser.add_argument("--output", type=Path, default=Path("docs/measured/retarget.json"))
    given = parser.parse_args(arguments)
    if given.n < 1 or given.batch_size < 1 or given.steps < 1:
        parser.error("--n, --batch-size and --steps must be at least 1")
    trial = Trial(
        model=given.model,
        steps=given.steps,
        guidance_scale=given.guidance_scale,
        captions=given.captions,
        seed=given.seed,
    )
    try:
        methods = available(given.methods)
        left_out = [] if given.methods else [name for name in METHODS if name not in methods]
        if left_out:
            print(f"not measured, since their weights are not here: {', '.join(left_out)}", flush=True)
        readers = Judge.folders()
        keys = {name: key_of(name, trial, readers) for name in (*methods, *REFERENCES)}
        pipe, judge = Pipeline.from_pretrained(trial.model), Judge.load()
        lines = Lines(given.output.with_suffix(".pairs.jsonl"), Verdict)
        seconds = None if given.minutes is None else given.minutes * 60
        verdicts = measure(pipe, judge, keys, given.n, trial, lines, given.batch_size, seconds)
        summary = summarise(verdicts, trial.model_dump(), judge.extractor)
        if summary.n == 0:
            print("no pair is complete yet")
            return
        given.output.parent.mkdir(parents=True, exist_ok=True)
        write(given.output, summary, contact_sheet(pipe, methods, verdicts[methods[0]], trial))
    except KeyboardInterrupt:
        raise SystemExit("stopped; run again to continue") from None
    except ControlRoomError as error:
        raise SystemExit(f"error: {error}") from None
    print(markdown(summary))
    print(f"{summary.n} of {given.n} pairs; {len(falls_short(summary))} measures fall short; wrote {given.output}")


if __name__ == "__main__":
    main()
