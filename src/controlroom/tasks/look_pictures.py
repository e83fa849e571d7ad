"""What was seen, as pictures: maps over the picture, features as colours, places coloured by where they look."""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from controlroom.tasks.look import Look

Cell = tuple[str, Image.Image]
_MARK = (255, 40, 120)


def cells(look: Look) -> list[list[Cell]]:
    """Rows of titled pictures: one for each picture with its words and features, one for what finds what."""
    colours = features_as_colours(look.components)
    rows: list[list[Cell]] = []
    for number, picture in enumerate(look.pictures):
        row: list[Cell] = [(look.prompts[number], picture)]
        for word, maps in look.words.items():
            if not np.isnan(maps[number]).any():
                row.append((f"{word} {100 * float(maps[number].mean()):.1f} %", heat_over(picture, maps[number])))
        row.append(("features", enlarged(colours[number], picture.size)))
        rows.append(row)
    return rows + _correspondences(look)


def _correspondences(look: Look) -> list[list[Cell]]:
    last = len(look.pictures) - 1
    row: list[Cell] = []
    if last:
        compass = place_colours(look.between.shape[4:6])
        row.append(("places of the first", blended(look.pictures[0], compass)))
        found = colours_of_matches(look.between[last, 0], compass)
        row.append(("where they are in the second", blended(look.pictures[last], found)))
    for number, point in enumerate(look.points):
        row.append((f"point {number + 1}", marked(look.pictures[0], point)))
        shown = heat_over(look.pictures[last], look.attended(point))
        row.append(("looks at", marked(shown, look.match(point))))
    return [row] if row else []


def heat_over(picture: Image.Image, field: NDArray[np.float32]) -> Image.Image:
    """A map [h, w] over a picture: dark where it is least, in its own colours where it is most."""
    span = float(field.max() - field.min())
    level = (field - field.min()) / span if span > 0 else np.zeros_like(field)
    wide = Image.fromarray((level * 255).astype(np.uint8)).resize(picture.size, Image.Resampling.BICUBIC)
    share = np.asarray(wide, np.float32)[..., None] / 255
    # From blue over red to yellow, so that much and little differ in more than brightness.
    heat = np.concatenate([np.minimum(2 * share, 1), np.clip(2 * share - 0.8, 0, 1), 0.45 * (1 - share)], axis=-1) * 255
    mixed = 0.45 * np.asarray(picture.convert("RGB"), np.float32) + 0.55 * heat
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def features_as_colours(components: NDArray[np.float32]) -> NDArray[np.uint8]:
    """[images, 3, h, w] -> [images, h, w, 3]: each component from its least to its most over all pictures."""
    low, high = (function(components, axis=(0, 2, 3), keepdims=True) for function in (np.min, np.max))
    level = (components - low) / np.where(high > low, high - low, 1)
    return np.moveaxis((level * 255).round().astype(np.uint8), 1, -1)


def place_colours(hw: tuple[int, ...]) -> NDArray[np.float32]:
    """[h, w, 3] in [0, 1]: hue around the middle, paler towards it, so that every place has its own colour."""
    height, width = hw
    found = np.empty((height, width, 3), np.float32)
    for y in range(height):
        for x in range(width):
            dx, dy = (x + 0.5) / width * 2 - 1, (y + 0.5) / height * 2 - 1
            hue = (np.arctan2(dy, dx) / (2 * np.pi)) % 1
            found[y, x] = colorsys.hsv_to_rgb(float(hue), min(float(np.hypot(dx, dy)) / 1.2, 1.0), 1.0)
    return found


def colours_of_matches(between: NDArray[np.float32], colours: NDArray[np.float32]) -> NDArray[np.float32]:
    """[h, w, h', w'] attention and [h', w', 3] -> [h, w, 3]: of each place, the colour where it looks most."""
    height, width = between.shape[:2]
    best = between.reshape(height, width, -1).argmax(-1)
    return colours.reshape(-1, 3)[best]


def blended(picture: Image.Image, colours: NDArray[np.float32]) -> Image.Image:
    """Colours [h, w, 3] in [0, 1] over a picture in grey."""
    wide = np.asarray(enlarged((colours * 255).round().astype(np.uint8), picture.size), np.float32)
    grey = np.asarray(picture.convert("L"), np.float32)[..., None]
    return Image.fromarray((0.65 * wide + 0.35 * grey).round().astype(np.uint8))


def enlarged(colours: NDArray[np.uint8], size: tuple[int, int]) -> Image.Image:
    """[h, w, 3] as squares in the size of a picture."""
    return Image.fromarray(colours).resize(size, Image.Resampling.NEAREST)


def marked(picture: Image.Image, point: tuple[float, float]) -> Image.Image:
    """A ring around a place."""
    found = picture.convert("RGB").copy()
    x, y = point[0] * found.width, point[1] * found.height
    radius = max(3.0, min(found.size) / 24)
    pen = ImageDraw.Draw(found)
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=_MARK, width=max(1, round(radius / 3)))
    return found
