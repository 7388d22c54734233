"""`sami-fast evaluate`, by a model and by judges: killed, with a full disk, with bad arguments."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from factory import tiny_model
from judge_pairs import brief, lines, make_pairs, prompts, write, write_pairs
from openai_server import OpenAIServer
from transformers import AutoModelForCausalLM, AutoTokenizer

from sami_fast.cli import main
from sami_fast.data import GroupDataset
from sami_fast.evaluation import score_groups, summarize, summarize_lengths
from sami_fast.examples import load_examples
from sami_fast.judge import LocalJudge
from sami_fast.stages import digest

pytest.importorskip("openai")
pytest_plugins = ["judge_pairs"]


def command(files, server, output, **options):
    options = {"responses": files[0], "against": files[1], "judge": server.url, "judge-model": "judge-1"} | options
    options |= {"output": output}
    return ["evaluate", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def process(arguments, **options):
    words = [sys.executable, "-m", "sami_fast.cli", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_a_killed_run_goes_on_and_asks_nothing_twice(tmp_path, capsys):
    pairs, reached = make_pairs(12), threading.Event()
    files, output = write_pairs(tmp_path, pairs), tmp_path / "out/rate.json"
    verdicts = tmp_path / "out/rate.verdicts.jsonl"

    def reply(messages):
        if verdicts.exists() and verdicts.read_bytes().count(b"\n") >= 9:
            reached.set()
            time.sleep(60)
        return brief(messages)

    with OpenAIServer(reply) as server:
        run = process(command(files, server, output, concurrency=1))
        try:
            assert reached.wait(120)
        finally:
            run.send_signal(signal.SIGKILL)
            run.communicate()
    kept = lines(verdicts)
    assert len(kept) == 9 and not output.exists()
    with OpenAIServer(brief) as second:
        assert main(command(files, second, output)) == 0
    assert len(set(prompts(server)[:9]) | set(prompts(second))) == 24 and len(prompts(second)) == 15
    assert lines(verdicts)[:9] == kept
    result = json.loads(output.read_text())
    assert result["win_rate"]["mean"] == 0.5 and result["wins"] == result["losses"] == 6
    assert result["length_controlled"]["mean"] == pytest.approx(0.5, abs=0.01)
    assert result["consistency"]["mean"] == 1 and result["judge"]["template"] == "reasoned"
    assert "length_controlled" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limit on file sizes here")
def test_a_disk_that_fills_up_stops_the_run_and_keeps_whole_lines(tmp_path):
    files, output = write_pairs(tmp_path, make_pairs(8)), tmp_path / "rate.json"

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))

    with OpenAIServer(brief) as server:
        run = process(command(files, server, output, concurrency=1), preexec_fn=small_disk)
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 1 and "Traceback" not in errors
        assert "File too large" in errors and "questions answered; they are kept in" in errors
        verdicts = tmp_path / "rate.verdicts.jsonl"
        whole = verdicts.read_bytes().count(b"\n")
        assert verdicts.stat().st_size == 900 and 2 <= whole < 16
        asked = len(server.requests)
        assert main(command(files, server, output)) == 0
    assert len(lines(verdicts)) == 16 and len(server.requests) - asked == 16 - whole


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, local):
    folder = tmp_path_factory.mktemp("model")
    for part in local:
        part.save_pretrained(folder)
    return folder


def test_the_command_evaluates_a_model(tmp_path, model_folder, capsys):
    rows = [
        {
            "query": f"Query {i}?",
            "constitutions": ["Be brief.", "Be long."],
            "responses": ["Yes.", "Yes, for" + " so" * i],
        }
        for i in range(5)
    ]
    data, output = write(tmp_path / "groups.jsonl", rows), tmp_path / "evaluation.json"
    arguments = ["evaluate", "--model", str(model_folder), "--data", str(data), "--device", "cpu"]
    assert main([*arguments, "--output", str(output)]) == 0
    assert "response_tokens" in capsys.readouterr().out
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    groups = GroupDataset.from_examples(load_examples(data), tokenizer).groups
    expected = summarize(list(score_groups(model, groups))) | {"response_tokens": summarize_lengths(groups)}
    written = json.loads(output.read_text())
    assert written["groups"] == 5
    for name, numbers in expected.items():
        assert written[name] == pytest.approx(numbers, abs=1e-5), name
    lengths = [np.mean([len(response) for response in group.responses]) for group in groups]
    assert written["response_tokens"]["mean"] == pytest.approx(np.mean(lengths))


def test_the_command_asks_a_local_judge(tmp_path, model_folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = write_pairs(tmp_path, make_pairs(3, constitution=None))
    arguments = ["--responses", str(files[0]), "--against", str(files[1]), "--judge", str(model_folder)]
    assert main(["evaluate", *arguments, "--device", "cpu"]) == 0
    result = json.loads((tmp_path / "win_rate.json").read_text())
    assert result["pairs"] == 3 and result["by_log_odds"] is not None and result["judge"]["template"] == "letter"
    output = capsys.readouterr().out
    assert "consistency" in output and "first_position" in output and "questions 6" in output


def test_the_command_tells_a_local_judge_by_its_weights(tmp_path, model_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files, mine = write_pairs(tmp_path, make_pairs(3)), tmp_path / "judge"
    shutil.copytree(model_folder, mine)
    arguments = ["evaluate", "--responses", str(files[0]), "--against", str(files[1]), "--device", "cpu", "--judge"]
    verdicts, asked, answers = tmp_path / "win_rate.verdicts.jsonl", [], LocalJudge.answers
    monkeypatch.setattr(LocalJudge, "answers", lambda self, rest: asked.append(len(rest)) or answers(self, rest))
    assert main([*arguments, str(mine)]) == 0
    whole = verdicts.read_text()
    verdicts.write_text("".join(whole.splitlines(keepends=True)[:4]))
    assert main([*arguments, str(mine)]) == 0 and verdicts.read_text() == whole
    other = tiny_model("llama", vocab_size=259, max_position_embeddings=2048, dtype=torch.float32, seed=1)
    other.save_pretrained(mine)
    assert main([*arguments, str(mine)]) == 0
    assert asked == [6, 2, 6], "another model under the same name is another judge"
    assert len(lines(verdicts)) == 12 and len({row["key"] for row in lines(verdicts)}) == 12
    result = json.loads((tmp_path / "win_rate.json").read_text())
    assert result["judge"]["weights"] == digest(mine) and result["questions"] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --model and --data, or --responses, --against and --judge, got neither"),
        (["--model", "m"], "got --model"),
        (["--model", "m", "--data", "d", "--judge", "j"], "got --model, --data, --judge"),
        (["--responses", "a", "--against", "b", "--judge", "http://x/v1"], "--judge-model: expected one exactly with"),
        (["--responses", "a", "--against", "b", "--judge", "m", "--judge-model", "n"], "--judge-model: expected one"),
        (["--model", "m", "--data", "d.jsonl", "--limit", "0"], "--limit: expected at least 1, got 0"),
        (["--model", "m", "--data", "missing.jsonl"], "missing.jsonl"),
        (
            [
                "--responses",
                "no.jsonl",
                "--against",
                "no.jsonl",
                "--judge",
                "http://localhost:1/v1",
                "--judge-model",
                "n",
            ],
            "no.jsonl",
        ),
        (
            [
                "--responses",
                "a",
                "--against",
                "b",
                "--judge",
                "http://x/v1",
                "--judge-model",
                "n",
                "--concurrency",
                "0",
            ],
            "concurrency: expected at least 1, got 0",
        ),
    ],
)
def test_bad_command_lines_say_what_is_wrong(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *arguments]) == 1
    assert message in capsys.readouterr().err
