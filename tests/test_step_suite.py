"""The suite of whole training steps, on its tiny case."""

import sys
from pathlib import Path

import pytest
import torch
from factory import random_group
from numpy.random import default_rng

sys.path.append(str(Path(__file__).parent.parent))  # benchmarks/ is not installed

from benchmarks import step
from benchmarks.harness import run_suite
from benchmarks.suite import Settings
from sami_fast import pack


def test_arms_agree_and_those_that_need_a_gpu_say_so():
    record = run_suite(step.SUITE, Settings(device="cpu", quick=True, budget=300.0, threads=1))
    outcomes = {(r["case"], r["pass"], r["arm"]): (r["outcome"], r["detail"]) for r in record["results"]}
    assert {case for case, *_ in outcomes} == {"tiny full", "tiny LoRA"}
    for (_, pass_name, arm), (outcome, detail) in outcomes.items():
        runs_anywhere = arm in ("one sequence at a time, float32", "prefix tree", "padded, full logits")
        runs_anywhere |= arm == "prefix tree, attention kept" and pass_name != "forward"
        assert outcome in (("ok",) if runs_anywhere else ("unsupported", "not installed")), (arm, detail)
    tree = next(r for r in record["results"] if r["ours"])
    assert tree["facts"]["token ratio"] > 2 and tree["facts"]["whole tokens/s"] > 0


def test_whole_sequences_score_as_the_tree_does():
    made = step.inputs(step.cases(Settings())[0], Settings(), 0)
    results = [step._scored(made, False, make, None).run() for make in (pack, step.whole_sequences)]
    for name in ("matrix", "loss"):
        assert torch.allclose(results[0][name], results[1][name], rtol=1e-5, atol=1e-6), name


def test_whole_sequences_share_nothing():
    groups = [random_group(default_rng(0), 2, 3), random_group(default_rng(1), 3, 3)]
    packed, whole = pack(groups), step.whole_sequences(groups)
    assert whole.num_tokens == packed.whole_tokens - sum(C * R for C, R in packed.shapes)  # last tokens are labels only
    assert whole.labels.equal(packed.labels) and whole.offsets.equal(packed.offsets) and whole.shapes == packed.shapes


def test_a_step_moves_the_weights_that_train():
    for case in step.cases(Settings()):
        made = step.inputs(case, Settings(), 0)
        before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
        step.prefix_tree(made, True).run()
        moved = {name for name, p in made.model.named_parameters() if not p.equal(before[name])}
        trained = {name for name, p in made.model.named_parameters() if p.requires_grad}
        assert moved and moved <= trained


@pytest.mark.parametrize("name", step._MODELS)
def test_flops_follow_the_weights(name):
    with torch.device("meta"):
        config = step._config(name)
        model = step.AutoModelForCausalLM.from_config(config)
    made = step.Inputs(model, [], "cpu", "full")
    head = config.hidden_size * config.vocab_size
    matrices = sum(
        p.numel() for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n and "lm_head" not in n
    )
    if experts := getattr(config, "num_local_experts", None):
        idle = 1 - config.num_experts_per_tok / experts
        matrices -= idle * sum(p.numel() for n, p in model.named_parameters() if "experts" in n)
    assert made.flops(10, 0, 3, False) == pytest.approx(2 * (10 * matrices + 3 * head))
    assert made.flops(10, 7, 3, True) > 3 * made.flops(10, 7, 3, False)
