"""Uni-ControlNet (Zhao et al., arXiv 2305.16322) on pictures of one's own: one adapter for several kinds of condition.

Two adapters, each trained for itself beside the frozen UNet. The local one is a copy of the UNet's encoder that reads
the conditions found in each picture, joined on channels; the global one turns CLIP's feature of the picture's own
content into tokens behind the words. As published, all conditions of a sample are kept in one of ten, all left out
(zeros) in one of ten, and else each is left out with probability 1/2; the words are left out of every second sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from controlroom.backbones.uni_controlnet import (
    ENCODER,
    GLOBAL,
    LOCAL,
    GlobalAdapter,
    LocalAdapter,
    check_local_adapter,
    load_global_adapter,
    load_local_adapter,
    part_folder,
)
from controlroom.controls.spatial.uni_controlnet import LocalConditions, UniControlNet
from controlroom.core.branch import Condition
from controlroom.core.control import Control, Residuals
from controlroom.core.errors import InputError, ModelError
from controlroom.data.pictures import Picture
from controlroom.sampling.pipeline import Pipeline
from controlroom.signals.signal import Kind
from controlroom.training.base_model import BaseModel
from controlroom.training.clip_vision import image_encoder_for
from controlroom.training.conditioned_recipe import ConditionedSettings, SideRecipe, weights_at
from controlroom.training.conditions import Conditions, JoinedMaps, Row, pixels_shown
from controlroom.training.randomness import StepRandom
from controlroom.training.shown import Shown, ShownBatch
from controlroom.training.side_networks import DROP_ALL, DROP_EACH, KEEP_ALL
from controlroom.training.uni_adapters import (
    PUBLISHED_FEATURES,
    PUBLISHED_FIRST,
    ContentFeatures,
    dropped,
    explicit_attention,
    load_into,
    new_adapter,
    only,
    save_part,
    with_content,
)

WITHOUT_NETWORK: tuple[Kind, ...] = ("canny", "soft_edge", "lines", "scribble")
"""Kinds that are found in any picture without the weights of another network."""
_OF_PART = {LOCAL: ("kinds", "given", "signal_models", "detector"), GLOBAL: ("image_encoder",)}


class UniControlNetSettings(ConditionedSettings):
    """How one of the adapters is trained; rate, steps and batch as published."""

    loop: ClassVar[dict[str, Any]] = {"total_steps": 100_000, "batch_size": 4, "learning_rate": 1e-5}

    aside: ClassVar[frozenset[str]] = ConditionedSettings.aside | {"with_encoder"}

    part: Literal["local", "global"] = "local"
    """Which adapter: that of conditions, or that of a content."""
    kinds: tuple[Kind, ...] | None = None
    """Conditions that the local adapter shall know; None: those of ``start_from``, or all that need no network."""
    given: Kind | None = None
    """Which of the kinds the pictures' own ``conditioning_image`` is; None: the only kind."""
    signal_models: dict[Kind, str] = {}
    """Networks of the signals, for depth, normals, segmentation and poses: ``theatre`` or a folder."""
    detector: str | None = None
    """What finds the people of a pose, for networks of photographs."""
    image_encoder: str | None = None
    """Folder of CLIP's image encoder, whose feature the global adapter reads; None: that of ``start_from``, or the
    theatre's."""
    with_encoder: bool = True
    """Whether the image encoder is written beside the global adapter, where the control looks for it."""
    start_from: str | None = None
    """A Uni-ControlNet whose adapter to go on from: a folder, a name of the theatre. None: a new one."""

    @model_validator(mode="after")
    def _of_one_part(self) -> Self:
        other = GLOBAL if self.part == LOCAL else LOCAL
        stray = next((name for name in _OF_PART[other] if getattr(self, name)), None)
        if stray is not None:
            raise ValueError(f"{stray} is of the {other} adapter, and part is {self.part!r}; leave it out")
        if self.part == LOCAL and self.kinds is not None and len({*self.kinds}) != max(1, len(self.kinds)):
            raise ValueError(f"kinds are one or more, each once, such as kinds=['canny', 'depth']; got {self.kinds}")
        return self

    def build(self, pipe: Pipeline, pictures: Sequence[Picture], folder: Path | None) -> UniControlNetRecipe:
        start = weights_at(self.start_from, "Uni-ControlNet")
        start = None if start is None else part_folder(start, self.part)
        encoder = self._encoder(pipe, start) if self.part == GLOBAL else None
        base, shown, held_out = self.sources(pipe, pictures)
        net = self._adapter(base, encoder, start)
        if encoder is not None:
            return UniControlNetRecipe(base, shown, self, ContentFeatures(encoder), net, encoder, held_out)
        maps = JoinedMaps(folder, net.kinds, self.signal_models, self.detector, self.given)
        recipe = UniControlNetRecipe(base, shown, self, maps, net, None, held_out)
        maps.check_found(shown)
        return recipe

    def _encoder(self, pipe: Pipeline, start: Path | None) -> Any:
        named = self.image_encoder
        if named is None and start is not None and (start / ENCODER).is_dir():
            named = str(start / ENCODER)
        return image_encoder_for(pipe, named, "The global adapter of a Uni-ControlNet")

    def _adapter(self, base: BaseModel, encoder: Any, start: Path | None) -> Any:
        """A new one, or that of ``start``."""
        unet, halvings = base.unet, base.backbone.pixels_per_latent.bit_length() - 1
        if start is None:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                kinds = self.kinds or WITHOUT_NETWORK
                return new_adapter(unet, kinds, encoder, halvings, PUBLISHED_FIRST, PUBLISHED_FEATURES)
        if encoder is not None:
            return load_global_adapter(start, unet)
        net = load_local_adapter(start, unet)
        check_local_adapter(net, unet, halvings, str(start))
        if self.kinds is not None and {*self.kinds} != {*net.kinds}:
            raise InputError(
                f"{start} knows {', '.join(net.kinds)}, and kinds are {', '.join(self.kinds)}. Leave kinds out, or "
                "begin a new adapter."
            )
        return net


class UniControlNetRecipe(SideRecipe[UniControlNetSettings]):
    """Recipe: several conditions of each picture, or its content, into the frozen UNet.

    Args:
        base: the model, all of it frozen.
        shown: the pictures.
        settings: see `UniControlNetSettings`.
        conditions: `JoinedMaps` of the adapter's kinds, or `ContentFeatures`.
        net: the adapter.
        encoder: CLIP's image encoder, for the global one.
        held_out: pictures that the error is measured on, on the way; None: none.

    Exported is the folder ``local`` or ``global``; the folder around it is a `cr.UniControlNet`. Both parts, trained
    one after the other, are put into one.

    Raises:
        InputError: no conditions of the pictures; see `JoinedMaps.fill`.
        ModelError: the image encoder is none, or gives features of another width than the adapter reads.
    """

    name = "uni_controlnet"

    def __init__(
        self,
        base: BaseModel,
        shown: Shown,
        settings: UniControlNetSettings,
        conditions: Conditions,
        net: LocalAdapter | GlobalAdapter,
        encoder: Any = None,
        held_out: Shown | None = None,
    ) -> None:
        if isinstance(net, GlobalAdapter) and net.settings["reads"] != int(encoder.config.projection_dim):
            raise ModelError(
                f"The encoder's features are {encoder.config.projection_dim} wide, the global adapter reads "
                f"{net.settings['reads']}. Give the encoder that belongs to it."
            )
        self.encoder = encoder
        super().__init__(base, shown, settings, conditions, net, held_out)
        self.count = len(net.kinds) if isinstance(net, LocalAdapter) else 1
        if base.device.type == "cpu":
            explicit_attention(net)

    def frozen(self) -> dict[str, nn.Module]:
        return {**super().frozen(), **({} if self.encoder is None else {ENCODER: self.encoder})}

    def fingerprint(self) -> str:
        return f"{super().fingerprint()} dropout={KEEP_ALL, DROP_ALL, DROP_EACH}"

    def dropped(self, maps: Tensor, rng: StepRandom) -> Tensor:
        return dropped(maps, rng, self.count)

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition, maps: Tensor) -> Tensor:
        if self.encoder is None:
            return super().predict(noisy, t, condition, maps)
        return self.base.predict(noisy, t, with_content(condition.expand(len(noisy)), self.net(maps)))

    def residuals(self, noisy: Tensor, t: Tensor, condition: Condition, maps: Tensor) -> Residuals:
        added = self.base.backbone.added_conditions(condition)
        down, mid = self.net(noisy, t, condition.tokens.float(), maps, added)
        return Residuals(("cond",), down, mid)

    def errors(self, part: ShownBatch, condition: Condition, maps: Tensor) -> dict[str, float]:
        """Also with each kind alone, where there are several."""
        found = super().errors(part, condition, maps)
        for number, kind in enumerate(self.net.kinds if self.count > 1 else ()):
            # Not the UNet alone once more.
            alone = super(SideRecipe, self).errors(part, condition, only(maps, number, self.count))
            found[f"held_out_{kind}"] = alone["held_out"]
        return found

    def controls(self, row: Row) -> list[Control]:
        if self.encoder is not None:
            content = pixels_shown(self.shown, row)
            return [UniControlNet({GLOBAL: self.net}, content=content, image_encoder=self.encoder)]
        maps = self.maps(self.shown, [row], 0)[0].split(3)
        images = LocalConditions.model_validate(dict(zip(self.net.kinds, maps, strict=True)))
        return [UniControlNet({LOCAL: self.net}, images)]

    def export(self, folder: Path) -> None:
        encoder = self.encoder if self.settings.with_encoder else None
        save_part(self.net, encoder, folder / self.settings.part)

    def load(self, folder: Path) -> None:
        load_into(self.net, part_folder(folder, self.settings.part), self.base.unet)
