"""Every way a run is cut off, and bad input: nothing finished is lost, and what is wrong is named."""

import json
import resource
import signal
from pathlib import Path

import pytest
import torch
from pipeline_runs import STAGES, WORDS, begun, configure, in_a_process, killed_at, rows_of, run

import sami_fast.pipeline as pipeline
from sami_fast.cli import main
from sami_fast.run_config import RunConfig
from sami_fast.run_responses import NoGroupsError
from sami_fast.stages import Run, StageError, read_manifest

pytest_plugins = ["pipeline_runs"]
pytestmark = pytest.mark.usefixtures("quick")

# For each stage the writes in the middle of which a process is killed there, one process after the other.
KILLS = [(name, write) for name in STAGES for write in ((1, 2, 3) if name.endswith("generation") else (2,))]
KILLS = [("queries", 1), *KILLS, *(("iteration-1/training", write) for write in (4, 6, 3))]
KILLS.sort(key=lambda kill: STAGES.index(kill[0]))


def test_killed_in_every_stage_and_continued(inputs, finished, tmp_path, processes):
    config = configure(inputs, tmp_path / "run")
    for name, write in KILLS:
        assert in_a_process(processes, killed_at, name, write, config) == -signal.SIGKILL, (name, write)
        status = {stage: read_manifest(tmp_path / "run" / stage)["status"] for stage in begun(tmp_path / "run")}
        cut_off = [] if write == 1 else [name]
        assert [stage for stage in status if status[stage] == "running"] == cut_off, (name, write)
    assert in_a_process(processes, killed_at, "none", 1, config) == 0
    for part in ("iteration-0", "iteration-1"):
        for name in ("responses/groups.jsonl", "evaluation/responses.jsonl", "evaluation/metrics.json"):
            assert (tmp_path / "run" / part / name).read_text() == (finished / part / name).read_text(), name
        rows = rows_of(tmp_path / "run" / part / "generation/generated.jsonl")
        assert sorted(map(str, rows)) == sorted(map(str, rows_of(finished / part / "generation/generated.jsonl")))
    assert not [path for path in (tmp_path / "run").rglob(".*-*") if path.is_file()], "no leftovers"


def limited(size: int, config: RunConfig, outcome: str) -> None:
    """Run in a process that can write no file larger than `size` bytes, as if the disk were full."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        pipeline.run_pipeline(config)
        text = "finished"
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    Path(outcome).write_text(text)


@pytest.mark.parametrize("overrides", [[], ["training.save_strategy='no'"]], ids=["checkpoint", "model"])
def test_a_full_disk_is_said_and_survived(overrides, inputs, finished, tmp_path, processes):
    folder = tmp_path / "run"
    config = configure(inputs, folder, *overrides)
    assert in_a_process(processes, limited, 20_000, config, str(tmp_path / "outcome")) == 0
    said = (tmp_path / "outcome").read_text()
    assert said.startswith(f"StageError: {folder}/iteration-1/training: cannot write"), said
    assert "finished work is kept, run again to go on" in said
    kept = begun(folder)
    run(inputs, folder, *overrides)
    assert {name for name in kept if begun(folder)[name] != kept[name]} == {"iteration-1/training"}
    metrics = "iteration-1/evaluation/metrics.json"
    assert (folder / metrics).read_text() == (finished / metrics).read_text()


def test_one_run_at_a_time(inputs, tmp_path):
    with Run(tmp_path / "run").locked(), pytest.raises(StageError, match="another run is at work in this folder"):
        run(inputs, tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["constitutions.attributes=[luck]"], "attributes: expected attributes out of size, style, got 'luck'"),
        (["constitutions.count=5"], "count: expected 1 to 4 constitutions of 2 attribute(s), got 5"),
        (["constitutions.pairs=x.json"], "constitutions: expected either principles or pairs"),
        (["task.field=post"], "queries.jsonl, line 1: missing field 'post'; there are: id, query"),
        (["task.name=chess"], "task.name: expected one of generic, tldr, hh, got 'chess'"),
        (["task.template=nowhere"], "template: expected a file or one of"),
        (["iterations.queries=9"], "iterations: expected at least 13 queries (4 held out, 1 x 9), got 12"),
        (["iterations.start=middle"], "iterations.start: expected base or previous, got 'middle'"),
        (["generation.backend=magic"], "generation.backend: expected transformers, continuous or vllm"),
        (["generation.heat=1"], "generation.heat: unknown key"),
        (["generation.top_p=0"], "generation.top_p: expected a number in (0, 1], got 0"),
        (["generation.responses=0"], "generation.responses: expected an int of at least 1, got 0"),
        (["training.output_dir=x"], "training.output_dir: expected nothing, the run sets it"),
        (["training.learn=1"], "training.learn: unknown key"),
        (["evaluation.normalize=max"], "evaluation.normalize: expected mean or sum"),
        (["model.adapter=x"], "model.adapter: expected None, a run starts from a whole model"),
        (["seed=x"], "seed: expected an int, got 'x'"),
        (["output="], "output: expected a folder, got None"),
        (["judge={}"], "judge: expected either model or endpoint, got None, None"),
        (["judge.model=a", "judge.endpoint.model=b"], "judge: expected either model or endpoint, got 'a', "),
        (["judge.model=bundled", "judge.max_pairs=0"], "judge.max_pairs: expected an int of at least 1 or None, got 0"),
        (["judge.model=bundled", "judge.dtype=int4"], "judge.dtype: expected one of auto, float32"),
        (["judge.model=nowhere-at-all"], "judge.model: expected a causal LM, got 'nowhere-at-all'"),
        (["judge.endpoint={modle: x}"], "judge.endpoint.modle: unknown key, did you mean 'model'?"),
        (["judge.endpoint={base_url: 'http://x/v1'}"], "model: expected the name of a model, got ''"),
        (
            ["judge.endpoint={model: m, base_url: 'http://x/v1'}", "judge.template=nowhere"],
            "template: expected a file or",
        ),
        (["trainign.x=1"], "trainign: unknown key, did you mean 'training'?"),
        (["task.stop='###'"], "task.stop: expected a list of texts, got '###'"),
        (["task.limit=some"], "task.limit: expected an int of at least 1 or None, got 'some'"),
        (["task.load_options=train"], "task.load_options: expected a section of keys, got 'train'"),
        (["constitutions.count=few"], "constitutions.count: expected an int of at least 2, got 'few'"),
        (["generation.markers='###'"], "generation.markers: expected a list of texts, got '###'"),
        (["generation.temperature=hot"], "generation.temperature: expected a number of at least 0, got 'hot'"),
        (["generation.temperature=.inf"], "generation.temperature: expected a number of at least 0, got inf"),
        (["generation.trim=later"], "generation.trim: expected true or false, got 'later'"),
        (["generation.vllm=fast"], "generation.vllm: expected a section of keys, got 'fast'"),
        (["evaluation.max_tokens=many"], "evaluation.max_tokens: expected an int of at least 1, got 'many'"),
        (["evaluation.queries=0"], "evaluation.queries: expected an int of at least 1 or None, got 0"),
        (
            ["judge.endpoint={model: m, base_url: 'http://x', timeout: soon}"],
            "timeout: expected more than 0 seconds",
        ),
    ],
)
def test_bad_settings_are_named(overrides, message, inputs, tmp_path, capsys):
    assert main(["run", str(inputs / "config.yaml"), f"output={tmp_path / 'run'}", *overrides]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run/iteration-0").exists()


def test_nothing_left_by_the_filters_is_said_and_mended_by_a_setting(inputs, finished, tmp_path, capsys, monkeypatch):
    folder, common = tmp_path / "run", ["training.save_strategy='no'", "generation.responses=2"]
    message = (
        rf"^{folder}/iteration-0/responses: no group is left of 4 queries: a group needs responses under two "
        r"constitutions; responses: 16 leftover, 0 trimmed, 0 unfinished, 0 empty, 0 identical, 0 kept. "
        r"Change generation.markers, task.stop or task.generation_template, and run again: what is complete is kept$"
    )
    with pytest.raises(NoGroupsError, match=message):
        run(inputs, folder, f"generation.markers={json.dumps(WORDS)}", *common)
    arguments = ["run", str(inputs / "config.yaml"), f"output={folder}", f"generation.markers={json.dumps(WORDS)}"]
    assert main([*arguments, *common]) == 1
    assert "no group is left of 4 queries" in capsys.readouterr().err and issubclass(NoGroupsError, StageError)
    before = begun(folder)
    assert read_manifest(folder / "iteration-0/responses")["status"] == "running"
    run(inputs, folder, *common)
    assert [name for name in before if begun(folder)[name] != before[name]] == ["iteration-0/responses"]
    assert read_manifest(folder / "iteration-1/evaluation")["status"] == "complete"


def test_a_model_too_short_for_every_query_is_said(inputs, tmp_path):
    message = (
        r"no group is left of 4 queries \(4 too long for the model\): .* Change generation.max_new_tokens, or a model"
    )
    with pytest.raises(NoGroupsError, match=message):
        run(inputs, tmp_path / "run", "generation.max_new_tokens=90")
    run(inputs, tmp_path / "run", "training.save_strategy='no'")


def test_what_takes_every_response_is_named_with_its_remedy():
    counts = {"leftover": 0, "trimmed": 3, "unfinished": 5, "empty": 0, "identical": 2, "kept": 1}
    said = str(NoGroupsError("here", 9, 1, counts))
    assert said.startswith("here: no group is left of 9 queries (1 too long for the model): ")
    parts = ["more positions", "drop_unfinished", "temperature", "responses, so that more constitutions keep one"]
    assert [said.index(part) for part in parts] == sorted(said.index(part) for part in parts)
    assert (
        "3 trimmed, 5 unfinished" in said
        and "generation.markers" not in said
        and "too long" not in str(NoGroupsError("here", 9, 0, counts))
    )


def test_command_line(inputs, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert "manifest.json" in capsys.readouterr().out
    arguments = ["run", str(inputs / "config.yaml"), f"output={tmp_path / 'run'}", "training.save_strategy='no'"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip().endswith(str(tmp_path / "run"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments) == 1
    assert "expected one process, got WORLD_SIZE=2" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "none.yaml")]) == 1
