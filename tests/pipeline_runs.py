"""Runs of the pipeline on a tiny model. A plugin of the tests that use it, so that all share one finished run.

PYTEST_DONT_REWRITE: it is imported before it is loaded as a plugin.
"""

import json
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from text_factory import train_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import sami_fast.pipeline as pipeline
import sami_fast.report as report
import sami_fast.stages as stages
from sami_fast.run_config import RunConfig, read_run_config
from sami_fast.stages import JsonLinesLog, Run

SHARED = Path(__file__).parents[2] / "shared" / "data"
WORDS = ["the", "a", "cat", "dog", "bird", "sat", "ran", "flew", "mat", "hill", "tree", "short", "long", "plain"]
WORDS += ["rich", "very", "far", "home", "again", "now", ".", ","]
STAGES = ["queries", *(f"iteration-0/{s}" for s in ("constitutions", "generation", "responses", "evaluation"))]
STAGES += [f"iteration-1/{s}" for s in ("constitutions", "generation", "responses", "training", "evaluation")]
PRINCIPLES = [
    {"attribute": "size", "principle": "very short .", "antithesis": "very long ."},
    {"attribute": "style", "principle": "plain .", "antithesis": "rich ."},
]


def words_tokenizer():
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(WORDS, trainers.WordLevelTrainer(special_tokens=["[UNK]", "<eos>"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="<eos>")


def save_model(folder, positions, tokenizer=None, dtype=torch.float32):
    """A tiny random Llama with its tokenizer, saved as users have them."""
    tokenizer = tokenizer or words_tokenizer()
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    ends = dict(eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id)
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=positions, **sizes, **ends
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Folder with a model, queries, principles and a configuration that names them."""
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "model", 96)
    rng = np.random.default_rng(0)
    rows = [{"id": f"q{i}", "query": f"{' '.join(rng.choice(WORDS[:-2], 5))} {i}"} for i in range(12)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "principles.json").write_text(json.dumps({"attributes": PRINCIPLES}))
    (folder / "template.txt").write_text("{constitution}\n{query}\n")
    config = {
        "model": {"name": str(folder / "model"), "device": "cpu"},
        "task": {"source": "queries.jsonl", "template": "template.txt"},
        "constitutions": {"principles": "principles.json"},
        "generation": {"max_new_tokens": 8, "batch_size": 4, "trim": False},
        "iterations": {"count": 1, "queries": 4, "held_out": 4},
        "training": {
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "save_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def quick(monkeypatch, finished):
    """One thread, and no more figures once a report has been written for `finished`."""
    torch.set_num_threads(1)
    monkeypatch.setattr(pipeline.Pipeline, "_report", lambda self: None)


def configure(inputs, output, *overrides) -> RunConfig:
    return read_run_config(str(inputs / "config.yaml"), [f"output={output}", *overrides])


def run(inputs, output, *overrides) -> Path:
    return pipeline.run_pipeline(configure(inputs, output, *overrides))


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def begun(folder):
    """Which stages are there, and when each was last begun and finished."""
    return {str(path.parent.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob(stages.MANIFEST)}


@pytest.fixture(scope="session")
def finished(inputs, tmp_path_factory):
    """A run of two iterations, to be looked at."""
    torch.set_num_threads(1)
    return run(inputs, tmp_path_factory.mktemp("finished") / "run", "iterations.count=2")


def killed_at(name: str, write: int, config: RunConfig) -> None:
    """Run in a process of its own, which is killed in the middle of that write of a stage, torn where it can be."""
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    pipeline.Pipeline._report = lambda self: None
    stage, count = None, 0
    begin = Run.stage

    def note(self, name, *args, **kwargs):
        nonlocal stage
        stage = name
        return begin(self, name, *args, **kwargs)

    def kill_in_the_end() -> bool:
        nonlocal count
        count += stage == name
        return stage == name and count == write

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    replace, append = os.replace, JsonLinesLog.append

    def torn_append(self, rows):
        if kill_in_the_end():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            with self.path.open("ab") as file:
                file.write(text.encode()[: -(len(text) // 3)])
            die()
        append(self, rows)

    def before(function):
        return lambda *args, **kwargs: die() if kill_in_the_end() else function(*args, **kwargs)

    Run.stage = note
    report.os = types.SimpleNamespace(**vars(os) | {"replace": before(replace)})
    JsonLinesLog.append = torn_append
    trainer = pipeline.SamiTrainer
    trainer._save_optimizer_and_scheduler = before(trainer._save_optimizer_and_scheduler)
    trainer.training_step = before(trainer.training_step)
    tokenizers = PreTrainedTokenizerFast
    tokenizers.save_pretrained = before(tokenizers.save_pretrained)
    pipeline.run_pipeline(config)


@pytest.fixture(scope="session")
def processes():
    """Processes that start as copies of one that has everything imported, and has computed nothing yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline_runs"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # it would not find the module otherwise, and say nothing
        multiprocessing.forkserver.ensure_running()
    return context


def in_a_process(processes, target, *arguments) -> int:
    process = processes.Process(target=target, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


@pytest.fixture(scope="session")
def judge_model(tmp_path_factory):
    """With a short question to it beside it."""
    folder = tmp_path_factory.mktemp("judge")
    (folder / "question.txt").write_text("{query}\n{constitution}\nA: {response_a}\nB: {response_b}\nBetter:")
    return save_model(folder / "model", 512, train_tokenizer("bytes"))


def copy_run(finished, tmp_path) -> Path:
    """The run of two iterations, as if it had been made here."""
    return Path(shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("report")))
