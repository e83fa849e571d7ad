"""Text states of weighted prompts: what the tree of a prompt becomes for the network.

Two ways to weigh a token. ``a1111``: its state is multiplied, and the states of a chunk are then brought back to their
mean. ``compel``: its state moves away from, or towards, that of a prompt without words; and where the weight is below 1
the result is averaged with states for which the text encoder did not see those words, the more so the lower it is.

Encoders are weighed each on its own; the pooled embedding is that of the first chunk, without weights (in a blend, the
average). Deviations: A1111 takes the mean over all prompts of a batch, here each has its own, so that a picture does
not depend on its neighbours; and a mean that is only rounding (a text encoder whose last norm was never trained) is not
brought back. Compel pools over the text with its notation, here over its words; and cuts long prompts at sentences,
here as A1111.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from controlroom.controls.prompt_chunks import NONE, Chunk, chunks_of, empty_chunk
from controlroom.controls.prompt_tree import Line, Prompt, line_at
from controlroom.core.branch import Condition
from controlroom.core.run import Run

Weighting = Literal["a1111", "compel"]

_ROUNDING = 1e-6
"""Share of the mean size of the states below which their mean says nothing."""

_SMALLEST = 1e-5
"""Below this a weight is as good as none, as published: the tangent of a right angle is infinite."""


@dataclass
class TextEncoder:
    """Encodes weighted prompts for one run; every line once.

    Attributes:
        run: the run, for its text encoders, sizes and ``clip_skip``.
        weighting: how tokens are weighed.
        scale: how much of the weights: each becomes 1 + (weight − 1) · scale, and the further prompts of a blend fade.
        negative: whether the texts are negative prompts.
    """

    run: Run
    weighting: Weighting
    scale: float = 1.0
    negative: bool = False
    _kept: dict[Any, Condition] = field(default_factory=dict)

    def encode(self, prompt: Prompt, part: int = 0, step: int = 0, steps: int = 1000) -> Condition:
        """Condition of one row for a prompt at a step; of a composition, for one of its parts.

        The same object wherever the text is the same.
        """
        lines = tuple(line_at(each.content, step, steps) for each in prompt.parts)
        if prompt.joined == "compose":
            return self.line(lines[part])
        key = (lines, prompt)
        if key not in self._kept:
            weights = [each.weight for each in prompt.parts]
            found = [self.line(line) for line in lines]
            joined = self._blend if prompt.joined == "blend" else self._concat
            self._kept[key] = joined(found, weights, prompt.normalised)
        return self._kept[key]

    def line(self, line: Line) -> Condition:
        """Condition of one row with as many chunks as the line has."""
        if line not in self._kept:
            self._kept[line] = self._line(line)
        return self._kept[line]

    def padded(self, condition: Condition, length: int) -> Condition:
        """A condition filled up with empty chunks to ``length`` tokens; zeros stay zeros."""
        missing = length - condition.tokens.shape[1]
        if missing <= 0:
            return condition
        empty = self.line(()).tokens
        if not bool(condition.tokens.any()):
            empty = torch.zeros_like(empty)
        filling = empty.repeat(condition.tokens.shape[0], missing // empty.shape[1], 1).to(condition.tokens)
        mask = condition.mask
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], filling.shape[1])], dim=1)
        return replace(condition, tokens=torch.cat([condition.tokens, filling], dim=1), mask=mask)

    # One line.

    def _line(self, line: Line) -> Condition:
        tokenizers = self.run.backbone.tokenizers()
        chunks = [chunks_of(tokenizer, line) for tokenizer in tokenizers]
        # Learned words can have different numbers of vectors in the two encoders of Stable Diffusion XL.
        count = max(len(each) for each in chunks)
        filled = [
            (*each, *[empty_chunk(tokenizer)] * (count - len(each)))
            for each, tokenizer in zip(chunks, tokenizers, strict=True)
        ]
        weights = [1.0 if piece is None else 1 + (piece.weight - 1) * self.scale for piece in line]
        condition = self._encoded(filled)
        tokens = condition.tokens
        if any(weight != 1 for weight in weights):
            factors = self._of_tokens(filled, [*weights, 1.0])
            tokens = self._multiplied(tokens, factors) if self.weighting == "a1111" else self._faded(filled, weights)
        return self._row(condition, tokens)

    def _encoded(self, chunks: list[tuple[Chunk, ...]], keep: torch.Tensor | None = None) -> Condition:
        """All chunks of a line, one row each."""
        ids = [torch.tensor([chunk.ids for chunk in each]) for each in chunks]
        run = self.run
        return run.backbone.encode_ids(ids, self.negative, run.size, run.clip_skip, keep)

    def _of_tokens(self, chunks: list[tuple[Chunk, ...]], values: list[float]) -> list[torch.Tensor]:
        """[chunks, 77, 1] for each encoder: the value of each token's piece, the last value for those of none."""
        device, kind = self.run.device, torch.float32
        found = []
        for each in chunks:
            rows = [[values[piece] if piece != NONE else values[-1] for piece in chunk.pieces] for chunk in each]
            found.append(torch.tensor(rows, device=device, dtype=kind)[..., None])
        return found

    def _multiplied(self, tokens: torch.Tensor, factors: list[torch.Tensor]) -> torch.Tensor:
        found = []
        for states, factor in zip(tokens.float().split(self.run.backbone.text_widths(), dim=-1), factors, strict=True):
            weighed = states * factor
            before, after = states.mean((1, 2), keepdim=True), weighed.mean((1, 2), keepdim=True)
            least = _ROUNDING * states.abs().mean((1, 2), keepdim=True)
            known = (before.abs() > least) & (after.abs() > least)
            weighed = torch.where(known, weighed * (before / after), weighed)
            # Chunks that nothing weighs stay as they are, bit for bit.
            found.append(torch.where((factor != 1).any(1, keepdim=True), weighed, states))
        return torch.cat(found, dim=-1).to(tokens)

    def _faded(self, chunks: list[tuple[Chunk, ...]], weights: list[float]) -> torch.Tensor:
        """Compel's: from the empty prompt, and averaged with the prompt without what weighs little."""
        factors = self._of_tokens(chunks, [*weights, 1.0])
        total, states = 1.0, self._from_empty(chunks, factors)
        found = states
        for number, weight in enumerate(weights):
            if weight < 1:
                hidden = [float(other != number) for other in range(len(weights))]
                # Padding is the same for both encoders, and so is the place of every token.
                keep = self._of_tokens(chunks, [*hidden, 1.0])[0][..., 0].long()
                share = math.tan((1 - max(weight, _SMALLEST)) * math.pi / 2)
                found = found + share * self._from_empty(chunks, factors, keep)
                total += share
        return (found / total).to(states)

    def _from_empty(
        self, chunks: list[tuple[Chunk, ...]], factors: list[torch.Tensor], keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        tokens = self._encoded(chunks, keep).tokens.float()
        empty = self.line(()).tokens.float()
        widths = self.run.backbone.text_widths()
        factor = torch.cat([part.expand(-1, -1, width) for part, width in zip(factors, widths, strict=True)], dim=-1)
        return torch.where(factor == 1, tokens, empty + (tokens - empty) * factor)

    def _row(self, condition: Condition, tokens: torch.Tensor) -> Condition:
        """Chunks side by side in one row."""
        pooled = None if condition.pooled is None else condition.pooled[:1]
        time_ids = None if condition.time_ids is None else condition.time_ids[:1]
        return Condition(tokens.to(condition.tokens).flatten(0, 1)[None], None, pooled, time_ids)

    # Several prompts.

    def _blend(self, found: list[Condition], weights: list[float], normalised: bool) -> Condition:
        total = sum(weights) if normalised else 1.0
        # At scale 0 a blend is its first prompt.
        shares = [weight / total * self.scale + (1 - self.scale) * (at == 0) for at, weight in enumerate(weights)]
        length = max(condition.tokens.shape[1] for condition in found)
        parts = list(zip((self.padded(condition, length) for condition in found), shares, strict=True))
        tokens = torch.stack([condition.tokens * share for condition, share in parts]).sum(0)
        pools = [condition.pooled * share for condition, share in parts if condition.pooled is not None]
        return replace(parts[0][0], tokens=tokens, pooled=torch.stack(pools).sum(0) if pools else None)

    def _concat(self, found: list[Condition], weights: list[float], normalised: bool) -> Condition:
        parts = []
        for condition, weight in zip(found, weights, strict=True):
            tokens = condition.tokens
            if weight != 1:
                empty = self.padded(self.line(()), tokens.shape[1]).tokens
                tokens = empty + (tokens - empty) * (1 + (weight - 1) * self.scale)
            parts.append(tokens)
        return replace(found[0], tokens=torch.cat(parts, dim=1))
