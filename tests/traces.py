"""Everything about a pipeline that a run could leave changed, as values that can be compared."""

from __future__ import annotations

from typing import Any

from controlroom.sampling.pipeline import Pipeline


def traces(pipe: Pipeline, *others: Any) -> list[Any]:
    """Processors, hooks, flags, attributes, parameters and buffers of the pipeline's modules and of further ones."""
    found: list[Any] = []
    for module in (*pipe._modules(), *others):
        for name, part in module.named_modules():
            hooks = {key: sorted(value) for key, value in vars(part).items() if key.endswith("_hooks")}
            found.append((name, id(part), part.training, hooks, id(getattr(part, "processor", None))))
            found.append(sorted(part.__dict__))
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            found.append((name, id(tensor), tensor.requires_grad, tensor.grad is None, tensor._version))
            found.append(tensor.detach().double().sum().item())
    found.append(sorted((k, str(v)) for k, v in vars(pipe.scheduler).items()))
    return found
