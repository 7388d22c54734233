"""The attention suite on trees of some dozen tokens: every arm agrees with float64, or says why it does not run."""

import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_flash import PLAIN, plain_forward
from tolerance import assert_exact

sys.path.append(str(Path(__file__).parent.parent))  # benchmarks/ is not installed

from benchmarks import attention, trees
from benchmarks.harness import run_suite
from benchmarks.suite import PASSES, Case, Prepared, Settings, find_suites, load_suite
from sami_fast import pack
from sami_fast.kernels import flash_attention
from sami_fast.kernels.flash_attention import Gather
from sami_fast.prefix_tree import AttentionPlan, Group

SETTINGS = Settings(quick=True, threads=1)
HEADS = {"Hq": 6, "Hkv": 2, "D": 8}
TREE = {"group": (7, 3, 5, 2, 6), "tokens": 100}
CASES = [
    Case("plain", TREE | HEADS, quick=True),
    Case("window", {"chain": (4, 5, 3), "tokens": 0, "window": 9} | HEADS, quick=True),
    Case("soft-cap", TREE | HEADS | {"softcap": 0.7}, quick=True),
]
# In a forward without options; on the CPU.
UNSUPPORTED = {"ours, triton", "varlen_attn, unshared", "gathered K/V + varlen_attn"}
NO_SOFTCAP = {"SDPA, unshared", "gathered K/V + SDPA"}
FLASH = {f"gathered K/V + flash-attn {version}" for version in flash_attention.LIBRARIES}


@pytest.fixture(scope="module")
def record():
    suite = load_suite("attention")
    suite = replace(suite, cases=lambda settings: CASES, arms=list(suite.arms))

    @suite.arm("plain causal", peer="sami-fast")
    def plain_causal(made, backward):
        T = len(made.q)
        plan = AttentionPlan.build(np.full(T, T), np.arange(T))
        return attention.ours("reference", replace(made, plan=plan), backward)

    @suite.arm("gradients of copies not added up", peer="torch")
    def one_copy(made, backward):
        unshared = attention.sdpa(made, backward)

        def numbers(returned):
            right = unshared.numbers(returned)
            return right | {name: 0.5 * right[name] for name in ("dk", "dv") if name in right}

        return replace(unshared, numbers=numbers)

    with warnings.catch_warnings(action="ignore"):  # FlexAttention says that it is not compiled
        return run_suite(suite, SETTINGS)


def test_arms_agree_or_say_why_not(record):
    assert "attention" in find_suites()
    assert {result["case"] for result in record["results"]} == {"plain", "window", "soft-cap"}
    ran = set()
    for result in record["results"]:
        arm, backward, softcap = result["arm"], PASSES[result["pass"]], result["shapes"].get("softcap")
        if arm == "plain causal" or (arm == "gradients of copies not added up" and backward and not softcap):
            assert result["outcome"] == "wrong", result
        elif arm in FLASH:
            assert result["outcome"] in ("not installed", "unsupported"), result
        elif arm in UNSUPPORTED or (arm == "FlexAttention" and backward) or (arm in NO_SOFTCAP and softcap):
            assert result["outcome"] == "unsupported" and result["detail"], result
        elif arm != "gradients of copies not added up":
            assert result["outcome"] == "ok", result
            assert set(result.get("errors", ())) in (set(), {"out"}, {"out", "dq", "dk", "dv"})
            ran.add((arm, result["pass"]))
    assert len(ran) == 4 * len(PASSES) + 1  # oracle, reference, SDPA with and without sharing; FlexAttention


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("arm", ["varlen", "gathered_varlen", "flash"])
def test_books_of_the_arms_for_gpus(arm, window, monkeypatch):
    """The same numbers, with a plain PyTorch kernel where theirs needs a GPU."""

    def varlen_attn(q, k, v, *lengths, window_size, enable_gqa):
        assert enable_gqa and window_size[1] == 0
        gather = Gather(window_size[0] + 1 or None, *[None] * 3, *lengths)
        return plain_forward(q, k, v, gather, q.shape[2] ** -0.5, 0.0)[0]

    case = Case("", TREE | HEADS | {"window": window})
    made = attention.inputs(case, SETTINGS, 0)
    exact = attention.oracle(made, True)
    expected = exact.numbers(exact.run())
    monkeypatch.setattr(attention.Inputs, "on_gpu", True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(flash_attention, "load", lambda version: PLAIN)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    prepared = attention.flash(3, made, True) if arm == "flash" else getattr(attention, arm)(made, True)
    numbers = prepared.numbers(prepared.run())
    assert numbers.keys() == expected.keys() == {"out", "dq", "dk", "dv"}
    for name, number in numbers.items():
        assert_exact(number, expected[name].double(), name, slack=4)


def test_what_is_counted(record):
    plan = attention.plan_of(CASES[1])
    i = torch.arange(len(plan.position_ids))
    visible = (i <= i[:, None]) & (i[:, None] < plan.subtree_end)
    visible &= plan.position_ids[:, None] - plan.position_ids < 9
    results = {(r["arm"], r["pass"]): r for r in record["results"] if r["case"] == "window"}
    forward, both = (results["ours, reference", name] for name in PASSES)
    assert forward["flops"] == 4 * 6 * 8 * int(visible.sum()) and both["flops"] == 3.5 * forward["flops"]
    T = len(i)
    assert forward["bytes"] == 4 * 8 * T * (6 + 2 + 2 + 6)
    assert both["bytes"] == forward["bytes"] + 4 * 8 * T * (6 + 2 + 2 + 6 + 6 + 6 + 2 + 2)
    assert forward["facts"] == {"queries": T, "keys": T}
    # Sequences of 8, 13, 18 and 23 tokens, padded to 23. Side branches begin at 15, 10 and 5 and see 8 tokens before.
    assert results["SDPA, unshared", "forward"]["facts"]["queries"] == 4 * 23
    assert results["gathered K/V + SDPA", "forward"]["facts"]["keys"] == 23 + (8 + 3) + (8 + 3) + (5 + 3)


def test_trees_are_laid_out_as_packs_are():
    group = Group(
        [[1, 2, 3, 10 + j, 20 + j] for j in range(3)], [[30 + k, 40 + k, 50 + k] for k in range(4)], [0, 1, 2, 0]
    )
    expected = pack([group, group]).plan
    node = trees.group(3, 3, 2, 4, 3)
    plan = trees.fill(node, 2 * node.tokens + 1)
    assert plan.nodes.equal(expected.nodes) and plan.position_ids.equal(expected.position_ids)
    chain = trees.fill(trees.chain(2, 3, 1), 0)
    assert chain.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 3]
    assert chain.subtree_end.tolist() == [8, 8, 8, 7, 7, 7, 7, 8]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_fit(device):
    made = attention.cases(Settings(device=device))
    assert len({case.name for case in made}) == len(made) and any(case.quick for case in made)
    for case in made:
        T = len(attention.plan_of(case).position_ids)
        assert 500 < T <= max(case.shapes["tokens"], 1 << 15)
        assert case.shapes["tokens"] == 0 or 0.7 * case.shapes["tokens"] < T
        assert case.dtype in attention.SUITE.limits


def test_numbers_of_a_large_pack_come_from_all_of_it():
    made = attention.inputs(Case("", {"group": (64, 1, 0, 64, 65), "tokens": 0} | HEADS), SETTINGS, 0)
    sample = made.sample.tolist()
    assert len(sample) == attention._SAMPLE == len(set(sample)) and max(np.diff(sample)) < 6
    numbers = made.prepared(lambda: None, False).numbers((made.q,))
    assert numbers["out"].equal(made.q[made.sample])
    assert isinstance(made.prepared(lambda: None, False), Prepared)
