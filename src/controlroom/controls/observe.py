"""A control that only reads: attention by token, attention between pictures, and features, at one step of a run.

It claims nothing, adds no row and changes no bit of the picture. Maps of attention to tokens are those that the layers
use, after every other control; attention between pictures is computed from a layer's own queries and keys, which no
other control has a part in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field

from controlroom.core.attention import AttentionCall, FeatureCall
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.run import Run


@dataclass
class Observation:
    """What was seen; filled by the step that is looked at.

    Attributes:
        cross: site -> [images, h * w, tokens], mean over heads, float32.
        between: site -> [images, images, h * w, h * w], mean over heads: entry [a, b, i, j] is how much place i of
            picture a looks at place j of picture b, where all it could look at were picture b. [a, a] is the layer's
            own self-attention.
        features: site -> [images, channels, h, w].
    """

    cross: dict[str, torch.Tensor] = field(default_factory=dict)
    between: dict[str, torch.Tensor] = field(default_factory=dict)
    features: dict[str, torch.Tensor] = field(default_factory=dict)


class Observe(Control):
    """Read layers at one step. ``step.memory(control)`` is an `Observation`.

    Args:
        step: number of the step, from 0.
        cross: names of cross-attention layers.
        between: names of self-attention layers.
        features: names of resnets, transformers and so on.
        branch: whose rows are read.
    """

    type: Literal["observe"] = Field(default="observe", kw_only=True)
    step: int = Field(default=0, ge=0)
    cross: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    branch: str = "cond"

    def window(self, n: int) -> frozenset[int]:
        return frozenset({self.step}) & frozenset(range(n))

    def declare(self, outline: Outline) -> Declaration:
        """Sites and nothing else."""
        wanted = {*self.cross, *self.between}
        return Declaration(
            attention=tuple(site for site in outline.attention if site.name in wanted),
            features=tuple(site for site in outline.features if site.name in self.features),
            phases=frozenset({"main"}),
        )

    def prepare(self, run: Run) -> Observation:
        return Observation()

    def attention(self, call: AttentionCall) -> None:
        if self.branch not in call:
            return
        seen: Observation = call.step.memory(self)
        if call.site.kind == "cross":
            call.read(self.branch, lambda found: seen.cross.update({call.site.name: found.mean(1)}))
        else:
            layer = call.step.run.backbone.unet.get_submodule(call.site.name)
            seen.between[call.site.name] = between_pictures(layer, call.input_of(self.branch))

    def feature(self, call: FeatureCall) -> None:
        if self.branch in call:
            seen: Observation = call.step.memory(self)
            seen.features[call.site.name] = call.hidden[call.rows(self.branch)].detach().float().clone()


def between_pictures(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Attention of every picture to every other, by a self-attention layer: [images, images, tokens, tokens], float32.

    Args:
        layer: diffusers' attention layer, of which only the weights are used.
        hidden: [images, tokens, channels] its input.
    """
    images, tokens = hidden.shape[:2]
    q, k = (part(hidden).unflatten(-1, (layer.heads, -1)).transpose(1, 2).float() for part in (layer.to_q, layer.to_k))
    found = torch.zeros(images, images, tokens, tokens, device=hidden.device)
    for a in range(images):
        for b in range(images):
            # Head by head: all heads of a wide layer are gigabytes.
            for head in range(layer.heads):
                found[a, b] += (q[a, head] @ k[b, head].T * layer.scale).softmax(-1)
    return found / layer.heads
