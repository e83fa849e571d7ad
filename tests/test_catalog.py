"""The catalogue is whole and true: what it says works can be imported, and nothing is named twice."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from controlroom import catalog
from controlroom.catalog import CONTROL_TYPES, FURTHER, SYSTEMS, System, control_class, load, system
from controlroom.catalog.pairs import REFUSED, combines, not_beside, refused
from controlroom.core.errors import InputError

SOURCE = Path(catalog.__file__).parents[1]
ALL = (*SYSTEMS, *FURTHER)
ARXIV = re.compile(r"\d{4}\.\d{5}|\d{4}\.\d{4}")


def test_all_fifty_three_in_order_with_names_of_their_own() -> None:
    assert [entry.number for entry in SYSTEMS] == list(range(1, 54))
    assert [entry.number for entry in FURTHER] == list(range(54, 54 + len(FURTHER)))
    assert len({entry.key for entry in ALL}) == len({entry.name for entry in ALL}) == len(ALL)


@pytest.mark.parametrize("entry", ALL, ids=lambda entry: entry.key)
def test_entry_is_well_formed(entry: System) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", entry.key)
    assert entry.does.endswith(".")
    assert (entry.neutral is None) != (entry.no_neutral is None), "give a neutral setting or why there is none"
    assert entry.code or entry.recipe
    for path in (*entry.code, *([entry.recipe] if entry.recipe else [])):
        assert re.fullmatch(r"controlroom(\.[a-z][a-z0-9_]*)+:[A-Za-z]\w*", path)
    for paper in entry.papers:
        assert paper.arxiv is None or ARXIV.fullmatch(paper.arxiv)


@pytest.mark.parametrize("entry", [e for e in ALL if e.status == "working"], ids=lambda entry: entry.key)
def test_what_works_can_be_imported(entry: System) -> None:
    for path in (*entry.code, *([entry.recipe] if entry.recipe else [])):
        assert load(path) is not None


def test_what_is_planned_has_no_effect_yet() -> None:
    assert not [entry.key for entry in ALL if entry.status == "planned" and entry.effect]


def test_pairs_that_are_refused_are_pairs_of_controls() -> None:
    assert {name for _, left, right in REFUSED for name in (*left, *right)} <= set(CONTROL_TYPES)
    for name in CONTROL_TYPES:
        assert all(refused(other, name) == why for other, why in not_beside(name).items())
        assert all(f"`{other}`" in combines(name) for other in not_beside(name) if other != name)
        assert ("and itself" in combines(name)) == (name not in not_beside(name))


def test_one_paper_has_one_title() -> None:
    titles = {(paper.arxiv, paper.title) for entry in ALL for paper in entry.papers if paper.arxiv}
    assert len({arxiv for arxiv, _ in titles}) == len(titles)


@pytest.mark.parametrize("name", CONTROL_TYPES)
def test_control_type_is_a_class_or_not_there_yet(name: str) -> None:
    try:
        found = control_class(name)
    except InputError as error:
        assert "not in this version" in str(error)
        assert not SOURCE.parent.joinpath(*CONTROL_TYPES[name].partition(":")[0].split(".")).with_suffix(".py").exists()
    else:
        assert isinstance(found, type)
        assert found.__name__ == CONTROL_TYPES[name].partition(":")[2]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("control_net", "Did you mean 'controlnet'"),
        ("ControlNet", "Did you mean 'controlnet'"),
        ("PromptToPromt", "'prompt_to_prompt'"),
        ("", "Known are: .*'?reference_only"),
        ("zzz", "Known are: appearance_control, attend_and_excite"),
        ("x" * 10_000, "Known are"),
        (7, "Unknown control type 7"),
        (["controlnet"], "Unknown control type"),
        (None, "Unknown control type None"),
    ],
)
def test_unknown_control_type_names_near_ones(given: object, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        control_class(given)  # type: ignore[arg-type]
    # What was given is cut; the names that are known may be many.
    assert len(str(caught.value)) < 250 + len(", ".join(CONTROL_TYPES))


def test_control_class_imports_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTROL_TYPES, "known", "controlroom.core.errors:InputError")
    assert control_class("known") is InputError


@pytest.mark.parametrize("module", ["controlroom.controls.nowhere", "controlroom.no_room.nowhere"])
def test_control_that_is_not_there_yet_is_an_input_error(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(CONTROL_TYPES, "later", f"{module}:Later")
    with pytest.raises(InputError, match="not in this version"):
        control_class("later")


def test_broken_import_inside_a_control_is_not_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tmp_path.joinpath("broken_control.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(CONTROL_TYPES, "broken", "broken_control:Broken")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        control_class("broken")


def test_system_by_key() -> None:
    assert system("ddpm").number == 14
    with pytest.raises(InputError, match="Did you mean 'masactrl'"):
        system("MasaControl")


def test_reading_the_catalogue_imports_no_room_but_core() -> None:
    imported = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for file in Path(catalog.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    ours = {name for name in imported if name and name.startswith("controlroom")}
    assert {name for name in ours if not name.startswith("controlroom.catalog")} == {"controlroom.core.errors"}


def test_every_control_type_belongs_to_an_entry() -> None:
    assert set(CONTROL_TYPES.values()) <= {path for entry in ALL for path in entry.code}
