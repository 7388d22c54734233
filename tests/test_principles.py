"""The principle writer: what is made of a model's answers, what is dropped and said, what survives a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from factory import tiny_model
from openai_server import OpenAIServer
from text_factory import byte_tokenizer

from sami_fast.cli import main
from sami_fast.constitutions import load_principles
from sami_fast.endpoint import Endpoint, EndpointError
from sami_fast.principles import ModelWriter, parse_principle, write_principles

TASK = "Summarise posts of a forum."


class Script:
    """A writer that gives its answers in turn, or by what the prompt is about."""

    def __init__(self, *answers):
        self.answers, self.calls = list(answers), []

    def complete(self, prompt, *, max_tokens, temperature, seed=None):
        self.calls.append((prompt, seed))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.mark.parametrize(
    ("reply", "principle", "others"),
    [
        ("Keep it short and plain.", "Keep it short and plain.", []),
        ("1. Keep it short and plain.", "Keep it short and plain.", []),
        ("(2) Keep it short.", "Keep it short.", []),
        ("- **Principle:** Keep it short.", "Keep it short.", []),
        ('Antithesis: "Ramble at length, always."', "Ramble at length, always.", []),
        ("Sure! Here is a principle:\n\nKeep it short.\n\nI hope this helps!", "Keep it short.", []),
        ("Certainly, here's one: Keep it short.", "Keep it short.", []),
        ("Keep it short.\nUse few words.", "Keep it short.", ["Use few words."]),
        ("<think>The user wants\na principle.</think>\nKeep it short.", "Keep it short.", []),
        ("### Principle 1: Keep it short.", "Keep it short.", []),
        ("Prompt: keep it short.", "keep it short.", []),
        ("```\nKeep it short.\n```", "Keep it short.", []),
        ("The antithesis would be: Ramble on.", "Ramble on.", []),
        ("3 sentences are enough for a summary.", "3 sentences are enough for a summary.", []),
        ("Here is the principle you asked for:", "", []),
        ("<think>endless thoughts", "", []),
        ("\n \n", "", []),
    ],
)
def test_parsing(reply, principle, others):
    assert parse_principle(reply) == (principle, others)


def test_writes_a_file_that_people_edit_and_the_package_reads(tmp_path):
    path = tmp_path / "p.json"
    writer = Script("1. Be brief, always.", "Ramble on and on.", "Say nothing untrue.", "Make up some details.")
    written = write_principles(path, writer, TASK, ["concise", "faithful"])
    assert not written.missing and not written.dropped
    assert load_principles(path) == written.principles
    assert [(p.attribute, p.principle, p.antithesis) for p in written.principles] == [
        ("concise", "Be brief, always.", "Ramble on and on."),
        ("faithful", "Say nothing untrue.", "Make up some details."),
    ]
    assert all(TASK in prompt for prompt, _ in writer.calls)
    assert "concise" in writer.calls[0][0] and "Be brief, always." in writer.calls[1][0]
    edited = json.loads(path.read_text())
    edited["attributes"][0]["principle"] = "Be very brief, please."
    edited["default"] = ["concise"]
    path.write_text(json.dumps(edited))
    again = write_principles(path, Script("Be warm and kind.", "Be cold and short."), TASK, ["concise", "warm"])
    assert [p.principle for p in again.principles] == [
        "Be very brief, please.",
        "Say nothing untrue.",
        "Be warm and kind.",
    ]
    assert [p.attribute for p in load_principles(path)] == ["concise"], "the person's default is kept"


def test_what_cannot_be_used_is_asked_for_again_and_reported(tmp_path):
    path = tmp_path / "p.json"
    answers = ["", "Short.", "Be brief, always.", "be BRIEF always", "word " * 61, "Ramble on and on.\nReally."]
    writer = Script(*answers, "Ramble on and on!", "Be brief: always.", "")
    written = write_principles(path, writer, TASK, ["concise", "plain"], attempts=3, seed=5)
    assert [(d.attribute, d.reason) for d in written.dropped] == [
        ("concise", "empty"),
        ("concise", "too short"),
        ("concise", "duplicate"),
        ("concise", "too long"),
        ("concise", "beside the principle"),
        ("plain", "duplicate"),
        ("plain", "duplicate"),
        ("plain", "empty"),
    ]
    assert written.missing == ["plain"] and [p.attribute for p in load_principles(path)] == ["concise"]
    assert [seed for _, seed in writer.calls] == [5, 6, 7] * 3, "each attempt has another seed"


def test_what_was_written_outlives_the_endpoint(tmp_path):
    path = tmp_path / "p.json"
    writer = Script("Be brief, always.", "Ramble on and on.", EndpointError("m: gone"))
    with pytest.raises(EndpointError, match="m: gone"):
        write_principles(path, writer, TASK, ["concise", "plain"])
    assert [p.attribute for p in load_principles(path)] == ["concise"]


def test_bad_arguments(tmp_path):
    for change, message in (
        ({"task": " "}, "task: expected a description"),
        ({"attributes": []}, "attributes: expected a list"),
        ({"attributes": "concise"}, "attributes: expected a list"),
        ({"attributes": ["a", "a "]}, "attributes: expected different names"),
        ({"attributes": ["a", 3]}, "attributes: expected different names"),
        ({"attempts": 0}, "attempts: expected at least 1"),
    ):
        options = {"task": TASK, "attributes": ["a"]} | change
        with pytest.raises(ValueError, match=f"^{message}"):
            write_principles(tmp_path / "p.json", Script(), **options)
    (tmp_path / "other.json").write_text('{"attributes": 3}')
    with pytest.raises(ValueError, match=r"other.json: 'attributes': expected a list"):
        write_principles(tmp_path / "other.json", Script(), TASK, ["a"])
    assert json.loads((tmp_path / "other.json").read_text()) == {"attributes": 3}


def test_a_causal_model_as_the_writer(tmp_path):
    tokenizer = byte_tokenizer()
    writer = ModelWriter(tiny_model("llama", vocab_size=259, max_position_embeddings=1024), tokenizer)
    draw = [writer.complete("Hello.", max_tokens=8, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert draw[0] == draw[1] != draw[2]
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    assert writer.complete("Hello.", max_tokens=8, temperature=1.0, seed=0) != draw[0]
    written = write_principles(tmp_path / "p.json", writer, TASK, ["concise"], attempts=2, max_tokens=24)
    assert len(written.principles) + len(written.missing) == 1 and (written.dropped or written.principles)


def about(messages):
    """An honest model: a principle for what the prompt names."""
    prompt = messages[0]["content"]
    attribute = re.search(r"attribute(?: of a response:|,) (\w+)", prompt)[1]
    return f"Sure!\n\nBe {'the opposite of ' if 'antithesis' in prompt else ''}{attribute} in every summary."


def test_command_line(tmp_path, capsys):
    pytest.importorskip("openai")
    path = tmp_path / "p.json"
    with OpenAIServer(lambda messages: 400 if "broken" in str(messages) else about(messages)) as server:
        endpoint = [f"endpoint.base_url={server.url}", "endpoint.model=m", "endpoint.max_retries=0"]
        arguments = ["write-principles", f"task={TASK}", f"output={path}", *endpoint]
        assert main([*arguments, "attributes=[concise, faithful]"]) == 0
        out = capsys.readouterr().out
        assert "concise\n  + Be concise in every summary.\n  - Be the opposite of concise in every summary." in out
        assert main([*arguments, "attributes=[broken]"]) == 1
        assert "m: http" in capsys.readouterr().err
    assert [p.attribute for p in load_principles(path)] == ["concise", "faithful"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task=x", "attributes=[a]"], "output: expected text, got None"),
        (["task=x", "output=o", "attributes=a"], "attributes: expected a list"),
        (["task=x", "output=o", "attributes=[a]", "endpoint=m"], "endpoint: expected a section"),
        (
            ["task=x", "output=o", "attributes=[a]", "endpoint.url=m"],
            "endpoint.url: unknown key. Known keys: api_key_env, base_url",
        ),
        (
            ["task=x", "output=o", "attributes=[a]", "endpoint.model=m", "model.name=n"],
            "expected one of them, got both",
        ),
        (
            ["task=x", "output=o", "attributes=[a]", "attempts=few"],
            "attempts: expected an int of at least 1, got",
        ),
        (["task=x", "output=o", "attributes=[a]", "max_tokens=0"], "max_tokens: expected an int of at least 1, got 0"),
        (["task=x", "output=o", "attributes=[a]", "temperature=-1"], "temperature: expected a number of at least 0"),
        (["task=x", "output=o", "attributes=[a]", "seed=x"], "seed: expected an int, got 'x'"),
        (["task=x", "tusk=y"], "tusk: unknown key, did you mean 'task'"),
    ],
)
def test_bad_command_lines(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["write-principles", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_killed_and_continued(tmp_path):
    pytest.importorskip("openai")
    path, stuck, release = tmp_path / "p.json", threading.Event(), threading.Event()

    def reply(messages):
        if "faithful" in messages[0]["content"] and not release.is_set():
            stuck.set()
            release.wait(30)
        return about(messages)

    with OpenAIServer(reply) as server:
        arguments = [f"task={TASK}", f"output={path}", f"endpoint.base_url={server.url}", "endpoint.model=m"]
        command = [sys.executable, "-m", "sami_fast.cli", "write-principles", *arguments]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        child = subprocess.Popen([*command, "attributes=[concise, faithful]"], env=environment)
        assert stuck.wait(60)
        child.send_signal(signal.SIGKILL)
        child.wait()
        release.set()
        assert [p.attribute for p in load_principles(path)] == ["concise"]
        asked = len(server.requests)
        written = write_principles(path, Endpoint("m", server.url), TASK, ["concise", "faithful"])
        assert [p.attribute for p in written.principles] == ["concise", "faithful"]
        assert len(server.requests) == asked + 2, "nothing is asked twice"
