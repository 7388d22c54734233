"""A whole suite run to a record: every arm on every case, held against two ceilings measured in the same run."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import measure, measure_apart, measure_ceilings
from benchmarks.suite import GB, PASSES, ROOT, Settings, Suite
from sami_fast.report import write_text


def run_suite(suite: Suite, settings: Settings, on_result: Callable[[dict], None] = lambda record: None) -> dict:
    """Every arm on every case and pass; returns the record, which `on_result` sees after every measurement."""
    begin = time.perf_counter()
    cases = [case for case in suite.cases(settings) if case.quick or not settings.quick]
    cases = [case for case in cases if settings.only in case.name]
    if not cases:
        raise ValueError(f"suite {suite.name}: expected at least one case for {settings}, got none")
    torch.set_num_threads(settings.threads)
    record: dict[str, Any] = {
        "format": 1,
        "suite": suite.name,
        "title": suite.title,
        "statistic": suite.statistic,
        "environment": environment(settings),
        "settings": _public(settings),
        "ceilings": measure_ceilings(settings.device, {case.dtype for case in cases}, quick=settings.quick),
        "results": [],
    }
    for case, pass_name in itertools.product(cases, PASSES):
        with tempfile.TemporaryDirectory() as folder:
            reference, checked_against = Path(folder) / "reference.safetensors", None
            same_case: list[dict] = []
            for arm in suite.arms:
                left = settings.budget - (time.perf_counter() - begin)
                args = (suite, arm, case, pass_name, settings, reference)
                if left <= 0:
                    result = {"outcome": "over budget", "detail": "not begun", "memory": None, "facts": {}}
                else:
                    result = measure_apart(args, left) if suite.isolated else measure(*args)
                head = {"case": case.name, "shapes": dict(case.shapes), "dtype": case.dtype, "pass": pass_name}
                head |= {"arm": arm.name, "peer": arm.peer, "ours": arm.ours, "timed": arm.timed}
                result = head | {"checked_against": checked_against} | result
                if result["outcome"] == "out of memory" and suite.isolated and settings.memory_limit is not None:
                    result["detail"] = f"limit {settings.memory_limit / GB:.0f} GB; {result['detail']}"
                if checked_against is None and reference.exists():
                    checked_against = arm.name
                same_case.append(result)
                record["results"].append(result)
                _rate(same_case, record["ceilings"][case.dtype], suite)
                on_result(record)
            for _ in range(0 if settings.quick else suite.rounds - 1):
                for arm, result in zip(suite.arms, same_case, strict=True):
                    if result["outcome"] == "ok" and arm.timed and time.perf_counter() - begin < settings.budget:
                        again = measure(suite, arm, case, pass_name, settings, reference)
                        if again["outcome"] == "ok" and again["seconds"]["median"] < result["seconds"]["median"]:
                            result |= {key: again[key] for key in ("seconds", "other_cores") if key in again}
            _rate(same_case, record["ceilings"][case.dtype], suite)
    return record


def _rate(same_case: list[dict], ceilings: Mapping[str, float], suite: Suite) -> None:
    """Rates, share of the ceiling that binds, and ratio to ours."""
    ours = next((r["seconds"][suite.statistic] for r in same_case if r["ours"] and r["outcome"] == "ok"), None)
    for result in same_case:
        if result["outcome"] != "ok":
            continue
        seconds = result["seconds"][suite.statistic]
        floors = {
            "gemm": result["flops"] / ceilings["flops_per_second"],
            "copy": result["bytes"] / ceilings["bytes_per_second"],
        }
        binding = max(floors, key=floors.get)
        result |= {
            "flops_per_second": result["flops"] / seconds,
            "bytes_per_second": result["bytes"] / seconds,
            "ceiling": binding,
            "share_of_ceiling": floors[binding] / seconds,
            "times_ours": None if ours is None else seconds / ours,
        }
    if suite.annotate is not None:
        suite.annotate(same_case)


def environment(settings: Settings) -> dict[str, Any]:
    """Versions, device and commit; no host name, no path."""

    def version(package: str) -> str | None:
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
        return None

    def git(*command: str) -> str | None:
        with suppress(OSError, subprocess.CalledProcessError):
            return subprocess.run(
                ["git", *command], cwd=ROOT, check=True, capture_output=True, text=True
            ).stdout.strip()
        return None

    changes = git("status", "--porcelain", "--untracked-files=no")
    return {
        "device": _device_name(settings.device),
        "cuda": torch.version.cuda,
        "threads": settings.threads,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in ("sami-fast", "torch", "triton", "transformers")},
        "commit": git("rev-parse", "--short=12", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    with suppress(OSError, TypeError):
        return re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1]
    return platform.processor() or platform.machine()


def _public(settings: Settings) -> dict[str, Any]:
    """The settings without folders."""
    return {
        name: Path(value).name if name in ("model", "data") and value else value
        for name, value in asdict(settings).items()
    }


def record_name(record: Mapping[str, Any]) -> str:
    """Stem of the record's files, and what the README's markers say: `SUITE[-ONLY]-cpu` or `SUITE[-ONLY]-GPU`."""
    device = "cpu" if record["settings"]["device"] == "cpu" else record["environment"]["device"]
    parts = (record["suite"], record["settings"].get("only", ""), device)
    return "-".join(re.sub("[^a-z0-9_]+", "-", part.lower()).strip("-") for part in parts if part)


def write_record(record: Mapping[str, Any], folder: Path) -> Path:
    """`folder/NAME.json`."""
    path = folder / f"{record_name(record)}.json"
    write_text(path, json.dumps(record, indent=1) + "\n")
    return path
