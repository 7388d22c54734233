"""Statistics of comparisons against known cases, and files joined or refused by name."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sami_fast.win_rate import Outcome, length_controlled_win_rate, load_pairs, summarize_outcomes, wilson_interval

REAL = Path(__file__).parents[2] / "shared/data/tldr_sample.jsonl"


def outcomes(scores, lengths=None, **fields):
    lengths = [(100 + i, 120) for i in range(len(scores))] if lengths is None else lengths
    return [
        Outcome(f"q{i}", length, score, **fields) for i, (score, length) in enumerate(zip(scores, lengths, strict=True))
    ]


def test_all_wins_are_not_certainty():
    result = summarize_outcomes(outcomes([(1, 1)] * 40))
    rate = result["win_rate"]
    assert rate["mean"] == rate["high"] == 1 and rate["low"] == pytest.approx(40 / (40 + 1.959964**2), abs=1e-6)
    assert (result["wins"], result["losses"], result["ties"]) == (40, 0, 0)
    assert result["consistency"]["mean"] == 1 and result["first_position"]["mean"] == 0.5
    assert result["length_controlled"]["mean"] > 0.99


def test_all_ties_are_half():
    result = summarize_outcomes(outcomes([(0.5, 0.5)] * 40))
    assert result["ties"] == 40 and result["win_rate"]["mean"] == 0.5
    assert result["win_rate"]["low"] < 0.4 < 0.6 < result["win_rate"]["high"]
    assert result["length_controlled"]["mean"] == pytest.approx(0.5)
    assert result["length_controlled"]["length_coefficient"] == pytest.approx(0)


def test_position_bias_cancels_and_is_reported():
    result = summarize_outcomes(outcomes([(1, 0)] * 30 + [(1, 1)] * 10))  # nearly always the one shown first
    assert result["win_rate"]["mean"] == pytest.approx(0.5 + 0.5 * 10 / 40)
    assert result["ties"] == 30 and result["consistency"]["mean"] == 0.25
    assert result["first_position"]["mean"] == pytest.approx((30 + 5) / 40) and result["first_position"]["low"] > 0.5


def test_log_odds_see_through_a_lean_to_one_position():
    leaning = [Outcome(f"q{i}", (9, 9), (1, 0), margins=(2.0 + 0.1 * (i < 15), 2.0)) for i in range(20)]
    result = summarize_outcomes(leaning)
    assert result["win_rate"]["mean"] == 0.5
    assert result["by_log_odds"]["mean"] == pytest.approx((15 + 0.5 * 5) / 20)
    assert result["length_controlled"] is None, "no length differs"
    longer = [dataclasses.replace(o, lengths=(9 + (o.margins[0] > 2), 9)) for o in leaning]
    controlled = summarize_outcomes(longer)["by_log_odds_length_controlled"]
    assert controlled["length_coefficient"] > 1 and controlled["mean"] < result["by_log_odds"]["mean"]


def test_identical_pairs_are_ties_that_say_nothing_about_the_judge():
    asked = outcomes([(1, 1), (0, 1)])
    result = summarize_outcomes([*asked, Outcome("same", (7, 7), (0.5, 0.5), identical=True)])
    assert (result["pairs"], result["questions"], result["identical"], result["ties"]) == (3, 4, 1, 2)
    assert result["win_rate"]["mean"] == pytest.approx(2 / 3) and result["consistency"]["mean"] == 0.5
    nothing = summarize_outcomes([Outcome("same", (7, 7), (0.5, 0.5), identical=True)])
    assert nothing["consistency"] is None and nothing["first_position"] is None and nothing["questions"] == 0


def test_unreadable_answers_are_counted_and_leave_consistency():
    result = summarize_outcomes(
        [Outcome("a", (5, 6), (0.5, 1), (False, True)), Outcome("b", (5, 6), (0.5, 0.5), (False, False))]
        + [Outcome("c", (5, 6), (0, 0))]
    )
    assert result["unreadable"] == 3 and result["win_rate"]["mean"] == pytest.approx((0.75 + 0.5 + 0) / 3)
    assert result["consistency"]["mean"] == 1 and json.dumps(result, allow_nan=False)


@given(
    st.lists(st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 2, *[st.integers(0, 500)] * 2), min_size=1, max_size=12)
)
def test_swapping_the_sides_mirrors_everything(rows):
    there = summarize_outcomes([Outcome(f"q{i}", (a, b), (x, y)) for i, (x, y, a, b) in enumerate(rows)], resamples=20)
    back = summarize_outcomes(
        [Outcome(f"q{i}", (b, a), (1 - y, 1 - x)) for i, (x, y, a, b) in enumerate(rows)], resamples=20
    )
    for name in ("win_rate", "length_controlled"):
        if there[name] is None:
            assert back[name] is None
            continue
        assert 0 <= there[name]["low"] <= there[name]["high"] <= 1
        assert back[name]["mean"] == pytest.approx(1 - there[name]["mean"], abs=1e-7)
        assert back[name]["low"] == pytest.approx(1 - there[name]["high"], abs=1e-7)
    assert (there["wins"], there["losses"], there["ties"]) == (back["losses"], back["wins"], back["ties"])
    assert there["first_position"] == back["first_position"] and there["consistency"] == back["consistency"]


def simulated(quality, bias, count=1500, mean_difference=200.0, seed=0):
    """Verdicts of a judge that sees `quality` (log-odds) and favours length by `bias`."""
    rng = np.random.default_rng(seed)
    difference = rng.normal(mean_difference, 300, count).round()
    p = 1 / (1 + np.exp(-quality - bias * np.tanh(difference / np.sqrt(np.mean(difference**2)))))
    scores = rng.random((count, 2)) < p[:, None]
    return outcomes(scores.astype(float).tolist(), [(1500 + int(d), 1500) for d in difference])


def test_a_length_bias_is_removed_and_real_quality_is_kept():
    biased = summarize_outcomes(simulated(quality=0.0, bias=2.5), resamples=300)
    assert biased["win_rate"]["low"] > 0.6, "longer answers look better"
    controlled = biased["length_controlled"]
    assert controlled["low"] < 0.5 < controlled["high"] and abs(controlled["mean"] - 0.5) < 0.03
    assert controlled["length_coefficient"] == pytest.approx(2.5, abs=0.3)
    better = summarize_outcomes(simulated(quality=1.0, bias=2.5, mean_difference=-300.0), resamples=300)
    assert better["win_rate"]["high"] < 0.5, "shorter and better, and yet the raw rate has it losing"
    assert better["length_controlled"]["mean"] == pytest.approx(1 / (1 + math.exp(-1)), abs=0.03)
    fair = summarize_outcomes(simulated(quality=0.5, bias=0.0), resamples=300)
    assert fair["length_controlled"]["mean"] == pytest.approx(fair["win_rate"]["mean"], abs=0.03)


def test_the_fit_is_at_the_minimum_also_where_lengths_separate_the_verdicts():
    difference = np.linspace(-300, 300, 60)
    lengths = np.stack([1000 + difference, np.full(60, 1000.0)], axis=1)
    for scores in ((difference > 0).astype(float), np.ones(60), np.linspace(0, 1, 60)):
        fit = length_controlled_win_rate(scores, lengths)
        a, b = math.log(fit["mean"] / (1 - fit["mean"])), fit["length_coefficient"]
        x = np.tanh(difference / np.sqrt(np.mean(difference**2)))
        residual = 1 / (1 + np.exp(-a - b * x)) - scores
        assert residual.sum() + 0.01 * a == pytest.approx(0, abs=1e-6)
        assert residual @ x + 0.01 * b == pytest.approx(0, abs=1e-6)


def test_bootstrap_resamples_queries_not_pairs():
    scores = [(1, 1)] * 10 + [(0, 0)] * 10
    apart = summarize_outcomes(outcomes(scores))["win_rate"]
    together = summarize_outcomes(
        [Outcome(f"q{i // 5}", (i + 9, 9), score) for i, score in enumerate(scores)]  # four queries, all alike within
    )["win_rate"]
    for kind in (lambda r: r["high"] - r["low"], lambda r: r["bootstrap"]["high"] - r["bootstrap"]["low"]):
        assert kind(together) > 1.5 * kind(apart)


def test_wilson_interval():
    # Known values: 0 of 10 and 5 of 10 at 95 %.
    assert wilson_interval(0, 10) == (0.0, pytest.approx(0.27753, abs=1e-5))
    assert wilson_interval(0.5, 10) == (pytest.approx(0.23659, abs=1e-5), pytest.approx(0.76341, abs=1e-5))
    rng = np.random.default_rng(0)
    inside = [low <= 0.8 <= high for low, high in (wilson_interval(p, 50) for p in rng.binomial(50, 0.8, 2000) / 50)]
    assert 0.93 < np.mean(inside) < 0.97
    for bad in ((1.2, 5), (0.5, 0)):
        with pytest.raises(ValueError, match="mean, count: expected a share"):
            wilson_interval(*bad)
    with pytest.raises(ValueError, match="outcomes: expected at least one pair"):
        summarize_outcomes([])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_files_join_by_query_and_constitution_in_any_order(tmp_path):
    rows = [{"query": f"q{i}", "constitution": c, "response": f"{i}{c}"} for i in range(3) for c in ("short", "long")]
    there = write(tmp_path / "a.jsonl", rows)
    back = write(tmp_path / "b.jsonl", [row | {"response": "other"} for row in reversed(rows)])
    pairs = load_pairs(there, back)
    assert [(p.query, p.constitution, p.response, p.against) for p in pairs] == [
        (row["query"], row["constitution"], row["response"], "other") for row in rows
    ]


def test_files_join_by_id_where_all_lines_have_one(tmp_path):
    there = write(
        tmp_path / "a.jsonl", [{"id": 1, "query": "q", "response": "x"}, {"id": 2, "query": "q", "response": ""}]
    )
    back = write(
        tmp_path / "b.jsonl", [{"id": "2", "query": "q", "response": "y"}, {"id": 1, "query": "q", "response": "z"}]
    )
    assert [(p.id, p.response, p.against) for p in load_pairs(there, back)] == [("1", "x", "z"), ("2", "", "y")]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            [{"query": "q", "response": "r"}] * 2,
            [{"query": "q", "response": "r"}],
            r"a\.jsonl, line 2: query 'q' has a response already",
        ),
        ([{"query": "q", "response": None}], [], r"a\.jsonl, line 1: response: expected text, got None"),
        ([{"query": " ", "response": "r"}], [], r"a\.jsonl, line 1: query: expected text, got ' '"),
        ([{"query": "q", "response": "a\ud83d"}], [], r"line 1: response: not valid Unicode: '\\ud83d' at character 1"),
        (["text"], [], r"a\.jsonl, line 1: expected an object with fields, got 'text'"),
        ([{"query": "q", "response": "r"}], [], r"b\.jsonl: expected at least one line, got none"),
        (
            [{"query": q, "response": "r"} for q in "abc"],
            [{"query": q, "response": "r"} for q in "cd"],
            r"2 of 3 lines of .*a\.jsonl have no partner \(the first: query 'a'\), 1 of 2 lines of .*b\.jsonl .*'d'",
        ),
        (
            [{"query": "q", "constitution": "c", "response": "r"}],
            [{"query": "q", "response": "r"}],
            r"1 of 1 lines of .*a\.jsonl have no partner \(the first: query 'q' under constitution 'c'\)",
        ),
        (
            [{"id": 1, "query": "q", "response": "r"}],
            [{"id": 1, "query": "p", "response": "r"}],
            r"b\.jsonl: id '1': expected the query that .*a\.jsonl has, got another",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused_by_name(tmp_path, first, second, message):
    files = [write(tmp_path / f"{name}.jsonl", rows) for name, rows in zip("ab", (first, second), strict=True)]
    with pytest.raises(ValueError, match=message):
        load_pairs(*files)


def test_broken_lines_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"query": "q", "response": "r"}\n\n{"query": \xff\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: not valid JSON"):
        load_pairs(path, path)


@pytest.mark.skipif(not REAL.exists(), reason="the shared data set is not there")
def test_real_responses_before_and_after_training(tmp_path):
    rows = [json.loads(line) for line in REAL.read_text(encoding="utf-8").splitlines()]
    files = [
        write(
            tmp_path / f"{field}.jsonl",
            [
                {"query": row["query"], "constitution": constitution, "response": response}
                for row in rows
                for constitution, response in zip(row["constitutions"], row[field], strict=True)
            ],
        )
        for field in ("responses_trained", "responses")
    ]
    pairs = load_pairs(*files)
    assert len(pairs) == 2 * len(rows)
    # A judge that likes brevity.
    brief = [
        Outcome(p.query, (len(p.response), len(p.against)), (float(len(p.response) < len(p.against)),) * 2)
        for p in pairs
    ]
    result = summarize_outcomes(brief, resamples=200)
    assert result["queries"] == len({row["query"] for row in rows})
    assert result["length_controlled"]["length_coefficient"] < -5, "length decides all of it"
