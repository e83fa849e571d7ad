"""What a control may do at an attention layer: typed operations in one fixed order.

``edit_input`` -> project -> ``affine`` -> ``route`` -> ``extend`` and ``bias`` -> ``mix_values`` -> attention ->
``stream`` -> ``identity``. A control *records* operations in its ``attention(call)``; the dispatcher
(`controlroom.backbones.attention`) carries them out in that order, whatever the order of the controls. Everything runs
on fused attention; probabilities are materialised, in float32, only where a control reads them.

Why values are mixed and probabilities never written: the edits of Prompt-to-Prompt are linear in V, since nothing is
normalised again after them. With M the matrix of the edit, (P M) V = P (M V).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from controlroom.core.branch import Layout
from controlroom.core.sites import Site

if TYPE_CHECKING:
    import torch

    from controlroom.core.control import Control
    from controlroom.core.step import Step

Operand = Literal["q", "k", "v"]
Lookup = Callable[[str], "torch.Tensor"]
"""Gives the operand's rows of another branch of the same pass."""


@dataclass(frozen=True)
class Extension:
    """More keys and values for one branch; exactly one of ``tokens``, (``k``, ``v``) and ``branch`` is given."""

    tokens: torch.Tensor | None = None
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    branch: str | None = None
    bias: torch.Tensor | None = None
    weight: float = 1.0
    share: float = 1.0


@dataclass(frozen=True)
class ValueTerm:
    """One term of ``mix_values``: P(source) · matrix · (weights ⊙ V(branch)).

    Attributes:
        source: branch whose queries and keys give the probabilities.
        weights: [L] or [rows, L], a factor for each of the branch's own values; None: 1.
        matrix: [L, L] or [rows, L, L]; row i says which values the probability of the source's key i is multiplied
            with (Prompt-to-Prompt's mapper); None: the identity.
    """

    source: str
    weights: torch.Tensor | None = None
    matrix: torch.Tensor | None = None


@dataclass(frozen=True)
class Stream:
    """A further attention of the branch's queries to other keys and values."""

    k: torch.Tensor | None
    v: torch.Tensor | None
    scale: float | torch.Tensor = 1.0
    query_mask: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    mode: Literal["add", "replace"] = "add"
    tokens: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Number of keys."""
        given = self.k if self.tokens is None else self.tokens
        assert given is not None
        return given.shape[1]


@dataclass(frozen=True)
class Reader:
    """A request for probabilities."""

    branch: str
    sink: Callable[[torch.Tensor], None]
    edited: bool


@dataclass
class Operations:
    """What all controls asked for at one layer in one pass."""

    affines: list[tuple[Operand, str, Callable[[torch.Tensor, Lookup], torch.Tensor]]] = field(default_factory=list)
    routes: dict[str, dict[Operand, str]] = field(default_factory=dict)
    extensions: dict[str, list[Extension]] = field(default_factory=dict)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    mixes: dict[str, tuple[ValueTerm, ...]] = field(default_factory=dict)
    streams: dict[str, list[Stream]] = field(default_factory=dict)
    identities: set[str] = field(default_factory=set)
    readers: list[Reader] = field(default_factory=list)
    edited: bool = False

    @property
    def empty(self) -> bool:
        """Whether nothing was asked, so that the layer's own processor runs untouched."""
        return not (self.edited or self.readers or self.streams or self.identities or self.splits or self.affines)

    @property
    def splits(self) -> bool:
        """Whether branches attend to different things, so that the batch is taken apart."""
        return bool(self.routes or self.extensions or self.biases or self.mixes)


class LayerCall:
    """One execution of a layer in a pass: where, at which step, for which branches.

    Attributes:
        site: where.
        step: the step of the run; ``step.memory(self)`` is the control's memory.
        layout: rows of this pass. A branch may be absent (an energy pass has few): test ``name in call``.
        phase: ``main``, ``energy`` or ``probe``.
    """

    def __init__(self, site: Site, step: Step, layout: Layout, phase: str) -> None:
        self.site, self.step, self.layout, self.phase = site, step, layout, phase

    def __contains__(self, branch: str) -> bool:
        return branch in self.layout

    @property
    def names(self) -> tuple[str, ...]:
        """Branches of this pass."""
        return self.layout.names

    def reached(self, control: Control) -> tuple[str, ...]:
        """Branches of this pass that the control reaches (those that denoise the picture or a variant of it)."""
        return tuple(name for name in self.layout.names if self.step.run.reaches(control, name))

    def rows(self, branch: str) -> slice:
        """Static slice of a branch's rows."""
        return self.layout.rows(branch)


class AttentionCall(LayerCall):
    """One execution of one attention layer, as a control sees it.

    Attributes:
        site, step, layout, phase: as in `LayerCall`; ``site.kind`` is ``self`` or ``cross``.
        heads: number of attention heads.
        context: [rows, length, width] of a cross-attention layer; None for self-attention. Read-only.
    """

    def __init__(
        self,
        site: Site,
        step: Step,
        layout: Layout,
        phase: str,
        hidden: torch.Tensor,
        context: torch.Tensor | None,
        heads: int,
    ) -> None:
        super().__init__(site, step, layout, phase)
        self.context, self.heads = context, heads
        self.operations = Operations()
        self._hidden = hidden

    @property
    def hidden(self) -> torch.Tensor:
        """[rows, tokens, channels] input of the layer, with the edits so far. Read-only; see `edit_input`."""
        return self._hidden

    def input_of(self, branch: str) -> torch.Tensor:
        """[rows of the branch, tokens, channels] input of the layer. Read-only."""
        return self._hidden[self.rows(branch)]

    # The operations, in the order in which they are carried out.

    def edit_input(self, branch: str, hidden: torch.Tensor) -> None:
        """Replace a branch's input [rows or 1, tokens, channels] before it is projected (for cross: the queries')."""
        edited = self._hidden.clone()
        edited[self.rows(branch)] = hidden
        self._hidden = edited
        self.operations.edited = True

    def affine(self, branch: str, operand: Operand, function: Callable[[torch.Tensor, Lookup], torch.Tensor]) -> None:
        """Change a branch's projected q, k or v: ``function(x, lookup)`` with x [rows, heads, tokens, width].

        ``lookup(name)`` gives the same operand of another branch, so that statistics can be taken from there.
        """
        self.rows(branch)
        self.operations.affines.append((operand, branch, function))

    def route(self, branch: str, q: str | None = None, k: str | None = None, v: str | None = None) -> None:
        """Take a branch's queries, keys or values from another branch (with one row or as many).

        Raises:
            ValueError: another control routed the same operand elsewhere; claims find this before a run.
        """
        taken = self.operations.routes.setdefault(branch, {})
        operands: tuple[tuple[Operand, str | None], ...] = (("q", q), ("k", k), ("v", v))
        for operand, source in operands:
            if source is None:
                continue
            self.rows(source)
            if taken.get(operand, source) != source:
                raise ValueError(f"{operand} of {branch!r} at {self.site.name} is routed to two branches")
            taken[operand] = source

    def extend(
        self,
        branch: str,
        tokens: torch.Tensor | None = None,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        source: str | None = None,
        bias: torch.Tensor | None = None,
        weight: float = 1.0,
        share: float = 1.0,
    ) -> None:
        """Let a branch attend to more keys and values beside its own.

        Args:
            branch: the branch that attends.
            tokens: [rows or 1, L, channels] projected with this layer's own key and value weights.
            k: [rows or 1, L, heads * width] keys, already projected.
            v: values, already projected, as ``k``.
            source: name of a branch whose keys and values (after ``affine``) are joined.
            bias: broadcastable to [rows, heads, queries, L], added to the logits of these keys.
            weight: factor on the unnormalised attention to these keys (log(weight) is added to their logits), so that 0
                is exactly their absence. Must be at least 0. How close small values come to absence depends on the
                logits; use ``share`` where it must not.
            share: 0 to 1, part of the attention won by these keys that they keep; the rest goes back to the branch's
                own keys, as it is divided among them. The output moves linearly with it, from their absence to all.
        """
        if sum((tokens is not None, k is not None and v is not None, source is not None)) != 1:
            raise ValueError("extend takes exactly one of tokens, (k and v), and source")
        if source is not None:
            self.rows(source)
        if not 0 <= share <= 1:
            raise ValueError(f"share is {share}; expected 0 to 1")
        if weight > 0 and share > 0:
            extension = Extension(tokens=tokens, k=k, v=v, branch=source, bias=bias, weight=weight, share=share)
            self.operations.extensions.setdefault(branch, []).append(extension)

    def bias(self, branch: str, bias: torch.Tensor) -> None:
        """Add to the logits of a branch's own keys; broadcastable to [rows, heads, queries, keys]. Biases add up."""
        self.rows(branch)
        held = self.operations.biases.get(branch)
        self.operations.biases[branch] = bias if held is None else held + bias

    def mix_values(self, branch: str, terms: tuple[ValueTerm, ...]) -> None:
        """Output of a branch = sum over terms of P(source) · matrix · (weights ⊙ V(branch)); see `ValueTerm`.

        Raises:
            ValueError: another control mixed the same values; claims find this before a run.
        """
        if branch in self.operations.mixes:
            raise ValueError(f"values of {branch!r} at {self.site.name} are mixed twice")
        for term in terms:
            self.rows(term.source)
        self.operations.mixes[branch] = terms

    def stream(
        self,
        branch: str,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        scale: float | torch.Tensor = 1.0,
        query_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        mode: Literal["add", "replace"] = "add",
        tokens: torch.Tensor | None = None,
    ) -> None:
        """Attend with the same queries to other keys and values, and join the result.

        Args:
            branch: the branch that attends.
            k: [rows or 1, L, heads * width] keys, already projected.
            v: values as ``k``.
            scale: factor; a tensor is broadcast to [rows, queries, 1].
            query_mask: [queries], [rows, queries] or [rows, queries, 1] in [0, 1]; where it is 0 nothing is joined.
            bias: broadcastable to [rows, heads, queries, L].
            mode: ``add``: out + scale·mask·stream. ``replace``: out·(1 − Σ scale·mask) + Σ scale·mask·stream, the sums
                over all replacing streams of the branch.
            tokens: [rows or 1, L, channels] projected with this layer's own key and value weights, instead of ``k`` and
                ``v``: other words, say.
        """
        self.rows(branch)
        if (tokens is None) != (k is not None and v is not None):
            raise ValueError("stream takes either tokens, or k and v")
        stream = Stream(k, v, scale, query_mask, bias, mode, tokens)
        self.operations.streams.setdefault(branch, []).append(stream)

    def identity(self, branch: str) -> None:
        """The branch's output is its values: every query attends to itself only. Self-attention only; comes last."""
        if self.site.kind != "self":
            raise ValueError(f"identity needs self-attention; {self.site.name} is cross-attention")
        self.rows(branch)
        self.operations.identities.add(branch)

    def read(self, branch: str, sink: Callable[[torch.Tensor], None], edited: bool = True) -> None:
        """Ask for probabilities: ``sink(p)`` with p [rows, heads, queries, keys], float32, not to be written.

        They are the branch's, after ``affine``, ``route``, ``extend`` and ``bias``; with ``edited`` (the default)
        also after ``mix_values``. In an energy pass they carry gradients.
        """
        self.rows(branch)
        self.operations.readers.append(Reader(branch, sink, edited))


class FeatureCall(LayerCall):
    """One execution of a resnet, transformer, up- or downsampler or norm, as a control sees it.

    Attributes:
        site, step, layout, phase: as in `LayerCall`.
        input: [rows, channels, h, w] first input of the module. Read-only.
        hidden: [rows, channels, h, w] output of the module, with the changes of controls before. Read-only: return a
            new tensor from ``feature``.
    """

    def __init__(
        self, site: Site, step: Step, layout: Layout, phase: str, input: torch.Tensor, hidden: torch.Tensor
    ) -> None:
        super().__init__(site, step, layout, phase)
        self.input, self.hidden = input, hidden
