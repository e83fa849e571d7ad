"""Gradient checkpointing (Chen et al., arXiv 1604.06174): keep few activations, compute the rest again going back.

diffusers and transformers build it into their models; here it is only turned on, in every model that offers it, frozen
ones included, since gradients flow through them too. Gradients stay the same, bit for bit where the machine computes
the same twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# Turned on by the first that a model has, and off by its partner: diffusers, transformers, transformers before 5.2x.
_SWITCHES = (
    ("enable_gradient_checkpointing", "disable_gradient_checkpointing"),
    ("activation_checkpointing_enable", "activation_checkpointing_disable"),
    ("gradient_checkpointing_enable", "gradient_checkpointing_disable"),
)
_STATES = ("is_activation_checkpointing", "is_gradient_checkpointing")
_FUNCTION = "_gradient_checkpointing_func"
"""Where parts of models of both libraries keep what recomputes them."""
_SUPPORT = ("_supports_gradient_checkpointing", "supports_gradient_checkpointing")


def offering(module: nn.Module) -> list[Any]:
    """The outermost models within a module that offer gradient checkpointing, the module itself included."""
    if any(hasattr(module, on) for on, _ in _SWITCHES):
        told = [getattr(module, name, True) for name in _SUPPORT]  # a model of these libraries says whether it does
        return [module] if all(told) else []
    return [found for child in module.children() for found in offering(child)]


def recomputes(model: Any) -> bool:
    """Whether gradient checkpointing of a model of these libraries is on."""
    name = next((name for name in _STATES if hasattr(type(model), name)), None)
    return name is not None and bool(getattr(model, name))


@contextmanager
def recomputing(modules: Iterable[nn.Module], by: Callable[..., Any] | None = None) -> Iterator[int]:
    """Within the block every model that offers it recomputes; gives how many do. Those that did before keep on.

    Args:
        modules: in which models are looked for.
        by: called as ``by(part, *its arguments)`` instead of what recomputes a part, to look on; None: the library's.
    """
    found = [m for module in modules for m in offering(module) if not recomputes(m)]
    replaced: list[tuple[Any, Any]] = []
    for model in found:
        switch = next(on for on, _ in _SWITCHES if hasattr(model, on))
        getattr(model, switch)()
        for part in model.modules() if by is not None else ():
            if hasattr(part, _FUNCTION):
                replaced.append((part, getattr(part, _FUNCTION)))
                setattr(part, _FUNCTION, by)
    try:
        yield len(found)
    finally:
        for part, function in replaced:
            setattr(part, _FUNCTION, function)
        for model in found:
            switch = next(off for on, off in _SWITCHES if hasattr(model, on))
            getattr(model, switch)()
