"""The one oracle: plain float64 PyTorch with autograd, written for clarity, shared by every test."""

from __future__ import annotations

import math

import torch

from sami_fast.prefix_tree import Group


def attention(q, k, v, subtree_end, position_ids, *, scale=None, window=None, softcap=None, sinks=None):
    """Dense T x T attention; out [T, Hq, Dv] and lse [T, Hq]."""
    q, k, v = q.double(), k.double(), v.double()
    T, Hq, D = q.shape
    group = Hq // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("ihd,nhd->hin", q, k) * (D**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    i, n = torch.arange(T)[:, None], torch.arange(T)[None, :]
    visible = (n <= i) & (i < subtree_end[None, :])
    if window is not None:
        visible &= position_ids[:, None] - position_ids[None, :] < window
    scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(Hq, T, 1)], dim=2)
    lse = scores.logsumexp(dim=2)
    weights = (scores - lse[:, :, None]).exp()[:, :, :T]
    return torch.einsum("hin,nhd->ihd", weights, v), lse.t()


def logits(hidden, weight, bias=None, logit_scale=1.0, softcap=None):
    z = hidden.double() @ weight.double().t()
    if bias is not None:
        z = z + bias.double()
    z = z * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def logprob(hidden, weight, labels, **head):
    return logits(hidden, weight, **head).log_softmax(-1).gather(1, labels[:, None]).squeeze(1)


def kl(logits_p, logits_ref):
    logp, logp_ref = logits_p.log_softmax(-1), logits_ref.log_softmax(-1)
    return (logp.exp() * (logp - logp_ref)).sum(-1)


def infonce(matrix, positives):
    """Loss, mutual information, row and column accuracy of one [C, R] matrix; -inf entries are not scored."""
    C, R = matrix.shape
    columns, rows = matrix.double().log_softmax(0), matrix.double().log_softmax(1)
    column_loss = -sum(columns[positives[k], k] for k in range(R)) / R
    row_loss, right_rows, right_columns = 0.0, 0, 0
    for j in range(C):
        own = [k for k in range(R) if positives[k] == j]
        row_loss = row_loss - sum(rows[j, k] for k in own) / len(own) / C
        others = [matrix[j, k] for k in range(R) if k not in own]
        right_rows += all(max(matrix[j, k] for k in own) > other for other in others)
    for k in range(R):
        right_columns += all(matrix[positives[k], k] > matrix[j, k] for j in range(C) if j != positives[k])
    information = ((math.log(C) - column_loss.detach()) + (math.log(R) - row_loss.detach())) / 2
    return (column_loss + row_loss) / 2, information, right_rows / C, right_columns / R


def matrices(model, groups: list[Group], normalize: str = "mean") -> list[torch.Tensor]:
    """Score every pair by a plain forward of the whole sequence; differentiable, in the model's own dtype."""
    results = []
    for group in groups:
        rows = []
        for j, prompt in enumerate(group.prompts):
            row = []
            for k, response in enumerate(group.responses):
                if group.mask is not None and not group.mask[j][k]:
                    row.append(torch.tensor(-math.inf))
                    continue
                ids = torch.tensor([*prompt, *response])[None].to(model.device)
                logp = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
                tokens = logp.gather(1, ids[0, 1:, None]).squeeze(1)[len(prompt) - 1 :]
                row.append(tokens.mean() if normalize == "mean" else tokens.sum())
            rows.append(torch.stack(row))
        results.append(torch.stack(rows))
    return results
