"""Segment-mean InfoNCE, registered with `torch.library`."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.autograd.forward_ad import unpack_dual

from sami_fast.ops.dispatch import EXTENSION_DEVICES, HAS_TRITON, expect, expect_index, resolve, run

_MAX_SIDE = 256  # of a group, in the kernels


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
    return run("segment_infonce", "forward", backend, arguments)


@_segment_infonce.register_fake
def _(token_logprobs, offsets, shapes, table, positives, normalize, backend):
    B, S = shapes.shape[0], offsets.shape[0] - 1
    new = token_logprobs.new_empty
    return new(B), new(S), new((B, 3)), new(S)


@torch.library.custom_op("sami_fast::segment_infonce_backward", mutates_args=())
def _segment_infonce_backward(
    grad_loss: torch.Tensor,
    grad_pairs: torch.Tensor,
    offsets: torch.Tensor,
    shapes: torch.Tensor,
    table: torch.Tensor,
    num_tokens: int,
    backend: str,
) -> torch.Tensor:
    arguments = (grad_loss, grad_pairs, offsets, shapes, table, num_tokens)
    return run("segment_infonce", "backward", backend, arguments)


@_segment_infonce_backward.register_fake
def _(grad_loss, grad_pairs, offsets, shapes, table, num_tokens, backend):
    return grad_pairs.new_empty(num_tokens)


def _segment_infonce_setup(ctx, inputs, output):
    token_logprobs, offsets, shapes, table, _, _, ctx.backend = inputs
    ctx.num_tokens = token_logprobs.shape[0]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[3], offsets, shapes, table)


def _segment_infonce_autograd(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 7
    grad_tokens = _segment_infonce_backward(grad_loss, *ctx.saved_tensors, ctx.num_tokens, ctx.backend)
    return grad_tokens, *(None,) * 6


_segment_infonce.register_autograd(_segment_infonce_autograd, setup_context=_segment_infonce_setup)


class _EagerSegmentInfonce(torch.autograd.Function):
    """The op without the boundary of `torch.library`, which takes longer than all the work on a small group."""

    @staticmethod
    def forward(ctx, *inputs):
        output = run("segment_infonce", "forward", inputs[-1], inputs[:-1])
        _segment_infonce_setup(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None or torch.is_grad_enabled():  # the registered op refuses a second derivative
            return _segment_infonce_autograd(ctx, grad_loss)
        arguments = (grad_loss, *ctx.saved_tensors, ctx.num_tokens)
        return run("segment_infonce", "backward", ctx.backend, arguments), None, None, None, None, None, None


class _Groups(NamedTuple):
    """What follows from the shapes of the groups alone."""

    shapes: torch.Tensor  # [B, 2] int64 on the host
    table: torch.Tensor  # [B, 4] int32 on the device: C, R, first pair and first response of each group
    pairs: int
    responses: int
    side: int  # the most prompts or responses of a group


@functools.lru_cache(maxsize=256)
def _groups(shapes: tuple[tuple[int, int], ...], device: torch.device) -> _Groups:
    """Kept, so that steps of like shapes copy nothing to the device and can be captured in a CUDA graph."""
    expect(len(shapes) > 0 and all(min(s) > 0 for s in shapes), "shapes", "(C, R) > 0 for each group", list(shapes))
    rows, pairs, responses = [], 0, 0
    for C, R in shapes:
        rows.append((C, R, pairs, responses))
        pairs, responses = pairs + C * R, responses + R
    table = torch.tensor(rows, dtype=torch.int32, pin_memory=device.type == "cuda")
    on_device = table.to(device, non_blocking=True)  # from pinned memory: the host goes on
    return _Groups(torch.tensor(shapes), on_device, pairs, responses, max(map(max, shapes)))


def _infonce_backend(backend: str | None, token_logprobs: torch.Tensor, groups: _Groups) -> str:
    device, dtype = token_logprobs.device, token_logprobs.dtype
    name = resolve("segment_infonce", backend, device)
    if backend is None:
        if dtype != torch.float32 or groups.side > _MAX_SIDE:
            return "reference"
        if device.type in EXTENSION_DEVICES:
            return "cuda"
        return "triton" if device.type == "cuda" and HAS_TRITON else "reference"
    if name == "cuda":
        got = f"a build for {' and '.join(EXTENSION_DEVICES) or 'nothing'}"
        expect(device.type in EXTENSION_DEVICES, "backend", f"sami_fast._C to be built for {device.type}", got, name)
    if name == "triton":
        expect(HAS_TRITON, "backend", "triton to be installed", "no such package", name)
    if name != "reference":
        expect(dtype == torch.float32, "token_logprobs", "torch.float32", dtype, name)
        expect(groups.side <= _MAX_SIDE, "shapes", f"C and R of at most {_MAX_SIDE}", groups.side, name)
    return name


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
        backend: None is "cuda" where sami_fast._C was built for the tensors' device (those of the CPU run its host
            code), else "triton" on CUDA, for what these take (float32, at most 256 prompts and responses), else
            "reference".

    Returns:
        loss [B], differentiable; matrix [S]; metrics [B, 3]: mutual information in nats, the mean of log C - column
        loss and log R - row loss; shares of rows and of columns whose positive is strictly above every negative.

    Raises:
        ValueError: a shape, dtype, device or option that does not fit, by name.
    """
    expect(normalize in ("mean", "sum"), "normalize", '"mean" or "sum"', repr(normalize))
    good = token_logprobs.dim() == 1 and token_logprobs.is_floating_point()
    expect(good, "token_logprobs", "floating point [N]", token_logprobs)
    device, compiling = token_logprobs.device, torch.compiler.is_compiling()
    groups = (_groups.__wrapped__ if compiling else _groups)(tuple(map(tuple, shapes)), device)
    expect_index("offsets", offsets, (groups.pairs + 1,), device)
    expect_index("positives", positives, (groups.responses,), device)
    name = _infonce_backend(backend, token_logprobs, groups)
    # Tensors without data, and whatever else is more than a tensor, go through the registered op.
    eager = not compiling and type(token_logprobs) is torch.Tensor and device.type != "meta"
    inputs = (token_logprobs, offsets, groups.shapes, groups.table, positives, normalize)
    differentiated = torch.is_grad_enabled() and token_logprobs.requires_grad
    if eager and not differentiated and unpack_dual(token_logprobs).tangent is None:  # autograd refuses a tangent
        return run("segment_infonce", "forward", name, inputs)[:3]
    op = _EagerSegmentInfonce.apply if eager else _segment_infonce
    return op(*inputs, name)[:3]
