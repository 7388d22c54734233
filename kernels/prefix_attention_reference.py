"""Prefix-tree attention in plain PyTorch: any device, float64-capable, production on the CPU.

It walks the nodes of the tree and never forms a T x T mask or copies keys. Work is done in float32 (float64 for float64
inputs). On the CPU attention without a window or soft-cap runs on the blocks of PyTorch's own fused attention.
"""

from collections.abc import Iterator

import torch

from sami_fast.ops.dispatch import wide_dtype

_SCORE_BYTES = 2 << 20  # one block of attention scores: stays in the caches
_STRIP = 128  # rows of a node at a time, about: PyTorch's fused attention computes what its causal mask hides
_NEG_INF = float("-inf")


def _heads_first(x: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[T, H, D] -> [Hkv, T * G, D]: the query heads of one KV head become consecutive rows of one matrix."""
    T, H, D = x.shape
    group = H // num_kv_heads
    x = x.to(wide_dtype(x)).view(T, num_kv_heads, group, D)
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
    return x.to(wide_dtype(x)).unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, *range(3, x.dim() + 1))


def _rows_in_memory(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _fused_blocks(
    nodes: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, slice, bool, torch.Tensor | None, bool, bool]]:
    """(rows, keys, causal, bias, new rows, new keys) per node: its rows against its own keys, then all rows below.

    A long node's own rows go strip by strip against the keys up to the strip's end, the last strip first: `bias`
    [rows, keys] hides what `causal` would, were rows and keys to begin together. New: in no earlier block.
    """
    tree_end = 0
    for begin, end, subtree in nodes.tolist():
        is_root = begin >= tree_end
        tree_end = max(tree_end, subtree)
        strips = max(1, round((end - begin) / _STRIP))
        height = -(-(end - begin) // strips)
        for low in reversed(range(begin, end, height)):
            high, bias = min(low + height, end), None
            if low > begin:
                bias = torch.full((high - low, high - begin), _NEG_INF, dtype=dtype).triu_(1 + low - begin)
            yield slice(low, high), slice(begin, high), bias is None, bias, is_root, high == end
        if end < subtree:
            yield slice(end, subtree), slice(begin, end), False, None, is_root, False


def _fused_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, nodes: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [T, Hq, D] and log-sum-exp [T, Hq] in the compute dtype, merged block by block."""
    T, Hq, D = q.shape
    Hkv = k.shape[1]
    out = torch.empty((T, Hq, D), dtype=wide_dtype(q))
    lse = torch.empty((T, Hq), dtype=wide_dtype(q))
    to_out, to_lse = _by_head(out, Hkv), _by_head(lse, Hkv)
    queries = _rows_in_memory(_by_head(q, Hkv))
    keys, values = (_rows_in_memory(_by_head(x, Hkv)).expand(-1, Hq // Hkv, -1, -1) for x in (k, v))
    for rows, at, causal, bias, new_rows, _ in _fused_blocks(nodes, queries.dtype):
        block_out, block_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries[:, :, rows], keys[:, :, at], values[:, :, at], 0.0, causal, attn_mask=bias, scale=scale
        )
        if new_rows:
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
    grads = [torch.empty(x.shape, dtype=wide_dtype(x)) for x in (q, k, v)]
    to_q, *to_kv = (_by_head(grad, Hkv) for grad in grads)
    upstream, queries, output, row_lse = (_rows_in_memory(_by_head(x, Hkv)) for x in (grad_out, q, out, lse))
    keys, values = (_rows_in_memory(_by_head(x, Hkv)).expand(-1, Hq // Hkv, -1, -1) for x in (k, v))
    for rows, at, causal, bias, new_rows, new_keys in _fused_blocks(nodes, queries.dtype):
        grad_q, *grad_kv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            upstream[:, :, rows],
            queries[:, :, rows],
            keys[:, :, at],
            values[:, :, at],
            output[:, :, rows],
            row_lse[:, :, rows].contiguous(),
            0.0,
            causal,
            attn_mask=bias,
            scale=scale,
        )
        if new_rows:
            to_q[:, :, rows] = grad_q
        else:
            to_q[:, :, rows] += grad_q
        for to, grad in zip(to_kv, grad_kv, strict=True):
            if new_keys:
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
