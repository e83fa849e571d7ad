"""``make demo``: what the embedded model can do, drawn into ``outputs/demo`` on the CPU.

A puppet of the theatre is drawn in the pose of another picture, of a doodle, and of a JSON file; and a few pictures are
made of words alone. Everything that goes in is written too, so that each line can be tried again with the command line.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from controlroom.app import runs
from controlroom.app.sheet import Cell, contact_sheet
from controlroom.core.errors import ControlRoomError
from controlroom.core.files import write_atomically
from controlroom.core.images import save_png
from controlroom.core.memory import keep_freed_memory
from controlroom.core.png import png_bytes
from controlroom.core.pose import Pose
from controlroom.data.theatre.doodle import draw_doodle
from controlroom.data.theatre.pairs import sample_pair
from controlroom.data.theatre.poses import fit_to_canvas, named_pose
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import CANVAS, Dice, Puppet, Scene
from controlroom.data.theatre.truth import keypoints
from controlroom.signals.pose.openpose_json import write_openpose

if TYPE_CHECKING:
    from controlroom.sampling.pipeline import Pipeline

FOLDER = Path("outputs/demo")
SEED = 7
PAIR = 3
"""Number of the held-out pair that the puppets are taken from."""
PROMPTS = (
    "a woman with long red hair wearing a blue striped shirt and white trousers, on the beach",
    "a man with short black hair wearing a yellow sweater, cheering, in the forest",
    "a red cat and a blue ball in the snow",
    "a smiling woman in a green dotted shirt and a purple skirt, with hands on hips, in the city",
)


@dataclass(frozen=True)
class Inputs:
    """The files that the demo is shown: the puppet, and three poses by what they are."""

    source: Path
    poses: dict[str, Path]


def draw_inputs(folder: Path, size: int = CANVAS) -> Inputs:
    """Draw the puppet, another puppet in another pose, a doodle, and write a pose as JSON.

    Raises:
        OutputError: a file could not be written.
    """
    pair, other = sample_pair(PAIR, "held_out"), sample_pair(PAIR + 1, "held_out")
    source = folder / "source.png"
    save_png(render(pair.source, size), source)
    poses = {"photo": folder / "pose_photo.png", "doodle": folder / "pose_doodle.png", "json": folder / "pose.json"}
    save_png(render(_posed(other.source, "waving"), size), poses["photo"])
    save_png(draw_doodle(_actor(_posed(other.target, "spreading")), SEED, size).picture, poses["doodle"])
    found = keypoints(_posed(pair.target, "running"), size=size)
    write_openpose(poses["json"], Pose(found[:, :2], (found[:, 2] > 0).astype(float), size, size))
    return Inputs(source, poses)


def _posed(scene: Scene, pose: str) -> Scene:
    actor = replace(_actor(scene), pose=pose, angles=named_pose(pose, Dice("demo", pose)))
    return replace(scene, actors=(fit_to_canvas(actor),))


def _actor(scene: Scene) -> Puppet:
    return scene.puppets[0]


def draw_words(pipeline: Pipeline, folder: Path, steps: int) -> list[Cell]:
    """Pictures of words alone, each in a run of its own so that its file can be replayed alone."""
    from controlroom.core.spec import RunSpec

    cells = []
    for index, prompt in enumerate(PROMPTS):
        run, seconds = runs.draw(
            pipeline, RunSpec(model=pipeline.model, prompt=prompt, seed=SEED + index, num_inference_steps=steps)
        )
        path = folder / f"words_{index}.png"
        run.save(path)
        _say(f"{path}: {prompt!r}, {seconds:.1f} s")
        cells.append((prompt, run.images[0]))
    return cells


def draw_poses(pipeline: Pipeline, inputs: Inputs, folder: Path, steps: int) -> tuple[list[list[Cell]], list[str]]:
    """The puppet in each pose, as rows source | pose | skeleton | result; and what went wrong."""
    from controlroom.tasks.retarget import RetargetOptions, plan_retarget

    rows, problems = [], []
    for kind, path in inputs.poses.items():
        begun = time.perf_counter()
        try:
            options = RetargetOptions(model=pipeline.model, num_inference_steps=steps)
            plan = plan_retarget(inputs.source, path, seed=SEED, options=options, pipeline=pipeline)
            result = plan.finished(runs.draw(pipeline, plan.spec)[0])
        except ControlRoomError as error:
            problems.append(f"retargeting to the {kind}: {error}")
            continue
        target = folder / f"retarget_{kind}.png"
        result.save(target)
        seconds = time.perf_counter() - begun
        _say(f"{target}: pose read from a {plan.reading.kind}, {plan.confidence:.0%} sure, {seconds:.1f} s")
        given = plan.skeleton if plan.reading.image is None else plan.reading.image
        pose: list[Cell] = [(f"pose: {kind}", given), ("as it was read", plan.skeleton)]
        rows.append([("source", result.source), *pose, ("result", result.image)])
    return rows, problems


def main(arguments: list[str] | None = None) -> int:
    """Draw the demo; 0 when the puppet was drawn in all poses, 1 when something was missing."""
    parser = argparse.ArgumentParser(prog="python -m controlroom.app.demo", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"where the pictures go (default: {FOLDER})")
    parser.add_argument("--model", default="theatre", help="another model in diffusers' layout")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args(arguments)
    try:
        problems = _demo(options.folder, options.model, options.steps)
    except ControlRoomError as error:
        problems = [str(error)]
    except OSError as error:
        problems = [f"{options.folder} cannot be written to: {(error.strerror or str(error)).lower()}."]
    except KeyboardInterrupt:
        return 130
    for problem in problems:
        print("error: " + " ".join(problem.split()), file=sys.stderr)
    return 1 if problems else 0


def _demo(folder: Path, model: str, steps: int) -> list[str]:
    begun = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    inputs = draw_inputs(folder)
    _say(f"{inputs.source} and {', '.join(map(str, inputs.poses.values()))}: what goes in")
    try:
        pipeline = runs.open_pipeline(model)
    except ControlRoomError as error:
        return [f"no picture can be drawn: {error}"]
    rows, problems = draw_poses(pipeline, inputs, folder, steps)
    words = draw_words(pipeline, folder, steps)
    for name, cells in (("demo.png", rows), ("words.png", [words])):
        if cells:
            write_atomically(folder / name, png_bytes(contact_sheet(cells)))
            _say(f"{folder / name}: all of them beside each other")
    _say(
        f"{time.perf_counter() - begun:.0f} s in all. Try: controlroom retarget {inputs.source} "
        f"--pose {inputs.poses['doodle']} -o mine.png"
    )
    return problems


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    keep_freed_memory()
    raise SystemExit(main())
