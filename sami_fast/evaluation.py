"""Scores of held-out groups: matrices, mutual information and accuracies with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from sami_fast.losses import InfoNCE, infonce_loss
from sami_fast.prefix_tree import Group, pack_within
from sami_fast.scoring import score

METRICS = ("loss", "mutual_information", "row_accuracy", "column_accuracy")


@dataclass(frozen=True)
class GroupResult:
    """One scored group. `matrix`: [C, R] log-probabilities in nats, -inf where a mask leaves a pair out."""

    id: str | None
    matrix: np.ndarray
    loss: float
    mutual_information: float
    row_accuracy: float
    column_accuracy: float

    def as_json(self) -> dict:
        """A mapping that JSON can hold; unscored pairs are null."""
        matrix = [[value if np.isfinite(value) else None for value in row] for row in self.matrix.tolist()]
        return asdict(self) | {"matrix": matrix}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> GroupResult:
        """What `as_json` gave."""
        matrix = [[-np.inf if value is None else value for value in line] for line in row["matrix"]]
        return cls(row["id"], np.array(matrix, dtype=float), *(float(row[name]) for name in METRICS))


def score_groups(
    model: nn.Module, groups: Sequence[Group], *, max_tokens: int = 16384, normalize: str = "mean"
) -> Iterator[GroupResult]:
    """Score groups without gradients and in eval mode, giving each as it is done, in their order.

    Raises:
        ValueError: a group above `max_tokens` by itself, or as in `score`.
    """
    packs = pack_within(groups, max_tokens)
    training = model.training
    model.eval()
    try:
        for packed in packs:
            with torch.no_grad():
                scores = score(model, packed.to(model.device), normalize=normalize)
                result = infonce_loss(scores, reduction="none")
            rows = torch.stack([getattr(result, name) for name in METRICS], dim=1).tolist()
            for id, matrix, row in zip(packed.ids, scores.matrices, rows, strict=True):
                yield GroupResult(id, matrix.double().cpu().numpy(), *row)
    finally:
        model.train(training)


def summarize(results: Sequence[GroupResult], *, resamples: int = 2000, seed: int = 0) -> dict[str, dict[str, float]]:
    """Mean of each metric over groups, with the 95 % percentile-bootstrap interval over groups (`low`, `high`)."""
    table = [[getattr(result, name) for name in METRICS] for result in results]
    return dict(zip(METRICS, mean_intervals(table, resamples, seed), strict=True))


def summarize_lengths(groups: Sequence[Group], *, resamples: int = 2000, seed: int = 0) -> dict[str, float]:
    """Mean tokens of a group's responses over groups, with its 95 % percentile-bootstrap interval over groups."""
    rows = [[np.mean([len(response) for response in group.responses])] for group in groups]
    return mean_intervals(rows, resamples, seed)[0]


def mean_intervals(table: Sequence[Sequence[float]], resamples: int = 2000, seed: int = 0) -> list[dict[str, float]]:
    """Mean of each column with its 95 % percentile-bootstrap interval over rows."""
    if not table:
        raise ValueError("table: expected at least one row, got none")
    values = np.array(table)
    draws = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975], axis=0)
    columns = zip(values.mean(axis=0).tolist(), low.tolist(), high.tolist(), strict=True)
    return [{"mean": mean, "low": a, "high": b} for mean, a, b in columns]


def padded_matrix(model: nn.Module, group: Group, *, normalize: str = "mean") -> torch.Tensor:
    """[C, R] by running all C x R sequences whole in one padded batch with full logits; differentiable.

    What implementations without a prefix tree do, kept as the yardstick of speed and memory.
    """
    C, R = group.shape
    pairs = [(prompt, response) for prompt in group.prompts for response in group.responses]
    length = max(len(prompt) + len(response) for prompt, response in pairs)
    ids = torch.zeros(C * R, length, dtype=torch.int64)
    attention_mask, scored = torch.zeros_like(ids), torch.zeros(C * R, length - 1)
    for row, (prompt, response) in enumerate(pairs):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.from_numpy(np.concatenate([prompt, response]))
        attention_mask[row, :end] = 1
        scored[row, len(prompt) - 1 : end - 1] = 1
    ids, attention_mask, scored = (tensor.to(model.device) for tensor in (ids, attention_mask, scored))
    logits = model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
    logprobs = logits.log_softmax(dim=-1).gather(2, ids[:, 1:, None]).squeeze(2)
    total = (logprobs * scored).sum(dim=1)
    return (total / scored.sum(dim=1) if normalize == "mean" else total).view(C, R)


def padded_infonce(model: nn.Module, group: Group, *, normalize: str = "mean") -> InfoNCE:
    """Loss of one group through `padded_matrix`."""
    return infonce_loss(padded_matrix(model, group, normalize=normalize), group.positives.tolist())
