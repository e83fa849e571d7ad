"""Words are found by their tokens: case, punctuation, words of several tokens, phrases, learned words."""

from __future__ import annotations

import pytest

from controlroom.backbones.words import prompt_tokens
from controlroom.core.errors import InputError
from tests.tiny import tiny_tokenizer


def test_words_have_their_tokens() -> None:
    found = prompt_tokens(tiny_tokenizer(), " a red Cat,  zebra")
    assert found.words == (("a", (1,)), ("red", (2,)), ("Cat,", (3, 4)), ("zebra", (5, 6, 7, 8, 9)))
    assert len(found.ids) == 11 and found.length == 16


@pytest.mark.parametrize(
    ("phrase", "places"),
    [
        ("cat", ((3,),)),
        ("CAT", ((3,),)),
        ("a", ((1,), (6,))),
        ("a red", ((1, 2), (6, 7))),
        ("cat, and a", ((3, 4, 5, 6),)),
        ("zed", ((8, 9, 10),)),
    ],
)
def test_every_occurrence_is_found(phrase: str, places: tuple[tuple[int, ...], ...]) -> None:
    found = prompt_tokens(tiny_tokenizer(), "a red cat, and a red zed")
    assert found.find(phrase) == places
    assert phrase in found


@pytest.mark.parametrize(
    ("phrase", "message"),
    [("dog", "'dog' is not in"), ("ed", "'ed' is not in"), ("", "'' is not in"), ("kat", "Did you mean 'cat'")],
)
def test_what_is_not_there_is_named(phrase: str, message: str) -> None:
    # "ed" is how "zed" ends, but no word of it.
    found = prompt_tokens(tiny_tokenizer(), "a red cat and a red zed")
    assert phrase not in found
    with pytest.raises(InputError, match=message):
        found.find(phrase)


def test_what_is_cut_is_said_to_be() -> None:
    found = prompt_tokens(tiny_tokenizer(), "a cat " * 8 + "frog")
    assert len(found.ids) == 16
    assert found.words[-1] == ("frog", ())
    with pytest.raises(InputError, match="behind the first 14 tokens"):
        found.find("frog")


def test_a_learned_word_of_several_vectors_is_one_word() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<anna>", "<anna>_1"])
    found = prompt_tokens(tokenizer, "a <anna> on the beach")
    assert [places for _, places in found.words] == [(1,), (2, 3), (4,), (5,), (6,)]
    assert found.find("<anna>") == ((2, 3),)
    assert found.find("on") == ((4,),)


def test_no_words_at_all() -> None:
    found = prompt_tokens(tiny_tokenizer(), "  ")
    assert found.words == () and len(found.ids) == 2
