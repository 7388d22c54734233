"""Segment-mean InfoNCE in plain PyTorch: any device, float64-capable, production on the CPU."""

import torch

_NEG_INF = float("-inf")


def segment_infonce_forward(
    token_logprobs: torch.Tensor,
    offsets: torch.Tensor,
    shapes: torch.Tensor,
    table: torch.Tensor,
    positives: torch.Tensor,
    normalize: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss [B], matrix [S], metrics [B, 3] (mutual information, row and column accuracy), d(loss)/d(token) [N].

    The dtype of the results is that of `token_logprobs`; sums run in float64.
    """
    device, dtype = token_logprobs.device, token_logprobs.dtype
    lengths = offsets.diff()
    matrix = torch.segment_reduce(token_logprobs.double(), "sum", offsets=offsets, axis=0)
    if normalize == "mean":
        matrix = matrix / lengths.clamp(min=1)
    matrix = matrix.masked_fill(lengths == 0, _NEG_INF)

    shape_list = shapes.tolist()
    cells = torch.tensor([0] + [C * R for C, R in shape_list]).cumsum(0).tolist()
    responses = torch.tensor([0] + [R for _, R in shape_list]).cumsum(0).tolist()
    loss = matrix.new_empty(len(shape_list))
    metrics = matrix.new_empty((len(shape_list), 3))
    grad_matrix = torch.empty_like(matrix)
    by_shape: dict[tuple[int, int], list[int]] = {}
    for index, (C, R) in enumerate(shape_list):
        by_shape.setdefault((C, R), []).append(index)
    for (C, R), members in by_shape.items():
        at = torch.tensor([cells[b] for b in members], device=device)[:, None] + torch.arange(C * R, device=device)
        owner_at = torch.tensor([responses[b] for b in members], device=device)[:, None] + torch.arange(
            R, device=device
        )
        scores = matrix[at].view(-1, C, R)
        is_positive = positives[owner_at][:, None, :] == torch.arange(C, device=device)[:, None]  # [b, C, R]
        target = is_positive.to(scores.dtype)
        target /= target.sum(dim=2, keepdim=True)  # uniform over a row's positives
        column_logp, row_logp = scores.log_softmax(dim=1), scores.log_softmax(dim=2)
        column_loss = -column_logp.masked_fill(~is_positive, 0.0).sum(dim=(1, 2)) / R
        row_loss = -(row_logp.masked_fill(~is_positive, 0.0) * target).sum(dim=(1, 2)) / C
        loss[members] = 0.5 * (column_loss + row_loss)
        metrics[members, 0] = 0.5 * (torch.log(scores.new_tensor(C * R)) - column_loss - row_loss)
        positive = scores.masked_fill(~is_positive, _NEG_INF)
        negative = scores.masked_fill(is_positive, _NEG_INF)
        # Strictly above every negative: a tie is wrong. NaN compares false.
        metrics[members, 1] = (positive.amax(dim=2) > negative.amax(dim=2)).to(scores.dtype).mean(dim=1)
        metrics[members, 2] = (positive.amax(dim=1) > negative.amax(dim=1)).to(scores.dtype).mean(dim=1)
        grad = 0.5 * ((column_logp.exp() - is_positive.to(scores.dtype)) / R + (row_logp.exp() - target) / C)
        grad_matrix[at] = grad.view(len(members), C * R)
    if normalize == "mean":
        grad_matrix = grad_matrix / lengths.clamp(min=1)
    grad_tokens = grad_matrix.repeat_interleave(lengths, output_size=token_logprobs.numel())
    return loss.to(dtype), matrix.to(dtype), metrics.to(dtype), grad_tokens.to(dtype)
