"""What settings of recipes that learn people share: who is on the pictures, and people who are held out.

The protocol of the published comparison on LFW is ``least_pictures=10, train_share=0.667``: people with at least ten
pictures, two thirds of them learned from, the others measured on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, PositiveInt, model_validator

from controlroom.training.recipe_settings import EncodedSettings

if TYPE_CHECKING:
    from controlroom.data.pictures import Picture


class PeopleSettings(EncodedSettings):
    """Pictures of several people or things, each in several pictures (`Picture.subject`)."""

    aside: ClassVar[frozenset[str]] = EncodedSettings.aside | {"least_pictures", "train_share"}

    prompt: str | None = None
    """Words for pictures without a caption."""
    least_pictures: PositiveInt | None = None
    """People with fewer pictures are left out; None: nobody is, or with ``train_share`` those with a single one."""
    train_share: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Share of the people that are learned from; the others are what errors are measured on. None: everyone is learned
    from. Who is on which side depends on the names alone."""

    @model_validator(mode="after")
    def _one_side(self) -> Self:
        if self.train_share is not None and self.validation is not None:
            raise ValueError("train_share holds people out of the data, validation names others; give one of the two")
        return self

    @property
    def holds_out(self) -> bool:
        return self.train_share is not None or super().holds_out

    def read(self, data: str) -> Sequence[Picture]:
        """Pictures of people: LFW's layout (``Name/Name_0001.jpg``), or a folder for each person."""
        from controlroom.data.lfw import is_lfw, lfw

        if not is_lfw(data):
            return super().read(data)
        return lfw(data) if self.prompt is None else lfw(data, self.prompt)

    def sides(self, pictures: Sequence[Picture]) -> tuple[Sequence[Picture], Sequence[Picture]]:
        """Pictures of people that are learned from, and of others.

        Raises:
            InputError: nobody has as many pictures, or too few people have for two sides.
        """
        from controlroom.data.lfw import people_split, people_with

        if self.train_share is not None:
            return people_split(pictures, self.least_pictures or 2, self.train_share)
        sides = super().sides(pictures)
        if self.least_pictures is None:
            return sides
        learned, held_out = (people_with(side, self.least_pictures) if side else side for side in sides)
        return learned, held_out
