"""What a run leaves for people to look at: figures, tables, JSON; every file appears whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from sami_fast.evaluation import GroupResult


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it over `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write indented JSON atomically; NaN and infinities are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: str | os.PathLike[str], rows: Sequence[Any]) -> None:
    """Write JSON Lines atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_json_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
    """Number, from 1, and value of each line that is not blank.

    Raises:
        ValueError: names the file and the line that is not JSON in UTF-8.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: not valid JSON: {error}") from None


def _figure(width: float, height: float):
    from matplotlib.figure import Figure  # a figure of its own: no global state, no display

    return Figure(figsize=(width, height), layout="constrained")


def draw_heat_maps(
    path: str | os.PathLike[str], results: Sequence[GroupResult], *, title: str = "", columns: int = 4
) -> None:
    """C x R matrices as PNG, each centred on its column means: what InfoNCE sees is the contrast within a column."""
    columns = min(columns, len(results))
    rows = -(-len(results) // columns)
    figure = _figure(2.6 * columns + 1.0, 2.5 * rows + 0.4)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    centred = [_centred(result.matrix) for result in results]
    bound = max(float(np.nanmax(np.abs(matrix))) for matrix in centred) or 1.0
    for axis, result, matrix in zip(axes, results, centred, strict=False):
        image = axis.imshow(matrix, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
        axis.set_title(f"{result.id or ''}\nMI {result.mutual_information:.2f} nats".strip(), fontsize=8)
        axis.set_xticks(range(matrix.shape[1]))
        axis.set_yticks(range(matrix.shape[0]))
        if matrix.size <= 16:
            for (j, k), value in np.ndenumerate(result.matrix):
                ink = "white" if abs(matrix[j, k]) > 0.6 * bound else "black"
                axis.text(k, j, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
    for axis in axes[len(results) :]:
        axis.axis("off")
    figure.supxlabel("response", fontsize=9)
    figure.supylabel("constitution", fontsize=9)
    figure.colorbar(image, ax=axes.tolist(), shrink=0.8, label="log-probability, column mean removed (nats)")
    if title:
        figure.suptitle(title, fontsize=11)
    write_atomically(path, lambda file: figure.savefig(file, dpi=130, format="png"))


def _centred(matrix: np.ndarray) -> np.ndarray:
    finite = np.where(np.isfinite(matrix), matrix, np.nan)
    return finite - np.nanmean(finite, axis=0, keepdims=True)


def draw_training_curve(
    path: str | os.PathLike[str],
    steps: Sequence[int],
    training: Sequence[float],
    held_out_steps: Sequence[int],
    held_out: Sequence[float],
    *,
    limit: float | None = None,
) -> None:
    """Mutual information in nats over optimiser steps as PNG; `limit` is the most there can be, log C."""
    figure = _figure(6.4, 3.8)
    axis = figure.subplots()
    axis.plot(steps, training, marker=".", alpha=0.7, label="training groups of the step")
    if held_out_steps:
        axis.plot(held_out_steps, held_out, marker="o", linewidth=2, label="held-out groups")
    if limit is not None:
        axis.axhline(limit, linestyle=":", color="grey", label=f"upper limit, {limit:.2f}")
    axis.axhline(0.0, linewidth=0.5, color="black")
    axis.set_xlabel("optimiser step")
    axis.set_ylabel("mutual information (nats)")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)  # inside it would hide what it explains
    write_atomically(path, lambda file: figure.savefig(file, dpi=130, format="png"))


def draw_iterations(
    path: str | os.PathLike[str],
    numbers: Sequence[int],
    intervals: Mapping[str, Sequence[Mapping[str, float] | None]],
    *,
    limit: float | None = None,
) -> None:
    """Mutual information of each iteration as PNG, a line for each key of `intervals`.

    Args:
        path: PNG file.
        numbers: of the iterations.
        intervals: name -> `mean`, `low` and `high` of each iteration, None where it was not measured.
        limit: the most there can be, log C.
    """
    figure = _figure(6.4, 3.8)
    axis = figure.subplots()
    for index, (name, values) in enumerate(intervals.items()):
        points = [(number, value) for number, value in zip(numbers, values, strict=True) if value is not None]
        x = [number + 0.06 * (index - (len(intervals) - 1) / 2) for number, _ in points]
        mean = np.array([value["mean"] for _, value in points])
        spread = np.abs([[value["mean"] - value["low"], value["high"] - value["mean"]] for _, value in points])
        axis.errorbar(x, mean, yerr=spread.T if points else None, marker="o", capsize=4, label=name)
    if limit is not None:
        axis.axhline(limit, linestyle=":", color="grey", label=f"upper limit, {limit:.2f}")
    axis.axhline(0.0, linewidth=0.5, color="black")
    axis.set_xticks(list(numbers))
    axis.set_xlabel("iteration")
    axis.set_ylabel("mutual information (nats)")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)  # inside it would hide what it explains
    write_atomically(path, lambda file: figure.savefig(file, dpi=130, format="png"))
