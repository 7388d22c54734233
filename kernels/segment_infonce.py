"""Segment-mean InfoNCE in Triton: loss, matrix, metrics and gradient of all groups in one launch, and one backward.

Forward: one program owns a group and keeps its C x R matrix in registers or, of a large group, a strip of its rows at a
time, twice. Sums over tokens run in float64, as in csrc/: the digits that tell two constitutions apart are the last
ones of a long sum. Backward: all tokens of a pair have one gradient. Deterministic.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from sami_fast.kernels import configs
from sami_fast.kernels.launch import expect_launchable, launching_on

_LOADS = 2048  # tokens that a program has in flight
_TILE = 2048  # cells that its registers hold
BACKWARD_OPTIONS = dict(BLOCK_S=8, BLOCK_T=128, num_warps=4, enable_fp_fusion=True)


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0 without cancellation: a Taylor polynomial where exp(x) is near 1."""
    series = 1.0 + x * (1.0 / 5.0) * (1.0 + x * (1.0 / 6.0) * (1.0 + x * (1.0 / 7.0)))
    series = x * (1.0 + x * (1.0 / 2.0) * (1.0 + x * (1.0 / 3.0) * (1.0 + x * (1.0 / 4.0) * series)))
    return tl.where(x > -0.35, series, tl.exp(x) - 1.0)


@triton.jit
def _mean(total, count, NEWTON: tl.constexpr):
    """total / count in float64; by Newton's steps for compilers that divide in a function and spill around it."""
    if NEWTON:
        inverse = (1.0 / count.to(tl.float32)).to(tl.float64)
        inverse *= 2.0 - count.to(tl.float64) * inverse
        inverse *= 2.0 - count.to(tl.float64) * inverse
        mean = total * inverse
    else:
        mean = total / count.to(tl.float64)
    return mean


@triton.jit
def _gradient(score, positive, counts, top, log_sum, count, AXIS: tl.constexpr):
    """Loss of lines and d(loss)/d(score) [BLOCK_C, BLOCK_R], 0 where not `counts`; AXIS as in `_line`.

    `top` + `log_sum` is the log-sum-exp of a line, of which the scores may be a part; `count` of all are positive.
    """
    share = 1.0 / tl.maximum(count, 1.0)
    # log softmax in two steps: the first keeps the digits that a large top + log_sum would round away.
    logp = (score - tl.expand_dims(top, AXIS)) - tl.expand_dims(log_sum, AXIS)
    loss = -tl.sum(tl.where(positive, logp, 0.0), AXIS) * share
    counts = counts & (count > 0)
    grad = tl.where(positive, _expm1(logp) + tl.expand_dims(1.0 - share, AXIS), tl.exp(logp))
    return tl.where(counts, loss, 0.0), tl.where(tl.expand_dims(counts, AXIS), grad, 0.0)


@triton.jit
def _best(score, positive, AXIS: tl.constexpr):
    """Highest score of a positive and of the others."""
    best_positive = tl.max(tl.where(positive, score, float("-inf")), AXIS)
    return best_positive, tl.max(tl.where(positive, float("-inf"), score), AXIS)


@triton.jit
def _hits(best_positive, best_negative, log_sum, count, counts):
    return tl.where(counts & (count > 0) & (best_positive > best_negative) & (log_sum == log_sum), 1.0, 0.0)


@triton.jit
def _line(score, positive, counts, AXIS: tl.constexpr):
    """Of each row (AXIS 1) or column (0): loss, hit, and d(loss)/d(score) [BLOCK_C, BLOCK_R]; 0 where not `counts`.

    Unscored entries are -inf and add exp(-inf) = 0. A NaN, or nothing but -inf, makes the line NaN.
    """
    best_positive, best_negative = _best(score, positive, AXIS)
    top = tl.maximum(best_positive, best_negative)
    log_sum = tl.log(tl.sum(tl.exp(score - tl.expand_dims(top, AXIS)), AXIS))
    count = tl.sum(positive.to(tl.float32), AXIS)
    loss, grad = _gradient(score, positive, counts, top, log_sum, count, AXIS)
    return loss, _hits(best_positive, best_negative, log_sum, count, counts), grad


@triton.jit
def _scores(
    token_logprobs, begin, length, MEAN: tl.constexpr, NEWTON: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """[BLOCK_C, BLOCK_R] float32, -inf for pairs without tokens."""
    longest = tl.max(tl.max(length, 1), 0)
    total = tl.zeros([BLOCK_C, BLOCK_R], tl.float64)
    for first in range(0, longest, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        here = token[None, None, :] < length[:, :, None]
        value = tl.load(token_logprobs + (begin[:, :, None] + token[None, None, :]), mask=here, other=0.0)
        total += tl.sum(value.to(tl.float64), 2)
    if MEAN:
        total = _mean(total, tl.maximum(length, 1), NEWTON)
    return tl.where(length > 0, total.to(tl.float32), float("-inf"))


@triton.jit
def _store_results(loss, metrics, group, C, R, rows, columns, row_hits, column_hits):
    """Of a group, from sums over its rows and columns."""
    rows = rows / C
    columns = columns / R
    tl.store(loss + group, 0.5 * (columns + rows))
    information = (tl.log(C.to(tl.float32)) - columns) + (tl.log(R.to(tl.float32)) - rows)
    tl.store(metrics + 3 * group, 0.5 * information)
    tl.store(metrics + 3 * group + 1, row_hits / C)
    tl.store(metrics + 3 * group + 2, column_hits / R)


@triton.jit
def _pairs(offsets, first_cell, c, C, r, R):
    """Of prompts c with responses r [BLOCK_C, BLOCK_R]: whether there is such a pair, its number, its tokens."""
    inside = (c < C)[:, None] & (r < R)[None, :]
    cell = first_cell + c[:, None] * R + r[None, :]
    begin = tl.load(offsets + cell, mask=inside, other=0)
    length = (tl.load(offsets + cell + 1, mask=inside, other=0) - begin).to(tl.int32)
    return inside, cell, begin, length


@triton.jit
def _segment_infonce_forward_kernel(
    token_logprobs, offsets, table, positives, loss, matrix, metrics, grad_pairs,
    MEAN: tl.constexpr, NEWTON: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Groups of at most BLOCK_C x BLOCK_R. Grid: (groups,)."""
    group = tl.program_id(0)
    C = tl.load(table + 4 * group)
    R = tl.load(table + 4 * group + 1)
    first_cell = tl.load(table + 4 * group + 2).to(tl.int64)
    first_response = tl.load(table + 4 * group + 3)
    c = tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    inside, cell, begin, length = _pairs(offsets, first_cell, c, C, r, R)
    score = _scores(token_logprobs, begin, length, MEAN, NEWTON, BLOCK_C, BLOCK_R, BLOCK_T)
    tl.store(matrix + cell, score, mask=inside)

    owner = tl.load(positives + first_response + r, mask=r < R, other=0)
    positive = inside & (c[:, None] == owner[None, :]) & (length > 0)
    row_loss, row_hit, row_grad = _line(score, positive, c < C, 1)
    column_loss, column_hit, column_grad = _line(score, positive, r < R, 0)
    column_loss = tl.where((owner < 0) | (owner >= C), float("nan"), column_loss)  # a positive out of range
    sums = tl.sum(row_loss, 0), tl.sum(column_loss, 0), tl.sum(row_hit, 0), tl.sum(column_hit, 0)
    _store_results(loss, metrics, group, C, R, sums[0], sums[1], sums[2], sums[3])

    grad = 0.5 * (column_grad / R + row_grad / C)
    if MEAN:
        grad = grad / tl.maximum(length, 1)
    tl.store(grad_pairs + cell, grad, mask=inside)


@triton.jit
def _segment_infonce_strips_kernel(
    token_logprobs, offsets, table, positives, loss, matrix, metrics, grad_pairs,
    MEAN: tl.constexpr, NEWTON: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Groups of any C and at most BLOCK_R responses, BLOCK_C rows at a time. Grid: (groups,).

    The first walk over the rows makes scores and running log-sum-exps of the columns, the second all that needs these.
    """
    group = tl.program_id(0)
    C = tl.load(table + 4 * group)
    R = tl.load(table + 4 * group + 1)
    first_cell = tl.load(table + 4 * group + 2).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    owner = tl.load(positives + tl.load(table + 4 * group + 3) + r, mask=r < R, other=0)

    best_positive = tl.full([BLOCK_R], float("-inf"), tl.float32)
    best_negative = best_positive
    total = tl.zeros([BLOCK_R], tl.float32)  # sum of exp(score - the higher of both)
    count = tl.zeros([BLOCK_R], tl.float32)
    for low in range(0, C, BLOCK_C):
        c = low + tl.arange(0, BLOCK_C)
        inside, cell, begin, length = _pairs(offsets, first_cell, c, C, r, R)
        score = _scores(token_logprobs, begin, length, MEAN, NEWTON, BLOCK_C, BLOCK_R, BLOCK_T)
        tl.store(matrix + cell, score, mask=inside)
        positive = inside & (c[:, None] == owner[None, :]) & (length > 0)
        here_positive, here_negative = _best(score, positive, 0)
        before = tl.maximum(best_positive, best_negative)
        best_positive = tl.maximum(best_positive, here_positive)
        best_negative = tl.maximum(best_negative, here_negative)
        top = tl.maximum(best_positive, best_negative)
        shift = tl.where(top == float("-inf"), 0.0, top)  # nothing but -inf so far: keep -inf - -inf out of exp
        total = total * tl.exp(before - shift) + tl.sum(tl.exp(score - shift[None, :]), 0)
        count += tl.sum(positive.to(tl.float32), 0)
    top = tl.maximum(best_positive, best_negative)
    log_sum = tl.log(total)
    tl.debug_barrier()  # other threads of the program wrote the scores that are read below

    column_loss = tl.zeros([BLOCK_R], tl.float32)
    row_sum = 0.0
    row_hits = 0.0
    for low in range(0, C, BLOCK_C):
        c = low + tl.arange(0, BLOCK_C)
        inside, cell, begin, length = _pairs(offsets, first_cell, c, C, r, R)
        score = tl.load(matrix + cell, mask=inside, other=float("-inf"))
        positive = inside & (c[:, None] == owner[None, :]) & (length > 0)
        row_loss, row_hit, row_grad = _line(score, positive, c < C, 1)
        strip_loss, column_grad = _gradient(score, positive, r < R, top, log_sum, count, 0)
        column_loss += strip_loss
        row_sum += tl.sum(row_loss, 0)
        row_hits += tl.sum(row_hit, 0)
        grad = 0.5 * (column_grad / R + row_grad / C)
        if MEAN:
            grad = grad / tl.maximum(length, 1)
        tl.store(grad_pairs + cell, grad, mask=inside)
    column_loss = tl.where((owner < 0) | (owner >= C), float("nan"), column_loss)  # a positive out of range
    column_hits = tl.sum(_hits(best_positive, best_negative, log_sum, count, r < R), 0)
    _store_results(loss, metrics, group, C, R, row_sum, tl.sum(column_loss, 0), row_hits, column_hits)


@triton.jit
def _segment_infonce_backward_kernel(
    grad_loss, grad_pairs, offsets, table, grad_tokens, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """grad_tokens of BLOCK_S pairs of a group. Grid: (groups, blocks of the largest group's pairs)."""
    group = tl.program_id(0)
    cells = tl.load(table + 4 * group) * tl.load(table + 4 * group + 1)
    pair = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = pair < cells
    cell = tl.load(table + 4 * group + 2).to(tl.int64) + pair
    begin = tl.load(offsets + cell, mask=inside, other=0)
    length = (tl.load(offsets + cell + 1, mask=inside, other=0) - begin).to(tl.int32)
    grad = tl.load(grad_loss + group) * tl.load(grad_pairs + cell, mask=inside, other=0.0)
    for first in range(0, tl.max(length, 0), BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        value = tl.broadcast_to(grad[:, None], (BLOCK_S, BLOCK_T))
        tl.store(grad_tokens + (begin[:, None] + token[None, :]), value, mask=token[None, :] < length[:, None])


def forward_launch(C: int, R: int) -> tuple[Any, dict[str, Any]]:
    """Kernel, tile and warps for groups of at most C x R, chosen so that none spills."""
    block_c, block_r = triton.next_power_of_2(C), triton.next_power_of_2(R)
    kernel = _segment_infonce_forward_kernel
    if block_c * block_r > _TILE:
        kernel, block_c = _segment_infonce_strips_kernel, max(1, _TILE // block_r // 2)
    cells = block_c * block_r
    block_t = 16 if cells <= 16 else 4 if cells == 32 else max(1, min(8, _LOADS // cells))
    num_warps = min(8, max(1, cells // 32))
    tile = dict(BLOCK_C=block_c, BLOCK_R=block_r, BLOCK_T=block_t)
    return kernel, dict(**tile, NEWTON=configs.OLDER_COMPILER, num_warps=num_warps, enable_fp_fusion=True)


def segment_infonce_forward(
    token_logprobs: torch.Tensor,
    offsets: torch.Tensor,
    shapes: torch.Tensor,
    table: torch.Tensor,
    positives: torch.Tensor,
    normalize: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss [B], matrix [S], metrics [B, 3], d(loss)/d(token) of each pair [S]; float32 only, C and R of at most 256."""
    C, R = shapes.amax(dim=0).tolist()
    expect_launchable("token_logprobs", token_logprobs, _segment_infonce_forward_kernel)
    B, S = shapes.shape[0], offsets.shape[0] - 1
    kernel, options = forward_launch(C, R)
    loss, matrix, metrics, grad_pairs = (token_logprobs.new_empty(size) for size in (B, S, (B, 3), S))
    with launching_on(token_logprobs.device):
        kernel[(B,)](
            token_logprobs.contiguous(),
            offsets.contiguous(),
            table,
            positives.contiguous(),
            loss,
            matrix,
            metrics,
            grad_pairs,
            MEAN=normalize == "mean",
            **options,
        )
    return loss, matrix, metrics, grad_pairs


def segment_infonce_backward(
    grad_loss: torch.Tensor,
    grad_pairs: torch.Tensor,
    offsets: torch.Tensor,
    shapes: torch.Tensor,
    table: torch.Tensor,
    num_tokens: int,
) -> torch.Tensor:
    """d(loss)/d(token) [N]."""
    blocks = triton.cdiv(int(shapes.prod(dim=1).max()), BACKWARD_OPTIONS["BLOCK_S"])
    grad_tokens = grad_pairs.new_empty(num_tokens)
    with launching_on(grad_pairs.device):
        _segment_infonce_backward_kernel[(shapes.shape[0], blocks)](
            grad_loss.contiguous(), grad_pairs, offsets.contiguous(), table, grad_tokens, **BACKWARD_OPTIONS
        )
    return grad_tokens
