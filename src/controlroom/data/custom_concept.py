"""CustomConcept101 (adobe-research/custom-diffusion; Kumari et al., arXiv 2212.04488): 101 concepts, and pairs of them.

Layout: ``dataset.json`` lists concepts (``instance_prompt``, ``class_prompt``, ``instance_data_dir``,
``prompt_filename``), ``dataset_multiconcept.json`` pairs with prompts for both; pictures lie in
``benchmark_dataset/CONCEPT/``, prompts in ``prompts/*.txt``, one a line.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlroom.core.errors import InputError
from controlroom.data.picture_files import existing_folder, inside, picture_of, pictures_in, text_of
from controlroom.data.subjects import TOKEN, Subject

SINGLE, PAIRS = "dataset.json", "dataset_multiconcept.json"
TOKENS = ("{token_1}", "{token_2}")
"""Stand for the words of the first and the second concept of a pair."""

_LIVE = ("cat", "dog", "person")
_WORDS = re.compile(r"<new\d+> .+|<new\d+>")
_EXPECTED = "the folder of CustomConcept101 with dataset.json, prompts/ and benchmark_dataset/"


@dataclass(frozen=True)
class ConceptPair:
    """Two concepts for one picture; ``prompts`` hold both of `TOKENS`."""

    concepts: tuple[Subject, Subject]
    prompts: tuple[str, ...]


def custom_concept(path: str | os.PathLike[str]) -> tuple[Subject, ...]:
    """Concepts with their pictures and prompts, in the order of the list.

    Concepts without pictures, or whose file of prompts is missing, are left out with a warning.

    Raises:
        InputError: no such folder, a list that cannot be read, no picture of any concept.
    """
    root = existing_folder(path, _EXPECTED)
    entries = _json(root / SINGLE)
    missing: list[str] = []
    found = [_concept(root, entry, f"{SINGLE}, entry {n}", missing) for n, entry in enumerate(entries, 1)]
    return _there([concept for concept in found if concept is not None], missing, root)


def custom_concept_pairs(path: str | os.PathLike[str]) -> tuple[ConceptPair, ...]:
    """Pairs of concepts with prompts for both.

    Raises:
        InputError: as `custom_concept`.
    """
    root = existing_folder(path, _EXPECTED)
    missing: list[str] = []
    found = []
    for number, entry in enumerate(_json(root / PAIRS), 1):
        where = f"{PAIRS}, entry {number}"
        if not isinstance(entry, list) or len(entry) != 3:
            raise InputError(f"{where} of {str(root)!r} is not two concepts and their prompts.")
        concepts = [_concept(root, each, where, missing) for each in entry[:2]]
        prompts = _prompts(root, _text(entry[2], "prompt_filename_compose", where), where)
        if prompts is None:
            missing.append(where)
        elif concepts[0] is not None and concepts[1] is not None:
            said = tuple(p.replace("{0}", TOKENS[0]).replace("{1}", TOKENS[1]) for p in prompts)
            found.append(ConceptPair((concepts[0], concepts[1]), said))
    return _there(found, missing, root)


def _there(found: list[Any], missing: list[str], root: Path) -> tuple[Any, ...]:
    if not found:
        raise InputError(f"There is no concept with pictures and prompts in {str(root)!r}; expected {_EXPECTED}.")
    names = list(dict.fromkeys(missing))
    if names:
        warnings.warn(f"{len(names)} concepts have no pictures or prompts: {', '.join(names[:5])}.", stacklevel=3)
    return tuple(found)


def _concept(root: Path, entry: Any, where: str, missing: list[str]) -> Subject | None:
    folder = inside(root, _text(entry, "instance_data_dir", where), where)
    class_words = _text(entry, "class_prompt", where)
    caption = _WORDS.sub(TOKEN, _text(entry, "instance_prompt", where), count=1)
    if TOKEN not in caption:
        raise InputError(f"{where} of {str(root)!r} has an instance_prompt without <new1>.")
    prompts = _prompts(root, _text(entry, "prompt_filename", where), where)
    files = pictures_in(folder) if folder.is_dir() else []
    if not files or prompts is None:
        missing.append(folder.name)
        return None
    pictures = tuple(picture_of(file, root, caption, subject=folder.name) for file in files)
    said = tuple(prompt.replace("{}", TOKEN) for prompt in prompts)
    return Subject(folder.name, class_words, pictures, said, class_words in _LIVE)


def _prompts(root: Path, named: str, where: str) -> tuple[str, ...] | None:
    path = inside(root, named, where)
    if not path.is_file():
        return None
    return tuple(" ".join(line.split()) for line in text_of(path).splitlines() if line.strip())


def _text(entry: Any, field: str, where: str) -> str:
    value = entry.get(field) if isinstance(entry, Mapping) else None
    if not isinstance(value, str) or not value:
        raise InputError(f"{where} has no {field!r}; expected CustomConcept101's list.")
    return value


def _json(path: Path) -> list[Any]:
    if not path.is_file():
        raise InputError(f"{str(path)!r} does not exist; expected {_EXPECTED}.")
    try:
        entries = json.loads(text_of(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} is not JSON: {error}.") from None
    if not isinstance(entries, list):
        raise InputError(f"{str(path)!r} holds {type(entries).__name__}; expected a list of concepts.")
    return entries
