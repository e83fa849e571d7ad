"""Entities of pictures: found, segmented, cut out; known from other pictures; networks from disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from controlroom.core.errors import InputError, ModelError
from controlroom.data.entities import (
    cut_from_target,
    cut_out,
    cut_out_of,
    entity_groups,
    find_entities,
    masked_groups,
)
from controlroom.data.groups import groups_fingerprint
from controlroom.data.pictures import Picture
from controlroom.data.theatre.groups import theatre_groups, theatre_subjects
from controlroom.signals.entities import BoxSegmenter, Detection, WordDetector
from tests.tiny import tiny_tokenizer

COLOURS = {"dog": (200, 30, 30), "ball": (30, 30, 200)}


def photo(name: str, caption: str, subject: str = "Rex", **places: tuple[int, int, int, int]) -> Picture:
    """A grey picture with a disc of the word's colour at each place."""

    def read() -> Image.Image:
        image = Image.new("RGB", (40, 30), (90, 90, 90))
        for word, box in places.items():
            ImageDraw.Draw(image).ellipse(box, fill=COLOURS[word])
        return image

    return Picture(name, name, (40, 30), read, caption, subject=subject)


def of_colour(image: Image.Image, word: str) -> np.ndarray[Any, Any]:
    return (np.asarray(image) == COLOURS[word]).all(-1)


def detector(image: Image.Image, word: str) -> Detection | None:
    ys, xs = np.nonzero(of_colour(image, word))
    if not len(xs):
        return None
    return Detection((xs.min() / 40, ys.min() / 30, (xs.max() + 1) / 40, (ys.max() + 1) / 30), 0.9)


def segmenter(image: Image.Image, box: tuple[float, float, float, float]) -> np.ndarray[Any, Any]:
    found = (np.asarray(image) != 90).any(-1)
    inside = np.zeros_like(found)
    inside[round(box[1] * 30) : round(box[3] * 30), round(box[0] * 40) : round(box[2] * 40)] = True
    return found & inside


PHOTOS = (
    photo("1", "a Dog with a ball", dog=(2, 5, 14, 20), ball=(25, 10, 32, 17)),
    photo("2", "a dog", dog=(20, 2, 36, 25)),
    photo("3", "a ball and a dog", dog=(2, 2, 10, 10), ball=(30, 20, 38, 28)),
    photo("4", "a dog", "Tim", dog=(5, 5, 20, 20)),
    photo("5", "a dog", "Tim"),
)


def test_entities_are_found_and_cut_out() -> None:
    image = PHOTOS[0].read()
    dog, ball = find_entities(image, ["dog", "hat", "ball"][::2], detector, segmenter)
    assert (dog.word, ball.word) == ("dog", "ball")
    assert np.array_equal(dog.mask, of_colour(image, "dog")) and dog.box == pytest.approx((0.05, 5 / 30, 0.375, 0.7))
    found = cut_out(image, dog.read_mask())
    assert found.size == (16, 16)
    pixels = np.asarray(found).reshape(-1, 3)
    assert {tuple(p) for p in pixels.tolist()} == {(255, 255, 255), COLOURS["dog"]}
    assert (pixels == COLOURS["dog"]).all(-1).sum() == dog.mask.sum()
    assert not find_entities(image, ["dog"], lambda i, w: Detection((0, 0, 1, 1), 0.1), segmenter)
    assert not find_entities(image, ["dog"], lambda i, w: None, segmenter)
    with pytest.raises(InputError, match="height, width"):
        find_entities(image, ["dog"], detector, lambda i, b: np.ones((3, 3), dtype=bool))
    with pytest.raises(InputError, match="black"):
        cut_out(image, Image.new("L", image.size))
    with pytest.raises(InputError, match="same size"):
        cut_out(image, Image.new("L", (3, 3)))


def test_photographs_know_their_entities_from_other_pictures() -> None:
    done: list[tuple[int, int]] = []
    groups = entity_groups(PHOTOS, ["dog", "ball"], detector, segmenter, report=lambda *x: done.append(x))
    assert done[-1] == (5, 5)
    # Tim's second picture does not show the dog, so the first has nothing to know it from.
    assert [group.picture.name for group in groups] == ["1", "2", "3"]
    first = groups[0].subjects
    assert [s.word for s in first] == ["dog", "ball"] and [s.picture.name for s in first] == [
        "cut out of dog of 2",
        "cut out of ball of 3",
    ]
    shown = first[0].picture.read()
    assert max(shown.size) == 24 and not of_colour(shown, "ball").any() and of_colour(shown, "dog").any()
    assert first[0].read_mask is not None
    assert np.array_equal(np.asarray(first[0].read_mask()) > 0, of_colour(PHOTOS[0].read(), "dog"))
    itself = entity_groups(PHOTOS, ["dog", "ball"], detector, segmenter, same_picture=True)
    assert [group.picture.name for group in itself] == ["1", "2", "3", "4"]
    assert itself[0].subjects[0].picture.read().size == (16, 16)
    assert groups_fingerprint(groups) != groups_fingerprint(itself[:3])
    for message, words in (("missing", []), ("None of 5", ["hat"])):
        with pytest.raises(InputError, match=message):
            entity_groups(PHOTOS, words, detector, segmenter)


def test_masks_beside_pictures_say_where_the_entity_is() -> None:
    mask = lambda p: lambda: Image.fromarray(of_colour(p.read(), "dog").astype(np.uint8) * 255)  # noqa: E731
    masked = [replace(p, read_mask=mask(p)) for p in PHOTOS[:3]]
    groups = masked_groups(masked, ["dog"])
    assert [g.subjects[0].picture.name for g in groups] == ["cut out of 2", "cut out of 3", "cut out of 1"]
    assert groups[1].subjects[0].box == pytest.approx((0.5, 2 / 30, 37 / 40, 26 / 30))
    plain = masked_groups(PHOTOS[:2], ["dog"])[0].subjects[0]
    assert plain.picture is PHOTOS[1] and plain.box == (0, 0, 1, 1) and plain.read_mask is None
    assert masked_groups(masked[:1], ["dog"], same_picture=True)[0].subjects[0].picture.read().size == (16, 16)
    for message, given, words, same in (
        ("One word", masked, ["dog", "cat"], False),
        ("takes two", masked[:1], ["dog"], False),
        ("no mask", PHOTOS[:2], ["dog"], True),
    ):
        with pytest.raises(InputError, match=message):
            masked_groups(given, words, same)


def test_the_theatre_knows_the_truth() -> None:
    for group in (*theatre_groups(2), *theatre_subjects(1)):
        whole = np.asarray(group.picture.read())
        for subject, other in zip(group.subjects, cut_from_target(group).subjects, strict=True):
            assert subject.read_mask is not None
            mask = np.asarray(subject.read_mask()) > 0
            ys, xs = np.nonzero(mask)
            assert subject.box == (xs.min() / 128, ys.min() / 128, (xs.max() + 1) / 128, (ys.max() + 1) / 128)
            own = np.asarray(other.picture.read()).reshape(-1, 3)
            kept = {tuple(pixel) for pixel in own.tolist()} - {(255, 255, 255)}
            assert kept <= {tuple(pixel) for pixel in whole[mask].tolist()}
            assert other.picture.content != subject.picture.content
            elsewhere = cut_out_of(subject.picture)
            assert elsewhere.content != subject.picture.content
            white = (np.asarray(elsewhere.read()) == 255).all(-1).mean()
            assert 0.05 < white < 0.95


def write_detector(folder: Path) -> Path:
    from transformers import OwlViTConfig, OwlViTForObjectDetection, OwlViTProcessor
    from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil

    common = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = tiny_tokenizer()
    text = {**common, "vocab_size": len(tokenizer) + 8, "max_position_embeddings": 16}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    torch.manual_seed(0)
    config = OwlViTConfig(
        text_config=text, vision_config={**common, "image_size": 32, "patch_size": 8}, projection_dim=32
    )
    OwlViTForObjectDetection(config).save_pretrained(folder)
    sizes: dict[str, Any] = {"size": {"height": 32, "width": 32}, "crop_size": {"height": 32, "width": 32}}
    OwlViTProcessor(OwlViTImageProcessorPil(**sizes), tokenizer).save_pretrained(folder)
    return folder


def write_segmenter(folder: Path) -> Path:
    from transformers import SamConfig, SamModel, SamProcessor
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    torch.manual_seed(0)
    vision = {
        "hidden_size": 16,
        "output_channels": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "window_size": 2,
        "global_attn_indexes": [0],
        "num_pos_feats": 4,
        "mlp_dim": 16,
    }
    prompt = {"hidden_size": 8, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 8,
        "mlp_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 8,
    }
    SamModel(
        SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    ).save_pretrained(folder)
    sizes: dict[str, Any] = {"size": {"longest_edge": 32}, "pad_size": {"height": 32, "width": 32}}
    SamProcessor(SamImageProcessorPil(**sizes)).save_pretrained(folder)
    return folder


def test_networks_from_disk_find_and_segment(tmp_path: Path) -> None:
    detect = WordDetector(write_detector(tmp_path / "owl"))
    image = PHOTOS[0].read()
    found = detect(image, "Dog")
    assert found is not None and 0 <= found.score <= 1
    left, top, right, bottom = found.box
    assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
    # The best of all places, by the network's own numbers.
    inputs = detect.network.processor(images=image, text=[["a photo of a dog"]], return_tensors="pt")
    scores = detect.network(**inputs).logits.sigmoid()[0, :, 0]
    assert found.score == pytest.approx(float(scores.max()), abs=1e-5)
    segment = BoxSegmenter(write_segmenter(tmp_path / "sam"))
    mask = segment(image, (0.0, 0.0, 0.5, 0.5))
    assert mask.shape == (30, 40) and mask.dtype == np.bool_
    assert np.array_equal(mask, segment(image, (0.0, 0.0, 0.5, 0.5)))
    assert entity_groups(PHOTOS[:2], ["dog"], lambda i, w: found, lambda i, b: np.ones((30, 40), dtype=bool))
    with pytest.raises(ModelError):
        WordDetector(tmp_path / "nowhere")
    with pytest.raises(ModelError):
        BoxSegmenter(tmp_path / "owl")
