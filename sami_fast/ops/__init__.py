"""The ops: validation, choice of a backend, and registration with `torch.library`."""

from sami_fast.ops.attention import prefix_attention
from sami_fast.ops.dispatch import backend_for, backends
from sami_fast.ops.infonce import segment_infonce
from sami_fast.ops.logprob import linear_logprob
from sami_fast.ops.statistics import TokenStatistics, linear_statistics

__all__ = [
    "TokenStatistics",
    "backend_for",
    "backends",
    "linear_logprob",
    "linear_statistics",
    "prefix_attention",
    "segment_infonce",
]
