"""`segment_infonce` where its CPU backends work in blocks, and what all backends make of unusual groups."""

import math

import numpy as np
import oracle
import pytest
import torch
from graph_replay import assert_replays
from tolerance import assert_exact
from torch.autograd import forward_ad

from sami_fast import segment_infonce
from sami_fast.kernels import segment_infonce_reference
from sami_fast.ops.dispatch import EXTENSION_DEVICES

BACKENDS = ["reference"] + (["cuda"] if "cpu" in EXTENSION_DEVICES else [])


def case(shapes, *, seed=0, longest=9, dtype=torch.float64):
    """Tokens, offsets, shapes and positives: response k is of prompt k modulo C."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, sum(C * R for C, R in shapes))
    tokens = torch.tensor(-rng.exponential(size=lengths.sum()), dtype=dtype).requires_grad_()
    positives = torch.tensor([k % C for C, R in shapes for k in range(R)])
    return tokens, torch.tensor(np.r_[0, np.cumsum(lengths)]), shapes, positives


def expected_losses(tokens, offsets, shapes):
    """Loss of each group by the oracle, in float64."""
    losses, pair = [], 0
    for C, R in shapes:
        entries = [tokens[offsets[s] : offsets[s + 1]].double().mean() for s in range(pair, pair + C * R)]
        losses.append(oracle.infonce(torch.stack(entries).view(C, R), [k % C for k in range(R)])[0])
        pair += C * R
    return torch.stack(losses)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", [1, 20, 1 << 14])
def test_shapes_in_any_order_and_blocks_of_any_size(block, backend, monkeypatch):
    monkeypatch.setattr(segment_infonce_reference, "_BLOCK", block)
    segment_infonce_reference._blocks.cache_clear()
    shapes = [(2, 2), (3, 5), (2, 2), (1, 4), (3, 5), (4, 4), (2, 2)]
    tokens, *groups = case(shapes, longest=30, dtype=torch.float64 if backend == "reference" else torch.float32)
    upstream = torch.linspace(0.5, 2.0, len(shapes))
    loss = segment_infonce(tokens, *groups, backend=backend)[0]
    expected = expected_losses(tokens, groups[0], shapes)
    assert_exact(loss, expected, "loss")
    (grad,) = torch.autograd.grad(loss, tokens, upstream.to(loss.dtype))
    (expected_grad,) = torch.autograd.grad(expected, tokens, upstream.double())
    assert_exact(grad, expected_grad, "gradient", slack=10)
    segment_infonce_reference._blocks.cache_clear()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("upstream", ["expanded", "strided"])
def test_upstream_gradients_of_any_layout(upstream, backend):
    tokens, *groups = case([(2, 3)] * 4, dtype=torch.float32)
    loss = segment_infonce(tokens, *groups, backend=backend)[0]
    grads = torch.ones(1).expand(4) if upstream == "expanded" else torch.arange(8.0)[::2]
    (grad,) = torch.autograd.grad(loss, tokens, grads, retain_graph=True)
    (plain,) = torch.autograd.grad(loss, tokens, grads.clone().contiguous())
    assert grad.equal(plain) and grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_tokens_are_summed_in_float64(dtype):
    tokens, *groups = case([(2, 2), (3, 4)], longest=300, dtype=dtype)
    loss, matrix, _ = segment_infonce(tokens, *groups)
    wide = tokens.detach().double().requires_grad_()
    wide_loss, wide_matrix, _ = segment_infonce(wide, *groups)
    assert loss.equal(wide_loss.to(dtype)) and matrix.equal(wide_matrix.to(dtype))
    (grad,) = torch.autograd.grad(loss.sum(), tokens)
    assert grad.dtype == dtype and grad.equal(torch.autograd.grad(wide_loss.sum(), wide)[0].to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_unusual_groups_mean_the_same_to_every_backend(backend):
    """A prompt without a response and an unscored positive add nothing; an owner out of range makes its group NaN."""
    tokens, offsets, shapes, positives = case([(3, 2), (2, 2), (2, 2)], dtype=torch.float32)
    lengths = offsets.diff()
    lengths[6] = 0  # the second group's first response under its own prompt
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    tokens = tokens.detach()[: int(offsets[-1])].requires_grad_()
    positives[4] = 2
    loss, matrix, _ = segment_infonce(tokens, offsets, shapes, positives, backend=backend)
    assert matrix[6] == -math.inf and loss.isnan().tolist() == [False, False, True]
    first, second = matrix[:6].view(3, 2).double(), matrix[6:10].view(2, 2).double()
    columns = -first.log_softmax(0).diagonal().sum() / 2
    rows = -first.log_softmax(1).diagonal().sum() / 3
    assert_exact(loss[0], (columns + rows) / 2, "a prompt without a response")
    lines = second.log_softmax(0)[1, 1] / 2 + second.log_softmax(1)[1, 1] / 2
    assert_exact(loss[1], -lines / 2, "an unscored positive")
    (grad,) = torch.autograd.grad(loss[:2].sum(), tokens)
    assert grad[: int(offsets[10])].isfinite().all()


def test_nothing_scored_leaves_nothing_to_learn():
    tokens, offsets = torch.zeros(0, requires_grad=True), torch.zeros(5, dtype=torch.int64)
    loss, matrix, _ = segment_infonce(tokens, offsets, [(2, 2)], torch.arange(2), backend="reference")
    assert loss.tolist() == [0.0] and matrix.tolist() == [-math.inf] * 4
    assert torch.autograd.grad(loss.sum(), tokens)[0].shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_refused(backend):
    tokens, *groups = case([(2, 2)], dtype=torch.float32)
    loss = segment_infonce(tokens, *groups, backend=backend)[0]
    upstream = torch.ones(1, requires_grad=True)
    (grad,) = torch.autograd.grad(loss, tokens, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="segment_infonce_backward"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("shapes", "dtype", "backend", "message"),
    [
        ([(257, 1)], torch.float32, "cuda", "shapes: expected C and R of at most 256 for backend 'cuda', got 257"),
        ([(2, 257)], torch.float32, "triton", "shapes: expected C and R of at most 256 for backend 'triton', got 257"),
        (
            [(2, 2)],
            torch.float64,
            "cuda",
            "token_logprobs: expected torch.float32 for backend 'cuda', got torch.float64",
        ),
        ([(2, 2)], torch.bfloat16, "triton", "token_logprobs: expected torch.float32 for backend 'triton'"),
        ([(2, 2), (0, 3)], torch.float32, None, r"shapes: expected \(C, R\) > 0 for each group"),
    ],
)
def test_what_a_backend_cannot_do_is_refused_by_name(shapes, dtype, backend, message):
    if backend == "cuda" and backend not in BACKENDS:
        pytest.skip("sami_fast._C was not built")
    pairs = sum(C * R for C, R in shapes)
    positives = torch.zeros(sum(R for _, R in shapes), dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        segment_infonce(torch.zeros(pairs, dtype=dtype), torch.arange(pairs + 1), shapes, positives, backend=backend)


@pytest.mark.parametrize("shape", [(257, 1), (2, 2)])
def test_groups_too_large_for_the_kernels_run_on_the_reference(shape):
    tokens, *groups = case([shape], dtype=torch.float32)
    loss, matrix, metrics = segment_infonce(tokens, *groups)
    reference = segment_infonce(tokens, *groups, backend="reference")
    for actual, expected, name in zip((loss, matrix, metrics), reference, ("loss", "matrix", "metrics"), strict=True):
        assert_exact(actual, expected.double(), name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
class TestOnGpu:
    @pytest.fixture(autouse=True)
    def installed(self, backend):
        if backend == "cuda" and "cuda" not in EXTENSION_DEVICES:
            pytest.skip("sami_fast._C was not built for CUDA")

    @pytest.mark.parametrize("normalize", ["mean", "sum"])
    @pytest.mark.parametrize(
        "shapes",
        [[(1, 1)], [(2, 2)] * 70, [(3, 5), (1, 7), (8, 8), (2, 9)], [(16, 16)] * 20, [(32, 64)], [(1, 256)], [(16, 2)]],
        ids=lambda shapes: f"{len(shapes)}x{shapes[0]}",
    )
    def test_against_float64(self, shapes, normalize, backend):
        tokens, *groups = case(shapes, longest=70, dtype=torch.float32)
        upstream = torch.linspace(-1.0, 2.0, len(shapes))
        wide = tokens.detach().double().requires_grad_()
        expected = segment_infonce(wide, *groups, normalize=normalize, backend="reference")
        (expected_grad,) = torch.autograd.grad(expected[0], wide, upstream.double())
        offsets, _, positives = groups
        moved = tokens.detach().cuda().requires_grad_()
        actual = segment_infonce(moved, offsets.cuda(), shapes, positives.cuda(), normalize=normalize, backend=backend)
        (grad,) = torch.autograd.grad(actual[0], moved, upstream.cuda())
        rounding = 10 * torch.finfo(torch.float32).eps
        assert torch.allclose(actual[0].cpu().double(), expected[0], rtol=10 * rounding, atol=rounding)
        assert_exact(actual[1].cpu(), expected[1], "matrix")
        assert torch.allclose(actual[2].cpu().double(), expected[2], rtol=10 * rounding, atol=10 * rounding)
        assert torch.allclose(grad.cpu().double(), expected_grad, rtol=1e-4, atol=rounding)

    def test_forward_and_backward_in_a_cuda_graph(self, backend):
        tokens, offsets, shapes, positives = case([(2, 2), (3, 4)], dtype=torch.float32)
        moved, offsets, positives = tokens.detach().cuda().requires_grad_(), offsets.cuda(), positives.cuda()

        def both():
            loss = segment_infonce(moved, offsets, shapes, positives, backend=backend)[0]
            return loss, torch.autograd.grad(loss.sum(), moved)[0]

        assert_replays(both)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_tangent_is_refused_not_dropped(backend):
    """Without a gradient to take, the eager op goes round autograd."""
    tokens, *groups = case([(2, 2)], dtype=torch.float32)
    tokens = tokens.detach()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode AD"):
        segment_infonce(forward_ad.make_dual(tokens, torch.ones_like(tokens)), *groups, backend=backend)
