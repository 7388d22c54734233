"""Segment-mean InfoNCE in NumPy, in float64: production on the CPU. Tensors of other devices are copied to the host.

Beside a small group's arithmetic a PyTorch operator's overhead is what takes the time, and over many tokens
`numpy.add.reduceat` and `numpy.repeat` are several times as fast as `torch.segment_reduce` and `repeat_interleave`.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch

_BLOCK = 1 << 14  # float64 numbers of a block: stays in the caches, and one thread of PyTorch casts it
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Block(NamedTuple):
    """Groups of one shape, few enough for the caches."""

    groups: np.ndarray  # [b]
    pairs: np.ndarray  # [b, C, R]
    responses: np.ndarray  # [b, 1, R]
    constitutions: np.ndarray  # [C, 1]: 0, 1, ...


@functools.lru_cache(maxsize=8)
def _blocks(shapes: bytes) -> list[_Block]:
    """Of all groups; `shapes` are those of a [B, 2] int64 tensor."""
    sizes = np.frombuffer(shapes, np.int64).reshape(-1, 2)
    first_pair = np.append(0, sizes.prod(axis=1).cumsum())
    first_response = np.append(0, sizes[:, 1].cumsum())
    blocks = []
    for C, R in np.unique(sizes, axis=0).tolist():
        members = (sizes == (C, R)).all(axis=1).nonzero()[0]
        count = max(1, _BLOCK // (C * R))
        for groups in np.split(members, range(count, len(members), count)):
            pairs = first_pair[groups, None, None] + np.arange(C * R).reshape(C, R)
            responses = first_response[groups, None, None] + np.arange(R)
            blocks.append(_Block(groups, pairs, responses, np.arange(C)[:, None]))
    return blocks


def _segment_sums(tokens: torch.Tensor, offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[S] sums of `tokens[offsets[s] : offsets[s + 1]]` in float64, 0 for none."""
    sums = np.zeros(len(lengths))
    filled = lengths.nonzero()[0]
    starts = offsets[filled]
    begin = 0
    while begin < len(starts):
        first = starts[begin]
        end = max(begin + 1, starts.searchsorted(first + _BLOCK))  # a long segment is a block of its own
        last = starts[end] if end < len(starts) else offsets[-1]
        block = tokens[first:last].double().numpy()
        sums[filled[begin:end]] = np.add.reduceat(block, starts[begin:end] - first)
        begin = end
    return sums


def _lines(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the lines of [..., lines, entries]: mean loss [...], share of hits [...], d(mean loss)/d(score).

    A line without a positive adds nothing; one with a NaN, or a positive of -inf, is not finite.
    """
    lines = scores.shape[-2]
    best = np.where(positive, scores, -np.inf).max(-1)
    rival = np.where(positive, -np.inf, scores).max(-1)
    logp = scores - np.maximum(best, rival)[..., None]
    weights = np.exp(logp)
    total = weights.sum(-1, keepdims=True)
    logp -= np.log(total)
    weights /= total
    count = positive.sum(-1, keepdims=True)
    target = positive / np.maximum(count, 1)  # uniform over a line's positives
    loss = np.where(positive, logp * target, 0.0).sum((-2, -1)) / -lines
    hits = (best > rival).sum(-1) / lines  # a tie is wrong; NaN compares false
    weights -= target
    if not count.all():
        weights = np.where(count > 0, weights, 0.0)
    return loss, hits, weights / lines


def _rows_and_columns(scores: np.ndarray, positive: np.ndarray) -> tuple[tuple, tuple]:
    """`_lines` of the rows and of the columns of [b, C, R], gradients as [b, C, R]."""
    transposed = scores.swapaxes(1, 2), positive.swapaxes(1, 2)
    if scores.shape[1] == scores.shape[2]:  # one call is cheaper than two
        rows, columns = zip(
            *_lines(np.array((scores, transposed[0])), np.array((positive, transposed[1]))), strict=True
        )
    else:
        rows, columns = _lines(scores, positive), _lines(*transposed)
    return rows, (*columns[:2], columns[2].swapaxes(1, 2))


def segment_infonce_forward(
    token_logprobs: torch.Tensor,
    offsets: torch.Tensor,
    shapes: torch.Tensor,
    table: torch.Tensor,
    positives: torch.Tensor,
    normalize: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss [B], matrix [S], metrics [B, 3] (mutual information, row and column accuracy), d(loss)/d(token) [S], one
    for all tokens of a pair.

    The dtype of the results is that of `token_logprobs`; everything is computed in float64.
    """
    bounds, owners = offsets.cpu().numpy(), positives.cpu().numpy()
    lengths = bounds[1:] - bounds[:-1]
    matrix = _segment_sums(token_logprobs.detach().cpu(), bounds, lengths)
    divisor = np.maximum(lengths, 1) if normalize == "mean" else 1
    matrix /= divisor
    matrix[lengths == 0] = -np.inf

    B = shapes.shape[0]
    loss, metrics, grad = np.empty(B), np.empty((B, 3)), np.empty_like(matrix)
    with np.errstate(all="ignore"):  # infinities and NaN are results
        for groups, pairs, responses, constitutions in _blocks(shapes.numpy().tobytes()):
            scores, owner = matrix[pairs], owners[responses]
            positive = (owner == constitutions) & (lengths[pairs] > 0)
            (row_loss, row_hits, row_grad), (column_loss, column_hits, column_grad) = _rows_and_columns(
                scores, positive
            )
            if np.count_nonzero(positive) < owner.size:  # an owner out of range makes a group NaN
                column_loss[((owner < 0) | (owner >= len(constitutions))).any((1, 2))] = np.nan
            sums = row_loss + column_loss
            loss[groups] = 0.5 * sums
            metrics[groups, 0] = 0.5 * (np.log(scores[0].size) - sums)
            metrics[groups, 1] = row_hits
            metrics[groups, 2] = column_hits
            grad[pairs] = 0.5 * (row_grad + column_grad)
    grad /= divisor
    return tuple(torch.from_numpy(result).to(token_logprobs) for result in (loss, matrix, metrics, grad))


def segment_infonce_backward(
    grad_loss: torch.Tensor,
    grad_pairs: torch.Tensor,
    offsets: torch.Tensor,
    shapes: torch.Tensor,
    table: torch.Tensor,
    num_tokens: int,
) -> torch.Tensor:
    """d(loss)/d(token) [N]."""
    if shapes.shape[0] > 1:
        pairs = shapes.prod(dim=1).to(grad_loss.device)
        grad_loss = grad_loss.repeat_interleave(pairs, output_size=grad_pairs.shape[0])
    of_pair = (grad_pairs * grad_loss).to(grad_pairs.dtype).cpu()
    bounds = offsets.cpu().numpy()
    as_integers = of_pair.view(_INTEGERS[of_pair.element_size()]).numpy()  # NumPy has no bfloat16
    of_token = torch.from_numpy(np.repeat(as_integers, bounds[1:] - bounds[:-1]))
    return of_token.view(grad_pairs.dtype).to(grad_pairs.device)
