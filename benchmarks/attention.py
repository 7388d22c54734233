"""Attention over packed prefix trees: ours, and the same numbers without sharing, with gathered keys or with a mask.

Each arm gets q, k, v of the packed tokens and the gradient of every packed output. Arms without sharing get whole
sequences, copied beforehand; the upstream gradient of a packed token goes to one of its copies, so that the function
differentiated is the same, and the gradients of copies are added up afterwards. Gathering keys is part of the arms that
gather. Numbers are compared at up to 2048 packed tokens, one drawn from each stretch of the pack.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import trees
from benchmarks.suite import Case, Prepared, Settings, Suite, Unsupported
from sami_fast import ops, prefix_attention
from sami_fast.kernels import flash_attention
from sami_fast.kernels.flash_attention import Gather, gather_for
from sami_fast.prefix_tree import AttentionPlan

_SAMPLE = 2048
_MAX_REFERENCE_TOKENS = 1 << 14  # on a GPU, where launches bound it

# --------------------------------------------------------------------------------------------------------------------
# Cases

_TREES = {  # query, prompts, constitution, responses, response; or turns, turn, side branch
    **{f"TL;DR {n}x{n}": {"group": (330, n, 100, n, 85)} for n in (2, 4, 8, 16)},
    "HH 4x4": {"group": (30, 4, 60, 4, 60)},
    "28 responses to 4k": {"group": (4096, 1, 0, 28, 512)},
    "28 responses to 16k": {"group": (16384, 1, 0, 28, 512)},
    "chain of 32": {"chain": (32, 256, 256)},
    "chain of 8": {"chain": (8, 64, 64)},
}
_HEADS = {
    "Mistral-7B": {"Hq": 32, "Hkv": 8, "D": 128},
    "Llama-3.2-1B": {"Hq": 32, "Hkv": 8, "D": 64},
    "Gemma-2": {"Hq": 8, "Hkv": 4, "D": 256, "window": 4096, "softcap": 50.0},
    "SmolLM2": {"Hq": 9, "Hkv": 3, "D": 64},
    "SmolLM2, window 64": {"Hq": 9, "Hkv": 3, "D": 64, "window": 64},
    "SmolLM2, soft-cap 5": {"Hq": 9, "Hkv": 3, "D": 64, "softcap": 5.0},
}
_CASES = {  # device -> tree, packed tokens to fill, heads, quick
    "cuda": [
        ("TL;DR 4x4", 1 << 14, "Mistral-7B", True),
        ("TL;DR 16x16", 1 << 16, "Mistral-7B", False),
        ("28 responses to 4k", 0, "Mistral-7B", True),
        ("28 responses to 16k", 0, "Mistral-7B", False),
        ("TL;DR 8x8", 1 << 14, "Llama-3.2-1B", True),
        ("TL;DR 4x4", 1 << 14, "Gemma-2", True),
        ("28 responses to 16k", 0, "Gemma-2", False),
        ("HH 4x4", 1 << 14, "Mistral-7B", False),
        ("chain of 32", 1 << 14, "Mistral-7B", False),
        ("TL;DR 2x2", 1 << 14, "Mistral-7B", False),
        ("TL;DR 8x8", 1 << 16, "Mistral-7B", False),
        ("TL;DR 16x16", 1 << 16, "Llama-3.2-1B", False),
    ],
    "cpu": [
        ("TL;DR 2x2", 0, "SmolLM2", True),
        ("HH 4x4", 0, "SmolLM2, window 64", True),
        ("HH 4x4", 0, "SmolLM2, soft-cap 5", True),
        ("TL;DR 4x4", 0, "SmolLM2", False),
        ("chain of 8", 0, "SmolLM2", False),
    ],
}


def cases(settings: Settings) -> list[Case]:
    """Trees and heads that occur, not every pair of them."""
    dtype = "bfloat16" if settings.device == "cuda" else "float32"
    made = []
    for tree, tokens, heads, quick in _CASES[settings.device]:
        name = ", ".join([tree, *([f"{tokens >> 10}k tokens"] if tokens else []), heads])
        made.append(Case(name, _TREES[tree] | {"tokens": tokens} | _HEADS[heads], dtype, quick))
    return made


@dataclass(frozen=True)
class Inputs:
    """One pack: q [T, Hq, D], k, v [T, Hkv, D] and the gradient of the output.

    Attributes:
        options: window and softcap.
        sample: [n] int64, the packed tokens at which numbers are compared.
    """

    plan: AttentionPlan
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad_out: torch.Tensor
    options: dict[str, Any]
    sample: torch.Tensor

    @property
    def on_gpu(self) -> bool:
        return self.q.device.type == "cuda"

    def gather(self, window: int | None = None) -> Gather:
        return gather_for(self.plan.nodes, window, self.q.device)

    def numbers(self, returned: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        """From the output, and the gradients of q, k, v if there are any, of all packed tokens."""
        names = ("out", "dq", "dk", "dv")[: len(returned)]
        return {name: x[self.sample].float() for name, x in zip(names, returned, strict=True)}

    def prepared(self, run: Callable[[], Any], backward: bool, numbers: Callable | None = None, **facts) -> Prepared:
        """Useful work only: pairs that are visible, and every tensor read or written once a pass."""
        T, Hq, D = self.q.shape
        seen = self.plan.position_ids.cpu().long() + 1
        pairs = int(seen.clamp(max=self.options["window"] or T).sum())
        q, kv = self.q.nbytes, self.k.nbytes + self.v.nbytes
        moved = 2 * q + kv + (4 * q + 2 * kv if backward else 0)
        flops = 4 * Hq * D * pairs * (3.5 if backward else 1.0)
        return Prepared(run, flops, float(moved), facts, numbers or self.numbers)


def plan_of(case: Case) -> AttentionPlan:
    """On the host."""
    shape = case.shapes
    tree = trees.group(*shape["group"]) if "group" in shape else trees.chain(*shape["chain"])
    return trees.fill(tree, shape["tokens"])


def inputs(case: Case, settings: Settings, seed: int) -> Inputs:
    """Normal q, k, v on a fresh plan."""
    shape, plan = case.shapes, plan_of(case).to(settings.device)
    T, Hq, Hkv, D = len(plan.position_ids), shape["Hq"], shape["Hkv"], shape["D"]
    generator = torch.Generator(settings.device).manual_seed(seed)
    q, k, v, grad_out = (
        torch.randn(T, heads, D, generator=generator, device=settings.device).to(getattr(torch, case.dtype))
        for heads in (Hq, Hkv, Hkv, Hq)
    )
    edges = np.linspace(0, T, min(T, _SAMPLE) + 1).astype(np.int64)
    sample = torch.from_numpy(np.random.default_rng(seed).integers(edges[:-1], edges[1:])).to(settings.device)
    options = {name: shape.get(name) for name in ("window", "softcap")}
    return Inputs(plan, q, k, v, grad_out, options, sample)


_LIMITS = {"float32": (1e-5, 2e-5), "bfloat16": (5e-3, 2e-2)}  # of the output, and of gradients

SUITE = Suite(
    name="attention",
    title="Attention over prefix trees",
    cases=cases,
    inputs=inputs,
    limits={dtype: {"out": out, "dq": grad, "dk": grad, "dv": grad} for dtype, (out, grad) in _LIMITS.items()},
    input_sets=2,
)

# --------------------------------------------------------------------------------------------------------------------
# Ours


def _packed(made: Inputs, backward: bool, attention: Callable, keys: int | None = None, **facts) -> Prepared:
    """An arm that takes and returns packed tokens."""
    leaves = [x.detach().requires_grad_(backward) for x in (made.q, made.k, made.v)]
    grad_out = made.grad_out.to(made.q.dtype)

    def run() -> tuple[torch.Tensor, ...]:
        out = attention(*leaves)
        return out.detach(), *(torch.autograd.grad(out, leaves, grad_out) if backward else ())

    T = len(made.q)
    return made.prepared(run, backward, queries=T, keys=keys or T, **facts)


@SUITE.arm("reference in float64", peer="sami-fast", timed=False)
def oracle(made: Inputs, backward: bool) -> Prepared:
    """Node by node: no T x T matrix."""
    q, k, v = (x.double() for x in (made.q, made.k, made.v))
    exact = Inputs(made.plan, q, k, v, made.grad_out.double(), made.options, made.sample)
    attention = functools.partial(prefix_attention, plan=made.plan, **made.options, backend="reference")
    return _packed(exact, backward, attention)


def ours(backend: str, made: Inputs, backward: bool) -> Prepared:
    """`sami_fast.prefix_attention`."""
    if backend != "reference" and not made.on_gpu:
        raise Unsupported("takes CUDA tensors")
    if backend == "reference" and made.on_gpu and len(made.q) > _MAX_REFERENCE_TOKENS:
        raise Unsupported("walks the nodes from the host: too slow to time on a pack of this size")
    return _packed(made, backward, functools.partial(prefix_attention, plan=made.plan, **made.options, backend=backend))


# The one that others are divided by is the first that runs.
for _backend in ops.dispatch.IMPLEMENTATIONS["prefix_attention"]:
    if _backend != "flash":
        SUITE.arm(f"ours, {_backend}", peer="sami-fast", ours=True)(functools.partial(ours, _backend))

# --------------------------------------------------------------------------------------------------------------------
# Without sharing


def _refuse_softcap(made: Inputs) -> None:
    if made.options["softcap"] is not None:
        raise Unsupported("no soft-cap")


def _unshared(
    made: Inputs, backward: bool, attention: Callable, queries: int, lay_out: Callable, flatten: Callable
) -> Prepared:
    """An arm on whole sequences, each token copied into every sequence that it belongs to before anything is timed.

    `lay_out`: rows of sequences end to end [K, H, D] -> what `attention` takes; `flatten`: the reverse, of its output.
    """
    gather = made.gather()  # every run ends in a leaf: what it sees is a whole sequence
    one_copy = gather.copies[gather.first_copy]
    leaves = [lay_out(gather.rows(x)).requires_grad_(backward) for x in (made.q, made.k, made.v)]
    if backward:
        upstream = made.grad_out.new_zeros(len(gather.index), *made.grad_out.shape[1:])
        upstream = lay_out(upstream.index_copy_(0, one_copy, made.grad_out))

    def run() -> tuple[torch.Tensor, ...]:
        out = attention(*leaves)
        return out.detach(), *(torch.autograd.grad(out, leaves, upstream) if backward else ())

    def numbers(returned: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        out, *grads = map(flatten, returned)
        return made.numbers((out[one_copy], *map(gather.sum, grads)))

    return made.prepared(run, backward, numbers, queries=queries, keys=queries)


@SUITE.arm("SDPA, unshared", peer="torch")
def sdpa(made: Inputs, backward: bool) -> Prepared:
    """`scaled_dot_product_attention` on all sequences, padded to the longest."""
    _refuse_softcap(made)
    gather = made.gather()
    lengths, L = gather.key_offsets.diff().long(), gather.max_keys
    S, device, window = len(lengths), made.q.device, made.options["window"]
    is_token = torch.arange(L, device=device) < lengths[:, None]
    slot = is_token.flatten().nonzero().squeeze(1)  # padded row of every token
    mask = {"is_causal": True}
    if window is not None and window < L:
        distance = torch.arange(L, device=device)[:, None] - torch.arange(L, device=device)
        mask = {"attn_mask": (distance >= 0) & (distance < window)}

    def lay_out(rows: torch.Tensor) -> torch.Tensor:
        padded = rows.new_zeros(S * L, *rows.shape[1:]).index_copy_(0, slot, rows)
        return padded.view(S, L, *rows.shape[1:]).transpose(1, 2)

    def flatten(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).flatten(0, 1)[slot]

    attention = functools.partial(scaled_dot_product_attention, enable_gqa=True, **mask)
    return _unshared(made, backward, attention, S * L, lay_out, flatten)


def _varlen(made: Inputs, gather: Gather, query_offsets: torch.Tensor, max_queries: int) -> Callable:
    """(q, gathered k and v) -> out, by PyTorch's own flash-attention."""
    _refuse_softcap(made)
    if not made.on_gpu:
        raise Unsupported("takes CUDA tensors")
    from torch.nn.attention.varlen import varlen_attn

    lengths = query_offsets, gather.key_offsets, max_queries, gather.max_keys
    window = made.options["window"]
    left = -1 if window is None or window >= gather.max_keys else window - 1
    return lambda q, k, v: varlen_attn(q, k, v, *lengths, window_size=(left, 0), enable_gqa=True)


@SUITE.arm("varlen_attn, unshared", peer="torch")
def varlen(made: Inputs, backward: bool) -> Prepared:
    """`torch.nn.attention.varlen.varlen_attn` on all sequences, end to end."""
    gather = made.gather()
    attention = _varlen(made, gather, gather.key_offsets, gather.max_keys)
    return _unshared(made, backward, attention, len(gather.index), lambda rows: rows, lambda rows: rows)


# --------------------------------------------------------------------------------------------------------------------
# Gathered keys and values


class GatheredRows(torch.autograd.Function):
    """`Gather.rows`, and its sum in the backward."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, gather: Gather) -> torch.Tensor:
        ctx.gather = gather
        return gather.rows(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.gather.sum(grad), None


@SUITE.arm("gathered K/V + varlen_attn", peer="torch")
def gathered_varlen(made: Inputs, backward: bool) -> Prepared:
    """Queries packed, keys copied along each path, in one call: how TRL trains on trees."""
    gather = made.gather(made.options["window"])
    attend = _varlen(made, gather, gather.query_offsets, gather.max_queries)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, GatheredRows.apply(k, gather), GatheredRows.apply(v, gather))

    return _packed(made, backward, attention, len(gather.index))


@SUITE.arm("gathered K/V + SDPA", peer="torch")
def gathered_sdpa(made: Inputs, backward: bool) -> Prepared:
    """The same where no variable-length kernel runs: one call for each run of queries."""
    _refuse_softcap(made)
    if made.on_gpu:
        raise Unsupported("varlen_attn does in one call what takes one for each run here")
    gather = made.gather(made.options["window"])
    queries, keys = (x.diff().tolist() for x in (gather.query_offsets, gather.key_offsets))
    masks = []
    for length, seen in zip(queries, keys, strict=True):
        distance = torch.arange(seen - length, seen)[:, None] - torch.arange(seen)
        masks.append((distance >= 0) & (distance < (gather.window or seen)))

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = GatheredRows.apply(k, gather).split(keys), GatheredRows.apply(v, gather).split(keys)
        runs = zip(q.split(queries), *rows, masks, strict=True)
        attended = [
            scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), mask, enable_gqa=True)
            for q, k, v, mask in runs
        ]
        return torch.cat(attended, dim=2)[0].transpose(0, 1)

    return _packed(made, backward, attention, len(gather.index))


def flash(version: int, made: Inputs, backward: bool) -> Prepared:
    """What `prefix_attention(..., backend="flash")` runs, by this version of flash-attn."""
    library = flash_attention.load(version)
    if not made.on_gpu:
        raise Unsupported("takes CUDA tensors")
    major, _ = torch.cuda.get_device_capability(made.q.device)
    if major not in flash_attention.LIBRARIES[version][3]:
        raise Unsupported(f"not for compute capability {major}.x")
    q, k, v = made.q, made.k, made.v
    plan = made.plan.position_ids, made.plan.nodes, None, q.shape[2] ** -0.5, *made.options.values(), library

    def run() -> tuple[torch.Tensor, ...]:
        out, lse = flash_attention.prefix_attention_forward(q, k, v, *plan)
        if not backward:
            return (out,)
        return out, *flash_attention.prefix_attention_backward(made.grad_out, lse, q, k, v, out, lse, *plan)[:3]

    keys = len(made.gather(made.options["window"]).index)
    return made.prepared(run, backward, queries=len(q), keys=keys)


for _version, (_package, *_) in sorted(flash_attention.LIBRARIES.items()):
    SUITE.arm(f"gathered K/V + flash-attn {_version}", peer=_package)(functools.partial(flash, _version))

# --------------------------------------------------------------------------------------------------------------------
# A mask


@functools.cache
def compiled_flex_attention() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    config = torch._dynamo.config
    config.recompile_limit = 64  # heads, options and passes; beyond the limit it would run uncompiled
    config.specialize_int = config.specialize_float = True  # windows and soft-caps; runtime numbers fail to compile
    return torch.compile(flex_attention, dynamic=True)


@SUITE.arm("FlexAttention", peer="torch")
def flex(made: Inputs, backward: bool) -> Prepared:
    """`flex_attention` with the same mask; the time to build the block mask is apart.

    Compiled for GPUs only: for the CPU, PyTorch 2.13 compiles no more than the first few variants of a process.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if backward and not made.on_gpu:
        raise Unsupported("no backward on the CPU")
    call = compiled_flex_attention() if made.on_gpu else flex_attention
    T, device, window, softcap = len(made.q), made.q.device, made.options["window"], made.options["softcap"]
    end, position = made.plan.subtree_end, made.plan.position_ids

    def visible(b, h, i, n):
        return (n <= i) & (i < end[n])

    def visible_nearby(b, h, i, n):
        return visible(b, h, i, n) & (position[i] - position[n] < window)

    def cap(score, b, h, i, n):
        return softcap * torch.tanh(score / softcap)

    def build() -> Any:
        return create_block_mask(
            visible if window is None else visible_nearby, None, None, T, T, device=device, _compile=made.on_gpu
        )

    if made.on_gpu:
        build()  # compiles
        torch.cuda.synchronize()
    begin = time.perf_counter()
    options = {"block_mask": build(), "score_mod": None if softcap is None else cap, "enable_gqa": True}
    if made.on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return call(*(x.transpose(0, 1)[None] for x in (q, k, v)), **options)[0].transpose(0, 1)

    return _packed(made, backward, attention, **{"mask build, ms": 1e3 * seconds, "compiled": made.on_gpu})
