"""What trainings leave of a subject in a folder, and how it draws: LoRAs, learned words, tuned networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from controlroom.backbones.learned_words import load_words
from controlroom.backbones.swapped_weights import read_weights, swapped
from controlroom.controls.personal.lora import LoRA
from controlroom.controls.personal.textual_inversion import TextualInversion
from controlroom.core.control import Control
from controlroom.core.errors import InputError, ModelError
from controlroom.core.spec import RunSpec

if TYPE_CHECKING:
    from controlroom.sampling.pipeline import Pipeline

_NETWORKS = ("unet", "text_encoder", "text_encoder_2")


class Called(Protocol):
    """Settings that say what a subject is called, and how strongly LoRAs act."""

    @property
    def word(self) -> str: ...

    @property
    def phrase(self) -> str: ...

    @property
    def learned_phrase(self) -> str: ...

    @property
    def scale(self) -> float: ...


@dataclass(frozen=True)
class Adapter:
    """What a method learned of a subject, in a folder.

    Attributes:
        place: the folder.
        lora, word: its files.
        networks: whole networks in it.
    """

    place: Path
    lora: Path | None
    word: Path | None
    networks: tuple[str, ...]

    @classmethod
    def at(cls, place: Path) -> Adapter:
        """Raises ModelError: there is nothing that can be drawn with."""
        place = place / "weights" if (place / "weights").is_dir() else place
        lora, word = place / "lora.safetensors", place / "learned_word.safetensors"
        networks = tuple(name for name in _NETWORKS if (place / name).is_dir())
        found = cls(place, lora if lora.is_file() else None, word if word.is_file() else None, networks)
        if not (found.lora or found.word or found.networks):
            raise ModelError(
                f"{place} holds no adapter: neither lora.safetensors nor learned_word.safetensors nor unet/. Train "
                "one there (controlroom train), or leave the method out."
            )
        return found

    def words(self, settings: Called, class_words: str) -> str:
        """What the subject is called."""
        word = settings.word if self.word is None else load_words(self.word)[0].word
        phrase = settings.learned_phrase if not (self.lora or self.networks) else settings.phrase
        return phrase.replace("{word}", word).replace("{class}", class_words)

    def controls(self, settings: Called) -> list[Control]:
        """What draws with it, beside whole networks."""
        words = [] if self.word is None else [TextualInversion(str(self.word))]
        return [*words, *([] if self.lora is None else [LoRA(str(self.lora), settings.scale)])]


class Networks:
    """Draws with tuned networks; the weights last read are kept."""

    def __init__(self) -> None:
        self._held: tuple[Path, Mapping[str, Any]] | None = None

    def drawing(self, adapter: Adapter, spec: RunSpec) -> Callable[[Pipeline], Image.Image]:
        """What draws a run with the networks of an adapter."""

        def draw(pipe: Pipeline) -> Image.Image:
            parts = {name: getattr(pipe.backbone, name) for name in adapter.networks}
            if self._held is None or self._held[0] != adapter.place:
                self._held = None  # the others are let go first
                read = {name: read_weights(adapter.place / name, part, name) for name, part in parts.items()}
                self._held = adapter.place, read
            with ExitStack() as stack:
                for name, part in parts.items():
                    stack.enter_context(swapped(part, self._held[1][name]))
                return pipe.run(spec).images[0]

        return draw


def loras_of(trained: Mapping[str, Mapping[str, Adapter]], words: bool = True) -> Mapping[str, Adapter]:
    """Subject -> its LoRA, of the one method that there is; empty where there is none.

    Args:
        trained: method -> subject -> what it learned.
        words: whether learned words may be beside them.

    Raises:
        InputError: several methods, or adapters of another kind.
    """
    if len(trained) > 1:
        raise InputError(f"One method at a time: say which of {', '.join(trained)}, --set methods='[\"…\"]'.")
    found = next(iter(trained.values()), {})
    for adapter in found.values():
        if adapter.lora is None or adapter.networks or (adapter.word and not words):
            raise InputError(f"{adapter.place} is not a LoRA alone, which is what this suite reads.")
    return found
