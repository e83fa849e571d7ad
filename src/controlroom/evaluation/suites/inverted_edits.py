"""What suites share that edit true pictures from their inversion: one inversion for all arms of a case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

from controlroom.controls.editing.from_inversion import FromInversion
from controlroom.core.control import Control
from controlroom.core.spec import RunSpec
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.edits import Edit
from controlroom.data.theatre.render import render
from controlroom.sampling.inversion import invert
from controlroom.sampling.inverted import Inversion, Method, NullText
from controlroom.sampling.pipeline import Pipeline


@dataclass
class Inverted:
    """The picture before an edit, inverted with its caption when it is first asked for.

    Attributes:
        edit: whose picture.
        spec: its steps, guidance and seed are the inversion's.
        iterations: of each step of null-text optimisation.
        kept: what was found; it goes with the case.
    """

    edit: Edit
    spec: RunSpec
    iterations: int = 10
    kept: dict[Method, Inversion] = field(default_factory=dict)

    def by(self, pipe: Pipeline, method: Method) -> Inversion:
        """What a method finds."""
        if method not in self.kept:
            self.kept[method] = invert(
                pipe,
                render(self.edit.before),
                full_caption(self.edit.before),
                method,
                self.spec.num_inference_steps,
                self.spec.guidance_scale if method == "null_text" else None,
                null_text=NullText(iterations=self.iterations),
                seed=self.spec.seed or 0,
                measure=False,
            )
        return self.kept[method]

    def draw(
        self, pipe: Pipeline, method: Method, prompt: str, controls: Sequence[Control] = (), hold_source: bool = True
    ) -> Image.Image:
        """A picture drawn from what a method found, with guidance."""
        start = FromInversion(self.by(pipe, method), hold_source=hold_source)
        changed = {"prompt": prompt, "controls": [start, *controls], "scheduler": "ddim"}
        return pipe.run(self.spec.model_copy(update=changed)).images[0]


def again_arm(method: Method) -> str:
    """Name of the arm that draws an inversion again from the caption after.

    >>> again_arm("ddim")
    'reprompted ddim'
    """
    return f"reprompted {method}"
