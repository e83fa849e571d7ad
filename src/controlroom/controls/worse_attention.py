"""What guidances away from worse self-attention share: the prompt's branch once more, with named layers made worse."""

from __future__ import annotations

import torch

from controlroom.controls.named_layers import named_sites
from controlroom.core.branch import Branch
from controlroom.core.claims import Claim, Operand, Operation
from controlroom.core.control import Declaration, Outline
from controlroom.core.step import Step


def worse_branch(
    branch: str, layers: str | list[str], outline: Outline, operand: Operand, operation: Operation
) -> Declaration:
    """The branch, the self-attention layers that are changed there, and the addition to the prediction.

    Raises:
        InputError: a layer that the network does not have.
    """
    sites = named_sites(layers, outline.sites("self"))
    names = frozenset(site.name for site in sites)
    return Declaration(
        branches=(Branch(branch),),
        attention=sites,
        claims=(Claim(operand, operation, names, frozenset({branch})), Claim("prediction", "add")),
    )


def away_from(branch: str, step: Step, state: str, scale: float) -> torch.Tensor | None:
    """From the branch's prediction of the picture to the one with the prompt, times a scale; for ``guide``."""
    return scale * (step.eps["cond"] - step.eps[branch]) if state == "image" else None
