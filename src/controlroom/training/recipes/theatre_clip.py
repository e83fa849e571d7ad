"""The theatre's CLIP: text and pictures in one space (arXiv 2103.00020), whose text encoder then conditions the UNet.

Deviation: beside the contrastive loss, both towers answer questions. Learned queries read the text tower's tokens, as
the UNet's cross-attention will, and say what the caption states of each attribute; so every token learns to carry what
it belongs to ("shirt" knows that it is blue and striped), which a contrastive loss alone leaves to chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from controlroom.data.theatre import attributes as a
from controlroom.data.theatre.captions import full_caption, training_caption
from controlroom.data.theatre.edits import sample_edit
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import CANVAS, Dice, sample_scene
from controlroom.data.theatre.tokenizer import LENGTH, write_tokenizer
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses
from controlroom.training.recipes.theatre_autoencoder import to_pixels

WIDTH = 192
TEXT_LAYERS, VISION_LAYERS, HEADS, PATCH = 4, 5, 4, 16


def new_clip(tokens: int) -> CLIPModel:
    """Fresh weights: text and vision towers 192 wide, one space of 192 dimensions."""
    text = CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=LENGTH,
        projection_dim=WIDTH,
        bos_token_id=tokens - 2,
        eos_token_id=tokens - 1,
        pad_token_id=tokens - 1,
    )
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=HEADS,
        image_size=CANVAS,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH))


class Questions(nn.Module):
    """One learned query for each question reads a sequence of tokens; only used to train, never shipped."""

    def __init__(self, width: int, extra: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(a.ANSWERS), width) * 0.5)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.heads = nn.ModuleList([nn.Linear(width, len(options) + extra) for options in a.ANSWERS.values()])

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """[B, L, width] to a list of logits [B, options (+ extra)]; ``mask`` [B, L] is true for tokens to read."""
        scores = self.queries @ self.key(tokens).transpose(1, 2) / tokens.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -1e4)
        read = scores.softmax(dim=-1) @ self.value(tokens)
        return [head(read[:, index]) for index, head in enumerate(self.heads)]


@dataclass(frozen=True)
class CaptionedBatch:
    """Pixels [B, 3, 128, 128], token ids [B, L] and where the end token is; labels [B, questions].

    ``said`` holds what the caption states, with one class more for "nothing"; ``seen`` what the picture shows, -1 for
    no answer.
    """

    pixels: Tensor
    ids: Tensor
    said: Tensor
    seen: Tensor


class TheatreClip:
    """Recipe: contrastive loss with questions for both towers."""

    name = "theatre_clip"

    def __init__(self, tokenizer_folder: Path) -> None:
        tokens = write_tokenizer(tokenizer_folder)
        self.tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
        torch.manual_seed(3)
        self.clip: Any = new_clip(tokens)
        self.text_questions, self.picture_questions = Questions(WIDTH, 1), Questions(WIDTH, 0)

    def modules(self) -> dict[str, nn.Module]:
        return {"clip": self.clip, "text_questions": self.text_questions, "picture_questions": self.picture_questions}

    def frozen(self) -> dict[str, nn.Module]:
        return {}

    def fingerprint(self) -> str:
        return WORLD_VERSION

    def batch(self, indices: Sequence[int], step: int) -> CaptionedBatch:
        pictures, texts, seen = [], [], []
        for index in indices:
            dice = Dice("clip", index)
            if dice.chance(0.08):  # instructions must be words too; the picture is what they lead to
                edit = sample_edit(index)
                scene, text = edit.after, edit.instruction
            else:
                scene = sample_scene(index)
                text = training_caption(scene, dice)
            pictures.append(render(scene))
            texts.append(text)
            seen.append(a.labels(a.attributes(scene)))
        said = []
        for text in texts:
            stated = a.labels(a.read_caption(text))
            said.append([len(o) if s < 0 else s for s, o in zip(stated, a.ANSWERS.values(), strict=True)])
        ids = self.tokenizer(
            texts, padding="longest", truncation=True, max_length=LENGTH, return_tensors="pt"
        ).input_ids
        return CaptionedBatch(to_pixels(pictures), ids, torch.tensor(said), torch.tensor(seen))

    def loss(self, batch: CaptionedBatch, step: int, rng: StepRandom) -> Losses:
        text = self.clip.text_model(input_ids=batch.ids)
        vision = self.clip.vision_model(pixel_values=batch.pixels)
        t = F.normalize(self.clip.text_projection(text.pooler_output).float(), dim=-1)
        p = F.normalize(self.clip.visual_projection(vision.pooler_output).float(), dim=-1)
        logits = t @ p.T * self.clip.logit_scale.exp().clamp(max=100.0)
        target = torch.arange(len(logits))
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        ends = (batch.ids == self.tokenizer.eos_token_id).int().argmax(dim=1)
        inside = torch.arange(batch.ids.shape[1])[None] <= ends[:, None]
        said, text_right = _answer_loss(self.text_questions(text.last_hidden_state, inside), batch.said)
        seen, picture_right = _answer_loss(self.picture_questions(vision.last_hidden_state), batch.seen)
        parts = {"contrast": contrast.detach(), "said": text_right, "seen": picture_right}
        parts["matched"] = float((logits.argmax(1) == target).float().mean())
        return Losses(contrast + 2.0 * said + seen, parts)

    def export(self, folder: Path) -> None:
        self.clip.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder / "tokenizer")

    def load(self, folder: Path) -> None:
        self.clip.load_state_dict(CLIPModel.from_pretrained(folder).state_dict())

    def validate(self, step: int) -> dict[str, float]:
        """Retrieval among 256 held-out scenes by their full captions, and the distance of a colour word."""
        scenes = [sample_scene(index, "held_out") for index in range(256)]
        ids = self.tokenizer([full_caption(s) for s in scenes], padding="longest", return_tensors="pt").input_ids
        t = F.normalize(self.clip.get_text_features(input_ids=ids).pooler_output, dim=-1)
        p = F.normalize(
            self.clip.get_image_features(pixel_values=to_pixels([render(s) for s in scenes])).pooler_output, dim=-1
        )
        best = (t @ p.T).argmax(dim=1)
        return {"retrieval": float((best == torch.arange(len(scenes))).float().mean())}


def _answer_loss(logits: list[Tensor], labels: Tensor) -> tuple[Tensor, float]:
    total, right, asked = torch.zeros(()), 0, 0
    for column, values in enumerate(logits):
        target = labels[:, column]
        known = target >= 0
        if known.any():
            total = total + F.cross_entropy(values.float()[known], target[known])
            right += int((values.argmax(1) == target)[known].sum())
            asked += int(known.sum())
    return total / len(logits), right / max(asked, 1)
