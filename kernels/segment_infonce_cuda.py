"""Segment-mean InfoNCE in CUDA C++: the launcher of csrc/segment_infonce.cu.

CPU tensors run the same source compiled for the host, so that a machine without a GPU can check its arithmetic.
"""

import torch

from sami_fast import _C


def segment_infonce_forward(
    token_logprobs: torch.Tensor,
    offsets: torch.Tensor,
    shapes: torch.Tensor,
    table: torch.Tensor,
    positives: torch.Tensor,
    normalize: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss [B], matrix [S], metrics [B, 3], d(loss)/d(token) [N], all groups in one launch; float32 only."""
    device = token_logprobs.device
    B, S = shapes.shape[0], offsets.shape[0] - 1
    token_logprobs, offsets, positives = token_logprobs.contiguous(), offsets.contiguous(), positives.int()
    loss, matrix, metrics = (token_logprobs.new_empty(size) for size in (B, S, (B, 3)))
    grad_tokens = torch.empty_like(token_logprobs)
    arguments = {
        "token_logprobs": token_logprobs.data_ptr(),
        "offsets": offsets.data_ptr(),
        "offsets_bits": 64,
        "shapes": table.data_ptr(),
        "positives": positives.data_ptr(),
        "groups": B,
        "max_cells": int(shapes.prod(dim=1).max()),
        "normalize": normalize,
        "loss": loss.data_ptr(),
        "metrics": metrics.data_ptr(),
        "matrix": matrix.data_ptr(),
        "token_grad": grad_tokens.data_ptr(),
    }
    if device.type == "cuda":
        with torch.cuda.device(device):
            _C.segment_infonce_cuda(**arguments, stream=torch.cuda.current_stream().cuda_stream)
    else:
        _C.segment_infonce_host(**arguments)
    return loss, matrix, metrics, grad_tokens
