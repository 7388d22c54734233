"""The demonstration: a recipe run by the pipeline, then what it shows: speed, tables, figures, samples."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sami_fast.data import GroupDataset
from sami_fast.evaluation import padded_infonce, padded_matrix
from sami_fast.examples import load_examples
from sami_fast.losses import infonce_loss
from sami_fast.pipeline import Pipeline
from sami_fast.prefix_tree import Group, pack
from sami_fast.report import (
    draw_heat_maps,
    draw_training_curve,
    read_json_lines,
    write_json,
    write_json_lines,
    write_text,
)
from sami_fast.run_config import read_run_config
from sami_fast.run_results import METRIC_LABELS, read_scores
from sami_fast.scoring import score
from sami_fast.stages import outputs_digest, read_manifest
from sami_fast.win_rate import SHARES

logger = logging.getLogger(__name__)

RECIPES = Path(__file__).parent / "recipes"
_TIMED_GROUPS = 3
_RULES = {
    "iteration-0/generation": "the model answers held-out queries under contrasting constitutions",
    "generation": "the model answers fresh queries",
    "training": "training with SAMI on its own answers",
    "evaluation": "held-out mutual information",
    "judge": "a judge compares responses with those before training",
}


def run_demo(
    model_name: str | None = None,
    output: Path | None = None,
    *,
    recipe: str = "demo",
    queries: int | None = None,
    steps: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Run a recipe and leave a report folder; returns what metrics.json holds.

    Args:
        model_name: folder or hub name of a chat model; None is the recipe's, as is any None below.
        output: the report folder, which is the run's folder too: what is complete in it is not done again.
        recipe: demo or demo_long.
        queries: use only so many; a third of them is held out.
        steps: optimiser steps of each iteration.
        seed: of the run.
    """
    overrides = [f"seed={seed}"]
    if queries is not None:
        count = len(list(read_json_lines(RECIPES / "demo" / "queries.jsonl")))
        if not 6 <= queries <= count:
            raise ValueError(f"queries: expected 6 to {count}, got {queries}")
        overrides += [f"task.limit={queries}", f"iterations.held_out={queries // 3}", "iterations.queries=null"]
    if steps is not None:
        overrides += [f"training.max_steps={steps}", f"training.eval_steps={max(1, steps // 2)}"]
    config = read_run_config(str(RECIPES / recipe / "config.yaml"), overrides)
    if config.judge is not None and config.judge.model == config.model.name:  # it judges itself, whichever it is
        config.judge.model = model_name or config.judge.model
    config.model.name = model_name or config.model.name
    config.output = str(output or config.output)
    console = Console()
    pipeline = Pipeline(config)
    folder = pipeline.run.folder
    with pipeline.run.locked():
        for name, work in pipeline.stages():
            if rule := _RULES.get(name, _RULES.get(name.rpartition("/")[2])):
                console.rule(f"{name.partition('/')[0]}: {rule}")
            work()
        console.rule("the tree against running every sequence whole")
        speed = _speed(pipeline)
    metrics = _metrics(folder, pipeline.config.model.name, config.iterations.count, speed)
    if pipeline.judge is not None:
        parts = [folder / f"iteration-{number}" for number in range(1, config.iterations.count + 1)]
        metrics["win_rates"] = [_read(part / "judge" / "win_rate.json") for part in parts]
    _report(folder, metrics, config.iterations.count)
    _print(console, metrics, folder)
    return metrics


def _speed(pipeline: Pipeline) -> dict[str, Any]:
    """A stage of its own: a few training groups, forward and backward, both ways."""
    responses = pipeline.run.folder / "iteration-1" / "responses"
    inputs = {
        "groups": outputs_digest(read_manifest(responses), "groups.jsonl"),
        "model": pipeline.models.digest(pipeline.config.model.name),
        "timed_groups": _TIMED_GROUPS,
    }

    def work(folder: Path) -> dict[str, Any]:
        model, tokenizer = pipeline.models.take(pipeline.config.model.name, pipeline.models.dtype)
        examples = load_examples(responses / "groups.jsonl", limit=_TIMED_GROUPS)
        groups = GroupDataset.from_examples(examples, tokenizer, pipeline.template).groups
        result = _compare_with_whole_sequences(model, groups)
        write_json(folder / "speed.json", result)
        return result

    return pipeline.run.stage("speed", inputs, work)["results"]


def _compare_with_whole_sequences(model, groups: list[Group]) -> dict[str, Any]:
    """Forward and backward of the same groups both ways in turns: best of two runs each, and how far they differ."""
    packed = pack(groups)

    def tree() -> None:
        infonce_loss(score(model, packed)).loss.backward()

    def whole() -> None:
        for group in groups:
            (padded_infonce(model, group).loss / len(groups)).backward()

    seconds: dict[str, list[float]] = {"tree": [], "whole": []}
    for _ in range(2):
        for name, run in (("tree", tree), ("whole", whole)):
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
            model.zero_grad(set_to_none=True)
    with torch.no_grad():
        pairs = zip(score(model, packed).matrices, groups, strict=True)
        difference = max(float((matrix - padded_matrix(model, group)).abs().max()) for matrix, group in pairs)
    best = {name: min(times) for name, times in seconds.items()}
    return {
        "groups": len(groups),
        "tree_seconds": best["tree"],
        "whole_seconds": best["whole"],
        "ratio": best["whole"] / best["tree"],
        "token_ratio": packed.token_ratio,
        "largest_difference": difference,
    }


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _metrics(folder: Path, model: str, iterations: int, speed: dict[str, Any]) -> dict[str, Any]:
    """Everything in numbers; `after` and `change` are those of the last iteration, `change` against the base model."""
    parts = [folder / f"iteration-{number}" for number in range(iterations + 1)]
    results = [read_manifest(part / "responses")["results"] for part in parts]
    evaluations = [_read(part / "evaluation" / "metrics.json") for part in parts]
    tokens = [read_manifest(part / "training")["results"]["tokens"] for part in parts[1:]]
    whole, packed = (sum(entry[kind] for entry in tokens) for kind in ("whole", "packed"))
    dropped: dict[str, int] = {}
    for result in results:
        for kind, count in result["filters"].items():
            dropped[kind] = dropped.get(kind, 0) + count
    manifests = [_read(path) for path in sorted(folder.rglob("manifest.json"))]
    return {
        "model": model,
        "groups": {
            "training": sum(result["groups"] for result in results[1:]),
            "held_out": results[0]["groups"],
            "dropped": {kind: count for kind, count in dropped.items() if kind != "kept"},
        },
        "before": evaluations[0]["held_out"],
        "after": evaluations[-1]["held_out"],
        "change": evaluations[-1]["change"],
        "iterations": evaluations[1:],
        "tokens": {"whole": whole, "packed": packed, "ratio": whole / packed},
        "speed": speed,
        "training": [
            entry | {"iteration": number}
            for number, part in enumerate(parts[1:], 1)
            for entry in _read(part / "training" / "log.json")
        ],
        "seconds": sum(manifest["seconds"] for manifest in manifests),
    }


def _report(folder: Path, metrics: dict[str, Any], iterations: int) -> None:
    steps: list[tuple[int, float]] = []
    held_out: list[tuple[int, float]] = []
    last = 0
    for number in range(1, iterations + 1):
        log = [entry for entry in metrics["training"] if entry["iteration"] == number]
        points = [(last + e["step"], e["mutual_information"]) for e in log if "mutual_information" in e]
        seen = [(last + e["step"], e["eval_mutual_information"]) for e in log if "eval_mutual_information" in e]
        end = max(step for step, _ in points)
        if not seen:  # not evaluated while training: the evaluations around it
            ends = (metrics["before"], metrics["iterations"][number - 1]["held_out"])
            seen = [(s, m["mutual_information"]["mean"]) for s, m in zip((last, end), ends, strict=True)]
        steps, held_out, last = steps + points, held_out + seen, end
    draw_training_curve(
        folder / "mutual_information.png", *zip(*steps, strict=True), *zip(*held_out, strict=True), limit=math.log(2)
    )
    ends = {"before": folder / "iteration-0", "after": folder / f"iteration-{iterations}"}
    for when, part in ends.items():
        title = f"held-out groups {when} training"
        draw_heat_maps(folder / f"heat_maps_{when}.png", read_scores(part)[:8], title=title)
    responses = {
        when: [row for _, row in read_json_lines(part / "evaluation" / "responses.jsonl")]
        for when, part in ends.items()
    }
    write_text(folder / "samples.md", _samples(**responses))
    files = [folder / f"iteration-{number}" / "responses" / "groups.jsonl" for number in range(iterations + 1)]
    write_json_lines(folder / "responses.jsonl", [row for path in files for _, row in read_json_lines(path)])
    write_json(folder / "metrics.json", metrics)


def _samples(before: Sequence[dict[str, str]], after: Sequence[dict[str, str]]) -> str:
    lines, query = ["# Sample responses to held-out queries", ""], None
    for old, new in zip(before, after, strict=True):
        if old["query"] != query:
            query = old["query"]
            lines += [f"## {query}", ""]
        lines += [f"**{old['constitution']}**", ""]
        for when, row in (("before", old), ("after", new)):
            lines.append(f"- {when}: {' '.join(row['response'].split())}")
        lines.append("")
    return "\n".join(lines)


def _print(console: Console, metrics: dict[str, Any], output: Path) -> None:
    after = {
        "after" if len(metrics["iterations"]) == 1 else f"iteration {entry['iteration']}": entry["held_out"]
        for entry in metrics["iterations"]
    }
    columns = {"before": metrics["before"], **after, "change": metrics["change"]}
    table = Table(title=f"{metrics['groups']['held_out']} held-out groups, mean (95 % bootstrap interval)")
    for heading in ("metric", *columns):
        table.add_column(heading)
    for name, label in METRIC_LABELS.items():
        cells = [column[name] for column in columns.values()]
        table.add_row(label, *(f"{cell['mean']:.3f} ({cell['low']:.3f} to {cell['high']:.3f})" for cell in cells))
    console.print(table)
    if win_rates := metrics.get("win_rates"):
        _print_win_rates(console, win_rates)
    speed, tokens = metrics["speed"], metrics["tokens"]
    console.print(
        f"tokens: {tokens['whole']} in whole sequences, {tokens['packed']} in the tree ({tokens['ratio']:.1f}x fewer)\n"
        f"forward + backward of {speed['groups']} groups: {speed['whole_seconds']:.1f} s whole, "
        f"{speed['tree_seconds']:.1f} s as trees ({speed['ratio']:.1f}x); matrices differ by at most "
        f"{speed['largest_difference']:.1e} nats\n"
        f"took {metrics['seconds']:.0f} s; report in {output}/"
    )


def _print_win_rates(console: Console, win_rates: Sequence[dict[str, Any]]) -> None:
    """What the judge says of each iteration against iteration 0, and how far its word goes."""
    judge = win_rates[0]["judge"]["judge"]
    table = Table(title=f"responses against those before training, by {judge}: mean (95 % interval)")
    for heading in ("share", *(f"iteration {number}" for number in range(1, len(win_rates) + 1))):
        table.add_column(heading)
    for name, label in SHARES.items():
        cells = [win_rate[name] for win_rate in win_rates]
        if any(cells):
            texts = (f"{cell['mean']:.3f} ({cell['low']:.3f} to {cell['high']:.3f})" if cell else "-" for cell in cells)
            table.add_row(label, *texts)
    for name in ("pairs", "identical", "questions", "unreadable"):
        table.add_row(name, *(str(win_rate[name]) for win_rate in win_rates))
    console.print(table)
