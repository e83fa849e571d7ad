"""People on disk and on the stage: nobody is on both sides, and everybody is there often enough."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from controlroom.core.errors import InputError
from controlroom.data.lfw import lfw, people_split
from controlroom.data.pictures import by_subject
from controlroom.data.subjects import TOKEN, named, with_words
from controlroom.data.theatre import vocabulary as v
from controlroom.data.theatre.people import looks, people, side_of, spread, subject_caption, theatre_people
from controlroom.data.theatre.poses import FREE
from controlroom.data.theatre.scene import Dice, is_held_out_combination, sample_identity
from tests.data.folders import paint


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    for person, count in {"Ann_B": 3, "Bo": 2, "Cy_D": 2, "Di": 1}.items():
        for number in range(1, count + 1):
            paint(tmp_path / person / f"{person}_{number:04d}.jpg", (count * 50, number * 50, 0))
    paint(tmp_path / "Bo" / "thumbnail.jpg")
    paint(tmp_path / "Bo" / "Di_0001.jpg")
    return tmp_path


def test_lfw(faces: Path) -> None:
    pictures = lfw(faces)
    assert [p.name for p in pictures][:3] == [f"Ann_B/Ann_B_000{n}.jpg" for n in (1, 2, 3)]
    assert {name: len(its) for name, its in by_subject(pictures).items()} == {"Ann_B": 3, "Bo": 2, "Cy_D": 2, "Di": 1}
    assert {p.caption for p in pictures} == {"a photo of a person"} and lfw(faces, "x")[0].caption == "x"
    with pytest.raises(InputError, match="nobody"):
        lfw(faces / "Bo")


def test_people_are_on_one_side(faces: Path) -> None:
    pictures = lfw(faces)
    train, held_out = people_split(pictures, minimum=2)
    on = [{p.subject for p in side} for side in (train, held_out)]
    assert [len(side) for side in on] == [2, 1] and not on[0] & on[1] and on[0] | on[1] == {"Ann_B", "Bo", "Cy_D"}
    assert len(train) + len(held_out) == 7
    backwards, _ = people_split(pictures[::-1], minimum=2)
    assert {p.subject for p in backwards} == on[0]
    others = {frozenset(p.subject for p in people_split(pictures, 2, seed=seed)[1]) for seed in range(20)}
    assert len(others) == 3
    assert len({p.subject for p in people_split(pictures, 2, share=0.99)[1]}) == 1
    with pytest.raises(InputError, match="1 people have 3 pictures"):
        people_split(pictures, minimum=3)
    with pytest.raises(InputError, match="share"):
        people_split(pictures, 2, share=1.0)


def test_the_split_of_looks() -> None:
    sides = [{looks(person.identity) for person in people(side, 150, 1)} for side in ("train", "held_out")]
    assert [len(side) for side in sides] == [150, 150] and not sides[0] & sides[1]
    other = {looks(person.identity) for person in people("held_out", 150, 1, seed=5)}
    assert not other & sides[0] and other != sides[1]
    drawn = Counter(side_of(sample_identity(Dice("test", n))) for n in range(900))
    assert 230 < drawn["held_out"] < 370
    bare = replace(sample_identity(Dice("x")), hat="none", hat_colour="red")
    assert looks(bare) == looks(replace(bare, hat_colour="blue")) != looks(replace(bare, hat="cap"))


def test_pictures_of_a_person_differ_in_everything_but_looks() -> None:
    for person in people("train", 4, 12):
        assert {scene.puppets[0].identity for scene in person.scenes} == {person.identity}
        assert {scene.place for scene in person.scenes} == set(v.PLACES)
        assert {scene.puppets[0].expression for scene in person.scenes} == set(v.EXPRESSIONS)
        poses = [scene.puppets[0].pose for scene in person.scenes]
        assert poses.count(FREE) == 6 and len(set(poses)) == 7
        assert len({scene.backdrop_seed for scene in person.scenes}) == 12
        assert not any(is_held_out_combination(scene) for scene in person.scenes)


def test_a_person_stays_when_there_are_more() -> None:
    few, many = people("held_out", 2, 10), people("held_out", 3, 14)
    assert [(p.name, p.identity, p.scenes) for p in few] == [(p.name, p.identity, p.scenes[:10]) for p in many[:2]]


def test_pictures() -> None:
    pictures = theatre_people("train", 2, 10)
    assert len(pictures) == 20 and list(by_subject(pictures)) == ["train-0000", "train-0001"]
    assert len({p.content for p in pictures}) == len({p.name for p in pictures}) == 20
    again, larger = theatre_people("train", 2, 10), theatre_people("train", 1, 1, size=64)
    assert [p.content for p in again] == [p.content for p in pictures]
    assert larger[0].content != pictures[0].content and larger[0].read().size == larger[0].size == (64, 64)
    drawn = [np.asarray(p.read()) for p in pictures[:2]]
    assert drawn[0].shape == (128, 128, 3) and np.abs(drawn[0].astype(int) - drawn[1]).mean() > 10
    assert np.array_equal(pickle.loads(pickle.dumps(pictures[0])).read(), drawn[0])


def test_captions_are_words_of_the_theatre() -> None:
    known = {*v.words(), TOKEN}
    for words in ("subject", "class", "full"):
        captions = [p.caption for p in theatre_people("train", 3, 12, words)]
        assert {word for caption in captions for word in caption.replace(",", " ").split()} <= known
        assert len(set(captions)) > 12 and all((TOKEN in caption) == (words == "subject") for caption in captions)
    person = people("train", 1, 1)[0]
    assert subject_caption(person.scenes[0], "sks") == named(person.pictures()[0].caption, "sks")
    assert {person.identity.figure} & set(person.pictures("class")[0].caption.split())


def test_words_for_subjects() -> None:
    pictures = theatre_people("train", 2, 2)
    assert all("<x>" in p.caption and TOKEN not in p.caption for p in with_words(pictures, "<x>"))
    told = with_words(pictures, {"train-0000": "sks woman", "train-0001": "xyz man"})
    assert ["sks woman" in p.caption for p in told] == [True, True, False, False]
    with pytest.raises(InputError, match="train-0001"):
        with_words(pictures, {"train-0000": "sks"})
    with pytest.raises(InputError, match="needs words"):
        with_words(pictures, " ")


def test_bad_people() -> None:
    with pytest.raises(InputError, match="side"):
        people("test", 1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="none"):
        people("train", 0)


def test_rounds() -> None:
    drawn = [spread((1, 2, 3), n, "k") for n in range(30)]
    rounds = [tuple(drawn[i : i + 3]) for i in range(0, 30, 3)]
    assert all(sorted(one) == [1, 2, 3] for one in rounds) and len(set(rounds)) > 2
