"""From features of a picture to tokens that cross-attention reads: the five networks of IP-Adapter's files.

IP-Adapter (Ye et al., arXiv 2308.06721): a linear layer (base), a layer for each state (full face), a small network for
a face's identity (FaceID), a resampler with learned queries (plus; after Perceiver, arXiv 2103.03206, and Flamingo,
arXiv 2204.14198), and one whose queries are a face's identity (FaceID-plus). Parameters are named as in the files;
every size is inferred from the tensors' shapes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from controlroom.core.errors import ModelError

HEAD_WIDTH = 64
"""Width of a head of the resampler in every published file; the files do not say."""


class ImageProjection(nn.Module):
    """Features -> tokens.

    Attributes:
        reads: width of the features.
        width: of the tokens.
        states: whether the features are the image encoder's states [n, length, reads] rather than [n, reads].
        identity: whether the features are a face's identity, which no image encoder gives.
    """

    reads: int
    width: int
    states: bool = False
    identity: bool = False


class LinearProjection(ImageProjection):
    """[n, reads] -> [n, tokens, width]: one linear layer and a norm."""

    def __init__(self, reads: int, width: int, tokens: int) -> None:
        super().__init__()
        self.reads, self.width = reads, width
        self.proj = nn.Linear(reads, tokens * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Tokens of each picture."""
        return self.norm(self.proj(features).unflatten(-1, (-1, self.width)))


class StateProjection(ImageProjection):
    """[n, length, reads] -> [n, length, width]: a token for each state of the encoder (full face)."""

    states = True

    def __init__(self, reads: int, hidden: int, width: int) -> None:
        super().__init__()
        self.reads, self.width = reads, width
        self.proj = nn.Sequential(nn.Linear(reads, hidden), nn.GELU(), nn.Linear(hidden, width), nn.LayerNorm(width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Tokens of each picture."""
        return self.proj(features)


class IdentityProjection(ImageProjection):
    """[n, reads] -> [n, tokens, width]: a face's identity vector through a hidden layer (FaceID)."""

    identity = True

    def __init__(self, reads: int, hidden: int, width: int, tokens: int) -> None:
        super().__init__()
        self.reads, self.width = reads, width
        self.proj = nn.Sequential(nn.Linear(reads, hidden), nn.GELU(), nn.Linear(hidden, tokens * width))
        self.norm = nn.LayerNorm(width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Tokens of each face."""
        return self.norm(self.proj(features).unflatten(-1, (-1, self.width)))


class FaceProjection(ImageProjection):
    """A face's identity and the states of its picture -> [n, tokens, width] (FaceID-plus).

    The identity becomes tokens, which attend to the states as a resampler's do. Both come as one tensor, see `packed`.

    Attributes:
        face: width of the identity.
        between: of the tokens within the resampler.
    """

    states = True
    identity = True

    def __init__(
        self,
        face: int,
        reads: int,
        between: int,
        hidden: int,
        width: int,
        tokens: int,
        depth: int,
        inner: int,
        feed: int,
    ) -> None:
        super().__init__()
        self.face, self.reads, self.between, self.width = face, reads, between, width
        self.proj = nn.Sequential(nn.Linear(face, hidden), nn.GELU(), nn.Linear(hidden, tokens * between))
        self.norm = nn.LayerNorm(between)
        self.perceiver_resampler = nn.Module()
        self.perceiver_resampler.proj_in = nn.Linear(reads, between)
        self.perceiver_resampler.proj_out = nn.Linear(between, width)
        self.perceiver_resampler.norm_out = nn.LayerNorm(width)
        self.perceiver_resampler.layers = resampler_layers(between, depth, inner, feed)

    def packed(self, identity: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """[..., face] and [..., length, reads] -> [..., 1 + length, the wider of both], the identity first."""
        wide = max(self.face, self.reads)
        first = F.pad(identity[..., None, :], (0, wide - self.face))
        return torch.cat([first, F.pad(states, (0, wide - self.reads)).to(first)], dim=-2)

    def face_tokens(self, features: torch.Tensor) -> torch.Tensor:
        """Tokens [..., tokens, between] of the identity alone, out of what `packed` gave."""
        return self.norm(self.proj(features[..., 0, : self.face]).unflatten(-1, (-1, self.between)))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Tokens of each face."""
        read: Any = self.perceiver_resampler
        states = read.proj_in(features[:, 1:, : self.reads])
        return read.norm_out(read.proj_out(resampled(read.layers, states, self.face_tokens(features))))


class Resampler(ImageProjection):
    """[n, length, reads] -> [n, tokens, width]: learned queries attend to the states and to each other (plus)."""

    states = True

    def __init__(self, reads: int, hidden: int, width: int, tokens: int, depth: int, inner: int, feed: int) -> None:
        super().__init__()
        self.reads, self.width = reads, width
        self.latents = nn.Parameter(torch.randn(1, tokens, hidden) / hidden**0.5)
        self.proj_in = nn.Linear(reads, hidden)
        self.proj_out = nn.Linear(hidden, width)
        self.norm_out = nn.LayerNorm(width)
        self.layers = resampler_layers(hidden, depth, inner, feed)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Tokens of each picture."""
        tokens = self.latents.expand(features.shape[0], -1, -1)
        return self.norm_out(self.proj_out(resampled(self.layers, self.proj_in(features), tokens)))


def resampler_layers(hidden: int, depth: int, inner: int, feed: int) -> nn.ModuleList:
    """Layers of a resampler, for `resampled`.

    Args:
        hidden: width of tokens and states.
        depth: number of layers.
        inner: width of the attention over all its heads.
        feed: of the hidden layer of each feed-forward network.

    Raises:
        ModelError: ``inner`` cannot be cut into heads.
    """
    if inner > HEAD_WIDTH and inner % HEAD_WIDTH:
        raise ModelError(f"The resampler's attention is {inner} wide, which is no multiple of {HEAD_WIDTH}.")
    blocks = [nn.ModuleList([_Reading(hidden, inner), _feed_forward(hidden, feed)]) for _ in range(depth)]
    return nn.ModuleList(blocks)


def resampled(layers: nn.ModuleList, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens [n, tokens, hidden] after they have attended to states [n, length, hidden] in each layer."""
    for block in layers:
        read, feed = block.children()
        tokens = tokens + read(states, tokens)
        tokens = tokens + feed(tokens)
    return tokens


class _Reading(nn.Module):
    """Attention of the tokens to the states and to the tokens themselves."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.heads = max(1, inner // HEAD_WIDTH)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        states, tokens = self.norm1(states), self.norm2(tokens)
        k, v = self.to_kv(torch.cat([states, tokens], dim=1)).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.to_q(tokens), k, v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _feed_forward(width: int, hidden: int) -> nn.Sequential:
    first, last = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)
    return nn.Sequential(nn.LayerNorm(width), first, nn.GELU(), last)


def projection_for(shapes: dict[str, tuple[int, ...]]) -> ImageProjection:
    """The network whose parameters have these names and shapes; its weights are not filled in.

    Raises:
        ModelError: none of the known ones; the message says which are.
    """
    try:
        if "latents" in shapes:
            depth = 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("layers."))
            (hidden, reads), (_, tokens, _) = shapes["proj_in.weight"], shapes["latents"]
            inner, feed = shapes["layers.0.0.to_q.weight"][0], shapes["layers.0.1.1.weight"][0]
            return Resampler(reads, hidden, shapes["proj_out.weight"][0], tokens, depth, inner, feed)
        if "proj.3.weight" in shapes:
            hidden, reads = shapes["proj.0.weight"]
            return StateProjection(reads, hidden, shapes["proj.2.weight"][0])
        width = shapes["norm.weight"][0]
        if "perceiver_resampler.proj_in.weight" in shapes:
            inside = {key.removeprefix("perceiver_resampler."): shape for key, shape in shapes.items()}
            depth = 1 + max(int(key.split(".")[1]) for key in inside if key.startswith("layers."))
            (hidden, face), (between, reads) = shapes["proj.0.weight"], inside["proj_in.weight"]
            inner, feed = inside["layers.0.0.to_q.weight"][0], inside["layers.0.1.1.weight"][0]
            tokens, out = shapes["proj.2.weight"][0] // between, inside["proj_out.weight"][0]
            return FaceProjection(face, reads, between, hidden, out, tokens, depth, inner, feed)
        if "proj.2.weight" in shapes:
            hidden, reads = shapes["proj.0.weight"]
            return IdentityProjection(reads, hidden, width, shapes["proj.2.weight"][0] // width)
        if "proj.weight" in shapes:
            out, reads = shapes["proj.weight"]
            return LinearProjection(reads, width, out // width)
    except (KeyError, ValueError, IndexError, ZeroDivisionError):
        pass
    found = ", ".join(sorted(shapes)[:6]) or "nothing"
    raise ModelError(
        f"The image projection of this IP-Adapter is of no known kind (it has {found}). Known are base, plus, "
        "full face, FaceID and FaceID-plus."
    )
