"""Split a prompt into regions with prompts of their own, as RPG's planner does (arXiv 2401.11708).

Three planners give the same `RegionPlan`: rules, for sentences that join simple things ("a red cat on the left and a
blue dog on the right"); a chat model of transformers in a folder; an OpenAI-compatible endpoint. Rules are the default,
and nothing else is loaded or contacted unless it is named. What a model answers is read by a strict schema; where it
does not fit, the model is told why and asked again, and in the end the error says what it said.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from controlroom.backbones.text_writer import Message, load_text_writer
from controlroom.controls.regions.regional_prompts import RegionalPrompts
from controlroom.controls.split_ratios import split_boxes
from controlroom.core.control import describe
from controlroom.core.errors import InputError, ModelError
from controlroom.core.spec import RunSpec

Ask = Callable[[Sequence[Message]], str]
MAX_ANSWER_BYTES = 1_000_000
MAX_REGIONS = 16


class RegionPlan(BaseModel):
    """A prompt split into regions: the strict schema of every planner's answer.

    Raises:
        ValidationError: a field that is missing, unknown or of another type, or ratios for another number of regions.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: str = Field(min_length=1, max_length=2000)
    """What the whole picture shows."""
    ratios: str = Field(min_length=1, max_length=200)
    """Where the regions are: see `controlroom.controls.split_ratios`."""
    regions: list[str] = Field(min_length=1, max_length=MAX_REGIONS)
    """Prompt of each cell, row by row from the left."""

    @model_validator(mode="after")
    def _fit(self) -> RegionPlan:
        if any(not region.strip() or len(region) > 1000 for region in self.regions):
            raise ValueError("every region needs a prompt, of at most 1000 characters")
        try:
            cells = len(split_boxes(self.ratios))
        except InputError as error:
            raise ValueError(str(error)) from error
        if cells != len(self.regions):
            raise ValueError(f"ratios {self.ratios!r} are {cells} cells, but there are {len(self.regions)} regions")
        return self

    def control(self, base_ratio: float = 0.5) -> RegionalPrompts:
        """The control that draws the plan."""
        return RegionalPrompts(tuple(self.regions), self.ratios, base_ratio)

    def spec(self, base_ratio: float = 0.5, **settings: Any) -> RunSpec:
        """The run that draws the plan; ``settings`` are those of a `RunSpec`."""
        return RunSpec(prompt=self.prompt, controls=[self.control(base_ratio)], **settings)


class PlannerSettings(BaseModel):
    """Who plans: rules unless a model or an endpoint is named.

    Raises:
        InputError: an unknown or ill-typed setting, or both a model and an endpoint.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    text_model: str | None = None
    """Folder of a chat model of transformers. Nothing is downloaded."""
    endpoint: str | None = Field(default=None, pattern=r"^https?://")
    """Base address of an OpenAI-compatible service, such as ``http://localhost:8000/v1``."""
    endpoint_model: str = "default"
    """What the service calls its model."""
    key_variable: str = "CONTROLROOM_PLANNER_KEY"
    """Environment variable with the key of the service; none is sent where it is empty."""
    retries: int = Field(default=3, ge=0, le=20)
    """How often a model is asked again."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds that an answer of a service may take."""
    new_tokens: int = Field(default=400, ge=1, le=8000)

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise InputError(describe("The planner", error)) from error
        if self.text_model is not None and self.endpoint is not None:
            raise InputError("A plan is made by a text model or by an endpoint; both were named. Give one of them.")


def plan_regions(prompt: str, settings: PlannerSettings | None = None) -> RegionPlan:
    """Split a prompt into regions.

    Raises:
        InputError: an empty prompt, or for the rules one that names fewer than two things.
        ModelError: no such model, a service that does not answer, or answers that are no plan.
    """
    if not prompt.strip():
        raise InputError("There is nothing to plan: the prompt is empty.")
    chosen = settings or PlannerSettings()
    if chosen.text_model is not None:
        return plan_with(chat_model(chosen.text_model, chosen.new_tokens), prompt, chosen.retries, chosen.text_model)
    if chosen.endpoint is not None:
        return plan_with(endpoint(chosen), prompt, chosen.retries, chosen.endpoint)
    return plan_by_rules(prompt)


# By rules.

_STARTS = r"(?:an?|the|one|two|three|four|five|another|some|his|her|their|its)\b"
_WORN = frozenset(
    "shirt sweater trousers skirt shorts hat cap beanie hair skin dress coat jacket shoes boots scarf gloves tie "
    "glasses smile eyes beard face head bag umbrella crown belt socks jeans suit cloak".split()
)
_PLACES = {
    "left": r"(?:on|at|to|in) (?:the|its) (?:far )?left(?: side| half)?|left",
    "right": r"(?:on|at|to|in) (?:the|its) (?:far )?right(?: side| half)?|right",
    "middle": r"(?:in|at) the (?:middle|cent(?:er|re))",
    "top": r"(?:on|at|in) the (?:top|upper half)|above",
    "bottom": r"(?:on|at|in) the (?:bottom|lower half)|below",
}
_MARKED = {
    side: re.compile(rf"[, ]*\b(?:{words})\b(?! of)\s*$|^(?:{words})\b(?! of)[, ]+", re.I)
    for side, words in _PLACES.items()
}
_RELATION = re.compile(
    r"\s*,?\s*\b(?:(?:to |on )?the (left|right) of|(above|over)|(below|under|beneath)|"
    r"next to|beside|near|between|in front of|behind)\s+(?=" + _STARTS + ")",
    re.I,
)
_JOINT = re.compile(r"\s*(?:,\s*and|,|;|\band\b|\bplus\b)\s+(?=(?:on|at|in|to) the |" + _STARTS + ")", re.I)
_SCENE = re.compile(
    r"[, ]+((?:on|in|at|under|by) "
    r"(?!(?:the |its )?(?:far )?(?:left|right|middle|cent(?:er|re)|top|bottom|upper|lower)\b)[\w ]{2,44})$",
    re.I,
)


def plan_by_rules(prompt: str) -> RegionPlan:
    """Split a sentence that joins things by commas, "and", and words for places.

    Every region is told its own thing and the scene that the sentence ends in. Things go side by side in their order,
    or where the sentence says; things at the top are above the others.

    Raises:
        InputError: it names fewer than two things, or more than 16.

    >>> plan_by_rules("a red cat on the left and a blue dog on the right, on the beach").regions
    ['a red cat, on the beach', 'a blue dog, on the beach']
    """
    text = " ".join(prompt.split()).rstrip(" .")
    text, scene = _without_scene(text)
    things = [_placed(part) for part in _parts(text)]
    if len(things) < 2:
        raise InputError(
            f"The prompt {prompt[:80]!r} names one thing, as far as rules can tell; regions need two or more, as "
            "in 'a red cat on the left and a blue dog on the right'. Write it so, name a text model, or give regions."
        )
    if len(things) > MAX_REGIONS:
        raise InputError(f"The prompt names {len(things)} things; a picture has at most {MAX_REGIONS} regions.")
    rows = [[words for words, side in things if side in wanted] for wanted in (("top",), _BESIDE, ("bottom",))]
    order = {"left": 0, "middle": 1, "": 1, "right": 2}
    beside = [thing for thing in things if thing[1] in _BESIDE]
    rows[1] = [words for words, _ in sorted(beside, key=lambda thing: order[thing[1]])]
    rows = [row for row in rows if row]
    if len(rows) == 1:
        ratios = ",".join("1" for _ in rows[0])
    else:
        ratios = ";".join(",".join("1" for _ in range(1 + len(row))) if len(row) > 1 else "1" for row in rows)
    tail = f", {scene}" if scene else ""
    return RegionPlan(prompt=" ".join(prompt.split()), ratios=ratios, regions=[w + tail for row in rows for w in row])


_BESIDE = ("left", "middle", "", "right")


def _without_scene(text: str) -> tuple[str, str]:
    """The sentence and where it all happens: a place after the last thing, or before the first comma."""
    match = _SCENE.search(text)
    if match and _parts(text[: match.start()]) and not re.search(r"\b(?:of|and)\b", match[1]):
        return text[: match.start()].rstrip(" ,"), match[1]
    return text, ""


def _parts(text: str) -> list[str]:
    """The things of a sentence; what somebody wears stays with them."""
    marked: list[str] = []
    for part in _split_relations(text):
        for index, piece in enumerate(_JOINT.split(part)):
            if index and marked and _belongs(marked[-1], piece):
                marked[-1] += f" and {piece}"
            elif piece.strip(" ,"):
                marked.append(piece.strip(" ,"))
    return marked


def _split_relations(text: str) -> list[str]:
    """Split at a relation: "A above B" as "A at the top", "B at the bottom"; "A next to B" as A, B."""
    match = _RELATION.search(text)
    if match is None:
        return [text]
    first, second = text[: match.start()], text[match.end() :]
    if match[1]:
        other = {"left": "right", "right": "left"}[match[1].lower()]
        first, second = f"{first} on the {match[1].lower()}", f"{second} on the {other}"
    elif match[2]:
        first, second = f"{first} at the top", f"{second} at the bottom"
    elif match[3]:
        first, second = f"{first} at the bottom", f"{second} at the top"
    return [first, second]


def _belongs(before: str, piece: str) -> bool:
    """Whether a piece is worn by who stands before it: "a woman with red hair" and "a blue hat"."""
    dressed = re.search(r"\b(?:wearing|with|in|holding)\b", before, re.I)
    words = re.findall(r"[a-z]+", piece.lower())
    head = re.split(r"\b(?:with|on|in|at|of|wearing)\b", piece.lower())[0].split()
    return bool(dressed and words and head and head[-1].strip(",.") in _WORN)


def _placed(part: str) -> tuple[str, str]:
    """A thing without its place, and the place: ``left``, ``top``, … or ""."""
    for side, pattern in _MARKED.items():
        shorter = pattern.sub("", part).strip(" ,")
        if shorter and shorter != part:
            return shorter, side
    return part, ""


# By a language model.

_TASK = """You plan pictures. Split the prompt into regions, one for each main thing, and describe each region richly
but only with what belongs there. Answer with one JSON object and nothing else:
{"prompt": "the whole picture in one sentence", "ratios": "1,1", "regions": ["left region", "right region"]}
"ratios" says where the regions are. Commas divide columns: "1,2" is a narrow left and a wide right column. Semicolons
divide rows, and then the first number of a row is its height: "1;2" is a low row above a high one, "1,1,1;2" two cells
side by side above one that is twice as high. "regions" has one text for each cell, row by row from the left."""


def plan_with(ask: Ask, prompt: str, retries: int = 3, name: str = "the planner") -> RegionPlan:
    """Ask a chat model for a plan until its answer fits the schema.

    Raises:
        ModelError: it never does; the message has the last reason and the beginning of the last answer.
    """
    messages: list[Message] = [{"role": "system", "content": _TASK}, {"role": "user", "content": prompt}]
    reason, answer = "", ""
    for _ in range(retries + 1):
        answer = ask(messages)
        try:
            return read_plan(answer)
        except InputError as error:
            reason = str(error)
        again = f"That is not a plan: {reason} Answer with the JSON object only."
        messages = [*messages[:2], {"role": "assistant", "content": answer[:4000]}, {"role": "user", "content": again}]
    shown = " ".join(answer.split())[:160]
    raise ModelError(
        f"{name!r} gave no plan in {retries + 1} attempts. The last answer began {shown!r}; {reason} Use a larger "
        "model, the rules (no model named), or give regions yourself."
    )


def read_plan(answer: str) -> RegionPlan:
    """The plan in a model's answer: its first JSON object.

    Raises:
        InputError: there is none, or it does not fit the schema; the message says where.
    """
    begin = answer.find("{")
    if begin < 0:
        raise InputError("It has no JSON object.")
    try:
        data, _ = json.JSONDecoder().raw_decode(answer[begin:])
    except (ValueError, RecursionError) as error:
        raise InputError(f"Its JSON cannot be read ({str(error)[:100]}).") from error
    try:
        return RegionPlan.model_validate(data)
    except ValidationError as error:
        raise InputError(describe("The plan", error)) from error


def chat_model(folder: str, new_tokens: int = 400) -> Ask:
    """A chat model of transformers from a folder.

    Raises:
        ModelError: no model there, or one that does not write text.
    """
    if not os.path.isdir(folder):
        raise ModelError(f"There is no folder {folder!r} with a chat model of transformers.")
    writer = load_text_writer(folder, "plans then come from rules")
    return lambda messages: writer.write(writer.as_text(messages), new_tokens)


def endpoint(settings: PlannerSettings) -> Ask:
    """An OpenAI-compatible service; contacted when it is asked, and not before."""
    import http.client
    import urllib.error
    import urllib.request

    address = f"{str(settings.endpoint).rstrip('/')}/chat/completions"

    def ask(messages: Sequence[Message]) -> str:
        body = {"model": settings.endpoint_model, "messages": list(messages), "temperature": 0}
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(settings.key_variable, "").strip()
        if key:
            headers["Authorization"] = f"Bearer {key}"
        try:
            request = urllib.request.Request(address, json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=settings.timeout) as response:
                data = response.read(MAX_ANSWER_BYTES + 1)
        except urllib.error.HTTPError as error:
            raise ModelError(f"The planner at {address} answered {error.code} ({error.reason}).") from error
        except (OSError, ValueError, OverflowError, http.client.HTTPException) as error:
            why = getattr(error, "reason", error)
            raise ModelError(f"The planner at {address} does not answer ({why}). Is it running?") from error
        if len(data) > MAX_ANSWER_BYTES:
            raise ModelError(f"The planner at {address} answered more than {MAX_ANSWER_BYTES} bytes.")
        try:
            return str(json.loads(data)["choices"][0]["message"]["content"])
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            shown = data[:120].decode("utf-8", "replace")
            raise ModelError(
                f"The planner at {address} is no OpenAI-compatible service; it answered {shown!r}."
            ) from error

    return ask
