"""Retargeting: what is read, what run is built, what is written, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from controlroom.app.cli import main
from controlroom.backbones import loading
from controlroom.core.errors import InputError, ModelError, OutputError
from controlroom.core.pose import JOINTS, Pose
from controlroom.data.theatre.doodle import draw_doodle
from controlroom.data.theatre.pairs import sample_pair
from controlroom.data.theatre.render import render
from controlroom.data.theatre.truth import keypoints
from controlroom.sampling.pipeline import Pipeline, replay
from controlroom.signals.pose.openpose_json import openpose_json, read_openpose, write_openpose
from controlroom.signals.pose.skeleton import draw_skeleton
from controlroom.tasks.pose_reader import default_reader
from controlroom.tasks.retarget import RetargetOptions, plan_retarget, pose_beside, retarget
from tests.controls.nets import tiny_image_encoder, tiny_ip_adapter

FEW = RetargetOptions(num_inference_steps=2)
PAIR = sample_pair(3, "held_out")


def true_pose(size: int = 128) -> Pose:
    found = keypoints(PAIR.target, size=size)
    return Pose(found[:, :2], (found[:, 2] > 0).astype(float), size, size)


def source() -> Image.Image:
    return render(PAIR.source)


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


def test_both_controls_change_the_picture(theatre: Path, pipeline: Pipeline) -> None:
    drawn = retarget(source(), true_pose(), "a cat", seed=1, options=FEW, pipeline=pipeline)
    assert drawn.image.size == (32, 32)
    assert drawn.manifest["cost"]["side_passes"] == 3, "the writer once, the ControlNet at each of two steps"
    assert [control["type"] for control in drawn.manifest["spec"]["controls"]] == ["appearance_control", "controlnet"]
    other = render(sample_pair(4, "held_out").source)
    for changed in (
        retarget(other, true_pose(), "a cat", seed=1, options=FEW, pipeline=pipeline),
        retarget(source(), true_pose().mirrored(), "a cat", seed=1, options=FEW, pipeline=pipeline),
        retarget(source(), true_pose(), "a dog", seed=1, options=FEW, pipeline=pipeline),
    ):
        assert not same(drawn.image, changed.image)
    again = retarget(source(), true_pose(), "a cat", seed=1, options=FEW, pipeline=pipeline)
    assert same(drawn.image, again.image)


def test_scales_of_zero_are_a_run_of_words_alone(theatre: Path, pipeline: Pipeline) -> None:
    options = FEW.model_copy(update={"appearance_scale": 0.0, "pose_scale": 0.0})
    drawn = retarget(source(), true_pose(), "a cat", seed=1, options=options, pipeline=pipeline)
    plain = pipeline("a cat", seed=1, num_inference_steps=2, guidance_scale=options.guidance_scale)
    assert same(drawn.image, plain.images[0])
    assert drawn.manifest["cost"]["side_passes"] == 0


def test_baselines_take_the_place_of_the_appearance_module(theatre: Path, pipeline: Pipeline) -> None:
    from controlroom.tasks.retarget import baseline

    adapter = tiny_ip_adapter(pipeline.unet)
    save_file(adapter, "adapter.safetensors")
    tiny_image_encoder().save_pretrained("image_encoder")
    options = FEW.model_copy(update={"appearance_model": "adapter.safetensors"})
    adapted = baseline(source(), true_pose(), seed=1, options=options, pipeline=pipeline)
    referred = retarget(
        source(), true_pose(), seed=1, options=FEW.model_copy(update={"identity": "reference_only"}), pipeline=pipeline
    )
    types = [[c["type"] for c in result.manifest["spec"]["controls"]] for result in (adapted, referred)]
    assert types == [["ip_adapter", "controlnet"], ["reference_only", "controlnet"]]
    kept = retarget(source(), true_pose(), seed=1, options=FEW, pipeline=pipeline)
    assert not same(adapted.image, referred.image) and not same(adapted.image, kept.image)
    with pytest.raises(ModelError, match="ip_adapter"):
        baseline(source(), true_pose(), options=FEW, pipeline=pipeline)


def test_every_kind_of_pose_is_read(theatre: Path, pipeline: Pipeline) -> None:
    pose = true_pose()
    doodle = draw_doodle(PAIR.target.puppets[0], 1, 256).picture
    write_openpose("pose.json", pose)
    for given, kind, reader in (
        (pose, "pose", "given"),
        ("pose.json", "json", "json"),
        (json.loads(openpose_json(pose)), "json", "json"),
        (draw_skeleton(pose, 512, 512), "skeleton", "skeleton"),
        (render(PAIR.target), "photo", "NetworkReader"),
        (doodle, "doodle", "NetworkReader"),
    ):
        plan = plan_retarget(source(), given, options=FEW, pipeline=pipeline)
        assert (plan.reading.kind, plan.reading.reader) == (kind, reader)
        assert (plan.pose.width, plan.pose.height) == (32, 32)
        assert 0.5 < plan.confidence <= 1


def test_a_drawn_skeleton_is_recognised_to_within_half_a_pixel(theatre: Path, pipeline: Pipeline) -> None:
    picture = draw_skeleton(true_pose(512))
    found = plan_retarget(source(), picture, options=FEW, pipeline=pipeline).pose
    expected = true_pose().fitted(32, 32)
    gap = np.abs(found.keypoints - expected.keypoints)[found.visible & expected.visible]
    assert gap.max() < 0.5


def test_the_pose_that_is_written_gives_the_same_picture(theatre: Path) -> None:
    source().save("anna.png")
    first = retarget("anna.png", render(PAIR.target), "a cat", seed=1, options=FEW)
    assert first.save("out.png") == (Path("out.png"), Path("out.pose.json"))
    assert read_openpose("out.pose.json") == first.pose
    second = retarget("anna.png", "out.pose.json", "a cat", seed=1, options=FEW)
    second.save("second.png")
    assert Path("second.png").read_bytes() == Path("out.png").read_bytes()
    redrawn = replay("out.png")
    redrawn.save("replayed.png")
    assert Path("replayed.png").read_bytes() == Path("out.png").read_bytes()


def test_a_pose_file_is_never_written_over(theatre: Path, pipeline: Pipeline) -> None:
    write_openpose("out.pose.json", true_pose())
    before = Path("out.pose.json").read_bytes()
    drawn = retarget(source(), "out.pose.json", seed=1, options=FEW, pipeline=pipeline)
    drawn.save("out.png")
    assert Path("out.pose.json").read_bytes() == before


def test_mirror_and_sides(theatre: Path, pipeline: Pipeline) -> None:
    pose = true_pose(32)

    def planned(**options: Any) -> Pose:
        return plan_retarget(source(), pose, options=RetargetOptions(**options), pipeline=pipeline).pose

    def close(one: Pose, other: Pose) -> bool:
        return bool(np.abs(one.keypoints - other.keypoints).max() < 1e-3)

    assert close(planned(), pose)
    assert close(planned(mirror=True), pose.mirrored())
    assert close(planned(swap_sides=True), pose.sides_swapped())
    assert not close(pose.mirrored(), pose) and not close(pose.sides_swapped(), pose)


@pytest.mark.parametrize("part", ["pose", "appearance", "readers/keypoints", "model_index.json", "unet", "tokenizer"])
def test_a_missing_part_of_the_theatre_is_named(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    copy = tmp_path / "theatre"
    shutil.copytree(assets, copy)
    shutil.rmtree(copy / part) if (copy / part).is_dir() else (copy / part).unlink()
    monkeypatch.setattr(loading, "theatre_folder", lambda: copy)
    with pytest.raises(ModelError) as raised:
        retarget(source(), render(PAIR.target), options=FEW)
    assert part in str(raised.value) or "checkpoint" in str(raised.value)
    if part == "readers/keypoints":
        # What needs no network is read all the same.
        assert retarget(source(), true_pose(), options=FEW).image.size == (32, 32)


def people(*numbers: Any) -> dict[str, Any]:
    return {"people": [{"pose_keypoints_2d": list(numbers)}], "canvas_width": 64, "canvas_height": 64}


def without(*joints: str) -> str:
    pose = true_pose()
    sure = pose.confidence.copy()
    sure[[JOINTS.index(joint) for joint in joints]] = 0
    return openpose_json(Pose(pose.keypoints, sure, 128, 128))


@pytest.mark.parametrize(
    ("pose", "says"),
    [
        ({"people": []}, "no people"),
        ({}, "no people"),
        (people(), "no people"),
        (people(*[0.0] * 54), "no people"),
        (people(*[1.0] * 53), "53 numbers"),
        (people(*[float("nan")] * 54), "finite"),
        ('{"people": [{"pose_keypoints_2d": [NaN, 1, 1]}]}', "NaN"),
        (people(*[1e300] * 54), "finite number"),
        (without("right_hip", "left_hip"), "no torso"),
        (without("neck"), "no torso"),
        (Pose(true_pose().keypoints + 500, true_pose().confidence, 128, 128), "outside its canvas"),
        (Image.new("RGB", (64, 64), (0, 0, 0)), "torso|Nobody|lie on one point|person"),
        ("missing.png", "does not exist"),
        (b"", "empty"),
    ],
)
def test_a_pose_that_cannot_be_used_is_said_so(
    theatre: Path, pipeline: Pipeline, pose: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from controlroom.signals.readers import KeypointReader

    def nobody(self: KeypointReader, pictures: Any, batch_size: int = 64) -> np.ndarray:
        return np.zeros((len(pictures), 18, 3), np.float32)

    monkeypatch.setattr(KeypointReader, "keypoints", nobody)
    with pytest.raises(InputError, match=says):
        plan_retarget(source(), pose, options=FEW, pipeline=pipeline)


def test_a_full_disk_leaves_neither_picture_nor_pose(
    theatre: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    from controlroom.core import files

    def full(path: Path, flags: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    drawn = retarget(source(), true_pose(), seed=1, options=FEW, pipeline=pipeline)
    monkeypatch.setattr(files, "_flush_to_disk", full)
    with pytest.raises(OutputError, match="no space left"):
        drawn.save("out.png")
    assert list(Path().iterdir()) == []
    assert pose_beside(Path("a/b.png")) == Path("a/b.pose.json")


def test_unknown_options_are_named() -> None:
    with pytest.raises(InputError, match="strenght"):
        RetargetOptions(strenght=1.0)
    with pytest.raises(InputError, match="pose_scale"):
        RetargetOptions(pose_scale=-1.0)


def test_the_command_line(theatre: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source().save("anna.png")
    draw_skeleton(true_pose()).save("skeleton.png")
    line = ["retarget", "anna.png", "--pose", "skeleton.png", "-o", "out.png", "--steps", "2", "--seed", "1"]
    assert main([*line, "--prompt", "a cat", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["files"] == ["out.png", "out.pose.json"]
    assert printed["pose"]["kind"] == "skeleton" and printed["pose"]["reader"] == "skeleton"
    assert printed["pose"]["joints"] == int(true_pose().visible.sum())
    assert printed["seeds"] == [1] and printed["cost"]["unet_passes"] == 2
    assert main(["replay", "out.png", "--verify"]) == 0
    before = Path("anna.png").read_bytes()
    assert main(["retarget", "anna.png", "--pose", "skeleton.png", "-o", "anna.png"]) == 2
    assert "is the source itself" in capsys.readouterr().err
    assert Path("anna.png").read_bytes() == before
    assert main(["retarget", "anna.png", "-o", "out.png"]) == 2  # no pose
    assert default_reader().__class__.__name__ == "NetworkReader"
