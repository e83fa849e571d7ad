"""The theatre's CLIP tokenizer: every word of the vocabulary is one token, anything else is spelled out.

The vocabulary has CLIP's layout: 256 byte symbols, the same at the end of a word, merges, start and end. Merges are
added word by word, in alphabetical order, until each word is whole, so the files are a function of the list. (A trained
byte-pair encoding is not: libraries break ties in the order of a hash table.) The package's checkpoint carries the
files it was trained with; those of `write_tokenizer` number the words otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from tokenizers import pre_tokenizers

from controlroom.core.files import write_text_atomically
from controlroom.data.theatre.vocabulary import words

LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"


def merges_of(vocabulary: Iterable[str]) -> list[tuple[str, str]]:
    """Merges in the order of their rank, with which byte-pair encoding makes each ASCII word one token.

    A word that the merges so far leave in pieces gets a merge of its first two pieces, until it is whole. A later merge
    ranks last, so it cannot undo an earlier word: it is only applied where encoding would have stopped.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in sorted(set(vocabulary)):
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pairs = list(pairwise(pieces))
            best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
            ranks.setdefault(best, len(ranks))
            at = pairs.index(best)
            pieces[at : at + 2] = ["".join(best)]
    return list(ranks)


def write_tokenizer(folder: Path) -> int:
    """Write ``vocab.json``, ``merges.txt`` and ``tokenizer_config.json``; returns the number of tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = merges_of(words())
    symbols = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    tokens = list(dict.fromkeys([*symbols, START, END]))
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    write_text_atomically(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    write_text_atomically(folder / "merges.txt", "\n".join(lines) + "\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": LENGTH,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    write_text_atomically(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    return len(tokens)
