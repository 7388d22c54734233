"""Prefix-tree attention on flash-attn: keys and values gathered along every path, then its variable-length kernels.

A *run* is a longest stretch of packed tokens whose positions go up by one. It lies on one path from a root, and its
queries see the tokens of that path before it and, causally, the run itself. Runs are therefore the sequences of one
variable-length call, its causal masks aligned bottom right, and each brings its own copy of the keys and values it
sees. Copies grow with the number of branches, in memory and in traffic; the backward gathers anew and sums the
gradients of the copies in a fixed order, in float32.

flash-attn is deterministic in its own backward only under `torch.use_deterministic_algorithms(True)`.
"""

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.nn.functional import embedding_bag

from sami_fast.ops.dispatch import expect
from sami_fast.tile_plan import DevicePlan, device_plan, positions

_MAX_HEAD_DIM = 256
_expect = functools.partial(expect, backend="flash")

# --------------------------------------------------------------------------------------------------------------------
# Gather


@dataclass(frozen=True)
class Gather:
    """Which keys each of S runs of T packed tokens brings to a variable-length call; K of them in all.

    Attributes:
        window: of that call; None when no path is longer.
        index: [K] int64, the packed token of every gathered row.
        copies: [K] int64, the gathered rows of token 0, then of token 1, and so on.
        first_copy: [T] int64, where the rows of each token begin in `copies`.
        query_offsets, key_offsets: [S + 1] int32, where the queries and the gathered rows of each run begin.
        max_queries, max_keys: of any run.
    """

    window: int | None
    index: torch.Tensor
    copies: torch.Tensor
    first_copy: torch.Tensor
    query_offsets: torch.Tensor
    key_offsets: torch.Tensor
    max_queries: int
    max_keys: int

    @classmethod
    def build(cls, position: np.ndarray, window: int | None, device: torch.device) -> "Gather":
        """From the position of every packed token, [T]."""
        T = len(position)
        first = np.flatnonzero(np.r_[True, np.diff(position) != 1])
        length = np.diff(np.r_[first, T])
        depth = position[first]
        nearest = np.zeros_like(depth) if window is None else np.maximum(depth - window + 1, 0)
        above = depth - nearest  # ancestors that a run's first token sees
        queries, keys = np.r_[0, np.cumsum(length)], np.r_[0, np.cumsum(above + length)]
        run = np.repeat(np.arange(len(first)), above + length)
        offset = np.arange(keys[-1]) - keys[run]  # within the run's keys
        # In the order of the pack, the last token at a position that comes before a run is the run's own ancestor.
        by_position = np.argsort(position, kind="stable")
        order = position[by_position] * T + by_position
        before = first[run] + np.maximum(offset - above[run], 0)
        index = by_position[np.searchsorted(order, (nearest[run] + offset) * T + before, side="right") - 1]
        counts = np.bincount(index, minlength=T)

        def move(array: np.ndarray, dtype: type = np.int64) -> torch.Tensor:
            return torch.from_numpy(array.astype(dtype)).to(device)

        return cls(
            window,
            move(index),
            move(np.argsort(index, kind="stable")),
            move(np.cumsum(counts) - counts),
            move(queries, np.int32),
            move(keys, np.int32),
            int(length.max()),
            int(np.diff(keys).max()),
        )

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """[T, ...] -> [K, ...]: a copy for every run that sees the token."""
        return x.index_select(0, self.index)

    def sum(self, rows: torch.Tensor) -> torch.Tensor:
        """[K, ...] -> [T, ...]: the copies of each token added up, in order and in at least float32."""
        summed = embedding_bag(self.copies, rows.flatten(1), self.first_copy, mode="sum")
        return summed.view(-1, *rows.shape[1:])


_gathers: WeakKeyDictionary[DevicePlan, dict[int | None, Gather]] = WeakKeyDictionary()


def gather_for(nodes: torch.Tensor, window: int | None, device: torch.device) -> Gather:
    """The one gather of these nodes (`AttentionPlan.nodes`) on `device`, made at first use."""
    plan = device_plan(nodes, device)
    if window is not None and window > plan.max_position:
        window = None
    by_window = _gathers.setdefault(plan, {})
    if window not in by_window:
        by_window[window] = Gather.build(positions(nodes.numpy()), window, device)
    return by_window[window]


# --------------------------------------------------------------------------------------------------------------------
# flash-attn


@dataclass(frozen=True)
class Library:
    """Variable-length attention over gathered keys, causal and aligned bottom right, and what it takes.

    Attributes:
        forward: (q, gathered k, gathered v, gather, scale, softcap or 0.0) -> out [T, Hq, D], lse [T, Hq] float32.
        backward: (grad_out, q, gathered k, gathered v, out, lse, gather, scale, softcap or 0.0) -> their gradients.
    """

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    device_type: str = "cuda"
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)


def _lengths(gather: Gather) -> dict:
    return dict(
        cu_seqlens_q=gather.query_offsets,
        cu_seqlens_k=gather.key_offsets,
        max_seqlen_q=gather.max_queries,
        max_seqlen_k=gather.max_keys,
    )


def _window(gather: Gather) -> dict:
    """Keys to the left of a query that it sees beside its own; all of them when negative."""
    return dict(window_size_left=-1 if gather.window is None else gather.window - 1, window_size_right=0)


def _flash_2(flash: ModuleType) -> Library:
    def forward(q, k, v, gather, scale, softcap):
        options = dict(dropout_p=0.0, softmax_scale=scale, causal=True, softcap=softcap)
        out, lse, *_ = flash._flash_attn_varlen_forward(q, k, v, **_lengths(gather), **_window(gather), **options)
        return out, lse.t().contiguous()

    def backward(grad_out, q, k, v, out, lse, gather, scale, softcap):
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        options = dict(dropout_p=0.0, softmax_scale=scale, causal=True, softcap=softcap, alibi_slopes=None)
        options |= _lengths(gather) | _window(gather) | dict(deterministic=torch.are_deterministic_algorithms_enabled())
        flash._flash_attn_varlen_backward(grad_out, q, k, v, out, lse.t().contiguous(), *grads, **options)
        return grads

    return Library(forward, backward)


def _flash_3(flash: ModuleType) -> Library:
    def forward(q, k, v, gather, scale, softcap):
        options = dict(softmax_scale=scale, causal=True, softcap=softcap)
        out, lse, *_ = flash._flash_attn_forward(q, k, v, **_lengths(gather), **_window(gather), **options)
        return out, lse.t().contiguous()

    def backward(grad_out, q, k, v, out, lse, gather, scale, softcap):
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        options = dict(softmax_scale=scale, is_causal=True, softcap=softcap, dq=dq, dk=dk, dv=dv)
        options |= _lengths(gather) | _window(gather) | dict(deterministic=torch.are_deterministic_algorithms_enabled())
        flash._flash_attn_backward(grad_out, q, k, v, out, lse.t().contiguous(), **options)
        return dq, dk, dv

    return Library(forward, backward)


def _flash_4(flash: ModuleType) -> Library:
    def window(gather):
        return {} if gather.window is None else _window(gather)

    def forward(q, k, v, gather, scale, softcap):
        options = dict(softmax_scale=scale, causal=True, softcap=softcap, return_lse=True)
        out, lse, *_ = flash._flash_attn_fwd(q, k, v, **_lengths(gather), **window(gather), **options)
        return out, lse.t().contiguous()

    def backward(grad_out, q, k, v, out, lse, gather, scale, softcap):
        options = dict(softmax_scale=scale, causal=True, softcap=softcap) | _lengths(gather) | window(gather)
        options |= dict(deterministic=torch.are_deterministic_algorithms_enabled())
        return flash._flash_attn_bwd(q, k, v, out, grad_out, lse.t().contiguous(), **options)

    return Library(forward, backward)


# Version -> package, module, what makes a library of it, and compute capabilities (major) that it is built for; best
# first where several serve a device.
LIBRARIES = {
    3: ("flash-attn-3", "flash_attn_interface", _flash_3, (9,)),
    4: ("flash-attn-4", "flash_attn.cute.interface", _flash_4, (9, 10, 11)),
    2: ("flash-attn", "flash_attn.flash_attn_interface", _flash_2, (8, 9, 10, 12)),
}


def installed() -> list[int]:
    """Versions of flash-attn that are installed, best first; nothing of them is imported."""
    found = []
    for version, (package, *_) in LIBRARIES.items():
        with suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.distribution(package)
            found.append(version)
    return found


@functools.cache
def load(version: int) -> Library:
    """flash-attn 2, 3 or 4.

    Raises:
        ImportError: it is not installed, or was built for another PyTorch.
    """
    _, module, adapt, _ = LIBRARIES[version]
    return adapt(importlib.import_module(module))


def best(device: torch.device) -> Library:
    """The best flash-attn that is installed for `device`.

    Raises:
        ValueError: there is none.
    """
    versions = installed()
    _expect(
        bool(versions),
        "backend",
        "flash-attn to be installed (pip install flash-attn --no-build-isolation; or flash-attn-4)",
        "no such package",
    )
    _expect(device.type == "cuda", "q", "CUDA tensors", f"a tensor on {device}")
    major, _ = torch.cuda.get_device_capability(device)
    serving = [version for version in versions if major in LIBRARIES[version][3]]
    names = [LIBRARIES[version][0] for version in versions]
    _expect(bool(serving), "backend", f"a flash-attn for compute capability {major}.x", ", ".join(names))
    return load(serving[0])


# --------------------------------------------------------------------------------------------------------------------
# Public functions


def _refuse(q: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, library: Library) -> None:
    """ValueError, by name, for what flash-attn cannot do; shapes and devices agree by now."""
    _expect(q.device.type == library.device_type, "q", f"{library.device_type} tensors", f"a tensor on {q.device}")
    _expect(q.dtype in library.dtypes, "q", f"one of {list(library.dtypes)}", q.dtype)
    D, DV = q.shape[2], v.shape[2]
    _expect(D % 8 == 0 and D <= _MAX_HEAD_DIM, "q", f"head_dim a multiple of 8, at most {_MAX_HEAD_DIM}", D)
    _expect(DV == D, "v", f"head_dim {D} as q has", DV)
    _expect(sinks is None, "sinks", "None", f"a tensor {list(sinks.shape) if sinks is not None else ''}")


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
    library: Library | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [T, Hq, D] and log-sum-exp [T, Hq] in float32; `library` None is the best that is installed.

    Raises:
        ValueError: no flash-attn for the device, or sinks, a device, dtype or head size that it does not take.
    """
    library = library or best(q.device)
    _refuse(q, v, sinks, library)
    gather = gather_for(nodes, window, q.device)
    return library.forward(q, gather.rows(k), gather.rows(v), gather, scale, softcap or 0.0)


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
    library: Library | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and (empty) of sinks. `grad_lse` is taken to be zero: the op refuses any other."""
    library = library or best(q.device)
    gather = gather_for(nodes, window, q.device)
    gathered = gather.rows(k), gather.rows(v)
    grad_q, *grad_kv = library.backward(grad_out.contiguous(), q, *gathered, out, lse, gather, scale, softcap or 0.0)
    return grad_q, *(gather.sum(grad) for grad in grad_kv), q.new_zeros(0)
