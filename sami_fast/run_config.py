"""The configuration of a whole run: one dataclass for each section of its YAML file, checked before any work."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sami_fast.config import (
    ModelConfig,
    build,
    check_count,
    check_dtype,
    check_keys,
    check_number,
    check_texts,
    lay_over,
    read_config,
    to_number,
)


@dataclass
class TaskConfig:
    """Which queries and prompts; what is left at None is as the task has it, see `sami_fast.tasks`.

    Args:
        name: generic, tldr or hh.
        source: file or data set with queries; None is the task's public data set.
        split: which split of it.
        load_options: further arguments of `datasets.load_dataset`.
        field, id_field: columns with the query and its id, `info.post`; ids are made up where there is no such column.
        limit: read only so many rows.
        template, generation_template: prompts of training and of generation; the latter is by default the task's own,
            or `template` where that is given.
        chat: wrap prompts in the tokenizer's chat template; None does what the template says.
        response_prefix: words that every response starts with.
        stop: strings at which a response ends.
    """

    name: str = "generic"
    source: str | None = None
    split: str | None = None
    load_options: dict[str, Any] | None = None
    field: str | None = None
    id_field: str | None = None
    limit: int | None = None
    template: str | None = None
    generation_template: str | None = None
    chat: bool | None = None
    response_prefix: str | None = None
    stop: list[str] | None = None

    def __post_init__(self) -> None:
        check_count("task.limit", self.limit, optional=True)
        if self.stop is not None:
            check_texts("task.stop", self.stop)
        if not isinstance(self.load_options or {}, Mapping):
            raise ValueError(f"task.load_options: expected a section of keys, got {self.load_options!r}")


@dataclass
class ConstitutionConfig:
    """What constitutions are made of: exactly one of `principles` and `pairs`.

    Args:
        principles: JSON file of principles and antitheses, see `sami_fast.constitutions`.
        pairs: JSON file of ready-made pairs in the format published with the paper.
        attributes: use these of the file's attributes; None uses the file's default.
        count: C, constitutions of a query; pairs are always 2.
    """

    principles: str | None = None
    pairs: str | None = None
    attributes: list[str] | None = None
    count: int = 2

    def __post_init__(self) -> None:
        if (self.principles is None) == (self.pairs is None):
            raise ValueError(f"constitutions: expected either principles or pairs, got {self.principles}, {self.pairs}")
        if self.pairs is not None and (self.attributes is not None or self.count != 2):
            raise ValueError("constitutions: expected count 2 and no attributes beside pairs, got others")
        if type(self.count) is not int or self.count < 2:
            raise ValueError(f"constitutions.count: expected an int of at least 2, got {self.count!r}")


@dataclass
class SamplingConfig:
    """How responses are sampled and filtered; the section is called `generation`.

    Args:
        backend: "transformers" (the same responses whatever the batches); "continuous", transformers' continuous
            batching, or "vllm" (`pip install "sami-fast[vllm]"`), both made for GPUs, with random numbers of their own.
        max_new_tokens, temperature, top_p: as in `sami_fast.generation.iter_responses`.
        responses: to each query under each constitution.
        batch_size: sequences generated together, by default 32, and 1024 where the backend is not transformers; changes
            speed and memory, and with transformers not what is written.
        trim: cut responses that ran into `max_new_tokens` after their last full sentence.
        drop_unfinished: leave out responses whose last sentence has no end.
        markers: leave out responses that hold one of these strings, beside those of the task.
        continuous: further arguments of `transformers.ContinuousBatchingConfig`, such as `{max_memory_percent: 0.5}`.
        vllm: further arguments of `vllm.LLM`, such as `{gpu_memory_utilization: 0.8, tensor_parallel_size: 2}`.
    """

    backend: str = "transformers"
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    responses: int = 1
    batch_size: int | None = None
    trim: bool = True
    drop_unfinished: bool = False
    markers: list[str] = field(default_factory=list)
    continuous: dict[str, Any] = field(default_factory=dict)
    vllm: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.backend not in ("transformers", "continuous", "vllm"):
            raise ValueError(f"generation.backend: expected transformers, continuous or vllm, got {self.backend!r}")
        for name in ("max_new_tokens", "responses", "batch_size"):
            check_count(f"generation.{name}", getattr(self, name), optional=name == "batch_size")
        if self.batch_size is None:
            self.batch_size = 32 if self.backend == "transformers" else 1024
        check_number("generation.temperature", self.temperature)
        if type(self.top_p) not in (int, float) or not 0 < self.top_p <= 1:
            raise ValueError(f"generation.top_p: expected a number in (0, 1], got {self.top_p!r}")
        check_texts("generation.markers", self.markers)
        for name in ("trim", "drop_unfinished"):
            if type(value := getattr(self, name)) is not bool:
                raise ValueError(f"generation.{name}: expected true or false, got {value!r}")
        for name in ("continuous", "vllm"):
            if not isinstance(value := getattr(self, name), Mapping):
                raise ValueError(f"generation.{name}: expected a section of keys, got {value!r}")


@dataclass
class IterationConfig:
    """How the loop runs; the section is called `iterations`.

    Args:
        count: how many iterations.
        queries: fresh queries in each; None shares out all there are.
        held_out: queries kept for evaluation, and never trained on.
        start: what training starts from: "base" (the paper's way) or "previous", the model of the iteration before.
    """

    count: int = 1
    queries: int | None = None
    held_out: int = 32
    start: str = "base"

    def __post_init__(self) -> None:
        for name in ("count", "held_out", "queries"):
            check_count(f"iterations.{name}", getattr(self, name), optional=name == "queries")
        if self.start not in ("base", "previous"):
            raise ValueError(f"iterations.start: expected base or previous, got {self.start!r}")


@dataclass
class EvaluationConfig:
    """What is measured on held-out queries after each iteration, and before the first.

    Args:
        queries: write responses to so many held-out queries; None writes them for all.
        max_tokens: packed tokens of one forward pass.
        normalize: mean or sum over a response's tokens.
    """

    queries: int | None = None
    max_tokens: int = 16384
    normalize: str = "mean"

    def __post_init__(self) -> None:
        for name in ("queries", "max_tokens"):
            check_count(f"evaluation.{name}", getattr(self, name), optional=name == "queries")
        if self.normalize not in ("mean", "sum"):
            raise ValueError(f"evaluation.normalize: expected mean or sum, got {self.normalize!r}")


@dataclass
class JudgeConfig:
    """Who compares each iteration's responses with those of the model as it came: one of `model` and `endpoint`.

    Args:
        model: folder or hub name of a causal LM, or "bundled"; runs where the run's model does.
        endpoint: arguments of `sami_fast.endpoint.Endpoint`, `{model: gpt-4.1, base_url: ...}`.
        template: letter, reasoned or a text file; None is letter for a model, reasoned for an endpoint.
        max_pairs: ask about so many pairs; None asks about all.
        dtype, max_tokens: of the model; packed tokens of one forward pass.
        answer_tokens, temperature, concurrency: of the endpoint; most tokens of an answer, questions in flight.
    """

    model: str | None = None
    endpoint: dict[str, Any] | None = None
    template: str | None = None
    max_pairs: int | None = None
    dtype: str = "auto"
    max_tokens: int = 16384
    answer_tokens: int = 400
    temperature: float = 0.0
    concurrency: int = 8

    def __post_init__(self) -> None:
        if (self.model is None) == (self.endpoint is None):
            raise ValueError(f"judge: expected either model or endpoint, got {self.model!r}, {self.endpoint!r}")
        if self.model is not None and not (isinstance(self.model, str) and self.model):
            raise ValueError(f"judge.model: expected a folder or name, got {self.model!r}")
        for name in ("max_pairs", "max_tokens", "answer_tokens", "concurrency"):
            check_count(f"judge.{name}", getattr(self, name), optional=name == "max_pairs")
        check_number("judge.temperature", self.temperature)
        check_dtype("judge.dtype", self.dtype)


@dataclass
class RunConfig:
    """A whole run of SAMI, see `sami_fast.pipeline`; each attribute is a section of the YAML file.

    Args:
        output: folder of the run.
        seed: of every draw: slices, constitutions, responses, training.
        training: arguments of `SamiConfig`; the run sets output_dir and seed.
        lora: arguments of `peft.LoraConfig`; None trains all weights.
        judge: None asks no judge.
    """

    output: str
    seed: int
    model: ModelConfig
    task: TaskConfig
    constitutions: ConstitutionConfig
    generation: SamplingConfig
    iterations: IterationConfig
    evaluation: EvaluationConfig
    training: dict[str, Any]
    lora: dict[str, Any] | None
    judge: JudgeConfig | None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> RunConfig:
        """From what `read_config` gives.

        Raises:
            ValueError: an unknown key or a value that is refused; names the section and the key.
        """
        check_keys("", values, [f.name for f in dataclasses.fields(cls)])
        sections = {
            "model": ModelConfig,
            "task": TaskConfig,
            "constitutions": ConstitutionConfig,
            "generation": SamplingConfig,
            "iterations": IterationConfig,
            "evaluation": EvaluationConfig,
        }
        if not isinstance(values.get("output"), str) or not values["output"]:
            raise ValueError(f"output: expected a folder, got {values.get('output')!r}")
        if type(values.get("seed", 0)) is not int:
            raise ValueError(f"seed: expected an int, got {values['seed']!r}")
        for name in ("training", "lora"):
            if not isinstance(values.get(name) or {}, Mapping):
                raise ValueError(f"{name}: expected a section of keys, got {values[name]!r}")
        built = {name: build(section, name, values.get(name) or {}) for name, section in sections.items()}
        training = {key: to_number(value) for key, value in (values.get("training") or {}).items()}
        lora = dict(values["lora"] or {}) if "lora" in values else None
        judge = None if values.get("judge") is None else build(JudgeConfig, "judge", values["judge"])
        own = dict(output=values["output"], seed=values.get("seed", 0), training=training, lora=lora, judge=judge)
        return cls(**own, **built)


def read_run_config(path: str, overrides: Sequence[str]) -> RunConfig:
    """A run's configuration. Files that it names are looked for beside it first, those in overrides are not.

    Raises:
        ValueError: as in `read_config` and `RunConfig.from_mapping`.
        FileNotFoundError: no such file.
    """
    values = read_config(path, [])
    _resolve_files(values, Path(path).parent)
    lay_over(values, overrides)
    return RunConfig.from_mapping(values)


def _resolve_files(values: dict[str, Any], folder: Path) -> None:
    """Make the files that a run's configuration names, and that lie beside it in `folder`, absolute paths."""
    for section, key in (
        ("task", "source"),
        ("task", "template"),
        ("task", "generation_template"),
        ("constitutions", "principles"),
        ("constitutions", "pairs"),
        ("judge", "template"),
    ):
        part = values.get(section)
        name = part.get(key) if isinstance(part, dict) else None
        if isinstance(name, str) and (folder / name).exists():
            part[key] = str((folder / name).resolve())
