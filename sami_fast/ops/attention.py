"""Attention over packed prefix trees, registered with `torch.library`."""

import torch

from sami_fast.ops.dispatch import expect, expect_like, run, triton_or_reference, wide_dtype
from sami_fast.prefix_tree import AttentionPlan


@torch.library.custom_op("sami_fast::prefix_attention", mutates_args=())
def _prefix_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    position_ids: torch.Tensor,
    nodes: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = (q, k, v, position_ids, nodes, sinks, scale, window, softcap)
    return run("prefix_attention", "forward", backend, arguments)


@_prefix_attention.register_fake
def _(q, k, v, position_ids, nodes, sinks, scale, window, softcap, backend):
    T, Hq, _ = q.shape
    return q.new_empty((T, Hq, v.shape[2])), q.new_empty((T, Hq), dtype=wide_dtype(q))


@torch.library.custom_op("sami_fast::prefix_attention_backward", mutates_args=())
def _prefix_attention_backward(
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
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    arguments = (grad_out, grad_lse, q, k, v, out, lse, position_ids, nodes, sinks, scale, window, softcap)
    return run("prefix_attention", "backward", backend, arguments)


@_prefix_attention_backward.register_fake
def _(grad_out, grad_lse, q, k, v, out, lse, position_ids, nodes, sinks, scale, window, softcap, backend):
    grad_sinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_sinks


def _prefix_attention_setup(ctx, inputs, output):
    q, k, v, position_ids, nodes, sinks, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, position_ids, nodes, sinks)


def _prefix_attention_autograd(ctx, grad_out, grad_lse):
    q, k, v, out, lse, position_ids, nodes, sinks = ctx.saved_tensors
    grad_q, grad_k, grad_v, grad_sinks = _prefix_attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, position_ids, nodes, sinks, *ctx.options
    )
    return grad_q, grad_k, grad_v, None, None, None if sinks is None else grad_sinks, None, None, None, None


_prefix_attention.register_autograd(_prefix_attention_autograd, setup_context=_prefix_attention_setup)


def _refuse_lse_gradient(grad: torch.Tensor | None) -> None:
    expect(grad is None, "return_lse", "no gradient through the log-sum-exp for backend 'flash'", "one")


def prefix_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over packed prefix trees: token i sees token n when `n <= i < plan.subtree_end[n]`.

    Args:
        q: [T, Hq, D]; float64, float32, float16 or bfloat16.
        k: [T, Hkv, D], Hq a multiple of Hkv (query heads of one KV head are consecutive).
        v: [T, Hkv, Dv].
        plan: of the pack, on the tensors' device.
        scale: of the scores; None is D ** -0.5.
        window: tokens farther up than this many positions are not seen: `position[i] - position[n] < window`.
        softcap: scores become `softcap * tanh(score / softcap)`.
        sinks: [Hq], a logit a head that takes part in the softmax and carries no value.
        return_lse: also return the log-sum-exp of the scores (sinks included), differentiable.
        backend: None is "triton" on CUDA, for what it takes (no float64, head sizes of at most 256), else "reference".
            "flash" needs flash-attn, copies K and V along every path, and takes 16-bit CUDA tensors, no sinks and no
            gradient of the log-sum-exp.

    Returns:
        [T, Hq, Dv] of q's dtype; with `return_lse` also [T, Hq], float32 (float64 for float64).

    Raises:
        ValueError: a shape, dtype, device, plan or backend that does not fit, by name.
    """
    expect(q.dim() == 3, "q", "[T, Hq, D]", q)
    expect(q.is_floating_point(), "q", "a floating-point dtype", q.dtype)
    T, Hq, D = q.shape
    expect(
        k.dim() == 3 and k.shape[1] > 0 and Hq % k.shape[1] == 0,
        "k",
        f"[T, Hkv, D] with Hkv dividing {Hq}",
        k,
    )
    expect_like("k", k, (T, k.shape[1], D), q)
    expect_like("v", v, (T, k.shape[1], v.shape[-1]), q)
    expect(plan.subtree_end.shape[0] == T, "plan", lambda: f"a plan of {T} tokens as q has", plan.subtree_end.shape[0])
    expect(plan.device == q.device, "plan", f"a plan on {q.device} as q is", plan.device)
    expect(window is None or window > 0, "window", "a positive number of positions or None", window)
    expect(softcap is None or softcap > 0, "softcap", "a positive number or None", softcap)
    if sinks is not None:
        expect(tuple(sinks.shape) == (Hq,) and sinks.device == q.device, "sinks", f"[{Hq}] on {q.device}", sinks)
    name = triton_or_reference("prefix_attention", backend, q, fits=max(D, v.shape[2]) <= 256)
    out, lse = _prefix_attention(
        q,
        k,
        v,
        plan.position_ids,
        plan.nodes,
        sinks,
        D**-0.5 if scale is None else float(scale),
        window,
        softcap,
        name,
    )
    if name == "flash" and return_lse and lse.requires_grad:
        lse.register_hook(_refuse_lse_gradient)
    return (out, lse) if return_lse else out
