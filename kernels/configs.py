"""Frozen launch configurations of the Triton kernels.

They were chosen from what the compiler reports for sm_90 and sm_80 (registers, spills, shared memory, matrix
instructions), which `python -m benchmarks.aot` prints and checks. Nothing is searched at run time; to search, put other
launches into the tables.
"""

from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class Launch:
    """One program: tiles of `block_rows` rows by `block_keys` keys, `num_warps` warps, `num_stages` loads in flight."""

    block_rows: int
    block_keys: int
    num_warps: int
    num_stages: int


# (loads, pass, head size padded to a power of two) -> Launch. Head size 256 computes dK and dV in two launches.
#
# Tensor descriptors: 16-bit types on sm_90 and sm_100, up to 227 KB of shared memory. Three stages, as with two the
# compiler cannot keep matrix instructions in flight; 128 keys to dK/dV, as eight warps take 16 keys each.
# Pointers: every other machine and layout; within the 99 KB of sm_86, sm_89 and sm_120.
PREFIX_ATTENTION: dict[tuple[str, str, int], Launch] = {
    ("descriptors", "forward", 64): Launch(128, 128, 8, 3),
    ("descriptors", "forward", 128): Launch(128, 128, 8, 3),
    ("descriptors", "forward", 256): Launch(128, 32, 8, 3),
    ("descriptors", "grad_q", 64): Launch(128, 64, 8, 3),
    ("descriptors", "grad_q", 128): Launch(128, 64, 8, 3),
    ("descriptors", "grad_q", 256): Launch(128, 32, 8, 3),
    ("descriptors", "grad_kv", 64): Launch(64, 128, 8, 3),
    ("descriptors", "grad_kv", 128): Launch(64, 128, 8, 3),
    ("descriptors", "grad_k", 256): Launch(32, 128, 8, 3),
    ("descriptors", "grad_v", 256): Launch(32, 128, 8, 3),
    ("pointers", "forward", 64): Launch(128, 64, 8, 3),
    ("pointers", "forward", 128): Launch(128, 32, 8, 3),
    ("pointers", "forward", 256): Launch(64, 32, 8, 2),
    ("pointers", "grad_q", 64): Launch(128, 64, 8, 2),
    ("pointers", "grad_q", 128): Launch(64, 64, 8, 2),
    ("pointers", "grad_q", 256): Launch(32, 32, 4, 2),
    ("pointers", "grad_kv", 64): Launch(32, 128, 8, 2),
    ("pointers", "grad_kv", 128): Launch(32, 64, 4, 2),
    ("pointers", "grad_k", 256): Launch(16, 64, 8, 2),
    ("pointers", "grad_v", 256): Launch(32, 64, 8, 2),
    ("float32", "forward", 64): Launch(64, 32, 8, 2),
    ("float32", "forward", 128): Launch(32, 16, 8, 2),
    ("float32", "forward", 256): Launch(32, 16, 8, 2),
    ("float32", "grad_q", 64): Launch(64, 32, 8, 2),
    ("float32", "grad_q", 128): Launch(32, 16, 8, 2),
    ("float32", "grad_q", 256): Launch(32, 16, 8, 2),
    ("float32", "grad_kv", 64): Launch(32, 64, 8, 2),
    ("float32", "grad_kv", 128): Launch(16, 32, 8, 2),
    ("float32", "grad_k", 256): Launch(16, 32, 8, 2),
    ("float32", "grad_v", 256): Launch(16, 32, 8, 2),
}
# A soft-cap keeps one more tile of scores in registers.
PREFIX_ATTENTION_CAPPED: dict[tuple[str, str, int], Launch] = {
    ("descriptors", "forward", 64): Launch(128, 64, 8, 3),
    ("descriptors", "forward", 128): Launch(128, 64, 8, 3),
    ("descriptors", "grad_kv", 128): Launch(32, 128, 8, 3),
}


# Before Triton 3.9 the compiler needs more registers, and would spill.
OLDER_COMPILER = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
PREFIX_ATTENTION_OLDER: dict[tuple[str, str, int], Launch] = {
    ("descriptors", "grad_kv", 128): Launch(32, 128, 8, 3),
    ("descriptors", "grad_q", 256): Launch(64, 32, 8, 3),
    ("descriptors", "grad_k", 256): Launch(32, 64, 8, 3),
    ("pointers", "forward", 256): Launch(64, 16, 8, 3),
    ("pointers", "grad_q", 64): Launch(128, 32, 8, 3),
    ("float32", "grad_q", 256): Launch(16, 32, 8, 2),
}
# With a soft-cap, or where a tile does not begin with the first head of a token.
PREFIX_ATTENTION_OLDER_TIGHT: dict[tuple[str, str, int], Launch] = {
    ("descriptors", "forward", 128): Launch(128, 64, 8, 3),
    ("descriptors", "grad_kv", 128): Launch(32, 128, 8, 2),
}


def prefix_attention(loads: str, name: str, head_dim: int, capped: bool, group: int) -> Launch:
    """Configuration of a pass: `head_dim` the larger of q's and v's, `group` query heads to a KV head."""
    key = loads, name, next(size for size in (64, 128, 256) if head_dim <= size)
    tables = [PREFIX_ATTENTION]
    if capped:
        tables.append(PREFIX_ATTENTION_CAPPED)
    if OLDER_COMPILER:
        tables.append(PREFIX_ATTENTION_OLDER)
        if capped or group & (group - 1):
            tables.append(PREFIX_ATTENTION_OLDER_TIGHT)
    return next(table[key] for table in reversed(tables) if key in table)


@dataclass(frozen=True)
class LogitBlocks:
    """Blocks of logits: at most `rows` rows, `columns` columns (a power of two) and `elements` numbers.

    A program holds a row of a block in its registers: a warp for `columns_per_warp` of them, and at most `warps`.
    """

    rows: int
    columns: int
    elements: int
    columns_per_warp: int
    warps: int


# At most 128 MB of float32 logits. Blocks are about twice as wide as they are high: both sums that a block adds to,
# over columns and over rows, weigh little beside its GEMMs then.
LINEAR_LOGPROB = LogitBlocks(4096, 16384, 1 << 25, columns_per_warp=1024, warps=16)
# Rows of two blocks share the registers.
LINEAR_STATISTICS = LogitBlocks(4096, 8192, 1 << 25, columns_per_warp=512, warps=8)
