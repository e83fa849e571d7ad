"""Sentences about a thing, from which the direction from one thing to another is taken (arXiv 2302.03027, section 3.1).

A direction between two words alone is noisy; between the means of many sentences about them it is robust. Sentences
come from rules (the same ones for every word, so that only the word differs), from a file, or from a text model that
lies on this machine.
"""

from __future__ import annotations

import os
import re
import stat

from controlroom.core.errors import InputError

_OPENINGS = (
    "{a}",
    "a photo of {a}",
    "a picture of {a}",
    "a drawing of {a}",
    "a painting of {a}",
    "a close-up of {a}",
    "a bright photo of {a}",
    "a dark photo of {a}",
    "a photo of the {thing}",
    "a photo of one {thing}",
    "a small {thing}",
    "a large {thing}",
    "a beautiful {thing}",
    "a funny {thing}",
    "an old {thing}",
    "a young {thing}",
)
_ENDINGS = (
    "",
    "in front of a house",
    "in the street",
    "in the snow",
    "in the rain",
    "in a garden",
    "on a table",
    "on the beach",
    "on a white background",
    "by the sea",
    "at night",
    "in the morning",
    "next to a tree",
    "under a blue sky",
    "in a forest",
    "in a city",
)
MAX_SENTENCES = 10_000
MAX_BYTES = 4 * 2**20
_MAX_LENGTH = 300
"""Characters of a sentence; CLIP reads 77 tokens."""
_STARTS = ("A photo of {a}", "A picture of {a}", "{A} that", "In this picture {a}", "There is {a}", "The {thing} is")


def sentences_about(thing: str, count: int | None = None) -> list[str]:
    """Sentences about a word or phrase, from rules; the same ones for every word.

    Args:
        thing: "cat", "red car". An article at its front is taken away.
        count: how many; None: all there are.

    Raises:
        InputError: no word, or a count that is not positive.

    >>> sentences_about("apple", 2)
    ['an apple', 'an apple in front of a house']
    """
    thing = _thing(thing)
    if count is not None and count < 1:
        raise InputError(f"{count} sentences are none; ask for one or more.")
    found = [f"{_filled(opening, thing)} {ending}".strip() for opening in _OPENINGS for ending in _ENDINGS]
    return list(dict.fromkeys(found))[:count]


def read_sentences(path: str | os.PathLike[str]) -> list[str]:
    """Sentences of a text file, one a line; empty lines and lines that start with ``#`` are left out.

    Raises:
        InputError: no such file, not text, too large, or no sentence in it.
    """
    name = repr(os.fspath(path))
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"{name} is not a file; give a text file with one sentence a line.")
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise InputError(f"{name} does not exist; give a text file with one sentence a line.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{name} cannot be read ({error}).") from error
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not text in UTF-8; give one sentence a line.") from error
    found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise InputError(f"{name} has no sentence. Write one a line.")
    if len(data) > MAX_BYTES or len(found) > MAX_SENTENCES:
        raise InputError(f"{name} has more than {MAX_SENTENCES} sentences or {MAX_BYTES // 2**20} MB. Keep fewer.")
    return found


def sentences_from_model(
    model: str | os.PathLike[str], thing: str, count: int = 64, seed: int = 0, new_tokens: int = 20
) -> list[str]:
    """Sentences that a causal language model of transformers writes about a thing.

    The model continues the beginning of a sentence that has the thing in it, so that every sentence is about it,
    whatever the model knows. Nothing is downloaded.

    Args:
        model: folder of the model with its tokenizer, or the name of one in the local cache.
        thing: word or phrase.
        count: how many different sentences at most; a model that repeats itself gives fewer.
        seed: of the sampling; torch's own generator is left as it was.
        new_tokens: that are added to a beginning at most.

    Raises:
        InputError: no word, or a count that is not positive.
        ModelError: no such model on this machine, or one that does not write text.
    """
    thing = _thing(thing)
    if count < 1 or new_tokens < 1:
        raise InputError(f"{count} sentences of {new_tokens} new tokens are none; ask for one or more.")
    from controlroom.backbones.text_writer import load_text_writer

    writer = load_text_writer(os.fspath(model), "sentences then come from rules")
    import torch

    found: dict[str, None] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for attempt in range(2 * count):
            if len(found) >= count:
                break
            start = _filled(_STARTS[attempt % len(_STARTS)], thing)
            found[_sentence(start, writer.write(start, new_tokens, sampled=True))] = None
    return list(found)


def _sentence(start: str, rest: str) -> str:
    """The first sentence, on one line, of printable characters."""
    first = re.split(r"[.!?\n\r]", rest, maxsplit=1)[0]
    printable = "".join(c if c.isprintable() else " " for c in f"{start}{first}")
    return " ".join(printable.split())[:_MAX_LENGTH]


def _thing(thing: str) -> str:
    words = thing.split() if isinstance(thing, str) else []
    if len(words) > 1 and words[0].lower() in ("a", "an", "the"):
        words = words[1:]
    if not words or len(" ".join(words)) > _MAX_LENGTH:
        raise InputError(f"A direction goes from one thing to another: give a word or a few, not {thing!r:.80}.")
    return " ".join(words)


def _filled(pattern: str, thing: str) -> str:
    article = "an" if thing[0].lower() in "aeiou" else "a"
    return pattern.format(thing=thing, a=f"{article} {thing}", A=f"{article.capitalize()} {thing}")
