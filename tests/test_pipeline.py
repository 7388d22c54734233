"""The whole run on a tiny model: what each stage leaves, and what is done again."""

import json
import logging

import pytest
import torch
import yaml
from pipeline_runs import PRINCIPLES, STAGES, begun, rows_of, run
from transformers import AutoModelForCausalLM

import sami_fast.pipeline as pipeline
import sami_fast.run_responses as run_responses
import sami_fast.stages as stages
from sami_fast.examples import load_examples
from sami_fast.stages import read_manifest

pytest_plugins = ["pipeline_runs"]
pytestmark = pytest.mark.usefixtures("quick")


def test_every_stage_says_what_it_was_made_from(finished):
    names = [*STAGES, *(name.replace("-1", "-2") for name in STAGES if "-1" in name)]
    assert sorted(begun(finished)) == sorted(names)
    for name in names:
        manifest = read_manifest(finished / name)
        assert manifest["status"] == "complete" and manifest["stage"] == name and manifest["seconds"] > 0
        assert manifest["versions"]["torch"] == torch.__version__ and manifest["outputs"]
        for file, entry in manifest["outputs"].items():
            assert entry == {
                "size": (finished / name / file).stat().st_size,
                "sha256": stages.digest(finished / name / file),
            }
    assert read_manifest(finished / "queries")["inputs"]["seed"] == 0
    assert not (finished / "iteration-1/training/checkpoints").exists()
    assert not list(finished.rglob("*.bin")), "safetensors only"
    assert yaml.safe_load((finished / "config.yaml").read_text())["iterations"]["count"] == 2
    assert (finished / "report/report.html").stat().st_size > 1000


def test_queries_are_fresh_in_every_iteration(finished):
    slices = [rows_of(finished / "queries" / f"{name}.jsonl") for name in ("held_out", "iteration-1", "iteration-2")]
    ids = [row["id"] for rows in slices for row in rows]
    assert [len(rows) for rows in slices] == [4, 4, 4] and len(set(ids)) == 12
    assert ids != sorted(ids, key=lambda id: int(id[1:])), "shuffled"


def test_constitutions_contrast_and_are_shuffled_again_for_training(finished):
    rows = [
        row
        for part in ("iteration-0", "iteration-1", "iteration-2")
        for row in rows_of(finished / part / "constitutions/constitutions.jsonl")
    ]
    reordered = 0
    for row in rows:
        sides = [tuple(sorted(identifiers.items())) for identifiers in row["identifiers"]]
        assert len(set(sides)) == 2 and all(set(dict(side)) == {"size", "style"} for side in sides)
        for generation, training, identifiers in zip(
            row["generation"], row["training"], row["identifiers"], strict=True
        ):
            lines = [sorted(line[3:] for line in text.split("\n")) for text in (generation, training)]
            assert lines[0] == lines[1] == sorted(p[identifiers[p["attribute"]]] for p in PRINCIPLES)
            reordered += generation != training
    assert 0 < reordered < 2 * len(rows)


def test_groups_are_what_the_filters_left(finished):
    for part in ("iteration-0", "iteration-1", "iteration-2"):
        generated = rows_of(finished / part / "generation/generated.jsonl")
        assert len({(row["id"], row["constitution"], row["sample"]) for row in generated}) == len(generated) == 8
        results = read_manifest(finished / part / "responses")["results"]
        examples = load_examples(finished / part / "responses/groups.jsonl")
        assert len(examples) == results["groups"] and results["queries"] == 4
        counts = results["filters"]
        assert counts["kept"] + counts["leftover"] + counts["empty"] + counts["identical"] == 8
        constitutions = {
            row["id"]: row["training"] for row in rows_of(finished / part / "constitutions/constitutions.jsonl")
        }
        texts = {(row["id"], row["constitution"]): row["text"] for row in generated}
        for example in examples:
            assert example.constitutions == constitutions[example.id]
            assert example.responses == [texts[example.id, j] for j in example.positives]


def test_models_follow_each_other(finished):
    names = (
        "iteration-0/generation",
        "iteration-1/generation",
        "iteration-1/training",
        "iteration-2/generation",
        "iteration-2/training",
    )
    digests = [read_manifest(finished / name)["inputs"]["model"] for name in names]
    assert digests[0] == digests[1] == digests[2] == digests[4] != digests[3], "base to start from, previous to ask"
    assert read_manifest(finished / "iteration-2/training")["inputs"]["start"] == "base"
    weights = [
        AutoModelForCausalLM.from_pretrained(finished / f"iteration-{n}/training/model").lm_head.weight for n in (1, 2)
    ]
    assert not torch.equal(*weights)


def test_evaluations_compare_with_the_base_model(finished):
    base = json.loads((finished / "iteration-0/evaluation/metrics.json").read_text())
    for number in (1, 2):
        folder = finished / f"iteration-{number}/evaluation"
        metrics = json.loads((folder / "metrics.json").read_text())
        before, after, change = (
            m["mutual_information"]["mean"] for m in (base["held_out"], metrics["held_out"], metrics["change"])
        )
        assert change == pytest.approx(after - before, abs=1e-9) and change != 0
        assert (
            metrics["own"] is None
            or metrics["own"]["mutual_information"]["low"] <= metrics["own"]["mutual_information"]["high"]
        )
        responses, before = (
            rows_of(folder / "responses.jsonl"),
            rows_of(finished / "iteration-0/evaluation/responses.jsonl"),
        )
        assert [(r["id"], r["constitution"]) for r in responses] == [(r["id"], r["constitution"]) for r in before]
        assert len(responses) == 8 and set(responses[0]) == {"id", "query", "constitution", "response", "identifiers"}


def test_a_run_is_reproducible(inputs, finished, tmp_path):
    again = run(inputs, tmp_path / "run", "generation.batch_size=3")
    for name in (
        "queries/held_out.jsonl",
        "iteration-0/constitutions/constitutions.jsonl",
        "iteration-0/generation/generated.jsonl",
    ):
        expected, got = (sorted((folder / name).read_text().splitlines()) for folder in (finished, again))
        assert got == expected
    other = run(inputs, tmp_path / "other", "seed=1")
    for name in ("queries/held_out.jsonl", "iteration-0/constitutions/constitutions.jsonl"):
        assert (other / name).read_text() != (again / name).read_text()


def test_what_is_complete_is_skipped_and_what_changed_is_redone(inputs, tmp_path, monkeypatch):
    folder = run(inputs, tmp_path / "run")
    before = begun(folder)

    def redone(*overrides):
        nonlocal before
        run(inputs, folder, *overrides)
        after = begun(folder)
        changed = [name for name in STAGES if after[name] != before[name]]
        before = after
        return changed

    with monkeypatch.context() as patch:
        patch.setattr(run_responses, "iter_responses", lambda *_, **__: pytest.fail("generated again"))
        patch.setattr(pipeline, "SamiTrainer", lambda *_, **__: pytest.fail("trained again"))
        assert redone() == []
        assert redone("generation.batch_size=2", "training.max_tokens=999", "evaluation.max_tokens=99") == []
    changed = redone("training.learning_rate=2e-3")
    assert changed == ["iteration-1/training", "iteration-1/evaluation"]
    changed = redone("training.learning_rate=2e-3", "evaluation.normalize=sum")
    assert changed == ["iteration-0/evaluation", "iteration-1/evaluation"]
    with monkeypatch.context() as patch:
        patch.setattr(run_responses, "iter_responses", lambda *_, **__: pytest.fail("generated again"))
        marker = rows_of(folder / "iteration-1/generation/generated.jsonl")[0]["text"]
        patch.setattr(pipeline.Pipeline, "_evaluate", lambda *_: None)
        changed = redone("training.learning_rate=2e-3", f"generation.markers=['{marker}']")
        assert changed == ["iteration-0/responses", "iteration-1/responses", "iteration-1/training"], (
            "filters ask for no new responses"
        )
    assert redone("generation.temperature=0.9")[0] == "iteration-0/generation"
    assert "iteration-1/training" in begun(folder)


def test_an_iteration_more_leaves_the_others_alone(inputs, finished, tmp_path):
    folder = run(inputs, tmp_path / "run")
    before = begun(folder)
    run(inputs, folder, "iterations.count=2")
    after = begun(folder)
    assert [name for name in before if after[name] != before[name]] == ["queries"]
    for name in ("generation/generated.jsonl", "evaluation/metrics.json"):
        assert (folder / "iteration-2" / name).read_text() == (finished / "iteration-2" / name).read_text()


def test_damaged_outputs_are_made_anew(inputs, tmp_path, caplog):
    folder = run(inputs, tmp_path / "run")
    expected = (folder / "iteration-0/responses/groups.jsonl").read_text()
    (folder / "iteration-0/responses/groups.jsonl").write_text(expected.replace("the", "eht"))
    (folder / "iteration-1/training/model/model.safetensors").unlink()
    caplog.clear()
    run(inputs, folder)
    assert (folder / "iteration-0/responses/groups.jsonl").read_text() == expected
    said = caplog.text
    assert "iteration-0/responses: groups.jsonl is not as it was written" in said
    assert "iteration-1/training: model/model.safetensors is not as it was written" in said


def test_edited_principles_start_the_constitutions_anew(inputs, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    mine = tmp_path / "mine.json"
    mine.write_text((inputs / "principles.json").read_text())
    folder = run(inputs, tmp_path / "run", f"constitutions.principles={mine}")
    mine.write_text(mine.read_text().replace("very short", "now short"))
    caplog.clear()
    run(inputs, folder, f"constitutions.principles={mine}")
    assert "queries: complete, skipped" in caplog.text
    assert "iteration-0/constitutions: principles changed, starting anew" in caplog.text
    assert "now short" in (folder / "iteration-1/responses/groups.jsonl").read_text()
