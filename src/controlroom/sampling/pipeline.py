"""`Pipeline`: a loaded model that one calls like a diffusers pipeline, with a list of controls."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch

from controlroom.backbones.base import Backbone, execution_device
from controlroom.backbones.loading import backbone_from_components, load_backbone
from controlroom.core.control import Control
from controlroom.core.errors import InputError, ModelError
from controlroom.core.result import RunResult
from controlroom.core.run import Run
from controlroom.core.spec import RunSpec
from controlroom.core.step import Step
from controlroom.sampling.execute import Generators, callback_tensors, plan_run, run_spec, to_images
from controlroom.sampling.explain import Explanation, explain_plan
from controlroom.sampling.loop import OnStep
from controlroom.sampling.manifest import read_recorded

Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


class Pipeline:
    """A Stable Diffusion 1, 2 or XL model. Calls leave it as they found it; one call runs at a time.

    Example:
        ``Pipeline.from_pretrained("theatre")("a woman with red hair", seed=7).images[0].save("anna.png")``
    """

    def __init__(self, backbone: Backbone, source: Any, model: str) -> None:
        self.backbone = backbone
        self.model = model
        self._source = source
        self._lock = threading.RLock()
        self._offload_hooks: list[Any] = []
        # The name that diffusers' callbacks set to stop a run.
        self._interrupt = False

    # Where it comes from.

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] = "theatre",
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        revision: str | None = None,
        config: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Load a model.

        Args:
            model: ``theatre`` (in the package), ``theatre/instruct_pix2pix`` (the same with the network that follows
                instructions), a folder in diffusers' layout, a hub id, or a ``.safetensors`` file.
            torch_dtype: precision; None: float32. ``dtype`` is another name for it.
            variant: files of a variant, e.g. ``fp16``.
            revision: branch, tag or commit on the hub.
            config: for a single file, the folder in diffusers' layout with its configurations and tokenizers; None:
                those of the hub repository it was made from, which must have been downloaded. Only a hub id as model
                is ever fetched.

        Raises:
            ModelError: nothing there, a part, key or vocabulary is missing, or it is a pickle.
        """
        backbone, source = load_backbone(model, torch_dtype or dtype, variant, revision, config)
        return cls(backbone, source, os.fspath(model))

    @classmethod
    def from_diffusers(cls, pipeline: Any) -> Self:
        """Use the components of a loaded diffusers pipeline as they are; nothing is copied.

        Raises:
            ModelError: not a Stable Diffusion 1, 2 or XL pipeline, or a component is missing.
        """
        name = str(getattr(getattr(pipeline, "config", None), "_name_or_path", "") or "")
        return cls(backbone_from_components(pipeline), pipeline, name)

    def to_diffusers(self) -> Any:
        """The diffusers pipeline that holds the components, untouched."""
        return self._source

    # Where it runs.

    @property
    def unet(self) -> Any:
        """The network."""
        return self.backbone.unet

    @property
    def vae(self) -> Any:
        """The autoencoder."""
        return self.backbone.vae

    @property
    def scheduler(self) -> Any:
        """The scheduler whose configuration runs start from."""
        return self.backbone.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self.backbone.scheduler = scheduler

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the network."""
        return self.backbone.dtype

    def _modules(self) -> list[Any]:
        b = self.backbone
        return [m for m in (b.text_encoder, b.text_encoder_2, b.unet, b.vae) if m is not None]

    def to(self, *args: torch.device | str | torch.dtype, **kwargs: Any) -> Self:
        """Move to a device, a precision, or both, as `torch.nn.Module.to`.

        Raises:
            InputError: torch knows no such device or precision, or the model is offloaded.
            ModelError: the device is not in this machine.
        """
        if self._offload_hooks:
            raise InputError("The model is offloaded to the CPU between uses; load it again to move it as a whole.")
        for given in (*args, *kwargs.values()):
            if isinstance(given, str | torch.device):
                _device(given)
        for module in self._modules():
            module.to(*args, **kwargs)
        return self

    def enable_model_cpu_offload(self, device: torch.device | str = "cuda") -> Self:
        """Keep components on the CPU and bring each to ``device`` only while it computes.

        Raises:
            InputError: torch knows no such device.
            ModelError: the device is not in this machine.
        """
        from accelerate import cpu_offload_with_hook

        target = _device(device)
        if self._offload_hooks:
            return self
        hook = None
        for module in self._modules():
            module.to("cpu")
            _, hook = cpu_offload_with_hook(module, target, prev_module_hook=hook)
            self._offload_hooks.append(hook)
        return self

    def cancel(self) -> None:
        """Stop the run under way before its next step; it returns what there is, with ``cancelled`` set."""
        self._interrupt = True

    # Running.

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        controls: Sequence[Control] = (),
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        latents: torch.Tensor | None = None,
        generator: Generators | None = None,
        seed: int | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        *,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        num_images_per_prompt: int = 1,
        guidance_rescale: float = 0.0,
        scheduler: str | None = None,
        eta: float = 0.0,
        clip_skip: int | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        prompt_2: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
    ) -> RunResult:
        """Draw pictures. Names and meanings are diffusers'; ``controls`` is the list of methods that act.

        Args:
            prompt: text, or one for each picture.
            negative_prompt: what the branch without the prompt is told.
            controls: in the order in which their additions are made.
            height: pixels; None: what the model was trained at.
            width: pixels.
            num_inference_steps: solver steps.
            guidance_scale: classifier-free guidance; at 1 or less there is none.
            latents: initial noise [B, C, h, w], before the scheduler's scaling.
            generator: one for the batch or one for each picture; draws follow diffusers' order.
            seed: picture i uses seed + i; None (without a generator): one is drawn and recorded.
            output_type: ``pil``, ``np``, ``pt`` or ``latent``.
            callback_on_step_end: ``f(pipe, i, t, tensors) -> tensors``, as in diffusers.

        Raises:
            InputError: an argument that does not fit.
            ConflictError: two controls that cannot run together.
            ModelError: weights that do not fit this model.
        """
        reasons: list[str] = []
        spec = RunSpec(
            model=self.model,
            prompt=prompt if prompt is not None else "",
            prompt_2=prompt_2,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            controls=_controls(controls),
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            scheduler=scheduler,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            eta=eta,
            clip_skip=clip_skip,
            num_images_per_prompt=num_images_per_prompt,
            seed=seed,
            generator_seed=_recorded_seeds(generator, reasons),
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            latents=latents,
            original_size=original_size,
            crops_coords_top_left=crops_coords_top_left,
            target_size=target_size,
            output_type=output_type,
        )
        if callback_on_step_end is not None:
            reasons.append("a callback may have changed the run")
        names = getattr(callback_on_step_end, "tensor_inputs", None) or callback_on_step_end_tensor_inputs
        return self.run(spec, generator, callback_on_step_end, tuple(names), tuple(reasons))

    def run(
        self,
        spec: RunSpec,
        generator: Generators | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
        reasons: tuple[str, ...] = (),
    ) -> RunResult:
        """Execute a specification on this model (whatever model it names)."""
        with self._lock:
            self._interrupt = False

            def on_step(run: Run) -> OnStep:
                def called(i: int, t: torch.Tensor, step: Step) -> None:
                    assert callback_on_step_end is not None
                    tensors = callback_tensors(run, step, callback_on_step_end_tensor_inputs)
                    _apply(run, step, callback_on_step_end(self, i, t, dict(tensors)), tensors)

                return called

            try:
                return run_spec(
                    self.backbone,
                    spec,
                    generator,
                    on_step if callback_on_step_end is not None else None,
                    lambda: self._interrupt,
                    reasons,
                )
            finally:
                if self._offload_hooks:
                    self._offload_hooks[-1].offload()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        """Latents [B, C, h, w] as the sampler leaves them (``result.states``) -> pictures, as a run gives them.

        Raises:
            InputError: not such latents, or an unknown ``output_type``.
        """
        if not isinstance(latents, torch.Tensor) or latents.ndim != 4:
            raise InputError("decode takes latents, a tensor [images, channels, height, width].")
        if output_type not in ("pil", "np", "pt"):
            raise InputError(f"output_type is pil, np or pt, got {output_type!r}.")
        return to_images(self.backbone.decode(latents), output_type, [{} for _ in range(latents.shape[0])])

    def unload(self) -> None:
        """Let go of what controls read from files, which is kept for the next run; the memory is free again.

        Nothing else needs to be undone: a run leaves the model as it was.
        """
        with self._lock:
            self.backbone.kept.clear()

    def explain(self, spec: RunSpec) -> Explanation:
        """What a run would do: branches, rows and passes for each step, claims, warnings. Nothing is computed."""
        return explain_plan(plan_run(self.backbone, spec).plan, self.backbone)


def _apply(run: Run, step: Step, returned: dict[str, Any] | None, given: dict[str, Any]) -> None:
    """Take back what a callback changed."""
    returned = returned or {}
    latents = returned.get("latents")
    if latents is not None:
        step.latents["image"] = latents
    for name, branch in (("prompt_embeds", "cond"), ("negative_prompt_embeds", "uncond")):
        tokens = returned.get(name)
        if tokens is not None and tokens is not given.get(name) and branch in run.plan.branches:
            from dataclasses import replace

            run.set_condition(branch, replace(step.condition(branch), tokens=tokens))


def _device(name: torch.device | str) -> torch.device:
    """A device that is there."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"{name!r} is no device. Give cpu, cuda, cuda:1, mps or another that torch knows.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"There is no GPU for {str(device)!r} in this machine. Run on the CPU.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"{str(device)!r} is not in this machine: {' '.join(str(error).split())[:200]}") from error
    return device


def _controls(controls: Any) -> list[Control]:
    if isinstance(controls, Control):
        raise InputError("controls is a list; put the control in brackets.")
    listed = list(controls)
    for control in listed:
        if not isinstance(control, Control | dict):
            raise InputError(
                f"controls takes control objects, such as cr.ControlNet(...); got {type(control).__name__}."
            )
    return listed


def _recorded_seeds(generator: Any, reasons: list[str]) -> int | list[int] | None:
    """Initial seeds of generators that nothing was drawn from yet; else the run cannot be drawn again."""
    if generator is None:
        return None
    listed = [generator] if isinstance(generator, torch.Generator) else list(generator)
    for one in listed:
        if not isinstance(one, torch.Generator):
            raise InputError(f"generator takes torch.Generator objects; got {type(one).__name__}.")
        fresh = torch.Generator(one.device).manual_seed(one.initial_seed())
        if one.device.type != "cpu" or not torch.equal(fresh.get_state(), one.get_state()):
            reasons.append("the generator had been drawn from before, or is not on the CPU")
            return None
    seeds = [one.initial_seed() for one in listed]
    return seeds[0] if isinstance(generator, torch.Generator) else seeds


def execute(spec: RunSpec, pipeline: Pipeline | None = None) -> RunResult:
    """Run a specification; without a pipeline its model is loaded first. Stateless, so any queue can call it.

    Raises:
        ControlRoomError: whatever is wrong with the run; see `Pipeline.__call__`.
    """
    return (pipeline or Pipeline.from_pretrained(spec.model)).run(spec)


def explain(spec: RunSpec, pipeline: Pipeline | None = None) -> Explanation:
    """What a run would do; without a pipeline its model is loaded first."""
    return (pipeline or Pipeline.from_pretrained(spec.model)).explain(spec)


def replay(path: str | os.PathLike[str], pipeline: Pipeline | None = None) -> Any:
    """Draw a PNG of controlroom again: the same pixels on the same machine.

    Returns:
        The picture; saved as PNG it is the same file, byte for byte.

    Raises:
        InputError: the PNG carries no run, or an input of it has changed.
    """
    recorded = read_recorded(path)
    result = execute(recorded.spec.model_copy(update={"output_type": "pil"}), pipeline)
    return result.images[recorded.index]


__all__ = ["Pipeline", "execute", "execution_device", "explain", "replay"]
