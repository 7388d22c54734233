"""The suites of head and loss on small cases: every arm agrees with float64, or says why it does not run."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tolerance import assert_exact
from torch.nn.functional import cross_entropy, linear

sys.path.append(str(Path(__file__).parent.parent))  # benchmarks/ is not installed

from benchmarks import infonce, logprob
from benchmarks.harness import run_suite
from benchmarks.suite import PASSES, Case, Settings, find_suites, load_suite
from sami_fast.ops.dispatch import EXTENSION_DEVICES

SETTINGS = Settings(quick=True, threads=1)
HEAD = {"N": 61, "H": 24, "V": 501}
FROZEN, TRAINABLE = HEAD | {"regime": "frozen head"}, HEAD | {"regime": "trainable head"}
HEAD_CASES = [
    Case("frozen", FROZEN, quick=True),
    Case("trainable", TRAINABLE, quick=True),
    Case("bf16", TRAINABLE, "bfloat16", quick=True),
]
HEAD_NUMBERS = ["logprob", "dhidden", "dweight", "dweight, no label"]
PEERS = {"TRL", "Liger", "Liger, float32 sums", "CCE", "CCE, no filter", "quack, full logits", "quack, fused"}
IN_GRAPHS = {"ours, cuda, CUDA graph", "ours, triton, CUDA graph", "eager, CUDA graph"}
HAS_LINEAR_CROSS_ENTROPY = hasattr(torch.nn.functional, "linear_cross_entropy")


def _run(name, cases):
    assert name in find_suites()
    return run_suite(replace(load_suite(name), cases=lambda settings: cases), SETTINGS)["results"]


def test_arms_of_the_head_agree_or_say_why_not():
    ran = set()
    for result in _run("logprob", HEAD_CASES):
        arm, backward, case = result["arm"], PASSES[result["pass"]], result["case"]
        if arm in PEERS:
            assert result["outcome"] in ("not installed", "unsupported", "ok"), result
        elif arm == "ours, triton":
            assert result["detail"] == "takes CUDA tensors", result
        elif arm == "F.linear_cross_entropy" and not HAS_LINEAR_CROSS_ENTROPY:
            assert result["detail"] == "came with PyTorch 2.13", result
        elif arm == "F.linear_cross_entropy" and case == "bf16":
            assert result["detail"] == "its result is bfloat16", result
        else:
            assert result["outcome"] == "ok", result
            wanted = HEAD_NUMBERS[: 1 + backward * (1 if case == "frozen" else 3)]
            assert list(result.get("errors", wanted)) == wanted
            ran.add(arm)
    assert len(ran) == 4 + HAS_LINEAR_CROSS_ENTROPY


def test_numbers_cover_the_head_and_work_is_counted():
    case = Case("", TRAINABLE)
    made = logprob.inputs(case, SETTINGS, 0)
    labels = made.labels.unique()
    assert made.of_labels.sort()[0].equal(labels) and len(made.of_others) == 501 - len(labels)
    assert made.tokens.sort()[0].equal(torch.arange(61))
    exact = -cross_entropy(linear(made.hidden, made.weight), made.labels, reduction="none")
    assert exact.max() > -0.1 and exact.min() < -4  # certain labels and hopeless ones
    work = {
        (shape["regime"], backward): logprob.full_logits(logprob.inputs(Case("", shape), SETTINGS, 0), backward)
        for shape in (FROZEN, TRAINABLE)
        for backward in (False, True)
    }
    product, hidden, weight = 2 * 61 * 24 * 501, 4 * 61 * 24, 4 * 501 * 24
    assert {key: (prepared.flops / product, prepared.bytes) for key, prepared in work.items()} == {
        ("frozen head", False): (1, hidden + weight),
        ("frozen head", True): (2, 2 * hidden + weight),
        ("trainable head", False): (1, hidden + weight),
        ("trainable head", True): (3, 3 * hidden + 3 * weight),
    }


def _library(calls, name, function, loss):
    module = ModuleType(name)

    def called(*head, **options):
        calls.append(options)
        return loss(*head)

    setattr(module, function, called)
    return module


@pytest.mark.parametrize("shape", [FROZEN, TRAINABLE], ids=["frozen", "trainable"])
def test_books_of_the_arms_for_gpus(shape, monkeypatch):
    """The same numbers, with plain PyTorch where their libraries need a GPU."""

    def loss(hidden, weight, labels):
        return cross_entropy(linear(hidden, weight), labels, reduction="none")

    class ChunkedLogProbFunction:
        @staticmethod
        def apply(hidden, weight, bias, targets, temperature, width, softcap, scale, outputs):
            assert (bias, temperature, width, softcap, scale, outputs) == (None, 1.0, 7, None, 1.0, ())
            return -loss(hidden, weight, targets), None, None, None, None

    calls = []
    modules = {
        "liger_kernel.transformers.functional": ("liger_fused_linear_cross_entropy", loss),
        "cut_cross_entropy": ("linear_cross_entropy", loss),
        "quack.linear_cross_entropy": ("linear_cross_entropy_func", lambda h, weight, _, y: loss(h, weight, y)),
    }
    for name, (function, what) in modules.items():
        monkeypatch.setitem(sys.modules, name, _library(calls, name, function, what))
    for name in ("liger_kernel", "liger_kernel.transformers", "quack", "trl", "trl.kernels", "trl.trainer.utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "trl.trainer", ModuleType("trl.trainer"))
    sys.modules["trl.kernels"].ChunkedLogProbFunction = ChunkedLogProbFunction
    sys.modules["trl.trainer.utils"]._CHUNKED_LOGPROB_CHUNK_SIZE = 7
    monkeypatch.setattr(logprob.Inputs, "on_gpu", True)

    made = logprob.inputs(Case("", shape), SETTINGS, 0)
    exact = logprob.oracle(made, True)
    expected = exact.numbers(exact.run())
    for arm in (arm for arm in logprob.SUITE.arms if arm.name in PEERS - {"quack, fused"}):
        prepared = arm.prepare(made, True)
        numbers = prepared.numbers(prepared.run())
        assert list(numbers) == list(expected) == HEAD_NUMBERS[: 2 if shape == FROZEN else 4]
        for name, number in numbers.items():
            assert_exact(number, expected[name], f"{arm.name}, {name}", slack=2)
    assert all(options.pop("reduction") == "none" for options in calls)
    sums = [{"accum_dtype": None}, {"accum_dtype": torch.float32}]
    assert calls == [*sums, {"filter_eps": "high"}, {"filter_eps": None}, {}]


def test_arms_of_the_loss_agree_or_say_why_not():
    cases = [Case(f"{B} x {n}x{n}", {"groups": B, "C": n, "R": n}, quick=True) for B, n in ((1, 2), (5, 3))]
    for result in _run("infonce", cases):
        not_here = {"ours, triton", "compiled", *IN_GRAPHS} | (set() if "cpu" in EXTENSION_DEVICES else {"ours, cuda"})
        if result["arm"] in not_here:
            assert result["outcome"] == "unsupported" and result["detail"], result
            continue
        assert result["outcome"] == "ok", result
        assert set(result.get("errors", ())) <= {"loss", "matrix", "gradient"}
        N = infonce.inputs(next(c for c in cases if c.name == result["case"]), SETTINGS, 0).token_logprobs.numel()
        itemsize = 8 if result["arm"] == "eager in float64" else 4
        assert result["bytes"] == itemsize * N * (2 if PASSES[result["pass"]] else 1)


@pytest.mark.parametrize("suite", [logprob, infonce])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_told_apart(suite, device):
    made = suite.cases(Settings(device=device))
    assert len({case.name for case in made}) == len(made) and any(case.quick for case in made)
    assert {case.dtype for case in made} <= set(suite.SUITE.limits)
