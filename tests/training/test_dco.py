"""DCO: the published loss, who moves and how fast, exact resume, files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import controlroom as cr
from controlroom.core.errors import InputError
from controlroom.training.loop import train
from controlroom.training.own_rate import OwnRate
from controlroom.training.randomness import StepRandom
from controlroom.training.recipes.dco import FILE, DCORecipe, DCOSettings
from tests.tiny import tiny_sd1, tiny_sd2, tiny_sdxl
from tests.traces import traces
from tests.training.recipe_checks import check_learns, check_moves_only_what_trains, check_resumes, loop, painted

DRAWN: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "latent"}
NAMED: dict[str, Any] = {"caption": "a {} cat on the beach"}
WHOLE = DCOSettings(rank=2, word="<anna>", vectors=2, initial="red", text_encoders=True)


def maker(settings: DCOSettings, folder: Path, make: Any = tiny_sd1) -> Any:
    pipe = cr.Pipeline.from_diffusers(make())
    return lambda: settings.build(pipe, painted(**NAMED), folder)


@pytest.mark.parametrize("make", [tiny_sd1, tiny_sdxl])
@pytest.mark.parametrize("settings", [DCOSettings(rank=2), WHOLE])
def test_only_what_is_declared_moves(tmp_path: Path, make: Any, settings: DCOSettings) -> None:
    recipe = check_moves_only_what_trains(maker(settings, tmp_path, make), tmp_path / "run")
    assert isinstance(recipe, DCORecipe)
    parts = {part for part, _ in recipe.adapter.layers}
    encoders = {"text_encoder", "text_encoder_2"} if make is tiny_sdxl else {"text_encoder"}
    assert parts == ({"unet"} | encoders if settings is WHOLE else {"unet"})
    assert set(recipe.modules()) == ({"lora", "word"} if settings is WHOLE else {"lora"})


def test_it_learns(tmp_path: Path) -> None:
    settings = DCOSettings(rank=8, beta=20.0)
    check_learns(maker(settings, tmp_path), tmp_path / "run", 30, learning_rate=2e-2)


@pytest.mark.parametrize("settings", [DCOSettings(rank=2, flip=True), WHOLE])
def test_a_broken_run_continues(tmp_path: Path, settings: DCOSettings) -> None:
    check_resumes(maker(settings, tmp_path), tmp_path)


def randomise(recipe: Any, size: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for up in recipe.adapter.up:
            up.copy_(size * torch.randn(up.shape, generator=generator))


@pytest.mark.parametrize("make", [tiny_sd1, tiny_sd2])
def test_loss_is_that_of_the_paper(tmp_path: Path, make: Any) -> None:
    """Weights with and without the change in two copies, sample by sample, numbers as floats."""
    source = make()
    settings = DCOSettings(rank=2, alpha=4.0, word="red", plain="blue", beta=100.0)
    recipe = settings.build(cr.Pipeline.from_diffusers(source), painted(**NAMED), tmp_path)
    randomise(recipe)
    rng, batch = StepRandom(3, 0, [0, 1, 2]), recipe.batch([0, 1, 2], 0)
    found = recipe.loss(batch, 0, rng)
    base, changed = make(), make()
    layers = dict(changed.unet.named_modules())
    with torch.no_grad():
        for (_, path), down, up in zip(recipe.adapter.layers, recipe.adapter.down, recipe.adapter.up, strict=True):
            layers[path].weight += 2.0 * up @ down
    noise, t = rng.normal("noise", (4, 16, 16)), rng.integers("timestep", 0, 1000)
    losses, own, reference = [], [], []
    with torch.no_grad():
        for i in range(3):
            noisy = base.scheduler.add_noise(batch[0].latents[i : i + 1], noise[i : i + 1], t[i : i + 1])
            target = noise[i : i + 1]
            if make is tiny_sd2:
                target = base.scheduler.get_velocity(batch[0].latents[i : i + 1], target, t[i : i + 1])
            errors = []
            for pipe, prompt in ((changed, "a red cat on the beach"), (base, "a blue cat on the beach")):
                states = pipe.encode_prompt(prompt, "cpu", 1, False)[0]
                predicted = pipe.unet(noisy, t[i : i + 1], encoder_hidden_states=states).sample
                errors.append(float(((predicted - target) ** 2).mean()))
            own.append(errors[0])
            reference.append(errors[1])
            losses.append(math.log(1.0 + math.exp(100.0 * (errors[0] - errors[1]))))
    assert found.total.item() == pytest.approx(sum(losses) / 3, rel=1e-3)
    assert float(found.parts["subject"]) == pytest.approx(sum(own) / 3, rel=1e-4)
    assert float(found.parts["reference"]) == pytest.approx(sum(reference) / 3, rel=1e-4)
    assert max(losses) > 1.05 * min(losses)
    # The published code averages the errors of the batch first, which is another number.
    averaged = math.log(1.0 + math.exp(100.0 * (sum(own) - sum(reference)) / 3))
    assert abs(found.total.item() - averaged) > 1e-3


def test_untouched_it_is_log_two_and_being_better_fades(tmp_path: Path) -> None:
    """Same words and a LoRA that changes nothing: no difference. The gradient's share is σ(β (ℓθ − ℓφ))."""
    settings = DCOSettings(rank=2, word="", beta=1000.0)
    recipe = settings.build(cr.Pipeline.from_diffusers(tiny_sd1()), painted(caption="a cat"), tmp_path)
    batch = recipe.batch([0], 0)
    assert float(recipe.loss(batch, 0, StepRandom(3, 0, [0])).total) == pytest.approx(math.log(2), rel=1e-4)
    difference = torch.tensor([0.01, -0.01, 0.0], requires_grad=True)
    (-torch.nn.functional.logsigmoid(-1000.0 * difference)).sum().backward()
    assert difference.grad is not None
    assert torch.allclose(difference.grad, 1000.0 * torch.sigmoid(1000.0 * difference.detach()))


def test_words_of_the_untouched_network(tmp_path: Path) -> None:
    recipe = DCOSettings(rank=1, word="<anna>", vectors=1).build(
        cr.Pipeline.from_diffusers(tiny_sd1()), painted(**NAMED), tmp_path
    )
    assert recipe.named_and_plain(["a {} cat", "<anna> at night"]) == (
        ("a <anna> cat", "<anna> at night"),
        ("a cat", "at night"),
    )
    other = DCOSettings(rank=1, word="sks", plain="old").build(
        cr.Pipeline.from_diffusers(tiny_sd1()), painted(**NAMED), tmp_path
    )
    assert other.named_and_plain(["a {token} cat"]) == (("a sks cat",), ("a old cat",))


def test_own_rate_is_the_optimizer_at_that_rate() -> None:
    start, data = torch.randn(3, 4), torch.randn(5, 3, 4)
    fast, slow = (torch.nn.Parameter(start.clone()) for _ in range(2))
    whole, part = (torch.optim.AdamW([p], lr=rate, weight_decay=0.1) for p, rate in ((fast, 0.1), (slow, 0.025)))
    own = OwnRate([fast], 0.25)
    for each in data:
        for parameter, optimizer in ((fast, whole), (slow, part)):
            optimizer.zero_grad()
            # A gradient that does not depend on where the parameter is, so that both see the same.
            (parameter * each).sum().backward()
        own.before()
        whole.step()
        own.after()
        part.step()
    assert torch.allclose(fast, slow, atol=1e-6) and not torch.allclose(fast, start, atol=1e-3)


def test_text_moves_at_its_own_rate_and_the_word_keeps_its_length(tmp_path: Path) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    before = traces(pipe)
    moved = {}
    for share in (1.0, 0.1):
        settings = DCOSettings(rank=2, text_encoders=True, text_rate=share, word="<anna>", vectors=1, beta=1.0)
        recipe = settings.build(pipe, painted(**NAMED), tmp_path)
        assert recipe.word is not None
        start = recipe.word.rows["text_encoder"].detach().clone()
        train(recipe, loop(tmp_path / str(share), total_steps=1))
        sizes = {"unet": 0.0, "text_encoder": 0.0}
        for (part, _), up in zip(recipe.adapter.layers, recipe.adapter.up, strict=True):
            sizes[part] = max(sizes[part], float(up.detach().abs().max()))
        end = recipe.word.rows["text_encoder"].detach()
        assert torch.linalg.vector_norm(end) == pytest.approx(float(torch.linalg.vector_norm(start)), rel=1e-5)
        moved[share] = (*sizes.values(), float((end - start).abs().max()))
    # Adam's first step is as long as the rate.
    assert moved[1.0][:2] == pytest.approx((1e-2, 1e-2), rel=0.02)
    assert moved[0.1][:2] == pytest.approx((1e-2, 1e-3), rel=0.02)
    assert moved[0.1][2] < 0.2 * moved[1.0][2]  # not quite a tenth, as its length is held
    assert traces(pipe) == before


@pytest.mark.parametrize("make", [tiny_sd1, tiny_sdxl])
def test_its_files_draw_the_same_here_and_in_diffusers(tmp_path: Path, make: Any) -> None:
    recipe = maker(WHOLE, tmp_path, make)()
    result = train(recipe, loop(tmp_path / "run", learning_rate=0.05))
    pipe = cr.Pipeline.from_diffusers(make())
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    word = str(result.weights / "learned_word.safetensors")
    controls = [cr.TextualInversion(word), cr.LoRA(str(result.weights / FILE))]
    ours = pipe("a <anna> cat", controls=controls, latents=noise, **DRAWN).images
    peer = make()
    peer.set_progress_bar_config(disable=True)
    peer.load_lora_weights(str(result.weights), weight_name=FILE)
    if make is tiny_sdxl:
        from safetensors.torch import load_file

        for key, end in (("clip_l", ""), ("clip_g", "_2")):
            parts = {"text_encoder": getattr(peer, f"text_encoder{end}"), "tokenizer": getattr(peer, f"tokenizer{end}")}
            peer.load_textual_inversion(load_file(word)[key], token="<anna>", **parts)
    else:
        peer.load_textual_inversion(word)
    theirs = peer("a <anna> cat", latents=noise, **DRAWN).images
    assert float((ours - theirs).abs().max()) < 1e-3 * float(theirs.std())
    assert float((ours - pipe("a cat", latents=noise, **DRAWN).images).abs().max()) > 0.05 * float(theirs.std())
    again = maker(WHOLE, tmp_path, make)()
    again.load(result.weights)
    batch = recipe.batch([0], 0)
    first, second = (float(r.loss(batch, 0, StepRandom(3, 0, [0])).parts["subject"]) for r in (recipe, again))
    assert first == pytest.approx(second, rel=1e-4)


def test_bad_input_is_told(tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"beta": 0.0}, "beta"),
        ({"text_rate": 2.0}, "text_rate"),
        ({"vectors": -1}, "vectors"),
        ({"dora": True}, "dora"),
    ]
    for settings, said in wrong:
        with pytest.raises(InputError, match=said):
            DCOSettings(**settings)
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    with pytest.raises(InputError, match="knows already"):
        DCOSettings(word="cat", vectors=1).build(pipe, painted(**NAMED), tmp_path)
    with pytest.raises(InputError, match="no caption"):
        DCOSettings().build(pipe, painted(caption=""), tmp_path)
