"""The report of a run: one file that stands alone, with everything the run left and the names of what it did not."""

import contextlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from sami_fast.cli import main
from sami_fast.evaluation import GroupResult, summarize
from sami_fast.report import write_json, write_json_lines, write_text
from sami_fast.run_report import write_run_report
from sami_fast.stages import outputs_digest
from sami_fast.win_rate import Outcome, summarize_outcomes

EVIL = '<script src="https://evil.example/x.js">alert(1)</script><img src=http://evil.example/p.png> & "quoted"'


def group_results(rng, count, gain):
    rows = []
    for index in range(count):
        matrix = rng.normal(-2, 0.3, (2, 2)) + gain * np.eye(2)
        rows.append(GroupResult(f"q{index}", matrix, *rng.uniform(0.1, 0.6, 4)))
    return rows


def responses(number):
    return [
        {"id": f"q{i}", "query": f"Q{i} {EVIL}", "constitution": text, "response": f"{number}/{i}/{text} {EVIL}"}
        for i in range(6)
        for text in ("Be brief.", "Be long.")
    ]


def leave_run(parent):
    """What a run of two iterations leaves."""
    rng, folder = np.random.default_rng(0), parent / "my <run>"
    write_text(folder / "config.yaml", yaml.safe_dump({"model": {"name": "tiny & <small>"}}))
    write_json(folder / "queries/manifest.json", {"status": "complete", "seconds": 0.1})
    for number in range(3):
        base = folder / f"iteration-{number}"
        for stage in ("constitutions", "responses", "training", "evaluation")[:: 1 if number else 3]:
            write_json(base / stage / "manifest.json", {"status": "complete", "seconds": 1.5, "results": {}})
        sampled = {"queries": 9, "groups": 6, "filters": {"empty": 3}}
        write_json(base / "responses/manifest.json", {"status": "complete", "seconds": 7.0, "results": sampled})
        results = group_results(rng, 10, number)
        metrics = {"iteration": number, "model": "tiny", "held_out": summarize(results)}
        write_json_lines(base / "evaluation/scores.jsonl", [result.as_json() for result in results])
        write_json_lines(base / "evaluation/responses.jsonl", responses(number))
        if number > 0:
            metrics |= {"change": summarize(results), "own": summarize(results), "own_filters": {"empty": 0}}
            log = [
                {"step": step, "loss": 0.6, "mutual_information": 0.1 * step, "token_ratio": 3.0}
                | {"tokens_saved": 2000, "tokens_per_second": 1000.0}
                for step in (1, 2, 3)
            ]
            log += [{"step": 3, "eval_mutual_information": 0.25}, {"step": 3, "train_runtime": 9.0}]
            write_json(base / "training/log.json", log)
            outcomes = [Outcome(f"q{i}", (50 + i, 60), (1.0, float(i % 2))) for i in range(10)]
            win_rate = {"judge": {"judge": f"judge {EVIL}"}, **summarize_outcomes(outcomes)}
            write_json(base / "evaluation/win_rate.json", win_rate)
        write_json(base / "evaluation/metrics.json", metrics)
    return folder


@pytest.fixture
def run(tmp_path):
    return leave_run(tmp_path)


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A run and the output of the command that wrote its report."""
    folder, output = leave_run(tmp_path_factory.mktemp("runs")), io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main(["report", str(folder)]) == 0
    return folder, output.getvalue().strip()


class Reader(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.words = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def images(reader):
    return [attributes["src"] for tag, attributes in reader.tags if tag == "img"]


def test_a_whole_run(reported):
    run, path = reported[0], Path(reported[1])
    assert path == run / "report" / "report.html"
    reader = Reader(path)
    assert not reader.open and "Missing" not in reader.words
    # The overview, the base model's matrices, and a curve and matrices for each iteration.
    assert len(images(reader)) == 1 + 1 + 2 * 2
    for name in ("Iteration 1", "Iteration 2", "Over iterations", "Configuration", "tiny & <small>", "my <run>"):
        assert name in reader.words
    metrics = json.loads((run / "iteration-2/evaluation/metrics.json").read_text())
    after = metrics["held_out"]["mutual_information"]
    assert f"{after['mean']:.3f} ({after['low']:.3f} to {after['high']:.3f})" in reader.words
    rates = json.loads((run / "iteration-1/evaluation/win_rate.json").read_text())
    change = metrics["change"]["mutual_information"]["mean"]
    assert "Model tiny & <small>." in reader.words and f"after iteration 2; a change of {change:+.3f} (" in reader.words
    assert reader.words.count("Red is likelier") == 3
    for name in ("win_rate", "length_controlled", "consistency"):
        assert f"{rates[name]['mean']:.3f} ({rates[name]['low']:.3f} to {rates[name]['high']:.3f})" in reader.words
    assert "10 pairs, 5 wins, 0 losses, 5 ties" in reader.words
    # Three steps of 3000 whole tokens, 1000 of them encoded, 3 s each.
    for text in ("whole sequences 9,000", "prefix trees 3,000", "saved 6,000", "steps 9.0 s", "estimated 18.0 s"):
        assert text in reader.words
    assert "iteration-1/training complete 1.5 s" in reader.words and "queries complete 0.1 s" in reader.words
    assert "filter: empty 3" in reader.words
    # Before and after side by side, both constitutions of four of the six queries.
    assert "4 of 6" in reader.words and reader.words.count("before after 0/") == 2 * 2 * 4
    assert f"before after 0/3/Be long. {EVIL} 2/3/Be long. {EVIL}" in reader.words
    length = np.mean([len(row["response"]) for row in responses(2)])
    assert f" {length:.0f} (" in reader.words


def test_nothing_is_fetched_and_all_text_is_escaped(reported):
    path = Path(reported[1])
    reader = Reader(path)
    assert all(src.startswith("data:image/png;base64,iVBOR") for src in images(reader))
    assert {tag for tag, _ in reader.tags}.isdisjoint({"script", "link", "iframe", "object", "a"})
    for _, attributes in reader.tags:
        assert not any(name.startswith("on") or "http" in (value or "") for name, value in attributes.items()
                       if name != "http-equiv")  # fmt: skip
    assert "url(" not in path.read_text() and "@import" not in path.read_text()
    assert EVIL in " ".join(reader.text), "shown as it is"
    assert re.search(r"default-src 'none'", path.read_text())


def test_what_is_not_there_is_named(run):
    for name in ("config.yaml", "iteration-1/evaluation/win_rate.json", "iteration-2/training/log.json"):
        (run / name).unlink()
    (run / "iteration-2/evaluation/responses.jsonl").write_text('{"query": ')
    (run / "iteration-1/responses/manifest.json").write_text("{")
    write_json(run / "iteration-2/evaluation/metrics.json", {"held_out": {"mutual_information": {"mean": 1}}})
    reader = Reader(write_run_report(run))
    missing = reader.words[reader.words.index("Missing") : reader.words.index("Intervals are")]
    assert "config.yaml" in missing and "iteration-1/evaluation/win_rate.json (no judge was asked" in missing
    assert "iteration-2/training/log.json" in missing
    assert re.search(r"iteration-2/evaluation/responses.jsonl: .* ValueError: .*line 1: not valid JSON", missing)
    assert "iteration-2/evaluation/metrics.json: cannot be read: KeyError: 'low'" in missing
    assert "iteration-1/evaluation/responses.jsonl" not in missing
    assert "Iteration 2" in reader.words and len(images(reader)) == 1 + 1 + 2 + 1


def test_what_the_judge_of_the_run_said(run):
    """It comes before what a person had another judge say, unless the responses are others by now."""
    for drawn in [*run.rglob("scores.jsonl"), *run.rglob("log.json")]:
        drawn.unlink()
    part = run / "iteration-1"
    described = {"status": "complete", "outputs": {"responses.jsonl": {"size": 1, "sha256": "ab"}}, "inputs": {}}
    write_json(part / "evaluation/manifest.json", described)
    about = {"responses": outputs_digest(described, "responses.jsonl")}
    write_json(part / "judge/manifest.json", {"status": "complete", "seconds": 2.0, "inputs": about})
    rates = summarize_outcomes([Outcome(f"q{i}", (50 + i, 60), (1.0, float(i < 7))) for i in range(10)])
    write_json(part / "judge/win_rate.json", {"judge": {"judge": "the run's own"}, **rates})
    words = Reader(write_run_report(run)).words
    assert words.index("iteration 0, by the run's own") < words.index(f"iteration 0, by judge {EVIL}")
    assert "10 pairs, 7 wins, 0 losses, 3 ties" in words and "10 pairs, 5 wins, 0 losses, 5 ties" in words
    overview = words[words.index("Over iterations") : words.index("Iteration 0")]
    low, high = rates["win_rate"]["low"], rates["win_rate"]["high"]
    assert f"0.850 ({low:.3f} to {high:.3f})" in overview and "iteration-1/judge complete 2.0 s" in words
    (part / "evaluation/win_rate.json").unlink()
    assert "no judge was asked" not in Reader(write_run_report(run)).words
    described["outputs"]["responses.jsonl"]["sha256"] = "cd"
    write_json(part / "evaluation/manifest.json", described)
    words = Reader(write_run_report(run)).words
    assert "iteration-1/judge/win_rate.json: is about responses that the run has made anew since" in words
    assert "by the run's own" not in words


def test_a_run_that_has_only_begun(tmp_path, capsys):
    (tmp_path / "new/iteration-0/responses").mkdir(parents=True)
    reader = Reader(write_run_report(tmp_path / "new", output=tmp_path / "elsewhere/r.html"))
    assert (tmp_path / "elsewhere/r.html").exists() and "Missing" in reader.words and not images(reader)
    assert main(["report", str(tmp_path / "elsewhere")]) == 1
    assert "folder: expected a run with iteration-0 and so on" in capsys.readouterr().err


def test_iterations_come_in_the_order_of_their_numbers_and_miss_their_base(run):
    for drawn in [*run.rglob("scores.jsonl"), *run.rglob("log.json")]:
        drawn.unlink()
    (run / "iteration-2").rename(run / "iteration-10")
    (run / "iteration-0").rename(run / "base")
    (run / "iteration-nonsense").mkdir()
    words = Reader(write_run_report(run)).words
    assert words.index("Iteration 1 ") < words.index("Iteration 10 ")
    assert "iteration-0: the model as it came" in words


def test_training_without_evaluations_is_drawn_between_those_around_it(run, monkeypatch):
    drawn = []
    monkeypatch.setattr("sami_fast.run_report.draw_heat_maps", lambda path, *_: path.write_bytes(b""))
    monkeypatch.setattr("sami_fast.run_report.draw_iterations", lambda path, *_, **__: path.write_bytes(b""))
    keep = lambda path, *points, limit: drawn.append(points) or path.write_bytes(b"")  # noqa: E731
    monkeypatch.setattr("sami_fast.run_report.draw_training_curve", keep)
    metrics = [json.loads((run / f"iteration-{n}/evaluation/metrics.json").read_text()) for n in range(3)]
    means = [entry["held_out"]["mutual_information"]["mean"] for entry in metrics]
    for n in (1, 2):
        path = run / f"iteration-{n}/training/log.json"
        write_json(path, [row for row in json.loads(path.read_text()) if "eval_mutual_information" not in row])
    for start, ends in (("base", [0, 0]), ("previous", [0, 1])):
        write_text(run / "config.yaml", yaml.safe_dump({"iterations": {"start": start}}))
        drawn.clear()
        write_run_report(run)
        assert [points[2:] for points in drawn] == [([0, 3], [means[end], means[n]]) for n, end in enumerate(ends, 1)]


def test_a_judge_that_goes_by_the_order_is_said_to(run):
    said = "In most pairs the judge changed its mind with the order"
    assert said not in Reader(write_run_report(run)).words
    rates = summarize_outcomes([Outcome(f"q{i}", (50 + i, 60), (1.0, 0.0)) for i in range(10)])
    write_json(run / "iteration-1/evaluation/win_rate.json", {"judge": {"judge": "j"}, **rates})
    assert Reader(write_run_report(run)).words.count(said) == 1


def test_a_configuration_that_cannot_be_read_is_shown_as_it_is(run):
    for text in ("a: [", "- 1", "model: 3"):
        write_text(run / "config.yaml", text)
        assert f"Configuration {text}" in Reader(write_run_report(run)).words
