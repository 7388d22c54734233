"""Groups, objectives and adapters that the tests of scoring share."""

import numpy as np
import oracle
import peft
import torch
from factory import random_group
from tolerance import assert_same_gradients, assert_same_scores, flat
from torch import nn

from sami_fast import Group, pack
from sami_fast.scoring import score


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


SMALL = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
