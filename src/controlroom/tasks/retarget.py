"""Retargeting: the person of one picture in the pose of another, styled by words.

Only builds a run: AppearanceControl (MagicPose's appearance module, arXiv 2311.12052) reads the source, a pose
ControlNet (arXiv 2302.05543) reads the skeleton. The pose may come from a photograph, a doodle, OpenPose JSON, a
skeleton that is already drawn, or a `Pose`; what was read can be saved, edited by hand and given again: the same file
gives the same picture.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from controlroom.backbones.loading import THEATRE, find_model
from controlroom.controls.personal.ip_adapter import IPAdapter
from controlroom.controls.pose.appearance import SHARED, AppearanceControl
from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.controls.style.reference_only import ReferenceOnly
from controlroom.core.control import Control, describe
from controlroom.core.errors import InputError, ModelError
from controlroom.core.files import atomic_path, write_atomically
from controlroom.core.images import ImageSource, load_image
from controlroom.core.png import png_bytes
from controlroom.core.pose import L_HIP, NECK, R_HIP, Pose
from controlroom.core.spec import RunSpec
from controlroom.signals.pose.openpose_document import Person
from controlroom.signals.pose.openpose_json import openpose_json, read_openpose
from controlroom.signals.pose.skeleton import draw_skeleton
from controlroom.signals.pose.source import PoseReader, PoseReading, PoseSource, read_pose
from controlroom.tasks.pose_reader import default_reader

if TYPE_CHECKING:
    from controlroom.core.result import RunResult
    from controlroom.sampling.pipeline import Pipeline

Identity = Literal["appearance_control", "ip_adapter", "reference_only"]
_IDENTITY_MODELS: dict[Identity, str | None] = {
    "appearance_control": f"{THEATRE}/appearance",
    "ip_adapter": f"{THEATRE}/ip_adapter",
    "reference_only": None,
}


class RetargetOptions(BaseModel):
    """Everything beside source, pose and words that a retargeting depends on.

    Raises:
        InputError: an unknown or ill-typed option.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), arbitrary_types_allowed=True)

    model: str = THEATRE
    """``theatre``, a folder, a hub id, or a ``.safetensors`` file."""
    identity: Identity = "appearance_control"
    """What keeps the person: the trained module, or one of the baselines that it is measured against."""
    appearance_model: Any = None
    """Weights of that control, made for that model: a name, a path, or a loaded module. None: the theatre's."""
    pose_model: Any = f"{THEATRE}/pose"
    """A ControlNet for OpenPose skeletons."""
    appearance_scale: float = Field(default=1.0, ge=0.0)
    pose_scale: float = Field(default=1.0, ge=0.0)
    mirror: bool = False
    """Flip the pose from left to right, as in a mirror."""
    swap_sides: bool = False
    """Exchange the person's left and right: a stick figure does not say whether it is seen from behind."""
    person: Person = "largest"
    """Which person of a JSON file, from 0."""
    size: tuple[int, int] | None = None
    """Width and height in pixels; None: what the model was trained at."""
    negative_prompt: str | None = None
    num_inference_steps: int = 30
    guidance_scale: float = 3.5
    scheduler: str | None = None

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise InputError(describe("The retargeting", error)) from error

    @property
    def identity_model(self) -> Any:
        """`appearance_model`, or the theatre's; None for a control without weights."""
        return self.appearance_model if self.appearance_model is not None else _IDENTITY_MODELS[self.identity]


@dataclass(frozen=True)
class RetargetPlan:
    """A retargeting that is ready to run.

    Attributes:
        spec: the run.
        pipeline: the model it runs on.
        source: the person's picture, RGB, of the size it came in.
        pose: on a canvas of the result's size.
        reading: how the pose was read.
        given: the file that the pose came from; it is never written over.
        notes: what a person should know, one sentence each.
    """

    spec: RunSpec
    pipeline: Pipeline
    source: Image.Image
    pose: Pose
    reading: PoseReading
    given: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def skeleton(self) -> Image.Image:
        """The pose as the ControlNet sees it."""
        return draw_skeleton(self.pose)

    @property
    def confidence(self) -> float:
        """Mean confidence, in [0, 1], of the joints that are there."""
        return float(self.pose.confidence[self.pose.visible].mean())

    def finished(self, run: RunResult) -> RetargetResult:
        """The result out of what the run of `spec` gave."""
        return RetargetResult(run.images[0], self.pose, self.source, run.manifest, run.texts[0], self)


@dataclass(frozen=True)
class RetargetResult:
    """What retargeting gives.

    Attributes:
        image: the person in the pose.
        pose: that was drawn to, in the picture's pixels.
        source: the person's picture.
        manifest: of the run.
        text: of the PNG, so that ``controlroom replay`` draws it again.
        plan: what was run.
    """

    image: Image.Image
    pose: Pose
    source: Image.Image
    manifest: dict[str, Any]
    text: dict[str, str]
    plan: RetargetPlan

    def save(self, path: str | os.PathLike[str]) -> tuple[Path, ...]:
        """Write the PNG, and the pose as OpenPose JSON beside it (``NAME.pose.json``): both, or neither.

        A JSON file that the pose itself came from is left as it is, and a device (``/dev/stdout``) gets the PNG alone.

        Returns:
            The paths of the PNG and of the pose, as far as they exist.

        Raises:
            OutputError: a file could not be written.
        """
        picture = Path(path)
        content, beside = png_bytes(self.image, self.text), pose_beside(picture)
        if picture.exists() and not picture.is_file() and not picture.is_dir():
            write_atomically(picture, content)
            return (picture,)
        if self.plan.given is not None and beside.exists() and beside.samefile(self.plan.given):
            write_atomically(picture, content)
            return picture, beside
        with atomic_path(picture) as first, atomic_path(beside) as second:
            first.write_bytes(content)
            second.write_text(openpose_json(self.pose), encoding="utf-8")
        return picture, beside


def pose_beside(picture: Path) -> Path:
    """Where the keypoints of a result are written: ``anna.png`` -> ``anna.pose.json``."""
    return picture.with_name(f"{picture.stem}.pose.json")


def plan_retarget(
    source: ImageSource,
    pose: PoseSource,
    prompt: str = "",
    *,
    seed: int | None = None,
    options: RetargetOptions | None = None,
    reader: PoseReader | None = None,
    pipeline: Pipeline | None = None,
) -> RetargetPlan:
    """Read source and pose, and build the run; nothing is drawn yet.

    Args:
        source: picture of the person; see `load_image`.
        pose: photograph, doodle, OpenPose JSON, drawn skeleton, or `Pose`; see `read_pose`.
        prompt: words for what the picture should look like.
        seed: of the noise; None: drawn.
        options: everything else.
        reader: finds keypoints in photographs and doodles; None: the theatre's.
        pipeline: the loaded model; None: ``options.model`` is loaded.

    Raises:
        InputError: a picture or pose that cannot be used, nobody in it, or no torso.
        ModelError: weights that are missing or do not fit.
    """
    options = options or RetargetOptions()
    picture = load_image(source)
    reading = read_pose(pose, reader or default_reader(), options.person)
    require_models(options)
    if pipeline is None:
        from controlroom.sampling.pipeline import Pipeline

        pipeline = Pipeline.from_pretrained(options.model)
    height, width = pipeline.backbone.default_size
    width, height = options.size or (width, height)
    placed, notes = place(reading, width, height, options)
    spec = RunSpec(
        model=pipeline.model or options.model,
        prompt=prompt,
        negative_prompt=options.negative_prompt,
        controls=[
            # A file is named, so that the PNG carries its name and hash; a picture in memory travels in the PNG.
            _keeper(os.fspath(source) if isinstance(source, str | os.PathLike) else picture, options),
            ControlNet(model=options.pose_model, image=placed, scale=options.pose_scale),
        ],
        width=width,
        height=height,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        scheduler=options.scheduler,
        seed=seed,
    )
    return RetargetPlan(spec, pipeline, picture, placed, reading, _file_of(pose), (*reading.notes, *notes))


def retarget(
    source: ImageSource,
    pose: PoseSource,
    prompt: str = "",
    *,
    seed: int | None = None,
    options: RetargetOptions | None = None,
    reader: PoseReader | None = None,
    pipeline: Pipeline | None = None,
) -> RetargetResult:
    """The person of ``source`` in another pose; arguments and errors as in `plan_retarget`."""
    plan = plan_retarget(source, pose, prompt, seed=seed, options=options, reader=reader, pipeline=pipeline)
    return plan.finished(plan.pipeline.run(plan.spec))


def baseline(
    source: ImageSource,
    pose: PoseSource,
    prompt: str = "",
    *,
    seed: int | None = None,
    options: RetargetOptions | None = None,
    reader: PoseReader | None = None,
    pipeline: Pipeline | None = None,
) -> RetargetResult:
    """The same with IP-Adapter (arXiv 2308.06721) in the place of AppearanceControl: the usual way without training."""
    chosen = (options or RetargetOptions()).model_copy(update={"identity": "ip_adapter"})
    return retarget(source, pose, prompt, seed=seed, options=chosen, reader=reader, pipeline=pipeline)


def _keeper(image: Any, options: RetargetOptions) -> Control:
    """The control that keeps the person."""
    if options.identity == "reference_only":
        return ReferenceOnly(image=image, scale=options.appearance_scale)
    if options.identity == "ip_adapter":
        return IPAdapter(model=options.identity_model, image=image, scale=options.appearance_scale)
    return AppearanceControl(image=image, model=options.identity_model, scale=options.appearance_scale)


def place(reading: PoseReading, width: int, height: int, options: RetargetOptions) -> tuple[Pose, tuple[str, ...]]:
    """The pose on the result's canvas, to the thousandth of a pixel that its JSON keeps; and notes.

    Raises:
        InputError: its torso lies outside the canvas.
    """
    pose = reading.pose.fitted(width, height)
    pose = pose.mirrored() if options.mirror else pose
    pose = pose.sides_swapped() if options.swap_sides else pose
    pose = read_openpose(openpose_json(pose))
    x, y = pose.keypoints.T
    inside = pose.visible & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    if not inside[[NECK, R_HIP, L_HIP]].any():
        raise InputError(
            f"The torso of the pose lies outside its canvas of {reading.pose.width} x {reading.pose.height} pixels. "
            "Expected coordinates in pixels of the canvas; check canvas_width and canvas_height."
        )
    away = int((pose.visible & ~inside).sum())
    return pose, (f"{away} joints lie outside the picture.",) if away else ()


def _file_of(source: PoseSource) -> Path | None:
    """The file that a pose was given as, if it was one."""
    if not isinstance(source, str | os.PathLike):
        return None
    try:
        return Path(source) if Path(source).is_file() else None
    except (OSError, ValueError):  # JSON text is longer than any path
        return None


def require_models(options: RetargetOptions) -> None:
    """Name the part that is missing before anything large is loaded.

    Raises:
        ModelError: weights of the appearance module or of the pose ControlNet are not there.
    """
    if options.model == THEATRE:
        from controlroom.backbones.loading import theatre_folder

        if not (theatre_folder() / "model_index.json").is_file():
            raise ModelError(
                f"The theatre's checkpoint is not in this installation ({theatre_folder()}). Reinstall the package."
            )
    if isinstance(options.identity_model, str | os.PathLike) and options.appearance_scale:
        if not (options.identity == "appearance_control" and options.identity_model == SHARED):
            find_model(options.identity_model, "appearance module")
    if isinstance(options.pose_model, str | os.PathLike) and options.pose_scale:
        find_model(options.pose_model, "pose ControlNet")
