"""Segment-mean InfoNCE, registered with `torch.library`."""

import functools
import importlib.util
import math
from collections.abc import Sequence

import torch

from sami_fast.ops.dispatch import HAS_TRITON, describe, expect, expect_index, resolve, run

_MAX_SIDE = 256  # of a group, in the kernels
_NEEDS = {"cuda": "sami_fast._C to be built", "triton": "triton to be installed"}


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
    table = torch.tensor(rows, dtype=torch.int32, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)  # from pinned memory: the host goes on


def _infonce_backend(backend: str | None, token_logprobs: torch.Tensor, shapes: tuple[tuple[int, int], ...]) -> str:
    name = resolve("segment_infonce", backend, token_logprobs.device)
    has_extension = importlib.util.find_spec("sami_fast._C") is not None
    if backend is None and name != "reference":
        if token_logprobs.dtype != torch.float32 or max(map(max, shapes)) > _MAX_SIDE:
            return "reference"
        return "cuda" if has_extension else "triton" if HAS_TRITON else "reference"
    if name != "reference":
        installed = has_extension if name == "cuda" else HAS_TRITON
        expect(installed, "backend", f"{_NEEDS[name]} for {name!r}", "no such module")
        expect(token_logprobs.dtype == torch.float32, "token_logprobs", "torch.float32", token_logprobs.dtype, name)
        largest = max(shapes, key=max)
        expect(max(largest) <= _MAX_SIDE, "shapes", f"C and R of at most {_MAX_SIDE}", largest, name)
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

    Returns:
        loss [B], differentiable; matrix [S]; metrics [B, 3]: mutual information in nats, the mean of log C - column
        loss and log R - row loss; shares of rows and of columns whose positive is strictly above every negative.

    Raises:
        ValueError: a shape, dtype, device or option that does not fit, by name.
    """
    expect(normalize in ("mean", "sum"), "normalize", '"mean" or "sum"', repr(normalize))
    expect(
        token_logprobs.dim() == 1 and token_logprobs.is_floating_point(),
        "token_logprobs",
        "floating point [N]",
        describe(token_logprobs),
    )
    expect(len(shapes) > 0 and all(min(s) > 0 for s in shapes), "shapes", "(C, R) > 0 for each group", list(shapes))
    device = token_logprobs.device
    expect_index("offsets", offsets, (sum(math.prod(s) for s in shapes) + 1,), device)
    expect_index("positives", positives, (sum(R for _, R in shapes),), device)
    shapes = tuple((int(C), int(R)) for C, R in shapes)
    table = (_group_table.__wrapped__ if torch.compiler.is_compiling() else _group_table)(shapes, device)
    on_host = torch.tensor(shapes, dtype=torch.int64).view(-1, 2)
    name = _infonce_backend(backend, token_logprobs, shapes)
    return _segment_infonce(token_logprobs, offsets, on_host, table, positives, normalize, name)[:3]
