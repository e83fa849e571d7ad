"""The words of weighted prompts, as everything but their encoder sees them: a control finds a word at its tokens.

`WeightedPrompt` is a string, the words without notation, so that a run, its other controls and their messages read it
as any prompt. It keeps the tree, and answers `controlroom.backbones.words.prompt_tokens` from the chunks that the
network is really given.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from controlroom.backbones.words import PlacedPrompt, PromptTokens, placed_tokens
from controlroom.controls.prompt_chunks import NONE, chunk_count, chunks_of
from controlroom.controls.prompt_tree import Prompt, changing, line_at, moves, words_of
from controlroom.core.errors import InputError


@dataclass
class RunTexts:
    """All weighted texts of one run: they share one number of chunks.

    Attributes:
        steps: number of steps; set when the run is planned.
        prompts: those of the pictures and the negative ones.
    """

    steps: int = 1000
    prompts: list[WeightedPrompt] = field(default_factory=list)

    def chunks(self, tokenizer: Any) -> int:
        """Most chunks that any text has at any step."""

        @cache
        def count(prompt: Prompt, step: int) -> int:
            return chunk_count(tokenizer, prompt, step, self.steps)

        return max(
            (
                count(text.tree, step)
                for text in self.prompts
                for step in (range(self.steps) if text.changes else range(1))
            ),
            default=1,
        )


class WeightedPrompt(PlacedPrompt):
    """Words, with the tree that they come from.

    Attributes:
        tree: the prompt with its weights, chunks and schedules.
        texts: the other texts of the run.
        reader: the control that read it, for messages.
    """

    tree: Prompt
    texts: RunTexts
    reader: str

    @classmethod
    def of(cls, tree: Prompt, texts: RunTexts, reader: str) -> WeightedPrompt:
        """The words of a tree; joins the texts of its run."""
        words = cls(words_of(tree))
        words.tree, words.texts, words.reader = tree, texts, reader
        texts.prompts.append(words)
        return words

    @property
    def changes(self) -> bool:
        """Whether anything of it is not the same at all steps."""
        return any(moves(part.content) for part in self.tree.parts)

    def tokens(self, tokenizer: Any) -> PromptTokens:
        """Positions of its words in the chunks; of a composition, those of the first part, which is ``cond``.

        Raises:
            InputError: the words have no one place: they change from step to step, or are averaged with others.
        """
        why = None
        parts = self.tree.parts if self.tree.joined == "concat" else self.tree.parts[:1]
        moving = next((node for part in parts if (node := changing(part.content)) is not None), None)
        if self.tree.joined == "blend":
            why = "it is a blend of several prompts"
        elif moving is not None:
            why = f"what stands at character {moving.at + 1} changes from step to step"
        if why is not None:
            raise InputError(
                f"Words are looked for in the prompt {str(self)!r}, but have no one place in it as {self.reader} reads "
                f"it: {why}. Take that out of the prompt, or remove one of the two controls."
            )
        chunks = [chunk for part in parts for chunk in chunks_of(tokenizer, line_at(part.content))]
        length = int(tokenizer.model_max_length)
        ids = [token for chunk in chunks for token in chunk.ids]
        places = [
            number * length + place
            for number, chunk in enumerate(chunks)
            for place, piece in enumerate(chunk.pieces)
            if piece != NONE
        ]
        used = sum(piece != NONE for piece in chunks[-1].pieces) + 2
        return placed_tokens(
            tokenizer,
            str(self),
            ids[: (len(chunks) - 1) * length + used],
            [ids[place] for place in places],
            places,
            self.texts.chunks(tokenizer) * length,
        )
