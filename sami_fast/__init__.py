"""SAMI and other contrastive alignment over prefix trees: each distinct prefix encoded once, exactly."""

import importlib

from sami_fast.ops import (
    TokenStatistics,
    backends,
    linear_logprob,
    linear_statistics,
    prefix_attention,
    segment_infonce,
)
from sami_fast.prefix_tree import AttentionPlan, Group, PackedTree, pack, pack_within

__version__ = "0.1.0"

# These need transformers, which takes seconds to import: loaded on first use.
_LAZY = {
    "Scores": "scoring",
    "check_model": "scoring",
    "score": "scoring",
    "UnsupportedModelError": "tree_attention",
    "InfoNCE": "losses",
    "infonce_loss": "losses",
    "NonFiniteError": "trainer",
    "SamiConfig": "trainer",
    "SamiTrainer": "trainer",
}

__all__ = [
    "AttentionPlan",
    "Group",
    "PackedTree",
    "TokenStatistics",
    "backends",
    "linear_logprob",
    "linear_statistics",
    "pack",
    "pack_within",
    "prefix_attention",
    "segment_infonce",
    *_LAZY,
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f"sami_fast.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'sami_fast' has no attribute {name!r}")
