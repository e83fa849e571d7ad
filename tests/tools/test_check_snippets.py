"""The checker of the documentation's snippets finds what is broken, and says where."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.check_snippets import PageError, check_page, main, python_blocks


def page(folder: Path, text: str) -> Path:
    path = folder / "page.md"
    path.write_text(text, encoding="utf-8")
    return path


def test_blocks_share_one_namespace(tmp_path: Path) -> None:
    assert check_page(page(tmp_path, "```python\nx = 2\n```\ntext\n```python\nassert x == 2\n```\n")) is None


def test_failure_names_page_and_line(tmp_path: Path) -> None:
    problem = check_page(page(tmp_path, "# Title\n\n```python\nx = 1\n```\n\n```python\nx = x / 0\n```\n"))
    assert problem is not None
    assert 'page.md", line 8' in problem
    assert "ZeroDivisionError" in problem


@pytest.mark.parametrize("gap", ["", "\n"])
def test_marker_leaves_the_next_block_out_and_no_other(gap: str) -> None:
    text = f"<!-- no-run -->\n{gap}```python\na\n```\n```python\nb\n```\n"
    assert [block.run for block in python_blocks(text)] == [False, True]


def test_marker_before_other_text_has_no_effect() -> None:
    assert [block.run for block in python_blocks("<!-- no-run -->\nwords\n```python\na\n```\n")] == [True]


def test_a_block_left_out_must_still_be_python(tmp_path: Path) -> None:
    problem = check_page(page(tmp_path, "<!-- no-run -->\n```python\nx = = 1\n```\n"))
    assert problem is not None
    assert "line 3" in problem


def test_other_languages_and_nested_fences_are_not_python() -> None:
    assert python_blocks("```bash\nx\n```\n~~~\n```python\nx\n```\n~~~\n````md\n```python\nx\n```\n````\n") == []


def test_indented_fence_is_dedented() -> None:
    assert [block.code for block in python_blocks("  ```python\n  if x:\n      y\n  ```\n")] == ["if x:\n    y\n"]


def test_block_without_end_is_an_error() -> None:
    with pytest.raises(PageError, match="line 2"):
        python_blocks("text\n```python\nx = 1\n")


def test_snippets_write_into_a_folder_that_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_page(page(tmp_path, "```python\nopen('made.txt', 'w').write('x')\n```\n")) is None
    assert not (tmp_path / "made.txt").exists()


def test_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page(tmp_path, "```python\nx = 1\n```\n")
    assert main([str(tmp_path)]) == 0
    page(tmp_path, "```python\nraise SystemExit(3)\n```\n")
    assert main([str(tmp_path)]) == 1
    assert main([str(tmp_path / "missing.md")]) == 1
    assert "no such file" in capsys.readouterr().err
