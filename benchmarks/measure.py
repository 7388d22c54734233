"""One arm on one case: run, checked, timed, its memory measured, in this process or in one of its own."""

from __future__ import annotations

import gc
import importlib.metadata
import itertools
import math
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.suite import PASSES, Arm, Case, Settings, Suite, Unsupported


def time_runs(runs: list[Callable[[], Any]], device: str, *, quick: bool) -> list[float]:
    """Seconds of each run, after warm-up: device events on CUDA, `time.perf_counter` on the CPU."""
    turns = itertools.cycle(runs)
    seconds: list[float] = []
    if device == "cuda":
        for _ in range(5):
            next(turns)()
        batch, target, enough = 10, 1.0, 0.05
    else:
        batch, target, enough = 1, 10.0, 0.5  # 200 short runs are over before a disturbance is
    if quick:
        target, enough = 0.2, min(0.2, enough)
    total = 0.0
    while len(seconds) < (2 if quick else 3) or total < (target if len(seconds) < 200 else enough):
        if device == "cuda":
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(batch)]
            for begin, end in events:
                begin.record()
                next(turns)()
                end.record()
            torch.cuda.synchronize()
            took = [begin.elapsed_time(end) / 1e3 for begin, end in events]
        else:
            run = next(turns)
            begin = time.perf_counter()
            run()
            took = [time.perf_counter() - begin]
        seconds += took
        total += sum(took)
    return seconds


def measure_ceilings(device: str, dtypes: set[str], *, quick: bool = False) -> dict[str, dict[str, float]]:
    """What the device reaches at best, by dtype: a large matrix product, and a copy (bytes read plus bytes written)."""
    size, copied = (8192, 1 << 30) if device == "cuda" else (1024 if quick else 2048, 1 << 28)
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * copied / min(time_runs([lambda: target.copy_(source)], device, quick=quick))
    ceilings = {}
    for name in sorted(dtypes):
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, name)) for _ in range(2))
        torch.mm(a, b)
        best = min(time_runs([lambda a=a, b=b: torch.mm(a, b)], device, quick=quick))
        ceilings[name] = {"flops_per_second": 2 * size**3 / best, "bytes_per_second": copy}
    return ceilings


def _seconds_of_others() -> float | None:
    """Processor seconds since start-up of whatever is not this process, other guests of the host included; Linux."""
    try:
        spent = [int(ticks) for ticks in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return None
    idle, waiting = spent[3:5]
    return (sum(spent) - idle - waiting) / os.sysconf("SC_CLK_TCK") - time.process_time()


# --------------------------------------------------------------------------------------------------------------------
# One arm on one case


def measure(
    suite: Suite, arm: Arm, case: Case, pass_name: str, settings: Settings, reference: Path, own_process: bool = False
) -> dict:
    """Run, check and time an arm; whatever goes wrong is an outcome.

    `reference` holds the numbers that an arm must reproduce; when the file is not there yet, this arm writes it.
    """
    result: dict[str, Any] = {"outcome": "failed", "detail": None, "memory": None, "facts": {}}
    try:
        result["version"] = _version(arm.peer)
        torch.set_num_threads(settings.threads)
        if own_process and settings.device == "cpu" and settings.memory_limit is not None:
            limit_memory(int(settings.memory_limit))
        sets = range(suite.input_sets if arm.timed else 1)
        prepared = [arm.prepare(suite.inputs(case, settings, seed), PASSES[pass_name]) for seed in sets]
        result |= {"flops": prepared[0].flops, "bytes": prepared[0].bytes, "facts": dict(prepared[0].facts)}
        runs = [each.run for each in prepared]

        baseline = _memory_in_use(settings.device, own_process)
        begin = time.perf_counter()
        returned = runs[0]()
        if settings.device == "cuda":
            torch.cuda.synchronize()
        first = time.perf_counter() - begin
        if baseline is not None:
            peak = _peak_memory(settings.device)
            result["memory"] = {"baseline": baseline, "peak": peak, "above_baseline": peak - baseline}
        numbers = prepared[0].numbers(returned)
        del returned

        if reference.exists():
            result["errors"] = compare(numbers, reference, suite.limits[case.dtype])
            wrong = [name for name, error in result["errors"].items() if not error["right"]]
            if wrong:
                return result | {"outcome": "wrong", "detail": f"{', '.join(wrong)} off by more than the limit"}
        else:
            written = reference.with_suffix(".tmp")
            save_file({name: number.detach().cpu().contiguous() for name, number in numbers.items()}, written)
            os.replace(written, reference)
        del numbers
        wall, others = time.perf_counter(), _seconds_of_others()
        seconds = time_runs(runs, settings.device, quick=settings.quick) if arm.timed else [first]
        if arm.timed and others is not None:
            result["other_cores"] = max(0.0, _seconds_of_others() - others) / (time.perf_counter() - wall)
        result |= {"outcome": "ok", "seconds": _summary(seconds)}
    except (importlib.metadata.PackageNotFoundError, ImportError) as error:
        result |= {"outcome": "not installed", "detail": _one_line(error)}
    except Unsupported as error:
        result |= {"outcome": "unsupported", "detail": str(error)}
    except Exception as error:  # any failure of a peer is a finding
        outcome = "out of memory" if _is_out_of_memory(error) else "failed"
        result |= {"outcome": outcome, "detail": _one_line(error)}
    return result


def _version(package: str) -> str | None:
    """None for ours where it runs from a source tree that is not installed."""
    if package == "sami-fast" and not list(importlib.metadata.distributions(name=package)):
        return None
    return importlib.metadata.version(package)


def compare(numbers: Mapping[str, torch.Tensor], reference: Path, limits: Mapping[str, float]) -> dict[str, dict]:
    """Relative (Euclidean norm) and largest absolute error of each group of numbers, with its limit.

    Raises:
        ValueError: names or shapes differ.
    """
    difference, norm, largest = defaultdict(float), defaultdict(float), defaultdict(float)
    with safe_open(reference, "pt") as expected:
        if set(expected.keys()) != set(numbers):
            raise ValueError(f"numbers: expected {sorted(expected.keys())[:4]}..., got {sorted(numbers)[:4]}...")
        for name, number in numbers.items():
            group, right = name.partition(":")[0], expected.get_tensor(name).double()
            if right.shape != number.shape:
                raise ValueError(f"{name}: expected shape {list(right.shape)}, got {list(number.shape)}")
            off = number.detach().cpu().double().sub_(right).abs_()
            norm[group] += float(right.square_().sum())
            largest[group] = max(largest[group], float(off.max()))
            difference[group] += float(off.square_().sum())
    errors = {}
    for group in norm:
        relative = (difference[group] / max(norm[group], 1e-300)) ** 0.5
        finite = math.isfinite(relative)  # JSON has no NaN
        errors[group] = {
            "relative": relative if finite else None,
            "max_abs": largest[group] if finite else None,
            "limit": limits[group],
            "right": finite and relative <= limits[group],
        }
    return errors


def _summary(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {
        "best": ordered[0],
        "p20": ordered[round(0.2 * last)],
        "median": statistics.median(ordered),
        "p80": ordered[round(0.8 * last)],
        "runs": len(ordered),
    }


def limit_memory(limit: int) -> None:
    """Make allocations beyond `limit` bytes fail in this process, instead of the machine."""
    import resource

    # DATA counts private writable memory; the address space would count mapped files and reservations too.
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _memory_in_use(device: str, own_process: bool) -> int | None:
    """Bytes in use, and the peak set back to it; None where a peak could not be told from others'."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if not own_process or sys.platform != "linux":
        return None
    with suppress(OSError):  # otherwise the peak includes that of loading
        Path("/proc/self/clear_refs").write_text("5")
    return _proc_status("VmRSS")


def _peak_memory(device: str) -> int:
    # Not ru_maxrss: a new process starts with that of its parent.
    return torch.cuda.max_memory_allocated() if device == "cuda" else _proc_status("VmHWM")


def _proc_status(key: str) -> int:
    return int(re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) * 1024


def _is_out_of_memory(error: Exception) -> bool:
    known = ("can't allocate memory", "out of memory", "cannot allocate memory", "bad_alloc")
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in text for words in known)


def _one_line(error: Exception) -> str:
    """Type and first line, without folders: records are published."""
    text = (str(error).splitlines() or [""])[0]
    return re.sub(r"(/[^\s/'\":]+)+/", "", f"{type(error).__name__}: {text}")[:200]


# --------------------------------------------------------------------------------------------------------------------
# A process of its own


def _child(connection, args: tuple) -> None:
    connection.send(measure(*args, own_process=True))


def measure_apart(args: tuple, seconds_left: float) -> dict:
    """`measure` in a new process, which may die or be ended."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(send, args), daemon=True)
    process.start()
    send.close()
    result: dict[str, Any] = {"detail": None, "memory": None, "facts": {}}
    try:
        if receive.poll(seconds_left):
            result = receive.recv()
        else:
            process.kill()
            result |= {"outcome": "over budget", "detail": "ended when the time budget was spent"}
    except EOFError:
        process.join()
        # The kernel's own answer to memory that runs out is SIGKILL.
        outcome = "out of memory" if process.exitcode == -9 else "failed"
        result |= {"outcome": outcome, "detail": f"its process ended with exit code {process.exitcode}"}
    finally:
        process.join()
        receive.close()
    return result
