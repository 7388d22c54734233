import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sami_fast import infonce_loss, pack, score
from sami_fast.cli import main
from sami_fast.config import read_config
from sami_fast.data import GroupDataset
from sami_fast.evaluation import GroupResult, padded_matrix, score_groups, summarize
from sami_fast.examples import load_examples
from sami_fast.report import draw_heat_maps, draw_training_curve, write_json
from sami_fast.win_rate import SHARES

WORDS = ["the", "cat", "dog", "sat", "ran", "mat", "hill", "short", "long", "plain", "very", "far", "home", "again"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny random Llama with a tokenizer, saved as users have them."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator([*WORDS, "A", "B"], trainers.WordLevelTrainer(special_tokens=["[UNK]", "<eos>"]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="<eos>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=len(fast), num_key_value_heads=2, max_position_embeddings=1024, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    rng = np.random.default_rng(0)
    text = lambda count: " ".join(rng.choice(WORDS, count))  # noqa: E731
    path = tmp_path_factory.mktemp("data") / "groups.jsonl"
    rows = [
        {"id": f"q{i}", "query": text(5), "constitutions": ["short", "very long"], "responses": [text(2), text(6)]}
        for i in range(10)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_train_from_yaml_with_overrides_then_resume(tmp_path, model_folder, data_file):
    config = tmp_path / "config.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "model": {"name": str(model_folder)},
                "data": {"source": str(data_file), "held_out": 3},
                "training": {"output_dir": str(tmp_path / "run"), "max_steps": 4, "report_to": "none"},
            }
        )
    )
    overrides = ["training.learning_rate=1e-3", "training.use_cpu=true", "training.save_steps=2"]
    assert main(["train", str(config), *overrides, "training.max_steps=2"]) == 0
    assert (tmp_path / "run/checkpoint-2/model.safetensors").exists()
    assert main(["train", str(config), *overrides, "--resume"]) == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["log"][-2]["step"] == 4 or metrics["log"][-1]["step"] == 4
    assert np.isfinite(metrics["after"]["eval_mutual_information"])
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert not trained.lm_head.weight.equal(AutoModelForCausalLM.from_pretrained(model_folder).lm_head.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "run").eos_token == "<eos>"


def test_train_lora_and_score_with_the_adapter(tmp_path, model_folder, data_file):
    pytest.importorskip("peft")
    common = [f"model.name={model_folder}", f"data.source={data_file}"]
    training = [f"training.output_dir={tmp_path}/lora", "training.max_steps=1", "training.use_cpu=true", "lora.r=2"]
    assert main(["train", *common, *training]) == 0
    assert (tmp_path / "lora/adapter_model.safetensors").exists()
    output = tmp_path / "scores.jsonl"
    arguments = [*common, f"model.adapter={tmp_path}/lora", f"output={output}", "model.device=cpu"]
    assert main(["score", *arguments]) == 0
    assert len(output.read_text().splitlines()) == 10


def test_score_writes_what_the_library_computes(tmp_path, model_folder, data_file, capsys):
    output, picture = tmp_path / "out/scores.jsonl", tmp_path / "out/heat.png"
    arguments = [f"model.name={model_folder}", f"data.source={data_file}", "model.device=cpu", "max_tokens=200"]
    assert main(["score", *arguments, f"output={output}", f"heat_map={picture}", "heat_map_groups=3"]) == 0
    assert "mutual_information" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    groups = GroupDataset.from_examples(load_examples(data_file), tokenizer).groups
    scores = score(model, pack(groups))
    expected = infonce_loss(scores, reduction="none")
    assert [row["id"] for row in rows] == [f"q{i}" for i in range(10)]
    assert np.allclose([row["matrix"] for row in rows], scores.matrix.detach(), atol=1e-5)
    assert np.allclose([row["mutual_information"] for row in rows], expected.mutual_information, atol=1e-5)


def test_padded_matrix_is_the_tree_matrix(model_folder, data_file):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    groups = GroupDataset.from_examples(load_examples(data_file, limit=3), tokenizer).groups
    for normalize in ("mean", "sum"):
        for result, group in zip(score_groups(model, groups, normalize=normalize), groups, strict=True):
            padded = padded_matrix(model, group, normalize=normalize).detach()
            assert np.allclose(result.matrix, padded, atol=1e-4)


def test_demo_leaves_its_report(tmp_path, model_folder):
    output = tmp_path / "report"
    assert main(["demo", "--model", str(model_folder), "--output", str(output), "--queries", "9", "--steps", "2"]) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    groups = metrics["groups"]["training"] + metrics["groups"]["held_out"]  # random answers: some are filtered out
    assert 2 <= groups <= 9 and len((output / "responses.jsonl").read_text().splitlines()) == groups
    for when in ("before", "after", "change"):
        interval = metrics[when]["mutual_information"]
        assert interval["low"] <= interval["mean"] <= interval["high"]
    before, after = (metrics[when]["mutual_information"]["mean"] for when in ("before", "after"))
    assert metrics["change"]["mutual_information"]["mean"] == pytest.approx(after - before)
    assert metrics["speed"]["largest_difference"] < 1e-4 and metrics["tokens"]["ratio"] > 1
    for name in ("mutual_information.png", "heat_maps_before.png", "heat_maps_after.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    assert "before:" in (output / "samples.md").read_text()


def test_the_long_demo_has_two_iterations_and_is_not_done_twice(tmp_path, model_folder, monkeypatch, capsys):
    arguments = ["demo", "--long", "--model", str(model_folder), "--output", str(tmp_path / "report")]
    arguments += ["--queries", "15", "--steps", "2", "--traceback"]
    monkeypatch.setenv("COLUMNS", "200")  # no broken lines in tables
    assert main(arguments) == 0
    first = (tmp_path / "report/metrics.json").read_text()
    metrics = json.loads(first)
    assert [entry["iteration"] for entry in metrics["iterations"]] == [1, 2]
    assert metrics["after"] == metrics["iterations"][1]["held_out"]
    assert {entry["iteration"] for entry in metrics["training"]} == {1, 2}
    assert (tmp_path / "report/mutual_information.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "iteration 2" in said
    for name, label in SHARES.items():
        assert label in said or all(rate[name] is None for rate in metrics["win_rates"])
    rates = [rate["win_rate"] for rate in metrics["win_rates"]]
    assert all(f"{r['mean']:.3f} ({r['low']:.3f} to {r['high']:.3f})" in said for r in rates) and len(rates) == 2
    assert metrics["win_rates"][0]["judge"]["judge"] == str(model_folder), "it judges itself"
    monkeypatch.setattr("sami_fast.run_responses.iter_responses", lambda *_, **__: pytest.fail("generated again"))
    assert main(arguments) == 0
    assert (tmp_path / "report/metrics.json").read_text() == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "data.source: expected a file"),
        (["train", "data.source=x.jsonl"], "training.output_dir: expected a folder"),
        (["train", "data.sauce=x"], "data.sauce: unknown key, did you mean 'source'?"),
        (["train", "trainning.lr=1"], "trainning: unknown key, did you mean 'training'?"),
        (["train", "data.source=x.jsonl", "training.output_dir=o", "training.learn=1"], "training.learn: unknown key"),
        (["train", "data=5"], "data: expected a section"),
        (["score", "data.source=missing.jsonl"], "missing.jsonl"),
        (["score", "data.source=x.jsonl", "model.dtype=float8"], "model.dtype: expected one of"),
        (["score", "nonsense.yaml"], "nonsense.yaml"),
        (["demo", "--queries", "2"], "queries: expected 6 to"),
    ],
)
def test_bad_command_lines_say_what_is_wrong(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_a_stopped_command_says_so(capsys, monkeypatch):
    def stopped(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("sami_fast.run_report.write_run_report", stopped)
    assert main(["report", "anywhere"]) == 130
    assert capsys.readouterr().err == "sami-fast report: stopped\n"
    with pytest.raises(KeyboardInterrupt):
        main(["report", "anywhere", "--traceback"])


def test_the_long_demo_refuses_a_judge_that_cannot_answer_before_any_work(tmp_path, model_folder, capsys):
    words = shutil.copytree(model_folder, tmp_path / "words")
    raw = Tokenizer(models.WordLevel({"[UNK]": 0, "x": 1}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", eos_token="x").save_pretrained(words)
    (words / "chat_template.jinja").unlink(missing_ok=True)
    assert main(["demo", "--long", "--model", str(words), "--output", str(tmp_path / "report")]) == 1
    said = capsys.readouterr().err
    assert f"judge.model: '{words}' cannot be asked: judge: expected a tokenizer that tells A from B, got" in said
    assert not (tmp_path / "report").exists(), "nothing was begun"


def test_bad_files_are_named(tmp_path, capsys, model_folder):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"query": "q", "constitutions": ["c"], "responses": ["r"]}\n{"query": \n')
    assert main(["score", f"model.name={model_folder}", f"data.source={broken}"]) == 1
    assert f"{broken}, line 2" in capsys.readouterr().err
    config = tmp_path / "list.yaml"
    config.write_text("- 1\n")
    assert main(["train", str(config)]) == 1
    assert "expected a mapping of sections, got list" in capsys.readouterr().err


def test_overrides_are_yaml_laid_over_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("a: {b: 1, c: 2}\n")
    assert read_config(str(path), ["a.b=[3, 4]", "d.e=true"]) == {"a": {"b": [3, 4], "c": 2}, "d": {"e": True}}
    with pytest.raises(ValueError, match="override: expected key=value, got 'oops'"):
        read_config(None, ["oops"])


def test_help_and_info(capsys):
    for command in ("train", "score", "demo"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
    assert "groups.jsonl" in capsys.readouterr().out
    assert main(["info"]) == 0
    assert "backend reference: available" in capsys.readouterr().out


def test_bootstrap_interval_covers_the_mean_and_narrows():
    rng = np.random.default_rng(0)

    def results(count):
        return [GroupResult(None, np.zeros((2, 2)), *rng.normal(0.3, 0.1, 4)) for _ in range(count)]

    few, many = (summarize(results(count))["mutual_information"] for count in (10, 1000))
    assert few["low"] < few["mean"] < few["high"]
    assert 0 < many["high"] - many["low"] < (few["high"] - few["low"]) / 3
    assert abs(many["high"] - many["low"] - 4 * 0.1 / 1000**0.5) < 0.002


def test_files_appear_whole_or_not_at_all(tmp_path):
    target = tmp_path / "x.json"
    write_json(target, {"kept": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(target, {"bad": float("nan")})
    assert json.loads(target.read_text()) == {"kept": 1} and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_figures_of_ragged_and_masked_groups(tmp_path):
    matrices = [np.array([[-1.0, -np.inf], [-2.0, -1.0]]), np.zeros((3, 5)), np.full((1, 1), -1.0)]
    results = [GroupResult(f"g{i}", matrix, 0.1, 0.2, 1.0, 1.0) for i, matrix in enumerate(matrices)]
    draw_heat_maps(tmp_path / "h.png", results, title="t")
    draw_training_curve(tmp_path / "c.png", [1, 2], [0.0, 0.1], [0, 2], [0.0, 0.2], limit=0.69)
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("h.png", "c.png"))
    assert results[0].as_json()["matrix"] == [[-1.0, None], [-2.0, -1.0]]
