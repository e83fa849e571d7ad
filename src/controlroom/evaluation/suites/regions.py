"""What regions repair: two objects left and right (suite ``regions``), and three in a row (suite ``rpg``).

Captions are held-out scenes of props of different kinds and colours, flat and from the front. Without a control the
caption says where things are. With regions each prop has the part of the picture where the scene has it: by
MultiDiffusion (tight columns, bootstrapping) and by RPG in its forms. Each column is as wide as the pictures that the
network was trained on, so that it has room for what the network draws in the middle of a picture; ``wide=False`` asks
for all columns in one such picture. The attribute reader looks at each column by itself; a half of a square is mirrored
to a whole one first. For ``rpg``, whose prompt says no places, an object counts in whichever column it is seen, and a
square is read as a whole. The true pictures give the reader's own error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image, ImageOps
from pydantic import Field

from controlroom.controls.region import Region
from controlroom.controls.regions.multidiffusion import MultiDiffusion
from controlroom.controls.regions.regional_prompts import RegionalPrompts
from controlroom.core.control import Control
from controlroom.core.spec import RunSpec
from controlroom.data.theatre.captions import article
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import CANVAS, Mix, Prop, Scene
from controlroom.data.theatre.vocabulary import PLACE_PHRASES, WORLD_VERSION
from controlroom.evaluation.extractor import TextExtractor, content_hash
from controlroom.evaluation.extractors.theatre import theatre_clip, theatre_reader
from controlroom.evaluation.suites.judges import PromptScore
from controlroom.evaluation.suites.suite import Arm, Case, Judge, Measure, Shown, Suite, SuiteSettings, Table, Values
from controlroom.evaluation.theatre_quality import TWO_OBJECTS, scenes_of
from controlroom.signals.readers import AttributeReader

WITHOUT, MULTI, ATTENTION, LATENTS, RESIZED, TRUE = "without", "multidiffusion", "rpg", "latents", "resized", "truth"
KINDS, RIGHT = "all kinds", "all right"
EACH = "attribute in the right region"
THREE_OBJECTS = Mix(kinds={"three": 1.0}, styles={"flat": 1.0}, views={"front": 1.0})
FIRST_SCENE = 40_000


class Settings(SuiteSettings):
    """Those of the controls."""

    base_ratio: float = Field(default=0.3, ge=0, le=1)
    """Of RPG; the published examples have 0.3 to 0.5."""
    bootstrap: float = Field(default=0.2, ge=0, le=1)
    window: int = Field(default=16, ge=1)
    """Side of MultiDiffusion's window in latent pixels."""
    stride: int = Field(default=8, ge=1)
    """Between its windows."""
    wide: bool = True
    """Each column as wide as the network's own pictures; False: all of them in one."""


class InPlace:
    """Whether each column of a picture shows its prop in its colour."""

    def __init__(self, reader: AttributeReader) -> None:
        self.reader = reader
        label = f"theatre-attributes@{content_hash(reader)}"
        self.fingerprint = f"halves {label}"
        self.measures = (Measure(EACH, extractor=label), Measure(RIGHT, "share", extractor=label))

    def __call__(self, shown: Sequence[Shown[Scene]]) -> Sequence[Values]:
        found: list[dict[str, dict[str, float | None]]] = [{} for _ in shown]
        for arm in shown[0].pictures:
            halves = [half for one in shown for half in columns_of(one.pictures[arm], 2)]
            answers = self.reader.read(halves)
            for index, (row, one) in enumerate(zip(found, shown, strict=True)):
                props = in_order(one.case.truth)
                right = [answers[2 * index + side][prop.kind] == prop.colour for side, prop in enumerate(props)]
                row[arm] = {EACH: sum(right) / len(right), RIGHT: float(all(right))}
        return found


class AllShown:
    """Whether all props are there, and in their colours."""

    def __init__(self, reader: AttributeReader) -> None:
        self.reader = reader
        label = f"theatre-attributes@{content_hash(reader)}"
        self.fingerprint = f"all props {label}"
        self.measures = (Measure(KINDS, "share", extractor=label), Measure(RIGHT, "share", extractor=label))

    def __call__(self, shown: Sequence[Shown[Scene]]) -> Sequence[Values]:
        found: list[dict[str, dict[str, float | None]]] = [{} for _ in shown]
        for arm in shown[0].pictures:
            # A square is one column here: what is in it stands anywhere.
            parts = [columns_of(one.pictures[arm], squares_in(one.pictures[arm])) for one in shown]
            answers = iter(self.reader.read([part for each in parts for part in each]))
            for row, one, each in zip(found, shown, parts, strict=True):
                props, reads = one.case.truth.props, [next(answers) for _ in each]
                kinds = all(any(read[prop.kind] != "absent" for read in reads) for prop in props)
                right = all(any(read[prop.kind] == prop.colour for read in reads) for prop in props)
                row[arm] = {KINDS: float(kinds), RIGHT: float(right)}
        return found


def in_order(scene: Scene) -> list[Prop]:
    """The props of a scene from the left to the right."""
    return sorted(scene.props, key=lambda prop: prop.x)


def squares_in(picture: Image.Image) -> int:
    """How many squares of its height stand side by side in a picture; at least 1."""
    return max(1, picture.width // picture.height)


def columns_of(picture: Image.Image, count: int) -> list[Image.Image]:
    """The columns of a picture, as squares: the halves of a square are beside their mirror images."""
    width, height = picture.width // count, picture.height
    parts = [picture.crop((i * width, 0, (i + 1) * width, height)) for i in range(count)]
    if width >= height:
        return parts
    found = []
    for part in parts:
        whole = Image.new("RGB", (2 * width, height))
        whole.paste(part, (0, 0))
        whole.paste(ImageOps.mirror(part), (width, 0))
        found.append(whole)
    return found


def words(scene: Scene) -> tuple[str, list[str]]:
    """The prompt of the whole picture, and that of each column."""
    place = PLACE_PHRASES[scene.place]
    things = [article(f"{prop.colour} {prop.kind}") for prop in in_order(scene)]
    if len(things) == 2:
        whole = f"{things[0]} on the left and {things[1]} on the right"
    else:
        whole = f"{', '.join(things[:-1])} and {things[-1]}"
    return f"{whole}{', ' if len(whole) > 40 else ' '}{place}", [f"{thing} {place}" for thing in things]


def _controls(settings: Settings, columns: list[str]) -> dict[str, list[Control]]:
    count = len(columns)
    boxes = [(i / count, 0.0, (i + 1) / count, 1.0) for i in range(count)]
    regions = tuple(Region(prompt, box) for prompt, box in zip(columns, boxes, strict=True))
    base = settings.base_ratio
    return {
        WITHOUT: [],
        MULTI: [MultiDiffusion(settings.window, settings.stride, regions=regions, bootstrap=settings.bootstrap)],
        ATTENTION: [RegionalPrompts(tuple(columns), base_ratio=base)],
        LATENTS: [RegionalPrompts(tuple(columns), base_ratio=base, form="latents", fit="crop")],
        RESIZED: [RegionalPrompts(tuple(columns), base_ratio=base, form="latents", fit="resize")],
    }


_TITLES = {
    WITHOUT: "without",
    MULTI: "MultiDiffusion",
    ATTENTION: "RPG (attention, published code)",
    LATENTS: "RPG (latents, cropped)",
    RESIZED: "RPG (latents, resized: the paper's equation)",
}


def _case(settings: Settings, mix: Mix, arms: Sequence[str]) -> Callable[[int], Case[Scene]]:
    def case(number: int) -> Case[Scene]:
        (scene,) = scenes_of(mix, 1, FIRST_SCENE + number)
        prompt, columns = words(scene)
        base = RunSpec(
            model=settings.model,
            prompt=prompt,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            height=CANVAS if settings.wide else None,
            width=len(columns) * CANVAS if settings.wide else None,
            seed=settings.seed + number,
        )
        controls = _controls(settings, columns)
        specs = {arm: base.model_copy(update={"controls": controls[arm]}) for arm in arms}
        return Case(number, prompt, scene, specs, {TRUE: lambda: render(scene)})

    return case


def _suite(
    name: str,
    title: str,
    n: int,
    settings: Settings,
    mix: Mix,
    arms: tuple[str, ...],
    ours: str,
    judge: Judge[Scene],
    clip: TextExtractor | None,
) -> Suite[Scene]:
    score = PromptScore(clip or theatre_clip(), {**{arm: arm for arm in arms}, TRUE: WITHOUT})

    def rank(values: Values) -> tuple[float, ...]:
        return values[ours][RIGHT] or 0.0, values[ours]["CLIP score"] or 0.0

    return Suite(
        name=name,
        title=title,
        n=n,
        settings=settings,
        arms=(*(Arm(arm, _TITLES[arm]) for arm in arms), Arm(TRUE, "true picture (reader)", known=True)),
        case=_case(settings, mix, arms),
        judges=(judge, score),
        table=Table(
            rank=rank,
            baseline=WITHOUT,
            ours=ours,
            others=tuple(arm for arm in arms if arm not in (WITHOUT, ours)),
            note="All arms of a caption are drawn from the same noise. The reader's own error is in the column of the "
            "true picture.",
        ),
        reference=TRUE,
        world=WORLD_VERSION,
    )


def build(
    settings: Settings, n: int, reader: AttributeReader | None = None, clip: TextExtractor | None = None
) -> Suite[Scene]:
    """Two objects, left and right: is each in its half, in its colour?

    Raises:
        ModelError: the theatre's readers are not in this installation.
    """
    judge = InPlace(reader or theatre_reader())
    title = "Two objects in their regions"
    return _suite("regions", title, n, settings, TWO_OBJECTS, (WITHOUT, MULTI, ATTENTION), MULTI, judge, clip)


def build_rpg(
    settings: Settings, n: int, reader: AttributeReader | None = None, clip: TextExtractor | None = None
) -> Suite[Scene]:
    """Three objects in a row: are all there, in their colours?

    Raises:
        ModelError: the theatre's readers are not in this installation.
    """
    judge = AllShown(reader or theatre_reader())
    arms = (WITHOUT, ATTENTION, LATENTS, RESIZED)
    return _suite("rpg", "Prompts of three objects", n, settings, THREE_OBJECTS, arms, ATTENTION, judge, clip)
