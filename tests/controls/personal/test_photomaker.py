"""PhotoMaker against the published computation, written out here, and what every control promises.

The reference takes only weights: token ids are expanded as published, row by row, with the trigger as a token; the
fusion is plain functions; the LoRA is added to the weights; the loop is by hand.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from controlroom.backbones.image_encoder import clip_pixels
from controlroom.backbones.photomaker import PhotoMakerModel, load_photomaker, photomaker_from_tensors
from controlroom.backbones.words import prompt_tokens
from controlroom.controls.guidance.attend_and_excite import AttendAndExcite
from controlroom.controls.personal.ip_adapter import IPAdapter
from controlroom.controls.personal.lora import LoRA
from controlroom.controls.personal.photomaker import PhotoMaker
from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.controls.stacked_prompt import StackedPrompt, person_in
from controlroom.core.errors import InputError, ModelError
from controlroom.sampling.pipeline import Pipeline
from tests.controls.loras import tiny_lora
from tests.controls.nets import tiny_controlnet, tiny_image_encoder, tiny_ip_adapter, tiny_photomaker
from tests.tiny import BACKBONES, tiny_sd1, tiny_sd2, tiny_tokenizer

DRAW: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent"}
PROMPTS = ["a red cat img on the beach", "the dog img"]


def picture(seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((40, 32), Image.Resampling.BICUBIC)


def faces(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 10, generator=torch.Generator().manual_seed(1))


# The published computation.


def norm(x: torch.Tensor, w: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: torch.Tensor, w: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def fused(word: torch.Tensor, identity: torch.Tensor, w: dict[str, torch.Tensor]) -> torch.Tensor:
    h = norm(torch.cat([word, identity], -1), w, "fuse_module.mlp1.layernorm")
    h = linear(F.gelu(linear(h, w, "fuse_module.mlp1.fc1")), w, "fuse_module.mlp1.fc2") + word
    g = norm(h, w, "fuse_module.mlp2.layernorm")
    h = linear(F.gelu(linear(g, w, "fuse_module.mlp2.fc1")), w, "fuse_module.mlp2.fc2") + h
    return norm(h, w, "fuse_module.layer_norm")


def identities(model: Any, pixels: torch.Tensor, vectors: torch.Tensor | None) -> torch.Tensor:
    """[n * tokens, width]"""
    w = model.encoder.state_dict()
    seen = model.encoder.vision_model(pixels)
    if vectors is None:
        parts = [linear(seen[1], w, "visual_projection")]
        if "visual_projection_2.weight" in w:
            parts.append(linear(seen[1], w, "visual_projection_2"))
        return torch.cat(parts, -1)
    q = {key.removeprefix("qformer_perceiver."): value for key, value in w.items() if key.startswith("qformer")}
    x = linear(F.gelu(linear(vectors, q, "token_proj.0")), q, "token_proj.2").reshape(len(vectors), 2, -1)
    x = norm(x, q, "token_norm")
    p = {key.removeprefix("perceiver_resampler."): value for key, value in q.items() if key.startswith("perceiver")}
    states, tokens = linear(seen[0], p, "proj_in"), x
    for i in range(2):
        a, b = norm(states, p, f"layers.{i}.0.norm1"), norm(tokens, p, f"layers.{i}.0.norm2")
        k, v = linear(torch.cat([a, b], 1), p, f"layers.{i}.0.to_kv").chunk(2, -1)
        query = linear(b, p, f"layers.{i}.0.to_q")
        # One head of 128.
        found = (query @ k.transpose(1, 2) / 128**0.5).softmax(-1) @ v
        tokens = linear(found, p, f"layers.{i}.0.to_out") + tokens
        h = linear(norm(tokens, p, f"layers.{i}.1.0"), p, f"layers.{i}.1.1")
        tokens = linear(F.gelu(h), p, f"layers.{i}.1.3") + tokens
    return (x + norm(linear(tokens, p, "proj_out"), p, "norm_out")).flatten(0, 1)


def expanded(tokenizer: Any, prompt: str, count: int) -> tuple[torch.Tensor, list[int]]:
    """Token ids with the class word ``count`` times, the trigger taken out."""
    known = copy.deepcopy(tokenizer)
    known.add_tokens(["img"], special_tokens=True)
    trigger = known.convert_tokens_to_ids("img")
    ids = known(prompt, padding="max_length", max_length=16, truncation=True).input_ids
    at = ids.index(trigger) - 1
    clean = [i for i in ids if i != trigger]
    clean = clean[:at] + [clean[at]] * count + clean[at + 1 :]
    clean = (clean + [known.pad_token_id] * 16)[:16]
    return torch.tensor([clean]), list(range(at, at + count))


def encoded(source: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    if getattr(source, "text_encoder_2", None) is None:
        return source.text_encoder(ids)[0], None
    first = source.text_encoder(ids, output_hidden_states=True)
    second = source.text_encoder_2(ids, output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second[0]


def reference(
    kind: str,
    version: int = 1,
    pictures: int = 2,
    merge: int = -1,
    rows: int = 1,
    apart: bool = False,
) -> torch.Tensor:
    """Four steps; steps up to ``merge`` see the text alone. ``apart``: each prompt has pictures of its own."""
    source = BACKBONES[kind]()
    model = tiny_photomaker(source, version)
    for key, down in model.lora.items():
        if key.endswith("down.weight"):
            part = key.split(".to_")[1].split("_lora")[0]
            path = key.removeprefix("unet.").split(".processor.")[0]
            layer = source.unet.get_submodule(path)
            layer = layer.to_out[0] if part == "out" else getattr(layer, f"to_{part}")
            layer.weight.data += model.lora[key.removesuffix("down.weight") + "up.weight"] @ down
    told = []
    for row in range(rows):
        seeds = range(row * pictures, (row + 1) * pictures) if apart else range(pictures)
        pixels = clip_pixels([picture(seed) for seed in seeds], 32)
        one = identities(model, pixels, faces(pictures) if version == 2 else None)
        ids, places = expanded(tiny_tokenizer(), PROMPTS[row], len(one))
        states, pooled = encoded(source, ids)
        states = states.clone()
        states[0, places] = fused(states[0, places], one, model.encoder.state_dict())
        told.append((states, pooled))
    pad = {"padding": "max_length", "max_length": 16, "return_tensors": "pt"}
    plain = [encoded(source, tiny_tokenizer()(p.replace(" img", ""), **pad).input_ids) for p in PROMPTS[:rows]]
    nothing = [encoded(source, tiny_tokenizer()("", **pad).input_ids)] * rows
    if kind == "sdxl":
        nothing = [(torch.zeros_like(a), torch.zeros_like(b)) for a, b in nothing if b is not None]
    scheduler = copy.deepcopy(source.scheduler)
    scheduler.set_timesteps(4)
    x = torch.cat([torch.randn(1, 4, 16, 16, generator=g) for g in generators(rows)])
    for i, t in enumerate(scheduler.timesteps):
        eps = []
        for parts in (nothing, plain if i <= merge else told):
            more: dict[str, Any] = {}
            if kind == "sdxl":
                sizes = torch.tensor([[32.0, 32, 0, 0, 32, 32]] * rows)
                more["added_cond_kwargs"] = {"text_embeds": torch.cat([p for _, p in parts]), "time_ids": sizes}  # type: ignore[arg-type]
            eps.append(source.unet(x, t, encoder_hidden_states=torch.cat([s for s, _ in parts]), **more).sample)
        x = scheduler.step(eps[0] + 4.0 * (eps[1] - eps[0]), t, x).prev_sample
    return x.detach()


def generators(rows: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(3 + i) for i in range(rows)]


def ours(kind: str, *controls: Any, rows: int = 1, **settings: Any) -> torch.Tensor:
    pipe = Pipeline.from_diffusers(BACKBONES[kind]())
    drawn = {"prompt": PROMPTS[:rows], "guidance_scale": 4.0, "scheduler": "ddim", **DRAW, **settings}
    return pipe(**drawn, controls=list(controls), generator=generators(rows)).images


def plain_of(kind: str, rows: int = 1) -> torch.Tensor:
    return ours(kind, rows=rows, prompt=[prompt.replace(" img", "") for prompt in PROMPTS[:rows]])


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", BACKBONES)
def test_latents_equal_the_published_computation(kind: str, version: int) -> None:
    theirs = reference(kind, version)
    model = tiny_photomaker(BACKBONES[kind](), version)
    told: dict[str, Any] = {"face_embeds": faces(2)} if version == 2 else {}
    mine = ours(kind, PhotoMaker(model, [picture(0), picture(1)], **told))
    assert torch.isfinite(theirs).all()
    assert (mine - theirs).abs().max() <= 1e-4 * theirs.std()
    assert (mine - plain_of(kind)).abs().max() > 0.05 * theirs.std()


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_delayed_merging_is_the_published_one(kind: str) -> None:
    """Steps 0 and 1 of four see the words alone, and the LoRA."""
    theirs = reference(kind, merge=1)
    mine = ours(kind, PhotoMaker(tiny_photomaker(BACKBONES[kind]()), [picture(0), picture(1)], start=0.5))
    assert (mine - theirs).abs().max() <= 1e-4 * theirs.std()
    assert (theirs - reference(kind)).abs().max() > 1e-2 * theirs.std()


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_batches_work_where_the_published_code_raises(kind: str) -> None:
    model, mine = tiny_photomaker(BACKBONES[kind]()), [[picture(0), picture(1)], [picture(2), picture(3)]]
    theirs = reference(kind, rows=2, apart=True)
    assert (ours(kind, PhotoMaker(model, mine), rows=2) - theirs).abs().max() <= 1e-4 * theirs.std()
    shared = ours(kind, PhotoMaker(model, mine[0]), rows=2)
    assert (shared - reference(kind, rows=2)).abs().max() <= 1e-4 * theirs.std()


def test_a_word_in_the_place_of_the_trigger() -> None:
    model, images = tiny_photomaker(tiny_sd1()), [picture(0), picture(1)]
    expected = ours("sd1", PhotoMaker(model, images))
    named = PhotoMaker(model, images, word="cat")
    assert torch.equal(ours("sd1", named, prompt="a red cat on the beach"), expected)
    other = PhotoMaker(model, images, trigger="ed")
    assert torch.equal(ours("sd1", other, prompt="a red cat ed on the beach"), expected)
    assert person_in("a man img, on the beach", "img", None, "")[0] == ["a", "man,", "on", "the", "beach"]


def test_files_in_every_order(tmp_path: Path) -> None:
    pipe = Pipeline.from_diffusers(tiny_sd1())
    images = [picture(0), picture(1)]
    for version in (1, 2):
        model = tiny_photomaker(tiny_sd1(), version)
        told: dict[str, Any] = {"face_embeds": faces(2)} if version == 2 else {}
        expected = ours("sd1", PhotoMaker(model, images, **told))
        model.save(tmp_path / f"v{version}.safetensors")
        flat = model.tensors()
        flat["id_encoder.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        # One head of 64 is what shapes say, so a mapping needs no metadata.
        nested = {"lora_weights": model.lora, "id_encoder": model.encoder.state_dict()}
        given: list[Any] = [tmp_path / f"v{version}.safetensors", dict(reversed(flat.items())), nested]
        for one in given:
            found = ours("sd1", PhotoMaker(one, images, **told))
            assert (found - expected).abs().max() <= 1e-4 * expected.std()
    again = load_photomaker(tmp_path / "v2.safetensors")
    assert all(torch.equal(v, again.tensors()[k]) for k, v in model.tensors().items())
    assert len(again.tensors()) == len(model.tensors())
    draw(pipe, PhotoMaker(tmp_path / "v1.safetensors", images))
    kept = len(pipe.backbone.kept)
    draw(pipe, PhotoMaker(tmp_path / "v1.safetensors", images))
    assert len(pipe.backbone.kept) == kept, "loaded once"


def test_with_the_others(tmp_path: Path) -> None:
    source = tiny_sd1()
    tiny_lora(tmp_path / "lora.safetensors", tiny_sd1)
    controls = [
        PhotoMaker(tiny_photomaker(source), [picture(0), picture(1)]),
        ControlNet(tiny_controlnet(source.unet), picture(1)),
        IPAdapter(tiny_ip_adapter(source.unet), picture(2), image_encoder=tiny_image_encoder(), scale=0.5),
        LoRA(tmp_path / "lora.safetensors", 0.8),
    ]
    whole = ours("sd1", *controls)
    torch.testing.assert_close(ours("sd1", *controls[::-1]), whole, atol=1e-4, rtol=1e-4)
    for i in range(1, 4):
        assert (ours("sd1", *controls[:i], *controls[i + 1 :]) - whole).abs().max() > 1e-3
    without = ours("sd1", *controls[1:], prompt="a red cat on the beach")
    assert (without - whole).abs().max() > 1e-3


def test_words_are_found_where_the_stack_has_moved_them() -> None:
    tokenizer = tiny_tokenizer()
    text = StackedPrompt.of("a red cat on the beach".split(), 2, lambda: 3, True)
    found = prompt_tokens(tokenizer, text)
    assert found.find("red") == ((2,),) and found.find("beach") == ((8,),)
    assert found.find("cat") == ((3,), (4,), (5,)), "each of the stack"
    late = StackedPrompt.of("a red cat on the beach".split(), 2, lambda: 3, False)
    with pytest.raises(InputError, match="no one place"):
        prompt_tokens(tokenizer, late)
    single = StackedPrompt.of("a red cat".split(), 2, lambda: 1, False)
    assert prompt_tokens(tokenizer, single).find("cat") == ((3,),)
    model, images = tiny_photomaker(tiny_sd1()), [picture(0), picture(1)]
    excite = AttendAndExcite(words=["beach"], iterations=2, thresholds={}, step_size=5.0)
    both = ours("sd1", PhotoMaker(model, images), excite)
    assert (both - ours("sd1", PhotoMaker(model, images))).abs().max() > 1e-3


def test_branches_that_are_told_the_same_are_told_the_person() -> None:
    from controlroom.controls.guidance.perturbed_attention_guidance import PerturbedAttentionGuidance

    model, images = tiny_photomaker(tiny_sd1()), [picture(0), picture(1)]
    pair = [PerturbedAttentionGuidance(2.0, layers=["mid"]), PhotoMaker(model, images, start=0.5)]
    assert torch.equal(ours("sd1", *pair), ours("sd1", *pair[::-1]))


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(tiny_sd1())


def draw(pipe: Pipeline, *controls: Any, **settings: Any) -> Any:
    return pipe(**{"prompt": PROMPTS[0], "seed": 5, **DRAW, **settings}, controls=list(controls))


@pytest.mark.parametrize("settings", [{"scale": 0.0}, {"start": 0.9, "end": 0.95}])
def test_neutral_is_absence_bit_for_bit_and_free(pipe: Pipeline, settings: dict[str, Any]) -> None:
    plain = draw(pipe, prompt="a red cat on the beach")
    neutral = draw(pipe, PhotoMaker(tiny_photomaker(tiny_sd1()), picture(), **settings))
    assert torch.equal(plain.images, neutral.images)
    assert plain.manifest["cost"] == neutral.manifest["cost"]
    assert list(neutral.manifest["dropped"]) == ["PhotoMaker"]


def test_small_scale_is_close_to_absence_and_costs_nothing(pipe: Pipeline) -> None:
    plain = draw(pipe, prompt="a red cat on the beach")
    small = draw(pipe, PhotoMaker(tiny_photomaker(tiny_sd1()), [picture(0), picture(1)], scale=1e-4))
    assert 0 < (plain.images - small.images).abs().max() < 1e-2 * plain.images.std()
    assert small.manifest["cost"] == plain.manifest["cost"]


BAD_INPUT: dict[str, tuple[dict[str, Any], str]] = {
    "no trigger": ({"trigger": "ed"}, "does not say who"),
    "no word": ({"trigger": "ed", "word": "frog"}, "'frog'"),
    "words": ({"trigger": "two words"}, "one word"),
    "too many": ({"images": [picture(i) for i in range(13)]}, "fewer pictures"),
    "none": ({"images": []}, "empty|Give"),
    "missing": ({"images": "nowhere.png"}, "does not exist"),
    "prompts": ({"images": [[picture()], [picture()]]}, "2 prompts"),
    "version": ({"face_embeds": faces(1)}, "version 1"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(pipe: Pipeline, case: str) -> None:
    settings, message = BAD_INPUT[case]
    with pytest.raises(InputError, match=message):
        draw(pipe, PhotoMaker(**{"model": tiny_photomaker(tiny_sd1()), "images": picture(), **settings}))


def test_bad_prompts(pipe: Pipeline) -> None:
    control = PhotoMaker(tiny_photomaker(tiny_sd1()), picture())
    for prompt in ("img on the beach", "a cat img and a dog img", "a cat"):
        with pytest.raises(InputError, match="PhotoMaker"):
            draw(pipe, control, prompt=prompt)
    with pytest.raises(InputError, match="face_embeds"):
        draw(pipe, PhotoMaker(tiny_photomaker(tiny_sd1(), 2), picture()))
    with pytest.raises(InputError, match="1 faces for 2|faces for 2"):
        draw(pipe, PhotoMaker(tiny_photomaker(tiny_sd1(), 2), [picture(), picture(1)], face_embeds=faces(1)))


def test_bad_models(pipe: Pipeline, tmp_path: Path) -> None:
    good = tiny_photomaker(tiny_sd1()).tensors()
    (tmp_path / "photomaker-v1.bin").write_bytes(b"")
    fuse = "id_encoder.fuse_module.layer_norm.weight"
    cases: list[tuple[Any, str]] = [
        (tmp_path, "controlroom convert"),
        ("photomaker-v1.bin", "pickle"),
        ({key: value for key, value in good.items() if key != fuse}, "fuse_module.layer_norm.weight"),
        ({**good, "id_encoder.extra": torch.ones(1)}, "extra"),
        ({**good, "other": torch.ones(1)}, "other"),
        ({**good, "lora_weights.strange": torch.ones(1)}, "strange"),
        ({**good, fuse: torch.ones(7)}, "layer_norm"),
        ({"lora_weights": {}}, "id_encoder"),
        ({"id_encoder": 3}, "tensors"),
        (tiny_photomaker(BACKBONES["sdxl"]()), "another base model"),
    ]
    for model, message in cases:
        with pytest.raises(ModelError, match=message):
            draw(pipe, PhotoMaker(model, picture()))
    other = tiny_photomaker(tiny_sd2(block_out_channels=(32, 64))).lora
    wrong = PhotoMakerModel(photomaker_from_tensors(good).encoder, other)
    with pytest.raises(ModelError, match="base model|fit"):
        draw(pipe, PhotoMaker(wrong, picture()))
    save_file({"a": torch.ones(1)}, str(tmp_path / "a.safetensors"))
    with pytest.raises(ModelError, match="not a PhotoMaker"):
        draw(pipe, PhotoMaker(tmp_path / "a.safetensors", picture()))
