"""InstantID (Wang et al., arXiv 2401.07519): identity of a face and its place, learned beside a frozen network.

IdentityNet starts as a copy of the UNet's encoder and is told the face's tokens in the place of the words; the
resampler that makes the tokens of the face's vector is new, and keys and values for them in every cross-attention start
as copies of the words'. Nothing is left out of any sample: words and face are always told, as published.

Deviation: the vector is that of another picture of the same person, where the paper takes the picture's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from controlroom.backbones.controlnet import load_controlnet
from controlroom.backbones.image_encoder import load_image_encoder
from controlroom.backbones.image_projection import HEAD_WIDTH, Resampler
from controlroom.backbones.image_prompt_attention import prompted
from controlroom.backbones.instant_id import ENCODER, FILE, NET, save_instant_id
from controlroom.backbones.ip_adapter import IPAdapterModel, load_ip_adapter
from controlroom.backbones.loading import THEATRE, find_model
from controlroom.core.branch import Condition
from controlroom.core.control import Residuals
from controlroom.core.errors import InputError, ModelError
from controlroom.core.images import placement
from controlroom.data.pictures import Picture
from controlroom.sampling.pipeline import Pipeline
from controlroom.signals.face import draw_face
from controlroom.signals.pose.network_reader import NetworkReader
from controlroom.training.base_model import BaseModel
from controlroom.training.clip_vision import image_encoder_of
from controlroom.training.faces import Face, encoded_faces, faces_in, read_by
from controlroom.training.held_out import in_parts, mean_over, spread_over
from controlroom.training.image_prompts import others_of
from controlroom.training.objective import Objective
from controlroom.training.people import PeopleSettings
from controlroom.training.randomness import StepRandom, seed_of
from controlroom.training.recipe import Losses
from controlroom.training.shown import Shown, ShownBatch
from controlroom.training.side_networks import new_controlnet, picture_pixels


class InstantIDSettings(PeopleSettings):
    """How an InstantID is trained; sizes are the published ones, its numbers of steps are not known."""

    loop: ClassVar[dict[str, Any]] = {"total_steps": 20_000, "batch_size": 8, "learning_rate": 1e-5}

    faces: str | None = None
    """Folder with what a face recogniser said of each picture (`training.faces`); None: the theatre's readers."""
    face_encoder: str | None = None
    """Folder of a CLIP image encoder that reads heads in the recogniser's place."""
    tokens: PositiveInt = 16
    """That a face becomes."""
    width: PositiveInt = 1280
    """Of the resampler."""
    depth: PositiveInt = 4
    heads: PositiveInt = 20
    """Of the resampler, 64 wide each."""
    without_words: float = Field(default=0.0, ge=0.0, le=1.0)
    without_face: float = Field(default=0.0, ge=0.0, le=1.0)
    """Shares of samples whose words are empty, and whose vector is zeros. 0 as published."""
    seed: int = Field(default=0, ge=0)
    """Of first weights, and of which picture of a person is shown."""

    def build(self, pipe: Pipeline, pictures: Sequence[Picture], folder: Path) -> InstantIDRecipe:
        base = self.networks(pipe)
        learned, held_out = self.sides(pictures)
        shown = Shown(base, learned, self.prompt, size=self.hw)
        if self.faces is not None:
            known, others = (faces_in(Path(self.faces), side) for side in (learned, held_out))
            return InstantIDRecipe(base, shown, self, known, held_out=list(zip(held_out, others, strict=True)))
        if pipe.model != THEATRE and self.face_encoder is None:
            raise ModelError("InstantID needs the faces. Name the folder with their points and vectors: faces=….")
        if self.face_encoder is not None:
            encoder = load_image_encoder(find_model(self.face_encoder, "face encoder"), pipe.backbone)
        else:
            encoder = image_encoder_of(find_model(f"{THEATRE}/clip", "CLIP"))
        reader = NetworkReader.load(find_model(f"{THEATRE}/readers/keypoints", "reader of keypoints"))
        known, others = (encoded_faces(side, read_by(reader), encoder) for side in (learned, held_out))
        return InstantIDRecipe(base, shown, self, known, encoder, list(zip(held_out, others, strict=True)))


@dataclass(frozen=True)
class FaceBatch:
    """``shown``; ``vectors`` of their persons [B, 1, n]; ``maps`` [B, 3, H, W] in [0, 1], where the faces are."""

    shown: ShownBatch
    vectors: Tensor
    maps: Tensor


class InstantIDRecipe:
    """Recipe: IdentityNet, resampler, keys and values.

    Args:
        base: the model, all of it frozen.
        shown: the pictures, with their subjects.
        settings: see `InstantIDSettings`.
        faces: of the pictures, in their order.
        encoder: a CLIP image encoder that gave the vectors, which is written beside the weights; None: none.
        held_out: pictures of other people with their faces, for the error on the way.

    Exported are ``ip-adapter.safetensors`` and ``ControlNetModel``, as published, and ``face_encoder``.

    Raises:
        InputError: not a face for each picture, or a subject with one picture only.
    """

    name = "instant_id"

    def __init__(
        self,
        base: BaseModel,
        shown: Shown,
        settings: InstantIDSettings,
        faces: Sequence[Face],
        encoder: Any = None,
        held_out: Sequence[tuple[Picture, Face]] = (),
    ) -> None:
        if len(faces) != len(shown.pictures):
            raise InputError(f"There are {len(faces)} faces for {len(shown.pictures)} pictures. Give one for each.")
        self.base, self.shown, self.settings, self.encoder = base, shown, settings, encoder
        self.faces = tuple(faces)
        self.dataset_size: int | None = len(shown)
        self.objective = Objective(base.backbone.scheduler, settings.objective)
        self.others = others_of(shown.pictures)
        self._numbers = {picture.name: number for number, picture in enumerate(shown.pictures)}
        width, inner = int(base.unet.config.cross_attention_dim), settings.heads * HEAD_WIDTH
        reads = len(faces[0].vector)
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            projection = Resampler(
                reads, settings.width, width, settings.tokens, settings.depth, inner, 4 * settings.width
            )
            self.adapter = IPAdapterModel.for_unet(base.unet, projection).to(base.device)
            net: Any = new_controlnet(base.unet, base.backbone.pixels_per_latent.bit_length() - 1)
        self.adapter.float().requires_grad_(True)
        self.net = net.to(base.device).float().requires_grad_(True)
        if base.device.type == "cpu":
            from diffusers.models.attention_processor import AttnProcessor

            # Explicit softmax attention trains faster than SDPA on a CPU.
            self.net.set_attn_processor(AttnProcessor())
        self._held_out = self._held_out_of(held_out)

    def modules(self) -> dict[str, nn.Module]:
        return {"ip_adapter": self.adapter, "identity_net": self.net}

    def frozen(self) -> dict[str, nn.Module]:
        encoder = {ENCODER: self.encoder} if isinstance(self.encoder, nn.Module) else {}
        return {**self.base.frozen(), **encoder}

    def fingerprint(self) -> str:
        subjects = [picture.subject for picture in self.shown.pictures]
        faces = sum(float(face.vector.double().sum() + face.points.sum()) for face in self.faces)
        return f"{self.shown.fingerprint()} {subjects} {faces:.6f} {self.settings.fingerprint()}"

    def names(self, indices: Sequence[int]) -> tuple[str, ...]:
        """Names of pictures, for messages."""
        return self.shown.batch(indices).names

    # -- what is shown --

    def reference_of(self, number: int, step: int) -> int:
        """Number of the picture whose face says who is in picture ``number``: another one of the person."""
        others = self.others[number]
        return others[seed_of(self.settings.seed, number, f"face {step}") % len(others)]

    def batch(self, indices: Sequence[int], step: int) -> FaceBatch:
        shown = self.shown.batch(indices)
        numbers = [self._numbers[name] for name in shown.names]
        vectors = [self.faces[self.reference_of(number, step)].vector for number in numbers]
        maps = [self._map(self.shown.pictures[number], self.faces[number]) for number in numbers]
        device = shown.latents.device
        return FaceBatch(shown, torch.stack(vectors)[:, None].to(device), torch.stack(maps).to(device))

    def _map(self, picture: Picture, face: Face) -> Tensor:
        """[3, H, W]: the points where they are after the picture is cropped to the size of the training."""
        height, width = self.shown.size
        x, y, left, top = placement(picture.size, width, height, "crop")
        return picture_pixels(draw_face(face.points * (x, y) + (left, top), width, height))

    # -- what is learned --

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition, vectors: Tensor, maps: Tensor) -> Tensor:
        """What the frozen network predicts with faces of these vectors [B, k, n] at these places."""
        tokens = self.adapter.image_proj(vectors)
        told = condition.expand(len(noisy))
        xl = self.net.config.addition_embed_type is not None
        down, mid = self.net(
            noisy,
            t,
            encoder_hidden_states=tokens,
            controlnet_cond=maps,
            added_cond_kwargs=self.base.backbone.added_conditions(told) if xl else None,
            return_dict=False,
        )
        dtype = self.base.unet.dtype
        residuals = Residuals(("cond",), tuple(x.to(dtype) for x in down), mid.to(dtype))
        with prompted(self.base.unet, self.adapter, tokens):
            return self.base.predict(noisy, t, told, residuals)

    def loss(self, batch: FaceBatch, step: int, rng: StepRandom) -> Losses:
        shown, vectors, prompts = batch.shown, batch.vectors, batch.shown.prompts
        if self.settings.without_words:
            silent = (rng.uniform("words") < self.settings.without_words).tolist()
            prompts = tuple("" if out else text for text, out in zip(prompts, silent, strict=True))
        if self.settings.without_face:
            vectors = vectors.masked_fill((rng.uniform("face") < self.settings.without_face)[:, None, None], 0.0)
        condition = self.base.condition(prompts, self.shown.size)
        errors = self.objective.loss(
            lambda noisy, t: self.predict(noisy, t, condition, vectors, batch.maps), shown.latents, rng, shown.mask
        )
        return Losses(errors.mean())

    # -- measured, written, read --

    def _held_out_of(self, held_out: Sequence[tuple[Picture, Face]]) -> list[tuple[FaceBatch, Tensor]]:
        """Some of them, a few at a time, and beside each the face of the next."""
        others = others_of([picture for picture, _ in held_out])
        numbers, found = spread_over(range(len(held_out)), self.settings.validation_pictures), []
        for part in in_parts(range(len(numbers))):
            pictures = [held_out[numbers[place]][0] for place in part]
            (shown,) = Shown(self.base, pictures, self.settings.prompt, size=self.shown.size).parts()
            maps = torch.stack([self._map(*held_out[numbers[place]]) for place in part])
            own, wrong = (
                torch.stack([held_out[others[numbers[place % len(numbers)]][0]][1].vector for place in places])
                for places in (part, [place + 1 for place in part])
            )
            found.append((FaceBatch(shown, own[:, None], maps), wrong[:, None]))
        return found

    @property
    def has_held_out(self) -> bool:
        """Whether there are pictures to measure on."""
        return bool(self._held_out)

    def validate(self, step: int) -> dict[str, float]:
        """Error on held-out people: with their faces, with no face at its place, and with the next one's face."""
        return mean_over((len(wrong), self._errors(batch, wrong)) for batch, wrong in self._held_out)

    def _errors(self, batch: FaceBatch, wrong: Tensor) -> dict[str, float]:
        latents = batch.shown.latents.to(self.base.device)
        condition = self.base.condition(batch.shown.prompts, self.shown.size)
        vectors, maps = batch.vectors.to(latents), batch.maps.to(latents)
        told = {"held_out": vectors, "without_face": torch.zeros_like(vectors), "wrong_face": wrong.to(latents)}
        return {
            name: self.objective.held_out(
                lambda noisy, t, who=who: self.predict(noisy, t, condition, who, maps), latents
            )
            for name, who in told.items()
        }

    def export(self, folder: Path) -> None:
        save_instant_id(folder, self.adapter, self.net)
        if isinstance(self.encoder, nn.Module):
            saved: Any = self.encoder
            saved.save_pretrained(folder / ENCODER)

    def load(self, folder: Path) -> None:
        self.adapter.load_state_dict(load_ip_adapter(folder / FILE, self.base.unet).state_dict())
        self.net.load_state_dict(load_controlnet(folder / NET, self.base.unet).state_dict())
