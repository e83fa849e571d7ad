"""BLIP-Diffusion against diffusers' pipeline, its encoder against transformers' parts, and what it promises."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from controlroom.backbones.subject_encoder import EncoderShape, SubjectEncoder
from controlroom.backbones.subject_reader import SubjectReader, load_subject_reader, save_subject_reader
from controlroom.backbones.words import prompt_tokens
from controlroom.controls.guidance.attend_and_excite import AttendAndExcite
from controlroom.controls.personal.blip_diffusion import CACHE, KEY, BLIPDiffusion
from controlroom.core.errors import InputError, ModelError
from controlroom.sampling.pipeline import Pipeline
from tests.controls.nets import tiny_subject_reader, write_subject_reader
from tests.tiny import BACKBONES, LENGTH, tiny_sd1, tiny_tokenizer

DRAW: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}


def picture(seed: int = 0, size: tuple[int, int] = (50, 40)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


# The encoder.

FORMER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "encoder_hidden_size": 24,
    "vocab_size": 30,
    "max_position_embeddings": 12,
    "cross_attention_frequency": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def published_encoder() -> SubjectEncoder:
    torch.manual_seed(3)
    data = {"qformer_config": FORMER, "vision_config": VISION, "num_query_tokens": 4, "model_type": "blip-2"}
    encoder = SubjectEncoder(EncoderShape.model_validate(data)).eval().requires_grad_(False)
    for parameter in encoder.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter) if parameter.ndim == 1 else 0.1 * torch.randn_like(parameter))
    return encoder


@torch.no_grad()
def by_transformers(encoder: SubjectEncoder, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The published encoder put together from transformers' own parts."""
    from transformers import Blip2QFormerConfig, Blip2QFormerModel, Blip2VisionConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2EncoderLayer

    state = encoder.state_dict()

    def part(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    eager: dict[str, Any] = {"attn_implementation": "eager"}
    vision: Any = Blip2VisionConfig(**{**VISION, **eager})
    patches = torch.nn.functional.conv2d(pixels, state["visual_encoder.embeddings.patch_embedding.weight"], stride=8)
    first = state["visual_encoder.embeddings.class_embedding"].expand(len(pixels), -1, -1)
    hidden = torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1)
    hidden = norm("visual_encoder.pre_layernorm", hidden + state["visual_encoder.embeddings.position_embedding"], 1e-5)
    for number in range(VISION["num_hidden_layers"]):
        layer = Blip2EncoderLayer(vision).eval()
        layer.load_state_dict(part(f"visual_encoder.encoder.layers.{number}."))
        hidden = layer(hidden)
    seen = norm("visual_encoder.post_layernorm", hidden, 1e-5)

    config = Blip2QFormerConfig(**{**FORMER, **eager, "use_qformer_text_input": True})
    model = Blip2QFormerModel(config).eval()
    own = {f"encoder.{key}": value for key, value in part("encoder.").items()}
    own |= {f"layernorm.{key}": value for key, value in part("embeddings.LayerNorm.").items()}
    model.load_state_dict(own)
    words = state["embeddings.word_embeddings.weight"][ids]
    words = words + state["embeddings.position_embeddings.weight"][: ids.shape[1]]
    queries = state["query_tokens"].expand(len(ids), -1, -1)
    kept = torch.cat([torch.ones(len(ids), 4), mask], dim=1)
    found = model(
        torch.cat([queries, words], dim=1), query_length=4, attention_mask=kept, encoder_hidden_states=seen
    ).last_hidden_state[:, :4]
    inner = norm("proj_layer.LayerNorm", found, 1e-12) @ state["proj_layer.dense1.weight"].T
    inner = inner + state["proj_layer.dense1.bias"]
    inner = inner * torch.sigmoid(1.702 * inner)
    return found + inner @ state["proj_layer.dense2.weight"].T + state["proj_layer.dense2.bias"]


def test_the_encoder_is_that_of_transformers_parts() -> None:
    encoder, generator = published_encoder(), torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    ids = torch.randint(1, 30, (2, 5), generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    expected = by_transformers(encoder, pixels, ids, mask.float())
    found = encoder(pixels, ids, mask)
    assert (found - expected).abs().max() <= 1e-4 * expected.std()
    assert (encoder(pixels.flip(0), ids, mask) - expected).abs().max() > 1e-2
    assert (encoder(pixels, ids.flip(1), mask) - expected).abs().max() > 1e-2


def test_a_published_folder_is_read(tmp_path: Path) -> None:
    """config.json and keys of `qformer/`, with BERT's tokenizer and stored position ids."""
    import json

    from transformers import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig

    encoder = published_encoder()
    place = tmp_path / "qformer"
    place.mkdir()
    config = Blip2Config(
        qformer_config=Blip2QFormerConfig(**FORMER), vision_config=Blip2VisionConfig(**VISION), num_query_tokens=4
    ).to_dict()
    config.pop("text_config", None)
    (place / "config.json").write_text(json.dumps(config, default=str))
    stored = {**encoder.state_dict(), "embeddings.position_ids": torch.arange(12)[None]}
    save_file(stored, place / "model.safetensors")
    (place / "tokenizer").mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog", "cat", "##fish"]
    (place / "tokenizer/vocab.txt").write_text("\n".join(vocabulary) + "\n")
    pipe = Pipeline.from_diffusers(tiny_sd1())
    reader = load_subject_reader(tmp_path, pipe.backbone)
    ids, mask = reader.words(["dog", "catfish"])
    assert ids.tolist() == [[2, 5, 3, 0], [2, 6, 7, 3]] and mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert reader.side == 32
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(reader(pixels, ["dog", "catfish"]), encoder(pixels, ids, mask))
    drawn = draw(pipe, BLIPDiffusion(tmp_path, picture(), "dog")).images
    assert (drawn - draw(pipe).images).abs().max() > 1e-2
    # The whole model, whose text encoder and picture processor are of classes of its own.
    plain = tiny_sd1()
    plain.save_pretrained(str(tmp_path))
    index = json.loads((tmp_path / "model_index.json").read_text())
    index |= {"_class_name": "BlipDiffusionPipeline", "mean": [0.5], "std": [0.5], "ctx_begin_pos": 2}
    parts = {"text_encoder": "ContextCLIPTextModel", "qformer": "Blip2QFormerModel"}
    index |= {part: ["blip_diffusion", name] for part, name in {**parts, "image_processor": "Blip"}.items()}
    (tmp_path / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if "safety" not in k}))
    (tmp_path / "image_processor").mkdir()
    file = tmp_path / "text_encoder/model.safetensors"
    stored = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(file).items()}
    save_file({**stored, "text_model.embeddings.position_ids": torch.arange(LENGTH)[None]}, file, {"format": "pt"})
    whole = Pipeline.from_pretrained(str(tmp_path))
    again = draw(whole, BLIPDiffusion(tmp_path, picture(), "dog")).images
    assert (again - drawn).abs().max() < 1e-4 * drawn.std()


# The control against diffusers' pipeline.


class Given(torch.nn.Module):
    """In the place of the pipeline's Q-Former, which this version of transformers cannot run: gives its vectors."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors, self.config = vectors, SimpleNamespace(num_query_tokens=vectors.shape[1])

    def forward(self, image_input: Any, text_input: Any, return_dict: bool) -> Tensor:
        return self.vectors.expand(len(text_input), -1, -1)


def theirs(kind: str, vectors: Tensor, prompt: list[str], target: str, **settings: Any) -> Tensor:
    """Latents of diffusers' pipeline."""
    from diffusers.pipelines.deprecated.blip_diffusion import BlipDiffusionPipeline
    from diffusers.pipelines.deprecated.blip_diffusion.blip_image_processing import BlipImageProcessor
    from diffusers.pipelines.deprecated.blip_diffusion.modeling_ctx_clip import ContextCLIPTextModel

    plain = BACKBONES[kind]()
    encoder = ContextCLIPTextModel(plain.text_encoder.config).eval()
    own = plain.text_encoder.state_dict()
    names = {key: key if key in own else key.removeprefix("text_model.") for key in encoder.state_dict()}
    encoder.load_state_dict({key: own[name] for key, name in names.items() if name in own}, strict=False)
    inside = encoder.text_model.encoder
    run = inside.forward

    def causal(*args: Any, causal_attention_mask: Any = None, attention_mask: Any = None, **named: Any) -> Any:
        """transformers 5 reads one mask; the argument of old versions would be ignored, and nothing masked."""
        return run(*args, attention_mask=causal_attention_mask, **named)

    inside.forward = causal

    class Reference(BlipDiffusionPipeline):
        _execution_device = torch.device("cpu")  # pyright: ignore[reportAssignmentType]

    pipe = Reference(
        tokenizer=plain.tokenizer,
        text_encoder=encoder,
        vae=plain.vae,
        unet=plain.unet,
        scheduler=plain.scheduler,
        qformer=Given(vectors),  # type: ignore[arg-type]
        image_processor=BlipImageProcessor(size={"height": 32, "width": 32}),
    )
    pipe.set_progress_bar_config(disable=True)
    latents: list[Tensor] = []
    decode = plain.vae.decode
    plain.vae.decode = lambda x, **named: latents.append(x * plain.vae.config.scaling_factor) or decode(x, **named)
    drawn = {"guidance_scale": 5.0, "num_inference_steps": 3, "height": 32, "width": 32, "output_type": "pt"}
    pipe(
        prompt,
        picture(),
        ["dog"] * len(prompt),
        [target] * len(prompt),
        generator=torch.Generator().manual_seed(3),
        **{**drawn, **settings},
    )
    return latents[0]


@pytest.mark.parametrize(
    ("kind", "target", "prompts", "settings"),
    [
        ("sd1", "dog", ["on the beach"], {}),
        ("sd1", "cat", ["with a hat", "red"], {"prompt_reps": 1}),
        ("sd1", "dog", ["on the beach"], {"neg_prompt": "blue night", "prompt_reps": 3}),
        ("sd1", "dog", ["on the beach"], {"guidance_scale": 1.0}),
    ],
)
def test_latents_equal_diffusers(kind: str, target: str, prompts: list[str], settings: dict[str, Any]) -> None:
    reader = tiny_subject_reader()
    from controlroom.backbones.image_encoder import clip_pixels

    pixels = clip_pixels([picture().resize((32, 32), Image.Resampling.BICUBIC)], 32)
    reference = theirs(kind, reader(pixels, ["dog"]), prompts, target, **settings)
    pipe = Pipeline.from_diffusers(BACKBONES[kind]())
    mine: dict[str, Any] = {"guidance_scale": settings.get("guidance_scale", 5.0), **DRAW}
    mine["negative_prompt"] = settings.get("neg_prompt")
    control = BLIPDiffusion(reader, picture(), "dog", target, repeat=settings.get("prompt_reps", 20))
    drawn, plain = (
        pipe(prompts, controls=controls, generator=torch.Generator().manual_seed(3), **mine).images
        for controls in ([control], [])
    )
    assert torch.isfinite(reference).all()
    assert (drawn - reference).abs().max() <= 1e-4 * reference.std()
    assert (drawn - plain).abs().max() > 0.05 * reference.std()


# What every control promises.


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(tiny_sd1())


@pytest.fixture(scope="module")
def folder(pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_subject_reader(tiny_sd1(), tmp_path_factory.mktemp("subject"))


def draw(pipe: Pipeline, *controls: Any, **settings: Any) -> Any:
    return pipe(**{"prompt": "on the beach", "seed": 5, **DRAW, **settings}, controls=list(controls))


def test_neutral_is_absence_and_small_scales_are_close(pipe: Pipeline, folder: Path) -> None:
    plain, neutral = draw(pipe), draw(pipe, BLIPDiffusion(folder, picture(), "dog", scale=0.0))
    assert torch.equal(plain.images, neutral.images)
    assert plain.manifest["cost"] == neutral.manifest["cost"]
    small, whole = (draw(pipe, BLIPDiffusion(folder, picture(), "dog", scale=s)) for s in (1e-4, 1.0))
    assert 0 < (plain.images - small.images).abs().max() < 1e-2 * plain.images.std()
    assert (plain.images - whole.images).abs().max() > 1e-2
    assert whole.manifest["cost"] == plain.manifest["cost"]


def test_folder_and_object_are_the_same_and_pictures_are_averaged(pipe: Pipeline, folder: Path) -> None:
    one = draw(pipe, BLIPDiffusion(folder, picture(), "dog")).images
    again = draw(pipe, BLIPDiffusion(tiny_subject_reader(), picture(), "dog")).images
    assert (one - again).abs().max() < 1e-4 * one.std()
    twice = draw(pipe, BLIPDiffusion(folder, [picture(), picture()], "dog")).images
    assert (one - twice).abs().max() < 1e-4 * one.std()
    for other in ({"image": [picture(), picture(1)]}, {"subject": "cat", "target": "dog"}, {"target": "cat"}):
        changed = draw(pipe, BLIPDiffusion(**{"model": folder, "image": picture(), "subject": "dog", **other})).images
        assert (one - changed).abs().max() > 1e-3


def test_pictures_of_each_prompt(pipe: Pipeline, folder: Path) -> None:
    pictures = [[picture(0)], [picture(1)]]
    settings = {"prompt": ["on the beach", "red"], "scheduler": "ddim"}
    together = draw(pipe, BLIPDiffusion(folder, pictures, "dog"), **settings).images
    for i, prompt in enumerate(settings["prompt"]):
        alone = draw(pipe, BLIPDiffusion(folder, pictures[i], "dog"), prompt=prompt, seed=5 + i).images
        assert (together[i : i + 1] - alone).abs().max() < 1e-4 * max(1.0, alone.std().item())


def test_words_are_found_behind_the_subject(pipe: Pipeline, folder: Path) -> None:
    said = BLIPDiffusion(folder, picture(), "dog", repeat=1)._said("with a red hat")
    assert said == "a dog with a red hat"
    tokens = prompt_tokens(tiny_tokenizer(), said)
    assert tokens.find("dog") == ((5,),) and tokens.find("red hat") == ((8, 9),)
    assert BLIPDiffusion(folder, picture(), "dog", repeat=1)._said("a dog on the beach") == "a dog on the beach"
    excited = AttendAndExcite(words=["dog"], iterations=2, thresholds={}, step_size=5.0)
    both = draw(pipe, BLIPDiffusion(folder, picture(), "dog", repeat=1), excited).images
    assert torch.isfinite(both).all()
    long = BLIPDiffusion(folder, picture(), "dog")._said("with a red hat")
    assert len(prompt_tokens(tiny_tokenizer(), long).ids) == LENGTH


def test_a_fit_draws_its_subject_without_a_picture(pipe: Pipeline, folder: Path, tmp_path: Path) -> None:
    other = tiny_sd1(seed=4)
    other.unet.save_pretrained(tmp_path / "unet")
    (tmp_path / CACHE).parent.mkdir()
    vectors = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    save_file({KEY: vectors}, tmp_path / CACHE)
    before = draw(pipe).images
    fitted = draw(pipe, BLIPDiffusion(tmp_path, subject="dog")).images
    assert torch.equal(draw(pipe).images, before)
    whole = Pipeline.from_diffusers(other)
    whole.backbone.text_encoder = pipe.backbone.text_encoder
    (tmp_path / "unet/diffusion_pytorch_model.safetensors").rename(tmp_path / "kept")
    (tmp_path / "unet/config.json").unlink()
    (tmp_path / "unet").rmdir()
    assert (draw(whole, BLIPDiffusion(tmp_path, subject="dog")).images - fitted).abs().max() < 1e-4 * fitted.std()


BAD_INPUT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no picture": ({"image": None}, {}, "give image"),
    "no word": ({"subject": " "}, {}, "subject"),
    "no word at all": ({"subject": ""}, {}, "subject"),
    "missing": ({"image": "nowhere.png"}, {}, "does not exist"),
    "empty": ({"image": []}, {}, "empty"),
    "prompts": ({"image": [[picture()], [picture()]]}, {}, "2 prompts"),
    "embeds": ({}, {"prompt": None, "prompt_embeds": torch.zeros(1, LENGTH, 32)}, "as text"),
    "repeat": ({"repeat": 0}, {}, "repeat"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(pipe: Pipeline, folder: Path, case: str) -> None:
    settings, run, message = BAD_INPUT[case]
    with pytest.raises(InputError, match=message):
        draw(pipe, BLIPDiffusion(**{"model": folder, "image": picture(), "subject": "dog", **settings}), **run)


def test_bad_models(pipe: Pipeline, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    wide = tmp_path / "wide"
    save_subject_reader(tiny_subject_reader(48), wide)
    broken = tmp_path / "broken"
    save_subject_reader(tiny_subject_reader(), broken)
    tensors = dict(tiny_subject_reader().encoder.state_dict())
    alone = tmp_path / "alone"
    save_subject_reader(tiny_subject_reader(), alone)
    for file in (alone / "image_encoder").iterdir():
        file.unlink()
    cases: list[tuple[Any, dict[str, Tensor] | None, str]] = [
        (tmp_path / "empty", None, "config.json"),
        (wide, None, "48 wide, this model's words 32"),
        (alone, None, "image encoder"),
        (broken, {k: v for k, v in tensors.items() if k != "query_tokens"}, "lacks 'query_tokens'"),
        (broken, {**tensors, "extra": torch.zeros(1)}, "'extra'"),
        (pipe.unet, None, "UNet2DConditionModel"),
    ]
    for model, stored, message in cases:
        if stored is not None:
            save_file(stored, model / "model.safetensors")
        with pytest.raises(ModelError, match=message):
            draw(pipe, BLIPDiffusion(model, picture(), "dog"))
    with pytest.raises(ModelError, match="CLIPVisionModelWithProjection"):
        SubjectReader(tiny_subject_reader().encoder, tiny_tokenizer())
