"""Textual Inversion: only the word's vectors move, exact resume, the formula, files for us and for diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import controlroom as cr
from controlroom.backbones.learned_words import LearnedWord, known_words, load_words, save_learned_words
from controlroom.core.errors import InputError, ModelError
from controlroom.training.base_model import BaseModel
from controlroom.training.learned_word import FILE, NewWord
from controlroom.training.loop import train
from controlroom.training.randomness import StepRandom
from controlroom.training.recipes.textual_inversion import TextualInversionSettings
from tests.tiny import tiny_sd1, tiny_sd2, tiny_sdxl
from tests.traces import traces
from tests.training.recipe_checks import check_moves_only_what_trains, check_resumes, loop, painted

DRAWN: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "latent"}
WORD = TextualInversionSettings(word="<anna>", vectors=2, initial="cat")


def maker(settings: TextualInversionSettings, folder: Path, make: Any = tiny_sd1, **pictures: Any) -> Any:
    pipe = cr.Pipeline.from_diffusers(make())
    return lambda: settings.build(pipe, painted(**pictures), folder)


@pytest.mark.parametrize("make", [tiny_sd1, tiny_sd2, tiny_sdxl])
def test_only_the_vectors_move(tmp_path: Path, make: Any) -> None:
    recipe = check_moves_only_what_trains(maker(WORD, tmp_path, make), tmp_path / "run")
    parts = ["text_encoder", "text_encoder_2"] if make is tiny_sdxl else ["text_encoder"]
    rows = dict(recipe.modules()["word"].named_parameters())
    assert {name: list(value.shape) for name, value in rows.items()} == {f"rows.{part}": [2, 32] for part in parts}


def test_the_pipeline_stays_as_it_was(tmp_path: Path) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    pipe.backbone.encode_text(["a cat"])
    before, tokenizer = traces(pipe), pipe.backbone.tokenizer
    recipe = WORD.build(pipe, painted(), tmp_path)
    train(recipe, loop(tmp_path / "run"))
    assert traces(pipe) == before and pipe.backbone.tokenizer is tokenizer and "<anna>" not in tokenizer.get_vocab()
    assert recipe.base.backbone.tokenizer is tokenizer
    assert "forward" not in vars(recipe.base.backbone.text_encoder.get_input_embeddings())


def test_it_learns(tmp_path: Path) -> None:
    """The same noise before and after, since a word alone moves the error of a random network by little."""
    recipe = maker(TextualInversionSettings(vectors=4), tmp_path)()

    @torch.no_grad()
    def error() -> float:
        batch = recipe.batch([0, 1, 2], 0)
        draws = [StepRandom(99, 0, [k, k + 1, k + 2]) for k in range(0, 24, 3)]
        return sum(float(recipe.loss(batch, 0, rng).total) for rng in draws) / len(draws)

    before = error()
    train(recipe, loop(tmp_path / "run", total_steps=40, learning_rate=0.2))
    assert error() < before - 1e-3


@pytest.mark.parametrize("make", [tiny_sd1, tiny_sdxl])
def test_a_broken_run_continues(tmp_path: Path, make: Any) -> None:
    settings = TextualInversionSettings(vectors=2, retraction=True, flip=True)
    check_resumes(maker(settings, tmp_path, make), tmp_path)


@pytest.mark.parametrize("make", [tiny_sd1, tiny_sd2])
def test_one_step_is_the_formulas(tmp_path: Path, make: Any) -> None:
    """The table of a plain pipeline made longer by hand, and the error of what it predicts, with autograd."""
    source = make()
    settings = TextualInversionSettings(word="<anna>", vectors=2, initial="red cat")
    recipe = settings.build(cr.Pipeline.from_diffusers(source), painted(), tmp_path)
    rng = StepRandom(3, 0, [0, 1])
    batch = recipe.batch([0, 2], 0)
    prompts = recipe.prompts(batch[0], rng)
    assert all("<anna>" in text and "{}" not in text for text in prompts)
    recipe.loss(batch, 0, rng).total.backward()
    # By hand: new tokens, a longer table, what diffusers' script minimises.
    plain = make()
    plain.tokenizer.add_tokens(["<anna>", "<anna>_1"])
    table = plain.text_encoder.get_input_embeddings()
    old = {word: table.weight[plain.tokenizer(word, add_special_tokens=False).input_ids[0]] for word in ("red", "cat")}
    first, count = plain.tokenizer.convert_tokens_to_ids("<anna>"), table.weight.shape[0]
    longer = torch.cat([table.weight.detach(), torch.zeros(4, 32)])
    longer[first], longer[first + 1] = old["red"].detach(), old["cat"].detach()
    table.weight, table.num_embeddings = torch.nn.Parameter(longer), count + 4
    written = [text.replace("<anna>", "<anna> <anna>_1") for text in prompts]
    ids = plain.tokenizer(written, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
    states = plain.text_encoder(ids)[0]
    noise, t = rng.normal("noise", (4, 16, 16)), rng.integers("timestep", 0, 1000)
    noisy = plain.scheduler.add_noise(batch[0].latents, noise, t)
    target = plain.scheduler.get_velocity(batch[0].latents, noise, t) if make is tiny_sd2 else noise
    F.mse_loss(plain.unet(noisy, t, encoder_hidden_states=states).sample, target).backward()
    gradient, ours = table.weight.grad, recipe.word.rows["text_encoder"].grad
    assert gradient is not None and ours is not None
    expected = gradient[first : first + 2]
    assert float((ours - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    assert float(expected.abs().max()) > 0


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("make", [tiny_sd1, tiny_sd2, tiny_sdxl])
def test_its_file_draws_the_same_here_and_in_diffusers(tmp_path: Path, make: Any, vectors: int) -> None:
    settings = TextualInversionSettings(word="<anna>", vectors=vectors)
    recipe = maker(settings, tmp_path, make)()
    result = train(recipe, loop(tmp_path / "run", learning_rate=0.2))
    file = result.weights / FILE
    pipe = cr.Pipeline.from_diffusers(make())
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    ours = pipe("a <anna>", controls=[cr.TextualInversion(str(file))], latents=noise, **DRAWN).images
    peer = make()
    peer.set_progress_bar_config(disable=True)
    if make is tiny_sdxl:
        for key, end in (("clip_l", ""), ("clip_g", "_2")):
            parts = {"text_encoder": getattr(peer, f"text_encoder{end}"), "tokenizer": getattr(peer, f"tokenizer{end}")}
            peer.load_textual_inversion(load_file(file)[key], token="<anna>", **parts)
    else:
        peer.load_textual_inversion(str(file))
    theirs = peer("a <anna>", latents=noise, **DRAWN).images
    assert float((ours - theirs).abs().max()) < 1e-4 * float(theirs.std())
    assert float((ours - pipe("a cat", latents=noise, **DRAWN).images).abs().max()) > 1e-2 * float(theirs.std())
    # And what training saw is what the file says.
    with recipe.attached(), torch.no_grad():
        seen = recipe.base.condition(["a <anna>"], grad=True).tokens
    with known_words(pipe.backbone, load_words(file), "file"), torch.no_grad():
        assert torch.allclose(pipe.backbone.encode_text(["a <anna>"]).tokens, seen, atol=1e-6)
    again = maker(settings, tmp_path, make)()
    again.load(result.weights)
    for name, rows in again.word.rows.items():
        assert torch.equal(rows, recipe.word.rows[name])


def test_vectors_start_from_words() -> None:
    base = BaseModel(cr.Pipeline.from_diffusers(tiny_sd1()))
    tokenizer, table = base.backbone.tokenizer, base.backbone.text_encoder.get_input_embeddings().weight
    a, red, cat = (table[tokenizer(word, add_special_tokens=False).input_ids[0]] for word in ("a", "red", "cat"))
    for initial, vectors, expected in (
        ("cat", 1, [cat]),
        ("cat", 2, [cat, cat]),
        ("red cat", 3, [red, cat, red]),
        ("a red cat", 1, [(a + red + cat) / 3]),
        ("a red cat", 2, [(a + red) / 2, cat]),
    ):
        word = NewWord(base, "<anna>", vectors, initial)
        assert torch.allclose(word.rows["text_encoder"], torch.stack(expected), atol=1e-6), (initial, vectors)
    random = NewWord(base, "<anna>", 3)
    lengths = torch.linalg.vector_norm(random.rows["text_encoder"], dim=1)
    assert torch.allclose(lengths, torch.linalg.vector_norm(table, dim=1).mean().expand(3), rtol=1e-5)
    assert torch.equal(NewWord(base, "<anna>", 3).rows["text_encoder"], random.rows["text_encoder"])
    assert not torch.equal(NewWord(base, "<anna>", 3, seed=1).rows["text_encoder"], random.rows["text_encoder"])


def test_retraction_holds_lengths(tmp_path: Path) -> None:
    held, free = (
        maker(TextualInversionSettings(vectors=2, initial="red cat", retraction=hold), tmp_path)()
        for hold in (True, False)
    )
    start = torch.linalg.vector_norm(held.word.rows["text_encoder"].detach(), dim=1)
    before = held.word.rows["text_encoder"].detach().clone()
    for recipe, folder in ((held, "held"), (free, "free")):
        train(recipe, loop(tmp_path / folder, learning_rate=0.1))
    lengths = [torch.linalg.vector_norm(recipe.word.rows["text_encoder"], dim=1) for recipe in (held, free)]
    assert torch.allclose(lengths[0], start, rtol=1e-5) and not torch.allclose(lengths[1], start, rtol=1e-2)
    assert not torch.allclose(held.word.rows["text_encoder"], before, atol=1e-2)


def test_words_around_the_word(tmp_path: Path) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    shown = TextualInversionSettings(templates=("{} on the beach", "a {}"))
    recipe = shown.build(pipe, painted(), tmp_path)
    drawn = {recipe.prompts(recipe.batch([0], 0)[0], StepRandom(0, 0, [slot]))[0] for slot in range(20)}
    assert drawn == {"<subject> on the beach", "a <subject>"}
    told = TextualInversionSettings(captions=True)
    recipe = told.build(pipe, painted(caption="a red {token} at night"), tmp_path)
    assert recipe.prompts(recipe.batch([0], 0)[0], StepRandom(0, 0, [0])) == ("a red <subject> at night",)
    with pytest.raises(InputError, match=r"red\.png has neither <subject> nor"):
        told.build(pipe, painted(), tmp_path)


def test_bad_input_is_told(tmp_path: Path) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"templates": ("a photo",)}, "templates"),
        ({"templates": "animal"}, "templates"),
        ({"vectors": 0}, "vectors"),
        ({"words": "x"}, "words"),
    ]
    for settings, said in wrong:
        with pytest.raises(InputError, match=said):
            TextualInversionSettings(**settings)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"word": "cat"}, "knows already"),
        ({"word": "two words"}, "one word"),
        ({"initial": " "}, "no word in"),
    ]
    for settings, said in refused:
        with pytest.raises(InputError, match=said):
            TextualInversionSettings(**settings).build(pipe, painted(), tmp_path)
    other = NewWord(BaseModel(pipe), "<ben>", 3)
    other.save(tmp_path)
    with pytest.raises(ModelError, match="shapes"):
        NewWord(BaseModel(pipe), "<ben>", 2).load(tmp_path)


def test_files_of_words(tmp_path: Path) -> None:
    one, two = torch.randn(2, 32), torch.randn(1, 48)
    several = [LearnedWord("<a>", (one,)), LearnedWord("<b>", (one,))]
    path = save_learned_words(tmp_path / "several.safetensors", several)
    assert set(load_file(path)) == {"<a>", "<b>"} and [w.word for w in load_words(path)] == ["<a>", "<b>"]
    path = save_learned_words(tmp_path / "xl.safetensors", [LearnedWord("<a>", (one, two))])
    (word,) = load_words(path)
    assert word.word == "<a>" and torch.equal(word.vectors[1], two) and set(load_file(path)) == {"clip_l", "clip_g"}
    assert load_words(path, "<other>")[0].word == "<other>"
    save_file(load_file(path), str(tmp_path / "foreign.safetensors"))
    assert load_words(tmp_path / "foreign.safetensors")[0].word == "foreign"
    for words, said in (
        ([], "got 0"),
        ([LearnedWord("<a>", (one, two)), LearnedWord("<b>", (one, two))], "got 2"),
        ([LearnedWord("a b", (one,))], "one word"),
    ):
        with pytest.raises(InputError, match=said):
            save_learned_words(tmp_path / "no.safetensors", words)
    assert not (tmp_path / "no.safetensors").exists()
