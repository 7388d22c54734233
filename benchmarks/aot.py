"""Ahead-of-time gate: compile every shipped kernel for sm_90 and sm_80, with no GPU present.

    python -m benchmarks.aot [--jobs 2] [--only "sm_90 bf16 128"]

Checked from PTX and from what ptxas reports: no spilled bytes, shared memory within the limit, and in every loop that
multiplies matrices asynchronous copies and, for 16-bit types on sm_90, `wgmma` that the assembler did not serialise.
Where nvcc is on the PATH, the kernels of csrc/ too: no spilled bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.suite import ROOT
from sami_fast.kernels import linear_logprob, linear_statistics, segment_infonce
from sami_fast.kernels import prefix_attention as kernels
from sami_fast.kernels.launch import Call

# Bytes of shared memory a program may use. Pointer configurations also serve sm_86, sm_89 and sm_120.
SHARED_MEMORY = {"descriptors": 227 << 10, "pointers": 99 << 10}
# Square groups, narrow ones and the largest: every tile that the launcher makes of squares is among them.
INFONCE_SHAPES = [(1, 1), (2, 2), (3, 5), (4, 4), (8, 8), (16, 16), (32, 32), (2, 16), (16, 2), (1, 32), (32, 1)]
INFONCE_SHAPES += [(4, 64), (64, 4), (32, 64), (64, 32), (8, 256), (256, 8), (1, 256), (256, 1)]
INFONCE_SHAPES += [(64, 64), (128, 128), (16, 256), (256, 16), (256, 256)]
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}


@dataclass(frozen=True)
class Case:
    """What decides the code of a kernel."""

    architecture: int
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    group: int = 4
    options: bool = False  # window, soft-cap and sinks

    def __str__(self) -> str:
        size = f"{self.head_dim}" if self.head_dim == self.value_dim else f"{self.head_dim}/{self.value_dim}"
        notes = " all options" * self.options + f" G={self.group}" * (self.group != 4)
        return f"sm_{self.architecture} {_TYPES[self.dtype]} {size}{notes}"


@dataclass(frozen=True)
class HeadCase:
    """Of the kernels around a head's products: the size of its blocks follows from rows and vocabulary."""

    architecture: int
    dtype: torch.dtype
    rows: int
    vocabulary: int
    options: bool = False  # bias, scale and soft-cap

    def __str__(self) -> str:
        size = f"head {self.rows} x {self.vocabulary}"
        return f"sm_{self.architecture} {_TYPES[self.dtype]} {size}" + " all options" * self.options


@dataclass(frozen=True)
class InfonceCase:
    """Of InfoNCE in Triton: groups of at most C x R."""

    architecture: int
    C: int
    R: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"sm_{self.architecture} {_TYPES[self.dtype]} infonce {self.C} x {self.R}"


@dataclass(frozen=True)
class ExtensionCase:
    """A source of csrc/, for an architecture as nvcc names it."""

    architecture: str
    source: str

    def __str__(self) -> str:
        return f"sm_{self.architecture} {self.source}"


@dataclass(frozen=True)
class Report:
    """One compiled kernel; `loops` lists (matrix instructions, asynchronous copies) of each loop that multiplies."""

    case: Case | HeadCase | InfonceCase | ExtensionCase
    kernel: str
    launch: str
    loads: str
    registers: int
    spilled: int
    shared: int
    wgmma: int
    mma: int
    serialised: bool
    loops: list[tuple[int, int]]
    failures: list[str] = field(default_factory=list)


def cases() -> Iterator[Case | HeadCase | InfonceCase]:
    """Every shipped Triton configuration, with and without options; head sizes share those of the next power of two."""
    for architecture in (90, 80):
        for D, DV in ((64, 64), (128, 128), (256, 256), (192, 128)):
            yield Case(architecture, torch.bfloat16, D, DV)
            yield Case(architecture, torch.bfloat16, D, DV, options=True)
        for D in (80, 96, 192):
            yield Case(architecture, torch.bfloat16, D, D)
        for D in (64, 128, 256):
            yield Case(architecture, torch.float32, D, D, options=True)
        yield Case(architecture, torch.float16, 128, 128)
        yield Case(architecture, torch.bfloat16, 128, 128, group=7)
        for rows, vocabulary in ((8192, 128256), (300, 128256), (300, 2000), (300, 1000)):
            yield HeadCase(architecture, torch.bfloat16, rows, vocabulary)
            yield HeadCase(architecture, torch.bfloat16, rows, vocabulary, options=True)
        yield HeadCase(architecture, torch.float32, 300, 128256, options=True)
        yield HeadCase(architecture, torch.float16, 300, 128256)
        for C, R in INFONCE_SHAPES:
            yield InfonceCase(architecture, C, R)


def extension_cases() -> list[ExtensionCase]:
    """Every source of csrc/ for Hopper and A100; none where there is no nvcc."""
    sources = sorted(path.name for path in (ROOT / "csrc").glob("*.cu")) if shutil.which("nvcc") else []
    return [ExtensionCase(architecture, source) for architecture in ("90a", "80") for source in sources]


def calls(case: Case | HeadCase | InfonceCase, T: int = 64) -> list[Call]:
    """The launches of a forward and a backward over T tokens (a head: over its rows), on tensors without memory."""
    if isinstance(case, HeadCase):
        return _head_calls(case)
    if isinstance(case, InfonceCase):
        return _infonce_calls(case)
    Hkv = 2
    D, DV, Hq = case.head_dim, case.value_dim, Hkv * case.group
    shapes = (Hq, D), (Hkv, D), (Hkv, DV), (Hq, DV)
    q, k, v, grad_out = (torch.empty((T, *shape), dtype=case.dtype, device="meta") for shape in shapes)
    nodes = torch.tensor([[0, T, T]], dtype=torch.int32)
    position_ids = torch.empty(T, dtype=torch.int32, device="meta")
    window, softcap = (16, 30.0) if case.options else (None, None)
    attention = kernels.Attention.prepare(
        q, k, v, position_ids, nodes, D**-0.5, window, softcap, architecture=case.architecture
    )
    sinks = torch.empty(Hq, device="meta") if case.options else None
    out = torch.empty_like(grad_out)
    lse = torch.empty((T, Hq), device="meta")
    shift = torch.empty((Hq, T + -T % 128), device="meta")
    backward = kernels.backward_calls(attention, grad_out, lse, out, lse, shift, q, k, v)
    return [kernels.forward_call(attention, sinks, out, lse), *backward]


def _head_calls(case: HeadCase) -> list[Call]:
    """The launches of the three regimes, a part of the columns kept; of the statistics, with a second head or none."""
    H = 4096
    hidden = torch.empty((case.rows, H), dtype=case.dtype, device="meta")
    weight = torch.empty((case.vocabulary, H), dtype=case.dtype, device="meta")
    labels = torch.empty(case.rows, dtype=torch.int64, device="meta")
    bias = torch.empty(case.vocabulary, device="meta") if case.options else None
    head = (hidden, weight, labels, bias)
    options = (0.5, 30.0) if case.options else (1.0, None)
    launches: list[Call] = []
    with mock.patch.object(Call, "run", lambda call: launches.append(call)):
        for regime, keep_columns in (("no_grad", 0), ("frozen_head", 0), ("trained_head", case.vocabulary // 128 * 64)):
            outputs = linear_logprob.linear_logprob_forward(*head, *options, regime, keep_columns)
        linear_logprob.linear_logprob_backward(outputs[0], *head, *outputs, *options)
        for second in ((hidden, weight, bias), (None, None, None)):
            outputs = linear_statistics.linear_statistics_forward(*head, *second, *options)
            grads = [outputs[0]] * 3
            linear_statistics.linear_statistics_backward(*grads, *head, *second, *outputs, *options, head_trains=True)
    return launches


def _infonce_calls(case: InfonceCase) -> list[Call]:
    """Forward and backward of one group."""
    forward, options = segment_infonce.forward_launch(case.C, case.R)
    passes = {
        forward: {"MEAN": True} | options,
        segment_infonce._segment_infonce_backward_kernel: dict(segment_infonce.BACKWARD_OPTIONS),
    }
    launches = []
    for kernel, options in passes.items():
        dtypes = dict.fromkeys(kernel.arg_names, case.dtype)
        dtypes |= {"offsets": torch.int64, "table": torch.int32, "positives": torch.int64}
        tensors = {name: torch.empty(1, dtype=dtype, device="meta") for name, dtype in dtypes.items()}
        constants = {name: options.pop(name) for name in kernel.arg_names if name in options}
        launches.append(Call(kernel, (1,), tensors | constants, options))
    return launches


def _distinct(launches: list[Call]) -> list[Call]:
    """One of those that compile to the same."""
    code = {}
    for call in launches:
        absent = [name for name, value in call.arguments.items() if value is None]
        code.setdefault(f"{call.kernel.__name__} {call.arguments.get('BLOCK_V')} {absent}", call)
    return list(code.values())


def _source(call: Call) -> ASTSource:
    """What the launcher would compile for these arguments."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(call.kernel.params):
        value = call.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            kind = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, TensorDescriptor):
            kind = f"tensordesc<{_TYPES[value.base.dtype]}{value.block_shape}>".replace(" ", "")
        elif isinstance(value, torch.Tensor):
            kind = "*" + _TYPES[value.dtype]
        else:
            kind = "fp32" if isinstance(value, float) else "i32"
        signature[parameter.name] = kind
        multiple = isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
        if kind.startswith("*") or (kind == "i32" and multiple):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(call.kernel, signature, constants, attributes)


def _compile(call: Call, architecture: int) -> tuple[triton.compiler.CompiledKernel, str]:
    """The compiled kernel, and what ptxas said."""
    log = io.StringIO()
    with contextlib.ExitStack() as stack:
        for scope in (knobs.nvidia, knobs.compilation, knobs.cache):
            stack.enter_context(scope.scope())
        knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory())
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        stack.enter_context(contextlib.redirect_stdout(log))
        target = GPUTarget("cuda", architecture, 32)
        compiled = triton.compile(_source(call), target=target, options=call.options)
    return compiled, log.getvalue()


def _loops(ptx: str, matrix: re.Pattern) -> list[tuple[int, int]]:
    """(matrix instructions, asynchronous copies) between each label and the branches back to it, where any multiply."""
    copy = re.compile(r"\bcp\.async\.(?:c[ag]\.shared|bulk\.tensor)")
    lines = ptx.splitlines()
    labels: dict[str, int] = {}
    found = []
    for index, line in enumerate(lines):
        if label := re.match(r"(\$L\w+):", line):
            labels[label[1]] = index
        elif (branch := re.search(r"\bbra(?:\.uni)?\s+(\$L\w+)", line)) and branch[1] in labels:
            body = lines[labels[branch[1]] : index]
            count = sum(bool(matrix.search(x)) for x in body)
            if count:
                found.append((count, sum(bool(copy.search(x)) for x in body)))
    return found


def _spilled(log: str) -> int:
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))


def _check_extension(case: ExtensionCase) -> list[Report]:
    """Every kernel of a source, compiled as CMakeLists.txt has it."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["-std=c++17", "-O3", "-DNDEBUG", "-DSAMI_FAST_WITH_CUDA", "-Xptxas", "-v", "-cubin"]
        command = ["nvcc", *options, f"-arch=sm_{case.architecture}", "-o", f"{folder}/kernels.cubin"]
        command.append(str(ROOT / "csrc" / case.source))
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr}")
    return _read_ptxas(case, done.stderr)


def _read_ptxas(case: ExtensionCase, log: str) -> list[Report]:
    """A report for each kernel that ptxas speaks of."""
    reports = []
    for name, said in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", log, re.DOTALL):
        # _ZN...<name>_kernelI<arguments>EEv..., or _ZN...<name>_kernelE... of one that is no template
        kernel, arguments = re.search(r"\d([a-z][a-z_]*)_kernel(?:I(\w*?)EEv|E)", name).groups(default="")
        shared = re.search(r"(\d+) bytes smem", said)
        report = Report(
            case=case,
            kernel=kernel,
            launch=_template_arguments(arguments),
            loads="pointers",
            registers=int(re.search(r"Used (\d+) registers", said)[1]),
            spilled=_spilled(said),
            shared=int(shared[1]) if shared else 0,
            wgmma=0,
            mma=0,
            serialised=False,
            loops=[],
        )
        if report.spilled:
            report.failures.append("spills")
        reports.append(report)
    if not reports:
        raise RuntimeError(f"{case}: expected kernels in the output of ptxas, got {log!r}")
    return reports


def _template_arguments(mangled: str) -> str:
    """`IlLi8E` -> `int64, 8`."""
    types = {"i": "int32", "l": "int64"}
    return ", ".join(number or types[letter] for number, letter in re.findall(r"Li(\d+)E?|([il])", mangled))


def check(case: Case | HeadCase | InfonceCase | ExtensionCase) -> list[Report]:
    """Compile the launches of a case and say what is wrong with each."""
    if isinstance(case, ExtensionCase):
        return _check_extension(case)
    reports = []
    for call in _distinct(calls(case)) if isinstance(case, HeadCase) else calls(case):
        compiled, log = _compile(call, case.architecture)
        ptx = compiled.asm["ptx"]
        spilled = _spilled(log)
        name = call.kernel.__name__.strip("_").removesuffix("_kernel")
        if name == "grad_kv":
            name = "grad_" + "".join(x for x in "kv" if call.arguments[f"grad_{x}"] is not None)
        half = case.dtype != torch.float32
        multiplies = isinstance(case, Case) and name != "row_statistics"
        loads = "descriptors" if call.arguments.get("DESCRIPTORS") else "pointers"
        blocks = [str(call.arguments[f"BLOCK_{b}"]) for b in "MNVCRT" if f"BLOCK_{b}" in call.arguments]
        report = Report(
            case=case,
            kernel=name,
            launch=f"{'x'.join(blocks)} w{compiled.metadata.num_warps} s{compiled.metadata.num_stages}",
            loads=loads,
            registers=int(re.search(r"Used (\d+) registers", log)[1]),
            spilled=spilled,
            shared=compiled.metadata.shared,
            wgmma=ptx.count("wgmma.mma_async"),
            mma=len(re.findall(r"\bmma\.sync", ptx)),
            serialised="wgmma.mma_async instructions are serialized" in log,
            loops=_loops(ptx, re.compile(r"wgmma\.mma_async|\bmma\.sync" if half else r"\bfma\.rn\.f32"))
            if isinstance(case, Case)
            else [],
        )
        limit = SHARED_MEMORY[loads]
        problems = {
            "spills": report.spilled > 0,
            f"shared memory above {limit}": report.shared > limit,
            "a loop for full and one for partial steps expected": multiplies and len(report.loops) < 2,
            "a loop without asynchronous copies": any(copies == 0 for _, copies in report.loops),
            "no wgmma": multiplies and half and case.architecture == 90 and report.wgmma == 0,
            "wgmma serialised": report.serialised and loads == "descriptors",
        }
        report.failures.extend(problem for problem, there in problems.items() if there)
        reports.append(report)
    return reports


_HEADER = (
    f"{'case':32} {'kernel':15} {'launch':15} {'loads':11} {'regs':>4} {'spill':>5} {'shared':>6} {'wgmma':>5} "
    f"{'mma':>4}  loops (matrix, copies)"
)


def line(report: Report) -> str:
    """One row of the table."""
    return (
        f"{report.case!s:32} {report.kernel:15} {report.launch:15} {report.loads:11} {report.registers:4} "
        f"{report.spilled:5} {report.shared:6} {report.wgmma:5} {report.mma:4}  "
        + " ".join(f"({work}, {copies})" for work, copies in report.loops)
        + "".join(f"  FAILED: {problem}" for problem in report.failures)
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains it")
    options = parser.parse_args(arguments)
    if not isinstance(kernels._forward_kernel, triton.JITFunction):
        parser.error("TRITON_INTERPRET: expected unset, as interpreted kernels are not compiled")
    selected = [case for case in (*cases(), *extension_cases()) if options.only in str(case)]
    if not selected:
        parser.error(f"--only: expected text that a case's name contains, got {options.only!r}")
    if not extension_cases():
        print("csrc/: not compiled, as there is no nvcc on the PATH")
    print(f"triton {triton.__version__}\n{_HEADER}", flush=True)
    failed = total = 0
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for reports in pool.map(check, selected):
            for report in reports:
                print(line(report), flush=True)
                failed += bool(report.failures)
                total += 1
    print(f"{total - failed} of {total} kernels passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
