import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from factory import AWKWARD_LENGTHS, qkv, random_group
from factory import groups as random_groups
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_good_as, assert_exact

from sami_fast import linear_logprob, ops, pack, prefix_attention, segment_infonce
from sami_fast.kernels import linear_logprob_reference, prefix_attention_reference
from sami_fast.ops.dispatch import EXTENSION_DEVICES
from sami_fast.prefix_tree import Group

DTYPES = [torch.float64, torch.float32]


def gradients(outputs, inputs, seed=0):
    """Outputs and gradients of inputs under random upstream gradients."""
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    return torch.autograd.grad(outputs, inputs, upstream)


def compare_attention(packed, q, k, v, **options):
    sinks = options.get("sinks")
    inputs = [q, k, v] if sinks is None else [q, k, v, sinks]
    actual = prefix_attention(q, k, v, packed.plan, **options, return_lse=True)
    expected = oracle.attention(q, k, v, packed.subtree_end, packed.position_ids, **options)
    for name, a, e in zip(("out", "lse"), actual, expected, strict=True):
        assert_exact(a, e, name)
    pairs = zip(("q", "k", "v", "sinks"), gradients(actual, inputs), gradients(expected, inputs), strict=False)
    for name, a, e in pairs:
        assert_exact(a, e, f"grad {name}", slack=4)


FEATURES = [
    dict(zip(("window", "softcap", "sinks", "scale"), values, strict=True))
    for values in itertools.product((None, 3), (None, 1.5), (False, True), (None, 0.3))
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2)])
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_attention_features(features, heads, dtype):
    rng = np.random.default_rng(3)
    packed = pack([random_group(rng, 3, 4), random_group(rng, 2, 2, query_first=False)])
    q, k, v = qkv(rng, packed.num_tokens, *heads, 8, 12, dtype=dtype)
    sinks = torch.tensor(rng.standard_normal(heads[0]), dtype=dtype).requires_grad_() if features["sinks"] else None
    compare_attention(packed, q, k, v, **{**features, "sinks": sinks})


@given(st.lists(random_groups(), min_size=1, max_size=2), st.integers(0, 2**32), st.sampled_from([None, 1, 2, 4]))
def test_attention_on_random_trees(groups, seed, window):
    rng = np.random.default_rng(seed)
    packed = pack(groups)
    compare_attention(packed, *qkv(rng, packed.num_tokens, 4, 2, 4), window=window)


@pytest.mark.parametrize("length", AWKWARD_LENGTHS)
def test_attention_across_block_edges(length, monkeypatch):
    monkeypatch.setattr(prefix_attention_reference, "_SCORE_BYTES", 1)  # 16 rows a block
    monkeypatch.setattr(prefix_attention_reference, "_STRIP", 16)
    rng = np.random.default_rng(length)
    query = rng.integers(0, 99, length)
    prompts = [np.r_[query, rng.integers(0, 99, size)] for size in (1, length)]
    packed = pack([Group(prompts, [rng.integers(0, 99, size) for size in (2, length + 1)])])
    q, k, v = qkv(rng, packed.num_tokens, 2, 1, 4)
    for window in (None, length):
        compare_attention(packed, q, k, v, window=window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_16_bit_is_as_good_as_pytorch(dtype):
    rng = np.random.default_rng(4)
    packed = pack([random_group(rng, 4, 4, query=40, constitution=20, response=20)])
    inputs = [t.detach().to(dtype).requires_grad_() for t in qkv(rng, packed.num_tokens, 4, 2, 16)]
    tokens = torch.arange(packed.num_tokens)
    visible = (tokens <= tokens[:, None]) & (tokens[:, None] < packed.subtree_end)
    heads_first = [t.transpose(0, 1) for t in inputs]
    eager = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=visible, enable_gqa=True)
    actual = prefix_attention(*inputs, packed.plan)
    expected = oracle.attention(*inputs, packed.subtree_end, packed.position_ids)[0]
    triples = zip(
        (actual, *gradients([actual], inputs)),
        (eager.transpose(0, 1), *gradients([eager.transpose(0, 1)], inputs)),
        (expected, *gradients([expected], inputs)),
        strict=True,
    )
    for name, (a, e, x) in zip(("out", "grad q", "grad k", "grad v"), triples, strict=True):
        assert a.dtype == dtype
        assert_as_good_as(a, e, x, name)


def head(rng, N, H, V, dtype, bias):
    make = lambda *shape: torch.tensor(rng.standard_normal(shape), dtype=dtype).requires_grad_()  # noqa: E731
    return make(N, H), make(V, H), torch.tensor(rng.integers(0, V, N)), make(V) if bias else None


@pytest.mark.parametrize("keep_bytes", [0, 64 * 37 * 8, 256 << 20])  # in between: the first columns, two dtypes
@pytest.mark.parametrize("chunk_bytes", [1, 4000, 8 << 20])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(1, 3, 1), (37, 8, 101), (5, 4, 50)])
def test_linear_logprob(shape, frozen, bias, softcap, dtype, chunk_bytes, keep_bytes, monkeypatch):
    monkeypatch.setattr(ops.logprob, "_KEEP_BYTES", keep_bytes)
    monkeypatch.setattr(linear_logprob_reference, "_CACHED_LOGIT_BYTES", chunk_bytes)
    monkeypatch.setattr(linear_logprob_reference, "_LOGIT_ROWS", min(16, chunk_bytes))
    hidden, weight, labels, bias = head(np.random.default_rng(5), *shape, dtype, bias)
    inputs = [hidden]
    for parameter in (weight, bias):
        if parameter is not None:
            parameter.requires_grad_(not frozen)
            inputs += [] if frozen else [parameter]
    options = dict(bias=bias, logit_scale=0.7, softcap=softcap)
    actual, expected = (f(hidden, weight, labels, **options) for f in (linear_logprob, oracle.logprob))
    assert actual.dtype == dtype and (actual <= 0).all()
    assert_exact(actual, expected, "logprob")
    names = ("hidden", "weight", "bias")
    pairs = zip(names, gradients([actual], inputs), gradients([expected], inputs), strict=False)
    for name, a, e in pairs:
        assert_exact(a, e, f"grad {name}", slack=4)


def test_linear_logprob_of_nearly_certain_and_hopeless_labels():
    weight = torch.eye(8, dtype=torch.float32, requires_grad=True)
    hidden = (40.0 * torch.eye(8)[:2]).requires_grad_()
    labels = torch.tensor([0, 5])
    actual, expected = linear_logprob(hidden, weight, labels), oracle.logprob(hidden, weight, labels)
    assert (actual <= 0).all()
    assert_exact(actual[1], expected[1])
    for a, e in zip(gradients([actual], [hidden, weight]), gradients([expected], [hidden, weight]), strict=True):
        assert_exact(a, e)


@pytest.mark.parametrize("frozen", [False, True])
def test_linear_logprob_in_bf16_is_as_good_as_pytorch(frozen):
    hidden, weight, labels, _ = head(np.random.default_rng(6), 64, 32, 9001, torch.bfloat16, False)
    weight.requires_grad_(not frozen)
    inputs = [hidden] if frozen else [hidden, weight]
    actual = linear_logprob(hidden, weight, labels)
    eager = (hidden @ weight.t()).float().log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    expected = oracle.logprob(hidden, weight, labels)
    assert actual.dtype == torch.float32
    assert_as_good_as(actual, eager, expected, "logprob")
    triples = zip(*(gradients([out], inputs) for out in (actual, eager, expected)), strict=True)
    for a, e, x in triples:
        assert_as_good_as(a, e, x, "gradient")


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INFONCE_BACKENDS = (
    ["reference"] + (["cuda"] if "cpu" in EXTENSION_DEVICES else []) + (["triton"] if INTERPRETED else [])
)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_segment_infonce_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "infonce or opcheck"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-6000:] + run.stderr[-2000:]


@given(
    st.lists(random_groups(), min_size=1, max_size=4),
    st.sampled_from(["mean", "sum"]),
    st.integers(0, 2**32),
    st.sampled_from(INFONCE_BACKENDS),
)
def test_segment_infonce(groups, normalize, seed, backend):
    packed = pack(groups)
    rng = np.random.default_rng(seed)
    dtype = torch.float64 if backend == "reference" else torch.float32
    tokens = torch.tensor(-rng.exponential(size=packed.labels.numel()), dtype=dtype).requires_grad_()
    arguments = (packed.offsets, packed.shapes, packed.positives)
    loss, matrix, metrics = segment_infonce(tokens, *arguments, normalize=normalize, backend=backend)
    pair, expected = 0, []
    for group in groups:
        C, R = group.shape
        segments = [tokens[packed.offsets[s] : packed.offsets[s + 1]].double() for s in range(pair, pair + C * R)]
        reduce = torch.mean if normalize == "mean" else torch.sum
        entries = [reduce(s) if len(s) else torch.tensor(-torch.inf, dtype=torch.float64) for s in segments]
        assert_exact(matrix[pair : pair + C * R], torch.stack(entries), "matrix")
        expected.append(oracle.infonce(torch.stack(entries).view(C, R), group.positives.tolist()))
        pair += C * R
    expected_loss = torch.stack([e[0] for e in expected])
    expected_metrics = torch.tensor([[float(x) for x in e[1:]] for e in expected], dtype=torch.float64)
    rounding = 10 * torch.finfo(dtype).eps  # of logits of order one: losses and gradients may be near zero
    assert torch.allclose(loss.double(), expected_loss, rtol=rounding, atol=rounding)
    assert torch.allclose(metrics.double(), expected_metrics, rtol=rounding, atol=rounding)
    (a,), (e,) = gradients([loss], [tokens]), gradients([expected_loss], [tokens])
    assert torch.allclose(a, e, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("backend", INFONCE_BACKENDS)
def test_segment_infonce_keeps_bad_numbers_inside_their_group(backend):
    rng = np.random.default_rng(8)
    packed = pack([random_group(rng, 2, 3) for _ in range(3)])
    tokens = torch.tensor(-rng.exponential(size=packed.labels.numel()), dtype=torch.float32)
    arguments = (packed.offsets, packed.shapes, packed.positives)
    clean = segment_infonce(tokens, *arguments, backend=backend)[0]
    for bad in (torch.nan, -torch.inf):
        spoiled = tokens.clone()
        spoiled[packed.offsets[6]] = bad  # first token of the second group's first positive
        loss = segment_infonce(spoiled, *arguments, backend=backend)[0]
        assert loss[[0, 2]].equal(clean[[0, 2]]) and not loss[1].isfinite()


def test_opcheck():
    rng = np.random.default_rng(9)
    packed = pack([random_group(rng, 2, 3)])
    q, k, v = qkv(rng, packed.num_tokens, 4, 2, 8, dtype=torch.float32)
    sinks = torch.randn(4, requires_grad=True)
    plan = packed.plan
    for arguments in ((sinks, 0.3, 4, 2.0), (None, 0.3, None, None)):
        torch.library.opcheck(
            ops.attention._prefix_attention, (q, k, v, plan.position_ids, plan.nodes, *arguments, "reference")
        )
    hidden, weight, labels, bias = head(rng, 9, 8, 33, torch.float32, True)
    for keep_columns in (0, 20, 64):
        arguments = (hidden, weight, labels, bias, 0.5, None, "trained_head", keep_columns, "reference")
        torch.library.opcheck(ops.logprob._linear_logprob, arguments)
    constants = (weight.detach(), labels, None, 1.0, 2.0)
    torch.library.opcheck(ops.logprob._linear_logprob, (hidden, *constants, "frozen_head", 0, "reference"))
    torch.library.opcheck(ops.logprob._linear_logprob, (hidden.detach(), *constants, "no_grad", 0, "reference"))
    tokens = torch.randn(packed.labels.numel(), requires_grad=True)
    shapes, table, *_ = ops.infonce._groups(packed.shapes, torch.device("cpu"))
    for backend in INFONCE_BACKENDS:
        arguments = (tokens, packed.offsets, shapes, table, packed.positives, "mean", backend)
        torch.library.opcheck(ops.infonce._segment_infonce, arguments)
        grads = torch.randn(1), torch.randn(packed.offsets.numel() - 1)
        arguments = (*grads, packed.offsets, shapes, table, tokens.numel(), backend)
        torch.library.opcheck(ops.infonce._segment_infonce_backward, arguments)


@pytest.mark.parametrize("backend", INFONCE_BACKENDS)
@pytest.mark.parametrize("normalize", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 256), (256, 256), (17, 33), (3, 64)])
def test_segment_infonce_of_large_groups(shape, normalize, backend):
    C, R = shape
    rng = np.random.default_rng(11)
    lengths = rng.integers(1, 4, C * R)
    offsets = torch.tensor(np.r_[0, np.cumsum(lengths)])
    owners = rng.permutation(np.r_[np.arange(min(C, R)), rng.integers(0, C, max(R - C, 0))])
    tokens = torch.tensor(-rng.exponential(size=lengths.sum()), dtype=torch.float32).requires_grad_()
    loss, matrix, metrics = segment_infonce(
        tokens, offsets, [shape], torch.tensor(owners), normalize=normalize, backend=backend
    )
    (grad,) = torch.autograd.grad(loss.sum(), tokens)
    wide = tokens.detach().double().requires_grad_()
    e_loss, e_matrix, e_metrics = segment_infonce(
        wide, offsets, [shape], torch.tensor(owners), normalize=normalize, backend="reference"
    )
    (e_grad,) = torch.autograd.grad(e_loss.sum(), wide)
    assert_exact(matrix, e_matrix, "matrix")
    assert_exact(grad, e_grad, "gradient")
    assert torch.allclose(loss.double(), e_loss, rtol=1e-6, atol=1e-6)
    assert torch.allclose(metrics.double(), e_metrics, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("tile", [1, 4, 14])
def test_segment_infonce_by_strips_of_rows(tile, seed, monkeypatch):
    """As of large groups: masks, groups of several shapes, numbers that are not finite, an owner out of range."""
    from sami_fast.kernels import segment_infonce as kernels

    monkeypatch.setattr(kernels, "_TILE", tile)
    rng = np.random.default_rng(seed)
    packed = pack([random_group(rng, *sorted(rng.integers(2, 7, 2)), masked=bool(i % 2)) for i in range(4)])
    assert kernels.forward_launch(*np.max(packed.shapes, axis=0).tolist())[0] is kernels._segment_infonce_strips_kernel
    tokens = torch.tensor(-rng.exponential(size=packed.labels.numel()) - 200.0 * (seed % 2), dtype=torch.float32)
    positives = packed.positives.clone()
    if seed % 3 == 1:
        tokens[rng.integers(len(tokens))] = [torch.nan, -torch.inf][seed % 2]
    if seed % 3 == 2:
        positives[rng.integers(len(positives))] = 99
    results = []
    for backend in ("triton", "reference"):
        leaf = tokens.to(torch.float32 if backend == "triton" else torch.float64).requires_grad_()
        outputs = segment_infonce(leaf, packed.offsets, packed.shapes, positives, backend=backend)
        results.append((*outputs, *torch.autograd.grad(outputs[0].sum(), leaf)))
    for name, a, e in zip(("loss", "matrix", "metrics", "gradient"), *results, strict=True):
        assert torch.allclose(a.double(), e, rtol=2e-5, atol=2e-5, equal_nan=True), name


def test_ops_compile_to_one_graph():
    rng = np.random.default_rng(10)
    packed = pack([random_group(rng, 2, 3)])
    q, k, v = qkv(rng, packed.num_tokens, 4, 2, 8, dtype=torch.float32)
    weight, labels = torch.randn(33, 32, requires_grad=True), packed.labels % 33

    def step(q, k, v, weight):
        out = prefix_attention(q, k, v, packed.plan, window=5)
        tokens = linear_logprob(out.flatten(1)[packed.hidden_index], weight, labels)
        return segment_infonce(tokens, packed.offsets, packed.shapes, packed.positives)[0].sum()

    inputs = (q, k, v, weight)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, e in zip(gradients([compiled(*inputs)], inputs), gradients([step(*inputs)], inputs), strict=True):
        assert_exact(a, e.double())


def test_backends_say_why(caplog):
    report = ops.backends()
    assert report["reference"].startswith("available: prefix_attention")
    if not torch.cuda.is_available():
        assert report["triton"].startswith("unavailable: ") and report["cuda"].startswith("unavailable: ")
    ops.dispatch.load.cache_clear()
    with caplog.at_level("INFO", "sami_fast.ops"):
        linear_logprob(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, dtype=torch.int64))
    assert "linear_logprob runs on backend 'reference' (cpu tensors)" in caplog.text


def test_bad_arguments_are_refused_by_name():
    packed = pack([random_group(np.random.default_rng(11), 2, 2)])
    q, k, v = qkv(np.random.default_rng(11), packed.num_tokens, 4, 2, 8, dtype=torch.float32, requires_grad=False)
    plan = packed.plan
    bad_attention = {
        r"q: expected \[T, Hq, D\]": (q[0], k, v, {}),
        "q: expected a floating-point dtype": (q.long(), k.long(), v.long(), {}),
        r"k: expected \[T, Hkv, D\] with Hkv dividing 4": (q, k.repeat(1, 2, 1)[:, :3], v, {}),
        "k: expected torch.float32": (q, k.double(), v, {}),
        "v: expected torch.float32": (q, k, v[1:], {}),
        "plan: expected a plan of": (q[1:], k[1:], v[1:], {}),
        "window: expected a positive": (q, k, v, dict(window=0)),
        "softcap: expected a positive": (q, k, v, dict(softcap=0.0)),
        r"sinks: expected \[4\]": (q, k, v, dict(sinks=torch.zeros(3))),
        "backend: expected one of": (q, k, v, dict(backend="magic")),
    }
    for message, (a, b, c, options) in bad_attention.items():
        with pytest.raises(ValueError, match=message):
            prefix_attention(a, b, c, plan, **options)
    hidden, weight, labels = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)
    bad_head = {
        r"hidden: expected \[N, H\]": (hidden[0], weight, labels, {}),
        "weight: expected torch.float32": (hidden, weight.double(), labels, {}),
        r"labels: expected torch.int64 \[3\]": (hidden, weight, labels.int(), {}),
        r"bias: expected \[5\]": (hidden, weight, labels, dict(bias=torch.zeros(4))),
    }
    for message, (a, b, c, options) in bad_head.items():
        with pytest.raises(ValueError, match=message):
            linear_logprob(a, b, c, **options)
    tokens = torch.zeros(4)
    offsets, positives = torch.arange(5), torch.arange(2)
    bad_infonce = {
        "normalize: expected": (tokens, offsets, [(2, 2)], positives, dict(normalize="max")),
        "token_logprobs: expected floating point": (tokens.long(), offsets, [(2, 2)], positives, {}),
        r"offsets: expected torch.int64 \[7\]": (tokens, offsets, [(2, 3)], positives, {}),
        r"positives: expected torch.int64 \[2\]": (tokens, offsets, [(2, 2)], positives[:1], {}),
        r"shapes: expected \(C, R\) > 0": (tokens, offsets, [], positives, {}),
    }
    for message, (a, b, c, d, options) in bad_infonce.items():
        with pytest.raises(ValueError, match=message):
            segment_infonce(a, b, c, d, **options)


@pytest.mark.skipif(INTERPRETED, reason="the reference, in its own process")
def test_autocast_rounds_nothing_inside_the_ops():
    rng = np.random.default_rng(12)
    packed = pack([random_group(rng, 2, 3)])
    q, k, v = qkv(rng, packed.num_tokens, 4, 2, 8, dtype=torch.float32)
    hidden, weight, labels, bias = head(rng, 9, 8, 33, torch.float32, True)
    calls = {
        "fused attention": (lambda: prefix_attention(q, k, v, packed.plan), (q, k, v)),
        "attention by blocks": (lambda: prefix_attention(q, k, v, packed.plan, window=4, softcap=2.0), (q, k, v)),
        "logprob": (lambda: linear_logprob(hidden, weight, labels, bias=bias), (hidden, weight, bias)),
    }
    for name, (call, inputs) in calls.items():
        plain = call()
        expected = [plain, *gradients([plain], inputs)]
        with torch.autocast("cpu", torch.bfloat16):
            cast = call()
            actual = [cast, *gradients([cast], inputs)]
        for a, e in zip(actual, expected, strict=True):
            assert a.equal(e), name
