"""The demonstration: a real small model, its own answers, SAMI through the prefix tree, held-out mutual information."""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from sami_fast.config import ModelConfig, load_model
from sami_fast.constitutions import Constitution, load_principles, sample_constitutions
from sami_fast.data import Example, GroupDataset, PromptTemplate, prompt_ids, train_test_split
from sami_fast.evaluation import METRICS, GroupResult, padded_infonce, padded_matrix, score_groups, summarize
from sami_fast.generation import filter_responses, generate_responses
from sami_fast.losses import infonce_loss
from sami_fast.prefix_tree import Group, pack
from sami_fast.report import draw_heat_maps, draw_training_curve, write_json, write_json_lines, write_text
from sami_fast.scoring import score
from sami_fast.trainer import SamiConfig, SamiTrainer

logger = logging.getLogger(__name__)

RECIPE = Path(__file__).parent / "recipes" / "demo"


@dataclass(frozen=True)
class DemoSettings:
    """What the demonstration runs; the learning rate suits 135 million weights, the paper's 5e-7 is for 7 billion."""

    template: str = "query_first_chat"
    max_new_tokens: int = 40
    temperature: float = 0.8
    generation_batch: int = 32
    held_out_share: float = 1 / 3
    steps: int = 12
    groups_per_step: int = 4
    learning_rate: float = 5e-6
    timed_groups: int = 3
    shown_queries: int = 4


def run_demo(
    model_name: str, output: Path, *, queries: int | None = None, steps: int | None = None, seed: int = 0
) -> dict:
    """Run it all and leave a report folder; returns what metrics.json holds."""
    settings = DemoSettings(**({} if steps is None else {"steps": steps}))
    console = Console()
    began = time.perf_counter()
    rows = [json.loads(line) for line in (RECIPE / "queries.jsonl").read_text(encoding="utf-8").splitlines()]
    if queries is not None:
        if not 6 <= queries <= len(rows):
            raise ValueError(f"queries: expected 6 to {len(rows)}, got {queries}")
        rows = rows[:queries]
    principles = load_principles(RECIPE / "principles.json")
    constitutions = {row["id"]: sample_constitutions(principles, 2, seed=seed, query_id=row["id"]) for row in rows}
    template = PromptTemplate.load(settings.template)
    model, tokenizer = load_model(ModelConfig(name=model_name, dtype="float32"))

    def answer(chosen: list[dict]) -> dict[str, list[str]]:
        pairs = [(row, constitution) for row in chosen for constitution in constitutions[row["id"]]]
        prompts = [prompt_ids(tokenizer, template, row["query"], constitution.text) for row, constitution in pairs]
        sampling = dict(max_new_tokens=settings.max_new_tokens, temperature=settings.temperature, seed=seed)
        responses = generate_responses(model, tokenizer, prompts, batch_size=settings.generation_batch, **sampling)
        answers: dict[str, list[str]] = {row["id"]: [] for row in chosen}
        for response in responses:
            answers[pairs[response.prompt][0]["id"]].append(response.text)
        return answers

    console.rule("1. the model answers every query under two contrasting constitutions")
    examples, dropped = _examples(rows, constitutions, answer(rows))
    write_json_lines(output / "responses.jsonl", [_as_row(example) for example in examples])
    train, held_out = train_test_split(examples, settings.held_out_share, seed)
    train_groups, test_groups = (GroupDataset.from_examples(part, tokenizer, template) for part in (train, held_out))
    shown = [row for row in rows if row["id"] in {example.id for example in held_out[: settings.shown_queries]}]

    console.rule("2. the tree against running every sequence whole")
    speed = _compare_with_whole_sequences(model, train_groups.groups[: settings.timed_groups])

    console.rule("3. training with SAMI")
    before = list(score_groups(model, test_groups))
    trainer = _train(model, tokenizer, train_groups, test_groups, output, settings, seed)
    after = list(score_groups(model, test_groups))
    new_answers = answer(shown)

    packed = pack(train_groups.groups)
    metrics = {
        "model": model_name,
        "groups": {"training": len(train_groups), "held_out": len(test_groups), "dropped": dropped},
        "before": summarize(before),
        "after": summarize(after),
        "change": _paired_change(before, after),
        "tokens": {"whole": packed.whole_tokens, "packed": packed.num_tokens, "ratio": packed.token_ratio},
        "speed": speed,
        "training": trainer.state.log_history,
        "seconds": time.perf_counter() - began,
    }
    _report(output, metrics, before, after, shown, constitutions, examples, new_answers)
    _print(console, metrics, output)
    return metrics


def _examples(
    rows: list[dict], constitutions: dict[str, list[Constitution]], answers: dict[str, list[str]]
) -> tuple[list[Example], dict[str, int]]:
    """Groups whose responses all survive the filters, and the filters' counts."""
    filtered = filter_responses([answers[row["id"]] for row in rows])
    examples = [
        Example(row["id"], row["query"], [c.text for c in constitutions[row["id"]]], texts)
        for row, texts in zip(rows, filtered.texts, strict=True)
        if None not in texts
    ]
    return examples, {kind: count for kind, count in filtered.counts.items() if kind != "kept"}


def _as_row(example: Example) -> dict:
    names = ("id", "query", "constitutions", "responses")
    return {name: getattr(example, name) for name in names}


def _compare_with_whole_sequences(model, groups: list[Group]) -> dict:
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


def _train(model, tokenizer, train_groups, test_groups, output: Path, settings: DemoSettings, seed: int) -> SamiTrainer:
    args = SamiConfig(
        output_dir=str(output / "checkpoints"),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.groups_per_step,
        learning_rate=settings.learning_rate,
        eval_strategy="steps",
        eval_steps=max(1, settings.steps // 2),
        eval_on_start=True,
        save_strategy="no",
        report_to="none",
        seed=seed,
    )
    trainer = SamiTrainer(model, args, train_groups, test_groups, processing_class=tokenizer)
    trainer.train()
    return trainer


def _paired_change(before: list[GroupResult], after: list[GroupResult]) -> dict:
    """How much each metric rose on the same groups, with its bootstrap interval."""
    changes = [
        GroupResult(a.id, a.matrix, *(getattr(a, name) - getattr(b, name) for name in METRICS))
        for b, a in zip(before, after, strict=True)
    ]
    return summarize(changes)


def _report(output, metrics, before, after, shown, constitutions, examples, new_answers) -> None:
    log = metrics["training"]
    steps = [(entry["step"], entry["mutual_information"]) for entry in log if "mutual_information" in entry]
    held_out = [(e["step"], e["eval_mutual_information"]) for e in log if "eval_mutual_information" in e]
    draw_training_curve(
        output / "mutual_information.png", *zip(*steps, strict=True), *zip(*held_out, strict=True), limit=math.log(2)
    )
    draw_heat_maps(output / "heat_maps_before.png", before[:8], title="held-out groups before training")
    draw_heat_maps(output / "heat_maps_after.png", after[:8], title="held-out groups after training")
    old = {example.id: example.responses for example in examples}
    lines = ["# Sample responses to held-out queries", ""]
    for row in shown:
        lines += [f"## {row['query']}", ""]
        for j, constitution in enumerate(constitutions[row["id"]]):
            lines += [f"**{constitution.text}**", ""]
            for when, text in (("before", old[row["id"]][j]), ("after", new_answers[row["id"]][j])):
                lines += [f"- {when}: {' '.join(text.split())}"]
            lines.append("")
    write_text(output / "samples.md", "\n".join(lines))
    write_json(output / "metrics.json", metrics)


def _print(console: Console, metrics: dict, output: Path) -> None:
    table = Table(title=f"{metrics['groups']['held_out']} held-out groups, mean (95 % bootstrap interval)")
    for heading in ("metric", "before", "after", "change"):
        table.add_column(heading)
    for name in METRICS:
        cells = [metrics[when][name] for when in ("before", "after", "change")]
        table.add_row(name, *(f"{cell['mean']:.3f} ({cell['low']:.3f} to {cell['high']:.3f})" for cell in cells))
    console.print(table)
    speed, tokens = metrics["speed"], metrics["tokens"]
    console.print(
        f"tokens: {tokens['whole']} in whole sequences, {tokens['packed']} in the tree ({tokens['ratio']:.1f}x fewer)\n"
        f"forward + backward of {speed['groups']} groups: {speed['whole_seconds']:.1f} s whole, "
        f"{speed['tree_seconds']:.1f} s as trees ({speed['ratio']:.1f}x); matrices differ by at most "
        f"{speed['largest_difference']:.1e} nats\n"
        f"took {metrics['seconds']:.0f} s; report in {output}/"
    )
