"""The benchmark harness on cases of milliseconds: wrong, failing and memory-hungry arms are no fast ones."""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent))  # benchmarks/ is not installed

from benchmarks import report, tables
from benchmarks.harness import record_name, run_suite, write_record
from benchmarks.suite import PASSES, Arm, Case, Prepared, Settings, Suite, find_suites, load_suite

LIMIT = 4e9
SETTINGS = Settings(quick=True, budget=300.0, threads=1)


def _cases(settings):
    return [Case("small", {"n": 64}, quick=True), Case("large", {"n": 1 << 40})]


def _inputs(case, settings, seed):
    return torch.randn(case.shapes["n"], 64, generator=torch.Generator().manual_seed(seed))


TOY = Suite("toy", "Column sums", _cases, _inputs, limits={"float32": {"sums": 1e-5}}, input_sets=2)


def _sums(x, off=0.0, work=lambda: None):
    def run():
        work()
        return {"sums:a": x.sum(0)[:32], "sums:b": x.sum(0)[32:] + off}

    return Prepared(run, flops=x.numel(), bytes=4 * x.numel(), facts={"rows": len(x)})


def _allocate_too_much():
    torch.empty(1 << 50, dtype=torch.uint8)


@TOY.arm("oracle", peer="torch", timed=False)
def oracle(x, backward):
    return _sums(x.double())


@TOY.arm("ours", peer="sami-fast", ours=True)
def ours(x, backward):
    return _sums(x)


@TOY.arm("wrong", peer="torch")
def wrong(x, backward):
    return _sums(x, off=1e-3)


@TOY.arm("not a number", peer="torch")
def not_a_number(x, backward):
    return _sums(x, off=float("nan"))


@TOY.arm("hungry", peer="torch")
def hungry(x, backward):
    return _sums(x, work=_allocate_too_much)


@TOY.arm("broken", peer="torch")
def broken(x, backward):
    raise ValueError("no kernel in /usr/lib/x.so for this shape")


@TOY.arm("absent", peer="no-such-package")
def absent(x, backward):
    raise AssertionError("an arm whose package is not installed must not run")


def _over_the_limit(x, backward):
    return _sums(x, work=lambda: torch.empty(int(LIMIT), dtype=torch.uint8))


def _killed(x, backward):
    return _sums(x, work=lambda: os.kill(os.getpid(), 9))


def _by_arm(record, pass_name="forward"):
    return {result["arm"]: result for result in record["results"] if result["pass"] == pass_name}


def test_some_cases_make_a_record_of_another_name():
    record = run_suite(TOY, replace(SETTINGS, quick=False, only="small"))
    assert {result["case"] for result in record["results"]} == {"small"}
    assert record_name(record) == "toy-small-cpu"
    with pytest.raises(ValueError, match="expected at least one case"):
        run_suite(TOY, replace(SETTINGS, only="medium"))


def test_of_several_rounds_the_fastest_counts():
    prepared = []

    def first_slow(x, backward):
        prepared.append(backward)
        wait = 0.004 if prepared.count(backward) == 1 else 0.0
        return _sums(x, work=lambda: time.sleep(wait))

    suite = replace(
        TOY, rounds=2, input_sets=1, arms=[Arm("ours", "sami-fast", ours, ours=True), Arm("slow", "torch", first_slow)]
    )
    record = run_suite(suite, replace(SETTINGS, quick=False, only="small"))
    assert len(prepared) == 2 * len(PASSES)
    for result in record["results"]:
        assert result["outcome"] == "ok" and result["seconds"]["median"] < 0.004
        floor = result["bytes"] / record["ceilings"]["float32"]["bytes_per_second"]
        assert result["share_of_ceiling"] == pytest.approx(floor / result["seconds"]["median"])  # made anew


def test_outcomes_and_record(tmp_path):
    record = run_suite(TOY, SETTINGS)
    assert {result["case"] for result in record["results"]} == {"small"}  # --quick leaves the large one out
    outcomes = {name: result["outcome"] for name, result in _by_arm(record).items()}
    assert outcomes == {
        "oracle": "ok",
        "ours": "ok",
        "wrong": "wrong",
        "not a number": "wrong",
        "hungry": "out of memory",
        "broken": "failed",
        "absent": "not installed",
    }
    results = _by_arm(record, "forward+backward")
    assert all("seconds" not in result for result in results.values() if result["outcome"] != "ok")
    assert results["oracle"]["seconds"]["runs"] == 1 and results["ours"]["seconds"]["runs"] > 1
    assert results["ours"]["errors"]["sums"]["relative"] < 1e-6 and results["ours"]["checked_against"] == "oracle"
    assert results["ours"]["times_ours"] == 1.0
    assert results["wrong"]["errors"]["sums"]["max_abs"] == pytest.approx(1e-3, rel=0.1)
    assert results["broken"]["detail"] == "ValueError: no kernel in x.so for this shape"
    ceiling = record["ceilings"]["float32"]
    bound = results["ours"]["bytes"] / ceiling["bytes_per_second"] / results["ours"]["seconds"]["median"]
    assert results["ours"]["ceiling"] == "copy" and results["ours"]["share_of_ceiling"] == pytest.approx(bound)

    path = write_record(record, tmp_path)
    assert path.name == "toy-cpu.json" and json.loads(path.read_text()) == record
    assert report.plot(record).startswith(b"\x89PNG")
    document = "before <!-- benchmark:toy-cpu -->\nold\n<!-- /benchmark --> after"
    filled = tables.fill(document, tmp_path)
    assert "| small | forward | wrong | wrong |" in filled and "old" not in filled
    assert "Not installed here: absent." in filled and "| absent |" not in filled
    busy = record | {"results": [result | {"other_cores": 1.3} for result in record["results"]]}
    assert "up to 1.3 cores' time" in report.markdown(busy) and results["ours"]["other_cores"] >= 0
    assert tables.fill(filled, tmp_path) == filled
    for broken_document in (document.replace("toy-cpu", "missing"), document.replace("<!-- /benchmark -->", "")):
        with pytest.raises(ValueError, match="marker"):
            tables.fill(broken_document, tmp_path)


def test_budget():
    record = run_suite(TOY, replace(SETTINGS, budget=0.0))
    assert {result["outcome"] for result in record["results"]} == {"over budget"}


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited and read as Linux does it")
def test_processes_of_their_own():
    arms = [Arm("ours", "sami-fast", ours, ours=True)]
    arms += [Arm(run.__name__, "torch", run) for run in (_over_the_limit, _killed)]
    record = run_suite(replace(TOY, isolated=True, arms=arms), replace(SETTINGS, memory_limit=LIMIT))
    results = _by_arm(record)
    assert results["ours"]["outcome"] == "ok" and 0 < results["ours"]["memory"]["peak"] < LIMIT
    assert results["_over_the_limit"]["outcome"] == results["_killed"]["outcome"] == "out of memory"
    assert results["_over_the_limit"]["detail"].startswith("limit 4 GB")
    assert "out of memory at 4 GB" in report.markdown(record)


@pytest.fixture
def tiny_model(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def _tiny_cases(settings):
    lengths = {"query": 12, "constitution": 5, "response": 6}
    return [Case(f"{n}x{n}", {"C": n, "R": n} | lengths, quick=True) for n in (2, 3)]


def test_end_to_end(tiny_model):
    assert "end_to_end" in find_suites()
    suite = load_suite("end_to_end")
    suite = replace(suite, cases=_tiny_cases, isolated=False, arms=list(suite.arms))
    right = next(arm for arm in suite.arms if arm.ours)

    @suite.arm("other prompts", peer="sami-fast")
    def other_prompts(made, backward):
        prompts = [[*prompt[1:], prompt[0]] for prompt in made.group.prompts]
        return right.prepare(replace(made, group=replace(made.group, prompts=prompts)), backward)

    record = run_suite(suite, replace(SETTINGS, model=tiny_model))
    assert len(record["results"]) == 2 * len(PASSES) * 6
    recomputing = {"prefix tree, layers recomputed", "prefix tree, attention kept"}
    for result in record["results"]:
        if result["arm"] == "other prompts":
            assert result["outcome"] == "wrong", result
            continue
        if result["arm"] in recomputing and not PASSES[result["pass"]]:
            assert result["outcome"] == "unsupported", result
            continue
        assert result["outcome"] == "ok", result
        C = result["shapes"]["C"]
        whole, packed = C * C * 23, 12 + 5 * C + C * C * 5  # a response's last token predicts nothing
        assert result["facts"]["token ratio"] == whole / packed
        assert result["facts"]["tokens"] == (packed if result["ours"] or result["arm"] in recomputing else whole)
        if result["arm"] == "padded, full logits":
            assert set(result["errors"]) == {"matrix", "loss"} | ({"gradients"} if PASSES[result["pass"]] else set())
            expected = result["times_ours"] / result["facts"]["token ratio"]
            assert result["facts"]["of token ratio"] == pytest.approx(expected)
    assert tiny_model not in json.dumps(record)


def test_arm_under_pytest_benchmark(benchmark, tiny_model):
    case = _tiny_cases(SETTINGS)[0]
    suite = load_suite("end_to_end")
    made = suite.inputs(case, replace(SETTINGS, model=tiny_model), 0)
    arms = {arm.name: arm.prepare(made, True).run for arm in suite.arms}
    numbers = benchmark.pedantic(arms["prefix tree"], rounds=2, warmup_rounds=1)
    torch.testing.assert_close(numbers["matrix"], arms["one sequence at a time"]()["matrix"], rtol=1e-4, atol=1e-5)
