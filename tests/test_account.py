"""The account of a step on the CPU, on a model of milliseconds."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from factory import random_group
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).parent.parent))  # benchmarks/ is not installed

from benchmarks import account
from benchmarks.end_to_end import Inputs
from benchmarks.harness import write_record
from benchmarks.report import markdown
from benchmarks.suite import Case, Settings


def inputs(case, settings, seed) -> Inputs:
    sizes = dict(vocab_size=997, hidden_size=256, intermediate_size=768, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).eval()
    group = random_group(np.random.default_rng(seed), 3, 3, query=120, constitution=40, response=40, vocab=997)
    return Inputs(model, group, "cpu")


def test_parts_add_up_to_the_step_and_are_found(tmp_path):
    made = account.record([Case("small", {})], Settings(threads=1, quick=True), inputs)
    for pass_name in ("forward", "forward+backward"):
        whole, *parts = [row for row in made["results"] if row["pass"] == pass_name]
        assert whole["arm"] == account.STEP and [row["arm"] for row in parts] == list(account.PARTS)
        seconds = {row["arm"]: row["seconds"]["best"] for row in parts}
        assert sum(seconds.values()) == pytest.approx(whole["seconds"]["best"], rel=0.02)
        assert seconds[account.PRODUCTS] > 0.1 * whole["seconds"]["best"] and min(seconds.values()) > 0
        assert sum(row["flops"] for row in parts) == pytest.approx(whole["flops"])
        assert parts[3]["bytes"] > 0 and parts[3]["ceiling"] == "copy"
    written = json.loads(write_record(made, tmp_path).read_text())
    assert "| attention |" in markdown(written) and "share of step" in markdown(written)


def test_time_belongs_to_the_op_that_it_is_spent_in():
    made = inputs(None, None, 0)
    with torch.profiler.profile() as profiler:
        step = account.end_to_end.prefix_tree(made, True)
        step.run()
    products = [event for event in profiler.events() if event.name in ("aten::mm", "aten::addmm_")]
    parts = {account.part_of(event) for event in products}
    assert parts == {account.PRODUCTS, account.HEAD}  # the head's own products are the head's
    flash = [event for event in profiler.events() if "flash_attention" in event.name]
    assert flash and {account.part_of(event) for event in flash} == {account.ATTENTION}
