"""The reference branch: a UNet over reference latents whose inputs of self-attention another UNet attends to.

Reference-only, MagicPose's appearance module (arXiv 2311.12052), AnimateAnyone's ReferenceNet (arXiv 2311.17117),
IDM-VTON's GarmentNet (arXiv 2403.05139) and BootComp (arXiv 2411.16801) are this one thing with different settings. The
*writer* reads a reference; what each of its self-attentions is given is recorded under the layer's name: the *bank*.
The *reader* joins the bank to the tokens that its own layer of that name projects to keys and values.

Hidden states are stored, not keys and values: the reader's own projections read them. Nothing after the last recorded
layer is of use, so the writer stops there (an exception that never leaves `ReferenceWriter.encode`), and those weights
may be missing from its files.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from controlroom.backbones.differences import is_difference, read_difference
from controlroom.backbones.model_files import explained, read_safetensors
from controlroom.backbones.sites import attention_sites, stages
from controlroom.core.errors import ModelError

Bank = dict[str, Tensor]
"""Name of a self-attention layer -> [rows, tokens, channels], what that layer was given."""


class _Finished(Exception):
    """The last layer to record has been reached."""


class ReferenceWriter:
    """Records what the self-attentions of a UNet are given.

    Args:
        unet: `UNet2DConditionModel`: the main one (shared), a trained copy, or another of the same layers.
        layers: names of self-attention layers, in the order of execution.

    Raises:
        ModelError: the UNet lacks one of the layers.
    """

    def __init__(self, unet: Any, layers: Sequence[str]) -> None:
        found = dict(unet.named_modules())
        missing = [name for name in layers if name not in found]
        if missing or not layers:
            raise ModelError(
                f"This network cannot supply a reference: it lacks {len(missing)} of the {len(layers)} self-attention "
                f"layers asked for (such as {next(iter(missing), 'any')}). Use one made for this base model."
            )
        self.unet = unet
        self.layers = tuple(layers)
        self._modules: list[nn.Module] = [found[name] for name in layers]

    def encode(
        self,
        latents: Tensor,
        tokens: Tensor,
        timestep: Tensor | float = 0,
        added: Mapping[str, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> Bank:
        """Run the writer up to its last recorded layer; nothing of it is left on the network.

        Gradients flow into the bank unless they are switched off outside.

        Args:
            latents: [R, C, h, w], scaled as for the UNet.
            tokens: [R, length, width] states of the text encoder.
            timestep: scalar or [R]; 0 for a clean reference.
            added: pooled text and time ids of Stable Diffusion XL.
            mask: [R, length] of the text, 1 keeps a token.

        Returns:
            Layer -> [R, tokens of that layer, channels].
        """
        bank: Bank = {}
        last = self.layers[-1]
        handles = []

        def record(name: str) -> Any:
            def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
                bank[name] = inputs[0] if inputs else named["hidden_states"]
                if name == last:
                    raise _Finished

            return hook

        try:
            for name, module in zip(self.layers, self._modules, strict=True):
                # Before all others: the hooks of whoever offloads this layer need not run, for it will not.
                handles.append(module.register_forward_pre_hook(record(name), prepend=True, with_kwargs=True))
            more: dict[str, Any] = {} if added is None else {"added_cond_kwargs": dict(added)}
            if mask is not None:
                more["encoder_attention_mask"] = mask
            self.unet(latents, timestep, encoder_hidden_states=tokens, return_dict=False, **more)
        except _Finished:
            return bank
        finally:
            for handle in handles:
                handle.remove()
        raise ModelError(f"The network never reached its layer {last}, so its reference is not whole.")


def self_attention_layers(unet: Any) -> tuple[str, ...]:
    """Names of the self-attention layers, in the order of execution."""
    return tuple(site.name for site in attention_sites(unet, (64, 64)) if site.kind == "self")


def prune(unet: Any, last: str) -> Any:
    """Drop, in place, everything that comes after the input of the layer ``last``; returns the UNet.

    What is dropped becomes `nn.Identity`, which has no weights and is never reached.
    """
    prefix, _, block = last.partition(".transformer_blocks.")
    number = int(block.partition(".")[0])
    after = False
    dead: list[str] = []
    for name, _, _, _, _ in stages(unet, (64, 64)):
        if after:
            dead.append(name)
        after = after or name == prefix
    if not after:
        raise ModelError(f"{last} is not a layer of this network.")
    transformer = unet.get_submodule(prefix)
    dead += [f"{prefix}.{name}" for name, _ in transformer.named_children() if name == "proj_out"]
    blocks = [f"{prefix}.transformer_blocks.{i}" for i in range(number, len(transformer.transformer_blocks))]
    for position, name in enumerate(blocks):
        parts = [child for child, _ in unet.get_submodule(name).named_children()]
        dead += [f"{name}.{child}" for child in parts if position > 0 or child != "norm1"]
    dead += [name for name in ("conv_norm_out", "conv_out") if getattr(unet, name, None) is not None]
    for name in dead:
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, nn.Identity())
    return unet


def new_writer(unet: Any) -> Any:
    """A copy of a UNet to be trained as a writer, without the weights that would be dead."""
    writer = prune(copy.deepcopy(unet), self_attention_layers(unet)[-1])
    return writer.requires_grad_(True)


def load_writer(path: Path, unet: Any) -> Any:
    """A trained writer for ``unet``, in its precision, on its device, not learning.

    Args:
        path: folder in diffusers' layout of a UNet (its weights after the last self-attention may be missing), or a
            ``.safetensors`` file, whose configuration is the UNet's own.
        unet: the network that will read.

    Raises:
        ModelError: broken, weights missing or left over, or made for another base model.
    """
    import diffusers

    kind = diffusers.UNet2DConditionModel
    if path.is_dir():
        config = explained(str(path), lambda: kind.load_config(str(path), local_files_only=True))
        if config.get("_class_name", kind.__name__) != kind.__name__:
            raise ModelError(f"{path} holds a {config['_class_name']}; expected the UNet2DConditionModel of a writer.")
        files = sorted(path.glob("*.safetensors"))
        files = [file for file in files if file.name.count(".") == 1] or files
        if not files:
            raise ModelError(f"{path} has no .safetensors file. Copy its weights there.")
    else:
        config, files = dict(unet.config), [path]
    stored: dict[str, Tensor] = read_difference(path) if is_difference(path) else {}
    for file in files if not stored else ():
        stored.update(read_safetensors(file))
    # Without memory first: random numbers for a large network that is overwritten anyway take a minute.
    with torch.device("meta"):
        writer: Any = explained(str(path), lambda: kind.from_config(config))
    known = set(writer.state_dict())
    prune(writer, self_attention_layers(writer)[-1])
    alive = writer.state_dict()
    missing = sorted(set(alive) - set(stored))
    unknown = sorted(set(stored) - known)
    if missing or unknown:
        raise ModelError(
            f"{path} is not a writer of references: {len(missing)} weights are missing (such as "
            f"{next(iter(missing), 'none')}), {len(unknown)} are unknown (such as {next(iter(unknown), 'none')})."
        )
    odd = [key for key, value in alive.items() if value.shape != stored[key].shape]
    if odd:
        found, asked = list(stored[odd[0]].shape), list(alive[odd[0]].shape)
        raise ModelError(f"{path} has {odd[0]!r} as {found}, its configuration asks for {asked}.")
    # Copies: tensors that lie in the mapped file are not aligned, and round differently.
    writer.load_state_dict({key: stored.pop(key).to(unet.dtype, copy=True) for key in alive}, assign=True)
    check_writer(writer, unet, str(path))
    return writer.to(device=unet.device).eval().requires_grad_(False)


def check_writer(writer: Any, unet: Any, name: str) -> None:
    """The writer's layers and text are those that ``unet`` has.

    Raises:
        ModelError: another kind of model, or made for another base model.
    """
    if type(writer).__name__ != "UNet2DConditionModel":
        raise ModelError(f"{name} is a {type(writer).__name__}; expected a diffusers UNet2DConditionModel.")
    layers = self_attention_layers(unet)
    ours, theirs = dict(writer.named_modules()), dict(unet.named_modules())
    for layer in layers:
        norm = f"{layer.rpartition('.')[0]}.norm1"
        width = None if norm not in ours else tuple(ours[norm].weight.shape)
        if width != tuple(theirs[norm].weight.shape):
            raise ModelError(
                f"{name} was made for another base model: its {norm} has {'no width' if width is None else width[0]}, "
                f"this model's {theirs[norm].weight.shape[0]}. Use the one for this model."
            )
    for field in ("cross_attention_dim", "addition_embed_type"):
        if _plain(writer.config.get(field)) != _plain(unet.config.get(field)):
            raise ModelError(
                f"{name} was made for another base model: its {field} is {writer.config.get(field)}, this model's "
                f"{unet.config.get(field)}. Use the one for this model."
            )


def _plain(value: Any) -> Any:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values[0] if len(set(map(str, values))) == 1 else values


# -- reading with gradients --------------------------------------------------------------------------------------------


@contextmanager
def joined(unet: Any, bank: Bank, keep: Tensor | None = None) -> Iterator[None]:
    """Let the self-attentions of ``unet`` attend to a bank as well, with gradients: how writers are trained.

    Equal to ``extend(tokens=...)`` of the engine at scale 1. Afterwards the processors are as before.

    Args:
        unet: the reader.
        bank: from `ReferenceWriter.encode`; rows as in the batch, or 1.
        keep: bool [rows], False where the bank is not seen; None: seen by all.
    """
    layers = [(unet.get_submodule(name), tokens) for name, tokens in bank.items()]
    before = [layer.processor for layer, _ in layers]
    try:
        for layer, tokens in layers:
            layer.processor = _Joined(tokens, keep)
        yield
    finally:
        for (layer, _), processor in zip(layers, before, strict=True):
            layer.processor = processor


class _Joined:
    """Self-attention over a layer's own tokens and a reference's. Explicit: on a CPU it trains faster than SDPA."""

    def __init__(self, tokens: Tensor, keep: Tensor | None) -> None:
        self.tokens, self.keep = tokens, keep

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **named: Any) -> Tensor:
        tokens = self.tokens.expand(hidden_states.shape[0], -1, -1).to(hidden_states.dtype)
        context = torch.cat([hidden_states, tokens], dim=1)
        q, k, v = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        logits = q @ k.transpose(-1, -2) * attn.scale
        if self.keep is not None:
            hidden = torch.zeros(1, 1, 1, context.shape[1], dtype=torch.bool, device=logits.device)
            hidden[..., hidden_states.shape[1] :] = True
            logits = logits.masked_fill(hidden & ~self.keep[:, None, None, None], float("-inf"))
        out = logits.float().softmax(-1).to(v.dtype) @ v
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
