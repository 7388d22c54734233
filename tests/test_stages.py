"""Stages and their logs by themselves."""

import errno
import os
import resource

import pytest

from sami_fast.stages import JsonLinesLog, Run


def test_a_log_survives_a_full_disk_and_torn_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    JsonLinesLog(path).append([{"n": 1}])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        log = JsonLinesLog(path)
        with pytest.raises(OSError) as error:
            for n in range(2, 50):
                log.append([{"n": n}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG and path.stat().st_size == 100, "a torn line"
    again = JsonLinesLog(path)
    assert again.rows == [{"n": n} for n in range(1, len(log.rows) + 1)] and path.read_bytes().endswith(b"}\n")
    again.append([{"n": "é\n"}])
    assert JsonLinesLog(path).rows[-1] == {"n": "é\n"}
    path.write_text('{"n": 1}\nnonsense\n{"n": 2}\n')
    with pytest.raises(ValueError, match=r"log.jsonl, line 2: expected JSON"):
        JsonLinesLog(path)


def test_folders_of_others_are_left_alone(tmp_path):
    (tmp_path / "run/stage").mkdir(parents=True)
    (tmp_path / "run/stage/thesis.txt").write_text("mine")
    stage = Run(tmp_path / "run").stage
    with pytest.raises(ValueError, match=r"stage: expected a stage's folder or nothing there, got thesis.txt"):
        stage("stage", {}, lambda folder: None)
    assert (tmp_path / "run/stage/thesis.txt").read_text() == "mine"
    stage("good", {"a": 1}, lambda folder: (folder / "x").write_text("1") and None)
    (tmp_path / "run/good/manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"good/manifest.json: expected the manifest of a stage"):
        stage("good", {"a": 1}, lambda folder: None)


def test_other_errors_of_a_stage_pass_through(tmp_path):
    def fail(error):
        def work(folder):
            raise error

        return work

    for error in (RuntimeError("no such thing"), OSError(errno.ENOENT, "gone"), ValueError("x")):
        with pytest.raises(type(error)) as raised:
            Run(tmp_path / "run").stage("s", {}, fail(error))
        assert raised.value is error


def test_a_log_to_keep_outlives_a_change_and_a_kill_in_it(tmp_path, monkeypatch):
    folder, replace = tmp_path / "run/s", os.replace

    def stage(value):
        def work(folder):
            log = JsonLinesLog(folder / "log.jsonl")
            log.append([{"value": value}])
            (folder / "other.txt").write_text(str(value))
            return {"rows": len(log.rows)}

        return Run(tmp_path / "run").stage("s", {"value": value}, work, keep=("log.jsonl",))["results"]["rows"]

    assert [stage(1), stage(1), stage(2)] == [1, 1, 2]

    def killed(*_, **__):
        raise KeyboardInterrupt

    def not_the_log(source, target):
        return killed() if str(source).endswith("log.jsonl") else replace(source, target)

    for value, (name, stopped) in enumerate((("os.replace", not_the_log), ("shutil.rmtree", killed)), 3):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"sami_fast.stages.{name}", stopped)  # before and after the log is taken over
            stage(value)
        assert not (folder / "manifest.json").exists() and not (folder / "other.txt").exists()
    assert stage(9) == 3
    assert sorted(path.name for path in folder.iterdir()) == ["log.jsonl", "manifest.json", "other.txt"]
    assert not list((tmp_path / "run").glob(".s*"))
    (folder / "other.txt").write_text("damaged")
    (folder / "log.jsonl").write_text("damaged too")
    assert stage(9) == 1, "what is damaged is not kept"
