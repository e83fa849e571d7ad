"""Plans of regions: by rules, by a language model that talks nonsense, and by a service that learns from its errors."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from controlroom.app.cli import main
from controlroom.backbones.text_writer import load_text_writer
from controlroom.controls.edit_sentences import sentences_from_model
from controlroom.controls.regions.regional_prompts import RegionalPrompts
from controlroom.core.errors import InputError, ModelError
from controlroom.core.spec import RunSpec
from controlroom.tasks.plan_regions import PlannerSettings, plan_by_rules, plan_regions, plan_with, read_plan
from tests.controls.editing.test_pix2pix_zero import tiny_language_model
from tests.saved import tiny_folder

GOOD = {"prompt": "a cat and a dog", "ratios": "1,2", "regions": ["a red cat", "a blue dog"]}


@pytest.mark.parametrize(
    ("prompt", "ratios", "regions"),
    [
        ("a red cat on the left and a blue dog on the right", "1,1", ["a red cat", "a blue dog"]),
        ("a blue dog on the right and a red cat on the left", "1,1", ["a red cat", "a blue dog"]),
        ("a red cat and a blue dog on the beach", "1,1", ["a red cat, on the beach", "a blue dog, on the beach"]),
        ("a red ball, a green box and a yellow star", "1,1,1", ["a red ball", "a green box", "a yellow star"]),
        ("a star above a red car", "1;1", ["a star", "a red car"]),
        ("a car below a star", "1;1", ["a star", "a car"]),
        ("a cup to the left of a chair", "1,1", ["a cup", "a chair"]),
        ("a cat to the right of a dog, in the snow", "1,1", ["a dog, in the snow", "a cat, in the snow"]),
        ("a small red ball next to a big box at night", "1,1", ["a small red ball, at night", "a big box, at night"]),
        ("a sun at the top, a cat on the left and a dog on the right", "1;1,1,1", ["a sun", "a cat", "a dog"]),
        (
            "a woman with red hair wearing a blue shirt and a green hat and a man in a city",
            "1,1",
            ["a woman with red hair wearing a blue shirt and a green hat, in a city", "a man, in a city"],
        ),
        ("on the left a cat, on the right a dog", "1,1", ["a cat", "a dog"]),
    ],
)
def test_rules(prompt: str, ratios: str, regions: list[str]) -> None:
    plan = plan_regions(prompt)
    assert (plan.ratios, plan.regions, plan.prompt) == (ratios, regions, prompt)
    assert isinstance(plan.control(), RegionalPrompts)


@pytest.mark.parametrize(
    "prompt", ["a cat", "a woman wearing a red shirt and a blue hat", "beach", "a cat on the left"]
)
def test_one_thing_is_no_plan(prompt: str) -> None:
    with pytest.raises(InputError, match="names one thing"):
        plan_regions(prompt)
    with pytest.raises(InputError, match="empty"):
        plan_regions("  ")
    with pytest.raises(InputError, match="at most 16"):
        plan_regions(", ".join(["a cat"] * 17))


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="a cdt,;.onthelf \n", max_size=60))
def test_any_prompt_is_a_plan_or_an_error(prompt: str) -> None:
    try:
        assert len(plan_by_rules(prompt).regions) >= 2
    except InputError:
        pass


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("I would love to help!", "no JSON"),
        ("{", "cannot be read"),
        ("[1]", "no JSON"),
        ("{}", "prompt: field required"),
        (json.dumps({**GOOD, "ratios": "1;x"}), "cannot be read at 'x'"),
        (json.dumps({**GOOD, "ratios": "1,1,1"}), "3 cells, but there are 2 regions"),
        (json.dumps({**GOOD, "regions": ["a", 1]}), "regions.1"),
        (json.dumps({**GOOD, "regions": []}), "regions"),
        (json.dumps({**GOOD, "regions": ["a", " "]}), "every region needs a prompt"),
        (json.dumps({**GOOD, "colour": "red"}), "colour"),
        ("{" * 100_000, "cannot be read"),
    ],
)
def test_answers_that_are_no_plan(answer: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_plan(answer)


def test_a_plan_among_other_words() -> None:
    plan = read_plan(f"Sure, here it is:\n```json\n{json.dumps(GOOD)}\n``` Anything else? {{}}")
    assert (plan.ratios, plan.regions) == ("1,2", GOOD["regions"])


def test_the_error_is_told_back_and_the_model_asked_again() -> None:
    heard: list[Any] = []

    def ask(messages: Any) -> str:
        heard.append(messages)
        return "a cat" if len(heard) < 3 else json.dumps(GOOD)

    assert plan_with(ask, "a cat and a dog").ratios == "1,2"
    assert [len(messages) for messages in heard] == [2, 4, 4]
    assert heard[0][1]["content"] == "a cat and a dog"
    assert heard[2][2]["content"] == "a cat" and "no JSON object" in heard[2][3]["content"]
    with pytest.raises(ModelError, match="'x' gave no plan in 2 attempts.*'nothing but words'.*no JSON"):
        plan_with(lambda messages: "nothing but\nwords", "a cat and a dog", retries=1, name="x")


def test_a_model_that_talks_nonsense(tmp_path: Path) -> None:
    folder = str(tiny_language_model(tmp_path))
    chosen = PlannerSettings(text_model=folder, retries=1, new_tokens=8)
    with pytest.raises(ModelError, match="gave no plan in 2 attempts"):
        plan_regions("a cat and a dog", chosen)
    with pytest.raises(ModelError, match="no folder"):
        plan_regions("a cat and a dog", PlannerSettings(text_model=str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no causal language model"):
        plan_regions("a cat and a dog", PlannerSettings(text_model=str(tmp_path / "empty")))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}ok", None),
        ("{{ raise_exception('I refuse') }}", "cannot be used: I refuse"),
        ("{{ messages[0].nothing.more }}", "cannot be used"),
        ("{% if %}", "cannot be used"),
    ],
)
def test_templates_that_refuse(template: str, said: str | None, tmp_path: Path) -> None:
    folder = tiny_language_model(tmp_path)
    (folder / "chat_template.jinja").write_text(template)
    chosen = PlannerSettings(text_model=str(folder), retries=1, new_tokens=8)
    with pytest.raises(ModelError, match=said or "gave no plan in 2 attempts"):
        plan_regions("a cat and a dog", chosen)


def test_the_systems_part_goes_to_the_user_where_it_is_refused(tmp_path: Path) -> None:
    folder = tiny_language_model(tmp_path)
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(
        refusing + "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    )
    writer = load_text_writer(str(folder), "")
    said = [{"role": "system", "content": "Plan."}, {"role": "user", "content": "a cat"}]
    assert writer.as_text([*said, {"role": "assistant", "content": "no"}]) == "[user] Plan.\n\na cat [assistant] no "


@pytest.mark.parametrize(
    ("name", "data"),
    [("model.safetensors", b"nothing"), ("tokenizer.json", b'{"version": "1.0", "model": 3}'), ("config.json", b"{")],
)
def test_broken_models_are_named(name: str, data: bytes, tmp_path: Path) -> None:
    folder = tiny_language_model(tmp_path)
    (folder / name).write_bytes(data)
    with pytest.raises(ModelError, match="writer' is no causal language model.*plans then come from rules"):
        plan_regions("a cat and a dog", PlannerSettings(text_model=str(folder)))


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    folder = tiny_language_model(tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no causal language model in safetensors"):
        plan_regions("a cat and a dog", PlannerSettings(text_model=str(folder)))
    with pytest.raises(ModelError, match="sentences then come from rules"):
        sentences_from_model(folder, "cat", 1)


class Service:
    """A service on this machine that gives its answers one after another."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, bytes]] = []
        self.heard: list[tuple[str, dict[str, Any], str | None]] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.heard.append((self.path, body, self.headers.get("Authorization")))
                code, data = service.answers.pop(0)
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def says(self, *contents: str) -> None:
        self.answers += [
            (200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode())
            for text in contents
        ]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    yield made
    made.close()


def test_an_endpoint(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = PlannerSettings(endpoint=service.address, endpoint_model="planner", key_variable="A_TEST_KEY")
    monkeypatch.delenv("A_TEST_KEY", raising=False)
    assert service.heard == [], "nothing is contacted before it is asked"
    service.says("no plan", json.dumps(GOOD))
    assert plan_regions("a cat and a dog", chosen).regions == GOOD["regions"]
    (path, first, key), (_, second, _) = service.heard
    assert path == "/v1/chat/completions" and first["model"] == "planner" and key is None
    assert "not a plan" in second["messages"][-1]["content"]
    monkeypatch.setenv("A_TEST_KEY", "secret")
    service.says(json.dumps(GOOD))
    plan_regions("a cat and a dog", chosen)
    assert service.heard[-1][2] == "Bearer secret"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((500, b"oh"), "answered 500"),
        ((200, b"<html>"), "no OpenAI-compatible service; it answered '<html>'"),
        ((200, b'{"choices": []}'), "no OpenAI-compatible"),
        ((200, b" " * 1_000_001), "more than 1000000 bytes"),
    ],
)
def test_an_endpoint_that_is_none(service: Service, answer: tuple[int, bytes], said: str) -> None:
    service.answers.append(answer)
    with pytest.raises(ModelError, match=said):
        plan_regions("a cat and a dog", PlannerSettings(endpoint=service.address))


def test_an_endpoint_that_is_not_there(service: Service) -> None:
    address = service.address
    service.server.server_close()
    with pytest.raises(ModelError, match="does not answer.*Is it running"):
        plan_regions("a cat and a dog", PlannerSettings(endpoint=address, timeout=2))
    for place in ("http://localhost:abc/v1", "http://localhost:99999999/v1", "http://[::1/v1"):
        with pytest.raises(ModelError, match="does not answer"):
            plan_regions("a cat and a dog", PlannerSettings(endpoint=place, timeout=2))
    for bad in ({"endpoint": "ftp://x"}, {"retries": -1}, {"model": "x"}, {"text_model": "x", "endpoint": address}):
        with pytest.raises(InputError):
            PlannerSettings(**bad)


def test_the_command_prints_a_run_that_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = "a red cat on the left and a blue dog on the right"
    assert main(["plan", words, "--model", str(tiny_folder()), "--seed", "3", "--base-ratio", "0.3"]) == 0
    printed = capsys.readouterr().out
    spec = RunSpec.from_yaml(printed)
    (control,) = spec.controls
    assert isinstance(control, RegionalPrompts)
    assert (control.regions, control.ratios, control.base_ratio) == (("a red cat", "a blue dog"), "1,1", 0.3)
    assert (spec.prompt, spec.seed) == (words, 3)
    Path("run.yaml").write_text(printed)
    assert main(["explain", "run.yaml"]) == 0
    assert "RegionalPrompts" in capsys.readouterr().out
    assert main(["generate", "--config", "run.yaml", "--steps", "2", "--size", "32", "-o", "out.png"]) == 0
    assert Path("out.png").exists()
    capsys.readouterr()
    assert main(["plan", words, "--json"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["prompt"] == words
    Path("run.json").write_text(printed)
    assert main(["explain", "run.json"]) == 0
    capsys.readouterr()
    assert main(["plan", "a cat"]) == 2
    assert "names one thing" in capsys.readouterr().err
