"""Attention over gathered keys: the gather, the sum of its copies, and the op around them with a plain PyTorch kernel.

flash-attn's own kernels run where they are installed and a GPU is there.
"""

import gc

import numpy as np
import oracle
import pytest
import torch
from factory import groups as random_groups
from factory import qkv, random_group
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import assert_as_good_as, assert_exact

from sami_fast import ops, pack, prefix_attention
from sami_fast.kernels import flash_attention
from sami_fast.kernels.flash_attention import Library, gather_for
from sami_fast.prefix_tree import Group

CPU = torch.device("cpu")
NAMES = ("out", "lse", "grad q", "grad k", "grad v")


def sequences(q, k, gather, scale, softcap):
    """Slices of queries and of keys, and scores [Hq, queries, keys], of each sequence, causal from the bottom right."""
    offsets = zip(*(x.unfold(0, 2, 1).tolist() for x in (gather.query_offsets, gather.key_offsets)), strict=True)
    for rows, seen in offsets:
        rows, seen = slice(*rows), slice(*seen)
        keys = k[seen].repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = torch.einsum("ihd,nhd->hin", q[rows], keys) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        length, n = scores.shape[1:]
        distance = torch.arange(n - length, n)[:, None].to(q.device) - torch.arange(n, device=q.device)
        visible = distance >= 0
        if gather.window is not None:
            visible &= distance < gather.window
        yield rows, seen, scores.masked_fill(~visible, -torch.inf)


def plain_forward(q, k, v, gather, scale, softcap):
    """What flash-attn's variable-length kernels compute, one sequence after the other."""
    values = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    outs, lses = [], []
    for _, seen, scores in sequences(q, k, gather, scale, softcap):
        outs.append(torch.einsum("hin,nhd->ihd", scores.softmax(2), values[seen]))
        lses.append(scores.logsumexp(2).t())
    return torch.cat(outs), torch.cat(lses)


def plain_backward(grad_out, q, k, v, out, lse, gather, scale, softcap):
    """From the output and log-sum-exp of the forward, as theirs; autograd is off inside an op."""
    group, (grad_q, grad_k, grad_v) = q.shape[1] // k.shape[1], map(torch.zeros_like, (q, k, v))
    for rows, seen, scores in sequences(q, k, gather, scale, softcap):
        keys, values = (x[seen].repeat_interleave(group, dim=1) for x in (k, v))
        weights = (scores - lse[rows].t()[:, :, None]).exp()
        shift = (grad_out[rows] * out[rows]).sum(2).t()[:, :, None]
        grad_scores = weights * (torch.einsum("ihd,nhd->hin", grad_out[rows], values) - shift)
        if softcap:
            grad_scores = grad_scores * (1 - (scores / softcap).square()).nan_to_num(neginf=0)
        grad_q[rows] += torch.einsum("hin,nhd->ihd", grad_scores, keys) * scale
        by_head = torch.einsum("hin,ihd->nhd", grad_scores, q[rows]) * scale
        grad_k[seen] += by_head.unflatten(1, (-1, group)).sum(2)
        grad_v[seen] += torch.einsum("hin,ihd->nhd", weights, grad_out[rows]).unflatten(1, (-1, group)).sum(2)
    return grad_q, grad_k, grad_v


PLAIN = Library(plain_forward, plain_backward, device_type="cpu", dtypes=(torch.float64, torch.float32))


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(flash_attention, "best", lambda device: PLAIN)


def compare(packed, q, k, v, **options):
    generator = torch.Generator().manual_seed(0)
    upstream = torch.randn(q.shape, generator=generator, dtype=torch.float64)

    def run(function, *where, **more):
        out, lse = function(q, k, v, *where, **options, **more)
        return out, lse, *torch.autograd.grad(out, (q, k, v), upstream.to(out.dtype))

    actual = run(prefix_attention, packed.plan, backend="flash", return_lse=True)
    expected = run(oracle.attention, packed.subtree_end, packed.position_ids)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert_exact(a, e, name, slack=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the same for all examples
@given(
    st.lists(random_groups(), min_size=1, max_size=3),
    st.integers(0, 2**32),
    st.sampled_from([None, 1, 2, 4, 100]),
    st.sampled_from([None, 0.7]),
    st.sampled_from([(1, 1), (4, 4), (6, 2)]),
)
def test_random_trees(plain, groups, seed, window, softcap, heads):
    packed = pack(groups)
    compare(packed, *qkv(np.random.default_rng(seed), packed.num_tokens, *heads, 8), window=window, softcap=softcap)


def test_float32_and_scale(plain):
    rng = np.random.default_rng(1)
    packed = pack([random_group(rng, 3, 4, query=40, constitution=30, response=20) for _ in range(2)])
    q, k, v = qkv(rng, packed.num_tokens, 9, 3, 64, dtype=torch.float32)
    compare(packed, q, k, v, scale=0.1, window=33)


def test_opcheck_and_compile(plain):
    packed = pack([random_group(np.random.default_rng(2), 2, 2)])
    q, k, v = qkv(np.random.default_rng(2), packed.num_tokens, 4, 2, 8)
    plan = packed.plan
    torch.library.opcheck(
        ops.attention._prefix_attention, (q, k, v, plan.position_ids, plan.nodes, None, 0.3, None, 2.0, "flash")
    )
    function = lambda *x: prefix_attention(*x, plan, backend="flash")  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_exact(compiled(q, k, v), function(q, k, v))


def test_runs_share_no_keys_but_their_ancestors():
    # 4 + C * (3 + R * (2 - 1)) tokens: a response's last one is no input.
    group = Group([[1, 2, 3, 4, 10 + j, 5, 6] for j in range(2)], [[20 + k, 7] for k in range(3)], [0, 1, 0])
    packed = pack([group])
    gather = gather_for(packed.plan.nodes, None, CPU)
    assert gather.query_offsets.tolist() == [0, 8, 9, 10, 14, 15, 16]
    # The first response continues the first prompt; the second prompt continues the query.
    assert gather.key_offsets.diff().tolist() == [8, 8, 8, 8, 8, 8]
    own = gather.index[:16].tolist()
    assert own == [*range(8), *range(7), 8]
    assert gather.index[24:32].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    near = gather_for(packed.plan.nodes, 2, CPU)
    assert near.key_offsets.diff().tolist() == [8, 2, 2, 5, 2, 2] and near.max_keys == 8
    assert near.index[8:10].tolist() == [6, 8]


def test_gather_is_made_once_and_dies_with_its_pack():
    packed = pack([random_group(np.random.default_rng(3), 2, 2)])
    nodes = packed.plan.nodes
    gather = gather_for(nodes, None, CPU)
    assert gather_for(nodes, None, CPU) is gather
    assert gather_for(packed.to("cpu").plan.nodes, 10**6, CPU) is gather  # a window that holds every tree
    assert gather_for(nodes, 3, CPU) is not gather
    before = len(flash_attention._gathers)
    del packed, nodes, gather
    gc.collect()
    gather_for(pack([random_group(np.random.default_rng(4), 2, 2)]).plan.nodes, None, CPU)
    assert len(flash_attention._gathers) <= before


def test_copies_add_up_in_float32():
    # In bfloat16, adding 1/256 to 1 changes nothing.
    group = Group([[1]], [[2 + k, 9] for k in range(257)], [0] * 257)
    gather = gather_for(pack([group]).plan.nodes, None, CPU)
    rows = torch.full((len(gather.index), 1, 2), 2.0**-8, dtype=torch.bfloat16)
    rows[gather.copies[0]] = 1.0
    summed = gather.sum(rows)
    assert summed.dtype == torch.bfloat16 and summed[0].eq(2.0).all() and summed[1:].eq(2.0**-8).all()


def test_what_flash_attn_cannot_do_is_refused(plain, monkeypatch):
    packed = pack([random_group(np.random.default_rng(5), 2, 2)])
    q, k, v = qkv(np.random.default_rng(5), packed.num_tokens, 4, 2, 8)
    half = [x.detach().half() for x in (q, k, v)]
    bad = {
        "q: expected one of .* for backend 'flash', got torch.float16": (*half, {}),
        "q: expected head_dim a multiple of 8, at most 256 .* got 7": (q[..., :7], k[..., :7], v[..., :7], {}),
        "q: expected head_dim .* got 264": (*(x.repeat(1, 1, 33) for x in (q, k, v)), {}),
        "v: expected head_dim 8 as q has .* got 16": (q, k, v.repeat(1, 1, 2), {}),
        r"sinks: expected None .* got a tensor \[4\]": (q, k, v, dict(sinks=torch.zeros(4, dtype=q.dtype))),
    }
    for message, (a, b, c, options) in bad.items():
        with pytest.raises(ValueError, match=message):
            prefix_attention(a, b, c, packed.plan, backend="flash", **options)
    out, lse = prefix_attention(q, k, v, packed.plan, backend="flash", return_lse=True)
    out.sum().backward(retain_graph=True)
    with pytest.raises(
        ValueError, match="return_lse: expected no gradient through the log-sum-exp for backend 'flash'"
    ):
        (out.sum() + lse.sum()).backward()
    monkeypatch.setattr(flash_attention, "best", lambda device: Library(plain_forward, plain_backward))
    with pytest.raises(ValueError, match="q: expected cuda tensors for backend 'flash', got a tensor on cpu"):
        prefix_attention(*half, packed.plan, backend="flash")


@pytest.mark.skipif(bool(flash_attention.installed()), reason="flash-attn is installed")
def test_without_flash_attn():
    assert ops.backends()["flash"].startswith("unavailable: flash-attn is not installed (pip install flash-attn")
    packed = pack([random_group(np.random.default_rng(6), 2, 2)])
    q = torch.zeros(packed.num_tokens, 1, 16, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"backend: expected flash-attn to be installed \(pip install flash-attn"):
        prefix_attention(q, q, q, packed.plan, backend="flash")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("version", flash_attention.installed())
@pytest.mark.parametrize("options", [{}, dict(window=37), dict(softcap=5.0)], ids=str)
def test_flash_attn_itself(version, options):
    if torch.cuda.get_device_capability()[0] not in flash_attention.LIBRARIES[version][3]:
        pytest.skip("not built for this device")
    rng = np.random.default_rng(7)
    packed = pack([random_group(rng, 4, 4, query=200, constitution=70, response=90)]).to("cuda")
    inputs = [x.detach().cuda().bfloat16() for x in qkv(rng, packed.num_tokens, 8, 2, 128)]
    upstream = torch.randn_like(inputs[0])
    arguments = dict(scale=128**-0.5, window=None, softcap=None) | options
    where = packed.plan.position_ids, packed.plan.nodes, None, *arguments.values()
    library = flash_attention.load(version)
    out, lse = flash_attention.prefix_attention_forward(*inputs, *where, library)
    grads = flash_attention.prefix_attention_backward(upstream, lse, *inputs, out, lse, *where, library)[:3]

    def run(function, dtype):
        x = [t.to(dtype).requires_grad_() for t in inputs]
        out, lse = function(*x)
        return out, lse, *torch.autograd.grad(out, x, upstream.to(dtype))

    def eager(q, k, v):
        gather = gather_for(packed.plan.nodes, arguments["window"], q.device)
        return plain_forward(q, gather.rows(k), gather.rows(v), gather, arguments["scale"], arguments["softcap"])

    def exact(q, k, v):
        return prefix_attention(q, k, v, packed.plan, **arguments, return_lse=True, backend="reference")

    triples = zip((out, lse, *grads), run(eager, torch.bfloat16), run(exact, torch.float64), strict=True)
    for name, (a, e, x) in zip(NAMES, triples, strict=True):
        assert_as_good_as(a, e, x, name)
