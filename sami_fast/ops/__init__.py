"""The ops: validation, choice of a backend, and registration with `torch.library`."""

from sami_fast.ops.attention import prefix_attention
from sami_fast.ops.dispatch import backend_for, backends
from sami_fast.ops.head import linear_kl, linear_logprob
from sami_fast.ops.infonce import segment_infonce

__all__ = ["backend_for", "backends", "linear_kl", "linear_logprob", "prefix_attention", "segment_infonce"]
