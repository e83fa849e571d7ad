"""Structure and appearance, and sets of one style: right cases, and the numbers that known pictures must give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from controlroom.controls.style.style_aligned import StyleAligned
from controlroom.data.theatre.paint import Part
from controlroom.data.theatre.render import render
from controlroom.evaluation.suites import ctrl_x, style_aligned
from controlroom.evaluation.suites.drawing import together
from controlroom.evaluation.suites.suite import Shown
from controlroom.sampling.pipeline import Pipeline
from controlroom.signals.dense_reader import DenseReader
from tests.evaluation.suites.stage import Knows
from tests.tiny import tiny_sd1


def dense() -> DenseReader:
    torch.manual_seed(0)
    return DenseReader([part.name.lower() for part in Part], size=64, width=8).eval()


def test_structure_and_appearance_are_told_apart() -> None:
    two = ctrl_x.two_number(0)
    assert two.structure.puppets[0].identity != two.appearance.puppets[0].identity
    knows: Any = Knows([two.structure, two.appearance])
    suite = ctrl_x.build(ctrl_x.Settings(), 1, knows, knows, dense())
    pictures = {arm.name: render(two.structure) for arm in suite.arms}
    pictures[ctrl_x.APPEARANCE] = render(two.appearance)
    (found,) = suite.judges[0]([Shown(suite.case(0), pictures)])
    assert found[ctrl_x.STRUCTURE][ctrl_x.PCK] == 1.0 and found[ctrl_x.APPEARANCE][ctrl_x.COLOURS] == 1.0
    colours, points = found[ctrl_x.STRUCTURE][ctrl_x.COLOURS], found[ctrl_x.APPEARANCE][ctrl_x.PCK]
    assert colours is not None and colours < 1 and points is not None and points < 1


def test_every_arm_of_two_cases_is_drawn() -> None:
    knows: Any = Knows([])
    # The miniature has other layers than the theatre: the control's own.
    own: dict[str, Any] = dict.fromkeys(("structure_features", "structure_attention", "appearance_attention"), ())
    suite = ctrl_x.build(ctrl_x.Settings(steps=2, recurrences=0, strength=1.0, **own), 2, knows, knows, dense())
    cases, pipe = [suite.case(number) for number in range(2)], Pipeline.from_diffusers(tiny_sd1())
    for arm in (ctrl_x.OURS, ctrl_x.STRUCTURE_ALONE, ctrl_x.CROSS, ctrl_x.REFERENCE):
        joined = together([case.specs[arm] for case in cases], suite.per_prompt)
        # What is not given has no list to join: such cases are drawn one by one.
        assert (joined is None) == (arm == ctrl_x.STRUCTURE_ALONE)
        small = {"height": 16, "width": 16, "output_type": "latent"}
        prompt = "a cat" if joined is None else ["a cat", "a dog"]
        drawn = pipe.run((joined or cases[0].specs[arm]).model_copy(update={**small, "prompt": prompt})).images
        assert drawn.shape[0] == (1 if joined is None else 2) and torch.isfinite(drawn).all()


def test_sets_of_one_style() -> None:
    reader: Any = Knows([])
    suite = style_aligned.build(style_aligned.Settings(steps=2), 2, reader)
    for number in range(2):
        case = suite.case(number)
        first, ours = case.specs[style_aligned.FIRST], case.specs[style_aligned.OURS]
        (control,) = ours.controls
        assert isinstance(control, StyleAligned)
        # The reference that is drawn along is the first picture of the set.
        assert (control.prompt, control.seed) == (first.prompt, first.seed)
        assert ours.model_copy(update={"controls": []}) == case.specs[style_aligned.ALONE]
        assert case.truth.style != "flat" and case.specs[style_aligned.WORDS].prompt != ours.prompt
        assert not any(word in str(ours.prompt) for word in ("sketch", "watercolour", "pixel", "neon"))


@pytest.mark.parametrize("same", [True, False])
def test_agreement_with_the_first_picture(same: bool) -> None:
    base = style_aligned.build(style_aligned.Settings(), 1, Knows([])).case(0)  # pyright: ignore[reportArgumentType]
    drawn, flat = base.truth, replace(base.truth, style="flat")
    reader: Any = Knows([drawn, flat])
    pictures = {arm: render(drawn) for arm in ("first", "style_aligned", "words", "truth")}
    pictures["independent"] = render(flat)
    if not same:
        pictures["style_aligned"] = render(flat)
    (found,) = style_aligned.StyleJudge(reader)([Shown(base, pictures)])
    assert found["style_aligned"][style_aligned.SAME] == float(same)
    assert found["independent"][style_aligned.SAME] == 0.0 and found["first"][style_aligned.SAME] is None
    assert found["truth"][style_aligned.FOLLOWED] == 1.0 == found["independent"][style_aligned.FOLLOWED]
