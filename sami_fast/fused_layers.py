"""Norms, RoPE, SwiGLU and residuals of the decoder layers fused: by Liger, or by torch.compile layer by layer."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

logger = logging.getLogger(__name__)

# What Liger would put in the place of the head: `score` takes the hidden states in front of it.
_NOT_OF_LIGER = ("cross_entropy", "fused_linear_cross_entropy")


def compile_layers(model: nn.Module, *, backend: str = "inductor", mode: str | None = None) -> int:
    """Compile every decoder layer in place, each kind of layer once for packs of any size; returns their number.

    Sizes of the pack and of its tree are symbols in the compiled code, and nothing in it tells one layer from another:
    all layers of a kind, with or without a sliding window say, share the code for a pass with gradients, and that for
    one without. Activation checkpointing, kept attention included, becomes part of the compiled code. Names of weights
    stay as they are.

    Args:
        model: a causal LM of transformers, with or without PEFT adapters.
        backend, mode: as in `torch.compile`.

    Raises:
        ValueError: the model has no layers of the kind that can be checkpointed.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"model: expected decoder layers to compile, got none in {type(model).__name__}")
    for layer in layers:
        layer.compile(dynamic=True, backend=backend, mode=mode)
    logger.info("%d layers of %s compiled in place by %s", len(layers), type(model).__name__, backend)
    return len(layers)


def liger_options(given: dict[str, Any] | None) -> dict[str, Any]:
    """`liger_kernel_config` of `TrainingArguments` for models that `score` runs: no losses.

    Raises:
        ValueError: one of Liger's losses is asked for.
    """
    given = given or {}
    for name in _NOT_OF_LIGER:
        if value := given.get(name):
            what = f"expected no {name}, as it takes the place of the scored head, got {value!r}"
            raise ValueError(f"liger_kernel_config: {what}")
    return dict.fromkeys(_NOT_OF_LIGER, False) | given


def apply_liger(model: nn.Module, options: dict[str, Any]) -> None:
    """Liger's kernels into the layers of a model, in place, through transformers' integration.

    Raises:
        ImportError: liger-kernel is not installed.
        ValueError: a model on the CPU, or of a type that Liger has no kernels for.
    """
    from transformers.integrations.liger import apply_liger_kernel
    from transformers.trainer_utils import unwrap_peft_model
    from transformers.utils import is_liger_kernel_available

    if not is_liger_kernel_available():
        raise ImportError("use_liger_kernel: needs liger-kernel, which is not installed: pip install liger-kernel")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = unwrap_peft_model(model).config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(f"use_liger_kernel: expected a model type that Liger has kernels for, got {kind!r}")
    device = model.get_input_embeddings().weight.device
    if device.type == "cpu":
        raise ValueError("use_liger_kernel: expected a model on a GPU, got one on the CPU")
    apply_liger_kernel(model, options)
    logger.info("Liger's kernels in the layers of %s", type(model).__name__)
