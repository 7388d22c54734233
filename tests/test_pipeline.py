"""The whole run on tiny models: what each stage leaves, what is done again, and every way to be cut off."""

import dataclasses
import errno
import json
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import shutil
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from test_data import train_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import sami_fast.pipeline as pipeline
import sami_fast.report as report
import sami_fast.stages as stages
from sami_fast.cli import main
from sami_fast.config import ModelConfig, RunConfig, read_run_config
from sami_fast.constitutions import Constitution, load_constitution_pairs, shuffle_principles
from sami_fast.data import load_examples, response_ids
from sami_fast.endpoint import EndpointError
from sami_fast.generation import Generated
from sami_fast.judge import LocalJudge, judge_pairs
from sami_fast.model_store import ModelStore
from sami_fast.stages import JsonLinesLog, Run, StageError, read_manifest
from sami_fast.win_rate import load_pairs

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


@pytest.fixture(scope="module")
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


@pytest.fixture(autouse=True)
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


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A run of two iterations, to be looked at."""
    torch.set_num_threads(1)
    return run(inputs, tmp_path_factory.mktemp("finished") / "run", "iterations.count=2")


# What a run leaves


def test_every_stage_says_what_it_was_made_from(finished):
    names = [*STAGES, *(name.replace("-1", "-2") for name in STAGES if "-1" in name)]
    assert sorted(begun(finished)) == sorted(names)
    for name in names:
        manifest = read_manifest(finished / name)
        assert manifest["status"] == "complete" and manifest["stage"] == name and manifest["seconds"] > 0
        assert manifest["versions"]["torch"] == torch.__version__ and manifest["outputs"]
        for file, entry in manifest["outputs"].items():
            assert entry == {
                "size": (finished / name / file).stat().st_size,
                "sha256": stages.digest(finished / name / file),
            }
    assert read_manifest(finished / "queries")["inputs"]["seed"] == 0
    assert not (finished / "iteration-1/training/checkpoints").exists()
    assert not list(finished.rglob("*.bin")), "safetensors only"
    assert yaml.safe_load((finished / "config.yaml").read_text())["iterations"]["count"] == 2
    assert (finished / "report/report.html").stat().st_size > 1000


def test_queries_are_fresh_in_every_iteration(finished):
    slices = [rows_of(finished / "queries" / f"{name}.jsonl") for name in ("held_out", "iteration-1", "iteration-2")]
    ids = [row["id"] for rows in slices for row in rows]
    assert [len(rows) for rows in slices] == [4, 4, 4] and len(set(ids)) == 12
    assert ids != sorted(ids, key=lambda id: int(id[1:])), "shuffled"


def test_constitutions_contrast_and_are_shuffled_again_for_training(finished):
    rows = [
        row
        for part in ("iteration-0", "iteration-1", "iteration-2")
        for row in rows_of(finished / part / "constitutions/constitutions.jsonl")
    ]
    reordered = 0
    for row in rows:
        sides = [tuple(sorted(identifiers.items())) for identifiers in row["identifiers"]]
        assert len(set(sides)) == 2 and all(set(dict(side)) == {"size", "style"} for side in sides)
        for generation, training, identifiers in zip(
            row["generation"], row["training"], row["identifiers"], strict=True
        ):
            lines = [sorted(line[3:] for line in text.split("\n")) for text in (generation, training)]
            assert lines[0] == lines[1] == sorted(p[identifiers[p["attribute"]]] for p in PRINCIPLES)
            reordered += generation != training
    assert 0 < reordered < 2 * len(rows)


def test_groups_are_what_the_filters_left(finished):
    for part in ("iteration-0", "iteration-1", "iteration-2"):
        generated = rows_of(finished / part / "generation/generated.jsonl")
        assert len({(row["id"], row["constitution"], row["sample"]) for row in generated}) == len(generated) == 8
        results = read_manifest(finished / part / "responses")["results"]
        examples = load_examples(finished / part / "responses/groups.jsonl")
        assert len(examples) == results["groups"] and results["queries"] == 4
        counts = results["filters"]
        assert counts["kept"] + counts["leftover"] + counts["empty"] + counts["identical"] == 8
        constitutions = {
            row["id"]: row["training"] for row in rows_of(finished / part / "constitutions/constitutions.jsonl")
        }
        texts = {(row["id"], row["constitution"]): row["text"] for row in generated}
        for example in examples:
            assert example.constitutions == constitutions[example.id]
            assert example.responses == [texts[example.id, j] for j in example.positives]


def test_models_follow_each_other(finished):
    names = (
        "iteration-0/generation",
        "iteration-1/generation",
        "iteration-1/training",
        "iteration-2/generation",
        "iteration-2/training",
    )
    digests = [read_manifest(finished / name)["inputs"]["model"] for name in names]
    assert digests[0] == digests[1] == digests[2] == digests[4] != digests[3], "base to start from, previous to ask"
    assert read_manifest(finished / "iteration-2/training")["inputs"]["start"] == "base"
    weights = [
        AutoModelForCausalLM.from_pretrained(finished / f"iteration-{n}/training/model").lm_head.weight for n in (1, 2)
    ]
    assert not torch.equal(*weights)


def test_evaluations_compare_with_the_base_model(finished):
    base = json.loads((finished / "iteration-0/evaluation/metrics.json").read_text())
    for number in (1, 2):
        folder = finished / f"iteration-{number}/evaluation"
        metrics = json.loads((folder / "metrics.json").read_text())
        before, after, change = (
            m["mutual_information"]["mean"] for m in (base["held_out"], metrics["held_out"], metrics["change"])
        )
        assert change == pytest.approx(after - before, abs=1e-9) and change != 0
        assert (
            metrics["own"] is None
            or metrics["own"]["mutual_information"]["low"] <= metrics["own"]["mutual_information"]["high"]
        )
        responses, before = (
            rows_of(folder / "responses.jsonl"),
            rows_of(finished / "iteration-0/evaluation/responses.jsonl"),
        )
        assert [(r["id"], r["constitution"]) for r in responses] == [(r["id"], r["constitution"]) for r in before]
        assert len(responses) == 8 and set(responses[0]) == {"id", "query", "constitution", "response", "identifiers"}


def test_a_run_is_reproducible(inputs, finished, tmp_path):
    again = run(inputs, tmp_path / "run", "generation.batch_size=3")
    for name in (
        "queries/held_out.jsonl",
        "iteration-0/constitutions/constitutions.jsonl",
        "iteration-0/generation/generated.jsonl",
    ):
        expected, got = (sorted((folder / name).read_text().splitlines()) for folder in (finished, again))
        assert got == expected
    other = run(inputs, tmp_path / "other", "seed=1")
    for name in ("queries/held_out.jsonl", "iteration-0/constitutions/constitutions.jsonl"):
        assert (other / name).read_text() != (again / name).read_text()


# What is done again


def test_what_is_complete_is_skipped_and_what_changed_is_redone(inputs, tmp_path, monkeypatch):
    folder = run(inputs, tmp_path / "run")
    before = begun(folder)

    def redone(*overrides):
        nonlocal before
        run(inputs, folder, *overrides)
        after = begun(folder)
        changed = [name for name in STAGES if after[name] != before[name]]
        before = after
        return changed

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "iter_responses", lambda *_, **__: pytest.fail("generated again"))
        patch.setattr(pipeline, "SamiTrainer", lambda *_, **__: pytest.fail("trained again"))
        assert redone() == []
        assert redone("generation.batch_size=2", "training.max_tokens=999", "evaluation.max_tokens=99") == []
    changed = redone("training.learning_rate=2e-3")
    assert changed == ["iteration-1/training", "iteration-1/evaluation"]
    changed = redone("training.learning_rate=2e-3", "evaluation.normalize=sum")
    assert changed == ["iteration-0/evaluation", "iteration-1/evaluation"]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "iter_responses", lambda *_, **__: pytest.fail("generated again"))
        marker = rows_of(folder / "iteration-1/generation/generated.jsonl")[0]["text"]
        patch.setattr(pipeline.Pipeline, "_evaluate", lambda *_: None)
        changed = redone("training.learning_rate=2e-3", f"generation.markers=['{marker}']")
        assert changed == ["iteration-0/responses", "iteration-1/responses", "iteration-1/training"], (
            "filters ask for no new responses"
        )
    assert redone("generation.temperature=0.9")[0] == "iteration-0/generation"
    assert "iteration-1/training" in begun(folder)


def test_an_iteration_more_leaves_the_others_alone(inputs, finished, tmp_path):
    folder = run(inputs, tmp_path / "run")
    before = begun(folder)
    run(inputs, folder, "iterations.count=2")
    after = begun(folder)
    assert [name for name in before if after[name] != before[name]] == ["queries"]
    for name in ("generation/generated.jsonl", "evaluation/metrics.json"):
        assert (folder / "iteration-2" / name).read_text() == (finished / "iteration-2" / name).read_text()


def test_damaged_outputs_are_made_anew(inputs, tmp_path, caplog):
    folder = run(inputs, tmp_path / "run")
    expected = (folder / "iteration-0/responses/groups.jsonl").read_text()
    (folder / "iteration-0/responses/groups.jsonl").write_text(expected.replace("the", "eht"))
    (folder / "iteration-1/training/model/model.safetensors").unlink()
    caplog.clear()
    run(inputs, folder)
    assert (folder / "iteration-0/responses/groups.jsonl").read_text() == expected
    said = caplog.text
    assert "iteration-0/responses: groups.jsonl is not as it was written" in said
    assert "iteration-1/training: model/model.safetensors is not as it was written" in said


def test_edited_principles_start_the_constitutions_anew(inputs, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    mine = tmp_path / "mine.json"
    mine.write_text((inputs / "principles.json").read_text())
    folder = run(inputs, tmp_path / "run", f"constitutions.principles={mine}")
    mine.write_text(mine.read_text().replace("very short", "now short"))
    caplog.clear()
    run(inputs, folder, f"constitutions.principles={mine}")
    assert "queries: complete, skipped" in caplog.text
    assert "iteration-0/constitutions: principles changed, starting anew" in caplog.text
    assert "now short" in (folder / "iteration-1/responses/groups.jsonl").read_text()


# Cut off: kill -9, a full disk, two at once


# For each stage the writes in the middle of which a process is killed there, one process after the other.
KILLS = [(name, write) for name in STAGES for write in ((1, 2, 3) if name.endswith("generation") else (2,))]
KILLS = [("queries", 1), *KILLS, *(("iteration-1/training", write) for write in (4, 6, 3))]
KILLS.sort(key=lambda kill: STAGES.index(kill[0]))


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


@pytest.fixture(scope="module")
def processes():
    """Processes that start as copies of one that has everything imported, and has computed nothing yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_pipeline"])
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


def test_killed_in_every_stage_and_continued(inputs, finished, tmp_path, processes):
    config = configure(inputs, tmp_path / "run")
    for name, write in KILLS:
        assert in_a_process(processes, killed_at, name, write, config) == -signal.SIGKILL, (name, write)
        status = {stage: read_manifest(tmp_path / "run" / stage)["status"] for stage in begun(tmp_path / "run")}
        cut_off = [] if write == 1 else [name]
        assert [stage for stage in status if status[stage] == "running"] == cut_off, (name, write)
    assert in_a_process(processes, killed_at, "none", 1, config) == 0
    for part in ("iteration-0", "iteration-1"):
        for name in ("responses/groups.jsonl", "evaluation/responses.jsonl", "evaluation/metrics.json"):
            assert (tmp_path / "run" / part / name).read_text() == (finished / part / name).read_text(), name
        rows = rows_of(tmp_path / "run" / part / "generation/generated.jsonl")
        assert sorted(map(str, rows)) == sorted(map(str, rows_of(finished / part / "generation/generated.jsonl")))
    assert not [path for path in (tmp_path / "run").rglob(".*-*") if path.is_file()], "no leftovers"


def limited(size: int, config: RunConfig, outcome: str) -> None:
    """Run in a process that can write no file larger than `size` bytes, as if the disk were full."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        pipeline.run_pipeline(config)
        text = "finished"
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    Path(outcome).write_text(text)


@pytest.mark.parametrize("overrides", [[], ["training.save_strategy='no'"]], ids=["checkpoint", "model"])
def test_a_full_disk_is_said_and_survived(overrides, inputs, finished, tmp_path, processes):
    folder = tmp_path / "run"
    config = configure(inputs, folder, *overrides)
    assert in_a_process(processes, limited, 20_000, config, str(tmp_path / "outcome")) == 0
    said = (tmp_path / "outcome").read_text()
    assert said.startswith(f"StageError: {folder}/iteration-1/training: cannot write"), said
    assert "finished work is kept, run again to go on" in said
    kept = begun(folder)
    run(inputs, folder, *overrides)
    assert {name for name in kept if begun(folder)[name] != kept[name]} == {"iteration-1/training"}
    metrics = "iteration-1/evaluation/metrics.json"
    assert (folder / metrics).read_text() == (finished / metrics).read_text()


def test_a_log_survives_a_full_disk_and_torn_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    JsonLinesLog(path).append([{"n": 1}])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        log = JsonLinesLog(path)
        with pytest.raises(OSError) as error:
            for n in range(2, 50):
                log.append([{"n": n}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG and path.stat().st_size == 100, "a torn line"
    again = JsonLinesLog(path)
    assert again.rows == [{"n": n} for n in range(1, len(log.rows) + 1)] and path.read_bytes().endswith(b"}\n")
    again.append([{"n": "é\n"}])
    assert JsonLinesLog(path).rows[-1] == {"n": "é\n"}
    path.write_text('{"n": 1}\nnonsense\n{"n": 2}\n')
    with pytest.raises(ValueError, match=r"log.jsonl, line 2: expected JSON"):
        JsonLinesLog(path)


def test_one_run_at_a_time(inputs, tmp_path):
    with Run(tmp_path / "run").locked(), pytest.raises(StageError, match="another run is at work in this folder"):
        run(inputs, tmp_path / "run")


def test_folders_of_others_are_left_alone(tmp_path):
    (tmp_path / "run/stage").mkdir(parents=True)
    (tmp_path / "run/stage/thesis.txt").write_text("mine")
    stage = Run(tmp_path / "run").stage
    with pytest.raises(ValueError, match=r"stage: expected a stage's folder or nothing there, got thesis.txt"):
        stage("stage", {}, lambda folder: None)
    assert (tmp_path / "run/stage/thesis.txt").read_text() == "mine"
    stage("good", {"a": 1}, lambda folder: (folder / "x").write_text("1") and None)
    (tmp_path / "run/good/manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"good/manifest.json: expected the manifest of a stage"):
        stage("good", {"a": 1}, lambda folder: None)


def test_other_errors_of_a_stage_pass_through(tmp_path):
    def fail(error):
        def work(folder):
            raise error

        return work

    for error in (RuntimeError("no such thing"), OSError(errno.ENOENT, "gone"), ValueError("x")):
        with pytest.raises(type(error)) as raised:
            Run(tmp_path / "run").stage("s", {}, fail(error))
        assert raised.value is error


# Options


def test_training_goes_on_from_the_model_before(inputs, tmp_path):
    save_model(tmp_path / "model", 96, dtype=torch.bfloat16)
    options = [f"model.name={tmp_path / 'model'}", "iterations.count=2", "iterations.start=previous"]
    folder = run(inputs, tmp_path / "run", *options, "training.learning_rate=1e-6", "training.save_strategy='no'")
    models = [tmp_path / "model", *(folder / f"iteration-{n}/training/model" for n in (1, 2))]
    start, first, second = (AutoModelForCausalLM.from_pretrained(path).lm_head.weight for path in models)
    assert start.dtype == torch.bfloat16 and first.dtype == second.dtype == torch.float32
    assert 0 < (first - start.float()).abs().max() < 1e-4, "steps below bf16 spacing are kept"
    assert 0 < (second - first).abs().max() < 1e-4
    assert read_manifest(folder / "iteration-2/training")["inputs"]["start"] == "previous"


def test_adapters_are_merged(inputs, tmp_path):
    pytest.importorskip("peft")
    folder = run(inputs, tmp_path / "run", "lora.r=2", "lora.target_modules=[q_proj]", "training.save_strategy='no'")
    trained = AutoModelForCausalLM.from_pretrained(folder / "iteration-1/training/model").state_dict()
    base = AutoModelForCausalLM.from_pretrained(inputs / "model").state_dict()
    assert trained.keys() == base.keys()
    assert {name.split(".")[-2] for name in base if not torch.equal(base[name], trained[name])} == {"q_proj"}


def test_several_responses_and_constitutions(inputs, tmp_path):
    options = ["generation.responses=3", "constitutions.count=4", "evaluation.queries=2", "iterations.queries=2"]
    folder = run(inputs, tmp_path / "run", *options, "training.save_strategy='no'")
    generated = rows_of(folder / "iteration-0/generation/generated.jsonl")
    assert len({(row["id"], row["constitution"], row["sample"]) for row in generated}) == 4 * 4 * 3
    examples = load_examples(folder / "iteration-0/responses/groups.jsonl")
    assert max(len(example.constitutions) for example in examples) == 4
    assert max(len(example.responses) for example in examples) > 4
    for part in ("iteration-0", "iteration-1"):
        assert len(rows_of(folder / part / "evaluation/responses.jsonl")) == 2 * 4


def test_the_real_posts_and_the_published_constitutions(inputs, tmp_path):
    if not (SHARED / "tldr_sample.jsonl").exists():
        pytest.skip("no sample of the real data here")
    save_model(tmp_path / "model", 4000, train_tokenizer("bytes"))
    pairs = SHARED / "tldr_constitutions.json"
    task = {"name": "tldr", "source": str(SHARED / "tldr_sample.jsonl"), "field": "query"}
    values = {
        "output": str(tmp_path / "run"),
        "model": {"name": str(tmp_path / "model"), "device": "cpu"},
        "task": task,
        "constitutions": {"pairs": str(pairs)},
        "generation": {"max_new_tokens": 12, "batch_size": 16},
        "iterations": {"queries": 4, "held_out": 3},
        "training": {"max_steps": 1, "report_to": "none", "save_strategy": "no"},
    }
    folder = pipeline.run_pipeline(RunConfig.from_mapping(values))

    def lines(text):
        return frozenset(line[3:].strip() for line in text.split("\n"))

    published = [{lines(constitution.text) for constitution in pair} for pair in load_constitution_pairs(pairs)]
    rows = rows_of(folder / "iteration-1/constitutions/constitutions.jsonl")
    for row in rows:
        assert {lines(text) for text in row["training"]} in published
    assert any(row["generation"] != row["training"] for row in rows)
    responses = rows_of(folder / "iteration-1/evaluation/responses.jsonl")
    assert responses and all(row["response"].startswith("The post") for row in responses)


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_responses_go_on_from_their_first_words(kind, inputs):
    tokenizer = train_tokenizer(kind)
    made = pipeline.Pipeline(configure(inputs, "unused", "task.response_prefix=The post", "task.template=query_first"))
    start = len(response_ids(tokenizer, made.generation_template, "The post"))
    for text in ("The post is about a person.", "The post: a summary.", "The post"):
        ids = response_ids(tokenizer, made.generation_template, text)
        response = Generated(0, 0, tokenizer.decode(ids[start:]), tuple(ids[start:]), True)
        expected = {"id": "a", "constitution": 1, "sample": 0, "text": text, "finished": True}
        assert made._row(tokenizer, "a", 1, response) == expected


def test_queries_too_long_for_the_model_are_left_out(inputs, tmp_path):
    rows = rows_of(inputs / "queries.jsonl")
    rows[3]["query"] = "the cat " * 60
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = run(inputs, tmp_path / "run", f"task.source={tmp_path / 'q.jsonl'}", "training.save_strategy='no'")
    results = [read_manifest(folder / part / "generation")["results"] for part in ("iteration-0", "iteration-1")]
    slices = [rows_of(folder / "queries" / f"{name}.jsonl") for name in ("held_out", "iteration-1")]
    assert [result["too_long"] for result in results] == [sum(r["id"] == "q3" for r in rows) for rows in slices]


class FakeVllm(types.ModuleType):
    """What the pipeline uses of vLLM's interface, on top of the same tiny model."""

    def __init__(self):
        super().__init__("vllm")
        self.requests, self.options, self.open = [], [], 0
        self.SamplingParams = lambda **options: types.SimpleNamespace(**options)
        self.LLM = self.make

    def make(self, model, **options):
        self.options.append(options)
        self.open += 1
        loaded = AutoModelForCausalLM.from_pretrained(model)
        limit = types.SimpleNamespace(max_model_len=96)
        core = types.SimpleNamespace(shutdown=lambda: setattr(self, "open", self.open - 1))

        def generate(prompts, settings, use_tqdm):
            self.requests += settings
            outputs = []
            for prompt, setting in zip(prompts, settings, strict=True):
                torch.manual_seed(setting.seed)
                ids = torch.tensor([prompt["prompt_token_ids"]])
                out = loaded.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=setting.max_tokens
                )
                completion = types.SimpleNamespace(token_ids=out[0, ids.shape[1] :].tolist())
                outputs.append(types.SimpleNamespace(outputs=[completion]))
            return outputs

        engine = types.SimpleNamespace(model_config=limit, engine_core=core)
        return types.SimpleNamespace(llm_engine=engine, generate=generate)


def test_vllm_backend(inputs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", fake := FakeVllm())
    options = ["generation.backend=vllm", "generation.vllm={gpu_memory_utilization: 0.5}", "generation.top_p=0.9"]
    folder = run(inputs, tmp_path / "run", *options, "training.save_strategy='no'")
    assert fake.open == 0 and len(fake.options) == 3, "one engine for each generation, each closed"
    assert all(o["enable_prefix_caching"] and o["gpu_memory_utilization"] == 0.5 for o in fake.options)
    assert len({request.seed for request in fake.requests[:8]}) == 8
    first = fake.requests[0]
    assert (first.max_tokens, first.top_p, first.temperature, first.stop_token_ids) == (8, 0.9, 1.0, [1])
    rows = rows_of(folder / "iteration-0/generation/generated.jsonl")
    assert len(rows) == 8 and not any("<eos>" in row["text"] for row in rows)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(RuntimeError, match="vllm is not installed"):
        run(inputs, tmp_path / "other", *options)


def test_models_are_told_apart_by_their_files(inputs, finished, tmp_path):
    shutil.copytree(inputs / "model", tmp_path / "model")
    (tmp_path / "manifest.json").write_text('{"of": "another program"}')
    store = ModelStore(ModelConfig(device="cpu"))
    assert store.digest(str(tmp_path / "model")) == store.digest(str(inputs / "model")) != "model"
    (tmp_path / "model/config.json").write_text((inputs / "model/config.json").read_text() + " ")
    assert ModelStore(store.config).digest(str(tmp_path / "model")) != store.digest(str(inputs / "model"))
    trained = [store.digest(str(finished / f"iteration-{n}/training/model")) for n in (1, 2)]
    assert len({*trained, store.digest("somebody/on-the-hub")}) == 3
    assert store.digest("somebody/on-the-hub") == "somebody/on-the-hub"


def test_shuffled_principles():
    constitution = Constitution(
        "1. One. \n2. Two,\n  and more.\n3. Three.", {"a": "principle", "b": "antithesis", "c": "principle"}
    )
    seen = set()
    for seed in range(30):
        shuffled = shuffle_principles(constitution, str(seed))
        assert shuffled == shuffle_principles(constitution, str(seed))
        lines = [part.split(". ", 1)[1] for part in shuffled.text.replace(",\n  and", ", and").split("\n")]
        place = {"One.": ("a", "principle"), "Two, and more.": ("b", "antithesis"), "Three.": ("c", "principle")}
        assert list(shuffled.identifiers.items()) == [place[line] for line in lines]
        assert [part[:2] for part in shuffled.text.replace(",\n", ", ").split("\n")] == ["1.", "2.", "3."]
        seen.add(tuple(lines))
    assert len(seen) == 6
    for text in ("Be brief.", "1. Be brief.", "Rules:\n1. a b\n2. c d"):
        assert shuffle_principles(Constitution(text, {}), "0").text == text


# The judge


@pytest.fixture(scope="module")
def judge_model(tmp_path_factory):
    """With a short question to it beside it."""
    folder = tmp_path_factory.mktemp("judge")
    (folder / "question.txt").write_text("{query}\n{constitution}\nA: {response_a}\nB: {response_b}\nBetter:")
    return save_model(folder / "model", 512, train_tokenizer("bytes"))


def copy_run(finished, tmp_path) -> Path:
    """The run of two iterations, as if it had been made here."""
    return Path(shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("report")))


JUDGES = ["iteration-1/judge", "iteration-2/judge"]


def test_a_judge_is_asked_about_each_iteration_and_again_when_it_changes(
    inputs, finished, judge_model, tmp_path, monkeypatch
):
    folder, mine = copy_run(finished, tmp_path), tmp_path / "judge"
    shutil.copytree(judge_model, mine)
    question = judge_model.with_name("question.txt")
    before = begun(folder)

    def redone(*overrides):
        nonlocal before
        run(inputs, folder, "iterations.count=2", f"judge.model={mine}", f"judge.template={question}", *overrides)
        after = begun(folder)
        changed = sorted(name for name in after if after[name] != before.get(name))
        before = after
        return changed

    assert redone() == JUDGES
    for part in ("iteration-1", "iteration-2"):
        result = json.loads((folder / part / "judge/win_rate.json").read_text())
        pairs = load_pairs(*(folder / name / "evaluation/responses.jsonl" for name in (part, "iteration-0")))
        assert result["pairs"] == len(pairs) == 8 and result["judge"]["judge"] == str(mine)
        asked = {pair.id for pair in pairs if pair.response != pair.against}
        rows = rows_of(folder / part / "judge/win_rate.verdicts.jsonl")
        assert {row["id"] for row in rows} == asked and len(rows) == result["questions"] > 0
        judge = LocalJudge(*ModelStore(ModelConfig(str(mine), device="cpu")).get(str(mine)), "j")
        expected = judge_pairs(pairs, judge, tmp_path / f"{part}.jsonl", template=question, progress=False)
        scores = np.mean([outcome.scores for outcome in expected])
        assert result["win_rate"]["mean"] == pytest.approx(scores) and result["by_log_odds"] is not None
        inputs_of = read_manifest(folder / part / "judge")["inputs"]
        assert inputs_of["judge"]["model"] == ModelStore(ModelConfig()).digest(str(mine)) != str(mine)
    with monkeypatch.context() as patch:
        patch.setattr(LocalJudge, "answers", lambda *_: pytest.fail("asked again"))
        assert redone("judge.max_tokens=9999", "judge.concurrency=2") == []
        assert redone("evaluation.normalize=sum") == [f"iteration-{n}/evaluation" for n in range(3)], "same responses"
    question.write_text(question.read_text() + " ")
    assert redone("evaluation.normalize=sum") == JUDGES
    same = ["evaluation.normalize=sum", "judge.max_pairs=3"]
    assert redone(*same) == JUDGES
    assert json.loads((folder / "iteration-1/judge/win_rate.json").read_text())["pairs"] == 3
    (mine / "config.json").write_text((mine / "config.json").read_text() + " ")
    assert redone(*same) == JUDGES
    changed = redone(*same, "evaluation.queries=1")
    assert set(changed) == {*JUDGES, *(f"iteration-{n}/evaluation" for n in range(3))}, "other responses"


def test_killed_while_a_judge_is_asked_and_continued(inputs, finished, judge_model, tmp_path, processes, monkeypatch):
    folder = copy_run(finished, tmp_path)
    options = [f"judge.model={judge_model}", f"judge.template={judge_model.with_name('question.txt')}"]
    config = configure(inputs, folder, "iterations.count=2", *options)
    assert in_a_process(processes, killed_at, JUDGES[0], 6, config) == -signal.SIGKILL
    verdicts = folder / "iteration-1/judge/win_rate.verdicts.jsonl"
    kept = verdicts.read_text().splitlines()
    assert len(kept) == 5 and read_manifest(folder / JUDGES[0])["status"] == "running", "four, and a torn one"
    asked, answers = [], LocalJudge.answers
    monkeypatch.setattr(LocalJudge, "answers", lambda self, rest: asked.append(len(rest)) or answers(self, rest))
    before = begun(folder)
    pipeline.run_pipeline(config)
    assert [name for name in before if begun(folder)[name] != before[name]] == [JUDGES[0]]
    result = json.loads((folder / JUDGES[0] / "win_rate.json").read_text())
    assert asked[0] == result["questions"] - 4 > 0 and len(asked) == 2
    assert verdicts.read_text().splitlines()[:4] == kept[:4] and len(rows_of(verdicts)) == result["questions"]


def test_an_endpoint_as_judge_fails_and_goes_on(inputs, finished, tmp_path):
    pytest.importorskip("openai")
    from openai_server import OpenAIServer
    from test_judge import brief, prompts

    folder = copy_run(finished, tmp_path)
    options = ["iterations.count=2", "judge.concurrency=1", "judge.endpoint.model=judge-1"]

    def ask(server):
        return run(inputs, folder, *options, f"judge.endpoint.base_url={server.url}")

    with (
        OpenAIServer(lambda messages: 401 if len(first.requests) > 5 else brief(messages)) as first,
        pytest.raises(EndpointError, match=r"judge-1: .* answered 401"),
    ):
        ask(first)
    assert len(rows_of(folder / "iteration-1/judge/win_rate.verdicts.jsonl")) == 5
    with OpenAIServer(brief) as second:
        ask(second)
        answered = len(second.requests)
        ask(second)
        assert len(second.requests) == answered
    questions = 0
    for part in ("iteration-1", "iteration-2"):
        result = json.loads((folder / part / "judge/win_rate.json").read_text())
        pairs = load_pairs(*(folder / name / "evaluation/responses.jsonl" for name in (part, "iteration-0")))
        lengths = [(len(pair.response), len(pair.against)) for pair in pairs]
        assert result["win_rate"]["mean"] == pytest.approx(np.mean([(np.sign(b - a) + 1) / 2 for a, b in lengths]))
        assert result["judge"]["template"] == "reasoned" and result["unreadable"] == 0
        questions += result["questions"]
    assert answered == questions - 5 and not set(prompts(first)[:5]) & set(prompts(second)), "nothing twice"


# Bad input


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["constitutions.attributes=[luck]"], "attributes: expected attributes out of size, style, got 'luck'"),
        (["constitutions.count=5"], "count: expected 1 to 4 constitutions of 2 attribute(s), got 5"),
        (["constitutions.pairs=x.json"], "constitutions: expected either principles or pairs"),
        (["task.field=post"], "queries.jsonl, line 1: missing field 'post'; there are: id, query"),
        (["task.name=chess"], "task.name: expected one of generic, tldr, hh, got 'chess'"),
        (["task.template=nowhere"], "template: expected a file or one of"),
        (["iterations.queries=9"], "iterations: expected at least 13 queries (4 held out, 1 x 9), got 12"),
        (["iterations.start=middle"], "iterations.start: expected base or previous, got 'middle'"),
        (["generation.backend=magic"], "generation.backend: expected transformers or vllm"),
        (["generation.heat=1"], "generation.heat: unknown key"),
        (["generation.top_p=0"], "generation: expected temperature >= 0 and top_p in (0, 1]"),
        (["generation.responses=0"], "generation.responses: expected an int of at least 1, got 0"),
        (["training.output_dir=x"], "training.output_dir: expected nothing, the run sets it"),
        (["training.learn=1"], "training.learn: unknown key"),
        (["evaluation.normalize=max"], "evaluation.normalize: expected mean or sum"),
        (["model.adapter=x"], "model.adapter: expected None, a run starts from a whole model"),
        (["seed=x"], "seed: expected an int, got 'x'"),
        (["output="], "output: expected a folder, got None"),
        (["judge={}"], "judge: expected either model or endpoint, got None, None"),
        (["judge.model=a", "judge.endpoint.model=b"], "judge: expected either model or endpoint, got 'a', "),
        (["judge.model=bundled", "judge.max_pairs=0"], "judge.max_pairs: expected an int of at least 1, got 0"),
        (["judge.model=bundled", "judge.dtype=int4"], "judge.dtype: expected one of auto, float32"),
        (["judge.model=nowhere-at-all"], "judge.model: expected a causal LM, got 'nowhere-at-all'"),
        (["judge.endpoint={modle: x}"], "judge.endpoint.modle: unknown key, did you mean 'model'?"),
        (["judge.endpoint={base_url: 'http://x/v1'}"], "model: expected the name of a model, got ''"),
        (
            ["judge.endpoint={model: m, base_url: 'http://x/v1'}", "judge.template=nowhere"],
            "template: expected a file or",
        ),
        (["trainign.x=1"], "trainign: unknown key, did you mean 'training'?"),
    ],
)
def test_bad_settings_are_named(overrides, message, inputs, tmp_path, capsys):
    assert main(["run", str(inputs / "config.yaml"), f"output={tmp_path / 'run'}", *overrides]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run/iteration-0").exists()


def test_nothing_left_by_the_filters(inputs, tmp_path):
    with pytest.raises(
        StageError, match=r"iteration-0/responses: no group is left of 4 queries; filters: .*'leftover': 8"
    ):
        run(inputs, tmp_path / "run", f"generation.markers={json.dumps(WORDS)}")


def test_command_line(inputs, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert "manifest.json" in capsys.readouterr().out
    arguments = ["run", str(inputs / "config.yaml"), f"output={tmp_path / 'run'}", "training.save_strategy='no'"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip().endswith(str(tmp_path / "run"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments) == 1
    assert "expected one process, got WORLD_SIZE=2" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "none.yaml")]) == 1


def test_recipes_are_valid(monkeypatch):
    import sami_fast

    # The judge is the bundled model, which `make test` does not install.
    monkeypatch.setattr("sami_fast.model_store.ModelStore.positions", lambda store, name: 8192)
    recipes = sorted((Path(sami_fast.__file__).parent / "recipes").glob("*/config.yaml"))
    assert [path.parent.name for path in recipes] == ["demo", "demo_long"]
    for path in recipes:
        made = pipeline.Pipeline(dataclasses.replace(read_run_config(str(path), []), output="unused"))
        loop = made.config.iterations
        queries = len(rows_of(Path(made.task.source)))
        assert loop.held_out + loop.count * (loop.queries or 1) <= queries
