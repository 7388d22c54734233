"""Responses of a run: sampled from a model under each constitution, filtered, and made into groups."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sami_fast.examples import Example
from sami_fast.generation import Generated, filter_responses, iter_responses
from sami_fast.model_store import ModelStore
from sami_fast.prompts import PromptTemplate, prompt_ids, response_ids
from sami_fast.run_config import RunConfig
from sami_fast.stages import JsonLinesLog, StageError
from sami_fast.tasks import Task

logger = logging.getLogger(__name__)

# What to change where a filter takes everything, in the order in which the filters come.
_REMEDIES = {
    "too_long": "generation.max_new_tokens, or a model with more positions",
    "leftover": "generation.markers, task.stop or task.generation_template",
    "unfinished": "generation.drop_unfinished or generation.max_new_tokens",
    "empty": "task.stop or task.generation_template",
    "identical": "generation.temperature, or constitutions that differ more",
    "kept": "generation.responses, so that more constitutions keep one",
}


class NoGroupsError(StageError):
    """The filters left no query with responses under two constitutions; names their counts and what to change."""

    def __init__(self, place: str, queries: int, too_long: int, filters: Mapping[str, int]) -> None:
        counts = {"too_long": too_long} | dict(filters)
        remedies = [remedy for kind, remedy in _REMEDIES.items() if counts.get(kind)]
        said = ", ".join(f"{count} {kind}" for kind, count in filters.items())
        left_out = f" ({too_long} too long for the model)" * (too_long > 0)
        super().__init__(
            f"{place}: no group is left of {queries} queries{left_out}: a group needs responses under two "
            f"constitutions; responses: {said}. Change {'; or '.join(remedies) or 'the generation section'}, and run "
            "again: what is complete is kept"
        )


class Responses:
    """Samples and filters as a run's configuration says.

    Args:
        config: of the run.
        task: as `find_task` gives it.
        template: of the prompts that responses are sampled from.
        models: of the run.

    Raises:
        ValueError: an option of the backend that is refused.
    """

    def __init__(self, config: RunConfig, task: Task, template: PromptTemplate, models: ModelStore) -> None:
        self.config, self.task, self.template, self.models = config, task, template, models
        if config.generation.backend == "continuous":
            from sami_fast.continuous_generation import batching_config

            batching_config(config.generation.continuous)

    def inputs(self, model: str) -> dict[str, Any]:
        """What sampled responses depend on, beside queries and constitutions; not batch sizes and devices."""
        settings = self.config.generation
        names = ("backend", "max_new_tokens", "temperature", "top_p")
        return {
            "seed": self.config.seed,
            "model": self.models.digest(model),
            "dtype": self.config.model.dtype,
            "generation": {name: getattr(settings, name) for name in names},
            "template": {"text": self.template.text, "chat": self.template.chat},
            "response_prefix": self.task.response_prefix,
            "stop": self.task.stop,
        }

    def filter_inputs(self) -> dict[str, Any]:
        """What the filters depend on, as `filter_responses` takes it."""
        settings = self.config.generation
        markers = [*self.task.markers, *settings.markers]
        return {"trim": settings.trim, "drop_unfinished": settings.drop_unfinished, "markers": markers}

    def sample(self, folder: Path, rows: Sequence[dict], model: str, samples: int) -> list[dict[str, Any]]:
        """Rows of generated.jsonl, those that are there already and the rest, in the order of the queries."""
        log = JsonLinesLog(folder / "generated.jsonl")
        known = {(row["id"], row["constitution"], row["sample"]) for row in log.rows}
        tokenizer, limit = self.models.tokenizer(model), self.models.positions(model)
        keys, prompts = [], []
        for row in rows:
            ids = [self._prompt(tokenizer, row["query"], text) for text in row["generation"]]
            if limit is not None and max(map(len, ids)) + self.config.generation.max_new_tokens > limit:
                logger.info("query %s: left out, too long for the model's %d positions", row["id"], limit)
                continue
            keys += [(row["id"], j) for j in range(len(ids))]
            prompts += ids
        if not keys:
            log.append([])  # the stages that follow read the file
        done = {(p, s) for p, (id, j) in enumerate(keys) for s in range(samples) if (id, j, s) in known}
        if done:
            logger.info("%s: %d of %d responses are there already", folder, len(done), samples * len(keys))
        if len(done) < samples * len(keys):
            for batch in self._batches(model, prompts, samples, done):
                log.append([self._row(tokenizer, *keys[response.prompt], response) for response in batch])
        order = {key: place for place, key in enumerate(keys)}
        return sorted(log.rows, key=lambda row: (order[row["id"], row["constitution"]], row["sample"]))

    def _prompt(self, tokenizer: Any, query: str, constitution: str) -> list[int]:
        ids = prompt_ids(tokenizer, self.template, query, constitution)
        if self.task.response_prefix:
            ids = ids + response_ids(tokenizer, self.template, self.task.response_prefix)
        return ids

    def _row(self, tokenizer: Any, id: str, constitution: int, response: Generated) -> dict[str, Any]:
        """A row of generated.jsonl; its text has the words that the response was made to start with."""
        prefix, text = self.task.response_prefix, response.text
        if prefix and response.token_ids:
            ids = response_ids(tokenizer, self.template, prefix)
            joined = tokenizer.decode([*ids, response.token_ids[0]])[len(tokenizer.decode(ids)) :]
            if joined[:1].isspace() and not text[:1].isspace():  # some tokenizers drop a space at the start of a text
                text = joined[0] + text
        row = {"id": id, "constitution": constitution, "sample": response.sample}
        return row | {"text": (prefix + text).strip(), "finished": response.finished}

    def _batches(self, model: str, prompts: list[list[int]], samples: int, done: set) -> Iterator[list[Generated]]:
        settings = self.config.generation
        options = dict(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            batch_size=settings.batch_size,
            seed=self.config.seed,
            num_return_sequences=samples,
            stop=list(self.task.stop),
            done=done,
        )
        if settings.backend == "transformers":
            yield from iter_responses(*self.models.get(model), prompts, **options)
            return
        if settings.backend == "continuous":
            from sami_fast import continuous_generation

            found = self.models.get(model)
            yield from continuous_generation.iter_responses(*found, prompts, **options, options=settings.continuous)
            return
        from sami_fast.vllm_generation import VllmEngine

        loading = dict(dtype=self.models.dtype, trust_remote_code=self.config.model.trust_remote_code)
        self.models.drop()  # the memory is the engine's now
        path = self.models.path(model)
        with VllmEngine(path, self.models.tokenizer(model), options=settings.vllm, **loading) as engine:
            yield from engine.iter_responses(prompts, **options)

    def filter(self, rows: Sequence[dict], generated: Sequence[dict]) -> tuple[list[Example], dict[str, int]]:
        """Groups, without the constitutions that no response is left of, and the filters' counts."""
        answers: dict[str, list[dict]] = {row["id"]: [] for row in rows}
        for response in generated:
            answers[response["id"]].append(response)
        rows = [row for row in rows if answers[row["id"]]]
        groups = [
            sorted(answers[row["id"]], key=lambda response: (response["constitution"], response["sample"]))
            for row in rows
        ]
        filtered = filter_responses(
            [[response["text"] for response in group] for group in groups],
            [[response["constitution"] for response in group] for group in groups],
            finished=[[response["finished"] for response in group] for group in groups],
            **self.filter_inputs(),
        )
        examples = []
        for row, group, texts in zip(rows, groups, filtered.texts, strict=True):
            kept = [(r["constitution"], text) for r, text in zip(group, texts, strict=True) if text is not None]
            under = sorted({constitution for constitution, _ in kept})
            if len(under) >= 2:
                constitutions = [row["training"][j] for j in under]
                positives = [under.index(j) for j, _ in kept]
                examples.append(Example(row["id"], row["query"], constitutions, [t for _, t in kept], positives))
        return examples, filtered.counts
