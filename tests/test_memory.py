"""The formula of a step's peak memory against what a step takes, counted."""

import contextlib

import numpy as np
import pytest
import torch
from factory import random_group
from peak_memory import PeakMemory
from transformers import LlamaConfig, LlamaForCausalLM

from sami_fast import SamiConfig, SamiTrainer, infonce_loss, pack, score
from sami_fast.memory import estimate_memory

POLICIES = {
    "nothing computed again": {},
    "layers": dict(gradient_checkpointing=True),
    "layers, attention kept": dict(gradient_checkpointing=True, keep_attention=True),
}


def llama(dtype=torch.float32, **options) -> LlamaForCausalLM:
    sizes = dict(vocab_size=997, hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4)
    config = LlamaConfig(**sizes | dict(num_key_value_heads=2, max_position_embeddings=4096) | options)
    return LlamaForCausalLM(config).to(dtype).train()


def config(folder, **options) -> SamiConfig:
    common = dict(output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no")
    return SamiConfig(**common | options)


def packs(groups: int) -> list:
    rng = np.random.default_rng(groups)
    lengths = dict(query=300, constitution=60, response=60)
    return [pack([random_group(rng, 3, 3, **lengths) for _ in range(groups)]) for _ in range(2)]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("groups", [2, 4])
def test_activations_take_what_the_formula_says(tmp_path, policy, dtype, groups):
    args = config(tmp_path, **POLICIES[policy], master_weights="fp32" if dtype == "autocast" else "none")
    model = llama(torch.float32 if dtype == "float32" else torch.bfloat16)
    measured_on = packs(groups)
    T, N = measured_on[1].num_tokens, len(measured_on[1].labels)
    estimate = estimate_memory(model, args, tokens=T, scored_tokens=N)
    if dtype == "autocast":
        model.float()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    score(model, measured_on[0])  # the first call of a model also checks it
    for packed in measured_on:  # the second finds gradients in place
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        with PeakMemory(*model.parameters(), *gradients) as counter:
            with torch.autocast("cpu", torch.bfloat16) if dtype == "autocast" else contextlib.nullcontext():
                loss = infonce_loss(score(model, packed, keep_attention=args.keep_attention)).loss
            loss.backward()
            del loss
    assert 0.92 < counter.peak / estimate.activations < 1.04


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vocab", [2000, 40000])
def test_heads_take_what_the_formula_says(tmp_path, vocab, tied):
    args = config(tmp_path, master_weights="none")
    model = llama(vocab_size=vocab, hidden_size=64, num_hidden_layers=1, tie_word_embeddings=tied)
    lengths = dict(query=30, constitution=9, response=9) if vocab > 2000 else dict(response=80)
    packed = pack([random_group(np.random.default_rng(0), 4, 4, **lengths)])
    estimate = estimate_memory(model, args, tokens=packed.num_tokens, scored_tokens=len(packed.labels))
    for _ in range(2):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        with PeakMemory(*model.parameters(), *gradients) as counter:
            infonce_loss(score(model, packed)).loss.backward()
    assert 0.92 < counter.peak / estimate.activations < 1.04


@pytest.mark.parametrize(
    "options",
    [
        dict(optim="rmsprop"),
        dict(optim="adamw_torch", master_weights="none"),
        dict(optim="sgd"),
        dict(optim="rmsprop", master_weights="kahan"),
    ],
    ids=str,
)
def test_weights_gradients_and_states_take_what_the_formula_says(tmp_path, options):
    if options.get("master_weights") == "kahan":
        pytest.importorskip("optimi")
    args = config(tmp_path, max_steps=1, per_device_train_batch_size=2, check_model=False, **options)
    model = llama(torch.bfloat16, num_hidden_layers=1)
    model.model.embed_tokens.requires_grad_(False)
    estimate = estimate_memory(model, args, tokens=100, scored_tokens=100)
    rng = np.random.default_rng(0)
    trainer = SamiTrainer(model, args, [random_group(rng, 2, 2) for _ in range(2)])
    trainer.train()
    states = [t for s in trainer.optimizer.optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    assert estimate.weights == sum(p.nbytes for p in model.parameters())
    assert estimate.gradients == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert estimate.optimizer == sum(t.nbytes for t in states if t.dim() > 0)


def test_a_budget_is_planned_on_the_meta_device(tmp_path):
    with torch.device("meta"):
        model = llama(torch.bfloat16, hidden_size=4096, intermediate_size=14336, num_attention_heads=32)
    configs = [config(tmp_path, **policy) for policy in POLICIES.values()]
    estimates = [estimate_memory(model, args, tokens=16384, scored_tokens=8192) for args in configs]
    none, layers, kept = (estimate.activations for estimate in estimates)
    assert none > kept > layers
    parts = {(estimate.weights, estimate.gradients, estimate.optimizer) for estimate in estimates}
    assert parts == {(4 * sum(p.numel() for p in model.parameters()),) * 3}
    assert "GB (weights" in str(estimates[0])


def test_what_the_formula_does_not_know_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"optim: expected one of .*, got 'adafactor'"):
        estimate_memory(llama(), config(tmp_path, optim="adafactor"), tokens=1, scored_tokens=1)
    model = llama()
    model.config.num_local_experts = 4
    with pytest.raises(ValueError, match="expected layers without experts"):
        estimate_memory(model, config(tmp_path), tokens=1, scored_tokens=1)
