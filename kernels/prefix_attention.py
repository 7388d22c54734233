"""Prefix-tree attention in Triton: forward, dQ and dK/dV. One program writes each number: deterministic, no atomics.

The mask. Tokens lie in depth-first order, so token i sees key n exactly when

    n <= i < subtree_end[n]                                   and, with a window, position[i] - position[n] < window

One integer per key decides. A program owns a tile of queries (forward, dQ) or of keys (dK/dV) and walks a flat list of
steps over the other side, made on the host (`sami_fast.tile_plan`): first the full steps, in which every pair is
visible and nothing is compared, then the partial ones. Neither loop branches on data, so both are pipelined.

The G query heads of one KV head share its keys. A tile of queries packs them: row = token * G + head, BLOCK_M rows. A
tile of keys visits them one after the other.

Scores are kept in base 2 as `x * slope`. Without a soft-cap, x = q.k and slope = scale * log2(e); with one,
x = tanh(q.k * cap_scale), cap_scale = scale / softcap and slope = softcap * log2(e). The weights of attention are then
exp2(x * slope - lse * log2(e)).

What the loops read comes through tensor descriptors of [H, T, D] (DESCRIPTORS: the copy engine of sm_90) or through
pointers to [T, H, D]. An option that is off is passed to a kernel as None.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from sami_fast.kernels import configs
from sami_fast.kernels.launch import Call, architecture_of, expect_launchable, launching_on
from sami_fast.ops.dispatch import expect
from sami_fast.tile_plan import DevicePlan, device_plan

_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2.0))
_MAX_HEAD_DIM = 256
_expect = functools.partial(expect, backend="triton")
_DESCRIPTOR_ARCHITECTURES = (90, 100, 103)  # a copy engine and 227 KB of shared memory
_STATISTICS_ROWS = 32
_TOKEN_PADDING = 128  # a multiple of every BLOCK_M
# Nothing of a pack's shape or of a plan may enter the specialisation of a kernel: a new tree would compile it anew.
_RUNTIME_ONLY = ["T", "T_padded", "window"]

# --------------------------------------------------------------------------------------------------------------------
# Helpers


@triton.jit
def _load_rows(base, offset, inside, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr):
    """[rows, BLOCK_D]: D numbers from each `base + offset[row]`, zeros beyond D and, if CHECK, in rows not `inside`."""
    column = tl.arange(0, BLOCK_D)
    pointer = base + offset[:, None] + column[None, :]
    if CHECK and D < BLOCK_D:
        tile = tl.load(pointer, mask=inside[:, None] & (column < D)[None, :], other=0.0)
    elif CHECK:
        tile = tl.load(pointer, mask=inside[:, None], other=0.0)
    elif D < BLOCK_D:
        tile = tl.load(pointer, mask=(column < D)[None, :], other=0.0)
    else:
        tile = tl.load(pointer)
    return tile


@triton.jit
def _store_rows(base, offset, tile, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    pointer = base + offset[:, None] + column[None, :]
    tl.store(pointer, tile.to(base.dtype.element_ty), mask=inside[:, None] & (column < D)[None, :])


@triton.jit
def _load_step(
    source, head, start, stride_token, stride_head, T,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """[BLOCK, BLOCK_D]: tokens [start, start + BLOCK) of one head, zeros beyond T (needs CHECK) and beyond D."""
    if DESCRIPTORS:
        tile = source.load([head, start, 0]).reshape(BLOCK, BLOCK_D)
    else:
        offset = tl.arange(0, BLOCK)
        base = source + head.to(tl.int64) * stride_head + start.to(tl.int64) * stride_token
        tile = _load_rows(base, offset * stride_token, start + offset < T, D, BLOCK_D, CHECK)
    return tile


@triton.jit
def _packed_rows(first, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of BLOCK_M rows from `first`: the first one's token, and each one's token, counted from there, and head."""
    row = tl.arange(0, BLOCK_M)
    if BLOCK_M % G != 0:  # else a tile begins with the first head of a token
        row += first % G
    return first // G, row // G, row % G


@triton.jit
def _cap(qk, cap_scale):
    """The x of a score."""
    if cap_scale is None:
        x = qk
    else:
        x = 1.0 - 2.0 / (1.0 + tl.exp2(qk * (cap_scale * 2.0 * _LOG2E)))  # tanh(qk * cap_scale)
    return x


@triton.jit
def _positions(position, token, inside, window):
    """Of the tokens `inside`; the tokens themselves where no window asks for positions."""
    if window is None:
        found = token
    else:
        found = tl.load(position + token, mask=inside, other=0)
    return found


@triton.jit
def _visible(token, key, subtree_end, token_position, key_position, window):
    """The mask. Arguments broadcast to [queries, keys], or to [keys, queries]."""
    visible = (key <= token) & (token < subtree_end)
    if window is not None:
        visible = visible & (token_position - key_position < window)
    return visible


@triton.jit
def _sees_keys(token, token_position, start, subtree_end, position, T, window, BLOCK_N: tl.constexpr):
    """The mask [tokens, BLOCK_N] of the keys from `start`."""
    key = start + tl.arange(0, BLOCK_N)
    key_end = tl.load(subtree_end + key, mask=key < T, other=0)
    key_position = _positions(position, key, key < T, window)
    return _visible(
        token[:, None], key[None, :], key_end[None, :], token_position[:, None], key_position[None, :], window
    )


# --------------------------------------------------------------------------------------------------------------------
# Kernels. Grid: (tiles, KV heads).


@triton.jit(do_not_specialize=_RUNTIME_ONLY)
def _forward_kernel(
    q, k, v, sinks, out, lse, tiles, steps, subtree_end, position,
    q_token, q_head, k_token, k_head, v_token, v_head, T, slope, cap_scale, window,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Out [T, Hq, DV] and lse [T, Hq] of one tile of queries: online softmax over its steps of keys."""
    tile = tiles + 4 * tl.program_id(0)
    kv_head = tl.program_id(1)
    num_heads = tl.num_programs(1) * G
    first_token, row, head = _packed_rows(tl.load(tile), G, BLOCK_M)
    token = first_token + row
    valid = token < T
    token_position = _positions(position, token, valid, window)
    q += first_token.to(tl.int64) * q_token + (kv_head * G).to(tl.int64) * q_head
    queries = _load_rows(q, row * q_token + head * q_head, valid, D, BLOCK_D, True)
    if sinks is None:
        highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    else:
        highest = tl.load(sinks + kv_head * G + head).to(tl.float32) * _LOG2E
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    for PARTIAL in tl.static_range(2):
        begin = tl.load(tile + 1 + PARTIAL)
        end = tl.load(tile + 2 + PARTIAL)
        start = tl.load(steps + begin)
        for at in range(begin, end):
            keys = _load_step(k, kv_head, start, k_token, k_head, T, D, BLOCK_N, BLOCK_D, PARTIAL, DESCRIPTORS)
            values = _load_step(v, kv_head, start, v_token, v_head, T, DV, BLOCK_N, BLOCK_DV, PARTIAL, DESCRIPTORS)
            x = _cap(tl.dot(queries, tl.trans(keys), input_precision="ieee"), cap_scale)
            if PARTIAL:
                visible = _sees_keys(token, token_position, start, subtree_end, position, T, window, BLOCK_N)
                x = tl.where(visible, x, float("-inf"))
            start = tl.load(steps + at + 1)  # a step ahead of its use
            after = tl.maximum(highest, tl.max(x, 1) * slope)
            shift = after
            if PARTIAL:  # a row may have seen nothing yet: keep -inf - -inf out of the exponent
                shift = tl.where(after == float("-inf"), 0.0, after)
            weights = tl.exp2(x * slope - shift[:, None])
            decay = tl.exp2(highest - shift)
            highest = after
            total = total * decay + tl.sum(weights, 1)
            acc = tl.dot(weights.to(values.dtype), values, acc * decay[:, None], input_precision="ieee")

    at = first_token.to(tl.int64) * num_heads + kv_head * G
    offset = row * num_heads + head
    tl.store(lse + at + offset, (highest + tl.log2(total)) * _LN2, mask=valid)
    _store_rows(out + at * DV, offset * DV, acc / total[:, None], valid, DV, BLOCK_DV)


@triton.jit(do_not_specialize=_RUNTIME_ONLY)
def _row_statistics_kernel(
    out, grad_out, lse, grad_lse, lse2, shift, grad_out_token, grad_out_head, T, T_padded,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """What the backward needs of each token and head, [Hq, T_padded]: lse in base 2, and the shift in

    d(score) = weight * (d(weight) + shift),  shift = d(lse) - sum(out * d(out)):

    the softmax Jacobian and the gradient of the LSE output in one number. Both are 0 beyond T. Grid: (tokens, Hq).
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    offset = tl.arange(0, BLOCK_M)
    valid = first + offset < T
    at = first * num_heads + head
    output = _load_rows(out + at * DV, offset * num_heads * DV, valid, DV, BLOCK_DV, True)
    grad_out += first * grad_out_token + head.to(tl.int64) * grad_out_head
    upstream = _load_rows(grad_out, offset * grad_out_token, valid, DV, BLOCK_DV, True)
    log_sum = tl.load(lse + at + offset * num_heads, mask=valid, other=0.0)
    grad_log_sum = tl.load(grad_lse + at + offset * num_heads, mask=valid, other=0.0)
    store_at = head.to(tl.int64) * T_padded + first + offset
    tl.store(lse2 + store_at, log_sum * _LOG2E)
    tl.store(shift + store_at, grad_log_sum - tl.sum(output.to(tl.float32) * upstream.to(tl.float32), 1))


@triton.jit(do_not_specialize=_RUNTIME_ONLY)
def _grad_q_kernel(
    q, k, v, grad_out, lse2, shift, grad_q, tiles, steps, subtree_end, position,
    q_token, q_head, k_token, k_head, v_token, v_head, grad_out_token, grad_out_head,
    T, T_padded, scale, slope, cap_scale, window,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """grad_q [T, Hq, D] of one tile of queries, over its steps of keys."""
    tile = tiles + 4 * tl.program_id(0)
    kv_head = tl.program_id(1)
    num_heads = tl.num_programs(1) * G
    first_token, row, head = _packed_rows(tl.load(tile), G, BLOCK_M)
    token = first_token + row
    valid = token < T
    token_position = _positions(position, token, valid, window)
    first_token = first_token.to(tl.int64)
    first_head = (kv_head * G).to(tl.int64)
    q += first_token * q_token + first_head * q_head
    queries = _load_rows(q, row * q_token + head * q_head, valid, D, BLOCK_D, True)
    grad_out += first_token * grad_out_token + first_head * grad_out_head
    upstream = _load_rows(grad_out, row * grad_out_token + head * grad_out_head, valid, DV, BLOCK_DV, True)
    row_at = (first_head + head) * T_padded + token
    row_lse2 = tl.load(lse2 + row_at, mask=valid, other=0.0)
    row_shift = tl.load(shift + row_at, mask=valid, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    for PARTIAL in tl.static_range(2):
        begin = tl.load(tile + 1 + PARTIAL)
        end = tl.load(tile + 2 + PARTIAL)
        start = tl.load(steps + begin)
        for at in range(begin, end):
            keys = _load_step(k, kv_head, start, k_token, k_head, T, D, BLOCK_N, BLOCK_D, PARTIAL, DESCRIPTORS)
            values = _load_step(v, kv_head, start, v_token, v_head, T, DV, BLOCK_N, BLOCK_DV, PARTIAL, DESCRIPTORS)
            grad_weights = tl.dot(upstream, tl.trans(values), input_precision="ieee")
            x = _cap(tl.dot(queries, tl.trans(keys), input_precision="ieee"), cap_scale)
            weights = tl.exp2(x * slope - row_lse2[:, None])
            if PARTIAL:
                visible = _sees_keys(token, token_position, start, subtree_end, position, T, window, BLOCK_N)
                weights = tl.where(visible, weights, 0.0)
            start = tl.load(steps + at + 1)  # a step ahead of its use
            grad_scores = weights * (grad_weights + row_shift[:, None])
            if cap_scale is not None:
                grad_scores *= 1.0 - x * x
            acc = tl.dot(grad_scores.to(keys.dtype), keys, acc, input_precision="ieee")

    grad_q += (first_token * num_heads + first_head) * D
    _store_rows(grad_q, (row * num_heads + head) * D, acc * scale, valid, D, BLOCK_D)


@triton.jit(do_not_specialize=_RUNTIME_ONLY)
def _grad_kv_kernel(
    q, k, v, grad_out, lse2, shift, grad_k, grad_v, tiles, steps, subtree_end, position,
    q_token, q_head, k_token, k_head, v_token, v_head, grad_out_token, grad_out_head,
    T, T_padded, scale, slope, cap_scale, window,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """grad_k [T, Hkv, D], grad_v [T, Hkv, DV] or both, of one tile of keys over its steps of tokens; all is transposed.

    Head size 256 takes a launch for each, so that the accumulators fit into the registers.
    """
    tile = tiles + 4 * tl.program_id(0)
    kv_head = tl.program_id(1)
    first_key = tl.load(tile)
    key_offset = tl.arange(0, BLOCK_N)
    key = first_key + key_offset
    inside = key < T
    key_end = tl.load(subtree_end + key, mask=inside, other=0)
    key_position = _positions(position, key, inside, window)
    first_key = first_key.to(tl.int64)
    k += first_key * k_token + kv_head.to(tl.int64) * k_head
    v += first_key * v_token + kv_head.to(tl.int64) * v_head
    keys = _load_rows(k, key_offset * k_token, inside, D, BLOCK_D, True)
    if grad_k is not None:
        values = _load_rows(v, key_offset * v_token, inside, DV, BLOCK_DV, True)
        acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if grad_v is not None:
        acc_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    for PARTIAL in tl.static_range(2):
        begin = tl.load(tile + 1 + PARTIAL) * G
        end = tl.load(tile + 2 + PARTIAL) * G
        start = tl.load(steps + begin // G)
        for at in range(begin, end):  # every step once for each head
            head = kv_head * G + at % G
            queries = _load_step(q, head, start, q_token, q_head, T, D, BLOCK_M, BLOCK_D, PARTIAL, DESCRIPTORS)
            upstream = _load_step(
                grad_out, head, start, grad_out_token, grad_out_head, T, DV, BLOCK_M, BLOCK_DV, PARTIAL, DESCRIPTORS
            )
            token = start + tl.arange(0, BLOCK_M)
            head_at = head.to(tl.int64) * T_padded
            row_lse2 = tl.load(lse2 + head_at + token)
            if grad_k is not None:
                row_shift = tl.broadcast_to(tl.load(shift + head_at + token)[None, :], (BLOCK_N, BLOCK_M))
                grad_weights = tl.dot(values, tl.trans(upstream), row_shift, input_precision="ieee")
            x = _cap(tl.dot(keys, tl.trans(queries), input_precision="ieee"), cap_scale)
            weights = tl.exp2(x * slope - row_lse2[None, :])
            if PARTIAL:
                token_position = _positions(position, token, token < T, window)
                visible = _visible(
                    token[None, :],
                    key[:, None],
                    key_end[:, None],
                    token_position[None, :],
                    key_position[:, None],
                    window,
                )
                weights = tl.where(visible, weights, 0.0)
            start = tl.load(steps + (at + 1) // G)  # a step ahead of its use
            if grad_k is not None:
                if cap_scale is not None:
                    grad_weights *= 1.0 - x * x
                grad_scores = weights * grad_weights
            if grad_v is not None:
                acc_v = tl.dot(weights.to(upstream.dtype), upstream, acc_v, input_precision="ieee")
            if grad_k is not None:
                acc_k = tl.dot(grad_scores.to(queries.dtype), queries, acc_k, input_precision="ieee")

    num_kv_heads = tl.num_programs(1)
    at = first_key * num_kv_heads + kv_head
    if grad_k is not None:
        _store_rows(grad_k + at * D, key_offset * num_kv_heads * D, acc_k * scale, inside, D, BLOCK_D)
    if grad_v is not None:
        _store_rows(grad_v + at * DV, key_offset * num_kv_heads * DV, acc_v, inside, DV, BLOCK_DV)


# --------------------------------------------------------------------------------------------------------------------
# Launcher


def _descriptor_strides(x: torch.Tensor) -> list[int]:
    """Strides (head, token, 1) of `x` [T, H, D]; those of a dimension of size 1 may be anything and are made to fit."""
    token, head = (x.stride(dim) if x.shape[dim] > 1 else x.shape[2] for dim in (0, 1))
    return [head, token, 1]


def _has_descriptor(x: torch.Tensor) -> bool:
    """Whether the copy engine can read `x` (others then read 16 bytes at a time): strides and address are multiples."""
    strides = [stride * x.element_size() for stride in _descriptor_strides(x)[:2]]
    return x.data_ptr() % 16 == 0 and all(stride > 0 and stride % 16 == 0 for stride in strides)


def _readable(x: torch.Tensor) -> torch.Tensor:
    """`x` itself, or a contiguous copy of what would be slow to read or is broadcast."""
    return x if x.stride(2) == 1 and _has_descriptor(x) else x.contiguous()


def _descriptor(x: torch.Tensor, block: int) -> TensorDescriptor:
    T, H, D = x.shape
    return TensorDescriptor(x, [H, T, D], _descriptor_strides(x), [1, block, _padded(D)])


def _padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _refuse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: DevicePlan, scale: float, architecture: int
) -> None:
    """ValueError, by name, for what these kernels cannot do; shapes and devices agree by now."""
    expect_launchable("q", q, _forward_kernel, architecture)
    head_dim = max(q.shape[2], v.shape[2])
    _expect(head_dim <= _MAX_HEAD_DIM, "head_dim", f"at most {_MAX_HEAD_DIM}", head_dim)
    _expect(scale > 0, "scale", "a positive number", scale)
    _expect(plan.num_tokens == q.shape[0], "plan", f"a plan of {q.shape[0]} tokens as q has", plan.num_tokens)
    # Rows are numbered, and offsets within a tile counted, in 32 bits; offsets of tiles in 64.
    _expect(q.shape[0] * q.shape[1] < 2**31 - 2**16, "q", "fewer than 2^31 rows (tokens times heads)", list(q.shape))
    for name, x in dict(q=q, k=k, v=v).items():
        reach = _MAX_HEAD_DIM * x.stride(0) + x.shape[1] * x.stride(1)
        near = f"{_MAX_HEAD_DIM} tokens of all heads to span fewer than 2^31 elements"
        _expect(reach < 2**31, name, near, x.stride())


@dataclass(frozen=True)
class Attention:
    """One call of the op: what all its launches share. `architecture` is 90 for sm_90."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    position_ids: torch.Tensor
    plan: DevicePlan
    scale: float
    window: int | None
    softcap: float | None
    architecture: int

    @classmethod
    def prepare(cls, q, k, v, position_ids, nodes, scale, window, softcap, architecture=None) -> "Attention":
        plan = device_plan(nodes, q.device)
        architecture = architecture or architecture_of(q.device)
        _refuse(q, k, v, plan, scale, architecture)
        if window is not None and window > plan.max_position:
            window = None  # it holds every tree
        return cls(_readable(q), _readable(k), _readable(v), position_ids, plan, scale, window, softcap, architecture)

    def call(self, kernel: Any, name: str, walked: dict[str, torch.Tensor], **arguments: Any) -> Call:
        """Launch of `kernel` as pass `name`, whose loop reads `walked`; not all passes have `arguments`."""
        q, k, v = self.q, self.k, self.v
        D, DV, group = q.shape[2], v.shape[2], q.shape[1] // k.shape[1]
        descriptors = self.architecture in _DESCRIPTOR_ARCHITECTURES and q.element_size() == 2
        descriptors = descriptors and all(map(_has_descriptor, walked.values()))
        loads = "float32" if q.element_size() == 4 else "descriptors" if descriptors else "pointers"
        launch = configs.prefix_attention(loads, name, max(D, DV), self.softcap is not None, group)
        shape = launch.block_rows, launch.block_keys, self.window
        if "k" in walked:
            block, (tiles, steps) = launch.block_keys, self.plan.tiles("query", group, *shape)
        else:
            block, (tiles, steps) = launch.block_rows, self.plan.tiles("key", *shape)
        arguments |= dict(q=q, k=k, v=v, tiles=tiles, steps=steps, subtree_end=self.plan.subtree_end)
        arguments |= {f"{key}_token": x.stride(0) for key, x in dict(q=q, k=k, v=v).items()}
        arguments |= {f"{key}_head": x.stride(1) for key, x in dict(q=q, k=k, v=v).items()}
        arguments |= dict(
            position=None if self.window is None else self.position_ids,
            T=q.shape[0],
            slope=(self.scale if self.softcap is None else self.softcap) * math.log2(math.e),
            cap_scale=None if self.softcap is None else self.scale / self.softcap,
            window=self.window,
            G=group,
            D=D,
            DV=DV,
            BLOCK_M=launch.block_rows,
            BLOCK_N=launch.block_keys,
            BLOCK_D=_padded(D),
            BLOCK_DV=_padded(DV),
            DESCRIPTORS=descriptors,
        )
        if descriptors:
            arguments |= {key: _descriptor(x, block) for key, x in walked.items()}
        options = dict(num_warps=launch.num_warps, num_stages=launch.num_stages, enable_fp_fusion=True)
        return Call(kernel, (tiles.numel() // 4, k.shape[1]), arguments, options)


def forward_call(attention: Attention, sinks: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor) -> Call:
    """The launch that fills `out` and `lse`."""
    walked = dict(k=attention.k, v=attention.v)
    return attention.call(_forward_kernel, "forward", walked, sinks=sinks, out=out, lse=lse)


def backward_calls(
    attention: Attention,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    shift: torch.Tensor,
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
) -> list[Call]:
    """The launches, in order, that fill `shift` [Hq, T padded to _TOKEN_PADDING] and the gradients."""
    T, Hq, DV = out.shape
    rows = dict(
        grad_out=grad_out,
        grad_out_token=grad_out.stride(0),
        grad_out_head=grad_out.stride(1),
        lse2=torch.empty_like(shift),
        shift=shift,
        T_padded=shift.shape[1],
    )
    blocks = dict(BLOCK_M=_STATISTICS_ROWS, BLOCK_DV=_padded(DV))
    statistics = Call(
        _row_statistics_kernel,
        (shift.shape[1] // _STATISTICS_ROWS, Hq),
        dict(out=out, lse=lse, grad_lse=grad_lse, T=T, DV=DV, **rows, **blocks),
        dict(num_warps=4, num_stages=1, enable_fp_fusion=True),
    )
    rows["scale"] = attention.scale
    keys, queries = dict(k=attention.k, v=attention.v), dict(q=attention.q, grad_out=grad_out)
    if max(attention.q.shape[2], DV) <= 128:
        passes = {"grad_kv": (grad_k, grad_v)}
    else:
        passes = {"grad_k": (grad_k, None), "grad_v": (None, grad_v)}
    return [
        statistics,
        attention.call(_grad_q_kernel, "grad_q", keys, grad_q=grad_q, **rows),
        *(attention.call(_grad_kv_kernel, n, queries, grad_k=k, grad_v=v, **rows) for n, (k, v) in passes.items()),
    ]


# --------------------------------------------------------------------------------------------------------------------
# Public functions


def prefix_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    position_ids: torch.Tensor,
    nodes: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention output [T, Hq, Dv] in q's dtype and log-sum-exp [T, Hq] (sinks included) in float32.

    Raises:
        ValueError: a device, dtype, head size, scale, plan or length that these kernels cannot do, by name.
    """
    attention = Attention.prepare(q, k, v, position_ids, nodes, scale, window, softcap)
    out = q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    with launching_on(q.device):
        forward_call(attention, None if sinks is None else sinks.contiguous(), out, lse).run()
    return out, lse


def prefix_attention_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    position_ids: torch.Tensor,
    nodes: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and sinks (empty without sinks); weights are recomputed from `lse`."""
    attention = Attention.prepare(q, k, v, position_ids, nodes, scale, window, softcap)
    T, Hq, _ = q.shape
    grads = tuple(x.new_empty(x.shape) for x in (q, k, v))
    shift = lse.new_empty((Hq, -(-T // _TOKEN_PADDING) * _TOKEN_PADDING))
    upstream = _readable(grad_out), grad_lse.contiguous()
    with launching_on(q.device):
        for call in backward_calls(attention, *upstream, out.contiguous(), lse.contiguous(), shift, *grads):
            call.run()
    grad_sinks = q.new_zeros(0)
    if sinks is not None:
        grad_sinks = ((sinks.float() - lse).exp() * shift[:, :T].t()).sum(dim=0).to(sinks.dtype)
    return *grads, grad_sinks
