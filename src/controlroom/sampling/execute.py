"""From a `RunSpec` to pictures on a loaded network: plan, attach, encode, denoise, decode. Nothing outlives a run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from controlroom.backbones.attention import Dispatcher
from controlroom.backbones.base import Backbone
from controlroom.backbones.sdxl import StableDiffusionXL
from controlroom.core.branch import IMAGE, Condition
from controlroom.core.control import Outline, Texts, implements
from controlroom.core.errors import InputError
from controlroom.core.picture import DrawnImage
from controlroom.core.plan import Plan
from controlroom.core.random import Streams
from controlroom.core.result import RunResult
from controlroom.core.run import Guidance, Run
from controlroom.core.sites import Site
from controlroom.core.spec import RunSpec
from controlroom.core.step import Step
from controlroom.sampling.loop import OnStep, denoise, picture
from controlroom.sampling.manifest import manifest_of, png_text
from controlroom.sampling.plan import make_plan
from controlroom.sampling.predict import Forward
from controlroom.sampling.solver import initial_latents, make_scheduler, timesteps_for

Generators = torch.Generator | Sequence[torch.Generator]


@dataclass(frozen=True)
class Prepared:
    """A planned run before anything is encoded."""

    plan: Plan
    scheduler: Any
    timesteps: torch.Tensor
    size: tuple[int, int]
    prompts: tuple[str, ...]
    negative_prompts: tuple[str | None, ...]


def plan_run(backbone: Backbone, spec: RunSpec) -> Prepared:
    """Plan a run without loading or encoding anything.

    Raises:
        InputError: sizes, prompts or controls that do not fit; see `make_plan` for the rest.
    """
    size = _size(backbone, spec)
    prompts, negatives = read_texts(spec)
    hw = (size[0] // backbone.pixels_per_latent, size[1] // backbone.pixels_per_latent)
    scheduler = make_scheduler(backbone.scheduler, spec.scheduler)

    def steps_for(strength: float | None) -> int:
        return len(timesteps_for(copy.deepcopy(scheduler), spec.num_inference_steps, backbone.device, strength))

    outline = Outline(
        backbone=backbone.name,
        images=len(prompts),
        steps=steps_for(None),
        latent=(backbone.latent_channels, *hw),
        guided=spec.guidance_scale > 1,
        attention=backbone.attention_sites(hw),
        features=backbone.feature_sites(hw),
        prompts=prompts,
        input_channels=int(backbone.unet.config.in_channels),
    )

    def sites_for(hw: tuple[int, int]) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
        return backbone.attention_sites(hw), backbone.feature_sites(hw)

    plan = make_plan(outline, spec.controls, int(backbone.unet.config.in_channels), steps_for, sites_for)
    if plan.strength is not None and spec.latents is not None:
        raise InputError("latents and a control that starts from a picture cannot both set where a run starts.")
    timesteps = timesteps_for(scheduler, spec.num_inference_steps, backbone.device, plan.strength)
    return Prepared(plan, scheduler, timesteps, size, prompts, negatives)


@torch.no_grad()
def run_spec(
    backbone: Backbone,
    spec: RunSpec,
    generator: Generators | None = None,
    on_step: Callable[[Run], OnStep] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    reasons: tuple[str, ...] = (),
) -> RunResult:
    """Execute a run.

    Args:
        backbone: the loaded network; left as it was found, also after an exception.
        spec: the run.
        generator: the caller's generators; None: from the seed (or the recorded seeds of generators).
        on_step: makes the function called after each step.
        cancelled: asked before each step; True ends the run early with what there is.
        reasons: why the run cannot be replayed, if so.
    """
    with opened_run(backbone, spec, generator) as (run, spec):
        latents = initial_latents(run, spec.latents)
        progress = denoise(run, latents, on_step(run) if on_step is not None else None, cancelled)
    final = picture(progress)
    manifest = manifest_of(run, spec, progress.cancelled, reasons)
    texts = [png_text(manifest, run, spec, index) for index in range(run.images)]
    images = final if spec.output_type == "latent" else to_images(_developed(run, final), spec.output_type, texts)
    others = {name: progress.latents[name] for name in run.schedulers if name != IMAGE}
    return RunResult(images, final, manifest, spec, progress.cancelled, others, texts, dict(run.masks))


def decoded(run: Run, latents: torch.Tensor) -> torch.Tensor:
    """Pixels of a run's latents; a picture whose ends meet is decoded with its other end beside each."""
    backbone = run.backbone
    assert isinstance(backbone, Backbone)
    wrap = min(run.plan.wrap, latents.shape[-1])
    if not wrap:
        return backbone.decode(latents)
    edge = wrap * backbone.pixels_per_latent
    return backbone.decode(torch.cat([latents[..., -wrap:], latents, latents[..., :wrap]], dim=-1))[..., edge:-edge]


@contextmanager
def opened_run(backbone: Backbone, spec: RunSpec, generator: Generators | None = None) -> Iterator[tuple[Run, RunSpec]]:
    """A run planned, attached and encoded, ready for `predict` and `denoise`; the network is put back at the end.

    Sampling, inversion and whatever else walks through the steps open their runs here.

    Yields:
        The run, and its specification with the seed that is used.
    """
    prepared = plan_run(backbone, spec)
    spec, streams = _streams(spec, generator, len(prepared.prompts))
    plan = prepared.plan
    solved = [name for name, state in plan.states.items() if state.advance == "solver"]
    run = Run(
        backbone=backbone,
        plan=plan,
        streams=streams,
        # Each set of latents has its own history; a shared one would mix them.
        schedulers={
            name: prepared.scheduler if index == 0 else copy.deepcopy(prepared.scheduler)
            for index, name in enumerate(solved)
        },
        timesteps=prepared.timesteps,
        guidance=Guidance(spec.guidance_scale, spec.guidance_rescale),
        prompts=prepared.prompts,
        negative_prompts=prepared.negative_prompts,
        size=prepared.size,
        eta=spec.eta,
        clip_skip=spec.clip_skip,
    )
    with ExitStack() as stack:
        for index, entry in enumerate(plan.controls):
            context = entry.control.attach(backbone) if implements(entry.control, "attach") else None
            if context is not None:
                run.attached[index] = stack.enter_context(context)
        run.remarks = plan.remarks(backbone)
        set_text_conditions(run, spec)
        for index, entry in enumerate(plan.controls):
            run.memories[index] = entry.control.prepare(run)
        dispatcher = Dispatcher(
            backbone.unet,
            _unique(site for entry in plan.controls for site in entry.declaration.attention),
            _unique(site for entry in plan.controls for site in entry.declaration.features),
        )
        run.forward = Forward(run, dispatcher)
        stack.enter_context(dispatcher.installed())
        yield run, spec


def set_text_conditions(run: Run, spec: RunSpec) -> None:
    """Conditions of ``cond`` and ``uncond`` from prompts or from given embeddings."""
    backbone = run.backbone
    assert isinstance(backbone, Backbone)
    seconds = _repeat(spec.prompt_2, run, spec)
    if spec.prompt_embeds is not None:
        cond = _given(run, spec, spec.prompt_embeds, spec.pooled_prompt_embeds, "prompt_embeds")
    else:
        cond = _encode(run, spec, run.prompts, False, seconds)
    run.set_condition("cond", _sized(run, spec, cond))
    if not run.plan.outline.guided:
        return
    absent = all(text is None for text in run.negative_prompts)
    if spec.negative_prompt_embeds is not None:
        embeds, pooled = spec.negative_prompt_embeds, spec.negative_pooled_prompt_embeds
        uncond = _given(run, spec, embeds, pooled, "negative_prompt_embeds")
    elif absent and isinstance(backbone, StableDiffusionXL) and backbone.zero_empty_negative:
        pooled = None if cond.pooled is None else torch.zeros_like(cond.pooled)
        uncond = replace(cond, tokens=torch.zeros_like(cond.tokens), pooled=pooled)
    else:
        negatives = tuple(text or "" for text in run.negative_prompts)
        uncond = _encode(run, spec, negatives, True, _repeat(spec.negative_prompt_2, run, spec))
    if uncond.tokens.shape[1:] != cond.tokens.shape[1:] and spec.negative_prompt_embeds is not None:
        raise InputError(
            f"negative_prompt_embeds has the shape {tuple(spec.negative_prompt_embeds.shape)}, the prompt "
            f"{tuple(cond.tokens.shape)}; they must agree."
        )
    run.set_condition("uncond", _sized(run, spec, uncond))


def _encode(run: Run, spec: RunSpec, texts: Sequence[str], negative: bool, seconds: Sequence[str] | None) -> Condition:
    """Each different text is encoded once."""
    pairs = list(zip(texts, seconds or texts, strict=True))
    unique = list(dict.fromkeys(pairs))
    assert isinstance(run.backbone, Backbone)
    condition = run.backbone.encode_text(
        [first for first, _ in unique],
        negative=negative,
        size=run.size,
        clip_skip=spec.clip_skip,
        second=[second for _, second in unique] if seconds is not None else None,
    )
    return condition.take([unique.index(pair) for pair in pairs])


def _given(run: Run, spec: RunSpec, embeds: Any, pooled: Any, name: str) -> Condition:
    width = run.backbone.unet.config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    if embeds.ndim != 3 or embeds.shape[-1] != width:
        raise InputError(f"{name} has the shape {tuple(embeds.shape)}; this model needs [rows, length, {width}].")
    if run.backbone.name == "sdxl" and pooled is None:
        raise InputError(f"With {name} Stable Diffusion XL needs its pooled_{name.removeprefix('negative_')} too.")

    if pooled is not None and pooled.ndim != 2:
        raise InputError(f"The pooled tensor of {name} has the shape {tuple(pooled.shape)}; expected [rows, width].")

    def rows(x: Any) -> torch.Tensor:
        x = x.to(device=run.device, dtype=run.dtype)
        if run.images % x.shape[0]:
            raise InputError(f"{name} has {x.shape[0]} rows for {run.images} images. Give one for each prompt.")
        return x.repeat_interleave(run.images // x.shape[0], dim=0)

    return Condition(tokens=rows(embeds), pooled=None if pooled is None else rows(pooled))


def _sized(run: Run, spec: RunSpec, condition: Condition) -> Condition:
    """Tell Stable Diffusion XL the sizes that the run names."""
    backbone = run.backbone
    if not isinstance(backbone, StableDiffusionXL):
        return condition
    ids = backbone.time_ids(
        condition.tokens.shape[0],
        run.size,
        condition.tokens.dtype,
        spec.original_size,
        spec.crops_coords_top_left,
        spec.target_size,
    )
    return replace(condition, time_ids=ids)


def _repeat(texts: str | list[str] | None, run: Run, spec: RunSpec) -> list[str] | None:
    if texts is None:
        return None
    listed = [texts] * (run.images // spec.num_images_per_prompt) if isinstance(texts, str) else texts
    found = [text for text in listed for _ in range(spec.num_images_per_prompt)]
    if len(found) != run.images:
        raise InputError(f"{len(listed)} second prompts for {run.images // spec.num_images_per_prompt} prompts.")
    return found


def _texts(spec: RunSpec) -> tuple[tuple[str, ...], tuple[str | None, ...]]:
    """Prompt and negative prompt of each image."""
    if isinstance(spec.prompt, list) and not spec.prompt:
        raise InputError("The list of prompts is empty. Give at least one prompt.")
    if spec.prompt_embeds is not None:
        if spec.prompt:
            raise InputError("prompt and prompt_embeds were both given. Give one of them.")
        count = int(spec.prompt_embeds.shape[0])
        prompts = [""] * count
    else:
        prompts = spec.prompt if isinstance(spec.prompt, list) else [spec.prompt]
    negative = spec.negative_prompt
    if negative is not None and spec.negative_prompt_embeds is not None:
        raise InputError("negative_prompt and negative_prompt_embeds were both given. Give one of them.")
    negatives: list[str | None]
    if isinstance(negative, list):
        if len(negative) != len(prompts):
            raise InputError(f"{len(negative)} negative prompts for {len(prompts)} prompts. Give one, or one for each.")
        negatives = list(negative)
    else:
        negatives = [negative] * len(prompts)
    each = range(spec.num_images_per_prompt)
    return tuple(p for p in prompts for _ in each), tuple(p for p in negatives for _ in each)


def read_texts(spec: RunSpec) -> tuple[tuple[str, ...], tuple[str | None, ...]]:
    """Prompt and negative prompt of each image as words, after every control that reads a notation."""
    prompts, negatives = _texts(spec)
    embeds = {"prompt": spec.prompt_embeds, "negative_prompt": spec.negative_prompt_embeds}
    seconds = {"prompt": spec.prompt_2, "negative_prompt": spec.negative_prompt_2}
    texts = Texts(
        prompts,
        negatives,
        frozenset(name for name, given in embeds.items() if given is not None),
        frozenset(name for name, given in seconds.items() if given is not None),
    )
    for control in spec.controls:
        if implements(control, "read"):
            texts = control.read(texts)
    if len(texts.prompts) != len(prompts) or len(texts.negatives) != len(negatives):
        raise RuntimeError("a control read another number of prompts than there are")
    return texts.prompts, texts.negatives


def _size(backbone: Backbone, spec: RunSpec) -> tuple[int, int]:
    step = backbone.pixels_per_latent
    height, width = backbone.default_size
    if spec.latents is not None:
        if getattr(spec.latents, "ndim", 0) != 4:
            raise InputError("latents must be a tensor [images, channels, height, width].")
        height, width = int(spec.latents.shape[-2]) * step, int(spec.latents.shape[-1]) * step
    height, width = spec.height or height, spec.width or width
    if height % step or width % step:
        raise InputError(
            f"Height and width must be multiples of {step}, got {height} x {width}. "
            f"Try {max(step, round(height / step) * step)} x {max(step, round(width / step) * step)}."
        )
    return height, width


def _streams(spec: RunSpec, generator: Generators | None, images: int) -> tuple[RunSpec, Streams]:
    """Randomness of a run, and the specification with the seed that is used."""
    if generator is None and spec.generator_seed is not None:
        recorded = spec.generator_seed
        seeds = recorded if isinstance(recorded, list) else [recorded]
        made = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        generator = made if isinstance(recorded, list) else made[0]
    if generator is not None:
        if spec.seed is not None:
            raise InputError("seed and generator were both given. Give one of them.")
        if isinstance(generator, torch.Generator):
            start = generator.initial_seed() % 2**63
            return spec, Streams([(start + i) % 2**63 for i in range(images)], generator)
        if len(generator) != images:
            raise InputError(f"{len(generator)} generators for {images} images. Give one, or one for each image.")
        return spec, Streams([g.initial_seed() % 2**63 for g in generator], generator)
    if spec.seed is None:
        # From torch's global generator, so that torch.manual_seed makes a script reproducible.
        spec = spec.model_copy(update={"seed": int(torch.randint(2**32, (1,)).item())})
    assert spec.seed is not None
    return spec, Streams([spec.seed + i for i in range(images)])


def _developed(run: Run, latents: torch.Tensor) -> torch.Tensor:
    """Decoded pictures [B, 3, H, W] in [-1, 1], after what controls do to them."""
    pixels = decoded(run, latents)
    for entry in run.plan.controls:
        if implements(entry.control, "develop"):
            pixels = entry.control.develop(run, pixels)
    return pixels


def to_images(pixels: torch.Tensor, kind: str, texts: list[dict[str, str]]) -> Any:
    """[B, 3, H, W] in [-1, 1] -> the form the caller asked for."""
    pixels = (pixels / 2 + 0.5).clamp(0, 1)
    if kind == "pt":
        return pixels
    array = pixels.cpu().permute(0, 2, 3, 1).float().numpy()
    if kind == "np":
        return array
    pictures = (np.nan_to_num(array) * 255).round().astype("uint8")
    return [DrawnImage.of(Image.fromarray(one), text) for one, text in zip(pictures, texts, strict=True)]


def callback_tensors(run: Run, step: Step, names: Sequence[str]) -> dict[str, torch.Tensor | None]:
    """What diffusers passes to ``callback_on_step_end``."""
    known: dict[str, Callable[[], torch.Tensor | None]] = {
        "latents": lambda: step.latents["image"],
        "prompt_embeds": lambda: step.condition("cond").tokens,
        "negative_prompt_embeds": lambda: step.condition("uncond").tokens if "uncond" in run.plan.branches else None,
        "noise_pred": lambda: step.combined["image"],
    }
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"callback_on_step_end_tensor_inputs can be {', '.join(known)}; got {', '.join(unknown)}.")
    return {name: known[name]() for name in names}


def _unique(sites: Any) -> tuple[Any, ...]:
    return tuple({site.name: site for site in sites}.values())
