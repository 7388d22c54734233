"""One HTML file that shows a run: mutual information, matrices, win rates, lengths, samples, cost, configuration."""

from __future__ import annotations

import base64
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sami_fast.evaluation import GroupResult, mean_intervals
from sami_fast.report import draw_heat_maps, draw_iterations, draw_training_curve, read_json_lines, write_text
from sami_fast.run_results import METRIC_LABELS
from sami_fast.stages import outputs_digest, read_manifest
from sami_fast.win_rate import SHARES

TEMPLATE = Path(__file__).parent / "templates" / "run_report.html"
_SHOWN_MATRICES = 8
_SHOWN_QUERIES = 4
_MATRIX_NOTE = (
    "Mean log-probability of a token of each response (column) under each constitution (row). Red is likelier than the "
    "column's mean: a response that tells its constitution is red under its own, and blue under the others."
)


def write_run_report(folder: str | os.PathLike[str], *, output: str | os.PathLike[str] | None = None) -> Path:
    """Write the report of a run's folder and return its path.

    The file stands alone: figures are embedded, nothing is fetched, and all text of models and data is escaped. What
    the run has not written, or what cannot be read, is listed at the top.

    Args:
        folder: see `sami_fast.pipeline` for what is in it. `iteration-i/judge/win_rate.json` is what the run's judge
            said; `iteration-i/evaluation/win_rate.json`, where there is one, is what `sami-fast evaluate` wrote for the
            responses of that iteration against those of iteration 0. Of both, the table over iterations has the former.
        output: where to write; `report/report.html` in the folder when None.

    Raises:
        ValueError: the folder has no iteration.
    """
    folder = Path(folder)
    names = sorted((path.name for path in folder.glob("iteration-*") if _number(path.name) is not None), key=_number)
    if not names:
        raise ValueError(f"folder: expected a run with iteration-0 and so on, got {folder}")
    files = _Files(folder)
    config = files.read("config.yaml", lambda path: path.read_text(encoding="utf-8"))
    runs = [_Iteration(name, files) for name in names]
    base = runs[0] if runs[0].number == 0 else None
    if base is None:
        files.missing.append("iteration-0: the model as it came, which the others are compared with")
    settings = _settings(config)
    sections = [_overview(runs, settings)]
    for i, run in enumerate(runs):
        start = runs[i - 1] if settings.get("start") == "previous" and i > 0 else base
        sections.append(_section(run, base, start))
    sections.append(_stages(folder))
    if config is not None:
        sections.append({"title": "Configuration", "blocks": [{"kind": "text", "heading": "", "text": config}]})
    html = _render(f"SAMI run: {folder.resolve().name}", sections, files.missing)
    path = folder / "report" / "report.html" if output is None else Path(output)
    write_text(path, html)
    return path


def _number(name: str) -> int | None:
    number = name.removeprefix("iteration-")
    return int(number) if number.isdigit() else None


def _settings(config: str | None) -> dict[str, Any]:
    """What the overview says of a run's configuration, where it can be read."""
    try:
        values = yaml.safe_load(config or "") or {}
        loop = values.get("iterations") or {}
        named = {"model": (values.get("model") or {}).get("name"), "task": (values.get("task") or {}).get("name")}
        return named | {"count": loop.get("count"), "start": loop.get("start")}
    except (yaml.YAMLError, AttributeError):
        return {}


class _Files:
    """Reads files of a run and remembers which were not there or not readable."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.missing: list[str] = []

    def read(self, name: str, parse: Callable[[Path], Any], hint: str = "") -> Any:
        path = self.folder / name
        if not path.is_file():
            self.missing.append(name + hint)
            return None
        try:
            return parse(path)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            self.missing.append(f"{name}: cannot be read: {type(error).__name__}: {error}")
            return None

    def json(self, name: str, parse: Callable[[Any], Any], hint: str = "") -> Any:
        return self.read(name, lambda path: parse(json.loads(path.read_text(encoding="utf-8"))), hint)


class _Iteration:
    """All that one iteration left, None where it left nothing."""

    def __init__(self, name: str, files: _Files) -> None:
        self.number = _number(name)
        self.metrics = files.json(f"{name}/evaluation/metrics.json", _metrics) or {}
        self.scores = files.read(f"{name}/evaluation/scores.jsonl", _scores)
        self.responses = files.read(f"{name}/evaluation/responses.jsonl", _responses) or {}
        self.sampled = files.json(f"{name}/responses/manifest.json", lambda value: dict(value.get("results", {}))) or {}
        self.log, self.win_rates = None, []
        if self.number > 0:
            self.log = files.json(f"{name}/training/log.json", lambda rows: [row for row in rows if "step" in row])
            self.win_rates = _win_rates(name, files)

    @property
    def limit(self) -> float | None:
        """log C where every group has the same C."""
        counts = {len(result.matrix) for result in self.scores or ()}
        return math.log(counts.pop()) if len(counts) == 1 else None

    def characters(self) -> dict[str, float] | None:
        """Mean length of the responses to held-out queries, resampled by query."""
        lengths: dict[str, list[int]] = {}
        for row in self.responses.values():
            lengths.setdefault(row["id"], []).append(len(row["response"]))
        return mean_intervals([[sum(own) / len(own)] for own in lengths.values()])[0] if lengths else None


def _interval(value: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value[name]) for name in ("mean", "low", "high")}


def _metrics(value: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    return {
        part: {name: _interval(entry) for name, entry in value[part].items() if name in METRIC_LABELS}
        for part in ("held_out", "change", "own")
        if value.get(part) is not None
    }


def _scores(path: Path) -> list[GroupResult]:
    return [GroupResult.from_json(row) for _, row in read_json_lines(path)]


def _responses(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    names = ("id", "query", "constitution", "response")
    rows = ({name: str(row[name]) for name in names} for _, row in read_json_lines(path))
    return {(row["id"], row["constitution"]): row for row in rows}


def _win_rates(name: str, files: _Files) -> list[dict[str, Any]]:
    """What the run's judge said, and what a person had a judge say, of responses that are still there."""
    found = []
    own, asked = f"{name}/judge/win_rate.json", f"{name}/evaluation/win_rate.json"
    if (files.folder / own).exists():
        if files.read(f"{name}/judge/manifest.json", _is_about_older_responses):
            files.missing.append(f"{own}: is about responses that the run has made anew since")
        else:
            found.append(files.json(own, _win_rate))
    if (files.folder / asked).exists() or not (files.folder / own).exists():
        hint = " (no judge was asked; a section judge in a run's configuration does, and sami-fast evaluate)"
        found.append(files.json(asked, _win_rate, hint))
    return [win_rate for win_rate in found if win_rate is not None]


def _is_about_older_responses(path: Path) -> bool:
    """Left by a run that had a judge, when a later one in the same folder had none."""
    evaluation = read_manifest(path.parent.with_name("evaluation"))
    now = evaluation and "outputs" in evaluation and outputs_digest(evaluation, "responses.jsonl")
    return read_manifest(path.parent)["inputs"]["responses"] != now


def _win_rate(value: Mapping[str, Any]) -> dict[str, Any]:
    shares = {name: None if value.get(name) is None else _interval(value[name]) for name in SHARES}
    counts = {name: int(value[name]) for name in ("pairs", "wins", "losses", "ties", "identical", "unreadable")}
    return {"shares": shares, "counts": counts, "judge": str(value["judge"]["judge"])}


def _summary(runs: Sequence[_Iteration], settings: Mapping[str, Any]) -> list[dict]:
    """What was run and what came of it, in a sentence each."""
    texts = []
    if settings.get("model"):
        words = [f"Model {settings['model']}"]
        words += [f"task {settings['task']}"] * bool(settings.get("task"))
        words += [f"{settings['count']} iteration(s)"] * bool(settings.get("count"))
        if settings.get("start"):
            words.append(f"each trained from the {'model before' if settings['start'] == 'previous' else 'base model'}")
        texts.append(", ".join(words) + ".")
    first = runs[0].metrics.get("held_out", {}).get("mutual_information") if runs[0].number == 0 else None
    last = next((run for run in reversed(runs) if run.number and "change" in run.metrics), None)
    change = last and last.metrics["change"].get("mutual_information")
    after = last and last.metrics.get("held_out", {}).get("mutual_information")
    if first and after and change:
        texts.append(
            f"Held-out mutual information: {first['mean']:.3f} nats before training, {after['mean']:.3f} after "
            f"iteration {last.number}; a change of {change['mean']:+.3f} "
            f"({change['low']:+.3f} to {change['high']:+.3f})."
        )
    return [{"kind": "paragraph", "heading": "", "text": text} for text in texts]


def _overview(runs: Sequence[_Iteration], settings: Mapping[str, Any]) -> dict:
    blocks, rows = _summary(runs, settings), []
    measured = {
        label: [run.metrics.get(part, {}).get("mutual_information") for run in runs]
        for part, label in (("held_out", "held-out groups of the base model"), ("own", "the model's own responses"))
    }
    measured = {label: values for label, values in measured.items() if any(values)}
    if measured:
        limits = {run.limit for run in runs if run.limit is not None}
        limit = limits.pop() if len(limits) == 1 else None
        numbers = [run.number for run in runs]
        blocks.append(_image("Mutual information", lambda path: draw_iterations(path, numbers, measured, limit=limit)))
    for run in runs:
        held_out, own = (run.metrics.get(part, {}) for part in ("held_out", "own"))
        names = ("mutual_information", "row_accuracy", "column_accuracy")
        shares = run.win_rates[0]["shares"] if run.win_rates else {}
        cells = [held_out.get(name) for name in names]
        wins = [shares.get(name) for name in ("win_rate", "length_controlled")]
        rows.append([run.number, *cells, own.get("mutual_information"), *wins, run.characters()])
    headings = ("iteration", "MI", "row accuracy", "column accuracy", "MI of its own responses", "win rate")
    blocks.append(_table("", [*headings, "win rate at equal lengths", "characters of a response"], rows))
    return {"title": "Over iterations", "blocks": blocks}


def _section(run: _Iteration, base: _Iteration | None, start: _Iteration | None) -> dict:
    """All about an iteration; `base` is what it is compared with, `start` what its training began from."""
    blocks = []
    if run.metrics:
        before = base.metrics.get("held_out", {}) if base is not None and run is not base else None
        columns = {} if before is None else {"before": before}
        columns |= {"after" if columns else "held-out": run.metrics.get("held_out", {})}
        columns |= {part: run.metrics[part] for part in ("change", "own") if part in run.metrics}
        rows = [
            [label, *(column.get(name) for column in columns.values())]
            for name, label in METRIC_LABELS.items()
            if any(name in column for column in columns.values())
        ]
        note = "own: the model's own responses to held-out queries." if "own" in columns else ""
        blocks.append(_table("Held-out groups", ["", *columns], rows, note=note))
    if run.log is not None:
        blocks += _training_blocks(run, start)
    if run.scores:
        shown = run.scores[:_SHOWN_MATRICES]
        heading = f"Matrices of held-out groups, {len(shown)} of {len(run.scores)}"
        blocks.append(_image(heading, lambda path: draw_heat_maps(path, shown), note=_MATRIX_NOTE))
    for win_rate in run.win_rates:
        rows = [[SHARES[name], share] for name, share in win_rate["shares"].items() if share is not None]
        counts = ", ".join(f"{count} {name}" for name, count in win_rate["counts"].items())
        agreeing = win_rate["shares"]["consistency"]
        if agreeing is not None and agreeing["mean"] < 0.5:
            counts += ". In most pairs the judge changed its mind with the order: it says little about the responses"
        heading = f"Win rate over the responses of iteration 0, by {win_rate['judge']}"
        blocks.append(_table(heading, ["", ""], rows, note=counts))
    if base is not None and run is not base and run.responses and base.responses:
        blocks.append(_samples(base.responses, run.responses))
    if run.sampled:
        rows = [[name, count] for name, count in run.sampled.items() if not isinstance(count, Mapping)]
        rows += [[f"filter: {name}", count] for name, count in run.sampled.get("filters", {}).items()]
        blocks.append(_table("Responses that were sampled to train on" if run.number else "Responses", ["", ""], rows))
    title = f"Iteration {run.number}" if run.number else "Iteration 0: the model as it came"
    return {"title": title, "blocks": blocks}


def _samples(before: Mapping[tuple, Mapping], after: Mapping[tuple, Mapping]) -> dict:
    shared = [key for key in before if key in after]
    ids = list(dict.fromkeys(id for id, _ in shared))
    shown = [
        {**before[key], "before": before[key]["response"], "after": after[key]["response"]}
        for key in shared
        if key[0] in ids[:_SHOWN_QUERIES]
    ]
    heading = f"Responses to held-out queries, {min(len(ids), _SHOWN_QUERIES)} of {len(ids)}"
    return {"kind": "samples", "heading": heading, "samples": shown}


def _training_blocks(run: _Iteration, start: _Iteration | None) -> list[dict]:
    blocks = []
    curves = [_curve(run.log, name) for name in ("mutual_information", "eval_mutual_information")]
    if any(steps for steps, _ in curves):
        (steps, training), (held_out_steps, held_out) = curves
        ends = [part.metrics.get("held_out", {}).get("mutual_information") for part in (start, run) if part is not None]
        if not held_out_steps and len(ends) == 2 and all(ends):  # not evaluated while it trained
            held_out_steps, held_out = [0, max(steps)], [end["mean"] for end in ends]
        points = (steps, training, held_out_steps, held_out)
        blocks.append(_image("Training", lambda path: draw_training_curve(path, *points, limit=run.limit)))
    if any("token_ratio" in row for row in run.log):
        blocks.append(_cost_block(run.log))
    return blocks


def _curve(log: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    rows = [row for row in log if name in row]
    return [row["step"] for row in rows], [row[name] for row in rows]


def _cost_block(log: Sequence[Mapping[str, Any]]) -> dict:
    """From `token_ratio` = whole / encoded, `tokens_saved` = whole - encoded, `tokens_per_second` = whole / time."""
    steps = [row for row in log if "tokens_saved" in row and row["token_ratio"] > 1]
    saved = [row["tokens_saved"] for row in steps]
    encoded = [row["tokens_saved"] / (row["token_ratio"] - 1) for row in steps]
    seconds = [(a + b) / row["tokens_per_second"] for a, b, row in zip(saved, encoded, steps, strict=True)]
    more = sum(time * a / b for time, a, b in zip(seconds, saved, encoded, strict=True))
    rows = [
        ["tokens in whole sequences", f"{round(sum(encoded) + sum(saved)):,}"],
        ["tokens encoded in prefix trees", f"{round(sum(encoded)):,}"],
        ["tokens saved", f"{round(sum(saved)):,}"],
        ["time in training steps", f"{sum(seconds):,.1f} s"],
        ["time saved, estimated", f"{more:,.1f} s"],
    ]
    note = "The estimate takes every token to cost the same; whole sequences were not run."
    return _table("Cost of training", ["", ""], rows, note=note)


def _stages(folder: Path) -> dict:
    rows = []
    for path in sorted(folder.glob("*/manifest.json")) + sorted(folder.glob("iteration-*/*/manifest.json")):
        name = str(path.parent.relative_to(folder))
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            seconds = manifest.get("seconds")
            rows.append([name, str(manifest.get("status")), None if seconds is None else f"{seconds:,.1f} s"])
        except (ValueError, TypeError, AttributeError, OSError):
            rows.append([name, "its manifest cannot be read", None])
    return {"title": "Stages", "blocks": [_table("", ["stage", "status", "took"], rows)]}


def _table(heading: str, headings: Sequence[str], rows: Sequence[Sequence[Any]], *, note: str = "") -> dict:
    """Cells are text, numbers, None or intervals."""
    return {"kind": "table", "heading": heading, "headings": headings, "rows": rows, "note": note}


def _image(heading: str, draw: Callable[[Path], None], *, note: str = "") -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "figure.png"
        draw(path)
        data = base64.b64encode(path.read_bytes()).decode()
    return {"kind": "image", "heading": heading, "data": data, "note": note}


def _render(title: str, sections: Sequence[dict], missing: Sequence[str]) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.globals["number"] = lambda value: f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, sections=sections, missing=missing)
