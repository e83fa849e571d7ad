"""The pinned environment satisfies what the package asks for, and names no place to download from."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "requirements" / "lock.txt").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pinned() -> dict[str, str]:
    lines = [line for line in LOCK.splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


@pytest.mark.parametrize("wanted", [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]])
def test_pinned_version_is_one_the_package_accepts(wanted: str) -> None:
    requirement = Requirement(wanted)
    assert requirement.specifier.contains(pinned()[canonicalize_name(requirement.name)])


def test_lock_holds_only_exact_versions() -> None:
    for version in pinned().values():
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), "a local build such as +cpu would not install elsewhere"


@pytest.mark.parametrize("file", ["requirements/lock.txt", "Makefile", "pyproject.toml", ".ci/run"])
def test_no_host_of_a_registry_is_named(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    assert not re.search(r"--(extra-)?index-url|--find-links|https?://", text)
