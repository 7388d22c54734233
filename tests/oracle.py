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


def entropy(logits):
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp.clamp(min=-1e300)).sum(-1)


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


def pair_logits(model, groups: list[Group]) -> list[torch.Tensor | None]:
    """[tokens, V] logits of each pair's response by a plain forward of its whole sequence, None where masked.

    Differentiable, in the model's own dtype but for 16-bit logits, which become float32 as in transformers' losses.
    """
    results = []
    for group in groups:
        for j, prompt in enumerate(group.prompts):
            for k, response in enumerate(group.responses):
                if group.mask is not None and not group.mask[j][k]:
                    results.append(None)
                    continue
                ids = torch.tensor([*prompt, *response])[None].to(model.device)
                z = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
                results.append(z if z.dtype == torch.float64 else z.float())
    return results


def token_logits(model, groups: list[Group]) -> torch.Tensor:
    """[N, V] logits at every scored token, in the order of `pack(groups).labels`."""
    return torch.cat([z for z in pair_logits(model, groups) if z is not None])


def matrices(model, groups: list[Group], normalize: str = "mean") -> list[torch.Tensor]:
    """Score every pair by a plain forward of its whole sequence; differentiable, -inf where masked."""
    remaining = iter(pair_logits(model, groups))
    results = []
    for group in groups:
        entries = []
        for pair in range(len(group.prompts) * len(group.responses)):
            z = next(remaining)
            if z is None:
                entries.append(torch.tensor(-math.inf, device=model.device))
                continue
            labels = torch.tensor(group.responses[pair % len(group.responses)], device=z.device)
            tokens = z.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
            entries.append(tokens.mean() if normalize == "mean" else tokens.sum())
        results.append(torch.stack(entries).view(group.shape))
    return results


def padded_matrices(model, groups: list[Group], normalize: str = "mean") -> list[torch.Tensor]:
    """As `matrices`, all sequences of a group in one right-padded batch, full logits: how it is done without a tree."""
    results = []
    for group in groups:
        pairs = [(prompt, response) for prompt in group.prompts for response in group.responses]
        sequences = [torch.tensor([*prompt, *response]) for prompt, response in pairs]
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        tokens = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        rows = [t[len(p) - 1 : len(p) + len(r) - 1] for t, (p, r) in zip(tokens, pairs, strict=True)]
        entries = [row.mean() if normalize == "mean" else row.sum() for row in rows]
        results.append(torch.stack(entries).view(group.shape))
    return results
