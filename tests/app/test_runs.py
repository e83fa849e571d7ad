"""Reading runs from files: a run or an `InputError`, whatever the file holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlroom.app.commands.generate import parse_size
from controlroom.app.output import destinations
from controlroom.app.runs import changed, read_run
from controlroom.core.errors import InputError, OutputError
from controlroom.core.spec import RunSpec

NAMES = sorted(RunSpec.model_fields)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda child: st.lists(child, max_size=3) | st.dictionaries(st.text(max_size=6), child, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "run.yaml"


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_run_or_an_error(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    try:
        assert isinstance(read_run(str(file)), RunSpec)
    except InputError as error:
        assert "run.yaml" in str(error)


@settings(max_examples=150, deadline=None)
@given(data=st.dictionaries(st.sampled_from(NAMES), plain, max_size=4))
def test_any_settings_are_a_run_or_an_error(file: Path, data: dict[str, object]) -> None:
    import yaml

    file.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    try:
        spec = read_run(str(file))
    except InputError:
        return
    assert RunSpec.from_yaml(spec.to_yaml()).to_json() == spec.to_json()


@given(text=st.text(max_size=20))
def test_any_size_is_two_numbers_or_an_error(text: str) -> None:
    try:
        width, height = parse_size(text)
    except InputError:
        return
    assert 0 <= width < 100_000 and 0 <= height < 100_000


@settings(max_examples=80)
@given(name=st.text(max_size=40))
def test_any_name_is_a_png_or_an_error(name: str) -> None:
    try:
        (path,) = destinations(name)
    except OutputError:
        return
    assert path.suffix.lower() == ".png" or path.exists()


def test_changes_are_checked() -> None:
    spec = RunSpec(prompt="a cat", seed=3)
    assert changed(spec, {"seed": 4, "prompt": None}).model_dump() == RunSpec(prompt="a cat", seed=4).model_dump()
    with pytest.raises(InputError, match="num_inference_steps"):
        changed(spec, {"num_inference_steps": 0})
