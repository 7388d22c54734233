import math

import numpy as np
import oracle
import pytest
import torch
from factory import random_group, score_matrix, tiny_model
from tolerance import assert_exact, assert_same_gradients, assert_same_scores

from sami_fast import Group, pack
from sami_fast.losses import InfoNCE, infonce_loss
from sami_fast.scoring import Scores, score

SHAPES = [(1, 1), (1, 4), (2, 2), (3, 3), (3, 7), (8, 8)]
NAMES = ("loss", "mutual_information", "row_accuracy", "column_accuracy")


def assert_same(actual: InfoNCE, expected: list[tuple], inputs: list[torch.Tensor], reduction: str = "mean") -> None:
    """All that `actual` holds, and the gradients of `inputs`, against `oracle.infonce` of each group."""
    for index, name in enumerate(NAMES):
        values = torch.stack([torch.as_tensor(group[index], dtype=torch.float64) for group in expected])
        values = values if reduction == "none" else values.mean()
        assert_exact(getattr(actual, name), values, name, slack=10)
    losses = torch.stack([group[0] for group in expected])
    upstream = torch.linspace(0.5, 2.0, len(expected), dtype=torch.float64) if reduction == "none" else None
    got = torch.autograd.grad(actual.loss, inputs, upstream)
    want = torch.autograd.grad(losses if reduction == "none" else losses.mean(), inputs, upstream, retain_graph=True)
    for a, e in zip(got, want, strict=True):
        assert a.isfinite().all() and torch.allclose(a, e, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_matrix(shape, masked):
    for seed in range(3):
        matrix, positives = score_matrix(np.random.default_rng(seed), *shape, masked=masked)
        matrix.requires_grad_()
        expected = [oracle.infonce(matrix, positives)]
        assert_same(infonce_loss(matrix, positives), expected, [matrix])
        assert_same(infonce_loss(matrix, torch.tensor(positives)), expected, [matrix])
        assert_same(infonce_loss([matrix], [positives], reduction="none"), expected, [matrix], "none")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_of_matrices(shape, reduction):
    rng = np.random.default_rng(1)
    cases = [score_matrix(rng, *shape) for _ in range(5)]
    batch = torch.stack([matrix for matrix, _ in cases]).requires_grad_()
    own = [positives for _, positives in cases]
    expected = [oracle.infonce(matrix, positives) for matrix, positives in zip(batch, own, strict=True)]
    assert_same(infonce_loss(batch, own, reduction=reduction), expected, [batch], reduction)
    assert_same(infonce_loss(batch, torch.tensor(own), reduction=reduction), expected, [batch], reduction)
    alike = [oracle.infonce(matrix, own[0]) for matrix in batch]
    assert_same(infonce_loss(batch, own[0], reduction=reduction), alike, [batch], reduction)
    assert_same(infonce_loss(batch, torch.tensor(own[0]), reduction=reduction), alike, [batch], reduction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ragged_matrices(reduction):
    rng = np.random.default_rng(2)
    cases = [score_matrix(rng, *shape, masked=i % 2 == 1) for i, shape in enumerate(SHAPES)]
    matrices, positives = [matrix.requires_grad_() for matrix, _ in cases], [own for _, own in cases]
    expected = [oracle.infonce(*case) for case in cases]
    assert_same(infonce_loss(matrices, positives, reduction=reduction), expected, matrices, reduction)


def test_response_k_belongs_to_prompt_k_unless_told():
    rng = np.random.default_rng(3)
    for shape in ((4, 4), (3, 4, 4)):
        matrices = torch.tensor(rng.standard_normal(shape))
        assert infonce_loss(matrices).loss.equal(infonce_loss(matrices, range(4)).loss)
    ragged = [torch.tensor(rng.standard_normal((n, n))) for n in (1, 2, 3)]
    assert infonce_loss(ragged).loss.equal(infonce_loss(ragged, [range(n) for n in (1, 2, 3)]).loss)


def test_mutual_information_is_what_the_loss_leaves_of_the_entropy():
    rng = np.random.default_rng(4)
    for n in (1, 2, 5, 8):
        result = infonce_loss(torch.tensor(rng.standard_normal((6, n, n))), reduction="none")
        assert torch.allclose(result.mutual_information, math.log(n) - result.loss, atol=1e-14)
    # Certainty gives the whole entropy, independence none of it.
    certain, independent = 1e3 * torch.eye(4), torch.zeros(4, 4)
    assert float(infonce_loss(certain).mutual_information) == pytest.approx(math.log(4))
    assert float(infonce_loss(independent).mutual_information) == pytest.approx(0, abs=1e-6)
    result = infonce_loss(torch.zeros(2, 6), [0, 0, 1, 1, 1, 1])
    assert float(result.loss) == pytest.approx((math.log(2) + math.log(6)) / 2)
    assert not result.mutual_information.requires_grad and not result.row_accuracy.requires_grad


def test_a_tie_is_wrong():
    def accuracies(rows, positives=None):
        result = infonce_loss(torch.tensor(rows), positives)
        return float(result.row_accuracy), float(result.column_accuracy)

    assert accuracies([[0.0, 0.0], [0.0, 0.0]]) == (0, 0)
    assert accuracies([[1.0, 0.0], [1.0, 2.0]]) == (1, 0.5)  # column 0 ties
    assert accuracies([[1.0, 1.0], [0.0, 2.0]]) == (0.5, 1)  # row 0 ties
    assert accuracies([[3.0, 1.0], [2.0, 0.0]]) == (0.5, 0.5)
    # Its own responses are no rivals of each other: one of them above the others is enough.
    assert accuracies([[2.0, 2.0, 0.0], [0.0, 0.0, 1.0]], [0, 0, 1]) == (1, 1)
    assert accuracies([[2.0, 0.0, 1.0], [0.0, 1.0, 1.0]], [0, 0, 1]) == (0.5, pytest.approx(1 / 3))
    # Nothing to confuse it with, and a rival that is not scored.
    assert accuracies([[-5.0]]) == (1, 1)
    assert accuracies([[1.0, -math.inf], [-math.inf, 1.0]]) == (1, 1)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_bad_numbers_are_not_hidden_and_stay_in_their_group(bad):
    matrices = torch.tensor(np.random.default_rng(5).standard_normal((3, 4, 4)))
    clean = infonce_loss(matrices, reduction="none").loss
    matrices[1, 2, 2] = bad
    loss = infonce_loss(matrices, reduction="none").loss
    assert loss[[0, 2]].equal(clean[[0, 2]]) and not loss[1].isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", ["mean", "sum"])
def test_scores_give_what_their_matrices_give(normalize, dtype):
    rng = np.random.default_rng(6)
    groups = [random_group(rng, C, R, masked=C == 3) for C, R in ((2, 2), (3, 5), (1, 2), (4, 4))]
    packed, positives = pack(groups), [group.positives.tolist() for group in groups]
    tokens = torch.tensor(-rng.exponential(size=packed.labels.numel()), dtype=dtype, requires_grad=True)
    scores = Scores(tokens, packed, normalize)
    for reduction in ("mean", "none"):
        direct = infonce_loss(scores, reduction=reduction)
        through_matrices = infonce_loss(scores.matrices, positives, reduction=reduction)
        assert direct.loss.dtype == dtype and direct.loss.shape == (() if reduction == "mean" else (len(groups),))
        for name in NAMES:
            assert_exact(getattr(direct, name), getattr(through_matrices, name), name)
        got, want = (torch.autograd.grad(result.loss.sum(), tokens)[0] for result in (direct, through_matrices))
        assert_exact(got, want, "gradient", slack=4)


@pytest.mark.parametrize("normalize", ["mean", "sum"])
def test_loss_of_a_model_and_its_gradients(normalize):
    rng, model = np.random.default_rng(7), tiny_model()
    groups = [random_group(rng, 3, 4, masked=True), random_group(rng, 2, 2, query_first=False)]

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    matrices = oracle.matrices(model, groups, normalize)
    expected = [oracle.infonce(m, g.positives.tolist()) for m, g in zip(matrices, groups, strict=True)]
    expected_loss = torch.stack([group[0] for group in expected]).mean()
    actual = infonce_loss(score(model, pack(groups), normalize=normalize))
    assert_same_scores([actual.loss], [expected_loss], "loss")
    information = torch.stack([group[1] for group in expected]).mean()
    assert float(actual.mutual_information) == pytest.approx(float(information), abs=1e-7)
    assert_same_gradients(gradients(actual.loss), gradients(expected_loss))


SQUARE, WIDE = torch.zeros(2, 2), torch.zeros(2, 3)
BAD_ARGUMENTS = {
    r'reduction: expected "mean" or "none", got \'sum\'': dict(scores=SQUARE, reduction="sum"),
    r"scores: expected \[C, R\] matrices, got \[\]": dict(scores=[]),
    r"scores: expected \[C, R\] matrices, got \[\[\], \[\]\]": dict(scores=torch.zeros(2)),
    r"scores: expected \[C, R\] matrices, got \[\[2, 2\], \[0, 2\]\]": dict(scores=[SQUARE, torch.zeros(0, 2)]),
    r"token_logprobs: expected floating point": dict(scores=SQUARE.long()),
    r"positives: required when 2 prompts meet 3 responses, got None": dict(scores=WIDE),
    r"positives: expected 3 prompt indices in \[0, 2\), got \[0, 1\]": dict(scores=WIDE, positives=[0, 1]),
    r"positives: expected 3 prompt indices in \[0, 2\), got \[0, 1, 2\]": dict(scores=WIDE, positives=[0, 1, 2]),
    r"positives: expected 3 prompt indices in \[0, 2\), got \[0, 1, -1\]": dict(scores=WIDE, positives=[0, 1, -1]),
    r"positives: expected 2 lists, one per matrix, got 1": dict(scores=[SQUARE, WIDE], positives=[[0, 1]]),
    r"positives: prompt 1 has no response of its own": dict(scores=WIDE, positives=[0, 0, 0]),
    r"positives: expected .*0\.5": dict(scores=SQUARE, positives=[0.5, 1]),
    r"backend: expected one of": dict(scores=SQUARE, backend="magic"),
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        infonce_loss(**BAD_ARGUMENTS[message])


def test_scores_bring_their_own_positives_and_need_them_scored():
    def scores(groups):
        packed = pack(groups)
        return Scores(torch.zeros(packed.labels.numel()), packed)

    group = Group([[1], [2]], [[3], [4]], mask=[[True, False], [True, True]], id="q7")
    with pytest.raises(ValueError, match="positives: expected None, as the scores carry those of their groups"):
        infonce_loss(scores([group]), [0, 1])
    incomplete = Group([[1], [2]], [[3], [4]], mask=[[True, True], [True, False]], id="q8")
    with pytest.raises(ValueError, match="the mask of group 'q8' leaves out prompt 1 with its own response 1"):
        infonce_loss(scores([group, incomplete]))
    with pytest.raises(ValueError, match="the mask of group number 1 of the pack leaves out prompt 0 with"):
        infonce_loss(scores([group, Group([[1]], [[3], [4]], [0, 0], mask=[[False, True]])]))
