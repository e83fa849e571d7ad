"""Where the words of a prompt are among its tokens.

Controls speak of words, networks of token positions. A word is found by its tokens, not by its letters: case,
punctuation beside it and words that a tokenizer takes apart are then no special cases, and neither are phrases and
learned words (textual inversion). Position 0 is the start token.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from controlroom.backbones.base import expand_learned_words
from controlroom.core.errors import InputError


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as a CLIP tokenizer reads it.

    Attributes:
        text: the prompt.
        ids: token ids with start and end, cut to ``length`` as the text encoder gets them; without padding at the end.
        words: the words between spaces, as written, each with its token positions (none where the prompt was cut).
        length: tokens of every prompt of the run with padding: 77 for CLIP, a multiple of it where prompts are longer.
    """

    text: str
    ids: tuple[int, ...]
    words: tuple[tuple[str, tuple[int, ...]], ...]
    length: int
    _ends: tuple[bool, ...]
    _tokenizer: Any

    def find(self, phrase: str) -> tuple[tuple[int, ...], ...]:
        """Token positions of every occurrence of a word or phrase.

        Raises:
            InputError: it is not in the prompt, or lies where the prompt is cut; the message names it.
        """
        sought = content_ids(self._tokenizer, phrase)
        count, found = len(sought), []
        for start in range(1, len(self.ids) - count):
            # "cat" is no word of "concat": an occurrence begins where a word of the tokenizer begins.
            if count and self._ends[start - 1] and list(self.ids[start : start + count]) == sought:
                found.append(tuple(range(start, start + count)))
        if found:
            return tuple(found)
        cut = any(not places and word.casefold() == phrase.casefold() for word, places in self.words)
        if cut:
            raise InputError(
                f"The word {phrase!r} lies behind the first {self.length - 2} tokens of the prompt, which is all that "
                "is read. Shorten the prompt."
            )
        near = difflib.get_close_matches(phrase.casefold(), [word.casefold() for word, _ in self.words], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"The word {phrase!r} is not in the prompt {_short(self.text)!r}.{hint}")

    def __contains__(self, phrase: str) -> bool:
        try:
            return bool(self.find(phrase))
        except InputError:
            return False


class PlacedPrompt(str):
    """The words of a prompt that a control encodes in a way of its own, and that so knows where they are.

    Whoever looks for words calls `prompt_tokens`, and need not know.
    """

    def tokens(self, tokenizer: Any) -> PromptTokens:
        """Where its words are among the tokens that the network gets; see `placed_tokens`.

        Raises:
            InputError: they have no one place; the message says why.
        """
        raise NotImplementedError


def prompt_tokens(tokenizer: Any, text: str) -> PromptTokens:
    """Read a prompt as a CLIP tokenizer does.

    Raises:
        InputError: the tokenizer reads words differently in a sentence than alone, or a control encodes this prompt so
            that its words have no place.
    """
    if isinstance(text, PlacedPrompt):
        return text.tokens(tokenizer)
    length = int(tokenizer.model_max_length)
    content = content_ids(tokenizer, text)
    ids = (tokenizer.bos_token_id, *content[: length - 2], tokenizer.eos_token_id)
    return placed_tokens(tokenizer, text, ids, content, range(1, length - 1), length)


def placed_tokens(
    tokenizer: Any, text: str, ids: Sequence[int], content: Sequence[int], places: Sequence[int], length: int
) -> PromptTokens:
    """Give every word of a text its positions.

    Args:
        tokenizer: a CLIP tokenizer.
        text: the words.
        ids: what the text encoder gets, without padding at the end.
        content: tokens of the words alone, in their order.
        places: position in ``ids`` of each of them; what lies behind the last place was cut.
        length: tokens of every prompt of the run, with padding.

    Raises:
        InputError: ``content`` is not the tokens of the words one by one.
    """
    written = text.split()
    pieces = [content_ids(tokenizer, word) for word in written]
    if [token for piece in pieces for token in piece] != list(content):
        raise InputError(f"The words of the prompt {_short(text)!r} cannot be told apart by this model's tokenizer.")
    words, at = [], 0
    for word, piece in zip(written, pieces, strict=True):
        words.append((word, tuple(places[at : at + len(piece)])))
        at += len(piece)
    whole = set(tokenizer.added_tokens_encoder.values()) | {tokenizer.bos_token_id}
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    ends = tuple(i in whole or str(token).endswith("</w>") for i, token in zip(ids, tokens, strict=True))
    return PromptTokens(text, tuple(ids), tuple(words), length, ends, tokenizer)


def content_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids without start and end, learned words written out."""
    return list(tokenizer(expand_learned_words(str(text), tokenizer), add_special_tokens=False).input_ids)


def _short(text: str) -> str:
    return text if len(text) <= 120 else text[:117] + "..."
