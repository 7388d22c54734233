"""Functions of scores: the symmetric InfoNCE loss of SAMI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sami_fast import ops
from sami_fast.scoring import Scores


@dataclass(frozen=True)
class InfoNCE:
    """Symmetric InfoNCE and what it says; scalars, or [B] with `reduction="none"`.

    Attributes:
        loss: differentiable.
        mutual_information: lower bound in nats, the mean of log C - column loss and log R - row loss.
        row_accuracy: share of prompts whose best own response is strictly above every other response.
        column_accuracy: share of responses whose own prompt is strictly above every other prompt.
    """

    loss: torch.Tensor
    mutual_information: torch.Tensor
    row_accuracy: torch.Tensor
    column_accuracy: torch.Tensor


def infonce_loss(
    scores: Scores | torch.Tensor | Sequence[torch.Tensor],
    positives: torch.Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
    *,
    reduction: str = "mean",
    backend: str | None = None,
) -> InfoNCE:
    """Symmetric InfoNCE of each group's C x R matrix (arXiv 2404.14313), see `ops.segment_infonce` for the formula.

    Args:
        scores: what `score` returned (its own positives count), or matrices: [C, R], [B, C, R], or a list of [C, R];
            -inf entries are not scored.
        positives: [R] ints for every group alike, or B lists of them: the prompt that each response belongs to. None: k
            under k.
        reduction: "mean" over groups, or "none".

    Raises:
        ValueError: positives out of range or of the wrong length, a prompt without a response, a masked positive pair.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction: expected "mean" or "none", got {reduction!r}')
    if isinstance(scores, Scores):
        if positives is not None:
            raise ValueError("positives: expected None, as the scores carry those of their groups")
        packed = scores.packed
        if packed.unscored_positive is not None:
            group, j, k = packed.unscored_positive
            raise ValueError(
                f"scores: the mask of group {packed.group_name(group)} leaves out prompt {j} with its own response {k}"
            )
        inputs = (scores.token_logprobs, packed.offsets, packed.shapes, packed.positives)
        normalize = scores.normalize
    else:
        inputs, normalize = _from_matrices(scores, positives), "sum"
    loss, _, metrics = ops.segment_infonce(*inputs, normalize=normalize, backend=backend)
    parts = (loss, *metrics.detach().unbind(dim=1))
    return InfoNCE(*(part.mean() for part in parts)) if reduction == "mean" else InfoNCE(*parts)


def _from_matrices(scores, positives) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]], torch.Tensor]:
    """Matrices as segments of one token each."""
    matrices = [scores] if isinstance(scores, torch.Tensor) and scores.dim() == 2 else list(scores)
    if not matrices or any(matrix.dim() != 2 or matrix.numel() == 0 for matrix in matrices):
        raise ValueError(f"scores: expected [C, R] matrices, got {[list(matrix.shape) for matrix in matrices]}")
    shapes = [tuple(matrix.shape) for matrix in matrices]
    one_for_all = positives is None or len(positives) == 0 or torch.as_tensor(positives[0]).dim() == 0
    if one_for_all:
        positives = [positives] * len(matrices)
    if len(positives) != len(matrices):
        raise ValueError(f"positives: expected {len(matrices)} lists, one per matrix, got {len(positives)}")
    owners = []
    for (C, R), own in zip(shapes, positives, strict=True):
        if own is None and C != R:
            raise ValueError(f"positives: required when {C} prompts meet {R} responses, got None")
        own = list(range(R)) if own is None else torch.as_tensor(own).tolist()
        if len(own) != R or any(not isinstance(j, int) or not 0 <= j < C for j in own):
            raise ValueError(f"positives: expected {R} prompt indices in [0, {C}), got {own}")
        if missing := set(range(C)) - set(own):
            raise ValueError(f"positives: prompt {min(missing)} has no response of its own")
        owners += own
    flat = torch.cat([matrix.flatten() for matrix in matrices])
    offsets = torch.arange(flat.numel() + 1, device=flat.device)
    return flat, offsets, shapes, torch.tensor(owners, device=flat.device)
