"""log p(label), entropy and KL to a second head in one pass over the vocabulary: library GEMMs, Triton between them.

As in `linear_logprob`, a block [R, W] of float32 logits at a time, here of both heads, and each logit is read once. Of
a row with label y it keeps running numbers over the *other* columns: m = max z, s = sum w with w = exp(z - m), and sums
of w (z - m) and w (z - z'), z' the second head's logits; of those m' and s' over all columns. With the log-odds
d = m + log(s) - z_y, q = sigmoid(d) = 1 - p(y), and sp(x) = log(1 + exp(x)),

    log p(y) = -sp(d)
    entropy  = q (log s - sum w (z - m) / s + sp(-d)) + p(y) sp(d)
    KL       = q sum w (z - z') / s + p(y) (z_y - z'_y) - gap,    gap = lse - lse'

and `gap` is the difference of the maxima plus that of what the sums add to them: no large numbers are subtracted. Those
of the upstream gradients that are there are combined in the backward, which recomputes the logits:

    -d/dz = g (p - onehot) + e p (log p + entropy) - k p (z - z' - gap - KL).

Peak extra memory in bytes, results included, with the letters of `linear_logprob` (4RW less without a second head):

    forward       8RW + 20N + 32R
    backward      (8 + e)RW + (4 + e)NH, and where the head trains 4WH + eNH + eVH more and, with a bias, (4 + e)V + eN;
                  at most 40N beside these.
"""

import functools

import torch
import triton
import triton.language as tl

from sami_fast.kernels import configs
from sami_fast.kernels.head_blocks import RUNTIME_ONLY, Head, finished, head_gradients, length, log1p, multiply
from sami_fast.kernels.launch import expect_launchable, launching_on

# What a gradient block is stored times: terms with logarithms may be far above 1.
_GAIN = {torch.float16: 2.0**6}

# --------------------------------------------------------------------------------------------------------------------
# Kernels. One program a row; numbers of rows, tensors and pointers are those of a chunk of rows.


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def _statistics_kernel(
    logits, bias, ref_logits, ref_bias, labels,
    highest, total, spread, label_logit, ref_highest, ref_total, difference, label_difference,
    logits_row, ref_logits_row, start, width, first, logit_scale, softcap, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Columns [start, start + width) into the running numbers (`first`: nothing is there yet)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_V)
    inside = column < width
    has = first == 0
    z, _ = finished(
        tl.load(logits + row * logits_row + column, mask=inside, other=0.0),
        bias, start + column, inside, logit_scale, softcap,
    )  # fmt: skip
    is_label = inside & (column == tl.load(labels + row) - start)
    own = tl.sum(tl.where(is_label, z, 0.0), 0)  # 0 in all blocks but one
    before = tl.load(highest + row, mask=has, other=float("-inf"))
    after = tl.maximum(before, tl.max(tl.where(is_label, float("-inf"), z), 0))
    shift = tl.where(after == float("-inf"), 0.0, after)  # nothing but -inf so far: keep -inf - -inf out of exp
    values = tl.where(is_label, 0.0, tl.exp(z - shift))
    decay = tl.exp(before - shift)
    moved = tl.where(before == float("-inf"), 0.0, before - shift)
    sum_before = tl.load(total + row, mask=has, other=0.0)
    sum_spread = tl.sum(tl.where(values > 0.0, values * (z - shift), 0.0), 0)
    tl.store(highest + row, after)
    tl.store(total + row, sum_before * decay + tl.sum(values, 0))
    spread_before = tl.load(spread + row, mask=has, other=0.0)
    tl.store(spread + row, (spread_before + sum_before * moved) * decay + sum_spread)
    tl.store(label_logit + row, tl.load(label_logit + row, mask=has, other=0.0) + own)
    if ref_logits is not None:
        ref_z, _ = finished(
            tl.load(ref_logits + row * ref_logits_row + column, mask=inside, other=0.0),
            ref_bias, start + column, inside, logit_scale, softcap,
        )  # fmt: skip
        sum_difference = tl.sum(tl.where(values > 0.0, values * (z - ref_z), 0.0), 0)
        tl.store(difference + row, tl.load(difference + row, mask=has, other=0.0) * decay + sum_difference)
        own_difference = tl.sum(tl.where(is_label, z - ref_z, 0.0), 0)
        tl.store(label_difference + row, tl.load(label_difference + row, mask=has, other=0.0) + own_difference)
        ref_before = tl.load(ref_highest + row, mask=has, other=float("-inf"))
        ref_after = tl.maximum(ref_before, tl.max(ref_z, 0))
        ref_shift = tl.where(ref_after == float("-inf"), 0.0, ref_after)
        ref_sum = tl.load(ref_total + row, mask=has, other=0.0) * tl.exp(ref_before - ref_shift)
        tl.store(ref_highest + row, ref_after)
        tl.store(ref_total + row, ref_sum + tl.sum(tl.exp(ref_z - ref_shift), 0))


@triton.jit
def _finish_statistics_kernel(
    highest, total, spread, label_logit, ref_highest, ref_total, difference, label_difference,
    logprob, entropy, lse, kl, gap,
):  # fmt: skip
    """The statistics of a row from its running numbers; `kl` and `gap` are optional."""
    row = tl.program_id(0).to(tl.int64)
    own = tl.load(label_logit + row)
    top = tl.load(highest + row)
    total_others = tl.load(total + row)
    others = top + tl.log(total_others)
    odds = others - own
    tail = log1p(tl.exp(-tl.abs(odds)))
    cost = tl.maximum(odds, 0.0) + tail  # -log p(y)
    cost_others = tl.maximum(-odds, 0.0) + tail  # -log(1 - p(y))
    missing = 1.0 / (1.0 + tl.exp(-odds))
    present = 1.0 / (1.0 + tl.exp(odds))
    # Of a share that is 0 its cost is infinite, and the product is 0.
    among_others = tl.log(total_others) - tl.load(spread + row) / total_others + cost_others
    of_label = tl.where(present == 0.0, 0.0, present * cost)
    tl.store(logprob + row, -cost)
    tl.store(entropy + row, tl.where(missing == 0.0, 0.0, missing * among_others) + of_label)
    tl.store(lse + row, tl.maximum(others, own) + tail)
    if kl is not None:
        above = tl.where(own > top, cost, tl.log(total_others) + cost_others)  # lse - max(top, own)
        ref_above = tl.log(tl.load(ref_total + row))
        shift = (tl.maximum(top, own) - tl.load(ref_highest + row)) + (above - ref_above)
        mean = tl.where(missing == 0.0, 0.0, missing * (tl.load(difference + row) / total_others))
        mean += tl.where(present == 0.0, 0.0, present * tl.load(label_difference + row))
        value = mean - shift
        tl.store(kl + row, tl.where(value < 0.0, 0.0, value))  # below 0 by rounding; NaN stays
        tl.store(gap + row, shift)


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def _statistics_gradient_kernel(
    logits, bias, ref_logits, ref_bias, labels, logprob, of_label, entropy, lse, kl, gap,
    share_logprob, share_entropy, share_kl, gradient,
    logits_row, ref_logits_row, gradient_row, start, width, logit_scale, softcap, gain, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """gain times -d/dx of columns [start, start + width), x what the cap takes; `of_label` is p(y) - 1."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_V)
    inside = column < width
    z, slope = finished(
        tl.load(logits + row * logits_row + column, mask=inside, other=0.0),
        bias, start + column, inside, logit_scale, softcap,
    )  # fmt: skip
    is_label = column == tl.load(labels + row) - start
    own = tl.load(logprob + row)
    logp = tl.where(is_label, own, z - tl.load(lse + row))
    p = tl.exp(logp)
    value = tl.load(share_logprob + row) * tl.where(is_label, tl.load(of_label + row), p)
    weight = tl.load(share_entropy + row) * (logp + tl.load(entropy + row))
    if ref_logits is not None:
        ref_z, _ = finished(
            tl.load(ref_logits + row * ref_logits_row + column, mask=inside, other=0.0),
            ref_bias, start + column, inside, logit_scale, softcap,
        )  # fmt: skip
        weight -= tl.load(share_kl + row) * ((z - ref_z - tl.load(gap + row)) - tl.load(kl + row))
    value += tl.where(p > 0.0, p * weight, 0.0)
    value *= slope * gain
    tl.store(gradient + row * gradient_row + column, value.to(gradient.dtype.element_ty), mask=inside)


# --------------------------------------------------------------------------------------------------------------------
# Public functions


def linear_statistics_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    ref_hidden: torch.Tensor | None,
    ref_weight: torch.Tensor | None,
    ref_bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """log p(label), entropy, log-sum-exp, KL and the difference of the log-sum-exps, [N] float32 each; the last two are
    empty without a second head.

    Raises:
        ValueError: a device or dtype that these kernels cannot do, by name.
    """
    expect_launchable("hidden", hidden, _statistics_kernel)
    head = Head.prepare(len(hidden), weight, labels, bias, logit_scale, softcap, configs.LINEAR_STATISTICS)
    N = len(hidden)
    new = functools.partial(hidden.new_empty, dtype=torch.float32)
    logprob, entropy, lse = new(N), new(N), new(N)
    kl, gap = (new(N), new(N)) if ref_hidden is not None else (new(0), new(0))
    names = ["highest", "total", "spread", "label_logit"]
    if ref_hidden is not None:
        expect_launchable("ref_hidden", ref_hidden, _statistics_kernel)
        names += ["ref_highest", "ref_total", "difference", "label_difference"]
    running = {name: new(head.height) for name in names}
    logits = _Logits(head, hidden, ref_hidden, ref_weight, ref_bias)
    with launching_on(hidden.device):
        for rows in head.rows:
            for columns in head.columns:
                head.call(_statistics_kernel, rows, columns, **running, **logits(rows, columns)).run()
            results = dict(logprob=logprob[rows], entropy=entropy[rows], lse=lse[rows])
            if ref_hidden is not None:
                results |= dict(kl=kl[rows], gap=gap[rows])
            head.call(_finish_statistics_kernel, rows, **running, **results).run()
    return logprob, entropy, lse, kl, gap


class _Logits:
    """Logits of a block by both heads, in buffers that the next block takes over."""

    def __init__(self, head: Head, hidden, ref_hidden, ref_weight, ref_bias) -> None:
        self.heads = {"logits": (hidden, head.weight)}
        if ref_hidden is not None:
            self.heads["ref_logits"] = (ref_hidden, ref_weight)
        self.buffers = {name: head.buffer(torch.float32) for name in self.heads}
        self.ref_bias = None if ref_bias is None else ref_bias.contiguous()

    def __call__(self, rows: slice, columns: slice) -> dict[str, torch.Tensor | None]:
        at = slice(length(rows)), slice(length(columns))
        made = {
            name: multiply(hidden[rows], weight[columns].t(), self.buffers[name][at])
            for name, (hidden, weight) in self.heads.items()
        }
        return made | dict(ref_bias=self.ref_bias)


def linear_statistics_backward(
    grad_logprob: torch.Tensor,
    grad_entropy: torch.Tensor,
    grad_kl: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    ref_hidden: torch.Tensor | None,
    ref_weight: torch.Tensor | None,
    ref_bias: torch.Tensor | None,
    logprob: torch.Tensor,
    entropy: torch.Tensor,
    lse: torch.Tensor,
    kl: torch.Tensor,
    gap: torch.Tensor,
    logit_scale: float,
    softcap: float | None,
    head_trains: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, weight and bias; the last two are empty unless `head_trains`."""
    expect_launchable("hidden", hidden, _statistics_kernel)
    head = Head.prepare(len(hidden), weight, labels, bias, logit_scale, softcap, configs.LINEAR_STATISTICS)
    gain = _GAIN.get(hidden.dtype, 1.0)
    logits = _Logits(head, hidden, ref_hidden, ref_weight, ref_bias)
    into = head.buffer(hidden.dtype)
    # Each row's upstream gradients relative to its largest: blocks are stored in hidden's dtype.
    upstream = dict(logprob=grad_logprob, entropy=grad_entropy)
    of_row = dict(logprob=logprob, of_label=torch.expm1(logprob), entropy=entropy, lse=lse)
    if ref_hidden is not None:
        upstream |= dict(kl=grad_kl)
        of_row |= dict(kl=kl, gap=gap)
    largest = functools.reduce(torch.maximum, [grad.abs() for grad in upstream.values()])
    unit = largest.clamp(min=torch.finfo(torch.float32).tiny)
    of_row |= {f"share_{name}": grad / unit for name, grad in upstream.items()}

    def gradient(rows: slice, columns: slice) -> torch.Tensor:
        block = into[: length(rows), : length(columns)]
        arguments = {name: x[rows] for name, x in of_row.items()} | logits(rows, columns)
        head.call(_statistics_gradient_kernel, rows, columns, **arguments, gradient=block, gain=gain).run()
        return block

    with launching_on(hidden.device):
        return head_gradients(head, hidden, largest * (-logit_scale / gain), gradient, trains=head_trains)
