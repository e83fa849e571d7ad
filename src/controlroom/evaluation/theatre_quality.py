"""How good the theatre's checkpoint is, judged by its readers: ``python -m controlroom.evaluation.theatre_quality``.

Five questions: how often the readers are wrong on renders (their own error), what the autoencoder loses, whether
pictures show what their captions say, also what training never showed together, and whether two named objects both
appear. Results go to a JSON file that
`docs/theatre.md` is made from.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from controlroom.core.files import write_text_atomically
from controlroom.data.theatre import attributes as a
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import DEFAULT_MIX, Mix, Scene, Split, held_out_combination, sample_scene
from controlroom.evaluation.estimates import Estimate, mean, share
from controlroom.signals.readers import AttributeReader, pixels_of

#: One puppet in a named pose, from the front, in the flat style: what the checkpoint's quality is promised for.
CORE_MIX = Mix(kinds={"puppet": 1.0}, styles={"flat": 1.0}, views={"front": 1.0}, free_pose=0.0)
TWO_OBJECTS = Mix(kinds={"two_props": 1.0}, styles={"flat": 1.0}, views={"front": 1.0})
JUDGED = (
    "place",
    "top colour",
    "top pattern",
    "lower",
    "lower colour",
    "hair colour",
    "hair length",
    "pose",
    "expression",
    "hat",
)

Draw = Callable[[Sequence[str], int], list[Image.Image]]
"""Pictures of prompts; the number is the seed of the first."""


def scenes_of(mix: Mix, count: int, first: int = 0, split: Split = "held_out") -> list[Scene]:
    """Held-out scenes of a mix; of the split "combination", with something that training never showed together."""
    return [sample_scene(first + index, split, mix) for index in range(count)]


def answers_right(reader: AttributeReader, pictures: Sequence[Image.Image], truths: Sequence[a.Answers]) -> dict:
    """For each question, whether the reader was right in each case; questions without a truth are left out.

    Props that are there are joined under "props shown".
    """
    right: dict[str, list[bool]] = {}
    for read, truth in zip(reader.read(pictures), truths, strict=True):
        for question, answer in truth.items():
            if answer is None or answer == a.ABSENT:
                continue
            shown = question in a.PUPPET_ANSWERS or question in ("place", "style", "puppets")
            right.setdefault(question if shown else "props shown", []).append(read[question] == answer)
    return right


def reader_error(reader: AttributeReader, count: int) -> dict[str, Estimate]:
    """The attribute reader's own accuracy on held-out renders of the default mix."""
    scenes = scenes_of(DEFAULT_MIX, count)
    right = answers_right(reader, [render(s) for s in scenes], [a.attributes(s) for s in scenes])
    return {question: share(values) for question, values in right.items()}


@torch.no_grad()
def reconstructions(vae: Any, pictures: Sequence[Image.Image], batch_size: int = 32) -> list[Image.Image]:
    """Pictures through the autoencoder and back, from the posterior's mean."""
    found: list[Image.Image] = []
    for start in range(0, len(pictures), batch_size):
        pixels = pixels_of(pictures[start : start + batch_size], pictures[0].width)
        restored = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        rows = ((restored + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        found.extend(Image.fromarray(row) for row in rows)
    return found


def psnr(first: Image.Image, second: Image.Image) -> float:
    """Peak signal to noise ratio in dB of two pictures of one size."""
    error = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return float(10 * np.log10(255.0**2 / max(np.mean(error**2), 1e-12)))


def autoencoder_quality(vae: Any, reader: AttributeReader, count: int) -> dict[str, Any]:
    """PSNR on held-out scenes, and the readers' accuracy on originals and on reconstructions."""
    scenes = scenes_of(DEFAULT_MIX, count)
    truths = [a.attributes(scene) for scene in scenes]
    originals = [render(scene) for scene in scenes]
    restored = reconstructions(vae, originals)
    before, after = (answers_right(reader, pictures, truths) for pictures in (originals, restored))
    return {
        "psnr": mean([psnr(x, y) for x, y in zip(originals, restored, strict=True)]),
        "lost points": {q: 100 * (float(np.mean(before[q])) - float(np.mean(after[q]))) for q in before},
    }


def caption_quality(draw: Draw, reader: AttributeReader, count: int, batch_size: int = 32) -> dict[str, Estimate]:
    """Share of held-out captions of one puppet whose picture shows what they say, by question."""
    scenes = scenes_of(CORE_MIX, count, 10_000)
    texts = [full_caption(scene) for scene in scenes]
    right: dict[str, list[bool]] = {}
    for start, pictures in _drawn(draw, texts, batch_size):
        stated = [a.read_caption(text) for text in texts[start : start + batch_size]]
        for question, values in answers_right(reader, pictures, stated).items():
            right.setdefault(question, []).extend(values)
    return {question: share(right[question]) for question in JUDGED if question in right}


def combination_quality(draw: Draw, reader: AttributeReader, count: int, batch_size: int = 32) -> dict[str, Estimate]:
    """Captions of one puppet with a combination that training never showed, each part of which it did.

    "together": the answers that make the combination are all right; "apart": the same questions, all right, on as many
    held-out captions without such a combination. Then each question by itself, as `caption_quality`.
    """
    scenes = scenes_of(CORE_MIX, count, 30_000, "combination")
    plain = scenes_of(CORE_MIX, count, 40_000)
    asked = [held_out_combination(scene) for scene in scenes]
    right: dict[str, list[bool]] = {"together": [], "apart": []}
    for name, shown in (("together", scenes), ("apart", plain)):
        texts = [full_caption(scene) for scene in shown]
        for start, pictures in _drawn(draw, texts, batch_size):
            stated = [a.read_caption(text) for text in texts[start : start + batch_size]]
            read = reader.read(pictures)
            for found, said, questions in zip(read, stated, asked[start : start + batch_size], strict=True):
                right[name].append(all(found[question] == said[question] for question in questions))
                if name == "together":
                    for question in JUDGED:
                        if said.get(question) not in (None, a.ABSENT):
                            right.setdefault(question, []).append(found[question] == said[question])
    return {name: share(values) for name, values in right.items()}


def two_object_quality(draw: Draw, reader: AttributeReader, count: int, batch_size: int = 32) -> dict[str, Estimate]:
    """Share of two-object captions with both kinds there, and with both in their colours."""
    scenes = scenes_of(TWO_OBJECTS, count, 20_000)
    texts = [full_caption(scene) for scene in scenes]
    kinds: list[bool] = []
    colours: list[bool] = []
    for start, pictures in _drawn(draw, texts, batch_size):
        for scene, read in zip(scenes[start : start + batch_size], reader.read(pictures), strict=True):
            there, right = both_shown(read, scene)
            kinds.append(there)
            colours.append(right)
    return {"both kinds": share(kinds), "both kinds and colours": share(colours)}


def both_shown(read: Mapping[str, str], scene: Scene) -> tuple[bool, bool]:
    """Whether what was read has every prop of the scene, and whether it has each in its colour."""
    there = all(read[prop.kind] != a.ABSENT for prop in scene.props)
    return there, all(read[prop.kind] == prop.colour for prop in scene.props)


def _drawn(draw: Draw, texts: Sequence[str], batch_size: int) -> Iterator[tuple[int, list[Image.Image]]]:
    begun = time.monotonic()
    for start in range(0, len(texts), batch_size):
        part = texts[start : start + batch_size]
        yield start, draw(part, 1000 + start)
        done = start + len(part)
        left = (time.monotonic() - begun) / done * (len(texts) - done)
        print(f"{done} of {len(texts)} pictures, {left:.0f} s left", flush=True)


def main() -> None:
    """Measure the embedded checkpoint (or another folder) and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="theatre")
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument(
        "--only", choices=("readers", "autoencoder", "captions", "combinations", "two objects"), default=None
    )
    parser.add_argument("--output", type=Path, default=Path("docs/measured/theatre.json"))
    arguments = parser.parse_args()

    from controlroom.backbones.loading import theatre_folder
    from controlroom.sampling.pipeline import Pipeline

    pipeline = cache(lambda: Pipeline.from_pretrained(arguments.model))
    reader = AttributeReader.load(theatre_folder() / "readers" / "attributes")

    def draw(texts: Sequence[str], seed: int) -> list[Image.Image]:
        return pipeline()(
            list(texts), seed=seed, num_inference_steps=arguments.steps, guidance_scale=arguments.guidance_scale
        ).images

    jobs: dict[str, Callable[[], Any]] = {
        "readers": lambda: reader_error(reader, 4 * arguments.n),
        "autoencoder": lambda: autoencoder_quality(_autoencoder(arguments.model), reader, arguments.n),
        "captions": lambda: caption_quality(draw, reader, arguments.n),
        "combinations": lambda: combination_quality(draw, reader, max(2 * arguments.n // 5, 1)),
        "two objects": lambda: two_object_quality(draw, reader, max(arguments.n // 2, 1)),
    }
    found: dict[str, Any] = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    for name, job in jobs.items():
        if arguments.only in (None, name):
            found[name] = _plain(job())
            print(name, json.dumps(found[name], indent=1), flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(arguments.output, json.dumps(found, indent=1, sort_keys=True) + "\n")


def _autoencoder(model: str) -> Any:
    """The autoencoder alone, so that it can be measured before there is a UNet."""
    from diffusers import AutoencoderKL

    from controlroom.backbones.loading import THEATRE, theatre_folder

    return AutoencoderKL.from_pretrained((theatre_folder() if model == THEATRE else Path(model)) / "vae").eval()


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return value.model_dump()
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return value


if __name__ == "__main__":
    main()
