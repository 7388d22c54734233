"""Symmetric InfoNCE of many groups, from the log-probabilities of their response tokens to the gradients of those.

Ours computes metrics and gradient with the loss, in the forward as well; the other arms have neither to do there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.suite import Case, Prepared, Settings, Suite, Unsupported
from sami_fast import ops, segment_infonce

_LENGTHS = 43, 127  # tokens of a response, both included

# --------------------------------------------------------------------------------------------------------------------
# Cases

_GROUPS = (1, 64, 1024)
_QUICK = {(1, 2), (64, 8)}


def cases(settings: Settings) -> list[Case]:
    """Groups of one shape, responses of different lengths."""
    return [
        Case(f"{B} x {n}x{n}", {"groups": B, "C": n, "R": n}, quick=(B, n) in _QUICK)
        for n in (2, 8, 16)
        for B in _GROUPS
    ]


@dataclass(frozen=True)
class Inputs:
    """token_logprobs [N] of B groups of n x n, pair s owning offsets[s]:offsets[s + 1]; response k is of prompt k."""

    token_logprobs: torch.Tensor
    offsets: torch.Tensor
    groups: int
    side: int

    @property
    def on_gpu(self) -> bool:
        return self.token_logprobs.device.type == "cuda"


def inputs(case: Case, settings: Settings, seed: int) -> Inputs:
    """Log-probabilities with a mean of -2 everywhere: no pair is far from any other."""
    B, C, R = (case.shapes[name] for name in ("groups", "C", "R"))
    generator = torch.Generator().manual_seed(seed)
    shortest, longest = _LENGTHS
    # A response has as many tokens under every prompt.
    lengths = torch.randint(shortest, longest + 1, (B, 1, R), generator=generator).expand(B, C, R).flatten()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    tokens = torch.empty(int(offsets[-1]), dtype=getattr(torch, case.dtype)).exponential_(0.5, generator=generator)
    return Inputs(tokens.neg_().to(settings.device), offsets.to(settings.device), B, C)


SUITE = Suite(
    name="infonce",
    title="Symmetric InfoNCE from token log-probabilities",
    cases=cases,
    inputs=inputs,
    limits={"float32": {"loss": 1e-5, "matrix": 1e-5, "gradient": 1e-5}},
    rounds=3,
)

# --------------------------------------------------------------------------------------------------------------------
# Arms


def _arm(made: Inputs, backward: bool, function: Callable) -> Prepared:
    """An arm that is a function of tokens -> loss of each group, matrices; bytes: tokens read and gradients written."""
    tokens = made.token_logprobs.detach().requires_grad_(backward)

    def run() -> dict[str, torch.Tensor]:
        with torch.set_grad_enabled(backward):
            loss, matrix = function(tokens)
        gradient = {"gradient": torch.autograd.grad(loss.mean(), tokens)[0]} if backward else {}
        return {"loss": loss.detach(), "matrix": matrix.detach().flatten()} | gradient

    return Prepared(run, float(tokens.numel()), float((1 + backward) * tokens.nbytes))


def formula(tokens: torch.Tensor, offsets: torch.Tensor, groups: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss [B] and matrix [B, n, n], in the dtype of the tokens."""
    # `unsafe`: offsets are not read back to be checked.
    matrix = torch.segment_reduce(tokens, "mean", offsets=offsets, unsafe=True).view(groups, side, side)
    logp = matrix.log_softmax(dim=1) + matrix.log_softmax(dim=2)
    return -0.5 * logp.diagonal(dim1=1, dim2=2).mean(dim=1), matrix


def _by_formula(made: Inputs, backward: bool, function: Callable = formula) -> Prepared:
    return _arm(made, backward, lambda tokens: function(tokens, made.offsets, made.groups, made.side))


@SUITE.arm("eager in float64", peer="torch", timed=False)
def oracle(made: Inputs, backward: bool) -> Prepared:
    return _by_formula(Inputs(made.token_logprobs.double(), made.offsets, made.groups, made.side), backward)


def ours(backend: str, made: Inputs, backward: bool) -> Prepared:
    """`sami_fast.segment_infonce`."""
    if backend == "triton" and not made.on_gpu:
        raise Unsupported("takes CUDA tensors")
    device = made.offsets.device.type
    if backend == "cuda" and device not in ops.dispatch.EXTENSION_DEVICES:
        raise Unsupported(f"sami_fast._C was not built for {device}")
    shapes = [(made.side, made.side)] * made.groups
    positives = torch.arange(made.side, device=made.offsets.device).repeat(made.groups)
    call = functools.partial(segment_infonce, offsets=made.offsets, shapes=shapes, positives=positives, backend=backend)
    return _arm(made, backward, lambda tokens: call(tokens)[:2])


# The one that others are divided by is the first that runs.
for _backend in ops.dispatch.IMPLEMENTATIONS["segment_infonce"]:
    SUITE.arm(f"ours, {_backend}", peer="sami-fast", ours=True)(functools.partial(ours, _backend))


@SUITE.arm("eager", peer="torch")
def eager(made: Inputs, backward: bool) -> Prepared:
    """All groups in one batch."""
    return _by_formula(made, backward)


def in_graph(prepare: Callable[[Inputs, bool], Prepared], made: Inputs, backward: bool) -> Prepared:
    """The same replayed from a CUDA graph: the device's time alone, without what Python and autograd take."""
    if not made.on_gpu:
        raise Unsupported("CUDA graphs need a GPU")
    prepared = prepare(made, backward)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is made once, by Triton say, is made outside the graph
        prepared.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = prepared.run()

    def replay() -> dict[str, torch.Tensor]:
        graph.replay()
        return returned

    return replace(prepared, run=replay)


for _backend in ("cuda", "triton"):
    _prepare = functools.partial(in_graph, functools.partial(ours, _backend))
    SUITE.arm(f"ours, {_backend}, CUDA graph", peer="sami-fast")(_prepare)
SUITE.arm("eager, CUDA graph", peer="torch")(functools.partial(in_graph, eager))


@functools.cache
def _compiled() -> Callable:
    return torch.compile(formula, fullgraph=True, dynamic=True)


@SUITE.arm("compiled", peer="torch")
def compiled(made: Inputs, backward: bool) -> Prepared:
    """The same under `torch.compile`, once for all shapes; on the CPU that takes longer than all the rest."""
    if not made.on_gpu:
        raise Unsupported("compiled for GPUs only")
    return _by_formula(made, backward, _compiled())
