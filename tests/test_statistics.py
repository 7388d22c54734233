"""linear_statistics, every backend against the float64 oracle; Triton's in a process of its own, interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from factory import random_group, tiny_model
from peak_memory import PeakMemory
from peft import LoraConfig, get_peft_model
from tolerance import assert_as_good_as, assert_exact, assert_same_gradients, assert_same_scores

from sami_fast import linear_logprob, linear_statistics, ops, pack, score
from sami_fast.kernels import linear_logprob_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
compiled = pytest.mark.skipif(INTERPRETED, reason="not in the interpreter's process")
gpu = [compiled, pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
BACKEND = "triton" if INTERPRETED else "reference"
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float64, torch.float32]
NAMES = ("logprob", "entropy", "kl")


@compiled
def test_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-6000:] + run.stderr[-2000:]


def two_heads(rng, N, H, V, dtype, *, bias=False, spread=1.0, near=None):
    """Arguments by name: logits of that standard deviation; the reference is another model, or `near` to the first."""
    make = lambda *shape: torch.tensor(rng.standard_normal(shape)).to(dtype)  # noqa: E731
    scale = spread * H**-0.5
    made = dict(hidden=(make(N, H) * scale).to(dtype), weight=make(V, H), labels=torch.tensor(rng.integers(0, V, N)))
    if near is None:
        made |= dict(ref_hidden=(make(N, 6) * spread * 6**-0.5).to(dtype), ref_weight=make(V, 6))
    else:
        made |= dict(ref_hidden=made["hidden"] + near * make(N, H) * scale, ref_weight=made["weight"].clone())
    return made | (dict(bias=make(V), ref_bias=make(V)) if bias else {})


def plain(hidden, weight, labels, ref_hidden=None, ref_weight=None, bias=None, ref_bias=None, **head):
    """The oracle of all three, in float64."""
    logits = oracle.logits(hidden, weight, bias, **head)
    kl = None
    if ref_hidden is not None:
        kl = oracle.kl(logits, oracle.logits(ref_hidden, ref_weight, ref_bias, **head))
    return oracle.logprob(hidden, weight, labels, bias=bias, **head), oracle.entropy(logits), kl


def eager(hidden, weight, labels, ref_hidden, ref_weight):
    """PyTorch's own path in 16 bits: float32 from the logits on."""
    logp, logp_ref = ((h @ w.t()).float().log_softmax(-1) for h, w in ((hidden, weight), (ref_hidden, ref_weight)))
    p = logp.exp()
    own = logp.gather(1, labels[:, None]).squeeze(1)
    return own, -(p * logp).sum(-1), (p * (logp - logp_ref)).sum(-1)


def run(function, made, upstream, trains=("hidden", "weight", "bias"), **options):
    """The statistics that are there and the gradients of what trains."""
    made = {name: x.detach().requires_grad_(name in trains) for name, x in made.items() if name != "labels"} | {
        "labels": made["labels"]
    }
    outputs = [x for x in function(**made, **options) if x is not None]
    inputs = [made[name] for name in trains if name in made]
    grads = torch.autograd.grad(outputs, inputs, [u.to(o) for u, o in zip(upstream, outputs, strict=False)])
    return outputs, dict(zip([name for name in trains if name in made], grads, strict=True))


def widened(made):
    return {name: x if name == "labels" else x.detach().cpu().double() for name, x in made.items()}


def compare(made, *, backend=BACKEND, upstream=None, trains=("hidden", "weight", "bias"), slack=4.0, **options):
    if upstream is None:
        upstream = torch.randn(3, len(made["hidden"]), generator=torch.Generator().manual_seed(3))
    device = made["hidden"].device
    outputs, grads = run(linear_statistics, made, upstream.to(device), trains, backend=backend, **options)
    made = widened(made) | {"labels": made["labels"].cpu()}
    expected, expected_grads = run(plain, made, upstream, trains, **options)
    for name, a, e in zip(NAMES, outputs, expected, strict=False):
        assert_exact(a, e, name, slack=slack)
    assert (outputs[0] <= 0).all() and all((x >= 0).all() for x in outputs[1:])
    for name, a in grads.items():
        if a.dtype in (torch.float32, torch.float64):
            assert_exact(a, expected_grads[name], f"grad {name}", slack=2 * slack)
    return outputs, grads, expected, expected_grads


@pytest.fixture
def small_blocks(monkeypatch):
    """Heads of a few columns span many blocks."""
    if INTERPRETED:
        from sami_fast.kernels import configs

        monkeypatch.setattr(configs, "LINEAR_STATISTICS", configs.LogitBlocks(16, 32, 512, 512, 8))
    else:
        monkeypatch.setattr(linear_logprob_reference, "_CACHED_LOGIT_BYTES", 1)
        monkeypatch.setattr(linear_logprob_reference, "_LOGIT_ROWS", 16)


@pytest.mark.parametrize("shape", [(1, 3, 1), (37, 8, 101), (5, 4, 32), (0, 4, 9)])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_the_oracle(dtype, bias, softcap, shape, small_blocks):
    made = two_heads(np.random.default_rng(1), *shape, dtype, bias=bias)
    if not len(made["hidden"]):
        outputs, grads = run(linear_statistics, made, torch.zeros(3, 0), backend=BACKEND)
        assert all(x.shape == (0,) for x in outputs) and not grads["weight"].any()
        return
    compare(made, logit_scale=0.7, softcap=softcap)
    alone = {name: x for name, x in made.items() if not name.startswith("ref_")}
    compare(alone, logit_scale=0.7, softcap=softcap)


@pytest.mark.parametrize("trains", [("hidden",), ("hidden", "weight"), ("weight",), ("bias",), ("hidden", "bias")])
@pytest.mark.parametrize("of", [0, 1, 2])
def test_each_gradient_alone(of, trains, small_blocks):
    made = two_heads(np.random.default_rng(2), 21, 8, 70, torch.float32, bias=True)
    compare(made, upstream=torch.nn.functional.one_hot(torch.tensor([of] * 21), 3).t().double(), trains=trains)


@pytest.mark.parametrize("near", [0.0, 1e-3])
def test_kl_near_zero_keeps_its_digits(near):
    """What training starts from: the KL of a model to itself, and to one a small step away."""
    made = two_heads(np.random.default_rng(3), 50, 16, 3000, torch.float32, spread=3.0, near=near)
    outputs = linear_statistics(**made, backend=BACKEND)
    if near == 0.0:
        assert float(outputs.kl.max()) < 1e-6
        return
    expected = plain(**widened(made))[2]
    assert 1e-7 < float(expected.mean()) < 1e-4
    assert float((outputs.kl - expected).abs().max()) < 2e-6  # the rounding of logits near 10


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_certain_and_hopeless_labels(offset):
    """Distributions on one token, and logits far from 0."""
    weight = torch.eye(8)
    hidden = 40.0 * torch.eye(8)[[0, 0, 3]]
    made = dict(hidden=hidden, weight=weight, labels=torch.tensor([0, 5, 3]), bias=torch.full((8,), offset))
    made |= dict(ref_hidden=hidden.flip(1) + 0.5, ref_weight=weight, ref_bias=torch.full((8,), -offset))
    outputs, _, expected, _ = compare(made, slack=20.0)
    if INTERPRETED:  # the label apart: nothing is lost where p(label) rounds to 1
        assert_exact(outputs[0][[0, 2]], expected[0][[0, 2]], "log p of certain labels")


def test_impossible_tokens_add_nothing():
    """A bias of -inf, as for ids that a vocabulary pads itself with: in both heads, of a label, of a whole block."""
    made = two_heads(np.random.default_rng(4), 9, 8, 101, torch.float32, bias=True)
    made["bias"][[3, 50]] = made["ref_bias"][[3, 50]] = -torch.inf
    made["labels"][:] = torch.arange(9) + 60
    kept = [i for i in range(101) if i not in (3, 50)]
    smaller = made | {name: made[name][kept] for name in ("weight", "bias", "ref_weight", "ref_bias")}
    smaller["labels"] = torch.arange(9) + 58
    upstream = torch.ones(3, 9)
    outputs, grads = run(linear_statistics, made, upstream, ("hidden", "weight"), backend=BACKEND)
    expected, expected_grads = run(plain, widened(smaller), upstream, ("hidden", "weight"))
    for name, a, e in zip(NAMES, outputs, expected, strict=True):
        assert_exact(a, e, name, slack=4)
    assert_exact(grads["hidden"], expected_grads["hidden"], slack=8)
    assert_exact(grads["weight"][kept], expected_grads["weight"], slack=8)
    assert not grads["weight"][[3, 50]].any()
    made["bias"][0], made["labels"][2] = -torch.inf, 0
    outputs = linear_statistics(**made, backend=BACKEND)
    assert outputs.logprob[2] == -torch.inf and outputs.entropy.isfinite().all() and outputs.kl.isfinite().all()


def test_nan_reaches_its_own_row_only():
    made = two_heads(np.random.default_rng(5), 5, 8, 40, torch.float32)
    clean = linear_statistics(**made, backend=BACKEND)
    made["hidden"][1], made["ref_hidden"][3] = torch.nan, torch.nan
    spoiled = linear_statistics(**made, backend=BACKEND)
    for name, a, e in zip(NAMES, spoiled, clean, strict=True):
        bad = [1, 3] if name == "kl" else [1]
        assert a[bad].isnan().all(), name
        good = [i for i in range(5) if i not in bad]
        assert a[good].equal(e[good]), name


def test_same_log_probability_as_the_plain_op(small_blocks):
    made = two_heads(np.random.default_rng(6), 30, 8, 200, torch.float32)
    expected = linear_logprob(made["hidden"], made["weight"], made["labels"], backend=BACKEND)
    assert_exact(linear_statistics(**made, backend=BACKEND).logprob, expected.double())


@compiled
@pytest.mark.parametrize("trains", [("hidden",), ("hidden", "weight")])
def test_in_bf16_as_good_as_pytorch(trains):
    made = two_heads(np.random.default_rng(7), 64, 32, 9001, torch.bfloat16, spread=2.0)
    made["ref_weight"] = made["ref_weight"].repeat(1, 2)[:, :12]
    made["ref_hidden"] = made["ref_hidden"].repeat(1, 2)
    upstream = torch.randn(3, 64)
    outputs, grads = run(linear_statistics, made, upstream, trains)
    theirs, their_grads = run(eager, made, upstream, trains)
    expected, expected_grads = run(plain, widened(made), upstream, trains)
    for name, a, t, e in zip(NAMES, outputs, theirs, expected, strict=True):
        assert a.dtype == torch.float32
        assert_as_good_as(a, t, e, name)
    for name in trains:
        assert_as_good_as(grads[name], their_grads[name], expected_grads[name], f"grad {name}")


def test_opcheck_compile_and_autocast():
    made = two_heads(np.random.default_rng(8), 5, 8, 101, torch.float32, bias=True)
    tensors = [made[name].requires_grad_(name in ("hidden", "weight", "bias")) for name in ("hidden", "weight")]
    tensors += [made["labels"], made["bias"].requires_grad_()]
    reference = [made[name] for name in ("ref_hidden", "ref_weight", "ref_bias")]
    for second in (reference, [None] * 3):
        torch.library.opcheck(ops.statistics._linear_statistics, (*tensors, *second, 0.5, 2.0, BACKEND))

    def step(hidden, weight, bias):
        made.update(hidden=hidden, weight=weight, bias=bias)
        return sum(x.sum() for x in linear_statistics(**made, backend=BACKEND))

    inputs = (tensors[0], tensors[1], tensors[3])
    graph = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = [step(*inputs), *torch.autograd.grad(step(*inputs), inputs)]
    with torch.autocast("cpu", torch.bfloat16):
        cast = [step(*inputs), *torch.autograd.grad(step(*inputs), inputs)]
    for a, c, e in zip([graph(*inputs), *torch.autograd.grad(graph(*inputs), inputs)], cast, expected, strict=True):
        assert_exact(a, e.double())
        assert c.equal(e)


@compiled
def test_bad_arguments_are_refused_by_name():
    made = two_heads(np.random.default_rng(9), 3, 4, 5, torch.float32, bias=True)
    bad = {
        "ref_weight: expected V = 5 as weight has, got 4": dict(ref_weight=made["ref_weight"][:4], ref_bias=None),
        "ref_hidden: expected 3 rows as hidden has, got 2": dict(ref_hidden=made["ref_hidden"][:2]),
        "ref_weight: expected to come with ref_hidden": dict(ref_weight=None, ref_bias=None),
        "ref_bias: expected None without ref_hidden": dict(ref_weight=None, ref_hidden=None),
        r"labels: expected torch.int64 \[3\]": dict(labels=made["labels"][:2]),
        "softcap: expected a positive number": dict(softcap=-1.0),
        "backend: expected one of": dict(backend="magic"),
        "hidden: expected CUDA tensors": dict(backend="triton"),
    }
    for message, arguments in bad.items():
        with pytest.raises(ValueError, match=message):
            linear_statistics(**(made | arguments))


@compiled
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("head", ["plain", "LoRA on the head"])
@pytest.mark.parametrize("against", ["nothing", "another model"])
def test_entropy_of_a_model(family, head, against):
    model, groups = tiny_model(family), [random_group(np.random.default_rng(12), 2, 3) for _ in range(2)]
    if head != "plain":
        options = dict(r=2, target_modules=["lm_head"], init_lora_weights=False)
        model = get_peft_model(model, LoraConfig(**options))
    ref_model = None if against == "nothing" else tiny_model(family, seed=1)
    scores = score(model, pack(groups), entropy=True, ref_model=ref_model)
    assert (scores.kl is None) == (ref_model is None)
    logits = oracle.token_logits(model, groups)
    assert_same_scores([scores.token_logprobs], [logits.log_softmax(-1).gather(1, pack(groups).labels[:, None])[:, 0]])
    assert_same_scores([scores.entropy], [oracle.entropy(logits)], "entropy")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    actual, expected = (
        dict(zip(parameters, torch.autograd.grad(x.square().sum(), parameters.values()), strict=True))
        for x in (scores.entropy, oracle.entropy(logits))
    )
    assert_same_gradients(actual, expected)
    assert score(model, pack(groups)).entropy is None


@compiled
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize(("N", "H", "V"), [(8192, 2048, 128256), (341, 4096, 32000)])
def test_peak_memory_is_that_of_the_formula(N, H, V, trains, second, bias, monkeypatch):
    pytest.importorskip("triton")
    from sami_fast.kernels import configs
    from sami_fast.kernels import linear_statistics as kernels
    from sami_fast.kernels.launch import Call

    monkeypatch.setattr(Call, "run", lambda call: None)
    make = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    head = [make(N, H), make(V, H), make(N, dtype=torch.int64), make(V) if bias else None]
    head += [make(N, 512), make(V, 512), None] if second else [None] * 3
    with PeakMemory(*head) as memory:
        outputs = kernels.linear_statistics_forward(*head, 1.0, None)
    block = kernels.Head.prepare(N, *head[1:4], 1.0, None, configs.LINEAR_STATISTICS)
    R, W, e = block.height, -(-block.width // 128) * 128, 2
    blocks, rows = (8, 20) if second else (4, 12)
    assert memory.peak == blocks * R * W + rows * N + 16 * R * (1 + second)
    grads = [make(N, dtype=torch.float32) for _ in range(3)]
    with PeakMemory(*head, *outputs, *grads) as memory:
        kernels.linear_statistics_backward(*grads, *head, *outputs, 1.0, None, trains)
    expected = (blocks + e) * R * W + (4 + e) * N * H
    if trains:
        expected += 4 * block.width * H + e * N * H + e * V * H + ((4 + e) * V + e * N if bias else 0)
    assert expected <= memory.peak <= expected + 40 * N + 64


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("shape", [(1, 64, 1), (340, 128, 32000), (5000, 96, 50257), (333, 64, 128256)])
    @pytest.mark.parametrize("trains", [("hidden",), ("hidden", "weight", "bias")])
    def test_against_the_oracle(self, shape, dtype, trains):
        made = two_heads(np.random.default_rng(10), *shape, dtype, bias=True, spread=3.0)
        made = {name: x.cuda() for name, x in made.items()}
        compare(made, backend="triton", trains=trains, logit_scale=0.5, softcap=30.0)

    def test_default_backend_and_determinism(self, caplog):
        made = {n: x.cuda() for n, x in two_heads(np.random.default_rng(11), 999, 64, 32000, torch.bfloat16).items()}
        ops.dispatch.load.cache_clear()
        with caplog.at_level("INFO", "sami_fast.ops"):
            first = run(linear_statistics, made, torch.ones(3, 999).cuda())
        assert "linear_statistics runs on backend 'triton'" in caplog.text
        second = run(linear_statistics, made, torch.ones(3, 999).cuda())
        for a, e in zip([*first[0], *first[1].values()], [*second[0], *second[1].values()], strict=True):
            assert a.equal(e)
