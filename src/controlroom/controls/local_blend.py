"""Local blend: confine an edit to where some words are (arXiv 2208.01626, section 3.2, "local editing").

Cross-attention maps of the words are summed over layers, heads and the steps so far, spread by a 3x3 maximum, brought
to the latents' size, and cut at a share of their maximum. The union over the pictures (source and edited) is where the
edited picture may differ from the source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F


class LocalBlend:
    """Maps of some words, gathered while a run goes on; sums and means give the same mask.

    Args:
        words: branch -> [rows, L], 1 at the tokens of its words.
        threshold: share of the maximum, in [0, 1).
    """

    def __init__(self, words: Mapping[str, torch.Tensor], threshold: float) -> None:
        self.words, self.threshold = dict(words), threshold
        self._maps: dict[str, torch.Tensor] = {}

    def sink(self, branch: str, hw: tuple[int, int]) -> Callable[[torch.Tensor], None]:
        """Takes probabilities [rows, heads, h·w, L] of a layer of size ``hw``; all layers must have one size."""

        def add(probabilities: torch.Tensor) -> None:
            words = self.words[branch].to(probabilities)
            # Beside longer prompts, what a branch is told is filled up at its end.
            words = F.pad(words, (0, probabilities.shape[-1] - words.shape[-1]))
            found = (probabilities.sum(1) @ words[:, :, None])[..., 0].reshape(-1, 1, *hw)
            self._maps[branch] = self._maps[branch] + found if branch in self._maps else found

        return add

    @property
    def seen(self) -> bool:
        """Whether a layer was read yet."""
        return bool(self._maps)

    def mask(self, hw: tuple[int, int] | torch.Size) -> torch.Tensor:
        """[rows, 1, h, w] in {0, 1} at the latents' size: 1 where a word of any branch is."""
        union: torch.Tensor | None = None
        for maps in self._maps.values():
            wide = F.interpolate(F.max_pool2d(maps, 3, stride=1, padding=1), size=tuple(hw))
            here = wide / wide.amax((2, 3), keepdim=True) > self.threshold
            union = here if union is None else union | here
        assert union is not None, "mask is asked for after the first pass"
        return union.float()
