"""The command line: results, exit codes, one line for each mistake, nothing half-written."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from controlroom.app.cli import app, main
from controlroom.core.png import read_png_text, save_png
from controlroom.core.spec import RunSpec
from tests.saved import tiny_folder


@pytest.fixture
def model() -> str:
    return str(tiny_folder())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on standard error of a command that the user got wrong; nothing else is printed or written."""
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert main(list(arguments)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), printed.err
    assert "Traceback" not in printed.err
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    return lines[0]


def draw(model: str, *arguments: str) -> int:
    return main(["generate", "a red cat", "--model", model, "--steps", "2", "--seed", "3", *arguments])


def test_every_command_prints_json() -> None:
    """As docs/cli.md says."""
    commands = app.registered_commands
    without = [c.callback.__name__ for c in commands if c.callback and "json" not in signature(c.callback).parameters]
    assert len(commands) > 15 and without == []


def test_help_loads_neither_torch_nor_diffusers() -> None:
    code = (
        "import sys; from controlroom.app.cli import main; main(['--help']);"
        "sys.exit(any(m in sys.modules for m in ('torch', 'diffusers', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "retarget" in done.stdout


def test_commands_of_later_issues_are_absent(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("personalise", "studio", "nonsense"):
        assert main([command]) == 2
    assert main([]) == 2
    assert main(["generate", "--no-such-option"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_generate_writes_a_png_that_replays_byte_for_byte(
    here: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw(model, "-o", "cat.png", "--size", "32x16", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["files"] == ["cat.png"]
    assert printed["seeds"] == [3]
    assert printed["cost"]["unet_rows"] == 4
    assert Image.open("cat.png").size == (32, 16)
    assert "Steps: 2" in read_png_text("cat.png")["parameters"]
    assert main(["replay", "cat.png", "-o", "again.png"]) == 0
    assert Path("again.png").read_bytes() == Path("cat.png").read_bytes()
    assert main(["replay", "cat.png", "--verify"]) == 0
    assert capsys.readouterr().out.strip().endswith("identical")


def test_verify_tells_a_picture_that_was_painted_over(
    here: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from controlroom.core.png import save_png

    draw(model, "-o", "cat.png")
    text = read_png_text("cat.png")
    picture = Image.open("cat.png").convert("RGB")
    picture.putpixel((0, 0), tuple(255 - value for value in picture.getpixel((0, 0))))  # type: ignore[arg-type, union-attr]
    save_png(picture, "painted.png", text)
    capsys.readouterr()
    assert main(["replay", "painted.png", "--verify"]) == 1
    assert "different: 0.10% of the pixels" in capsys.readouterr().out
    assert not Path("painted.replay.png").exists()


def test_several_pictures_get_a_name_each(here: Path, model: str) -> None:
    assert draw(model, "-n", "2", "-o", "cat.png") == 0
    assert sorted(path.name for path in here.iterdir()) == ["cat_0.png", "cat_1.png"]
    assert main(["replay", "cat_1.png", "--verify"]) == 0


def test_a_name_is_made_of_prompt_and_seed(here: Path, model: str) -> None:
    assert draw(model) == 0
    assert Path("a-red-cat-3.png").is_file()


def test_without_a_seed_pictures_differ(here: Path, model: str) -> None:
    for name in ("one.png", "two.png"):
        assert main(["generate", "a cat", "--model", model, "--steps", "1", "-o", name]) == 0
    assert Image.open("one.png").tobytes() != Image.open("two.png").tobytes()


def test_masks_by_words_are_written_beside(here: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (32, 32), (90, 20, 200)).save("old.png")
    lines = [f"model: {model}", "prompt: a red cat", "num_inference_steps: 2", "seed: 3", "controls:"]
    lines += ["- {type: image_to_image, image: old.png, mask: 'words: cat'}"]
    Path("run.yaml").write_text("\n".join(lines))
    assert main(["generate", "-c", "run.yaml", "-n", "2", "-o", "cat.png", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["mask_files"] == ["cat_0.mask.png", "cat_1.mask.png"]
    assert data["files"] == ["cat_0.png", "cat_1.png", *data["mask_files"]]
    assert all(Image.open(name).size == (32, 32) and Image.open(name).mode == "L" for name in data["mask_files"])
    # A file that the run reads is not written over.
    Path("old.png").rename("cat.mask.png")
    before = Path("cat.mask.png").read_bytes()
    Path("run.yaml").write_text("\n".join(lines).replace("old.png", "cat.mask.png"))
    assert main(["generate", "-c", "run.yaml", "-o", "cat.png"]) == 0
    assert capsys.readouterr().out.split() == ["cat.png"] and Path("cat.mask.png").read_bytes() == before


def test_options_count_more_than_the_file(here: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text(f"model: {model}\nprompt: a dog\nnum_inference_steps: 3\nseed: 1\n")
    assert main(["generate", "--config", "run.yaml", "--seed", "9", "-o", "dog.png", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["seeds"], printed["steps"]) == ([9], 3)


def test_explain_prints_rows_and_passes_of_each_step(
    here: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run.yaml").write_text(f"model: {model}\nprompt: [a dog, a cat]\nnum_inference_steps: 3\n")
    assert main(["explain", "run.yaml"]) == 0
    assert "steps 0 to 2: 4 rows in 1 pass" in capsys.readouterr().out
    assert main(["explain", "run.yaml", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["unet_rows"], printed["rows"], printed["passes"]) == (12, [4, 4, 4], [1, 1, 1])
    draw(model, "-o", "cat.png")
    capsys.readouterr()
    assert main(["explain", "cat.png"]) == 0
    assert "2 steps, 4 UNet rows in 2 passes" in capsys.readouterr().out


def test_controls_lists_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["controls", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    types = [row["type"] for row in rows if row["type"]]
    assert {"controlnet", "ip_adapter", "prompt_to_prompt"} <= set(types) and len(types) == len(set(types))
    assert main(["controls"]) == 0
    assert "Attend-and-Excite" in capsys.readouterr().out
    assert main(["controls", "--all", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) > len(rows)
    assert main(["controls", "control_net"]) == 2


def test_controls_says_paper_needs_and_combinations(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["controls", "--json"]) == 0
    one = next(row for row in json.loads(capsys.readouterr().out) if row["type"] == "prompt_to_prompt")
    assert one["papers"] == ["https://arxiv.org/abs/2208.01626"] and "masactrl" in one["not_with"]
    assert main(["controls", "controlnet"]) == 0
    said = capsys.readouterr().out
    assert "arxiv.org/abs/2302.05543" in said and "needs: " in said and "combines with: every other control" in said
    assert main(["controls", "controlnet", "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert both["needs"] and both["settings"]


def test_an_empty_prompt_is_a_picture(here: Path, model: str) -> None:
    assert main(["generate", "", "--model", model, "--steps", "1", "--seed", "1", "-o", "empty.png"]) == 0
    assert main(["replay", "empty.png", "--verify"]) == 0


def test_a_prompt_of_10000_characters_is_cut_and_said_so(
    here: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "a red cat " * 1000
    assert main(["generate", words, "--model", model, "--steps", "1", "--seed", "1", "-o", "long.png"]) == 0
    assert "3002 tokens; the model reads the first 16" in capsys.readouterr().err
    # Weighted prompts are read to their end, in chunks.
    words = "a (red:1.2) cat on the beach with a dog and a frog on the beach at night, a hat"
    Path("run.yaml").write_text(f"prompt: '{words}'\ncontrols: [{{type: prompt_weighting}}]\n")
    weighted = ["generate", "-c", "run.yaml", "--model", model, "--steps", "1", "--seed", "1", "-o", "chunks.png"]
    assert main(weighted) == 0
    assert "reads the first" not in capsys.readouterr().err
    assert main(["replay", "long.png", "--verify"]) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "nothing to draw"),
        (["cat", "-o", "cat.jpg"], ".png"),
        (["cat", "-o", "no/such/folder/cat.png"], "does not exist"),
        (["cat", "-o", "."], "is a folder"),
        (["cat", "-o", ""], "name of a file"),
        (["cat", "-o", "cat.png/deep.png"], "folder"),
        (["cat", "-o", "cat.png", "--size", "large"], "640x384"),
        (["cat", "-o", "cat.png", "--size", "0"], "greater than or equal to 1"),
        (["cat", "-o", "cat.png", "--steps", "0"], "num_inference_steps"),
        (["cat", "-o", "cat.png", "--seed", "-1"], "seed"),
        (["cat", "-o", "cat.png", "--guidance-scale", "nan"], "guidance_scale"),
        (["cat", "-o", "cat.png", "--model", "no/such/model/at/all"], "no model"),
        (["cat", "-o", "cat.png", "--model", "evil.ckpt"], "pickle"),
        (["cat", "-o", "cat.png", "--model", "x" * 300], "cannot be loaded"),
        (["cat", "-o", "cat.png", "--model", f"theatre/{'x' * 300}"], "theatre"),
        (["--config", "missing.yaml"], "does not exist"),
        (["--config", "."], "not a file"),
        (["x" * 2_000_000, "-o", "cat.png"], "characters"),
    ],
)
def test_mistakes_are_one_line(
    here: Path, model: str, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    Path("cat.png").write_bytes(b"the old file")
    more = [] if "--model" in arguments or not arguments else ["--model", model]
    assert says in failed(capsys, "generate", *arguments, *more)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("- a list", "mapping"),
        ("prompt: [", "not YAML"),
        ("prompt: {a: 1}", "prompt"),
        ("sheduler: ddim", "sheduler"),
        ("scheduler: dimm", "Unknown scheduler"),
        ("controls: [{type: control_net, image: a.png}]", "Did you mean 'controlnet'"),
        ("controls: [{image: a.png}]", "type"),
        ("controls: controlnet", "controls"),
        ("seed: .nan", "seed"),
        ("height: 20", "multiples"),
        ("!!python/object/apply:os.system [id]", "not YAML"),
        ("prompt: &a [*a]", "aliases"),
        ("\0", "not YAML"),
    ],
)
def test_mistakes_in_a_run_file_are_one_line(
    here: Path, model: str, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    if text[:1].islower():
        text += f"\nmodel: {model}\n"
    Path("run.yaml").write_text(text.replace("height: 20", "height: 21"))
    assert says in failed(capsys, "generate", "-c", "run.yaml", "-o", "cat.png")
    assert failed(capsys, "explain", "run.yaml")


def test_yaml_that_unfolds_to_billions_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    Path("run.yaml").write_text("\n".join([*lines, "prompt: *a9"]))
    assert "aliases" in failed(capsys, "generate", "-c", "run.yaml", "-o", "cat.png")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json"])
def test_a_checkpoint_with_a_missing_part_is_named(here: Path, capsys: pytest.CaptureFixture[str], part: str) -> None:
    folder = here / "model"
    shutil.copytree(tiny_folder(), folder)
    target = folder / part
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    assert part in failed(capsys, "generate", "cat", "--model", "model", "-o", "cat.png")


def test_a_full_disk_is_one_line(here: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = failed(capsys, "generate", "cat", "--model", model, "--steps", "1", "-o", "/dev/full")
    assert "no space left" in line


def test_a_disk_that_fills_up_leaves_the_old_file(
    here: Path, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    from controlroom.core import files

    def full(path: Path, flags: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Path("cat.png").write_bytes(b"the old file")
    monkeypatch.setattr(files, "_flush_to_disk", full)
    line = failed(capsys, "generate", "cat", "--model", model, "--steps", "1", "-o", "cat.png")
    assert "no space left" in line and "free some space" in line


def test_results_that_cannot_be_printed_are_one_line() -> None:
    with open("/dev/full", "w") as full:
        code = "import sys; from controlroom.app.cli import main; sys.exit(main(['controls']))"
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: the result cannot be printed: no space is left on the disk. Free some."]


def test_replay_says_what_it_cannot_restore(here: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "missing.png" in failed(capsys, "replay", "missing.png")
    Image.new("RGB", (8, 8)).save("plain.png")
    assert "carries no run" in failed(capsys, "replay", "plain.png")
    draw(model, "-o", "cat.png")
    capsys.readouterr()
    Path("cut.png").write_bytes(Path("cat.png").read_bytes()[:-20])
    assert "broken PNG" in failed(capsys, "replay", "cut.png")
    shutil.copytree(model, "moved")
    assert "Create it first" in failed(capsys, "replay", "cat.png", "-o", "no/such/cat.png")
    # A model that has moved is given by name; the file still comes out the same.
    assert main(["replay", "cat.png", "--model", "moved", "--verify"]) == 0


def test_a_run_on_standard_input_may_be_a_png(
    here: Path, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert draw(model, "-o", "cat.png") == 0
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(Path("cat.png").read_bytes())))
    assert main(["explain", "-"]) == 0
    assert "2 steps, 4 UNet rows in 2 passes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage",
    [
        {"index": float("inf")},
        {"index": 1},
        {"index": -1},
        {"index": None},
        {"inputs": {"a": "b"}},
        {"inputs": {"a": {}}},
        {"inputs": {"a": {"path": 3, "sha256": ""}}},
        {"inputs": [1]},
        {"replayable": False, "reasons": 3},
        {"spec": []},
    ],
)
def test_a_damaged_run_in_a_png_is_one_line(
    here: Path, model: str, capsys: pytest.CaptureFixture[str], damage: dict[str, object]
) -> None:
    data = {"spec": RunSpec(model=model).to_data(), "index": 0, "inputs": {}, "replayable": True} | damage
    save_png(Image.new("RGB", (8, 8)), "cat.png", {"controlroom": json.dumps(data)})
    assert failed(capsys, "replay", "cat.png")
    assert failed(capsys, "explain", "cat.png")


def test_a_defect_is_short_and_debug_shows_its_trace(
    here: Path, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from controlroom.app import runs

    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("by a test")

    monkeypatch.setattr(runs, "draw", broken)
    assert draw(model, "-o", "cat.png") == 1
    printed = capsys.readouterr().err
    assert "ZeroDivisionError: by a test" in printed and "--debug" in printed and "Traceback" not in printed
    with pytest.raises(ZeroDivisionError):
        draw(model, "-o", "cat.png", "--debug")


def test_an_interrupt_is_130_and_leaves_nothing(
    here: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from controlroom.sampling import pipeline

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run_spec", interrupted)
    assert draw(model, "-o", "cat.png") == 130
    assert list(here.iterdir()) == []
    assert "Traceback" not in capsys.readouterr().err


def test_the_run_file_of_the_docs_is_one(here: Path) -> None:
    import re

    from controlroom.core.spec import RunSpec

    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert blocks
    for block in blocks:
        assert RunSpec.from_yaml(block).controls
