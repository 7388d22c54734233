"""Where the time of a SAMI step on the CPU goes: `python -m benchmarks.account` writes a record as the suites do.

The prefix-tree arm of `end_to_end` under the profiler: seconds in the products of the layers, in attention, in the head
and in everything between, each beside what it would take at the ceiling that binds it. What no operator accounts for,
Python and the autograd engine, is overhead.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import end_to_end
from benchmarks.harness import environment, write_record
from benchmarks.measure import measure_ceilings
from benchmarks.report import markdown
from benchmarks.suite import PASSES, ROOT, Case, Settings
from sami_fast import pack

STEP = "whole step"
PRODUCTS, ATTENTION, HEAD, ELEMENTWISE, OVERHEAD = PARTS = (
    "products of the layers",
    "attention",
    "head",
    "elementwise, copies",
    "overhead",
)
_OPS = {"sami_fast::prefix_attention": ATTENTION, "sami_fast::linear_logprob": HEAD}
_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmm_", "aten::_addmm_activation"}


def part_of(event: Any) -> str:
    """The part of the step that an operator's own time belongs to: that of the op it runs in, else its own."""
    within = event
    while within is not None:
        for prefix, part in _OPS.items():
            if within.name.startswith(prefix):
                return part
        within = within.cpu_parent
    if event.name in _PRODUCTS:
        return PRODUCTS
    return ELEMENTWISE if event.name.startswith("aten::") else OVERHEAD


def seconds_by_part(events: Iterable[Any], whole: float) -> dict[str, float]:
    """Own times of all operators of a run that took `whole` seconds; what is left is overhead."""
    spent = Counter()
    for event in events:
        spent[part_of(event)] += event.self_cpu_time_total / 1e6
    known = {part: spent[part] for part in PARTS[:-1]}
    return known | {OVERHEAD: max(0.0, whole - sum(known.values()))}


def bytes_between(events: Iterable[Any]) -> float:
    """Bytes that the operators between the products read and write, one after the other, in float32."""
    total = 0
    for event in events:
        if event.self_cpu_time_total > 0 and part_of(event) == ELEMENTWISE:
            sizes = [math.prod(shape) for shape in event.input_shapes if shape]
            total += 4 * (sum(sizes) + max(sizes, default=0))
    return float(total)


def flops_by_part(made: end_to_end.Inputs, backward: bool) -> dict[str, float]:
    """Floating-point operations that the products, attention and the head need."""
    packed = pack([made.group])
    attended, predicted = int((packed.position_ids + 1).sum()), len(packed.labels)
    sizes = {PRODUCTS: (packed.num_tokens, 0, 0), ATTENTION: (0, attended, 0), HEAD: (0, 0, predicted)}
    return {part: made.flops(*size, backward) for part, size in sizes.items()}


def account(made: end_to_end.Inputs, backward: bool, runs: int = 3) -> list[dict]:
    """Rows of a record for one pass: the step, then its parts, of the fastest of the profiled runs."""
    step = end_to_end.prefix_tree(made, backward)
    step.run()
    best: tuple[float, Any] | None = None
    for _ in range(runs):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
            begin = time.perf_counter()
            step.run()
            whole = time.perf_counter() - begin
        if best is None or whole < best[0]:
            best = whole, profiler
    whole, profiler = best
    events = profiler.events()
    flops, spent = flops_by_part(made, backward), seconds_by_part(events, whole)
    rows = [_row(STEP, whole, step.flops, step.bytes, whole)]
    for part in PARTS:
        moved = bytes_between(events) if part == ELEMENTWISE else 0.0
        rows.append(_row(part, spent[part], flops.get(part, 0.0), moved, whole))
    return rows


def _row(arm: str, seconds: float, flops: float, moved: float, whole: float) -> dict:
    return {
        "arm": arm,
        "peer": "sami-fast",
        "ours": False,
        "timed": True,
        "outcome": "ok",
        "detail": None,
        "memory": None,
        "seconds": {"best": max(seconds, 1e-9)},
        "flops": flops,
        "bytes": moved,
        "facts": {"share of step": f"{100 * seconds / whole:.0f} %"},
    }


def _against(row: dict, ceilings: dict[str, float]) -> dict:
    """The row's rates and its floor, what it would take at the ceiling that binds it."""
    seconds = row["seconds"]["best"]
    floors = {"gemm": row["flops"] / ceilings["flops_per_second"], "copy": row["bytes"] / ceilings["bytes_per_second"]}
    binding = max(floors, key=floors.get)
    return {
        "flops_per_second": row["flops"] / seconds,
        "bytes_per_second": row["bytes"] / seconds,
        "ceiling": binding,
        "share_of_ceiling": floors[binding] / seconds,
        "times_ours": None,
        "facts": row["facts"] | {"floor": f"{floors[binding]:.2f} s"},
    }


def record(
    cases: Iterable[Case], settings: Settings, make: Callable = end_to_end.inputs, *, passes: Iterable[str] = PASSES
) -> dict:
    """Every case's account, as `benchmarks.tables` reads it."""
    torch.set_num_threads(settings.threads)
    made: dict[str, Any] = {
        "format": 1,
        "suite": "account",
        "title": "Where the time of a SAMI step goes",
        "statistic": "best",
        "environment": environment(settings),
        "settings": {name: getattr(settings, name) for name in ("device", "only", "threads", "quick", "memory_limit")},
        "ceilings": measure_ceilings(settings.device, {"float32"}, quick=settings.quick),
        "results": [],
    }
    for case in cases:
        inputs = make(case, settings, 0)
        for pass_name in passes:
            rows = account(inputs, PASSES[pass_name], runs=1 if settings.quick else 3)
            head = {"case": case.name, "shapes": dict(case.shapes), "dtype": case.dtype, "pass": pass_name}
            made["results"] += [head | row | _against(row, made["ceilings"]["float32"]) for row in rows]
    return made


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.account", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="one run of each")
    parser.add_argument("--model", help="folder or hub name (the bundled model)")
    parser.add_argument("--data", help="JSON Lines file of examples")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/benchmarks", metavar="DIR")
    options = vars(parser.parse_args())
    folder = options.pop("out")
    settings = Settings(device="cpu", **options)
    cases = [case for case in end_to_end.cases(settings) if settings.only in case.name]
    if not cases:
        parser.error(f"--only: expected part of a case's name, got {settings.only!r}")
    made = record(cases, settings)
    path = write_record(made, folder)
    print(markdown(made), f"\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
