"""The command line: `sami-fast run`, `write-principles`, `train`, `score`, `evaluate`, `report`, `demo`, `info`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

_TRAIN_HELP = """\
Train a causal LM with SAMI on groups of constitutions and responses.

The configuration is a YAML file, key=value overrides, or both:

  model:    {name: HuggingFaceTB/SmolLM2-135M-Instruct, dtype: auto}
  data:     {source: groups.jsonl, held_out: 0.1, template: query_first}
  training: {output_dir: runs/first, learning_rate: 5e-7, max_tokens: 16384, num_train_epochs: 1}
  lora:     {r: 16, lora_alpha: 32}        # optional: train adapters instead of all weights

  sami-fast train config.yaml
  sami-fast train config.yaml training.learning_rate=1e-6 data.limit=100
  sami-fast train data.source=groups.jsonl training.output_dir=runs/first

A line of groups.jsonl holds one query with its constitutions and responses; response k was written under
constitution k, or under constitution positives[k]:

  {"query": "...", "constitutions": ["...", "..."], "responses": ["...", "..."]}

training takes every argument of transformers.TrainingArguments (batch sizes count groups) and max_tokens, normalize,
beta, master_weights, check_model. The model, its tokenizer and metrics.json end up in output_dir. A run that was
killed goes on from its last checkpoint with --resume.
"""

_SCORE_HELP = """\
Score groups: the C x R matrix of each, its mutual information in nats and its accuracies.

  sami-fast score model.name=bundled data.source=groups.jsonl output=scores.jsonl heat_map=scores.png

Keys: model and data as for `train` (see sami-fast train --help), and
  output       JSON Lines file, one group a line
  heat_map     PNG file; the first heat_map_groups (default 8) groups
  max_tokens   packed tokens of one forward pass (default 16384)
  normalize    mean (default) or sum over a response's tokens
"""

_EVALUATE_HELP = """\
Evaluate a model on held-out groups, or one file of responses against another.

  sami-fast evaluate --model runs/first --data held_out.jsonl --output evaluation.json
  sami-fast evaluate --responses after.jsonl --against before.jsonl --judge bundled
  sami-fast evaluate --responses after.jsonl --against before.jsonl \\
      --judge http://localhost:8000/v1 --judge-model Qwen/Qwen3-32B --concurrency 32

The first gives mutual information in nats, accuracies and response lengths with 95 % intervals. The second asks a judge
about every pair in both orders and gives the win rate of --responses, raw and length-controlled, with the judge's
consistency and its bias towards the response shown first. Their lines hold query, response and, if there, constitution
and id. The judge is a model on this machine, which is read by its log-probabilities of "A" and "B", or an
OpenAI-compatible endpoint (its key in OPENAI_API_KEY), whose text is read. Answers are kept as they come in
OUTPUT.verdicts.jsonl: a run that stopped goes on when started again, and asks nothing twice.
"""

_RUN_HELP = """\
The whole of SAMI: queries, constitutions, responses, training and evaluation, for one or more iterations.

  output: runs/tldr
  model:          {name: mistralai/Mistral-7B-v0.1}
  task:           {name: tldr}                      # tldr, hh, or generic with source: queries.jsonl
  constitutions:  {principles: principles.json}     # or pairs: in the format published with the paper
  generation:     {max_new_tokens: 200, temperature: 1.0, backend: transformers}      # continuous, vllm
  iterations:     {count: 3, queries: 2000, held_out: 128, start: base}               # or previous
  training:       {learning_rate: 5e-7, save_steps: 32}
  evaluation:     {queries: 64}
  judge:          {model: bundled}                  # optional: asked about each iteration against the model as it came;
                                                    # or endpoint: {model: ..., base_url: ...}, key in OPENAI_API_KEY

  sami-fast run config.yaml
  sami-fast run config.yaml iterations.count=4 output=runs/longer

Each stage writes a folder with a manifest.json of its inputs. A run that was stopped, in whatever way, goes on when it
is started again; what is complete is skipped, and what depends on something that changed is made anew.
"""

_PRINCIPLES_HELP = """\
Have a model write the principles of a task: for each attribute one principle and its antithesis, in a JSON file that
is yours to edit. Attributes that the file has already are kept.

  sami-fast write-principles task="Summarise posts of a forum." attributes="[concise, faithful]" \\
      output=principles.json model.name=mistralai/Mistral-7B-Instruct-v0.3
  sami-fast write-principles task=... attributes=... output=... endpoint.model=gpt-4.1   # key in OPENAI_API_KEY
  sami-fast write-principles task=... attributes=... output=... \\
      endpoint.model=qwen endpoint.base_url=http://localhost:8000/v1

Further keys: attempts (3), max_tokens (160), temperature (0.7), seed (0).
"""

_DEMO_HELP = """\
See SAMI work, on a CPU, in minutes: the bundled SmolLM2-135M-Instruct answers short questions under two contrasting
constitutions, is trained on its own answers through the prefix tree, and held-out mutual information is shown before
and after. Leaves a report folder: metrics.json, mutual_information.png, heat maps, samples.md, and all stages of the
run (see sami-fast run --help), which are not done again when the folder is used again.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "httpx2", "filelock", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    commands = {
        "run": _run,
        "write-principles": _write_principles,
        "train": _train,
        "score": _score,
        "evaluate": _evaluate,
        "report": _report,
        "demo": _demo,
        "info": _info,
    }
    try:
        commands[options.command](options)
    except (ValueError, OSError, RuntimeError) as error:
        if options.traceback:
            raise
        print(f"sami-fast {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if options.traceback:
            raise
        print(f"sami-fast {options.command}: stopped", file=sys.stderr)
        return 130  # as shells say it
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="sami-fast",
        formatter_class=raw,
        description="Contrastive alignment over prefix trees (SAMI, arXiv 2404.14313).",
        epilog="sami-fast COMMAND --help explains a command with examples.",
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, summary: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=summary, description=text, formatter_class=raw, parents=[common])

    for name, summary, text in (
        ("run", "the whole of SAMI, iteration after iteration", _RUN_HELP),
        ("write-principles", "have a model write principles", _PRINCIPLES_HELP),
        ("train", "train a model on groups", _TRAIN_HELP),
        ("score", "score groups, draw heat maps", _SCORE_HELP),
    ):
        command = add(name, summary, text)
        if name == "run":
            command.add_argument("config", help="YAML file")
        else:
            command.add_argument("config", nargs="?", help="YAML file; may be left out")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="laid over the file")
        if name == "train":
            command.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    evaluate = add("evaluate", "mutual information of a model, or win rate of responses", _EVALUATE_HELP)
    groups = evaluate.add_argument_group("mutual information")
    groups.add_argument("--model", help="folder or hub name of the model; bundled")
    groups.add_argument("--adapter", help="folder of PEFT adapters to load on top")
    groups.add_argument("--data", help="JSON Lines of groups, or a data set (see sami-fast train --help)")
    groups.add_argument("--template", help="prompt template, by default query_first; or the question to the judge")
    wins = evaluate.add_argument_group("win rate")
    wins.add_argument("--responses", help="JSON Lines of responses")
    wins.add_argument("--against", help="JSON Lines of responses to the same queries")
    wins.add_argument("--judge", help="folder or hub name of a model, bundled, or the URL of an endpoint")
    wins.add_argument("--judge-model", help="the model's name at that endpoint")
    wins.add_argument("--concurrency", type=int, default=8, help="questions in flight (default: %(default)s)")
    wins.add_argument("--timeout", type=float, default=60.0, help="seconds for one answer (default: %(default)s)")
    wins.add_argument("--retries", type=int, default=5, help="times to ask again (default: %(default)s)")
    wins.add_argument("--answer-tokens", type=int, default=400, help="most tokens of an answer (default: %(default)s)")
    wins.add_argument("--temperature", type=float, default=0.0, help="of the endpoint's answers (default: %(default)s)")
    both = evaluate.add_argument_group("both")
    both.add_argument("--limit", type=int, help="use only so many groups or pairs")
    both.add_argument("--max-tokens", type=int, default=16384, help="packed tokens of one pass (default: %(default)s)")
    both.add_argument("--dtype", default="auto", help="of the model or local judge (default: %(default)s)")
    both.add_argument("--device", default="auto", help="of the model or local judge (default: %(default)s)")
    both.add_argument("--output", help="JSON file (default for win rates: win_rate.json)")
    report = add("report", "write the report of a run again", "HTML with all that a run's folder holds by now.")
    report.add_argument("folder", help="folder of the run")
    demo = add("demo", "see it work, on a CPU, in minutes", _DEMO_HELP)
    demo.add_argument("--long", action="store_true", help="two iterations, two principles; up to 40 minutes")
    demo.add_argument("--model", help="folder or hub name of a chat model (default: bundled)")
    demo.add_argument("--output", type=Path, help="report folder (default: demo-report, or demo-long-report)")
    demo.add_argument("--queries", type=int, help="use only so many queries")
    demo.add_argument("--steps", type=int, help="optimiser steps")
    demo.add_argument("--seed", type=int, default=0)
    add("info", "what is installed and which backends are available", "Versions, devices and backends.")
    return parser


def _read(options: argparse.Namespace, sections: Sequence[str]) -> dict:
    from sami_fast.config import check_keys, read_config

    path, overrides = options.config, options.overrides
    if path is not None and "=" in path and not os.path.exists(path):
        path, overrides = None, [path, *overrides]
    config = read_config(path, overrides)
    check_keys("", config, sections)
    return config


def _run(options: argparse.Namespace) -> None:
    from sami_fast.run_config import read_run_config

    config = read_run_config(options.config, options.overrides)  # before seconds of imports
    from sami_fast.pipeline import run_pipeline

    print(run_pipeline(config))


def _write_principles(options: argparse.Namespace) -> None:
    from sami_fast.principles import write_from_config

    known = ("task", "attributes", "output", "model", "endpoint", "attempts", "max_tokens", "temperature", "seed")
    config = _read(options, known)
    written = write_from_config(config)
    for dropped in written.dropped:
        print(f"dropped, {dropped.attribute}: {dropped.reason}: {' '.join(dropped.text.split())[:100]}")
    for principle in written.principles:
        print(f"{principle.attribute}\n  + {principle.principle}\n  - {principle.antithesis}")
    if written.missing:
        raise RuntimeError(f"no usable answer for {', '.join(written.missing)}; run again to ask for those alone")


def _train(options: argparse.Namespace) -> None:
    from sami_fast.config import DataConfig, ModelConfig, build, load_model
    from sami_fast.data import GroupDataset, train_test_split
    from sami_fast.examples import load_examples
    from sami_fast.prompts import PromptTemplate
    from sami_fast.report import write_json
    from sami_fast.trainer import SamiConfig, SamiTrainer

    config = _read(options, ("model", "data", "training", "lora"))
    model_config = build(ModelConfig, "model", config.get("model", {}))
    data = build(DataConfig, "data", config.get("data", {}))
    training = dict(config.get("training", {}))
    if not training.get("output_dir"):
        raise ValueError("training.output_dir: expected a folder, got nothing")
    args = build(SamiConfig, "training", training)
    template = PromptTemplate.load(data.template)
    examples = load_examples(data.source, split=data.split, limit=data.limit, fields=data.fields)
    held_out = []
    if data.eval_source is not None or data.eval_split is not None:
        held_out = load_examples(data.eval_source or data.source, split=data.eval_split, fields=data.fields)
    elif data.held_out is not None:
        examples, held_out = train_test_split(examples, data.held_out, data.seed)
    peft_config = None
    if "lora" in config:
        from peft import LoraConfig

        peft_config = build(LoraConfig, "lora", {"task_type": "CAUSAL_LM", **(config["lora"] or {})})

    model, tokenizer = load_model(model_config)
    tokenize = dict(template=template, chat=data.chat, score_eos=data.score_eos, max_length=data.max_length)
    trainer = SamiTrainer(
        model,
        args,
        GroupDataset.from_examples(examples, tokenizer, **tokenize),
        GroupDataset.from_examples(held_out, tokenizer, **tokenize) if held_out else None,
        peft_config=peft_config,
        processing_class=tokenizer,
    )
    metrics = {"before": trainer.evaluate()} if held_out and not options.resume else {}
    trainer.train(resume_from_checkpoint=options.resume or None)
    if held_out:
        metrics["after"] = trainer.evaluate()
    trainer.save_model()
    write_json(Path(args.output_dir) / "metrics.json", metrics | {"log": trainer.state.log_history})


def _score(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import track

    from sami_fast.config import DataConfig, ModelConfig, build, load_model
    from sami_fast.data import GroupDataset
    from sami_fast.evaluate_command import print_intervals
    from sami_fast.evaluation import score_groups, summarize
    from sami_fast.examples import load_examples
    from sami_fast.prompts import PromptTemplate
    from sami_fast.report import draw_heat_maps, write_json_lines
    from sami_fast.scoring import check_model

    known = ("model", "data", "output", "heat_map", "heat_map_groups", "max_tokens", "normalize")
    config = _read(options, known)
    model_config = build(ModelConfig, "model", config.get("model", {}))
    data = build(DataConfig, "data", config.get("data", {}))
    template = PromptTemplate.load(data.template)
    examples = load_examples(data.source, split=data.split, limit=data.limit, fields=data.fields)
    model, tokenizer = load_model(model_config)
    check_model(model)
    groups = GroupDataset.from_examples(
        examples, tokenizer, template, chat=data.chat, score_eos=data.score_eos, max_length=data.max_length
    ).groups
    packing = {key: config[key] for key in ("max_tokens", "normalize") if key in config}
    rows = track(score_groups(model, groups, **packing), "scoring", total=len(groups), console=Console(stderr=True))
    results = list(rows)
    print_intervals(f"{len(results)} groups, {model_config.name}", summarize(results))
    if config.get("output"):
        write_json_lines(config["output"], [result.as_json() for result in results])
    if config.get("heat_map"):
        draw_heat_maps(config["heat_map"], results[: config.get("heat_map_groups", 8)], title=model_config.name)


def _evaluate(options: argparse.Namespace) -> None:
    from sami_fast.evaluate_command import evaluate

    evaluate(options)


def _report(options: argparse.Namespace) -> None:
    from sami_fast.run_report import write_run_report

    print(write_run_report(options.folder))


def _demo(options: argparse.Namespace) -> None:
    from sami_fast.demo import run_demo

    sizes = dict(queries=options.queries, steps=options.steps, seed=options.seed)
    run_demo(options.model, options.output, recipe="demo_long" if options.long else "demo", **sizes)


def _info(options: argparse.Namespace) -> None:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from sami_fast import __version__, backends

    print(f"sami_fast {__version__}, Python {sys.version.split()[0]}")
    for package in ("torch", "triton", "transformers", "accelerate", "peft", "flash-attn"):
        try:
            print(f"  {package} {version(package)}")
        except PackageNotFoundError:
            print(f"  {package} not installed")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"devices: cpu ({torch.get_num_threads()} threads){''.join(', ' + name for name in devices)}")
    for backend, status in backends().items():
        print(f"backend {backend}: {status}")


if __name__ == "__main__":
    sys.exit(main())
