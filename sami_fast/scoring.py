"""A Hugging Face causal LM and a packed prefix tree in, log-probabilities and the C x R matrices out.

The model runs once over the packed tokens, its attention switched to the tree through `transformers.AttentionInterface`
for the duration of the call. Its head is not run: a hook takes the hidden states in front of it, and only the rows that
predict a response token meet the vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import math
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sami_fast import ops
from sami_fast.prefix_tree import Group, PackedTree, pack
from sami_fast.tree_attention import TreeCall, UnsupportedModelError, autocast, tree_mode

logger = logging.getLogger(__name__)

_LOGIT_BYTES = 64 << 20  # one chunk of logits of a head that is no plain Linear


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of the scored tokens of a pack.

    Attributes:
        token_logprobs: [N] float32 (float64 for a float64 model), differentiable.
        packed: the pack, on the same device.
        normalize: "mean" or "sum", how a response's tokens make one entry of the matrix.
        kl: [N] float32, KL(model || reference) at each scored token's position; None without a reference model.
        entropy: [N] float32, of the model's distribution there; None unless asked for.
    """

    token_logprobs: torch.Tensor
    packed: PackedTree
    normalize: str = "mean"
    kl: torch.Tensor | None = None
    entropy: torch.Tensor | None = None

    @property
    def matrices(self) -> list[torch.Tensor]:
        """[C, R] of each group, differentiable; -inf where a mask leaves a pair out."""
        offsets = self.packed.offsets
        lengths = offsets.diff()
        flat = torch.segment_reduce(self.token_logprobs, "sum", offsets=offsets, axis=0)
        if self.normalize == "mean":
            flat = flat / lengths.clamp(min=1)
        flat = flat.masked_fill(lengths == 0, float("-inf"))
        sizes = [C * R for C, R in self.packed.shapes]
        return [part.view(shape) for part, shape in zip(flat.split(sizes), self.packed.shapes, strict=True)]

    @property
    def matrix(self) -> torch.Tensor | list[torch.Tensor]:
        """[B, C, R] when all groups have one shape, else a list of [C, R]."""
        matrices = self.matrices
        return torch.stack(matrices) if len(set(self.packed.shapes)) == 1 else matrices


# --------------------------------------------------------------------------------------------------------------------
# Head


@dataclass(frozen=True)
class _Head:
    """The output embedding and what the family puts around it: softcap(logit_scale * module(hidden))."""

    module: nn.Module
    logit_scale: float
    softcap: float | None

    @property
    def is_plain(self) -> bool:
        return type(self.module) is nn.Linear

    def finish(self, raw: torch.Tensor) -> torch.Tensor:
        logits = raw * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def is_like(self, other: _Head) -> bool:
        """Whether one op can compute both."""
        scaling = (self.logit_scale, self.softcap)
        return self.is_plain and other.is_plain and scaling == (other.logit_scale, other.softcap)

    def weight(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias in the dtype of the hidden states, which autocast may have narrowed."""
        return self.module.weight.to(hidden.dtype), self.module.bias


def _find_head(model: nn.Module) -> _Head:
    module = model.get_output_embeddings()
    if module is None:
        raise UnsupportedModelError(f"model: {type(model).__name__} has no output embeddings, so it is no causal LM")
    if hasattr(getattr(module, "weight", None), "full_tensor"):
        raise ValueError("model: the output embedding is sharded (DTensor); gather it before scoring")
    config = model.config.get_text_config(decoder=True)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
    return _Head(module, scale, getattr(config, "final_logit_softcapping", None))


@dataclass(frozen=True)
class _Reference:
    """The reference model's head, its hidden states [N, H'], and the context in which it is what it should be."""

    head: _Head
    hidden: torch.Tensor
    context: Callable[[], contextlib.AbstractContextManager]


def _token_statistics(
    head: _Head,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    reference: _Reference | None,
    entropy: bool,
    backend: str | Mapping[str, Any] | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """log p(label), and entropy and KL where they are wanted, [N] each."""
    if head.is_plain and (reference is None or reference.head.is_like(head)):
        weight, bias = head.weight(hidden)
        options = dict(bias=bias, logit_scale=head.logit_scale, softcap=head.softcap)
        if reference is None and not entropy:
            which = ops.backend_for("linear_logprob", backend)
            return ops.linear_logprob(hidden, weight, labels, **options, backend=which), None, None
        if reference is not None:
            ref_weight, ref_bias = reference.head.weight(reference.hidden)
            options |= dict(ref_hidden=reference.hidden, ref_weight=ref_weight, ref_bias=ref_bias)
        which = ops.backend_for("linear_statistics", backend)
        statistics = ops.linear_statistics(hidden, weight, labels, **options, backend=which)
        return statistics.logprob, statistics.entropy if entropy else None, statistics.kl
    _log_head_once(type(head.module).__name__)

    def chunk(hidden: torch.Tensor, labels: torch.Tensor, ref_hidden: torch.Tensor | None = None) -> torch.Tensor:
        logp = _log_softmax(head.finish(_widen(head.module(hidden))))
        results = [logp.gather(1, labels[:, None]).squeeze(1)]
        if entropy:
            # A probability of 0 adds nothing: 0 * -inf would be NaN.
            results.append(-(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(dim=-1))
        if reference is not None:
            with torch.no_grad(), reference.context():
                logp_ref = _log_softmax(reference.head.finish(_widen(reference.head.module(ref_hidden))))
            results.append((logp.exp() * (logp - logp_ref)).sum(dim=-1))
        return torch.stack(results, dim=1)

    rows = [hidden, labels] if reference is None else [hidden, labels, reference.hidden]
    height = max(16, _LOGIT_BYTES // (4 * vocab_size))
    # Logits are recomputed in the backward instead of kept.
    chunks = zip(*(tensor.split(height) for tensor in rows), strict=True)
    columns = torch.cat([checkpoint(chunk, *part, use_reentrant=False) for part in chunks]).unbind(dim=1)
    return columns[0], columns[1] if entropy else None, columns[-1] if reference is not None else None


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """(The CPU's own float32 log_softmax is off by 2e-5, all to one side, over a vocabulary of 49152.)"""
    return logits - logits.logsumexp(dim=-1, keepdim=True)


def _widen(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


_logged_heads: set[str] = set()


def _log_head_once(name: str) -> None:
    if name not in _logged_heads:
        _logged_heads.add(name)
        logger.info("the output embedding is a %s, no plain Linear: its logits run by checkpointed chunks", name)


# --------------------------------------------------------------------------------------------------------------------
# Scoring


def score(
    model: nn.Module,
    packed: PackedTree,
    *,
    normalize: str = "mean",
    ref_model: nn.Module | None = None,
    backend: str | Mapping[str, Any] | None = None,
    keep_attention: bool = False,
    entropy: bool = False,
) -> Scores:
    """Log-probability of every response token under every prompt of the pack, in one pass over its tokens.

    Works with any causal LM of transformers whose attention goes through `AttentionInterface`, PEFT adapters included,
    under autocast and gradient checkpointing. The model is left as it was found.

    Args:
        model: the causal LM, on the pack's device.
        packed: from `pack`.
        normalize: "mean" or "sum" over a response's tokens, for `Scores.matrix`.
        ref_model: also give KL(model || ref_model) at every scored token, exact over the vocabulary. The model itself
            stands for itself without its PEFT adapters.
        backend: of the ops that have it, or a mapping from op to backend; None picks by device. A function with the
            arguments of "prefix_attention" may stand for its backend in the mapping.
        keep_attention: where activation checkpointing (of the kind that is not reentrant) computes layers again in the
            backward, keep the output and log-sum-exp of each layer's attention instead of computing them again: T x Hq
            x (Dv numbers of the model's dtype and one float32) a layer.
        entropy: also give the entropy of the model's distribution at every scored token.

    Raises:
        UnsupportedModelError: the architecture cannot be exact over a tree; the message names it and says why.
        ValueError: token ids outside the vocabulary, a sequence longer than the model's positions, a pack on another
            device, attention dropout.
    """
    if normalize not in ("mean", "sum"):
        raise ValueError(f'normalize: expected "mean" or "sum", got {normalize!r}')
    hidden, head, vocab_size = _predicting_states(model, packed, backend, keep_attention)
    reference = None if ref_model is None else _reference_states(model, ref_model, packed, vocab_size, backend)
    statistics = _token_statistics(head, hidden, packed.labels, vocab_size, reference, entropy, backend)
    logprobs, token_entropy, kl = statistics
    return Scores(logprobs, packed, normalize, kl, token_entropy)


def _reference_states(
    model: nn.Module,
    ref_model: nn.Module,
    packed: PackedTree,
    vocab_size: int,
    backend: str | Mapping[str, Any] | None,
) -> _Reference:
    if ref_model is model and not hasattr(model, "disable_adapter"):
        raise ValueError(
            f"ref_model: {type(model).__name__} has no adapters to disable, so it is no reference of itself"
        )

    def as_reference() -> contextlib.AbstractContextManager:
        return model.disable_adapter() if ref_model is model else contextlib.nullcontext()

    with torch.no_grad(), as_reference():
        ref_hidden, ref_head, ref_vocab = _predicting_states(ref_model, packed, backend)
    if ref_vocab != vocab_size:
        raise ValueError(f"ref_model: expected a vocabulary of {vocab_size} as the model has, got {ref_vocab}")
    return _Reference(ref_head, ref_hidden, as_reference)


def _predicting_states(
    model: nn.Module, packed: PackedTree, backend: str | Mapping[str, Any] | None, keep_attention: bool = False
) -> tuple[torch.Tensor, _Head, int]:
    """Hidden states [N, H] in front of the head of the tokens that predict each label, the head, and V."""
    inner = model
    if not hasattr(inner, "get_output_embeddings"):
        from accelerate.utils import extract_model_from_parallel

        inner = extract_model_from_parallel(model, keep_fp32_wrapper=True)
    head = _find_head(inner)
    config = inner.config.get_text_config(decoder=True)
    vocab_size = inner.get_input_embeddings().weight.shape[0]
    bare = getattr(inner, "_orig_mod", inner)  # what torch.compile wrapped
    bare = bare.get_base_model() if hasattr(bare, "get_base_model") else bare
    bare = getattr(bare, "_orig_mod", bare)
    name = type(bare).__name__
    _check_inputs(bare, config, name, packed, vocab_size)

    taken: list[torch.Tensor] = []

    def take(_module: nn.Module, args: tuple) -> tuple:
        taken.append(autocast(args[0]))
        return (args[0][:, :1], *args[1:])  # one row: the model's own logits are only compared with ours, once

    raw: list[torch.Tensor] = []
    call = TreeCall(packed.plan, name, ops.backend_for("prefix_attention", backend))
    hooks = [
        head.module.register_forward_pre_hook(take),
        head.module.register_forward_hook(lambda _module, _args, output: raw.append(output)),
    ]
    # Compiled code notes nothing of its layers: a model runs without it until it was seen in all that is checked.
    slides = _slides(config, packed)
    known = inner in _verified and (_verified[inner] or not slides)
    stance = contextlib.nullcontext() if known else torch.compiler.set_stance("force_eager")
    try:
        with tree_mode(inner, keep_attention), stance:
            output = model(
                input_ids=packed.input_ids[None],
                position_ids=packed.position_ids[None],
                use_cache=False,
                prefix_tree=call,
            )
    except (AttributeError, RuntimeError, TypeError) as error:
        # Families without the interface may trip over the mask that they did not get.
        if call.windows or known or isinstance(error, torch.OutOfMemoryError):
            raise
        raise call.unsupported(
            f"none of its layers attends through transformers' AttentionInterface ({error})"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if len(taken) != 1 or taken[0].shape[1] != packed.num_tokens:
        raise call.unsupported("its output embedding does not see every token once")
    if not (known and _is_compiled(inner)):
        _check_layers(call, bare, config, slides)
    if not known:
        ours, theirs = head.finish(_widen(raw[0].detach())), _widen(output.logits.detach())
        error, size = float((ours - theirs).abs().max()), float(theirs.abs().max())
        if error > 1e-2 * size:
            raise call.unsupported("its logits are not softcap(scale * output_embedding(hidden)) as its config says")
        if math.isfinite(error):  # NaN weights show in the scores; the head is looked at again
            _verified[inner] = slides
    # Embedding as a gather: its backward is a deterministic segment sum where branches share a predictor.
    hidden = nn.functional.embedding(packed.hidden_index, taken[0][0])
    return hidden, head, head.module.weight.shape[0] if head.is_plain else raw[0].shape[-1]


_verified: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()  # also with its windows in use?


def _check_inputs(model: nn.Module, config, name: str, packed: PackedTree, vocab_size: int) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"model: {name} is an encoder-decoder; expected a causal LM")
    forwards = [vars(cls)["forward"] for cls in type(model).__mro__ if "forward" in vars(cls)]
    if not any("position_ids" in inspect.signature(forward).parameters for forward in forwards):
        raise UnsupportedModelError(
            f"model: {name} cannot be scored over a prefix tree: its forward takes no position_ids"
        )
    if getattr(model, "_is_stateful", False) or any(isinstance(module, nn.Conv1d) for module in model.modules()):
        raise UnsupportedModelError(
            f"model: {name} cannot be scored over a prefix tree: it carries state from token to token beside attention"
        )
    if packed.max_token_id >= vocab_size:
        raise ValueError(
            f"packed: expected token ids below the vocabulary size {vocab_size}, got {packed.max_token_id}"
        )
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and packed.max_length > limit:
        raise ValueError(
            f"packed: expected sequences of at most {limit} tokens, the positions of {name}, got {packed.max_length}"
        )
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None and packed.max_length > chunk:
        raise UnsupportedModelError(
            f"model: {name} attends in chunks of {chunk} tokens; expected shorter sequences, got {packed.max_length}"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    layers = rope.values() if rope and all(isinstance(value, dict) for value in rope.values()) else [rope]
    for parameters in layers:
        kind = parameters.get("rope_type", "default")
        original = parameters.get("original_max_position_embeddings") or limit
        if kind in ("dynamic", "longrope") and original is not None and packed.max_length > original:
            raise UnsupportedModelError(
                f"model: the {kind} RoPE of {name} changes with the sequence length beyond {original} tokens, so "
                f"prefixes are not shared; got a sequence of {packed.max_length}"
            )
    device = model.get_input_embeddings().weight.device
    if packed.device != device:
        raise ValueError(f"packed: expected tensors on {device} as the model is, got {packed.device}")


def _is_compiled(model: nn.Module) -> bool:
    return any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules())


def _slides(config, packed: PackedTree) -> bool:
    """Whether a sliding window cuts any of the pack's sequences."""
    window = getattr(config, "sliding_window", None)
    return window is not None and packed.max_length > window


def _check_layers(call: TreeCall, model: nn.Module, config, slides: bool) -> None:
    """Every layer must have attended through us, with the window that its config promises."""
    if len(call.windows) != config.num_hidden_layers:
        raise call.unsupported(
            f"{len(call.windows)} of its {config.num_hidden_layers} layers attend through transformers' "
            "AttentionInterface"
        )
    if slides:
        # Families without a list of layer types slide in all layers, if they know how to make such a mask at all.
        kind = "sliding" if _makes_sliding_masks(model) else "full"
        kinds = getattr(config, "layer_types", None) or [kind] * config.num_hidden_layers
        promised, got = sum("sliding" in kind for kind in kinds), sum(w is not None for w in call.windows.values())
        if promised != got:
            raise call.unsupported(f"{promised} layers have a sliding window and {got} passed it to their attention")


def _makes_sliding_masks(model: nn.Module) -> bool:
    classes = {cls for module in model.modules() if hasattr(module, "config") for cls in type(module).__mro__}
    return any(hasattr(sys.modules.get(cls.__module__), "create_sliding_window_causal_mask") for cls in classes)


# --------------------------------------------------------------------------------------------------------------------
# Guard of last resort

_CHECK_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_CHECK_COPY_WEIGHTS = 1_000_000_000


@torch.no_grad()
def check_model(model: nn.Module, *, seed: int = 0, backend: str | Mapping[str, Any] | None = None) -> float:
    """Score a small random tree and, by plain forwards, each of its sequences; return the relative difference.

    A 16-bit model of at most 10^9 weights is checked as a float32 copy, since rounding would hide mistakes; a larger or
    quantized one as it is, where only mistakes beyond its rounding show.

    Raises:
        UnsupportedModelError: when they differ by more than 1e-6 in float64, 1e-4 in float32, 5e-3 in float16 or 2e-2
            in bfloat16, naming the model and the difference.
    """
    embedding = model.get_input_embeddings().weight
    narrow = embedding.dtype in (torch.float16, torch.bfloat16) and not getattr(model, "is_quantized", False)
    small = sum(p.numel() for p in model.parameters()) <= _CHECK_COPY_WEIGHTS
    subject = copy.deepcopy(model).float() if narrow and small else model
    dtype = subject.get_input_embeddings().weight.dtype
    rng = np.random.default_rng(seed)
    vocab = embedding.shape[0]
    query, tail = rng.integers(0, vocab, 11), rng.integers(0, vocab, 4)
    prompts = [np.r_[query, rng.integers(0, vocab, 5)], np.r_[query, rng.integers(0, vocab, 9)]]
    responses = [np.r_[tail, rng.integers(0, vocab, 3)], np.r_[tail, rng.integers(0, vocab, 6)]]
    groups = [Group(prompts, responses), Group([rng.integers(0, vocab, 7)], [rng.integers(0, vocab, 5)])]
    packed = pack(groups).to(embedding.device)
    training = subject.training
    subject.eval()
    try:
        with torch.autocast(embedding.device.type, enabled=False), torch.compiler.set_stance("force_eager"):
            tree = score(subject, packed, backend=backend).token_logprobs.double()
            plain = torch.cat([_plain_logprobs(subject, p, r) for g in groups for p in g.prompts for r in g.responses])
    finally:
        subject.train(training)
    difference = float((tree - plain).norm() / plain.norm())
    name, limit = type(model).__name__, _CHECK_TOLERANCE[dtype]
    if not difference <= limit:
        raise UnsupportedModelError(
            f"model: {name} scores a prefix tree differently from whole sequences: relative difference "
            f"{difference:.1e}, expected at most {limit:.0e} in {dtype}"
        )
    logger.info("%s scores trees as it scores whole sequences (relative difference %.1e)", name, difference)
    return difference


def _plain_logprobs(model: nn.Module, prompt: np.ndarray, response: np.ndarray) -> torch.Tensor:
    ids = torch.from_numpy(np.r_[prompt, response]).to(model.get_input_embeddings().weight.device)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(dim=-1).gather(1, ids[len(prompt) :, None]).squeeze(1)
