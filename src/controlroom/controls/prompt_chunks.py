"""Which tokens a weighted prompt has, in chunks of as many as a text encoder reads (75 and a start and an end).

The rule is that of A1111 for both notations: pieces are tokenised each on its own; a full chunk ends at its last comma
if that is among its last 20 tokens, so that a phrase is not cut in two; BREAK ends a chunk where it stands; what is not
full is padded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from controlroom.backbones.words import content_ids
from controlroom.controls.prompt_tree import Line, Prompt, line_at

COMMA_REACH = 20
"""Tokens that may move into the next chunk with what stands behind the last comma."""

NONE = -1
"""Instead of the number of a piece: start, end and padding."""


@dataclass(frozen=True)
class Chunk:
    """What a text encoder reads at once.

    Attributes:
        ids: token ids with start, end and padding.
        pieces: number of the piece of the line that each token comes from, or `NONE`.
    """

    ids: tuple[int, ...]
    pieces: tuple[int, ...]


@dataclass
class _Open:
    """A chunk that is being filled."""

    tokens: list[tuple[int, int]] = field(default_factory=list)
    comma: int | None = None


def chunks_of(tokenizer: Any, line: Line) -> tuple[Chunk, ...]:
    """The chunks of a line, at least one."""
    length = int(tokenizer.model_max_length)
    room, comma = length - 2, content_ids(tokenizer, ",")
    chunks = [_Open()]
    for number, piece in enumerate(line):
        if piece is None:
            chunks.append(_Open())
            continue
        for token in content_ids(tokenizer, piece.text):
            chunk = chunks[-1]
            if len(chunk.tokens) == room:
                chunks.append(_Open())
                if [token] != comma and chunk.comma is not None and room - chunk.comma <= COMMA_REACH:
                    chunks[-1].tokens = chunk.tokens[chunk.comma + 1 :]
                    del chunk.tokens[chunk.comma + 1 :]
                # As published: a comma that begins a chunk is not where the next one could be divided.
            elif [token] == comma:
                chunk.comma = len(chunk.tokens)
            chunks[-1].tokens.append((token, number))
    if len(chunks) > 1 and not chunks[-1].tokens:
        chunks.pop()
    return tuple(_closed(tokenizer, chunk, length) for chunk in chunks)


def empty_chunk(tokenizer: Any) -> Chunk:
    """The chunk of a prompt without words, with which shorter prompts are filled up."""
    return _closed(tokenizer, _Open(), int(tokenizer.model_max_length))


def _closed(tokenizer: Any, chunk: _Open, length: int) -> Chunk:
    padding = length - 2 - len(chunk.tokens)
    ids = (tokenizer.bos_token_id, *(token for token, _ in chunk.tokens), tokenizer.eos_token_id)
    pieces = (NONE, *(number for _, number in chunk.tokens), NONE)
    return Chunk((*ids, *[tokenizer.pad_token_id] * padding), (*pieces, *[NONE] * padding))


def chunk_count(tokenizer: Any, prompt: Prompt, step: int = 0, steps: int = 1000) -> int:
    """How many chunks the longest branch of a prompt has at a step."""
    counts = [len(chunks_of(tokenizer, line_at(part.content, step, steps))) for part in prompt.parts]
    return sum(counts) if prompt.joined == "concat" else max(counts)
