"""After a run with files of controls the base is what it was: bit for bit, in work and in memory."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import controlroom as cr
from tests.controls.loras import tiny_lora, tiny_word
from tests.controls.nets import tiny_controlnet, tiny_ip_adapter
from tests.tiny import tiny_sd1
from tests.traces import traces

DRAW: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "latent", "seed": 3}


class Work(TorchDispatchMode):
    """Counts the operations that torch carries out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def drawn(pipe: Any, prompt: str, controls: list[Any]) -> tuple[torch.Tensor, Counter[str]]:
    with Work() as work:
        found = pipe(prompt, controls=controls, **DRAW).images
    return found, work.found


def alive() -> int:
    """Bytes of all tensors that somebody holds."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_the_base_is_restored_in_bits_work_and_memory(tmp_path: Path) -> None:
    lora = tiny_lora(tmp_path / "anna.safetensors", tiny_sd1)
    save_file({"<anna>": tiny_word(tiny_sd1())["clip_l"]}, str(tmp_path / "word.safetensors"))
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    save_file(tiny_ip_adapter(pipe.unet, "faceid"), str(tmp_path / "ip.safetensors"))
    tiny_controlnet(pipe.unet).save_pretrained(tmp_path / "net")
    drawn(pipe, "a cat", [])  # what libraries set up once
    plain, work = drawn(pipe, "a cat", [])
    before, memory = traces(pipe), alive()
    condition = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    controls = [
        cr.LoRA(str(lora)),
        cr.TextualInversion(str(tmp_path / "word.safetensors")),
        cr.IPAdapter(str(tmp_path / "ip.safetensors"), embeds=torch.ones(1, 10)),
        cr.ControlNet(str(tmp_path / "net"), condition),
    ]
    changed, more = drawn(pipe, "a <anna>", controls)
    assert not torch.equal(changed, plain) and more.total() > work.total()
    again, same = drawn(pipe, "a cat", [])
    assert torch.equal(again, plain) and same == work
    # Kept for the next run, until it is let go.
    del changed, again, controls, condition
    assert alive() > memory and pipe.backbone.kept
    pipe.unload()
    assert alive() == memory and traces(pipe) == before
