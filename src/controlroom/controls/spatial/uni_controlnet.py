"""Uni-ControlNet (Zhao et al., "Uni-ControlNet: All-in-One Control to Text-to-Image Diffusion Models",
arXiv 2305.16322).

One local adapter reads any of up to eight condition maps at once, each in channels of its own, and one global adapter
turns a picture's content into further words; both were trained for themselves and act together.

The global tokens join the keys and values of every cross-attention, which is what appending them to the text is.
Deviations from the published code: its strength of the local adapter was never read, here it is; without a picture of
the content no tokens are joined and without a map the local adapter does not run (the published code always runs both,
on zeros, which its training of one adapter at a time does not); ``scale``, ``mask`` and the window are ours.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, SerializerFunctionWrapHandler, field_serializer, field_validator

from controlroom.backbones.image_encoder import check_image_encoder, image_features, load_image_encoder
from controlroom.backbones.loading import check_device, find_model, keep
from controlroom.backbones.uni_controlnet import (
    ENCODER,
    GLOBAL,
    KINDS,
    LOCAL,
    GlobalAdapter,
    LocalAdapter,
    check_global_adapter,
    check_local_adapter,
    load_global_adapter,
    load_local_adapter,
    part_folder,
)
from controlroom.controls.condition_map import tiled
from controlroom.controls.prompt_pictures import check_width, prompt_pixels
from controlroom.controls.run_mask import RunMask, joined_sites, mask_sites, run_mask
from controlroom.controls.side_maps import side_map
from controlroom.controls.side_passes import SideRows, masked_residuals, shared_passes
from controlroom.controls.word_mask import MaskInput
from controlroom.core import inputs
from controlroom.core.attention import AttentionCall
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline, Residuals, Settings
from controlroom.core.errors import InputError, ModelError
from controlroom.core.pose import Pose
from controlroom.core.run import Run
from controlroom.core.step import Step


class LocalConditions(Settings):
    """Condition maps by kind; those left out are absent. Each as a ControlNet's ``image``."""

    canny: Any = None
    soft_edge: Any = None
    lines: Any = None
    scribble: Any = None
    depth: Any = None
    normal: Any = None
    segmentation: Any = None
    pose: Any = None

    @field_validator("*", mode="before")
    @classmethod
    def _decode(cls, value: Any) -> Any:
        return inputs.decode(value)

    @field_validator("pose", mode="after")
    @classmethod
    def _storable(cls, value: Any) -> Any:
        """Poses as documents, so that a run can be written down."""
        if isinstance(value, list | tuple):
            return [cls._storable(item) for item in value]
        if isinstance(value, Pose):
            from controlroom.signals.pose.openpose_json import openpose_json

            return openpose_json(value)
        return value

    @field_serializer("*", mode="wrap", when_used="json")
    def _encode(self, value: Any, handler: SerializerFunctionWrapHandler) -> Any:
        return inputs.encode(value) if inputs.is_opaque(value) else handler(value)

    @property
    def given(self) -> dict[str, Any]:
        """Kind -> map, of those that are not absent."""
        return {kind: value for kind in KINDS if (value := getattr(self, kind)) is not None}


@dataclass
class _Memory:
    """What a run knows of the adapters.

    Attributes:
        net: the local adapter; None: there is no map, or it is silent.
        rows: of the conditions and the mask, where there is a local adapter.
        tokens: of the global adapter, times its scale, [1 or images, tokens, width], for branches with words (False)
            and without (True); empty: there is no picture of the content.
        mask: where it acts, or None.
        biases: of the tokens' logits, where there is a mask.
    """

    net: LocalAdapter | None
    rows: SideRows | None
    tokens: dict[bool, torch.Tensor]
    mask: RunMask | None
    biases: dict[tuple[str, int, int], torch.Tensor] = field(default_factory=dict)


class UniControlNet(Control):
    """Draw along any of several condition maps, and after the content of a picture, with one model.

    Args:
        model: folder with ``local`` and ``global`` (or one of them), downloaded hub id, name of the theatre
            (``theatre/uni_controlnet``), or a mapping ``{"local": LocalAdapter, "global": GlobalAdapter}``.
        images: condition maps by kind: `LocalConditions` or a mapping of its fields (canny, soft_edge, lines, scribble,
            depth, normal, segmentation, pose). Those left out are zeros, as in training.
        content: a picture whose content the result shall have; a list: one for each prompt.
        scale: of everything. 0 is the absence of the control; above 1 only the local adapter gets stronger.
        local_scale: factor of all residuals of the local adapter.
        global_scale: the published weight λ of the global adapter's tokens. 0: they are not joined.
        start, end: share of the steps between which it acts.
        mask: white where it may act: a picture, a list of one for each prompt, or words of the prompt.
        image_encoder: folder or loaded `CLIPVisionModelWithProjection`; None: ``image_encoder`` in the model's
            ``global``.

    Raises:
        InputError: neither a map nor a content; at the start of a run, something that does not fit.
        ModelError: at the start of a run: no such model, or one for another base model.
    """

    by_views: ClassVar[bool] = True
    type: Literal["uni_controlnet"] = Field(default="uni_controlnet", kw_only=True)
    model: Any
    images: LocalConditions = Field(default_factory=LocalConditions)
    content: Any = None
    scale: float = Field(default=1.0, ge=0.0)
    local_scale: float = 1.0
    global_scale: float = 1.0
    start: float = Field(default=0.0, ge=0.0, le=1.0)
    end: float = Field(default=1.0, ge=0.0, le=1.0)
    mask: MaskInput = None
    image_encoder: Any = None

    @property
    def _local(self) -> bool:
        return bool(self.images.given) and self.local_scale != 0

    @property
    def _global(self) -> bool:
        return self.content is not None and self.global_scale != 0

    def neutral(self, n: int) -> bool:
        given = bool(self.images.given) or self.content is not None
        return super().neutral(n) or (given and not self._local and not self._global)

    def declare(self, outline: Outline) -> Declaration:
        if not self._local and not self._global:
            raise InputError(f"{self.label} was given nothing to draw along: give images (by kind) or content.")
        claims, sites = [], ()
        if self._local:
            claims.append(Claim("skip", "add"))
        if self._global:
            sites = outline.sites("cross")
            names = frozenset(site.name for site in sites)
            claims += [Claim("k", "extend", names), Claim("v", "extend", names)]
        return Declaration(attention=joined_sites(sites, mask_sites(outline, self.mask)), claims=tuple(claims))

    # Loading.

    def prepare(self, run: Run) -> _Memory:
        net = self._local_adapter(run) if self._local else None
        tokens = self._tokens(run) if self._global else {}
        mask = None if self.mask is None else run_mask(self.mask, run, self)
        rows = None if net is None else SideRows(self._conditions(run, net), mask)
        return _Memory(net, rows, tokens, mask)

    def _conditions(self, run: Run, net: LocalAdapter) -> torch.Tensor:
        """[images, 3 * kinds, H, W]: the maps that were given in the adapter's order, zeros for the others."""
        given = self.images.given
        unknown = [kind for kind in given if kind not in net.kinds]
        if unknown:
            raise InputError(f"{self.label}: this model does not know {unknown[0]}. It knows: {', '.join(net.kinds)}.")
        height, width = run.size
        zeros = torch.zeros(run.images, 3, height, width, device=run.device, dtype=run.dtype)
        maps = [side_map(given[k], run, 3, f"condition {k}") if k in given else zeros for k in net.kinds]
        return torch.cat(maps, dim=1)

    def _folder(self, part: str) -> Path:
        return part_folder(find_model(self.model, "Uni-ControlNet"), part)

    def _given(self, part: str, kind: type) -> Any:
        found = self.model.get(part) if isinstance(self.model, Mapping) else self.model
        if not isinstance(found, kind):
            raise ModelError(f"The {part} adapter of a Uni-ControlNet cannot be a {type(found).__name__}; give a path.")
        return found

    def _local_adapter(self, run: Run) -> LocalAdapter:
        unet, backbone, halvings = run.backbone.unet, run.backbone, run.backbone.pixels_per_latent.bit_length() - 1
        if isinstance(self.model, str | os.PathLike):
            path = self._folder(LOCAL)
            net = keep(backbone, ("uni_local",), path, lambda: load_local_adapter(path, unet)).to(run.device)
        else:
            net = self._given(LOCAL, LocalAdapter)
            check_device(net, run.device, "local adapter")
        check_local_adapter(net, unet, halvings, str(self.model) if isinstance(self.model, str) else "given")
        return net

    def _tokens(self, run: Run) -> dict[bool, torch.Tensor]:
        """Tokens of the content, and of no content for the branches without words, times λ."""
        unet, backbone = run.backbone.unet, run.backbone
        if isinstance(self.model, str | os.PathLike):
            path = self._folder(GLOBAL)
            net = keep(backbone, ("uni_global",), path, lambda: load_global_adapter(path, unet)).to(run.device)
        else:
            net = self._given(GLOBAL, GlobalAdapter)
            check_global_adapter(net, unet, "given")
            check_device(net, run.device, "global adapter")
        encoder = self._encoder(run)
        listed = isinstance(self.content, list | tuple) and bool(self.content)
        each = [[picture] for picture in self.content] if listed else self.content
        pixels = prompt_pixels(each, encoder.config.image_size, run.images)
        with torch.no_grad():
            features = image_features(encoder, pixels[:, 0], states=False)
            check_width(features, net.settings["reads"])
            features = features.to(next(net.parameters()))
            both = {False: net(features), True: net(torch.zeros_like(features[:1]))}
        return {absent: self.global_scale * tokens.to(run.dtype) for absent, tokens in both.items()}

    def _encoder(self, run: Run) -> Any:
        given = self.image_encoder
        if given is not None and not isinstance(given, str | os.PathLike):
            check_image_encoder(given)
            return given
        if given is not None:
            return load_image_encoder(find_model(given, "image encoder"), run.backbone).to(run.device)
        if not isinstance(self.model, str | os.PathLike) or not (self._folder(GLOBAL) / ENCODER).is_dir():
            raise ModelError(f"{self.label} needs the image encoder that its global adapter reads: image_encoder=….")
        return load_image_encoder(self._folder(GLOBAL) / ENCODER, run.backbone).to(run.device)

    # A step.

    def before(self, step: Step) -> None:
        """A mask by words moves on."""
        memory: _Memory = step.memory(self)
        if memory.mask is not None and memory.mask.update():
            memory.biases.clear()
            if memory.rows is not None:
                memory.rows.joined.clear()

    def attention(self, call: AttentionCall) -> None:
        """Join the global adapter's tokens."""
        memory: _Memory = call.step.memory(self)
        if memory.mask is not None:
            memory.mask.attention(call)
        if not memory.tokens or call.site.kind != "cross":
            return
        for name in call.reached(self):
            tokens = self._tokens_of(call.step, memory, name, call.layout.size(name))
            bias = None if memory.mask is None else self._bias(call, memory, name)
            call.extend(name, tokens=tokens, bias=bias, share=min(1.0, self.scale))

    def _tokens_of(self, step: Step, memory: _Memory, name: str, rows: int) -> torch.Tensor:
        tokens = memory.tokens[step.run.plan.branches[name].role == "uncond"]
        return tiled(tokens, rows, name).expand(rows, -1, -1)

    def _bias(self, call: AttentionCall, memory: _Memory, name: str) -> torch.Tensor:
        """[rows, 1, queries, 1]: logarithm of the mask, so that the tokens are not seen where it is black."""
        run, queries = call.step.run, call.hidden.shape[1]
        key = (name, queries, id(run.plan))
        if key not in memory.biases:
            assert memory.mask is not None
            memory.biases[key] = memory.mask.tokens(name, queries).float().log()[:, None, :, None]
        return memory.biases[key]

    def side(self, step: Step) -> tuple[Residuals, ...] | None:
        memory: _Memory = step.memory(self)
        net, rows = memory.net, memory.rows
        if net is None or rows is None:
            return None
        groups = shared_passes(step, step.reached(self))
        return tuple(self._pass(step, memory, net, rows, names) for names in groups)

    def _pass(
        self, step: Step, memory: _Memory, net: LocalAdapter, rows: SideRows, names: tuple[str, ...]
    ) -> Residuals:
        """One forward of the local adapter over some branches."""
        run, given, dtype = step.run, step.inputs(names), net.dtype
        conditions, mask = rows.of(run, names)
        context = given.condition.tokens
        if memory.tokens:
            tokens = [self._tokens_of(step, memory, name, given.layout.size(name)) for name in names]
            context = torch.cat([context, torch.cat(tokens).to(context)], dim=1)
        added = run.backbone.added_conditions(given.condition)
        down, mid = net(given.sample.to(dtype), given.timestep, context.to(dtype), conditions.to(dtype), added)
        step.count_side(given.layout.total)
        factor = self.scale * self.local_scale
        return masked_residuals(names, (factor * x for x in (*down, mid)), mask, run.dtype)
