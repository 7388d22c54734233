"""A part of `python -m benchmarks.aot`: kernels compiled for machines that are not here."""

import os
import sys
from pathlib import Path

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


def test_every_configuration_is_among_the_cases():
    from benchmarks import aot
    from sami_fast.kernels import configs

    used = set()
    for case in aot.cases():
        for call in aot.calls(case):
            if "DESCRIPTORS" in call.arguments:
                names = ("BLOCK_M", "BLOCK_N")
                used.add((*(call.arguments[n] for n in names), call.options["num_warps"], call.options["num_stages"]))
    for table in (configs.PREFIX_ATTENTION, configs.PREFIX_ATTENTION_CAPPED):
        for key, launch in table.items():
            assert tuple(vars(launch).values()) in used, key


def test_loops_are_found():
    from benchmarks import aot

    matrix = aot.re.compile("wgmma")
    ptx = "$L__BB0_1:\n wgmma.mma_async\n cp.async.cg.shared\n wgmma.mma_async\n @%p1 bra $L__BB0_1;\n wgmma\n"
    assert aot._loops(ptx, matrix) == [(2, 1)]
    assert aot._loops(ptx.replace("bra $L__BB0_1", "bra $L__BB0_2"), matrix) == []
