"""Suites, cases and arms: what a benchmark is made of.

A suite is a module of this package with `SUITE = Suite(...)`; its cases are data, its arms functions registered with
`@SUITE.arm(...)`. On every case the first arm that succeeds sets the numbers that the others must reproduce.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
PASSES = {"forward": False, "forward+backward": True}  # name -> with the backward?
GB = 1e9


class Unsupported(Exception):
    """Raised by an arm that cannot do a case, with the reason: an outcome of its own, not a failure."""


@dataclass(frozen=True)
class Settings:
    """What the user asked for; the same for every case and arm of a run.

    Attributes:
        device: "cpu" or "cuda".
        quick: only the cases marked quick, and fewer runs.
        only: the cases whose name contains it; their record has a name of its own.
        budget: seconds after which no measurement is begun, and a running one in a process of its own is ended.
        threads: of PyTorch on the CPU.
        memory_limit: bytes that a CPU arm in a process of its own may allocate; None does not limit it.
        model: folder or hub name of the model, for suites that need one; None is the bundled one.
        data: JSON Lines file with examples, for suites that read one.
    """

    device: str = "cpu"
    quick: bool = False
    only: str = ""
    budget: float = 3600.0
    threads: int = field(default_factory=torch.get_num_threads)
    memory_limit: float | None = None
    model: str | None = None
    data: str | None = None


@dataclass(frozen=True)
class Case:
    """Everything that makes one set of inputs: a name, sizes, and the dtype that it is computed in."""

    name: str
    shapes: Mapping[str, Any]
    dtype: str = "float32"
    quick: bool = False


@dataclass(frozen=True)
class Prepared:
    """An arm ready to run: `run()` is what is timed, and what it returns becomes the arm's numbers.

    Numbers are named tensors; those named `group:name` count as one vector under `group` when they are compared.

    Attributes:
        run: () -> numbers, or whatever `numbers` takes.
        flops: floating-point operations of one run that the task needs (recomputation and padding not).
        bytes: fewest bytes that one run must move.
        facts: whatever else is worth a column in the table.
        numbers: what `run()` returned -> numbers; not timed.
    """

    run: Callable[[], Any]
    flops: float
    bytes: float
    facts: Mapping[str, Any] = field(default_factory=dict)
    numbers: Callable[[Any], dict[str, torch.Tensor]] = lambda returned: returned


@dataclass(frozen=True)
class Arm:
    """A way to compute what the suite is about.

    Attributes:
        peer: the installed package that it comes from.
        prepare: (inputs, backward) -> Prepared.
        ours: the arm that the others' times are divided by.
        timed: an arm that is not runs once, for the numbers that the others are held to.
    """

    name: str
    peer: str
    prepare: Callable[[Any, bool], Prepared]
    ours: bool = False
    timed: bool = True


@dataclass
class Suite:
    """Cases and arms.

    Attributes:
        cases: settings -> cases.
        inputs: (case, settings, seed) -> whatever the arms take.
        limits: dtype -> name of a number -> largest relative error (Euclidean norm).
        isolated: measure every arm in a process of its own, so that its peak memory and its failures are its own.
        statistic: "median" or "best": which of the runs rates and ratios are made of.
        rounds: how often the arms are timed in turn, of which each arm's fastest round counts: cores that change their
            speed while the arms run would decide between short ones. Not with `isolated`.
        input_sets: inputs to rotate among while timing, so that small ones do not stay in the cache.
        annotate: gets the results of one case and pass and may add to their facts.
    """

    name: str
    title: str
    cases: Callable[[Settings], list[Case]]
    inputs: Callable[[Case, Settings, int], Any]
    limits: Mapping[str, Mapping[str, float]]
    isolated: bool = False
    statistic: str = "median"
    rounds: int = 1
    input_sets: int = 1
    annotate: Callable[[list[dict]], None] | None = None
    arms: list[Arm] = field(default_factory=list)

    def arm(self, name: str, *, peer: str, ours: bool = False, timed: bool = True) -> Callable:
        """Register `(inputs, backward) -> Prepared`."""

        def register(prepare: Callable[[Any, bool], Prepared]) -> Callable[[Any, bool], Prepared]:
            self.arms.append(Arm(name, peer, prepare, ours, timed))
            return prepare

        return register


def find_suites() -> list[str]:
    """Names of the modules of this package that define a suite."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if "\nSUITE = " in path.read_text())


def load_suite(name: str) -> Suite:
    """The suite of `benchmarks/NAME.py`.

    Raises:
        ValueError: no such suite.
    """
    if name not in find_suites():
        raise ValueError(f"suite: expected one of {', '.join(find_suites())}, got {name!r}")
    return importlib.import_module(f"benchmarks.{name}").SUITE
