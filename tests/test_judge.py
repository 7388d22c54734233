"""The judge: every pair asked in both orders, answers read, runs that stop go on; endpoints that fail in every way."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from judge_pairs import brief, lines, make_pairs, prompts, shown, write_pairs
from openai_server import OpenAIServer

from sami_fast.comparison import JudgeTemplate, compare_files, judge_pairs
from sami_fast.endpoint import Endpoint, EndpointError
from sami_fast.judge import EndpointJudge, parse_choice
from sami_fast.win_rate import Pair

pytest.importorskip("openai")

REAL = Path(__file__).parents[2] / "shared/data/tldr_sample.jsonl"


def ask(server, pairs, path, *, timeout=5.0, retries=2, **options):
    judge = EndpointJudge(Endpoint("judge-1", server.url, timeout=timeout, max_retries=retries), **options)
    return judge_pairs(pairs, judge, path, progress=False)


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
