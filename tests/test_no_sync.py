"""Nothing in a training step waits for the device, but for one look at whether its numbers are finite.

Without a GPU the meta device stands for one: whatever would bring a number to the host is caught and named, and copies
to the device must not block.
"""

import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from factory import random_group, tiny_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

import sami_fast
from sami_fast import Group, SamiConfig, SamiTrainer, pack, score
from sami_fast.kernels import prefix_attention_reference

aten = torch.ops.aten
# Ops that give the host a number, or a tensor whose size depends on numbers.
_READS = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten._unique2}
_COPIES = {aten._to_copy, aten.copy_}
_OWN = tuple(str(Path(module.__file__).parent) for module in (sami_fast, prefix_attention_reference))


class HostTraffic(TorchDispatchMode):
    """Notes where in this project, or else in a library, the host waits for tensors of `device`."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.reads: list[str] = []
        self.blocking_copies: list[str] = []
        self.of_functions = _NewTensors(self)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        op = func.overloadpacket
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        there = [x.device.type == self.device for x in tensors]
        if op in _READS and any(there):
            self.reads.append(f"{func} {_place()}")
            if op is aten._local_scalar_dense:
                return True  # whatever: the run goes on
        indices = args[1] if op in (aten.index, aten.index_put, aten.index_put_) else ()
        if any(i is not None and i.dtype == torch.bool and i.device.type == self.device for i in indices):
            self.reads.append(f"{func} {_place()}")
        if op in _COPIES:
            source = tensors[-1].device.type
            target = torch.device(kwargs.get("device") or tensors[0].device).type
            if source == self.device and target == "cpu":
                self.reads.append(f"{func} {_place()}")
                return torch.zeros(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
            waits = not (kwargs.get("non_blocking") or (op is aten.copy_ and len(args) > 2 and args[2]))
            if source == "cpu" and target == self.device and waits:
                self.blocking_copies.append(f"{func} {_place()}")
        return func(*args, **kwargs)


class _NewTensors(TorchFunctionMode):
    """Sees tensors made of Python's numbers on the device, which the dispatcher does not."""

    def __init__(self, traffic: HostTraffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = torch.device(kwargs.get("device") or "cpu").type
        if func in (torch.tensor, torch.as_tensor) and device == self.traffic.device:
            self.traffic.blocking_copies.append(f"torch.tensor {_place()}")
        return func(*args, **kwargs)


def _place() -> str:
    frames = [frame for frame in traceback.extract_stack() if not frame.filename.endswith("test_no_sync.py")]
    own = [frame for frame in frames if frame.filename.startswith(_OWN)]
    frame = (own or [f for f in frames if "/transformers/" in f.filename or "/accelerate/" in f.filename] or frames)[-1]
    return f"in {frame.name} ({frame.filename}:{frame.lineno})"


def groups(count: int = 24) -> list[Group]:
    rng = np.random.default_rng(0)
    return [random_group(rng, *[(2, 2), (2, 3), (3, 3)][i % 3], id=f"g{i}") for i in range(count)]


STEPS = 4
OPTIONS = {
    "one pack": {},
    "packs": dict(max_tokens=60),
    "checkpointing": dict(gradient_checkpointing=True, keep_attention=True),
    "accumulation": dict(gradient_accumulation_steps=2),
    "adamw": dict(optim="adamw_torch"),
    "reference": dict(beta=0.1),
}


def trainer(folder, model, **options) -> SamiTrainer:
    defaults = dict(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=4, logging_steps=100, save_strategy="no"
    )
    config = SamiConfig(**defaults | dict(report_to="none", disable_tqdm=True) | options)
    return SamiTrainer(model, config, groups())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_host_reads_one_number_a_step(tmp_path, monkeypatch, options):
    made = trainer(tmp_path, tiny_model(dtype=torch.float32), use_cpu=True, **options)
    made.model.to("meta")
    if made.ref_model is not None:
        score(made.ref_model, pack(groups(1)))  # its first call checks it
        made.ref_model.to("meta")
    monkeypatch.setattr(SamiConfig, "device", torch.device("meta"))
    monkeypatch.setattr(type(made.accelerator), "device", torch.device("meta"))
    with HostTraffic("meta") as traffic, traffic.of_functions:
        made.train()
    passes = STEPS * options.get("gradient_accumulation_steps", 1)
    assert len(traffic.blocking_copies) == 1 and "in _inner_training_loop" in traffic.blocking_copies[0]  # once a run
    assert [read for read in traffic.reads if "in _refuse_non_finite" in read] == traffic.reads[:passes]
    assert all("in _finalize_training" in read for read in traffic.reads[passes:])  # the mean loss of the whole run


def test_what_waits_is_named():
    x = torch.ones(3, device="meta")
    with HostTraffic("meta") as traffic, traffic.of_functions:
        bool(x.sum())
        float(x.sum())
        x.cpu()
        torch.ones(3).to("meta")
        x.copy_(torch.ones(3))
        torch.tensor([1, 2], device="meta")
        x.copy_(torch.ones(3), non_blocking=True)
        torch.ones(3).to("meta", non_blocking=True)
    assert len(traffic.reads) == 3 and len(traffic.blocking_copies) == 3
    assert all("in " in line for line in traffic.reads)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_step_waits_for_the_gpu(tmp_path, options):
    made = trainer(tmp_path, tiny_model(dtype=torch.bfloat16), **options)
    look = made._refuse_non_finite
    steps = []

    def looking() -> None:
        torch.cuda.set_sync_debug_mode("default")
        look()
        torch.cuda.set_sync_debug_mode("error" if made.state.global_step > 0 else "default")

    class Strict(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            # The first step compiles kernels and makes the optimiser's state.
            torch.cuda.set_sync_debug_mode("error" if state.global_step > 0 else "default")
            steps.append(state.global_step)

        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.set_sync_debug_mode("default")

    made._refuse_non_finite = looking
    made.add_callback(Strict())
    try:
        made.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps == list(range(STEPS))
