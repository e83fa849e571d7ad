"""Prompt weighting: more or less of a word, in the notation of A1111's web UI or of the library Compel.

The idea: a text encoder gives one state for each token; a word is weighed by moving its states. The notations also put
prompts together: in chunks of 75 tokens, one behind the other; as a weighted sum of guidances (AND); as an average
(blend); and in turn, step by step. There is no paper; both are described by their authors.

The run's own prompt and negative prompt are read in the notation (or ``text`` and ``negative`` of the control). All
else sees their words: a control that looks for "cat" finds it at its tokens, also in the second chunk.

Every text of the run is filled up to as many chunks as the longest has, those of other controls too, so that all rows
share a pass. AND is A1111's sum: uncond + g · Σ wᵢ · (condᵢ − uncond); each further prompt has a branch of its own,
which spatial and image-prompt controls reach. It is written as an addition to the base combination, so that it does not
exclude another one. Without guidance it is the weighted mean of the predictions.

Deviations from the two are named in `controlroom.controls.notation_a1111`, `notation_compel`, `prompt_chunks` and
`weighted_text`. A schedule switches after exactly as many steps as it says (in A1111's sampler one step later).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field

from controlroom.backbones.words import PlacedPrompt
from controlroom.controls.placed_words import RunTexts, WeightedPrompt
from controlroom.controls.prompt_notation import Dialect, parse
from controlroom.controls.prompt_tree import Prompt, Text, words_of
from controlroom.controls.weighted_text import TextEncoder, Weighting
from controlroom.core.branch import IMAGE, Branch, Condition, ConditionSource
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline, Texts
from controlroom.core.errors import ConflictError, InputError
from controlroom.core.plan import Plan
from controlroom.core.run import Run
from controlroom.core.step import Step


class PromptWeighting(Control):
    """Read the prompts in a notation with weights, chunks and schedules.

    Args:
        text: the prompt with its notation; a list has one for each prompt. None: the run's own prompt is read so. With
            it the run's prompt is left out, or has the same words.
        dialect: ``a1111``: ``(cat:1.3) [dog] BREAK a AND b [x:y:0.5] [x|y]``; ``compel``: ``cat++ (a dog)0.8
            ("a", "b").blend(1, 1)``.
        negative: the negative prompt with its notation, likewise.
        scale: how much of the weights: each becomes 1 + (weight − 1) · scale, and the further prompts of AND and blend
            fade out. 0: the words alone, without chunks and schedules.
        weighting: how words are weighed, ``a1111`` or ``compel``; None: as the dialect's own library does.

    Raises:
        InputError: at planning, brackets that do not match and numbers that are none, with their position; embeddings
            or a second prompt, which this does not read; AND in a negative prompt. At the start, words that another
            control looks for and that have no one place.
        ConflictError: at the start, prompts of several chunks beside a control that compares the tokens of two prompts.
    """

    type: Literal["prompt_weighting"] = Field(default="prompt_weighting", kw_only=True)
    text: str | list[str] | None = None
    dialect: Dialect = "a1111"
    negative: str | list[str] | None = None
    scale: float = Field(default=1.0, ge=0)
    weighting: Weighting | None = None

    # Planning.

    def read(self, texts: Texts) -> Texts:
        """The words of prompts and negative prompts."""
        for name, taken in (("prompt", True), ("negative_prompt", self.negative is not None)):
            if taken and name in texts.embeds:
                raise InputError(f"{self.label} reads text, but {name}_embeds was given. Give {name} as text.")
            if name in texts.seconds:
                raise InputError(
                    f"{self.label} gives both text encoders the same words. Leave {name}_2 out, or remove the control."
                )
        group = RunTexts()
        prompts = self._read(self.text, texts.prompts, "prompt", group)
        negatives = self._read(self.negative, texts.negatives, "negative prompt", group)
        return replace(texts, prompts=tuple(text or "" for text in prompts), negatives=tuple(negatives))

    def _read(
        self, given: str | list[str] | None, present: Sequence[str | None], name: str, group: RunTexts
    ) -> list[str | None]:
        """What the run is told: words that know their tree, or words alone where the control is dropped."""
        listed = [given] if isinstance(given, str) else given
        if listed is not None and (not listed or len(present) % len(listed)):
            raise InputError(
                f"{self.label} has {len(listed)} texts for {len(present)} pictures. Give one, or one for each."
            )
        trees: dict[str, Prompt] = {}
        found: list[str | None] = []
        for index, own in enumerate(present):
            text = own if listed is None else listed[index * len(listed) // len(present)]
            # What another control has read stays as it is: the two are a conflict that is found later.
            if isinstance(own, PlacedPrompt):
                found.append(own)
                continue
            if text is None:
                found.append(text)
                continue
            if text not in trees:
                trees[text] = self._parsed(text, name)
            words = words_of(trees[text])
            if own and own is not text and own.split() != words.split():
                raise InputError(
                    f"The {name} {own!r} has other words than the one of {self.label}, {words!r}. Leave the run's out, "
                    "or give it these words."
                )
            found.append(words if self.scale == 0 else WeightedPrompt.of(trees[text], group, self.label))
        return found

    def _parsed(self, text: str, name: str) -> Prompt:
        try:
            tree = parse(text, self.dialect)
        except InputError as error:
            raise InputError(f"{self.label}, {name}: {error}") from error
        if name != "prompt" and tree.joined == "compose" and len(tree.parts) > 1:
            raise InputError(f"{self.label}: AND combines prompts, and cannot stand in a {name}: {text!r:.80}.")
        return tree

    def declare(self, outline: Outline) -> Declaration:
        """A branch for each further prompt of AND; claims on what the branches are told."""
        prompts = [self._weighted(text) for text in outline.prompts]
        for prompt in prompts:
            prompt.texts.steps = outline.steps
        parts = max(_parts(prompt.tree) for prompt in prompts)
        told = {"cond"} if len(prompts[0].texts.prompts) <= len(prompts) else {"cond", "uncond"}
        claims = [Claim("condition", "own", branches=frozenset(told))]
        notes = []
        if parts > 1:
            claims.append(Claim("prediction", "add"))
            notes.append(f"{parts} prompts are combined by AND, each in a row of its own.")
        if any(prompt.changes for prompt in prompts):
            notes.append(f"the prompt changes during the {outline.steps} steps.")
        return Declaration(
            branches=tuple(Branch(_branch(part), purpose="picture") for part in range(1, parts)),
            claims=tuple(claims),
            notes=tuple(notes),
        )

    def _weighted(self, text: str) -> WeightedPrompt:
        if isinstance(text, WeightedPrompt):
            return text
        return WeightedPrompt.of(self._parsed(text, "prompt"), RunTexts(), self.label)

    # A run.

    def prepare(self, run: Run) -> torch.Tensor | None:
        """Encode every text, and tell the branches. Its memory: the weights of AND, [prompts, images]."""
        prompts = [self._weighted(text) for text in run.prompts]
        texts = prompts[0].texts
        chunks = max(texts.chunks(tokenizer) for tokenizer in run.backbone.tokenizers())
        length = chunks * int(run.backbone.tokenizers()[0].model_max_length)
        positive, negative = self._encoder(run, False), self._encoder(run, True)
        told = _Told(run, length)
        parts = max(_parts(prompt.tree) for prompt in prompts)
        if parts > 1 or chunks > 1 or not all(_plain(prompt.tree) for prompt in prompts):
            for part in range(parts):
                told.tell(_branch(part), [prompt.tree for prompt in prompts], positive, part)
        if "uncond" in run.plan.branches:
            negatives = [text.tree if isinstance(text, WeightedPrompt) else None for text in run.negative_prompts]
            if any(tree is not None and not _plain(tree) for tree in negatives) or (chunks > 1 and all(negatives)):
                told.tell("uncond", [tree or _NOTHING for tree in negatives], negative)
        if chunks > 1:
            self._check_others(run, chunks)
            plan = run.plan
            shared = {name for name in plan.branches if _pass(plan, name) == _pass(plan, "cond")}

            def filling(branch: str, condition: Condition) -> Condition:
                encoder = negative if plan.branches[branch].role == "uncond" else positive
                return encoder.padded(condition, length) if branch in shared else condition

            run.fill_texts(filling)
        if parts == 1:
            return None
        return torch.tensor([_weights(prompt.tree, parts, self.scale) for prompt in prompts]).T

    def _encoder(self, run: Run, negative: bool) -> TextEncoder:
        return TextEncoder(run, self.weighting or self.dialect, self.scale, negative)

    def _check_others(self, run: Run, chunks: int) -> None:
        """A control that compares the tokens of two prompts knows those of one chunk."""
        for entry in run.plan.controls:
            along = [b for b in entry.declaration.branches if b.role == "cond" and b.state != IMAGE]
            if along and any(site.kind == "cross" for site in entry.declaration.attention):
                raise ConflictError(
                    f"{self.label} and {entry.label} cannot run together with these prompts: {entry.label} compares "
                    f"the tokens of two prompts, which must be of one chunk each, and here are {chunks}. Shorten the "
                    "prompts (BREAK begins a chunk), or remove one of the controls."
                )

    # A step.

    def guide(self, step: Step, state: str) -> torch.Tensor | None:
        """The further prompts of AND."""
        given: torch.Tensor | None = step.memory(self)
        if given is None or state != IMAGE:
            return None
        parts = [step.eps[_branch(part)] for part in range(len(given))]
        weights = given.repeat(1, parts[0].shape[0] // given.shape[1]).to(parts[0])[:, :, None, None, None]
        uncond = step.role(state, "uncond")
        if uncond is None or step.i in step.run.plan.unguided:
            total = weights.sum(0)
            mean = sum(weight * part for weight, part in zip(weights, parts, strict=True)) / total.where(total > 0, 1.0)
            return torch.where(total > 0, mean - parts[0], 0.0)
        base = step.eps[uncond]
        # The base combination holds the first prompt once.
        weights = torch.cat([weights[:1] - 1, weights[1:]])
        guided = torch.stack([weight * (part - base) for weight, part in zip(weights, parts, strict=True)])
        return step.run.guidance.scale * guided.sum(0)


@dataclass
class _Told:
    """Gives branches their conditions."""

    run: Run
    length: int

    def tell(self, branch: str, trees: list[Prompt], encoder: TextEncoder, part: int = 0) -> None:
        """One row for each picture; a function of the step where a text changes."""
        run = self.run
        known: dict[tuple[int, ...], Condition] = {}
        steps = []
        for step in range(run.n):
            rows = [encoder.encode(tree, part if part < len(tree.parts) else 0, step, run.n) for tree in trees]
            key = tuple(map(id, rows))
            if key not in known:
                known[key] = self._joined(rows, encoder)
            steps.append(known[key])
        source: ConditionSource = steps[0] if len(known) == 1 else lambda step: steps[min(step.i, len(steps) - 1)]
        # A control before this one in the list may have passed on what the branch was told until now.
        before = run.conditions.get(branch)
        held = [name for name, other in run.conditions.items() if other is before]
        for name in {*held, branch}:
            run.set_condition(name, source)

    def _joined(self, rows: list[Condition], encoder: TextEncoder) -> Condition:
        rows = [encoder.padded(row, self.length) for row in rows]
        tokens = torch.cat([row.tokens for row in rows])
        pooled = [row.pooled for row in rows if row.pooled is not None]
        # The sizes that Stable Diffusion XL is told are the run's.
        cond = self.run.conditions.get("cond")
        time_ids = cond.time_ids if isinstance(cond, Condition) else rows[0].time_ids
        return Condition(tokens, None, torch.cat(pooled) if pooled else None, time_ids)


_NOTHING = parse("", "a1111")


def _pass(plan: Plan, branch: str) -> tuple[object, ...]:
    """Branches with the same share a pass."""
    return plan.network_of(branch), plan.hw_of(branch)


def _branch(part: int) -> str:
    return "cond" if part == 0 else f"and/{part + 1}"


def _parts(tree: Prompt) -> int:
    return len(tree.parts) if tree.joined == "compose" else 1


def _weights(tree: Prompt, parts: int, scale: float) -> list[float]:
    """Weights of AND; towards scale 0 the first prompt becomes 1, the others nothing."""
    given = [part.weight for part in tree.parts] if tree.joined == "compose" else [1.0]
    scaled = [1 + (given[0] - 1) * scale, *(weight * scale for weight in given[1:])]
    return scaled + [0.0] * (parts - len(scaled))


def _plain(tree: Prompt) -> bool:
    """Whether a prompt says nothing that its words do not."""
    nodes = [node for part in tree.parts for node in part.content]
    return len(tree.parts) == 1 and tree.joined == "compose" and all(isinstance(node, Text) for node in nodes)
