"""`python -m benchmarks SUITE...`: measure, print the tables, write records and plots."""

from __future__ import annotations

import argparse
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

import torch

from benchmarks.harness import record_name, run_suite, write_record
from benchmarks.report import outcome, plot, print_table
from benchmarks.suite import GB, ROOT, Settings, find_suites, load_suite
from sami_fast.report import write_atomically


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Ours beside its peers on the same inputs. Arms whose numbers are wrong are shown as wrong.",
        epilog="Records that the README shows: --out benchmarks/results, then python -m benchmarks.tables README.md",
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"{', '.join(find_suites())} (all of them)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small cases only, few runs")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains it")
    parser.add_argument("--budget", type=float, default=3600.0, metavar="SECONDS", help="for each suite (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/benchmarks", metavar="DIR")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on the CPU (%(default)s)")
    parser.add_argument(
        "--memory-limit",
        type=float,
        metavar="GB",
        help="for each CPU arm that has its own process (80%% of what is free)",
    )
    parser.add_argument("--model", help="folder or hub name (the bundled model)")
    parser.add_argument("--data", help="JSON Lines file of examples")
    options = parser.parse_args()
    try:
        options.suites = [load_suite(name) for name in options.suites or find_suites()]
    except ValueError as error:
        parser.error(str(error))
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected cpu, as PyTorch sees no CUDA device")
    return options


def _free_memory() -> float | None:
    with suppress(OSError):
        return 1024.0 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    return None


def main() -> int:
    options = _arguments()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    free = _free_memory()
    limit = options.memory_limit * GB if options.memory_limit is not None else free and 0.8 * free
    settings = Settings(
        device=options.device,
        quick=options.quick,
        only=options.only,
        budget=options.budget,
        threads=options.threads,
        memory_limit=limit,
        model=options.model,
        data=options.data,
    )

    def on_result(record: dict) -> None:
        result = record["results"][-1]
        figure = outcome(record, result)
        if figure == "ok":
            figure = f"{result['seconds'][record['statistic']]:.4g} s"
        print(f"{result['case']}, {result['pass']}, {result['arm']}: {figure}", file=sys.stderr, flush=True)
        write_record(record, options.out)

    for suite in options.suites:
        record = run_suite(suite, settings, on_result)
        path = write_record(record, options.out)
        write_atomically(path.with_suffix(".png"), lambda file, record=record: file.write_bytes(plot(record)))
        print_table(record)
        print(f"{record_name(record)}: {path} and {path.with_suffix('.png').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
