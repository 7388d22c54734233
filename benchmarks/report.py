"""A record as a table for people, in the terminal or as Markdown, and as a plot."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from benchmarks.suite import GB, PASSES

_NOT_HERE = ("not installed", "unsupported")


def table(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row for each arm on each case and pass."""
    results = record["results"]
    facts = list(dict.fromkeys(name for result in results for name in result["facts"]))
    headings = ["case", "pass", "arm", "time", "rate", "of ceiling", "× ours", "memory", "error", *facts]
    rows = []
    for result in results:
        arm = f"**{result['arm']}**" if result["ours"] else result["arm"]
        row = [result["case"], result["pass"], arm, *_figures(record, result)]
        rows.append(row + [_fact(result["facts"].get(name)) for name in facts])
    return headings, rows


def _figures(record: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    memory = "" if result["memory"] is None else f"{result['memory']['peak'] / GB:.1f} GB"
    errors = result.get("errors")
    error = "" if not errors else max((_number(e["relative"]) for e in errors.values()), key=float)
    if result["outcome"] != "ok":
        return [outcome(record, result), "", "", "", memory, error]
    ratio = result["times_ours"]
    return [
        _seconds(result["seconds"][record["statistic"]]),
        f"{_si(result['flops_per_second'])}FLOP/s"
        if result["ceiling"] == "gemm"
        else f"{_si(result['bytes_per_second'])}B/s",
        f"{100 * result['share_of_ceiling']:.0f} % {result['ceiling']}",
        "" if ratio is None else f"{ratio:.2f}",
        memory,
        error,
    ]


def outcome(record: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """What became of an arm that has no time."""
    limit = record["settings"]["memory_limit"]
    if result["outcome"] == "out of memory" and record["settings"]["device"] == "cpu" and limit is not None:
        return f"out of memory at {limit / GB:.0f} GB"
    return result["outcome"]


def _number(value: float | None) -> str:
    return "inf" if value is None else f"{value:.0e}"


def _seconds(value: float) -> str:
    unit, scale = next((unit, scale) for unit, scale in (("s", 1), ("ms", 1e3), ("µs", 1e6)) if value * scale >= 1)
    return f"{value * scale:.3g} {unit}"


def _si(value: float) -> str:
    prefix, scale = next((p, s) for p, s in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("", 1)) if value >= s or s == 1)
    return f"{value / scale:.3g} {prefix}"


def _fact(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def caption(record: Mapping[str, Any]) -> str:
    """Where and with what the figures were taken, and what they are held against."""
    where, settings = record["environment"], record["settings"]
    device = f"{where['device']}, {where['threads']} threads" if settings["device"] == "cpu" else where["device"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    ceilings = "; ".join(
        f"{dtype} matrix product {_si(c['flops_per_second'])}FLOP/s, copy {_si(c['bytes_per_second'])}B/s"
        for dtype, c in record["ceilings"].items()
    )
    commit = f"commit {where['commit']}{' with changes' if where['uncommitted_changes'] else ''}"
    others = max((result.get("other_cores", 0.0) for result in record["results"]), default=0.0)
    if settings["device"] == "cpu" and others > 0.2:
        device += f" (beside other work: up to {others:.1f} cores' time)"
    return (
        f"{record['title']}. {device}; {versions}; {commit}, {where['date']}. "
        f"Times are the {record['statistic']} of the runs. Ceilings measured in the same run: {ceilings}."
    )


def markdown(record: Mapping[str, Any]) -> str:
    """The table, without the arms that cannot run here and without empty columns, and its caption."""
    results = record["results"]
    run = {result["case"] for result in results if result["outcome"] != "over budget"}
    shown = [r for r in results if r["case"] in run and r["outcome"] not in _NOT_HERE]
    headings, rows = table(dict(record) | {"results": shown})
    columns = [index for index in range(len(headings)) if any(row[index] for row in rows)]
    lines = [[line[index] for index in columns] for line in (headings, ["---"] * len(headings), *rows)]
    notes = [caption(record)]
    if left_out := [case for case in dict.fromkeys(r["case"] for r in results) if case not in run]:
        notes.append(f"Not run within the time budget: {', '.join(left_out)}.")
    for reason in _NOT_HERE:
        absent = dict.fromkeys(r["arm"] for r in results if r["outcome"] == reason)
        if absent := [arm for arm in absent if all(r["arm"] != arm for r in shown)]:
            notes.append(f"{reason.capitalize()} here: {', '.join(absent)}.")
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{' '.join(notes)}"


def print_table(record: Mapping[str, Any]) -> None:
    """The same in the terminal."""
    from rich.console import Console
    from rich.table import Table

    headings, rows = table(record)
    view = Table(title=record["title"], caption=caption(record))
    for heading in headings:
        view.add_column(heading, justify="left" if heading in ("case", "pass", "arm") else "right")
    for index, row in enumerate(rows):
        last = index + 1 == len(rows) or rows[index + 1][:2] != row[:2]
        view.add_row(*(cell.replace("**", "") for cell in row), end_section=last)
    console = Console()
    Console(width=None if console.is_terminal else 180).print(view)


def plot(record: Mapping[str, Any]) -> bytes:
    """PNG: bars of time for every case and arm, a panel for each pass; an arm without a time says why."""
    from matplotlib.figure import Figure

    results = record["results"]
    arms, cases = (list(dict.fromkeys(result[key] for result in results)) for key in ("arm", "case"))
    figure = Figure(figsize=(10, 1.5 + 0.35 * len(arms) * len(cases)), layout="constrained")
    for axes, pass_name in zip(figure.subplots(1, len(PASSES), sharey=True), PASSES, strict=True):
        for result in (r for r in results if r["pass"] == pass_name):
            at = cases.index(result["case"]) + 0.8 * (arms.index(result["arm"]) + 0.5) / len(arms) - 0.4
            seconds = result["seconds"][record["statistic"]] if result["outcome"] == "ok" else 0
            bar = axes.barh(at, seconds, height=0.75 / len(arms), color=f"C{arms.index(result['arm'])}")
            axes.bar_label(bar, [f" {_seconds(seconds) if seconds else outcome(record, result)}"], fontsize=8)
        axes.set(title=pass_name, xlabel="seconds")
        axes.set_yticks(range(len(cases)), cases)
        axes.margins(x=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    handles = [figure.axes[0].barh([0], [0], color=f"C{index}") for index in range(len(arms))]
    figure.legend(handles, arms, loc="outside lower center", ncols=len(arms), frameon=False)
    figure.suptitle(f"{record['title']} ({record['environment']['device']})")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()
