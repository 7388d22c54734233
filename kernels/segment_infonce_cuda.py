"""Segment-mean InfoNCE in CUDA C++: the launchers of csrc/segment_infonce.cu.

CPU tensors run the same source compiled for the host: the fastest backend there too, and a check of the arithmetic on
machines without a GPU.
"""

from typing import Any

import torch

from sami_fast import _C


def _run(name: str, device: torch.device, **arguments: Any) -> None:
    """`_C.NAME_cuda` or `_C.NAME_host`."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            getattr(_C, f"{name}_cuda")(**arguments, stream=torch.cuda.current_stream().cuda_stream)
    else:
        getattr(_C, f"{name}_host")(**arguments)


def _groups(offsets: torch.Tensor, shapes: torch.Tensor, table: torch.Tensor) -> dict[str, Any]:
    """What both directions take."""
    pointers = dict(offsets=offsets.data_ptr(), shapes=table.data_ptr(), sizes=shapes.data_ptr())
    return dict(pointers, groups=shapes.shape[0])


def segment_infonce_forward(
    token_logprobs: torch.Tensor,
    offsets: torch.Tensor,
    shapes: torch.Tensor,
    table: torch.Tensor,
    positives: torch.Tensor,
    normalize: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss [B], matrix [S], metrics [B, 3], d(loss)/d(token) of each pair [S], all groups in one launch; float32."""
    B, S = shapes.shape[0], offsets.shape[0] - 1
    # Names of their own: an address keeps no copy alive.
    token_logprobs, offsets, positives = token_logprobs.contiguous(), offsets.contiguous(), positives.contiguous()
    loss, matrix, metrics, grad_pairs = (token_logprobs.new_empty(size) for size in (B, S, (B, 3), S))
    _run(
        "segment_infonce_forward",
        token_logprobs.device,
        **_groups(offsets, shapes, table),
        token_logprobs=token_logprobs.data_ptr(),
        positives=positives.data_ptr(),
        normalize=normalize,
        loss=loss.data_ptr(),
        metrics=metrics.data_ptr(),
        matrix=matrix.data_ptr(),
        pair_grad=grad_pairs.data_ptr(),
    )
    return loss, matrix, metrics, grad_pairs


def segment_infonce_backward(
    grad_loss: torch.Tensor,
    grad_pairs: torch.Tensor,
    offsets: torch.Tensor,
    shapes: torch.Tensor,
    table: torch.Tensor,
    num_tokens: int,
) -> torch.Tensor:
    """d(loss)/d(token) [N], in one launch."""
    grad_loss, offsets = grad_loss.contiguous(), offsets.contiguous()
    grad_tokens = grad_pairs.new_empty(num_tokens)
    _run(
        "segment_infonce_backward",
        grad_pairs.device,
        **_groups(offsets, shapes, table),
        loss_grad=grad_loss.data_ptr(),
        pair_grad=grad_pairs.data_ptr(),
        token_grad=grad_tokens.data_ptr(),
    )
    return grad_tokens
