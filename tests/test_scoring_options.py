"""Scoring under checkpointing, adapters, wrappers and compilation, and against a reference model."""

import contextlib
import copy

import oracle
import pytest
import torch
from factory import tiny_model
from scored_models import ADAPTERS, adapted, assert_exact_on, gradients, objective, two_trees
from tolerance import assert_as_good_as, assert_exact, assert_same_gradients, assert_same_scores, flat
from torch import nn

from sami_fast import pack
from sami_fast.kernels import prefix_attention_reference
from sami_fast.scoring import score

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "gpt2", "opt", "gpt_neox"])
def test_gradient_checkpointing_changes_nothing(family, use_reentrant):
    model, packs = tiny_model(family), [pack(two_trees(seed)) for seed in range(2)]
    ids = torch.arange(12)[None]

    def step():
        # Both backwards run when the scoring is over and a plain forward has come between.
        first = score(model, packs[0]).matrices
        plain = model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum()
        second = score(model, packs[1]).matrices
        return [*first, *second], gradients(model, objective(first) + 0.1 * plain + objective(second))

    expected, expected_gradients = step()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    functions = [m._gradient_checkpointing_func for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]
    model.train()
    passes = []
    layer = next(m for m in model.modules() if isinstance(m, nn.ModuleList))[0]
    leaf = next(m for m in layer.modules() if not any(m.children()))
    leaf.register_forward_pre_hook(lambda *_: passes.append(1))
    actual, actual_gradients = step()
    assert len(passes) == 6, "expected every pass through the layer to be repeated in the backward"
    assert_same_scores(actual, expected)
    assert_same_gradients(actual_gradients, expected_gradients)
    after = [m._gradient_checkpointing_func for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]
    assert after == functions


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_exact_with_adapters(name, tied):
    model = adapted(tiny_model(tie_word_embeddings=tied), **ADAPTERS[name])
    assert_exact_on(model, two_trees())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and gradients(model, objective(score(model, pack(two_trees())).matrices)).keys() == set(trained)


@pytest.mark.parametrize("name", ["attention", "head", "saved head"])
def test_adapters_on_a_16_bit_model_are_as_good_as_the_plain_forward(name):
    scores, grads = [], []
    for seed in range(4):
        model, groups = adapted(tiny_model(dtype=torch.bfloat16, seed=seed), **ADAPTERS[name]), two_trees(seed)
        wide = copy.deepcopy(model).double()
        runs = [
            (model, score(model, pack(groups)).matrices),
            (model, oracle.matrices(model, groups)),
            (wide, oracle.matrices(wide, groups)),
        ]
        scores.append([flat(matrices) for _, matrices in runs])
        grads.append([flat(gradients(m, objective(matrices)).values()) for m, matrices in runs])
    for what, results in (("scores", scores), ("gradients", grads)):
        assert_as_good_as(*(torch.cat(part) for part in zip(*results, strict=True)), what)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_adapters_under_gradient_checkpointing(use_reentrant):
    model = adapted(tiny_model(), **ADAPTERS["head"])
    packed = pack(two_trees())
    expected = gradients(model, objective(score(model, packed).matrices))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model.train()
    assert_same_gradients(gradients(model, objective(score(model, packed).matrices)), expected)


def test_kept_attention_is_not_computed_again(monkeypatch):
    model, packed = tiny_model(), pack(two_trees())
    expected = gradients(model, objective(score(model, packed).matrices))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    forward, calls = prefix_attention_reference.prefix_attention_forward, []
    monkeypatch.setattr(
        prefix_attention_reference, "prefix_attention_forward", lambda *args: calls.append(1) or forward(*args)
    )
    for keep, times in ((False, 2), (True, 1)):
        calls.clear()
        scores = score(model, packed, keep_attention=keep)
        assert_same_gradients(gradients(model, objective(scores.matrices)), expected)
        assert len(calls) == times * model.config.num_hidden_layers


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "phi"])
def test_a_frozen_head_gives_the_rest_the_same_gradients(family):
    model, packed = tiny_model(family, tie_word_embeddings=False), pack(two_trees())
    everything = gradients(model, objective(score(model, packed).matrices))
    model.get_output_embeddings().requires_grad_(False)
    rest = gradients(model, objective(score(model, packed).matrices))
    assert set(everything) - set(rest) == {n for n, p in model.named_parameters() if not p.requires_grad}
    assert_same_gradients(rest, {name: everything[name] for name in rest})


def test_a_parallel_wrapper_is_looked_through():
    model, packed = tiny_model(), pack(two_trees())
    assert_exact(score(nn.DataParallel(model), packed).token_logprobs, score(model, packed).token_logprobs)


def test_a_compiled_model_is_looked_through():
    model, packed = tiny_model(), pack(two_trees())
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    assert_exact(score(compiled, packed).token_logprobs, score(model, packed).token_logprobs)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_model_scores_in_one_graph(family):
    model, packed = tiny_model(family), pack(two_trees())
    expected = gradients(model, objective(score(model, packed).matrices))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_gradients(gradients(model, objective(score(compiled, packed).matrices)), expected)


KL_CASES = {
    "another size": lambda: (tiny_model(), tiny_model(seed=1, hidden_size=16)),
    "tied": lambda: (tiny_model(tie_word_embeddings=True), tiny_model(seed=1, tie_word_embeddings=True)),
    "head bias": lambda: (tiny_model("phi"), tiny_model("phi", seed=1)),
    "soft-cap": lambda: (tiny_model("gemma2"), tiny_model("gemma2", seed=1)),
    "logits divided": lambda: (tiny_model("granite"), tiny_model("granite", seed=1)),
    "logits multiplied": lambda: (tiny_model("cohere"), tiny_model("cohere", seed=1)),
    "another scale": lambda: (tiny_model("cohere"), tiny_model("llama", seed=1)),
    "another soft-cap": lambda: (tiny_model("llama"), tiny_model("gemma2", seed=1)),
    "adapters against another model": lambda: (adapted(tiny_model(), **ADAPTERS["head"]), tiny_model(seed=1)),
    **{
        f"adapters on {name} against none": lambda name=name: (adapted(tiny_model(), **ADAPTERS[name]), None)
        for name in ADAPTERS
    },
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("name", KL_CASES)
def test_kl_to_a_reference_model(name):
    model, reference = KL_CASES[name]()
    groups = two_trees()
    plain = oracle.token_logits(model, groups)
    with torch.no_grad(), model.disable_adapter() if reference is None else contextlib.nullcontext():
        plain_reference = oracle.token_logits(model if reference is None else reference, groups)
    expected = oracle.kl(plain, plain_reference)
    scores = score(model, pack(groups), ref_model=model if reference is None else reference)
    assert_same_scores([scores.kl], [expected], "kl")
    assert_same_scores(scores.matrices, oracle.matrices(model, groups))
    assert_same_gradients(gradients(model, objective([scores.kl])), gradients(model, objective([expected])))
    # Both losses at once, as training sums them.
    scores = score(model, pack(groups), ref_model=model if reference is None else reference)
    expected = (
        objective(oracle.matrices(model, groups))
        + oracle.kl(oracle.token_logits(model, groups), plain_reference).mean()
    )
    assert_same_gradients(gradients(model, objective(scores.matrices) + scores.kl.mean()), gradients(model, expected))
    if reference is not None:
        assert all(p.grad is None for p in reference.parameters())


def test_kl_to_itself_is_zero_and_needs_adapters():
    model, packed = tiny_model(), pack(two_trees())
    scores = score(model, packed, ref_model=copy.deepcopy(model))
    assert scores.kl.abs().max().item() < 1e-12
    with pytest.raises(ValueError, match="ref_model: LlamaForCausalLM has no adapters to disable"):
        score(model, packed, ref_model=model)
    with pytest.raises(ValueError, match="ref_model: expected a vocabulary of 97 as the model has, got 120"):
        score(model, packed, ref_model=tiny_model(vocab_size=120))
