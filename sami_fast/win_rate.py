"""Two files of responses as pairs, and what a judge's verdicts on them say: win rates, biases, intervals.

A pair is two responses to one query, `response` and `against`, asked about in both orders. Its two outcomes are 1 where
`response` won, 0 where `against` did and 0.5 for a tie or an answer that could not be read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sami_fast.report import read_json_lines

# What `summarize_outcomes` gives with intervals, in words.
SHARES = {
    "win_rate": "win rate",
    "length_controlled": "win rate at equal lengths",
    "by_log_odds": "win rate by log-odds of both orders",
    "by_log_odds_length_controlled": "win rate by log-odds at equal lengths",
    "consistency": "both orders agree",
    "first_position": "won by the response shown first",
}
_Z = 1.959963984540054  # normal quantile of a 95 % interval
_RIDGE = 0.01  # a normal prior of standard deviation 10 on each coefficient: keeps separable data finite
_DRAWS_AT_ONCE = 1 << 22  # bootstrap draws x pairs held in memory


@dataclass(frozen=True)
class Pair:
    """Two responses to one query, under one constitution or none."""

    id: str
    query: str
    constitution: str | None
    response: str
    against: str


def load_pairs(responses: str | os.PathLike[str], against: str | os.PathLike[str]) -> list[Pair]:
    """Join two JSON Lines files with the fields `query`, `response` and, if there, `constitution` and `id`.

    Lines belong together when their constitution and their `id` are the same; their query, where a line has no `id`.

    Raises:
        ValueError: names the file, the line and the field; or says how many lines have no partner, and the first.
        FileNotFoundError: no such file.
    """
    files = [Path(responses), Path(against)]
    tables = [_read_responses(path) for path in files]
    by_id = all(row["id"] is not None for table in tables for _, row in table)
    keyed: list[dict[tuple[str, str | None], dict]] = []
    for path, table in zip(files, tables, strict=True):
        rows: dict[tuple[str, str | None], dict] = {}
        for line, row in table:
            key = (row["id"] if by_id else row["query"], row["constitution"])
            if key in rows:
                raise ValueError(f"{path}, line {line}: {_name(key, by_id)} has a response already")
            rows[key] = row
        keyed.append(rows)
    first, second = keyed
    alone = [[key for key in a if key not in b] for a, b in ((first, second), (second, first))]
    if any(alone):
        said = (
            f"{len(keys)} of {len(rows)} lines of {path} have no partner"
            + (f" (the first: {_name(keys[0], by_id)})" if keys else "")
            for path, rows, keys in zip(files, keyed, alone, strict=True)
        )
        raise ValueError(f"responses, against: expected the same queries and constitutions, but {', '.join(said)}")
    pairs = []
    for number, (key, row) in enumerate(first.items(), 1):
        other = second[key]
        if row["query"] != other["query"]:
            raise ValueError(f"{files[1]}: {_name(key, by_id)}: expected the query that {files[0]} has, got another")
        id = row["id"] if by_id else str(number)
        pairs.append(Pair(id, row["query"], row["constitution"], row["response"], other["response"]))
    return pairs


def _name(key: tuple[str, str | None], by_id: bool) -> str:
    under = "" if key[1] is None else f" under constitution {key[1][:40]!r}"
    return f"{'id' if by_id else 'query'} {key[0][:60]!r}{under}"


def _read_responses(path: Path) -> list[tuple[int, dict]]:
    rows = []
    for line, row in read_json_lines(path):
        where = f"{path}, line {line}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object with fields, got {row!r:.60}")
        row = {name: row.get(name) for name in ("id", "query", "constitution", "response")}
        if type(row["id"]) is int:
            row["id"] = str(row["id"])
        for name, value in row.items():
            optional = name in ("id", "constitution") and value is None
            if not optional and not (isinstance(value, str) and (value.strip() or name == "response")):
                raise ValueError(f"{where}: {name}: expected text, got {value!r:.60}")
            try:
                (value or "").encode()
            except UnicodeEncodeError as error:
                bad = f"{error.object[error.start]!r} at character {error.start}"
                raise ValueError(f"{where}: {name}: not valid Unicode: {bad}") from None
        rows.append((line, row))
    if not rows:
        raise ValueError(f"{path}: expected at least one line, got none")
    return rows


@dataclass(frozen=True)
class Outcome:
    """What a judge said about one pair.

    Attributes:
        query: outcomes of one query are resampled together.
        lengths: characters of `response` and of `against`.
        scores: outcome with `response` shown first, and with it shown second.
        readable: whether each of the two answers could be read.
        margins: for judges that give log-odds: log p(first) - log p(second) in each order; None otherwise.
        identical: both responses are the same text, a tie that nobody was asked about.
    """

    query: str
    lengths: tuple[int, int]
    scores: tuple[float, float]
    readable: tuple[bool, bool] = (True, True)
    margins: tuple[float, float] | None = None
    identical: bool = False


def summarize_outcomes(outcomes: Sequence[Outcome], *, resamples: int = 2000, seed: int = 0) -> dict:
    """Everything a report says about a comparison, as JSON holds it.

    Every share comes with its 95 % interval.

    - `win_rate`: mean over pairs and orders. `low` and `high` are the Wilson interval at n = distinct queries, too wide
      rather than too narrow; `bootstrap` is the percentile interval over queries.
    - `length_controlled`: see `length_controlled_win_rate`.
    - `by_log_odds`: share of pairs whose margins, averaged over both orders so that a constant lean to one position
      drops out, favour `response`; None when the judge gives no log-odds. `by_log_odds_length_controlled`: likewise.
    - `wins`, `losses`, `ties`: pairs, by the mean of both orders.
    - `consistency`: share of pairs with two readable answers whose orders agree, of those asked about.
    - `first_position`: share of questions won by the response shown first, ties half; 0.5 is no bias.
    - `pairs`, `queries`, `identical`, `questions`, `unreadable`: counts.
    - `characters`: mean length of each side.

    Raises:
        ValueError: no outcomes.
    """
    if not outcomes:
        raise ValueError("outcomes: expected at least one pair, got none")
    scores = np.array([outcome.scores for outcome in outcomes], dtype=float)
    pair_scores = scores.mean(axis=1)
    lengths = np.array([outcome.lengths for outcome in outcomes], dtype=float)
    names, query = np.unique([outcome.query for outcome in outcomes], return_inverse=True)
    counts = _draws(len(names), resamples, seed)
    asked = np.array([not outcome.identical for outcome in outcomes])
    readable = np.array([outcome.readable for outcome in outcomes])
    both = asked & readable.all(axis=1)
    first = np.stack([scores[:, 0], 1 - scores[:, 1]], axis=1)[asked]
    margins = [outcome.margins for outcome in outcomes if not outcome.identical]
    by_log_odds, controlled_by_log_odds = None, None
    if margins and None not in margins:
        lean = np.zeros(len(outcomes))
        lean[asked] = [a - b for a, b in margins]
        wins = (np.sign(lean) + 1) / 2
        by_log_odds = _share(wins, len(names)) | {"bootstrap": _bootstrap(wins, query, counts)}
        controlled_by_log_odds = length_controlled_win_rate(wins, lengths, query, counts=counts)
    return {
        "pairs": len(outcomes),
        "queries": len(names),
        "identical": int((~asked).sum()),
        "questions": 2 * int(asked.sum()),
        "unreadable": int((~readable[asked]).sum()),
        "wins": int((pair_scores > 0.5).sum()),
        "losses": int((pair_scores < 0.5).sum()),
        "ties": int((pair_scores == 0.5).sum()),
        "win_rate": _share(pair_scores, len(names)) | {"bootstrap": _bootstrap(pair_scores, query, counts)},
        "length_controlled": length_controlled_win_rate(pair_scores, lengths, query, counts=counts),
        "by_log_odds": by_log_odds,
        "by_log_odds_length_controlled": controlled_by_log_odds,
        "consistency": _share((scores[both, 0] == scores[both, 1]).astype(float)),
        "first_position": _share(first.mean(axis=1)),
        "characters": {
            name: {"mean": float(lengths[:, side].mean()), **_bootstrap(lengths[:, side], query, counts)}
            for side, name in enumerate(("response", "against"))
        },
    }


def wilson_interval(mean: float, count: float) -> tuple[float, float]:
    """95 % Wilson score interval of a share (E. B. Wilson, 1927).

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n). For values in between 0 and 1, such as ties counted half,
    it is conservative: none vary more than p(1-p).

    Raises:
        ValueError: `mean` outside [0, 1] or `count` not positive.
    """
    if not 0 <= mean <= 1 or not count > 0:
        raise ValueError(f"mean, count: expected a share in [0, 1] and a positive number, got {mean} and {count}")
    spread = _Z * np.sqrt(mean * (1 - mean) / count + _Z**2 / (4 * count**2))
    middle, scale = mean + _Z**2 / (2 * count), 1 + _Z**2 / count
    return max(0.0, float((middle - spread) / scale)), min(1.0, float((middle + spread) / scale))


def length_controlled_win_rate(
    scores: np.ndarray, lengths: np.ndarray, query: np.ndarray | None = None, *, counts: np.ndarray | None = None
) -> dict[str, float] | None:
    """Win rate that two responses of equal length would have, as in AlpacaEval 2 (arXiv 2404.04475), its simplest form.

        log-odds(response wins) = a + b tanh(d / s),   d = characters of response - characters of against,

    with s the root mean square of d; fitted by logistic regression to the `scores` (ties count half on both sides)
    with a ridge of 0.01/2 (a^2 + b^2). The win rate at d = 0 is 1 / (1 + exp(-a)); b > 0: the judge favours length.

    Args:
        scores: [N] in [0, 1].
        lengths: [N, 2] characters.
        query: [N] int; which query each pair belongs to, for the bootstrap. None: each its own.
        counts: [B, queries]; how often each bootstrap sample holds each query. None: 2000 samples, seed 0.

    Returns:
        `mean` with its percentile-bootstrap interval `low`, `high`, and `length_coefficient` (b); None when the lengths
        of every pair are equal, since nothing is there to control for.
    """
    difference = np.asarray(lengths, dtype=float) @ np.array([1.0, -1.0])
    scale = np.sqrt(np.mean(difference**2))
    if scale == 0:
        return None
    features = np.stack([np.ones(len(difference)), np.tanh(difference / scale)], axis=1)
    query = np.arange(len(scores)) if query is None else query
    counts = _draws(query.max() + 1, 2000, 0) if counts is None else counts
    intercept, slope = _logistic_fit(features, scores, np.ones((1, len(scores))))[0]
    block = max(1, _DRAWS_AT_ONCE // len(scores))
    blocks = (counts[start : start + block, query] for start in range(0, len(counts), block))
    drawn = np.concatenate([_logistic_fit(features, scores, weights)[:, 0] for weights in blocks])
    low, high = np.quantile(_sigmoid(drawn), [0.025, 0.975])
    mean = float(_sigmoid(intercept))
    return {"mean": mean, "low": float(low), "high": float(high), "length_coefficient": float(slope)}


def _logistic_fit(features: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[B, K] coefficients of B weighted, ridged logistic regressions on the same data, by Newton with step halving.

    features: [N, K]; targets: [N] in [0, 1]; weights: [B, N].
    """
    K = features.shape[1]

    def objective(theta: np.ndarray, rows: np.ndarray) -> np.ndarray:
        z = theta @ features.T
        return (rows * (np.logaddexp(0, z) - targets * z)).sum(axis=1) + _RIDGE / 2 * (theta**2).sum(axis=1)

    theta = np.zeros((len(weights), K))
    value = objective(theta, weights)
    for _ in range(100):
        p = _sigmoid(theta @ features.T)
        gradient = (weights * (p - targets)) @ features + _RIDGE * theta
        hessian = np.einsum("bn,nk,nl->bkl", weights * p * (1 - p), features, features) + _RIDGE * np.eye(K)
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        for _ in range(30):
            new = objective(theta - step, weights)
            worse = new > value + 1e-12 * np.abs(value)
            if not worse.any():
                break
            step[worse] /= 2
        theta, value = theta - step, new
        if np.abs(step).max() < 1e-8:
            return theta
    raise RuntimeError("the logistic regression on the length difference did not converge in 100 Newton steps")


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -z))


def _draws(count: int, resamples: int, seed: int) -> np.ndarray:
    """[resamples, count]: how often each bootstrap sample holds each of `count` things."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)


def _bootstrap(values: np.ndarray, query: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Percentile interval of the mean of `values` [N] over samples of queries."""
    sums, sizes = np.bincount(query, values), np.bincount(query)
    low, high = np.quantile((counts @ sums) / (counts @ sizes), [0.025, 0.975])
    return {"low": float(low), "high": float(high)}


def _share(values: np.ndarray, count: int | None = None) -> dict[str, float] | None:
    """Mean of values in [0, 1] with its Wilson interval; None of nothing."""
    if len(values) == 0:
        return None
    mean = float(values.mean())
    low, high = wilson_interval(mean, len(values) if count is None else count)
    return {"mean": mean, "low": low, "high": high}
