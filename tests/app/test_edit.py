"""``controlroom edit``: what it writes and says, and one line for each mistake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from controlroom.app.cli import main
from controlroom.core.png import read_png_text
from controlroom.sampling.inverted import Inversion
from tests.sampling.test_inversion import picture
from tests.saved import tiny_folder
from tests.tiny import tiny_sd1

SOURCE, TARGET = "a red cat on the beach", "a blue cat on the beach"
WORDS = ("--from", SOURCE, "--to", TARGET)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    picture().save("anna.png")
    Image.new("L", (16, 16), 255).save("small.png")
    return tmp_path


def edit(*arguments: str, model: str | None = None) -> int:
    line = ("edit", "anna.png", "--model", model or str(tiny_folder()), "--steps", "2", "--seed", "3", *arguments)
    return main(list(line))


def test_writes_the_picture_before_after_and_the_mask(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert edit(*WORDS, "-o", "blue.png", "--mask-words", "blue cat", "--json") == 0
    printed = capsys.readouterr()
    data = json.loads(printed.out)
    assert data["files"] == ["blue.png", "blue.before_after.png", "blue.mask.png"]
    assert data["mask_files"] == ["blue.mask.png"]
    assert [Image.open(name).size for name in data["files"]] == [(32, 32), (72, 32), (32, 32)]
    assert data["method"] == "prompt_to_prompt" and "'red' becomes 'blue'" in data["why"]
    assert set(data["reconstruction_db"]) == {"picture", "autoencoder", "ceiling"}
    assert (data["seeds"], data["steps"], data["source"]) == ([3], 2, "anna.png")
    lines = printed.err.splitlines()
    assert f"method: {data['why']}" in lines
    assert f"reconstruction: {data['reconstruction_db']['picture']:.1f} dB" in printed.err
    types = [control["type"] for control in json.loads(read_png_text("blue.png")["controlroom"])["spec"]["controls"]]
    assert types == ["from_inversion", "prompt_to_prompt"]


def test_an_inversion_that_is_kept_makes_it_replayable(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert edit(*WORDS, "-o", "blue.png", "--inversion", "anna.safetensors") == 0
    assert Inversion.load("anna.safetensors").prompts == (SOURCE,)
    assert main(["replay", "blue.png", "--verify"]) == 0
    assert capsys.readouterr().out.strip().endswith("identical")
    kept = Path("anna.safetensors").read_bytes()
    assert edit("--from", SOURCE, "--to", "a red dog on the beach", "--inversion", "anna.safetensors") == 0
    assert Path("a-red-dog-on-the-beach-3.png").is_file() and Path("anna.safetensors").read_bytes() == kept


def test_follows_an_instruction(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_sd1(in_channels=8).save_pretrained(tmp_path / "editor")
    Image.new("L", (32, 32), 255).save("mask.png")
    assert edit("-i", "a red hat", "--mask", "mask.png", "-o", "hat.png", "--json", model="editor") == 0
    printed = capsys.readouterr()
    data = json.loads(printed.out)
    assert (data["method"], data["reconstruction_db"]) == ("instruct_pix2pix", None)
    assert data["files"] == ["hat.png", "hat.before_after.png"]
    assert printed.err.startswith("method: InstructPix2Pix, since there is an instruction")
    assert main(["replay", "hat.png", "--verify"]) == 0


def test_a_target_alone_is_drawn_over_the_picture(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert edit("--to", TARGET, "--strength", "0.5", "-o", "one.png") == 0
    assert edit("--to", TARGET, "--strength", "1.0", "-o", "two.png") == 0
    assert capsys.readouterr().out.split() == [f"{n}{end}.png" for n in ("one", "two") for end in ("", ".before_after")]
    assert Image.open("one.png").tobytes() != Image.open("two.png").tobytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "nothing to do"),
        (("--instruction", "make it red"), "reads 4 channels"),
        ((*WORDS, "--instruction", "make it red"), "not both"),
        ((*WORDS, "--mask-words", "frog"), "'frog' is not in the prompt"),
        ((*WORDS, "--mask-words", "bea"), "'bea' is not in the prompt"),
        ((*WORDS, "--mask", "small.png"), "'small.png' is 16 x 16 pixels, 'anna.png' is 32 x 32"),
        ((*WORDS, "--mask", "missing.png"), "'missing.png' does not exist"),
        (("--from", SOURCE, "--to", "dogs and frogs"), "'dogs and frogs' cannot be aligned"),
        (("--from", SOURCE, "--to", SOURCE), "the same"),
        ((*WORDS, "--method", "magic"), "'magic'"),
        ((*WORDS, "--strength", "7"), "strength is 7"),
        ((*WORDS, "-o", "anna.png"), "'anna.png' is the picture itself"),
        ((*WORDS, "-o", "x.jpg"), "does not end with .png"),
        ((*WORDS, "-o", "nowhere/x.png"), "nowhere"),
        ((*WORDS, "--inversion", "x.png"), "'x.png' is not the name of an inversion"),
        ((*WORDS, "--inversion", "small.safetensors"), "small.safetensors"),
        ((*WORDS, "--inversion", f"{'x' * 300}.safetensors"), "file name too long"),
        ((*WORDS, "--method", "imagic"), "--fit"),
        ((*WORDS, "--image-guidance-scale", "1"), "image_guidance_scale is of instruct_pix2pix"),
        ((*WORDS, "--fit", "folder"), "fit is of imagic"),
        (("--to", TARGET, "--inversion", "x.safetensors"), "inversion is of methods that invert"),
        ((*WORDS, "--mask-threshold", "0.5"), "mask_threshold is of a mask by words"),
        ((*WORDS, "--strength", "0"), "strength is 0"),
    ],
)
def test_mistakes_are_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    Path("small.safetensors").write_bytes(b"nothing of the kind")
    before = sorted(here.iterdir())
    assert edit(*arguments) == 2
    _one_line(capsys, said)
    assert sorted(here.iterdir()) == before


def test_before_after_is_never_written_over_the_picture(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy("anna.png", "blue.before_after.png")
    kept = Path("blue.before_after.png").read_bytes()
    model = str(tiny_folder())
    assert main(["edit", "blue.before_after.png", "--model", model, *WORDS, "-o", "blue.png"]) == 2
    _one_line(capsys, "is the picture itself")
    assert Path("blue.before_after.png").read_bytes() == kept


def test_an_inversion_that_diverges_names_the_picture_and_leaves_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_folder(), "broken")
    path = "broken/unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_out.bias"] = torch.full_like(weights["conv_out.bias"], float("inf"))
    save_file(weights, path, {"format": "pt"})
    before = sorted(here.iterdir())
    assert edit(*WORDS, "-o", "blue.png", "--inversion", "anna.safetensors", model="broken") == 2
    _one_line(capsys, "The inversion of 'anna.png' diverged")
    assert sorted(here.iterdir()) == before


def test_a_run_that_fails_leaves_no_inversion(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from controlroom.app import runs
    from controlroom.core.errors import OutputError

    def fails(*arguments: object) -> None:
        raise OutputError("the disk is full.")

    monkeypatch.setattr(runs, "draw", fails)
    assert edit(*WORDS, "-o", "blue.png", "--inversion", "anna.safetensors") == 2
    assert sorted(path.name for path in here.iterdir()) == ["anna.png", "small.png"]
    capsys.readouterr()


def _one_line(capsys: pytest.CaptureFixture[str], said: str) -> None:
    """One line on standard error, beside the method and the reconstruction; nothing on standard output."""
    printed = capsys.readouterr()
    lines = [line for line in printed.err.strip().splitlines() if not line.startswith(("method: ", "note: "))]
    assert printed.out == "" and len(lines) == 1, printed.err
    assert lines[0].startswith("error: ") and said in lines[0]
