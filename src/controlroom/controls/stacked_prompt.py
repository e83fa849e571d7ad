"""Prompts one word of which is a person: it is said once for each picture, and pictures are fused into its states.

The word is marked by a trigger behind it (``a woman img on the beach``), or named. What everything but the encoder sees
are the words without the trigger; `StackedPrompt` knows where they are among the tokens that the network is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from controlroom.backbones.words import PlacedPrompt, PromptTokens, content_ids, placed_tokens, prompt_tokens
from controlroom.core.errors import InputError


class StackedPrompt(PlacedPrompt):
    """Words, one of which stands for a person.

    Attributes:
        word: number of the word between spaces.
        count: gives how many tokens the word becomes.
        always: whether it does so at every step.
    """

    word: int
    count: Callable[[], int]
    always: bool

    @classmethod
    def of(cls, words: Sequence[str], word: int, count: Callable[[], int], always: bool) -> StackedPrompt:
        """Out of the words between spaces."""
        found = cls(" ".join(words))
        found.word, found.count, found.always = word, count, always
        return found

    def tokens(self, tokenizer: Any) -> PromptTokens:
        """Positions of its words; the stacked word has as many places as tokens.

        Raises:
            InputError: the words have no one place, since the word is stacked at some steps only.
        """
        count = self.count()
        if count == 1:
            return prompt_tokens(tokenizer, str(self))
        if not self.always:
            raise InputError(
                f"Words are looked for in the prompt {str(self)!r}, but have no one place in it: {count} tokens stand "
                f"for {self.split()[self.word]!r}, and not at all steps. Give the control of the person start=0 and "
                "end=1, a single picture, or remove one of the two controls."
            )
        ids, stacked = stacked_ids(tokenizer, str(self), self.word, count)
        content = content_ids(tokenizer, str(self))
        first, shift = stacked[0], len(stacked) - 1
        places = [place if place <= first else place + shift for place in range(1, len(content) + 1)]
        inside = [place for place in places if place < len(ids) - 1]
        return placed_tokens(tokenizer, str(self), ids, content, inside, int(tokenizer.model_max_length))


def stacked_ids(tokenizer: Any, text: str, word: int, count: int) -> tuple[list[int], list[int]]:
    """Token ids of a text with start and end, one word of which is said ``count`` times, and where it then is.

    Of a word of several tokens, the last is repeated, as published.

    Raises:
        InputError: the stacked word lies behind what the text encoder reads.
    """
    length = int(tokenizer.model_max_length)
    written = text.split()
    before = len(content_ids(tokenizer, " ".join(written[: word + 1])))
    content = content_ids(tokenizer, text)
    at = before - 1
    stacked = [*content[:at], *([content[at]] * count), *content[at + 1 :]]
    if at + count > length - 2:
        raise InputError(
            f"The word {written[word]!r} becomes {count} tokens, which do not fit into the {length - 2} that are read. "
            "Give fewer pictures, or a shorter prompt."
        )
    ids = [tokenizer.bos_token_id, *stacked[: length - 2], tokenizer.eos_token_id]
    return ids, list(range(at + 1, at + 1 + count))


def person_in(text: str, trigger: str, words: Sequence[str] | None, who: str) -> tuple[list[str], int]:
    """The words of a text without the trigger, and which of them stands for the person.

    Args:
        text: the prompt.
        trigger: stands behind that word.
        words: that are looked for where there is no trigger: the first that is in the text.
        who: asks, for messages.

    Raises:
        InputError: neither the trigger nor one of the words is there, or the trigger stands twice or first.
    """
    written = text.split()
    bare = [_bare(word) for word in written]
    places = [i for i, word in enumerate(bare) if word == trigger]
    if len(places) > 1 or places == [0]:
        problem = "first, with no word before it" if len(places) == 1 else f"{len(places)} times"
        raise InputError(
            f"{who}: {trigger!r} stands {problem} in {text!r:.80}. Write it once, behind 'man' or 'woman'."
        )
    if places:
        place = places[0]
        # Punctuation that hung on the trigger hangs on the word now.
        tail = written[place][len(trigger) :] if written[place].startswith(trigger) else ""
        kept = [*written[: place - 1], written[place - 1] + tail, *written[place + 1 :]]
        return kept, place - 1
    for word in words or ():
        if _bare(word) in bare:
            return written, bare.index(_bare(word))
    wanted = f"{trigger!r} behind the word for the person"
    wanted += f", or {', '.join(map(repr, words))}" if words else ""
    raise InputError(f"{who}: the prompt {text!r:.80} does not say who is meant. Expected {wanted}.")


def _bare(word: str) -> str:
    return word.strip(".,;:!?()\"'").casefold()
