"""The words of the theatre: what can be said about a scene, what each word looks like, and the version of both.

Frozen: every shipped checkpoint has learned exactly these words and colours. Changing anything here or in the drawing
invalidates them, so such a change must raise ``WORLD_VERSION`` and train everything again.
"""

from __future__ import annotations

from typing import Final

WORLD_VERSION: Final = "theatre-1"

RGB = tuple[int, int, int]

#: Colours of garments, animals and things (8-bit sRGB), chosen far apart so that they survive an 8x autoencoder.
COLOURS: Final[dict[str, RGB]] = {
    "red": (217, 38, 48),
    "orange": (245, 132, 31),
    "yellow": (250, 214, 54),
    "green": (44, 160, 68),
    "blue": (40, 98, 224),
    "purple": (128, 52, 180),
    "pink": (246, 138, 188),
    "brown": (126, 78, 44),
    "black": (40, 40, 46),
    "white": (246, 246, 244),
}
HAIR_COLOURS: Final[dict[str, RGB]] = {
    "black": (34, 32, 38),
    "brown": (112, 66, 34),
    "blond": (240, 204, 92),
    "red": (204, 76, 28),
    "blue": (48, 108, 226),
}
SKINS: Final[dict[str, RGB]] = {
    "pale": (255, 224, 200),
    "tan": (232, 180, 134),
    "brown": (172, 112, 70),
    "dark": (100, 62, 40),
}
FIGURES: Final = ("woman", "man")
HAIR_LENGTHS: Final = ("short", "long")
TOPS: Final = ("shirt", "sweater")  # short sleeves, long sleeves
LOWERS: Final = ("trousers", "skirt", "shorts")
PATTERNS: Final = ("plain", "striped", "dotted", "checked")
HATS: Final = ("none", "top hat", "cap", "beanie")
EXPRESSIONS: Final = ("neutral", "smiling", "surprised", "frowning")
VIEWS: Final = ("front", "side", "back", "above")
PLACES: Final = ("beach", "forest", "city", "snow", "room", "desert", "stage", "night", "studio")
STYLES: Final = ("flat", "sketch", "watercolour", "pixel", "neon")
ANIMALS: Final = ("cat", "dog", "rabbit", "bird", "elephant")
THINGS: Final = ("ball", "box", "cone", "star", "car", "chair", "cup", "flower")
#: Kinds that are recognised from the side, and so shown from there unless a view is asked for.
SIDE_FIRST: Final = (*ANIMALS, "car")
SIZES: Final = ("small", "medium", "big")
POSES: Final = (
    "standing",
    "waving",
    "cheering",
    "spreading",
    "akimbo",
    "pointing",
    "walking",
    "running",
    "jumping",
    "sitting",
    "kicking",
    "dancing",
)

#: How a caption says them.
POSE_PHRASES: Final[dict[str, str]] = {
    **{pose: pose for pose in POSES},
    "spreading": "with arms spread",
    "akimbo": "with hands on hips",
}
PLACE_PHRASES: Final[dict[str, str]] = {
    "beach": "on the beach",
    "forest": "in the forest",
    "city": "in the city",
    "snow": "in the snow",
    "room": "in a room",
    "desert": "in the desert",
    "stage": "on a stage",
    "night": "at night",
    "studio": "in a studio",
}
STYLE_PHRASES: Final[dict[str, str]] = {
    "flat": "",
    "sketch": "pencil sketch",
    "watercolour": "watercolour painting",
    "pixel": "pixel art",
    "neon": "neon lights",
}
VIEW_PHRASES: Final[dict[str, str]] = {
    "front": "from the front",
    "side": "from the side",
    "back": "from behind",
    "above": "from above",
}

#: Words that captions do not use but instructions, edits and later subjects need; they get tokens of their own.
_EXTRA_WORDS: Final = """
a an the and or with without of in on at to into from by for is are be it its her his their this that no not very
make makes turn change give put take add remove replace move let keep wear wearing wears hold same other another
more less bigger smaller left right middle centre center side front back behind above below next near between under over
top bottom one two three four both pair picture photo drawing painting art style portrait full body face head
hair skin hat shirt sweater trousers skirt shorts garment clothes dress laid flat person people puppet figure girl boy
she he they who standing eyes mouth smile frown happy sad angry sun moon sea tree trees sand ground sky light dark day
night colour pattern size small medium big tall short long large tiny stripes dots checks plain stripy spotted
animal thing object scene background place view seen looking close up upper lower sks toy xyz subject
""".split()


def words() -> list[str]:
    """Every word the tokenizer knows as one token, sorted, without duplicates."""
    found: set[str] = set(_EXTRA_WORDS)
    tables = (COLOURS, HAIR_COLOURS, SKINS, FIGURES, HAIR_LENGTHS, TOPS, LOWERS, PATTERNS, HATS, EXPRESSIONS, VIEWS)
    tables += (PLACES, STYLES, ANIMALS, THINGS, SIZES, POSES)
    for table in tables:
        for entry in table:
            found.update(entry.split())
    for phrases in (POSE_PHRASES, PLACE_PHRASES, STYLE_PHRASES, VIEW_PHRASES):
        for phrase in phrases.values():
            found.update(phrase.split())
    return sorted(found)
