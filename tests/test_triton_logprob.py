"""Triton head against the float64 oracle: on the CPU under Triton's interpreter, and on a GPU where there is one.

Triton decides at import whether it interprets, so the interpreted tests run in a process of their own.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from graph_replay import assert_replays
from peak_memory import PeakMemory
from tolerance import EXACT, assert_as_good_as, assert_exact, relative_error

from sami_fast import linear_logprob, ops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")
compiled = pytest.mark.skipif(INTERPRETED, reason="needs compiled kernels")
gpu = [compiled, pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
VOCABULARIES = [32000, 128256, 151936, 262144]


@compiled
def test_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-6000:] + run.stderr[-2000:]


@compiled
def test_cpu_tensors_need_the_interpreter():
    hidden, weight, labels = torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"hidden: expected CUDA tensors \(or TRITON_INTERPRET=1 .* a tensor on cpu"):
        linear_logprob(hidden, weight, labels, backend="triton")
    assert linear_logprob(hidden, weight, labels).shape == (2,)


@compiled
def test_default_backend_on_cuda():
    for dtype, expected in ((torch.bfloat16, "triton"), (torch.float64, "reference")):
        x = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
        assert ops.dispatch.triton_or_reference("linear_logprob", None, x) == expected


def head(rng, N, H, V, dtype=torch.float32, spread=1.0):
    """hidden, weight, labels, bias: logits of that standard deviation."""
    make = lambda *shape: torch.tensor(rng.standard_normal(shape), dtype=dtype)  # noqa: E731
    hidden = (make(N, H).double() * spread * H**-0.5).to(dtype)
    return hidden, make(V, H), torch.tensor(rng.integers(0, V, N)), make(V)


def eager(hidden, weight, labels, bias=None, logit_scale=1.0, softcap=None):
    """PyTorch's own path: the head in the tensors' dtype, float32 logits from there on."""
    z = torch.nn.functional.linear(hidden, weight, bias).float() * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return z.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)


def run(function, hidden, weight, labels, bias, trains, upstream, **options):
    """log p and the gradients that the regime asks for."""
    leaves = dict(no_grad=[], frozen_head=[hidden], trained_head=[t for t in (hidden, weight, bias) if t is not None])
    tensors = [t if t is None else t.detach().requires_grad_() for t in (hidden, weight, bias)]
    if trains != "trained_head":
        tensors = [tensors[0], *(t if t is None else t.detach() for t in tensors[1:])]
    inputs = [t for t in tensors if t is not None and t.requires_grad][: len(leaves[trains])]
    with torch.set_grad_enabled(trains != "no_grad"):
        out = function(tensors[0], tensors[1], labels, bias=tensors[2], **options)
    return [out, *(torch.autograd.grad(out, inputs, upstream.to(out.dtype)) if inputs else [])]


def compare(hidden, weight, labels, bias=None, *, regime="trained_head", upstream=None, **options):
    """log p exact whatever the dtype; gradients exact in float32, in 16 bits as good as PyTorch's."""
    if upstream is None:
        generator = torch.Generator().manual_seed(len(hidden))
        upstream = torch.randn(len(hidden), generator=generator).to(hidden.device)
    arguments = (labels, bias, regime, upstream)
    actual = run(lambda *a, **k: linear_logprob(*a, **k, backend="triton"), hidden, weight, *arguments, **options)
    wide = [t if t is None else t.detach().cpu().double() for t in (hidden, weight, bias)]
    expected = run(oracle.logprob, *wide[:2], labels.cpu(), wide[2], regime, upstream.cpu(), **options)
    assert actual[0].dtype == torch.float32 and (actual[0] <= 0).all()
    assert_exact(actual[0], expected[0], "logprob")
    names = ("hidden", "weight", "bias")
    if hidden.dtype == torch.float32:
        for name, a, e in zip(names, actual[1:], expected[1:], strict=False):
            assert_exact(a, e, f"grad {name}", slack=4)
        return
    theirs = run(eager, hidden, weight, *arguments, **options)
    for name, a, t, e in zip(names, actual[1:], theirs[1:], expected[1:], strict=False):
        assert a.dtype == hidden.dtype
        assert_as_good_as(a, t, e, f"grad {name}")


def pairwise(features, seed=0):
    """Few combinations in which every two values of different features meet."""
    rng = np.random.default_rng(seed)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(features, 2)
        for x in range(len(features[a]))
        for y in range(len(features[b]))
    }
    rows = []
    while missing:
        candidates = [{name: int(rng.integers(len(values))) for name, values in features.items()} for _ in range(50)]
        forced = min(missing)
        candidates = [row | dict(forced) for row in candidates]
        covered = [{p for p in itertools.combinations(row.items(), 2) if p in missing} for row in candidates]
        best = max(range(len(candidates)), key=lambda i: len(covered[i]))
        missing -= covered[best]
        rows.append({name: features[name][index] for name, index in candidates[best].items()})
    return rows


# --------------------------------------------------------------------------------------------------------------------
# In the interpreter


@pytest.fixture
def small_blocks(monkeypatch):
    """Call with (rows, columns, kept bytes): small heads then span many blocks. Fresh memory holds NaN."""
    from sami_fast.kernels import configs

    def use(rows, columns, keep_bytes=256 << 20):
        monkeypatch.setattr(configs, "LINEAR_LOGPROB", configs.LogitBlocks(rows, columns, rows * columns, 1024, 16))
        monkeypatch.setattr(ops.logprob, "_KEEP_BYTES", keep_bytes)

    torch.use_deterministic_algorithms(True)
    yield use
    torch.use_deterministic_algorithms(False)


# Rows: one, a part of a chunk, many chunks and a rest. Vocabularies: one token, fewer than a block, blocks exactly,
# blocks and one more. Kept: nothing, the first 64 columns, everything and its padding.
FEATURES = dict(
    N=[1, 13, 41],
    H=[1, 24, 40],
    V=[1, 97, 128, 193],
    dtype=[torch.float32, torch.float16],
    regime=["no_grad", "frozen_head", "trained_head", "trained_head"],
    blocks=[(16, 32), (64, 64), (16, 256)],
    keep=[0, 64, 4096],
    bias=[False, True],
    logit_scale=[1.0, 0.3],
    softcap=[None, 2.0, 30.0],
    spread=[0.1, 1.0, 8.0],
    same_label=[False, True],
)


@interpreted
@pytest.mark.parametrize("case", pairwise(FEATURES), ids=lambda case: "-".join(map(str, case.values())))
def test_features_pairwise(case, small_blocks):
    rng = np.random.default_rng(1)
    hidden, weight, labels, bias = head(rng, case["N"], case["H"], case["V"], case["dtype"], case["spread"])
    small_blocks(*case["blocks"], keep_bytes=case["keep"] * case["N"] * hidden.element_size())
    if case["same_label"]:
        labels = labels[:1].expand_as(labels)
    options = dict(regime=case["regime"], logit_scale=case["logit_scale"], softcap=case["softcap"])
    compare(hidden, weight, labels, bias if case["bias"] else None, **options)


@interpreted
@pytest.mark.parametrize("keep_bytes", [0, 2 << 20, 256 << 20])
@pytest.mark.parametrize("regime", ["no_grad", "frozen_head", "trained_head"])
def test_shipped_blocks(regime, keep_bytes, monkeypatch):
    """A vocabulary of two blocks, odd, with padding behind what is kept."""
    monkeypatch.setattr(ops.logprob, "_KEEP_BYTES", keep_bytes)
    compare(*head(np.random.default_rng(2), 20, 16, 50257, torch.float16, spread=3.0)[:3], regime=regime)


@interpreted
@pytest.mark.parametrize("regime", ["frozen_head", "trained_head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nearly_certain_and_hopeless_labels(dtype, regime, small_blocks):
    """Each row on its own is exact: log p from -1e-7 to -100, with gradients of the size of 1 - p."""
    small_blocks(16, 32, keep_bytes=64 * 14 * 2)
    V, H = 100, 100
    weight = torch.eye(V, H, dtype=dtype)
    gaps = torch.tensor([20.0, 18, 16, 14, 12, 10, 8, 4, 0, -4, -16, -30, -60, -100])
    labels = torch.arange(len(gaps)) * 7
    hidden = torch.randn(len(gaps), H).to(dtype)
    hidden[torch.arange(len(gaps)), labels] = gaps.to(dtype)
    upstream = torch.ones(())[None].expand(len(gaps))  # stride 0
    ours = run(
        lambda *a, **k: linear_logprob(*a, **k, backend="triton"), hidden, weight, labels, None, regime, upstream
    )
    expected = run(oracle.logprob, hidden.double(), weight.double(), labels, None, regime, upstream)
    for row in range(len(gaps)):
        assert_exact(ours[0][row : row + 1], expected[0][row : row + 1], f"logprob {row}")
        error = relative_error(ours[1][row], expected[1][row])
        # float16 cannot hold a gradient of 1e-9: half its smallest step, in each of H entries, is allowed.
        step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        limit = 4 * (EXACT[dtype] if dtype == torch.float32 else torch.finfo(dtype).eps)
        assert error <= limit + step * H**0.5 / float(expected[1][row].norm()), f"grad hidden {row}: {error:.1e}"


@interpreted
def test_vocabulary_that_is_masked_by_its_bias(small_blocks):
    """Whole blocks of -inf, before the label's and after it, and a label that cannot be."""
    small_blocks(16, 32, keep_bytes=64 * 6 * 4)
    hidden, weight, labels, bias = head(np.random.default_rng(3), 6, 8, 200)
    bias[:70] = bias[150:] = -torch.inf
    labels = torch.tensor([75, 80, 149, 100, 70, 3])
    compare(hidden[:5], weight, labels[:5], bias, regime="frozen_head")
    compare(hidden[:5], weight, labels[:5], bias, regime="no_grad")
    assert linear_logprob(hidden, weight, labels, bias=bias, backend="triton")[5] == -torch.inf
    actual = run(linear_logprob, hidden[:5], weight, labels[:5], bias, "trained_head", torch.ones(5), backend="triton")
    expected = run(oracle.logprob, hidden[:5], weight, labels[:5], bias, "trained_head", torch.ones(5))
    for a, e in zip(actual, expected, strict=True):
        assert_exact(a, e, slack=4)


@interpreted
def test_layouts(small_blocks):
    """Strided views between NaN, a transposed weight, labels and upstream gradients with strides 2 and 0."""
    small_blocks(16, 32, keep_bytes=64 * 20 * 4)
    hidden, weight, labels, bias = head(np.random.default_rng(4), 20, 24, 101)
    views = []
    for tensor in (hidden, weight):
        wide = torch.full((tensor.shape[0] + 2, tensor.shape[1] + 5), torch.nan)
        views.append(wide[1:-1, 3:-2].copy_(tensor))
    labels = torch.stack([labels, labels], dim=1)[:, 0]
    for regime in ("frozen_head", "trained_head"):
        for upstream in (torch.ones(()).expand(20), torch.randn(20, 2)[:, 0], torch.zeros(20)):
            compare(*views, labels, bias, regime=regime, upstream=upstream)
        compare(hidden.t().contiguous().t(), weight.t().contiguous().t(), labels, bias, regime=regime)


@interpreted
@pytest.mark.parametrize("regime", ["no_grad", "frozen_head", "trained_head"])
def test_no_rows(regime):
    hidden, weight, labels, bias = head(np.random.default_rng(5), 0, 8, 50)
    out, *grads = run(linear_logprob, hidden, weight, labels, bias, regime, torch.zeros(0), backend="triton")
    assert out.shape == (0,) and all(not grad.any() for grad in grads)


@interpreted
@pytest.mark.parametrize("trains", [False, True])
def test_weight_tied_to_the_embedding(trains):
    rng = np.random.default_rng(6)
    _, weight, labels, _ = head(rng, 1, 12, 60)
    ids = torch.tensor(rng.integers(0, 60, 9))
    labels, mix = torch.tensor(rng.integers(0, 60, 9)), torch.randn(12, 12, requires_grad=True)
    results = []
    for function, dtype in ((lambda *a: linear_logprob(*a, backend="triton"), torch.float32), (oracle.logprob, None)):
        tied = weight.to(dtype or torch.float64).requires_grad_(trains)
        out = function(tied[ids] @ mix.to(tied.dtype), tied, labels)
        results.append([out, *torch.autograd.grad(out.sum(), [mix, tied] if trains else [mix])])
    for a, e in zip(*results, strict=True):
        assert_exact(a, e, slack=4)


@interpreted
def test_opcheck_and_one_graph(small_blocks):
    small_blocks(16, 64, keep_bytes=64 * 5 * 4)
    torch.use_deterministic_algorithms(False)
    hidden, weight, labels, bias = head(np.random.default_rng(7), 5, 8, 101)
    hidden.requires_grad_()
    plain, all_options = (None, 1.0, None), (bias.requires_grad_(), 0.5, 2.0)
    trained = weight.clone().requires_grad_()
    for matrix, options, regime, keep in (
        (weight, (None, 0.5, None), "frozen_head", 0),
        (trained, plain, "trained_head", 0),
        (trained, all_options, "trained_head", 64),
    ):
        arguments = (hidden, matrix, labels, *options, regime, keep, "triton")
        torch.library.opcheck(ops.logprob._linear_logprob, arguments)
    constants = (hidden.detach(), weight, labels, *plain, "no_grad", 0, "triton")
    torch.library.opcheck(ops.logprob._linear_logprob, constants, test_utils=("test_schema", "test_faketensor"))
    for trained in (False, True):
        inputs = [hidden, weight.detach().requires_grad_(trained)]
        step = lambda h, w: linear_logprob(h, w, labels, softcap=3.0, backend="triton")  # noqa: E731
        graph = torch.compile(step, fullgraph=True, backend="aot_eager")
        pair = [[f(*inputs), *torch.autograd.grad(f(*inputs).sum(), inputs[: 1 + trained])] for f in (step, graph)]
        for a, e in zip(*pair, strict=True):
            assert a.equal(e)


@interpreted
def test_regimes_are_logged_once_each(caplog):
    hidden, weight, labels, _ = head(np.random.default_rng(8), 3, 8, 50)
    ops.logprob._log_regime.cache_clear()
    with caplog.at_level("INFO", "sami_fast.ops"):
        for _ in range(2):
            for regime in ("no_grad", "frozen_head", "trained_head"):
                run(linear_logprob, hidden, weight, labels, None, regime, torch.ones(3), backend="triton")
    said = [m for m in caplog.messages if m.startswith("linear_logprob on backend 'triton': ")]
    assert len(said) == 3
    for message, words in zip(said, ("no gradient", "head is frozen", "head trains"), strict=True):
        assert words in message


@interpreted
def test_what_the_kernels_cannot_do_is_refused_by_name():
    hidden, weight, labels, _ = head(np.random.default_rng(9), 3, 8, 50)
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(ValueError, match=rf"hidden: expected one of .* got {dtype}"):
            linear_logprob(hidden.to(dtype), weight.to(dtype), labels, backend="triton")


# --------------------------------------------------------------------------------------------------------------------
# Contracts of every backend


BACKENDS = [("triton", torch.float32), ("triton", torch.float16)] if INTERPRETED else []
BACKENDS += [] if INTERPRETED else [("reference", d) for d in (torch.float32, torch.bfloat16, torch.float16)]


def two_constitutions(rng, V, dtype, shape, tokens=8, H=16):
    """Head and hidden states of one response under two constitutions that move them a little."""
    _, weight, labels, _ = head(rng, tokens, H, V, dtype)
    noise = torch.tensor(rng.standard_normal((2, tokens, H)))
    if shape == "peaked":  # the label far ahead of a vocabulary of logits of 1
        direction = weight[labels].double()
        hidden = direction * (1.6 * np.log(V) / direction.square().sum(1, keepdim=True)) + 0.1 * noise
    else:
        hidden = torch.tensor(0.02 * rng.standard_normal((tokens, H))) + 0.01 * noise
    return hidden.to(dtype).flatten(0, 1), weight, labels.repeat(2)


def check_differences(backend, dtype, V, shape, device="cpu"):
    """Of log p between constitutions, and of gradients: InfoNCE consumes nothing else."""
    hidden, weight, labels = two_constitutions(np.random.default_rng(V), V, dtype, shape)
    N = len(labels) // 2
    upstream = torch.tensor([1.0, -1.0]).repeat_interleave(N)
    on_device = [t.to(device) for t in (hidden, weight, labels)], upstream.to(device)

    def results(function, tensors, upstream, regime="trained_head"):
        logprob, *grads = run(function, *tensors, None, regime, upstream)
        return logprob, logprob[:N].double() - logprob[N:].double(), *grads

    expected = results(oracle.logprob, (hidden.double(), weight.double(), labels), upstream)
    theirs = results(eager, *on_device)
    for regime in ("frozen_head", "trained_head"):
        ours = results(lambda *a, **k: linear_logprob(*a, **k, backend=backend), *on_device, regime)
        names = (f"{regime} {name}" for name in ("logprob", "difference", "hidden", "weight"))
        for name, a, t, e in zip(names, ours, theirs, expected, strict=False):
            assert_as_good_as(a, t, e, name)
        # Beyond the contract: no logit is ever rounded, so that log p is float32's in every dtype.
        assert_exact(ours[0], expected[0], "logprob")


@pytest.mark.parametrize("shape", ["peaked", "flat"])
@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=str)
def test_differences_between_constitutions(backend, dtype, V, shape):
    check_differences(backend, dtype, V, shape)


@pytest.mark.parametrize("backend", ["triton"] if INTERPRETED else ["reference"])
def test_autocast_rounds_nothing(backend):
    hidden, weight, labels, _ = head(np.random.default_rng(10), 5, 32, 300)
    for regime in ("frozen_head", "trained_head"):
        plain = run(linear_logprob, hidden, weight, labels, None, regime, torch.ones(5), backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            cast = run(linear_logprob, hidden, weight, labels, None, regime, torch.ones(5), backend=backend)
        for a, e in zip(cast, plain, strict=True):
            assert a.equal(e)


# --------------------------------------------------------------------------------------------------------------------
# Memory, on tensors without any


@compiled
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("regime", "keep_columns"),
    [("no_grad", 0), ("frozen_head", 0), ("trained_head", 0), ("trained_head", 16384), ("trained_head", 128320)],
)
@pytest.mark.parametrize(("N", "H", "V"), [(8192, 2048, 128256), (341, 4096, 32000), (5000, 1024, 50257)])
def test_peak_memory_is_that_of_the_formula(N, H, V, regime, keep_columns, bias, monkeypatch):
    from sami_fast.kernels import configs
    from sami_fast.kernels import linear_logprob as kernels
    from sami_fast.kernels.launch import Call

    monkeypatch.setattr(Call, "run", lambda call: None)
    make = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    hidden, weight, labels = make(N, H), make(V, H), make(N, dtype=torch.int64)
    bias = make(V) if bias else None
    with PeakMemory(hidden, weight, labels, bias) as memory:
        outputs = kernels.linear_logprob_forward(hidden, weight, labels, bias, 1.0, None, regime, keep_columns)
    block = kernels.Head.prepare(N, weight, labels, bias, 1.0, None, configs.LINEAR_LOGPROB, keep_columns)
    R, W, e = block.height, -(-block.width // 128) * 128, 2
    assert R <= 4096 and R * W <= 1 << 25
    kept_blocks = sum(columns.stop <= block.kept for columns in block.columns)
    forward = 4 * R * W + e * N * keep_columns + 4 * (2 * N + 3 * R + kept_blocks * R + R * (kept_blocks > 0))
    if regime == "frozen_head":
        forward += e * R * W + 4 * R * H + e * N * H
    assert memory.peak == forward
    assert memory.live == e * N * (H if regime == "frozen_head" else keep_columns) + 8 * N
    if regime != "trained_head":
        return
    grad = make(N, dtype=torch.float32)
    with PeakMemory(hidden, weight, labels, bias, grad, *outputs) as memory:
        kernels.linear_logprob_backward(grad, hidden, weight, labels, bias, *outputs, 1.0, None)
    recomputed = (4 + e) * R * W if keep_columns < V else 0
    backward = recomputed + 4 * block.width * H + (4 + 2 * e) * N * H + e * V * H + 12 * N
    backward += (4 + e) * V + e * N if bias is not None else 0
    assert 0 <= memory.peak - backward < 64  # single numbers


# --------------------------------------------------------------------------------------------------------------------
# On a GPU


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("keep_bytes", [0, 64 << 20, 1 << 30])
    @pytest.mark.parametrize("regime", ["no_grad", "frozen_head", "trained_head"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("shape", [(1, 64, 1), (340, 128, 32000), (5000, 96, 50257), (333, 64, 128256)])
    def test_against_oracle(self, shape, dtype, regime, keep_bytes, monkeypatch):
        monkeypatch.setattr(ops.logprob, "_KEEP_BYTES", keep_bytes)
        N, H, V = shape
        tensors = [t.cuda() for t in head(np.random.default_rng(11), N, H, V, dtype, spread=3.0)]
        compare(*tensors, regime=regime, logit_scale=0.5, softcap=30.0)
        compare(*tensors[:3], regime=regime)

    @pytest.mark.parametrize("shape", ["peaked", "flat"])
    @pytest.mark.parametrize("V", VOCABULARIES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_differences_between_constitutions(self, dtype, V, shape):
        check_differences("triton", dtype, V, shape, device="cuda")

    def test_default_is_triton_but_for_float64(self, caplog):
        ops.logprob._log_regime.cache_clear()
        hidden, weight, labels, _ = (t.cuda() for t in head(np.random.default_rng(12), 3, 16, 100))
        with caplog.at_level("INFO", "sami_fast.ops"):
            linear_logprob(hidden, weight, labels)
            linear_logprob(hidden.double(), weight.double(), labels)
        assert "backend 'triton'" in caplog.text and "backend 'reference'" in caplog.text

    def test_offsets_beyond_32_bits(self):
        """Rows of what is kept that lie 2^31 elements and more from the first."""
        N, V, H = 40000, 60000, 16
        rng = np.random.default_rng(13)
        hidden, weight, labels, _ = (t.cuda() for t in head(rng, N, H, V, torch.bfloat16))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops.logprob, "_KEEP_BYTES", 6 << 30)
            whole = run(linear_logprob, hidden, weight, labels, None, "trained_head", torch.ones(N).cuda())
        last = slice(N - 100, N)
        part = run(linear_logprob, hidden[last], weight, labels[last], None, "trained_head", torch.ones(100).cuda())
        assert relative_error(whole[0][last], part[0]) < 1e-5 and relative_error(whole[1][last], part[1]) < 1e-2

    def test_cuda_graph_determinism_and_no_recompilation(self):
        from sami_fast.kernels import linear_logprob as kernels

        rng = np.random.default_rng(14)
        functions = [kernels._block_kernel, kernels._finish_kernel, kernels._normalise_kernel, kernels._gradient_kernel]

        def step(N, V=32000):
            tensors = [t.cuda() for t in head(rng, N, 64, V, torch.bfloat16)]

            def all_regimes():
                results = []
                for regime in ("no_grad", "frozen_head", "trained_head"):
                    results += run(linear_logprob, *tensors[:3], None, regime, torch.ones(N, device="cuda"))
                return results

            return all_regimes

        both = step(5000)
        for a, e in zip(both(), both(), strict=True):
            assert a.equal(e)
        assert_replays(both)
        step(6000)()
        before = [sum(len(c[0]) for c in function.device_caches.values()) for function in functions]
        for N in (5001, 5555, 7001):
            step(N)()
        assert before == [sum(len(c[0]) for c in function.device_caches.values()) for function in functions]
