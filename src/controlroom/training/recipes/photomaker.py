"""PhotoMaker (Li et al., arXiv 2312.04461): pictures of a person fused into the word for them, learned with a LoRA.

A picture is learned from its caption, whose word for the person is said once for each of one to four other pictures of
them; each is fused into one of the word's states. The projections of the image encoder, the fuse module and low-rank
layers beside the UNet's attention learn. One sample in ten has no words (and no person); where pictures have masks of
the person, only those count for half of the samples. Version 1; version 2 is read, not trained.

Deviation: references are whole other pictures of the person (or what ``seen`` cuts out of them), in other scenes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from controlroom.backbones.image_encoder import check_image_encoder, clip_pixels
from controlroom.backbones.lora_dialects import low_rank_parts
from controlroom.backbones.photomaker import FILE, IDEncoder, PhotoMakerModel, load_photomaker
from controlroom.controls.stacked_prompt import person_in, stacked_ids
from controlroom.core.branch import Condition
from controlroom.data.pictures import Picture
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.base_model import BaseModel
from controlroom.training.clip_vision import image_encoder_for
from controlroom.training.held_out import in_parts, mean_over, spread_over
from controlroom.training.image_prompts import others_of
from controlroom.training.low_rank import LowRankLayers, layers_ending
from controlroom.training.objective import Objective
from controlroom.training.own_rate import OwnRate
from controlroom.training.people import PeopleSettings
from controlroom.training.randomness import StepRandom, seed_of
from controlroom.training.recipe import Losses
from controlroom.training.shown import Shown, ShownBatch

CLASS_WORDS = ("man", "woman", "boy", "girl", "person")


class PhotoMakerSettings(PeopleSettings):
    """How a PhotoMaker is trained; the rates are the published ones, for the LoRA that of the run."""

    loop: ClassVar[dict[str, Any]] = {"total_steps": 20_000, "batch_size": 8, "learning_rate": 1e-4}

    image_encoder: str | None = None
    """Folder of CLIP's image encoder; None: the theatre's."""
    trigger: str = "img"
    """Stands behind the word for the person in captions."""
    class_words: tuple[str, ...] = CLASS_WORDS
    """Words for a person, where a caption has no trigger: the first that is in it."""
    pictures: PositiveInt = 4
    """Most pictures of a person that one is learned from; each sample has one to so many."""
    rank: PositiveInt = 64
    """Of the LoRA."""
    encoder_rate: float = Field(default=0.1, gt=0.0, le=1.0)
    """Rate of projections and fuse module, as a share of the run's."""
    without_words: float = Field(default=0.1, ge=0.0, le=1.0)
    masked: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of samples in which only the mask counts, where there is one."""
    seed: int = Field(default=0, ge=0)
    """Of first weights, and of which pictures are shown together."""

    def build(self, pipe: Pipeline, pictures: Sequence[Picture], folder: Path) -> PhotoMakerRecipe:
        base = self.networks(pipe)
        encoder = image_encoder_for(pipe, self.image_encoder, "PhotoMaker")
        learned, held_out = self.sides(pictures)
        shown = Shown(base, learned, self.prompt, size=self.hw)
        return PhotoMakerRecipe(base, shown, self, encoder, held_out=held_out)


@dataclass(frozen=True)
class PersonBatch:
    """``shown``; for each of them what the encoder says of other pictures of its person [pictures, width]."""

    shown: ShownBatch
    seen: tuple[Tensor, ...]


class PhotoMakerRecipe:
    """Recipe: projections and fuse module, and a LoRA of the UNet.

    Args:
        base: the model, all of it frozen.
        shown: the pictures, with their subjects.
        settings: see `PhotoMakerSettings`.
        encoder: `CLIPVisionModelWithProjection`; its layers stay as they are.
        seen: what the encoder is shown of a picture; None: all of it.
        held_out: pictures of other people, for the error on the way.

    Exported is ``photomaker.safetensors`` with the published keys.

    Raises:
        InputError: a subject with one picture only, or a caption without a word for a person.
        ModelError: the encoder is none.
    """

    name = "photomaker"

    def __init__(
        self,
        base: BaseModel,
        shown: Shown,
        settings: PhotoMakerSettings,
        encoder: Any,
        seen: Callable[[Picture], Image.Image] | None = None,
        held_out: Sequence[Picture] = (),
    ) -> None:
        check_image_encoder(encoder)
        self.base, self.shown, self.settings = base, shown, settings
        self.dataset_size: int | None = len(shown)
        self.objective = Objective(base.backbone.scheduler, settings.objective)
        self.others = others_of(shown.pictures)
        self._numbers = {picture.name: number for number, picture in enumerate(shown.pictures)}
        for text in shown.prompts:
            self._person(text)
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            self.encoder = IDEncoder(encoder.config, base.backbone.text_widths())
        self.encoder.vision_model.load_state_dict(encoder.vision_model.state_dict())
        known = encoder.visual_projection.weight
        if known.shape == self.encoder.visual_projection.weight.shape:
            self.encoder.visual_projection.load_state_dict({"weight": known.detach()})
        self.encoder.float().eval().requires_grad_(True).vision_model.requires_grad_(False)
        look = seen or (lambda picture: picture.read())
        self._seen = self._encoded([look(picture) for picture in shown.pictures])
        self._held_out = self._held_out_of(held_out, look)
        self.encoder.to(base.device)
        names = base.names()
        self.adapter = LowRankLayers(names, layers_ending(names), settings.rank, seed=settings.seed)
        trained = [p for name, m in self.modules().items() if name != "lora" for p in m.parameters()]
        self._rate = OwnRate(trained, settings.encoder_rate)

    def modules(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {"lora": self.adapter, "fuse_module": self.encoder.fuse_module}
        for name in ("visual_projection", "visual_projection_2"):
            if hasattr(self.encoder, name):
                found[name] = getattr(self.encoder, name)
        return found

    def frozen(self) -> dict[str, nn.Module]:
        return {**self.base.frozen(), "image_encoder": self.encoder.vision_model}

    def fingerprint(self) -> str:
        subjects = [picture.subject for picture in self.shown.pictures]
        seen = float(self._seen.double().sum())
        return f"{self.shown.fingerprint()} {subjects} {seen:.6f} {self.settings.fingerprint()}"

    def names(self, indices: Sequence[int]) -> tuple[str, ...]:
        """Names of pictures, for messages."""
        return self.shown.batch(indices).names

    # -- what is shown --

    @torch.no_grad()
    def _encoded(self, pictures: Sequence[Image.Image]) -> Tensor:
        """[n, width]: what the frozen encoder says of whole pictures, before projections."""
        side, found = int(self.encoder.config.image_size), []
        for i in range(0, len(pictures), 32):
            found.append(self.encoder.vision_model(clip_pixels(pictures[i : i + 32], side))[1].float())
        return torch.cat(found)

    def references_of(self, number: int, step: int) -> list[int]:
        """Numbers of one to four other pictures of the person in picture ``number``."""
        others = self.others[number]
        seed = seed_of(self.settings.seed, number, f"person {step}")
        count = 1 + seed % min(self.settings.pictures, len(others))
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed)).tolist()
        return [others[i] for i in order[:count]]

    def batch(self, indices: Sequence[int], step: int) -> PersonBatch:
        shown = self.shown.batch(indices)
        sets = [self.references_of(self._numbers[name], step) for name in shown.names]
        return PersonBatch(shown, tuple(self._seen[numbers].to(shown.latents.device) for numbers in sets))

    def _person(self, text: str) -> tuple[str, int]:
        words, place = person_in(text, self.settings.trigger, self.settings.class_words, "A caption")
        return " ".join(words), place

    # -- what is learned --

    def condition(self, prompts: Sequence[str], seen: Sequence[Tensor]) -> Condition:
        """What the network is told: a row for each prompt, with pictures fused into its word; "" has none."""
        backbone = self.base.backbone
        ids: list[list[list[int]]] = [[] for _ in backbone.tokenizers()]
        places: list[list[int]] = []
        for text, pictures in zip(prompts, seen, strict=True):
            words, word = self._person(text) if text else ("", 0)
            for known, tokenizer in zip(ids, backbone.tokenizers(), strict=True):
                row, where = stacked_ids(tokenizer, words, word, len(pictures)) if text else (_nothing(tokenizer), [])
                known.append(row + [tokenizer.pad_token_id] * (int(tokenizer.model_max_length) - len(row)))
            places.append(where)
        with torch.no_grad():
            told = backbone.encode_ids([torch.tensor(rows) for rows in ids], size=self.shown.size)
        rows = []
        for states, pictures, where in zip(told.tokens.float(), seen, places, strict=True):
            identities = self.encoder.projected(pictures)[:, 0]
            rows.append(self.encoder.fused(states, identities, where) if where else states)
        return replace(told, tokens=torch.stack(rows))

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """What the network with the LoRA predicts."""
        with self.adapter.attached():
            return self.base.predict(noisy, t, condition)

    def loss(self, batch: PersonBatch, step: int, rng: StepRandom) -> Losses:
        self._rate.before()
        shown = batch.shown
        silent = (rng.uniform("words") < self.settings.without_words).tolist()
        prompts = tuple("" if out else text for text, out in zip(shown.prompts, silent, strict=True))
        condition = self.condition(prompts, batch.seen)
        mask = shown.mask
        if mask is not None:
            counts = (rng.uniform("masked") < self.settings.masked)[:, None, None, None]
            mask = torch.where(counts, mask, torch.ones_like(mask))
        errors = self.objective.loss(lambda noisy, t: self.predict(noisy, t, condition), shown.latents, rng, mask)
        return Losses(errors.mean())

    def after_step(self, step: int) -> None:
        self._rate.after()

    # -- measured, written, read --

    def _held_out_of(self, pictures: Sequence[Picture], look: Callable[[Picture], Image.Image]) -> list[PersonBatch]:
        others, found = others_of(pictures), list[PersonBatch]()
        for part in in_parts(spread_over(range(len(pictures)), self.settings.validation_pictures)):
            few = [pictures[number] for number in part]
            (shown,) = Shown(self.base, few, self.settings.prompt, size=self.shown.size).parts()
            for text in shown.prompts:
                self._person(text)
            sets = [others[number][: self.settings.pictures] for number in part]
            seen = tuple(self._encoded([look(pictures[other]) for other in own]) for own in sets)
            found.append(PersonBatch(shown, seen))
        return found

    @property
    def has_held_out(self) -> bool:
        """Whether there are pictures to measure on."""
        return bool(self._held_out)

    def validate(self, step: int) -> dict[str, float]:
        """Error on held-out people: with their pictures in the word for them, and by the words alone."""
        return mean_over((len(batch.seen), self._errors(batch)) for batch in self._held_out)

    def _errors(self, batch: PersonBatch) -> dict[str, float]:
        latents, prompts = batch.shown.latents.to(self.base.device), batch.shown.prompts
        seen = [pictures.to(latents) for pictures in batch.seen]
        told = {"held_out": self.condition(prompts, seen), "by_words": self.base.condition(prompts, self.shown.size)}
        return {
            name: self.objective.held_out(lambda noisy, t, c=condition: self.predict(noisy, t, c), latents)
            for name, condition in told.items()
        }

    def export(self, folder: Path) -> None:
        lora: dict[str, Tensor] = {}
        for layer, change in self.adapter.changes().items():
            for end, value in low_rank_parts(layer, change).items():
                lora[f"{layer[0]}.{layer[1]}.{end}"] = value
        PhotoMakerModel(self.encoder, lora).save(folder / FILE)

    def load(self, folder: Path) -> None:
        model = load_photomaker(folder / FILE)
        self.encoder.load_state_dict(model.encoder.state_dict())
        self.adapter.load(model.changes(self.base.names()))


def _nothing(tokenizer: Any) -> list[int]:
    return [tokenizer.bos_token_id, tokenizer.eos_token_id]
