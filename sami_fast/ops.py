"""The ops: validation, the one backend switch, and registration with `torch.library`.

Every op takes `backend`: None picks the best one for the tensors' device, and the choice is logged once.
Implementations live in `sami_fast.kernels`, are imported on first use, and never import each other.
"""

import functools
import importlib
import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

from sami_fast.prefix_tree import AttentionPlan

logger = logging.getLogger(__name__)

_KEEP_BYTES = 256 << 20  # logits or probabilities kept between forward and backward of a head that trains
_HAS_TRITON = importlib.util.find_spec("triton") is not None

# op -> backend -> module with `<op>_forward` and `<op>_backward`. The first entry that runs on a device is its default.
_IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "prefix_attention": {
        "triton": "sami_fast.kernels.prefix_attention",
        "reference": "sami_fast.kernels.reference",
        "flash": "sami_fast.kernels.flash_attention",
    },
    "linear_logprob": {
        "triton": "sami_fast.kernels.linear_logprob",
        "reference": "sami_fast.kernels.reference",
    },
    "linear_kl": {"reference": "sami_fast.kernels.reference"},
    "segment_infonce": {
        "cuda": "sami_fast.kernels.segment_infonce_cuda",
        "triton": "sami_fast.kernels.segment_infonce",
        "reference": "sami_fast.kernels.reference",
    },
}


def backends() -> dict[str, str]:
    """What each backend can do here: its ops when it is available, the reason when it is not."""
    report = {}
    for backend in ("reference", "triton", "cuda", "flash"):
        implemented = [op for op, table in _IMPLEMENTATIONS.items() if backend in table]
        if backend == "triton" and importlib.util.find_spec("triton") is None:
            report[backend] = "unavailable: triton is not installed"
        elif backend == "cuda" and importlib.util.find_spec("sami_fast._C") is None:
            report[backend] = "unavailable: sami_fast._C was not built (no nvcc when sami_fast was installed)"
        elif backend == "flash" and not importlib.import_module("sami_fast.kernels.flash_attention").installed():
            report[backend] = "unavailable: flash-attn is not installed (pip install flash-attn --no-build-isolation)"
        elif backend != "reference" and not torch.cuda.is_available():
            report[backend] = "unavailable: torch sees no CUDA device"
        elif not implemented:
            report[backend] = "unavailable: no op has an implementation"
        else:
            report[backend] = "available: " + ", ".join(implemented)
    return report


def _resolve(op: str, backend: str | None, device: torch.device) -> str:
    table = _IMPLEMENTATIONS[op]
    if backend is None:
        return "reference" if device.type != "cuda" else next(iter(table))
    if backend not in table:
        raise ValueError(f"backend: expected one of {sorted(table)} or None for {op}, got {backend!r}")
    return backend


def backend_for(op: str, backend: str | Mapping[str, Any] | None) -> Any:
    """An op's own backend out of one choice for several: a mapping by op, or a name for those ops that have it.

    Raises:
        ValueError: no op of that name, or none that has the backend.
    """
    if isinstance(backend, Mapping):
        unknown = sorted(set(backend) - set(_IMPLEMENTATIONS))
        _expect(not unknown, "backend", f"a mapping from {sorted(_IMPLEMENTATIONS)}", unknown)
        return backend.get(op)
    known = {name for table in _IMPLEMENTATIONS.values() for name in table}
    _expect(backend is None or backend in known, "backend", f"one of {sorted(known)}, a mapping or None", repr(backend))
    return backend if backend in _IMPLEMENTATIONS[op] else None


def _triton_or_reference(op: str, backend: str | None, x: torch.Tensor, *, fits: bool = True) -> str:
    """The backend of an op that Triton serves by default on CUDA, where it is installed and takes x."""
    name = _resolve(op, backend, x.device)
    if name == "triton":
        if backend is None and not (_HAS_TRITON and fits and x.dtype != torch.float64):
            return "reference"
        _expect(_HAS_TRITON, "backend", "triton to be installed for 'triton'", "no such package")
    return name


@functools.cache
def _load(op: str, backend: str, device_type: str) -> ModuleType:
    logger.info("%s runs on backend %r (%s tensors)", op, backend, device_type)
    return importlib.import_module(_IMPLEMENTATIONS[op][backend])


def _run(op: str, direction: str, backend: str, arguments: tuple) -> Any:
    """An implementation's work, in its own dtypes: autocast would round what it multiplies to 16 bits."""
    device_type = arguments[0].device.type
    function = getattr(_load(op, backend, device_type), f"{op}_{direction}")
    with torch.autocast(device_type, enabled=False):
        return function(*arguments)


def _expect(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def _expect_like(name: str, tensor: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor) -> None:
    good = tuple(tensor.shape) == shape and tensor.dtype == like.dtype and tensor.device == like.device
    _expect(good, name, f"{like.dtype} {list(shape)} on {like.device}", _describe(tensor))


def _expect_index(name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    good = tuple(tensor.shape) == shape and tensor.dtype == torch.int64 and tensor.device == device
    _expect(good, name, f"torch.int64 {list(shape)} on {device}", _describe(tensor))


# --------------------------------------------------------------------------------------------------------------------
# prefix_attention


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
    return _run("prefix_attention", "forward", backend, arguments)


@_prefix_attention.register_fake
def _(q, k, v, position_ids, nodes, sinks, scale, window, softcap, backend):
    T, Hq, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((T, Hq, v.shape[2])), q.new_empty((T, Hq), dtype=lse_dtype)


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
    return _run("prefix_attention", "backward", backend, arguments)


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
    _expect(grad is None, "return_lse", "no gradient through the log-sum-exp for backend 'flash'", "one")


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
    _expect(q.dim() == 3, "q", "[T, Hq, D]", _describe(q))
    _expect(q.is_floating_point(), "q", "a floating-point dtype", q.dtype)
    T, Hq, D = q.shape
    _expect(
        k.dim() == 3 and k.shape[1] > 0 and Hq % k.shape[1] == 0,
        "k",
        f"[T, Hkv, D] with Hkv dividing {Hq}",
        _describe(k),
    )
    _expect_like("k", k, (T, k.shape[1], D), q)
    _expect_like("v", v, (T, k.shape[1], v.shape[-1]), q)
    _expect(plan.subtree_end.shape[0] == T, "plan", f"a plan of {T} tokens as q has", plan.subtree_end.shape[0])
    _expect(plan.device == q.device, "plan", f"a plan on {q.device} as q is", plan.device)
    _expect(window is None or window > 0, "window", "a positive number of positions or None", window)
    _expect(softcap is None or softcap > 0, "softcap", "a positive number or None", softcap)
    if sinks is not None:
        _expect(
            tuple(sinks.shape) == (Hq,) and sinks.device == q.device, "sinks", f"[{Hq}] on {q.device}", _describe(sinks)
        )
    name = _triton_or_reference("prefix_attention", backend, q, fits=max(D, v.shape[2]) <= 256)
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


# --------------------------------------------------------------------------------------------------------------------
# linear_logprob


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
    return _run("linear_logprob", "forward", backend, arguments)


@_linear_logprob.register_fake
def _(hidden, weight, labels, bias, logit_scale, softcap, regime, keep_columns, backend):
    logprob = hidden.new_empty(hidden.shape[0], dtype=_wide_dtype(hidden))
    if regime == "frozen_head":
        kept = hidden.new_empty(hidden.shape)
    else:
        kept = hidden.new_empty((hidden.shape[0], keep_columns), dtype=_kept_dtype(hidden, backend))
    return logprob, torch.empty_like(logprob), kept


def _wide_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _kept_dtype(hidden: torch.Tensor, backend: str) -> torch.dtype:
    """The reference keeps logits, Triton keeps probabilities."""
    return _wide_dtype(hidden) if backend == "reference" else hidden.dtype


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
    return _run("linear_logprob", "backward", backend, arguments)


@_linear_logprob_backward.register_fake
def _(grad_logprob, hidden, weight, labels, bias, logprob, lse, kept, logit_scale, softcap, backend):
    return _fake_head_gradients(hidden, weight, bias)


def _fake_head_gradients(hidden, weight, bias):
    grad_bias = weight.new_empty(0, dtype=_wide_dtype(hidden)) if bias is None else torch.empty_like(bias)
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


def _expect_head(name: str, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    _expect(hidden.dim() == 2, f"{name}hidden", "[N, H]", _describe(hidden))
    _expect(hidden.is_floating_point(), f"{name}hidden", "a floating-point dtype", hidden.dtype)
    _expect(weight.dim() == 2, f"{name}weight", "[V, H]", _describe(weight))
    _expect_like(f"{name}weight", weight, (weight.shape[0], hidden.shape[1]), hidden)
    if bias is not None:
        _expect(
            tuple(bias.shape) == (weight.shape[0],) and bias.device == hidden.device,
            f"{name}bias",
            f"[{weight.shape[0]}] on {hidden.device}",
            _describe(bias),
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
    _expect_head("", hidden, weight, bias)
    _expect_index("labels", labels, (hidden.shape[0],), hidden.device)
    _expect(softcap is None or softcap > 0, "softcap", "a positive number or None", softcap)
    head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    name = _triton_or_reference("linear_logprob", backend, hidden)
    regime, keep_columns = "no_grad", 0
    if torch.is_grad_enabled() and head_trains:
        regime, keep_columns = "trained_head", _columns_to_keep(hidden, weight, name)
    elif torch.is_grad_enabled() and hidden.requires_grad:
        regime = "frozen_head"
    return _linear_logprob(hidden, weight, labels, bias, float(logit_scale), softcap, regime, keep_columns, name)[0]


# --------------------------------------------------------------------------------------------------------------------
# linear_kl


@torch.library.custom_op("sami_fast::linear_kl", mutates_args=())
def _linear_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    ref_bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    backend: str,
) -> torch.Tensor:
    arguments = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias, logit_scale, softcap)
    return _run("linear_kl", "forward", backend, arguments)


@_linear_kl.register_fake
def _(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, logit_scale, softcap, backend):
    return hidden.new_empty(hidden.shape[0], dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)


@torch.library.custom_op("sami_fast::linear_kl_backward", mutates_args=())
def _linear_kl_backward(
    grad_kl: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    ref_bias: torch.Tensor | None,
    kl: torch.Tensor,
    logit_scale: float,
    softcap: float | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    arguments = (grad_kl, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, kl, logit_scale, softcap)
    return _run("linear_kl", "backward", backend, arguments)


@_linear_kl_backward.register_fake
def _(grad_kl, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, kl, logit_scale, softcap, backend):
    return _fake_head_gradients(hidden, weight, bias)


def _linear_kl_setup(ctx, inputs, output):
    *tensors, ctx.logit_scale, ctx.softcap, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output)


def _linear_kl_autograd(ctx, grad_kl):
    grad_hidden, grad_weight, grad_bias = _linear_kl_backward(
        grad_kl, *ctx.saved_tensors, ctx.logit_scale, ctx.softcap, ctx.backend
    )
    has_bias = ctx.saved_tensors[2] is not None
    return grad_hidden, grad_weight, grad_bias if has_bias else None, None, None, None, None, None, None


_linear_kl.register_autograd(_linear_kl_autograd, setup_context=_linear_kl_setup)


def linear_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """KL(p || p_ref) of each row over the whole vocabulary, without N x V in memory; the reference is a constant.

    Args:
        hidden, weight, bias: [N, H], [V, H], [V] of the policy.
        ref_hidden, ref_weight, ref_bias: [N, H'], [V, H'], [V] of the reference model.
        logit_scale, softcap: as in `linear_logprob`, the same for both.

    Returns:
        [N] nats, float32 (float64 for float64).

    Raises:
        ValueError: a shape, dtype, device or backend that does not fit, by name.
    """
    _expect_head("", hidden, weight, bias)
    _expect_head("ref_", ref_hidden, ref_weight, ref_bias)
    _expect(ref_hidden.shape[0] == hidden.shape[0], "ref_hidden", f"{hidden.shape[0]} rows", ref_hidden.shape[0])
    _expect(ref_weight.shape[0] == weight.shape[0], "ref_weight", f"V = {weight.shape[0]}", ref_weight.shape[0])
    _expect(softcap is None or softcap > 0, "softcap", "a positive number or None", softcap)
    reference = [None if t is None else t.detach() for t in (ref_hidden, ref_weight, ref_bias)]
    name = _resolve("linear_kl", backend, hidden.device)
    return _linear_kl(hidden, weight, bias, *reference, float(logit_scale), softcap, name)


# --------------------------------------------------------------------------------------------------------------------
# segment_infonce


@torch.library.custom_op("sami_fast::segment_infonce", mutates_args=())
def _segment_infonce(
    token_logprobs: torch.Tensor,
    offsets: torch.Tensor,
    shapes: torch.Tensor,
    table: torch.Tensor,
    positives: torch.Tensor,
    normalize: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    arguments = (token_logprobs, offsets, shapes, table, positives, normalize)
    return _run("segment_infonce", "forward", backend, arguments)


@_segment_infonce.register_fake
def _(token_logprobs, offsets, shapes, table, positives, normalize, backend):
    B, S = shapes.shape[0], offsets.shape[0] - 1
    new = token_logprobs.new_empty
    return new(B), new(S), new((B, 3)), new(token_logprobs.shape)


def _segment_infonce_setup(ctx, inputs, output):
    _, offsets, _, table, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[3], offsets, table)


def _segment_infonce_autograd(ctx, grad_loss, *_):
    grad_tokens, offsets, table = ctx.saved_tensors
    tokens = torch.diff(offsets[table[:, 2].long()], append=offsets[-1:])
    grad_loss = grad_loss.to(grad_tokens.dtype).repeat_interleave(tokens, output_size=grad_tokens.numel())
    return grad_tokens * grad_loss, None, None, None, None, None, None


_segment_infonce.register_autograd(_segment_infonce_autograd, setup_context=_segment_infonce_setup)


@functools.lru_cache(maxsize=256)
def _group_table(shapes: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    """[B, 4] int32: C, R, first pair and first response of each group.

    Kept, so that steps of like shapes copy nothing to the device and can be captured in a CUDA graph.
    """
    rows, pairs, responses = [], 0, 0
    for C, R in shapes:
        rows.append((C, R, pairs, responses))
        pairs, responses = pairs + C * R, responses + R
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _infonce_backend(backend: str | None, token_logprobs: torch.Tensor, shapes: tuple[tuple[int, int], ...]) -> str:
    name = _resolve("segment_infonce", backend, token_logprobs.device)
    if backend is not None or name == "reference":
        return name
    if token_logprobs.dtype != torch.float32 or max(map(max, shapes)) > 256:
        return "reference"
    has_extension = importlib.util.find_spec("sami_fast._C") is not None
    return "cuda" if has_extension else "triton" if _HAS_TRITON else "reference"


def segment_infonce(
    token_logprobs: torch.Tensor,
    offsets: torch.Tensor,
    shapes: Sequence[tuple[int, int]],
    positives: torch.Tensor,
    *,
    normalize: str = "mean",
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Symmetric InfoNCE of B groups from the log-probabilities of their response tokens (arXiv 2404.14313).

    M[j, k] is the mean (or sum) over the tokens of response k under prompt j, g(k) the prompt that k belongs to, and

        loss = 1/2 mean_k -log softmax_j(M[:, k])[g(k)]  +  1/2 mean_j mean_{k: g(k) = j} -log softmax_k(M[j, :])[k].

    Args:
        token_logprobs: [N] floating point, pair by pair.
        offsets: [S + 1] int64; tokens of pair s are `offsets[s]:offsets[s + 1]`. A pair without tokens is not scored:
            its entry is -inf and takes no part.
        shapes: (C, R) of each group; pair `j * R + k` of a group is prompt j with response k.
        positives: [sum(R)] int64, g of every group end to end.
        normalize: "mean" or "sum" over a response's tokens.

    Returns:
        loss [B], differentiable; matrix [S]; metrics [B, 3]: mutual information in nats, the mean of log C - column
        loss and log R - row loss; shares of rows and of columns whose positive is strictly above every negative.

    Raises:
        ValueError: a shape, dtype, device or option that does not fit, by name.
    """
    _expect(normalize in ("mean", "sum"), "normalize", '"mean" or "sum"', repr(normalize))
    _expect(
        token_logprobs.dim() == 1 and token_logprobs.is_floating_point(),
        "token_logprobs",
        "floating point [N]",
        _describe(token_logprobs),
    )
    _expect(len(shapes) > 0 and all(min(s) > 0 for s in shapes), "shapes", "(C, R) > 0 for each group", list(shapes))
    device = token_logprobs.device
    _expect_index("offsets", offsets, (sum(math.prod(s) for s in shapes) + 1,), device)
    _expect_index("positives", positives, (sum(R for _, R in shapes),), device)
    shapes = tuple((int(C), int(R)) for C, R in shapes)
    table = (_group_table.__wrapped__ if torch.compiler.is_compiling() else _group_table)(shapes, device)
    on_host = torch.tensor(shapes, dtype=torch.int64).view(-1, 2)
    name = _infonce_backend(backend, token_logprobs, shapes)
    return _segment_infonce(token_logprobs, offsets, on_host, table, positives, normalize, name)[:3]
