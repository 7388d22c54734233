"""log p(label) of a language-model head: library GEMMs for the products, one Triton kernel between two of them.

Logits exist in float32 and a block [R, W] at a time. A program of the block kernel holds its row of the block in
registers, so every logit is read once. Of a row with label y it keeps running numbers over the *other* columns only,
m = max z and s = sum exp(z - m) with z = cap(logit_scale * (h.E + b)). The log-odds d = m + log(s) - z_y then give

    log p(y) = -softplus(d) <= 0,    1 - p(y) = sigmoid(d),    lse = max(m + log(s), z_y) + log1p(exp(-|d|)),

exact to the last digits for labels that are nearly certain as for hopeless ones. Beside that, per block, a regime does

    no_grad       nothing;
    frozen_head   mean += exp(z - m) E in float32, rescaled where m grows; at the end of the forward
                  d(log p)/dh = (1 - p(y)) (E_y - mean / s), in hidden's dtype: the backward is a row scale;
    trained_head  the first K columns of the vocabulary keep A = p - onehot in hidden's dtype. The backward recomputes
                  the other columns' A and multiplies each block twice: dh -= g A E, dE -= A^T (g h), g upstream.

A block of dE sums over all rows in a float32 buffer and is rounded once: no float32 copy of the whole gradient is held.
That costs 10 bytes of traffic for each element of E, and 8 more for each chunk of rows after the first.

Peak extra memory in bytes, results included, with R <= 4096 rows, W columns, R * W <= 2^25, e bytes an element:

    no_grad       4RW
    frozen_head   (4 + e)RW + 4RH + eNH
    trained_head  4RW + eNK;  backward (4 + e)RW + 4WH + (4 + 2e)NH + eVH beside what was kept

plus, small beside these, 8N for the results, 12R and, where columns are kept, 4R for each of their blocks and 4R more;
12N in the backward and, with a bias, (4 + e)V + eN. Nothing waits for the device and there are no atomics: the same
result every time, and fit for a CUDA graph.
"""

import functools

import torch
import triton
import triton.language as tl

from sami_fast.kernels import configs
from sami_fast.kernels.head_blocks import GAIN, RUNTIME_ONLY, Head, finished, head_gradients, length, log1p, multiply
from sami_fast.kernels.launch import expect_launchable, launching_on

# --------------------------------------------------------------------------------------------------------------------
# Kernels. One program a row; numbers of rows, tensors and pointers are those of a chunk of rows.


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def _block_kernel(
    logits, bias, labels, highest, total, label_logit, weights, reference, mean,
    logits_row, weights_row, start, width, first, logit_scale, softcap, gain,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Columns [start, start + width) into the running m, s and z_y (`first`: nothing is there yet).

    Optional: `weights` gets gain * exp(z - m) dz/dx, 0 for the label; `reference` that m; `mean` is brought to it.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_V)
    inside = column < width
    logit = tl.load(logits + row * logits_row + column, mask=inside, other=0.0)
    z, slope = finished(logit, bias, start + column, inside, logit_scale, softcap)
    is_label = inside & (column == tl.load(labels + row) - start)
    own = tl.sum(tl.where(is_label, z, 0.0), 0)  # 0 in all blocks but one
    z = tl.where(is_label, float("-inf"), z)

    before = tl.load(highest + row, mask=first == 0, other=float("-inf"))
    after = tl.maximum(before, tl.max(z, 0))
    shift = tl.where(after == float("-inf"), 0.0, after)  # nothing but -inf so far: keep -inf - -inf out of exp
    values = tl.exp(z - shift)
    decay = tl.exp(before - shift)
    tl.store(highest + row, after)
    tl.store(total + row, tl.load(total + row, mask=first == 0, other=0.0) * decay + tl.sum(values, 0))
    tl.store(label_logit + row, tl.load(label_logit + row, mask=first == 0, other=0.0) + own)
    if weights is not None:
        values *= slope * gain
        tl.store(weights + row * weights_row + column, values.to(weights.dtype.element_ty), mask=inside)
    if reference is not None:
        tl.store(reference + row, after)
    if mean is not None:
        has_grown = (first == 0) & (decay != 1.0)
        if has_grown:
            for low in range(0, H, BLOCK_H):
                at = low + tl.arange(0, BLOCK_H)
                pointer = mean + row * H + at
                tl.store(pointer, tl.load(pointer, mask=at < H, other=0.0) * decay, mask=at < H)


@triton.jit
def _finish_kernel(
    highest, total, label_logit, labels, logprob, lse, label_slope, mean, weight, hidden_grad,
    weight_row, weight_column, logit_scale, softcap, gain, H: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """log p(y) and lse from the running numbers. Optional: `label_slope`, d(log p) / d(x_y) with x what the cap takes;
    `hidden_grad` [rows, H], d(log p) / dh."""
    row = tl.program_id(0).to(tl.int64)
    own = tl.load(label_logit + row)
    sum_others = tl.load(total + row)
    others = tl.load(highest + row) + tl.log(sum_others)
    odds = others - own
    tail = log1p(tl.exp(-tl.abs(odds)))
    tl.store(logprob + row, -(tl.maximum(odds, 0.0) + tail))
    tl.store(lse + row, tl.maximum(others, own) + tail)
    missing = 1.0 / (1.0 + tl.exp(-odds))  # 1 - p(y)
    slope = missing
    if softcap is not None:
        slope *= 1.0 - (own / softcap) * (own / softcap)
    if label_slope is not None:
        tl.store(label_slope + row, slope)
    if hidden_grad is not None:
        scale = 1.0
        if logit_scale is not None:
            scale = logit_scale
        of_mean = tl.where(sum_others > 0.0, missing / (sum_others * gain), 0.0) * scale
        vector = weight + tl.load(labels + row) * weight_row
        for low in range(0, H, BLOCK_H):
            at = low + tl.arange(0, BLOCK_H)
            own_vector = tl.load(vector + at.to(tl.int64) * weight_column, mask=at < H, other=0.0).to(tl.float32)
            grad = own_vector * (slope * scale) - tl.load(mean + row * H + at, mask=at < H, other=0.0) * of_mean
            tl.store(hidden_grad + row * H + at, grad.to(hidden_grad.dtype.element_ty), mask=at < H)


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def _normalise_kernel(kept, reference, labels, lse, label_slope, kept_row, start, width, gain, BLOCK_V: tl.constexpr):
    """Kept columns [start, start + width), in place: from gain * exp(z - reference) to gain * A."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_V)
    inside = column < width
    pointer = kept + row * kept_row + column
    factor = tl.exp(tl.load(reference + row) - tl.load(lse + row))
    value = tl.load(pointer, mask=inside, other=0.0).to(tl.float32) * factor
    value = tl.where(column == tl.load(labels + row) - start, -gain * tl.load(label_slope + row), value)
    tl.store(pointer, value.to(kept.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def _gradient_kernel(
    logits, bias, labels, lse, of_label, gradient,
    logits_row, gradient_row, start, width, logit_scale, softcap, gain, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """gain * A of columns [start, start + width), from their logits; `of_label` is p(y) - 1."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_V)
    inside = column < width
    logit = tl.load(logits + row * logits_row + column, mask=inside, other=0.0)
    z, slope = finished(logit, bias, start + column, inside, logit_scale, softcap)
    value = tl.exp(z - tl.load(lse + row))
    value = tl.where(column == tl.load(labels + row) - start, tl.load(of_label + row), value)
    value *= slope * gain
    tl.store(gradient + row * gradient_row + column, value.to(gradient.dtype.element_ty), mask=inside)


# --------------------------------------------------------------------------------------------------------------------
# Public functions


def linear_logprob_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    regime: str,
    keep_columns: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log p(label) [N] and log-sum-exp [N] in float32, and what is kept for the backward, in hidden's dtype:
    d(log p)/dh [N, H] in regime "frozen_head", else A [N, keep_columns], times 2^15 in float16.

    Raises:
        ValueError: a device or dtype that these kernels cannot do, by name.
    """
    expect_launchable("hidden", hidden, _block_kernel)
    frozen = regime == "frozen_head"
    head = Head.prepare(len(hidden), weight, labels, bias, logit_scale, softcap, configs.LINEAR_LOGPROB, keep_columns)
    N, H = hidden.shape
    new = functools.partial(hidden.new_empty, dtype=torch.float32)
    logprob, lse = new(N), new(N)
    kept = hidden.new_empty((N, H if frozen else keep_columns))
    if not frozen:
        kept[:, head.kept :].zero_()
    buffer, weights = head.buffer(torch.float32), head.buffer(hidden.dtype) if frozen else None
    sums = {name: new(head.height) for name in ("highest", "total", "label_logit")}
    kept_columns = [columns for columns in head.columns if columns.stop <= head.kept]
    references = [new(head.height) for _ in kept_columns]
    label_slope = new(head.height) if kept_columns else None
    mean = new((head.height, H)) if frozen else None
    with launching_on(hidden.device):
        for rows in head.rows:
            for index, columns in enumerate(head.columns):
                at = slice(length(rows)), slice(length(columns))
                logits = multiply(hidden[rows], weight[columns].t(), buffer[at])
                keeps = index < len(kept_columns)
                into = kept[rows, columns] if keeps else weights[at] if frozen else None
                reference = references[index] if keeps else None
                block = dict(logits=logits, weights=into, reference=reference, mean=mean)
                head.call(_block_kernel, rows, columns, **sums, **block).run()
                if frozen:
                    multiply(into, weight[columns], mean[at[0]], add=index > 0)
            results = dict(logprob=logprob[rows], lse=lse[rows], label_slope=label_slope)
            head.call(
                _finish_kernel, rows, **sums, **results, mean=mean, hidden_grad=kept[rows] if frozen else None
            ).run()
            for columns, reference in zip(kept_columns, references, strict=True):
                block = dict(kept=kept[rows, columns], reference=reference, lse=lse[rows], label_slope=label_slope)
                head.call(_normalise_kernel, rows, columns, **block).run()
    return logprob, lse, kept


def linear_logprob_backward(
    grad_logprob: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    logprob: torch.Tensor,
    lse: torch.Tensor,
    kept: torch.Tensor,
    logit_scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, weight and bias (empty without one) in regime "trained_head"; `kept` is the forward's."""
    expect_launchable("hidden", hidden, _block_kernel)
    head = Head.prepare(len(hidden), weight, labels, bias, logit_scale, softcap, configs.LINEAR_LOGPROB, kept.shape[1])
    of_label = torch.expm1(logprob)
    if head.kept < len(weight) and len(hidden):
        buffer, gradients = head.buffer(torch.float32), head.buffer(hidden.dtype)

    def gradient(rows: slice, columns: slice) -> torch.Tensor:
        if columns.stop <= head.kept:
            return kept[rows, columns]
        at = slice(length(rows)), slice(length(columns))
        logits, into = multiply(hidden[rows], weight[columns].t(), buffer[at]), gradients[at]
        block = dict(logits=logits, lse=lse[rows], of_label=of_label[rows], gradient=into)
        head.call(_gradient_kernel, rows, columns, **block).run()
        return into

    # Rows are scaled outside of A: kept blocks then need nothing but their two products.
    coefficient = grad_logprob * (-logit_scale / GAIN.get(hidden.dtype, 1.0))
    with launching_on(hidden.device):
        return head_gradients(head, hidden, coefficient, gradient, trains=True)
