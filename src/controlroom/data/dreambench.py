"""DreamBench (google/dreambooth; Ruiz et al., arXiv 2208.12242): 30 subjects with their class and 25 prompts.

Layout: ``dataset/SUBJECT/*.jpg`` and ``dataset/prompts_and_classes.txt``, which lists every subject's class and two
sets of prompts, one for live subjects and one for objects.
"""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

from controlroom.core.errors import InputError
from controlroom.data.picture_files import existing_folder, picture_of, pictures_in, text_of
from controlroom.data.subjects import TOKEN, Subject

FILE = "prompts_and_classes.txt"
CAPTION = f"a photo of a {TOKEN}"
LIVE_CLASSES = ("cat", "dog")

_PROMPT = re.compile(r"""^\s*(['"])(.*)\1\.format\(""")
_PLACE_OF_WORDS = "{0} {1}"


def dreambench(path: str | os.PathLike[str]) -> tuple[Subject, ...]:
    """Subjects with their pictures and prompts, in the order of the list.

    In a prompt, `TOKEN` stands for the name and the class ("sks dog"). Subjects without a folder are left out, with a
    warning.

    Args:
        path: the repository, or its ``dataset`` folder.

    Raises:
        InputError: no such folder, no list or one that cannot be read, no picture of any subject.
    """
    root = existing_folder(path, "the folder of google/dreambooth, or its 'dataset'")
    root = root / "dataset" if (root / "dataset").is_dir() else root
    classes, prompts = _read(root / FILE)
    found, missing = [], []
    for name, class_words in classes.items():
        files = pictures_in(root / name) if (root / name).is_dir() else []
        if not files:
            missing.append(name)
            continue
        live = class_words in LIVE_CLASSES
        pictures = tuple(picture_of(file, root, CAPTION, subject=name) for file in files)
        found.append(Subject(name, class_words, pictures, prompts[live], live))
    if not found:
        raise InputError(
            f"There is no picture of any subject in {str(root)!r}; expected '{next(iter(classes))}/*.jpg'."
        )
    if missing:
        warnings.warn(f"{len(missing)} subjects of {FILE} have no pictures: {', '.join(missing)}.", stacklevel=2)
    return tuple(found)


def _read(path: Path) -> tuple[dict[str, str], dict[bool, tuple[str, ...]]]:
    """Classes by subject, and prompts for live subjects (True) and objects."""
    if not path.is_file():
        raise InputError(f"{str(path)!r} does not exist; expected DreamBench's list of classes and prompts.")
    classes: dict[str, str] = {}
    prompts: dict[bool, list[str]] = {True: [], False: []}
    section = ""
    for line in text_of(path).splitlines():
        words = line.strip().lower().rstrip(":")
        if words in ("classes", "prompts", "object prompts", "live subject prompts"):
            section = words
        elif section == "classes" and line.count(",") == 1 and words != "subject_name,class":
            name, _, class_words = line.partition(",")
            classes[name.strip()] = class_words.strip()
        elif match := _PROMPT.match(line):
            prompts[section.startswith("live")].append(match[2].replace(_PLACE_OF_WORDS, TOKEN))
    bad = [name for name in classes if not name or "/" in name or "\\" in name or name.startswith(".")]
    if (
        bad
        or not classes
        or not all(prompts.values())
        or any(TOKEN not in p for part in prompts.values() for p in part)
    ):
        raise InputError(
            f"{str(path)!r} cannot be read: {len(classes)} classes{f' (one is {bad[0]!r})' if bad else ''}, "
            f"{len(prompts[False])} prompts for objects, {len(prompts[True])} for live subjects; expected the sections "
            "Classes, Object Prompts and Live Subject Prompts."
        )
    return classes, {live: tuple(part) for live, part in prompts.items()}
