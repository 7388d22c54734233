import numpy as np
import pytest
import torch
from factory import groups as random_groups
from factory import random_group
from hypothesis import given
from hypothesis import strategies as st

from sami_fast.prefix_tree import AttentionPlan, Group, pack, pack_within


def ancestors(subtree_end, i):
    return [n for n in range(i + 1) if i < subtree_end[n]]


@given(st.lists(random_groups(), min_size=1, max_size=3))
def test_every_distinct_prefix_is_packed_once_and_every_label_has_its_predictor(groups):
    packed = pack(groups)
    ids, positions, subtree_end = packed.input_ids.tolist(), packed.position_ids.tolist(), packed.subtree_end.tolist()
    for i in range(packed.num_tokens):
        assert [positions[n] for n in ancestors(subtree_end, i)] == list(range(positions[i] + 1))
    prefixes, pair, whole = set(), 0, 0
    for g, group in enumerate(groups):
        for j, prompt in enumerate(group.prompts):
            for k, response in enumerate(group.responses):
                begin, end = packed.offsets[pair].item(), packed.offsets[pair + 1].item()
                if group.mask is not None and not group.mask[j][k]:
                    assert begin == end
                else:
                    whole += len(prompt) + len(response)
                    sequence = [*prompt.tolist(), *response.tolist()]
                    prefixes |= {(g, *sequence[:t]) for t in range(1, len(sequence))}
                    assert packed.labels[begin:end].tolist() == response.tolist()
                    assert packed.sequence[begin:end].tolist() == [pair] * len(response)
                    for t, h in enumerate(packed.hidden_index[begin:end].tolist()):
                        assert [ids[n] for n in ancestors(subtree_end, h)] == sequence[: len(prompt) + t]
                pair += 1
    assert packed.num_tokens == len(prefixes)
    assert packed.whole_tokens == whole and packed.token_ratio == whole / packed.num_tokens
    assert packed.shapes == tuple(group.shape for group in groups)
    assert packed.positives.tolist() == [int(p) for group in groups for p in group.positives]


@given(st.lists(random_groups(), min_size=1, max_size=5), st.integers(0, 30))
def test_pack_within_keeps_order_and_budget(groups, extra):
    budget = max(pack([group]).num_tokens for group in groups) + extra
    packs = pack_within(groups, budget)
    assert all(p.num_tokens <= budget for p in packs)
    assert torch.cat([p.input_ids for p in packs]).equal(pack(groups).input_ids)
    assert [s for p in packs for s in p.shapes] == [g.shape for g in groups]


@pytest.mark.parametrize("query_first", [True, False])
def test_token_count_is_that_of_the_formula(query_first):
    rng = np.random.default_rng(0)
    Lq, Lc, Lr, C = 40, 11, 9, 4
    query = rng.integers(0, 10**6, Lq)
    own = rng.integers(0, 10**6, (C, Lc))
    prompts = [np.r_[query, c] if query_first else np.r_[c, query] for c in own]
    packed = pack([Group(prompts, rng.integers(0, 10**6, (C, Lr)))])
    shared = Lq + C * Lc if query_first else C * (Lc + Lq)
    assert packed.num_tokens == shared + C * C * (Lr - 1)
    assert packed.whole_tokens == C * C * (Lq + Lc + Lr)


def test_plan_nodes_tile_the_pack():
    rng = np.random.default_rng(1)
    packed = pack([random_group(rng, 3, 4) for _ in range(3)])
    nodes = packed.plan.nodes
    assert nodes[0, 0] == 0 and nodes[-1, 1] == packed.num_tokens and nodes[1:, 0].equal(nodes[:-1, 1])
    for begin, end, subtree in nodes.tolist():
        assert (packed.subtree_end[begin:end] == subtree).all()
    rebuilt = AttentionPlan.build(packed.subtree_end.numpy(), packed.position_ids.numpy())
    assert rebuilt.nodes.equal(nodes)


def test_moved_pack_is_equal():
    packed = pack([random_group(np.random.default_rng(2), 2, 3, masked=True)])
    moved = packed.to("cpu")
    assert moved.input_ids.equal(packed.input_ids) and moved.plan.nodes.equal(packed.plan.nodes)
    assert moved.shapes == packed.shapes and moved.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompts=[], responses=[[1]]), "prompts: expected at least one"),
        (dict(prompts=[[1]], responses=[]), "responses: expected at least one"),
        (dict(prompts=[[]], responses=[[1]]), r"prompts\[0\]: expected at least one token"),
        (dict(prompts=[[1]], responses=[[]]), r"responses\[0\]: expected at least one token"),
        (dict(prompts=[[1]], responses=[[-2]]), r"responses\[0\]: expected token ids"),
        (dict(prompts=[[1.5]], responses=[[2]]), r"prompts\[0\]: expected a flat sequence of integer"),
        (dict(prompts=[[1], [2]], responses=[[1]]), "positives: required when 2 prompts meet 1 responses"),
        (dict(prompts=[[1]], responses=[[1]], positives=[1]), r"positives: expected prompt indices in \[0, 1\)"),
        (dict(prompts=[[1]], responses=[[1]], positives=[0, 0]), "positives: expected 1 integers"),
        (dict(prompts=[[1], [2]], responses=[[1], [2]], positives=[0, 0]), "positives: prompt 1 has no response"),
        (dict(prompts=[[1]], responses=[[1]], mask=[[1]]), r"mask: expected bool \[1, 1\]"),
        (dict(prompts=[[1]], responses=[[1]], mask=[[False]]), "mask: expected at least one pair"),
    ],
)
def test_bad_groups_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=f"group 'g7': {message}"):
        Group(**arguments, id="g7")


def test_budget_and_plan_errors():
    group = Group([[1, 2, 3]], [[4, 5]], id="g7")
    with pytest.raises(ValueError, match="max_tokens: 2 groups pack to 8 tokens, over the budget of 7"):
        pack([group, group], max_tokens=7)
    with pytest.raises(ValueError, match="max_tokens: group 'g7' alone packs to 4 tokens, over the budget of 3"):
        pack_within([group], 3)
    with pytest.raises(ValueError, match="groups: expected at least one group"):
        pack([])
    with pytest.raises(ValueError, match="subtree_end: expected nested subtrees"):
        AttentionPlan.build(np.array([2, 3, 3]), np.arange(3))
    with pytest.raises(ValueError, match="position_ids: expected"):
        AttentionPlan.build(np.array([2, 2]), np.arange(3))
