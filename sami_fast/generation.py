"""Sampling responses with transformers' `generate`, and filtering what comes back.

Each response is drawn from the model's own distribution p(. | prompt) (at `temperature`, cut to `top_p`), with random
numbers of its own: they depend on `seed`, the prompt and the sample's number, not on the batch or on what was generated
before. A run that is cut off and continued with the remaining prompts therefore writes the same responses.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generated:
    """One sampled response.

    Attributes:
        prompt: index of its prompt in the list that was given.
        sample: its number among the responses to that prompt, from 0.
        text: the response up to the end-of-sequence token or the stop string, which it does not hold. Other special
            tokens stay visible in it, so that a filter can see them.
        token_ids: the tokens of `text`; a token that reaches into a stop string is left out.
        finished: whether the response ended by itself, rather than at `max_new_tokens`.
    """

    prompt: int
    sample: int
    text: str
    token_ids: tuple[int, ...]
    finished: bool


def generate_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[int]],
    **options,
) -> list[Generated]:
    """All of `iter_responses` (same options) in the order of the prompts, the samples of each prompt together."""
    batches = iter_responses(model, tokenizer, prompts, **options)
    return sorted((response for batch in batches for response in batch), key=lambda r: (r.prompt, r.sample))


def iter_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 32,
    seed: int = 0,
    num_return_sequences: int = 1,
    stop: str | Sequence[str] | None = None,
    done: Collection[tuple[int, int]] = (),
    progress: bool = True,
) -> Iterator[list[Generated]]:
    """Sample responses, giving each batch as it is done; batches come longest prompt first.

    Sampling settings kept in the model (`model.generation_config`: top-k, repetition penalty and so on) are set aside,
    all but its end-of-sequence tokens. The model is in eval mode while a batch runs, and as it was in between.

    Args:
        model: a causal language model, on the device to use.
        tokenizer: its tokenizer.
        prompts: texts, or token ids as they are to be given to the model. A text is tokenized with the tokenizer's
            special tokens, unless it starts with the beginning-of-sequence token already.
        max_new_tokens: a response is cut off at this many tokens.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_p: sample among the likeliest tokens that make up this much probability. Below 1 it sorts the vocabulary
            at each token.
        batch_size: sequences generated together.
        seed: of the random numbers.
        num_return_sequences: responses to each prompt.
        stop: strings at which a response ends.
        done: (prompt, sample) of responses that are there already, from a run that was cut off; they are left out.
        progress: show a progress bar.

    Raises:
        ValueError: an argument out of range, an empty prompt, or one that leaves no room for `max_new_tokens`;
            before anything is generated.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    sampling = dict(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, batch_size=batch_size, stop=stop
    )
    jobs, stop = plan(tokenizer, prompts, num_return_sequences, limit=limit, seed=seed, done=done, **sampling)
    eos = eos_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(eos), 0)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=eos or None,
        pad_token_id=pad,
        stop_strings=stop or None,
        use_cache=True,
    )
    warpers = LogitsProcessorList()
    if temperature not in (0, 1):
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_p < 1 and temperature > 0:
        warpers.append(TopPLogitsWarper(top_p))
    return _batches(model, tokenizer, jobs, config, warpers, batch_size, progress)


@dataclass(frozen=True)
class Job:
    """One response to be sampled: `ids` is its prompt, `seed` its own, or None to take the likeliest tokens."""

    prompt: int
    sample: int
    ids: list[int]
    seed: int | None


def plan(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[int]],
    num_return_sequences: int,
    *,
    limit: int | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    batch_size: int,
    seed: int,
    stop: str | Sequence[str] | None,
    done: Collection[tuple[int, int]],
) -> tuple[list[Job], list[str]]:
    """Jobs, longest prompt first, and the list of stop strings; `limit` is the model's positions, see `iter_responses`.

    Raises:
        ValueError: as in `iter_responses`.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts: expected a list of texts or token ids, got one text")
    for name, value in (
        ("max_new_tokens", max_new_tokens),
        ("batch_size", batch_size),
        ("num_return_sequences", num_return_sequences),
    ):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number of at least 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected more than 0 and at most 1, got {top_p}")
    stop = [stop] if isinstance(stop, str) else list(stop or ())
    if "" in stop:
        raise ValueError("stop: expected strings that are not empty, got ''")
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    for index, ids in enumerate(encoded):
        if not ids:
            raise ValueError(f"prompts: expected at least one token in each, got none in prompts[{index}]")
        if limit is not None and len(ids) + max_new_tokens > limit:
            raise ValueError(
                f"prompts: the model has {limit} positions, prompts[{index}] has {len(ids)} tokens and "
                f"max_new_tokens is {max_new_tokens}"
            )
    jobs = _jobs(encoded, num_return_sequences, seed if temperature > 0 else None)
    return [job for job in jobs if (job.prompt, job.sample) not in done], stop


def _jobs(encoded: Sequence[list[int]], samples: int, seed: int | None) -> list[Job]:
    """One job for each response. Its seed comes from the prompt's tokens; equal prompts count as samples of one."""
    seen: Counter[tuple[int, ...]] = Counter()
    jobs = []
    for prompt, ids in enumerate(encoded):
        for sample in range(samples):
            number = seen[tuple(ids)]
            seen[tuple(ids)] += 1
            digest = hashlib.sha256(f"{seed}/{number}/{ids}".encode()).digest()
            own = None if seed is None else int.from_bytes(digest[:8], "big") >> 1
            jobs.append(Job(prompt, sample, ids, own))
    # Longest first, so that a batch too large for the memory fails at once.
    return sorted(jobs, key=lambda job: -len(job.ids))


def _batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    jobs: Sequence[Job],
    config: GenerationConfig,
    warpers: LogitsProcessorList,
    batch_size: int,
    progress: bool,
) -> Iterator[list[Generated]]:
    eos, stop = config.eos_token_id or (), config.stop_strings or ()
    with tqdm(total=len(jobs), desc="generating", unit="response", disable=not progress) as bar:
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            length = len(batch[0].ids)
            fill = [length - len(job.ids) for job in batch]  # on the left: the last token of each is the newest
            input_ids = [[config.pad_token_id] * n + job.ids for n, job in zip(fill, batch, strict=True)]
            attention_mask = [[0] * n + [1] * (length - n) for n in fill]
            processors = LogitsProcessorList(warpers)
            if batch[0].seed is not None:
                processors.append(_GumbelNoise([job.seed for job in batch], model.device))
            with _for_sampling(model, config):
                output = model.generate(
                    input_ids=torch.tensor(input_ids, device=model.device),
                    attention_mask=torch.tensor(attention_mask, device=model.device),
                    generation_config=config,
                    logits_processor=processors,
                    tokenizer=tokenizer,
                )
            bar.update(len(batch))
            yield [
                Generated(job.prompt, job.sample, *cut(tokenizer, row, eos, stop))
                for job, row in zip(batch, output[:, length:].tolist(), strict=True)
            ]


class _GumbelNoise(LogitsProcessor):
    """Makes the choice of the likeliest token a draw: argmax(logits + Gumbel noise) has the softmax distribution.

    Unlike `torch.multinomial` over a batch, each sequence has a random stream of its own.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log_()


@contextmanager
def _for_sampling(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    # What `config` leaves open would be filled in from the model's own settings: they are replaced, not overridden.
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    kept = owner.generation_config
    training = [module for module in model.modules() if module.training]
    owner.generation_config = config
    model.eval()
    try:
        yield
    finally:
        owner.generation_config = kept
        for module in training:
            module.training = True


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[int]) -> list[int]:
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    has_bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    return list(tokenizer(prompt, add_special_tokens=not has_bos).input_ids)


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End-of-sequence tokens of the model's generation settings and of the tokenizer."""
    return merge_eos_ids(model.generation_config.eos_token_id, tokenizer)


def merge_eos_ids(of_model: int | Sequence[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Those of a model's settings, one, several or none, and the tokenizer's."""
    ids = [of_model] if isinstance(of_model, int) else list(of_model or ())
    return sorted({*ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})


def cut(
    tokenizer: PreTrainedTokenizerBase, row: list[int], eos_ids: Collection[int], stop: Sequence[str]
) -> tuple[str, tuple[int, ...], bool]:
    """Text, tokens and `finished` of a generated row: what lies before its end-of-sequence token or stop string."""
    end = next((i for i, token in enumerate(row) if token in eos_ids), None)
    ids = row if end is None else row[:end]
    text = tokenizer.decode(ids)
    at = min((i for i in map(text.find, stop) if i >= 0), default=None)
    if at is not None:
        text = text[:at]
        while ids and len(tokenizer.decode(ids)) > at:
            ids = ids[:-1]
    while ids and text.endswith("\ufffd"):  # a character that was cut between its bytes
        ids = ids[:-1]
        text = tokenizer.decode(ids)
    return text, tuple(ids), end is not None or at is not None


# What chat and instruction formats leave behind when a model writes on past its answer.
_LEFTOVERS = re.compile(
    r"<\|[^|<>\n]{1,40}\|>|\[/?INST\]|<</?SYS>>|</?s>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>"
    r"|^[ \t]*#{2,}[ \t]*(?:Instruction|Input|Response)\b|^[ \t]*(?:Human|User|Assistant|System)[ \t]*:",
    re.IGNORECASE | re.MULTILINE,
)
_SENTENCE_END = re.compile(r"[.!?…。！？]+[\"'”’)\]]*(?=\s|$)")
_NO_SENTENCE_END = re.compile(r"(?:(?:^|\n)[ \t]*(?:\d{1,3}|[A-Za-z])|\b(?:e\.g|i\.e|vs|Mr|Mrs|Ms|Dr|St))\.$")


@dataclass(frozen=True)
class Filtered:
    """`texts[i][k]`: response k of group i, None where it was removed. `counts`: how many of each kind, see below."""

    texts: list[list[str | None]]
    counts: dict[str, int]


def filter_responses(
    groups: Sequence[Sequence[str]],
    positives: Sequence[Sequence[int]] | None = None,
    *,
    markers: Sequence[str] = (),
    finished: Sequence[Sequence[bool]] | None = None,
    trim: bool = False,
    drop_unfinished: bool = False,
) -> Filtered:
    """Remove responses that say nothing about their constitution. Nothing is moved: removed ones become None.

    Counted, in this order: `leftover` (removed: holds a marker of a chat or instruction format, or one of `markers`),
    `trimmed` (kept: cut after its last full sentence), `unfinished` (removed: its last sentence has no end; only when
    asked for), `empty` (removed), `identical` (removed: the same text, but for case and white space, was written under
    another constitution of the group; all copies go), and `kept`.

    Args:
        groups: the responses to each query.
        positives: the constitution that each was written under, by its number; response k under constitution k if None.
        markers: further strings that a response must not hold, such as headings of the prompt template.
        finished: which responses ended by themselves; trimming leaves those as they are.
        trim: cut responses after the last full sentence. One with no full sentence is left as it is.
        drop_unfinished: remove responses, trimmed or not, that do not end where a sentence ends.

    Raises:
        ValueError: `positives` or `finished` differ in shape from `groups`.
    """
    for name, given in (("positives", positives), ("finished", finished)):
        if given is not None and [len(row) for row in given] != [len(row) for row in groups]:
            raise ValueError(f"{name}: expected the shape of groups, one entry for each response, got another shape")
    counts = dict.fromkeys(("leftover", "trimmed", "unfinished", "empty", "identical", "kept"), 0)
    texts: list[list[str | None]] = []
    for i, group in enumerate(groups):
        row: list[str | None] = []
        for k, text in enumerate(group):
            if _LEFTOVERS.search(text) or any(marker in text for marker in markers):
                counts["leftover"] += 1
                row.append(None)
                continue
            if trim and not (finished is not None and finished[i][k]):
                shorter = trim_to_sentence(text)
                counts["trimmed"] += shorter != text
                text = shorter
            if drop_unfinished and text.strip() and not ends_sentence(text):
                counts["unfinished"] += 1
                row.append(None)
                continue
            counts["empty"] += not text.strip()
            row.append(text if text.strip() else None)
        written_under: dict[str, set[int]] = {}
        keys = [None if text is None else " ".join(text.split()).casefold() for text in row]
        for k, key in enumerate(keys):
            if key is not None:
                written_under.setdefault(key, set()).add(k if positives is None else positives[i][k])
        for k, key in enumerate(keys):
            if key is not None and len(written_under[key]) > 1:
                counts["identical"] += 1
                row[k] = None
        counts["kept"] += sum(text is not None for text in row)
        texts.append(row)
    logger.info("responses: %s", ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return Filtered(texts, counts)


def trim_to_sentence(text: str) -> str:
    """`text` up to the end of its last full sentence; all of it if there is none.

    The dot of a list number ("2.") or of a common abbreviation ends no sentence.
    """
    for match in reversed(list(_SENTENCE_END.finditer(text))):
        if not _NO_SENTENCE_END.search(text[: match.end()]):
            return text[: match.end()]
    return text


def ends_sentence(text: str) -> bool:
    """Whether `text` ends where a sentence ends, see `trim_to_sentence`."""
    text = text.rstrip()
    return any(m.end() == len(text) for m in _SENTENCE_END.finditer(text)) and not _NO_SENTENCE_END.search(text)
