"""What launchers of Triton kernels share."""

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton

from sami_fast.ops.dispatch import expect


@dataclass(frozen=True)
class Call:
    """One kernel launch: to run on tensors, or to compile for a machine that is not there."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)


@functools.cache
def architecture_of(device: torch.device) -> int:
    """90 for sm_90; the interpreter stands for the oldest machine."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    return 10 * major + minor


def launching_on(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def expect_launchable(name: str, x: torch.Tensor, kernel: Any, architecture: int | None = None) -> None:
    """ValueError, by name, unless `kernel` runs on x's device and in x's dtype."""
    expect_triton = functools.partial(expect, backend="triton")
    interpreted = not isinstance(kernel, triton.JITFunction)
    place = "CUDA tensors (or TRITON_INTERPRET=1 in the environment before triton is imported)"
    expect_triton(interpreted or x.device.type in ("cuda", "meta"), name, place, f"a tensor on {x.device}")
    architecture = architecture or architecture_of(x.device)
    expect_triton(architecture >= 80, name, "a device of compute capability 8.0 or later", architecture / 10)
    # Triton's interpreter computes with the bit patterns of bfloat16.
    dtypes = [torch.float16, torch.float32] if interpreted else [torch.bfloat16, torch.float16, torch.float32]
    expect_triton(x.dtype in dtypes, name, f"one of {dtypes}", x.dtype)
