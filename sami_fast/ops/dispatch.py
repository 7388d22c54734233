"""The one backend switch, and how arguments are refused.

Every op takes `backend`: None picks the best one for the tensors' device, and the choice is logged once.
Implementations live in `sami_fast.kernels`, are imported on first use; no backend imports another.
"""

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch

logger = logging.getLogger(__name__)

HAS_TRITON = importlib.util.find_spec("triton") is not None


def _extension_devices() -> tuple[str, ...]:
    if importlib.util.find_spec("sami_fast._C") is None:
        return ()
    return ("cpu", "cuda") if importlib.import_module("sami_fast._C").cuda_version() else ("cpu",)


EXTENSION_DEVICES = _extension_devices()  # that sami_fast._C was built for

# op -> backend -> module with `<op>_forward` and `<op>_backward`. The first entry that runs on a device is its default.
IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "prefix_attention": {
        "triton": "sami_fast.kernels.prefix_attention",
        "reference": "sami_fast.kernels.prefix_attention_reference",
        "flash": "sami_fast.kernels.flash_attention",
    },
    "linear_logprob": {
        "triton": "sami_fast.kernels.linear_logprob",
        "reference": "sami_fast.kernels.linear_logprob_reference",
    },
    "linear_statistics": {
        "triton": "sami_fast.kernels.linear_statistics",
        "reference": "sami_fast.kernels.linear_statistics_reference",
    },
    "segment_infonce": {
        "cuda": "sami_fast.kernels.segment_infonce_cuda",
        "triton": "sami_fast.kernels.segment_infonce",
        "reference": "sami_fast.kernels.segment_infonce_reference",
    },
}


def backends() -> dict[str, str]:
    """What each backend can do here: its ops when it is available, the reason when it is not."""
    report = {}
    for backend in ("reference", "triton", "cuda", "flash"):
        implemented = [op for op, table in IMPLEMENTATIONS.items() if backend in table]
        if backend == "triton" and not HAS_TRITON:
            report[backend] = "unavailable: triton is not installed"
        elif backend == "cuda" and "cuda" not in EXTENSION_DEVICES:
            what = "holds its host code alone (no nvcc" if EXTENSION_DEVICES else "was not built (no C++ compiler"
            report[backend] = f"unavailable: sami_fast._C {what}, or not asked for, when sami_fast was installed)"
        elif backend == "flash" and not importlib.import_module("sami_fast.kernels.flash_attention").installed():
            report[backend] = "unavailable: flash-attn is not installed (pip install flash-attn --no-build-isolation)"
        elif backend != "reference" and not torch.cuda.is_available():
            report[backend] = "unavailable: torch sees no CUDA device"
        else:
            report[backend] = "available: " + ", ".join(implemented)
    return report


def resolve(op: str, backend: str | None, device: torch.device) -> str:
    table = IMPLEMENTATIONS[op]
    if backend is None:
        return "reference" if device.type != "cuda" else next(iter(table))
    if backend not in table:
        raise ValueError(f"backend: expected one of {sorted(table)} or None for {op}, got {backend!r}")
    return backend


def backend_for(op: str, backend: str | Mapping[str, Any] | None) -> Any:
    """An op's own backend out of one choice for several: a mapping by op, or a name for those ops that have it.

    Raises:
        ValueError: no op of that name, or none that has the backend.
    """
    if isinstance(backend, Mapping):
        unknown = sorted(set(backend) - set(IMPLEMENTATIONS))
        expect(not unknown, "backend", f"a mapping from {sorted(IMPLEMENTATIONS)}", unknown)
        return backend.get(op)
    known = {name for table in IMPLEMENTATIONS.values() for name in table}
    expect(backend is None or backend in known, "backend", f"one of {sorted(known)}, a mapping or None", repr(backend))
    return backend if backend in IMPLEMENTATIONS[op] else None


def triton_or_reference(op: str, backend: str | None, x: torch.Tensor, *, fits: bool = True) -> str:
    """The backend of an op that Triton serves by default on CUDA, where it is installed and takes x."""
    name = resolve(op, backend, x.device)
    if name == "triton":
        if backend is None and not (HAS_TRITON and fits and x.dtype != torch.float64):
            return "reference"
        expect(HAS_TRITON, "backend", "triton to be installed for 'triton'", "no such package")
    return name


@functools.cache
def load(op: str, backend: str, device_type: str) -> ModuleType:
    logger.info("%s runs on backend %r (%s tensors)", op, backend, device_type)
    return importlib.import_module(IMPLEMENTATIONS[op][backend])


def run(op: str, direction: str, backend: str, arguments: tuple) -> Any:
    """An implementation's work, in its own dtypes: autocast would round what it multiplies to 16 bits."""
    device_type = arguments[0].device.type
    function = getattr(load(op, backend, device_type), f"{op}_{direction}")
    if not torch.is_autocast_enabled(device_type):
        return function(*arguments)
    with torch.autocast(device_type, enabled=False):
        return function(*arguments)


def expect(
    condition: bool, name: str, expected: str | Callable[[], str], got: object, backend: str | None = None
) -> None:
    """ValueError unless the condition holds; `backend` for what only that one expects.

    Words with a size in them come as a function, tensors as they are: in compiled code a size that is printed is a
    constant, so nothing is put into words before it is needed.
    """
    if not condition:
        expected = expected() if callable(expected) else expected
        got = describe(got) if isinstance(got, torch.Tensor) else got
        what = expected if backend is None else f"{expected} for backend {backend!r}"
        raise ValueError(f"{name}: expected {what}, got {got}")


def wide_dtype(tensor: torch.Tensor) -> torch.dtype:
    """What sums, log-sum-exps and results are in: float32, or float64 for float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def expect_like(name: str, tensor: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor) -> None:
    good = tuple(tensor.shape) == shape and tensor.dtype == like.dtype and tensor.device == like.device
    expect(good, name, lambda: f"{like.dtype} {list(shape)} on {like.device}", tensor)


def expect_index(name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    good = tuple(tensor.shape) == shape and tensor.dtype == torch.int64 and tensor.device == device
    expect(good, name, lambda: f"torch.int64 {list(shape)} on {device}", tensor)
