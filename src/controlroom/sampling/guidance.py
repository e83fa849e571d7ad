"""The base combination and the rescaling of guidance.

Classifier-free guidance: arXiv 2207.12598. Rescaling against overexposure: arXiv 2305.08891, section 3.4. The formulas
are diffusers', operation by operation, so that results agree to rounding.
"""

from __future__ import annotations

import torch

from controlroom.core.step import Step


def classifier_free(step: Step, state: str) -> torch.Tensor:
    """uncond + scale · (cond − uncond), or cond alone at a step without guidance and for a state without ``uncond``."""
    cond, uncond = step.role(state, "cond"), step.role(state, "uncond")
    if cond is None:
        raise RuntimeError(f"state {state!r} is advanced by the solver but has no branch of role 'cond'")
    if uncond is None or step.i in step.run.plan.unguided:
        return step.eps[cond]
    base = step.eps[uncond]
    return base + step.run.guidance.scale * (step.eps[cond] - base)


def rescaled(prediction: torch.Tensor, text: torch.Tensor, rescale: float) -> torch.Tensor:
    """Bring the standard deviation of each row back towards that of the prediction with the prompt."""
    axes = list(range(1, text.ndim))
    ratio = text.std(dim=axes, keepdim=True) / prediction.std(dim=axes, keepdim=True)
    return rescale * (prediction * ratio) + (1 - rescale) * prediction
