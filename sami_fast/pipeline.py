"""The whole of SAMI (arXiv 2404.14313) as one run: queries, constitutions, responses, training, evaluation, again.

    output/
      config.yaml             as it was run
      queries/                held_out.jsonl, iteration-1.jsonl, ...
      iteration-0/            the model as it came, on held-out queries: as below, without training
      iteration-1/
        constitutions/        constitutions.jsonl: texts for generation and for training, what side each takes
        generation/           generated.jsonl, from the model of the iteration before; grows while it goes
        responses/            groups.jsonl: what the filters left
        training/             model/, log.json
        evaluation/           metrics.json, scores.jsonl, responses.jsonl
        judge/                win_rate.json, win_rate.verdicts.jsonl; where the configuration names a judge
      report/                 report.html

Each folder in `iteration-N` is a stage, see `sami_fast.stages`; so is `queries`. `held_out` in metrics.json is measured
on the same groups after each iteration, those of iteration 0, and `change` is against iteration 0; `own` is measured on
the model's own responses to held-out queries. A judge compares those with the ones of iteration 0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from sami_fast.config import build
from sami_fast.constitutions import (
    Constitution,
    load_constitution_pairs,
    load_principles,
    sample_constitutions,
    shuffle_principles,
)
from sami_fast.data import GroupDataset
from sami_fast.evaluation import GroupResult, score_groups, summarize
from sami_fast.examples import Example, load_examples
from sami_fast.model_store import ModelStore
from sami_fast.prefix_tree import pack_within
from sami_fast.prompts import PromptTemplate
from sami_fast.report import read_json_lines, write_json, write_json_lines, write_text
from sami_fast.run_config import RunConfig
from sami_fast.run_judge import VERDICTS, RunJudge
from sami_fast.run_responses import NoGroupsError, Responses
from sami_fast.run_results import judge_rows, paired_change, read_scores
from sami_fast.stages import Run, digest, outputs_digest, read_manifest
from sami_fast.tasks import find_task, load_queries
from sami_fast.trainer import SamiConfig, SamiTrainer

logger = logging.getLogger(__name__)

# Settings of training that change speed, memory or what is kept and logged, and not the weights that come out.
_NO_INPUT = ("max_tokens", "save_strategy", "save_steps", "save_total_limit", "disable_tqdm", "report_to", "use_cpu")


def run_pipeline(config: RunConfig) -> Path:
    """Do what is left of a run; returns its folder.

    Raises:
        ValueError: a setting, file or field that is wrong; most of them before any stage starts.
        EndpointError: the judge's endpoint failed; what it answered is kept.
        StageError: a stage could not be finished, or another run is at work in the folder.
    """
    pipeline = Pipeline(config)
    with pipeline.run.locked():
        for _, work in pipeline.stages():
            work()
    return pipeline.run.folder


class Pipeline:
    """The stages of a run. Everything that its configuration names is read and checked at once.

    Raises:
        ValueError: a setting, file or field that is wrong.
        EndpointError: no key for the judge's endpoint.
    """

    def __init__(self, config: RunConfig) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(f"run: expected one process, got WORLD_SIZE={os.environ['WORLD_SIZE']} from a launcher")
        self.config = config
        self.run = Run(config.output)
        self.task = find_task(config.task)
        self.template = self._load_template(self.task.template)
        generation_template = self._load_template(self.task.generation_template or self.task.template)
        self.principles, self.pairs = [], []
        if config.constitutions.pairs is not None:
            self.pairs = load_constitution_pairs(config.constitutions.pairs)
        else:
            self.principles = load_principles(config.constitutions.principles, config.constitutions.attributes)
            sample_constitutions(self.principles, config.constitutions.count, seed=0)  # refuses a count too large
        self._training("unused")
        self._lora()
        self.models = ModelStore(config.model)
        self.responses = Responses(config, self.task, generation_template, self.models)
        self.judge = None if config.judge is None else RunJudge(config.judge, self.models)

    def stages(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """(name, work) of all stages in order; to be worked off in that order, under the run's lock."""
        yield "queries", self._queries
        for number in range(self.config.iterations.count + 1):
            part = f"iteration-{number}"
            yield f"{part}/constitutions", lambda number=number: self._constitutions(number)
            yield f"{part}/generation", lambda number=number: self._generate(number)
            yield f"{part}/responses", lambda number=number: self._groups(number)
            if number > 0:
                yield f"{part}/training", lambda number=number: self._train(number)
            yield f"{part}/evaluation", lambda number=number: self._evaluate(number)
            if number > 0 and self.judge is not None:
                yield f"{part}/judge", lambda number=number: self._judge(number)
        yield "report", self._report

    def _load_template(self, name: str) -> PromptTemplate:
        template, chat = PromptTemplate.load(name), self.config.task.chat
        return template if chat is None else dataclasses.replace(template, chat=chat)

    # Queries and constitutions

    def _queries(self) -> None:
        config, task, loop = self.config, self.task, self.config.iterations
        source = Path(task.source)
        inputs = {
            "seed": config.seed,
            "source": digest(source) if source.exists() else task.source,
            "task": {name: getattr(task, name) for name in ("name", "split", "load_options", "field", "id_field")}
            | {"limit": config.task.limit},
            "iterations": {"count": loop.count, "queries": loop.queries, "held_out": loop.held_out},
        }

        def work(folder: Path) -> dict[str, Any]:
            queries, counts = load_queries(task, limit=config.task.limit)
            random.Random(config.seed).shuffle(queries)
            share = loop.queries or max(1, (len(queries) - loop.held_out) // loop.count)
            needed = loop.held_out + share * loop.count
            if needed > len(queries):
                raise ValueError(
                    f"iterations: expected at least {needed} queries ({loop.held_out} held out, {loop.count} x {share})"
                    f", got {len(queries)} from {task.source}"
                )
            write_json_lines(folder / "held_out.jsonl", [asdict(query) for query in queries[: loop.held_out]])
            for number in range(1, loop.count + 1):
                end = loop.held_out + share * number
                rows = [asdict(query) for query in queries[end - share : end]]
                write_json_lines(folder / f"iteration-{number}.jsonl", rows)
            return counts | {"held_out": loop.held_out, "each_iteration": share}

        write_text(self.run.folder / "config.yaml", yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))
        self.run.stage("queries", inputs, work)

    def _constitutions(self, number: int) -> None:
        config = self.config
        name = f"iteration-{number}.jsonl" if number else "held_out.jsonl"
        inputs = {
            "seed": config.seed,
            "queries": self._output("queries", name),
            "count": config.constitutions.count,
            "principles": [asdict(principle) for principle in self.principles],
            "pairs": [[constitution.text for constitution in pair] for pair in self.pairs],
        }

        def work(folder: Path) -> dict[str, Any]:
            rows = []
            for _, query in read_json_lines(self.run.folder / "queries" / name):
                drawn = self._draw(query["id"])
                shuffled = [shuffle_principles(c, f"{config.seed}/{query['id']}/{j}") for j, c in enumerate(drawn)]
                rows.append(
                    {
                        "id": query["id"],
                        "query": query["text"],
                        "generation": [c.text for c in drawn],
                        "training": [c.text for c in shuffled],
                        "identifiers": [dict(c.identifiers) for c in drawn],
                    }
                )
            write_json_lines(folder / "constitutions.jsonl", rows)
            return {"queries": len(rows), "constitutions": sum(len(row["generation"]) for row in rows)}

        self.run.stage(f"iteration-{number}/constitutions", inputs, work)

    def _draw(self, query_id: str) -> Sequence[Constitution]:
        seed = self.config.seed
        if self.pairs:
            return random.Random(f"{seed}/{query_id}").choice(self.pairs)
        return sample_constitutions(self.principles, self.config.constitutions.count, seed=seed, query_id=query_id)

    # Responses

    def _generate(self, number: int) -> None:
        """Responses to the slice of an iteration, from the model of the iteration before."""
        model, samples = self._model_after(max(number - 1, 0)), self.config.generation.responses

        def work(folder: Path) -> dict[str, Any]:
            rows = self._rows(number)
            generated = self.responses.sample(folder, rows, model, samples)
            asked = len({response["id"] for response in generated})
            return {"queries": len(rows), "too_long": len(rows) - asked, "responses": len(generated)}

        inputs = self._sampling_inputs(number, model) | {"responses": samples}
        self.run.stage(f"iteration-{number}/generation", inputs, work)

    def _sampling_inputs(self, number: int, model: str) -> dict[str, Any]:
        constitutions = self._output(f"iteration-{number}/constitutions", "constitutions.jsonl")
        return self.responses.inputs(model) | {"constitutions": constitutions}

    def _rows(self, number: int) -> list[dict[str, Any]]:
        path = self.run.folder / f"iteration-{number}" / "constitutions" / "constitutions.jsonl"
        return [row for _, row in read_json_lines(path)]

    def _groups(self, number: int) -> None:
        """Groups of what the filters leave."""
        part = f"iteration-{number}"
        inputs = self.responses.filter_inputs() | {
            "constitutions": self._output(f"{part}/constitutions", "constitutions.jsonl"),
            "generated": self._output(f"{part}/generation", "generated.jsonl"),
        }

        def work(folder: Path) -> dict[str, Any]:
            rows = self._rows(number)
            generated = [row for _, row in read_json_lines(self.run.folder / part / "generation" / "generated.jsonl")]
            examples, counts = self.responses.filter(rows, generated)
            asked = len({response["id"] for response in generated})
            if not examples:
                raise NoGroupsError(str(folder), len(rows), len(rows) - asked, counts)
            write_json_lines(
                folder / "groups.jsonl",
                [{k: v for k, v in asdict(example).items() if v is not None} for example in examples],
            )
            logger.info("%s: %d groups of %d queries", part, len(examples), len(rows))
            one_sided = asked - len(examples)  # with responses left under one constitution, or under none
            return {"queries": len(rows), "groups": len(examples), "one_sided": one_sided, "filters": counts}

        self.run.stage(f"{part}/responses", inputs, work)

    # Training

    def _training(self, folder: str | os.PathLike[str]) -> SamiConfig:
        given = self.config.training
        for name in ("output_dir", "seed"):
            if name in given:
                raise ValueError(f"training.{name}: expected nothing, the run sets it, got {given[name]!r}")
        own = {"output_dir": str(folder), "seed": self.config.seed, "use_cpu": self.config.model.device == "cpu"}
        return build(SamiConfig, "training", {**own, **given})

    def _lora(self) -> Any:
        if self.config.lora is None:
            return None
        from peft import LoraConfig

        return build(LoraConfig, "lora", {"task_type": "CAUSAL_LM", **self.config.lora})

    def _train(self, number: int) -> None:
        """Train on the groups of an iteration. The model, adapters merged into it, ends up in training/model."""
        config, part = self.config, f"iteration-{number}"
        goes_on = config.iterations.start == "previous"
        start = self._model_after(number - 1) if goes_on else config.model.name
        inputs = {
            "seed": config.seed,
            "start": config.iterations.start,
            "model": self.models.digest(start),
            "dtype": config.model.dtype,
            "groups": self._output(f"{part}/responses", "groups.jsonl"),
            "template": {"text": self.template.text, "chat": self.template.chat},
            "training": {key: value for key, value in config.training.items() if key not in _NO_INPUT},
            "lora": config.lora,
        }

        def work(folder: Path) -> dict[str, Any]:
            args = self._training(folder / "checkpoints")
            dtype = self.models.dtype
            whole = goes_on and args.master_weights == "fp32" and config.lora is None
            model, tokenizer = self.models.take(start, "float32" if whole and number > 1 else dtype)
            if model.dtype == torch.float32 and dtype != "float32":  # weights that training left in float32
                args = dataclasses.replace(args, bf16=dtype == "bfloat16", fp16=dtype == "float16")
            data = GroupDataset.from_examples(
                load_examples(self.run.folder / part / "responses" / "groups.jsonl"), tokenizer, self.template
            )
            held_out = None
            if args.eval_strategy != "no":
                held_out = GroupDataset.from_examples(self._held_out(), tokenizer, self.template)
            trainer = SamiTrainer(model, args, data, held_out, peft_config=self._lora(), processing_class=tokenizer)
            trainer.train(resume_from_checkpoint=_last_checkpoint(folder / "checkpoints"))
            trained = trainer.model if config.lora is None else trainer.model.merge_and_unload()
            if not whole:  # nothing goes on from these weights: they need no more bits than they compute in
                trained.to(getattr(torch, dtype))
            trained.save_pretrained(folder / "model")
            tokenizer.save_pretrained(folder / "model")
            packs = pack_within(data.groups, args.max_tokens)
            packed, in_full = (sum(getattr(p, name) for p in packs) for name in ("num_tokens", "whole_tokens"))
            tokens = {"whole": in_full, "packed": packed, "ratio": in_full / packed}
            write_json(folder / "log.json", trainer.state.log_history)
            return {"groups": len(data), "steps": trainer.state.global_step, "tokens": tokens}

        self.run.stage(f"{part}/training", inputs, work, scratch=("checkpoints",))

    def _held_out(self) -> list[Example]:
        return load_examples(self.run.folder / "iteration-0" / "responses" / "groups.jsonl")

    # Evaluation

    def _evaluate(self, number: int) -> None:
        """Held-out groups scored by the model of an iteration, and its own responses to held-out queries."""
        model, settings, part = self._model_after(number), self.config.evaluation, f"iteration-{number}"
        inputs = self._sampling_inputs(0, model) | {
            "groups": self._output("iteration-0/responses", "groups.jsonl"),
            "generated": self._output("iteration-0/generation", "generated.jsonl"),
            "training_template": {"text": self.template.text, "chat": self.template.chat},
            "evaluation": {"queries": settings.queries, "normalize": settings.normalize},
            "filters": self.responses.filter_inputs(),
        }

        def work(folder: Path) -> dict[str, Any]:
            rows = self._rows(0)[: settings.queries]
            generated = self.responses.sample(folder, rows, model, 1) if number else self._first_responses(rows)
            write_json_lines(folder / "responses.jsonl", judge_rows(rows, generated))
            results = self._score(model, self._held_out())
            write_json_lines(folder / "scores.jsonl", [result.as_json() for result in results])
            metrics = {"iteration": number, "held_out": summarize(results)}
            if number:
                metrics["change"] = paired_change(read_scores(self.run.folder / "iteration-0"), results)
                own, counts = self.responses.filter(rows, generated)
                metrics |= {"own": summarize(self._score(model, own)) if own else None, "own_filters": counts}
            write_json(folder / "metrics.json", metrics)
            logger.info("%s: held-out MI %.4f nats", part, metrics["held_out"]["mutual_information"]["mean"])
            commit = getattr(self.models.get(model)[0].config, "_commit_hash", None)
            return {"groups": len(results), "responses": len(generated), "commit": commit}

        self.run.stage(f"{part}/evaluation", inputs, work)

    def _first_responses(self, rows: Sequence[dict]) -> list[dict]:
        """The base model's first response to each of these held-out queries under each constitution."""
        place = {row["id"]: i for i, row in enumerate(rows)}
        all_rows = (
            row for _, row in read_json_lines(self.run.folder / "iteration-0" / "generation" / "generated.jsonl")
        )
        chosen = [row for row in all_rows if row["id"] in place and row["sample"] == 0]
        return sorted(chosen, key=lambda row: (place[row["id"]], row["constitution"]))

    def _judge(self, number: int) -> None:
        """The judge's comparison of an iteration's responses to held-out queries with those of iteration 0."""
        sides = {"responses": f"iteration-{number}/evaluation", "against": "iteration-0/evaluation"}
        inputs = {side: self._output(stage, "responses.jsonl") for side, stage in sides.items()} | self.judge.inputs()
        files = [self.run.folder / stage / "responses.jsonl" for stage in sides.values()]

        def work(folder: Path) -> dict[str, Any]:
            return self.judge.compare(*files, folder)

        self.run.stage(f"iteration-{number}/judge", inputs, work, keep=(VERDICTS,))

    def _score(self, name: str, examples: Sequence[Example]) -> list[GroupResult]:
        model, tokenizer = self.models.get(name)
        groups = GroupDataset.from_examples(examples, tokenizer, self.template).groups
        settings = self.config.evaluation
        return list(score_groups(model, groups, max_tokens=settings.max_tokens, normalize=settings.normalize))

    def _report(self) -> None:
        from sami_fast.run_report import write_run_report

        logger.info("report: %s", write_run_report(self.run.folder))

    # What stages know of each other

    def _output(self, stage: str, name: str) -> str:
        """Hash of a file that a complete stage wrote."""
        return outputs_digest(read_manifest(self.run.folder / stage), name)

    def _model_after(self, number: int) -> str:
        """Folder or name of the model after an iteration; 0 is the base model."""
        return str(self.run.folder / f"iteration-{number}" / "training" / "model") if number else self.config.model.name


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; its state is what the trainer writes last."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        with contextlib.suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            logger.info("going on from %s", path)
            return str(path)
        logger.warning("%s was cut off, left out", path)
        shutil.rmtree(path)
    return None
