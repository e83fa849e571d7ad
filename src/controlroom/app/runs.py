"""What the commands share: reading runs, opening models, drawing with a progress bar, saying what was done.

Nothing here is printed to standard output: that belongs to the result of a command (a path, or its JSON).
"""

from __future__ import annotations

import os
import stat
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlroom.core.errors import InputError
from controlroom.core.spec import RunSpec

if TYPE_CHECKING:
    from rich.console import Console

    from controlroom.core.result import RunResult
    from controlroom.sampling.pipeline import Pipeline

MAX_RUN_BYTES = 64 * 2**20
_MAX_YAML_NODES = 1_000_000


def notes() -> Console:
    """Standard error, for progress, warnings and what a person likes to know."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def read_run(path: str) -> RunSpec:
    """A run out of a YAML or JSON file, out of a PNG that controlroom wrote, or (``-``) from standard input.

    Raises:
        InputError: no such file, not a run, or a field that does not fit; the message names the file.
    """
    data = _bytes_of(path)
    if data.startswith(b"\x89PNG"):
        from controlroom.sampling.manifest import read_recorded

        return read_recorded(data if path == "-" else path).spec
    try:
        return RunSpec.from_data(_yaml(data))
    except InputError as error:
        raise InputError(f"{path!r}: {error}") from error


def _bytes_of(path: str) -> bytes:
    if path == "-":
        data = sys.stdin.buffer.read(MAX_RUN_BYTES + 1)
    else:
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise InputError(f"{path!r} is not a file; give the YAML file of a run.")
            with open(path, "rb") as file:
                data = file.read(MAX_RUN_BYTES + 1)
        except FileNotFoundError as error:
            raise InputError(f"{path!r} does not exist; give the YAML file of a run.") from error
        except (OSError, ValueError) as error:
            raise InputError(f"{path!r} cannot be read ({error}).") from error
    if len(data) > MAX_RUN_BYTES:
        raise InputError(f"{path!r} is larger than {MAX_RUN_BYTES // 2**20} MB, which no run is. Check the path.")
    return data


def _yaml(data: bytes) -> Any:
    """Plain data; a few lines of YAML whose aliases unfold to billions of nodes are refused."""
    import yaml

    try:
        loader = yaml.SafeLoader(data)
        try:
            node = loader.get_single_node()
            if node is None:
                raise InputError("It is empty; expected settings of a run, such as 'prompt: a red hat'.")
            if _unfolded(node, {}) > _MAX_YAML_NODES:
                raise InputError(f"Its aliases unfold to more than {_MAX_YAML_NODES} entries, which no run has.")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"It is not YAML: {' '.join(str(error).split())[:300]}.") from error


def _unfolded(node: Any, known: dict[int, int]) -> int:
    """Number of nodes with every alias written out."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = _MAX_YAML_NODES + 1  # what holds itself has no end
    total = 1
    for child in node.value if isinstance(node.value, list) else ():
        total += sum(_unfolded(one, known) for one in child) if isinstance(child, tuple) else _unfolded(child, known)
    known[id(node)] = min(total, _MAX_YAML_NODES + 1)
    return known[id(node)]


def new_seed() -> int:
    """A seed. Torch's own generator starts alike in every process: every first picture would have the same noise."""
    import secrets

    return secrets.randbelow(2**32)


def with_seed(spec: RunSpec) -> RunSpec:
    """The same run with a seed."""
    if spec.seed is not None or spec.generator_seed is not None:
        return spec
    return spec.model_copy(update={"seed": new_seed()})


def changed(spec: RunSpec, settings: dict[str, Any]) -> RunSpec:
    """The run with other settings (None: as it is), checked anew.

    Raises:
        InputError: a setting that does not fit.
    """
    given = {name: getattr(spec, name) for name in spec.model_fields_set}
    return RunSpec(**{**given, **{name: value for name, value in settings.items() if value is not None}})


def open_pipeline(model: str) -> Pipeline:
    """Load a model without the libraries' own bars and notes.

    Raises:
        ModelError: nothing there, or a part of it is missing.
    """
    quiet_libraries()
    from controlroom.sampling.pipeline import Pipeline

    return Pipeline.from_pretrained(model)


def quiet_libraries() -> None:
    """Their notes are for programmers; what a user must know is said by controlroom itself."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore")
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def draw(pipeline: Pipeline, spec: RunSpec) -> tuple[RunResult, float]:
    """Execute a run on a loaded model with a progress bar on standard error; the result and its seconds."""
    from rich.progress import Progress

    console = notes()
    for line in cut_prompts(pipeline, spec):
        console.print(f"warning: {line}", markup=False)
    begun = time.perf_counter()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("drawing", total=spec.num_inference_steps)

        def stepped(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            bar.advance(task)
            return {}

        # Only looks on: the run can still be drawn again.
        result = pipeline.run(spec, callback_on_step_end=stepped)
    for line in result.manifest["warnings"]:
        console.print(f"warning: {line}", markup=False)
    for line in result.manifest.get("notes", ()):
        console.print(f"note: {line}", markup=False)
    for label, why in result.manifest["dropped"].items():
        console.print(f"{label} was left out: {why}", markup=False)
    return result, time.perf_counter() - begun


def cut_prompts(pipeline: Pipeline, spec: RunSpec) -> list[str]:
    """A line for each prompt of which the model reads only the beginning; weighted ones are read chunk by chunk."""
    from controlroom.backbones.base import MAX_PROMPT_CHARACTERS
    from controlroom.controls.placed_words import WeightedPrompt
    from controlroom.sampling.execute import read_texts

    found = []
    tokenizer = pipeline.backbone.tokenizer or pipeline.backbone.tokenizer_2
    for text in dict.fromkeys(read_texts(spec)[0]):
        if isinstance(text, WeightedPrompt) or len(text) > MAX_PROMPT_CHARACTERS:
            continue  # too many characters are refused by the run itself
        count = len(tokenizer(text, truncation=False).input_ids)
        if count > tokenizer.model_max_length:
            found.append(
                f"the prompt has {count} tokens; the model reads the first {tokenizer.model_max_length}: {text[:40]!r}…"
            )
    return found


def save_masks(result: RunResult, files: tuple[Path, ...]) -> tuple[Path, ...]:
    """Write the masks that were found by words beside the pictures, ``NAME.mask.png``; several are numbered from 1.

    None is written beside a device, or over a file that the run reads.
    """
    from controlroom.app.output import same_file
    from controlroom.core.png import save_png

    read = [entry["path"] for entry in result.manifest["inputs"].values()]
    written = []
    for index, file in enumerate(files):
        for number, name in enumerate(result.masks, 1):
            count = f"_{number}" if len(result.masks) > 1 else ""
            beside = file.with_name(f"{file.stem}.mask{count}.png")
            if not file.is_file() or any(same_file(beside, path) for path in read):
                continue
            save_png(result.mask_picture(name, index), beside)
            written.append(beside)
    return tuple(written)


def summary(result: RunResult, files: tuple[Path, ...], seconds: float) -> dict[str, Any]:
    """What a command that draws prints as JSON."""
    manifest = result.manifest
    pictures = result.images
    return {
        "files": [str(file) for file in files],
        "model": manifest["spec"].get("model", "theatre"),
        "backbone": manifest["backbone"],
        "size": list(pictures[0].size) if pictures else None,
        "steps": result.spec.num_inference_steps if result.spec is not None else None,
        "seeds": manifest["seeds"],
        "cost": manifest["cost"],
        "warnings": manifest["warnings"],
        "dropped": manifest["dropped"],
        "replayable": manifest["replayable"],
        "reasons": manifest["reasons"],
        "seconds": round(seconds, 3),
    }
