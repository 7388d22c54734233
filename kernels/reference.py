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
_LOGIT_ROWS = 1024  # at most, in a block of logits
_WIDENED_ROWS = 8192  # of a weight, at a time
_CACHED_LOGIT_BYTES = 4 << 20  # the same where it should stay in the caches
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


def _tokens_first(x: torch.Tensor, T: int) -> torch.Tensor:
    """[Hkv, T * G, D] -> contiguous [T, H, D]."""
    Hkv, rows, D = x.shape
    return x.view(Hkv, T, rows // T, D).transpose(0, 1).reshape(T, Hkv * rows // T, D).contiguous()


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


def _by_head(x: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[T, H, ...] -> [Hkv, H / Hkv, T, ...], in the compute dtype and without a copy when it has that already."""
    return x.to(_compute_dtype(x)).unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, *range(3, x.dim() + 1))


def _rows_in_memory(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _fused_blocks(nodes: torch.Tensor) -> Iterator[tuple[slice, slice, bool, bool]]:
    """(rows, keys, causal, first) per node: its rows against its own keys, then all rows below against them.

    `first`: no earlier block had these rows.
    """
    tree_end = 0
    for begin, end, subtree in nodes.tolist():
        is_root = begin >= tree_end
        tree_end = max(tree_end, subtree)
        yield slice(begin, end), slice(begin, end), True, is_root
        if end < subtree:
            yield slice(end, subtree), slice(begin, end), False, is_root


def _fused_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, nodes: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [T, Hq, D] and log-sum-exp [T, Hq] in the compute dtype, merged block by block."""
    T, Hq, D = q.shape
    Hkv = k.shape[1]
    out = torch.empty((T, Hq, D), dtype=_compute_dtype(q))
    lse = torch.empty((T, Hq), dtype=_compute_dtype(q))
    to_out, to_lse = _by_head(out, Hkv), _by_head(lse, Hkv)
    queries = _rows_in_memory(_by_head(q, Hkv))
    keys, values = (_rows_in_memory(_by_head(x, Hkv)).expand(-1, Hq // Hkv, -1, -1) for x in (k, v))
    for rows, at, causal, first in _fused_blocks(nodes):
        block_out, block_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries[:, :, rows], keys[:, :, at], values[:, :, at], 0.0, causal, scale=scale
        )
        if first:
            to_out[:, :, rows], to_lse[:, :, rows] = block_out, block_lse
        else:
            before = to_lse[:, :, rows]
            to_out[:, :, rows].lerp_(block_out, (block_lse - before).sigmoid_().unsqueeze(-1))
            to_lse[:, :, rows] = torch.logaddexp(before, block_lse)
    return out, lse


def _fused_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    nodes: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v in the compute dtype; the LSE of all a row sees makes each block's weights final."""
    Hq, Hkv = q.shape[1], k.shape[1]
    grads = [torch.empty(x.shape, dtype=_compute_dtype(x)) for x in (q, k, v)]
    to_q, *to_kv = (_by_head(grad, Hkv) for grad in grads)
    upstream, queries, output, row_lse = (_rows_in_memory(_by_head(x, Hkv)) for x in (grad_out, q, out, lse))
    keys, values = (_rows_in_memory(_by_head(x, Hkv)).expand(-1, Hq // Hkv, -1, -1) for x in (k, v))
    for rows, at, causal, first in _fused_blocks(nodes):
        grad_q, *grad_kv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            upstream[:, :, rows],
            queries[:, :, rows],
            keys[:, :, at],
            values[:, :, at],
            output[:, :, rows],
            row_lse[:, :, rows].contiguous(),
            0.0,
            causal,
            scale=scale,
        )
        if first:
            to_q[:, :, rows] = grad_q
        else:
            to_q[:, :, rows] += grad_q
        for to, grad in zip(to_kv, grad_kv, strict=True):
            if causal:  # the first block of these keys
                torch.sum(grad, dim=1, keepdim=True, out=to[:, :, at])
            else:
                to[:, :, at] += grad.sum(dim=1, keepdim=True)
    return tuple(grads)


def _blockwise_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    position_ids: torch.Tensor,
    nodes: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_fused_forward`, with every option: online softmax over a row's blocks."""
    T, Hq, _ = q.shape
    Hkv = k.shape[1]
    group = Hq // Hkv
    rows, keys, values = _heads_first(q, Hkv), _heads_first(k, Hkv), _heads_first(v, Hkv)
    highest = rows.new_full((*rows.shape[:2], 1), _NEG_INF)
    total = torch.zeros_like(highest)
    out = rows.new_zeros((*rows.shape[:2], values.shape[2]))
    for low, high, begin, end, visible in _blocks(nodes, position_ids, Hq, rows.element_size(), window):
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
    return _tokens_first(out.div_(total), T), _tokens_first(highest.add_(total.log_()), T).squeeze(-1)


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
    if _fuses(q, v, window, softcap):
        out, lse = _fused_forward(q, k, v, nodes, scale)
    else:
        out, lse = _blockwise_forward(q, k, v, position_ids, nodes, scale, window, softcap)
    if sinks is not None:
        with_sinks = torch.logaddexp(lse, sinks.to(lse.dtype))
        out.mul_((lse - with_sinks).exp_().unsqueeze(-1))
        lse = with_sinks
    return out.to(q.dtype), lse


def _blockwise_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    shift: torch.Tensor,
    lse: torch.Tensor,
    position_ids: torch.Tensor,
    nodes: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `_fused_backward`, with every option; scores are recomputed block by block."""
    T, Hq, _ = q.shape
    Hkv = k.shape[1]
    group = Hq // Hkv
    rows, keys, values, upstream = (_heads_first(x, Hkv) for x in (q, k, v, grad_out))
    lse_rows, shift = (_heads_first(x.unsqueeze(-1), Hkv) for x in (lse, shift))
    grad_q, grad_k, grad_v = torch.zeros_like(rows), torch.zeros_like(keys), torch.zeros_like(values)
    for low, high, begin, end, visible in _blocks(nodes, position_ids, Hq, rows.element_size(), window):
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
    return _tokens_first(grad_q, T), _tokens_first(grad_k, T), _tokens_first(grad_v, T)


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
    fused = _fuses(q, v, window, softcap) and not bool(grad_lse.any())
    grad_sinks = q.new_zeros(0)
    if not fused or sinks is not None:
        # d(score) = p * (d(p) - shift): the softmax Jacobian and the gradient of the LSE output in one per-row number.
        shift = (grad_out.to(lse.dtype) * out).sum(dim=-1) - grad_lse
    if sinks is not None:
        grad_sinks = -((sinks.to(lse.dtype) - lse).exp() * shift).sum(dim=0).to(sinks.dtype)
    if fused:
        grads = _fused_backward(grad_out, q, k, v, out, lse, nodes, scale)
    else:
        grads = _blockwise_backward(grad_out, q, k, v, shift, lse, position_ids, nodes, scale, window, softcap)
    return (*(grad.to(q.dtype) for grad in grads), grad_sinks)


# --------------------------------------------------------------------------------------------------------------------
# linear_logprob and linear_kl


def _row_chunks(num_rows: int, vocab_size: int, itemsize: int) -> Iterator[slice]:
    height = max(16, _LOGIT_BYTES // (vocab_size * itemsize))
    for low in range(0, num_rows, height):
        yield slice(low, min(low + height, num_rows))


def _logit_blocks(num_rows: int, weight: torch.Tensor, itemsize: int, kept: int) -> Iterator[tuple[slice, list[slice]]]:
    """Chunks of rows, and the blocks of the vocabulary that each chunk walks, none of them across column `kept`.

    On the CPU a block of logits stays in the caches between the products and what is done to it in between.
    """
    budget = _CACHED_LOGIT_BYTES if weight.device.type == "cpu" else _LOGIT_BYTES
    width = max(16, budget // (min(_LOGIT_ROWS, max(num_rows, 1)) * itemsize))
    sides = (0, kept), (kept, weight.shape[0])
    blocks = [slice(low, min(low + width, end)) for begin, end in sides for low in range(begin, end, width)]
    for low in range(0, num_rows, _LOGIT_ROWS):
        yield slice(low, min(low + _LOGIT_ROWS, num_rows)), blocks


def _widened(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """The weight in `dtype`, whole if it is so already: a copy of a whole vocabulary would double its memory."""
    height = max(len(weight), 1) if weight.dtype == dtype else _WIDENED_ROWS
    for low in range(0, len(weight), height):
        at = slice(low, min(low + height, len(weight)))
        yield at, weight[at].to(dtype)


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
    logits = hidden.new_empty((len(hidden), len(weight))) if out is None else out
    for at, vectors in _widened(weight, dtype):
        torch.mm(hidden, vectors.t(), out=logits[:, at])
    if bias is not None:
        logits.add_(bias)
    if scale != 1.0:
        logits.mul_(scale)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def _cap_slope(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """d(softcap * tanh(x / softcap)) / dx, from the capped value."""
    return logits.div(softcap).square_().neg_().add_(1.0)


def linear_logprob_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    regime: str,
    keep_columns: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log p(label) [N], log-sum-exp [N], and what is kept for the backward.

    Kept are d(log p)/d(hidden) [N, H] in regime "frozen_head", else the logits of the first columns [N, keep_columns].
    """
    dtype = _compute_dtype(hidden)
    N, (V, H) = hidden.shape[0], weight.shape
    frozen, num_kept = regime == "frozen_head", min(keep_columns, V)
    logprob, lse = hidden.new_empty(N, dtype=dtype), hidden.new_empty(N, dtype=dtype)
    kept = hidden.new_empty((N, H)) if frozen else lse.new_empty((N, keep_columns))
    if not frozen:
        kept[:, V:].zero_()
    lowest = torch.finfo(dtype).min  # of a block whose logits are all -inf
    for rows, blocks in _logit_blocks(N, weight, lse.element_size(), num_kept):
        states = hidden[rows].to(dtype)
        highest = states.new_full((len(states), 1), lowest)
        total, label_logit = torch.zeros_like(highest), torch.zeros_like(highest)
        mean_row = torch.zeros_like(states)  # sum of weight rows by exp(logit - highest)
        for at in blocks:
            vectors = weight[at].to(dtype)
            out = kept[rows, at] if at.stop <= num_kept else None
            logits = _logits(states, vectors, None if bias is None else bias[at], logit_scale, softcap, out)
            inside, index = _in_block(labels[rows], at)
            label_logit = torch.where(inside, logits.gather(1, index), label_logit)
            after = torch.maximum(highest, logits.amax(dim=1, keepdim=True))
            weights = torch.sub(logits, after).exp_()
            decay = (highest - after).exp_()
            total.mul_(decay).add_(weights.sum(dim=1, keepdim=True))
            highest = after
            if frozen:
                # The label's part of the mean is left out and taken off its own row below: 1 - p without cancellation.
                weights.scatter_(1, index, weights.gather(1, index).masked_fill_(inside, 0.0))
                if softcap is not None:
                    weights.mul_(_cap_slope(logits, softcap))
                mean_row.mul_(decay).addmm_(weights, vectors)
        lse[rows] = (highest + total.log()).squeeze(1)
        # Rounding may put a certain label's logit an ulp above the log-sum-exp; a log-probability is never positive.
        logprob[rows] = (label_logit.squeeze(1) - lse[rows]).clamp_(max=0.0)
        if frozen:
            of_label = -torch.expm1(logprob[rows, None])
            if softcap is not None:
                of_label.mul_(_cap_slope(label_logit, softcap))
            label_row = weight[labels[rows]].to(dtype)
            kept[rows] = label_row.mul_(of_label).sub_(mean_row.div_(total)).mul_(logit_scale)
    return logprob, lse, kept


def _in_block(labels: torch.Tensor, block: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, 1] whether each label lies in the block, and where (somewhere valid if not)."""
    index = (labels - block.start)[:, None]
    width = block.stop - block.start
    return (index >= 0) & (index < width), index.clamp(0, width - 1)


def linear_logprob_backward(
    grad_logprob: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    logprob: torch.Tensor,
    lse: torch.Tensor,
    kept: torch.Tensor,
    logit_scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, weight and bias (empty without one); logits that were not kept are recomputed."""
    dtype, num_kept = _compute_dtype(hidden), min(kept.shape[1], len(weight))
    grad_hidden = torch.zeros_like(hidden, dtype=dtype)
    grad_weight = torch.empty_like(weight, dtype=dtype) if len(hidden) else torch.zeros_like(weight, dtype=dtype)
    grad_bias = weight.new_zeros(0 if bias is None else bias.shape[0], dtype=dtype)
    for rows, blocks in _logit_blocks(len(hidden), weight, lse.element_size(), num_kept):
        states, upstream = hidden[rows].to(dtype), grad_logprob[rows, None].to(dtype)
        of_label = torch.expm1(logprob[rows, None])
        for at in blocks:
            vectors = weight[at].to(dtype)
            if at.stop <= num_kept:
                logits = kept[rows, at]
            else:
                logits = _logits(states, vectors, None if bias is None else bias[at], logit_scale, softcap)
            # -d(log p(label)) / d(logit) = p - onehot
            grad = torch.sub(logits, lse[rows, None]).exp_()
            inside, index = _in_block(labels[rows], at)
            grad.scatter_(1, index, torch.where(inside, of_label, grad.gather(1, index)))
            if softcap is not None:
                grad.mul_(_cap_slope(logits, softcap))
            grad.mul_(upstream * -logit_scale)
            grad_hidden[rows].addmm_(grad, vectors)
            grad_weight[at].addmm_(grad.t(), states, beta=float(rows.start > 0))  # 0: what is there is not read
            if bias is not None:
                grad_bias[at].add_(grad.sum(dim=0))
    grad_bias = grad_bias if bias is None else grad_bias.to(bias.dtype)
    return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), grad_bias


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """In place. (The CPU's own float32 log_softmax is off by 2e-5 to one side over a vocabulary of 49152.)"""
    return logits.sub_(torch.logsumexp(logits, dim=-1, keepdim=True))


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
        logp = _log_softmax(_logits(hidden[rows], weight, bias, logit_scale, softcap))
        logp_ref = _log_softmax(_logits(ref_hidden[rows], ref_weight, ref_bias, logit_scale, softcap))
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
        upstream = grad_kl[rows, None].to(dtype) * logit_scale
        slope = upstream if softcap is None else _cap_slope(logits, softcap).mul_(upstream)
        logp = _log_softmax(logits)
        logp_ref = _log_softmax(_logits(ref_hidden[rows], ref_weight, ref_bias, logit_scale, softcap))
        grad = logp_ref.neg_().add_(logp).sub_(kl[rows, None]).mul_(logp.exp_()).mul_(slope)
        of_rows = torch.zeros_like(hidden[rows], dtype=dtype)
        for at, vectors in _widened(weight, dtype):
            of_rows.addmm_(grad[:, at], vectors)
        grad_hidden[rows] = of_rows.to(hidden.dtype)
        grad_weight.addmm_(grad.t(), hidden[rows].to(dtype))
        if bias is not None:
            grad_bias.add_(grad.sum(dim=0))
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias if bias is None else grad_bias.to(bias.dtype)


# --------------------------------------------------------------------------------------------------------------------
# segment_infonce


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
