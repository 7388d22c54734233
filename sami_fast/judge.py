"""A judge compares two files of responses: every pair in both orders, no question asked twice.

Verdicts go to a JSON Lines file as they come, each under a key made of the judge's settings and the whole prompt. A run
that was killed, or that stopped because the endpoint or the disk gave out, goes on from there when started again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tqdm.auto import tqdm

from sami_fast.data import TEMPLATES, PromptTemplate, prompt_ids, response_ids
from sami_fast.endpoint import Endpoint, NoAnswerError
from sami_fast.evaluation import score_groups
from sami_fast.prefix_tree import Group
from sami_fast.report import write_json
from sami_fast.stages import JsonLinesLog
from sami_fast.win_rate import Outcome, Pair, load_pairs, summarize_outcomes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")


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
        found, needed = set(_PLACEHOLDER.findall(self.text)), {"query", "response_a", "response_b"}
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
        built_in = {path.stem: path for path in sorted((TEMPLATES / "judge").glob("*.txt"))}
        path = built_in.get(str(name_or_path), Path(name_or_path))
        if not path.is_file():
            raise ValueError(f"template: expected a file or one of {', '.join(built_in)}, got {str(name_or_path)!r}")
        try:
            return cls(path.read_text(encoding="utf-8-sig").removesuffix("\n"), str(name_or_path))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None

    def render(self, query: str, constitution: str | None, response_a: str, response_b: str) -> str:
        """The template with the texts put in verbatim, in one pass: braces inside them mean nothing."""
        texts = {"query": query, "constitution": constitution, "response_a": response_a, "response_b": response_b}
        paragraphs = self.text.split("\n\n")
        if constitution is None:
            lost = [paragraph for paragraph in paragraphs if "{constitution}" in paragraph]
            if set(_PLACEHOLDER.findall("".join(lost))) - {"constitution"}:
                raise ValueError(
                    f"{self.name}: expected {{constitution}} in a paragraph of its own, as some pairs have none"
                )
            paragraphs = [paragraph for paragraph in paragraphs if paragraph not in lost]
        return _PLACEHOLDER.sub(lambda match: texts[match[1]], "\n\n".join(paragraphs))


@dataclass(frozen=True)
class Question:
    """A pair in one order: 0 shows `response` as A, 1 as B.

    `pair` and `id`: its place and its name. `key` stands for the judge's settings, the order and the prompt.
    """

    pair: int
    id: str
    order: int
    prompt: str
    key: str


@dataclass(frozen=True)
class Answer:
    """`choice`: "A", "B", "tie", or None when it could not be read; with the judge's text, or log p(A) and log p(B)."""

    choice: str | None
    text: str | None = None
    logprobs: tuple[float, float] | None = None


class Judge(Protocol):
    """Who answers. `settings` tell one judge's answers from another's; `template` is the one it is made for."""

    template: str
    settings: Mapping[str, Any]

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[Question, Answer]]:
        """Answers as they come, in any order."""


_FINAL = re.compile(r".*\b(?:choice|response|answer|preference|preferred|verdict)\b[^\w:=]*[:=](.*)", re.IGNORECASE)
_LETTER = re.compile(
    r"[^\w]*(?:(?:response|answer|option)\b)?[^\w]*(A|B)\b[^\w]*(?:(?:is )?better\b)?[^\w]*", re.IGNORECASE
)
_TIE = re.compile(r"[^\w]*(?:an? )?(?:tie|draw|both|neither|equal|equally|A (?:and|=) B)\b.*", re.IGNORECASE)


def parse_choice(text: str) -> str | None:
    """The choice in a judge's text: A, B, tie, or None when it cannot be read.

    Read from the last line of the kind `Final choice: A`, else from the last line of all. Markdown, quotes and brackets
    around the letter are fine; a line that names no single letter is not guessed at.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [match[1] for line in lines if (match := _FINAL.fullmatch(line))]
    for candidate in said[-1:] + lines[-1:]:
        if _TIE.fullmatch(candidate):
            return "tie"
        if match := _LETTER.fullmatch(candidate):
            return match[1].upper()
    return None


class EndpointJudge:
    """Asks an endpoint, several questions at a time, and reads the answers from its text.

    Args:
        endpoint: see `sami_fast.endpoint.Endpoint`, which retries and backs off.
        concurrency: questions in flight.
        max_tokens, temperature, seed: of each answer.
    """

    template = "reasoned"

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        concurrency: int = 8,
        max_tokens: int = 400,
        temperature: float = 0.0,
        seed: int | None = 0,
    ) -> None:
        for name, value in (("concurrency", concurrency), ("max_tokens", max_tokens)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.endpoint, self.concurrency = endpoint, concurrency
        self.sampling = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        self.settings = {"judge": endpoint.model, "kind": "endpoint", **self.sampling}

    def _ask(self, question: Question) -> Answer:
        try:
            text = self.endpoint.complete(question.prompt, **self.sampling)
        except NoAnswerError as error:
            logger.warning("pair %r, order %d: %s, counted as unreadable", question.id, question.order, error)
            return Answer(None)
        text = text.encode("utf-8", "replace").decode()  # an emoji that was cut in half is no Unicode
        return Answer(parse_choice(text), text)

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[Question, Answer]]:
        """Answers as they come. After a failure nothing new is asked; what is in flight is still given, then it raises.

        Raises:
            EndpointError: the first failure. An answer without text is none: it cannot be read.
        """
        rest, failure = iter(questions), None
        with ThreadPoolExecutor(self.concurrency) as pool:
            running: dict[Future[Answer], Question] = {
                pool.submit(self._ask, question): question for question in islice(rest, self.concurrency)
            }
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    question = running.pop(future)
                    failure = failure or future.exception()
                    if failure is None and (following := next(rest, None)) is not None:
                        running[pool.submit(self._ask, following)] = following
                    if future.exception() is None:
                        yield question, future.result()
        if failure is not None:
            raise failure


_VERBATIM = PromptTemplate("{query}{constitution}", "the judge's prompt")


class LocalJudge:
    """Reads the answer of a local model from log p("A") and log p("B") as its next words; nothing is sampled.

    Both orders of a pair share their beginning, and go through one exact prefix tree.

    Args:
        model, tokenizer: a causal LM; its chat template is used if it has one.
        name: the model's name in verdicts and reports.
        max_tokens: packed tokens of one forward pass.
    """

    template = "letter"

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, *, max_tokens: int = 16384
    ) -> None:
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        chat = bool(tokenizer.chat_template)
        self.frame = PromptTemplate(_VERBATIM.text, _VERBATIM.name, chat)
        self.letters = [response_ids(tokenizer, self.frame, letter) for letter in "AB"]
        if self.letters[0] == self.letters[1]:
            raise ValueError(f"judge: expected a tokenizer that tells A from B, got the ids {self.letters[0]} for both")
        self.settings = {"judge": name, "kind": "local", "chat": chat, "dtype": str(model.dtype).removeprefix("torch.")}

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[Question, Answer]]:
        """Answers in order.

        Raises:
            ValueError: a prompt is longer than the model has positions, or than `max_tokens`; before any is asked.
            RuntimeError: a log-probability is not finite.
        """
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        parts, groups = [], []
        for _, part in groupby(questions, key=lambda question: question.pair):
            part = list(part)
            prompts = [prompt_ids(self.tokenizer, self.frame, question.prompt, "") for question in part]
            length = max(map(len, prompts)) + max(map(len, self.letters))
            if length > limit:
                raise ValueError(f"pair {part[0].id!r}: expected at most {limit} tokens for this judge, got {length}")
            parts.append(part)
            groups.append(Group(prompts, self.letters, [0, len(part) - 1], id=part[0].id))
        results = score_groups(self.model, groups, max_tokens=self.max_tokens, normalize="sum")
        for part, result in zip(parts, results, strict=True):
            for question, (a, b) in zip(part, result.matrix.tolist(), strict=True):
                if not (math.isfinite(a) and math.isfinite(b)):
                    raise RuntimeError(f"pair {question.id!r}: log-probabilities of A and B are not finite: {a}, {b}")
                yield question, Answer("A" if a > b else "B" if b > a else "tie", logprobs=(a, b))


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
