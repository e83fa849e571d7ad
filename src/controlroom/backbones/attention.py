"""The one attention dispatcher: carries out what controls recorded, and leaves no trace.

A processor is put only on the layers where some control of the run acts, and the layer's own processor is put back when
the run ends. A layer for which nothing was recorded runs its own processor, bit for bit. What is computed from the
records: `controlroom.backbones.attend`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from controlroom.backbones.attend import attend
from controlroom.core.attention import AttentionCall, FeatureCall
from controlroom.core.branch import Layout
from controlroom.core.control import Control
from controlroom.core.errors import ModelError
from controlroom.core.sites import Site
from controlroom.core.step import Step

_PLAIN = {"AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor"}


@dataclass(frozen=True)
class Binding:
    """Which pass is running: its step, its rows, its phase, and who acts at which site."""

    step: Step
    layout: Layout
    phase: str
    attention: Mapping[str, Sequence[Control]]
    features: Mapping[str, Sequence[Control]]


class Dispatcher:
    """Puts processors and hooks on a network for the time of a run.

    Args:
        unet: the network.
        attention: sites where some control acts.
        features: sites where some control reads or writes a feature.

    Raises:
        ModelError: a layer carries a processor of another library that changes what it computes.
    """

    def __init__(self, unet: Any, attention: Sequence[Site], features: Sequence[Site]) -> None:
        self.binding: Binding | None = None
        modules = dict(unet.named_modules())
        self._attention = [(modules[site.name], site) for site in attention]
        self._features = [(modules[site.name], site) for site in features]
        for layer, site in self._attention:
            name = type(layer.processor).__name__
            if name not in _PLAIN:
                raise ModelError(
                    f"{site.name} carries the processor {name}, which controls cannot be combined with. Take it "
                    "out first (pipe.unload_ip_adapter(), unet.set_default_attn_processor()) and use the control of "
                    "that name here."
                )

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Put processors and hooks in place; on the way out everything is as before."""
        originals = [(layer, layer.processor) for layer, _ in self._attention]
        handles = []
        try:
            for layer, site in self._attention:
                layer.processor = _Processor(self, site, layer.processor)
            for module, site in self._features:
                handles.append(module.register_forward_hook(self._hook(site)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for layer, processor in originals:
                layer.processor = processor
            self.binding = None

    @contextmanager
    def bound(self, binding: Binding) -> Iterator[None]:
        """Let the controls of a pass act while the network runs."""
        outer, self.binding = self.binding, binding
        try:
            yield
        finally:
            self.binding = outer

    def _hook(self, site: Site) -> Callable[[Any, tuple[Any, ...], Any], Any]:
        def hook(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
            binding = self.binding
            controls = binding.features.get(site.name, ()) if binding is not None else ()
            if binding is None or not controls:
                return None
            hidden = output[0] if isinstance(output, tuple) else output
            changed = False
            for control in controls:
                call = FeatureCall(site, binding.step, binding.layout, binding.phase, inputs[0], hidden)
                result = control.feature(call)
                if result is not None:
                    hidden, changed = result, True
            if not changed:
                return None
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook


class _Processor:
    """Stands in for a layer's processor while a run lasts."""

    def __init__(self, dispatcher: Dispatcher, site: Site, original: Any) -> None:
        self.dispatcher, self.site, self.original = dispatcher, site, original

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        binding = self.dispatcher.binding
        controls = binding.attention.get(self.site.name, ()) if binding is not None else ()
        if binding is not None and controls:
            hidden = _tokens(attn, hidden_states, temb)
            context = encoder_hidden_states
            if context is not None and attn.norm_cross:
                context = attn.norm_encoder_hidden_states(context)
            call = AttentionCall(self.site, binding.step, binding.layout, binding.phase, hidden, context, attn.heads)
            for control in controls:
                control.attention(call)
            if not call.operations.empty:
                out = attend(attn, call, attention_mask)
                return _finish(attn, out, hidden_states)
        return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)


def _tokens(attn: Any, hidden: torch.Tensor, temb: torch.Tensor | None) -> torch.Tensor:
    """[rows, tokens, channels] as the projections get them."""
    if attn.spatial_norm is not None:
        hidden = attn.spatial_norm(hidden, temb)
    if hidden.ndim == 4:
        hidden = hidden.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        hidden = attn.group_norm(hidden.transpose(1, 2)).transpose(1, 2)
    return hidden


def _finish(attn: Any, out: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    out = attn.to_out[1](attn.to_out[0](out))
    if residual.ndim == 4:
        out = out.transpose(-1, -2).reshape(residual.shape[0], -1, *residual.shape[2:])
    if attn.residual_connection:
        out = out + residual
    return out / attn.rescale_output_factor
