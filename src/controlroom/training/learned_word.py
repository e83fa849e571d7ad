"""A new word that trains: a few vectors in the place of its tokens' embeddings, in every text encoder of a model.

Tokenizers know the word, and text encoders its vectors, within a block only; tables of embeddings are never touched.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from controlroom.backbones.base import expand_learned_words
from controlroom.backbones.learned_words import LearnedWord, check_word, load_words, save_learned_words
from controlroom.backbones.lora_names import TEXT, TEXT_2
from controlroom.core.errors import InputError, ModelError
from controlroom.training.base_model import BaseModel
from controlroom.training.randomness import seed_of

FILE = "learned_word.safetensors"
_TOKENIZERS = {TEXT: "tokenizer", TEXT_2: "tokenizer_2"}


class NewWord(nn.Module):
    """Vectors of one new word: ``rows[part]`` [vectors, width] for each text encoder.

    Args:
        base: the model; read only, outside of `known`.
        word: as it is written in prompts, like ``<anna>``; several vectors are ``<anna>``, ``<anna>_1``, ...
        vectors: how many.
        initial: words that it starts from: their embeddings, averaged in groups or repeated until there are enough.
            None: random, as long as the table's are on average.
        seed: of random vectors.

    Raises:
        InputError: a word that cannot stand in a prompt or that the model knows already; no initial words in the text.
        ModelError: a model without a text encoder.
    """

    def __init__(self, base: BaseModel, word: str, vectors: int = 1, initial: str | None = None, seed: int = 0) -> None:
        super().__init__()
        check_word(word)
        if vectors < 1:
            raise InputError(f"A word needs at least 1 vector, got {vectors}.")
        encoders = base.text_encoders()
        if not encoders:
            raise ModelError(f"{base.model} has no text encoder that could learn a word.")
        self.word = word
        self._backbone = base.backbone
        self._tokenizers: dict[str, Any] = {}
        self._tables: dict[str, Any] = {}
        self._first: dict[str, int] = {}
        self.rows = nn.ParameterDict()
        for number, (part, encoder) in enumerate(encoders.items()):
            tokenizer, table = getattr(base.backbone, _TOKENIZERS[part]), encoder.get_input_embeddings()
            self._tables[part] = table
            self._tokenizers[part], self._first[part] = _knowing(tokenizer, word, vectors)
            rows = _started(tokenizer, table.weight, initial, vectors, seed_of(seed, number, "learned word"))
            self.rows[part] = nn.Parameter(rows)
            lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            self.register_buffer(f"lengths_{part}", lengths, persistent=False)

    @contextmanager
    def known(self) -> Iterator[None]:
        """Within the block, the model's tokenizers and text encoders know the word."""
        with ExitStack() as stack:
            for part, table in self._tables.items():
                name = _TOKENIZERS[part]
                stack.callback(setattr, self._backbone, name, getattr(self._backbone, name))
                setattr(self._backbone, name, self._tokenizers[part])
                stack.enter_context(_spliced(table, self._first[part], self.rows[part]))
            yield

    @torch.no_grad()
    def retract(self) -> None:
        """Give each vector the length again that it started with."""
        for part, rows in self.rows.items():
            lengths = self.get_buffer(f"lengths_{part}")
            rows.mul_(lengths / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-12))

    def learned(self) -> LearnedWord:
        """What was learned, as files and controls have it; detached."""
        return LearnedWord(self.word, tuple(rows.detach().clone() for rows in self.rows.values()))

    def save(self, folder: Path) -> Path:
        """Write ``learned_word.safetensors``, which `cr.TextualInversion` and diffusers load."""
        return save_learned_words(folder / FILE, [self.learned()])

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            ModelError: a word of another number of vectors, or for other text encoders.
        """
        (stored,) = load_words(folder / FILE, self.word)
        given, own = [list(v.shape) for v in stored.vectors], [list(rows.shape) for rows in self.rows.values()]
        if given != own:
            raise ModelError(f"{folder / FILE} has vectors of the shapes {given}, where {own} are trained.")
        for rows, vectors in zip(self.rows.values(), stored.vectors, strict=True):
            rows.copy_(vectors)


def _knowing(tokenizer: Any, word: str, vectors: int) -> tuple[Any, int]:
    """A copy of a tokenizer that knows the word, and the number of its first token."""
    changed = copy.deepcopy(tokenizer)
    tokens = [word, *(f"{word}_{k}" for k in range(1, vectors))]
    for token in tokens:
        alone = tokenizer(token, add_special_tokens=False).input_ids
        if len(alone) == 1 or token in tokenizer.get_added_vocab() or not changed.add_tokens([token]):
            raise InputError(f"{token!r} is a word that this model knows already. Choose another, like <{word}>.")
    numbers = [int(changed.convert_tokens_to_ids(token)) for token in tokens]
    assert numbers == list(range(numbers[0], numbers[0] + vectors))
    return changed, numbers[0]


def _started(tokenizer: Any, table: Tensor, initial: str | None, vectors: int, seed: int) -> Tensor:
    """First values [vectors, width] in float32."""
    table = table.detach().float()
    if initial is None:
        noise = torch.randn(vectors, table.shape[1], generator=torch.Generator().manual_seed(seed)).to(table.device)
        length = torch.linalg.vector_norm(table, dim=1).mean()
        return noise * (length / torch.linalg.vector_norm(noise, dim=1, keepdim=True))
    ids = tokenizer(expand_learned_words(initial, tokenizer), add_special_tokens=False).input_ids
    if not ids:
        raise InputError(f"There is no word in {initial!r} to start from. Name what is learned, like initial='dog'.")
    found = table[torch.tensor(ids, device=table.device)]
    if len(ids) < vectors:
        return found[[k % len(ids) for k in range(vectors)]].clone()
    return torch.stack([group.mean(0) for group in torch.tensor_split(found, vectors)])


@contextmanager
def _spliced(table: Any, first: int, rows: Tensor) -> Iterator[None]:
    """Tokens from number ``first`` on are looked up in ``rows`` instead of the table."""
    plain, own = table.forward, "forward" in vars(table)

    def looked_up(ids: Tensor) -> Tensor:
        new = (ids >= first) & (ids < first + len(rows))
        # Numbers of new tokens may lie behind the table's end.
        found = plain(ids.masked_fill(new, 0))
        vectors = rows[(ids - first).clamp(0, len(rows) - 1)].to(found.dtype)
        return torch.where(new[..., None], vectors, found)

    table.forward = looked_up
    try:
        yield
    finally:
        if own:
            table.forward = plain
        else:
            del table.forward
