r"""The notation of AUTOMATIC1111's web UI, from its published description.

``(w)`` times 1.1, ``[w]`` divided by 1.1, ``(w:1.2)`` times 1.2, nested ones multiply; ``\(`` is a bracket. ``BREAK``
begins a new chunk, ``AND`` a prompt of its own with ``:0.5`` behind it as its weight. ``[a:b:0.5]`` is a for the first
half of the steps and b then, ``[a:b:10]`` a for ten steps, ``[b:10]`` nothing and then b, ``[a::10]`` a and then
nothing; ``[a|b]`` takes turns.

Deviations: brackets that do not match, and numbers that are none, are errors (there they are text, or raise); so is
``[a:b]`` without a number, and AND inside brackets. ``\:`` and ``\|`` are a colon and a bar. BREAK keeps its meaning
inside brackets. A single prompt that ends in ``:30`` is no prompt of weight 30.
"""

from __future__ import annotations

import re
from typing import Literal

from controlroom.controls.notation_source import Source, decimal
from controlroom.controls.prompt_tree import (
    Alternating,
    Break,
    Node,
    Nodes,
    Part,
    Prompt,
    Scheduled,
    Text,
    Weighted,
    joined_texts,
    trimmed,
)
from controlroom.core.errors import InputError

ROUND = 1.1
SQUARE = 1 / 1.1

_ESCAPED = "()[]:|\\"
_KEYWORD = re.compile(r"\b(BREAK|AND)\b")
# A colon, something of which every sign belongs to numbers, and the end of what it weighs.
_WEIGHT = re.compile(r":\s*([-+0-9.,eE]+)\s*\)")
_PART_WEIGHT = re.compile(r":\s*([-+0-9.]+)\s*(?=\bAND\b|\Z)")

_Inside = Literal["", "(", "["]


def read(text: str) -> Prompt:
    """Text to tree.

    Raises:
        InputError: brackets that do not match, numbers that are none; the message names the position.
    """
    return _Reader(text).prompt()


class _Reader(Source):
    """Reads from left to right; each method leaves ``at`` behind what it read."""

    def prompt(self) -> Prompt:
        parts = [self._part(first=True)]
        while self.at < len(self.text):
            self.at += len("AND")
            parts.append(self._part(first=False))
        if len(parts) == 1:
            return Prompt(tuple(parts))
        return Prompt(tuple(Part(trimmed(part.content), part.weight) for part in parts))

    def _part(self, first: bool) -> Part:
        content = self._content("", self.at)
        weight = 1.0
        # Without an AND a colon and a number at the end are text.
        found = self._weight(_PART_WEIGHT) if self.here == ":" else None
        if found is not None and first and found.end() == len(self.text):
            rest = self.text[self.at :]
            self.at = len(self.text)
            return Part(joined_texts([*content, Text(rest)]))
        if found is not None:
            weight = self.number(found.start(1), found[1])
            self.at = found.end()
        return Part(content, weight)

    def _content(self, inside: _Inside, opened: int) -> Nodes:
        """Nodes up to what ends them here: the end of the text, an AND, the bracket or a sign that divides it."""
        nodes: list[Node] = []
        while self.at < len(self.text):
            sign, at = self.here, self.at
            if sign in ")]":
                if sign != {"(": ")", "[": "]"}.get(inside):
                    raise self._unbalanced(at, inside, opened)
                return joined_texts(nodes)
            if self._divides(sign, inside):
                return joined_texts(nodes)
            if sign == "(":
                nodes.append(self._round())
            elif sign == "[":
                nodes.append(self._square())
            elif (keyword := _KEYWORD.match(self.text, at)) is not None:
                if keyword[1] == "AND" and not inside:
                    return joined_texts(nodes)
                if keyword[1] == "AND":
                    raise self.problem(at, "AND divides whole prompts and cannot stand inside brackets.")
                nodes.append(Break(at))
                self.at = keyword.end()
            else:
                escaped = sign == "\\" and self.text[at + 1 : at + 2] in tuple(_ESCAPED)
                self.at += 2 if escaped else 1
                nodes.append(Text(self.text[self.at - 1], at))
        if inside:
            raise self.problem(opened, f"this {inside!r} is never closed. Close it, or write \\{inside} for the sign.")
        return joined_texts(nodes)

    def _divides(self, sign: str, inside: _Inside) -> bool:
        if inside == "[":
            return sign in (":", "|")
        if sign != ":":
            return False
        return self._weight(_WEIGHT if inside else _PART_WEIGHT) is not None

    def _weight(self, expression: re.Pattern[str]) -> re.Match[str] | None:
        """What stands behind a colon, if it is meant as a number."""
        found = expression.match(self.text, self.at)
        return found if found is not None and any(sign.isdigit() for sign in found[1]) else None

    def _unbalanced(self, at: int, inside: _Inside, opened: int) -> InputError:
        sign = self.text[at]
        if not inside:
            return self.problem(at, f"this {sign!r} closes nothing. Open it, or write \\{sign} for the sign.")
        return self.problem(at, f"this {sign!r} stands before the {inside!r} of character {opened + 1} is closed.")

    def _round(self) -> Weighted:
        at = self.at
        self.enter()
        self.at += 1
        content, weight = self._content("(", at), ROUND
        if self.here == ":":
            found = self._weight(_WEIGHT)
            assert found is not None
            weight = self.number(found.start(1), found[1])
            self.at = found.end() - 1
        self.at += 1
        self.leave()
        return Weighted(weight, content, at)

    def _square(self) -> Node:
        at = self.at
        self.enter()
        signs, parts, starts = "", [], []
        while not parts or self.here != "]":
            signs += self.here
            self.at += 1
            starts.append(self.at)
            parts.append(self._content("[", at))
        last = self.text[starts[-1] : self.at].strip()
        self.at += 1
        self.leave()
        signs = signs[1:]
        if not signs:
            return Weighted(SQUARE, parts[0], at)
        if ":" not in signs:
            return Alternating(tuple(parts), at)
        if "|" in signs or len(signs) > 2:
            raise self.problem(
                at, "square brackets hold [a|b|c], or [a:b:0.5] with at most two colons. Write \\: or \\| for the sign."
            )
        expected = "a number of steps or a share of them. Write [a:b:10] or [a:b:0.5], or \\: for a colon"
        when = self.number(starts[-1], last, expected)
        if last[0] in "+-":
            raise self.problem(starts[-1], f"{last!r} is not {expected}.")
        before = parts[0] if len(parts) == 3 else ()
        return Scheduled(before, parts[-2], when, "." in last, at)


def write(prompt: Prompt) -> str:
    """Tree to text.

    Raises:
        InputError: a blend or a concatenation, which this notation does not have.
    """
    if prompt.joined != "compose":
        raise InputError(f"The notation of A1111 has no {prompt.joined}. Write the prompt in that of Compel.")
    if len(prompt.parts) == 1:
        return _nodes(prompt.parts[0].content, "")
    return " AND ".join(
        _nodes(part.content, ":") + ("" if part.weight == 1 else f" :{decimal(part.weight)}") for part in prompt.parts
    )


def _nodes(content: Nodes, divides: str) -> str:
    return "".join(_node(node, divides) for node in content)


def _node(node: Node, divides: str) -> str:
    """A node; ``divides``: signs that would be read as more than text where it stands."""
    match node:
        case Text(text):
            # The tokenizer knows no capitals, so that a word that looks like a keyword loses nothing.
            plain = _KEYWORD.sub(lambda word: word[0].lower(), text)
            return "".join(f"\\{sign}" if sign in "()[]\\" or sign in divides else sign for sign in plain)
        case Break():
            return " BREAK "
        case Weighted(weight, content):
            return f"({_nodes(content, ':|')}:{decimal(weight)})"
        case Alternating(options):
            return f"[{'|'.join(_nodes(option, ':|') for option in options)}]"
        case Scheduled(before, after, when, share):
            number = decimal(when) if share else str(int(when))
            return f"[{_nodes(before, ':|')}:{_nodes(after, ':|')}:{number}]"
