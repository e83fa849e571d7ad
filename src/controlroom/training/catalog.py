"""The recipes that `controlroom train` knows, in one explicit table; the module of one is imported when it is used."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import import_module

from controlroom.core.errors import InputError
from controlroom.training.recipe_settings import RecipeSettings


@dataclass(frozen=True)
class RecipeEntry:
    """A recipe by name.

    Attributes:
        name: on the command line.
        settings: ``module:Class`` of its settings, below ``controlroom.training.recipes``.
        summary: what it learns, in a line.
        makes: what comes out, and which control draws with it.
    """

    name: str
    settings: str
    summary: str
    makes: str

    def load(self) -> type[RecipeSettings]:
        """The class of its settings."""
        module, name = self.settings.split(":")
        found: type[RecipeSettings] = getattr(import_module(f"controlroom.training.recipes.{module}"), name)
        return found


RECIPES = (
    RecipeEntry(
        "lora",
        "lora:LoRASettings",
        "a person, thing or style from pictures with captions, as low-rank layers",
        "lora.safetensors for cr.LoRA",
    ),
    RecipeEntry(
        "dreambooth_lora",
        "dreambooth_lora:DreamBoothLoRASettings",
        "a subject from a few pictures, its class kept, as low-rank layers",
        "lora.safetensors for cr.LoRA",
    ),
    RecipeEntry(
        "dreambooth",
        "dreambooth:DreamBoothSettings",
        "a subject from a few pictures, its class kept, in the whole UNet",
        "unet/ in diffusers' layout",
    ),
)


def recipe_entry(name: str) -> RecipeEntry:
    """The recipe of that name.

    Raises:
        InputError: there is none; the message names the nearest.
    """
    wanted = name.replace("-", "_").lower()
    for entry in RECIPES:
        if entry.name == wanted:
            return entry
    names = [entry.name for entry in RECIPES]
    near = difflib.get_close_matches(wanted, names, 1)
    hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(names)}."
    raise InputError(f"There is no recipe {name!r}. {hint}")
