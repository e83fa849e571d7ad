r"""The notation of the library Compel, from its published description.

``word++`` times 1.1², ``word-`` times 0.9; ``(two words)1.3`` and ``"two words"1.3`` give the weight as a number, and
``(two words)++`` as signs; nested ones multiply; ``(two words).attend(1.3)`` is the same. ``("a", "b").blend(1, 0.5)``
averages the text states of whole prompts, divided by the sum of the weights unless ``no_normalize`` stands behind them;
``("a", "b").and()`` puts them one behind the other. ``\(`` is a bracket, likewise ``\" \+ \- \,``.

Deviations: brackets and quotes that do not match, numbers that are none, and a ``blend`` or ``and`` that is not the
whole prompt are errors (there they are text); so are ``.swap`` and ``withLora``, for which there are controls. A
backslash escapes every sign and digit. The prompts of a blend may be several bare words. A comma ends the word that
signs weigh, also where no blank follows it.
"""

from __future__ import annotations

import re
from typing import Literal

from controlroom.controls.notation_source import Source, decimal
from controlroom.controls.prompt_tree import Node, Nodes, Part, Prompt, Text, Weighted, joined_texts, trimmed
from controlroom.core.errors import InputError

PLUS, MINUS = 1.1, 0.9

_SIGNS = re.compile(r"\++|-+")
_NUMBER = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+")
_METHOD = re.compile(r"\.(attend|blend|and|add|swap)\(")
_LORA = re.compile(r"\b(with|use)Lora\(")
_ENDS_WORD = ' \t\r\n\f\v(),."=+-'

_Inside = Literal["", "(", '"', ","]


def read(text: str) -> Prompt:
    """Text to tree.

    Raises:
        InputError: brackets that do not match, numbers that are none; the message names the position.
    """
    return _Reader(text).prompt()


class _Reader(Source):
    """Reads from left to right; each method leaves ``at`` behind what it read."""

    def prompt(self) -> Prompt:
        start = len(self.text) - len(self.text.lstrip())
        end = self._closing(start) if self.text[start : start + 1] == "(" else None
        found = _METHOD.match(self.text, end + 1) if end is not None else None
        if end is None or found is None or found[1] not in ("blend", "and", "add"):
            return Prompt((Part(self._content("", 0)),))
        return self._combined(start, end, "blend" if found[1] == "blend" else "concat", found)

    def _closing(self, at: int) -> int | None:
        """Where the bracket that opens at ``at`` is closed; None: nowhere."""
        depth, quoted = 0, False
        while at < len(self.text):
            sign = self.text[at]
            if sign == "\\":
                at += 1
            elif sign == '"':
                quoted = not quoted
            elif not quoted and sign in "()":
                depth += 1 if sign == "(" else -1
                if depth == 0:
                    return at
            at += 1
        return None

    def _combined(self, start: int, end: int, joined: Literal["blend", "concat"], found: re.Match[str]) -> Prompt:
        """All of ``("a", "b").blend(1, 0.5)``."""
        self.at = start
        contents = []
        while self.here != ")":
            self.at += 1
            contents.append(trimmed(self._content(",", start)))
        assert self.at == end
        self.at = found.end()
        arguments, places = self._arguments()
        normalised = True
        if joined == "blend" and arguments and arguments[-1] == "no_normalize":
            normalised = False
            arguments, places = arguments[:-1], places[:-1]
        weights = [self.number(at, word) for word, at in zip(arguments, places, strict=True)] or [1.0] * len(contents)
        if len(weights) != len(contents):
            raise self.problem(
                found.start(), f"{len(weights)} weights for {len(contents)} prompts. Give one for each, or none."
            )
        if joined == "blend" and normalised and abs(sum(weights)) < 1e-6:
            raise self.problem(found.start(), "the weights add up to 0, by which they are divided. Add no_normalize.")
        if rest := self.text[self.at :].strip():
            raise self.problem(self.text.index(rest, self.at), f"nothing may stand behind .{found[1]}(…).")
        return Prompt(tuple(map(Part, contents, weights)), joined, normalised)

    def _arguments(self) -> tuple[list[str], list[int]]:
        """What stands between the brackets of a method, and where."""
        began, end = self.at, self.text.find(")", self.at)
        if end < 0:
            raise self.problem(began - 1, "this '(' is never closed.")
        inside = self.text[began:end]
        self.at = end + 1
        if not inside.strip():
            return [], []
        words, places = [], []
        for word in inside.split(","):
            words.append(word.strip())
            places.append(began + len(word) - len(word.lstrip()))
            began += len(word) + 1
        return words, places

    def _content(self, inside: _Inside, opened: int) -> Nodes:
        """Nodes up to what ends them here: the end of the text, the bracket or quote, or the next prompt."""
        nodes: list[Node] = []
        word: list[Text] = []
        while self.at < len(self.text):
            sign, at = self.here, self.at
            if (sign == ")" and inside in ("(", ",")) or (sign == inside and inside != "("):
                return joined_texts([*nodes, *word])
            if sign == ")":
                reason = "stands before the quote is closed" if inside else "closes nothing"
                raise self.problem(at, f"this ')' {reason}. Write \\) for the sign.")
            if sign in '("':
                nodes += word
                word = []
                nodes += self._group(nodes)
                continue
            self._refuse()
            if word and (weight := self._signs(at)) is not None:
                nodes.append(Weighted(weight, joined_texts([*word]), word[0].at))
                word = []
                continue
            signs = _SIGNS.match(self.text, at)
            following = self.text[at + 1 : at + 2]
            escaped = sign == "\\" and following != "" and (not following.isalpha())
            # Signs with no word before them are text, all of them.
            taken = 2 if escaped else len(signs[0]) if signs is not None and not word else 1
            self.at += taken
            letters = Text(following if escaped else self.text[at : self.at], at)
            if (sign.isspace() or sign == ",") and not escaped:
                nodes += [*word, letters]
                word = []
            else:
                word.append(letters)
        if inside:
            what = {'"': "quote", ",": "'('", "(": "'('"}[inside]
            raise self.problem(opened, f"this {what} is never closed. Close it, or put a backslash before it.")
        return joined_texts([*nodes, *word])

    def _refuse(self) -> None:
        """What other controls are for, and methods where they cannot stand."""
        if (method := _METHOD.match(self.text, self.at)) is not None:
            raise self._misplaced(method)
        if _LORA.match(self.text, self.at):
            raise self.problem(self.at, "a LoRA is a control of its own here: add cr.LoRA(...) to controls.")

    def _misplaced(self, method: re.Match[str]) -> InputError:
        if method[1] == "swap":
            what = ".swap is a control of its own here: add cr.PromptToPrompt(source=...) to controls."
        elif method[1] == "attend":
            what = ".attend stands behind brackets, as in (two words).attend(1.3)."
        else:
            what = f'.{method[1]} combines whole prompts: ("one", "another").{method[1]}(1, 1), with nothing around it.'
        return self.problem(method.start(), f"{what} Write \\. for the sign.")

    def _signs(self, at: int) -> float | None:
        """The weight of ``+`` or ``-`` behind a word or bracket; None where they are text (``blue-eyed``)."""
        found = _SIGNS.match(self.text, at)
        if found is None:
            return None
        following = self.text[found.end() : found.end() + 1]
        if len(found[0]) == 1 and following and following not in _ENDS_WORD:
            return None
        self.at = found.end()
        return self._power(found)

    def _power(self, signs: re.Match[str]) -> float:
        weight = float(PLUS if signs[0][0] == "+" else MINUS) ** len(signs[0])
        if not 1e-3 <= weight <= 1e3:
            raise self.problem(signs.start(), f"{len(signs[0])} signs are too many. Write the weight as a number.")
        return weight

    def _group(self, before: list[Node]) -> list[Node]:
        """Brackets or quotes with what weighs them; without a weight, what they hold."""
        at, sign = self.at, self.here
        self.enter()
        self.at += 1
        content = self._content("(" if sign == "(" else '"', at)
        self.at += 1
        self.leave()
        weight = self._suffix()
        if weight is not None:
            return [Weighted(weight, content, at)]
        # Brackets end words: "(a)b" are two.
        nodes: list[Node] = list(content)
        if before and _ends_in_word(before[-1]):
            nodes.insert(0, Text(" ", at))
        if self.here.isalnum() or self.here == "\\":
            nodes.append(Text(" ", self.at))
        return nodes

    def _suffix(self) -> float | None:
        """The weight directly behind a bracket or quote, or None."""
        at = self.at
        if (signs := _SIGNS.match(self.text, at)) is not None:
            self.at = signs.end()
            return self._power(signs)
        if (number := _NUMBER.match(self.text, at)) is not None:
            self.at = number.end()
            if self.here.isdigit() or (self.here == "." and self.text[self.at + 1 : self.at + 2].isdigit()):
                raise self.problem(at, "this is no weight. Write a number such as 1.2, or put a blank before it.")
            return self.number(at, number[0])
        method = _METHOD.match(self.text, at)
        if method is None:
            return None
        if method[1] != "attend":
            raise self._misplaced(method)
        self.at = method.end()
        arguments, places = self._arguments()
        if len(arguments) != 1:
            raise self.problem(at, f".attend takes one weight, got {len(arguments)}.")
        if (signs := _SIGNS.fullmatch(arguments[0])) is not None:
            return self._power(signs)
        return self.number(places[0], arguments[0])


def _ends_in_word(node: Node) -> bool:
    return node.text[-1].isalnum() if isinstance(node, Text) else True


def write(prompt: Prompt) -> str:
    """Tree to text.

    Raises:
        InputError: something of A1111's that this notation does not have.
    """
    if prompt.joined == "compose":
        if len(prompt.parts) != 1:
            raise InputError("The notation of Compel has no AND. Write the prompt in that of A1111.")
        return _nodes(prompt.parts[0].content)
    prompts = ", ".join(f'"{_nodes(part.content)}"' for part in prompt.parts)
    weights = ", ".join(decimal(part.weight) for part in prompt.parts)
    if prompt.joined == "blend":
        return f"({prompts}).blend({weights}{'' if prompt.normalised else ', no_normalize'})"
    return f"({prompts}).and({weights})"


def _nodes(content: Nodes) -> str:
    written = ""
    for node in content:
        if isinstance(node, Text):
            written += _escaped(node.text, behind=bool(written))
        elif isinstance(node, Weighted):
            number = decimal(node.weight)
            written += f"({_nodes(node.content)})" + (number if node.weight >= 0 else f".attend({number})")
        else:
            raise InputError(
                f"The notation of Compel has nothing for the {type(node).__name__.lower()} of character "
                f"{node.at + 1}. Write the prompt in that of A1111."
            )
    return written


def _escaped(text: str, behind: bool) -> str:
    """Text with a backslash before every sign that would be read as more, ``behind`` a weight also before a digit."""
    found = []
    for at, sign in enumerate(text):
        before, after = text[at - 1 : at], text[at + 1 : at + 2]
        joins = sign in "+-" and before.isalnum() and after.isalnum()
        plain = sign.isalnum() or sign.isspace() or joins or sign not in '()"\\+-.'
        if sign == ".":
            plain = not (behind and at == 0) and not _METHOD.match(text, at)
        if behind and at == 0 and sign.isdigit():
            plain = False
        found.append(sign if plain else f"\\{sign}")
    return "".join(found)
