"""How the tokens of one prompt correspond to those of another (Prompt-to-Prompt, arXiv 2208.01626, section 3.2).

An `Alignment` says which of the source's attention maps each target token takes: target map n is
kept[n] · (Σ_m matrix[m, n] · source map m) + (1 − kept[n]) · own map n.

`replacement` is for prompts of as many words each: word by word, a word of several tokens spread evenly over those of
its counterpart. `refinement` is for any two prompts: Needleman-Wunsch on the tokens, new tokens keep their own maps.

Deviation: in the published code all tokens behind the last swapped word are given the source's map of the same
*position*, so that a swap of words of different numbers of tokens shifts the words behind it ("a cat on a beach" -> "a
chihuahua on a beach" gives "on" the map of "beach"). Here every word keeps its own counterpart. With as many tokens on
both sides the two are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from controlroom.backbones.words import PromptTokens
from controlroom.core.errors import InputError


@dataclass(frozen=True)
class Alignment:
    """Which of the source's attention maps each target token takes.

    Attributes:
        matrix: [L, L], source token by target token.
        kept: [L], 1 where the target takes the source's map, 0 where it keeps its own.
    """

    matrix: torch.Tensor
    kept: torch.Tensor


def replacement(source: PromptTokens, target: PromptTokens) -> Alignment:
    """Word by word.

    Raises:
        InputError: the prompts have different numbers of words.
    """
    if len(source.words) != len(target.words):
        raise InputError(
            f"Words can be swapped one for one only: the source {source.text!r} has {len(source.words)} words, the "
            f'prompt {target.text!r} has {len(target.words)}. Use mode="refine", or as many words in both.'
        )
    length = target.length
    matrix = torch.zeros(length, length)
    for (_, old), (_, new) in zip(source.words, target.words, strict=True):
        if len(old) == len(new):
            matrix[list(old), list(new)] = 1.0
        else:
            for column in new:
                matrix[list(old), column] = 1.0 / len(new)
    matrix[0, 0] = 1.0
    # The end and the padding, side by side for as long as both last.
    tail = min(length - _end(source), length - _end(target))
    steps = torch.arange(tail)
    matrix[_end(source) + steps, _end(target) + steps] = 1.0
    return Alignment(matrix, torch.ones(length))


def _end(prompt: PromptTokens) -> int:
    return len(prompt.ids) - 1


def refinement(source: PromptTokens, target: PromptTokens) -> Alignment:
    """Common tokens take the source's maps, new ones keep their own; padding corresponds by position."""
    length = target.length
    counterparts = align(source.ids, target.ids)
    matrix, kept = torch.zeros(length, length), torch.ones(length)
    for column in range(length):
        row = counterparts[column] if column < len(counterparts) else column
        if row is None:
            kept[column] = 0.0
        else:
            matrix[row, column] = 1.0
    return Alignment(matrix, kept)


def align(source: Sequence[int], target: Sequence[int]) -> list[int | None]:
    """Index in ``source`` for each item of ``target``, None for new ones: Needleman-Wunsch.

    Scores as published: 1 for equal, -1 for different, 0 for a gap; of equal scores a new item is preferred to a lost
    one, and either to a pair.

    Example:
        >>> align([1, 2, 3], [1, 9, 2, 3])
        [0, None, 1, 2]
    """
    rows, columns = len(source), len(target)
    score = [[0] * (columns + 1) for _ in range(rows + 1)]
    for i in range(1, rows + 1):
        for j in range(1, columns + 1):
            pair = score[i - 1][j - 1] + (1 if source[i - 1] == target[j - 1] else -1)
            score[i][j] = max(score[i][j - 1], score[i - 1][j], pair)
    found: list[int | None] = [None] * columns
    i, j = rows, columns
    while i > 0 and j > 0:
        if score[i][j] == score[i][j - 1]:
            j -= 1
        elif score[i][j] == score[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            found[j] = i
    return found
