"""A part of `python -m benchmarks.aot`: kernels compiled for machines that are not here."""

import itertools
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent))  # benchmarks/ is not installed

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels have no code")


@pytest.mark.parametrize(
    ("architecture", "dtype", "sizes", "options"),
    [
        (90, torch.bfloat16, (64, 64), False),
        (90, torch.bfloat16, (128, 128), False),
        (90, torch.bfloat16, (128, 128), True),
        (80, torch.bfloat16, (128, 128), False),
    ],
    ids=str,
)
def test_shipped_kernels_compile_to_good_code(architecture, dtype, sizes, options):
    from benchmarks import aot

    case = aot.Case(architecture, dtype, *sizes, options=options)
    assert case in set(aot.cases())
    reports = aot.check(case)
    assert [report.kernel for report in reports][:3] == ["forward", "row_statistics", "grad_q"]
    for report in reports:
        assert not report.failures, aot.line(report)


@pytest.mark.parametrize(("C", "R"), [(4, 4), (32, 64), (256, 1)])
def test_shipped_infonce_kernels_do_not_spill(C, R):
    from benchmarks import aot

    case = aot.InfonceCase(80, C, R)
    assert case in set(aot.cases())
    reports = aot.check(case)
    kind = "strips" if C * R > 2048 else "forward"
    assert [report.kernel for report in reports] == [f"segment_infonce_{kind}", "segment_infonce_backward"]
    for report in reports:
        assert not report.failures, aot.line(report)


def test_every_tile_of_infonce_is_among_the_cases():
    from benchmarks import aot
    from sami_fast.kernels.segment_infonce import forward_launch

    def tiles(shapes):
        launches = (forward_launch(*shape) for shape in shapes)
        return {(kernel.__name__, *sorted(options.items())) for kernel, options in launches}

    squares = {(n, n) for n in range(1, 33)}
    assert tiles(squares) <= tiles(aot.INFONCE_SHAPES)


def test_registers_of_the_extension_are_read():
    from benchmarks import aot

    case = aot.ExtensionCase("90a", "segment_infonce.cu")
    if aot.extension_cases():
        assert case in aot.extension_cases()
        reports = aot.check(case)
        launches = {(report.kernel, report.launch) for report in reports}
        forward = {("segment_infonce_forward", str(lanes)) for lanes in (8, 32)}
        assert launches == forward | {("segment_infonce_backward", "")}
        for report in reports:
            assert report.registers > 0 and not report.failures, aot.line(report)
    log = (
        "ptxas info    : Compiling entry function '_ZN9sami_fast10row_kernelIlLi32EEEvPf' for 'sm_80'\n"
        "    24 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 64 registers, used 1 barriers, 512 bytes smem\n"
    )
    (report,) = aot._read_ptxas(case, log)
    assert (report.kernel, report.launch, report.registers, report.shared) == ("row", "int64, 32", 64, 512)
    assert report.spilled == 12 and report.failures == ["spills"]
    with pytest.raises(RuntimeError, match="expected kernels"):
        aot._read_ptxas(case, "")


def test_every_configuration_is_among_the_cases():
    from benchmarks import aot
    from sami_fast.kernels import configs

    used = set()
    for case in aot.cases():
        for call in aot.calls(case):
            if "DESCRIPTORS" in call.arguments:
                names = ("BLOCK_M", "BLOCK_N")
                used.add((*(call.arguments[n] for n in names), call.options["num_warps"], call.options["num_stages"]))
    for key, capped, group in itertools.product(configs.PREFIX_ATTENTION, (False, True), (4, 7)):
        assert tuple(vars(configs.prefix_attention(*key, capped, group)).values()) in used, (key, capped, group)


def test_loops_are_found():
    from benchmarks import aot

    matrix = aot.re.compile("wgmma")
    ptx = "$L__BB0_1:\n wgmma.mma_async\n cp.async.cg.shared\n wgmma.mma_async\n @%p1 bra $L__BB0_1;\n wgmma\n"
    assert aot._loops(ptx, matrix) == [(2, 1)]
    assert aot._loops(ptx.replace("bra $L__BB0_1", "bra $L__BB0_2"), matrix) == []


def _warm_launcher(monkeypatch, kernels):
    """Triton's own launch path, up to the launch: a function of a case that returns how much code each kernel has."""
    from benchmarks import aot

    target = aot.GPUTarget("cuda", 90, 32)
    nowhere = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target
    )
    monkeypatch.setattr(aot.triton.runtime.driver, "_active", nowhere)
    functions = [f for f in vars(kernels).values() if isinstance(f, aot.triton.JITFunction) and "_kernel" in f.__name__]
    for function in functions:
        monkeypatch.setattr(function, "device_caches", type(function.device_caches)(function.create_binder))

    def warm(case, *tokens):
        for call in aot.calls(case, *tokens):
            assert call.kernel.run(grid=call.grid, warmup=True, **call.arguments, **call.options).asm["ptx"]
        return [len(function.device_caches[0][0]) for function in functions]

    return warm


def test_launcher_compiles_once_for_every_tree(monkeypatch):
    from benchmarks import aot
    from sami_fast.kernels import prefix_attention as kernels

    warm = _warm_launcher(monkeypatch, kernels)
    for case in (aot.Case(90, torch.bfloat16, 64, 64), aot.Case(90, torch.bfloat16, 64, 64, options=True)):
        compiled = warm(case, 64)
        for tokens in (33, 77, 1000):
            assert warm(case, tokens) == compiled


def test_launcher_compiles_once_for_every_number_of_rows(monkeypatch):
    """A head of a vocabulary has at most two sizes of blocks: for up to 2048 rows, and for more."""
    from benchmarks import aot
    from sami_fast.kernels import linear_logprob as kernels

    warm = _warm_launcher(monkeypatch, kernels)
    for few in ((1, 7, 300, 2048), (2049, 4097, 5555, 20000)):
        compiled = [warm(aot.HeadCase(90, torch.bfloat16, rows, 50257)) for rows in few]
        assert all(min(counts) > 0 and counts == compiled[0] for counts in compiled), compiled


def test_shipped_head_kernels_compile_to_good_code():
    from benchmarks import aot

    case = aot.HeadCase(90, torch.bfloat16, 300, 128256, options=True)
    assert case in set(aot.cases())
    reports = aot.check(case)
    assert {report.kernel for report in reports} == {
        *("block", "finish", "normalise", "gradient"),
        *("statistics", "finish_statistics", "statistics_gradient"),
    }
    for report in reports:
        assert not report.failures, aot.line(report)
