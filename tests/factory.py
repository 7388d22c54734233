"""The one input factory: random groups, tensors and tiny models, fresh for every seed."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from sami_fast.prefix_tree import Group

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)  # tensors are tiny here: on a busy machine, threads mostly wait for each other

AWKWARD_LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 57, 59, 63, 64, 65, 127, 128, 129)


def random_group(
    rng: np.random.Generator,
    num_prompts: int,
    num_responses: int,
    *,
    query: int = 8,
    constitution: int = 5,
    response: int = 6,
    vocab: int = 97,
    query_first: bool = True,
    masked: bool = False,
    id: str | None = None,
) -> Group:
    """A group whose lengths vary between 1 and the given ones around a query that all prompts share."""
    shared = rng.integers(0, vocab, query)
    own = [rng.integers(0, vocab, rng.integers(1, constitution + 1)) for _ in range(num_prompts)]
    prompts = [np.r_[shared, c] if query_first else np.r_[c, shared] for c in own]
    responses = [rng.integers(0, vocab, rng.integers(1, response + 1)) for _ in range(num_responses)]
    positives = np.r_[np.arange(num_prompts), rng.integers(0, num_prompts, num_responses - num_prompts)]
    mask = None
    if masked:
        mask = rng.random((num_prompts, num_responses)) < 0.5
        mask[positives, np.arange(num_responses)] = True
    return Group(prompts, responses, positives, mask, id)


def score_matrix(
    rng: np.random.Generator, num_prompts: int, num_responses: int, *, masked: bool = False
) -> tuple[torch.Tensor, list[int]]:
    """[C, R] float64 scores, with -inf where a mask leaves a pair out, and the prompt each response belongs to."""
    group = random_group(rng, num_prompts, num_responses, masked=masked)
    scores = torch.tensor(-rng.exponential(size=group.shape))
    if masked:
        scores = scores.masked_fill(torch.from_numpy(~group.mask), -torch.inf)
    return scores, group.positives.tolist()


@st.composite
def groups(draw, max_prompts: int = 4, max_responses: int = 5, max_length: int = 7) -> Group:
    """Groups over a tiny vocabulary: duplicates, prefixes of each other and one-token sequences are common."""
    vocab = draw(st.integers(1, 4))
    tokens = st.lists(st.integers(0, vocab - 1), min_size=1, max_size=max_length)
    prompts = draw(st.lists(tokens, min_size=1, max_size=max_prompts))
    C = len(prompts)
    responses = draw(st.lists(tokens, min_size=C, max_size=max(C, max_responses)))
    rest = draw(st.lists(st.integers(0, C - 1), min_size=len(responses) - C, max_size=len(responses) - C))
    positives = [*draw(st.permutations(range(C))), *rest]
    mask = None
    if draw(st.booleans()):
        rows = st.lists(st.booleans(), min_size=len(responses), max_size=len(responses))
        mask = draw(st.lists(rows, min_size=C, max_size=C))
        for k, j in enumerate(positives):
            mask[j][k] = True
    return Group(prompts, responses, positives, mask)


def qkv(rng: np.random.Generator, T, Hq, Hkv, D, Dv=None, dtype=torch.float64, requires_grad=True):
    """q, k, v with unit-variance entries; the dtype is the compute dtype of the test."""
    shapes = [(T, Hq, D), (T, Hkv, D), (T, Hkv, Dv or D)]
    return [torch.tensor(rng.standard_normal(s), dtype=dtype).requires_grad_(requires_grad) for s in shapes]


_SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
    attention_dropout=0.0,
)
_WINDOWS = dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"])
_EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=16)
# Families with what is theirs beyond the sizes: every kind of attention that a tree must get right.
FAMILIES = {
    "llama": {},
    "mistral": dict(sliding_window=6),
    "mixtral": dict(sliding_window=None, num_local_experts=4, **_EXPERTS),
    "qwen2": dict(use_sliding_window=True, max_window_layers=1, sliding_window=6),
    "qwen3": {},
    "qwen3_moe": dict(num_experts=4, **_EXPERTS),
    "gemma": {},
    "gemma2": dict(query_pre_attn_scalar=24, attn_logit_softcapping=1.5, final_logit_softcapping=2.0, **_WINDOWS),
    "gemma3_text": dict(query_pre_attn_scalar=24, **_WINDOWS),
    "phi": dict(partial_rotary_factor=0.5),
    "phi3": {},
    "olmo2": {},
    "granite": dict(logits_scaling=3.0, attention_multiplier=0.2, embedding_multiplier=2.0, residual_multiplier=0.7),
    "gpt_neox": dict(rotary_pct=0.5),
    "gpt2": dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
    "starcoder2": dict(sliding_window=6, residual_dropout=0.0, embedding_dropout=0.0),
    "cohere": dict(logit_scale=0.3),
    "smollm3": dict(no_rope_layers=[1, 0]),
    "gpt_oss": dict(num_local_experts=4, **_EXPERTS, **_WINDOWS),
    # Gives its attention's output to `view`, which wants it contiguous.
    "jetmoe": dict(num_key_value_heads=2, kv_channels=8, num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": dict(
        num_key_value_heads=4,
        head_dim=8,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
        first_k_dense_replace=2,
        rope_interleave=True,
    ),
}
_FLOAT32_ONLY = {"mixtral", "qwen3_moe", "gpt_oss"}  # expert layers compute in float32
_PLAIN_ATTENTION = {"gemma2": "eager", "gpt_oss": "eager"}  # sdpa knows no soft-cap and no sinks


def tiny_config(family: str, **options) -> PreTrainedConfig:
    """Config of a model that a plain forward runs through in milliseconds; options override it."""
    return AutoConfig.for_model(family, **_SIZES | FAMILIES.get(family, {}) | options)


def tiny_model(family: str = "llama", *, dtype: torch.dtype | None = None, seed: int = 0, **options) -> PreTrainedModel:
    """Causal LM of a transformers family, random in all its weights: norms, biases and sinks too.

    `dtype` None is the widest that the family computes in.
    """
    if dtype is None:
        dtype = torch.float32 if family in _FLOAT32_ONLY else torch.float64
    config, attention = tiny_config(family, **options), _PLAIN_ATTENTION.get(family)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return perturbed(AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype))


@torch.no_grad()
def perturbed(model: PreTrainedModel) -> PreTrainedModel:
    """The model in eval mode with noise on every weight, so that none is still at its initial 0 or 1."""
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
