"""The generated pages are up to date, and the check can tell when they are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from controlroom.app.docs import main, systems_page
from controlroom.catalog import FURTHER, SYSTEMS

ROOT = Path(__file__).parents[2]


def test_committed_pages_are_up_to_date() -> None:
    assert main(["--check", "--folder", str(ROOT / "docs")]) == 0


def test_check_fails_on_a_changed_page_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", "--folder", str(tmp_path)]) == 1
    assert list(tmp_path.iterdir()) == []
    assert main(["--folder", str(tmp_path)]) == 0
    assert main(["--check", "--folder", str(tmp_path)]) == 0
    page = tmp_path / "systems.md"
    page.write_bytes(page.read_bytes().replace(b"planned", b"working", 1))
    assert main(["--check", "--folder", str(tmp_path)]) == 1
    assert "make docs" in capsys.readouterr().err


def test_missing_folder_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--folder", str(tmp_path / "no")]) == 2
    assert "There is no folder" in capsys.readouterr().err


def test_every_system_has_a_row_and_a_section_that_it_links_to() -> None:
    page = systems_page()
    for system in (*SYSTEMS, *FURTHER):
        anchor = system.key.replace("_", "-")
        assert f"| {system.number} | [{system.name}](#{anchor}) |" in page
        assert page.count(f'<a id="{anchor}"></a>\n\n## {system.number}. {system.name}\n') == 1
