"""Every op in plain PyTorch: any device, float64-capable, production on the CPU.

Lean as well as exact: attention walks the nodes of the tree and never forms a T x T mask or copies keys; the vocabulary
ops walk chunks of rows and never hold N x V. Work is done in float32 (float64 for float64 inputs). On the CPU attention
without a window or soft-cap runs on the blocks of PyTorch's own fused attention.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

_SCORE_BYTES = 2 << 20  # one block of attention scores: stays in the caches
_LOGIT_BYTES = 64 << 20  # one chunk of logits
_NEG_INF = float("-inf")


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


# --------------------------------------------------------------------------------------------------------------------
# prefix_attention


def _heads_first(x: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[T, H, D] -> [Hkv, T * G, D]: the query heads of one KV head become consecutive rows of one matrix."""
    T, H, D = x.shape
    group = H // num_kv_heads
    x = x.to(_compute_dtype(x)).view(T, num_kv_heads, group, D)
    return x.transpose(0, 1).reshape(num_kv_heads, T * group, D)


def _tokens_first(x: torch.Tensor, T: int, dtype: torch.dtype) -> torch.Tensor:
    """[Hkv, T * G, D] -> contiguous [T, H, D]."""
    Hkv, rows, D = x.shape
    return x.view(Hkv, T, rows // T, D).transpose(0, 1).reshape(T, Hkv * rows // T, D).to(dtype).contiguous()


def _blocks(
    nodes: torch.Tensor, position_ids: torch.Tensor, num_heads: int, itemsize: int, window: int | None
) -> Iterator[tuple[int, int, int, int, torch.Tensor | None]]:
    """Blocks (row begin, row end, key begin, key end, visible) that cover every visible (query, key) pair once.

    The tokens below a node see all of its keys, so a block is a dense product of contiguous slices; only rows inside
    the node itself, or at the edge of a window, need `visible`: [rows, keys] bool (None: everything is).
    """
    device = position_ids.device
    for begin, end, subtree in nodes.tolist():
        height = max(16, _SCORE_BYTES // (num_heads * (end - begin) * itemsize))
        for low in range(begin, subtree, height):
            high = min(low + height, subtree)
            keys = min(end, high)
            visible = None
            if low < keys - 1:
                visible = torch.arange(low, high, device=device)[:, None] >= torch.arange(begin, keys, device=device)
            if window is not None:
                distance = position_ids[low:high, None] - position_ids[None, begin:keys]
                if bool((distance.amax() >= window).item()):
                    inside = distance < window
                    if not bool(inside.any().item()):
                        continue
                    visible = inside if visible is None else visible & inside
            yield low, high, begin, keys, visible


def _scores(
    q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float | None, visible: torch.Tensor | None, group: int
) -> torch.Tensor:
    """[Hkv, rows * G, keys] scaled, capped and masked scores."""
    scores = torch.matmul(q, k.transpose(1, 2)).mul_(scale)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if visible is not None:
        scores.masked_fill_(~visible.repeat_interleave(group, dim=0), _NEG_INF)
    return scores


def _fuses(q: torch.Tensor, v: torch.Tensor, window: int | None, softcap: float | None) -> bool:
    """Whether PyTorch's fused CPU attention computes the blocks: plain softmax attention, twice as fast as by parts."""
    return q.device.type == "cpu" and window is None and softcap is None and q.shape[-1] == v.shape[-1]


def _fused_blocks(
    nodes: torch.Tensor, group: int, q_side: tuple[torch.Tensor, ...], kv_side: tuple[torch.Tensor, ...]
) -> Iterator[tuple[slice, slice, bool, list[torch.Tensor], list[torch.Tensor]]]:
    """Per node: its rows against its own keys (causal), then all rows below against them; [Hkv, G, n, ...] each.

    Heads apart rather than as rows, since the fused backward spreads heads over threads.
    """
    for begin, end, subtree in nodes.tolist():
        keys = slice(begin, end)
        heads = [x[:, None, keys].expand(-1, group, -1, -1) for x in kv_side]
        for low, high in ((begin, end), (end, subtree)):
            if low < high:
                at = slice(low * group, high * group)
                queries = [x[:, at].unflatten(1, (high - low, group)).transpose(1, 2) for x in q_side]
                yield at, keys, low == begin, queries, heads


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """[Hkv, G, n, ...] -> [Hkv, n * G, ...]."""
    return x.transpose(1, 2).flatten(1, 2)


def _fused_forward(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, nodes: torch.Tensor, group: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [Hkv, T * G, Dv] and log-sum-exp [Hkv, T * G, 1], merged block by block."""
    out = torch.zeros_like(rows)
    lse = rows.new_full((*rows.shape[:2], 1), _NEG_INF)
    for at, _, causal, (q,), (k, v) in _fused_blocks(nodes, group, (rows,), (keys, values)):
        block = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        block_out, block_lse = _as_rows(block[0]), _as_rows(block[1]).unsqueeze(-1)
        before = lse[:, at]
        after = torch.logaddexp(before, block_lse)
        out[:, at] = out[:, at].mul_((before - after).exp_()).add_(block_out * (block_lse - after).exp_())
        lse[:, at] = after
    return out, lse


def _fused_backward(
    upstream: torch.Tensor,
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    nodes: torch.Tensor,
    group: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of rows, keys and values; the LSE of all a row sees makes each block's weights its final ones."""
    grad_q, grad_k, grad_v = torch.zeros_like(rows), torch.zeros_like(keys), torch.zeros_like(values)
    for at, key_at, causal, (do, q, o, row_lse), (k, v) in _fused_blocks(
        nodes, group, (upstream, rows, out, lse), (keys, values)
    ):
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, row_lse.squeeze(-1).contiguous(), 0.0, causal, scale=scale
        )
        grad_q[:, at] += _as_rows(dq)
        grad_k[:, key_at] += dk.sum(dim=1)
        grad_v[:, key_at] += dv.sum(dim=1)
    return grad_q, grad_k, grad_v


def _blockwise_forward(
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position_ids: torch.Tensor,
    nodes: torch.Tensor,
    num_heads: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_fused_forward`, with every option: online softmax over a row's blocks."""
    group = num_heads // rows.shape[0]
    highest = rows.new_full((*rows.shape[:2], 1), _NEG_INF)
    total = torch.zeros_like(highest)
    out = rows.new_zeros((*rows.shape[:2], values.shape[2]))
    for low, high, begin, end, visible in _blocks(nodes, position_ids, num_heads, rows.element_size(), window):
        at = slice(low * group, high * group)
        scores = _scores(rows[:, at], keys[:, begin:end], scale, softcap, visible, group)
        before = highest[:, at]
        after = torch.maximum(before, scores.amax(dim=-1, keepdim=True))
        # A row may see nothing of a block and nothing before it (windows): keep -inf - -inf out of the exponent.
        shift = after.masked_fill(after == _NEG_INF, 0.0) if window is not None else after
        weights = scores.sub_(shift).exp_()
        decay = (before - shift).exp_()
        total[:, at] = total[:, at].mul_(decay).add_(weights.sum(dim=-1, keepdim=True))
        out[:, at] = out[:, at].mul_(decay).add_(torch.matmul(weights, values[:, begin:end]))
        highest[:, at] = after
    return out.div_(total), highest.add_(total.log_())


def prefix_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    position_ids: torch.Tensor,
    nodes: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [T, Hq, Dv] and log-sum-exp [T, Hq], sinks included."""
    T, Hq, _ = q.shape
    Hkv = k.shape[1]
    group = Hq // Hkv
    rows, keys, values = _heads_first(q, Hkv), _heads_first(k, Hkv), _heads_first(v, Hkv)
    if _fuses(q, v, window, softcap):
        out, lse = _fused_forward(rows, keys, values, nodes, group, scale)
    else:
        out, lse = _blockwise_forward(rows, keys, values, position_ids, nodes, Hq, scale, window, softcap)
    if sinks is not None:
        sink_rows = sinks.to(rows.dtype).view(Hkv, 1, group).expand(Hkv, T, group).reshape(Hkv, T * group, 1)
        with_sinks = torch.logaddexp(lse, sink_rows)
        out.mul_((lse - with_sinks).exp_())
        lse = with_sinks
    return _tokens_first(out, T, q.dtype), _tokens_first(lse, T, lse.dtype).squeeze(-1)


def _blockwise_backward(
    upstream: torch.Tensor,
    shift: torch.Tensor,
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lse_rows: torch.Tensor,
    position_ids: torch.Tensor,
    nodes: torch.Tensor,
    num_heads: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `_fused_backward`, with every option; scores are recomputed block by block."""
    group = num_heads // rows.shape[0]
    grad_q, grad_k, grad_v = torch.zeros_like(rows), torch.zeros_like(keys), torch.zeros_like(values)
    for low, high, begin, end, visible in _blocks(nodes, position_ids, num_heads, rows.element_size(), window):
        at = slice(low * group, high * group)
        scores = _scores(rows[:, at], keys[:, begin:end], scale, softcap, visible, group)
        cap_slope = None if softcap is None else scores.div(softcap).square_().neg_().add_(1.0)
        weights = scores.sub_(lse_rows[:, at]).exp_()
        grad_v[:, begin:end].add_(torch.matmul(weights.transpose(1, 2), upstream[:, at]))
        grad_scores = torch.matmul(upstream[:, at], values[:, begin:end].transpose(1, 2))
        grad_scores.sub_(shift[:, at]).mul_(weights)
        if cap_slope is not None:
            # A masked score is -inf and its slope with it; its weight is 0 and so is its gradient.
            grad_scores.mul_(cap_slope if visible is None else cap_slope.nan_to_num_(neginf=0.0))
        grad_scores.mul_(scale)
        grad_q[:, at].add_(torch.matmul(grad_scores, keys[:, begin:end]))
        grad_k[:, begin:end].add_(torch.matmul(grad_scores.transpose(1, 2), rows[:, at]))
    return grad_q, grad_k, grad_v


def prefix_attention_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    position_ids: torch.Tensor,
    nodes: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and sinks (empty without sinks)."""
    T, Hq, _ = q.shape
    Hkv = k.shape[1]
    group = Hq // Hkv
    rows, keys, values = _heads_first(q, Hkv), _heads_first(k, Hkv), _heads_first(v, Hkv)
    upstream, lse_rows = _heads_first(grad_out, Hkv), _heads_first(lse.unsqueeze(-1), Hkv)
    out_rows = _heads_first(out, Hkv)
    # d(score) = p * (d(p) - shift): the softmax Jacobian and the gradient of the LSE output in one per-row number.
    shift = (upstream * out_rows).sum(dim=-1, keepdim=True) - _heads_first(grad_lse.unsqueeze(-1), Hkv)
    if _fuses(q, v, window, softcap) and not bool(grad_lse.any()):
        grads = _fused_backward(upstream, rows, keys, values, out_rows, lse_rows, nodes, group, scale)
    else:
        grads = _blockwise_backward(
            upstream, shift, rows, keys, values, lse_rows, position_ids, nodes, Hq, scale, window, softcap
        )
    grad_sinks = q.new_zeros(0)
    if sinks is not None:
        sink_weight = (sinks.to(lse.dtype) - lse).exp()
        grad_sinks = -(sink_weight * _tokens_first(shift, T, lse.dtype).squeeze(-1)).sum(dim=0).to(sinks.dtype)
    return (
        *(_tokens_first(grad, T, like.dtype) for grad, like in zip(grads, (q, k, v), strict=True)),
        grad_sinks,
    )


# --------------------------------------------------------------------------------------------------------------------
# linear_logprob and linear_kl


def _row_chunks(num_rows: int, vocab_size: int, itemsize: int) -> Iterator[slice]:
    height = max(16, _LOGIT_BYTES // (vocab_size * itemsize))
    for low in range(0, num_rows, height):
        yield slice(low, min(low + height, num_rows))


def _logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """[rows, V] softcap(scale * (hidden @ weight.T + bias)), never rounded below the compute dtype."""
    dtype = _compute_dtype(hidden)
    hidden = hidden.to(dtype)
    logits = hidden.new_empty((hidden.shape[0], weight.shape[0])) if out is None else out
    if weight.dtype == dtype:
        torch.mm(hidden, weight.t(), out=logits)
    else:
        for block in range(0, weight.shape[0], 8192):  # widening the whole weight at once would double its memory
            torch.mm(hidden, weight[block : block + 8192].to(dtype).t(), out=logits[:, block : block + 8192])
    if bias is not None:
        logits.add_(bias)
    if scale != 1.0:
        logits.mul_(scale)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def _logit_slope(logits: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor | float:
    """d(logit) / d(hidden @ weight.T)."""
    return scale if softcap is None else logits.div(softcap).square_().neg_().add_(1.0).mul_(scale)


def _times_weight(grad_logits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[rows, V] @ [V, H] with a weight of a narrower dtype widened block by block."""
    if weight.dtype == grad_logits.dtype:
        return grad_logits @ weight
    out = grad_logits.new_zeros((grad_logits.shape[0], weight.shape[1]))
    for block in range(0, weight.shape[0], 8192):
        out.addmm_(grad_logits[:, block : block + 8192], weight[block : block + 8192].to(out.dtype))
    return out


def _label_gradient(
    logits: torch.Tensor, lse: torch.Tensor, labels: torch.Tensor, logprob: torch.Tensor, slope: torch.Tensor | float
) -> torch.Tensor:
    """[rows, V] d(log p(label)) / d(hidden @ weight.T) = (onehot - p) * slope; overwrites `logits`."""
    grad = logits.sub_(lse[:, None]).exp_().neg_()
    grad.scatter_(1, labels[:, None], -torch.expm1(logprob)[:, None])
    return grad.mul_(slope)


def linear_logprob_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    keep: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log p(label) [N], log-sum-exp [N], and what is kept for the backward.

    `keep`: "hidden_grad", d(log p)/d(hidden) [N, H]; "probabilities" [N, V] (no soft-cap); "nothing" [0].
    """
    dtype = _compute_dtype(hidden)
    N = hidden.shape[0]
    logprob, lse = hidden.new_empty(N, dtype=dtype), hidden.new_empty(N, dtype=dtype)
    kept = hidden.new_empty(0, dtype=dtype)
    if keep == "hidden_grad":
        kept = torch.empty_like(hidden)
    elif keep == "probabilities":
        kept = hidden.new_empty((N, weight.shape[0]), dtype=dtype)
    for rows in _row_chunks(N, weight.shape[0], lse.element_size()):
        out = kept[rows] if keep == "probabilities" else None
        logits = _logits(hidden[rows], weight, bias, logit_scale, softcap, out)
        lse[rows] = torch.logsumexp(logits, dim=-1)
        # Rounding may put a certain label's logit an ulp above the log-sum-exp; a log-probability is never positive.
        logprob[rows] = (logits.gather(1, labels[rows, None]).squeeze(1) - lse[rows]).clamp_(max=0.0)
        if keep == "probabilities":
            logits.sub_(lse[rows, None]).exp_()
        elif keep == "hidden_grad":
            slope = _logit_slope(logits, logit_scale, softcap)
            grad = _label_gradient(logits, lse[rows], labels[rows], logprob[rows], slope)
            kept[rows] = _times_weight(grad, weight).to(hidden.dtype)
    return logprob, lse, kept


def linear_logprob_backward(
    grad_logprob: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    logprob: torch.Tensor,
    lse: torch.Tensor,
    probabilities: torch.Tensor,
    logit_scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, weight and bias (empty without one); without kept probabilities logits are recomputed."""
    dtype = _compute_dtype(hidden)
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros_like(weight, dtype=dtype)
    grad_bias = weight.new_zeros(0 if bias is None else bias.shape[0], dtype=dtype)
    for rows in _row_chunks(hidden.shape[0], weight.shape[0], lse.element_size()):
        upstream = grad_logprob[rows, None].to(dtype)
        if probabilities.numel():
            grad = probabilities[rows] * (upstream * -logit_scale)
            grad.scatter_(1, labels[rows, None], -torch.expm1(logprob[rows, None]) * (upstream * logit_scale))
        else:
            logits = _logits(hidden[rows], weight, bias, logit_scale, softcap)
            slope = _logit_slope(logits, logit_scale, softcap)
            grad = _label_gradient(logits, lse[rows], labels[rows], logprob[rows], slope).mul_(upstream)
        grad_hidden[rows] = _times_weight(grad, weight).to(hidden.dtype)
        grad_weight.addmm_(grad.t(), hidden[rows].to(dtype))
        if bias is not None:
            grad_bias.add_(grad.sum(dim=0))
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias if bias is None else grad_bias.to(bias.dtype)


def linear_kl_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    ref_bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """KL(p || p_ref) [N] over the whole vocabulary, p and p_ref being softmaxes of the two heads' logits."""
    dtype = _compute_dtype(hidden)
    kl = hidden.new_empty(hidden.shape[0], dtype=dtype)
    for rows in _row_chunks(hidden.shape[0], weight.shape[0], 2 * kl.element_size()):
        logp = _logits(hidden[rows], weight, bias, logit_scale, softcap).log_softmax(dim=-1)
        logp_ref = _logits(ref_hidden[rows], ref_weight, ref_bias, logit_scale, softcap).log_softmax(dim=-1)
        kl[rows] = logp_ref.neg_().add_(logp).mul_(logp.exp()).sum(dim=-1)
    return kl


def linear_kl_backward(
    grad_kl: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    ref_bias: torch.Tensor | None,
    kl: torch.Tensor,
    logit_scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, weight and bias (empty without one); d(KL)/d(logit) = p * (log p - log p_ref - KL)."""
    dtype = _compute_dtype(hidden)
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros_like(weight, dtype=dtype)
    grad_bias = weight.new_zeros(0 if bias is None else bias.shape[0], dtype=dtype)
    for rows in _row_chunks(hidden.shape[0], weight.shape[0], 2 * kl.element_size()):
        logits = _logits(hidden[rows], weight, bias, logit_scale, softcap)
        slope = _logit_slope(logits, logit_scale, softcap)
        logp = logits.log_softmax(dim=-1)
        logp_ref = _logits(ref_hidden[rows], ref_weight, ref_bias, logit_scale, softcap).log_softmax(dim=-1)
        grad = logp_ref.neg_().add_(logp).sub_(kl[rows, None]).mul_(logp.exp_())
        grad.mul_(slope).mul_(grad_kl[rows, None].to(dtype))
        grad_hidden[rows] = _times_weight(grad, weight).to(hidden.dtype)
        grad_weight.addmm_(grad.t(), hidden[rows].to(dtype))
        if bias is not None:
            grad_bias.add_(grad.sum(dim=0))
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias if bias is None else grad_bias.to(bias.dtype)


# --------------------------------------------------------------------------------------------------------------------
# segment_infonce


def segment_infonce_forward(
    token_logprobs: torch.Tensor, offsets: torch.Tensor, shapes: torch.Tensor, positives: torch.Tensor, normalize: str
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
