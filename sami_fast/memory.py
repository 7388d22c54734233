"""Peak memory of a training step, as a formula.

Letters: T packed tokens of a pass, N scored tokens, L layers, H hidden size, I intermediate size, Hq and Hkv heads of
size D, V vocabulary, P weights of which P_t train, e bytes of a number the layers compute in. In bytes,

    peak = weights + gradients + optimizer + max(saved + max(head, layer), embedding)

    weights     w P: their own bytes, or 4 for trained ones with float32 master weights
    gradients   w P_t
    optimizer   for each trained weight w (RMSprop), 2 w (AdamW) or 0 (SGD); with Kahan summation w more, and RMSprop
                as Adam
    saved       what waits for the backward:
                  every layer's activations, L T a                    without checkpointing
                  every layer's input, L T h                          gradient_checkpointing
                  that and its attention, L T (h + e Hq D + 4 Hq)     gradient_checkpointing and keep_attention
                where h = e H (4 H under autocast) and a, in the order of a layer of Llama,
                  norms       2 (4 H + 2 e H + 4)     residual in float32, normalised, and scaled
                  attention   2 e (Hq + Hkv) D + 4 Hq    q, k, v, output, log-sum-exp
                  MLP         4 e I                   gate, its activation, up, their product
                and under autocast norms 2 (8 H + 4) + 5 e H: each product has an input of its own
    head        T (4 H + 2 e H) of the last norm, N hidden states, and what linear_logprob keeps and works in
    layer       backward of one layer: T e (2 I + H), and with checkpointing its activations T a, computed again
    embedding   3 w V H where the head is tied to an embedding that trains: its gradients as either, and their sum
    casts       under autocast e for each weight of the layers, copied for their products: in `saved`, but with
                checkpointing until the end of the forward, in `head`, and then layer by layer, in `layer`

Layers run again in the backward one at a time, so that checkpointing takes L times less for activations and costs one
more forward; keeping attention saves that forward its attention, the only part that grows faster than T.

It holds for layers like Llama's that transformers runs one operation at a time, gradients of earlier packs in place;
adapters and compiled layers save less. An allocator's own losses and what libraries work in are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import nn

from sami_fast.ops.logprob import _KEEP_BYTES
from sami_fast.trainer import SamiConfig

_LOGIT_BLOCK_BYTES = {"cpu": 4 << 20}
_OTHER_LOGIT_BLOCK_BYTES = 128 << 20
_STATES = {"rmsprop": 1, "adamw_torch": 2, "adamw_torch_fused": 2, "sgd": 0}


@dataclass(frozen=True)
class StepMemory:
    """Bytes of each part at the peak of a step; see the formula of this module."""

    weights: int
    gradients: int
    optimizer: int
    saved: int
    head: int
    layer: int
    embedding: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def activations(self) -> int:
        """What a pass takes beside weights, gradients and the optimiser's states."""
        return max(self.saved + max(self.head, self.layer), self.embedding)

    def __str__(self) -> str:
        parts = [f"{field.name} {getattr(self, field.name) / 1e9:.2f}" for field in fields(self)]
        return f"{self.total / 1e9:.2f} GB ({', '.join(parts)})"


def estimate_memory(model: nn.Module, args: SamiConfig, *, tokens: int, scored_tokens: int) -> StepMemory:
    """Peak memory of a step over packs of at most `tokens` packed and `scored_tokens` scored tokens.

    Args:
        model: a causal LM before it is given to `SamiTrainer`; on the meta device it costs nothing to ask.
        args: optim, master_weights, gradient_checkpointing and keep_attention count.
        tokens, scored_tokens: T and N of the largest pack.

    Raises:
        ValueError: an optimiser whose states are not known here, or a model with experts.
    """
    optim = str(getattr(args.optim, "value", args.optim))
    if optim not in _STATES:
        raise ValueError(f"optim: expected one of {sorted(_STATES)}, got {optim!r}")
    config = model.config.get_text_config(decoder=True)
    if any(getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")):
        raise ValueError(f"model: expected layers without experts, got {type(model).__name__}")
    head = model.get_output_embeddings()
    narrow = head.weight.dtype
    trains = [p for p in model.parameters() if p.requires_grad]
    widened = args.master_weights == "fp32" and narrow.itemsize == 2 and bool(trains)
    autocast = widened or args.bf16 or args.fp16
    e = 2 if autocast else narrow.itemsize

    def bytes_of(parameter: nn.Parameter) -> int:
        wide = widened and parameter.requires_grad and parameter.dtype.itemsize == 2
        return parameter.numel() * (4 if wide else parameter.element_size())

    trained = sum(map(bytes_of, trains))
    states = _STATES[optim] + (2 if optim == "rmsprop" else 1) * (args.master_weights == "kahan")
    T, N, L, H = tokens, scored_tokens, config.num_hidden_layers, config.hidden_size
    heads, size = config.num_attention_heads, getattr(config, "head_dim", None) or H // config.num_attention_heads
    kept_attention = e * heads * size + 4 * heads
    norms = 2 * (8 * H + 4) + 5 * e * H if autocast else 2 * (4 * H + 2 * e * H + 4)
    attention = 2 * e * (heads + config.num_key_value_heads) * size + 4 * heads
    layer = norms + attention + 4 * e * config.intermediate_size
    saved = layer
    if args.gradient_checkpointing:
        saved = (4 if autocast else e) * H + kept_attention * args.keep_attention
    casts = 0
    if autocast:
        linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
        casts = sum(w.numel() * e for w in linear if widened or w.dtype.itemsize == 4)
    again = args.gradient_checkpointing
    tied = head.weight is model.get_input_embeddings().weight and head.weight.requires_grad
    return StepMemory(
        weights=sum(map(bytes_of, model.parameters())),
        gradients=trained,
        optimizer=states * trained,
        saved=L * T * saved + (0 if again else casts),
        head=T * (4 * H + 2 * e * H) + _head_bytes(head, N, H, e, args.device) + casts * again,
        layer=T * e * (2 * config.intermediate_size + H) + (T * layer + casts // L) * again,
        embedding=3 * bytes_of(head.weight) * tied,
    )


def _head_bytes(head: nn.Module, rows: int, hidden: int, e: int, device: torch.device) -> int:
    """Hidden states of the scored tokens, and linear_logprob from its forward to its backward."""
    vocab = head.weight.shape[0]
    block = min(_LOGIT_BLOCK_BYTES.get(device.type, _OTHER_LOGIT_BLOCK_BYTES), 4 * rows * vocab)
    if not head.weight.requires_grad:
        return 3 * e * rows * hidden + block
    kept = min(_KEEP_BYTES, (4 if device.type == "cpu" else e) * rows * vocab)
    if device.type == "cpu":  # its backward turns all that was kept into probabilities at once
        block = max(block, kept)
    return e * rows * hidden + kept + block + (4 + 2 * e) * rows * hidden + e * vocab * hidden
