"""The CUDA C++ extension. Without a GPU the kernel's own arithmetic runs on the host, from the same source."""

import math

import pytest
import torch
from tolerance import assert_exact

_C = pytest.importorskip(
    "sami_fast._C", reason="sami_fast._C was not built: no C++ compiler when sami_fast was installed"
)
WITH_CUDA = _C.cuda_version() is not None
needs_nvcc = pytest.mark.skipif(not WITH_CUDA, reason="sami_fast._C has its host code alone: no nvcc was there")

NAN = math.nan
EVERY_SHAPE = [(1, 1), (1, 5), (5, 1), (2, 2), (8, 8), (3, 7), (17, 33), (256, 1), (1, 256), (31, 32), (4, 4)]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not (WITH_CUDA and torch.cuda.is_available()):
        pytest.skip("torch sees no CUDA device" if WITH_CUDA else "sami_fast._C has its host code alone")
    return request.param


class Case:
    """Random ragged groups as the extension takes them."""

    def __init__(self, sizes, *, seed, longest=12, unscored=0.0, keep_positives=True):
        rng = torch.Generator().manual_seed(seed)
        self.sizes = sizes
        lengths, owners, bases, cell, response = [], [], [], 0, 0
        for C, R in sizes:
            # Every constitution owns a response as far as they go, some several, in no particular order.
            owner = torch.cat([torch.randperm(C, generator=rng), torch.randint(C, (R,), generator=rng)])[:R]
            owner = owner[torch.randperm(R, generator=rng)]
            length = torch.randint(1, longest + 1, (C, R), generator=rng)
            drop = torch.rand((C, R), generator=rng) < unscored
            if keep_positives:
                drop[owner, torch.arange(R)] = False
            lengths.append(length.masked_fill(drop, 0).flatten())
            owners.append(owner)
            bases.append((C, R, cell, response))
            cell, response = cell + C * R, response + R
        self.offsets = torch.cat([torch.zeros(1, dtype=torch.long), torch.cat(lengths).cumsum(0)])
        self.positives = torch.cat(owners)
        self.shapes = torch.tensor(bases, dtype=torch.int32)
        self.tokens = torch.empty(int(self.offsets[-1])).exponential_(generator=rng).neg_()

    def run(self, device, *, normalize="mean", sizes=None, loss_grad=None):
        """Loss [B], metrics [B, 3], matrix [S], token gradient [N], every output poisoned with NaN beforehand.

        `sizes`: [B, 2] by which memory is sized; None is the groups' own. `loss_grad`: [B] upstream; None is ones.
        """
        everything = (self.tokens, self.offsets, self.shapes, self.positives)
        tokens, offsets, shapes, positives = (x.to(device) for x in everything)
        host_sizes = torch.tensor(self.sizes) if sizes is None else sizes
        B, S, N = len(self.sizes), offsets.numel() - 1, tokens.numel()
        sizes = ((B,), (B, 3), (S,), (S,), (N,))
        loss, metrics, matrix, pair_grad, token_grad = (torch.full(size, NAN, device=device) for size in sizes)
        upstream = torch.ones(B, device=device) if loss_grad is None else loss_grad.to(device)
        groups = {
            "offsets": offsets.data_ptr(),
            "shapes": shapes.data_ptr(),
            "sizes": host_sizes.data_ptr(),
            "groups": B,
        }
        forward = {
            "token_logprobs": tokens.data_ptr(),
            "positives": positives.data_ptr(),
            "normalize": normalize,
            "loss": loss.data_ptr(),
            "metrics": metrics.data_ptr(),
            "matrix": matrix.data_ptr(),
            "pair_grad": pair_grad.data_ptr(),
        }
        backward = {"loss_grad": upstream.data_ptr(), "pair_grad": pair_grad.data_ptr()}
        backward["token_grad"] = token_grad.data_ptr()
        if device == "cuda":
            stream = torch.cuda.current_stream().cuda_stream
            _C.segment_infonce_forward_cuda(**groups, **forward, stream=stream)
            _C.segment_infonce_backward_cuda(**groups, **backward, stream=stream)
        else:
            _C.segment_infonce_forward_host(**groups, **forward)
            _C.segment_infonce_backward_host(**groups, **backward)
        return loss.cpu(), metrics.cpu(), matrix.cpu(), token_grad.cpu()

    def pairs(self, b):
        C, R, cell, _ = self.shapes[b].tolist()
        return slice(cell, cell + C * R)

    def token_span(self, b):
        pairs = self.pairs(b)
        return slice(int(self.offsets[pairs.start]), int(self.offsets[pairs.stop]))

    def expected(self, b, normalize):
        """The same four of group b, in float64 by autograd, straight from the definition."""
        C, R, _, response = self.shapes[b].tolist()
        lengths = self.offsets.diff()[self.pairs(b)]
        tokens = self.tokens[self.token_span(b)].double().requires_grad_()
        scores = torch.zeros(C * R, dtype=torch.float64)
        scores = scores.index_add(0, torch.arange(C * R).repeat_interleave(lengths), tokens)
        if normalize == "mean":
            scores = scores / lengths.clamp(min=1)
        scored = (lengths > 0).view(C, R)
        owner = self.positives[response : response + R]
        positive = (owner == torch.arange(C)[:, None]) & scored
        kept = scores.view(C, R).masked_fill(~scored, -1e9)  # exp underflows to 0, and no NaN in autograd
        share = positive / positive.sum(1, keepdim=True).clamp(min=1)
        column = -(kept.log_softmax(0) * positive).sum() / R
        row = -(kept.log_softmax(1) * share).sum() / C
        (grad,) = torch.autograd.grad((column + row) / 2, tokens)
        column, row = column.item(), row.item()
        matrix = scores.detach().view(C, R).masked_fill(~scored, -math.inf)
        best, rest = matrix.masked_fill(~positive, -math.inf), matrix.masked_fill(positive, -math.inf)
        accuracies = [float((best.amax(d) > rest.amax(d)).double().mean()) for d in (1, 0)]
        metrics = torch.tensor([(math.log(C) - column + math.log(R) - row) / 2, *accuracies], dtype=torch.float64)
        return (column + row) / 2, metrics, matrix.flatten(), grad

    def check(self, device, normalize, **options):
        loss, metrics, matrix, grad = self.run(device, normalize=normalize, **options)
        for b, (C, R) in enumerate(self.sizes):
            name = f"{C} x {R} {normalize}"
            e_loss, e_metrics, e_matrix, e_grad = self.expected(b, normalize)
            assert abs(loss[b] - e_loss) <= 1e-5 * max(1.0, abs(e_loss)), f"{name}: loss {loss[b]} not {e_loss}"
            assert_exact(matrix[self.pairs(b)], e_matrix, f"{name}: matrix")
            assert abs(metrics[b, 0] - e_metrics[0]) <= 1e-5 * max(1.0, math.log(C * R)), f"{name}: information"
            assert metrics[b, 1:].tolist() == pytest.approx(e_metrics[1:].tolist(), abs=1e-6), f"{name}: accuracies"
            assert_exact(grad[self.token_span(b)], e_grad, f"{name}: gradient")


@pytest.mark.parametrize("normalize", ["mean", "sum"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"unscored": 0.3},
        {"unscored": 0.4, "keep_positives": False},  # lines without a scored positive add nothing
        {"longest": 600},  # several batches of loads a pair
    ],
    ids=["dense", "masked", "unscored-positives", "long"],
)
def test_matches_float64(device, normalize, options):
    sizes = EVERY_SHAPE if options.get("longest", 0) < 100 else [(2, 2), (1, 3), (6, 6), (9, 5)]
    Case(sizes, seed=1, **options).check(device, normalize)


@pytest.mark.parametrize("normalize", ["mean", "sum"])
def test_largest_group(device, normalize):
    """65,536 pairs: the matrix does not fit in shared memory."""
    Case([(256, 256), (2, 3)], seed=2, longest=3).check(device, normalize)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (5, 6), (16, 16), (64, 64)])
def test_one_group_at_a_time(device, size):
    """Each launch shape: the number of pairs picks block and tile sizes."""
    Case([size], seed=3).check(device, "mean")


def test_paths_agree_bitwise(device):
    case = Case(EVERY_SHAPE, seed=4, unscored=0.2)
    first = case.run(device)
    assert all(torch.equal(a, b) for a, b in zip(first, case.run(device), strict=True))  # reproducible
    small = torch.zeros(len(EVERY_SHAPE), 2, dtype=torch.int64)
    if device == "cpu":  # on the GPU the sizes also pick the tile, and with it the order of the sums
        unstaged = case.run(device, sizes=small)
        assert all(torch.equal(a, b) for a, b in zip(first, unstaged, strict=True))
    else:
        case.check(device, "mean", sizes=small)


def test_backward_scales_each_group_by_its_upstream_gradient(device):
    case = Case(EVERY_SHAPE, seed=11, unscored=0.2)
    plain, upstream = case.run(device)[3], torch.linspace(-2.0, 3.0, len(EVERY_SHAPE))
    scaled = case.run(device, loss_grad=upstream)[3]
    for b in range(len(EVERY_SHAPE)):
        tokens = case.token_span(b)
        assert torch.equal(scaled[tokens], plain[tokens] * upstream[b])


@pytest.mark.parametrize("bad", [NAN, -math.inf])
def test_bad_numbers_stay_in_their_group(device, bad):
    case = Case([(2, 3), (4, 4), (3, 3)], seed=5)
    clean = case.run(device)
    owner = int(case.positives[3])
    pair = case.pairs(1).start + owner * 4  # the positive of response 0 of the second group
    case.tokens[int(case.offsets[pair])] = bad
    spoiled = case.run(device)
    assert not spoiled[0][1].isfinite()
    assert spoiled[2][pair].isnan() if math.isnan(bad) else spoiled[2][pair] == bad
    for b in (0, 2):
        assert torch.equal(spoiled[0][b], clean[0][b]) and torch.equal(spoiled[1][b], clean[1][b])
        assert torch.equal(spoiled[2][case.pairs(b)], clean[2][case.pairs(b)])
        assert torch.equal(spoiled[3][case.token_span(b)], clean[3][case.token_span(b)])


def test_minus_infinity_off_the_positives_is_a_certain_negative(device):
    case = Case([(2, 2)], seed=6)
    owner = int(case.positives[0])
    pair = (1 - owner) * 2
    case.tokens[int(case.offsets[pair])] = -math.inf
    loss, metrics, matrix, grad = case.run(device)
    assert loss.isfinite().all() and metrics.isfinite().all() and matrix[pair] == -math.inf
    assert grad.isfinite().all()


def test_ties_are_wrong(device):
    case = Case([(2, 2), (1, 2)], seed=7)
    case.tokens.fill_(-1.5)
    _, metrics, _, _ = case.run(device)
    assert metrics[0].tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)  # all equal: no information
    assert metrics[1, 1:].tolist() == [1.0, 1.0]  # no negatives to lose against


def test_a_line_with_nan_is_wrong(device):
    case = Case([(2, 2)], seed=10, longest=1)
    case.tokens.fill_(-5.0)
    case.tokens[case.positives * 2 + torch.arange(2)] = -1.0  # right everywhere
    assert case.run(device)[1][0, 1:].tolist() == [1.0, 1.0]
    case.tokens[(1 - int(case.positives[0])) * 2] = NAN
    assert case.run(device)[1][0, 1:].tolist() == [0.5, 0.5]


def test_large_sums_keep_their_differences(device):
    """Scores near -2000 that differ by one: a log-sum-exp in one fp32 number would lose three digits."""
    case = Case([(4, 4)], seed=8, longest=1)
    case.tokens.sub_(2000.0).round_()
    case.check(device, "sum")


def test_what_cannot_be_computed_is_nan_and_loud(device):
    case = Case([(2, 2), (3, 3), (2, 2)], seed=9)
    clean = case.run(device)
    case.positives[3] = 3  # the second group has constitutions 0, 1, 2
    assert case.run(device)[0].isnan().tolist() == [False, True, False]
    case.positives[3] = -1
    assert case.run(device)[0].isnan().tolist() == [False, True, False]
    case.positives[3] = 0
    case.shapes[1, 0] = 257
    loss, metrics, _, _ = case.run(device)
    assert loss.isnan().tolist() == [False, True, False] and metrics[1].isnan().all()
    assert torch.equal(loss[[0, 2]], clean[0][[0, 2]])


SIZES = torch.tensor([[2, 2]])
GROUPS = {"offsets": 64, "shapes": 64, "sizes": SIZES.data_ptr(), "groups": 1}
FORWARD = GROUPS | {"normalize": "mean"}
FORWARD |= dict.fromkeys(("token_logprobs", "positives", "loss", "metrics", "matrix", "pair_grad"), 64)
BACKWARD = GROUPS | dict.fromkeys(("loss_grad", "pair_grad", "token_grad"), 64)
CALLS = {
    _C.segment_infonce_forward_host: FORWARD,
    _C.segment_infonce_backward_host: BACKWARD,
}
if WITH_CUDA:
    CALLS[_C.segment_infonce_forward_cuda] = FORWARD | {"stream": 0}
    CALLS[_C.segment_infonce_backward_cuda] = BACKWARD | {"stream": 0}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("normalize", "median"),
        ("groups", -1),
        ("offsets", 0),
        ("shapes", 0),
        ("sizes", 0),
        ("positives", 0),
        ("loss", 0),
        ("metrics", 0),
        ("matrix", 0),
        ("pair_grad", 0),
        ("loss_grad", 0),
    ],
)
def test_bad_arguments_are_named(name, value):
    taking = {call: arguments for call, arguments in CALLS.items() if name in arguments}
    assert taking
    for call, arguments in taking.items():
        with pytest.raises(ValueError, match=f"^{name}: expected .* got '?{value}"):
            call(**arguments | {name: value})


def test_no_groups_is_nothing_to_do():
    for call, arguments in CALLS.items():
        assert call(**arguments | {"groups": 0}) is None


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_launch_without_a_device_raises_with_cudas_words():
    for name in ("segment_infonce_forward", "segment_infonce_backward"):
        call = getattr(_C, f"{name}_cuda")
        with pytest.raises(RuntimeError, match=rf"^{name}: .*(CUDA|driver|device)"):
            call(**CALLS[call])


@needs_nvcc
def test_cuda_version():
    major, minor = _C.cuda_version().split(".")
    assert int(major) >= 12 and int(minor) >= 0
