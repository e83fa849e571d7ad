"""The data factory of InstructPix2Pix (Brooks et al., arXiv 2211.09800): caption pairs -> pictures before and after.

Both captions are drawn by Prompt-to-Prompt from the same noise, many times with other seeds, other shares of replaced
attention and other guidance; CLIP keeps the samples that show what they should and differ as they should. A job that
can be stopped and continued: what a pair of captions gives depends on its number alone, and is written whole or not at
all. Deviation: the authors' code replaces self-attention alone; here cross-attention is replaced as the paper says, and
self-attention for the same share of the steps.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from controlroom.core.control import describe
from controlroom.core.errors import InputError
from controlroom.core.files import atomic_path, write_text_atomically
from controlroom.data.caption_edits import CaptionEdit
from controlroom.data.edited_pictures import METADATA

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from controlroom.evaluation.extractor import TextExtractor
    from controlroom.sampling.pipeline import Pipeline

HOW = "instruct.json"
DONE = "done"
# Pairs of captions between two writings of the table; it is also written at the end, however that comes.
_TABLE_EVERY = 100


class InstructDataOptions(BaseModel):
    """How pairs are drawn and which are kept; the defaults are the published ones.

    Raises:
        InputError: an unknown or ill-typed option.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "theatre"
    samples: PositiveInt = 100
    """Drawn of each pair of captions."""
    keep: PositiveInt = 4
    """The best of them that pass, by directional similarity."""
    share: tuple[float, float] = (0.1, 0.9)
    """Bounds of the share of steps whose attention maps are those of the picture before; drawn for each sample."""
    guidance: tuple[float, float] = (7.5, 15.0)
    """Bounds of the guidance scale; drawn for each sample."""
    replace_self: bool = True
    """Whether self-attention is replaced as well; otherwise the pictures have less in common."""
    text_similarity: float = Field(default=0.2, ge=-1, le=1)
    """Least cosine of each picture and its caption."""
    image_similarity: float = Field(default=0.7, ge=-1, le=1)
    """Least cosine of the two pictures."""
    direction: float = Field(default=0.2, ge=-1, le=1)
    """Least cosine of what changed in the pictures and in the captions."""
    steps: PositiveInt = 100
    size: tuple[PositiveInt, PositiveInt] | None = None
    """Height and width in pixels; None: what the model was trained at."""
    scheduler: str | None = None
    """None: the model's own; the authors took ``euler_a``."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    device: str = "cpu"

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise InputError(describe("instruct_data", error)) from error

    @model_validator(mode="after")
    def _bounds(self) -> InstructDataOptions:
        low, high = self.share
        if not 0 <= low <= high <= 1:
            raise ValueError(f"share is {self.share}; expected two numbers from 0 to 1 in order")
        low, high = self.guidance
        if not 1 < low <= high:
            raise ValueError(f"guidance is {self.guidance}; expected two numbers above 1 in order")
        return self


@dataclass(frozen=True)
class Similarities:
    """What CLIP says of a sample, all cosines: each picture and its caption, the pictures, the two changes."""

    before: float
    after: float
    image: float
    direction: float

    def passes(self, options: InstructDataOptions) -> bool:
        """Whether all are high enough."""
        return (
            min(self.before, self.after) >= options.text_similarity
            and self.image >= options.image_similarity
            and self.direction >= options.direction
        )


@dataclass(frozen=True)
class Sample:
    """One drawing of a pair of captions: what was drawn with, and what came out."""

    seed: int
    share: float
    guidance: float
    before: Image.Image
    after: Image.Image
    found: Similarities


@dataclass(frozen=True)
class InstructData:
    """What a job has made.

    Attributes:
        folder: with ``metadata.jsonl`` and ``NNNN/before.png``, ``NNNN/after.png``.
        captions: pairs of captions that were drawn, in all.
        pairs: pairs of pictures that were kept, in all.
        drawn: pairs of captions that this call drew.
    """

    folder: Path
    captions: int
    pairs: int
    drawn: int


def make_instruct_data(
    edits: Sequence[CaptionEdit],
    folder: str | Path,
    options: InstructDataOptions | None = None,
    clip: TextExtractor | None = None,
    pipe: Pipeline | None = None,
) -> InstructData:
    """Draw, filter and write pairs; captions that a former call has drawn are not drawn again.

    Args:
        edits: pairs of captions; more may be appended later.
        folder: what is written to.
        options: None: the published ones.
        clip: what filters; None: the theatre's, for the theatre.
        pipe: the model, if it is loaded already.

    Raises:
        InputError: no captions, captions that Prompt-to-Prompt cannot align, a folder of another job, or a model that
            needs a CLIP of its own.
    """
    from controlroom.evaluation.extractor import label_of
    from controlroom.sampling.pipeline import Pipeline

    options, place = options or InstructDataOptions(), Path(folder)
    if not edits:
        raise InputError("There are no captions to draw.")
    if clip is None:
        if options.model.partition("/")[0] != "theatre":
            raise InputError(
                f"The pictures of {options.model} are judged by CLIP, and the theatre's knows only the theatre. Give "
                "the folder of a CLIP (--clip)."
            )
        from controlroom.evaluation.extractors.theatre import theatre_clip

        clip = theatre_clip()
    _same_job(place, {**options.model_dump(mode="json", exclude={"device"}), "clip": label_of(clip)})
    rows: dict[int, list[dict[str, Any]]] = {}
    for number, edit in enumerate(edits):
        found = _done(place, number, edit)
        if found is not None:
            rows[number] = found
    missing = [number for number in range(len(edits)) if number not in rows]
    if missing and pipe is None:
        pipe = Pipeline.from_pretrained(options.model)
        if options.device != "cpu":
            pipe.to(options.device)
    try:
        for count, number in enumerate(missing, 1):
            assert pipe is not None
            best = best_samples(pipe, clip, edits[number], number, options)
            rows[number] = _write(place, number, edits[number], best, options)
            print(f"captions {len(rows)} of {len(edits)}: {len(best)} pairs kept", file=sys.stderr, flush=True)
            if count % _TABLE_EVERY == 0:
                _write_table(place, rows)
    finally:
        _write_table(place, rows)
    return InstructData(place, len(rows), sum(map(len, rows.values())), len(missing))


def best_samples(
    pipe: Pipeline, clip: TextExtractor, edit: CaptionEdit, number: int, options: InstructDataOptions
) -> list[Sample]:
    """The samples of a pair of captions that pass, the best first, at most ``options.keep``.

    Args:
        pipe: draws.
        clip: judges.
        edit: the captions.
        number: of the pair; with the options it decides everything.
        options: see `InstructDataOptions`.

    Raises:
        InputError: captions that cannot be aligned; the message says which.
    """
    words = clip.text_features([edit.caption, edit.edited])
    kept: list[Sample] = []
    for k in range(options.samples):
        seed, share, guidance = drawn_with(number, k, options)
        try:
            before, after = _draw(pipe, edit, seed, share, guidance, options)
        except InputError as error:
            raise InputError(f"{edit.where or f'captions {number}'}: {error}") from error
        sample = Sample(seed, share, guidance, before, after, similarities(clip, before, after, words))
        if sample.found.passes(options):
            kept = sorted([*kept, sample], key=lambda one: -one.found.direction)[: options.keep]
    return kept


def drawn_with(number: int, sample: int, options: InstructDataOptions) -> tuple[int, float, float]:
    """Seed, share of replaced steps and guidance scale of a sample of a pair of captions."""
    from controlroom.training.randomness import seed_of

    dice = random.Random(seed_of(options.seed, number * options.samples + sample, "instruct data"))
    return dice.getrandbits(31), round(dice.uniform(*options.share), 4), round(dice.uniform(*options.guidance), 4)


def similarities(clip: TextExtractor, before: Image.Image, after: Image.Image, words: torch.Tensor) -> Similarities:
    """What CLIP says of two pictures and the features [2, D] of their captions."""
    import numpy as np
    import torch

    from controlroom.evaluation.metrics.direction import directional_similarity
    from controlroom.evaluation.metrics.similarity import similarity

    pixels = np.stack([np.asarray(picture.convert("RGB"), np.float32) / 255 for picture in (before, after)])
    seen = clip.features(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    first, second = similarity(seen, words.to(seen.device)).tolist()
    alike = float(similarity(seen[:1], seen[1:]))
    changed = directional_similarity(seen[:1], seen[1:], words[:1].to(seen.device), words[1:].to(seen.device))
    return Similarities(first, second, alike, float(changed))


def _draw(
    pipe: Pipeline, edit: CaptionEdit, seed: int, share: float, guidance: float, options: InstructDataOptions
) -> tuple[Image.Image, Image.Image]:
    """The pictures of both captions, from the same noise."""
    from controlroom.controls.editing.prompt_to_prompt import PromptToPrompt

    height, width = options.size or (None, None)
    control = PromptToPrompt(
        source=edit.caption, cross_replace=share, self_replace=share if options.replace_self else 0.0
    )
    settings: dict[str, Any] = {
        "height": height,
        "width": width,
        "num_inference_steps": options.steps,
        "guidance_scale": guidance,
        "scheduler": options.scheduler,
        "seed": seed,
    }
    result = pipe(edit.edited, controls=[control], **settings)
    if "source" in result.states:
        return pipe.decode(result.states["source"])[0], result.images[0]
    # A share of less than a step replaces nothing, and then nothing was drawn along.
    return pipe(edit.caption, **settings).images[0], result.images[0]


# -- on disk ----------------------------------------------------------------------------------------------------------


def _same_job(folder: Path, how: dict[str, Any]) -> None:
    """Note what the folder is drawn with, or check that it is this."""
    note = folder / HOW
    how = json.loads(json.dumps(how))
    if not note.is_file():
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{str(folder)!r} is a file; give a folder for the pairs.")
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{str(folder)!r} holds something else; give an empty folder, or that of a former job.")
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(note, json.dumps(how, indent=1))
        return
    found = _read(note, folder)
    wrong = [name for name in how if found.get(name) != how[name]]
    if wrong:
        raise InputError(
            f"{str(folder)!r} was begun with another {wrong[0]} ({str(found.get(wrong[0]))[:60]}, now "
            f"{str(how[wrong[0]])[:60]}). Give another folder, or the same options."
        )


def _read(path: Path, folder: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be read ({error}). Remove it, or begin in another folder.") from error
    if not isinstance(found, dict):
        raise InputError(f"{str(path)!r} is not a note of this job. Begin in another folder than {str(folder)!r}.")
    return found


def _key(edit: CaptionEdit) -> str:
    text = json.dumps([edit.caption, edit.instruction, edit.edited])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _done(folder: Path, number: int, edit: CaptionEdit) -> list[dict[str, Any]] | None:
    """Rows of a pair of captions that was drawn; None if it was not."""
    path = folder / DONE / f"{number:06d}.json"
    if not path.is_file():
        return None
    found = _read(path, folder)
    if found.get("captions") != _key(edit):
        raise InputError(
            f"{edit.where or f'Captions {number}'} differ from what {str(folder)!r} was drawn from. Append new "
            "captions at the end, or give another folder."
        )
    rows: Any = found.get("rows")
    if not isinstance(rows, list):
        raise InputError(f"{str(path)!r} is not a note of this job. Remove it to draw its captions again.")
    return rows


def _write(
    folder: Path, number: int, edit: CaptionEdit, best: Sequence[Sample], options: InstructDataOptions
) -> list[dict[str, Any]]:
    """Write the pictures of a pair of captions, and last the note that it is done."""
    rows = []
    for rank, sample in enumerate(best):
        name = f"{number * options.keep + rank:04d}"
        (folder / name).mkdir(exist_ok=True)
        for side, picture in (("before", sample.before), ("after", sample.after)):
            with atomic_path(folder / name / f"{side}.png") as beside:
                picture.save(beside, format="PNG")
        rows.append(
            {
                "before": f"{name}/before.png",
                "after": f"{name}/after.png",
                "instruction": edit.instruction,
                "caption": edit.caption,
                "edited": edit.edited,
                "seed": sample.seed,
                "share": sample.share,
                "guidance": sample.guidance,
                "text_similarity": [round(sample.found.before, 4), round(sample.found.after, 4)],
                "image_similarity": round(sample.found.image, 4),
                "direction": round(sample.found.direction, 4),
            }
        )
    (folder / DONE).mkdir(exist_ok=True)
    note = {"captions": _key(edit), "rows": rows}
    write_text_atomically(folder / DONE / f"{number:06d}.json", json.dumps(note, ensure_ascii=False))
    return rows


def _write_table(folder: Path, rows: dict[int, list[dict[str, Any]]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for number in sorted(rows) for row in rows[number]]
    write_text_atomically(folder / METADATA, "".join(f"{line}\n" for line in lines))
