import copy
import json

import numpy as np
import pytest
import torch
from factory import random_group
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback

from sami_fast import Group, pack
from sami_fast.losses import infonce_loss
from sami_fast.scoring import UnsupportedModelError, score
from sami_fast.trainer import NonFiniteError, SamiConfig, SamiTrainer, _rmsprop

VOCAB = 97


def llama(dtype=torch.float32, seed=0, **options) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=64, **options)
    return LlamaForCausalLM(config).to(dtype)


def dataset(count: int = 12, seed: int = 0) -> list[Group]:
    rng = np.random.default_rng(seed)
    shapes = [(2, 2), (2, 3), (3, 3)]
    return [random_group(rng, *shapes[i % 3], id=f"g{i}") for i in range(count)]


def config(folder, **options) -> SamiConfig:
    defaults = dict(
        output_dir=str(folder),
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        max_steps=6,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=1,
    )
    return SamiConfig(**defaults | options)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_training_raises_mutual_information_and_logs_it(tmp_path):
    # Responses that repeat their constitution's token: a dependence that the model can learn.
    groups = []
    for i in range(16):
        pair = [10 + i % 4, 20 + i % 5]
        groups.append(Group([[1, i, c] for c in pair], [[c] * 4 for c in pair], id=f"g{i}"))
    trainer = SamiTrainer(llama(), config(tmp_path, max_steps=40), groups[:12], groups[12:])
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_mutual_information"] > before["eval_mutual_information"] + 0.2
    assert after["eval_column_accuracy"] > before["eval_column_accuracy"]
    logs = [entry for entry in trainer.state.log_history if "mutual_information" in entry]
    assert len(logs) == 40 and logs[-1]["mutual_information"] > logs[0]["mutual_information"]
    for entry in logs:
        assert entry["loss"] == pytest.approx(np.log(2) - entry["mutual_information"], abs=1e-5)
        assert entry["tokens_saved"] > 0 and entry["tokens_per_second"] > 0 and "kl" not in entry
        assert entry["token_ratio"] > 1 and 0 <= entry["row_accuracy"] <= 1 and 0 <= entry["column_accuracy"] <= 1


def test_evaluation_agrees_with_scoring(tmp_path):
    groups = dataset()
    trainer = SamiTrainer(llama(), config(tmp_path, per_device_eval_batch_size=5, max_tokens=60), eval_dataset=groups)
    metrics = trainer.evaluate()
    expected = infonce_loss(score(trainer.model, pack(groups)))
    for name in ("loss", "mutual_information", "row_accuracy", "column_accuracy"):
        assert metrics[f"eval_{name}"] == pytest.approx(float(getattr(expected, name)), rel=1e-5)
    assert metrics["eval_token_ratio"] == pytest.approx(pack(groups).token_ratio)


@pytest.mark.parametrize("options", [dict(max_tokens=60), dict(gradient_checkpointing=True)], ids=str)
def test_packs_and_checkpointing_do_not_change_the_result(tmp_path, options):
    # SGD: RMSprop would turn rounding of a gradient near zero into a whole step.
    reference, other = (
        SamiTrainer(llama(), config(tmp_path, optim="sgd", learning_rate=0.1, **extra), dataset())
        for extra in (dict(max_tokens=10_000), options)
    )
    reference.train()
    other.train()
    for (name, a), b in zip(weights(reference.model).items(), weights(other.model).values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), name


def test_accumulated_steps_equal_one_large_step(tmp_path):
    one, two = (
        SamiTrainer(llama(), config(tmp_path, optim="sgd", learning_rate=0.1, max_steps=3, **extra), dataset())
        for extra in (
            dict(per_device_train_batch_size=4),
            dict(per_device_train_batch_size=2, gradient_accumulation_steps=2),
        )
    )
    one.train()
    two.train()
    for (name, a), b in zip(weights(one.model).items(), weights(two.model).values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), name


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_resume_continues_bit_for_bit(tmp_path, two_threads):
    def run(folder, steps, resume=None):
        options = dict(max_steps=steps, save_strategy="steps", save_steps=2)
        trainer = SamiTrainer(llama(attention_dropout=0.0), config(tmp_path / folder, **options), dataset(10))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole", 6)
    run("killed", 4)
    assert (tmp_path / "killed/checkpoint-4/model.safetensors").exists()
    resumed = run("killed", 6, resume=str(tmp_path / "killed/checkpoint-4"))
    assert resumed.state.global_step == 6
    for (name, a), b in zip(weights(whole.model).items(), weights(resumed.model).values(), strict=True):
        assert a.equal(b), name


@pytest.mark.parametrize("poison", ["weight", "gradient"])
def test_non_finite_numbers_stop_training_and_keep_the_last_checkpoint(tmp_path, poison):
    model = llama()
    trainer = SamiTrainer(model, config(tmp_path, save_strategy="steps", save_steps=1), dataset())
    good = {}

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                good.update(weights(model))
                if poison == "weight":
                    model.model.layers[0].mlp.up_proj.weight.data[3, 3] = torch.nan
                else:
                    model.model.layers[0].mlp.up_proj.weight.register_hook(lambda grad: grad * torch.nan)

    trainer.add_callback(Poison())
    if poison == "weight":
        message = r"loss of group 'g\d+' is not finite at step 2: weight model.layers.0.mlp.up_proj.weight"
    else:
        message = "gradient of model.layers.0.mlp.up_proj.weight is not finite at step 2"
    with pytest.raises(NonFiniteError, match=message):
        trainer.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    for name, p in weights(kept).items():
        assert p.equal(good[name]), name


def test_small_updates_of_bf16_models_count_with_master_weights_only(tmp_path):
    moved = {}
    for choice in ("fp32", "none"):
        model = llama(torch.bfloat16)
        start = weights(copy.deepcopy(model).float())
        options = dict(master_weights=choice, learning_rate=5e-7, max_steps=2)
        SamiTrainer(model, config(tmp_path, **options), dataset()).train()
        end = weights(copy.deepcopy(model).float())
        norms = [name for name in start if "norm" in name]  # weights of 1.0: bf16 spacing is 8e-3 there
        moved[choice] = [name for name in norms if not start[name].equal(end[name])]
        assert model.lm_head.weight.dtype == (torch.float32 if choice == "fp32" else torch.bfloat16)
    assert len(moved["fp32"]) == 5 and moved["none"] == []


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_kahan_summation_moves_bf16_weights_as_float32_moves(tmp_path, optim):
    pytest.importorskip("optimi")
    moved = {}
    for choice in ("fp32", "kahan", "none"):
        model = llama(torch.bfloat16)
        start = weights(copy.deepcopy(model).float())
        options = dict(master_weights=choice, learning_rate=5e-7, max_steps=20, optim=optim, max_grad_norm=0.0)
        trainer = SamiTrainer(model, config(tmp_path, **options), dataset())
        trainer.train()
        state = trainer.optimizer.state
        carry = {name: state[p].get("kahan_comp", torch.zeros(())).double() for name, p in model.named_parameters()}
        parts = [p.detach().double() + carry[name] - start[name] for name, p in model.named_parameters()]
        moved[choice] = torch.cat([part.flatten() for part in parts])
        assert model.lm_head.weight.dtype == (torch.float32 if choice == "fp32" else torch.bfloat16)
    off = {choice: float((moved[choice] - moved["fp32"]).norm() / moved["fp32"].norm()) for choice in moved}
    assert off["kahan"] < 0.1 and off["none"] > 0.5


@pytest.mark.parametrize("adapters", [False, True])
def test_kl_to_the_reference_is_logged_and_holds_the_model_back(tmp_path, adapters):
    peft = pytest.importorskip("peft")
    drift = {}
    for beta in (0.01, 100.0):
        peft_config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False) if adapters else None
        options = dict(beta=beta, max_steps=8, learning_rate=3e-3, optim="sgd", max_grad_norm=1.0)
        trainer = SamiTrainer(llama(), config(tmp_path, **options), dataset(), dataset(4, 1), peft_config=peft_config)
        trainer.train()
        assert all("kl" in entry for entry in trainer.state.log_history if "mutual_information" in entry)
        drift[beta] = trainer.evaluate()["eval_kl"]
        if adapters:
            assert trainer.ref_model is trainer.model
            assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == {
                name for name, _ in trainer.model.named_parameters() if "lora_" in name
            }
    assert 0 <= drift[100.0] < drift[0.01]


@pytest.mark.parametrize("workers", [1, 2])
def test_packs_made_ahead_are_the_same_in_the_same_order(tmp_path, workers):
    def batches(count):
        options = dict(dataloader_num_workers=count, max_tokens=60, per_device_train_batch_size=5)
        loader = SamiTrainer(llama(), config(tmp_path, **options), dataset()).get_train_dataloader()
        return [batch["packs"] for batch in loader]

    made, ahead = batches(0), batches(workers)
    assert [len(packs) for packs in made] == [len(packs) for packs in ahead] and max(map(len, made)) > 1
    for a, b in zip((p for packs in made for p in packs), (p for packs in ahead for p in packs), strict=True):
        assert a.ids == b.ids and a.shapes == b.shapes and a.plan.nodes.equal(b.plan.nodes)
        for name in ("input_ids", "position_ids", "subtree_end", "hidden_index", "labels", "offsets", "positives"):
            assert getattr(a, name).equal(getattr(b, name)), name


def test_training_with_packs_made_ahead_is_the_same(tmp_path):
    trainers = [SamiTrainer(llama(), config(tmp_path, dataloader_num_workers=count), dataset()) for count in (0, 1)]
    for trainer in trainers:
        trainer.train()
    for (name, a), b in zip(weights(trainers[0].model).items(), weights(trainers[1].model).values(), strict=True):
        assert a.equal(b), name


def test_packs_are_pinned_by_the_data_loader(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.numel()) or tensor.clone())
    from torch.utils.data._utils.pin_memory import pin_memory

    packed = pack(dataset(3))
    batch = pin_memory({"packs": [packed]}, "cuda")
    assert len(pinned) == 9  # all but the table of nodes, which the host walks
    assert batch["packs"][0].plan.nodes is packed.plan.nodes and batch["packs"][0].labels is not packed.labels


def test_processes_make_packs_where_there_is_a_gpu(tmp_path, monkeypatch):
    assert config(tmp_path).dataloader_num_workers == 0
    monkeypatch.setattr(SamiConfig, "device", torch.device("cuda"))
    assert config(tmp_path).dataloader_num_workers == 1
    assert config(tmp_path, dataloader_num_workers=3).dataloader_num_workers == 3


def test_rmsprop_runs_over_lists_of_adapters_and_one_large_weight_at_a_time(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    options = config(tmp_path)
    adapters = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    large = torch.nn.Linear(2048, 1024)
    assert _rmsprop(adapters, options)[1]["foreach"] is False  # on the CPU it gains nothing
    monkeypatch.setattr(SamiConfig, "device", torch.device("cuda"))
    assert _rmsprop(adapters, options)[1]["foreach"] is True and _rmsprop(large, options)[1]["foreach"] is False


@pytest.mark.parametrize(("optim", "flag"), [("rmsprop", "foreach"), ("adamw_torch_fused", "fused")])
def test_the_optimiser_says_how_it_runs(tmp_path, optim, flag):
    trainer = SamiTrainer(llama(), config(tmp_path, optim=optim, learning_rate=2e-4), dataset())
    optimizer = trainer.create_optimizer()
    assert {group[flag] for group in optimizer.param_groups} == {optim == "adamw_torch_fused"}
    assert {group["lr"] for group in optimizer.param_groups} == {2e-4}


def test_layers_are_compiled_in_place_and_the_model_is_not(tmp_path):
    torch._dynamo.reset()
    counters.clear()  # reset leaves what earlier tests counted
    plain, compiled = (
        SamiTrainer(llama(), config(tmp_path, optim="sgd", learning_rate=0.1, max_tokens=60, **extra), dataset())
        for extra in ({}, dict(torch_compile=True, torch_compile_backend="aot_eager", gradient_checkpointing=True))
    )
    names = list(weights(compiled.model))
    for trainer in (plain, compiled):
        trainer.train()
    assert 1 <= counters["stats"]["unique_graphs"] <= 2
    assert list(weights(compiled.model)) == names and not hasattr(compiled.model_wrapped, "_orig_mod")
    for (name, a), b in zip(weights(plain.model).items(), weights(compiled.model).values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), name


def test_liger_and_compiled_layers_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="expected one of torch_compile and use_liger_kernel, got both"):
        config(tmp_path, torch_compile=True, use_liger_kernel=True)
    made = config(tmp_path, use_liger_kernel=True, liger_kernel_config={"rope": False})
    assert made.liger_kernel_config == {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}


def test_one_process_saves_json_and_safetensors_only(tmp_path):
    trainer = SamiTrainer(llama(), config(tmp_path, max_steps=1), dataset())
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert "model.safetensors" in names and not any(name.endswith((".pt", ".pkl")) for name in names)
    assert json.loads((tmp_path / "model/config.json").read_text())["model_type"] == "llama"


def test_bad_input_is_refused_before_training(tmp_path):
    model = llama()
    cases = {
        r"train_dataset: expected at least one group": [],
        r"train_dataset: group 'big': expected token ids below 97, got 97": [Group([[1]], [[97]], id="big")],
        r"train_dataset: group number 0: expected sequences of at most 64 tokens, got 71": [Group([[1] * 70], [[1]])],
        r"max_tokens: group 'wide' alone packs to 44 tokens, over the budget of 40": [
            Group([[1] * 40], [[1] * 5], id="wide")
        ],
        r"groups 0 and 1 share the id 'x'": [Group([[1]], [[1]], id="x")] * 2,
        r"train_dataset\[0\]: expected a Group, got dict": [{"input_ids": [1]}],
    }
    for message, groups in cases.items():
        with pytest.raises(ValueError, match=message):
            SamiTrainer(model, config(tmp_path, max_tokens=40), groups)
    for options, message in {
        "normalize": ("median", "normalize: expected one of"),
        "master_weights": ("bf16", "master_weights: expected one of"),
        "max_tokens": (0, "max_tokens: expected a positive"),
        "beta": (-1.0, "beta: expected a number >= 0"),
    }.items():
        with pytest.raises(ValueError, match=message[1] if isinstance(message, tuple) else message):
            config(tmp_path, **{options: message[0]})
    with pytest.raises(ValueError, match=r"optim: expected one of .* got 'adafactor'"):
        config(tmp_path, master_weights="kahan", optim="adafactor")


def test_inexact_models_are_refused_before_training(tmp_path):
    model = llama()
    model.model.layers[1].self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM"):
        SamiTrainer(model, config(tmp_path), dataset())
