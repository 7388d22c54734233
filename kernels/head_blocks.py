"""What the Triton kernels of a head share: float32 logits, a block of rows by columns of the vocabulary at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sami_fast.kernels import configs
from sami_fast.kernels.launch import Call

_BLOCK_H = 1024
# Probabilities that go into a product are stored times this: float16 has few exponents below 1, and most above it.
GAIN = {torch.float16: 2.0**15}
# Whatever depends on the number of rows or on the place of a block: it would compile a kernel anew.
RUNTIME_ONLY = ["start", "first"]

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
def finished(logit, bias, column, inside, logit_scale, softcap):
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
def log1p(x):
    """For 0 <= x <= 1: the rounding of 1 + x is undone by the factor."""
    total = 1.0 + x
    rounded = total - 1.0
    return tl.where(rounded == 0.0, x, tl.log(total) * (x / tl.where(rounded == 0.0, 1.0, rounded)))


# --------------------------------------------------------------------------------------------------------------------
# Launcher


def split(begin: int, end: int, limit: int) -> list[slice]:
    """[begin, end) in nearly equal slices of at most `limit`, all but the last one a multiple of 128 (or the limit)."""
    step = min(128, limit)
    count = max(1, -(-(end - begin) // limit))
    size = -(-(end - begin) // (count * step)) * step
    return [slice(low, min(low + size, end)) for low in range(begin, end, size)] if end > begin else []


def length(part: slice) -> int:
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
    limits: configs.LogitBlocks

    @classmethod
    def prepare(cls, num_rows, weight, labels, bias, logit_scale, softcap, limits, keep_columns=0) -> "Head":
        V = weight.shape[0]
        rows = split(0, num_rows, limits.rows)
        fitting = limits.elements // max(map(length, rows), default=1)
        width = min(limits.columns, 1 << (fitting.bit_length() - 1))
        kept = min(keep_columns, V)
        columns = split(0, kept, width) + split(kept, V, width)
        bias = None if bias is None else bias.contiguous()
        return cls(weight, labels.contiguous(), bias, logit_scale, softcap, rows, columns, kept, limits)

    @property
    def height(self) -> int:
        return max(map(length, self.rows), default=0)

    @property
    def width(self) -> int:
        return max(map(length, self.columns), default=0)

    def buffer(self, dtype: torch.dtype) -> torch.Tensor:
        """[height, width] for blocks. Its rows are aligned whatever the vocabulary: library GEMMs want that."""
        rounded = -(-self.width // 128) * 128
        return self.weight.new_empty((self.height, rounded), dtype=dtype)[:, : self.width]

    def call(self, kernel: Any, rows: slice, columns: slice | None = None, **arguments: Any) -> Call:
        """Launch of `kernel` with `arguments` and those of its parameters that follow from the head and the block."""
        dtype, H = self.weight.dtype, self.weight.shape[1]
        given = dict(
            bias=self.bias,
            labels=self.labels[rows],
            weight=self.weight,
            weight_row=self.weight.stride(0),
            weight_column=self.weight.stride(1),
            logit_scale=None if self.logit_scale == 1.0 else self.logit_scale,
            softcap=self.softcap,
            gain=GAIN.get(dtype, 1.0),
            H=H,
            BLOCK_H=min(_BLOCK_H, triton.next_power_of_2(H)),
        )
        given |= arguments
        given |= {f"{name}_row": x.stride(0) for name, x in arguments.items() if getattr(x, "ndim", 0) == 2}
        warps = 4
        if columns is not None:
            block = triton.next_power_of_2(length(columns))
            warps = min(max(block // self.limits.columns_per_warp, 1), self.limits.warps)
            given |= dict(start=columns.start, width=length(columns), first=int(columns.start == 0), BLOCK_V=block)
        used = {name: given.get(name) for name in kernel.arg_names}
        return Call(kernel, (length(rows),), used, dict(num_warps=warps, num_stages=1, enable_fp_fusion=True))


def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, *, add: bool = False) -> torch.Tensor:
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


def head_gradients(
    head: Head,
    hidden: torch.Tensor,
    coefficient: torch.Tensor,
    gradient: Callable[[slice, slice], torch.Tensor],
    *,
    trains: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, and of weight and bias (both empty unless the head `trains`, the last without a bias).

    `coefficient` [N] times `gradient(rows, columns)`, in hidden's dtype, is the gradient of hidden @ weight.T + bias. A
    block of the weight's sums over all rows in float32 and is rounded once.
    """
    weight, bias = head.weight, head.bias
    (N, H), V = hidden.shape, len(weight)
    grad_hidden, grad_weight = hidden.new_empty((N, H)), weight.new_empty((V if trains else 0, H))
    grad_bias = weight.new_zeros((V if trains and bias is not None else 0, 1), dtype=torch.float32)
    if N == 0:
        return grad_hidden, grad_weight.zero_(), _as_bias(grad_bias, bias)
    coefficient = coefficient[:, None]
    # What the sums over rows take is relative to the largest coefficient, as float16 could lose small ones.
    largest = coefficient.abs().amax().clamp_(min=torch.finfo(torch.float32).tiny)
    sum_hidden = hidden.new_empty((N, H), dtype=torch.float32)
    if trains:
        share = coefficient / largest
        scaled = torch.mul(hidden, share, out=torch.empty_like(grad_hidden))
        narrow = None if bias is None else share.to(hidden.dtype)
        sum_weight = hidden.new_empty((head.width, H), dtype=torch.float32)
    for columns in head.columns:
        for rows in head.rows:
            block = gradient(rows, columns)
            multiply(block, weight[columns], sum_hidden[rows], add=columns.start > 0)
            if trains:
                multiply(block.t(), scaled[rows], sum_weight[: length(columns)], add=rows.start > 0)
            if trains and bias is not None:
                multiply(block.t(), narrow[rows], grad_bias[columns], add=rows.start > 0)
        if trains:
            torch.mul(sum_weight[: length(columns)], largest, out=grad_weight[columns])
    torch.mul(sum_hidden, coefficient, out=grad_hidden)
    return grad_hidden, grad_weight, _as_bias(grad_bias.mul_(largest), bias)


def _as_bias(grad: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return grad.squeeze(1) if bias is None else grad.squeeze(1).to(bias.dtype)
