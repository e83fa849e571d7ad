"""`RunSpec`: a whole run as data.

Its JSON is the YAML file of the command line, the body of the REST call, the form of the studio, the manifest in a PNG
and the work item of a batch. Controls are told apart by ``type``; `controlroom.catalog` names their classes, and is
asked only when a run is read, so that this module imports no control.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
)

from controlroom.core import inputs
from controlroom.core.control import Control, describe
from controlroom.core.errors import InputError

OutputType = Literal["pil", "np", "pt", "latent"]


def _read_tensor(value: Any, field: ValidationInfo) -> Any:
    value = inputs.decode(value)
    if value is None:
        return None
    shape, kind = getattr(value, "shape", None), getattr(getattr(value, "dtype", None), "kind", "f")
    if not isinstance(shape, tuple) or not hasattr(value, "ndim") or kind not in "fiu":
        raise InputError(
            f"{field.field_name} must be a tensor (or an array of numbers), got {value!r:.80}. In a file, tensors "
            "stand as a saved run has them."
        )
    if not shape or 0 in shape:
        raise InputError(f"{field.field_name} is a tensor of the shape {tuple(shape)}, with nothing in it to use.")
    return inputs.as_tensor(value)


TensorInput = Annotated[Any, BeforeValidator(_read_tensor), PlainSerializer(inputs.encode, when_used="json")]
"""A tensor that travels with the run, given as one or as an array; see `controlroom.core.inputs`."""


def _read_control(value: Any) -> Any:
    if isinstance(value, Control):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise InputError(
            f"A control is a mapping with a type, such as {{type: controlnet, model: theatre/pose, image: pose.json}}; "
            f"got {value!r:.80}."
        )
    from controlroom.catalog import control_class

    return control_class(value["type"])(**{str(key): item for key, item in value.items()})


class RunSpec(BaseModel):
    """Everything a run depends on. Names are diffusers' where diffusers has one.

    Raises:
        InputError: an unknown or ill-typed field; the message names it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    version: Literal[1] = 1
    """Version of this schema."""
    model: str = "theatre"
    """``theatre``, a folder, a hub id, or a ``.safetensors`` file."""
    prompt: str | list[str] = ""
    prompt_2: str | list[str] | None = None
    """For the second text encoder of Stable Diffusion XL; None: the prompt."""
    negative_prompt: str | list[str] | None = None
    negative_prompt_2: str | list[str] | None = None
    controls: list[Annotated[SerializeAsAny[Control], BeforeValidator(_read_control)]] = Field(default_factory=list)
    height: int | None = Field(default=None, ge=1, le=16384)
    """Pixels; None: what the model was trained at."""
    width: int | None = Field(default=None, ge=1, le=16384)
    num_inference_steps: int = Field(default=50, ge=1, le=1000)
    scheduler: str | None = None
    """``ddim``, ``euler``, ``euler_a``, ``dpmpp_2m``, ``unipc``, …; None: the model's own."""
    guidance_scale: float = 7.5
    """Classifier-free guidance; at 1 or less there is none (and one row less)."""
    guidance_rescale: float = Field(default=0.0, ge=0.0, le=1.0)
    eta: float = Field(default=0.0, ge=0.0, le=1.0)
    """Of DDIM: 0 deterministic, 1 as DDPM."""
    clip_skip: int | None = Field(default=None, ge=0, le=64)
    num_images_per_prompt: int = Field(default=1, ge=1, le=4096)
    seed: int | None = Field(default=None, ge=0, le=2**63 - 1)
    """Image i uses seed + i; None: one is drawn and recorded."""
    generator_seed: int | list[int] | None = None
    """Set where the caller gave generators: their initial seeds, drawn from in diffusers' order."""
    prompt_embeds: TensorInput | None = None
    negative_prompt_embeds: TensorInput | None = None
    pooled_prompt_embeds: TensorInput | None = None
    negative_pooled_prompt_embeds: TensorInput | None = None
    latents: TensorInput | None = None
    """Initial noise [B, C, h, w], before the scheduler's scaling."""
    original_size: tuple[int, int] | None = None
    """Height and width that Stable Diffusion XL is told the training picture had; None: the size drawn."""
    crops_coords_top_left: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    output_type: OutputType = "pil"

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise InputError(describe("The run", error)) from error

    @property
    def num_images(self) -> int:
        """Number of pictures: prompts times ``num_images_per_prompt``."""
        count = len(self.prompt) if isinstance(self.prompt, list) else 1
        if self.prompt_embeds is not None:
            count = int(self.prompt_embeds.shape[0])
        return count * self.num_images_per_prompt

    def to_data(self) -> dict[str, Any]:
        """Plain data without what has its default value."""
        return self.model_dump(mode="json", exclude_defaults=True) | {"version": self.version}

    def to_json(self, indent: int | None = None) -> str:
        """JSON; `from_json` reads it back."""
        return json.dumps(self.to_data(), indent=indent, ensure_ascii=False)

    def to_yaml(self) -> str:
        """YAML; `from_yaml` reads it back."""
        import yaml

        return yaml.safe_dump(self.to_data(), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_data(cls, data: Any) -> Self:
        """A run out of plain data.

        Raises:
            InputError: not a mapping, or a field that does not fit.
        """
        if not isinstance(data, dict):
            raise InputError(f"A run is a mapping of settings (prompt, controls, …), got {type(data).__name__}.")
        return cls(**{str(key): value for key, value in data.items()})

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read JSON.

        Raises:
            InputError: not JSON, or a field that does not fit.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"The run is not JSON: {error}.") from error
        return cls.from_data(data)

    @classmethod
    def from_yaml(cls, text: str | bytes) -> Self:
        """Read YAML (and so JSON). No object is ever constructed from it.

        Raises:
            InputError: not YAML, or a field that does not fit.
        """
        import yaml

        try:
            data = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise InputError(f"The run is not YAML: {' '.join(str(error).split())}.") from error
        return cls.from_data(data)
