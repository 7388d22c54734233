"""A SAMI step of large models with random weights in known shapes: forward, loss, backward, optimiser, on a GPU.

All arms score the same groups with the same model and train alike; they differ in what they encode, whole sequences or
the tree, and in the attention they run. Each takes as many groups at a time as fit into a fixed number of its tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from benchmarks.attention import GatheredRows, compiled_flex_attention
from benchmarks.suite import Case, Prepared, Settings, Suite, Unsupported
from sami_fast import Group, pack
from sami_fast.fused_layers import apply_liger, compile_layers, liger_options
from sami_fast.kernels.flash_attention import gather_for
from sami_fast.losses import infonce_loss
from sami_fast.prefix_tree import PackedTree
from sami_fast.scoring import score

# Published configurations; `tiny` lets the suite itself run anywhere.
_MODELS: dict[str, dict[str, Any]] = {
    "Mistral-7B": dict(
        model_type="mistral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, sliding_window=None,
    ),
    "Llama-3.2-1B": dict(
        model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    ),
    "Qwen3-8B": dict(
        model_type="qwen3", vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    ),
    "Mixtral-8x7B, 2 layers": dict(
        model_type="mixtral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=2,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, num_local_experts=8, num_experts_per_tok=2,
        sliding_window=None,
    ),
    "tiny": dict(
        model_type="llama", vocab_size=199, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    ),
}  # fmt: skip
_LENGTHS = {"TL;DR": (330, 100, 85), "HH-RLHF": (30, 60, 60), "tiny": (9, 5, 6)}  # query, constitution, response
_STEP_TOKENS = 16384  # packed, about, in the groups of a step
_PASS_TOKENS = 32768  # of an arm's own, in one forward and backward, unless a single group has more


@dataclass(frozen=True)
class Inputs:
    """A model, the groups of a step, and which weights train."""

    model: nn.Module
    groups: list[Group]
    device: str
    tuning: str

    def flops(self, tokens: int, attended: int, predicted: int, backward: bool) -> float:
        """Matrix products over `tokens`, `attended` pairs of tokens a layer, logits at `predicted`; nothing twice."""
        config = self.model.config
        heads = config.num_attention_heads
        hidden, size = config.hidden_size, config.head_dim
        projections = hidden * size * (2 * heads + 2 * config.num_key_value_heads)
        experts = getattr(config, "num_experts_per_tok", None)
        mlp = 3 * hidden * config.intermediate_size * (experts or 1)
        router = hidden * config.num_local_experts if experts else 0
        weights = config.num_hidden_layers * (projections + mlp + router)
        dense = 2 * (tokens * weights + predicted * hidden * config.vocab_size)
        attention = 4 * attended * config.num_hidden_layers * heads * size
        if not backward:
            return dense + attention
        return dense * (3 if self.tuning == "full" else 2) + 3.5 * attention


def cases(settings: Settings) -> list[Case]:
    """Model, data, C = R, and full fine-tuning or LoRA."""
    if settings.device == "cpu":
        return [
            Case(f"tiny {tuning}", _shapes("tiny", "tiny", 3, tuning), "float32", quick=True)
            for tuning in ("full", "LoRA")
        ]
    listed = [
        ("Llama-3.2-1B", "TL;DR", 4, "full", True),
        ("Mistral-7B", "TL;DR", 4, "full", True),
        ("Mistral-7B", "TL;DR", 2, "full", False),
        ("Mistral-7B", "TL;DR", 8, "full", False),
        ("Mistral-7B", "TL;DR", 4, "LoRA", True),
        ("Mistral-7B", "HH-RLHF", 4, "full", False),
        ("Llama-3.2-1B", "TL;DR", 2, "full", False),
        ("Llama-3.2-1B", "TL;DR", 8, "full", False),
        ("Llama-3.2-1B", "HH-RLHF", 8, "full", False),
        ("Qwen3-8B", "TL;DR", 4, "LoRA", False),
        ("Qwen3-8B", "TL;DR", 8, "LoRA", False),
        ("Mixtral-8x7B, 2 layers", "TL;DR", 4, "full", False),
    ]
    return [
        Case(f"{model}, {data} {n}x{n}, {tuning}", _shapes(model, data, n, tuning), "bfloat16", quick)
        for model, data, n, tuning, quick in listed
    ]


def _shapes(model: str, data: str, n: int, tuning: str) -> dict[str, Any]:
    return {"model": model, "data": data, "C": n, "R": n, "tuning": tuning}


def inputs(case: Case, settings: Settings, seed: int) -> Inputs:
    """The model on the device, with gradient checkpointing, and random groups of the data's lengths."""
    shapes = case.shapes
    config = _config(shapes["model"])
    torch.manual_seed(seed)
    with torch.device(settings.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype), attn_implementation="sdpa")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if shapes["tuning"] == "LoRA":
        from peft import LoraConfig, get_peft_model

        model.enable_input_require_grads()
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
    rng = np.random.default_rng(seed)
    query, constitution, response = _LENGTHS[shapes["data"]]
    groups = [_group(rng, config.vocab_size, shapes["C"], query, constitution, response)]
    tokens = _STEP_TOKENS if shapes["data"] != "tiny" else 300
    while len(groups) * pack(groups[:1]).num_tokens < tokens:
        groups.append(_group(rng, config.vocab_size, shapes["C"], query, constitution, response))
    return Inputs(model, groups, settings.device, shapes["tuning"])


def _config(name: str) -> PreTrainedConfig:
    options = dict(_MODELS[name])
    return AutoConfig.for_model(options.pop("model_type"), max_position_embeddings=32768, **options)


def _group(rng: np.random.Generator, vocab: int, n: int, query: int, constitution: int, response: int) -> Group:
    shared = rng.integers(0, vocab, query)
    prompts = [np.r_[shared, rng.integers(0, vocab, constitution)] for _ in range(n)]
    return Group(prompts, [rng.integers(0, vocab, response) for _ in range(n)])


def annotate(results: list[dict]) -> None:
    """Tokens a second as whole sequences, and how much of the saving in tokens the saving in time is."""
    good = {result["arm"]: result for result in results if result["outcome"] == "ok"}
    for result in good.values():
        result["facts"]["whole tokens/s"] = result["facts"]["whole tokens"] / result["seconds"]["median"]
    whole, tree = good.get(_WHOLE), good.get(_TREE)
    if whole is not None and tree is not None:
        speedup = whole["seconds"]["median"] / tree["seconds"]["median"]
        tree["facts"]["of token ratio"] = speedup / tree["facts"]["token ratio"]


SUITE = Suite(
    name="step",
    title="A SAMI step: tokens to updated weights",
    cases=cases,
    inputs=inputs,
    limits={"float32": {"matrix": 1e-4, "loss": 1e-4}, "bfloat16": {"matrix": 2e-2, "loss": 5e-2}},
    annotate=annotate,
)
_WHOLE, _TREE = "whole sequences, varlen", "prefix tree"


# --------------------------------------------------------------------------------------------------------------------
# Arms


def whole_sequences(groups: list[Group]) -> PackedTree:
    """The same scores with nothing shared: every pair of a prompt and a response is a tree of its own."""
    pairs = [Group([p], [r]) for g in groups for p, r in itertools.product(g.prompts, g.responses)]
    packed = pack(groups)
    return dataclasses.replace(pack(pairs), shapes=packed.shapes, positives=packed.positives, ids=packed.ids)


def _passes(groups: list[Group], make: Callable[[list[Group]], PackedTree], limit: int) -> list[PackedTree]:
    """Groups in order, as many at a time as `make` turns into at most `limit` tokens, at least one."""
    size = make(groups[:1]).num_tokens
    count = max(1, limit // size)
    return [make(groups[low : low + count]) for low in range(0, len(groups), count)]


def _prepared(made: Inputs, backward: bool, packs: list[PackedTree], matrices_and_loss: Callable) -> Prepared:
    """A step over `packs`; `matrices_and_loss` takes one of them."""
    model = made.model.train(backward)
    trained = [p for p in model.parameters() if p.requires_grad]
    # One tensor at a time: all at once would need as much memory again.
    optimizer = torch.optim.RMSprop(trained, lr=5e-7, foreach=False) if backward else None

    def run() -> dict[str, torch.Tensor]:
        matrices, total = [], 0.0
        for packed in packs:
            with torch.set_grad_enabled(backward):
                matrix, loss = matrices_and_loss(packed)
            loss = loss * (len(packed.shapes) / len(made.groups))
            if backward:
                loss.backward()
            matrices += [m.detach().flatten() for m in matrix]
            total += loss.detach()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {"matrix": torch.cat(matrices), "loss": total}

    tree = pack(made.groups)
    tokens = sum(packed.num_tokens for packed in packs)
    attended = sum(int((packed.position_ids + 1).sum()) for packed in packs)
    facts = {"tokens": tokens, "whole tokens": tree.whole_tokens, "token ratio": tree.whole_tokens / tree.num_tokens}
    bytes_moved = sum(p.numel() * p.element_size() for p in model.parameters()) * (3 if backward else 1)
    return Prepared(run, made.flops(tokens, attended, len(tree.labels), backward), bytes_moved, facts)


def _scored(
    made: Inputs, backward: bool, make: Callable, backend: Mapping[str, Any] | None, keep_attention: bool = False
) -> Prepared:
    """Through `score`, with what encodes and attends as given."""

    packs = [packed.to(made.device) for packed in _passes(made.groups, make, _PASS_TOKENS)]

    def matrices_and_loss(packed: PackedTree):
        scores = score(made.model, packed, backend=backend, keep_attention=keep_attention)
        return scores.matrices, infonce_loss(scores).loss

    return _prepared(made, backward, packs, matrices_and_loss)


@SUITE.arm("one sequence at a time, float32", peer="transformers", timed=False)
def one_by_one(made: Inputs, backward: bool) -> Prepared:
    """The numbers that the others are held to."""
    model = made.model.float().eval()

    def matrix_of(group: Group) -> torch.Tensor:
        entries = []
        for prompt, response in itertools.product(group.prompts, group.responses):
            ids = torch.from_numpy(np.r_[prompt, response]).to(made.device)
            logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=len(response) + 1).logits[0, :-1]
            entries.append(-cross_entropy(logits.double(), ids[-len(response) :]))
        return torch.stack(entries).view(group.shape)

    def run() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            matrices = [matrix_of(group) for group in made.groups]
            loss = torch.stack([infonce_loss(matrix).loss for matrix in matrices]).mean()
        return {"matrix": torch.cat([m.flatten() for m in matrices]).float(), "loss": loss.float()}

    packed = whole_sequences(made.groups)
    attended = int((packed.position_ids + 1).sum())
    facts = {"tokens": packed.num_tokens, "whole tokens": packed.whole_tokens, "token ratio": 1.0}
    return Prepared(run, made.flops(packed.num_tokens, attended, len(packed.labels), False), 0.0, facts)


@SUITE.arm(_TREE, peer="sami-fast", ours=True)
def prefix_tree(made: Inputs, backward: bool) -> Prepared:
    """score, infonce_loss, backward, step."""
    return _scored(made, backward, pack, None)


@SUITE.arm("prefix tree, attention kept", peer="sami-fast")
def attention_kept(made: Inputs, backward: bool) -> Prepared:
    """Ours, with attention outputs kept rather than computed again by activation checkpointing."""
    if not backward:
        raise Unsupported("the forward is that of the prefix tree")
    return _scored(made, backward, pack, None, keep_attention=True)


@SUITE.arm("prefix tree, layers compiled", peer="torch")
def layers_compiled(made: Inputs, backward: bool) -> Prepared:
    """Ours, with the decoder layers compiled in place; compiling is not timed."""
    _on_gpu(made)
    compile_layers(made.model)
    return _scored(made, backward, pack, None)


@SUITE.arm("prefix tree, Liger", peer="liger-kernel")
def liger(made: Inputs, backward: bool) -> Prepared:
    """Ours, with Liger's norms, RoPE and SwiGLU in the layers."""
    _on_gpu(made)
    base = made.model.get_base_model() if made.tuning == "LoRA" else made.model
    functions = vars(sys.modules[type(base).__module__])  # some of them Liger replaces, for all models of the family
    before = dict(functions)
    apply_liger(made.model, liger_options(None))
    replaced = {name: value for name, value in functions.items() if before.get(name) is not value}
    functions.update(before)
    prepared = _scored(made, backward, pack, None)

    def run() -> dict[str, torch.Tensor]:
        functions.update(replaced)
        try:
            return prepared.run()
        finally:
            functions.update(before)

    return dataclasses.replace(prepared, run=run)


def _on_gpu(made: Inputs) -> None:
    if made.device != "cuda":
        raise Unsupported("takes CUDA tensors")


def _plain(window: int | None, softcap: float | None, sinks: torch.Tensor | None) -> None:
    for name, value in dict(window=window, softcap=softcap, sinks=sinks).items():
        if value is not None:
            raise Unsupported(f"no {name}")


def _varlen(made: Inputs, gathers: bool) -> Callable:
    """PyTorch's variable-length flash-attention; if it `gathers`, over keys copied along every path."""
    _on_gpu(made)
    from torch.nn.attention.varlen import varlen_attn

    def attend(q, k, v, plan, *, scale, window, softcap, sinks):
        _plain(window, softcap, sinks)
        gather = gather_for(plan.nodes, None, q.device)
        if gathers:
            k, v = GatheredRows.apply(k, gather), GatheredRows.apply(v, gather)
        lengths = gather.query_offsets, gather.key_offsets, gather.max_queries, gather.max_keys
        return varlen_attn(q, k, v, *lengths, scale=scale, window_size=(-1, 0), enable_gqa=True)

    return attend


@SUITE.arm(_WHOLE, peer="torch")
def whole_varlen(made: Inputs, backward: bool) -> Prepared:
    """Nothing shared, nothing padded, our head and loss."""
    return _scored(made, backward, whole_sequences, {"prefix_attention": _varlen(made, gathers=False)})


@SUITE.arm("prefix tree, gathered keys", peer="torch")
def gathered(made: Inputs, backward: bool) -> Prepared:
    """The tree, its keys and values copied along every path into a variable-length call."""
    return _scored(made, backward, pack, {"prefix_attention": _varlen(made, gathers=True)})


@SUITE.arm("prefix tree, FlexAttention", peer="torch")
def flex(made: Inputs, backward: bool) -> Prepared:
    """The tree with its mask in FlexAttention; masks are made at first use and not timed."""
    if made.device != "cuda":
        raise Unsupported("no backward on the CPU")
    from torch.nn.attention.flex_attention import create_block_mask

    call, masks = compiled_flex_attention(), {}

    def attend(q, k, v, plan, *, scale, window, softcap, sinks):
        _plain(window, softcap, sinks)
        if plan not in masks:
            T, end = len(q), plan.subtree_end
            masks[plan] = create_block_mask(
                lambda b, h, i, n: (n <= i) & (i < end[n]), None, None, T, T, device=q.device, _compile=True
            )
        states = (x.transpose(0, 1)[None] for x in (q, k, v))
        return call(*states, block_mask=masks[plan], scale=scale, enable_gqa=True)[0].transpose(0, 1)

    return _scored(made, backward, pack, {"prefix_attention": attend})


@SUITE.arm("padded, full logits", peer="transformers")
def padded(made: Inputs, backward: bool) -> Prepared:
    """A query's sequences in one padded batch with logits of every position, as the reference code of SAMI."""
    model, pad = made.model, 0
    by_pack = {}

    def matrices_and_loss(packed: PackedTree):
        group = by_pack[id(packed)]
        sequences = [
            torch.from_numpy(np.r_[p, r]).to(made.device) for p, r in itertools.product(group.prompts, group.responses)
        ]
        lengths = torch.tensor([len(r) for r in group.responses] * group.shape[0], device=made.device)[:, None]
        input_ids = pad_sequence(sequences, batch_first=True, padding_value=pad)
        ends = torch.tensor([len(ids) for ids in sequences], device=made.device)[:, None]
        position = torch.arange(input_ids.shape[1], device=made.device)
        scored = ((position >= ends - lengths) & (position < ends))[:, 1:]
        logits = model(input_ids=input_ids, attention_mask=(position < ends).long(), use_cache=False).logits
        logprobs = logits[:, :-1].float().log_softmax(dim=-1).gather(2, input_ids[:, 1:, None]).squeeze(2)
        matrix = ((logprobs * scored).sum(dim=1) / scored.sum(dim=1)).view(group.shape)
        return [matrix], infonce_loss(matrix).loss

    packs = [whole_sequences([group]) for group in made.groups]
    by_pack |= {id(packed): group for packed, group in zip(packs, made.groups, strict=True)}
    return _prepared(made, backward, packs, matrices_and_loss)
