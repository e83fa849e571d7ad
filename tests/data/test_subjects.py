"""Benchmarks of subjects: their lists are read as they are published; the theatre's own can be checked by readers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from controlroom.core.errors import InputError
from controlroom.data.custom_concept import TOKENS, custom_concept, custom_concept_pairs
from controlroom.data.dreambench import dreambench
from controlroom.data.subjects import TOKEN, named
from controlroom.data.theatre import vocabulary as v
from controlroom.data.theatre.attributes import ANSWERS, attributes, read_caption
from controlroom.data.theatre.scene import is_held_out_combination
from controlroom.data.theatre.subjects import PROMPTS, score, theatre_subjects
from tests.data.folders import paint

LIST = """Classes

subject_name,class
can,can
dog2,dog
gone,stuffed animal

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
'a cube shaped {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
"a {0} {1} in a chef's outfit".format(unique_token, class_token),
]
"""


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    for name in ("can/00.jpg", "can/01.jpg", "dog2/00.jpg"):
        paint(tmp_path / "dataset" / name, (len(name), 5, 5))
    (tmp_path / "dataset" / "prompts_and_classes.txt").write_text(LIST)
    return tmp_path


def test_dreambench(bench: Path) -> None:
    with pytest.warns(UserWarning, match="1 subjects .* no pictures: gone"):
        can, dog = dreambench(bench)
    assert (can.name, can.class_words, can.live, len(can.pictures)) == ("can", "can", False, 2)
    assert can.prompts == ("a {token} in the snow", "a cube shaped {token}")
    assert dog.live and [named(p, f"sks {dog.class_words}") for p in dog.prompts] == ["a sks dog in a chef's outfit"]
    assert (
        can.pictures[1].name == "can/01.jpg" and can.pictures[1].subject == "can" and TOKEN in dog.pictures[0].caption
    )
    with pytest.warns(UserWarning):
        assert [s.name for s in dreambench(bench / "dataset")] == ["can", "dog2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("", "0 classes, 0 prompts"),
        (LIST.replace("can,can", "../can,can"), r"one is '\.\./can'"),
        (LIST.replace("{0} {1}", "{0}"), "cannot be read"),
        (LIST.replace("can,can", "x,can").replace("dog2", "y"), "no picture of any subject"),
    ],
)
def test_a_list_that_is_not_dreambenchs(bench: Path, text: str | None, message: str) -> None:
    path = bench / "dataset" / "prompts_and_classes.txt"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(InputError, match=message):
        dreambench(bench)


def entry(name: str, words: str, prompts: str, number: int = 1) -> dict[str, str]:
    return {
        "instance_prompt": f"photo of a <new{number}> {words}",
        "class_prompt": words.split()[0],
        "instance_data_dir": f"./benchmark_dataset/{name}",
        "class_data_dir": f"./regularization/{name}",
        "prompt_filename": f"prompts/{prompts}.txt",
    }


@pytest.fixture
def concepts(tmp_path: Path) -> Path:
    paint(tmp_path / "benchmark_dataset" / "pet_dog1" / "1.jpeg", "red")
    paint(tmp_path / "benchmark_dataset" / "plushie_dice" / "1.png", "blue")
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "dog.txt").write_text("Photo of a {}.\n{}  swimming in a pool.\n\n")
    (tmp_path / "prompts" / "both.txt").write_text("photo of the {1} and {0}.\n")
    first, second = entry("pet_dog1", "dog", "dog"), entry("plushie_dice", "dice plushie", "dog", 2)
    missing = entry("chair", "chair", "chair")
    (tmp_path / "dataset.json").write_text(json.dumps([first, second, missing]))
    compose = {"prompt_filename_compose": "prompts/both.txt"}
    (tmp_path / "dataset_multiconcept.json").write_text(
        json.dumps([[first, second, compose], [first, missing, compose]])
    )
    return tmp_path


def test_custom_concept(concepts: Path) -> None:
    with pytest.warns(UserWarning, match="1 concepts .*: chair"):
        dog, dice = custom_concept(concepts)
    assert dog.prompts == ("Photo of a {token}.", "{token} swimming in a pool.") and dog.live and not dice.live
    assert dice.pictures[0].caption == "photo of a {token}" and dice.class_words == "dice"
    assert dice.pictures[0].name == "benchmark_dataset/plushie_dice/1.png" and dog.pictures[0].subject == "pet_dog1"
    with pytest.warns(UserWarning, match="chair"):
        (pair,) = custom_concept_pairs(concepts)
    assert [c.name for c in pair.concepts] == ["pet_dog1", "plushie_dice"]
    assert pair.prompts == (f"photo of the {TOKENS[1]} and {TOKENS[0]}.",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "expected a list"),
        ("[3]", "entry 1 has no 'instance_data_dir'"),
        ("[]", "no concept with pictures"),
        (json.dumps([{**entry("a", "b", "c"), "instance_data_dir": "../x"}]), "expected a path inside"),
        (json.dumps([{**entry("a", "b", "c"), "instance_prompt": "photo of a b"}]), "without <new1>"),
    ],
)
def test_a_list_that_is_not_custom_concepts(concepts: Path, text: str, message: str) -> None:
    (concepts / "dataset.json").write_text(text)
    with pytest.raises(InputError, match=message):
        custom_concept(concepts)


def test_theatre_subjects_are_different_and_complete() -> None:
    subjects = theatre_subjects(6, 8)
    assert len({s.name for s in subjects}) == 14 and [s.name for s in subjects[:2]] == [
        "held_out-0000",
        "held_out-0001",
    ]
    assert theatre_subjects(6, 8) == subjects and theatre_subjects(6, 8, seed=1) != subjects
    for subject in subjects:
        assert len(subject.scenes) == 5 and len(subject.prompts) == len({p.text for p in subject.prompts}) == PROMPTS
        assert not any(is_held_out_combination(scene) for scene in subject.scenes)
        made = subject.subject(64)
        assert made.pictures[0].size == (64, 64) and len({p.content for p in made.pictures}) == 5
        assert made.prompts == tuple(p.text for p in subject.prompts)
    assert len(theatre_subjects(0, 128)) == 128
    for bad in ((0, 0), (0, 129), (-1, 3)):
        with pytest.raises(InputError):
            theatre_subjects(*bad)


def test_prompts_ask_for_what_readers_read_and_say_it_in_known_words() -> None:
    known = {*v.words(), TOKEN}
    for subject in theatre_subjects(4, 12):
        captions = [p.caption for p in subject.subject().pictures]
        texts = [p.text for p in subject.prompts]
        assert {word for text in (*texts, *captions) for word in text.replace(",", " ").split()} <= known
        assert all(text.count(TOKEN) == 1 for text in (*texts, *captions))
        own = "woman" if subject.class_words in v.FIGURES else subject.name  # "red cat"
        for prompt in subject.prompts:
            assert prompt.asks and all(answer in ANSWERS[question] for question, answer in prompt.asks.items())
            # The words of the prompt mean what is asked for.
            said = read_caption(named(prompt.text, own))
            assert {question: said[question] for question in prompt.asks if question != "puppets"} == {
                question: answer for question, answer in prompt.asks.items() if question != "puppets"
            }
            kept = subject.keeps(prompt)
            assert kept and not set(kept) & set(prompt.asks) and all(kept[q] in ANSWERS[q] for q in kept)


def test_the_truth_scores_one() -> None:
    for subject in theatre_subjects(5, 5):
        for scene in subject.scenes:
            truth = {question: answer for question, answer in attributes(scene).items() if answer is not None}
            for prompt in subject.prompts:
                kept, asked = score(subject, prompt, truth)
                assert kept == 1
                if set(prompt.asks) == {"place"}:
                    assert asked == (scene.place == prompt.asks["place"])
    one, other = theatre_subjects(2, 0)
    truth = {question: answer for question, answer in attributes(other.scenes[0]).items() if answer is not None}
    assert score(one, one.prompts[0], truth)[0] < 1
    assert "hat" not in one.keeps(next(p for p in one.prompts if "hat" in p.asks))
