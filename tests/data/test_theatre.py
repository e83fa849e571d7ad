"""The theatre: deterministic, true to its words, and split so that train and held-out never meet."""

from dataclasses import replace

import numpy as np
import pytest

from controlroom.data.theatre import attributes as a
from controlroom.data.theatre import vocabulary as v
from controlroom.data.theatre.captions import captions, full_caption, training_caption
from controlroom.data.theatre.doodle import draw_doodle
from controlroom.data.theatre.edits import KINDS, sample_edit
from controlroom.data.theatre.paint import Part
from controlroom.data.theatre.pairs import portraits, sample_pair
from controlroom.data.theatre.poses import JointAngles, named_pose
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import Dice, Mix, Prop, Puppet, Scene, is_held_out_combination, sample_scene
from controlroom.data.theatre.truth import boxes, edges, face_keypoints, keypoints, maps

EVERYTHING = Mix(
    styles=dict.fromkeys(v.STYLES, 0.2),
    views=dict.fromkeys(v.VIEWS, 0.25),
)

FROZEN_CAPTION = "a portrait of a woman with long brown hair wearing a purple shirt, seen from behind, on a stage"
FROZEN_PIXELS = [
    [
        (216, 156, 76),
        (218, 158, 77),
        (213, 159, 76),
        (205, 160, 73),
        (205, 160, 73),
        (213, 159, 76),
        (219, 158, 77),
        (221, 158, 78),
    ],
    [
        (168, 90, 62),
        (166, 88, 61),
        (152, 88, 56),
        (136, 91, 50),
        (136, 91, 50),
        (154, 88, 56),
        (171, 89, 63),
        (179, 93, 66),
    ],
    [
        (145, 74, 59),
        (130, 63, 52),
        (114, 58, 42),
        (106, 61, 36),
        (106, 61, 36),
        (120, 62, 43),
        (142, 68, 55),
        (152, 75, 62),
    ],
    [
        (151, 77, 65),
        (126, 66, 66),
        (108, 61, 52),
        (106, 62, 37),
        (106, 62, 37),
        (115, 67, 52),
        (137, 75, 65),
        (150, 72, 64),
    ],
    [
        (155, 57, 72),
        (132, 57, 101),
        (108, 56, 88),
        (102, 58, 53),
        (103, 58, 55),
        (109, 59, 85),
        (127, 60, 87),
        (150, 54, 68),
    ],
    [
        (153, 41, 69),
        (132, 47, 109),
        (110, 52, 108),
        (102, 56, 69),
        (106, 57, 79),
        (111, 51, 115),
        (123, 47, 99),
        (150, 45, 67),
    ],
    [
        (151, 35, 57),
        (127, 42, 81),
        (105, 49, 91),
        (102, 55, 77),
        (106, 55, 89),
        (111, 48, 106),
        (127, 44, 83),
        (152, 44, 61),
    ],
    [
        (153, 35, 51),
        (124, 40, 59),
        (94, 44, 74),
        (92, 49, 90),
        (97, 49, 93),
        (103, 44, 79),
        (130, 43, 62),
        (156, 44, 58),
    ],
]


def pixels(scene: Scene, size: int = 128) -> np.ndarray:
    return np.asarray(render(scene, size), dtype=np.int16)


def puppet_scene(seed: int, **changes: object) -> Scene:
    scene = sample_scene(seed, "held_out", Mix(kinds={"puppet": 1.0}, styles={"flat": 1.0}, views={"front": 1.0}))
    return replace(scene, actors=(replace(scene.puppets[0], **changes),))  # type: ignore[arg-type]


def test_a_seed_is_a_picture() -> None:
    for seed in range(20):
        scene = sample_scene(seed, "train", EVERYTHING)
        assert scene == sample_scene(seed, "train", EVERYTHING)
        assert np.array_equal(pixels(scene), pixels(scene))
        assert captions(scene, seed) == captions(scene, seed)
    assert sample_scene(1) != sample_scene(2)


def test_the_world_has_not_changed() -> None:
    """Every shipped checkpoint has learned this world: a change must raise WORLD_VERSION and train them again."""
    assert v.WORLD_VERSION == "theatre-1"
    scene = sample_scene(123)
    assert full_caption(scene) == FROZEN_CAPTION
    assert np.abs(pixels(scene, 8) - np.array(FROZEN_PIXELS)).max() <= 4


def test_splits_never_meet() -> None:
    train = {repr(sample_scene(seed, "train")) for seed in range(300)}
    held_out = {repr(sample_scene(seed, "held_out")) for seed in range(300)}
    assert not train & held_out


def test_combinations_are_held_out_of_training() -> None:
    assert not any(is_held_out_combination(sample_scene(seed, "train", EVERYTHING)) for seed in range(400))
    assert not any(is_held_out_combination(sample_scene(seed, "held_out", EVERYTHING)) for seed in range(400))
    assert all(is_held_out_combination(sample_scene(seed, "combination")) for seed in range(60))
    for seed in range(100):
        edit, pair = sample_edit(seed), sample_pair(seed)
        for scene in (edit.before, edit.after, pair.source, pair.target, *portraits(seed, 2)):
            assert not is_held_out_combination(scene)


def test_captions_use_known_words_and_are_true() -> None:
    known = set(v.words())
    for seed in range(400):
        scene = sample_scene(seed, "held_out", EVERYTHING)
        truth = a.attributes(scene)
        for text in (*captions(scene, seed), training_caption(scene, Dice("test", seed))):
            assert set(text.replace(",", " ").split()) <= known, text
            for question, answer in a.read_caption(text).items():
                if answer is not None and truth[question] is not None:
                    assert answer == truth[question], (question, text)


def test_full_captions_say_what_quality_is_judged_by() -> None:
    mix = Mix(kinds={"puppet": 1.0}, styles={"flat": 1.0}, views={"front": 1.0}, free_pose=0.0)
    for seed in range(50):
        scene = sample_scene(seed, "held_out", mix)
        stated = a.read_caption(full_caption(scene))
        for question in ("place", "top colour", "top pattern", "lower", "lower colour", "hair colour", "pose"):
            assert stated[question] == a.attributes(scene)[question]


def test_labels_follow_the_order_of_the_questions() -> None:
    scene = sample_scene(5, "held_out")
    numbers = a.labels(a.attributes(scene))
    assert len(numbers) == len(a.ANSWERS)
    assert numbers[0] == v.PLACES.index(scene.place)


@pytest.mark.parametrize("pose", v.POSES)
def test_keypoints_lie_on_the_puppet(pose: str) -> None:
    scene = puppet_scene(3, pose=pose, angles=named_pose(pose, Dice("pose", pose)), view="front")
    points, actor = keypoints(scene), maps(scene).actor
    assert points.shape == (18, 3)
    inside = points[points[:, 2] > 0]
    on = [actor[int(y), int(x)] == 1 for x, y, _ in inside]
    assert np.mean(on) > 0.9


def test_right_is_the_puppets_right() -> None:
    front = keypoints(puppet_scene(3, view="front"))
    back = keypoints(puppet_scene(3, view="back"))
    assert front[2, 0] < front[5, 0]  # its right shoulder is on the left of the picture
    assert back[2, 0] > back[5, 0]
    assert back[0, 2] == 0.5  # the nose is there, but hidden


def test_mirrored_angles_mirror_the_joints() -> None:
    angles = JointAngles(120, 20, 30, -10, 20, -5, 40, -60, torso=4, head=2)
    first = puppet_scene(3, angles=angles, x=64.0, view="front")
    second = puppet_scene(3, angles=angles.mirrored(), x=64.0, view="front")
    right, left = keypoints(first), keypoints(second)
    np.testing.assert_allclose(right[3, 0] - 64, -(left[6, 0] - 64), atol=1e-3)
    np.testing.assert_allclose(right[3, 1], left[6, 1], atol=1e-3)


def test_face_keypoints_follow_the_expression() -> None:
    mouth = slice(48, 60)
    height = {}
    for mood in v.EXPRESSIONS:
        points = face_keypoints(puppet_scene(3, expression=mood, view="front"))
        assert points.shape == (70, 3)
        height[mood] = np.ptp(points[mouth, 1])
    assert height["surprised"] > height["neutral"] * 2
    corners = {m: face_keypoints(puppet_scene(3, expression=m, view="front"))[[48, 54], 1].mean() for m in height}
    assert corners["frowning"] > corners["smiling"]
    assert face_keypoints(puppet_scene(3, view="back"))[:, 2].max() == 0


def test_expression_changes_the_head_only() -> None:
    scene = puppet_scene(3, expression="neutral", view="front")
    other = puppet_scene(3, expression="surprised", view="front")
    changed = np.abs(pixels(scene) - pixels(other)).max(axis=-1) > 12
    assert changed.any()
    head = np.isin(maps(scene).part, [Part.HEAD, Part.HAIR])
    assert head[changed].mean() > 0.95


def test_maps_and_boxes_agree_with_the_picture() -> None:
    for seed in range(20):
        scene = sample_scene(seed, "held_out", Mix(kinds={"two_props": 1.0}))
        found = maps(scene)
        for index, box in enumerate(boxes(scene)):
            assert box is not None
            mask = found.mask(index)
            ys, xs = np.nonzero(mask)
            assert (box[0], box[1]) == (xs.min(), ys.min())
            actor = scene.actors[index]
            assert isinstance(actor, Prop)
            alone = replace(scene, actors=tuple(other for other in scene.actors if other is not actor))
            gone = np.abs(pixels(scene) - pixels(alone)).max(axis=-1) > 40
            if gone.sum() > 50:  # an object of the ground's colour hardly shows
                assert mask[gone].mean() > 0.6
        assert set(np.unique(edges(scene))) == {0, 255}


def test_depth_is_nearer_in_front() -> None:
    scene = puppet_scene(3)
    found = maps(scene)
    assert found.depth[found.mask(0)].mean() > found.depth[~found.mask(0)].mean() + 30


def test_size_scales_the_truth_with_the_picture() -> None:
    scene = puppet_scene(3)
    np.testing.assert_allclose(keypoints(scene, size=256)[:, :2], keypoints(scene)[:, :2] * 2, rtol=1e-5)
    assert render(scene, 64).size == (64, 64)
    assert maps(scene, 64).part.shape == (64, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_edits_change_what_they_name(kind: str) -> None:
    known = set(v.words())
    for seed in range(6):
        edit = sample_edit(seed, "held_out", kind)
        assert edit.kind == kind
        assert set(edit.instruction.split()) <= known
        assert edit.changed().any()
        if kind in ("place", "style", "pose"):
            continue
        before, after = a.attributes(edit.before), a.attributes(edit.after)
        moved = {question for question in before if before[question] != after[question]}
        assert 1 <= len(moved) <= 3, (edit.instruction, moved)
        assert edit.changed().mean() < 0.45


def test_pairs_keep_the_identity_and_change_the_pose() -> None:
    for seed in range(20):
        pair = sample_pair(seed, "held_out")
        one, other = pair.source.puppets[0], pair.target.puppets[0]
        assert one.identity == other.identity and one.expression == other.expression
        assert one.angles != other.angles
        assert pair.source.place == pair.target.place and not pair.moved
    assert any(
        sample_pair(seed, moved=1.0).source.place != sample_pair(seed, moved=1.0).target.place for seed in range(5)
    )


def test_doodles_are_thin_dark_strokes_on_paper() -> None:
    puppet = puppet_scene(3).puppets[0]
    assert isinstance(puppet, Puppet)
    drawn = draw_doodle(puppet, 5)
    grey = np.asarray(drawn.picture.convert("L"))
    assert 0.02 < (grey < 170).mean() < 0.2
    points = drawn.keypoints
    assert points.shape == (18, 3) and (points[:, 2] > 0).sum() >= 16
    wrists = points[[4, 7, 10, 13], :2].astype(int)
    for x, y in wrists:
        if 4 <= x < 124 and 4 <= y < 124:
            assert grey[y - 4 : y + 5, x - 4 : x + 5].min() < 170
    assert not np.array_equal(np.asarray(draw_doodle(puppet, 6).picture), np.asarray(drawn.picture))


def test_styles_and_views_all_differ() -> None:
    scene = puppet_scene(3)
    looks = [pixels(replace(scene, style=style)) for style in v.STYLES]
    looks += [pixels(puppet_scene(3, view=view)) for view in v.VIEWS[1:]]
    for i, first in enumerate(looks):
        for second in looks[i + 1 :]:
            assert np.abs(first - second).mean() > 1.0
