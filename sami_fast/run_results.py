"""What stages of a run say about responses and scores, in the form that people, judges and reports read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sami_fast.evaluation import METRICS, GroupResult, summarize
from sami_fast.report import read_json_lines

# What tables call the metrics of an evaluation, in their order.
METRIC_LABELS = {
    "mutual_information": "mutual information (nats)",
    "row_accuracy": "row accuracy",
    "column_accuracy": "column accuracy",
    "loss": "loss",
}


def read_scores(iteration: Path) -> list[GroupResult]:
    """Scores of the held-out groups, as the evaluation stage in an iteration's folder wrote them."""
    return [GroupResult.from_json(row) for _, row in read_json_lines(iteration / "evaluation" / "scores.jsonl")]


def paired_change(before: Sequence[GroupResult], after: Sequence[GroupResult]) -> dict[str, dict[str, float]]:
    """How much each metric rose on the same groups, with its bootstrap interval."""
    changes = [
        GroupResult(a.id, a.matrix, *(getattr(a, name) - getattr(b, name) for name in METRICS))
        for b, a in zip(before, after, strict=True)
    ]
    return summarize(changes)


def judge_rows(rows: Sequence[dict], responses: Sequence[dict]) -> list[dict[str, Any]]:
    """id, query, constitution, response and the sides that the constitution takes.

    Args:
        rows: of constitutions.jsonl.
        responses: of generated.jsonl.
    """
    by_id = {row["id"]: row for row in rows}
    found = []
    for response in responses:
        row, j = by_id[response["id"]], response["constitution"]
        text = {"id": row["id"], "query": row["query"], "constitution": row["generation"][j]}
        found.append(text | {"response": response["text"], "identifiers": row["identifiers"][j]})
    return found
