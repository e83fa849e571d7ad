"""What every control costs, as the engine counts it: ``python -m benchmarks.cost``; ``--write`` puts it in the docs.

A run of 20 steps with guidance on Stable Diffusion 1 in miniature: rows and passes do not depend on the network's size.
The settings are those of the contract tests, made typical where these are short or extreme.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from controlroom.catalog import control_class
from controlroom.core.files import write_text_atomically
from controlroom.core.spec import RunSpec
from controlroom.sampling.inversion import invert
from controlroom.sampling.pipeline import Pipeline
from tests.controls.nets import gated_unet
from tests.controls.test_contracts import CHANNELS, DRAW, SETTINGS, Stage, picture
from tests.tiny import tiny_sd1

STEPS = 20
PAGE = Path(__file__).resolve().parent.parent / "docs" / "speed.md"
BEGIN = "<!-- What follows is written by `python -m benchmarks.cost --write`, until it says so. -->"
END = "<!-- Until here. -->"


@dataclass(frozen=True)
class Typical:
    """How a run differs from that of the contract tests.

    Attributes:
        words: what the cost of this run depends on, for the table.
        settings: other settings of the control.
        default: settings that are left at their defaults.
        draw: other settings of the run.
    """

    words: str = ""
    settings: Callable[[Path], dict[str, Any]] = field(default=lambda folder: {})
    default: tuple[str, ...] = ()
    draw: dict[str, Any] = field(default_factory=dict)


TYPICAL: dict[str, Typical] = {
    "appearance_control": Typical("one picture"),
    # How many passes a threshold takes depends on the picture.
    "attend_and_excite": Typical("no thresholds; each adds up to 20 passes", default=("iterations", "step_size")),
    "consistency_guidance": Typical("one factor for the subject"),
    "controlnet": Typical("one map"),
    "cross_image_attention": Typical("strength 0.68", default=("strength", "attention_start", "structure_every")),
    "ctrl_x": Typical("structure and appearance", default=("structure_schedule",)),
    "depth_to_image": Typical("strength 0.8", default=("strength",)),
    "from_inversion": Typical(
        "after the inversion", lambda folder: {"inversion": str(folder / "inversion of a typical run.safetensors")}
    ),
    "gligen": Typical(default=("scheduled_sampling_beta",)),
    "guidance_interval": Typical("the first half"),
    "image_to_image": Typical("strength 0.8", default=("strength",)),
    "masactrl": Typical("a drawn source", default=("start_step",)),
    "multidiffusion": Typical("2:1, nine windows", lambda folder: {"window": 8, "stride": 1}, draw={"width": 32}),
    "perp_neg": Typical("one negative", lambda folder: {"negatives": ["night"], "scale": 1.0}),
    "pix2pix_zero": Typical("a drawn source"),
    "prompt_to_prompt": Typical("a drawn source", default=("cross_replace", "self_replace")),
    "reference_only": Typical("one picture", default=("reference_adain",)),
    "regional_prompts": Typical("two regions, by attention"),
    "self_guidance": Typical("one object moved", default=("scale",)),
    "semantic_guidance": Typical("two concepts"),
    "style_aligned": Typical("one picture, inverted in the run"),
    "uni_controlnet": Typical("two maps and a picture"),
    "upscale": Typical("strength 0.4", default=("strength",)),
}


@dataclass(frozen=True)
class Cost:
    """What a run spent.

    Attributes:
        steps: that it drew.
        rows, passes: of the UNet, with those that carry a gradient.
        energy_passes: those that carry one.
        side_passes: of other networks, and of the UNet where a control prepares something.
    """

    steps: int
    rows: int
    passes: int
    energy_passes: int
    side_passes: int


class Costs:
    """A miniature with the files of every control, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.stage, self.folder = Stage("sd1", folder), folder
        size = {"height": DRAW["height"], "width": DRAW["width"], "num_inference_steps": STEPS}
        inverted = invert(self.stage.pipe, picture(7), DRAW["prompt"], measure=False, **size)
        inverted.save(folder / "inversion of a typical run.safetensors")

    def of(self, name: str | None = None) -> Cost:
        """Draw a run with a control, or without any, and read what it spent off its manifest."""
        typical = TYPICAL.get(name or "", Typical())
        controls = [] if name is None else [self._control(name, typical)]
        pipe = self._stage(name).pipe
        draw = {**DRAW, "num_inference_steps": STEPS, "guidance_scale": 7.5, **typical.draw}
        spec = RunSpec(controls=controls, **draw)
        steps, found = len(pipe.explain(spec).rows), pipe.run(spec).manifest["cost"]
        return Cost(steps, found["unet_rows"], found["unet_passes"], found["energy_passes"], found["side_passes"])

    def _control(self, name: str, typical: Typical) -> Any:
        settings = {key: value for key, value in SETTINGS[name](self.folder).items() if key not in typical.default}
        return control_class(name)(**{**settings, **typical.settings(self.folder)})

    def _stage(self, name: str | None) -> Stage:
        """The same files beside a network with the channels and layers that a control needs."""
        if name not in CHANNELS and name != "gligen":
            return self.stage
        source, other = tiny_sd1(in_channels=CHANNELS.get(name, 4)), copy.copy(self.stage)
        if name == "gligen":
            source.unet = gated_unet(source.unet)
        other.pipe = Pipeline.from_diffusers(source)
        return other


def table() -> str:
    """The Markdown table: a run without controls, then every control, the cheap ones first."""
    with tempfile.TemporaryDirectory() as folder:
        costs = Costs(Path(folder))
        plain = costs.of()
        found = {name: costs.of(name) for name in SETTINGS}
    lines = [
        "| control | in this run | steps | UNet rows a step | passes a step | of them with a gradient "
        "| side passes of the run | UNet rows beside none |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
        _row("none", "", plain, plain),
    ]
    for name in sorted(found, key=lambda name: _dearness(name, found[name])):
        page = {"appearance_control": "appearance", "from_inversion": "inversion"}.get(name, name)
        words = TYPICAL[name].words if name in TYPICAL else ""
        lines.append(_row(f"[{name}](controls/{page}.md)", words, found[name], plain))
    return "\n".join(lines) + "\n"


def _row(title: str, words: str, cost: Cost, plain: Cost) -> str:
    rows, passes, energies = (f"{n / cost.steps:.3g}" for n in (cost.rows, cost.passes, cost.energy_passes))
    share = f"{cost.rows / plain.rows:.2f}"
    return f"| {title} | {words} | {cost.steps} | {rows} | {passes} | {energies} | {cost.side_passes} | {share} |"


def _dearness(name: str, cost: Cost) -> tuple[float, int, int, int, str]:
    return cost.rows, cost.energy_passes, cost.passes, cost.side_passes, name


def with_table(page: str, text: str) -> str:
    """The page with another table between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{PAGE.name} lacks the two lines between which the table stands: {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put it into docs/speed.md")
    options = parser.parse_args()
    text = table()
    if options.write:
        write_text_atomically(PAGE, with_table(PAGE.read_text(encoding="utf-8"), text))
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
