"""log p(label), entropy and KL to a second head in plain PyTorch: any device, float64-capable, production on the CPU.

One pass over blocks of both heads' logits; see `linear_statistics` for the sums that run along.
"""

import torch

from sami_fast.kernels.linear_logprob_reference import block_logits, cap_slope, in_block, logit_blocks
from sami_fast.ops.dispatch import wide_dtype


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
    """log p(label), entropy, log-sum-exp, KL and the difference of the log-sum-exps, [N] each; the last two are empty
    without a second head."""
    dtype, N = wide_dtype(hidden), len(hidden)
    logprob, entropy, lse = (hidden.new_empty(N, dtype=dtype) for _ in range(3))
    kl, gap = (hidden.new_empty(0 if ref_hidden is None else N, dtype=dtype) for _ in range(2))
    lowest = torch.finfo(dtype).min  # of a block whose logits are all -inf
    for rows, blocks in logit_blocks(N, weight, lse.element_size(), 0):
        states = hidden[rows].to(dtype)
        ref_states = None if ref_hidden is None else ref_hidden[rows].to(dtype)
        highest = ref_highest = states.new_full((len(states), 1), lowest)
        total = ref_total = spread = difference = label_logit = torch.zeros_like(highest)
        for at in blocks:
            vectors = weight[at].to(dtype)
            logits = block_logits(states, vectors, bias, at, logit_scale, softcap)
            inside, index = in_block(labels[rows], at)
            label_logit = torch.where(inside, logits.gather(1, index), label_logit)
            after = torch.maximum(highest, logits.amax(dim=1, keepdim=True))
            shifted = torch.sub(logits, after).clamp_(min=lowest)  # 0 * -inf would be NaN
            weights = shifted.exp()
            moved = highest - after
            decay = moved.exp()
            spread = (spread + total * moved) * decay + (weights * shifted).sum(dim=1, keepdim=True)
            total = total * decay + weights.sum(dim=1, keepdim=True)
            highest = after
            if ref_states is None:
                continue
            ref_vectors = ref_weight[at].to(dtype)
            ref_logits = block_logits(ref_states, ref_vectors, ref_bias, at, logit_scale, softcap)
            of_block = torch.sub(logits, ref_logits).mul_(weights).masked_fill_(weights == 0, 0.0)
            difference = difference * decay + of_block.sum(dim=1, keepdim=True)
            ref_after = torch.maximum(ref_highest, ref_logits.amax(dim=1, keepdim=True))
            ref_sum = ref_logits.sub_(ref_after).exp_().sum(dim=1, keepdim=True)
            ref_total = ref_total * (ref_highest - ref_after).exp_() + ref_sum
            ref_highest = ref_after
        log_total = total.log()
        lse[rows] = (highest + log_total).squeeze(1)
        entropy[rows] = (log_total - spread / total).squeeze(1)
        # Rounding may put a certain label's logit an ulp above the log-sum-exp; a log-probability is never positive.
        logprob[rows] = (label_logit.squeeze(1) - lse[rows]).clamp_(max=0.0)
        if ref_states is not None:
            # The maxima and what the sums add to them apart: no large numbers are subtracted.
            gap[rows] = ((highest - ref_highest) + (log_total - ref_total.log())).squeeze(1)
            kl[rows] = ((difference / total).squeeze(1) - gap[rows]).clamp_(min=0.0)
    return logprob, entropy, lse, kl, gap


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
    """Gradients of hidden, weight and bias; the last two are empty unless `head_trains`. Logits are recomputed.

    -d/d(logit) = g (p - onehot) + e p (log p + entropy) - k p (log p - log p_ref - KL) for upstream gradients g, e, k.
    """
    dtype, lowest = wide_dtype(hidden), torch.finfo(wide_dtype(hidden)).min
    grad_hidden = torch.zeros_like(hidden, dtype=dtype)
    grad_weight = torch.zeros_like(weight if head_trains else weight[:0], dtype=dtype)
    has_bias = head_trains and bias is not None
    grad_bias = weight.new_zeros(len(bias) if has_bias else 0, dtype=dtype)
    for rows, blocks in logit_blocks(len(hidden), weight, lse.element_size(), 0):
        states = hidden[rows].to(dtype)
        ref_states = None if ref_hidden is None else ref_hidden[rows].to(dtype)
        of_logprob, of_entropy = grad_logprob[rows, None], grad_entropy[rows, None]
        of_label = torch.expm1(logprob[rows, None]) * of_logprob
        for at in blocks:
            vectors = weight[at].to(dtype)
            logits = block_logits(states, vectors, bias, at, logit_scale, softcap)
            logp = torch.sub(logits, lse[rows, None]).clamp_(min=lowest)
            p = logp.exp()
            grad = logp.add_(entropy[rows, None]).mul_(of_entropy)
            if ref_states is not None:
                ref_vectors = ref_weight[at].to(dtype)
                ref_logits = block_logits(ref_states, ref_vectors, ref_bias, at, logit_scale, softcap)
                of_kl = torch.sub(logits, ref_logits, out=ref_logits).sub_(gap[rows, None] + kl[rows, None])
                grad.sub_(of_kl.mul_(grad_kl[rows, None]))
            grad.mul_(p).masked_fill_(p == 0, 0.0)
            inside, index = in_block(labels[rows], at)
            own = grad.gather(1, index) + of_label
            grad.addcmul_(p, of_logprob)
            grad.scatter_(1, index, torch.where(inside, own, grad.gather(1, index)))
            if softcap is not None:
                grad.mul_(cap_slope(logits, softcap))
            grad.mul_(-logit_scale)
            grad_hidden[rows].addmm_(grad, vectors)
            if head_trains:
                grad_weight[at].addmm_(grad.t(), states)
            if has_bias:
                grad_bias[at].add_(grad.sum(dim=0))
    return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype if has_bias else dtype)
