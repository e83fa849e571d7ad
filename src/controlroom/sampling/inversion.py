"""Inversion: the noise from which a model draws a given picture.

DDIM inversion (arXiv 2010.02502, section 4.3): the steps of DDIM are those of an ordinary differential equation and
can be walked backwards. The picture is encoded, and each step, from the cleanest to the noisiest, predicts as a drawing
does at its timestep and moves the latents to more noise. ``regularised`` keeps the predictions like noise on the way
(`controlroom.sampling.regularisation`), ``null_text`` learns embeddings with which a run with guidance comes back to
the picture (`controlroom.sampling.null_text`).

Predictions are those of `controlroom.sampling.predict`, so controls may act on the way. Step i of an inversion is step
i of a drawing: a control whose window ends at 0.8 is silent in the first fifth of an inversion, which is the last of a
drawing. The inverse step is diffusers' `DDIMInverseScheduler`, at the timesteps that ``scheduler="ddim"`` has.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch

from controlroom.core.branch import IMAGE
from controlroom.core.control import Control, implements
from controlroom.core.errors import InputError
from controlroom.core.images import FitMode, ImageSource
from controlroom.core.plan import Plan
from controlroom.core.run import Run
from controlroom.core.spec import RunSpec
from controlroom.core.step import Step
from controlroom.sampling.execute import opened_run, plan_run
from controlroom.sampling.inverted import Inversion, InversionSettings, Method, NullText, Quality, Regularisation
from controlroom.sampling.inverted_pictures import decibels, names, paired, read_pixels
from controlroom.sampling.loop import denoise, give_states
from controlroom.sampling.null_text import optimise_null_text
from controlroom.sampling.pipeline import Pipeline
from controlroom.sampling.predict import predict
from controlroom.sampling.regularisation import regularised
from controlroom.sampling.solver import alpha_bars

OnProgress = Callable[[int, int], Any]
"""Called with the number of steps done and of all."""
NULL_TEXT_GUIDANCE = 7.5


def invert(
    pipe: Pipeline,
    image: ImageSource | Sequence[ImageSource],
    prompt: str | list[str] = "",
    method: Method = "ddim",
    num_inference_steps: int = 50,
    guidance_scale: float | None = None,
    controls: Sequence[Control] = (),
    *,
    negative_prompt: str | list[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    mode: FitMode = "crop",
    seed: int = 0,
    regularisation: Regularisation | None = None,
    null_text: NullText | None = None,
    measure: bool = True,
    min_db: float = 15.0,
    on_progress: OnProgress | None = None,
) -> Inversion:
    """Find the noise that one or several pictures come from.

    ``pipe.cancel()`` (from another thread, or in ``on_progress``) stops it before its next step; what comes back has
    ``cancelled`` set then and cannot be drawn from.

    Args:
        pipe: the model.
        image: path, bytes, PIL picture, array or tensor; a list has one for each prompt.
        prompt: what the picture shows, in words; "" is the branch without a prompt alone. A list has one for each
            picture.
        method: ``ddim``; ``regularised``, the noise kept like noise, for Pix2Pix-Zero; ``null_text``, with embeddings
            for runs with guidance.
        num_inference_steps: of the inversion, and of every run that starts from it.
        guidance_scale: of the inversion; None: 1, which is none and loses least. With ``null_text``: of the runs that
            start from it; None: 7.5.
        controls: act on every prediction; those that move latents or choose where a run starts cannot.
        negative_prompt: what the branch without the prompt is told.
        height: pixels; None: what the model was trained at.
        width: pixels.
        mode: how the picture is brought to that size: ``crop``, ``pad`` or ``stretch``.
        seed: of the shifts of the regularisation, and of controls that draw noise.
        regularisation: its settings.
        null_text: its settings.
        measure: draw the picture again and measure how well it comes back (n more steps; free with ``null_text``).
        min_db: below this many dB against the autoencoder's reconstruction there is a warning that names the picture.
        on_progress: called after each step with the steps done and all steps.

    Raises:
        InputError: a picture that cannot be read; numbers that do not fit; a control that cannot act here; an inversion
            that diverged (values that are not finite), with the picture's name.
    """
    if method not in get_args(Method):
        raise InputError(f"Unknown method {method!r}. Choose one of {', '.join(get_args(Method))}.")
    if method == "null_text" and guidance_scale is not None and guidance_scale <= 1:
        raise InputError(
            f"Null-text optimisation learns embeddings for guidance, but guidance_scale is {guidance_scale:g}. Give "
            'one above 1, or use method="ddim".'
        )
    settings = InversionSettings(
        method=method,
        num_inference_steps=num_inference_steps,
        guidance_scale=_guidance(method) if guidance_scale is None else guidance_scale,
        seed=seed,
        regularisation=regularisation or Regularisation(),
        null_text=null_text or NullText(),
    )
    sources, prompts = paired(image, prompt)
    spec = RunSpec(
        model=pipe.model,
        prompt=prompts,
        negative_prompt=negative_prompt,
        controls=list(controls),
        height=height,
        width=width,
        num_inference_steps=num_inference_steps,
        scheduler="ddim",
        guidance_scale=settings.guidance_scale,
        seed=seed,
    )
    with _using(pipe), torch.no_grad():
        plan = plan_run(pipe.backbone, spec)
        _check(plan.plan)
        pictures = read_pixels(sources, plan.size, mode)
        work = _Inverting(pipe, spec, settings, names(sources), on_progress or (lambda done, total: None), measure)
        found = work.invert(pictures, plan.negative_prompts)
    return _warned(found, min_db)


def _guidance(method: Method) -> float:
    return NULL_TEXT_GUIDANCE if method == "null_text" else 1.0


@contextmanager
def _using(pipe: Pipeline) -> Iterator[None]:
    """One call runs at a time; an offloaded model goes back to where it was."""
    with pipe._lock:
        pipe._interrupt = False
        try:
            yield
        finally:
            if pipe._offload_hooks:
                pipe._offload_hooks[-1].offload()


@dataclass
class _Inverting:
    """One call of `invert`: the way up, the way down, and what they cost."""

    pipe: Pipeline
    spec: RunSpec
    settings: InversionSettings
    names: tuple[str, ...]
    on_progress: OnProgress
    measure: bool
    steps_done: int = 0
    rows: int = 0
    passes: int = 0

    @property
    def total(self) -> int:
        """Steps of the way up and, where it is walked, of the way down."""
        down = self.measure or self.settings.method == "null_text"
        return self.settings.num_inference_steps * (2 if down else 1)

    @property
    def stopped(self) -> bool:
        return self.pipe._interrupt

    def invert(self, pixels: torch.Tensor, negatives: tuple[str | None, ...]) -> Inversion:
        """[B, 3, H, W] in [-1, 1] -> what was found."""
        backbone = self.pipe.backbone
        # Row by row, since an autoencoder rounds a batch otherwise.
        clean = torch.cat([backbone.encode_picture(row) for row in pixels.split(1)])
        latents, timesteps = self.ascend(clean)
        uncond: list[torch.Tensor] = []
        drawn: torch.Tensor | None = None
        if not self.stopped and self.settings.method == "null_text":
            uncond, drawn = self.optimise(latents)
        elif not self.stopped and self.measure:
            drawn = self.draw(latents[-1])
        cancelled = self.stopped
        quality = None if cancelled or drawn is None or not self.measure else self.quality(pixels, clean, drawn)
        return Inversion(
            latents=torch.stack(latents).cpu(),
            timesteps=timesteps,
            prompts=tuple(self.spec.prompt),
            negative_prompts=negatives,
            pictures=self.names,
            settings=self.settings,
            backbone=backbone.name,
            model=self.pipe.model,
            uncond=torch.stack(uncond).cpu() if uncond and not cancelled else None,
            run=self.spec.to_json(),
            quality=quality,
            cost=(self.rows, self.passes),
            cancelled=cancelled,
        )

    @contextmanager
    def opened(self, guidance_scale: float) -> Iterator[Run]:
        spec = self.spec.model_copy(update={"guidance_scale": guidance_scale})
        with opened_run(self.pipe.backbone, spec) as (run, _):
            yield run
            self.rows += run.cost.unet_rows
            self.passes += run.cost.unet_passes

    def done(self, latents: torch.Tensor, way: str) -> None:
        """After each step: whatever is not a number would only be found in black pictures later."""
        self.steps_done += 1
        finite = torch.isfinite(latents).flatten(1).all(1)
        if not bool(finite.all()):
            name = self.names[int((~finite).nonzero()[0])]
            raise InputError(
                f"The inversion of {name} diverged: its latents are not finite after step {self.steps_done} of "
                f"{self.total} ({way}). Use more steps, a guidance_scale of 1, float32, or fewer controls."
            )
        self.on_progress(self.steps_done, self.total)

    # The way up.

    def ascend(self, clean: torch.Tensor) -> tuple[list[torch.Tensor], tuple[int, ...]]:
        """Latents from the picture to its noise, and the timesteps on the way."""
        settings, latents = self.settings, [clean]
        with self.opened(1.0 if settings.method == "null_text" else settings.guidance_scale) as run:
            inverse = _inverse_scheduler(run)
            generators = [torch.Generator("cpu").manual_seed(settings.seed + index) for index in range(run.images)]
            for i in reversed(range(run.n)):
                if self.stopped:
                    break
                step = _step(run, i, latents[-1])
                prediction = predict(step)[IMAGE]
                if settings.method == "regularised":
                    prediction = regularised(step, prediction, generators, settings.regularisation)
                latents.append(inverse.step(prediction, step.t, step.latents[IMAGE], return_dict=False)[0])
                self.done(latents[-1], "towards the noise")
            return latents, tuple(int(t) for t in run.timesteps.flip(0))

    # The way down.

    def optimise(self, latents: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
        def done(i: int, current: torch.Tensor) -> bool:
            self.done(current, "back to the picture, with null-text optimisation")
            return self.stopped

        with self.opened(self.settings.guidance_scale) as run:
            return optimise_null_text(run, latents, lambda i, x: _step(run, i, x), self.settings.null_text, done)

    def draw(self, noise: torch.Tensor) -> torch.Tensor:
        with self.opened(self.settings.guidance_scale) as run:

            def on_step(i: int, t: torch.Tensor, step: Step) -> None:
                self.done(step.latents[IMAGE], "back to the picture")

            return denoise(run, {IMAGE: noise}, on_step, lambda: self.stopped).latents[IMAGE]

    def quality(self, pixels: torch.Tensor, clean: torch.Tensor, drawn: torch.Tensor) -> Quality:
        decode = self.pipe.backbone.decode
        best, found = (torch.cat([decode(row).float().cpu() for row in part.split(1)]) for part in (clean, drawn))
        return Quality(decibels(found, pixels), decibels(found, best), decibels(best, pixels))


def _step(run: Run, i: int, latents: torch.Tensor) -> Step:
    """Step i of a drawing with these latents, after ``before`` of its controls."""
    levels = alpha_bars(run.scheduler, run.timesteps)
    following = run.timesteps[i + 1] if i + 1 < run.n else None
    step = Step(run, i, run.timesteps[i], {IMAGE: latents}, levels[i], levels[i + 1], following)
    give_states(step, ("pinned", "derived"))
    for entry in run.plan.active(i):
        if implements(entry.control, "before"):
            entry.control.before(step)
    return step


def _inverse_scheduler(run: Run) -> Any:
    """diffusers' inverse of the run's DDIM, at the same timesteps whatever their spacing."""
    from diffusers import DDIMInverseScheduler

    inverse: Any = DDIMInverseScheduler.from_config(run.scheduler.config)
    inverse.num_inference_steps = run.scheduler.num_inference_steps
    inverse.timesteps = run.timesteps.flip(0)
    return inverse


def _check(plan: Plan) -> None:
    """Refuse controls that an inversion cannot walk through backwards.

    Raises:
        InputError: there is one; the message names it.
    """
    for entry in plan.controls:
        declared = entry.declaration
        reason = None
        if declared.strength is not None:
            reason = "chooses where a run starts, and an inversion ends there"
        elif declared.energy is not None:
            reason = "moves the latents by a gradient, which cannot be walked backwards"
        elif declared.repeats or any(claim.operand == "latents" for claim in declared.claims):
            reason = "changes the latents between steps, which cannot be walked backwards"
        elif any(state.advance == "solver" for state in declared.states):
            reason = "draws another picture along, which an inversion has not"
        if reason is not None:
            raise InputError(
                f"{entry.label} cannot act during an inversion: it {reason}. Leave it out here and give it to the run "
                "that starts from the inversion."
            )


def _warned(found: Inversion, min_db: float) -> Inversion:
    """Say which pictures do not come back."""
    if found.quality is None:
        return found
    lines = [
        f"{name} does not come back: {db:.1f} dB against the autoencoder's reconstruction, expected {min_db:g} or "
        "more. Use more steps, a prompt that says what it shows, a guidance_scale of 1, or method='null_text'."
        for name, db in zip(found.pictures, found.quality.autoencoder, strict=True)
        if not db >= min_db
    ]
    for line in lines:
        warnings.warn(line, stacklevel=3)
    return replace(found, warnings=tuple(lines))
