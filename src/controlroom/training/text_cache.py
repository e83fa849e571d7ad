"""What frozen text encoders say of prompts, on disk: encoded once, told ever after.

An entry's key is a hash of the prompt's tokens, of the weights of the encoders, and of the precision it is kept in.
Only for encoders that do not train: a word or a LoRA that is being learned changes their states at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from controlroom.backbones.base import Backbone
from controlroom.core.branch import Condition
from controlroom.training.checkpoint import modules_hash
from controlroom.training.entry_store import EntryStore, key_of

_VERSION = "text states 1"


class TextCache:
    """Conditions of prompts in a folder, which several processes and several models may share.

    Args:
        folder: where entries are kept.
        backbone: whose text encoders and tokenizers speak; frozen.
        dtype: that entries are kept in; None: as they are encoded, so that a run is bit-equal with and without.
        clip_skip: layers of CLIP to leave out at the end.
    """

    def __init__(
        self, folder: Path, backbone: Backbone, dtype: torch.dtype | None = None, clip_skip: int | None = None
    ) -> None:
        self.store, self.backbone, self.dtype, self.clip_skip = EntryStore(folder), backbone, dtype, clip_skip
        self._ids: dict[str, tuple[str, list[Tensor]]] = {}

    @cached_property
    def encoder_hash(self) -> str:
        """Of the weights that speak."""
        encoders = {name: getattr(self.backbone, name) for name in ("text_encoder", "text_encoder_2")}
        return modules_hash({name: part for name, part in encoders.items() if part is not None})

    def fill(self, prompts: Sequence[str]) -> int:
        """Encode what is missing or broken; returns how many that were.

        Raises:
            InputError: a prompt that is not text.
            OutputError: an entry that cannot be written.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if self.store.read(self.key(prompt)) is None]
        for prompt in missing:
            self._make(prompt)
        return len(missing)

    def read(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None, time_ids: Tensor | None = None
    ) -> Condition:
        """What the network is told, one row for each prompt; what is missing or broken is made first.

        Args:
            prompts: texts.
            size: height and width of the pictures in pixels (SDXL is told it); None: the model's own.
            time_ids: [B, 6] for SDXL in place of ``size``, as of `PictureLatents`.
        """
        entries = []
        for prompt in prompts:
            found = self.store.read(self.key(prompt))
            entries.append(self._make(prompt) if found is None else found)
        device, dtype = self.backbone.device, self._text_dtype
        rows = {name: torch.stack([entry[name] for entry in entries]).to(device, dtype) for name in entries[0]}
        pooled = rows.get("pooled")
        if pooled is None:
            return Condition(tokens=rows["tokens"])
        if time_ids is None:
            height, width = size or self.backbone.default_size
            time_ids = torch.tensor([[height, width, 0, 0, height, width]]).expand(len(prompts), -1)
        return Condition(tokens=rows["tokens"], pooled=pooled, time_ids=time_ids.to(device, dtype))

    def key(self, prompt: str) -> str:
        """Of the entry of a prompt."""
        return self._known(prompt)[0]

    @property
    def _text_dtype(self) -> torch.dtype:
        encoder = self.backbone.text_encoder if self.backbone.text_encoder_2 is None else self.backbone.text_encoder_2
        return encoder.dtype

    def _known(self, prompt: str) -> tuple[str, list[Tensor]]:
        if prompt not in self._ids:
            ids = [self.backbone.tokenize(tokenizer, [prompt]) for tokenizer in self.backbone.tokenizers()]
            tokens = "|".join(" ".join(map(str, part[0].tolist())) for part in ids)
            key = key_of(_VERSION, tokens, self.encoder_hash, str(self.dtype), str(self.clip_skip))
            self._ids[prompt] = key, ids
        return self._ids[prompt]

    @torch.no_grad()
    def _make(self, prompt: str) -> dict[str, Tensor]:
        key, ids = self._known(prompt)
        told = self.backbone.encode_ids(ids, clip_skip=self.clip_skip)
        entry = {"tokens": told.tokens[0]} | ({} if told.pooled is None else {"pooled": told.pooled[0]})
        entry = {name: value.cpu().to(self.dtype or value.dtype) for name, value in entry.items()}
        self.store.write(key, entry)
        return entry
