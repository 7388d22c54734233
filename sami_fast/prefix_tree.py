"""Groups of prompts and responses as packed prefix trees.

The C x R sequences `prompt j + response k` of a group form a trie over token ids. `pack` lays the tries of many groups
end to end in depth-first preorder, without padding, so that every distinct prefix is encoded once (a response's last
token predicts nothing and is not encoded). In that order token `i` may attend to token `n` exactly when
`n <= i < subtree_end[n]`: the whole mask is one integer per key.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import numpy as np
import torch

from sami_fast.tile_plan import positions


@dataclass(frozen=True)
class Group:
    """One query: C prompts, R responses, and which prompt each response belongs to.

    Args:
        prompts: C sequences of token ids; prompt j holds constitution j and the query, in either order.
        responses: R sequences of token ids, each scored under every prompt.
        positives: [R] int; response k was sampled under prompt `positives[k]`. None means response k under prompt k.
        mask: [C, R] bool; score only the pairs that are True. None scores all.
        id: name of the group in logs and error messages.

    Raises:
        ValueError: empty prompt or response, no prompts, negative ids, positives or mask of the wrong shape or range,
            a prompt without a positive response, a mask that names no pair.
    """

    prompts: Sequence[Sequence[int]]
    responses: Sequence[Sequence[int]]
    positives: Sequence[int] | None = None
    mask: Sequence[Sequence[bool]] | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        name = "group" if self.id is None else f"group {self.id!r}"
        prompts = tuple(_token_ids(p, f"{name}: prompts[{j}]") for j, p in enumerate(self.prompts))
        responses = tuple(_token_ids(r, f"{name}: responses[{k}]") for k, r in enumerate(self.responses))
        if not prompts:
            raise ValueError(f"{name}: prompts: expected at least one constitution's prompt, got none")
        if not responses:
            raise ValueError(f"{name}: responses: expected at least one response, got none")
        C, R = len(prompts), len(responses)
        if self.positives is None and C != R:
            raise ValueError(f"{name}: positives: required when {C} prompts meet {R} responses, got None")
        positives = np.asarray(range(R) if self.positives is None else self.positives)
        if positives.shape != (R,) or positives.dtype.kind not in "iu":
            raise ValueError(
                f"{name}: positives: expected {R} integers, one per response, got {positives.dtype} {positives.shape}"
            )
        if ((positives < 0) | (positives >= C)).any():
            raise ValueError(f"{name}: positives: expected prompt indices in [0, {C}), got {positives.tolist()}")
        if missing := sorted(set(range(C)) - set(positives.tolist())):
            raise ValueError(f"{name}: positives: prompt {missing[0]} has no response of its own")
        mask = None
        if self.mask is not None:
            mask = np.asarray(self.mask)
            if mask.shape != (C, R) or mask.dtype != bool:
                raise ValueError(f"{name}: mask: expected bool [{C}, {R}], got {mask.dtype} {list(mask.shape)}")
            if not mask.any():
                raise ValueError(f"{name}: mask: expected at least one pair to score, got none")
        object.__setattr__(self, "prompts", prompts)
        object.__setattr__(self, "responses", responses)
        object.__setattr__(self, "positives", positives.astype(np.int64))
        object.__setattr__(self, "mask", mask)

    @property
    def shape(self) -> tuple[int, int]:
        """(C, R)."""
        return len(self.prompts), len(self.responses)


def _token_ids(ids: Sequence[int], name: str) -> np.ndarray:
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name}: expected a flat sequence of integer token ids, got {array.dtype} {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name}: expected at least one token, got an empty sequence")
    if array.min() < 0 or array.max() >= 2**31:
        raise ValueError(f"{name}: expected token ids in [0, 2^31), got {array.min()}..{array.max()}")
    return array.astype(np.int64)


@dataclass(frozen=True)
class AttentionPlan:
    """What attention needs to know of a pack; built once, shared by every layer and both passes.

    Attributes:
        subtree_end: [T] int32, one past the last packed index below each token's node.
        position_ids: [T] int32, depth of each token in its tree.
        nodes: [M, 3] int32 on the CPU: start, end and subtree_end of each maximal run of equal `subtree_end`.
    """

    subtree_end: torch.Tensor
    position_ids: torch.Tensor
    nodes: torch.Tensor

    @classmethod
    def build(cls, subtree_end: np.ndarray, position_ids: np.ndarray) -> AttentionPlan:
        """Plan for packed arrays ([T] integers each).

        Raises:
            ValueError: when the subtrees do not nest, i.e. the arrays are no depth-first preorder, or a position is not
                the depth that they give.
        """
        subtree_end, position_ids = np.asarray(subtree_end), np.asarray(position_ids)
        T = len(subtree_end)
        if T == 0 or position_ids.shape != (T,):
            raise ValueError(f"position_ids: expected [{T}] with T > 0 as subtree_end, got {list(position_ids.shape)}")
        start = np.flatnonzero(np.r_[True, subtree_end[1:] != subtree_end[:-1]])
        nodes = np.stack([start, np.r_[start[1:], T], subtree_end[start]], axis=1)
        enclosing: list[int] = [T]
        for begin, end, subtree in nodes.tolist():
            while begin >= enclosing[-1]:
                enclosing.pop()
            if not end <= subtree <= enclosing[-1]:
                raise ValueError(
                    f"subtree_end: expected nested subtrees, got [{begin}, {subtree}) for the node [{begin}, {end}) "
                    f"inside a subtree that ends at {enclosing[-1]}"
                )
            enclosing.append(subtree)
        depth = positions(nodes)
        if wrong := np.flatnonzero(depth != position_ids)[:1].tolist():
            raise ValueError(
                f"position_ids: expected the depth of each token in its tree, {depth[wrong[0]]} for token {wrong[0]}, "
                f"got {position_ids[wrong[0]]}"
            )
        return cls(
            torch.from_numpy(subtree_end.astype(np.int32)),
            torch.from_numpy(position_ids.astype(np.int32)),
            torch.from_numpy(nodes.astype(np.int32)),
        )

    @property
    def device(self) -> torch.device:
        return self.subtree_end.device

    def to(self, device: torch.device | str) -> AttentionPlan:
        """The plan with its per-token arrays on `device`; `nodes` stays on the host, which walks it."""
        return replace(
            self,
            subtree_end=self.subtree_end.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class PackedTree:
    """The prefix trees of B groups in one pack of T tokens with N scored tokens in S = sum(C * R) pairs.

    Attributes:
        input_ids, position_ids: [T] int64.
        hidden_index: [N] int64, packed index of the token whose hidden state predicts the scored token.
        labels: [N] int64, the scored token.
        sequence: [N] int64, pair of the scored token: pairs are numbered group by group, `j * R + k` within a group.
        offsets: [S + 1] int64, scored tokens of pair s are `offsets[s]:offsets[s + 1]` (none: the pair is masked).
        positives: [sum(R)] int64, the groups' positives end to end.
        plan: the attention plan; `plan.subtree_end` is the mask.
        shapes: (C, R) of each group.
        ids: name of each group, None where it has none.
        whole_tokens: tokens of every scored sequence run by itself.
        max_token_id, max_length: largest token id and longest sequence, host integers for checks without a sync.
        unscored_positive: (group, prompt, response) of a positive pair that a mask leaves out, else None.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    hidden_index: torch.Tensor
    labels: torch.Tensor
    sequence: torch.Tensor
    offsets: torch.Tensor
    positives: torch.Tensor
    plan: AttentionPlan
    shapes: tuple[tuple[int, int], ...]
    ids: tuple[str | None, ...]
    whole_tokens: int
    max_token_id: int
    max_length: int
    unscored_positive: tuple[int, int, int] | None

    @property
    def subtree_end(self) -> torch.Tensor:
        """[T] int32."""
        return self.plan.subtree_end

    @property
    def num_tokens(self) -> int:
        """T, tokens that are encoded."""
        return self.input_ids.numel()

    @property
    def token_ratio(self) -> float:
        """How many times fewer tokens the tree holds than the whole sequences."""
        return self.whole_tokens / self.num_tokens

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    def group_name(self, index: int) -> str:
        """What to call group `index` of this pack in a message."""
        return repr(self.ids[index]) if self.ids[index] is not None else f"number {index} of the pack"

    def _map(self, move, plan: AttentionPlan) -> PackedTree:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, plan=plan, **{name: move(t) for name, t in tensors.items() if isinstance(t, torch.Tensor)})

    def to(self, device: torch.device | str) -> PackedTree:
        """The same pack on `device`."""
        return self._map(lambda t: t.to(device, non_blocking=True), self.plan.to(device))

    def pin_memory(self) -> PackedTree:
        """The same pack in page-locked memory, so that `.to` overlaps with compute."""
        plan = replace(
            self.plan,
            subtree_end=self.plan.subtree_end.pin_memory(),
            position_ids=self.plan.position_ids.pin_memory(),
        )
        return self._map(torch.Tensor.pin_memory, plan)


@dataclass(frozen=True)
class _Tree:
    """One group's trie, packed from index 0; numpy counterparts of PackedTree's tensors."""

    group: Group
    input_ids: np.ndarray
    position_ids: np.ndarray
    subtree_end: np.ndarray
    hidden_index: np.ndarray
    labels: np.ndarray
    pair_tokens: np.ndarray  # [C * R], 0 where masked
    whole_tokens: int
    max_length: int


def pack(groups: Iterable[Group], *, max_tokens: int | None = None) -> PackedTree:
    """Pack the prefix trees of `groups` end to end; the order of groups, prompts and responses is kept.

    Raises:
        ValueError: no groups, or more than `max_tokens` packed tokens.
    """
    trees = [_build_tree(group) for group in groups]
    if not trees:
        raise ValueError("groups: expected at least one group, got none")
    total = sum(len(tree.input_ids) for tree in trees)
    if max_tokens is not None and total > max_tokens:
        raise ValueError(f"max_tokens: {len(trees)} groups pack to {total} tokens, over the budget of {max_tokens}")
    return _concatenate(trees)


def pack_within(groups: Iterable[Group], max_tokens: int) -> list[PackedTree]:
    """As few packs as filling in order gives, none above `max_tokens` tokens; the order of groups is kept.

    Raises:
        ValueError: no groups, or one group alone is above `max_tokens` (it is named).
    """
    bins: list[list[_Tree]] = []
    filled = max_tokens
    for index, group in enumerate(groups):
        tree = _build_tree(group)
        size = len(tree.input_ids)
        if size > max_tokens:
            name = repr(group.id) if group.id is not None else f"number {index}"
            raise ValueError(f"max_tokens: group {name} alone packs to {size} tokens, over the budget of {max_tokens}")
        if filled + size > max_tokens:
            bins.append([])
            filled = 0
        bins[-1].append(tree)
        filled += size
    if not bins:
        raise ValueError("groups: expected at least one group, got none")
    return [_concatenate(trees) for trees in bins]


def _concatenate(trees: list[_Tree]) -> PackedTree:
    sizes = np.array([len(tree.input_ids) for tree in trees])
    base = np.r_[0, np.cumsum(sizes)[:-1]]
    if sizes.sum() >= 2**31:
        raise ValueError(f"groups: expected fewer than 2^31 packed tokens, got {sizes.sum()}")
    position_ids = np.concatenate([tree.position_ids for tree in trees])
    subtree_end = np.concatenate([tree.subtree_end + b for tree, b in zip(trees, base, strict=True)])
    hidden_index = np.concatenate([tree.hidden_index + b for tree, b in zip(trees, base, strict=True)])
    pair_tokens = np.concatenate([tree.pair_tokens for tree in trees])
    return PackedTree(
        input_ids=torch.from_numpy(np.concatenate([tree.input_ids for tree in trees])),
        position_ids=torch.from_numpy(position_ids),
        hidden_index=torch.from_numpy(hidden_index),
        labels=torch.from_numpy(np.concatenate([tree.labels for tree in trees])),
        sequence=torch.from_numpy(np.repeat(np.arange(len(pair_tokens)), pair_tokens)),
        offsets=torch.from_numpy(np.r_[0, np.cumsum(pair_tokens)]),
        positives=torch.from_numpy(np.concatenate([tree.group.positives for tree in trees])),
        plan=AttentionPlan.build(subtree_end, position_ids),
        shapes=tuple(tree.group.shape for tree in trees),
        ids=tuple(tree.group.id for tree in trees),
        whole_tokens=sum(tree.whole_tokens for tree in trees),
        max_token_id=max(int(max(tree.input_ids.max(), tree.labels.max())) for tree in trees),
        max_length=max(tree.max_length for tree in trees),
        unscored_positive=_unscored_positive([tree.group for tree in trees]),
    )


def _unscored_positive(groups: list[Group]) -> tuple[int, int, int] | None:
    for index, group in enumerate(groups):
        if group.mask is not None:
            hidden = np.flatnonzero(~group.mask[group.positives, np.arange(len(group.responses))])
            if hidden.size:
                return index, int(group.positives[hidden[0]]), int(hidden[0])
    return None


def _build_tree(group: Group) -> _Tree:
    C, R = group.shape
    scored = range(C * R) if group.mask is None else np.flatnonzero(group.mask).tolist()
    # Big-endian bytes compare as token ids do, so that C's memcmp sorts whole sequences. The last token of a response
    # predicts nothing and no one attends to it: it is a label, never an input.
    prompts = [p.astype(">i4").tobytes() for p in group.prompts]
    responses = [r[:-1].astype(">i4").tobytes() for r in group.responses]
    pairs = list(scored)
    sequences = [prompts[pair // R] + responses[pair % R] for pair in pairs]
    order, shared = _depth_first_order(sequences)

    chunks: list[bytes] = []  # tokens that each sequence adds to the pack
    chunk_rows: list[tuple[int, int]] = []  # (length, depth of its first token)
    runs: list[tuple[int, int, int]] = []  # (packed start, length, subtree_end) of finished runs
    spans: list[tuple[int, int, int, int]] = []  # (pair, depth, packed start, length) of predicting tokens
    path: list[list[int]] = []  # current root-to-leaf path: [depth begin, depth end, packed start] without gaps
    total = 0

    def close(depth: int) -> None:
        while path and path[-1][1] > depth:
            begin, end, start = path[-1]
            cut = max(begin, depth)
            runs.append((start + cut - begin, end - cut, total))
            if cut == begin:
                path.pop()
            else:
                path[-1][1] = cut

    for index, common in zip(order, shared, strict=True):
        close(common)
        length = len(sequences[index]) // 4
        if length > common:
            chunks.append(sequences[index][4 * common :])
            chunk_rows.append((length - common, common))
            path.append([common, length, total])
            total += length - common
        first = len(prompts[pairs[index] // R]) // 4 - 1
        for begin, end, start in reversed(path):
            low, high = max(begin, first), min(end, length)
            if low < high:
                spans.append((pairs[index], low, start + low - begin, high - low))
            if begin <= first:
                break
    close(0)

    chunk_length, chunk_depth = np.array(chunk_rows).T
    _, run_length, run_end = np.array(sorted(runs)).T
    span_start, span_length = np.array(sorted(spans)).T[2:]
    pair_tokens = np.zeros(C * R, dtype=np.int64)
    pair_tokens[pairs] = [len(group.responses[pair % R]) for pair in pairs]
    return _Tree(
        group=group,
        input_ids=np.frombuffer(b"".join(chunks), dtype=">i4").astype(np.int64),
        position_ids=_ranges(chunk_depth, chunk_length),
        subtree_end=np.repeat(run_end, run_length),
        hidden_index=_ranges(span_start, span_length),
        labels=np.concatenate([group.responses[pair % R] for pair in pairs]),
        pair_tokens=pair_tokens,
        whole_tokens=sum(map(len, sequences)) // 4 + len(sequences),
        max_length=max(map(len, sequences)) // 4 + 1,
    )


def _ranges(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """`start[i], ..., start[i] + length[i] - 1` for every i, end to end."""
    end = np.cumsum(length)
    return np.arange(end[-1]) + np.repeat(start - (end - length), length)


def _depth_first_order(sequences: list[bytes]) -> tuple[list[int], list[int]]:
    """Order along the trie, children by first appearance, and how many tokens each shares with the one before."""
    order = np.array(sorted(range(len(sequences)), key=sequences.__getitem__))
    tokens = [np.frombuffer(sequences[index], dtype=np.int32) for index in order]
    common = np.array([0] + [_common_prefix(a, b) for a, b in pairwise(tokens)])
    result: list[int] = []
    shared: list[int] = []
    stack = [(0, len(sequences), 0)]
    while stack:
        low, high, before = stack.pop()
        if high - low == 1:
            result.append(int(order[low]))
            shared.append(before)
            continue
        inner = common[low + 1 : high]
        branch = int(inner.min())
        cuts = [low, *(np.flatnonzero(inner == branch) + low + 1).tolist(), high]
        children = sorted((int(order[a:b].min()), a, b) for a, b in pairwise(cuts))
        entries = [(a, b, before if i == 0 else branch) for i, (_, a, b) in enumerate(children)]
        stack.extend(reversed(entries))
    return result, shared


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    size = min(len(a), len(b))
    differs = a[:size] != b[:size]
    first = int(differs.argmax())
    return first if differs[first] else size
