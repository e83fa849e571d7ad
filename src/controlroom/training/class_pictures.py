"""Pictures that the untrained model draws of a class, which a training shows beside its subject (arXiv 2208.12242).

A job that can be stopped and continued: picture i has seed i and is written whole or not at all.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from controlroom.core.errors import InputError
from controlroom.core.files import atomic_path, write_atomically
from controlroom.data.picture_files import picture_of
from controlroom.data.pictures import Picture
from controlroom.sampling.pipeline import Pipeline


def class_pictures(
    pipe: Pipeline,
    prompt: str,
    count: int,
    folder: Path,
    size: tuple[int, int] | None = None,
    steps: int = 50,
    guidance_scale: float = 7.5,
    batch: int = 4,
) -> tuple[Picture, ...]:
    """Draw those pictures of the class that are not in the folder yet, and return all.

    Args:
        pipe: the untrained model.
        prompt: names the class: "a photo of a dog".
        count: how many.
        folder: for ``00000.png`` and so on, and ``class.json``, which says how they were drawn.
        size: height and width; None: the model's own.
        steps, guidance_scale: of the solver.
        batch: pictures drawn at once.

    Raises:
        InputError: the folder holds pictures of another class, model or size.
    """
    if not prompt.strip():
        raise InputError("Pictures of a class need a prompt that names it, such as 'a photo of a dog'.")
    folder.mkdir(parents=True, exist_ok=True)
    height, width = size or pipe.backbone.default_size
    how = {
        "model": pipe.model,
        "prompt": prompt,
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
    }
    note = folder / "class.json"
    if note.is_file():
        try:
            found = json.loads(note.read_text())
        except ValueError as error:
            raise InputError(f"{note} cannot be read ({error}). Delete {folder} to draw its pictures anew.") from error
        if found != how:
            wrong = next(name for name in how if not isinstance(found, dict) or found.get(name) != how[name])
            raise InputError(
                f"{folder} holds pictures of a class with another {wrong}. Give another folder, or delete it."
            )
    else:
        write_atomically(note, json.dumps(how, indent=1).encode())
    missing = [i for i in range(count) if not (folder / f"{i:05d}.png").is_file()]
    for start in range(0, len(missing), batch):
        part = missing[start : start + batch]
        # Seeds follow from the number; a batch only holds neighbours.
        for first, length in _runs(part):
            drawn = pipe(
                prompt,
                num_images_per_prompt=length,
                seed=first,
                height=height,
                width=width,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
            )
            for k, picture in enumerate(drawn.images):
                with atomic_path(folder / f"{first + k:05d}.png") as beside:
                    picture.save(beside, format="PNG")
        done = count - len(missing) + start + len(part)
        print(f"pictures of the class: {done} of {count}", file=sys.stderr, flush=True)
    return tuple(picture_of(folder / f"{i:05d}.png", folder, prompt) for i in range(count))


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Neighbouring numbers as (first, length)."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][0] + found[-1][1] == number:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((number, 1))
    return found
