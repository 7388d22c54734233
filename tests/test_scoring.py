import contextlib
import copy
import dataclasses

import numpy as np
import oracle
import peft
import pytest
import torch
from factory import FAMILIES, perturbed, random_group, tiny_config, tiny_model
from factory import groups as random_groups
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_good_as, assert_exact, assert_same_gradients, assert_same_scores, flat
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention

from sami_fast import Group, pack, prefix_tree
from sami_fast.kernels import prefix_attention_reference
from sami_fast.prefix_tree import AttentionPlan
from sami_fast.scoring import Scores, UnsupportedModelError, check_model, score

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")


def two_trees(seed: int = 0) -> list[Group]:
    """A masked query-first group and a constitution-first one, of different shapes, longer than the tiny windows."""
    rng = np.random.default_rng(seed)
    return [random_group(rng, 3, 4, masked=True), random_group(rng, 2, 2, query_first=False)]


def objective(matrices: list[torch.Tensor]) -> torch.Tensor:
    """Scalar whose gradient reaches every scored pair with a weight of its own."""
    entries = flat(matrices)
    weights = torch.from_numpy(np.random.default_rng(1).standard_normal(entries.shape)).to(entries)
    return (entries * weights)[entries.isfinite()].sum()


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of the trainable parameters that the loss depends on, by name; through `.grad`, as training does."""
    model.zero_grad()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_exact_on(model: nn.Module, groups: list[Group], normalize: str = "mean") -> None:
    """Scores and gradients of all parameters against a plain forward of every sequence."""
    expected = oracle.matrices(model, groups, normalize)
    actual = score(model, pack(groups), normalize=normalize).matrices
    assert_same_scores(actual, expected)
    assert_same_gradients(gradients(model, objective(actual)), gradients(model, objective(expected)))


# --------------------------------------------------------------------------------------------------------------------
# Exactness


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_on_family(family):
    assert_exact_on(tiny_model(family), two_trees())


def trees() -> dict[str, list[Group]]:
    rng = np.random.default_rng(2)
    query, tail = rng.integers(0, 97, 9), rng.integers(0, 97, 5)
    return {
        "query-first": [random_group(rng, 4, 4)],
        "constitution-first": [random_group(rng, 4, 4, query_first=False)],
        "masked": [random_group(rng, 3, 5, masked=True), random_group(rng, 3, 3, query_first=False, masked=True)],
        "groups": [random_group(rng, C, R, query=q) for C, R, q in ((1, 1, 1), (2, 5, 12), (4, 4, 3), (2, 2, 20))],
        "duplicates": [
            Group([query, query], [tail, tail, tail], [0, 1, 0]),
            # Prompts and responses that are prefixes of each other, and a prompt that runs on as the other's response.
            Group([query, np.r_[query, tail]], [np.r_[tail, 7], tail[:1], tail, np.r_[tail, tail]], [0, 1, 0, 1]),
        ],
        "one token": [Group([[5]], [[6]]), Group([[5], [6]], [[6], [5]])],
        "a chain": [Group([[3]], [[3] * n for n in (1, 2, 3, 12)], [0] * 4)],
    }


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("name", trees())
def test_exact_on_trees(name, family):
    assert_exact_on(tiny_model(family), trees()[name])


@pytest.fixture(scope="module", params=["llama", "mistral"])
def small_window_model(request):
    return tiny_model(request.param, sliding_window=3)


@settings(max_examples=15)
@given(groups=st.lists(random_groups(), min_size=1, max_size=2))
def test_exact_on_random_trees(small_window_model, groups):
    model = small_window_model
    with torch.no_grad():
        assert_same_scores(score(model, pack(groups)).matrices, oracle.matrices(model, groups))


@pytest.mark.parametrize("normalize", ["mean", "sum"])
def test_normalize(normalize):
    assert_exact_on(tiny_model(), two_trees(), normalize)
    with pytest.raises(ValueError, match='normalize: expected "mean" or "sum", got \'max\''):
        score(tiny_model(), pack(two_trees()), normalize="max")


def test_scores_come_in_the_shapes_of_their_groups():
    rng, model = np.random.default_rng(3), tiny_model(dtype=torch.float32)
    ragged = score(model, pack(two_trees()))
    assert ragged.token_logprobs.dtype == torch.float32 and (ragged.token_logprobs <= 0).all()
    assert [m.shape for m in ragged.matrix] == [(3, 4), (2, 2)] and ragged.kl is None
    alike = score(model, pack([random_group(rng, 2, 3) for _ in range(4)]))
    assert isinstance(alike, Scores) and alike.matrix.shape == (4, 2, 3)
    assert_same_scores(list(alike.matrix), alike.matrices)


def test_packs_one_by_one_give_what_one_pack_gives():
    model, groups = tiny_model("mistral"), [g for part in trees().values() for g in part]
    together = score(model, pack(groups)).matrices
    assert_same_scores([score(model, pack([g])).matrices[0] for g in groups], together)


# --------------------------------------------------------------------------------------------------------------------
# Gradient checkpointing, precision


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


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text", "olmo2", "gpt_neox", "granite", "phi"])
def test_16_bit_is_as_good_as_the_plain_forward(family, autocast):
    scores, grads = [], []  # of several models, so that no rounding decides: (ours, plain forward, float64)
    for seed in range(4):
        groups = two_trees(seed)
        model = tiny_model(family, dtype=torch.float32 if autocast else torch.bfloat16, seed=seed)
        wide = copy.deepcopy(model).double()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours, plain = score(model, pack(groups)).matrices, oracle.matrices(model, groups)
        runs = [(model, ours), (model, plain), (wide, oracle.matrices(wide, groups))]
        assert ours[0].dtype == torch.float32
        grads.append([flat(gradients(m, objective(matrices)).values()) for m, matrices in runs])
        scores.append([flat(matrices) for _, matrices in runs])
    for name, results in (("scores", scores), ("gradients", grads)):
        assert_as_good_as(*(torch.cat(part) for part in zip(*results, strict=True)), name)


# --------------------------------------------------------------------------------------------------------------------
# Heads and adapters

ADAPTERS = {
    "attention": dict(target_modules=["q_proj", "v_proj"]),
    "all linear layers": dict(target_modules="all-linear"),
    "head": dict(target_modules=["q_proj", "lm_head"]),
    "head with DoRA": dict(target_modules=["lm_head"], use_dora=True),
    "saved head": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "trained tokens": dict(target_modules=["q_proj"], trainable_token_indices=[3, 5, 7]),
}


def adapted(model: nn.Module, **options) -> nn.Module:
    """The model with random LoRA adapters in eval mode."""
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


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


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "phi"])
def test_exact_with_tied_and_untied_heads(family, tied):
    model = tiny_model(family, tie_word_embeddings=tied)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert_exact_on(model, two_trees())


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "phi"])
def test_a_frozen_head_gives_the_rest_the_same_gradients(family):
    model, packed = tiny_model(family, tie_word_embeddings=False), pack(two_trees())
    everything = gradients(model, objective(score(model, packed).matrices))
    model.get_output_embeddings().requires_grad_(False)
    rest = gradients(model, objective(score(model, packed).matrices))
    assert set(everything) - set(rest) == {n for n, p in model.named_parameters() if not p.requires_grad}
    assert_same_gradients(rest, {name: everything[name] for name in rest})


@pytest.mark.parametrize("method", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_virtual_tokens_are_refused(method):
    options = dict(encoder_hidden_size=8) if method == "PromptEncoderConfig" else {}
    config = getattr(peft, method)(num_virtual_tokens=3, task_type="CAUSAL_LM", **options)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM"):
        score(peft.get_peft_model(tiny_model(dtype=torch.float32), config), pack(two_trees()))


def test_a_sharded_head_is_refused_by_name(tmp_path):
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tiny_model(tie_word_embeddings=False)
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)]))
        with pytest.raises(ValueError, match=r"output embedding is sharded \(DTensor\)"):
            score(model, pack(two_trees()))
    finally:
        torch.distributed.destroy_process_group()


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


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_exact_on_a_class_made_of_a_family(family):
    # As sharding wrappers and users make them: the class is not in the family's own module.
    model = tiny_model(family)
    model.__class__ = type("Sharded" + type(model).__name__, (type(model),), {})
    assert_exact_on(model, two_trees())


# --------------------------------------------------------------------------------------------------------------------
# Reference model

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


# --------------------------------------------------------------------------------------------------------------------
# The model is left as it was found


def multimodal() -> nn.Module:
    """A text model inside a vision-language model: configs within configs, each with an attention setting."""
    text = tiny_config("gemma3_text").to_dict()
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=28)
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=dict(patch_size=14, **vision), mm_tokens_per_image=4
    )
    settings = {"text_config": "eager", "vision_config": "sdpa"}
    return perturbed(AutoModelForCausalLM.from_config(config, attn_implementation=settings, dtype=torch.float32))


def settings_of(config) -> list[str]:
    """Attention settings of a config and of all inside it."""
    parts = [part for name in config.sub_configs if (part := getattr(config, name, None)) is not None]
    return [config._attn_implementation, *(setting for part in parts for setting in settings_of(part))]


def traces(model: nn.Module) -> list:
    """All that scoring touches for the time of a call."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_gradient_checkpointing_func", "forward")
    held = [{name: m.__dict__.get(name) for name in names} for m in model.modules()]
    parts = [{name: dict(v) if isinstance(v, dict) else v for name, v in part.items()} for part in held]
    needs = [p.requires_grad for p in model.parameters()]
    return [settings_of(model.config), parts, [m.training for m in model.modules()], needs]


LEFT_AS_FOUND = {
    "llama": tiny_model,
    "llama, eager": lambda: tiny_model(attn_implementation="eager"),
    "gpt2": lambda: tiny_model("gpt2"),
    "gemma2": lambda: tiny_model("gemma2", dtype=torch.float32),
    "gpt_oss": lambda: tiny_model("gpt_oss"),
    "multimodal": multimodal,
    "adapters": lambda: adapted(tiny_model(), **ADAPTERS["saved head"]),
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", LEFT_AS_FOUND)
def test_the_model_is_left_as_it_was_found(name, checkpointing):
    model, ids = LEFT_AS_FOUND[name](), torch.arange(3, 15)[None]
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def behaviour():
        generated = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        return model(input_ids=ids).logits, model(input_ids=generated, use_cache=False).logits, generated

    before, found = behaviour(), traces(model)
    model.train(checkpointing)
    scores = score(model, pack(two_trees()), ref_model=model if name == "adapters" else None)
    model.train(False)
    assert traces(model) == found
    objective(scores.matrices).backward()
    assert traces(model) == found
    check_model(model.train())
    assert all(m.training for m in model.modules())
    model.eval()
    assert traces(model) == found
    for a, b in zip(behaviour(), before, strict=True):
        assert torch.equal(a, b)


class Boom(Exception):
    pass


@pytest.mark.parametrize("where", ["embedding", "first layer", "last layer", "head", "backward"])
def test_the_model_is_left_as_it_was_found_by_errors(where):
    model, ids, packed = tiny_model(), torch.arange(3, 15)[None], pack(two_trees())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    logits = model(input_ids=ids, use_cache=False).logits
    layers = model.model.layers
    places = {"embedding": model.model.embed_tokens, "first layer": layers[0].self_attn.q_proj, "head": model.lm_head}
    loss = objective(score(model, packed).matrices) if where == "backward" else None

    def explode(*_):
        raise Boom("boom")

    handle = places.get(where, layers[1].mlp).register_forward_pre_hook(explode)
    found = traces(model)
    with pytest.raises(Boom):
        loss.backward() if where == "backward" else score(model, packed)
    assert traces(model) == found
    handle.remove()
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, logits)
    assert_exact_on(model.eval(), two_trees())


# --------------------------------------------------------------------------------------------------------------------
# Refusals

SMALL = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
REFUSED = {
    # Attention of their own: they would ignore the tree in silence.
    "BloomForCausalLM": dict(family="bloom"),
    "FalconForCausalLM": dict(family="falcon"),
    "MptForCausalLM": dict(family="mpt"),
    "GPTJForCausalLM": dict(family="gptj", rotary_dim=4),
    "GPTNeoForCausalLM": dict(
        family="gpt_neo", num_layers=2, attention_types=[[["global", "local"], 1]], max_position_embeddings=64
    ),
    # Keyword arguments dropped on the way, or a mask of their own.
    "NemotronAttention": dict(family="nemotron", intermediate_size=48, num_key_value_heads=2, head_dim=8),
    "DogeForCausalLM": dict(family="doge", intermediate_size=48, num_key_value_heads=2),
    # State outside of attention.
    "MambaForCausalLM": dict(family="mamba"),
    "FalconH1ForCausalLM": dict(family="falcon_h1", intermediate_size=48, num_key_value_heads=2),
    "RecurrentGemmaForCausalLM": dict(
        family="recurrent_gemma", intermediate_size=48, lru_width=32, num_hidden_layers=3
    ),
    "Lfm2ForCausalLM": dict(
        family="lfm2", intermediate_size=48, num_key_value_heads=2, layer_types=["conv", "full_attention"]
    ),
    # Attention in both directions, positions that are not ours, windows that the attention is not told.
    "BertLMHeadModel": dict(family="bert", intermediate_size=48),
    "BartForCausalLM": dict(
        family="bart", d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, pad_token_id=1
    ),
    "PhimoeForCausalLM": dict(
        family="phimoe", intermediate_size=48, num_key_value_heads=2, num_local_experts=4, sliding_window=6
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_families_are_refused_by_name(name):
    options = SMALL | REFUSED[name]
    config = AutoConfig.for_model(options.pop("family"), **options)
    model = perturbed(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    with pytest.raises(UnsupportedModelError, match=f"model: {name} "):
        score(model, pack(two_trees()))


def test_what_is_no_causal_lm_is_refused():
    sizes = dict(vocab_size=97, d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4)
    encoder_decoder = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes))
    with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration is an encoder-decoder"):
        score(encoder_decoder, pack(two_trees()))
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no output embeddings"):
        score(LlamaModel(tiny_config("llama")), pack(two_trees()))


class OwnAttention(LlamaAttention):
    """Attends by itself."""

    def forward(self, hidden_states, position_embeddings, **kwargs):
        return self.o_proj(self.q_proj(hidden_states).cumsum(1)), None


class DeafAttention(LlamaAttention):
    """Drops the keyword arguments that it does not know."""

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        return super().forward(hidden_states, position_embeddings, attention_mask)


class NarrowAttention(LlamaAttention):
    """Passes on a window that its model's mask does not have."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, sliding_window=4, **kwargs)


class DoubledLlama(LlamaForCausalLM):
    """Has logits that its config does not tell."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


class DisplacedLlama(LlamaForCausalLM):
    """Makes its own positions of those it is given."""

    def forward(self, *args, position_ids=None, **kwargs):
        return super().forward(*args, **kwargs)


def test_a_single_layer_that_does_not_attend_through_the_interface_is_noticed():
    model = tiny_model()
    model.model.layers[1].self_attn.__class__ = OwnAttention
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM .*: 1 of its 2 layers attend through"):
        score(model, pack(two_trees()))


def test_a_layer_that_drops_our_arguments_is_named():
    model = tiny_model()
    model.model.layers[1].self_attn.__class__ = DeafAttention
    with pytest.raises(UnsupportedModelError, match="DeafAttention dropped the keyword arguments"):
        score(model, pack(two_trees()))


def test_logits_that_the_config_does_not_tell_are_refused():
    model = perturbed(DoubledLlama(tiny_config("llama")).double())
    with pytest.raises(UnsupportedModelError, match=r"DoubledLlama .* its logits are not"):
        score(model, pack(two_trees()))


def test_attention_dropout_is_refused_in_training_only():
    model = tiny_model(attention_dropout=0.1)
    assert_exact_on(model, two_trees())
    with pytest.raises(ValueError, match=r"attention dropout must be 0 to score exactly, got 0.1 in LlamaAttention"):
        score(model.train(), pack(two_trees()))


def test_packs_that_do_not_fit_the_model_are_refused():
    model = tiny_model()
    bad = {
        "packed: expected token ids below the vocabulary size 97, got 97": [Group([[1, 97]], [[2, 3]])],
        "packed: expected token ids below the vocabulary size 97, got 98": [Group([[1]], [[2, 98]])],  # a label only
        "packed: expected sequences of at most 64 tokens, .* of LlamaForCausalLM, got 65": [
            Group([[1] * 60], [[2] * 5])
        ],
    }
    for message, groups in bad.items():
        with pytest.raises(ValueError, match=message):
            score(model, pack(groups))
    with torch.no_grad():
        assert score(model, pack([Group([[1] * 60], [[2] * 4])])).token_logprobs.isfinite().all()
    with pytest.raises(ValueError, match="packed: expected tensors on cpu as the model is, got meta"):
        score(model, pack(two_trees()).to("meta"))
    with pytest.raises(ValueError, match="backend: expected one of"):
        score(model, pack(two_trees()), backend="magic")


def test_weights_that_are_not_finite_show_in_the_scores():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(torch.nan)
    assert score(model, pack(two_trees())).token_logprobs.isnan().all()


# --------------------------------------------------------------------------------------------------------------------
# Guard of last resort


@pytest.mark.parametrize("family", FAMILIES)
def test_check_model_passes_what_is_right(family):
    assert 0 <= check_model(tiny_model(family)) < 1e-6
    for seed in range(3):
        assert check_model(tiny_model(family, dtype=torch.bfloat16, seed=seed), seed=seed) > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert check_model(tiny_model(family, dtype=torch.float32)) > 0


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss"])
def test_check_model_tells_rounding_from_mistakes(family):
    # Deep models in 16 bit, where rounding sends some tokens to other experts in either way of scoring.
    for seed in range(3):
        options = dict(num_hidden_layers=12, hidden_size=64, layer_types=None)
        check_model(tiny_model(family, dtype=torch.bfloat16, seed=seed, **options), seed=seed)


def test_check_model_takes_a_quantized_model_as_it_is():
    model = tiny_model(dtype=torch.bfloat16)
    model.is_quantized = True  # transformers then refuses to change its dtype
    assert check_model(model) > 0


def siblings_seen(monkeypatch, model):
    """A plan in which every token sees all before it."""
    build = AttentionPlan.build

    def careless(subtree_end, position_ids):
        T = len(subtree_end)
        plan = build(np.full(T, T), np.arange(T))
        return dataclasses.replace(plan, position_ids=torch.from_numpy(position_ids).int())

    monkeypatch.setattr(AttentionPlan, "build", careless)


def positions_in_packed_order(monkeypatch, model):
    concatenate = prefix_tree._concatenate

    def shifted(trees):
        packed = concatenate(trees)
        return dataclasses.replace(packed, position_ids=torch.arange(packed.num_tokens))

    monkeypatch.setattr(prefix_tree, "_concatenate", shifted)


def another_window(monkeypatch, model):
    model.model.layers[1].self_attn.__class__ = NarrowAttention


def own_positions(monkeypatch, model):
    model.__class__ = DisplacedLlama


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mistake", [siblings_seen, positions_in_packed_order, another_window, own_positions])
def test_check_model_notices(mistake, dtype, monkeypatch):
    model = tiny_model(dtype=dtype)
    check_model(model)
    mistake(monkeypatch, model)
    with pytest.raises(UnsupportedModelError, match=r"Llama.* scores a prefix tree differently .* relative difference"):
        check_model(model)


def test_check_model_notices_families_with_positions_of_their_own():
    config = AutoConfig.for_model("roberta", **SMALL, intermediate_size=48, is_decoder=True, pad_token_id=1)
    with pytest.raises(UnsupportedModelError, match="RobertaForCausalLM"):
        check_model(perturbed(AutoModelForCausalLM.from_config(config)))
