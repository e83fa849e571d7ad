"""BLIP-Diffusion's subject encoder (Li et al., arXiv 2305.14720, section 3.2): pictures of subjects into the words.

A Q-Former on the states of a frozen image encoder learns vectors that, put into the prompt, let the network draw the
subject elsewhere: the error of the predicted noise, through frozen text encoder and UNet. With ``unet`` the UNet learns
too, and the subject is left out of some samples, so that words alone keep their meaning.

Deviations: the published encoder is BLIP-2's, trained on pictures with captions before, with a network of its own for
pixels, and the text encoder learns with it; subjects are shown in another scene, where the published data puts the
target's own subject on another background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from controlroom.backbones.image_encoder import clip_pixels
from controlroom.backbones.lora_names import UNET
from controlroom.backbones.subject_encoder import EncoderShape, QFormerShape, SubjectEncoder
from controlroom.backbones.subject_reader import (
    SubjectReader,
    load_subject_reader,
    save_subject_reader,
    told_with,
    with_subject_first,
)
from controlroom.core.branch import Condition
from controlroom.data.groups import Group
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.base_model import BaseModel as Networks
from controlroom.training.grouped import EncodedGroups, GroupBatch, GroupSettings
from controlroom.training.held_out import mean_over
from controlroom.training.objective import Objective
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses

WITHOUT_SUBJECT = 0.15
"""Share of samples that words alone describe, where the UNet learns."""


class BLIPSubjectSettings(GroupSettings):
    """Sizes of what learns; the published encoder has 12 layers and is as wide as the words.

    Rate and number of steps are this project's: the published encoder had learned before.
    """

    loop: ClassVar[dict[str, Any]] = {"total_steps": 100_000, "batch_size": 16, "learning_rate": 1e-4}
    needs_boxes: ClassVar[bool] = False

    queries: PositiveInt = 16
    """Vectors of a subject."""
    layers: PositiveInt = 4
    heads: PositiveInt = 4
    unet: bool = False
    """Whether the UNet learns too, as published."""
    seed: int = Field(default=8, ge=0)
    """Of the encoder's first weights."""

    def build(self, pipe: Pipeline, pictures: Sequence[Any], folder: Path) -> BLIPSubjectRecipe:
        learned, held_out = ([_as_drawn(group) for group in side] for side in self.groups(pictures))
        encoder = self.encoder_for(pipe)
        return BLIPSubjectRecipe(pipe, encoder, learned, self, held_out, self.cache_folder, exact=True)


def _as_drawn(group: Group) -> Group:
    """The group with its caption as the control would say it: the first subject's word behind an article first."""
    said = with_subject_first(group.picture.caption, group.subjects[0].word)
    return replace(group, picture=replace(group.picture, caption=said))


class BLIPSubjectRecipe:
    """Recipe: a subject encoder for any Stable Diffusion 1, 2 or XL model.

    Args:
        pipe: the model; it is only read.
        image_encoder: a `CLIPVisionModelWithProjection`, frozen.
        groups: pictures whose captions begin with "a" and the word for their first subject; others are not looked at.
        settings: see `BLIPSubjectSettings`.
        held_out: groups that are never trained on, for `validate`.
        cache_folder: where latents and features are kept; None: in memory.
        exact: whether they are kept in float32, so that a run is the same bit for bit; otherwise in half precision.

    Exported are ``config.json`` and ``model.safetensors`` with the published keys, the image encoder beside them, and,
    where it learned, the UNet in diffusers' layout in ``unet``.

    Raises:
        InputError: no groups, or a picture without a caption.
    """

    name = "blip_subject"

    def __init__(
        self,
        pipe: Pipeline,
        image_encoder: Any,
        groups: Sequence[Group],
        settings: BLIPSubjectSettings | None = None,
        held_out: Sequence[Group] = (),
        cache_folder: Path | None = None,
        exact: bool = False,
    ) -> None:
        self.settings = settings or BLIPSubjectSettings()
        self.base = Networks(pipe, trains=(UNET,) if self.settings.unet else ())
        self.objective = Objective(self.base.backbone.scheduler, self.settings.objective)
        tables = [encoder.get_input_embeddings().weight for encoder in self.base.text_encoders().values()]
        tokenizer = self.base.backbone.tokenizers()[0]
        shape = QFormerShape(
            hidden_size=sum(int(table.shape[1]) for table in tables),
            num_hidden_layers=self.settings.layers,
            num_attention_heads=self.settings.heads,
            intermediate_size=4 * sum(int(table.shape[1]) for table in tables),
            encoder_hidden_size=int(image_encoder.config.hidden_size),
            cross_attention_frequency=1,
            vocab_size=int(tables[0].shape[0]),
            max_position_embeddings=int(tokenizer.model_max_length),
        )
        torch.manual_seed(self.settings.seed)
        whole = EncoderShape(qformer_config=shape, num_query_tokens=self.settings.queries)
        encoder = SubjectEncoder.beside_words(whole, tables[0]).to(self.base.device)
        self.reader = SubjectReader(encoder, tokenizer, image_encoder.eval().requires_grad_(False))
        encoder.requires_grad_(True)
        for module in self.base.trained().values():
            module.requires_grad_(True)
        size = self.settings.hw
        self.shown = EncodedGroups(self.base, groups, self.states, image_encoder, size, cache_folder, exact)
        self.unseen = EncodedGroups(self.base, held_out, self.states, image_encoder, size) if held_out else None
        self.dataset_size: int | None = len(self.shown)

    def modules(self) -> dict[str, nn.Module]:
        return {"subject_encoder": self.reader.encoder, **self.base.trained()}

    def frozen(self) -> dict[str, nn.Module]:
        return {**self.base.frozen(), "image_encoder": self.reader.image_encoder}

    def fingerprint(self) -> str:
        """Pictures and words; sizes; what is left out how often."""
        objective = self.objective.settings.model_dump_json()
        return f"{self.shown.fingerprint()} {self.settings.own()} {WITHOUT_SUBJECT} {objective}"

    def names(self, indices: Sequence[int]) -> tuple[str, ...]:
        """Names of pictures, for messages."""
        return self.shown.names(indices)

    @torch.no_grad()
    def states(self, pictures: Sequence[Image.Image]) -> Tensor:
        """[n, length, reads]: what the image encoder says of pictures of subjects, as in a run."""
        side = self.reader.side
        square = [picture.resize((side, side), Image.Resampling.BICUBIC) for picture in pictures]
        return self.reader.seen(clip_pixels(square, side))

    def batch(self, indices: Sequence[int], step: int) -> GroupBatch:
        return self.shown.batch(indices)

    def condition(self, batch: GroupBatch) -> Condition:
        """What the network is told: the captions with the subjects in them, with gradients."""
        ids, mask = self.reader.words([words[0] for words in batch.words])
        vectors = self.reader.encoder(batch.features[:, 0], ids, mask)
        return told_with(self.base.backbone, batch.prompts, vectors, self.shown.size)

    def loss(self, batch: GroupBatch, step: int, rng: StepRandom) -> Losses:
        told = self.condition(batch)
        if self.settings.unet:
            alone = rng.choice("subject", (1 - WITHOUT_SUBJECT, WITHOUT_SUBJECT)) == 1
            plain = self.base.condition(batch.prompts, self.shown.size)
            told = replace(
                told,
                tokens=torch.where(alone[:, None, None], plain.tokens, told.tokens),
                pooled=told.pooled
                if told.pooled is None or plain.pooled is None
                else torch.where(alone[:, None], plain.pooled, told.pooled),
            )
        each = self.objective.loss(lambda noisy, t: self.base.predict(noisy, t, told), batch.latents, rng)
        return Losses(each.mean(), {"mse": each.mean().detach()})

    def error(self, batch: GroupBatch, subject: bool = True) -> float:
        """Unweighted error of pictures at four noise levels, with the same noise every time."""
        told = self.condition(batch) if subject else self.base.condition(batch.prompts, self.shown.size)
        return self.objective.held_out(lambda noisy, t: self.base.predict(noisy, t, told), batch.latents)

    @property
    def has_held_out(self) -> bool:
        """Whether there is something to measure on."""
        return self.unseen is not None

    def validate(self, step: int) -> dict[str, float]:
        """Error on held-out pictures with their subjects, and by words alone."""
        if self.unseen is None:
            return {}
        return mean_over((len(batch.prompts), self._errors(batch)) for batch in self.unseen.parts())

    def _errors(self, batch: GroupBatch) -> dict[str, float]:
        return {"held_out": self.error(batch), "by_words": self.error(batch, subject=False)}

    def export(self, folder: Path) -> None:
        save_subject_reader(self.reader, folder)
        for name, module in self.base.trained().items():
            module.save_pretrained(folder / name)

    def load(self, folder: Path) -> None:
        self.reader.encoder.load_state_dict(load_subject_reader(folder, self.base.backbone).encoder.state_dict())
        for name, module in self.base.trained().items():
            module.load_state_dict(type(module).from_pretrained(folder / name).state_dict())
