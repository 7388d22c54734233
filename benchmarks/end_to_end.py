"""SAMI of a whole model, tokens to gradients: whole sequences padded, with full logits, as SAMI's own code; and ours.

On the CPU: the bundled model in float32 on a real TL;DR post where a file of them is at hand (`--data`), else on random
token ids of the same lengths. `--model` takes any other causal LM.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.suite import ROOT, Case, Prepared, Settings, Suite, Unsupported
from sami_fast import Group, pack
from sami_fast.bundled import bundled_model_path
from sami_fast.data import Example, PromptTemplate, load_examples, tokenize_example
from sami_fast.losses import infonce_loss
from sami_fast.scoring import score

_TLDR_SAMPLE = ROOT.parent / "shared/data/tldr_sample.jsonl"
_TLDR_LENGTHS = {"query": 330, "constitution": 100, "response": 85}


@dataclass(frozen=True)
class Inputs:
    """A model and the group that it scores."""

    model: nn.Module
    group: Group
    device: str

    def sequences(self) -> Iterator[tuple[torch.Tensor, int]]:
        """Token ids of every prompt with every response, prompt by prompt, and the length of the response."""
        for prompt, response in itertools.product(self.group.prompts, self.group.responses):
            yield torch.from_numpy(np.r_[prompt, response]).to(self.device), len(response)

    def numbers(self, matrix: torch.Tensor, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        """What an arm is checked by."""
        gradients = {f"gradients:{n}": p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        return {"matrix": matrix.detach(), "loss": loss.detach()} | gradients

    def flops(self, tokens: int, attended: int, predicted: int, backward: bool) -> float:
        """Matrix products over `tokens`, with `attended` pairs of tokens a layer and logits at `predicted` tokens."""
        config, head = self.model.config.get_text_config(), self.model.get_output_embeddings()
        linear = sum(m.weight.numel() for m in self.model.modules() if isinstance(m, nn.Linear) and m is not head)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attention = 2 * attended * config.num_hidden_layers * config.num_attention_heads * head_dim
        return 2 * (tokens * linear + attention + predicted * head.weight.numel()) * (3 if backward else 1)

    def bytes(self, backward: bool) -> float:
        """Weights read; in the backward read again, and their gradients written."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters()) * (3 if backward else 1)


# --------------------------------------------------------------------------------------------------------------------
# Cases


def cases(settings: Settings) -> list[Case]:
    """C = R = 2, 4, 8 under one post; 2 also under the longest post, where more is shared."""
    file = _data_file(settings)
    dtype = "bfloat16" if settings.device == "cuda" else "float32"
    source = _TLDR_LENGTHS if file is None else {"data": file.name, "post": "middle token ratio"}
    made = [Case(f"TL;DR {n}x{n}", {"C": n, "R": n} | source, dtype, quick=n == 2) for n in (2, 4, 8)]
    if file is not None:
        made.insert(1, Case("TL;DR 2x2, longest post", made[0].shapes | {"post": "longest"}, dtype))
    return made


def _data_file(settings: Settings) -> Path | None:
    if settings.data is not None:
        return Path(settings.data)
    return _TLDR_SAMPLE if _TLDR_SAMPLE.exists() else None


def inputs(case: Case, settings: Settings, seed: int) -> Inputs:
    """The model on the device, and the case's group."""
    path = bundled_model_path() if settings.model is None else settings.model
    dtype = getattr(torch, case.dtype)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").to(settings.device)
    for parameter in model.parameters():  # memory of their own, not pages of the file that are read on first use
        parameter.data = parameter.data.clone()
    if "data" in case.shapes:
        group = _real_group(case, _data_file(settings), AutoTokenizer.from_pretrained(path))
    else:
        group = _random_group(case, model.get_input_embeddings().weight.shape[0], seed)
    return Inputs(model.eval(), group, settings.device)


def _random_group(case: Case, vocab: int, seed: int) -> Group:
    rng = np.random.default_rng(seed)
    length = case.shapes
    query = rng.integers(0, vocab, length["query"])
    prompts = [np.r_[query, rng.integers(0, vocab, length["constitution"])] for _ in range(length["C"])]
    return Group(prompts, [rng.integers(0, vocab, length["response"]) for _ in range(length["R"])])


def _real_group(case: Case, file: Path, tokenizer) -> Group:
    """The longest post, or that whose own group shares as much as the middle one of the file does.

    Further constitutions are other posts', then new pairs of all their principles; responses are the next posts'.
    """
    examples = load_examples(file)
    template = PromptTemplate.load("query_first")
    groups = [tokenize_example(example, tokenizer, template) for example in examples]
    if case.shapes["post"] == "longest":
        at = int(np.argmax([len(group.prompts[0]) for group in groups]))
    else:
        at = int(np.argsort([pack([group]).token_ratio for group in groups])[len(groups) // 2])
    examples = examples[at:] + examples[:at]
    pairs = itertools.permutations(dict.fromkeys(itertools.chain.from_iterable(map(_principles, examples))), 2)
    constitutions = dict.fromkeys(text for example in examples for text in example.constitutions)
    constitutions |= dict.fromkeys(f"1. {first}\n2. {second}" for first, second in pairs)
    responses = dict.fromkeys(text for example in examples for text in example.responses)
    C, R = case.shapes["C"], case.shapes["R"]
    if min(len(constitutions) - C, len(responses) - R) < 0:
        raise ValueError(f"data: expected {C} constitutions and {R} responses in {file.name}, got fewer")
    example = replace(examples[0], constitutions=list(constitutions)[:C], responses=list(responses)[:R])
    return tokenize_example(example, tokenizer, template)


def _principles(example: Example) -> list[str]:
    """A constitution's numbered lines, without the numbers."""
    return [line.partition(". ")[2] for text in example.constitutions for line in text.splitlines()]


def token_ratio(results: list[dict]) -> None:
    """How much of the saving in tokens an arm's time over ours is."""
    for result in results:
        if result["peer"] != "sami-fast" and result.get("times_ours") and "token ratio" in result["facts"]:
            result["facts"]["of token ratio"] = result["times_ours"] / result["facts"]["token ratio"]


SUITE = Suite(
    name="end_to_end",
    title="SAMI step: tokens to loss and gradients",
    cases=cases,
    inputs=inputs,
    limits={
        "float32": {"matrix": 1e-4, "loss": 1e-4, "gradients": 1e-4},
        "bfloat16": {"matrix": 2e-2, "loss": 5e-2, "gradients": 1e-1},
    },
    isolated=True,
    statistic="best",
    annotate=token_ratio,
)


# --------------------------------------------------------------------------------------------------------------------
# Arms


def _infonce(matrix: torch.Tensor) -> torch.Tensor:
    own = torch.arange(len(matrix), device=matrix.device)
    return (cross_entropy(matrix, own) + cross_entropy(matrix.t(), own)) / 2


def _prepared(run: Callable, made: Inputs, backward: bool, tokens: int, attended: int, predicted: int) -> Prepared:
    packed = pack([made.group])
    facts = {"tokens": tokens, "token ratio": packed.whole_tokens / packed.num_tokens}
    return Prepared(run, made.flops(tokens, attended, predicted, backward), made.bytes(backward), facts)


@SUITE.arm("one sequence at a time", peer="transformers", timed=False)
def one_by_one(made: Inputs, backward: bool) -> Prepared:
    """Every sequence whole and by itself, at least in float32; a second pass takes the gradients, the matrix known."""
    model, (C, R) = made.model, made.group.shape
    if model.dtype.itemsize < 4:
        model.float()

    def mean_logprob(ids: torch.Tensor, length: int) -> torch.Tensor:
        logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=length + 1).logits[0, :-1]
        # In float32 the CPU's log_softmax over a vocabulary is off by 2e-5, all to one side.
        return -cross_entropy(logits.double(), ids[-length:]).to(logits.dtype)

    def run() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            entries = torch.stack([mean_logprob(*sequence) for sequence in made.sequences()])
        matrix = entries.view(C, R).requires_grad_(backward)
        loss = _infonce(matrix)
        if backward:
            loss.backward()
            for sequence, upstream in zip(made.sequences(), matrix.grad.flatten(), strict=True):
                mean_logprob(*sequence).backward(upstream)
        return made.numbers(matrix, loss)

    lengths = [len(ids) for ids, _ in made.sequences()]
    predicted = sum(length for _, length in made.sequences())
    return _prepared(run, made, backward, sum(lengths), sum(n * (n + 1) // 2 for n in lengths), predicted)


@SUITE.arm("prefix tree", peer="sami-fast", ours=True)
def prefix_tree(made: Inputs, backward: bool, **options: bool) -> Prepared:
    """pack, score, infonce_loss, backward; `options` of `score`."""

    def run() -> dict[str, torch.Tensor]:
        made.model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(backward):
            scores = score(made.model, pack([made.group]).to(made.device), **options)
            loss = infonce_loss(scores).loss
        if backward:
            loss.backward()
        return made.numbers(scores.matrix[0], loss)

    packed = pack([made.group])
    attended = int((packed.position_ids + 1).sum())
    return _prepared(run, made, backward, packed.num_tokens, attended, len(packed.labels))


def recomputed(keep_attention: bool, made: Inputs, backward: bool) -> Prepared:
    """The same where the backward computes every layer again, from its input or from that and its attention."""
    if not backward:
        raise Unsupported("a forward by itself keeps nothing that could be computed again")
    prepared = prefix_tree(made, backward, keep_attention=keep_attention)

    def run() -> dict[str, torch.Tensor]:
        made.model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            return prepared.run()
        finally:
            made.model.eval().gradient_checkpointing_disable()

    return replace(prepared, run=run)


SUITE.arm("prefix tree, layers recomputed", peer="sami-fast")(functools.partial(recomputed, False))
SUITE.arm("prefix tree, attention kept", peer="sami-fast")(functools.partial(recomputed, True))


@SUITE.arm("padded, full logits", peer="transformers")
def padded(made: Inputs, backward: bool) -> Prepared:
    """All sequences in one right-padded batch, logits of every position, as the reference code of SAMI."""
    model, (C, R) = made.model, made.group.shape
    pad = model.config.pad_token_id or 0

    def run() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        sequences, lengths = zip(*made.sequences(), strict=True)
        input_ids = pad_sequence(sequences, batch_first=True, padding_value=pad)
        ends = torch.tensor([len(ids) for ids in sequences], device=made.device)[:, None]
        position = torch.arange(input_ids.shape[1], device=made.device)
        starts = ends - torch.tensor(lengths, device=made.device)[:, None]
        scored = ((position >= starts) & (position < ends))[:, 1:]
        with torch.set_grad_enabled(backward):
            logits = model(input_ids=input_ids, attention_mask=(position < ends).long(), use_cache=False).logits
            logprobs = logits[:, :-1].log_softmax(dim=-1).gather(2, input_ids[:, 1:, None]).squeeze(2)
            matrix = ((logprobs * scored).sum(dim=1) / scored.sum(dim=1)).view(C, R)
            loss = _infonce(matrix)
        if backward:
            del logits, logprobs
            loss.backward()
        return made.numbers(matrix, loss)

    lengths = [len(ids) for ids, _ in made.sequences()]
    tokens = len(lengths) * max(lengths)
    return _prepared(run, made, backward, tokens, sum(n * (n + 1) // 2 for n in lengths), tokens)
