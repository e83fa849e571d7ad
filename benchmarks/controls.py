"""Each control against the diffusers pipeline of its method: ``python -m benchmarks.controls``.

The same components, auxiliary networks, prompt, noise and steps; interleaved pairs; the median of their ratios (at most
1.03 is asked for). Prompt-to-Prompt and AppearanceControl have no pipeline there: they are timed against a run without
controls, beside the number of UNet rows, which says what to expect.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

import controlroom as cr
from benchmarks import models, timing
from controlroom.backbones.ip_adapter import adapter_from_tensors
from controlroom.catalog import control_class
from tests.controls.nets import tiny_controlnet, tiny_image_encoder, tiny_ip_adapter
from tests.tiny import tiny_unet

PROMPT = "a cat and a dog on the beach"
SOURCE = "a cat and a frog on the beach"
EXCITED = [2, 5]
"""Positions of cat and dog."""
Call = Callable[[str], Any]


class Bench:
    """One model with what every control needs.

    Attributes:
        source: diffusers pipeline.
        ours: the same components.
        arguments: of a call, on both sides.
        picture: RGB, of the size that is drawn.
    """

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps = name, steps
        self.source = models.pipeline(name)
        self.ours = cr.Pipeline.from_diffusers(self.source)
        size = models.pixels(name)
        noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        self.picture = Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)
        self.arguments: dict[str, Any] = {"prompt": PROMPT, "height": size, "width": size, "num_inference_steps": steps}

    def run(self, pipe: Any, output: str = "pil", **more: Any) -> Any:
        """One call with noise of its own generator."""
        generator = torch.Generator().manual_seed(1)
        return pipe(**self.arguments, **more, generator=generator, output_type=output).images

    def controlled(self, control: Any) -> Call:
        return lambda output="pil": self.run(self.ours, output, controls=[control])

    def plain(self, output: str = "pil") -> Any:
        return self.run(self.ours, output)

    def rows(self, control: Any) -> int:
        """UNet rows of a run with a control."""
        result = self.ours(**self.arguments, controls=[control], seed=1)
        return int(result.manifest["cost"]["unet_rows"] + result.manifest["cost"]["side_rows"])


def controlnet(bench: Bench) -> tuple[str, Call, Call]:
    from diffusers import StableDiffusionControlNetPipeline

    halvings = len(bench.source.vae.config.block_out_channels)
    net = tiny_controlnet(bench.source.unet, conditioning_embedding_out_channels=(16,) * halvings)
    parts = {name: part for name, part in bench.source.components.items() if name != "image_encoder"}
    theirs: Any = StableDiffusionControlNetPipeline(**parts, controlnet=net)
    theirs.set_progress_bar_config(disable=True)
    ours = control_class("controlnet")(model=net, image=bench.picture)
    return "ControlNet", bench.controlled(ours), lambda output="pil": bench.run(theirs, output, image=bench.picture)


def controlnet_multi(bench: Bench) -> tuple[str, Call, Call]:
    """Two ControlNets at once."""
    from diffusers import MultiControlNetModel, StableDiffusionControlNetPipeline

    nets = _two_controlnets(bench)
    parts = {name: part for name, part in bench.source.components.items() if name != "image_encoder"}
    theirs: Any = StableDiffusionControlNetPipeline(**parts, controlnet=MultiControlNetModel(nets))
    theirs.set_progress_bar_config(disable=True)
    ours = [control_class("controlnet")(model=net, image=bench.picture) for net in nets]
    return (
        "ControlNet, two",
        lambda output="pil": bench.run(bench.ours, output, controls=ours),
        lambda output="pil": bench.run(theirs, output, image=[bench.picture] * 2),
    )


def controlnet_img2img(bench: Bench) -> tuple[str, Call, Call]:
    """ControlNet from a picture, as `controlroom stylise` draws."""
    from diffusers import StableDiffusionControlNetImg2ImgPipeline

    net = _two_controlnets(bench)[0]
    parts = {name: part for name, part in bench.source.components.items() if name != "image_encoder"}
    theirs: Any = StableDiffusionControlNetImg2ImgPipeline(**parts, controlnet=net)
    theirs.set_progress_bar_config(disable=True)
    ours = [
        control_class("image_to_image")(image=bench.picture, strength=0.8),
        control_class("controlnet")(model=net, image=bench.picture),
    ]
    pictures = {"image": bench.picture, "control_image": bench.picture, "strength": 0.8, "guidance_scale": 7.5}
    return (
        "ControlNet img2img",
        lambda output="pil": bench.run(bench.ours, output, controls=ours),
        lambda output="pil": bench.run(theirs, output, **pictures, controlnet_conditioning_scale=1.0),
    )


def _two_controlnets(bench: Bench) -> list[Any]:
    halvings = len(bench.source.vae.config.block_out_channels)
    widths = (16,) * halvings
    return [tiny_controlnet(bench.source.unet, seed, conditioning_embedding_out_channels=widths) for seed in (7, 8)]


def ip_adapter(bench: Bench) -> tuple[str, Call, Call]:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPImageProcessor

    # Of its own, since diffusers writes its adapter into the UNet.
    theirs: Any = StableDiffusionPipeline(**models.pipeline(bench.name).components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    encoder, file = tiny_image_encoder(), tiny_ip_adapter(bench.source.unet)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    theirs.register_modules(image_encoder=encoder, feature_extractor=processor)
    nested: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in file.items():
        group, _, rest = key.partition(".")
        nested[group][rest] = value
    theirs.load_ip_adapter(nested, subfolder="", weight_name="", image_encoder_folder=None)
    # Loaded before, as theirs is.
    adapter = adapter_from_tensors(file, bench.ours.backbone.unet)
    ours = control_class("ip_adapter")(model=adapter, image=bench.picture, image_encoder=encoder)
    called = bench.controlled(ours)
    return "IP-Adapter", called, lambda output="pil": bench.run(theirs, output, ip_adapter_image=bench.picture)


def attend_and_excite(bench: Bench) -> tuple[str, Call, Call]:
    from diffusers import StableDiffusionAttendAndExcitePipeline

    parts = {name: part for name, part in bench.source.components.items() if name != "image_encoder"}
    theirs: Any = StableDiffusionAttendAndExcitePipeline(**parts, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    factor = 2 ** (len(bench.source.vae.config.block_out_channels) - 1)
    resolution = models.pixels(bench.name) // factor // 2
    settings: dict[str, Any] = {"iterations": 25, "thresholds": {0: 0.05, 10: 0.5, 20: 0.8}}
    ours = control_class("attend_and_excite")(indices=EXCITED, resolution=resolution, **settings)

    def called(output: str = "pil") -> Any:
        return bench.run(
            theirs,
            output,
            token_indices=EXCITED,
            max_iter_to_alter=settings["iterations"],
            thresholds=settings["thresholds"],
            attn_res=(resolution, resolution),
        )

    return "Attend-and-Excite", bench.controlled(ours), called


def multidiffusion(bench: Bench) -> tuple[str, Call, Call]:
    """A panorama of 2:1, all windows of a step at once; theirs one by one, with windows of the model's size too."""
    from diffusers import StableDiffusionPanoramaPipeline

    factor = bench.ours.backbone.pixels_per_latent
    window = models.pixels(bench.name) // factor
    stride = max(1, window // 8)

    class Panorama(StableDiffusionPanoramaPipeline):
        def get_views(self, panorama_height: int, panorama_width: int, *given: Any, **named: Any) -> Any:
            size = (8 * panorama_height // factor, 8 * panorama_width // factor)
            return super().get_views(*size, window_size=window, stride=stride)

    parts = {name: part for name, part in bench.source.components.items() if name != "image_encoder"}
    theirs: Any = Panorama(**parts, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    ours = control_class("multidiffusion")(window=window, stride=stride)
    wide = {**bench.arguments, "width": 2 * bench.arguments["width"]}

    def called(pipe: Any, output: str, **more: Any) -> Any:
        return pipe(**wide, **more, generator=torch.Generator().manual_seed(1), output_type=output).images

    return (
        "MultiDiffusion, 2:1",
        lambda output="pil": called(bench.ours, output, controls=[ours]),
        lambda output="pil": called(theirs, output),
    )


PARITY = {
    "multidiffusion": multidiffusion,
    "controlnet": controlnet,
    "controlnet_multi": controlnet_multi,
    "controlnet_img2img": controlnet_img2img,
    "ip_adapter": ip_adapter,
    "attend_and_excite": attend_and_excite,
}


def alone(bench: Bench) -> dict[str, Any]:
    """Controls without a pipeline in diffusers, by type."""
    unet = bench.source.unet
    return {
        "prompt_to_prompt": lambda: control_class("prompt_to_prompt")(source=SOURCE),
        "appearance_control": lambda: control_class("appearance_control")(
            image=bench.picture, model=tiny_unet(seed=1) if bench.name == "tiny" else unet
        ),
    }


def main() -> None:
    """Time what was asked for and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=models.NAMES, default=["theatre", "sd15"])
    parser.add_argument("--controls", nargs="+", default=None, help="types, as in a run file; default: all")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=None, help="default: 20, and 4 for sd15")
    parser.add_argument("--quick", action="store_true", help="only the miniature and five pairs, to see that it runs")
    options = parser.parse_args()
    pairs = 5 if options.quick else options.pairs
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n\n{timing.HEADER}", flush=True)
    for name in ["tiny"] if options.quick else options.models:
        if not models.available(name):
            print(f"| {name} | – | not in this installation | | | | | |", flush=True)
            continue
        bench = Bench(name, options.steps or (4 if name == "sd15" else 20))
        for key, prepare in PARITY.items():
            if options.controls is None or key in options.controls:
                print(against_diffusers(bench, key, prepare, pairs), flush=True)
        for key, make in alone(bench).items():
            if options.controls is None or key in options.controls:
                print(against_none(bench, key, make, pairs), flush=True)


def against_diffusers(bench: Bench, key: str, prepare: Callable[[Bench], tuple[str, Call, Call]], pairs: int) -> str:
    try:
        title, ours, theirs = prepare(bench)
    except cr.ControlRoomError as error:
        return f"| {key} | – | {error} | | | | | |"
    gap = float((ours("latent") - theirs("latent")).abs().max())
    return timing.row(f"{title}, {bench.name}", "its diffusers pipeline", timing.compare(ours, theirs, pairs), gap)


def against_none(bench: Bench, key: str, make: Callable[[], Any], pairs: int) -> str:
    try:
        control = make()
    except cr.ControlRoomError as error:
        return f"| {key} | – | {error} | | | | | |"
    found = timing.compare(bench.controlled(control), bench.plain, pairs)
    rows = bench.rows(control)
    plain = 2 * bench.steps
    return timing.row(f"{key}, {bench.name}", f"no control ({rows} rows for {plain})", found)


if __name__ == "__main__":
    main()
