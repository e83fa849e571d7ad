"""Sentences around a word that is being learned, so that it becomes a word and not a whole prompt."""

from __future__ import annotations

from controlroom.data.subjects import TOKEN

OBJECT = (
    "{}",
    "a photo of {}",
    "a picture of {}",
    "a close photo of {}",
    "a photo of {} from afar",
    "a clear photo of {}",
    "a blurred photo of {}",
    "a bright photo of {}",
    "a dark photo of {}",
    "a good photo of {}",
    "a snapshot of {}",
    "a cropped photo of {}",
    "a photo that shows {}",
    "here is {}",
    "this is {}",
    "{} in a photo",
    "{} seen from the front",
    "one {}",
)
"""For a person, an animal or a thing."""

STYLE = (
    "a picture in the style of {}",
    "a painting in the style of {}",
    "a drawing in the style of {}",
    "an image in the manner of {}",
    "a small work in the style of {}",
    "a large work in the style of {}",
    "a scene as {} would draw it",
    "a close view in the style of {}",
    "a wide view in the style of {}",
    "something in the style of {}",
    "art in the style of {}",
    "the style of {}",
)
"""For a way of drawing."""

TEMPLATES = {"object": OBJECT, "style": STYLE}


def has_place(text: str) -> bool:
    """Whether a sentence or a caption of a data set has a place for the word: ``{}`` or ``{token}``."""
    return "{}" in text or TOKEN in text


def with_word(text: str, word: str) -> str:
    """The text with the word in its place."""
    return text.replace(TOKEN, word).replace("{}", word)
