"""SAMI and other contrastive alignment over prefix trees: each distinct prefix encoded once, exactly."""

from sami_fast.ops import backends, linear_kl, linear_logprob, prefix_attention, segment_infonce
from sami_fast.prefix_tree import AttentionPlan, Group, PackedTree, pack, pack_within

__version__ = "0.1.0"
