"""The manifest of a run, the text of its PNGs, and reading both back.

A PNG carries ``controlroom`` (JSON: the specification, which picture of the run it is, hashes of the inputs, versions)
and ``parameters`` (the line that AUTOMATIC1111's web UI and its successors write and read). Neither holds a time or a
path of this machine beyond what the specification names, so that a replay is the same file, byte for byte.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from controlroom.core import inputs
from controlroom.core.errors import InputError
from controlroom.core.png import read_png_text
from controlroom.core.run import Run
from controlroom.core.spec import RunSpec

KEY = "controlroom"


def manifest_of(run: Run, spec: RunSpec, cancelled: bool, reasons: tuple[str, ...]) -> dict[str, Any]:
    """The run as data; see `RunResult.manifest`."""
    data = spec.to_data()
    why = [*reasons, *_omitted(data)]
    if cancelled:
        why.append("the run was cancelled before its last step")
    return {
        "spec": data,
        "backbone": run.backbone.name,
        "seeds": list(run.streams.seeds),
        "cost": run.cost.as_dict(),
        "warnings": list(run.plan.warnings),
        "dropped": dict(run.plan.dropped),
        "notes": [*run.plan.notes, *run.remarks],
        "inputs": inputs.hash_inputs({"controls": data.get("controls", [])}),
        "versions": versions(),
        "cancelled": cancelled,
        "replayable": not why,
        "reasons": why,
    }


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    import diffusers
    import torch

    import controlroom

    return {"controlroom": controlroom.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__}


def png_text(manifest: dict[str, Any], run: Run, spec: RunSpec, index: int) -> dict[str, str]:
    """Text chunks of picture ``index``."""
    kept = {key: manifest[key] for key in ("spec", "inputs", "versions", "seeds", "replayable", "reasons")}
    content = json.dumps({**kept, "index": index}, ensure_ascii=False, sort_keys=True)
    return {"parameters": parameters_line(run, spec, index), KEY: content}


def parameters_line(run: Run, spec: RunSpec, index: int) -> str:
    """Prompt, negative prompt and settings as AUTOMATIC1111's web UI writes them."""
    negative = _written(spec.negative_prompt, spec, index) or run.negative_prompts[index]
    height, width = run.size
    settings = {
        "Steps": spec.num_inference_steps,
        "Sampler": spec.scheduler or type(run.scheduler).__name__.removesuffix("Scheduler"),
        "CFG scale": spec.guidance_scale,
        "Seed": run.streams.seeds[index],
        "Size": f"{width}x{height}",
        "Model": os.path.basename(spec.model) or spec.model,
        "Version": f"controlroom {versions()['controlroom']}",
    }
    lines = [_written(spec.prompt, spec, index) or run.prompts[index]]
    if negative:
        lines.append(f"Negative prompt: {negative}")
    lines.append(", ".join(f"{key}: {value}" for key, value in settings.items()))
    return "\n".join(lines)


def _written(texts: str | list[str] | None, spec: RunSpec, index: int) -> str | None:
    """A picture's text as the user wrote it, with the notation that a control read."""
    return texts[index // spec.num_images_per_prompt] if isinstance(texts, list) else texts


@dataclass(frozen=True)
class Recorded:
    """What a PNG says of the run that drew it.

    Attributes:
        spec: the run.
        index: which of its pictures this is.
        manifest: all that was recorded.
    """

    spec: RunSpec
    index: int
    manifest: dict[str, Any]


def read_recorded(source: str | os.PathLike[str] | bytes) -> Recorded:
    """Read the run out of a PNG: a file, or its bytes.

    Raises:
        InputError: not a PNG of controlroom, one that cannot be replayed, or inputs that have changed since.
    """
    text = read_png_text(source)
    name = "The PNG given" if isinstance(source, bytes) else repr(os.fspath(source))
    if KEY not in text:
        hint = " It has a parameters line of another program." if "parameters" in text else ""
        raise InputError(f"{name} carries no run of controlroom.{hint} Give a PNG that controlroom wrote.")
    try:
        data = json.loads(text[KEY])
        index, stored = int(data["index"]), data["spec"]
        hashes = {str(where): (entry["path"], entry["sha256"]) for where, entry in data.get("inputs", {}).items()}
        reasons = [str(why) for why in data.get("reasons", [])]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"The run in {name} is damaged ({error!r:.200}). Give an undamaged PNG.") from error
    if not data.get("replayable", True):
        raise InputError(f"{name} cannot be drawn again: {'; '.join(reasons)}.")
    for where, (path, before) in hashes.items():
        now = inputs.file_hash(path) if isinstance(path, str) else None
        if now is None:
            raise InputError(f"The input {where} of this run, {path!r}, is not there. Put it back.")
        if now != before:
            raise InputError(f"The input {where} of this run, {path!r}, has changed since. Put the old one back.")
    spec = RunSpec.from_data(stored)
    if not 0 <= index < spec.num_images:
        raise InputError(
            f"The run in {name} is damaged: it says to be picture {index} (from 0) of {spec.num_images}. Give an "
            "undamaged PNG."
        )
    return Recorded(spec, index, data)


def _omitted(data: Any, where: str = "") -> list[str]:
    """Inputs that were too large to be stored."""
    if isinstance(data, dict):
        if "$omitted" in data:
            return [f"{where} was a {data['$omitted']} given in memory, too large to store"]
        return [line for key, item in data.items() for line in _omitted(item, f"{where}.{key}" if where else str(key))]
    if isinstance(data, list):
        return [line for index, item in enumerate(data) for line in _omitted(item, f"{where}.{index}")]
    return []
