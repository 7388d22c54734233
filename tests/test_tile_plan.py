import itertools

import numpy as np
import pytest
from factory import AWKWARD_LENGTHS, random_group
from factory import groups as random_groups
from hypothesis import example, given
from hypothesis import strategies as st

from sami_fast import tile_plan
from sami_fast.prefix_tree import Group, pack


def visible_pairs(packed, window):
    """[T, T] bool, from the definition of the mask."""
    i, n = np.arange(packed.num_tokens)[:, None], np.arange(packed.num_tokens)
    position = packed.position_ids.numpy()
    visible = (n <= i) & (i < packed.subtree_end.numpy())
    return visible if window is None else visible & (position[:, None] - position < window)


def check(plan, visible, block_tile, block_step):
    """Each visible pair is in exactly one step, full steps hold visible pairs only, heavy tiles come first.

    `visible` is [tiles' side, steps' side]. Returns how many steps see nothing.
    """
    height = len(visible)
    padded = np.pad(visible, ((0, 0), (0, block_step)))
    seen = np.zeros(padded.shape, dtype=int)
    assert sorted(plan.tiles[:, 0].tolist()) == list(range(0, height, block_tile))
    assert plan.tiles.dtype == plan.steps.dtype == np.int32
    weight = plan.tiles[:, 3] - plan.tiles[:, 1]
    assert (np.diff(weight) <= 0).all() and weight.sum() == len(plan.steps) - 1
    empty = 0
    for first, begin, middle, end in plan.tiles.tolist():
        for at in range(begin, end):
            here = slice(first, first + block_tile), slice(plan.steps[at], plan.steps[at] + block_step)
            seen[here] += 1
            empty += not padded[here].any()
            assert at >= middle or padded[here].all(), "a full step with a hidden pair"
    assert (seen[padded] == 1).all()
    return empty


def check_both(packed, group, rows, keys, window):
    nodes = packed.plan.nodes.numpy()
    visible = visible_pairs(packed, window)
    queries = tile_plan.query_tiles(nodes, group, rows, keys, window)
    empty = check(queries, np.repeat(visible, group, axis=0), rows, keys)
    empty += check(tile_plan.key_tiles(nodes, rows, keys, window), visible.T, keys, rows)
    # With a window, a tile that holds several branches may visit a little too much.
    assert empty == 0 or window is not None
    return queries


@given(
    st.lists(random_groups(max_length=40), min_size=1, max_size=3),
    st.sampled_from([1, 2, 3, 8]),
    st.sampled_from([16, 32, 64]),
    st.sampled_from([16, 32, 64]),
    st.sampled_from([None, 1, 5, 20, 1000]),
)
@example([Group([[1]], [[1]])], 1, 16, 16, None)
def test_every_visible_pair_is_visited_once(groups, group, rows, keys, window):
    packed = pack(groups)
    assert (tile_plan.positions(packed.plan.nodes.numpy()) == packed.position_ids.numpy()).all()
    check_both(packed, group, rows, keys, window)


@pytest.mark.parametrize("length", AWKWARD_LENGTHS)
def test_branches_at_awkward_offsets(length):
    rng = np.random.default_rng(length)
    query = rng.integers(0, 99, length)
    prompts = [np.r_[query, rng.integers(0, 99, size)] for size in (1, length, 40)]
    responses = [rng.integers(0, 99, size) for size in (2, length + 1, 70)]
    packed = pack([Group(prompts, responses), random_group(rng, 2, 3, query=length)])
    for group, window in itertools.product((1, 4, 7), (None, 33, length + 3)):
        check_both(packed, group, 64, 32, window)


def test_steps_are_few_and_mostly_full():
    """One shared prompt of 1000 tokens: its steps need no mask, and a response's tile does not visit its siblings."""
    rng = np.random.default_rng(0)
    responses = [rng.integers(0, 10**6, 65) for _ in range(10)]
    packed = pack([Group([rng.integers(0, 9, 1000)], responses, [0] * 10)])
    nodes = packed.plan.nodes.numpy()
    plan = check_both(packed, 1, 64, 64, None)
    own = plan.tiles[plan.tiles[:, 0] >= 1000 + 64]
    assert ((own[:, 2] - own[:, 1]) == 1000 // 64).all()
    assert ((own[:, 3] - own[:, 2]) <= 3).all()
    near = tile_plan.query_tiles(nodes, 1, 64, 64, 128)
    assert (near.tiles[:, 3] - near.tiles[:, 1]).max() <= 5


def test_deep_chain_of_branches():
    """A comb: every node has a leaf beside its next node, so that ancestors are scattered in as many runs as levels."""
    rng = np.random.default_rng(1)
    spine = rng.integers(0, 2**20, 400)
    responses = [np.r_[spine[:cut], rng.integers(2**20, 2**21, 9)] for cut in range(20, 400, 20)]
    packed = pack([Group([[1]], responses[::-1], [0] * len(responses))])
    for group, window in itertools.product((1, 3), (None, 50)):
        check_both(packed, group, 32, 32, window)
    packed = pack([Group([[1]], responses, [0] * len(responses))])
    check_both(packed, 2, 32, 16, None)
