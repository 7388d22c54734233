"""Log-probabilities of a head in plain PyTorch: any device, float64-capable, production on the CPU.

Blocks of the vocabulary by chunks of rows: N x V is never held. Work is done in float32 (float64 for float64 inputs).
"""

from collections.abc import Iterator

import torch

from sami_fast.ops.dispatch import wide_dtype

_LOGIT_BYTES = 64 << 20  # one chunk of logits
_LOGIT_ROWS = 1024  # at most, in a block of logits
_CACHED_LOGIT_BYTES = 4 << 20  # the same where it should stay in the caches


def logit_blocks(num_rows: int, weight: torch.Tensor, itemsize: int, kept: int) -> Iterator[tuple[slice, list[slice]]]:
    """Chunks of rows, and the blocks of the vocabulary that each chunk walks, none of them across column `kept`.

    On the CPU a block of logits stays in the caches between the products and what is done to it in between.
    """
    budget = _CACHED_LOGIT_BYTES if weight.device.type == "cpu" else _LOGIT_BYTES
    width = max(16, budget // (min(_LOGIT_ROWS, max(num_rows, 1)) * itemsize))
    sides = (0, kept), (kept, weight.shape[0])
    blocks = [slice(low, min(low + width, end)) for begin, end in sides for low in range(begin, end, width)]
    for low in range(0, num_rows, _LOGIT_ROWS):
        yield slice(low, min(low + _LOGIT_ROWS, num_rows)), blocks


def block_logits(
    states: torch.Tensor,
    vectors: torch.Tensor,
    bias: torch.Tensor | None,
    at: slice,
    scale: float,
    softcap: float | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """[rows, columns] softcap(scale * (states @ vectors.T + bias[at])), with vectors the weight's rows `at`."""
    logits = torch.mm(states, vectors.t(), out=out)
    if bias is not None:
        logits.add_(bias[at])
    if scale != 1.0:
        logits.mul_(scale)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def cap_slope(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """d(softcap * tanh(x / softcap)) / dx, from the capped value."""
    return logits.div(softcap).square_().neg_().add_(1.0)


def in_block(labels: torch.Tensor, block: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, 1] whether each label lies in the block, and where (somewhere valid if not)."""
    index = (labels - block.start)[:, None]
    width = block.stop - block.start
    return (index >= 0) & (index < width), index.clamp(0, width - 1)


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
    """log p(label) [N], log-sum-exp [N], and what is kept for the backward.

    Kept are d(log p)/d(hidden) [N, H] in regime "frozen_head", else the logits of the first columns [N, keep_columns].
    """
    dtype = wide_dtype(hidden)
    N, (V, H) = hidden.shape[0], weight.shape
    frozen, num_kept = regime == "frozen_head", min(keep_columns, V)
    logprob, lse = hidden.new_empty(N, dtype=dtype), hidden.new_empty(N, dtype=dtype)
    kept = hidden.new_empty((N, H)) if frozen else lse.new_empty((N, keep_columns))
    if not frozen:
        kept[:, V:].zero_()
    lowest = torch.finfo(dtype).min  # of a block whose logits are all -inf
    for rows, blocks in logit_blocks(N, weight, lse.element_size(), num_kept):
        states = hidden[rows].to(dtype)
        highest = states.new_full((len(states), 1), lowest)
        total, label_logit = torch.zeros_like(highest), torch.zeros_like(highest)
        mean_row = torch.zeros_like(states)  # sum of weight rows by exp(logit - highest)
        for at in blocks:
            vectors = weight[at].to(dtype)
            out = kept[rows, at] if at.stop <= num_kept else None
            logits = block_logits(states, vectors, bias, at, logit_scale, softcap, out)
            inside, index = in_block(labels[rows], at)
            label_logit = torch.where(inside, logits.gather(1, index), label_logit)
            after = torch.maximum(highest, logits.amax(dim=1, keepdim=True))
            weights = torch.sub(logits, after).exp_()
            decay = (highest - after).exp_()
            total.mul_(decay).add_(weights.sum(dim=1, keepdim=True))
            highest = after
            if frozen:
                # The label's part of the mean is left out and taken off its own row below: 1 - p without cancellation.
                weights.scatter_(1, index, weights.gather(1, index).masked_fill_(inside, 0.0))
                if softcap is not None:
                    weights.mul_(cap_slope(logits, softcap))
                mean_row.mul_(decay).addmm_(weights, vectors)
        lse[rows] = (highest + total.log()).squeeze(1)
        # Rounding may put a certain label's logit an ulp above the log-sum-exp; a log-probability is never positive.
        logprob[rows] = (label_logit.squeeze(1) - lse[rows]).clamp_(max=0.0)
        if frozen:
            of_label = -torch.expm1(logprob[rows, None])
            if softcap is not None:
                of_label.mul_(cap_slope(label_logit, softcap))
            label_row = weight[labels[rows]].to(dtype)
            kept[rows] = label_row.mul_(of_label).sub_(mean_row.div_(total)).mul_(logit_scale)
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
    """Gradients of hidden, weight and bias (empty without one); logits that were not kept are recomputed."""
    dtype, num_kept = wide_dtype(hidden), min(kept.shape[1], len(weight))
    grad_hidden = torch.zeros_like(hidden, dtype=dtype)
    grad_weight = torch.empty_like(weight, dtype=dtype) if len(hidden) else torch.zeros_like(weight, dtype=dtype)
    grad_bias = weight.new_zeros(0 if bias is None else bias.shape[0], dtype=dtype)
    for rows, blocks in logit_blocks(len(hidden), weight, lse.element_size(), num_kept):
        states, upstream = hidden[rows].to(dtype), grad_logprob[rows, None].to(dtype)
        of_label = torch.expm1(logprob[rows, None])
        for at in blocks:
            vectors = weight[at].to(dtype)
            if at.stop <= num_kept:
                logits = kept[rows, at]
            else:
                logits = block_logits(states, vectors, bias, at, logit_scale, softcap)
            # -d(log p(label)) / d(logit) = p - onehot
            grad = torch.sub(logits, lse[rows, None]).exp_()
            inside, index = in_block(labels[rows], at)
            grad.scatter_(1, index, torch.where(inside, of_label, grad.gather(1, index)))
            if softcap is not None:
                grad.mul_(cap_slope(logits, softcap))
            grad.mul_(upstream * -logit_scale)
            grad_hidden[rows].addmm_(grad, vectors)
            grad_weight[at].addmm_(grad.t(), states, beta=float(rows.start > 0))  # 0: what is there is not read
            if bias is not None:
                grad_bias[at].add_(grad.sum(dim=0))
    grad_bias = grad_bias if bias is None else grad_bias.to(bias.dtype)
    return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), grad_bias
