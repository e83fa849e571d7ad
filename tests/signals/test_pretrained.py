"""Networks of transformers from local folders: miniatures with random weights, against transformers' own results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
import transformers as t
from PIL import Image

from controlroom.core.errors import InputError, ModelError
from controlroom.signals.captioner import BlipCaptioner, Captioner
from controlroom.signals.choose import choose_signal
from controlroom.signals.depth import TransformersDepth, nearness
from controlroom.signals.palette import ADE20K
from controlroom.signals.pose.openpose_document import coco_to_openpose
from controlroom.signals.pose.vitpose_reader import VitPoseReader
from controlroom.signals.segmentation import TransformersSegmentation

PHOTO = Image.fromarray(skimage.data.astronaut()).resize((150, 120))


def processor(name: str, **settings: Any) -> Any:
    return getattr(t, name)(**settings)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    vit = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}
    dino = t.Dinov2Config(
        **vit, image_size=56, patch_size=14, out_indices=[1, 2, 3, 4], apply_layernorm=True, reshape_hidden_states=False
    )
    for name, more in (("depth", {}), ("metres", {"depth_estimation_type": "metric", "max_depth": 20})):
        config = t.DepthAnythingConfig(
            backbone_config=dino,
            reassemble_hidden_size=16,
            neck_hidden_sizes=[8, 8, 8, 8],
            fusion_hidden_size=8,
            head_hidden_size=8,
            **more,
        )
        t.DepthAnythingForDepthEstimation(config).save_pretrained(root / name)
        processor("DPTImageProcessorPil", size={"height": 56, "width": 56}).save_pretrained(root / name)
    sizes = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "decoder_hidden_size": 16}
    for name, classes in (("ade", 150), ("other", 7)):
        config = t.SegformerConfig(**sizes, num_attention_heads=[1, 1, 2, 2], num_labels=classes)
        t.SegformerForSemanticSegmentation(config).save_pretrained(root / name)
        processor("SegformerImageProcessorPil", size={"height": 64, "width": 64}).save_pretrained(root / name)
    backbone = t.VitPoseBackboneConfig(**vit, image_size=[64, 48], patch_size=[8, 8], out_indices=[4])
    t.VitPoseForPoseEstimation(t.VitPoseConfig(backbone_config=backbone, num_labels=17)).save_pretrained(root / "pose")
    processor("VitPoseImageProcessorPil", size={"height": 64, "width": 48}).save_pretrained(root / "pose")
    yolos = t.YolosConfig(
        **vit, image_size=[64, 64], num_detection_tokens=5, id2label={0: "N/A", 1: "person"}, label2id={"person": 1}
    )
    t.YolosForObjectDetection(yolos).save_pretrained(root / "detector")
    processor("YolosImageProcessorPil", size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(
        root / "detector"
    )
    blip(root / "blip")
    return root


def blip(folder: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]", "a", "photo", "of", "woman", "cat", "in", "space"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = t.BertTokenizer(vocab=str(folder / "vocab.txt"), bos_token="[DEC]")
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = t.BlipConfig(
        text_config={
            **text,
            "encoder_hidden_size": 16,
            "vocab_size": len(words),
            "bos_token_id": 4,
            "eos_token_id": 3,
            "sep_token_id": 3,
            "pad_token_id": 0,
        },
        vision_config={**text, "image_size": 32, "patch_size": 8},
    )
    t.BlipForConditionalGeneration(config).save_pretrained(folder)
    pictures = processor("BlipImageProcessorPil", size={"height": 32, "width": 32})
    t.BlipProcessor(pictures, tokenizer).save_pretrained(folder)


def test_depth_is_that_of_transformers_pipeline(folders: Path) -> None:
    found = TransformersDepth(folders / "depth")(PHOTO)
    pictures = t.AutoImageProcessor.from_pretrained(folders / "depth", backend="pil")
    model = t.AutoModelForDepthEstimation.from_pretrained(folders / "depth").eval()
    inputs = pictures(images=PHOTO, return_tensors="pt")
    with torch.no_grad():
        (true,) = pictures.post_process_depth_estimation(model(**inputs), target_sizes=[(120, 150)])
    depth = true["predicted_depth"].numpy()
    assert np.abs(found.values - (depth - depth.min()) / np.ptp(depth)).max() < 1e-4
    assert found.values.min() == 0 and found.values.max() == pytest.approx(1) and not found.recognised


def test_metres_are_turned_into_nearness(folders: Path) -> None:
    signal = TransformersDepth(folders / "metres")
    assert signal.in_metres and not TransformersDepth(folders / "depth").in_metres
    assert np.isfinite(signal(PHOTO).values).all()
    far = np.array([[1.0, 2.0, 10.0]], np.float32)
    assert (np.diff(nearness(far, True)) < 0).all() and (np.diff(nearness(far, False)) > 0).all()
    assert not nearness(np.ones((2, 2), np.float32), False).any()


def test_segmentation_is_that_of_transformers_in_ade20ks_colours(folders: Path) -> None:
    found = TransformersSegmentation(folders / "ade")(PHOTO)
    pictures = t.AutoImageProcessor.from_pretrained(folders / "ade", backend="pil")
    model = t.AutoModelForSemanticSegmentation.from_pretrained(folders / "ade").eval()
    with torch.no_grad():
        output = model(**pictures(images=PHOTO, return_tensors="pt"))
    (true,) = pictures.post_process_semantic_segmentation(output, target_sizes=[(120, 150)])
    assert np.array_equal(found.values, true.numpy())
    assert np.array_equal(np.asarray(found.picture), ADE20K[true.numpy()])
    other = TransformersSegmentation(folders / "other")
    assert len(other.classes) == len(other.palette) == 7 and other(PHOTO).values.max() < 7


def test_a_map_is_passed_on(folders: Path) -> None:
    labels = np.zeros((96, 96), np.float32)
    labels[:, 40:] = 12
    given = Image.fromarray(ADE20K[labels.astype(int)])
    found = TransformersSegmentation(folders / "ade")(given)
    assert found.recognised and np.array_equal(found.values, labels)


def test_vitpose_finds_the_keypoints_that_transformers_finds(folders: Path) -> None:
    reader = VitPoseReader(folders / "pose", threshold=-1.0)
    pose = reader.read(PHOTO)
    pictures = t.AutoImageProcessor.from_pretrained(folders / "pose", backend="pil")
    model = t.VitPoseForPoseEstimation.from_pretrained(folders / "pose").eval()
    boxes = [[[0.0, 0.0, 150.0, 120.0]]]
    with torch.no_grad():
        output = model(**pictures(images=PHOTO, boxes=boxes, return_tensors="pt"))
    true = pictures.post_process_pose_estimation(output, boxes=boxes)[0][0]
    body, _ = coco_to_openpose(true["keypoints"].numpy().astype(float), np.ones(17))
    seen = pose.visible
    assert np.abs(pose.keypoints[seen] - body[seen]).max() < 1e-3
    with pytest.raises(InputError, match="No joint"):
        VitPoseReader(folders / "pose", threshold=10.0).read(PHOTO)
    with pytest.raises(InputError, match="No person"):
        VitPoseReader(folders / "pose", folders / "detector").read(PHOTO)


def test_blip_captions_as_transformers_generates(folders: Path) -> None:
    captioner = BlipCaptioner(folders / "blip", prompt="a photo of", max_new_tokens=5)
    assert isinstance(captioner, Captioner)
    text = captioner(PHOTO)
    assert text == captioner(PHOTO) and text.startswith("a photo of")
    assert BlipCaptioner(folders / "blip", max_new_tokens=5, num_beams=1)(PHOTO)
    with pytest.raises(InputError, match="num_beams"):
        BlipCaptioner(folders / "blip", num_beams=0)


def test_signals_are_chosen_by_their_folders(folders: Path) -> None:
    for kind, folder in (("depth", "depth"), ("normal", "depth"), ("segmentation", "other")):
        assert choose_signal(kind, str(folders / folder))(PHOTO).kind == kind
    assert choose_signal("pose", str(folders / "pose")).kind == "pose"


def test_wrong_folders_are_refused(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        TransformersDepth("nowhere")
    with pytest.raises(ModelError):
        TransformersDepth(folders / "ade")
    with pytest.raises(ModelError):
        TransformersSegmentation(folders / "blip")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError):
        TransformersDepth(tmp_path)
