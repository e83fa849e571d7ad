"""``import controlroom`` is light, and every public name is where the table says."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import controlroom

HEAVY = ("torch", "diffusers", "transformers", "numpy", "PIL", "pydantic", "accelerate", "peft", "fastapi")


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    ).stdout


def test_import_loads_nothing_heavy() -> None:
    loaded = run(f"import sys, controlroom; print([name for name in {HEAVY} if name in sys.modules])")
    assert loaded.strip() == "[]"


def test_naming_an_error_or_the_catalogue_loads_no_torch() -> None:
    code = "import sys, controlroom as cr; cr.InputError, cr.control_class, dir(cr); print('torch' in sys.modules)"
    assert run(code).strip() == "False"


@pytest.mark.parametrize("name", controlroom._EXPORTS)
def test_exported_name_exists(name: str) -> None:
    value = getattr(controlroom, name)
    assert value.__module__ == controlroom._EXPORTS[name], "name the module that defines it"
    assert name in dir(controlroom)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(controlroom.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert seen == controlroom._EXPORTS


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = controlroom.Nothing
