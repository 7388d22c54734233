"""Log-probabilities of labels by a model's head, registered with `torch.library`."""

import functools
import logging

import torch

from sami_fast.ops.dispatch import describe, expect, expect_index, expect_like, run, triton_or_reference, wide_dtype

logger = logging.getLogger(__name__)

_KEEP_BYTES = 256 << 20  # logits or probabilities kept between forward and backward of a head that trains

_REGIMES = {
    "no_grad": "no gradient is needed, nothing is kept",
    "frozen_head": "the head is frozen, d(log p)/d(hidden) is kept",
    "trained_head": "the head trains, as many columns of the vocabulary are kept as a byte budget allows",
}


@functools.cache
def _log_regime(regime: str, backend: str) -> None:
    logger.info("linear_logprob on backend %r: %s", backend, _REGIMES[regime])


@torch.library.custom_op("sami_fast::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    regime: str,
    keep_columns: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log p(label) and log-sum-exp [N]; what is kept: d(log p)/d(hidden) [N, H] in regime "frozen_head", otherwise
    [N, keep_columns] of what the backend likes to keep of the first columns of the vocabulary."""
    _log_regime(regime, backend)
    arguments = (hidden, weight, labels, bias, logit_scale, softcap, regime, keep_columns)
    return run("linear_logprob", "forward", backend, arguments)


@_linear_logprob.register_fake
def _(hidden, weight, labels, bias, logit_scale, softcap, regime, keep_columns, backend):
    logprob = hidden.new_empty(hidden.shape[0], dtype=wide_dtype(hidden))
    if regime == "frozen_head":
        kept = hidden.new_empty(hidden.shape)
    else:
        kept = hidden.new_empty((hidden.shape[0], keep_columns), dtype=_kept_dtype(hidden, backend))
    return logprob, torch.empty_like(logprob), kept


def _kept_dtype(hidden: torch.Tensor, backend: str) -> torch.dtype:
    """The reference keeps logits, Triton keeps probabilities."""
    return wide_dtype(hidden) if backend == "reference" else hidden.dtype


def _columns_to_keep(hidden: torch.Tensor, weight: torch.Tensor, backend: str) -> int:
    """Within the byte budget, in 64s: aligned rows. It may exceed V, by padding."""
    row_bytes = _KEEP_BYTES // max(hidden.shape[0], 1)
    return min(row_bytes // _kept_dtype(hidden, backend).itemsize, weight.shape[0] + 63) // 64 * 64


@torch.library.custom_op("sami_fast::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
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
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    arguments = (grad_logprob, hidden, weight, labels, bias, logprob, lse, kept, logit_scale, softcap)
    return run("linear_logprob", "backward", backend, arguments)


@_linear_logprob_backward.register_fake
def _(grad_logprob, hidden, weight, labels, bias, logprob, lse, kept, logit_scale, softcap, backend):
    return _fake_head_gradients(hidden, weight, bias)


def _fake_head_gradients(hidden, weight, bias):
    grad_bias = weight.new_empty(0, dtype=wide_dtype(hidden)) if bias is None else torch.empty_like(bias)
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), grad_bias


def _linear_logprob_setup(ctx, inputs, output):
    hidden, weight, labels, bias, ctx.logit_scale, ctx.softcap, ctx.regime, _, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    if ctx.regime == "frozen_head":
        ctx.save_for_backward(output[2])
    else:
        ctx.save_for_backward(hidden, weight, labels, bias, *output)


def _linear_logprob_autograd(ctx, grad_logprob, *_):
    none = (None,) * 6
    if ctx.regime == "frozen_head":
        (hidden_grad,) = ctx.saved_tensors
        grad_hidden = (hidden_grad * grad_logprob[:, None]).to(hidden_grad.dtype)
        return grad_hidden, None, None, *none
    grad_hidden, grad_weight, grad_bias = _linear_logprob_backward(
        grad_logprob, *ctx.saved_tensors, ctx.logit_scale, ctx.softcap, ctx.backend
    )
    has_bias = ctx.saved_tensors[3] is not None
    return grad_hidden, grad_weight, None, grad_bias if has_bias else None, *none[1:]


_linear_logprob.register_autograd(_linear_logprob_autograd, setup_context=_linear_logprob_setup)


def expect_head(name: str, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    expect(hidden.dim() == 2, f"{name}hidden", "[N, H]", describe(hidden))
    expect(hidden.is_floating_point(), f"{name}hidden", "a floating-point dtype", hidden.dtype)
    expect(weight.dim() == 2, f"{name}weight", "[V, H]", describe(weight))
    expect_like(f"{name}weight", weight, (weight.shape[0], hidden.shape[1]), hidden)
    if bias is not None:
        expect(
            tuple(bias.shape) == (weight.shape[0],) and bias.device == hidden.device,
            f"{name}bias",
            f"[{weight.shape[0]}] on {hidden.device}",
            describe(bias),
        )


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """log softmax(softcap(logit_scale * (hidden @ weight.T + bias)))[labels] without N x V logits in memory.

    With the head frozen the forward also stores d(log p)/d(hidden), so that the backward is a row scale. Otherwise it
    keeps as many columns of the vocabulary as fit into 256 MB ("reference": logits, "triton": probabilities in hidden's
    dtype), and the backward recomputes the others block by block. Extra memory: a block of logits (128 MB "triton", 64
    MB "reference", 4 MB on the CPU), N x H when frozen, at most 256 MB when not; to the byte in the "triton" module.

    Args:
        hidden: [N, H]; float64, float32, float16 or bfloat16.
        weight: [V, H], of hidden's dtype.
        labels: [N] int64 in [0, V); the range is the caller's to check, as it would cost a device sync here.
        bias: [V].
        logit_scale, softcap: what the model family puts around its head; the cap comes last.
        backend: None is "triton" on CUDA (but for float64), else "reference".

    Returns:
        [N], at most 0, float32 (float64 for float64).

    Raises:
        ValueError: a shape, dtype, device or backend that does not fit, by name.
    """
    expect_head("", hidden, weight, bias)
    expect_index("labels", labels, (hidden.shape[0],), hidden.device)
    expect(softcap is None or softcap > 0, "softcap", "a positive number or None", softcap)
    head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    name = triton_or_reference("linear_logprob", backend, hidden)
    regime, keep_columns = "no_grad", 0
    if torch.is_grad_enabled() and head_trains:
        regime, keep_columns = "trained_head", _columns_to_keep(hidden, weight, name)
    elif torch.is_grad_enabled() and hidden.requires_grad:
        regime = "frozen_head"
    return _linear_logprob(hidden, weight, labels, bias, float(logit_scale), softcap, regime, keep_columns, name)[0]
