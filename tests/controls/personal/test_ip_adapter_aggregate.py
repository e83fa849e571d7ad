"""Several pictures of one subject: attention between them against the formula and diffusers, files, and bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from controlroom.backbones.image_aggregator import (
    Aggregate,
    AggregatorSettings,
    PictureAttention,
    aggregated,
    chosen_pictures,
)
from controlroom.backbones.image_encoder import clip_pixels, image_features
from controlroom.backbones.image_projection import LinearProjection
from controlroom.backbones.ip_adapter import (
    IPAdapterModel,
    adapter_from_tensors,
    load_ip_adapter,
    save_ip_adapter,
)
from controlroom.controls.personal.ip_adapter import IPAdapter
from controlroom.core.errors import InputError, ModelError
from controlroom.sampling.pipeline import Pipeline
from tests.controls.nets import tiny_image_encoder, tiny_ip_adapter
from tests.tiny import BACKBONES, tiny_sd1
from tests.traces import traces

DRAW: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "residual": {"residual": True},
    "heads": {"heads": 3},
    "mean": {"tokens": "mean"},
}


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((40, 40), Image.Resampling.BICUBIC)


PICTURES = [picture(seed) for seed in range(12)]


def trained(attention: PictureAttention, seed: int = 5) -> PictureAttention:
    """Weights as after a training: nothing is the identity or zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    return attention


def write(folder: Path, unet: Any, kind: str = "base", **settings: Any) -> Path:
    """A file with attention between pictures, whose weights are random."""
    model = adapter_from_tensors(tiny_ip_adapter(unet, kind), unet)
    model.aggregator = trained(PictureAttention(model.image_proj.reads, AggregatorSettings(**settings)))
    save_ip_adapter(model, folder / "ip_adapter.safetensors")
    return folder / "ip_adapter.safetensors"


@pytest.fixture(scope="module")
def encoder() -> Any:
    return tiny_image_encoder()


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(tiny_sd1())


def draw(pipe: Pipeline, *controls: IPAdapter) -> torch.Tensor:
    return pipe("a red cat", controls=list(controls), seed=5, **DRAW).images


def features_of(encoder: Any, pictures: list[Image.Image], states: bool = False) -> torch.Tensor:
    with torch.no_grad():
        return image_features(encoder, clip_pixels(pictures, 32), states)


def by_hand(attention: PictureAttention, x: torch.Tensor) -> torch.Tensor:
    """[pictures, width] -> the same, with every probability written out."""
    weights = {name: value.double() for name, value in attention.state_dict().items()}
    x, settings = x.double(), attention.settings
    q, k, v = (x @ weights[f"to_{part}.weight"].T for part in "qkv")
    wide = x.shape[1] // settings.heads
    rows = []
    for i in range(len(x)):
        row = []
        for head in range(settings.heads):
            own = slice(head * wide, (head + 1) * wide)
            logits = torch.stack([(q[i, own] * k[j, own]).sum() / math.sqrt(wide) for j in range(len(x))])
            p = logits.exp() / logits.exp().sum()
            row.append(sum(p[j] * v[j, own] for j in range(len(x))))
        out = torch.cat(row)
        if settings.heads > 1:
            out = weights["to_out.weight"] @ out
        rows.append(out + (x[i] if settings.residual else 0))
    found = torch.stack(rows)
    return found.mean(0, keepdim=True) if settings.tokens == "mean" else found


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_is_its_formula(variant: str) -> None:
    attention = trained(PictureAttention(24, AggregatorSettings(**VARIANTS[variant])))
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = attention(x)
        states = attention(x.unsqueeze(2).expand(-1, -1, 3, -1) * torch.tensor([1.0, 0.5, -1.0])[:, None])
    for row in range(2):
        torch.testing.assert_close(found[row].double(), by_hand(attention, x[row]), atol=1e-5, rtol=1e-5)
        for place, gain in enumerate((1.0, 0.5, -1.0)):
            expected = by_hand(attention, x[row] * gain)
            torch.testing.assert_close(states[row, :, place].double(), expected, atol=1e-5, rtol=1e-5)
    assert not bool(attention(torch.zeros(1, 9, 24)).any()), "no pictures stay no pictures"


def test_it_starts_near_the_average_and_with_a_residual_as_the_pictures() -> None:
    x = torch.randn(1, 9, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain, residual = PictureAttention(24)(x), PictureAttention(24, AggregatorSettings(residual=True))(x)
        alike = PictureAttention(24)(x[:, :1].expand(-1, 9, -1))
    assert (plain - x.mean(1, keepdim=True)).std() < 0.15 * x.std()
    assert torch.equal(residual, x)
    torch.testing.assert_close(alike, x[:, :1].expand(-1, 9, -1))


def test_more_pictures_are_cut_and_fewer_filled_up_the_same_every_time() -> None:
    assert chosen_pictures(12, 9, 0) == list(range(9)) == chosen_pictures(9, 9, 3)
    few = chosen_pictures(4, 9, 0)
    assert few[:4] == [0, 1, 2, 3] and len(few) == 9 and set(few) <= set(range(4))
    torch.rand(3)
    assert few == chosen_pictures(4, 9, 0)
    assert any(chosen_pictures(4, 9, seed) != few for seed in range(1, 5))
    x = torch.randn(1, 12, 24)
    attention = trained(PictureAttention(24))
    assert aggregated(x, "attention", attention).shape == (1, 9, 24)
    assert torch.equal(aggregated(x, "attention", attention), aggregated(x[:, :9], "attention", attention))
    assert torch.equal(aggregated(x[:, :4], "attention", attention), attention(x[:, few]))


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_run_equals_diffusers_given_what_the_pictures_became(kind: str, encoder: Any, tmp_path: Path) -> None:
    """diffusers reads the same file, ignores the aggregator, and is told its result."""
    plain = BACKBONES[kind]()
    plain.set_progress_bar_config(disable=True)
    file = write(tmp_path, plain.unet)
    model = load_ip_adapter(file, plain.unet)
    given = features_of(encoder, PICTURES)
    expected: dict[Aggregate, torch.Tensor] = {
        "attention": by_hand(model.aggregator, given[:9]).float(),  # type: ignore[arg-type]
        "max": given.max(0, keepdim=True).values,
        "average": given.mean(0, keepdim=True),
        "tokens": given,
    }
    plain.load_ip_adapter(str(tmp_path), subfolder="", weight_name=file.name, image_encoder_folder=None)
    plain.set_ip_adapter_scale(0.7)
    pipe = Pipeline.from_diffusers(BACKBONES[kind]())
    drawn = {}
    for how, features in expected.items():
        embeds = torch.stack([torch.zeros_like(features), features])
        generator = torch.Generator().manual_seed(5)
        settings = {"prompt": "a red cat", "guidance_scale": 7.5, **DRAW}
        theirs = plain(ip_adapter_image_embeds=[embeds], generator=generator, **settings).images
        control = IPAdapter(file, PICTURES, scale=0.7, aggregate=how, image_encoder=encoder)
        drawn[how] = pipe(**settings, controls=[control], generator=torch.Generator().manual_seed(5)).images
        assert (drawn[how] - theirs).abs().max() <= 1e-4 * theirs.std(), how
    # What the file was trained for is what is done unless something else is asked for.
    generator = torch.Generator().manual_seed(5)
    control = IPAdapter(file, PICTURES, scale=0.7, image_encoder=encoder)
    told = pipe("a red cat", controls=[control], generator=generator, guidance_scale=7.5, **DRAW).images
    assert torch.equal(told, drawn["attention"])
    assert all((drawn[how] - told).abs().max() > 1e-2 * told.std() for how in ("max", "average", "tokens"))


def test_order_of_the_pictures_does_not_matter_and_which_they_are_does(
    pipe: Pipeline, encoder: Any, tmp_path: Path
) -> None:
    for kind in ("base", "plus"):
        file = write(tmp_path, pipe.unet, kind)
        drawn = draw(pipe, IPAdapter(file, PICTURES[:9], image_encoder=encoder))
        turned = draw(pipe, IPAdapter(file, PICTURES[8::-1], image_encoder=encoder))
        others = draw(pipe, IPAdapter(file, PICTURES[3:], image_encoder=encoder))
        assert (drawn - turned).abs().max() < 1e-4 * drawn.std()
        assert (drawn - others).abs().max() > 1e-3 * drawn.std()


def test_states_and_faces_are_aggregated_too(pipe: Pipeline, encoder: Any, tmp_path: Path) -> None:
    plus = write(tmp_path, pipe.unet, "plus", tokens="mean")
    model = load_ip_adapter(plus, pipe.unet)
    states = features_of(encoder, PICTURES[:9], states=True)
    found = model.tokens(states[None])
    assert found.shape == (1, 1, 4, 32)
    places = torch.stack([by_hand(model.aggregator, states[:, i]).float() for i in range(17)], 1)  # type: ignore[arg-type]
    torch.testing.assert_close(found[:, 0], model.image_proj(places), atol=1e-4, rtol=1e-4)
    face = write(tmp_path, pipe.unet, "faceid", heads=2)
    one = torch.randn(9, 10, generator=torch.Generator().manual_seed(1))
    drawn = draw(pipe, IPAdapter(face, embeds=one))
    assert (drawn - draw(pipe, IPAdapter(face, embeds=one, aggregate="average"))).abs().max() > 1e-3 * drawn.std()


def test_a_file_keeps_everything(pipe: Pipeline, tmp_path: Path) -> None:
    for settings in VARIANTS.values():
        file = write(tmp_path, pipe.unet, **settings)
        model = load_ip_adapter(file, pipe.unet)
        assert model.aggregator is not None and model.aggregate == "attention"
        assert model.aggregator.settings == AggregatorSettings(**settings)
        assert set(load_file(str(file))) == set(model.state_dict())
        assert ("aggregator.to_out.weight" in load_file(str(file))) is ("heads" in settings)
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in load_file(str(file)).items())
    # Pooling has no weights; that the adapter was trained with it is in the metadata alone.
    pooled = adapter_from_tensors(tiny_ip_adapter(pipe.unet), pipe.unet)
    pooled.aggregate = "max"
    save_ip_adapter(pooled, tmp_path / "max.safetensors")
    assert load_ip_adapter(tmp_path / "max.safetensors", pipe.unet).aggregate == "max"


def test_nothing_of_an_aggregator_is_left_out(pipe: Pipeline, encoder: Any, tmp_path: Path) -> None:
    good = load_file(str(write(tmp_path, pipe.unet)))
    said = AggregatorSettings().to_metadata()
    bare = {key: value for key, value in good.items() if not key.startswith("aggregator.")}
    cases: list[tuple[dict[str, torch.Tensor], dict[str, str], str]] = [
        (good, {}, "cannot be left out"),
        (good, AggregatorSettings(aggregate="max").to_metadata(), "cannot be left out"),
        (good, {"aggregator": "{}x"}, "cannot be read"),
        (good, {"aggregator": json.dumps({"aggregate": "attention", "new": 1})}, "cannot be read"),
        (bare, said, "lacks aggregator"),
        ({**good, "aggregator.to_out.weight": torch.eye(24)}, said, "nothing reads"),
        ({**good, "aggregator.to_q.weight": torch.eye(23)}, said, "the rest of it asks"),
        ({**bare, "aggregator.to_q.weight": torch.eye(24)}, said, "lacks aggregator.to_v"),
        (good, AggregatorSettings(heads=2).to_metadata(), "to_out"),
        (good, AggregatorSettings(heads=5).to_metadata(), "5 heads"),
        ({**bare, **{f"aggregator.to_{x}.weight": torch.eye(8) for x in "qkv"}}, said, "8 wide"),
    ]
    for number, (tensors, metadata, message) in enumerate(cases):
        file = tmp_path / f"{number}.safetensors"
        save_file(tensors, str(file), metadata)
        with pytest.raises(ModelError, match=message):
            draw(pipe, IPAdapter(file, PICTURES, image_encoder=encoder))


def test_bad_input(pipe: Pipeline, encoder: Any, tmp_path: Path) -> None:
    file = write(tmp_path, pipe.unet)
    without = tiny_ip_adapter(pipe.unet)
    with pytest.raises(ModelError, match="no attention between pictures"):
        draw(pipe, IPAdapter(without, PICTURES, aggregate="attention", image_encoder=encoder))
    with pytest.raises(InputError, match="3 numbers for 1 pictures.*made one"):
        draw(pipe, IPAdapter(file, PICTURES[:3], scale=[1.0, 0.5, 0.2], image_encoder=encoder))
    with pytest.raises(InputError, match=r"2 masks for 1 pictures.*aggregate=\"tokens\""):
        masks = [torch.ones(4, 4), torch.ones(4, 4)]
        draw(pipe, IPAdapter(file, PICTURES[:2], mask=masks, image_encoder=encoder))
    with pytest.raises(ModelError, match="10 wide"):
        projection = LinearProjection(24, 32, 4)
        IPAdapterModel(projection, {}, PictureAttention(10))


def test_neutral_small_and_without_a_trace(pipe: Pipeline, encoder: Any, tmp_path: Path) -> None:
    file = write(tmp_path, pipe.unet)
    plain = draw(pipe)
    draw(pipe, IPAdapter(file, PICTURES, image_encoder=encoder))  # loaded once
    before = traces(pipe)
    assert torch.equal(plain, draw(pipe, IPAdapter(file, PICTURES, scale=0.0, image_encoder=encoder)))
    small = draw(pipe, IPAdapter(file, PICTURES, scale=1e-4, image_encoder=encoder))
    assert 0 < (small - plain).abs().max() < 1e-2 * plain.std()
    with pytest.raises(InputError):
        draw(pipe, IPAdapter(file, PICTURES, mask=torch.zeros(4, 4), image_encoder=encoder))
    assert traces(pipe) == before


def test_low_rank_changes_of_a_new_adapter_start_at_nothing(pipe: Pipeline) -> None:
    model = IPAdapterModel.for_unet(pipe.unet, LinearProjection(24, 32, 4), rank=3)
    plain = IPAdapterModel.for_unet(pipe.unet, LinearProjection(24, 32, 4))
    plain.image_proj.load_state_dict(model.image_proj.state_dict())
    again = adapter_from_tensors(model.state_dict(), pipe.unet)
    assert again.adapts_attention and not plain.adapts_attention
    numbers = {int(key.split(".")[1]) for key in model.state_dict() if "_lora" in key}
    assert numbers == set(range(len(pipe.unet.attn_processors)))
    embeds = torch.randn(1, 24, generator=torch.Generator().manual_seed(1))
    left, right = (draw(pipe, IPAdapter(one, embeds=embeds)) for one in (again, plain.requires_grad_(False)))
    assert torch.equal(left, right)
