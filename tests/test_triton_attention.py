"""Triton attention against the float64 oracle: on the CPU under Triton's interpreter, and on a GPU where there is one.

Triton decides at import whether it interprets, so the interpreted tests run in a process of their own.
"""

import functools
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
from graph_replay import assert_replays
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_good_as, assert_exact

from sami_fast import ops, pack, prefix_attention, tile_plan
from sami_fast.prefix_tree import AttentionPlan, Group

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")
compiled = pytest.mark.skipif(INTERPRETED, reason="needs compiled kernels")
gpu = [compiled, pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
NAMES = ("out", "lse", "grad q", "grad k", "grad v", "grad sinks")


@compiled
def test_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-6000:] + run.stderr[-2000:]


@compiled
def test_cpu_tensors_need_the_interpreter():
    packed = pack([Group([[1, 2]], [[3, 4]])])
    q = torch.zeros(packed.num_tokens, 1, 16)
    with pytest.raises(ValueError, match=r"q: expected CUDA tensors \(or TRITON_INTERPRET=1 .*got a tensor on cpu"):
        prefix_attention(q, q, q, packed.plan, backend="triton")
    assert prefix_attention(q, q, q, packed.plan).shape == q.shape


def laid_out(tensors, layout):
    """The same numbers as leaves that are views of something larger, [T, H, D] each."""
    T, sizes = tensors[0].shape[0], [t.shape[1] * t.shape[2] for t in tensors]
    if layout == "fused":  # one projection's output, side by side
        whole = torch.cat([t.detach().flatten(1) for t in tensors], dim=1)
        views = [part.view(t.shape) for part, t in zip(whole.split(sizes, dim=1), tensors, strict=True)]
    elif layout == "heads first":
        views = [t.detach().transpose(0, 1).contiguous().transpose(0, 1) for t in tensors]
    elif layout == "between NaN":  # whatever is read beyond a tensor poisons the result
        wide = [
            torch.full((T + 300, t.shape[1], t.shape[2] + 3), torch.nan, dtype=t.dtype).to(t.device) for t in tensors
        ]
        views = [w[100 : T + 100, :, : t.shape[2]].copy_(t.detach()) for w, t in zip(wide, tensors, strict=True)]
    else:
        views = [t.detach() for t in tensors]
    return [view.requires_grad_() for view in views]


def run(function, inputs, upstream):
    outputs = function(*inputs)
    grads = torch.autograd.grad(outputs, inputs, [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)])
    return [*outputs, *grads]


def eager(q, k, v, packed, **options):
    """PyTorch's own arithmetic in q's dtype, dense."""
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = (q @ k.transpose(1, 2)) * (options.get("scale") or q.shape[2] ** -0.5)
    if options.get("softcap"):
        scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
    i, n = torch.arange(packed.num_tokens)[:, None].to(q.device), torch.arange(packed.num_tokens).to(q.device)
    visible = (n <= i) & (i < packed.subtree_end)
    if options.get("window"):
        visible &= packed.position_ids[:, None] - packed.position_ids < options["window"]
    scores = scores.masked_fill(~visible, -torch.inf)
    if options.get("sinks") is not None:
        column = options["sinks"].to(q.dtype)[:, None, None].expand(-1, packed.num_tokens, 1)
        scores = torch.cat([scores, column], dim=2)
    weights = scores.float().softmax(-1).to(q.dtype)[:, :, : packed.num_tokens]
    return (weights @ v).transpose(0, 1), scores.float().logsumexp(-1).t()


def compare(packed, tensors, *, layout=None, sinks=False, seed=0, device="cpu", **options):
    """Forward and every gradient against float64: exact in float32, as good as PyTorch's in 16 bits."""
    inputs = [t.detach().to(device) for t in tensors]
    inputs = laid_out(inputs, layout)
    if sinks:
        inputs.append(torch.linspace(-1, 2, inputs[0].shape[1], device=device).requires_grad_())
    packed = packed.to(device)
    generator = torch.Generator().manual_seed(seed)
    T, Hq, _ = tensors[0].shape
    shapes = (T, Hq, tensors[2].shape[2]), (T, Hq)
    upstream = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    upstream[0] = upstream[0].to(tensors[0].dtype)  # the same numbers for all
    named = lambda q, k, v, s=None: dict(options, sinks=s)  # noqa: E731

    def ours(*x):
        return prefix_attention(*x[:3], packed.plan, **named(*x), return_lse=True, backend="triton")

    def theirs(*x):
        return oracle.attention(*x[:3], packed.subtree_end.cpu(), packed.position_ids.cpu(), **named(*x))

    actual = run(ours, inputs, upstream)
    for name, a, again in zip(NAMES, actual, run(ours, inputs, upstream) if device == "cuda" else actual, strict=False):
        assert a.equal(again), f"{name} differs from run to run"
    expected = run(theirs, [x.detach().cpu().double().requires_grad_() for x in inputs], [u.cpu() for u in upstream])
    if inputs[0].dtype == torch.float32:
        for name, a, e in zip(NAMES, actual, expected, strict=False):
            assert_exact(a, e, name, slack=4 if name.startswith("grad") else 1)
        return
    reference = run(lambda *x: eager(*x[:3], packed, **named(*x)), inputs, upstream)
    for name, a, r, e in zip(NAMES, actual, reference, expected, strict=False):
        assert_as_good_as(a, r, e, name)


# --------------------------------------------------------------------------------------------------------------------
# In the interpreter


@pytest.fixture
def small_tiles(monkeypatch):
    """Call with (rows, keys) to launch every pass so: short trees then span many tiles. Fresh memory holds NaN."""
    from sami_fast.kernels import configs
    from sami_fast.kernels import prefix_attention as kernels

    def use(rows, keys, architecture=80):
        monkeypatch.setattr(configs, "prefix_attention", lambda *_: configs.Launch(rows, keys, 4, 2))
        monkeypatch.setattr(kernels, "architecture_of", lambda device: architecture)

    torch.use_deterministic_algorithms(True)
    yield use
    torch.use_deterministic_algorithms(False)


def pairwise(features, seed=0):
    """Few combinations in which every two values of different features meet."""
    rng = np.random.default_rng(seed)
    names = list(features)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in range(len(features[a]))
        for y in range(len(features[b]))
    }
    rows = []
    while missing:
        candidates = [{name: int(rng.integers(len(features[name]))) for name in names} for _ in range(50)]
        (a, x), (b, y) = min(missing)
        candidates = [row | {a: x, b: y} for row in candidates]
        covered = [{p for p in itertools.combinations(row.items(), 2) if p in missing} for row in candidates]
        best = max(range(len(candidates)), key=lambda i: len(covered[i]))
        missing -= covered[best]
        rows.append({name: features[name][index] for name, index in candidates[best].items()})
    return rows


FEATURES = dict(
    heads=[(1, 1), (4, 1), (6, 2), (2, 2)],
    sizes=[(16, 16), (24, 8), (8, 40)],
    dtype=[torch.float32, torch.float16],
    architecture=[80, 90],
    tiles=[(16, 16), (32, 64), (64, 32)],
    layout=["fused", "heads first", "between NaN", None],
    window=[None, 1, 30, 10**6],
    softcap=[None, 1.5],
    sinks=[False, True],
    scale=[None, 0.4],
)


@interpreted
@pytest.mark.parametrize("case", pairwise(FEATURES), ids=lambda case: "-".join(map(str, case.values())))
def test_features_pairwise(case, small_tiles):
    rng = np.random.default_rng(1)
    packed = pack(
        [
            random_group(rng, 2, 3, query=41, constitution=12, response=20),
            random_group(rng, 2, 2, query=9, constitution=6, query_first=False),
        ]
    )
    small_tiles(*case["tiles"], case["architecture"])
    tensors = qkv(rng, packed.num_tokens, *case["heads"], *case["sizes"], dtype=case["dtype"])
    options = {name: case[name] for name in ("layout", "window", "softcap", "sinks", "scale")}
    compare(packed, tensors, **options)


@interpreted
@settings(max_examples=20)
@given(
    st.lists(random_groups(max_length=30), min_size=1, max_size=2),
    st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    st.sampled_from([(16, 16), (16, 32), (32, 16)]),
    st.sampled_from([None, 1, 7, 25]),
    st.integers(0, 2**32),
)
def test_random_trees(groups, heads, tiles, window, seed):
    from sami_fast.kernels import configs

    packed, rng = pack(groups), np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "prefix_attention", lambda *_: configs.Launch(*tiles, 4, 2))
        compare(packed, qkv(rng, packed.num_tokens, *heads, 8, dtype=torch.float32), window=window, seed=seed)


@interpreted
@pytest.mark.parametrize("length", sorted({*AWKWARD_LENGTHS, *range(56, 67), 47, 48, 49, 111, 112, 113}))
def test_branches_at_awkward_offsets(length, small_tiles):
    """Siblings begin `length` tokens into the pack, and again after a branch of that length."""
    rng = np.random.default_rng(length)
    query = rng.integers(0, 99, length)
    prompts = [np.r_[query, rng.integers(100, 199, size)] for size in (1, length)]
    responses = [rng.integers(200, 299, size) for size in (2, 59)]
    packed = pack([Group(prompts, responses)])
    small_tiles(64, 32, architecture=90 if length % 2 else 80)
    dtype = torch.float16 if length % 4 == 3 else torch.float32
    compare(packed, qkv(rng, packed.num_tokens, 2, 1, 16, dtype=dtype), window=None if length % 3 else length + 3)


@interpreted
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("sizes", [(64, 64), (80, 80), (128, 128), (192, 128), (256, 256)])
def test_shipped_configurations(sizes, dtype, architecture, monkeypatch):
    from sami_fast.kernels import prefix_attention as kernels

    if dtype == torch.float32 and (architecture == 90 or sizes[0] not in (64, 128, 256)):
        pytest.skip("float32 is launched alike on both, and alike between powers of two")
    monkeypatch.setattr(kernels, "architecture_of", lambda device: architecture)
    rng = np.random.default_rng(2)
    packed = pack([random_group(rng, 2, 3, query=130, constitution=30, response=40)])
    tensors = qkv(rng, packed.num_tokens, 3, 1, *sizes, dtype=dtype)
    compare(packed, tensors, softcap=20.0 if sizes[0] == 128 else None)


@interpreted
def test_only_what_the_copy_engine_cannot_read_is_copied():
    from sami_fast.kernels import prefix_attention as kernels

    x = torch.zeros(40, 3, 32, dtype=torch.float16)
    as_it_is = [x, x.transpose(0, 1).contiguous().transpose(0, 1), x[:, :1, :8], x[:, :, 8:24], x[:, 1:]]
    for view in as_it_is:
        assert kernels._readable(view) is view and kernels._has_descriptor(view)
    copied = dict(
        address=x[:, :, 1:9],
        strides=torch.zeros(40, 3, 20, dtype=torch.float16)[:, :, :16],
        layout=x.transpose(1, 2),
        broadcast=x[:, :1].expand(40, 3, 32),
    )
    for name, view in copied.items():
        assert kernels._readable(view).is_contiguous(), name
    assert not kernels._has_descriptor(torch.zeros(40, 3, 12, dtype=torch.float16))


@interpreted
def test_upstream_gradients_of_any_layout(small_tiles):
    rng = np.random.default_rng(3)
    packed = pack([random_group(rng, 2, 3, query=20)])
    small_tiles(16, 16)
    q, k, v = qkv(rng, packed.num_tokens, 4, 2, 16, dtype=torch.float32)
    inputs = [q, k, v]
    out = prefix_attention(q, k, v, packed.plan, backend="triton")
    expected = oracle.attention(q, k, v, packed.subtree_end, packed.position_ids)[0]
    weight = torch.randn(packed.num_tokens, 16, 4)
    for upstream in (torch.ones(()).expand_as(out), weight.transpose(1, 2)):
        pairs = (torch.autograd.grad(o, inputs, upstream.to(o.dtype), retain_graph=True) for o in (out, expected))
        for name, a, e in zip("qkv", *pairs, strict=True):
            assert_exact(a, e, name, slack=4)


@interpreted
def test_plan_is_made_once_and_goes_with_its_pack(small_tiles, monkeypatch):
    small_tiles(16, 16)
    made = []
    for name in ("query_tiles", "key_tiles"):
        function = getattr(tile_plan, name)
        monkeypatch.setattr(tile_plan, name, lambda *a, f=function: made.append(a) or f(*a))
    rng = np.random.default_rng(4)
    packed = pack([random_group(rng, 2, 2, query=20)])
    q, k, v = qkv(rng, packed.num_tokens, 2, 1, 16, dtype=torch.float32)
    attend = functools.partial(prefix_attention, plan=packed.plan, backend="triton")
    for reentrant in (True, False, False):  # three layers that hold the plan in different ways
        torch.utils.checkpoint.checkpoint(attend, q, k, v, use_reentrant=reentrant).sum().backward()
    assert len(made) == 2
    kept = len(tile_plan._plans)
    del packed, attend
    tile_plan.device_plan(pack([random_group(rng, 2, 2)]).plan.nodes, torch.device("cpu"))
    assert len(tile_plan._plans) <= kept, "the plan of a pack that is gone"


@interpreted
def test_nothing_of_a_tree_enters_the_specialisation():
    from sami_fast.kernels import prefix_attention as kernels

    def fixed(size):
        rng = np.random.default_rng(size)
        packed = pack([random_group(rng, 2, 3, query=size)])
        q, k, v = qkv(rng, packed.num_tokens, 4, 2, 16, dtype=torch.float32, requires_grad=False)
        plan = packed.plan
        attention = kernels.Attention.prepare(q, k, v, plan.position_ids, plan.nodes, 0.5, 4, 2.0)
        lse = torch.zeros(packed.num_tokens, 4)
        shift = torch.zeros(4, 256)
        calls = [kernels.forward_call(attention, None, q, lse)]
        calls += kernels.backward_calls(attention, q, lse, q, lse, shift, q, k, v)
        free = set(kernels._RUNTIME_ONLY)
        tensors = [a for call in calls for a in call.arguments.values() if isinstance(a, torch.Tensor)]
        assert all(t.data_ptr() % 16 == 0 for t in tensors)
        return [
            {n: a for n, a in call.arguments.items() if n not in free and not isinstance(a, torch.Tensor)}
            for call in calls
        ]

    assert fixed(5) == fixed(77)


@interpreted
def test_opcheck_and_one_graph():
    rng = np.random.default_rng(5)
    packed = pack([random_group(rng, 2, 3)])
    q, k, v = qkv(rng, packed.num_tokens, 4, 2, 16, dtype=torch.float32)
    sinks, plan = torch.randn(4, requires_grad=True), packed.plan
    for arguments in ((sinks, 0.3, 4, 2.0), (None, 0.3, None, None)):
        torch.library.opcheck(
            ops.attention._prefix_attention, (q, k, v, plan.position_ids, plan.nodes, *arguments, "triton")
        )

    def step(q, k, v):
        return prefix_attention(q, k, v, plan, window=5, backend="triton", return_lse=True)

    inputs, upstream = [q, k, v], [torch.randn(q.shape), torch.randn(q.shape[:2])]
    graph = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, e in zip(run(graph, inputs, upstream), run(step, inputs, upstream), strict=True):
        assert a.equal(e)


@interpreted
def test_what_the_kernels_cannot_do_is_refused_by_name():
    from sami_fast.kernels import prefix_attention as kernels

    packed = pack([random_group(np.random.default_rng(6), 2, 2)])
    T, plan = packed.num_tokens, packed.plan
    x = torch.zeros(T, 2, 16)
    wide = torch.zeros(T, 1, 264)
    bad = {
        r"q: expected one of \[torch.float16, torch.float32\].*got torch.float64": (x.double(), {}),
        r"q: expected one of .* got torch.bfloat16": (x.bfloat16(), {}),
        "head_dim: expected at most 256 .* got 264": (wide, {}),
        "scale: expected a positive number .* got -1.0": (x, dict(scale=-1.0)),
    }
    for message, (tensor, options) in bad.items():
        with pytest.raises(ValueError, match=message):
            prefix_attention(tensor, tensor, tensor, plan, backend="triton", **options)
    far = torch.empty_strided((T, 2, 16), (2**24, 16, 1), device="meta")
    with pytest.raises(ValueError, match=r"k: expected 256 tokens .* fewer than 2\^31 elements"):
        kernels._refuse(far.contiguous(), far, far, tile_plan.device_plan(plan.nodes, torch.device("cpu")), 1.0, 90)
    one = AttentionPlan.build(np.full(T, T), np.arange(T))
    shorter = pack([Group([[1]], [[2, 3]])]).plan.nodes
    with pytest.raises(ValueError, match=f"plan: expected a plan of {T} tokens as q has"):
        ops.attention._prefix_attention(x, x, x, one.position_ids, shorter, None, 1.0, None, None, "triton")


# --------------------------------------------------------------------------------------------------------------------
# On a GPU


def tldr(rng, size=2):
    """Two groups of the shape of TL;DR data."""
    return pack([random_group(rng, size, size, query=330, constitution=100, response=85) for _ in range(2)])


SIZES = [(64, 64), (80, 80), (96, 96), (128, 128), (192, 192), (192, 128), (256, 256)]
SHIPPED = [
    *((torch.bfloat16, sizes) for sizes in SIZES),
    (torch.float16, (128, 128)),
    (torch.float32, (64, 64)),
    (torch.float32, (256, 256)),
]


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("options", [{}, dict(window=100, softcap=20.0, sinks=True, layout="fused")], ids=str)
    @pytest.mark.parametrize(("dtype", "sizes"), SHIPPED, ids=str)
    def test_shipped_configurations(self, dtype, sizes, options):
        rng = np.random.default_rng(7)
        packed = tldr(rng)
        compare(packed, qkv(rng, packed.num_tokens, 8, 2, *sizes, dtype=dtype), device="cuda", **options)

    @pytest.mark.parametrize("layout", ["heads first", "between NaN"])
    @pytest.mark.parametrize("heads", [(7, 1), (6, 2), (3, 3)])
    def test_layouts_and_groups(self, heads, layout):
        rng = np.random.default_rng(8)
        packed = tldr(rng)
        compare(packed, qkv(rng, packed.num_tokens, *heads, 64, dtype=torch.bfloat16), layout=layout, device="cuda")

    @pytest.mark.parametrize("length", AWKWARD_LENGTHS)
    def test_awkward_offsets(self, length):
        rng = np.random.default_rng(length)
        query = rng.integers(0, 99, length)
        prompts = [np.r_[query, rng.integers(100, 199, size)] for size in (1, length)]
        packed = pack([Group(prompts, [rng.integers(200, 299, size) for size in (2, 59)])])
        compare(packed, qkv(rng, packed.num_tokens, 4, 1, 128, dtype=torch.bfloat16), device="cuda")

    def test_cuda_graph_and_no_recompilation(self):
        from sami_fast.kernels import prefix_attention as kernels

        rng = np.random.default_rng(9)

        def step(packed):
            q, k, v = (t.cuda() for t in qkv(rng, packed.num_tokens, 8, 2, 64, dtype=torch.bfloat16))
            inputs = [t.detach().requires_grad_() for t in (q, k, v)]
            packed = packed.to("cuda")

            def both():
                out = prefix_attention(*inputs, packed.plan)
                return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]

            return both

        assert_replays(step(tldr(rng)))
        kernels_of = (kernels._forward_kernel, kernels._grad_q_kernel, kernels._grad_kv_kernel)
        before = [sum(len(c[0]) for c in kernel.device_caches.values()) for kernel in kernels_of]
        for size in (2, 3, 5):
            step(tldr(rng, size))()
        assert before == [sum(len(c[0]) for c in kernel.device_caches.values()) for kernel in kernels_of]
