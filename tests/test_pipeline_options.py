"""What a run's configuration can ask for: models, adapters, several responses, real data, other backends."""

import dataclasses
import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from pipeline_runs import (
    SHARED,
    configure,
    rows_of,
    run,
    save_model,
)
from text_factory import BYTES, train_tokenizer
from transformers import AutoModelForCausalLM

import sami_fast.pipeline as pipeline
from sami_fast.config import ModelConfig
from sami_fast.constitutions import load_constitution_pairs
from sami_fast.examples import load_examples
from sami_fast.generation import Generated
from sami_fast.model_store import ModelStore
from sami_fast.prompts import response_ids
from sami_fast.run_config import RunConfig, read_run_config
from sami_fast.stages import read_manifest

pytest_plugins = ["pipeline_runs"]
pytestmark = pytest.mark.usefixtures("quick")


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
    start = len(response_ids(tokenizer, made.responses.template, "The post"))
    for text in ("The post is about a person.", "The post: a summary.", "The post"):
        ids = response_ids(tokenizer, made.responses.template, text)
        response = Generated(0, 0, tokenizer.decode(ids[start:]), tuple(ids[start:]), True)
        expected = {"id": "a", "constitution": 1, "sample": 0, "text": text, "finished": True}
        assert made.responses._row(tokenizer, "a", 1, response) == expected


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


def test_continuous_batching_backend(inputs, tmp_path):
    options = ["generation.backend=continuous", "generation.top_p=0.9", "generation.continuous={num_blocks: 40}"]
    folder = run(inputs, tmp_path / "run", *options, "training.save_strategy='no'", "generation.responses=2")
    rows = rows_of(folder / "iteration-0/generation/generated.jsonl")
    assert len({(row["id"], row["constitution"], row["sample"]) for row in rows}) == len(rows) == 16
    assert read_manifest(folder / "iteration-0/generation")["inputs"]["generation"]["backend"] == "continuous"
    assert len(rows_of(folder / "iteration-1/evaluation/responses.jsonl")) == 8
    with pytest.raises(ValueError, match=r"generation.continuous: expected arguments of .*'blocks'"):
        run(inputs, tmp_path / "other", "generation.backend=continuous", "generation.continuous={blocks: 4}")
    assert not (tmp_path / "other").exists()


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


def test_recipes_are_valid(monkeypatch):
    import sami_fast

    # The judge is the bundled model, which `make test` does not install.
    monkeypatch.setattr("sami_fast.model_store.ModelStore.positions", lambda store, name: 8192)
    monkeypatch.setattr("sami_fast.model_store.ModelStore.tokenizer", lambda store, name: BYTES)
    recipes = sorted((Path(sami_fast.__file__).parent / "recipes").glob("*/config.yaml"))
    assert [path.parent.name for path in recipes] == ["demo", "demo_long"]
    for path in recipes:
        made = pipeline.Pipeline(dataclasses.replace(read_run_config(str(path), []), output="unused"))
        loop = made.config.iterations
        queries = len(rows_of(Path(made.task.source)))
        assert loop.held_out + loop.count * (loop.queries or 1) <= queries
