"""A write leaves the whole new file, or the whole old one and a clear error; never a temporary file."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from controlroom.core import files
from controlroom.core.errors import OutputError
from controlroom.core.files import atomic_path, write_atomically, write_text_atomically


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_writes_new_and_replaces_old(tmp_path: Path) -> None:
    target = tmp_path / "pose.json"
    write_atomically(target, b"old")
    write_atomically(str(target), b"new")
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["pose.json"]


def test_text_is_utf8_with_its_own_line_ends(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "a.txt", "ü\r\n\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xbc\r\n\n"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("there_before", [True, False])
def test_full_disk_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, there_before: bool
) -> None:
    target = tmp_path / "pose.json"
    if there_before:
        target.write_bytes(b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, failing, fail)
    with pytest.raises(OutputError, match=r"pose\.json': no space left on device.*free some space"):
        write_atomically(target, b"new")
    monkeypatch.undo()
    assert names(tmp_path) == (["pose.json"] if there_before else [])
    assert not there_before or target.read_bytes() == b"old"


def test_full_disk_while_the_bytes_are_written(tmp_path: Path) -> None:
    # A file name that stands for a full device: open succeeds, the write does not.
    with pytest.raises(OutputError, match="no space left on device"), atomic_path(tmp_path / "a.bin") as temporary:
        os.unlink(temporary)
        os.symlink("/dev/full", temporary)
        temporary.write_bytes(b"x" * 10_000)
    assert names(tmp_path) == []


def test_device_is_written_to_and_never_replaced() -> None:
    write_atomically("/dev/null", b"x")
    with pytest.raises(OutputError, match="no space left on device"):
        write_atomically("/dev/full", b"x" * 10_000)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


@pytest.mark.parametrize("error", [ValueError("cannot encode"), KeyboardInterrupt()])
def test_failure_of_the_writer_passes_and_leaves_no_trace(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "a.png"
    target.write_bytes(b"old")
    with pytest.raises(type(error)), atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert names(tmp_path) == ["a.png"]
    assert target.read_bytes() == b"old"


def test_temporary_path_is_beside_the_target_with_its_suffix(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.png") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".png"
        temporary.write_bytes(b"whole")
    assert (tmp_path / "a.png").read_bytes() == b"whole"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing/a.json", "no such file or directory.*create the folder first"),
        ("file/a.json", "not a directory.*a part of the path is a file"),
        ("folder", "is a directory.*add a file name"),
        ("", "is a directory.*add a file name"),
        ("n" * 300, "file name too long.*shorter name"),
        ("a\0b", "null character"),
    ],
)
def test_bad_path_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=message):
        write_atomically(path, b"x")
    assert names(tmp_path) == ["file", "folder"]


def test_missing_permission_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Simulated, since the tests may run as root, whom permissions do not stop.
    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(files.os, "open", refuse)
    with pytest.raises(OutputError, match="permission denied.*may write to"):
        write_atomically(tmp_path / "a", b"x")


def test_longest_name_can_be_written(tmp_path: Path) -> None:
    name = "n" * 250 + ".json"
    write_atomically(tmp_path / name, b"x")
    assert names(tmp_path) == [name]


def test_link_is_followed_and_permissions_are_kept(tmp_path: Path) -> None:
    target, link = tmp_path / "a", tmp_path / "link"
    target.write_bytes(b"old")
    target.chmod(0o640)
    link.symlink_to(target)
    write_atomically(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_new_file_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_atomically(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644
