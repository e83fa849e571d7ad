"""IP-Adapter (Ye et al., "IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models",
arXiv 2308.06721).

A picture becomes a few tokens, to which every cross-attention layer attends with the same queries but keys and values
of its own; the result is added to that of the words.

Scales by layer are those of InstantStyle (arXiv 2404.02733). Deviations from diffusers: a mask keeps its grey values;
``aggregate`` makes one prompt of several pictures of a subject (`backbones.image_aggregator`); scales for each picture
also work without masks, where each picture is then attended to by itself.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator

from controlroom.backbones.image_aggregator import Aggregate
from controlroom.backbones.image_encoder import check_image_encoder, image_features
from controlroom.backbones.image_projection import FaceProjection
from controlroom.backbones.ip_adapter import (
    IPAdapterModel,
    adapted_attention,
    adapter_file,
    adapter_from_tensors,
    check_adapter,
    find_image_encoder,
    layer_numbers,
    load_ip_adapter,
)
from controlroom.backbones.loading import check_device, find_model, keep
from controlroom.controls.condition_map import rows_of, tiled, tokens_hw
from controlroom.controls.layer_scales import Scale, layer_scales, leaves
from controlroom.controls.prompt_pictures import check_width, given_features, prompt_pixels
from controlroom.controls.run_mask import RunMask, joined_sites, mask_sites, run_mask
from controlroom.controls.word_mask import MaskInput
from controlroom.core.attention import AttentionCall
from controlroom.core.backbone import Backbone
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import InputError, ModelError
from controlroom.core.run import Run
from controlroom.core.step import Step


@dataclass
class _Memory:
    """What a run knows of one adapter.

    Attributes:
        model: the adapter.
        tokens: of the pictures, [1 or images, groups, length, width], a group for each picture unless they were made
            one; and for branches without words.
        masks: one for each picture, or one for all; empty: none.
        scales: of each layer.
        numbers: of each layer in the file.
        apart: each picture is attended to by itself.
        projected: keys and values, kept since the tokens stay the same.
        queries: masks at the size of a layer, for the views of a plan.
    """

    model: IPAdapterModel
    tokens: dict[bool, torch.Tensor]
    masks: list[RunMask]
    scales: dict[str, Scale]
    numbers: dict[str, int]
    apart: bool
    projected: dict[tuple[str, bool, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    queries: dict[tuple[str, int, int, int], torch.Tensor] = field(default_factory=dict)


class IPAdapter(Control):
    """Let a picture say what words cannot: a prompt made of pictures, beside the words.

    Args:
        model: ``.safetensors`` file (or a folder with one), downloaded hub id with the path inside, name of the
            theatre, a mapping of tensors with a file's keys, or an `IPAdapterModel`. Base, plus, full face, FaceID and
            FaceID-plus files are told apart by their keys; FaceID's changes to the layers act in the whole run.
        image: a picture, or a list of several: their tokens are joined. A list of lists: one list for each prompt. A
            float tensor ``[n, 3, S, S]`` of the image encoder's size with values outside [0, 1] is taken as normalised
            already.
        embeds: features instead of pictures (for FaceID-plus a face's identity, beside its picture): ``[pictures, …]``,
            or ``[2, pictures, …]`` with those of the branch without words first, as diffusers'
            ``ip_adapter_image_embeds``.
        scale: a number; by layer, ``{"up": {"block_0": [0.0, 1.0, 0.0]}}`` (the rest is 0); or a list of one number for
            each picture, which are then attended to by themselves. 0 is the absence of the control.
        mask: white where the pictures act; or one for each picture, which are then attended to by themselves.
            Pictures, or words of the prompt (``"words: red hat"``), which are looked up from the second step on.
        start, end: share of the steps between which it acts.
        aggregate: what becomes of several pictures: ``tokens`` joins those of all; ``max`` and ``average`` pool their
            features; ``attention`` lets them look at each other, as the adapter was trained to. Masks and scales are
            then of all together. None: as the file says, which is ``tokens`` for all published ones.
        image_encoder: folder or loaded `CLIPVisionModelWithProjection`; None: the folder ``image_encoder`` beside the
            file.
        shortcut: of FaceID-plus, version 2, whose files are like those of version 1: weight of what was read of the
            picture beside the identity's own tokens (published: 1). None: version 1.

    Raises:
        InputError: neither or both of image and embeds; at the start of a run, something that does not fit.
        ModelError: at the start of a run: no such model, or one for another base model.
    """

    by_views: ClassVar[bool] = True
    type: Literal["ip_adapter"] = Field(default="ip_adapter", kw_only=True)
    model: Any
    image: Any = None
    embeds: Any = None
    scale: float | dict[str, Any] | list[Any] = 1.0
    mask: MaskInput = None
    start: float = Field(default=0.0, ge=0.0, le=1.0)
    end: float = Field(default=1.0, ge=0.0, le=1.0)
    aggregate: Aggregate | None = None
    image_encoder: Any = None
    shortcut: float | None = None

    @field_validator("scale", mode="after")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        if not leaves(value):
            raise ValueError("expected a number, or numbers by layer")
        return value

    def neutral(self, n: int) -> bool:
        return not any(leaves(self.scale)) or not self.window(n)

    def declare(self, outline: Outline) -> Declaration:
        scales = layer_scales(self.scale, outline.sites("cross"))
        sites = tuple(site for site in outline.attention if site.name in scales and any(leaves(scales[site.name])))
        return Declaration(
            attention=joined_sites(sites, mask_sites(outline, *_masks(self.mask))),
            claims=(Claim("out", "stream", frozenset(site.name for site in sites)),),
        )

    def attach(self, backbone: Backbone) -> AbstractContextManager[None] | None:
        adapter = self._adapter(backbone)
        return adapted_attention(adapter, backbone.unet) if adapter.adapts_attention else None

    def prepare(self, run: Run) -> _Memory:
        adapter = self._adapter(run.backbone)
        if isinstance(adapter.image_proj, FaceProjection):
            if self.image is None or self.embeds is None:
                raise InputError("A FaceID-plus adapter reads a face's identity and picture: give embeds and image.")
        elif (self.image is None) == (self.embeds is None):
            raise InputError("IPAdapter needs a picture: give image or embeds, one of them.")
        positive, negative = self._features(run, adapter)
        tokens = {False: self._tokens(adapter, positive)}
        if negative is not None:
            tokens[True] = self._tokens(adapter, negative)
        masks = [run_mask(mask, run, self, name) for name, mask in _named(_masks(self.mask))]
        scales = layer_scales(self.scale, run.plan.outline.sites("cross"))
        pictures, lists = tokens[False].shape[1], [x for x in scales.values() if isinstance(x, list)]
        made_one = (self.aggregate or adapter.aggregate) != "tokens"
        hint = ' and aggregate="tokens", since they were made one' if made_one else ""
        if len(masks) not in (0, 1, pictures):
            raise InputError(f"There are {len(masks)} masks for {pictures} pictures. Give one, or one for each{hint}.")
        if any(len(x) != pictures for x in lists):
            raise InputError(
                f"scale has {len(lists[0])} numbers for {pictures} pictures. Give one, or one for each{hint}."
            )
        apart = len(masks) > 1 or bool(lists)
        return _Memory(adapter, tokens, masks, scales, layer_numbers(run.backbone.unet), apart)

    def before(self, step: Step) -> None:
        """Masks by words move on."""
        memory: _Memory = step.memory(self)
        for mask in memory.masks:
            if mask.update():
                memory.queries.clear()

    def attention(self, call: AttentionCall) -> None:
        memory: _Memory = call.step.memory(self)
        name, plan = call.site.name, call.step.run.plan
        for mask in memory.masks:
            mask.attention(call)
        scale = memory.scales.get(name, 0.0)
        pictures = range(memory.tokens[False].shape[1]) if memory.apart else (0,)
        for branch in call.reached(self):
            negative = plan.branches[branch].role == "uncond"
            for picture in pictures:
                factor = scale[picture] if isinstance(scale, list) else scale
                if factor == 0:
                    continue
                k, v = self._projected(memory, name, negative, picture)
                rows = call.layout.size(branch)
                k, v = tiled(k, rows, branch), tiled(v, rows, branch)
                mask = self._query_mask(memory, call, branch, picture) if memory.masks else None
                call.stream(branch, k, v, scale=factor, query_mask=mask)

    def _projected(self, memory: _Memory, name: str, negative: bool, picture: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer: those of one picture, or of all joined."""
        key = (name, negative, picture)
        if key not in memory.projected:
            tokens = memory.tokens[negative]
            tokens = tokens[:, picture] if memory.apart else tokens.flatten(1, 2)
            # Kept from pass to pass, so no pass's graph may hang on them.
            with torch.no_grad():
                memory.projected[key] = memory.model.keys_and_values(memory.numbers[name], tokens)
        return memory.projected[key]

    def _query_mask(self, memory: _Memory, call: AttentionCall, branch: str, picture: int) -> torch.Tensor:
        """[rows, queries]: the mask at the size of the layer."""
        queries, run = call.hidden.shape[1], call.step.run
        key = (branch, picture, queries, id(run.plan))
        if key not in memory.queries:
            mask = rows_of(memory.masks[picture % len(memory.masks)].pixels, run, branch)
            hw = tokens_hw(run.plan.hw_of(branch), queries)
            # Bicubic without smoothing, as diffusers does.
            memory.queries[key] = F.interpolate(mask.float(), size=hw, mode="bicubic").flatten(1).to(run.dtype)
        return memory.queries[key]

    # Loading.

    def _adapter(self, backbone: Backbone) -> IPAdapterModel:
        unet = backbone.unet
        if isinstance(self.model, str | os.PathLike):
            path = adapter_file(find_model(self.model, "IP-Adapter"))
            return keep(backbone, ("ip_adapter",), path, lambda: load_ip_adapter(path, unet)).to(backbone.device)
        if isinstance(self.model, dict):
            return adapter_from_tensors(self.model, unet).to(backbone.device)
        if not isinstance(self.model, IPAdapterModel):
            raise ModelError(f"An IP-Adapter cannot be made from a {type(self.model).__name__}; give a path.")
        check_adapter(self.model, unet)
        check_device(self.model, backbone.device, "IP-Adapter")
        return self.model

    def _features(self, run: Run, adapter: IPAdapterModel) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features of the pictures [1 or images, pictures, …], and those of the branches without words."""
        needed = any(branch.role == "uncond" for branch in run.plan.branches.values())
        projection = adapter.image_proj
        if isinstance(projection, FaceProjection):
            return self._face_features(run, adapter, projection, needed)
        if self.embeds is not None:
            positive, negative = given_features(self.embeds, projection.reads, 2 if projection.states else 1)
            if needed and negative is None and projection.states:
                side = torch.zeros(1, 3, *[self._encoder(run, adapter).config.image_size] * 2)
                zero = image_features(self._encoder(run, adapter), side, states=True)[:, None]
                negative = zero.expand(-1, positive.shape[1], *zero.shape[2:])
        else:
            if projection.identity:
                raise InputError("A FaceID adapter reads a face's identity vector, not a picture. Give it as embeds.")
            positive, negative = self._picture_features(run, adapter, needed)
        check_width(positive, projection.reads)
        if needed and negative is None:
            negative = torch.zeros_like(positive[:1])
        return positive.to(run.device, run.dtype), None if negative is None else negative.to(run.device, run.dtype)

    def _picture_features(
        self, run: Run, adapter: IPAdapterModel, needed: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features of the pictures, and those of no picture where they are not zeros."""
        projection, encoder = adapter.image_proj, self._encoder(run, adapter)
        pixels = prompt_pixels(self.image, encoder.config.image_size, run.images)
        flat = image_features(encoder, pixels.flatten(0, 1), projection.states)
        positive, negative = flat.unflatten(0, pixels.shape[:2]), None
        if needed and projection.states:
            # One black-out picture serves all: zeros after normalisation, as in training.
            zero = image_features(encoder, torch.zeros_like(pixels[0, :1]), states=True)[None]
            negative = zero.expand(-1, positive.shape[1], -1, -1)
        return positive, negative

    def _face_features(
        self, run: Run, adapter: IPAdapterModel, projection: FaceProjection, needed: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Identities and pictures of faces in one tensor, and those of no face."""
        identity, nobody = given_features(self.embeds, projection.face, 1)
        positive, negative = self._picture_features(run, adapter, needed)
        check_width(positive, projection.reads)
        if identity.shape[1] != positive.shape[1]:
            raise InputError(
                f"There are {identity.shape[1]} identities in embeds and {positive.shape[1]} pictures. Give as many."
            )
        place = {"device": run.device, "dtype": run.dtype}
        found = projection.packed(identity.expand(positive.shape[0], -1, -1).to(**place), positive.to(**place))
        if negative is None:
            return found, None
        nobody = torch.zeros_like(identity) if nobody is None else nobody
        return found, projection.packed(nobody.to(**place), negative.to(**place))

    def _tokens(self, adapter: IPAdapterModel, features: torch.Tensor) -> torch.Tensor:
        """[rows, pictures, …] -> [rows, groups, length, width]."""
        projection, features = adapter.image_proj, features.to(next(adapter.parameters()).dtype)
        with torch.no_grad():
            found = adapter.tokens(features, self.aggregate)
            if self.shortcut is None:
                return found
            if not isinstance(projection, FaceProjection) or (self.aggregate or adapter.aggregate) != "tokens":
                raise InputError("shortcut is for FaceID-plus adapters whose pictures stay apart. Leave it out.")
            return projection.face_tokens(features) + self.shortcut * found

    def _encoder(self, run: Run, adapter: IPAdapterModel) -> Any:
        encoder = self.image_encoder
        if encoder is not None and not isinstance(encoder, str | os.PathLike):
            check_image_encoder(encoder)
            return encoder
        path = None
        if isinstance(self.model, str | os.PathLike):
            path = adapter_file(find_model(self.model, "IP-Adapter"))
        return find_image_encoder(encoder, path, adapter.image_proj, run.backbone)


def _masks(mask: Any) -> list[Any]:
    if mask is None:
        return []
    if isinstance(mask, torch.Tensor) and mask.ndim in (3, 4):
        return list(mask.reshape(-1, *mask.shape[-2:]))
    return list(mask) if isinstance(mask, list | tuple) else [mask]


def _named(masks: list[Any]) -> list[tuple[str, Any]]:
    """What each mask is called: ``mask``, or ``mask 1``, ``mask 2``."""
    return [("mask" if len(masks) == 1 else f"mask {i + 1}", mask) for i, mask in enumerate(masks)]
