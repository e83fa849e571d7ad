"""A run as data: JSON and YAML and back, inputs that travel with it, errors that name the field."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import Field

from controlroom import catalog
from controlroom.core.control import Control
from controlroom.core.errors import ControlRoomError, InputError
from controlroom.core.inputs import hash_inputs
from controlroom.core.spec import RunSpec


class Picky(Control):
    type: Literal["picky"] = Field(default="picky", kw_only=True)
    model: Any
    image: Any = None
    scale: float = 1.0
    start: float = 0.0


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    real = catalog.control_class
    monkeypatch.setattr(catalog, "control_class", lambda name: Picky if name == "picky" else real(name))


def noise_image(size: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


def test_round_trip_through_json_and_yaml() -> None:
    spec = RunSpec(
        prompt=["a cat", 'ein Mädchen: "x"'], seed=3, controls=[Picky("theatre/pose", "pose.json", scale=0.5)]
    )
    for again in (RunSpec.from_json(spec.to_json()), RunSpec.from_yaml(spec.to_yaml())):
        assert again == spec
        assert isinstance(again.controls[0], Picky) and again.controls[0].scale == 0.5


def test_small_pictures_and_tensors_travel_with_the_run() -> None:
    image, tensor = noise_image(16), torch.randn(1, 4, 8, 8)
    spec = RunSpec(prompt="x", latents=tensor, controls=[Picky([tensor, "a"], image)])
    again = RunSpec.from_json(spec.to_json())
    assert torch.equal(again.latents, tensor)
    control = again.controls[0]
    assert isinstance(control, Picky)
    assert control.image.tobytes() == image.tobytes()
    assert torch.equal(control.model[0], tensor) and control.model[1] == "a"


def test_large_inputs_and_modules_leave_a_hash_and_say_what_to_give() -> None:
    for value in (noise_image(512), torch.randn(1, 4, 256, 256), torch.nn.Linear(2, 2)):
        text = RunSpec(controls=[Picky(value)]).to_json()
        assert len(text) < 1000 and "sha256" in text
        with pytest.raises(InputError, match="Give it again"):
            RunSpec.from_json(text)


def test_files_are_hashed(tmp_path: Path) -> None:
    path = tmp_path / "pose.json"
    path.write_text("{}")
    found = hash_inputs(RunSpec(controls=[Picky(str(path))]).to_data())
    assert found == {
        "controls.0.model": {
            "path": str(path),
            "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
        }
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}x", "not JSON"),
        ("[]", "mapping"),
        ('{"prompts": "x"}', "prompts"),
        ('{"controls": [{"model": "a"}]}', "type"),
        ('{"controls": [{"type": "no_such"}]}', "no_such"),
        ('{"controls": [{"type": "picky", "model": 1, "scales": 2}]}', "scales"),
        ('{"controls": [{"type": "picky"}]}', "model"),
        ('{"seed": -1}', "seed"),
        ('{"guidance_scale": NaN}', "guidance_scale"),
        ('{"version": 2}', "version"),
        ('{"latents": {"$tensor": "!!"}}', "damaged"),
        ('{"controls": [{"type": "picky", "model": {"$image": "AAAA"}}]}', "damaged"),
    ],
)
def test_errors_name_the_field(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        RunSpec.from_json(text)


TENSORS = [
    "latents",
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
]


@pytest.mark.parametrize("field", TENSORS)
@pytest.mark.parametrize("given", ["hello", "[[1, 2]]", "3", "{a: 1}", "{$image: x}", "{$bytes: AAAA}"])
def test_what_is_no_tensor_is_refused_by_name(field: str, given: str) -> None:
    with pytest.raises(InputError, match=f"{field} must be a tensor|damaged"):
        RunSpec.from_yaml(f"{field}: {given}")


@pytest.mark.parametrize("value", [np.array(["a"]), torch.tensor(1.0), torch.zeros(0, 77, 8), np.zeros((1, 0))])
def test_a_tensor_must_hold_something(value: Any) -> None:
    with pytest.raises(InputError, match="prompt_embeds"):
        RunSpec(prompt_embeds=value)


def test_yaml_makes_no_objects() -> None:
    with pytest.raises(InputError, match="YAML"):
        RunSpec.from_yaml("prompt: !!python/object/apply:os.system ['true']")


def test_settings_are_frozen_and_positional() -> None:
    control = Picky("m", None, 0.3)
    assert (control.model, control.scale) == ("m", 0.3)
    with pytest.raises(Exception, match="frozen"):
        control.scale = 1.0  # type: ignore[misc]
    with pytest.raises(InputError, match="twice"):
        Picky("m", model="n")
    with pytest.raises(InputError, match="at most 4"):
        Picky(1, 2, 3, 4, 5)
    with pytest.raises(InputError, match="scale"):
        Picky("m", scale="much")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from([*RunSpec.model_fields, "$image", "type", ""])


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(FIELDS, JSON, max_size=4) | JSON)
def test_any_data_is_a_run_or_one_clear_error(data: Any) -> None:
    try:
        spec = RunSpec.from_data(data)
    except ControlRoomError as error:
        assert str(error)
    else:
        assert RunSpec.from_json(spec.to_json()) == spec


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60))
def test_any_text_is_a_run_or_one_clear_error(text: str | bytes) -> None:
    for read in (RunSpec.from_json, RunSpec.from_yaml):
        try:
            read(text)
        except ControlRoomError:
            pass


def test_seeded_noise_does_not_depend_on_the_batch() -> None:
    from controlroom.core.random import Streams

    random.seed(0)
    together = Streams([4, 5, 6]).normal("reference", (3, 2, 2))
    assert torch.equal(together[1:2], Streams([5]).normal("reference", (1, 2, 2)))
    assert not torch.equal(together[1:2], Streams([5]).normal("other", (1, 2, 2)))
