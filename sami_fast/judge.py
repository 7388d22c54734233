"""Who answers a judge's questions: a model behind an endpoint, by its text, or a local one, by its log-odds."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, Protocol

from sami_fast.endpoint import Endpoint, NoAnswerError
from sami_fast.evaluation import score_groups
from sami_fast.prefix_tree import Group
from sami_fast.prompts import PromptTemplate, prompt_ids, response_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


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


def read_letters(tokenizer: PreTrainedTokenizerBase) -> tuple[PromptTemplate, list[list[int]]]:
    """The frame of a local judge's prompts, a chat where its tokenizer knows one, and the ids of the answers A and B.

    Raises:
        ValueError: a tokenizer to which A and B are the same.
    """
    frame = PromptTemplate("{query}{constitution}", "the judge's prompt", bool(tokenizer.chat_template))
    letters = [response_ids(tokenizer, frame, letter) for letter in "AB"]
    if letters[0] == letters[1]:
        raise ValueError(f"judge: expected a tokenizer that tells A from B, got the ids {letters[0]} for both")
    return frame, letters


class LocalJudge:
    """Reads the answer of a local model from log p("A") and log p("B") as its next words; nothing is sampled.

    Both orders of a pair share their beginning, and go through one exact prefix tree.

    Args:
        model, tokenizer: a causal LM; its chat template is used if it has one.
        name: the model's name in verdicts and reports.
        weights: what tells its weights from others', such as `sami_fast.model_store.weights_digest` gives; a judge with
            other weights is another judge, whatever its name.
        max_tokens: packed tokens of one forward pass.

    Raises:
        ValueError: a tokenizer to which A and B are the same.
    """

    template = "letter"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        weights: str,
        max_tokens: int = 16384,
    ) -> None:
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        self.frame, self.letters = read_letters(tokenizer)
        dtype = str(model.dtype).removeprefix("torch.")
        self.settings = {"judge": name, "kind": "local", "weights": weights, "chat": self.frame.chat, "dtype": dtype}

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
