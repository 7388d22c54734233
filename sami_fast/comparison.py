"""A judge compares two files of responses: every pair in both orders, no question asked twice.

Verdicts go to a JSON Lines file as they come, each under a key made of the judge's settings and the whole prompt. A run
that was killed, or that stopped because the endpoint or the disk gave out, goes on from there when started again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sami_fast.judge import Answer, Judge, Question
from sami_fast.prompts import TEMPLATES, fill, placeholders, read_template
from sami_fast.report import write_json
from sami_fast.stages import JsonLinesLog
from sami_fast.win_rate import Outcome, Pair, load_pairs, summarize_outcomes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JudgeTemplate:
    """The question to a judge: text with `{query}`, `{response_a}`, `{response_b}` and, if wanted, `{constitution}`.

    Where a pair has no constitution, the paragraph that holds `{constitution}` is left out.

    Raises:
        ValueError: a placeholder is missing or unknown.
    """

    text: str
    name: str = "template"

    def __post_init__(self) -> None:
        found, needed = placeholders(self.text), {"query", "response_a", "response_b"}
        if missing := sorted(needed - found):
            raise ValueError(f"{self.name}: expected the placeholder {{{missing[0]}}}, got a template without it")
        if unknown := sorted(found - needed - {"constitution"}):
            raise ValueError(f"{self.name}: expected no placeholder but the four known ones, got {{{unknown[0]}}}")

    @classmethod
    def load(cls, name_or_path: str | os.PathLike[str]) -> JudgeTemplate:
        """`reasoned` (compares first, then chooses), `letter` (answers at once), or a text file.

        Raises:
            ValueError: no such template, not UTF-8, or as in the class.
        """
        return cls(read_template(name_or_path, TEMPLATES / "judge")[1], str(name_or_path))

    def render(self, query: str, constitution: str | None, response_a: str, response_b: str) -> str:
        """The template with the texts put in, see `sami_fast.prompts.fill`."""
        texts = {"query": query, "constitution": constitution, "response_a": response_a, "response_b": response_b}
        paragraphs = self.text.split("\n\n")
        if constitution is None:
            lost = [paragraph for paragraph in paragraphs if "{constitution}" in paragraph]
            if placeholders("".join(lost)) - {"constitution"}:
                raise ValueError(
                    f"{self.name}: expected {{constitution}} in a paragraph of its own, as some pairs have none"
                )
            paragraphs = [paragraph for paragraph in paragraphs if paragraph not in lost]
        return fill("\n\n".join(paragraphs), texts)


def judge_pairs(
    pairs: Sequence[Pair],
    judge: Judge,
    verdicts: str | os.PathLike[str],
    *,
    template: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> list[Outcome]:
    """Ask about every pair in both orders; what `verdicts` holds already is not asked again.

    Pairs of two identical texts are ties that nobody is asked about.

    Args:
        pairs: see `load_pairs`.
        judge: `EndpointJudge` or `LocalJudge`.
        verdicts: JSON Lines file that answers are appended to as they come.
        template: see `JudgeTemplate.load`; None takes the judge's own.
        progress: show a progress bar.

    Raises:
        ValueError: `verdicts` holds something else.
        EndpointError, OSError: the endpoint failed for good, the disk is full; answers so far are in `verdicts`.
    """
    template = JudgeTemplate.load(judge.template if template is None else template)
    questions = [
        question
        for index, pair in enumerate(pairs)
        if pair.response != pair.against
        for question in _both_orders(index, pair, template, judge.settings)
    ]
    path = Path(verdicts)
    path.parent.mkdir(parents=True, exist_ok=True)
    log = JsonLinesLog(path)
    known = _by_key(log)
    open_questions = [question for question in questions if question.key not in known]
    others = len(known.keys() - {question.key for question in questions})
    logger.info(
        "%d pairs, %d questions to %s: %d answered in %s already%s",
        len(pairs),
        len(questions),
        judge.settings["judge"],
        len(questions) - len(open_questions),
        path,
        f", which also holds {others} answers to other questions" if others else "",
    )
    done = len(questions) - len(open_questions)
    bar = tqdm(total=len(questions), initial=done, desc="judging", unit="question", disable=not progress)
    try:
        with bar:
            for question, answer in judge.answers(open_questions) if open_questions else ():
                row = _verdict(question, answer, judge.settings["judge"])
                log.append([row])
                known[question.key] = row
                done += 1
                bar.update()
    except BaseException:
        logger.error("stopped with %d of %d questions answered; they are kept in %s", done, len(questions), path)
        raise
    by_pair = {(question.pair, question.order): known[question.key] for question in questions}
    return [_outcome(pair, [by_pair.get((index, order)) for order in (0, 1)]) for index, pair in enumerate(pairs)]


def _both_orders(index: int, pair: Pair, template: JudgeTemplate, settings: Mapping[str, Any]) -> Iterator[Question]:
    for order, (a, b) in enumerate(((pair.response, pair.against), (pair.against, pair.response))):
        prompt = template.render(pair.query, pair.constitution, a, b)
        key = hashlib.sha256(json.dumps([dict(settings), order, prompt], sort_keys=True).encode()).hexdigest()[:32]
        yield Question(index, pair.id, order, prompt, key)


def _verdict(question: Question, answer: Answer, judge: str) -> dict:
    winners = {"A": "response", "B": "against"} if question.order == 0 else {"A": "against", "B": "response"}
    row = {
        "key": question.key,
        "id": question.id,
        "order": question.order,
        "judge": judge,
        "choice": answer.choice,
        "winner": winners.get(answer.choice, answer.choice),
    }
    return row | ({"text": answer.text} if answer.logprobs is None else {"logprobs": list(answer.logprobs)})


def _by_key(log: JsonLinesLog) -> dict[str, dict]:
    for row in log.rows:
        if not isinstance(row, dict) or not isinstance(row.get("key"), str) or "winner" not in row:
            raise ValueError(f"{log.path}: expected verdicts, got {row!r:.60}; is this another file?")
    return {row["key"]: row for row in log.rows}


def _outcome(pair: Pair, rows: Sequence[dict | None]) -> Outcome:
    lengths = (len(pair.response), len(pair.against))
    if None in rows:
        return Outcome(pair.query, lengths, (0.5, 0.5), identical=True)
    points = {"response": 1.0, "against": 0.0, "tie": 0.5, None: 0.5}
    margins = tuple(row["logprobs"][0] - row["logprobs"][1] for row in rows if "logprobs" in row)
    return Outcome(
        pair.query,
        lengths,
        tuple(points[row["winner"]] for row in rows),
        tuple(row["winner"] is not None for row in rows),
        margins or None,
    )


def compare_files(
    responses: str | os.PathLike[str],
    against: str | os.PathLike[str],
    judge: Judge,
    output: str | os.PathLike[str],
    *,
    template: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> dict:
    """Win rate of one file of responses over another; written to `output` (JSON) and returned.

    The verdicts go to `<output without suffix>.verdicts.jsonl`. Keys: `judge` (its settings and template), `files`, and
    those of `summarize_outcomes`.

    Raises:
        As `load_pairs` and `judge_pairs`.
    """
    pairs = load_pairs(responses, against)[:limit]
    output = Path(output)
    verdicts = output.with_suffix(".verdicts.jsonl")
    outcomes = judge_pairs(pairs, judge, verdicts, template=template, progress=progress)
    result = {
        "judge": {**judge.settings, "template": str(template or judge.template)},
        "files": {"response": str(responses), "against": str(against), "verdicts": str(verdicts)},
        **summarize_outcomes(outcomes),
    }
    write_json(output, result)
    agreeing = result["consistency"]
    if agreeing is not None and agreeing["mean"] < 0.5:
        logger.warning(
            "the judge prefers the same response in both orders for %.0f %% of pairs only: "
            "most of what it says is about the order, and a stronger judge would say more",
            100 * agreeing["mean"],
        )
    return result
