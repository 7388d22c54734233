"""Log-probabilities of labels from hidden states and head: ours, full logits, and the fused losses of other libraries.

Every arm gets the gradient of each label's log-probability after its forward. With the head frozen only d(hidden) is
taken; the forward by itself runs under no_grad, whatever the regime of the case. Numbers are compared at up to 2048
tokens and 2048 vectors of the head, half of them of labels: an error in the small gradients of all the others would not
show beside those.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from benchmarks.suite import Case, Prepared, Settings, Suite, Unsupported
from sami_fast import linear_logprob, ops

_SAMPLE = 2048
_CHUNK = 1024  # rows
_EXACT_LOGITS = 1 << 25  # of the oracle, at a time
_FROZEN, _TRAINABLE = "frozen head", "trainable head"

# --------------------------------------------------------------------------------------------------------------------
# Cases

_CASES = {  # device -> tokens, hidden size, vocabulary, quick
    "cuda": [(8192, 4096, 32000, True), (8192, 2048, 128256, False), (4096, 4096, 128256, False)],
    "cpu": [(512, 256, 8192, True), (256, 576, 49152, False)],
}


def cases(settings: Settings) -> list[Case]:
    """Heads of Mistral-7B, Llama-3.2-1B and Llama-3-8B on CUDA, SmolLM2's on the CPU; each frozen and trainable."""
    dtype = "bfloat16" if settings.device == "cuda" else "float32"
    return [
        Case(f"{N} x {H} x {V}, {regime}", {"N": N, "H": H, "V": V, "regime": regime}, dtype, quick)
        for N, H, V, quick in _CASES[settings.device]
        for regime in (_FROZEN, _TRAINABLE)
    ]


@dataclass(frozen=True)
class Inputs:
    """hidden [N, H], weight [V, H], labels [N] and the gradient of every label's log-probability [N], float32.

    Attributes:
        tokens, of_labels, of_others: int64, where logprob and d(hidden), and where d(weight) are compared.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    grad_logprob: torch.Tensor
    trains: bool
    tokens: torch.Tensor
    of_labels: torch.Tensor
    of_others: torch.Tensor

    @property
    def on_gpu(self) -> bool:
        return self.hidden.device.type == "cuda"

    def numbers(self, returned: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        """From log-probabilities, and the gradients of hidden and weight where there are any."""
        logprob, *grads = returned
        numbers = {"logprob": logprob[self.tokens]}
        if grads:
            numbers["dhidden"] = grads[0][self.tokens]
        if len(grads) > 1:
            numbers |= {"dweight": grads[1][self.of_labels], "dweight, no label": grads[1][self.of_others]}
        return numbers

    def prepared(self, run: Callable[[], tuple[torch.Tensor, ...]], backward: bool) -> Prepared:
        """Useful work: the logits, and a product of their size for each gradient.

        A head that trains is read twice, as the upstream gradients are known after the forward only.
        """
        products = 1 + backward * (1 + self.trains)
        read = self.hidden.nbytes + self.weight.nbytes
        written = (self.hidden.nbytes + self.trains * (read + self.weight.nbytes)) if backward else 0
        flops = 2.0 * products * self.hidden.numel() * len(self.weight)
        return Prepared(run, flops, float(read + written), numbers=self.numbers)


def inputs(case: Case, settings: Settings, seed: int) -> Inputs:
    """Logits of standard deviation 2; the label's is raised by 0 to 20: hopeless labels, likely ones, certain ones."""
    N, H, V = (case.shapes[name] for name in "NHV")
    device, dtype = settings.device, getattr(torch, case.dtype)
    generator = torch.Generator(device).manual_seed(seed)
    normal = functools.partial(torch.randn, generator=generator, device=device)
    weight = normal(V, H).mul_(2 * H**-0.5).to(dtype)
    labels = torch.randint(V, (N,), generator=generator, device=device)
    pull = 5 * torch.rand(N, 1, generator=generator, device=device)
    hidden = torch.addcmul(normal(N, H), weight[labels].float(), pull).to(dtype)
    is_label = torch.zeros(V, dtype=torch.bool, device=device).index_fill_(0, labels, True)
    tokens = torch.randperm(N, generator=generator, device=device)[:_SAMPLE]
    of_labels, of_others = (
        x[torch.randperm(len(x), generator=generator, device=device)[: _SAMPLE // 2]]
        for x in (is_label.nonzero().squeeze(1), (~is_label).nonzero().squeeze(1))
    )
    trains = case.shapes["regime"] == _TRAINABLE
    return Inputs(hidden, weight, labels, normal(N), trains, tokens, of_labels, of_others)


_NAMES = "logprob", "dhidden", "dweight", "dweight, no label"
# At 16 bits some two or three times what full logits of that dtype are off by.
_LIMITS = {"float32": (1e-5, 2e-5, 2e-5, 2e-5), "bfloat16": (4e-3, 1e-2, 1e-2, 3e-2)}

SUITE = Suite(
    name="logprob",
    title="Log-probabilities of labels from a language-model head",
    cases=cases,
    inputs=inputs,
    limits={dtype: dict(zip(_NAMES, limits, strict=True)) for dtype, limits in _LIMITS.items()},
)

# --------------------------------------------------------------------------------------------------------------------
# Arms


@SUITE.arm("full logits in float64", peer="torch", timed=False)
def oracle(made: Inputs, backward: bool) -> Prepared:
    """The formula, some rows at a time."""
    rows = max(1, _EXACT_LOGITS // len(made.weight))
    wanted = [made.hidden, made.weight][: backward * (1 + made.trains)]

    def run() -> tuple[torch.Tensor, ...]:
        weight = made.weight.double().requires_grad_(len(wanted) > 1)
        logprobs, grads = [], []
        for at in range(0, len(made.hidden), rows):
            part = slice(at, at + rows)
            hidden = made.hidden[part].double().requires_grad_(backward)
            logprob = linear(hidden, weight).log_softmax(dim=1).gather(1, made.labels[part, None]).squeeze(1)
            if backward:
                logprob.backward(made.grad_logprob[part].double())
                grads.append(hidden.grad)
            logprobs.append(logprob.detach())
        gradients = torch.cat(grads) if grads else None, weight.grad
        return torch.cat(logprobs), *(x for x in gradients if x is not None)

    return made.prepared(run, backward)


def _arm(made: Inputs, backward: bool, logprob: Callable[..., torch.Tensor]) -> Prepared:
    """An arm that is a function (hidden, weight, labels) -> log-probabilities, differentiable."""
    hidden = made.hidden.detach().requires_grad_(backward)
    weight = made.weight.detach().requires_grad_(backward and made.trains)
    leaves = [x for x in (hidden, weight) if x.requires_grad]

    def run() -> tuple[torch.Tensor, ...]:
        with torch.set_grad_enabled(backward):
            result = logprob(hidden, weight, made.labels)
        if result.dtype != torch.float32:
            raise Unsupported(f"its result is {result.dtype}".replace("torch.", ""))
        return result.detach(), *(torch.autograd.grad(result, leaves, made.grad_logprob) if backward else ())

    return made.prepared(run, backward)


def _needs_gpu(made: Inputs) -> None:
    if not made.on_gpu:
        raise Unsupported("takes CUDA tensors")


def ours(backend: str, made: Inputs, backward: bool) -> Prepared:
    """`sami_fast.linear_logprob`."""
    if backend != "reference":
        _needs_gpu(made)
    return _arm(made, backward, functools.partial(linear_logprob, backend=backend))


# The one that others are divided by is the first that runs.
for _backend in ops.dispatch.IMPLEMENTATIONS["linear_logprob"]:
    SUITE.arm(f"ours, {_backend}", peer="sami-fast", ours=True)(functools.partial(ours, _backend))


def _from_logits(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    # As transformers does: logits of the weights' dtype, and only then in float32.
    return -cross_entropy(linear(hidden, weight).float(), labels, reduction="none")


@SUITE.arm("full logits", peer="torch")
def full_logits(made: Inputs, backward: bool) -> Prepared:
    return _arm(made, backward, _from_logits)


@SUITE.arm("full logits, chunks checkpointed", peer="torch")
def checkpointed(made: Inputs, backward: bool) -> Prepared:
    """`torch.utils.checkpoint` for each 1024 rows."""

    def logprob(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        parts = zip(hidden.split(_CHUNK), labels.split(_CHUNK), strict=True)
        return torch.cat([checkpoint(_from_logits, h, weight, y, use_reentrant=False) for h, y in parts])

    return _arm(made, backward, logprob)


@SUITE.arm("F.linear_cross_entropy", peer="torch")
def linear_cross_entropy(made: Inputs, backward: bool) -> Prepared:
    """PyTorch's own, in chunks of its choice."""
    loss = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if loss is None:
        raise Unsupported("came with PyTorch 2.13")
    options = torch.nn.LinearCrossEntropyOptions()
    return _arm(made, backward, lambda *head: -loss(*head, reduction="none", options=options))


@SUITE.arm("TRL", peer="trl")
def trl(made: Inputs, backward: bool) -> Prepared:
    """The log-probabilities of its trainers, in chunks of the width that they take."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as width

    def logprob(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
        return ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, width, None, 1.0, ())[0]

    return _arm(made, backward, logprob)


def liger(sums: torch.dtype | None, made: Inputs, backward: bool) -> Prepared:
    """Fused linear cross-entropy; `sums`: dtype in which the gradient of the head adds up, None its own."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as loss

    _needs_gpu(made)
    return _arm(made, backward, lambda *head: -loss(*head, reduction="none", accum_dtype=sums))


def cce(filter_eps: str | None, made: Inputs, backward: bool) -> Prepared:
    """Cut cross-entropy; `filter_eps`: below what probability a gradient is dropped."""
    from cut_cross_entropy import linear_cross_entropy as loss

    _needs_gpu(made)
    return _arm(made, backward, lambda *head: -loss(*head, reduction="none", filter_eps=filter_eps))


SUITE.arm("Liger", peer="liger-kernel")(functools.partial(liger, None))
SUITE.arm("Liger, float32 sums", peer="liger-kernel")(functools.partial(liger, torch.float32))
SUITE.arm("CCE", peer="cut-cross-entropy")(functools.partial(cce, "high"))
SUITE.arm("CCE, no filter", peer="cut-cross-entropy")(functools.partial(cce, None))


@SUITE.arm("quack, full logits", peer="quack-kernels")
def quack(made: Inputs, backward: bool) -> Prepared:
    """Its cross-entropy kernel on full logits, which alone of its functions gives a loss for each token."""
    from quack.linear_cross_entropy import linear_cross_entropy_func as loss

    _needs_gpu(made)
    return _arm(made, backward, lambda h, weight, y: -loss(h, weight, None, y, reduction="none"))


@SUITE.arm("quack, fused", peer="quack-kernels")
def quack_fused(made: Inputs, backward: bool) -> Prepared:
    """Its gradients are made in the forward, before those of the tokens are known."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy  # noqa: F401

    raise Unsupported("mean or sum over tokens only")
