"""log p(label), entropy and KL of a head in one pass over the vocabulary, registered with `torch.library`."""

from typing import NamedTuple

import torch

from sami_fast.ops.dispatch import expect, expect_index, run, triton_or_reference, wide_dtype
from sami_fast.ops.logprob import expect_head


class TokenStatistics(NamedTuple):
    """[N] each, in nats, differentiable: log p(label), entropy of p, KL(p || p_ref) (None without a reference)."""

    logprob: torch.Tensor
    entropy: torch.Tensor
    kl: torch.Tensor | None


@torch.library.custom_op("sami_fast::linear_statistics", mutates_args=())
def _linear_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    ref_hidden: torch.Tensor | None,
    ref_weight: torch.Tensor | None,
    ref_bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """log p(label), entropy, log-sum-exp, KL and lse - lse_ref [N]; the last two are [0] without a reference."""
    arguments = (hidden, weight, labels, bias, ref_hidden, ref_weight, ref_bias, logit_scale, softcap)
    return run("linear_statistics", "forward", backend, arguments)


@_linear_statistics.register_fake
def _(hidden, weight, labels, bias, ref_hidden, ref_weight, ref_bias, logit_scale, softcap, backend):
    def new(size: int) -> torch.Tensor:
        return hidden.new_empty(size, dtype=wide_dtype(hidden))

    N, with_reference = hidden.shape[0], 0 if ref_hidden is None else hidden.shape[0]
    return new(N), new(N), new(N), new(with_reference), new(with_reference)


@torch.library.custom_op("sami_fast::linear_statistics_backward", mutates_args=())
def _linear_statistics_backward(
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
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    arguments = (grad_logprob, grad_entropy, grad_kl, hidden, weight, labels, bias, ref_hidden, ref_weight, ref_bias)
    arguments += (logprob, entropy, lse, kl, gap, logit_scale, softcap, head_trains)
    return run("linear_statistics", "backward", backend, arguments)


@_linear_statistics_backward.register_fake
def _(grad_logprob, grad_entropy, grad_kl, hidden, weight, labels, bias, *others):
    head_trains = others[-2]
    V = weight.shape[0] if head_trains else 0
    if bias is None or not head_trains:
        grad_bias = weight.new_empty(0, dtype=wide_dtype(hidden))
    else:
        grad_bias = torch.empty_like(bias)
    return hidden.new_empty(hidden.shape), weight.new_empty((V, weight.shape[1])), grad_bias


def _setup(ctx, inputs, output):
    *tensors, ctx.logit_scale, ctx.softcap, ctx.backend = inputs
    ctx.mark_non_differentiable(output[2], output[4])
    ctx.save_for_backward(*tensors, *output)


def _autograd(ctx, grad_logprob, grad_entropy, _, grad_kl, __):
    _, weight_trains, _, bias_trains, *_ = ctx.needs_input_grad
    grad_hidden, grad_weight, grad_bias = _linear_statistics_backward(
        grad_logprob,
        grad_entropy,
        grad_kl,
        *ctx.saved_tensors,
        ctx.logit_scale,
        ctx.softcap,
        weight_trains or bias_trains,
        ctx.backend,
    )
    none = (None,) * 6
    return grad_hidden, grad_weight if weight_trains else None, None, grad_bias if bias_trains else None, *none


_linear_statistics.register_autograd(_autograd, setup_context=_setup)


def linear_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ref_hidden: torch.Tensor | None = None,
    ref_weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    backend: str | None = None,
) -> TokenStatistics:
    """What `linear_logprob` gives, with the entropy of p and KL(p || p_ref) over the whole vocabulary, in one pass.

    N x V is never in memory. The backward computes the logits again, block by block, and combines the upstream
    gradients of all three; the reference is a constant. Where only log p(label) is needed `linear_logprob` does less.

    Args:
        hidden, weight, bias: [N, H], [V, H], [V].
        labels: [N] int64 in [0, V); the range is the caller's to check, as it would cost a device sync here.
        ref_hidden, ref_weight, ref_bias: [N, H'], [V, H'], [V] of the reference; None, and there is no KL.
        logit_scale, softcap: what the model family puts around its head, the same for both; the cap comes last.
        backend: None is "triton" on CUDA (but for float64), else "reference".

    Returns:
        [N] each, float32 (float64 for float64): logprob at most 0, entropy and kl at least 0.

    Raises:
        ValueError: a shape, dtype, device or backend that does not fit, by name.
    """
    expect_head("", hidden, weight, bias)
    expect_index("labels", labels, (hidden.shape[0],), hidden.device)
    expect(softcap is None or softcap > 0, "softcap", "a positive number or None", softcap)
    got = {"ref_hidden": ref_hidden is not None, "ref_weight": ref_weight is not None}
    expect(all(got.values()) or not any(got.values()), "ref_weight", "to come with ref_hidden", got)
    if ref_hidden is None:
        expect(ref_bias is None, "ref_bias", "None without ref_hidden", "a tensor")
    else:
        expect_head("ref_", ref_hidden, ref_weight, ref_bias)
        N, V = hidden.shape[0], weight.shape[0]
        expect(ref_hidden.shape[0] == N, "ref_hidden", f"{N} rows as hidden has", ref_hidden.shape[0])
        expect(ref_weight.shape[0] == V, "ref_weight", f"V = {V} as weight has", ref_weight.shape[0])
        expect(ref_hidden.device == hidden.device, "ref_hidden", f"a tensor on {hidden.device}", ref_hidden.device)
    reference = [None if t is None else t.detach() for t in (ref_hidden, ref_weight, ref_bias)]
    name = triton_or_reference("linear_statistics", backend, hidden)
    outputs = _linear_statistics(hidden, weight, labels, bias, *reference, float(logit_scale), softcap, name)
    logprob, entropy, _, kl, _ = outputs
    return TokenStatistics(logprob, entropy, None if ref_hidden is None else kl)
