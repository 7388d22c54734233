"""The judge of a run: asked about each iteration, never twice about the same pair, cut off and continued."""

import json
import shutil
import signal

import numpy as np
import pytest
from pipeline_runs import begun, configure, copy_run, in_a_process, killed_at, rows_of, run

import sami_fast.pipeline as pipeline
from sami_fast.comparison import judge_pairs
from sami_fast.config import ModelConfig
from sami_fast.endpoint import EndpointError
from sami_fast.judge import LocalJudge
from sami_fast.model_store import ModelStore
from sami_fast.stages import read_manifest
from sami_fast.win_rate import load_pairs

pytest_plugins = ["pipeline_runs"]
pytestmark = pytest.mark.usefixtures("quick")

JUDGES = ["iteration-1/judge", "iteration-2/judge"]


def test_a_judge_is_asked_about_each_iteration_and_again_when_it_changes(
    inputs, finished, judge_model, tmp_path, monkeypatch
):
    folder, mine = copy_run(finished, tmp_path), tmp_path / "judge"
    shutil.copytree(judge_model, mine)
    question = judge_model.with_name("question.txt")
    before = begun(folder)

    def redone(*overrides):
        nonlocal before
        run(inputs, folder, "iterations.count=2", f"judge.model={mine}", f"judge.template={question}", *overrides)
        after = begun(folder)
        changed = sorted(name for name in after if after[name] != before.get(name))
        before = after
        return changed

    assert redone() == JUDGES
    for part in ("iteration-1", "iteration-2"):
        result = json.loads((folder / part / "judge/win_rate.json").read_text())
        pairs = load_pairs(*(folder / name / "evaluation/responses.jsonl" for name in (part, "iteration-0")))
        assert result["pairs"] == len(pairs) == 8 and result["judge"]["judge"] == str(mine)
        asked = {pair.id for pair in pairs if pair.response != pair.against}
        rows = rows_of(folder / part / "judge/win_rate.verdicts.jsonl")
        assert {row["id"] for row in rows} == asked and len(rows) == result["questions"] > 0
        judge = LocalJudge(*ModelStore(ModelConfig(str(mine), device="cpu")).get(str(mine)), "j", weights="w")
        expected = judge_pairs(pairs, judge, tmp_path / f"{part}.jsonl", template=question, progress=False)
        scores = np.mean([outcome.scores for outcome in expected])
        assert result["win_rate"]["mean"] == pytest.approx(scores) and result["by_log_odds"] is not None
        inputs_of = read_manifest(folder / part / "judge")["inputs"]
        assert inputs_of["judge"]["model"] == ModelStore(ModelConfig()).digest(str(mine)) != str(mine)
    with monkeypatch.context() as patch:
        patch.setattr(LocalJudge, "answers", lambda *_: pytest.fail("asked again"))
        assert redone("judge.max_tokens=9999", "judge.concurrency=2") == []
        assert redone("evaluation.normalize=sum") == [f"iteration-{n}/evaluation" for n in range(3)], "same responses"
    question.write_text(question.read_text() + " ")
    assert redone("evaluation.normalize=sum") == JUDGES
    same = ["evaluation.normalize=sum", "judge.max_pairs=3"]
    said = {part: rows_of(folder / part / "win_rate.verdicts.jsonl") for part in JUDGES}
    with monkeypatch.context() as patch:
        patch.setattr(LocalJudge, "answers", lambda *_: pytest.fail("asked again"))
        assert redone(*same) == JUDGES
        assert json.loads((folder / "iteration-1/judge/win_rate.json").read_text())["pairs"] == 3
        assert redone("evaluation.normalize=sum") == JUDGES, "all pairs again"
        assert redone(*same) == JUDGES
        (folder / "iteration-2/judge/win_rate.json").write_text("{}")
        assert redone(*same) == JUDGES[1:]
    assert said == {part: rows_of(folder / part / "win_rate.verdicts.jsonl") for part in JUDGES}
    (folder / "iteration-2/judge/win_rate.verdicts.jsonl").write_text("not what a judge said\n")
    assert redone(*same) == JUDGES[1:], "what is damaged is not kept"
    assert 0 < len(rows_of(folder / "iteration-2/judge/win_rate.verdicts.jsonl")) <= 6
    (mine / "config.json").write_text((mine / "config.json").read_text() + " ")
    assert redone(*same) == JUDGES
    changed = redone(*same, "evaluation.queries=1")
    assert set(changed) == {*JUDGES, *(f"iteration-{n}/evaluation" for n in range(3))}, "other responses"


def test_killed_while_a_judge_is_asked_and_continued(inputs, finished, judge_model, tmp_path, processes, monkeypatch):
    folder = copy_run(finished, tmp_path)
    options = [f"judge.model={judge_model}", f"judge.template={judge_model.with_name('question.txt')}"]
    config = configure(inputs, folder, "iterations.count=2", *options)
    assert in_a_process(processes, killed_at, JUDGES[0], 6, config) == -signal.SIGKILL
    verdicts = folder / "iteration-1/judge/win_rate.verdicts.jsonl"
    kept = verdicts.read_text().splitlines()
    assert len(kept) == 5 and read_manifest(folder / JUDGES[0])["status"] == "running", "four, and a torn one"
    asked, answers = [], LocalJudge.answers
    monkeypatch.setattr(LocalJudge, "answers", lambda self, rest: asked.append(len(rest)) or answers(self, rest))
    before = begun(folder)
    pipeline.run_pipeline(config)
    assert [name for name in before if begun(folder)[name] != before[name]] == [JUDGES[0]]
    result = json.loads((folder / JUDGES[0] / "win_rate.json").read_text())
    assert asked[0] == result["questions"] - 4 > 0 and len(asked) == 2
    assert verdicts.read_text().splitlines()[:4] == kept[:4] and len(rows_of(verdicts)) == result["questions"]


def test_an_endpoint_as_judge_fails_and_goes_on(inputs, finished, tmp_path):
    pytest.importorskip("openai")
    from judge_pairs import brief, prompts
    from openai_server import OpenAIServer

    folder = copy_run(finished, tmp_path)
    options = ["iterations.count=2", "judge.concurrency=1", "judge.endpoint.model=judge-1"]

    def ask(server):
        return run(inputs, folder, *options, f"judge.endpoint.base_url={server.url}")

    with (
        OpenAIServer(lambda messages: 401 if len(first.requests) > 5 else brief(messages)) as first,
        pytest.raises(EndpointError, match=r"judge-1: .* answered 401"),
    ):
        ask(first)
    assert len(rows_of(folder / "iteration-1/judge/win_rate.verdicts.jsonl")) == 5
    with OpenAIServer(brief) as second:
        ask(second)
        answered = len(second.requests)
        ask(second)
        assert len(second.requests) == answered
    questions = 0
    for part in ("iteration-1", "iteration-2"):
        result = json.loads((folder / part / "judge/win_rate.json").read_text())
        pairs = load_pairs(*(folder / name / "evaluation/responses.jsonl" for name in (part, "iteration-0")))
        lengths = [(len(pair.response), len(pair.against)) for pair in pairs]
        assert result["win_rate"]["mean"] == pytest.approx(np.mean([(np.sign(b - a) + 1) / 2 for a, b in lengths]))
        assert result["judge"]["template"] == "reasoned" and result["unreadable"] == 0
        questions += result["questions"]
    assert answered == questions - 5 and not set(prompts(first)[:5]) & set(prompts(second)), "nothing twice"
