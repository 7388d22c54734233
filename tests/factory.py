"""The one input factory: random groups, tensors and tiny models, fresh for every seed."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from sami_fast.prefix_tree import Group

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
