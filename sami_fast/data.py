"""Examples in, groups of token ids out: tokenisation, and the data set that is trained and scored on."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean as mean
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from sami_fast.examples import Example, load_examples
from sami_fast.prefix_tree import Group
from sami_fast.prompts import PromptTemplate, prompt_ids, response_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def tokenize_example(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate,
    *,
    score_eos: bool = False,
    chat: bool | None = None,
    max_length: int | None = None,
) -> Group:
    """Token ids of an example; see `prompt_ids` and `response_ids`.

    Args:
        chat: wrap prompts in the tokenizer's chat template. None does what the template says.
        max_length: most tokens that one prompt and one response may have together.

    Raises:
        ValueError: too long (names the example, its length and the limit), or as in `prompt_ids`, `response_ids`.
    """
    if chat is not None:
        template = replace(template, chat=chat)
    prompts = [prompt_ids(tokenizer, template, example.query, text) for text in example.constitutions]
    responses = [response_ids(tokenizer, template, text, score_eos=score_eos) for text in example.responses]
    length = max(map(len, prompts)) + max(map(len, responses))
    if max_length is not None and length > max_length:
        raise ValueError(f"example {example.id!r}: expected at most max_length={max_length} tokens, got {length}")
    return Group(prompts, responses, example.positives, example.mask, example.id)


class GroupDataset(Dataset):
    """Groups for training, tokenised at once so that bad data shows before any work."""

    def __init__(self, groups: Iterable[Group]) -> None:
        self.groups = list(groups)
        if not self.groups:
            raise ValueError("groups: expected at least one, got none")

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Group:
        return self.groups[index]

    @classmethod
    def from_examples(
        cls,
        examples: Iterable[Example],
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate | str | Path = "query_first",
        *,
        chat: bool | None = None,
        **options: Any,
    ) -> GroupDataset:
        """Tokenise examples; `options` are the others of `tokenize_example`."""
        if not isinstance(template, PromptTemplate):
            template = PromptTemplate.load(template)
        if chat is not None:
            template = replace(template, chat=chat)
        data = cls(tokenize_example(example, tokenizer, template, **options) for example in examples)
        C, R = zip(*(group.shape for group in data.groups), strict=True)
        logger.info(
            "%d groups, %s prompts from %s: constitutions %d to %d, responses %d to %d, "
            "mean tokens of a prompt %.1f, of a response %.1f",
            len(data),
            "chat" if template.chat else "plain",
            template.name,
            *(min(C), max(C), min(R), max(R)),
            mean(len(prompt) for group in data.groups for prompt in group.prompts),
            mean(len(response) for group in data.groups for response in group.responses),
        )
        return data

    @classmethod
    def from_source(
        cls,
        source: Any,
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate | str | Path = "query_first",
        *,
        split: str | None = None,
        limit: int | None = None,
        fields: Mapping[str, str] | None = None,
        load_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> GroupDataset:
        """`load_examples`, then `from_examples`."""
        examples = load_examples(source, split=split, limit=limit, fields=fields, load_options=load_options)
        return cls.from_examples(examples, tokenizer, template, **options)


def train_test_split(
    examples: Sequence[Example], held_out: int | float, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """Hold out `held_out` examples (int) or that share of them (float in (0, 1)); both parts keep their order.

    Raises:
        ValueError: `held_out` leaves one part empty.
    """
    count = held_out if type(held_out) is int else round(held_out * len(examples))
    if not 0 < count < len(examples):
        raise ValueError(f"held_out: expected 1 to {len(examples) - 1} of {len(examples)} examples, got {held_out!r}")
    chosen = set(random.Random(seed).sample(range(len(examples)), count))
    train = [example for index, example in enumerate(examples) if index not in chosen]
    test = [examples[index] for index in sorted(chosen)]
    if shared := {example.query for example in train} & {example.query for example in test}:
        logger.warning("%d queries are in the training and in the held-out part", len(shared))
    return train, test
