"""Small networks that read a picture: its attributes, and the keypoints of a person.

They are plain PyTorch modules whose settings and labels lie beside their weights, so they know nothing of the world
they were trained on; the theatre's come with the package. Their own error on held-out renders is printed beside every
number they give (`docs/theatre.md`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from controlroom.core.errors import ModelError


def pixels_of(pictures: Sequence[Image.Image], size: int) -> Tensor:
    """RGB pictures to [B, 3, size, size] in [-1, 1]; other sizes are resized with antialiasing."""
    square = [p.convert("RGB") for p in pictures]
    square = [p if p.size == (size, size) else p.resize((size, size), Image.Resampling.LANCZOS) for p in square]
    stacked = torch.from_numpy(np.stack([np.asarray(p) for p in square]))
    return stacked.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


class Block(nn.Module):
    """Residual block with group norm: two 3 x 3 convolutions, the first with the stride."""

    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, 1)
        self.norm = nn.GroupNorm(8, outside)
        self.second = nn.Conv2d(outside, outside, 3, 1, 1)
        self.out_norm = nn.GroupNorm(8, outside)
        self.skip = nn.Conv2d(inside, outside, 1, stride) if inside != outside or stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm(self.first(x)))
        return F.silu(self.out_norm(self.second(h)) + self.skip(x))


class _QuestionPool(nn.Module):
    """One summary of the feature maps for each question: learned queries attend over all places.

    Where something stands must not matter to whether it is there, so the queries look at 1/8 of the size, where a
    small thing still has places of its own. Maps [B, near, 2h, 2w] and [B, far, h, w] to [B, questions, width].
    """

    def __init__(self, near: int, far: int, questions: int, width: int, side: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.near, self.far = nn.Conv2d(near, width, 1), nn.Conv2d(far, width, 1)
        self.position = nn.Parameter(torch.randn(1, width, side, side) * 0.1)
        self.norm = nn.LayerNorm(width)
        self.key_value = nn.Linear(width, 2 * width)
        self.query = nn.Parameter(torch.randn(questions, width) * 0.3)
        self.think = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )

    def forward(self, near: Tensor, far: Tensor) -> Tensor:
        places = self.near(near) + F.interpolate(self.far(far), scale_factor=2.0) + self.position
        keys, values = self.key_value(self.norm(places.flatten(2).mT)).chunk(2, dim=-1)
        query = self.query.expand(len(near), -1, -1)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (query, keys, values))
        pooled = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return pooled + self.think(pooled)


class AttributeReader(nn.Module):
    """Answers questions about a picture: for each question one of its options.

    ``forward`` maps [B, 3, size, size] in [-1, 1] to logits by question [B, options]. `features` gives the maps of all
    stages, which perceptual distances and identity scores are measured in.
    """

    def __init__(self, answers: Mapping[str, Sequence[str]], size: int = 128, width: int = 24) -> None:
        super().__init__()
        self.answers = {question: tuple(options) for question, options in answers.items()}
        self.size, self.width = size, width
        w = width
        self.stem = nn.Conv2d(3, w, 4, 2, 1)
        self.stages = nn.ModuleList(
            [
                nn.Sequential(Block(w, w)),
                nn.Sequential(Block(w, 2 * w, 2), Block(2 * w, 2 * w)),
                nn.Sequential(Block(2 * w, 4 * w, 2), Block(4 * w, 4 * w)),
                nn.Sequential(Block(4 * w, 6 * w, 2), Block(6 * w, 6 * w)),
            ]
        )
        # 8 x 8 places, pooled to 4 x 4: where something is decides what it is (a shirt is above the trousers).
        self.mix = nn.Sequential(nn.Flatten(), nn.Linear(6 * w * 16, 320), nn.SiLU(), nn.LayerNorm(320))
        self.pool = _QuestionPool(4 * w, 6 * w, len(self.answers), 128, size // 8)
        self.whole = nn.Linear(320, 128)
        counts = [len(options) for options in self.answers.values()]
        self.option = nn.Parameter(torch.randn(sum(counts), 128) * 128**-0.5)
        self.option_bias = nn.Parameter(torch.zeros(sum(counts)))
        self._question_of = [question for question, count in enumerate(counts) for _ in range(count)]

    def features(self, pixels: Tensor) -> list[Tensor]:
        """Feature maps at 1/2, 1/4, 1/8 and 1/16 of the size: list of [B, C, h, w]."""
        maps, h = [], F.silu(self.stem(pixels))
        for stage in self.stages:
            h = stage(h)
            maps.append(h)
        return maps

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        near, far = self.features(pixels)[-2:]
        summary = self.pool(near, far) + self.whole(self.mix(F.adaptive_avg_pool2d(far, 4)))[:, None]
        logits = (summary[:, self._question_of] * self.option).sum(dim=-1) + self.option_bias
        split = logits.split([len(options) for options in self.answers.values()], dim=1)
        return dict(zip(self.answers, split, strict=True))

    @torch.no_grad()
    def read(self, pictures: Sequence[Image.Image], batch_size: int = 64) -> list[dict[str, str]]:
        """The likeliest answer to every question, for each picture."""
        found: list[dict[str, str]] = []
        for start in range(0, len(pictures), batch_size):
            logits = self(pixels_of(pictures[start : start + batch_size], self.size))
            best = {question: values.argmax(dim=1).tolist() for question, values in logits.items()}
            for row in range(len(pictures[start : start + batch_size])):
                found.append({question: self.answers[question][best[question][row]] for question in self.answers})
        return found

    def save(self, folder: Path) -> None:
        save_module(self, folder, {"answers": self.answers, "size": self.size, "width": self.width})

    @classmethod
    def load(cls, folder: Path) -> AttributeReader:
        return load_module(folder, lambda settings: cls(settings["answers"], settings["size"], settings["width"]))


class KeypointReader(nn.Module):
    """Finds the OpenPose-18 keypoints of the person in a photo, a rendered puppet or a doodle.

    ``forward`` maps [B, 3, size, size] in [-1, 1] to heatmap logits [B, 18, size/4, size/4] and presence logits
    [B, 18]. A coarse-to-fine network: down to 1/32 to see the whole figure, up again to place the joints.
    """

    JOINTS = 18

    def __init__(self, size: int = 128, width: int = 24) -> None:
        super().__init__()
        self.size, self.width = size, width
        w = width
        self.stem = nn.Sequential(nn.Conv2d(3, w, 4, 2, 1), nn.SiLU(), Block(w, 2 * w, 2))  # 1/4
        self.down = nn.ModuleList([Block(2 * w, 3 * w, 2), Block(3 * w, 4 * w, 2), Block(4 * w, 6 * w, 2)])
        self.bottom = nn.Sequential(Block(6 * w, 6 * w), Block(6 * w, 6 * w))
        self.up = nn.ModuleList([Block(6 * w + 4 * w, 4 * w), Block(4 * w + 3 * w, 3 * w), Block(3 * w + 2 * w, 3 * w)])
        self.joints = nn.Conv2d(3 * w, self.JOINTS, 1)
        self.presence = nn.Linear(6 * w, self.JOINTS)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        h = self.stem(pixels)
        skips = [h]
        for block in self.down:
            h = block(h)
            skips.append(h)
        h = self.bottom(h)
        presence = self.presence(h.mean(dim=(2, 3)))
        for block, skip in zip(self.up, reversed(skips[:-1]), strict=True):
            h = F.interpolate(h, scale_factor=2.0, mode="nearest")
            h = block(torch.cat([h, skip], dim=1))
        return self.joints(h), presence

    @staticmethod
    def locate(heat: Tensor) -> Tensor:
        """Sub-cell maxima of [B, 18, h, w]: x and y in [0, 1] of the picture, [B, 18, 2].

        The mean over the peak's 5 x 5 neighbourhood, weighted by probability.
        """
        height, width = heat.shape[2:]
        flat = heat.flatten(2).float().softmax(dim=2)
        peak = flat.argmax(dim=2, keepdim=True)
        xs = torch.arange(width).repeat(height).float()
        ys = torch.arange(height).repeat_interleave(width).float()
        near = ((xs - xs[peak]).abs() <= 2) & ((ys - ys[peak]).abs() <= 2)
        weight = flat * near
        weight = weight / weight.sum(dim=2, keepdim=True).clamp_min(1e-12)
        x, y = (weight * xs).sum(dim=2), (weight * ys).sum(dim=2)
        return torch.stack([(x + 0.5) / width, (y + 0.5) / height], dim=2)

    @torch.no_grad()
    def keypoints(self, pictures: Sequence[Image.Image], batch_size: int = 64) -> NDArray[np.float32]:
        """[B, 18, 3]: x and y in each picture's own pixels, and the probability that the joint is in the picture."""
        found: list[NDArray[np.float32]] = []
        for start in range(0, len(pictures), batch_size):
            part = pictures[start : start + batch_size]
            heat, presence = self(pixels_of(part, self.size))
            places = self.locate(heat).numpy()
            scale = np.array([[picture.width, picture.height] for picture in part], dtype=np.float32)
            sure = presence.float().sigmoid().numpy()
            found.append(np.concatenate([places * scale[:, None], sure[..., None]], axis=2).astype(np.float32))
        return np.concatenate(found)

    def save(self, folder: Path) -> None:
        save_module(self, folder, {"size": self.size, "width": self.width})

    @classmethod
    def load(cls, folder: Path) -> KeypointReader:
        return load_module(folder, lambda settings: cls(settings["size"], settings["width"]))


def save_module(module: nn.Module, folder: Path, settings: Mapping[str, Any]) -> None:
    """Write ``settings`` as config.json and the weights, in half precision, as model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    weights = {name: value.half().contiguous() for name, value in module.state_dict().items()}
    save_file(weights, str(folder / "model.safetensors"))


def load_module(folder: Path, make: Any) -> Any:
    """What `save_module` wrote, in evaluation mode; ``make`` builds the module from its settings.

    Raises:
        ModelError: a file is missing, broken, or of another module.
    """
    try:
        reader = make(json.loads((folder / "config.json").read_text()))
        reader.load_state_dict({k: t.float() for k, t in load_file(str(folder / "model.safetensors")).items()})
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{folder} is not a reader that can be loaded ({error}); expected config.json and model.safetensors "
            f"as `save` writes them."
        ) from error
    return reader.eval()
