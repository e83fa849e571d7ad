"""``controlroom inspect`` and ``convert``: what they print, and one line for each mistake."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import controlroom as cr
from controlroom.app.cli import main
from controlroom.core.errors import ControlRoomError
from tests.controls.loras import tiny_lora
from tests.saved import tiny_folder
from tests.tiny import tiny_sd1


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_inspect_prints_what_it_is_and_what_takes_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_lora(here / "anna.safetensors", tiny_sd1)
    assert main(["inspect", "anna.safetensors"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("anna.safetensors: LoRA (diffusers), for a model with words 32 wide\n")
    assert (
        "108 of 108 keys known: 96 of the UNet, 12 of the text encoder" in printed
        and "rank 3" in printed
        and "metadata lora_adapter_metadata" in printed
    )
    assert printed.splitlines()[-1] == "  use: cr.LoRA('anna.safetensors')"
    assert main(["inspect", "theatre/pose", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["kind"] == "controlnet" and sum(data["groups"].values()) == data["keys"]
    save_file({"strange.x": torch.zeros(2, 2)}, "x.safetensors")
    for name, said in (("x.safetensors", "strange.x"), ("x.ckpt", "controlroom convert x.ckpt -o x.safetensors")):
        assert main(["inspect", name]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_convert_a_lora(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_lora(here / "anna.safetensors", tiny_sd1)
    line = ["convert", "anna.safetensors", "-o", "kohya.safetensors", "--to", "kohya", "--base", str(tiny_folder())]
    assert main(line) == 0
    printed = capsys.readouterr()
    assert printed.out == "kohya.safetensors\n" and "108 of 108 keys read" in " ".join(printed.err.split())
    assert main([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["from"]["kind"] == "lora"
    assert main(["convert", "anna.safetensors", "-o", "x.safetensors", "--to", "flux"]) == 2
    assert "diffusers, kohya, peft" in capsys.readouterr().err


class Command:
    """What runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch was-run",)


def test_a_malicious_pickle_is_refused_with_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"weight": torch.ones(1)}, "more": Command()}, "evil.ckpt")
    assert main(["convert", "evil.ckpt", "-o", "x.safetensors"]) == 2
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("\n") == 1
    assert "'evil.ckpt' is refused: when it is opened it asks for" in printed.err and "system" in printed.err
    assert sorted(path.name for path in here.iterdir()) == ["evil.ckpt"]


def test_a_pickle_anywhere_else_is_sent_to_convert(here: Path) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    folder = here / "net"
    folder.mkdir()
    (folder / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    image = torch.rand(3, 32, 32)
    controls = [
        cr.LoRA("x.bin"),
        cr.TextualInversion("x.pt"),
        cr.IPAdapter("x.bin", embeds=torch.zeros(1, 24)),
        cr.ControlNet("x.pth", image),
        cr.ControlNet(str(folder), image),
        cr.T2IAdapter("x.pth", image),
        cr.UniControlNet("x.ckpt", {"canny": image}),  # type: ignore[arg-type]
    ]
    for control in controls:
        with pytest.raises(ControlRoomError, match="controlroom convert"):
            pipe("cat", controls=[control], num_inference_steps=1)
    for model in ("x.ckpt", "x.bin"):
        with pytest.raises(ControlRoomError, match="controlroom convert"):
            cr.Pipeline.from_pretrained(model)
