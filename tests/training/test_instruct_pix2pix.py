"""InstructPix2Pix's general recipe: how it starts, what moves, what is left out, and that its export edits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from PIL import Image

import controlroom as cr
from controlroom.data.edited_pictures import EditedPicture, edited_pictures
from controlroom.tasks.train import plan_training
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Recipe
from controlroom.training.recipes.instruct_pix2pix import InstructPix2PixRecipe, InstructPix2PixSettings
from tests.saved import tiny_folder
from tests.tiny import tiny_sd1, tiny_sdxl
from tests.training.recipe_checks import check_learns, check_moves_only_what_trains, check_resumes, painted

SETTINGS = InstructPix2PixSettings()


def pairs() -> tuple[EditedPicture, ...]:
    """Cats that change their colour."""
    before, after = painted(), painted(("blue", "green", "red"))
    return tuple(
        EditedPicture(b.name, a.content, a.size, a.read, f"make it {a.content}", before=b)
        for a, b in zip(after, before, strict=True)
    )


def maker(settings: InstructPix2PixSettings = SETTINGS, make: Any = tiny_sd1) -> Callable[[], InstructPix2PixRecipe]:
    pipe = cr.Pipeline.from_diffusers(make())
    return lambda: settings.build(pipe, pairs(), Path("unused"))


def trained(make: Callable[[], Recipe[Any]], folder: Path) -> InstructPix2PixRecipe:
    recipe = check_moves_only_what_trains(make, folder, learning_rate=1e-3)
    assert isinstance(recipe, InstructPix2PixRecipe)
    return recipe


def written(folder: Path, count: int = 3) -> Path:
    """The pairs as a folder."""
    lines = []
    for number, pair in enumerate(pairs()[:count]):
        for side, picture in (("before", pair.before), ("after", pair)):
            file = folder / f"{number:04d}" / f"{side}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.read().save(file)
        row = {"before": f"{number:04d}/before.png", "after": f"{number:04d}/after.png", "instruction": pair.caption}
        lines.append(json.dumps({**row, "seed": 3}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_it_starts_as_the_model_it_came_from() -> None:
    recipe, plain = maker()(), tiny_sd1().unet
    batch = recipe.batch([0, 2], 0)
    noisy, t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([300, 600])
    told = recipe.base.condition(batch.after.prompts, (32, 32)).tokens
    with torch.no_grad():
        found = recipe.predict(noisy, t, batch.before, batch.after.prompts)
        expected = plain(noisy, t, told).sample
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    first = recipe.base.unet.conv_in
    assert torch.equal(first.weight[:, :4], plain.conv_in.weight) and not first.weight[:, 4:].any()
    assert torch.equal(first.bias, plain.conv_in.bias) and bool(plain.conv_in.bias.any())


def test_batches_are_before_unscaled_and_after() -> None:
    recipe = maker(SETTINGS.model_copy(update={"flip": True}))()
    assert recipe.dataset_size == 6
    batch, pair = recipe.batch([1, 5], 0), pairs()[1]
    assert batch.after.prompts[0] == "make it green" == pair.caption
    vae = tiny_sd1().vae
    pixels = torch.stack([torch.tensor([0.0, 0.0, 255.0]) / 127.5 - 1]).reshape(1, 3, 1, 1).expand(1, 3, 32, 32)
    with torch.no_grad():
        mode = vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(batch.before[:1], mode, atol=1e-5, rtol=1e-4)  # of the blue picture
    assert not torch.allclose(batch.before[0], batch.after.latents[0], atol=0.01)


@pytest.mark.parametrize("make", [tiny_sd1, tiny_sdxl])
def test_the_whole_unet_moves_and_nothing_else(tmp_path: Path, make: Any) -> None:
    recipe = trained(maker(make=make), tmp_path / "run")
    assert set(recipe.modules()) == {"unet"} and recipe.base.unet.conv_in.weight[:, 4:].any()


def test_it_learns_and_continues(tmp_path: Path) -> None:
    check_learns(maker(), tmp_path / "run", learning_rate=1e-3)
    check_resumes(maker(), tmp_path, learning_rate=1e-3)


def test_the_loss_leaves_out_picture_words_and_both() -> None:
    recipe = maker()()
    with torch.no_grad():
        recipe.base.unet.conv_in.weight[:, 4:].normal_(generator=torch.Generator().manual_seed(1))
    shares = (0.85, 0.05, 0.05, 0.05)
    assert recipe.shares == pytest.approx(shares)
    outcomes = StepRandom(0, 0, range(200)).choice("left out", shares).tolist()
    rng = StepRandom(0, 0, [outcomes.index(outcome) for outcome in range(4)])
    batch = recipe.batch([0, 1, 2, 0], 0)
    noise, t = rng.normal("noise", (4, 16, 16)), rng.integers("timestep", 0, 1000)
    bars = tiny_sd1().scheduler.alphas_cumprod[t]
    expected = 0.0
    with torch.no_grad():
        for row in range(4):
            before = batch.before[row] if row in (0, 2) else torch.zeros(4, 16, 16)
            words = batch.after.prompts[row] if row in (0, 1) else ""
            noisy = bars[row] ** 0.5 * batch.after.latents[row] + (1 - bars[row]) ** 0.5 * noise[row]
            tokens = recipe.base.condition([words], (32, 32)).tokens
            told = recipe.base.unet(torch.cat([noisy, before])[None], t[row : row + 1], tokens).sample[0]
            expected += float(((told - noise[row]) ** 2).mean()) / 4
    assert float(recipe.loss(batch, 0, rng).total.detach()) == pytest.approx(expected, rel=1e-4)


def test_what_it_writes_edits_here_and_in_diffusers(tmp_path: Path) -> None:
    recipe = trained(maker(), tmp_path / "run")
    unet: Any = UNet2DConditionModel.from_pretrained(tmp_path / "run/weights/unet")
    assert unet.config.in_channels == 8
    again = maker()()
    again.load(tmp_path / "run/weights")
    for key, value in unet.state_dict().items():
        assert torch.equal(value, recipe.base.unet.state_dict()[key])
        assert torch.equal(value, again.base.unet.state_dict()[key])
    plain = tiny_sd1()
    plain.unet = unet.eval()
    parts: dict[str, Any] = {**plain.components, "requires_safety_checker": False}
    theirs: Any = StableDiffusionInstructPix2PixPipeline(**parts)
    theirs.set_progress_bar_config(disable=True)
    picture = Image.new("RGB", (32, 32), "red")
    more: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}
    expected = theirs("make it blue", picture, generator=torch.Generator().manual_seed(2), **more).images
    ours: Any = cr.Pipeline.from_diffusers(plain)
    found = ours("make it blue", controls=[cr.InstructPix2Pix(picture)], seed=2, **more).images
    assert (found - expected).abs().max() <= 1e-4 * expected.std()


def test_the_command_reads_a_folder_of_pairs(tmp_path: Path) -> None:
    folder = written(tmp_path / "pairs")
    found = edited_pictures(folder)
    assert [pair.caption for pair in found] == ["make it blue", "make it green", "make it red"]
    assert found[0].before.read().getpixel((0, 0)) == (255, 0, 0) and found[0].read().getpixel((0, 0)) == (0, 0, 255)
    changes = ["train.total_steps=1", "train.batch_size=2", "train.threads=1", f"validation={folder}"]
    plan = plan_training("instruct_pix2pix", None, str(folder), str(tiny_folder()), tmp_path / "run", changes)
    assert (plan.run().weights / "unet/config.json").is_file()
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    (found,) = [line for line in lines if line["event"] == "validation"]
    assert found["held_out"] != found["without_picture"]


def test_bad_pairs_are_named(tmp_path: Path) -> None:
    with pytest.raises(cr.InputError, match=r"no picture before it"):
        SETTINGS.build(cr.Pipeline.from_diffusers(tiny_sd1()), painted(), tmp_path)
    with pytest.raises(cr.InputError, match="more than all"):
        InstructPix2PixSettings(without_picture=0.6, without_words=0.6)
    with pytest.raises(cr.InputError, match="There is no metadata.jsonl"):
        edited_pictures(tmp_path)
    folder = written(tmp_path / "pairs", 1)
    good = json.loads((folder / "metadata.jsonl").read_text())
    Image.new("RGB", (8, 8)).save(folder / "small.png")
    for changed, said in (
        ("nonsense", "line 1 is not JSON"),
        ("[]", "expected an object"),
        ("", "lists nothing"),
        ({**good, "instruction": " "}, "'instruction'"),
        ({**good, "before": None}, "'before' is missing"),
        ({**good, "before": "gone.png"}, "not in"),
        ({**good, "before": "../x.png"}, "inside of"),
        ({**good, "before": "small.png"}, "8 x 8"),
    ):
        (folder / "metadata.jsonl").write_text(changed if isinstance(changed, str) else json.dumps(changed))
        with pytest.raises(cr.InputError, match=said):
            edited_pictures(folder)
