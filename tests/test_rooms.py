"""The rooms of the design: a room imports only from rooms above it, and no control imports another."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import controlroom

SOURCE = Path(controlroom.__file__).parent
ROOMS = (
    "core",
    "backbones",
    "signals",
    "data",
    "sampling",
    "controls",
    "training",
    "threed",
    "gans",
    "evaluation",
    "tasks",
    "app",
)
# Data about all rooms, beside them: any room may read it, and it reads no room but core.
BESIDE = ("catalog",)
# These import heavy or optional packages, and so only inside the functions that use them.
LATE = ("fastapi", "uvicorn", "ray", "rtmlib", "trimesh")
FILES = sorted(SOURCE.rglob("*.py"))


def imports(tree: ast.AST, package: str) -> Iterator[tuple[str, bool]]:
    """Yield (absolute module, whether it is at the top of the file) for each import."""
    top = set(ast.iter_child_nodes(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in top
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module, node in top
            # `from controlroom.controls.style import ctrl_x` imports a module, not a name.
            for alias in node.names:
                if (SOURCE.parent / Path(*module.split("."), f"{alias.name}.py")).exists():
                    yield f"{module}.{alias.name}", node in top


def problems(text: str, relative: Path) -> list[str]:
    """Say what is wrong with the imports of the file at ``relative`` (to the package's folder)."""
    room = relative.parts[0] if len(relative.parts) > 1 else None
    package = ".".join(["controlroom", *relative.parent.parts])
    found = []
    for module, at_top in imports(ast.parse(text), package):
        parts = module.split(".")
        if room == "core" and parts[0] in ("diffusers", "transformers"):
            found.append(f"core imports {module}")
        if at_top and parts[0] in LATE and room != "app":
            found.append(f"{module} is imported before it is used")
        if parts[0] != "controlroom" or room is None or len(parts) < 2 or parts[1] not in ROOMS:
            continue
        if room in BESIDE:
            if parts[1] != "core":
                found.append(f"{room} imports {module}, and may read nothing but core")
        elif room not in ROOMS:
            found.append(f"{room} is not one of the rooms")
        elif ROOMS.index(parts[1]) > ROOMS.index(room):
            found.append(f"{room} imports {module}, which is below it")
        # controls/<kind>/<method>.py: only what all controls share (a file directly in controls/) may be imported.
        if room == "controls" and parts[1] == "controls" and len(parts) > 3:
            own = ["controlroom", *relative.with_suffix("").parts]
            if parts[:4] != own[:4]:
                found.append(f"the control {'.'.join(own)} imports the control {module}")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_only_from_rooms_above(file: Path) -> None:
    assert problems(file.read_text(encoding="utf-8"), file.relative_to(SOURCE)) == []


@pytest.mark.parametrize(
    ("relative", "text", "wrong"),
    [
        ("core/a.py", "import diffusers", True),
        ("core/a.py", "import torch", False),
        ("core/a.py", "def f():\n    from controlroom.sampling import loop", True),
        ("sampling/a.py", "from controlroom.core.errors import InputError", False),
        ("sampling/a.py", "from ..training import loop", True),
        ("controls/style/a.py", "from controlroom.controls.editing.b import B", True),
        ("controls/style/a.py", "from .b import B", True),
        ("controls/style/a.py", "from controlroom.controls.shared import f", False),
        ("signals/a.py", "import rtmlib", True),
        ("signals/a.py", "def f():\n    import rtmlib", False),
        ("attic/a.py", "from controlroom.core import errors", True),
        ("catalog/a.py", "from controlroom.core import errors", False),
        ("catalog/a.py", "from controlroom.controls.editing.b import B", True),
    ],
)
def test_the_check_can_fail(relative: str, text: str, wrong: bool) -> None:
    assert bool(problems(text, Path(relative))) is wrong


def test_every_folder_is_a_room() -> None:
    folders = {file.relative_to(SOURCE).parts[0] for file in FILES if file.parent != SOURCE}
    assert folders <= {*ROOMS, *BESIDE}
