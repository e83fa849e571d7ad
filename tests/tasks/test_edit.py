"""Editing by words: which method is chosen, what run is built, and what is refused before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from controlroom.controls.editing.from_inversion import FromInversion
from controlroom.controls.editing.image_to_image import ImageToImage
from controlroom.controls.editing.instruct_pix2pix import InstructPix2Pix
from controlroom.controls.editing.masactrl import MasaCtrl
from controlroom.controls.editing.pix2pix_zero import Pix2PixZero
from controlroom.controls.editing.prompt_to_prompt import PromptToPrompt
from controlroom.controls.word_mask import WordMask
from controlroom.core.errors import InputError, ModelError, OutputError
from controlroom.core.spec import RunSpec
from controlroom.sampling.inverted import NullText
from controlroom.sampling.pipeline import Pipeline
from controlroom.tasks import edit as task
from controlroom.tasks.edit import edit, plan_edit
from controlroom.tasks.edit_method import EditOptions, Words, choose
from controlroom.training.recipes.imagic import ImagicSettings
from tests.sampling.test_inversion import gentle_sd1, picture
from tests.tiny import tiny_sd1

SOURCE, TARGET = "a red cat on the beach", "a blue cat on the beach"
FEW: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(gentle_sd1())


@pytest.fixture(scope="module")
def instructed() -> Pipeline:
    return Pipeline.from_diffusers(tiny_sd1(in_channels=8))


@pytest.fixture
def anna(tmp_path: Path) -> str:
    path = tmp_path / "anna.png"
    picture().save(path)
    return str(path)


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


class TestChoice:
    @pytest.mark.parametrize(
        ("words", "method", "said"),
        [
            (Words("make it red"), "instruct_pix2pix", "since there is an instruction"),
            (Words(None, SOURCE, TARGET), "prompt_to_prompt", "word for word: 'red' becomes 'blue'"),
            (
                Words(None, "a cat", "a cat with a red hat"),
                "prompt_to_prompt",
                "refining, since the prompts have 2",
            ),
            (Words(None, "a man standing", "a man waving"), "masactrl", "'waving' asks for another pose or shape"),
            (Words(None, "a man", "a man with arms spread"), "masactrl", "'arms'"),
            (Words(None, "a man waving", "a woman waving"), "prompt_to_prompt", "'man' becomes 'woman'"),
            (Words(None, None, TARGET), "image_to_image", "nothing says what the picture shows"),
        ],
    )
    def test_rule(self, words: Words, method: str, said: str) -> None:
        chosen, why = choose(words)
        assert chosen == method and said in why

    def test_what_is_asked_for(self) -> None:
        for method in ("prompt_to_prompt", "null_text", "masactrl", "pix2pix_zero"):
            assert choose(Words(None, SOURCE, TARGET), method) == (method, f"{method}, as asked for")
        assert choose(Words(None, None, TARGET), "imagic")[0] == "imagic"

    @pytest.mark.parametrize(
        ("words", "method", "said"),
        [
            (Words(), "auto", "nothing to do"),
            (Words(None, SOURCE), "auto", "nothing to do"),
            (Words("make it red", SOURCE, TARGET), "auto", "not both"),
            (Words(None, SOURCE, " "), "auto", "--to are empty"),
            (Words("make it red"), "masactrl", "masactrl needs what the picture shall show"),
            (Words(None, SOURCE, TARGET), "instruct_pix2pix", "needs an instruction"),
            (Words(None, None, TARGET), "null_text", "say what it shows.*controlroom signal caption"),
            (Words(None, SOURCE, TARGET), "magic", "Unknown method 'magic'"),
        ],
    )
    def test_what_cannot_be_chosen(self, words: Words, method: str, said: str) -> None:
        with pytest.raises(InputError, match=said):
            choose(words, method)


class TestRun:
    @pytest.mark.parametrize(
        ("method", "control", "prompt"),
        [
            ("prompt_to_prompt", PromptToPrompt(SOURCE), TARGET),
            ("null_text", PromptToPrompt(SOURCE), TARGET),
            ("masactrl", MasaCtrl(SOURCE), TARGET),
            ("pix2pix_zero", Pix2PixZero([SOURCE], [TARGET]), SOURCE),
        ],
    )
    def test_is_the_inversion_and_the_control(
        self, pipe: Pipeline, anna: str, method: Any, control: Any, prompt: str
    ) -> None:
        options = EditOptions(method=method, null_text=NullText(iterations=2), **FEW)
        plan = plan_edit(anna, source=SOURCE, target=TARGET, options=options, pipeline=pipe)
        found = plan.invert()
        assert found is not None and found.quality is not None and found.settings.method == task.INVERSIONS[method]
        result = plan.finished(pipe.run(plan.spec(found, 3)), found)
        spec = RunSpec(prompt=prompt, controls=[FromInversion(found), control], scheduler="ddim", seed=3, **FEW)
        assert same(result.image, pipe.run(spec).images[0])
        assert same(result.before, picture()) and result.quality == found.quality and result.mask is None
        assert result.before_after.size == (72, 32)

    def test_image_to_image(self, pipe: Pipeline, anna: str) -> None:
        result = edit(anna, target=TARGET, seed=3, options=EditOptions(strength=0.6, **FEW), pipeline=pipe)
        expected = pipe(TARGET, controls=[ImageToImage(anna, 0.6)], seed=3, **FEW).images[0]
        assert same(result.image, expected) and result.quality is None

    def test_instruct_pix2pix(self, instructed: Pipeline, anna: str) -> None:
        options = EditOptions(image_guidance_scale=1.2, **FEW)
        result = edit(anna, "a red hat", seed=3, options=options, pipeline=instructed)
        expected = instructed("a red hat", controls=[InstructPix2Pix(anna, 1.2)], seed=3, **FEW).images[0]
        assert same(result.image, expected)

    def test_imagic(self, anna: str, tmp_path: Path) -> None:
        pipe, folder = Pipeline.from_diffusers(tiny_sd1()), str(tmp_path / "fit")
        settings = ImagicSettings(embedding_steps=2, unet_steps=1)
        options = EditOptions(method="imagic", fit=folder, imagic=settings, strength=0.8, **FEW)
        result = edit(anna, target=TARGET, seed=3, options=options, pipeline=pipe)
        (control,) = result.manifest["spec"]["controls"]
        assert (control["type"], control["alpha"], control["model"]) == ("imagic", 0.8, folder)

    def test_masks(self, pipe: Pipeline, anna: str, tmp_path: Path) -> None:
        white = np.zeros((32, 32), np.uint8)
        white[:, :16] = 255
        Image.fromarray(white).save(tmp_path / "mask.png")
        path = str(tmp_path / "mask.png")
        settings: dict[str, Any] = {"source": SOURCE, "target": TARGET, "pipeline": pipe, "seed": 3}
        whole = edit(anna, options=EditOptions(**FEW), **settings)
        # Where the picture is stretched, so is its mask.
        stretched = edit(anna, options=EditOptions(mask=path, size=(64, 32), **FEW), **settings)
        assert stretched.image.size == (64, 32) and "stretched" in stretched.notes[0]
        left = edit(anna, options=EditOptions(mask=path, **FEW), **settings)
        words = edit(anna, options=EditOptions(mask_words="blue cat, beach", mask_threshold=0.9, **FEW), **settings)
        assert left.plan.spec(left.plan.invert()).controls[0].mask == path  # type: ignore[attr-defined]
        assert not same(whole.image, left.image) and left.mask is None
        control = words.plan.spec(words.plan.invert()).controls[0]
        assert control.mask == WordMask(("blue cat", "beach"), threshold=0.9)  # type: ignore[attr-defined]
        assert words.mask is not None and words.mask.size == (32, 32)
        assert set(np.unique(np.asarray(words.mask))) == {0, 255}

    def test_size_follows_the_picture(self, pipe: Pipeline) -> None:
        def size(width: int, height: int) -> tuple[int, int]:
            wide = Image.new("RGB", (width, height))
            return plan_edit(wide, target=TARGET, pipeline=pipe).before.size

        assert [size(500, 500), size(200, 100), size(100, 200), size(33, 32)] == [
            (32, 32),
            (44, 24),
            (24, 44),
            (32, 32),
        ]
        far = plan_edit(Image.new("RGB", (900, 90)), target=TARGET, pipeline=pipe)
        assert far.before.size == (64, 16) and "stretched to 64 x 16" in far.notes[0]
        given = plan_edit(picture(), target=TARGET, options=EditOptions(size=(16, 32)), pipeline=pipe)
        assert given.before.size == (16, 32)


class TestInversionFile:
    def test_is_read_where_it_is_there(self, pipe: Pipeline, anna: str, tmp_path: Path, monkeypatch: Any) -> None:
        path = str(tmp_path / "anna.safetensors")
        options = EditOptions(inversion=path, **FEW)
        settings: dict[str, Any] = {"options": options, "pipeline": pipe, "seed": 3}
        first = edit(anna, source=SOURCE, target=TARGET, **settings)
        assert Path(path).is_file() and first.manifest["replayable"]

        def never(*arguments: Any, **more: Any) -> None:
            raise AssertionError("inverted again")

        monkeypatch.setattr(task, "invert", never)
        again = edit(anna, source=SOURCE, target=TARGET, **settings)
        assert same(first.image, again.image) and again.quality == first.quality
        assert not same(first.image, edit(anna, source=SOURCE, target="a red dog on the beach", **settings).image)
        with pytest.raises(InputError, match=r"anna\.safetensors.*of another picture"):
            edit(picture(1), source=SOURCE, target=TARGET, **settings)
        for changed in (
            {"source": "a red dog on the beach"},
            {"options": options.model_copy(update={"method": "null_text"})},
        ):
            with pytest.raises(InputError, match=r"is the ddim inversion with the prompt 'a red cat on the beach'"):
                edit(anna, **{"source": SOURCE, "target": TARGET, **settings, **changed})


class TestSaved:
    def test_all_or_none(self, pipe: Pipeline, anna: str, tmp_path: Path) -> None:
        options = EditOptions(mask_words="cat", **FEW)
        result = edit(anna, source=SOURCE, target=TARGET, seed=3, options=options, pipeline=pipe)
        files = result.save(tmp_path / "red.png")
        assert [file.name for file in files] == ["red.png", "red.before_after.png", "red.mask.png"]
        assert same(Image.open(files[1]).crop((0, 0, 32, 32)), picture())
        assert same(Image.open(files[1]).crop((40, 0, 72, 32)), result.image.convert("RGB"))
        (tmp_path / "blue.before_after.png").mkdir()
        with pytest.raises(OutputError):
            result.save(tmp_path / "blue.png")
        assert not (tmp_path / "blue.png").exists() and not (tmp_path / "blue.mask.png").exists()


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"mask_words": "frog"}, "'frog' is not in the prompt"),
    ({}, {"mask_words": "red"}, "'red' is not in the prompt 'a blue cat"),
    ({}, {"mask_words": "bea"}, "'bea' is not in the prompt .* Did you mean 'beach'"),
    ({}, {"mask_words": "cat,,beach"}, "empty in part"),
    ({}, {"mask_words": "cat", "mask": "anna.png"}, "not both"),
    ({}, {"mask": Image.new("L", (16, 32), 255)}, "The mask is 16 x 32 pixels, .* is 32 x 32"),
    ({}, {"mask": Image.new("L", (32, 32))}, "black all over"),
    ({}, {"mask": "missing.png"}, r"'missing\.png' does not exist"),
    ({"target": SOURCE}, {}, "are the same to this model"),
    ({"target": "A red CAT on the beach"}, {}, "are the same to this model"),
    ({"target": "dogs and frogs"}, {}, "'dogs and frogs' cannot be aligned"),
    ({"target": "a red cat on the beach and a dog and a frog with a zebra"}, {}, "'zebra' lies behind"),
    ({}, {"strength": 1.5}, "strength is 1.5"),
    ({}, {"method": "null_text", "guidance_scale": 1.0}, "null_text"),
    ({}, {"method": "imagic"}, "--fit"),
    ({}, {"method": "imagic", "fit": "x", "mask_words": "cat"}, "takes no mask"),
    ({"image": "nobody.png"}, {}, r"'nobody\.png' does not exist"),
]


@pytest.mark.parametrize(("words", "options", "said"), BAD)
def test_is_refused_before_anything_is_inverted(
    pipe: Pipeline, anna: str, words: dict[str, Any], options: dict[str, Any], said: str
) -> None:
    given = {"image": anna, "source": SOURCE, "target": TARGET, **words}
    with pytest.raises(InputError, match=said):
        plan_edit(**given, options=EditOptions(**options), pipeline=pipe)


def test_instructions_need_a_model_that_follows_them(theatre: Path, pipeline: Pipeline, instructed: Pipeline) -> None:
    with pytest.raises(ModelError, match="no 'theatre/instruct_pix2pix'.*--from, --to"):
        plan_edit(picture(), "make it red")
    with pytest.raises(ModelError, match=r"reads 4 channels, not 8\. Say what the picture shows"):
        plan_edit(picture(), "make it red", pipeline=pipeline)
    with pytest.raises(InputError, match="image_guidance_scale"):
        plan_edit(picture(), "make it red", options=EditOptions(strength=0.5), pipeline=instructed)
    with pytest.raises(InputError, match="'cat' is not in the prompt 'a red hat'"):
        plan_edit(picture(), "a red hat", options=EditOptions(mask_words="cat"), pipeline=instructed)


def test_a_picture_whose_inversion_diverges_is_named(anna: str) -> None:
    pipe = Pipeline.from_diffusers(tiny_sd1())
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("inf"))
    with pytest.raises(InputError, match=r"The inversion of '.*anna\.png' diverged"):
        edit(anna, source=SOURCE, target=TARGET, options=EditOptions(**FEW), pipeline=pipe)
