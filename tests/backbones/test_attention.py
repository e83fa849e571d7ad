"""Every attention operation against the same thing written out with materialised probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from controlroom.backbones.attend import attend
from controlroom.backbones.sites import attention_sites, feature_sites
from controlroom.core.attention import AttentionCall, ValueTerm
from controlroom.core.branch import Layout
from controlroom.core.sites import Site
from tests.tiny import BACKBONES, tiny_unet

HEADS, WIDTH, TOKENS, LENGTH = 2, 6, 9, 5
LAYOUT = Layout([("u", 2), ("c", 2), ("ref", 1)])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Case:
    """A layer, its input, and its attention written out."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        cross = 7 if kind == "cross" else None
        self.attn = Attention(query_dim=12, cross_attention_dim=cross, heads=HEADS, dim_head=WIDTH).eval()
        self.x = normal(5, TOKENS, 12, seed=1) * 2
        self.context = normal(5, LENGTH, 7, seed=2) * 2 if cross else None
        site = Site("layer", kind, "down", 0, 0, (3, 3), 12)  # type: ignore[arg-type]
        self.call = AttentionCall(site, None, LAYOUT, "main", self.x, self.context, HEADS)  # type: ignore[arg-type]
        source = self.x if self.context is None else self.context
        self.q, self.k, self.v = (
            self.split(f(z)) for f, z in ((self.attn.to_q, self.x), (self.attn.to_k, source), (self.attn.to_v, source))
        )

    def split(self, z: torch.Tensor) -> torch.Tensor:
        return z.reshape(z.shape[0], z.shape[1], HEADS, -1).permute(0, 2, 1, 3)

    def p(self, q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | float = 0.0) -> torch.Tensor:
        return torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) / WIDTH**0.5 + bias, -1)

    def plain(self) -> torch.Tensor:
        return self.p(self.q, self.k) @ self.v

    def check(self, expected: torch.Tensor, moved: tuple[str, ...]) -> None:
        got = self.split(attend(self.attn, self.call, None))
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
        for name in LAYOUT.names:
            rows = LAYOUT.rows(name)
            changed = (got[rows] - self.plain()[rows]).abs().max() > 1e-3
            assert bool(changed) is (name in moved), f"{name} should {'' if name in moved else 'not '}change"


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


U, C, R = LAYOUT.rows("u"), LAYOUT.rows("c"), LAYOUT.rows("ref")


def test_route_takes_queries_and_keys_from_another_branch() -> None:
    case = Case("self")
    case.call.route("c", q="u", k="u")
    expected = case.plain()
    expected[C] = case.p(case.q[U], case.k[U]) @ case.v[C]
    case.check(expected, ("c",))


def test_route_gives_one_row_to_many() -> None:
    case = Case("self")
    case.call.route("c", k="ref", v="ref")
    expected = case.plain()
    expected[C] = case.p(case.q[C], case.k[R].expand(2, -1, -1, -1)) @ case.v[R]
    case.check(expected, ("c",))


def test_route_to_two_sources_is_refused() -> None:
    case = Case("self")
    case.call.route("c", q="u")
    with pytest.raises(ValueError, match="two branches"):
        case.call.route("c", q="ref")


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_extend_by_tokens_projects_with_this_layer(weight: float) -> None:
    case = Case("self")
    more = normal(1, 4, 12, seed=5)
    case.call.extend("c", tokens=more, weight=weight)
    k = torch.cat([case.k[C], case.split(case.attn.to_k(more)).expand(2, -1, -1, -1)], 2)
    v = torch.cat([case.v[C], case.split(case.attn.to_v(more)).expand(2, -1, -1, -1)], 2)
    logits = torch.einsum("bhqd,bhkd->bhqk", case.q[C], k) / WIDTH**0.5
    mass = logits.exp() * torch.tensor([1.0] * TOKENS + [weight] * 4)
    expected = case.plain()
    expected[C] = (mass / mass.sum(-1, keepdim=True)) @ v
    case.check(expected, ("c",))


def test_share_moves_linearly_from_absence_to_all() -> None:
    more = normal(1, 4, 12, seed=5)

    def joined(case: Case, name: slice, k: torch.Tensor) -> torch.Tensor:
        keys, values = (case.split(f(k)).expand(2, -1, -1, -1) for f in (case.attn.to_k, case.attn.to_v))
        return case.p(case.q[name], torch.cat([case.k[name], keys], 2)) @ torch.cat([case.v[name], values], 2)

    case = Case("self")
    sums: list[torch.Tensor] = []
    case.call.extend("c", tokens=more, share=0.3)
    case.call.extend("u", tokens=more)
    case.call.read("c", lambda p: sums.append(p))
    expected = case.plain()
    expected[C] = 0.7 * expected[C] + 0.3 * joined(case, C, more)
    expected[U] = joined(case, U, more)
    case.check(expected, ("c", "u"))
    values = torch.cat([case.v[C], case.split(case.attn.to_v(more)).expand(2, -1, -1, -1)], 2)
    torch.testing.assert_close(sums[0] @ values, expected[C], atol=2e-6, rtol=1e-5)


def test_shares_of_several_are_their_own() -> None:
    case = Case("self")
    more = [normal(1, 4, 12, seed=5), normal(1, 3, 12, seed=6)]
    bias = normal(1, 1, TOKENS, 3, seed=7)
    case.call.extend("c", tokens=more[0], share=0.3)
    case.call.extend("c", tokens=more[1], bias=bias)
    k, v = (
        torch.cat([own[C], *(case.split(f(m)).expand(2, -1, -1, -1) for m in more)], 2)
        for own, f in ((case.k, case.attn.to_k), (case.v, case.attn.to_v))
    )
    p = case.p(case.q[C], k, torch.cat([torch.zeros(1, 1, TOKENS, TOKENS + 4), bias], -1))
    lost = 0.7 * p[..., TOKENS : TOKENS + 4].sum(-1, keepdim=True)
    p[..., TOKENS : TOKENS + 4] *= 0.3
    expected = case.plain()
    expected[C] = p @ v + lost * expected[C]
    case.check(expected, ("c",))
    with pytest.raises(ValueError, match="0 to 1"):
        case.call.extend("c", tokens=more[0], share=1.5)


def test_extend_of_weight_zero_is_absence_and_small_is_close() -> None:
    case = Case("self")
    case.call.extend("c", tokens=normal(1, 4, 12), weight=0.0)
    assert case.call.operations.empty
    case.call.extend("c", tokens=normal(1, 4, 12), weight=1e-5)
    assert (case.split(attend(case.attn, case.call, None)) - case.plain()).abs().max() < 1e-3


def test_extend_by_projected_keys_by_a_branch_and_with_bias() -> None:
    case = Case("self")
    k, v = normal(2, 3, 12, seed=6), normal(2, 3, 12, seed=7)
    bias = normal(1, 1, TOKENS, 3, seed=8)
    case.call.extend("c", k=k, v=v, bias=bias)
    case.call.extend("u", source="ref")
    expected = case.plain()
    wide = torch.cat([torch.zeros(1, 1, TOKENS, TOKENS), bias], -1)
    joined_k, joined_v = torch.cat([case.k[C], case.split(k)], 2), torch.cat([case.v[C], case.split(v)], 2)
    expected[C] = case.p(case.q[C], joined_k, wide) @ joined_v
    ref_k = torch.cat([case.k[U], case.k[R].expand(2, -1, -1, -1)], 2)
    ref_v = torch.cat([case.v[U], case.v[R].expand(2, -1, -1, -1)], 2)
    expected[U] = case.p(case.q[U], ref_k) @ ref_v
    case.check(expected, ("u", "c"))


def test_bias_on_own_keys_adds_up() -> None:
    case = Case("cross")
    one, two = normal(LENGTH, seed=3) * 3, normal(2, 1, TOKENS, LENGTH, seed=4)
    case.call.bias("c", one)
    case.call.bias("c", two)
    expected = case.plain()
    expected[C] = case.p(case.q[C], case.k[C], one + two) @ case.v[C]
    case.check(expected, ("c",))


def test_biases_stay_as_small_as_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """For every head and query of a wide layer they would take gigabytes."""
    case, sizes = Case("self"), []
    plain = torch.nn.functional.scaled_dot_product_attention

    def counted(*args: Any, attn_mask: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
        sizes.append(None if attn_mask is None else tuple(attn_mask.shape))
        return plain(*args, attn_mask=attn_mask, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    keys, each = normal(2, 1, 1, TOKENS, seed=3) * 3, normal(1, 1, TOKENS, TOKENS, seed=4) * 3
    case.call.bias("c", keys)
    case.call.bias("ref", each)
    expected = case.plain()
    expected[C] = case.p(case.q[C], case.k[C], keys) @ case.v[C]
    expected[R] = case.p(case.q[R], case.k[R], each) @ case.v[R]
    case.check(expected, ("c", "ref"))
    assert set(sizes) == {None, (3, 1, TOKENS, TOKENS)}
    case, sizes[:] = Case("self"), []
    case.call.bias("c", keys)
    expected[R] = case.plain()[R]
    case.check(expected, ("c",))
    assert set(sizes) == {None, (2, 1, 1, TOKENS)}


def test_mix_values_edits_probabilities() -> None:
    """Prompt-to-Prompt: replaced probabilities P_src M, blended by word, as a write to materialised maps."""
    case = Case("cross")
    matrix, alpha = normal(LENGTH, LENGTH, seed=3).abs(), torch.tensor([0.0, 1.0, 0.3, 1.0, 0.0])
    case.call.mix_values("c", (ValueTerm("u", weights=alpha, matrix=matrix), ValueTerm("c", weights=1 - alpha)))
    seen: list[torch.Tensor] = []
    case.call.read("c", seen.append)
    case.call.read("c", seen.append, edited=False)
    own, source = case.p(case.q[C], case.k[C]), case.p(case.q[U], case.k[U])
    edited = (source @ matrix) * alpha + own * (1 - alpha)
    expected = case.plain()
    expected[C] = edited @ case.v[C]
    case.check(expected, ("c",))
    torch.testing.assert_close(seen[0], edited)
    torch.testing.assert_close(seen[1], own)


def test_stream_adds_with_scale_and_mask() -> None:
    case = Case("cross")
    k, v = normal(1, 3, 12, seed=3), normal(1, 3, 12, seed=4)
    mask = torch.linspace(0, 1, TOKENS)
    case.call.stream("c", k, v, scale=0.7, query_mask=mask)
    expected = case.plain()
    part = case.p(case.q[C], case.split(k).expand(2, -1, -1, -1)) @ case.split(v)
    expected[C] = expected[C] + 0.7 * mask[None, None, :, None] * part
    case.check(expected, ("c",))


def test_replacing_streams_share_the_picture() -> None:
    case = Case("cross")
    left = (torch.arange(TOKENS) < 4).float()
    parts = [(normal(1, 3, 12, seed=s), normal(1, 3, 12, seed=s + 1)) for s in (3, 5)]
    for (k, v), mask in zip(parts, (left, 1 - left), strict=True):
        case.call.stream("c", k, v, scale=0.8, query_mask=mask, mode="replace")
    expected = case.plain()
    total = 0.2 * expected[C]
    for (k, v), mask in zip(parts, (left, 1 - left), strict=True):
        out = case.p(case.q[C], case.split(k).expand(2, -1, -1, -1)) @ case.split(v)
        total = total + 0.8 * mask[None, None, :, None] * out
    expected[C] = total
    case.check(expected, ("c",))


def test_identity_gives_values_and_needs_self_attention() -> None:
    case = Case("self")
    case.call.identity("c")
    expected = case.plain()
    expected[C] = case.v[C]
    case.check(expected, ("c",))
    with pytest.raises(ValueError, match="self-attention"):
        Case("cross").call.identity("c")


def test_affine_reads_another_branch_and_comes_before_route() -> None:
    case = Case("self")
    case.call.route("u", q="c")
    case.call.affine("c", "q", lambda q, lookup: q + lookup("ref").mean())
    moved = case.q.clone()
    moved[C] = case.q[C] + case.q[R].mean()
    expected = case.plain()
    expected[C] = case.p(moved[C], case.k[C]) @ case.v[C]
    expected[U] = case.p(moved[C], case.k[U]) @ case.v[U]
    case.check(expected, ("u", "c"))


def test_edit_input_comes_before_the_projections() -> None:
    case = Case("self")
    case.call.edit_input("c", case.x[R])
    edited = case.x.clone()
    edited[C] = case.x[R]
    q, k, v = (case.split(f(edited)) for f in (case.attn.to_q, case.attn.to_k, case.attn.to_v))
    case.check(case.p(q, k) @ v, ("c",))


def test_reading_changes_nothing_and_carries_gradients() -> None:
    case = Case("cross")
    seen: list[torch.Tensor] = []
    case.call.read("c", seen.append)
    with torch.enable_grad():
        case.call._hidden = case.x.clone().requires_grad_(True)
        out = attend(case.attn, case.call, None)
    torch.testing.assert_close(case.split(out), case.plain(), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(seen[0], case.p(case.q[C], case.k[C]))
    assert seen[0].requires_grad and seen[0].dtype == torch.float32


def test_a_call_without_edits_equals_diffusers_bit_for_bit() -> None:
    for kind in ("self", "cross"):
        case = Case(kind)
        case.call.read("c", lambda p: None)
        ours = case.attn.to_out[0](attend(case.attn, case.call, None))
        assert torch.equal(ours, AttnProcessor2_0()(case.attn, case.x, case.context))


@pytest.mark.parametrize("make", BACKBONES.values(), ids=list(BACKBONES))
def test_sites_are_in_the_order_of_execution_with_their_sizes(make: Callable[[], Any]) -> None:
    pipe = make()
    unet, hw = pipe.unet, (13, 18)
    sites = {site.name: site for site in (*attention_sites(unet, hw), *feature_sites(unet, hw))}
    ran: list[tuple[str, tuple[int, ...]]] = []
    handles = []
    for name, module in unet.named_modules():
        if name in sites:
            hook = lambda _m, i, o, name=name: ran.append((name, (i[0] if torch.is_tensor(i[0]) else i[0][0]).shape))  # noqa: E731
            handles.append(module.register_forward_hook(hook))
    more = {}
    if unet.config.addition_embed_type:
        more["added_cond_kwargs"] = {"text_embeds": torch.zeros(1, 32), "time_ids": torch.zeros(1, 6)}
    unet(torch.zeros(1, 4, *hw), 5, torch.zeros(1, 4, unet.config.cross_attention_dim), **more)
    assert sorted({name for name, _ in ran}) == sorted(sites)
    for kind in ("self", "cross", "resnet", "transformer"):
        order = [name for name, _ in ran if sites[name].kind == kind]
        assert [sites[name].index for name in order] == list(range(len(order)))
    for name, shape in ran:
        site = sites[name]
        if site.kind in ("self", "cross"):
            assert shape[1] == site.hw[0] * site.hw[1]
        elif site.kind in ("resnet", "transformer"):
            assert tuple(shape[2:]) == site.hw


def test_attention_processors_of_diffusers_are_all_sites() -> None:
    unet = tiny_unet()
    assert {f"{site.name}.processor" for site in attention_sites(unet, (16, 16))} == set(unet.attn_processors)
