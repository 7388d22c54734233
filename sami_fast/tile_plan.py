"""Which tiles of keys each tile of queries visits, and the reverse: the host side of the GPU attention kernels.

A pack is described by its nodes ([M, 3]: start, end, subtree_end; see `AttentionPlan`). A kernel program owns one tile
and walks a flat list of *steps*, blocks of the other side. A step is *full* when every pair in it is visible, so that
it needs no mask, and *partial* otherwise. Everything is vectorised over nodes and tiles; no T x T array exists.

Tiles of queries are counted in *rows*: the `group` query heads of one KV head share a tile, row = token * group + head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(frozen=True)
class TilePlan:
    """Work lists of one kernel.

    Attributes:
        tiles: [num_tiles, 4] int32, one row a program, heaviest first: the tile's first row (of queries) or key, then
            `begin`, `middle`, `end`: `steps[begin:middle]` are full, `steps[middle:end]` partial.
        steps: [num_steps + 1] int32, each step's first key (for tiles of queries) or token (for tiles of keys). Steps
            of one tile do not overlap and cover everything it sees. The last is padding: kernels read one ahead.
    """

    tiles: np.ndarray
    steps: np.ndarray


@dataclass(frozen=True)
class _Forest:
    """What the plans need of the nodes; arrays are [M] unless said otherwise."""

    start: np.ndarray
    end: np.ndarray
    subtree_end: np.ndarray
    depth: np.ndarray  # position of the node's first token
    chain: np.ndarray  # first node of the run of ancestors that lie directly before this node, itself included
    above: np.ndarray  # parent of that first node, -1 for none
    tree_end: np.ndarray
    position: np.ndarray  # [T]

    @classmethod
    def build(cls, nodes: np.ndarray) -> _Forest:
        start, end, subtree_end = nodes.astype(np.int64).T
        M = len(start)
        index = np.arange(M)
        # Nodes before x that are no ancestors of x are those whose subtree ended by then.
        by_end = np.argsort(subtree_end, kind="stable")
        finished = np.searchsorted(subtree_end[by_end], start, side="right")
        level = index - finished
        depth = start - np.r_[0, np.cumsum((end - start)[by_end])][finished]
        # The parent is the last node before x that is one level up.
        by_level = np.argsort(level, kind="stable")
        key = level[by_level] * M + by_level
        before = np.searchsorted(key, (level - 1) * M + index) - 1
        parent = np.where(level > 0, by_level[before], -1)
        chain = np.maximum.accumulate(np.where((level > 0) & (parent == index - 1), 0, index))
        roots = np.flatnonzero(level == 0)
        tree_end = subtree_end[roots][np.searchsorted(roots, index, side="right") - 1]
        position = np.arange(end[-1]) + np.repeat(depth - start, end - start)
        return cls(start, end, subtree_end, depth, chain, parent[chain], tree_end, position)

    def node_of(self, token: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.start, token, side="right") - 1

    def first_below(self, top: np.ndarray, end: np.ndarray) -> np.ndarray:
        """First node of the chain from `top` whose subtree ends before `end` (the node after the chain if none)."""
        T = self.end[-1]
        ordered = self.chain * (T + 1) + T - self.subtree_end  # chains come in order, subtrees shrink along each
        return np.searchsorted(ordered, top * (T + 1) + T - end, side="right")


def positions(nodes: np.ndarray) -> np.ndarray:
    """[T] position of every token in its tree."""
    return _Forest.build(np.asarray(nodes)).position


def _reduce_ranges(function: np.ufunc, values: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """`function.reduce(values[begin[i]:end[i]])` for every i; ranges may overlap but not be empty."""
    edges = np.stack([begin, end], axis=1).reshape(-1)
    return function.reduceat(np.r_[values, values[-1]], edges)[::2]


def _expand(begin: np.ndarray, count: np.ndarray, stride: int, padding: int = 0) -> np.ndarray:
    """int32 `begin[i], begin[i] + stride, ...` (`count[i]` of them) for every i, end to end, then zeros."""
    offset = np.cumsum(count) - count
    values = np.zeros(int(count.sum()) + padding, dtype=np.int32)
    filled = values[: len(values) - padding]
    filled += np.repeat((begin - stride * offset).astype(np.int32), count)  # may wrap around, and back in the sum
    filled += np.arange(0, stride * len(filled), stride, dtype=np.int64).astype(np.int32)
    return values


def _assemble(
    first: np.ndarray, stride: int, pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]
) -> TilePlan:
    """Plan from arithmetic runs of steps, each (tile, first step, number of steps, whether they are full)."""
    tile, begin, count, full = (np.concatenate(columns) for columns in zip(*pieces, strict=True))
    order = np.argsort(2 * tile + ~full, kind="stable")
    steps = _expand(begin[order], count[order], stride, padding=1)
    num_full = np.bincount(tile, weights=count * full, minlength=len(first)).astype(np.int64)
    total = np.bincount(tile, weights=count, minlength=len(first)).astype(np.int64)
    offset = np.cumsum(total) - total
    tiles = np.stack([first, offset, offset + num_full, offset + total], axis=1).astype(np.int32)
    return TilePlan(tiles[np.argsort(-total, kind="stable")], steps)


def query_tiles(nodes: np.ndarray, group: int, block_rows: int, block_keys: int, window: int | None) -> TilePlan:
    """For each tile of `block_rows` rows, the fewest steps of `block_keys` keys that cover all it sees.

    Steps start anywhere (at the first visible key that no earlier step covers), since runs are short and many.
    """
    forest = _Forest.build(nodes)
    T = int(forest.end[-1])
    first = np.arange(0, T * group, block_rows)
    a, b = first // group, np.minimum(-(-(first + block_rows) // group), T)  # tokens [a, b) of each tile
    node = forest.node_of(a)
    if window is not None:
        inside = np.minimum(b, forest.tree_end[node])
        lowest = _reduce_ranges(np.minimum, forest.position, a, inside)
        highest = _reduce_ranges(np.maximum, forest.position, a, b)

    # A tile sees its own tokens and the ancestors of its first one. Going up, those come in runs [low, path_end) of
    # consecutive tokens and positions; keys below `common` are ancestors of all tokens of the tile.
    runs = []  # (tile, low, position of low, high, path_end, common), deepest first
    tile, high, path_end = np.arange(len(a)), b, a + 1
    while len(tile):
        top = forest.chain[node]
        low, position = forest.start[top], forest.depth[top]
        leaves = forest.first_below(top, b[tile])
        common = np.where(leaves > node, path_end, forest.start[np.minimum(leaves, node)])
        if window is not None:
            skip = np.clip(lowest[tile] - window + 1 - position, 0, path_end - low)
            low, position = low + skip, position + skip
        runs.append((tile, low, position, high, path_end, common))
        node = forest.above[node]
        tile, node = tile[node >= 0], node[node >= 0]
        high = path_end = forest.end[node]

    pieces = []
    covered = np.zeros(len(a), dtype=np.int64)
    for tile, low, position, high, path_end, common in reversed(runs):
        skip = np.maximum(covered[tile] - low, 0)
        low, position = low + skip, position + skip
        count = np.maximum(-(-(high - low) // block_keys), 0)
        covered[tile] = np.where(count > 0, low + count * block_keys, covered[tile])
        # Steps [near, far) of the run are full: close enough to all queries, and above all of them.
        far = np.clip((np.minimum(common, path_end) - low) // block_keys, 0, count)
        near = np.zeros_like(far)
        if window is not None:
            near = np.clip(-(-(highest[tile] - window + 1 - position) // block_keys), 0, far)
        pieces += [
            (tile, low + near * block_keys, far - near, np.ones(len(tile), dtype=bool)),
            (tile, low, near, np.zeros(len(tile), dtype=bool)),
            (tile, low + far * block_keys, count - far, np.zeros(len(tile), dtype=bool)),
        ]
    return _assemble(first, block_keys, pieces)


def key_tiles(nodes: np.ndarray, block_tokens: int, block_keys: int, window: int | None) -> TilePlan:
    """For each tile of `block_keys` keys, the aligned steps of `block_tokens` tokens that see any of it.

    Without a window they are one range: from the tile's first token to the end of the widest subtree that it touches.
    """
    forest = _Forest.build(nodes)
    T = int(forest.end[-1])
    first = np.arange(0, T, block_keys)
    n_end = np.minimum(first + block_keys, T)
    touched = forest.node_of(first), forest.node_of(n_end - 1) + 1
    widest, narrowest = (_reduce_ranges(f, forest.subtree_end, *touched) for f in (np.maximum, np.minimum))
    # Blocks [begin, end) of tokens see some of the tile, blocks [low, high) all of it.
    begin, end = first // block_tokens, -(-widest // block_tokens)
    low = np.clip(-(-(n_end - 1) // block_tokens), begin, end)
    high = np.clip(narrowest // block_tokens, low, end)
    tile = np.arange(len(first))
    if window is None:
        some, every = np.zeros(len(tile), dtype=bool), np.ones(len(tile), dtype=bool)
        ranges = [(low, high, every), (begin, low, some), (high, end, some)]
        return _assemble(first, block_tokens, [(tile, x * block_tokens, y - x, full) for x, y, full in ranges])
    edges = np.arange(0, T, block_tokens)
    lowest, highest = (f.reduceat(forest.position, edges) for f in (np.minimum, np.maximum))
    shallowest, deepest = (f.reduceat(forest.position, first) for f in (np.minimum, np.maximum))
    # Which blocks of [begin, end) come near enough, found among superblocks first: most are far from most tiles.
    size = 32
    coarse = np.minimum.reduceat(lowest, np.arange(0, len(lowest), size))
    count = -(-end // size) - begin // size
    at, owner = _expand(begin // size, count, 1), np.repeat(tile, count)
    near = coarse[at] - deepest[owner] < window
    at, owner = at[near] * size, owner[near]
    at, stop = np.maximum(at, begin[owner]), np.minimum(at + size, end[owner])
    block, owner = _expand(at, stop - at, 1), np.repeat(owner, stop - at)
    near = lowest[block] - deepest[owner] < window
    block, owner = block[near].astype(np.int64), owner[near]
    full = (low[owner] <= block) & (block < high[owner]) & (highest[block] - shallowest[owner] < window)
    return _assemble(first, block_tokens, [(owner, block * block_tokens, np.ones_like(block), full)])


class DevicePlan:
    """The tile plans of one pack on one device, made on the host at first use and moved once."""

    def __init__(self, nodes: torch.Tensor, device: torch.device) -> None:
        self._nodes = nodes.numpy().copy()  # a view would keep alive the memory that the plan dies with
        self._device = device
        self._tiles: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}
        start, end, subtree_end = self._nodes.T
        self.num_tokens = int(end[-1])
        self.max_position = int(positions(self._nodes).max())
        (self.subtree_end,) = self._move(np.repeat(subtree_end, end - start))

    def tiles(self, side: str, *shape: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """`tiles`, flat, and `steps` of `query_tiles` or `key_tiles`: side "query" or "key", and their arguments."""
        if (side, *shape) not in self._tiles:
            plan = (query_tiles if side == "query" else key_tiles)(self._nodes, *shape)
            self._tiles[side, *shape] = self._move(plan.tiles.reshape(-1), plan.steps)
        return self._tiles[side, *shape]

    def _move(self, *arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
        # One copy. Every part starts at a multiple of 16 bytes: kernels are specialised on the alignment of pointers.
        sizes = [-(-len(array) // 4) * 4 for array in arrays]
        host = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=self._device.type == "cuda")
        for part, array in zip(host.split(sizes), arrays, strict=True):
            part[: len(array)] = torch.from_numpy(array)
        moved = host.to(self._device, non_blocking=True)
        return tuple(part[: len(array)] for part, array in zip(moved.split(sizes), arrays, strict=True))


# Plans live as long as the memory of the `nodes` they were made from, which the pack, saved tensors and compiled graphs
# all share, whichever tensor object they hold it by.
_plans: dict[int, tuple[StorageWeakRef, dict[torch.device, DevicePlan]]] = {}


def device_plan(nodes: torch.Tensor, device: torch.device) -> DevicePlan:
    """The one plan of these nodes (`AttentionPlan.nodes`, on the host) on `device`."""
    storage = nodes.untyped_storage()
    if storage._cdata not in _plans:
        for key in [key for key, (alive, _) in _plans.items() if alive.expired()]:
            del _plans[key]
        _plans[storage._cdata] = StorageWeakRef(storage), {}
    by_device = _plans[storage._cdata][1]
    if device not in by_device:
        by_device[device] = DevicePlan(nodes, device)
    return by_device[device]
