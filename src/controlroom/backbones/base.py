"""What Stable Diffusion 1, 2 and XL have in common: the UNet, the autoencoder, and CLIP text states.

diffusers' models are used as they are; this file only calls them. Subclasses differ in how text becomes a condition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from controlroom.backbones import sites
from controlroom.core.branch import Condition, Layout
from controlroom.core.control import Residuals
from controlroom.core.errors import InputError, ModelError
from controlroom.core.sites import Site

# A prompt is cut to 77 tokens anyway; tokenizing megabytes of text first would look like a hang.
MAX_PROMPT_CHARACTERS = 20_000


@dataclass
class Backbone:
    """Components of a Stable Diffusion checkpoint.

    Attributes:
        unet, vae, scheduler: diffusers' models.
        text_encoder, tokenizer: the first CLIP; None where a checkpoint (SDXL refiner) has only the second.
        text_encoder_2, tokenizer_2: the second CLIP of SDXL.
        zero_empty_negative: SDXL's ``force_zeros_for_empty_prompt``.
        kept: what controls loaded from files, kept for the next run; see `loading.keep`.
    """

    name: ClassVar[str] = "sd1"

    unet: Any
    vae: Any
    scheduler: Any
    text_encoder: Any = None
    tokenizer: Any = None
    text_encoder_2: Any = None
    tokenizer_2: Any = None
    zero_empty_negative: bool = True
    kept: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        kind = getattr(self.unet.config, "encoder_hid_dim_type", None)
        if kind == "ip_image_proj":
            raise ModelError(
                "This UNet has an IP-Adapter loaded by diffusers. Call pipe.unload_ip_adapter() first and add "
                "cr.IPAdapter(...) to controls instead, so that it can be checked against the other controls."
            )
        if getattr(self.unet.config, "time_cond_proj_dim", None) is not None:
            raise ModelError(
                "This UNet embeds the guidance scale (a latent consistency model), which is not supported. "
                "Load the checkpoint it was distilled from."
            )

    # Where and in which precision.

    @property
    def device(self) -> torch.device:
        """Where the UNet runs; with offloading, where its hook will bring it."""
        return execution_device(self.unet)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the UNet."""
        return self.unet.dtype

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along one side of a latent pixel."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.vae.config.latent_channels)

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels that the network was trained at."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.pixels_per_latent, width * self.pixels_per_latent

    # Text.

    def tokenizers(self) -> tuple[Any, ...]:
        """CLIP tokenizers in the order in which their states are joined."""
        return tuple(t for t in (self.tokenizer, self.tokenizer_2) if t is not None)

    def encode_text(
        self,
        prompts: Sequence[str],
        negative: bool = False,
        size: tuple[int, int] | None = None,
        clip_skip: int | None = None,
        second: Sequence[str] | None = None,
    ) -> Condition:
        """Condition of one row for each prompt.

        Args:
            prompts: texts; more than 77 tokens are cut, as diffusers does.
            negative: whether they are what the branch without the prompt is told.
            size: height and width of the picture in pixels (SDXL is told it).
            clip_skip: layers of CLIP to leave out at the end; as in diffusers, negative prompts ignore it.
            second: texts for the second encoder of SDXL.
        """
        texts = [prompts] * len(self.tokenizers())
        if second is not None and self.tokenizer_2 is not None:
            texts[-1] = second
        ids = [self.tokenize(tokenizer, each) for tokenizer, each in zip(self.tokenizers(), texts, strict=True)]
        return self.encode_ids(ids, negative, size, clip_skip)

    def encode_ids(
        self,
        ids: Sequence[torch.Tensor],
        negative: bool = False,
        size: tuple[int, int] | None = None,
        clip_skip: int | None = None,
        keep: torch.Tensor | None = None,
    ) -> Condition:
        """Condition of token ids.

        Args:
            ids: [rows, 77] with start, end and padding, for each of `tokenizers`.
            negative: whether they are what the branch without the prompt is told.
            size: height and width of the picture in pixels (SDXL is told it).
            clip_skip: layers of CLIP to leave out at the end; negative prompts ignore it.
            keep: [rows, 77], 0 at tokens that the others do not see; None: all are seen.
        """
        encoder = self.text_encoder
        device = execution_device(encoder)
        tokens = ids[0].to(device)
        if getattr(encoder.config, "use_attention_mask", False):
            seen = tokens.ne(self.tokenizer.pad_token_id)
            keep = seen if keep is None else seen & keep.to(device).bool()
        arguments = {} if keep is None else {"attention_mask": keep.to(device)}
        if clip_skip is None or negative:
            states = encoder(tokens, **arguments)[0]
        else:
            hidden = encoder(tokens, output_hidden_states=True, **arguments).hidden_states
            # Intermediate states have not passed the last norm, which the UNet was trained with.
            norm = getattr(encoder, "text_model", encoder).final_layer_norm
            states = norm(hidden[-(clip_skip + 1)])
        return Condition(tokens=states.to(device=self.device, dtype=encoder.dtype))

    def text_widths(self) -> tuple[int, ...]:
        """Width of each text encoder's states, in the order in which they are joined."""
        return tuple(int(e.config.hidden_size) for e in (self.text_encoder, self.text_encoder_2) if e is not None)

    def tokenize(self, tokenizer: Any, prompts: Sequence[str]) -> torch.Tensor:
        """[B, 77] ids, cut and padded.

        Raises:
            InputError: a prompt that is not text, or longer than any prompt can be.
        """
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise InputError(f"A prompt must be text, got {type(prompt).__name__}.")
            if len(prompt) > MAX_PROMPT_CHARACTERS:
                raise InputError(
                    f"The prompt has {len(prompt)} characters; at most {MAX_PROMPT_CHARACTERS} are read, and only the "
                    f"first {tokenizer.model_max_length} tokens count. Shorten it."
                )
        texts = [expand_learned_words(prompt, tokenizer) for prompt in prompts]
        return tokenizer(
            texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids

    # Pictures.

    def posterior(self, pixels: torch.Tensor) -> Any:
        """[B, 3, H, W] in [-1, 1] -> diffusers' distribution (``mean``, ``std``) of latents that are not scaled."""
        with self._vae_in_float32():
            pixels = pixels.to(device=execution_device(self.vae), dtype=self.vae.dtype)
            return self.vae.encode(pixels).latent_dist

    def encode_picture(self, pixels: torch.Tensor, generator: Any = None) -> torch.Tensor:
        """[B, 3, H, W] in [-1, 1] -> scaled latents; the mean of the posterior, or a sample with ``generator``."""
        posterior = self.posterior(pixels)
        if generator is None:
            latents = posterior.mode()
        else:
            from controlroom.core.random import draw

            noise = draw(generator, posterior.mean.shape, posterior.mean.device, posterior.mean.dtype)
            latents = posterior.mean + posterior.std * noise
        shift, scale = self._latent_scale(latents)
        return ((latents - shift) * scale).to(device=self.device, dtype=self.dtype)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the sampler has them -> [B, 3, H, W] in [-1, 1], not clamped."""
        with self._vae_in_float32():
            shift, scale = self._latent_scale(latents)
            latents = (latents / scale + shift).to(device=execution_device(self.vae), dtype=self.vae.dtype)
            return self.vae.decode(latents, return_dict=False)[0]

    def _latent_scale(self, latents: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        config = self.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            return 0.0, float(config.scaling_factor)
        shape = (1, -1, 1, 1)
        return latents.new_tensor(mean).view(shape), config.scaling_factor / latents.new_tensor(std).view(shape)

    @contextmanager
    def _vae_in_float32(self) -> Iterator[None]:
        """SDXL's autoencoder overflows in float16; it is brought back to float16 afterwards."""
        needed = self.vae.dtype == torch.float16 and bool(getattr(self.vae.config, "force_upcast", False))
        if not needed or self.name != "sdxl":
            yield
            return
        self.vae.to(dtype=torch.float32)
        try:
            yield
        finally:
            self.vae.to(dtype=torch.float16)

    # The network.

    def attention_sites(self, hw: tuple[int, int]) -> tuple[Site, ...]:
        """Attention sites in the order of execution, for latents of that size."""
        return sites.attention_sites(self.unet, hw)

    def feature_sites(self, hw: tuple[int, int]) -> tuple[Site, ...]:
        """Feature sites in the order of execution, for latents of that size."""
        return sites.feature_sites(self.unet, hw)

    def predict(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        condition: Condition,
        residuals: Residuals | None = None,
        layout: Layout | None = None,
    ) -> torch.Tensor:
        """One forward of the UNet: [rows, channels, h, w], in the parameterisation it was trained in."""
        more: dict[str, Any] = {}
        if residuals is not None and residuals.down:
            more["down_block_additional_residuals"] = residuals.down
            more["mid_block_additional_residual"] = residuals.mid
        if residuals is not None and residuals.intrablock:
            # The UNet pops from the list it is given.
            more["down_intrablock_additional_residuals"] = list(residuals.intrablock)
        if condition.mask is not None:
            more["encoder_attention_mask"] = condition.mask
        added = self.added_conditions(condition)
        if added is not None:
            more["added_cond_kwargs"] = added
        return self.unet(sample, timestep, encoder_hidden_states=condition.tokens, return_dict=False, **more)[0]

    def added_conditions(self, condition: Condition) -> dict[str, torch.Tensor] | None:
        """What the UNet (and a ControlNet) is told beside the text; None for Stable Diffusion 1 and 2."""
        return None


def execution_device(module: Any) -> torch.device:
    """Where a module computes, also when accelerate's hooks bring it there only for the call."""
    # A run asks often, and walking through all parts takes milliseconds: only parts that are brought one by one, whose
    # parameters are elsewhere meanwhile (meta), need it.
    device = next(module.parameters()).device
    for part in module.modules() if device.type == "meta" else (module,):
        at = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if at is not None:
            return torch.device(at)
    return device


def expand_learned_words(prompt: str, tokenizer: Any) -> str:
    """A word learned as several vectors (``<cat>``, ``<cat>_1``, …) is written out as all of them."""
    added = tokenizer.added_tokens_encoder
    if not any(f"{word}_1" in added for word in added):
        return prompt
    for word in sorted(added, key=len, reverse=True):
        if f"{word}_1" in added and word in prompt:
            count = 1
            words = [word]
            while f"{word}_{count}" in added:
                words.append(f"{word}_{count}")
                count += 1
            if f"{word}_1" not in prompt:
                prompt = prompt.replace(word, " ".join(words))
    return prompt
