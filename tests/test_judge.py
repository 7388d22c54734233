"""The judge: every pair asked in both orders, answers read, runs that stop go on; endpoints that fail in every way."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from factory import tiny_model
from openai_server import OpenAIServer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sami_fast.cli import main
from sami_fast.data import GroupDataset, load_examples
from sami_fast.endpoint import Endpoint, EndpointError
from sami_fast.evaluation import score_groups, summarize, summarize_lengths
from sami_fast.judge import EndpointJudge, JudgeTemplate, LocalJudge, compare_files, judge_pairs, parse_choice
from sami_fast.win_rate import Pair

pytest.importorskip("openai")

REAL = Path(__file__).parents[2] / "shared/data/tldr_sample.jsonl"


def make_pairs(count, constitution="Be brief."):
    """Pair i: the response is shorter than the other when i is even."""
    texts = ["Yes.", "Yes, and here is why, at some length."]
    return [Pair(f"p{i}", f"Query {i}?", constitution, *(texts if i % 2 == 0 else texts[::-1])) for i in range(count)]


def shown(messages):
    """Texts of responses A and B in a question."""
    (message,) = messages
    return [re.search(rf"<response_{x}>\n(.*)\n</response_{x}>", message["content"], re.S)[1] for x in "ab"]


def brief(messages):
    a, b = shown(messages)
    return f"Comparison: response A has {len(a)} characters.\n\n**Final choice:** {'A' if len(a) < len(b) else 'B'}"


def ask(server, pairs, path, *, timeout=5.0, retries=2, **options):
    judge = EndpointJudge(Endpoint("judge-1", server.url, timeout=timeout, max_retries=retries), **options)
    return judge_pairs(pairs, judge, path, progress=False)


def prompts(server):
    return [request["messages"][0]["content"] for request in server.requests]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("Comparison: B rambles, so A is better.\nFinal choice: A", "A"),
        ("Comparison: ...\n\n**Final Choice:** **B**", "B"),
        ('Final choice: "A"', "A"),
        ("Final response:\nB.", "B"),
        ("final choice: <b>", "B"),
        ("Comparison: fine. Preferred: Response B.", "B"),
        ("Final choice: A\n\nLet me know if I can help further!", "A"),
        ("A", "A"),
        ("I prefer the second.\n[[B]]", "B"),
        ("Better response: B", "B"),
        ("Final choice: A is better.", "A"),
        ("Final choice: tie", "tie"),
        ("Final choice: Both are equally good.", "tie"),
        ("Final choice: A and B", "tie"),
        ("Final choice: <A or B>", None),
        ("Response A: is short.\nResponse B: is long.", None),
        ("Final choice: neither one, or A\nA", "tie"),
        ("A good question. I cannot say.", None),
        ("B is better than A in my view, but hard to say", None),
        ("Final choice: C", None),
        ("", None),
    ],
)
def test_choices_are_read_and_never_guessed(text, choice):
    assert parse_choice(text) == choice


def test_templates_put_texts_in_verbatim_and_leave_out_missing_principles():
    for name in ("reasoned", "letter"):
        template = JudgeTemplate.load(name)
        full = template.render("q {response_b}", "c {query}", "a\n\nb", "{constitution}")
        assert all(
            text in full for text in ("q {response_b}", "c {query}", "a\n\nb", "\n{constitution}\n", "principles")
        )
        assert full.index("a\n\nb") < full.index("\n{constitution}\n")
        without = template.render("q", None, "a {constitution}", "b")
        assert "principles" not in without and "a {constitution}" in without and "q" in without


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{query} {response_a}", r"mine\.txt: expected the placeholder \{response_b\}"),
        ("{query} {response_a} {response_b} {other}", r"mine\.txt: .*got \{other\}"),
        (b"{query}\xff", r"mine\.txt: not UTF-8 at byte 7"),
        (None, "template: expected a file or one of letter, reasoned, got"),
    ],
)
def test_bad_templates_are_refused(tmp_path, text, message):
    path = tmp_path / "mine.txt"
    if text is not None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=message):
        JudgeTemplate.load(path)


def test_a_template_that_needs_principles_says_so():
    template = JudgeTemplate("{query} by {constitution}\n\n{response_a} {response_b}")
    assert template.render("q", "c", "a", "b") == "q by c\n\na b"
    with pytest.raises(ValueError, match=r"expected \{constitution\} in a paragraph of its own"):
        template.render("q", None, "a", "b")


def test_every_pair_is_asked_in_both_orders(tmp_path):
    pairs = [*make_pairs(6), Pair("same", "Query?", None, "Equal.", "Equal.")]
    with OpenAIServer(brief) as server:
        outcomes = ask(server, pairs, tmp_path / "v.jsonl")
    assert [outcome.scores for outcome in outcomes] == [(1, 1), (0, 0)] * 3 + [(0.5, 0.5)]
    assert [outcome.identical for outcome in outcomes] == [False] * 6 + [True]
    assert len(prompts(server)) == len(set(prompts(server))) == 12
    assert {tuple(shown(request["messages"])) for request in server.requests} == {
        order for p in pairs[:2] for order in ((p.response, p.against), (p.against, p.response))
    }
    assert all(request["temperature"] == 0 and request["max_tokens"] == 400 for request in server.requests)
    rows = lines(tmp_path / "v.jsonl")
    assert len(rows) == 12 and {row["winner"] for row in rows if row["id"] == "p1"} == {"against"}
    assert all(row["judge"] == "judge-1" and "Final choice" in row["text"] for row in rows)


def test_questions_are_asked_at_the_same_time(tmp_path):
    barrier = threading.Barrier(4, timeout=20)

    def reply(messages):
        barrier.wait()
        return brief(messages)

    with OpenAIServer(reply) as server:
        outcomes = ask(server, make_pairs(4), tmp_path / "v.jsonl", timeout=30, concurrency=4)
    assert [outcome.scores[0] for outcome in outcomes] == [1, 0, 1, 0]


def test_a_judge_that_cannot_be_read_makes_ties_that_are_counted(tmp_path):
    def reply(messages):
        return "I would rather not." if "Query 0" in messages[0]["content"] else brief(messages)

    with OpenAIServer(reply) as server:
        outcomes = ask(server, make_pairs(2), tmp_path / "v.jsonl")
        assert outcomes[0].scores == (0.5, 0.5) and outcomes[0].readable == (False, False)
        assert ask(server, make_pairs(2), tmp_path / "v.jsonl") == outcomes
    assert len(server.requests) == 4, "an answer that cannot be read is an answer"


def test_an_answer_without_text_is_unreadable_and_stops_nothing(tmp_path, caplog):
    def reply(messages):
        if "Query 0" not in messages[0]["content"]:
            return brief(messages)
        return b'{"choices": [{"message": {"role": "assistant", "content": null}, "finish_reason": "content_filter"}]}'

    with OpenAIServer(reply) as server:
        outcomes = ask(server, make_pairs(2), tmp_path / "v.jsonl")
        assert [outcome.readable for outcome in outcomes] == [(False, False), (True, True)]
        assert [outcome.scores for outcome in outcomes] == [(0.5, 0.5), (0, 0)]
        assert caplog.text.count("gave an answer without text, counted as unreadable") == 2
        assert ask(server, make_pairs(2), tmp_path / "v.jsonl") == outcomes
    assert len(server.requests) == 4 and [row["winner"] for row in lines(tmp_path / "v.jsonl")].count(None) == 2


def test_half_an_emoji_in_an_answer_is_kept_as_a_question_mark(tmp_path):
    def reply(messages):
        return "It is \ud83d" if "Query 0" in messages[0]["content"] else brief(messages)

    with OpenAIServer(reply) as server:
        outcomes = ask(server, make_pairs(2), tmp_path / "v.jsonl")
    assert [outcome.scores for outcome in outcomes] == [(0.5, 0.5), (0, 0)]
    assert [row["text"] for row in lines(tmp_path / "v.jsonl") if row["id"] == "p0"] == ["It is ?"] * 2


def test_busy_endpoints_are_asked_again(tmp_path):
    seen = set()

    def reply(messages):
        content = messages[0]["content"]
        if content not in seen:
            seen.add(content)
            return 429
        return brief(messages)

    with OpenAIServer(reply) as server:
        outcomes = ask(server, make_pairs(2), tmp_path / "v.jsonl")
    assert [outcome.scores for outcome in outcomes] == [(1, 1), (0, 0)] and len(server.requests) == 8


def late(_messages):
    time.sleep(0.6)
    return "Final choice: A"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda _: 500, "judge-1: .* answered 500"),
        (lambda _: 401, "judge-1: .* answered 401"),
        (lambda _: b"<html>not what was asked for", "judge-1: "),
        (lambda _: b'{"choices": []}', "judge-1: "),
        (late, "judge-1: .* gave no answer in"),
    ],
    ids=["500 always", "401", "garbage", "empty", "late"],
)
def test_failures_stop_the_run_and_keep_what_was_answered(tmp_path, fault, message, caplog):
    path, broken = tmp_path / "v.jsonl", threading.Event()

    def reply(messages):
        if broken.is_set():
            return fault(messages)
        if "Query 2" in messages[0]["content"]:
            broken.set()
            return fault(messages)
        return brief(messages)

    with OpenAIServer(reply) as server:
        with pytest.raises(EndpointError, match=message):
            ask(server, make_pairs(20), path, timeout=0.3, retries=1, concurrency=1)
        kept = lines(path)
        assert [row["id"] for row in kept] == ["p0", "p0", "p1", "p1"]
        assert "stopped with 4 of 40 questions answered" in caplog.text
        assert len(server.requests) <= 4 + 2, "nothing new is asked after a failure"
    with OpenAIServer(brief) as server:
        outcomes = ask(server, make_pairs(20), path)
    assert [outcome.scores for outcome in outcomes] == [(1, 1), (0, 0)] * 10
    assert len(server.requests) == 36 and lines(path)[:4] == kept


def test_answers_in_flight_at_a_failure_are_kept(tmp_path):
    arrived = threading.Barrier(3, timeout=20)

    def reply(messages):
        arrived.wait()  # three questions are in flight together; one fails, the other two are answered later
        if "Query 0" in messages[0]["content"] and len(shown(messages)[0]) < 10:
            return 400
        time.sleep(0.2)
        return brief(messages)

    with OpenAIServer(reply) as server, pytest.raises(EndpointError, match="answered 400"):
        ask(server, make_pairs(5), tmp_path / "v.jsonl", timeout=30, concurrency=3)
    assert len(lines(tmp_path / "v.jsonl")) == 2 and len(server.requests) == 3


def test_another_judge_or_other_settings_are_asked_anew(tmp_path, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "v.jsonl"
    with OpenAIServer(brief) as server:
        ask(server, make_pairs(2), path)
        ask(server, make_pairs(2), path, temperature=0.5)
        assert len(server.requests) == 8 and "also holds 4 answers to other questions" in caplog.text
        ask(server, make_pairs(3), path)
        assert len(server.requests) == 10, "only the new pair"


def test_a_line_that_was_cut_off_is_asked_again(tmp_path):
    path = tmp_path / "v.jsonl"
    with OpenAIServer(brief) as server:
        outcomes = ask(server, make_pairs(2), path, concurrency=1)
        whole = path.read_bytes()
        path.write_bytes(whole[:-30])
        assert ask(server, make_pairs(2), path, concurrency=1) == outcomes
    assert len(server.requests) == 5 and path.read_bytes() == whole


def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "v.jsonl"
    path.write_text('{"query": "q"}\n')
    with OpenAIServer(brief) as server, pytest.raises(ValueError, match=r"v\.jsonl: expected verdicts, got"):
        ask(server, make_pairs(1), path)
    assert path.read_text() == '{"query": "q"}\n' and not server.requests


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_pairs(folder, pairs):
    def rows(field):
        return [{"query": p.query, "constitution": p.constitution, "response": getattr(p, field)} for p in pairs]

    return [write(folder / f"{field}.jsonl", rows(field)) for field in ("response", "against")]


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


def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    table = {"<unk>": 0, "<s>": 1, "</s>": 2, **{c: i for i, c in enumerate(alphabet, 3)}}
    tokenizer = Tokenizer(models.BPE(table, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def local():
    model = tiny_model("llama", vocab_size=259, max_position_embeddings=2048, dtype=torch.float32)
    return model, byte_tokenizer()


@pytest.mark.parametrize("chat", [False, True])
def test_a_local_judge_reads_the_likelier_letter(tmp_path, local, chat):
    model, tokenizer = local[0], byte_tokenizer()
    if chat:
        tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    pairs = [*make_pairs(3), Pair("plain", "No principles?", None, "One.", "Two!")]
    outcomes = judge_pairs(pairs, LocalJudge(model, tokenizer, "tiny"), tmp_path / "v.jsonl", progress=False)
    template = JudgeTemplate.load("letter")
    for pair, outcome in zip(pairs, outcomes, strict=True):
        for order, (a, b) in enumerate(((pair.response, pair.against), (pair.against, pair.response))):
            text = template.render(pair.query, pair.constitution, a, b)
            ids = tokenizer.encode(f"<s>{text}</s>" if chat else text)
            space = [] if chat else tokenizer.encode(" ")
            letters = [tokenizer.encode(letter) for letter in "AB"]
            with torch.no_grad():
                logits = model(torch.tensor([ids + space])).logits[0, -1].double().log_softmax(-1)
            margin = float(logits[letters[0][0]] - logits[letters[1][0]])
            assert outcome.margins[order] == pytest.approx(margin, abs=1e-4)
            assert outcome.scores[order] == (margin > 0 if order == 0 else margin < 0)
    rows = lines(tmp_path / "v.jsonl")
    assert len(rows) == 8 and all(len(row["logprobs"]) == 2 and row["choice"] in "AB" for row in rows)


def test_a_local_judge_goes_on_with_half_a_pair(tmp_path, local):
    path, judge = tmp_path / "v.jsonl", LocalJudge(*local, "tiny", max_tokens=4096)
    outcomes = judge_pairs(make_pairs(4), judge, path, progress=False)
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join(rows[:3]))
    for outcome, again in zip(outcomes, judge_pairs(make_pairs(4), judge, path, progress=False), strict=True):
        assert outcome.scores == again.scores and np.allclose(outcome.margins, again.margins, atol=1e-5)
    assert len(lines(path)) == 8 and path.read_text().splitlines(keepends=True)[:3] == rows[:3]


def test_a_local_judge_with_nothing_left_to_ask(tmp_path, local):
    path, judge = tmp_path / "v.jsonl", LocalJudge(*local, "tiny", max_tokens=4096)
    same = [Pair("same", "Query?", None, "Equal.", "Equal.")]
    assert judge_pairs(same, judge, path, progress=False)[0].identical and not path.exists()
    first = judge_pairs(make_pairs(1), judge, path, progress=False)
    assert judge_pairs(make_pairs(1), judge, path, progress=False) == first


def test_a_local_judge_refuses_what_it_cannot_read(tmp_path, local):
    model, tokenizer = local
    long = [*make_pairs(1), Pair("long", "Query?", None, "word " * 500, "No.")]
    with pytest.raises(ValueError, match="pair 'long': expected at most 2048 tokens for this judge, got"):
        judge_pairs(long, LocalJudge(model, tokenizer, "tiny"), tmp_path / "v.jsonl", progress=False)
    assert not (tmp_path / "v.jsonl").exists(), "nothing was asked"
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "x": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="expected a tokenizer that tells A from B"):
        LocalJudge(model, PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]"), "tiny")


@pytest.mark.skipif(not REAL.exists(), reason="the shared data set is not there")
def test_real_responses_by_a_judge_that_likes_brevity(tmp_path):
    rows = lines(REAL)
    pairs = [
        Pair(str(row["id"]), row["query"], *texts)
        for row in rows
        for texts in zip(row["constitutions"], row["responses_trained"], row["responses"], strict=True)
    ]
    files = write_pairs(tmp_path, pairs)
    with OpenAIServer(brief) as server:
        endpoint = Endpoint("judge-1", server.url)
        result = compare_files(*files, EndpointJudge(endpoint), tmp_path / "rate.json", limit=20, progress=False)
    expected = [len(p.response) < len(p.against) for p in pairs[:20]]
    assert result["win_rate"]["mean"] == pytest.approx(np.mean(expected)) and result["unreadable"] == 0
    assert result["questions"] == len(server.requests) == 40 and result["first_position"]["mean"] == 0.5


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
