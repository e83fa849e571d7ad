"""Attention with the operations that controls recorded, stage by stage, in their fixed order.

Scaled-dot-product attention as diffusers' `AttnProcessor2_0`, in float32 where the checkpoint asks for
``upcast_attention`` (diffusers' processor ignores that); probabilities in float32. Operations and their order:
`controlroom.core.attention`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from controlroom.core.attention import AttentionCall, Extension, Operations, Stream, ValueTerm


def attend(attn: Any, call: AttentionCall, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Carry out the recorded operations: [rows, tokens, heads * width] before the output projection."""
    return _Attend(attn, call, attention_mask).run()


class _Attend:
    """One execution of the operations, stage by stage."""

    def __init__(self, attn: Any, call: AttentionCall, attention_mask: torch.Tensor | None) -> None:
        self.attn, self.call, self.layout = attn, call, call.layout
        self.operations: Operations = call.operations
        self.heads: int = attn.heads
        hidden = call.hidden
        context = hidden if call.context is None else call.context
        self.dtype = hidden.dtype
        self.q = self.split(attn.to_q(hidden))
        self.k = self.split(attn.to_k(context))
        self.v = self.split(attn.to_v(context))
        if attn.norm_q is not None:
            self.q = attn.norm_q(self.q)
        if attn.norm_k is not None:
            self.k = attn.norm_k(self.k)
        self.mask = None
        if attention_mask is not None:
            prepared = attn.prepare_attention_mask(attention_mask, context.shape[1], hidden.shape[0])
            self.mask = prepared.view(hidden.shape[0], self.heads, -1, prepared.shape[-1])

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, tokens, heads * width] -> [rows, heads, tokens, width]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def run(self) -> torch.Tensor:
        self.affine()
        operations = self.operations
        self.branch_qkv: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]] = {}
        self.shares: dict[str, torch.Tensor] = {}
        if operations.splits:
            for name in self.layout.names:
                self.branch_qkv[name] = self.of_branch(name)
            out = self.attend_apart()
        else:
            out = self.sdpa(self.q, self.k, self.v, self.mask)
        for reader in operations.readers:
            reader.sink(self.probabilities(reader.branch, reader.edited))
        if operations.streams:
            out = self.with_streams(out)
        for name in operations.identities:
            out = self.replace_rows(out, name, self.values_of(name))
        return out.transpose(1, 2).flatten(2).to(self.dtype)

    # affine

    def affine(self) -> None:
        for operand, name, function in self.operations.affines:
            whole: torch.Tensor = getattr(self, operand)
            rows = self.layout.rows(name)

            def lookup(branch: str, whole: torch.Tensor = whole) -> torch.Tensor:
                return whole[self.layout.rows(branch)]

            setattr(self, operand, self.replace_rows(whole, name, function(whole[rows], lookup)))

    def replace_rows(self, whole: torch.Tensor, name: str, part: torch.Tensor) -> torch.Tensor:
        """A new tensor with a branch's rows replaced; out of place, so that gradients and readers stay right."""
        rows = self.layout.rows(name)
        part = part.to(whole.dtype).expand_as(whole[rows])
        return torch.cat([whole[: rows.start], part, whole[rows.stop :]])

    # route, extend, bias

    def of_branch(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Queries, keys, values and bias with which a branch attends."""
        routes = self.operations.routes.get(name, {})
        q = self.rows_from(self.q, routes.get("q", name), name)
        k = self.rows_from(self.k, routes.get("k", name), name)
        v = self.rows_from(self.v, routes.get("v", name), name)
        bias = None if self.mask is None else self.mask[self.layout.rows(name)]
        own = self.operations.biases.get(name)
        if own is not None:
            bias = own.to(q) if bias is None else bias + own.to(q)
        lengths, extensions = [k.shape[2]], self.operations.extensions.get(name, ())
        for extension in extensions:
            k, v, bias = self.extended(name, q, k, v, bias, extension)
            lengths.append(k.shape[2] - sum(lengths))
        if any(extension.share < 1 for extension in extensions):
            shares = [1.0, *(extension.share for extension in extensions)]
            parts = [q.new_full((length,), share) for length, share in zip(lengths, shares, strict=True)]
            self.shares[name] = torch.cat(parts)
        return q, k, v, bias

    def rows_from(self, whole: torch.Tensor, source: str, name: str) -> torch.Tensor:
        part = whole[self.layout.rows(source)]
        return part if source == name else self.match(part, name)

    def match(self, part: torch.Tensor, name: str) -> torch.Tensor:
        """Rows of another branch, one for each row of ``name``."""
        size = self.layout.size(name)
        if part.shape[0] not in (1, size):
            raise ValueError(f"{part.shape[0]} rows cannot be given to the {size} rows of branch {name!r}")
        return part.expand(size, *part.shape[1:])

    def extended(
        self,
        name: str,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None,
        extension: Extension,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        if extension.branch is not None:
            rows = self.layout.rows(extension.branch)
            more_k, more_v = self.k[rows], self.v[rows]
        elif extension.tokens is not None:
            tokens = extension.tokens.to(self.dtype)
            more_k, more_v = self.split(self.attn.to_k(tokens)), self.split(self.attn.to_v(tokens))
        else:
            assert extension.k is not None and extension.v is not None
            more_k, more_v = self.split(extension.k.to(self.dtype)), self.split(extension.v.to(self.dtype))
        more_k, more_v = self.match(more_k, name), self.match(more_v, name)
        more_bias = None if extension.bias is None else extension.bias.to(q)
        if extension.weight != 1.0:
            shift = math.log(extension.weight)
            more_bias = q.new_full((1, 1, 1, 1), shift) if more_bias is None else more_bias + shift
        if bias is not None or more_bias is not None:
            length, more = k.shape[2], more_k.shape[2]
            left = q.new_zeros(1, 1, 1, 1) if bias is None else bias
            right = q.new_zeros(1, 1, 1, 1) if more_bias is None else more_bias
            left, right = _four(left), _four(right)
            shape = torch.broadcast_shapes(left.shape[:3], right.shape[:3])
            bias = torch.cat([left.expand(*shape, length), right.expand(*shape, more)], dim=-1)
        return torch.cat([k, more_k], dim=2), torch.cat([v, more_v], dim=2), bias

    # mix_values and attention

    def attend_apart(self) -> torch.Tensor:
        """Attention branch by branch; branches with as many keys share a call."""
        outs: dict[str, torch.Tensor] = {}
        groups: dict[tuple[int, bool], list[str]] = {}
        for name, (_, k, _, bias) in self.branch_qkv.items():
            if name in self.operations.mixes:
                outs[name] = self.mixed(name, self.operations.mixes[name])
            elif name in self.shares:
                outs[name] = self.shared(name)
            else:
                groups.setdefault((k.shape[2], bias is None), []).append(name)
        for (_, free), names in groups.items():
            parts = [self.branch_qkv[name] for name in names]
            q, k, v = (torch.cat([part[i] for part in parts]) for i in range(3))  # type: ignore[misc]
            bias = None
            if not free:
                # As small as it was given: heads times queries times keys of a wide layer are gigabytes.
                biases = [_four(p[3]) for p in parts if p[3] is not None]
                shape = (*torch.broadcast_shapes(*(b.shape[1:3] for b in biases)), k.shape[2])
                sized = zip(biases, parts, strict=True)
                bias = torch.cat([b.expand(part[0].shape[0], *shape) for b, part in sized])
            joined = self.sdpa(q, k, v, bias)
            outs.update(zip(names, joined.split([part[0].shape[0] for part in parts]), strict=True))
        return torch.cat([outs[name] for name in self.layout.names])

    def shared(self, name: str) -> torch.Tensor:
        """Joined keys give back a part of what they won: P(share ⊙ V) + (P(1 − share)) · own attention."""
        (q, k, v, bias), share = self.branch_qkv[name], self.shares[name][:, None]
        own = self.k.shape[2]
        # One more column of values counts what is given back.
        given_back = (1 - share).expand(*v.shape[:2], -1, 1)
        out = self.sdpa(q, k, torch.cat([v * share, given_back], dim=-1), bias)
        alone = self.sdpa(q, k[:, :, :own], v[:, :, :own], None if bias is None else _four(bias)[..., :own])
        return out[..., :-1] + out[..., -1:] * alone

    def mixed(self, name: str, terms: tuple[ValueTerm, ...]) -> torch.Tensor:
        """Sum over terms of P(source) · matrix · (weights ⊙ V(branch))."""
        own = self.branch_qkv[name][2]
        total: torch.Tensor | None = None
        for term in terms:
            q, k, _, bias = self.branch_qkv[term.source]
            q, k = self.match(q, name), self.match(k, name)
            value = own
            if term.weights is not None:
                value = term.weights.to(own).reshape(-1, 1, own.shape[2], 1) * value
            if term.matrix is not None:
                value = term.matrix.to(own).reshape(-1, 1, *term.matrix.shape[-2:]) @ value
            out = self.sdpa(q, k, value, bias)
            total = out if total is None else total + out
        assert total is not None, "mix_values needs at least one term"
        return total

    def sdpa(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.attn.upcast_attention:
            q, k, v = _wide(q), _wide(k), _wide(v)
        bias = None if bias is None else _four(bias).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=0.0, is_causal=False)

    # probabilities

    def probabilities(self, name: str, edited: bool) -> torch.Tensor:
        """[rows, heads, queries, keys] in float32, as the branch attends."""
        mix = self.operations.mixes.get(name) if edited else None
        if mix is None:
            return self.softmax(name, name)
        length = self.branch_qkv[name][2].shape[2]
        total: torch.Tensor | None = None
        for term in mix:
            part = self.softmax(term.source, name)
            if term.matrix is not None:
                part = part @ term.matrix.to(part).reshape(-1, 1, *term.matrix.shape[-2:])
            if term.weights is not None:
                part = part * term.weights.to(part).reshape(-1, 1, 1, length)
            total = part if total is None else total + part
        assert total is not None
        return total

    def softmax(self, source: str, name: str) -> torch.Tensor:
        if self.branch_qkv:
            q, k, _, bias = self.branch_qkv[source]
        else:
            rows = self.layout.rows(source)
            q, k, bias = self.q[rows], self.k[rows], None if self.mask is None else self.mask[rows]
        logits = (_wide(q) @ _wide(k).transpose(-1, -2)) * self.attn.scale
        if bias is not None:
            logits = logits + _four(bias).to(logits)
        found = logits.softmax(-1)
        if source in self.shares:
            own, kept = self.k.shape[2], found * self.shares[source]
            alone = logits[..., :own].softmax(-1) * (found - kept).sum(-1, keepdim=True)
            found = torch.cat([kept[..., :own] + alone, kept[..., own:]], dim=-1)
        return self.match(found, name)

    # stream and identity

    def with_streams(self, out: torch.Tensor) -> torch.Tensor:
        """Join every branch's streams; branches whose streams have as many keys share a call."""
        alike = self.alike_streams()
        if alike is not None:
            k, v, factor = alike
            return torch.add(out, self.sdpa(self.q, k, v, None), alpha=factor)
        parts: dict[tuple[str, int], torch.Tensor] = {}
        groups: dict[tuple[int, int], list[str]] = {}
        for name, streams in self.operations.streams.items():
            for number, stream in enumerate(streams):
                if stream.bias is None:
                    groups.setdefault((number, stream.length), []).append(name)
                else:
                    q, k, v = self.stream_qkv(name, stream)
                    parts[name, number] = self.sdpa(q, k, v, stream.bias.to(q))
        for (number, _), names in groups.items():
            each = [self.stream_qkv(name, self.operations.streams[name][number]) for name in names]
            q, k, v = (torch.cat([part[i] for part in each]) if len(each) > 1 else each[0][i] for i in range(3))
            joined = self.sdpa(q, k, v, None).split([part[0].shape[0] for part in each])
            parts.update({(name, number): part for name, part in zip(names, joined, strict=True)})
        pieces = []
        for name in self.layout.names:
            piece = out[self.layout.rows(name)]
            streams = self.operations.streams.get(name, [])
            pieces.append(_joined(piece, streams, [parts[name, i] for i in range(len(streams))]) if streams else piece)
        return torch.cat(pieces)

    def alike_streams(self) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """Keys, values and factor of all rows, where every branch has one stream and all are added alike.

        The batch then stays whole, as an IP-Adapter alone leaves it. None: it has to be taken apart.
        """
        streams = [self.operations.streams.get(name, []) for name in self.layout.names]
        if self.branch_qkv or any(len(each) != 1 for each in streams):
            return None
        found = [each[0] for each in streams]
        factor, length = found[0].scale, found[0].length
        if not isinstance(factor, int | float):
            return None
        keys, values = [], []
        for name, one in zip(self.layout.names, found, strict=True):
            plain = one.mode == "add" and one.query_mask is None and one.bias is None
            if not plain or one.k is None or one.v is None or one.length != length or one.scale != factor:
                return None
            keys.append(self.match(one.k, name))
            values.append(self.match(one.v, name))
        k, v = (self.split(torch.cat(parts).to(self.dtype)) for parts in (keys, values))
        return k, v, factor

    def stream_qkv(self, name: str, stream: Stream) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q = self.branch_qkv[name][0] if self.branch_qkv else self.q[self.layout.rows(name)]
        if stream.tokens is not None:
            tokens = stream.tokens.to(self.dtype)
            k, v = (
                self.match(self.split(self.attn.to_k(tokens)), name),
                self.match(self.split(self.attn.to_v(tokens)), name),
            )
            return q, k if self.attn.norm_k is None else self.attn.norm_k(k), v
        assert stream.k is not None and stream.v is not None
        k, v = (self.match(self.split(part.to(self.dtype)), name) for part in (stream.k, stream.v))
        return q, k, v

    def values_of(self, name: str) -> torch.Tensor:
        rows = self.operations.routes.get(name, {}).get("v", name)
        return self.match(self.v[self.layout.rows(rows)], name)


def _joined(out: torch.Tensor, streams: list[Stream], parts: list[torch.Tensor]) -> torch.Tensor:
    """A branch's attention with its streams added or put in its place."""
    replaced: torch.Tensor | float = 0.0
    added: torch.Tensor | float = 0.0
    for stream, part in zip(streams, parts, strict=True):
        factor: torch.Tensor | float = stream.scale
        if isinstance(factor, torch.Tensor):
            factor = _per_query(factor.to(part))
        if stream.query_mask is not None:
            factor = _per_query(stream.query_mask.to(part)) * factor
        added = added + factor * part
        if stream.mode == "replace":
            replaced = replaced + factor
    if isinstance(replaced, torch.Tensor) or replaced != 0.0:
        out = out * (1 - replaced)
    return out + added


def _per_query(x: torch.Tensor) -> torch.Tensor:
    """[queries], [rows, queries], [rows, queries, 1] or a scalar -> broadcastable to [rows, heads, queries, width]."""
    if x.ndim == 0:
        return x
    if x.ndim == 3:
        x = x[..., 0]
    return x.reshape(-1, 1, x.shape[-1], 1)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """At least float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _four(bias: torch.Tensor) -> torch.Tensor:
    """Leading dimensions of 1, so that a bias has [rows, heads, queries, keys]."""
    return bias.reshape((1,) * (4 - bias.ndim) + tuple(bias.shape))
