"""Scores and gradients of prefix trees against a plain forward of every sequence."""

import copy

import numpy as np
import oracle
import pytest
import torch
from factory import FAMILIES, random_group, tiny_model
from factory import groups as random_groups
from hypothesis import given, settings
from hypothesis import strategies as st
from scored_models import assert_exact_on, gradients, objective, two_trees
from tolerance import assert_as_good_as, assert_same_scores, flat

from sami_fast import Group, pack
from sami_fast.scoring import Scores, score

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")


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


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "phi"])
def test_exact_with_tied_and_untied_heads(family, tied):
    model = tiny_model(family, tie_word_embeddings=tied)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert_exact_on(model, two_trees())


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_exact_on_a_class_made_of_a_family(family):
    # As sharding wrappers and users make them: the class is not in the family's own module.
    model = tiny_model(family)
    model.__class__ = type("Sharded" + type(model).__name__, (type(model),), {})
    assert_exact_on(model, two_trees())


def test_weights_that_are_not_finite_show_in_the_scores():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(torch.nan)
    assert score(model, pack(two_trees())).token_logprobs.isnan().all()
