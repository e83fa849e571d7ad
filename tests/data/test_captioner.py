"""The theatre's captioner: true answers become sentences that say what is true and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from controlroom.data.theatre.attributes import ABSENT, attributes, read_caption
from controlroom.data.theatre.captioner import TheatreCaptioner, caption_of
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import DEFAULT_MIX, Mix, sample_scene
from controlroom.data.theatre.vocabulary import words
from controlroom.signals.captioner import Captioner
from tests.evaluation.suites.stage import Knows

MIX = Mix(kinds=DEFAULT_MIX.kinds, styles={"flat": 0.5, "sketch": 0.2, "pixel": 0.2, "neon": 0.1})
SCENES = [scene for scene in (sample_scene(i, "held_out", MIX) for i in range(80)) if scene.framing != "flat_lay"]


def test_captions_state_the_answers_and_read_back_as_them() -> None:
    assert len(SCENES) > 60
    for scene in SCENES:
        answers = attributes(scene)
        text = caption_of(answers)
        stated = read_caption(text)
        for question, answer in stated.items():
            if answer is not None and (answer != "plain" or answers[question] is not None):
                assert answer == answers[question], (text, question)
        for prop in scene.props:
            assert f"{answers[prop.kind]} {prop.kind}" in text
        assert stated["place"] == scene.place and set(text.replace(",", "").split()) <= set(words())
        if len(scene.puppets) == 1:
            for question in ("figure", "hair colour", "hair length", "top colour", "lower colour", "lower"):
                if answers["top"] is not None or question in ("figure", "hair colour", "hair length"):
                    assert stated[question] == answers[question], (text, question)


def test_what_is_not_answered_is_not_said() -> None:
    assert caption_of({}) == ""
    assert caption_of({"puppets": "two", "place": "beach", "figure": "woman"}) == "two people on the beach"
    assert caption_of({"puppets": "one", "ball": ABSENT, "cat": "red"}) == "a person and a red cat"


@pytest.mark.parametrize("number", [0, 3])
def test_a_reader_becomes_a_captioner(number: int) -> None:
    knows: Any = Knows(SCENES)
    captioner = TheatreCaptioner(knows)
    assert isinstance(captioner, Captioner)
    assert captioner(render(SCENES[number])) == caption_of(attributes(SCENES[number]))
