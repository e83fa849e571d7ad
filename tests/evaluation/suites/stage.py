"""What suites are tested on: stand-ins that know what they look at, and a theatre of miniatures with its real words."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from controlroom.backbones.loading import theatre_folder
from controlroom.core.spec import RunSpec
from controlroom.data.theatre.attributes import ANSWERS, attributes
from controlroom.data.theatre.paint import Part
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import Scene
from controlroom.data.theatre.truth import keypoints
from controlroom.signals.dense_reader import DenseReader
from controlroom.signals.readers import AttributeReader
from tests.tasks.theatre import sure_reader
from tests.tiny import tiny_sd1

REAL = theatre_folder()


class Knows:
    """Both readers: knows the pictures of the scenes that it was told about, and answers for one that it does not."""

    size = 128

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self.known = {render(scene).tobytes(): scene for scene in scenes}

    def scene(self, picture: Image.Image) -> Scene:
        return self.known[picture.tobytes()]

    def read(self, pictures: Sequence[Image.Image]) -> list[dict[str, str | None]]:
        return [attributes(self.scene(picture)) for picture in pictures]

    def keypoints(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        found = np.stack([keypoints(self.scene(picture)) for picture in pictures])
        found[..., 2] = 0.9
        return found

    def features(self, pixels: Tensor) -> list[Tensor]:
        return [pixels + 2.0, pixels * 2]

    def state_dict(self) -> dict[str, Tensor]:
        return {}


class Words:
    """A CLIP whose texts point where pictures of that brightness do."""

    name, hash = "words", "00"

    def features(self, images: Tensor) -> Tensor:
        level = images.mean(dim=(1, 2, 3))
        return torch.stack([level + 0.1, 1 - level], dim=1)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([[1.0, float(len(text) % 3)] for text in texts])


class Draws:
    """A drawer that gives what it is told for each prompt and control, and keeps account of its runs."""

    def __init__(self, picture: Any, fingerprint: str = "fake") -> None:
        self.picture, self.fingerprint, self.runs = picture, fingerprint, []

    def __call__(self, spec: RunSpec) -> list[Image.Image]:
        prompts = spec.prompt if isinstance(spec.prompt, list) else [spec.prompt]
        self.runs.append((len(prompts), spec.seed, bool(spec.controls)))
        return [self.picture(prompt, bool(spec.controls), (spec.seed or 0) + i) for i, prompt in enumerate(prompts)]


def opened(data: str) -> Image.Image:
    """A thumbnail of a report."""
    import base64

    return Image.open(io.BytesIO(base64.b64decode(data)))


def write_stage(folder: Path) -> Path:
    """The package's assets as miniatures that know the theatre's words, with random readers and the real CLIP."""
    pipeline = tiny_sd1()
    words: Any = CLIPTokenizer
    tokenizer = words.from_pretrained(REAL / "tokenizer")
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    pipeline.register_modules(tokenizer=tokenizer, text_encoder=CLIPTextModel(config).eval())
    pipeline.save_pretrained(str(folder))
    torch.manual_seed(0)
    AttributeReader(ANSWERS, size=32, width=8).save(folder / "readers/attributes")
    sure_reader().save(folder / "readers/keypoints")
    DenseReader([part.name.lower() for part in Part], size=64, width=8).save(folder / "readers/dense")
    (folder / "clip").symlink_to(REAL / "clip")
    return folder
