"""`sami-fast evaluate`: mutual information of a model on groups, or the win rate of one file of responses."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.progress import track
from rich.table import Table

from sami_fast.comparison import compare_files
from sami_fast.config import ModelConfig, load_model
from sami_fast.data import GroupDataset
from sami_fast.endpoint import Endpoint
from sami_fast.evaluation import score_groups, summarize, summarize_lengths
from sami_fast.examples import load_examples
from sami_fast.judge import EndpointJudge, LocalJudge
from sami_fast.model_store import ModelStore, weights_digest
from sami_fast.prompts import PromptTemplate
from sami_fast.report import write_json
from sami_fast.scoring import check_model
from sami_fast.win_rate import SHARES


def evaluate(options: argparse.Namespace) -> None:
    """Do what the options of `sami-fast evaluate` ask for.

    Raises:
        ValueError: options that do not go together, or bad data.
        EndpointError: the judge's endpoint failed; what it answered is kept.
    """
    forms = (("model", "data"), ("responses", "against", "judge"))
    given = [[name for name in form if getattr(options, name) is not None] for form in forms]
    chosen = [form for form, names in zip(forms, given, strict=True) if len(names) == len(form)]
    if len(chosen) != 1 or sum(map(bool, given)) != 1:
        got = ", ".join(f"--{name}" for names in given for name in names) or "neither"
        raise ValueError(f"expected --model and --data, or --responses, --against and --judge, got {got}")
    name = options.model if chosen[0] == forms[0] else options.judge
    is_url = name.startswith(("http://", "https://"))
    if is_url != (options.judge_model is not None):
        raise ValueError(f"--judge-model: expected one exactly with a URL, got {options.judge_model!r} with {name!r}")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit: expected at least 1, got {options.limit}")
    if is_url:
        config = None
    else:
        config = ModelConfig(name, options.dtype, options.device, options.adapter)
    if chosen[0] == forms[0]:
        _evaluate_groups(options, config)
    else:
        _evaluate_responses(options, config)


def _evaluate_groups(options: argparse.Namespace, model_config: ModelConfig) -> None:
    template = PromptTemplate.load(options.template or "query_first")
    examples = load_examples(options.data, limit=options.limit)
    model, tokenizer = load_model(model_config)
    check_model(model)
    groups = GroupDataset.from_examples(examples, tokenizer, template).groups
    rows = score_groups(model, groups, max_tokens=options.max_tokens)
    results = list(track(rows, "scoring", total=len(groups), console=Console(stderr=True)))
    metrics = summarize(results) | {"response_tokens": summarize_lengths(groups)}
    print_intervals(f"{len(results)} groups, {options.model}", metrics)
    if options.output:
        source = {"model": options.model, "adapter": options.adapter, "data": options.data, "template": template.name}
        write_json(options.output, source | {"groups": len(groups)} | metrics)


def _evaluate_responses(options: argparse.Namespace, model_config: ModelConfig | None) -> None:
    if model_config is None:
        retrying = dict(timeout=options.timeout, max_retries=options.retries)
        endpoint = Endpoint(options.judge_model, options.judge, **retrying)
        sampling = dict(max_tokens=options.answer_tokens, temperature=options.temperature)
        judge = EndpointJudge(endpoint, concurrency=options.concurrency, **sampling)
    else:
        model, tokenizer = load_model(model_config)
        check_model(model)
        parts = [part for part in (options.judge, options.adapter) if part is not None]
        store = ModelStore(ModelConfig(options.judge))
        weights = " with ".join([weights_digest(store.digest(parts[0]), model), *map(store.digest, parts[1:])])
        judge = LocalJudge(model, tokenizer, " with ".join(parts), weights=weights, max_tokens=options.max_tokens)
    output = options.output or "win_rate.json"
    files = (options.responses, options.against)
    result = compare_files(*files, judge, output, template=options.template, limit=options.limit)
    title = f"{options.responses} against {options.against}, by {judge.settings['judge']}"
    print_intervals(title, {name: result[name] for name in SHARES if result[name] is not None})
    counts = ("pairs", "wins", "losses", "ties", "identical", "questions", "unreadable")
    print(", ".join(f"{name} {result[name]}" for name in counts))
    print(f"all of it in {output}")


def print_intervals(title: str, metrics: dict[str, dict[str, float]]) -> None:
    """A table of means with their 95 % intervals."""
    table = Table(title=title)
    for heading in ("metric", "mean", "95 % interval"):
        table.add_column(heading)
    for name, numbers in metrics.items():
        table.add_row(name, f"{numbers['mean']:.4f}", f"{numbers['low']:.4f} to {numbers['high']:.4f}")
    Console().print(table)
