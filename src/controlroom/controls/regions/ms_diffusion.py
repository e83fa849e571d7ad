"""MS-Diffusion (Wang et al., "MS-Diffusion: Multi-subject Zero-shot Image Personalization with Layout Guidance",
arXiv 2406.07209).

Each subject is a picture, a name and a box. A resampler whose queries are made of name and box turns the picture into
tokens; every cross-attention layer attends to them beside the words, each query only to the subjects in whose boxes it
lies. Outside of all boxes, and without a prompt, nothing is added.

Deviations from the published code: the picture need not be square (there the number of queries is taken for a square);
boxes follow the views of a canvas; a box that is empty or leaves the picture is an error, where theirs switches the
method off. Its masks from the words' attention, for runs without boxes, are not here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from controlroom.backbones.base import execution_device
from controlroom.backbones.image_encoder import check_image_encoder, image_features
from controlroom.backbones.ip_adapter import find_image_encoder, layer_numbers
from controlroom.backbones.loading import check_device, find_model, keep
from controlroom.backbones.ms_diffusion import (
    Box,
    MSDiffusionModel,
    check_ms_diffusion,
    coarse,
    inside_boxes,
    load_ms_diffusion,
    model_file,
    ms_diffusion_from_tensors,
)
from controlroom.controls.condition_map import rows_of, tiled, tokens_hw
from controlroom.controls.prompt_pictures import check_width, prompt_pixels, squared
from controlroom.core.attention import AttentionCall
from controlroom.core.backbone import Backbone
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import ModelError
from controlroom.core.run import Run

_SIDE = 512
"""Pixels to which the published code stretches the subjects' pictures, whatever their shape."""


@dataclass
class _Memory:
    """What a run knows.

    Attributes:
        model: the networks.
        tokens: [1 or images, dummies + subjects * tokens, width].
        factors: of each token's values, [length, 1]; None: 1.
        inside: [images, subjects, height, width] in pixels of the run, 1 in the boxes.
        numbers: of each layer in the file.
        projected: keys and values, kept since the tokens stay the same.
        seen: bias and mask at the size of a layer, for the views of a plan.
    """

    model: MSDiffusionModel
    tokens: torch.Tensor
    factors: torch.Tensor | None
    inside: torch.Tensor
    numbers: dict[str, int]
    projected: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    seen: dict[tuple[str, int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


class MSDiffusion(Control):
    """Show several subjects of pictures, each in its box.

    Args:
        model: ``.safetensors`` file (or a folder with one), downloaded hub id with the path inside, name of the
            theatre, a mapping of tensors with a file's keys, or an `MSDiffusionModel`.
        images: a picture of each subject; or a list of such lists, one for each prompt.
        boxes: of each subject left, top, right and bottom, 0 to 1 of the picture. They may overlap: both subjects are
            seen there.
        words: what each subject is called, like ``["dog", "cat"]``; None: learned queries stand in for names and boxes,
            which then only say where each subject is seen.
        scale: of what is added; or a list of one number for each subject. 0 is the absence of the control.
        start, end: share of the steps between which it acts.
        image_encoder: folder or loaded `CLIPVisionModelWithProjection`; None: the folder ``image_encoder`` beside the
            file.

    Raises:
        InputError: pictures, boxes, words or scales that do not belong together; a box without an area or outside of
            the picture; at the start of a run, a picture that cannot be read.
        ModelError: at the start of a run: no such model, or one for another base model.
    """

    by_views: ClassVar[bool] = True
    type: Literal["ms_diffusion"] = Field(default="ms_diffusion", kw_only=True)
    model: Any
    images: list[Any]
    boxes: list[Box]
    words: list[str] | None = None
    scale: float | list[float] = 0.6
    start: float = Field(default=0.0, ge=0.0, le=1.0)
    end: float = Field(default=1.0, ge=0.0, le=1.0)
    image_encoder: Any = None

    @model_validator(mode="after")
    def _together(self) -> MSDiffusion:
        listed = [each if isinstance(each, list | tuple) else None for each in self.images]
        nested = any(each is not None for each in listed)
        counts = {len(each or ()) for each in listed} if nested else {len(self.images)}
        if counts != {len(self.boxes)} or not self.boxes:
            raise ValueError(
                f"{max(counts)} pictures for {len(self.boxes)} boxes; expected one box for each, at least one"
            )
        if self.words is not None and (len(self.words) != len(self.boxes) or not all(w.strip() for w in self.words)):
            raise ValueError(f"words is {self.words!r:.60}; expected a name for each of the {len(self.boxes)} subjects")
        if isinstance(self.scale, list) and len(self.scale) != len(self.boxes):
            raise ValueError(f"scale has {len(self.scale)} numbers for {len(self.boxes)} subjects")
        for left, top, right, bottom in self.boxes:
            if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
                raise ValueError(
                    f"a box is {left, top, right, bottom}; expected left < right and top < bottom, from 0 to 1 of the "
                    "picture"
                )
        return self

    def declare(self, outline: Outline) -> Declaration:
        sites = outline.sites("cross")
        claim = Claim("out", "stream", frozenset(site.name for site in sites))
        return Declaration(attention=sites, claims=(claim,))

    @torch.no_grad()
    def prepare(self, run: Run) -> _Memory:
        model = self._model(run.backbone)
        encoder = self._encoder(run, model)
        pixels = prompt_pixels(squared(self.images, _SIDE), encoder.config.image_size, run.images)
        features = image_features(encoder, pixels.flatten(0, 1), states=True).unflatten(0, pixels.shape[:2])
        check_width(features, model.image_proj.reads, "model")
        rows, dtype = features.shape[0], next(model.parameters()).dtype
        boxes = torch.tensor(self.boxes, device=run.device)
        told = None if self.words is not None else torch.zeros(rows, dtype=torch.bool, device=run.device)
        phrases = self._phrases(run, model).to(run.device, dtype)
        features = features.to(run.device, dtype)
        tokens = model.prompt(features, boxes.expand(rows, -1, -1), phrases.expand(rows, -1, -1), told)
        factors = None
        if isinstance(self.scale, list):
            each = torch.tensor(self.scale).repeat_interleave(model.image_proj.tokens)
            dummies = torch.ones(model.dummy_image_tokens.shape[1])
            factors = torch.cat([dummies, each])[:, None].to(tokens)
        inside = inside_boxes(self.boxes, run.size).to(run.device, run.dtype)
        inside = inside.expand(run.images, -1, -1, -1)
        return _Memory(model, tokens.to(run.dtype), factors, inside, layer_numbers(run.backbone.unet))

    def attention(self, call: AttentionCall) -> None:
        memory: _Memory = call.step.memory(self)
        plan, name = call.step.run.plan, call.site.name
        for branch in call.reached(self):
            if plan.branches[branch].role == "uncond":
                continue
            if name not in memory.projected:
                # Kept from pass to pass, so no pass's graph may hang on them.
                with torch.no_grad():
                    k, v = memory.model.keys_and_values(memory.numbers[name], memory.tokens)
                    memory.projected[name] = k, v if memory.factors is None else memory.factors * v
            k, v = memory.projected[name]
            rows = call.layout.size(branch)
            bias, anywhere = self._seen(memory, call, branch)
            scale = 1.0 if isinstance(self.scale, list) else self.scale
            k, v = tiled(k, rows, branch), tiled(v, rows, branch)
            call.stream(branch, k, v, scale=scale, query_mask=anywhere, bias=bias)

    def _seen(self, memory: _Memory, call: AttentionCall, branch: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Bias [rows, 1, queries, tokens] and mask [rows, queries] at the size of the layer."""
        queries, run = call.hidden.shape[1], call.step.run
        key = (branch, queries, id(run.plan))
        if key not in memory.seen:
            inside = (rows_of(memory.inside, run, branch) > 0).to(run.dtype)
            hw = tokens_hw(run.plan.hw_of(branch), queries)
            memory.seen[key] = memory.model.seen(coarse(inside, hw).to(run.dtype))
        return memory.seen[key]

    # Loading.

    def _phrases(self, run: Run, model: MSDiffusionModel) -> torch.Tensor:
        """[subjects, width]: pooled states of the first text encoder; zeros where nothing has a name."""
        width = model.image_proj.phrase
        if self.words is None:
            return torch.zeros(len(self.boxes), width)
        found = pooled_words(run.backbone, self.words)
        if found.shape[-1] != width:
            raise ModelError(
                f"The words' embeddings are {found.shape[-1]} wide, this model reads {width}: it was made for another "
                "text encoder."
            )
        return found

    def _model(self, backbone: Backbone) -> MSDiffusionModel:
        unet = backbone.unet
        if isinstance(self.model, str | os.PathLike):
            path = model_file(find_model(self.model, "MS-Diffusion"))
            return keep(backbone, ("ms_diffusion",), path, lambda: load_ms_diffusion(path, unet)).to(backbone.device)
        if isinstance(self.model, dict):
            return ms_diffusion_from_tensors(self.model, unet).to(backbone.device)
        if not isinstance(self.model, MSDiffusionModel):
            raise ModelError(f"MS-Diffusion cannot be made from a {type(self.model).__name__}; give a path.")
        check_ms_diffusion(self.model, unet)
        check_device(self.model, backbone.device, "model of MS-Diffusion")
        return self.model

    def _encoder(self, run: Run, model: MSDiffusionModel) -> Any:
        encoder = self.image_encoder
        if encoder is not None and not isinstance(encoder, str | os.PathLike):
            check_image_encoder(encoder)
            return encoder
        path = None
        if isinstance(self.model, str | os.PathLike):
            path = model_file(find_model(self.model, "MS-Diffusion"))
        elif encoder is None:
            raise ModelError("A model of MS-Diffusion given in memory has no image encoder beside it. Give it too.")
        return find_image_encoder(encoder, path, model.image_proj, run.backbone)


@torch.no_grad()
def pooled_words(backbone: Any, words: list[str]) -> torch.Tensor:
    """[words, width]: what the first text encoder makes of each, pooled.

    Raises:
        ModelError: the model has no first text encoder (a refiner of Stable Diffusion XL).
    """
    if backbone.text_encoder is None:
        raise ModelError(
            "MS-Diffusion reads the first text encoder, which this model does not have. Use its base model."
        )
    ids = backbone.tokenize(backbone.tokenizer, words)
    return backbone.text_encoder(ids.to(execution_device(backbone.text_encoder))).pooler_output
