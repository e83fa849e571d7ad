"""InstantID (Wang et al., "InstantID: Zero-shot Identity-Preserving Generation in Seconds", arXiv 2401.07519).

A face's identity becomes sixteen tokens. The UNet attends to them beside the words (as an IP-Adapter); IdentityNet, a
ControlNet that sees five points of the face, attends to them in the place of the words.

Deviations from the published code: ``mask`` also confines IdentityNet; several images of a run may have different
faces; without ``keypoints`` IdentityNet does not run, and only the tokens act.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, SerializerFunctionWrapHandler, field_serializer, field_validator

from controlroom.backbones.instant_id import face_encoder_beside, find_identity_adapter, find_identity_net
from controlroom.backbones.ip_adapter import IPAdapterModel, layer_numbers
from controlroom.controls.condition_map import storable, tiled
from controlroom.controls.face_inputs import FaceEncoder, face_features, face_map, face_vectors
from controlroom.controls.run_mask import RunMask, joined_sites, mask_sites, run_mask
from controlroom.controls.side_passes import SideRows, masked_residuals, shared_passes
from controlroom.controls.word_mask import MaskInput
from controlroom.core import inputs
from controlroom.core.attention import AttentionCall
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline, Residuals
from controlroom.core.errors import InputError, ModelError
from controlroom.core.run import Run
from controlroom.core.step import Step


@dataclass
class _Memory:
    """What a run knows of one InstantID.

    Attributes:
        adapter: gives keys and values of the tokens.
        tokens: [1 or images, length, width], for branches with words (False) and without (True).
        numbers: of each layer in the adapter's file.
        net: IdentityNet, or None; dtype: its precision.
        rows: of the faces that it sees, and of the mask.
        mask: where the control acts, or None.
        projected: keys and values, kept since the tokens stay the same.
        queries: masks at the size of a layer.
    """

    adapter: IPAdapterModel
    tokens: dict[bool, torch.Tensor]
    numbers: dict[str, int]
    net: Any
    dtype: torch.dtype
    rows: SideRows | None
    mask: RunMask | None
    projected: dict[tuple[str, bool], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    queries: dict[tuple[str, int, int], torch.Tensor] = field(default_factory=dict)


class InstantID(Control):
    """Keep a face's identity, and put it where five points say.

    Args:
        model: folder with ``ip-adapter.safetensors`` and ``ControlNetModel``, the adapter's file, downloaded hub id,
            name of the theatre, a mapping of tensors with a file's keys, or an `IPAdapterModel`.
        face_embeds: the face's vector from a recogniser: ``[width]``, ``[pictures, width]`` of one person, ``[prompts,
            pictures, width]``, an ``.npy`` or ``.safetensors`` file, or a list of one for each prompt.
        keypoints: where the face shall be: five points ``[5, 2]`` in pixels of the run (the person's right eye, left
            eye, nose, right and left corner of the mouth), a `Pose` or OpenPose JSON, or a picture drawn already. A
            list: one for each prompt. None: anywhere; IdentityNet does not run.
        controlnet: IdentityNet: folder, file or loaded `ControlNetModel`; None: ``ControlNetModel`` beside the adapter.
        scale: of everything. 0 is the absence of the control.
        identity_scale: of the attention to the face's tokens.
        mask: white where it may act: a picture, a list of one for each prompt, or words of the prompt.
        start, end: share of the steps between which it acts.
        controlnet_scale: of IdentityNet's residuals.
        image: instead of ``face_embeds``: a picture of the person, several, or a list of lists, one for each prompt.
        image_keypoints: where the face of each ``image`` is (five points in its pixels, or a pose): the head is cut out
            for the encoder. None: the encoder sees the picture as it is.
        face_encoder: gives the vectors of ``image``: an object with ``embed(picture)``, or a CLIP image encoder or its
            folder. None: ``face_encoder`` beside the adapter.

    Raises:
        InputError: neither or both of face_embeds and image; at the start of a run, something that does not fit.
        ModelError: at the start of a run: no such model, or one for another base model.
    """

    by_views: ClassVar[bool] = True
    type: Literal["instant_id"] = Field(default="instant_id", kw_only=True)
    model: Any
    face_embeds: Any = None
    keypoints: Any = None
    controlnet: Any = None
    scale: float = 1.0
    identity_scale: float = 0.8
    mask: MaskInput = None
    start: float = Field(default=0.0, ge=0.0, le=1.0)
    end: float = Field(default=1.0, ge=0.0, le=1.0)
    controlnet_scale: float = 0.8
    image: Any = None
    image_keypoints: Any = None
    face_encoder: Any = None

    @field_validator("keypoints", "image_keypoints", mode="after")
    @classmethod
    def _storable(cls, value: Any) -> Any:
        return None if value is None else storable(value)

    @field_serializer("*", mode="wrap", when_used="json")
    def _encode(self, value: Any, handler: SerializerFunctionWrapHandler) -> Any:
        """As every control's; an encoder that is no module can only be named."""
        if isinstance(value, FaceEncoder) and not isinstance(value, torch.nn.Module):
            return {"$omitted": f"face encoder {type(value).__name__}"}
        return inputs.encode(value) if inputs.is_opaque(value) else handler(value)

    @property
    def _places(self) -> bool:
        return self.keypoints is not None and self.controlnet_scale != 0

    def neutral(self, n: int) -> bool:
        return super().neutral(n) or (self.identity_scale == 0 and not self._places)

    def declare(self, outline: Outline) -> Declaration:
        claims, sites = [], ()
        if self.identity_scale:
            sites = outline.sites("cross")
            claims.append(Claim("out", "stream", frozenset(site.name for site in sites)))
        if self._places:
            claims.append(Claim("skip", "add"))
        return Declaration(attention=joined_sites(sites, mask_sites(outline, self.mask)), claims=tuple(claims))

    # Loading.

    def prepare(self, run: Run) -> _Memory:
        if (self.face_embeds is None) == (self.image is None):
            raise InputError(f"{self.label} needs a face: give face_embeds or image, one of them.")
        adapter = find_identity_adapter(self.model, run.backbone)
        net = find_identity_net(self.controlnet, self.model, run.backbone) if self._places else None
        tokens = self._tokens(run, adapter)
        faces = None if net is None else face_map(self.keypoints, run)
        mask = None if self.mask is None else run_mask(self.mask, run, self)
        rows = None if faces is None else SideRows(faces, mask)
        dtype = run.dtype if net is None else net.dtype
        return _Memory(adapter, tokens, layer_numbers(run.backbone.unet), net, dtype, rows, mask)

    @torch.no_grad()
    def _tokens(self, run: Run, adapter: IPAdapterModel) -> dict[bool, torch.Tensor]:
        """The face's tokens, and those of no face, which branches without words attend to."""
        projection = adapter.image_proj
        if self.face_embeds is not None:
            found = face_vectors(self.face_embeds, projection.reads, run.images)
        else:
            encoder = self.face_encoder or face_encoder_beside(self.model)
            if encoder is None:
                raise ModelError(f"{self.label} needs the encoder that gives the face's vector: face_encoder=….")
            found = face_features(self.image, self.image_keypoints, encoder, run.backbone, run.images)
        if found.shape[-1] != projection.reads:
            raise ModelError(
                f"The face's vector is {found.shape[-1]} wide, this model reads {projection.reads}. Give the encoder "
                "that belongs to it (face_encoder=…)."
            )
        found = found.to(next(adapter.parameters()))
        both = {False: projection(found), True: projection(torch.zeros_like(found[:1]))}
        return {absent: tokens.to(run.dtype) for absent, tokens in both.items()}

    # A step.

    def before(self, step: Step) -> None:
        """A mask by words moves on."""
        memory: _Memory = step.memory(self)
        if memory.mask is not None and memory.mask.update():
            memory.queries.clear()
            if memory.rows is not None:
                memory.rows.joined.clear()

    def attention(self, call: AttentionCall) -> None:
        """Attend to the face's tokens beside the words."""
        memory: _Memory = call.step.memory(self)
        if memory.mask is not None:
            memory.mask.attention(call)
        if not self.identity_scale or call.site.kind != "cross":
            return
        for branch in call.reached(self):
            absent = call.step.run.plan.branches[branch].role == "uncond"
            rows = call.layout.size(branch)
            k, v = (tiled(x, rows, branch) for x in self._projected(memory, call.site.name, absent))
            mask = None if memory.mask is None else self._query_mask(memory, memory.mask, call, branch)
            call.stream(branch, k, v, scale=self.scale * self.identity_scale, query_mask=mask)

    def _projected(self, memory: _Memory, name: str, absent: bool) -> tuple[torch.Tensor, torch.Tensor]:
        key = (name, absent)
        if key not in memory.projected:
            # Kept from pass to pass, so no pass's graph may hang on them.
            with torch.no_grad():
                memory.projected[key] = memory.adapter.keys_and_values(memory.numbers[name], memory.tokens[absent])
        return memory.projected[key]

    def _query_mask(self, memory: _Memory, mask: RunMask, call: AttentionCall, branch: str) -> torch.Tensor:
        """[rows, queries]: the mask at the size of the layer."""
        queries, run = call.hidden.shape[1], call.step.run
        key = (branch, queries, id(run.plan))
        if key not in memory.queries:
            memory.queries[key] = mask.tokens(branch, queries).to(run.dtype)
        return memory.queries[key]

    def side(self, step: Step) -> tuple[Residuals, ...] | None:
        """IdentityNet: told the face in the place of the words."""
        memory: _Memory = step.memory(self)
        rows = memory.rows
        if rows is None:
            return None
        return tuple(self._pass(step, memory, rows, names) for names in shared_passes(step, step.reached(self)))

    def _pass(self, step: Step, memory: _Memory, rows: SideRows, names: tuple[str, ...]) -> Residuals:
        run, given, dtype = step.run, step.inputs(names), memory.dtype
        faces, mask = rows.of(run, names)
        tokens = []
        for name in names:
            size = given.layout.size(name)
            own = memory.tokens[run.plan.branches[name].role == "uncond"]
            tokens.append(tiled(own, size, name).expand(size, -1, -1))
        added = run.backbone.added_conditions(given.condition) if memory.net.config.addition_embed_type else None
        down, mid = memory.net(
            given.sample.to(dtype),
            given.timestep,
            encoder_hidden_states=torch.cat(tokens).to(dtype),
            controlnet_cond=faces.to(dtype),
            conditioning_scale=self.scale * self.controlnet_scale,
            added_cond_kwargs=added,
            return_dict=False,
        )
        step.count_side(given.layout.total)
        return masked_residuals(names, (*down, mid), mask, run.dtype)
