"""A prompt with weights, chunks and schedules as a tree, whatever notation it was written in.

`controlroom.controls.prompt_notation` reads and writes the notations of A1111 and Compel. Here are the tree and what
follows from it alone: `line_at`, the pieces of one prompt at one step with the products of their weights; `words_of`,
the words that other controls and a run without weights see. Nodes know where in the text they began (``at``, not
compared), so that errors can say so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from controlroom.core.errors import InputError

MAX_WEIGHT = 1000.0
"""Largest weight, also of nested ones together; far beyond what a network can follow, far below what overflows."""


@dataclass(frozen=True)
class Text:
    """Plain text."""

    text: str
    at: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Weighted:
    """More (weight above 1) or less of what is inside; weights of nested ones multiply."""

    weight: float
    content: Nodes
    at: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Break:
    """What follows begins a new chunk of 75 tokens."""

    at: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Scheduled:
    """One thing up to a step, another from there on.

    Attributes:
        before: for the first steps.
        after: for the others.
        when: number of first steps, or their share of all steps.
        share: which of the two ``when`` is.
    """

    before: Nodes
    after: Nodes
    when: float
    share: bool
    at: int = field(default=0, compare=False)

    def first_steps(self, steps: int) -> int:
        """Number of steps, of ``steps``, that see ``before``."""
        return min(steps, int(self.when * steps if self.share else self.when))


@dataclass(frozen=True)
class Alternating:
    """Another option at each step, in turn."""

    options: tuple[Nodes, ...]
    at: int = field(default=0, compare=False)


Node = Text | Weighted | Break | Scheduled | Alternating
Nodes = tuple[Node, ...]


@dataclass(frozen=True)
class Part:
    """One of the prompts that are combined."""

    content: Nodes
    weight: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        parts: at least one.
        joined: ``compose``: each part is a prediction of its own, the weighted guidances are added (A1111's AND).
            ``blend``: the text states are averaged (Compel's blend). ``concat``: they are put one behind the other
            (Compel's and).
        normalised: of a blend, whether the weights are divided by their sum.
    """

    parts: tuple[Part, ...]
    joined: Literal["compose", "blend", "concat"] = "compose"
    normalised: bool = True


@dataclass(frozen=True)
class Piece:
    """Text with one weight; None in place of a piece is the end of a chunk."""

    text: str
    weight: float


Line = tuple[Piece | None, ...]
"""One part at one step: pieces from left to right, neighbours of one weight as one."""


def line_at(content: Nodes, step: int = 0, steps: int = 1000) -> Line:
    """What a part says at step ``step`` (from 0) of ``steps``; the first step, unless one is named.

    Raises:
        InputError: nested weights whose product is out of bounds.

    Example:
        >>> line_at((Text("a "), Weighted(1.5, (Text("cat"),))))
        (Piece(text='a ', weight=1.0), Piece(text='cat', weight=1.5))
    """
    found: list[Piece | None] = []
    for text, weight in _flat(content, 1.0, step, steps):
        last = found[-1] if found else None
        if text is None:
            found.append(None)
        elif last is not None and last.weight == weight:
            # "[fe|]male" is one word: texts of one weight are joined before they are tokenised.
            found[-1] = Piece(last.text + text, weight)
        elif text:
            found.append(Piece(text, weight))
    return tuple(found)


def _flat(content: Nodes, weight: float, step: int, steps: int) -> Iterator[tuple[str | None, float]]:
    for node in content:
        match node:
            case Text(text):
                yield text, weight
            case Break():
                yield None, weight
            case Weighted(own, inside):
                if abs(product := weight * own) > MAX_WEIGHT:
                    raise InputError(
                        f"The weights around character {node.at + 1} of the prompt multiply to {product:.6g}; they lie "
                        f"between -{MAX_WEIGHT:g} and {MAX_WEIGHT:g}."
                    )
                yield from _flat(inside, product, step, steps)
            case Scheduled(before, after):
                yield from _flat(before if step < node.first_steps(steps) else after, weight, step, steps)
            case Alternating(options):
                yield from _flat(options[step % len(options)], weight, step, steps)


def words_of(prompt: Prompt) -> str:
    """The words without notation: of the first step, and of the first part where parts are not put in a row.

    Example:
        >>> words_of(Prompt((Part((Weighted(1.3, (Text("red"),)), Text(" cat"))), Part((Text("a dog"),)))))
        'red cat'
    """
    parts = prompt.parts if prompt.joined == "concat" else prompt.parts[:1]
    return " ".join(text for part in parts if (text := _text_of(line_at(part.content))))


def _text_of(line: Line) -> str:
    text = ""
    for piece in line:
        following = " " if piece is None else piece.text
        # Pieces are tokenised each on its own: "(fe:1.2)male" are two words.
        text += " " + following if text[-1:].isalnum() and following[:1].isalnum() else following
    return text.strip()


def moves(content: Nodes) -> bool:
    """Whether anything is not the same at all steps, be it only a weight."""
    return any(
        isinstance(node, Scheduled | Alternating) or (isinstance(node, Weighted) and moves(node.content))
        for node in content
    )


def changing(content: Nodes) -> Node | None:
    """The first schedule or alternation whose words are not the same at all steps, or None."""
    for node in content:
        if isinstance(node, Weighted):
            options: tuple[Nodes, ...] = (node.content,)
        elif isinstance(node, Scheduled):
            options = (node.before, node.after)
        elif isinstance(node, Alternating):
            options = node.options
        else:
            continue
        for option in options:
            if (inner := changing(option)) is not None:
                return inner
        if len({_text_of(line_at(option)) for option in options}) > 1:
            return node
    return None


def joined_texts(nodes: list[Node]) -> Nodes:
    """Nodes with neighbouring texts as one, without empty ones, and without blanks beside the end of a chunk."""
    found: list[Node] = []
    for node in nodes:
        last = found[-1] if found else None
        if isinstance(node, Text):
            if isinstance(last, Text):
                node = Text(last.text + node.text, last.at)
                found.pop()
            elif isinstance(last, Break):
                node = Text(node.text.lstrip(), node.at)
            if node.text:
                found.append(node)
            continue
        if isinstance(node, Break) and isinstance(last, Text):
            found.pop()
            if stripped := last.text.rstrip():
                found.append(Text(stripped, last.at))
        found.append(node)
    return tuple(found)


def trimmed(content: Nodes) -> Nodes:
    """A part without blanks at its ends."""
    nodes = list(content)
    if nodes and isinstance(first := nodes[0], Text):
        nodes[0] = Text(first.text.lstrip(), first.at)
    if nodes and isinstance(last := nodes[-1], Text):
        nodes[-1] = Text(last.text.rstrip(), last.at)
    return joined_texts(nodes)
