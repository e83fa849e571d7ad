"""Both notations: documented examples, a transcription of A1111's rules that works on the text, any text at all."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlroom.controls.prompt_chunks import NONE, chunk_count, chunks_of, empty_chunk
from controlroom.controls.prompt_notation import Dialect, parse, write
from controlroom.controls.prompt_tree import (
    Alternating,
    Break,
    Line,
    Part,
    Piece,
    Prompt,
    Scheduled,
    Text,
    Weighted,
    changing,
    line_at,
    words_of,
)
from controlroom.core.errors import InputError
from tests.tiny import tiny_tokenizer


def pieces(text: str, dialect: Dialect, step: int = 0, steps: int = 1000) -> list[tuple[str, float]]:
    """Stripped texts and weights of a prompt of one part; a chunk's end is ("", 0)."""
    (part,) = parse(text, dialect).parts
    line = line_at(part.content, step, steps)
    found = [("", 0.0) if piece is None else (piece.text.strip(), round(piece.weight, 6)) for piece in line]
    return [pair for pair in found if pair[0] or not pair[1]]


A1111 = {
    "a red cat": [("a red cat", 1.0)],
    "a (red) cat": [("a", 1.0), ("red", 1.1), ("cat", 1.0)],
    "a ((red)) cat": [("a", 1.0), ("red", 1.21), ("cat", 1.0)],
    "a [red] cat": [("a", 1.0), ("red", 0.909091), ("cat", 1.0)],
    "[[red]]": [("red", 0.826446)],
    "a (red hat:1.5)": [("a", 1.0), ("red hat", 1.5)],
    "a (red:0.25)": [("a", 1.0), ("red", 0.25)],
    "(a (red:1.2) cat:1.5)": [("a", 1.5), ("red", 1.8), ("cat", 1.5)],
    "((a) b:.5)": [("a", 0.55), ("b", 0.5)],
    "(red: 1.3 )": [("red", 1.3)],
    "(red:-1)": [("red", -1.0)],
    "(red:+1.)": [("red", 1.0)],
    r"a \(red\) \[cat\]": [("a (red) [cat]", 1.0)],
    r"(a \(red\):1.2)": [("a (red)", 1.2)],
    r"\\(red)": [("\\", 1.0), ("red", 1.1)],
    r"a\b": [(r"a\b", 1.0)],
    "a BREAK b": [("a", 1.0), ("", 0.0), ("b", 1.0)],
    "(a BREAK b:2)": [("a", 2.0), ("", 0.0), ("b", 2.0)],
    "BREAKFAST and BRANDY": [("BREAKFAST and BRANDY", 1.0)],
    "at 12:30": [("at 12:30", 1.0)],
    "(style: oil)": [("style: oil", 1.1)],
    "(ratio 16:9)": [("ratio 16", 9.0)],
    "a (:) b": [("a", 1.0), (":", 1.1), ("b", 1.0)],
    r"(16\:9)": [("16:9", 1.1)],
    "a | b": [("a | b", 1.0)],
    "()[]": [],
    "": [],
}

COMPEL = {
    "a red cat": [("a red cat", 1.0)],
    "a red+ cat": [("a", 1.0), ("red", 1.1), ("cat", 1.0)],
    "a red++ cat": [("a", 1.0), ("red", 1.21), ("cat", 1.0)],
    "a red-- cat": [("a", 1.0), ("red", 0.81), ("cat", 1.0)],
    "a (red hat)1.3": [("a", 1.0), ("red hat", 1.3)],
    "a (red hat).5 x": [("a", 1.0), ("red hat", 0.5), ("x", 1.0)],
    "(red hat)++": [("red hat", 1.21)],
    '"red hat"-': [("red hat", 0.9)],
    "(red hat).attend(1.4)": [("red hat", 1.4)],
    "(red hat).attend(--)": [("red hat", 0.81)],
    "((a)1.2 b)1.5": [("a", 1.8), ("b", 1.5)],
    "red++, cat": [("red", 1.21), (", cat", 1.0)],
    "cat++.": [("cat", 1.21), (".", 1.0)],
    "(a). B": [("a. B", 1.0)],
    "blue-eyed a+b -x +": [("blue-eyed a+b -x +", 1.0)],
    "a ++ b": [("a ++ b", 1.0)],
    "(a)b": [("a b", 1.0)],
    "(cat) 1.5": [("cat 1.5", 1.0)],
    "(cat)-0.5": [("cat", 0.9), ("0.5", 1.0)],
    r"\(a\) \"b\" c\+\+": [('(a) "b" c++', 1.0)],
    "a (red:1.2) [cat]": [("a red:1.2 [cat]", 1.0)],
    "": [],
}


class TestExamples:
    @pytest.mark.parametrize(("text", "expected"), A1111.items(), ids=A1111)
    def test_a1111(self, text: str, expected: list[tuple[str, float]]) -> None:
        assert pieces(text, "a1111") == expected

    @pytest.mark.parametrize(("text", "expected"), COMPEL.items(), ids=COMPEL)
    def test_compel(self, text: str, expected: list[tuple[str, float]]) -> None:
        assert pieces(text, "compel") == expected

    @pytest.mark.parametrize(
        ("text", "steps", "expected"),
        [
            ("a [b:3]", 5, ["a"] * 3 + ["a b"] * 2),
            ("a [b::3]", 5, ["a b"] * 3 + ["a"] * 2),
            ("a [b:c:1] d", 3, ["a b d", "a c d", "a c d"]),
            ("[b:c:0.5]", 4, ["b", "b", "c", "c"]),
            ("[b:c:0.5]", 5, ["b", "b", "c", "c", "c"]),
            ("[b:c:1.0]", 3, ["b"] * 3),
            ("[b:c:0]", 2, ["c"] * 2),
            ("[b:c:100]", 2, ["b"] * 2),
            ("a[b:[c:d:2]:1]e", 4, ["abe", "ace", "ade", "ade"]),
            ("[fe|]male", 3, ["female", "male", "female"]),
            ("[a|b|]c", 4, ["ac", "bc", "c", "ac"]),
            ("[a|[b:c:2]]", 4, ["a", "b", "a", "c"]),
        ],
    )
    def test_schedules_and_turns(self, text: str, steps: int, expected: list[str]) -> None:
        (part,) = parse(text, "a1111").parts
        found = ["".join(p.text for p in line_at(part.content, i, steps) if p).split() for i in range(steps)]
        assert found == [text.split() for text in expected]

    def test_prompts_put_together(self) -> None:
        composed = parse("a cat :1.2 AND a (dog:2) AND x:-.5", "a1111")
        assert composed.joined == "compose"
        assert [part.weight for part in composed.parts] == [1.2, 1.0, -0.5]
        assert composed.parts[1] == Part((Text("a "), Weighted(2.0, (Text("dog"),))))
        blend = parse('("a (cat)1.2", "a dog").blend(1, .5, no_normalize)', "compel")
        assert (blend.joined, blend.normalised) == ("blend", False)
        assert [part.weight for part in blend.parts] == [1.0, 0.5]
        assert blend.parts[0] == Part((Text("a "), Weighted(1.2, (Text("cat"),))))
        assert parse("(a cat, (b)++).blend()", "compel").normalised
        concat = parse(' ("a, b", "c").and() ', "compel")
        assert concat == Prompt((Part((Text("a, b"),)), Part((Text("c"),))), "concat")

    def test_one_tree(self) -> None:
        tree = parse("a (red:1.5) cat", "a1111")
        assert (
            tree
            == parse("a (red)1.5 cat", "compel")
            == Prompt((Part((Text("a "), Weighted(1.5, (Text("red"),)), Text(" cat"))),))
        )
        assert parse("[a:b:0.5]", "a1111").parts[0].content == (Scheduled((Text("a"),), (Text("b"),), 0.5, True),)
        assert parse("[a|b]BREAK", "a1111").parts[0].content == (Alternating(((Text("a"),), (Text("b"),))), Break())

    def test_words(self) -> None:
        for text, expected in [
            ("a (red:1.5) cat", "a red cat"),
            ("(fe:1.2)male", "fe male"),
            ("(red), cat", "red, cat"),
            ("a BREAK b", "a b"),
            ("a [b:c:0.5]", "a b"),
            ("[a|b] c AND d", "a c"),
        ]:
            assert words_of(parse(text, "a1111")) == expected
        assert words_of(parse('("a", "b").blend(1, 1)', "compel")) == "a"
        assert words_of(parse('("a", "b").and()', "compel")) == "a b"

    def test_what_changes(self) -> None:
        for text, expected in [("[a:b:1]", 0), ("x [a|a] [b|c]", 8), ("(x [a:1]:2)", 3), ("[a:(a:2):1]", None)]:
            node = changing(parse(text, "a1111").parts[0].content)
            assert (None if node is None else node.at) == expected

    def test_from_one_notation_to_the_other(self) -> None:
        assert write(parse('a [red] (cat:1.2) (5")', "a1111"), "compel") == (
            'a (red)0.9090909090909091 (cat)1.2 (5\\")1.1'
        )
        assert write(parse("a red+ cat: [x] AND", "compel"), "a1111") == r"a (red:1.1) cat: \[x\] and"
        assert parse(write(parse("(a:-2) b", "a1111"), "compel"), "compel") == parse("(a:-2) b", "a1111")
        for text in ("a AND b", "a BREAK b", "[a:b:1]", "[a|b]"):
            with pytest.raises(InputError, match="Write the prompt in that of A1111"):
                write(parse(text, "a1111"), "compel")
        for text in ('("a", "b").blend(1, 1)', '("a", "b").and()'):
            with pytest.raises(InputError, match="Write the prompt in that of Compel"):
                write(parse(text, "compel"), "a1111")


class TestErrors:
    @pytest.mark.parametrize(
        ("dialect", "text", "at", "message"),
        [
            ("a1111", "a (red cat", 3, "never closed"),
            ("a1111", "a [red cat", 3, "never closed"),
            ("a1111", "a red) cat", 6, "closes nothing"),
            ("a1111", "a (red] cat", 7, "before the '\\(' of character 3"),
            ("a1111", "(red:1.2.3)", 6, "'1.2.3' is not a weight"),
            ("a1111", "(red:1,5)", 6, "'1,5' is not a weight"),
            ("a1111", "(red:1e5)", 6, "'1e5' is not a weight"),
            ("a1111", "(red:5000)", 6, "between -1000 and 1000"),
            ("a1111", "[a:b]", 4, "'b' is not a number of steps"),
            ("a1111", "[a:b:-1]", 6, "'-1' is not a number of steps"),
            ("a1111", "[a:b:c:1]", 1, "at most two colons"),
            ("a1111", "[a|b:1]", 1, "at most two colons"),
            ("a1111", "(a AND b)", 4, "AND divides whole prompts"),
            ("a1111", "a :1.2.3 AND b", 4, "'1.2.3' is not a weight"),
            ("a1111", "x" + "(" * 65, 66, "more than 64 brackets"),
            ("compel", "a (red cat", 3, "never closed"),
            ("compel", "a red) cat", 6, "closes nothing"),
            ("compel", 'a 5" cat', 4, "never closed"),
            ("compel", '"a) b"', 3, "before the quote is closed"),
            ("compel", "(red)1.2.3", 6, "no weight"),
            ("compel", "(red)5000", 6, "between -1000 and 1000"),
            ("compel", "red" + "+" * 80, 4, "80 signs are too many"),
            ("compel", "(red).attend(x)", 14, "'x' is not a weight"),
            ("compel", "(red).attend(1, 2)", 6, "one weight, got 2"),
            ("compel", '("a", "b").blend(1)', 11, "1 weights for 2 prompts"),
            ("compel", '("a", "b").blend(1, x)', 21, "'x' is not a weight"),
            ("compel", '("a", "b").blend(1, -1)', 11, "add up to 0"),
            ("compel", '("a", "b").blend(1, 1) c', 24, "nothing may stand behind"),
            ("compel", '("a", "b").blend(1, 1', 17, "never closed"),
            ("compel", 'x ("a", "b").and()', 13, "combines whole prompts"),
            ("compel", "a cat.swap(dog)", 6, "PromptToPrompt"),
            ("compel", "a withLora(x)", 3, "LoRA"),
        ],
    )
    def test_they_name_the_position(self, dialect: Dialect, text: str, at: int, message: str) -> None:
        with pytest.raises(InputError, match=rf"character {at} \(.*{message}"):
            parse(text, dialect)

    def test_what_is_too_much(self) -> None:
        with pytest.raises(InputError, match="at most 20000"):
            parse("a" * 20_001, "a1111")
        nested = parse("((((a:900):900)))", "a1111")
        with pytest.raises(InputError, match="around character"):
            line_at(nested.parts[0].content)


BITS = st.one_of(
    st.sampled_from([*'()[]:|\\"+-., \n', "AND", " BREAK ", "a", "cat", "1", "0.5", ":1.2", ".blend(", ".and("]),
    st.sampled_from(["(a:1.2)", "[a:b:0.5]", "(a)1.3", '"a"', ".attend(", "no_normalize", "++", ".swap(", "²", "e"]),
    st.text(max_size=2),
)


def nested(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        inner.map("({})".format),
        inner.map("[{}]".format),
        st.tuples(inner, st.sampled_from(["1.3", " 0.5", "2"])).map(lambda pair: f"({pair[0]}:{pair[1]})"),
        st.tuples(inner, inner, st.sampled_from(["0.5", "1", "3", ".25"])).map(lambda t: f"[{t[0]}:{t[1]}:{t[2]}]"),
        st.tuples(inner, inner).map(lambda pair: f"[{pair[0]}|{pair[1]}]"),
    )


class TestAnyText:
    @settings(max_examples=300, deadline=None)
    @given(st.lists(BITS, max_size=12).map("".join), st.sampled_from(["a1111", "compel"]))
    def test_is_read_and_written_or_refused(self, text: str, dialect: Dialect) -> None:
        try:
            tree = parse(text, dialect)
        except InputError as error:
            assert "character" in str(error)
            return
        written = write(tree, dialect)
        assert parse(written, dialect) == tree
        assert write(parse(written, dialect), dialect) == written
        assert isinstance(words_of(tree), str)

    @settings(max_examples=100, deadline=None)
    @given(st.recursive(st.sampled_from(["a", " b ", ", ", r"\(", r"\\"]), nested, max_leaves=8))
    def test_a1111_means_what_a_transcription_on_the_text_says(self, text: str) -> None:
        """Brackets that are balanced, weights and schedules at every depth."""
        (part,) = parse(text, "a1111").parts
        for step in range(4):
            ours = [(p.text, p.weight) for p in line_at(part.content, step, 4) if p is not None]
            letters = [(sign, weight) for sign, weight in weighed(resolved(text, step + 1, 4))]
            assert [(sign, pytest.approx(weight)) for text, weight in ours for sign in text] == letters


def resolved(text: str, step: int, steps: int) -> str:
    """A1111's first pass, on the text: schedules and turns of step ``step`` (from 1) replaced, innermost first."""
    signs = {"\\\\": "\0", "\\(": "\1", "\\)": "\2"}
    for escaped, sign in signs.items():
        text = text.replace(escaped, sign)
    while True:
        for found in re.finditer(r"\[([^\[\]]*)\]", text):
            inside, depth, cuts = found[1], 0, [-1]
            for at, sign in enumerate(inside):
                depth += (sign == "(") - (sign == ")")
                if depth == 0 and sign in ":|":
                    cuts.append(at)
            options = [inside[a + 1 : b] for a, b in zip(cuts, [*cuts[1:], len(inside)], strict=True)]
            if "|" in [inside[at] for at in cuts[1:]]:
                chosen = options[(step - 1) % len(options)]
            elif len(options) == 3:
                when = float(options[2]) * (steps if "." in options[2] else 1)
                chosen = options[0] if step <= int(when) else options[1]
            else:
                # Less of what is inside, for the second pass.
                text = f"{text[: found.start()]}\3{inside}\4{text[found.end() :]}"
                break
            text = text[: found.start()] + chosen + text[found.end() :]
            break
        else:
            return text


def weighed(text: str) -> list[tuple[str, float]]:
    """A1111's second pass: each sign with the product of the brackets around it."""
    signs: list[list] = []
    opened: list[int] = []
    at = 0
    while at < len(text):
        number = re.match(r":\s*([-+]?[.\d]+)\s*\)", text[at:])
        if text[at] in "(\3":
            opened.append(len(signs))
        elif (text[at] in ")\4") or (number and opened):
            factor = float(number[1]) if number else 1.1 if text[at] == ")" else 1 / 1.1
            for entry in signs[opened.pop() :]:
                entry[1] *= factor
            at += len(number[0]) - 1 if number else 0
        else:
            signs.append([text[at].translate({0: "\\", 1: "(", 2: ")"}), 1.0])
        at += 1
    return [(sign, weight) for sign, weight in signs]


def transcribed_chunks(tokens: list[int | None], comma: int, room: int = 75) -> list[list[int]]:
    """A1111's chunks: None is BREAK. Works on whole chunks where the code under test fills one token by token."""
    chunks: list[list[int]] = []
    for stretch in split(tokens):
        left = stretch
        while len(left) > room:
            commas = [at for at in range(room) if left[at] == comma]
            cut = room
            if left[room] != comma and commas and room - commas[-1] <= 20:
                cut = commas[-1] + 1
            chunks.append(left[:cut])
            left = left[cut:]
        chunks.append(left)
    while len(chunks) > 1 and not chunks[-1] and tokens[-1] is None:
        chunks.pop()
        break
    return chunks


def split(tokens: list[int | None]) -> list[list[int]]:
    found: list[list[int]] = [[]]
    for token in tokens:
        if token is None:
            found.append([])
        else:
            found[-1].append(token)
    return found


class TestChunks:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.sampled_from(["cat "] * 12 + [", "] * 2 + ["dog, ", " BREAK "]), max_size=220))
    def test_as_a1111_divides(self, words: list[str]) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.model_max_length = 77
        comma, cat, dog = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in (",", "cat", "dog"))
        known: dict[str, list[int | None]] = {
            "cat ": [cat], ", ": [comma], "dog, ": [dog, comma], " BREAK ": [None],
        }  # fmt: skip
        tokens = [token for word in words for token in known[word]]
        (part,) = parse("".join(words), "a1111").parts
        chunks = chunks_of(tokenizer, line_at(part.content))
        for chunk, expected in zip(chunks, transcribed_chunks(tokens, comma), strict=True):
            bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
            assert list(chunk.ids) == [bos, *expected, eos, *[pad] * (75 - len(expected))]
            assert [piece != NONE for piece in chunk.pieces] == [
                False,
                *[True] * len(expected),
                *[False] * (76 - len(expected)),
            ]

    def test_tokens_know_their_piece(self) -> None:
        line: Line = (Piece("a ", 1.0), Piece("red cat", 1.5), None, Piece("dog", 1.0))
        first, second = chunks_of(tiny_tokenizer(), line)
        assert first.pieces[:6] == (NONE, 0, 1, 1, NONE, NONE)
        assert second.pieces[:4] == (NONE, 3, NONE, NONE)
        assert len(first.ids) == len(second.ids) == 16
        assert chunks_of(tiny_tokenizer(), ()) == (empty_chunk(tiny_tokenizer()),)

    def test_number_of_chunks(self) -> None:
        tokenizer = tiny_tokenizer()
        assert chunk_count(tokenizer, parse("cat " * 30, "a1111")) == 3
        assert chunk_count(tokenizer, parse("cat AND " + "cat " * 15, "a1111")) == 2
        assert chunk_count(tokenizer, parse('("cat", "dog").and()', "compel")) == 2
        assert chunk_count(tokenizer, parse('("cat", "dog").blend()', "compel")) == 1
