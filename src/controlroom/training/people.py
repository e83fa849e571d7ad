"""What settings of recipes that learn people share: pictures that say who is on them, and words for those without."""

from __future__ import annotations

from controlroom.training.recipe_settings import EncodedSettings


class PeopleSettings(EncodedSettings):
    """Pictures of several people or things, each in several pictures (`Picture.subject`)."""

    prompt: str | None = None
    """Words for pictures without a caption."""
