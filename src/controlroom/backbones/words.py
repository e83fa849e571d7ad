"""Where the words of a prompt are among its tokens.

Controls speak of words, networks of token positions. A word is found by its tokens, not by its letters: case,
punctuation beside it and words that a tokenizer takes apart are then no special cases, and neither are phrases and
learned words (textual inversion). Position 0 is the start token.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from controlroom.backbones.base import expand_learned_words
from controlroom.core.errors import InputError


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as a CLIP tokenizer reads it.

    Attributes:
        text: the prompt.
        ids: token ids with start and end, cut to ``length`` as the text encoder gets them; without padding.
        words: the words between spaces, as written, each with its token positions (none where the prompt was cut).
        length: tokens of every prompt with padding, 77 for CLIP.
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
        sought = _content(self._tokenizer, phrase)
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


def prompt_tokens(tokenizer: Any, text: str) -> PromptTokens:
    """Read a prompt as a CLIP tokenizer does.

    Raises:
        InputError: the tokenizer reads words differently in a sentence than alone, so that they have no place.
    """
    length = int(tokenizer.model_max_length)
    written = text.split()
    pieces = [_content(tokenizer, word) for word in written]
    content = [token for piece in pieces for token in piece]
    if content != _content(tokenizer, text):
        raise InputError(f"The words of the prompt {_short(text)!r} cannot be told apart by this model's tokenizer.")
    words, at = [], 1
    for word, piece in zip(written, pieces, strict=True):
        words.append((word, tuple(p for p in range(at, at + len(piece)) if p < length - 1)))
        at += len(piece)
    ids = (tokenizer.bos_token_id, *content[: length - 2], tokenizer.eos_token_id)
    whole = set(tokenizer.added_tokens_encoder.values()) | {tokenizer.bos_token_id}
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    ends = tuple(i in whole or str(token).endswith("</w>") for i, token in zip(ids, tokens, strict=True))
    return PromptTokens(text, ids, tuple(words), length, ends, tokenizer)


def _content(tokenizer: Any, text: str) -> list[int]:
    """Token ids without start and end."""
    return list(tokenizer(expand_learned_words(text, tokenizer), add_special_tokens=False).input_ids)


def _short(text: str) -> str:
    return text if len(text) <= 120 else text[:117] + "..."
