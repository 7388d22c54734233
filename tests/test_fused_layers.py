"""Decoder layers compiled in place, and Liger's kernels in them."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from factory import random_group, tiny_model
from tolerance import assert_same_gradients
from torch._dynamo.utils import counters

from sami_fast import infonce_loss, pack, score
from sami_fast.fused_layers import apply_liger, compile_layers, liger_options
from sami_fast.kernels import prefix_attention_reference as reference
from sami_fast.scoring import UnsupportedModelError, check_model


def packs():
    """Of growing size, with trees of different shapes."""
    rng = np.random.default_rng(0)
    shapes = [(2, 2), (2, 3), (3, 3), (1, 1)]
    return [pack([random_group(rng, *shapes[(i + g) % 4], query=5 + 7 * i) for g in range(i + 1)]) for i in range(4)]


def gradients(model, packed, **options) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    infonce_loss(score(model, packed, **options)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def checkpointed(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("family", "kinds", "checkpointing"),
    [("qwen3", 1, "none"), ("llama", 1, "layers"), ("gemma2", 2, "layers, attention kept")],
)
def test_compiled_layers_are_exact_and_compiled_once_for_all_packs(family, kinds, checkpointing, monkeypatch):
    model = tiny_model(family).train()
    if checkpointing != "none":
        checkpointed(model)
    keep = checkpointing == "layers, attention kept"
    expected = [gradients(model, packed) for packed in packs()]
    compile_layers(model, backend="aot_eager")
    calls = []
    forward = reference.prefix_attention_forward
    monkeypatch.setattr(reference, "prefix_attention_forward", lambda *args: calls.append(0) or forward(*args))
    for packed, gradient in zip(packs(), expected, strict=True):
        calls.clear()
        assert_same_gradients(gradients(model, packed, keep_attention=keep), gradient)
        assert len(calls) == 2 * (2 if checkpointing == "layers" else 1)  # layers, and how often each attends
    assert counters["stats"]["unique_graphs"] == kinds
    assert not counters["graph_break"]


def test_layers_with_adapters_are_compiled_with_and_without_them():
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(checkpointed(tiny_model()), options)
    expected = [gradients(model, packed, ref_model=model) for packed in packs()]
    compile_layers(model, backend="aot_eager")
    for packed, gradient in zip(packs(), expected, strict=True):
        assert_same_gradients(gradients(model, packed, ref_model=model), gradient)
    assert counters["stats"]["unique_graphs"] == 3  # the first layer's inputs need no gradient, the others' do


def test_inductor_is_exact():
    model = checkpointed(tiny_model())
    expected = [gradients(model, packed) for packed in packs()]
    compile_layers(model)
    for packed, gradient in zip(packs(), expected, strict=True):
        assert_same_gradients(gradients(model, packed, keep_attention=True), gradient)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_compiled_model_is_checked_as_any_other():
    model = tiny_model()
    compile_layers(model, backend="aot_eager")
    assert check_model(model) < 1e-6 and not counters["stats"]
    inexact = tiny_model()
    inexact.model.layers[1].self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    compile_layers(inexact, backend="aot_eager")
    with pytest.raises(UnsupportedModelError, match="1 of its 2 layers"):
        score(inexact, packs()[0])


def test_windows_are_checked_on_the_first_pack_that_is_longer():
    # A model that says it slides and never passes its window on: exact until a sequence is longer than that.
    model = tiny_model("mistral", sliding_window=12)
    short = pack([random_group(np.random.default_rng(0), 2, 2, query=2, constitution=2, response=2)])
    long = packs()[3]
    for layer in model.model.layers:
        layer.self_attn.config = model.config.__class__(**model.config.to_dict() | {"sliding_window": None})
    compile_layers(model, backend="aot_eager")
    for _ in range(2):
        score(model, short)
    with pytest.raises(UnsupportedModelError, match="2 layers have a sliding window and 0 passed it"):
        score(model, long)


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="expected decoder layers to compile, got none in Linear"):
        compile_layers(torch.nn.Linear(2, 2))


# --------------------------------------------------------------------------------------------------------------------
# Liger


def test_ligers_losses_are_refused():
    assert liger_options(None) == {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert liger_options({"rope": False}) == liger_options(None) | {"rope": False}
    for name in ("cross_entropy", "fused_linear_cross_entropy"):
        with pytest.raises(ValueError, match=f"liger_kernel_config: expected no {name}"):
            liger_options({name: True})


def test_liger_is_refused_where_it_would_do_nothing_or_fail():
    pytest.importorskip("liger_kernel")
    with pytest.raises(ValueError, match="expected a model on a GPU, got one on the CPU"):
        apply_liger(tiny_model(), liger_options(None))
    with pytest.raises(ValueError, match="expected a model type that Liger has kernels for, got 'gpt2'"):
        apply_liger(tiny_model("gpt2"), liger_options(None))


_PATCHED = """
from factory import tiny_model
from sami_fast.fused_layers import apply_liger, liger_options
model = tiny_model().to("meta")
forward = type(model).forward
apply_liger(model, liger_options(None))
assert model.forward.__func__ is forward, "the model's own forward is gone"
layer = model.model.layers[0]
assert all("liger_kernel" in f.__func__.__module__ for f in (layer.mlp.forward, layer.input_layernorm.forward))
"""


def test_liger_patches_layers_and_leaves_the_head():
    # In a process of its own: Liger replaces functions of transformers' modules.
    pytest.importorskip("liger_kernel")
    environment = {"PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run([sys.executable, "-c", _PATCHED], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_liger_is_as_good_as_the_layers_it_replaces(family):
    pytest.importorskip("liger_kernel")
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen3 import modeling_qwen3

    module = {"llama": modeling_llama, "qwen3": modeling_qwen3}[family]
    before = dict(vars(module))
    try:
        model = tiny_model(family, dtype=torch.float32).cuda().train()
        expected = [gradients(model, packed.to("cuda")) for packed in packs()]
        apply_liger(model, liger_options(None))
        for packed, gradient in zip(packs(), expected, strict=True):
            assert_same_gradients(gradients(model, packed.to("cuda")), gradient, slack=10)
    finally:
        vars(module).update(before)
