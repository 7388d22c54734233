"""Data files in, examples out: queries with their constitutions and responses, as text, checked row by row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sami_fast.prefix_tree import Group

_REQUIRED = ("query", "constitutions", "responses")
_OPTIONAL = ("id", "positives", "mask")
_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json"}


@dataclass(frozen=True)
class Example:
    """One query with the constitutions and responses of its group, as text.

    Args:
        id: name in logs and error messages.
        query: the text that every response answers.
        constitutions: C texts.
        responses: R texts.
        positives: R ints; response k was sampled under constitution `positives[k]`. None means response k under
            constitution k, and then R must equal C.
        mask: C rows of R bools; score only the pairs that are True. None scores all.

    Raises:
        ValueError: a field of the wrong type, length or range, a blank text, a constitution without a response.
    """

    id: str
    query: str
    constitutions: list[str]
    responses: list[str]
    positives: list[int] | None = None
    mask: list[list[bool]] | None = None

    def __post_init__(self) -> None:
        _check_text("id", self.id)
        _check_text("query", self.query)
        for name in ("constitutions", "responses"):
            _check_list(name, getattr(self, name), str)
            for index, text in enumerate(getattr(self, name)):
                _check_text(f"{name}[{index}]", text)
        if self.positives is not None:
            _check_list("positives", self.positives, int)
        if self.mask is not None:
            _check_list("mask", self.mask, list)
            for j, row in enumerate(self.mask):
                _check_list(f"mask[{j}]", row, bool)
                if len(row) != len(self.responses):
                    raise ValueError(f"mask[{j}]: expected {len(self.responses)} bools, one a response, got {len(row)}")
        # A group of one-token texts checks counts and ranges, so that its rules stand in one place.
        Group([[0]] * len(self.constitutions), [[0]] * len(self.responses), self.positives, self.mask, self.id)


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _check_list(name: str, value: Any, item: type) -> None:
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list of {item.__name__}, got {_kind(value)}")
    if not value:
        raise ValueError(f"{name}: expected at least one entry, got an empty list")
    for index, entry in enumerate(value):
        if type(entry) is not item:
            raise ValueError(f"{name}[{index}]: expected {item.__name__}, got {_kind(entry)}")


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected str, got {_kind(value)}")
    if not value.strip():
        raise ValueError(f"{name}: expected text, got {'only white space' if value else 'an empty string'}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half an emoji, left by cutting a text: tokenizers refuse it without a name
        raise ValueError(f"{name}: not valid Unicode at character {error.start}: {value[error.start]!r}") from None


def load_examples(
    source: Any,
    *,
    split: str | None = None,
    limit: int | None = None,
    fields: Mapping[str, str] | None = None,
    load_options: Mapping[str, Any] | None = None,
) -> list[Example]:
    """Read and check examples.

    Fields read: `query` (text), `constitutions` and `responses` (lists of text), and if there `positives`, `mask` (see
    `Example`) and `id` (text or integer; by default the place, such as `line-3`). Other fields are ignored.

    Args:
        source: path of a JSON Lines file (`.jsonl` or `.json`; a `.json` array too), of a parquet, arrow, CSV or TSV
            file (list columns as JSON text), or of a folder written by `save_to_disk`; whatever else
            `datasets.load_dataset` takes (a name on the hub, a folder of files); or a `datasets` object.
        split: which split of a source that has several.
        limit: read only the first `limit` examples.
        fields: column names where they differ from ours, `{"query": "prompt"}`.
        load_options: further arguments of `datasets.load_dataset`, `{"name": "comparisons"}`.

    Raises:
        ValueError: names the file, the line or row, the field, what was expected and what came.
        FileNotFoundError: no such file.
    """
    fields = dict(fields or {})
    if unknown := sorted(set(fields) - {*_REQUIRED, *_OPTIONAL}):
        raise ValueError(f"fields: expected keys among {', '.join(_REQUIRED + _OPTIONAL)}, got {', '.join(unknown)}")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"limit: expected a positive int or None, got {limit!r}")
    label = str(source) if isinstance(source, str | Path) else type(source).__name__
    rows = iter_rows(source, split=split, load_options=load_options)
    examples: list[Example] = []
    places: dict[str, str] = {}
    for place, row in rows:
        try:
            example = _example(row, place, fields)
            if first := places.get(example.id):
                raise ValueError(f"id: expected a new one, got {example.id!r}, which {first} has too")
        except ValueError as error:
            raise ValueError(f"{label}, {place}: {error}") from None
        places[example.id] = place
        examples.append(example)
        if len(examples) == limit:
            break
    if not examples:
        raise ValueError(f"{label}: expected at least one example, got none")
    return examples


def iter_rows(
    source: Any, *, split: str | None = None, load_options: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, Any]]:
    """(place, row) of every row of a source, see `load_examples`; a place is such as `line 3`.

    Raises:
        ValueError: a line that is no JSON, named; a split that the source does not have.
        FileNotFoundError: no such file.
    """
    if isinstance(source, str | Path) and Path(source).suffix in (".jsonl", ".json"):
        if split is not None or load_options:
            raise ValueError(f"split, load_options: expected neither with a JSON file, got {split!r}, {load_options!r}")
        return _json_rows(Path(source))
    return _dataset_rows(source, split, dict(load_options or {}))


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    def parse(text: bytes, line: int) -> Any:
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            place = f"line {line + error.lineno - 1}, column {error.colno}"
            raise ValueError(f"{path}, {place}: not valid JSON: {error.msg}") from None
        except UnicodeDecodeError as error:
            place = f"line {line + error.object[: error.start].count(10)}"
            raise ValueError(f"{path}, {place}: not UTF-8: byte 0x{error.object[error.start]:02x}") from None

    with path.open("rb") as file:
        if path.suffix == ".json" and file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            file.seek(0)
            for number, row in enumerate(parse(file.read(), 1), 1):
                yield f"item {number}", row
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", parse(line.rstrip(), number)


def _dataset_rows(source: Any, split: str | None, options: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    import datasets  # seconds to import, and not needed for JSON Lines

    if not isinstance(source, str | Path):
        loaded = source
        kinds = (datasets.Dataset, datasets.IterableDataset, datasets.DatasetDict, datasets.IterableDatasetDict)
        if not isinstance(loaded, kinds):
            raise ValueError(f"source: expected a path, a data set's name or a datasets object, got {_kind(source)}")
    elif (path := Path(source)).is_file():
        suffix = next((s for s in reversed(path.suffixes) if s in _BUILDERS), None)  # data.csv.gz is a CSV file
        if suffix is None:
            raise ValueError(f"source: expected a file ending in {', '.join(_BUILDERS)}, got {path}")
        if _BUILDERS[suffix] == "csv":  # an answer 'None' or 'NA' is text, no missing value
            options = {"keep_default_na": False, "sep": "\t" if suffix == ".tsv" else ","} | options
        loaded = datasets.load_dataset(_BUILDERS[suffix], data_files=str(path), **options)
    elif any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        loaded = datasets.load_from_disk(str(path), **options)
    elif path.suffix in _BUILDERS:
        raise FileNotFoundError(f"source: no such file: {path}")
    else:
        loaded = datasets.load_dataset(str(source), split=split, **options)
        split = None
    if isinstance(loaded, dict):
        name = next(iter(loaded)) if split is None and len(loaded) == 1 else split
        if name not in loaded:
            raise ValueError(f"split: expected one of {', '.join(loaded)}, got {split!r}")
        loaded = loaded[name]
    elif split is not None:
        raise ValueError(f"split: expected None for a data set without splits, got {split!r}")
    for number, row in enumerate(loaded.with_format(None), 1):
        yield f"row {number}", row


def _example(row: Any, place: str, fields: Mapping[str, str]) -> Example:
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object with fields, got {_kind(row)}")
    values = {}
    for name in _REQUIRED + _OPTIONAL:
        column = fields.get(name, name)
        if column not in row and (name in _REQUIRED or name in fields):
            for_field = "" if column == name else f" (for {name!r})"
            raise ValueError(f"missing field {column!r}{for_field}; there are: {', '.join(map(str, row)) or 'none'}")
        value = row.get(column)
        if isinstance(value, str) and name not in ("id", "query"):
            try:
                value = json.loads(value) if value or name in _REQUIRED else None
            except ValueError:
                raise ValueError(f"{name}: expected a list or its JSON text, got {value[:40]!r}") from None
        values[name] = value
    if values["id"] is None or values["id"] == "":
        values["id"] = place.replace(" ", "-")
    elif type(values["id"]) not in (str, int):
        raise ValueError(f"id: expected str or int, got {_kind(values['id'])}")
    values["id"] = str(values["id"])
    return Example(**values)
