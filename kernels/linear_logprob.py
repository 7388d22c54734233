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
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sami_fast.kernels import configs
from sami_fast.kernels.launch import Call, expect_launchable, launching_on

_BLOCK_H = 1024
# Probabilities that go into a product are stored times this: float16 has few exponents below 1, and most above it.
_GAIN = {torch.float16: 2.0**15}
# Whatever depends on the number of rows or on the place of a block: it would compile a kernel anew.
_RUNTIME_ONLY = ["start", "first"]

# --------------------------------------------------------------------------------------------------------------------
# Helpers


@triton.jit
def _tanh(x):
    """Relative error of a few ulp: the quotient cancels near 0, where a Taylor polynomial takes over."""
    size = tl.abs(x)
    decay = tl.exp(-2.0 * size)
    quotient = (1.0 - decay) / (1.0 + decay)
    x2 = x * x
    series = size * (1.0 + x2 * (-1.0 / 3.0 + x2 * (2.0 / 15.0 + x2 * (-17.0 / 315.0 + x2 * (62.0 / 2835.0)))))
    value = tl.where(size < 0.25, series, quotient)
    return tl.where(x < 0.0, -value, value)


@triton.jit
def _finished(logit, bias, column, inside, logit_scale, softcap):
    """z = softcap * tanh(logit_scale * (logit + bias) / softcap), -inf where not `inside`, and dz / d(its argument)."""
    z = logit
    if bias is not None:
        z += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if logit_scale is not None:
        z *= logit_scale
    slope = tl.full(z.shape, 1.0, tl.float32)
    if softcap is not None:
        capped = _tanh(z / softcap)
        z = capped * softcap
        slope = 1.0 - capped * capped
    return tl.where(inside, z, float("-inf")), slope


@triton.jit
def _log1p(x):
    """For 0 <= x <= 1: the rounding of 1 + x is undone by the factor."""
    total = 1.0 + x
    rounded = total - 1.0
    return tl.where(rounded == 0.0, x, tl.log(total) * (x / tl.where(rounded == 0.0, 1.0, rounded)))


# --------------------------------------------------------------------------------------------------------------------
# Kernels. One program a row; numbers of rows, tensors and pointers are those of a chunk of rows.


@triton.jit(do_not_specialize=_RUNTIME_ONLY)
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
    z, slope = _finished(logit, bias, start + column, inside, logit_scale, softcap)
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
    tail = _log1p(tl.exp(-tl.abs(odds)))
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


@triton.jit(do_not_specialize=_RUNTIME_ONLY)
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


@triton.jit(do_not_specialize=_RUNTIME_ONLY)
def _gradient_kernel(
    logits, bias, labels, lse, of_label, gradient,
    logits_row, gradient_row, start, width, logit_scale, softcap, gain, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """gain * A of columns [start, start + width), from their logits; `of_label` is p(y) - 1."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_V)
    inside = column < width
    logit = tl.load(logits + row * logits_row + column, mask=inside, other=0.0)
    z, slope = _finished(logit, bias, start + column, inside, logit_scale, softcap)
    value = tl.exp(z - tl.load(lse + row))
    value = tl.where(column == tl.load(labels + row) - start, tl.load(of_label + row), value)
    value *= slope * gain
    tl.store(gradient + row * gradient_row + column, value.to(gradient.dtype.element_ty), mask=inside)


# --------------------------------------------------------------------------------------------------------------------
# Launcher


def _split(begin: int, end: int, limit: int) -> list[slice]:
    """[begin, end) in nearly equal slices of at most `limit`, all but the last one a multiple of 128 (or the limit)."""
    step = min(128, limit)
    count = max(1, -(-(end - begin) // limit))
    size = -(-(end - begin) // (count * step)) * step
    return [slice(low, min(low + size, end)) for low in range(begin, end, size)] if end > begin else []


def _length(part: slice) -> int:
    return part.stop - part.start


@dataclass(frozen=True)
class Head:
    """One call of the op: what its launches share. Blocks are `rows` by `columns`, and none reaches across `kept`."""

    weight: torch.Tensor
    labels: torch.Tensor
    bias: torch.Tensor | None
    logit_scale: float
    softcap: float | None
    rows: list[slice]
    columns: list[slice]
    kept: int

    @classmethod
    def prepare(cls, num_rows, weight, labels, bias, logit_scale, softcap, keep_columns) -> "Head":
        limits, V = configs.LINEAR_LOGPROB, weight.shape[0]
        rows = _split(0, num_rows, limits.rows)
        fitting = limits.elements // max(map(_length, rows), default=1)
        width = min(limits.columns, 1 << (fitting.bit_length() - 1))
        kept = min(keep_columns, V)
        columns = _split(0, kept, width) + _split(kept, V, width)
        bias = None if bias is None else bias.contiguous()
        return cls(weight, labels.contiguous(), bias, logit_scale, softcap, rows, columns, kept)

    @property
    def height(self) -> int:
        return max(map(_length, self.rows), default=0)

    @property
    def width(self) -> int:
        return max(map(_length, self.columns), default=0)

    def buffer(self, dtype: torch.dtype) -> torch.Tensor:
        """[height, width] for blocks. Its rows are aligned whatever the vocabulary: library GEMMs want that."""
        rounded = -(-self.width // 128) * 128
        return self.weight.new_empty((self.height, rounded), dtype=dtype)[:, : self.width]

    def call(self, kernel: Any, rows: slice, columns: slice | None = None, **arguments: Any) -> Call:
        """Launch of `kernel` with `arguments` and those of its parameters that follow from the head and the block."""
        dtype, H = self.weight.dtype, self.weight.shape[1]
        given = arguments | dict(
            bias=self.bias,
            labels=self.labels[rows],
            weight=self.weight,
            weight_row=self.weight.stride(0),
            weight_column=self.weight.stride(1),
            logit_scale=None if self.logit_scale == 1.0 else self.logit_scale,
            softcap=self.softcap,
            gain=_GAIN.get(dtype, 1.0),
            H=H,
            BLOCK_H=min(_BLOCK_H, triton.next_power_of_2(H)),
        )
        given |= {f"{name}_row": x.stride(0) for name, x in arguments.items() if x is not None and x.dim() == 2}
        warps = 4
        if columns is not None:
            block = triton.next_power_of_2(_length(columns))
            warps = configs.linear_logprob_warps(block)
            given |= dict(start=columns.start, width=_length(columns), first=int(columns.start == 0), BLOCK_V=block)
        used = {name: given.get(name) for name in kernel.arg_names}
        return Call(kernel, (_length(rows),), used, dict(num_warps=warps, num_stages=1, enable_fp_fusion=True))


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, *, add: bool = False) -> torch.Tensor:
    """out = a @ b, or out += a @ b, summed and stored in float32 whatever the type of a and b.

    Always with `out`: autocast leaves these overloads alone.
    """
    if a.device.type == "cpu":  # of the interpreter; its library has no such product
        a, b = a.float(), b.float()
    if a.dtype == torch.float32:
        return torch.addmm(out, a, b, beta=float(add), out=out)
    if add:
        return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


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
    head = Head.prepare(len(hidden), weight, labels, bias, logit_scale, softcap, keep_columns)
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
                at = slice(_length(rows)), slice(_length(columns))
                logits = _multiply(hidden[rows], weight[columns].t(), buffer[at])
                keeps = index < len(kept_columns)
                into = kept[rows, columns] if keeps else weights[at] if frozen else None
                reference = references[index] if keeps else None
                block = dict(logits=logits, weights=into, reference=reference, mean=mean)
                head.call(_block_kernel, rows, columns, **sums, **block).run()
                if frozen:
                    _multiply(into, weight[columns], mean[at[0]], add=index > 0)
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
    head = Head.prepare(len(hidden), weight, labels, bias, logit_scale, softcap, kept.shape[1])
    (N, H), V = hidden.shape, len(weight)
    grad_hidden, grad_weight = hidden.new_empty((N, H)), weight.new_empty((V, H))
    grad_bias = weight.new_zeros((0 if bias is None else V, 1), dtype=torch.float32)
    if N == 0:
        return grad_hidden, grad_weight.zero_(), _as_bias(grad_bias, bias)
    # Rows are scaled outside of A: kept blocks then need nothing but their two products. What the sums over rows take
    # is relative to the largest upstream gradient, as float16 could lose small ones.
    coefficient = grad_logprob[:, None] * (-logit_scale / _GAIN.get(hidden.dtype, 1.0))
    largest = coefficient.abs().amax().clamp_(min=torch.finfo(torch.float32).tiny)
    share = coefficient / largest
    scaled = torch.mul(hidden, share, out=torch.empty_like(grad_hidden))
    narrow = None if bias is None else share.to(hidden.dtype)
    of_label = torch.expm1(logprob)
    sum_hidden = hidden.new_empty((N, H), dtype=torch.float32)
    sum_weight = hidden.new_empty((head.width, H), dtype=torch.float32)
    if head.kept < V:
        buffer, gradients = head.buffer(torch.float32), head.buffer(hidden.dtype)
    with launching_on(hidden.device):
        for columns in head.columns:
            of_block = sum_weight[: _length(columns)]
            for rows in head.rows:
                if columns.stop <= head.kept:
                    gradient = kept[rows, columns]
                else:
                    at = slice(_length(rows)), slice(_length(columns))
                    logits, gradient = _multiply(hidden[rows], weight[columns].t(), buffer[at]), gradients[at]
                    block = dict(logits=logits, lse=lse[rows], of_label=of_label[rows], gradient=gradient)
                    head.call(_gradient_kernel, rows, columns, **block).run()
                _multiply(gradient.t(), scaled[rows], of_block, add=rows.start > 0)
                _multiply(gradient, weight[columns], sum_hidden[rows], add=columns.start > 0)
                if bias is not None:
                    _multiply(gradient.t(), narrow[rows], grad_bias[columns], add=rows.start > 0)
            torch.mul(of_block, largest, out=grad_weight[columns])
    torch.mul(sum_hidden, coefficient, out=grad_hidden)
    return grad_hidden, grad_weight, _as_bias(grad_bias.mul_(largest), bias)


def _as_bias(grad: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return grad.squeeze(1) if bias is None else grad.squeeze(1).to(bias.dtype)
