"""The guard of last resort: a small random tree scored both ways."""

import dataclasses

import numpy as np
import pytest
import torch
from factory import FAMILIES, perturbed, tiny_model
from scored_models import SMALL
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from sami_fast import prefix_tree
from sami_fast.prefix_tree import AttentionPlan
from sami_fast.scoring import UnsupportedModelError, check_model

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")


class NarrowAttention(LlamaAttention):
    """Passes on a window that its model's mask does not have."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, sliding_window=4, **kwargs)


class DisplacedLlama(LlamaForCausalLM):
    """Makes its own positions of those it is given."""

    def forward(self, *args, position_ids=None, **kwargs):
        return super().forward(*args, **kwargs)


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
