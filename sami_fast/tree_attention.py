"""The tree as an attention implementation of transformers: registered once, switched on for the duration of a call.

No model class is patched: the name goes into the model's configs, the plan travels as a keyword argument of `forward`,
and both are gone afterwards. Layers that activation checkpointing runs again in a later backward see the same setting.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import AttentionInterface

from sami_fast import ops
from sami_fast.prefix_tree import AttentionPlan

_ATTENTION = "sami_fast"


class UnsupportedModelError(ValueError):
    """The model's architecture cannot be scored exactly over a prefix tree."""


@dataclass
class TreeCall:
    """What travels through `model.forward` to every attention layer, and what the layers leave behind."""

    plan: AttentionPlan
    model_name: str
    backend: str | Callable | None  # of prefix_attention; a function takes its place
    windows: dict[int, int | None] = field(default_factory=dict)  # layer -> its sliding window

    def unsupported(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"model: {self.model_name} cannot be scored over a prefix tree: {reason}")


def _tree_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    prefix_tree: TreeCall | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The attention function registered with transformers: [1, H, T, D] in, [1, T, Hq, Dv] out."""
    if prefix_tree is None:
        raise UnsupportedModelError(
            f"model: {type(module).__name__} dropped the keyword arguments of `forward` on the way to its attention, "
            "so it cannot be scored over a prefix tree"
        )
    if attention_mask is not None:
        raise prefix_tree.unsupported(f"{type(module).__name__} brings an attention mask of its own")
    causal = kwargs.get("is_causal", getattr(module, "is_causal", True))
    if kwargs.get("position_bias") is not None or causal is False:
        raise prefix_tree.unsupported(f"{type(module).__name__} asks for a position bias or for non-causal attention")
    if dropout:
        raise ValueError(
            f"model: attention dropout must be 0 to score exactly, got {dropout} in {type(module).__name__}"
        )
    tokens = prefix_tree.plan.subtree_end.shape[0]
    if query.shape[0] != 1 or query.shape[2] != tokens or key.shape[2] != tokens:
        raise prefix_tree.unsupported(
            f"{type(module).__name__} attends from {query.shape[2]} to {key.shape[2]} tokens, the tree has {tokens}"
        )
    if not torch.compiler.is_compiling():  # what tells layers apart would compile each of them anew
        prefix_tree.windows[getattr(module, "layer_idx", id(module))] = sliding_window
    q, k, v = (autocast(states[0].transpose(0, 1)) for states in (query, key, value))
    attend = prefix_tree.backend
    if not callable(attend):
        attend = functools.partial(ops.prefix_attention, backend=attend)
    out = attend(q, k, v, prefix_tree.plan, scale=scaling, window=sliding_window, softcap=softcap, sinks=s_aux)
    return out[None], None


def autocast(tensor: torch.Tensor) -> torch.Tensor:
    """What autocast does to the inputs of PyTorch's own attention and linear layers, for ops that it does not know."""
    device = tensor.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return tensor.to(torch.get_autocast_dtype(device)) if enabled else tensor


AttentionInterface.register(_ATTENTION, _tree_attention)


@contextlib.contextmanager
def _attention_setting(configs: list) -> Iterator[None]:
    """Every config of the model says `sami_fast` inside and what it said before outside."""
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = _ATTENTION
        yield
    finally:
        for config, setting in zip(configs, before, strict=True):
            config._attn_implementation = setting


def _configs(model: nn.Module) -> list:
    """Distinct configs of the model and its parts, innermost last (setting one sets its sub-configs)."""
    found = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            pending = [config]
            while pending:
                current = pending.pop()
                found.setdefault(id(current), current)
                pending += [sub for name in current.sub_configs if (sub := getattr(current, name, None)) is not None]
    return list(found.values())


def _saving_attention() -> tuple:
    """Contexts of a checkpointed layer in which attention is not computed again."""
    return create_selective_checkpoint_contexts([torch.ops.sami_fast.prefix_attention.default])


@contextlib.contextmanager
def tree_mode(model: nn.Module, keep_attention: bool = False) -> Iterator[None]:
    """Tree attention inside, also when activation checkpointing runs a layer again during a later backward.

    `keep_attention`: such a layer then finds the outputs of its attention kept.
    """
    configs = _configs(model)
    originals: list[tuple[nn.Module, str, Callable]] = []
    for module in model.modules():
        for name in ("_gradient_checkpointing_func", "checkpoint_fn"):
            if callable(original := module.__dict__.get(name)):
                originals.append((module, name, original))

    def in_tree_mode(original: Callable) -> Callable:
        def run(function: Callable, *args, **kwargs):
            if keep_attention:
                kwargs.setdefault("context_fn", _saving_attention)
            if torch.compiler.is_compiling():  # compiled code computes again what it computed, whatever is set by then
                return original(function, *args, **kwargs)

            def layer(*layer_args, **layer_kwargs):
                with _attention_setting(configs):
                    return function(*layer_args, **layer_kwargs)

            return original(layer, *args, **kwargs)

        return run

    try:
        for module, name, original in originals:
            setattr(module, name, in_tree_mode(original))
        with _attention_setting(configs):
            yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)
