"""Files in, examples out: every layout that is read, and every way bad data is refused by its line and field."""

import gzip
import json
from pathlib import Path

import datasets
import pytest

from sami_fast.examples import Example, load_examples

ROW = {"id": "a", "query": "Why?", "constitutions": ["brief", "long"], "responses": ["Because.", "Well, because."]}


def write(path: Path, *rows: dict | str) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_json_lines_fields_defaults_and_limit(tmp_path):
    more = ROW | {"id": 7, "responses": ["1", "2", "3"], "positives": [0, 1, 1], "mask": [[True] * 3, [False] * 3]}
    anonymous = {key: value for key, value in ROW.items() if key != "id"} | {"other": 1, "positives": None}
    path = write(tmp_path / "data.jsonl", ROW, "", more, anonymous)
    first, second, third = load_examples(path)
    assert first == Example(**ROW)
    assert (second.id, second.positives, second.mask) == ("7", [0, 1, 1], more["mask"])
    assert (third.id, third.positives) == ("line-4", None)
    assert load_examples(str(path), limit=2) == [first, second]


def test_json_file_with_an_array_or_with_lines_and_a_byte_order_mark(tmp_path):
    rows = [ROW, ROW | {"id": "b"}]
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    expected = [Example(**row) for row in rows]
    assert load_examples(tmp_path / "array.json") == load_examples(tmp_path / "lines.json") == expected
    (tmp_path / "array.json").write_text(json.dumps([ROW, ROW | {"query": 1}]))
    with pytest.raises(ValueError, match=r"array\.json, item 2: query: expected str, got int"):
        load_examples(tmp_path / "array.json")


def without(name: str) -> dict:
    return {key: value for key, value in ROW.items() if key != name}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"id": "b", ', r"line 2, column \d+: not valid JSON: "),
        ('["not", "an object"]', r"line 2: expected an object with fields, got list"),
        ("null", r"line 2: expected an object with fields, got null"),
        (without("query"), r"line 2: missing field 'query'; there are: id, constitutions, responses$"),
        (without("constitutions"), r"line 2: missing field 'constitutions'; there are: id, query, responses$"),
        (without("responses"), r"line 2: missing field 'responses'; there are: id, query, constitutions$"),
        ("{}", r"line 2: missing field 'query'; there are: none"),
        (ROW | {"id": 1.5}, r"line 2: id: expected str or int, got float"),
        (ROW | {"id": True}, r"line 2: id: expected str or int, got bool"),
        (ROW | {"query": None}, r"line 2: query: expected str, got null"),
        (ROW | {"query": " \n"}, r"line 2: query: expected text, got only white space"),
        (ROW | {"constitutions": "brief"}, r"line 2: constitutions: expected a list or its JSON text, got 'brief'"),
        (ROW | {"constitutions": {"a": 1}}, r"line 2: constitutions: expected a list of str, got dict"),
        (ROW | {"constitutions": []}, r"line 2: constitutions: expected at least one entry, got an empty list"),
        (ROW | {"constitutions": ["brief", 3]}, r"line 2: constitutions\[1\]: expected str, got int"),
        (ROW | {"constitutions": ["brief", ""]}, r"line 2: constitutions\[1\]: expected text, got an empty string"),
        (ROW | {"responses": []}, r"line 2: responses: expected at least one entry, got an empty list"),
        (ROW | {"responses": ["Because.", ""]}, r"line 2: responses\[1\]: expected text, got an empty string"),
        (ROW | {"responses": ["Because.", "\n\t"]}, r"line 2: responses\[1\]: expected text, got only white space"),
        (ROW | {"responses": ["cut \ud83d", "b"]}, r"line 2: responses\[0\]: not valid Unicode at character 4"),
        (ROW | {"responses": ["1", "2", "3"]}, r"line 2: .*positives: required when 2 prompts meet 3 responses"),
        (ROW | {"positives": [0]}, r"line 2: .*positives: expected 2 integers, one per response"),
        (ROW | {"positives": []}, r"line 2: positives: expected at least one entry, got an empty list"),
        (ROW | {"positives": [0, 2]}, r"line 2: .*positives: expected prompt indices in \[0, 2\), got \[0, 2\]"),
        (ROW | {"positives": [0, -1]}, r"line 2: .*positives: expected prompt indices in \[0, 2\)"),
        (ROW | {"positives": [0, True]}, r"line 2: positives\[1\]: expected int, got bool"),
        (ROW | {"positives": [0, 0]}, r"line 2: .*positives: prompt 1 has no response"),
        (ROW | {"positives": 0}, r"line 2: positives: expected a list of int, got int"),
        (ROW | {"mask": [True, False]}, r"line 2: mask\[0\]: expected list, got bool"),
        (ROW | {"mask": [[True, False], [True]]}, r"line 2: mask\[1\]: expected 2 bools, one a response, got 1"),
        (ROW | {"mask": [[True, 1], [True, True]]}, r"line 2: mask\[0\]\[1\]: expected bool, got int"),
        (ROW | {"mask": [[True, True]]}, r"line 2: .*mask: expected bool \[2, 2\]"),
        (ROW | {"mask": [[False, False]] * 2}, r"line 2: .*mask: expected at least one pair"),
        (ROW | {"id": "first"}, r"line 2: id: expected a new one, got 'first', which line 1 has too"),
    ],
)
def test_bad_row_is_refused_with_its_file_line_and_field(tmp_path, row, message):
    path = write(tmp_path / "data.jsonl", ROW | {"id": "first"}, row)
    with pytest.raises(ValueError, match=r"data\.jsonl, " + message):
        load_examples(path)


def test_ids_of_different_type_and_the_same_text_are_duplicates(tmp_path):
    path = write(tmp_path / "data.jsonl", ROW | {"id": 1}, ROW | {"id": "2"}, ROW | {"id": "1"})
    with pytest.raises(ValueError, match=r"line 3: id: .*'1', which line 1 has too"):
        load_examples(path)


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b'\n{"query": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"data\.jsonl, line 2: not UTF-8: byte 0xe9"):
        load_examples(path)
    array = tmp_path / "data.json"
    array.write_bytes(b'[\n\n{"query": "caf\xe9"}]')
    with pytest.raises(ValueError, match=r"data\.json, line 3: not UTF-8: byte 0xe9"):
        load_examples(array)
    array.write_bytes(b'[\n{"query": }]')
    with pytest.raises(ValueError, match=r"data\.json, line 2, column 11: not valid JSON"):
        load_examples(array)


def test_line_separators_inside_a_text_are_no_line_ends(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(ROW | {"query": "a\u2028b\x85c"}, ensure_ascii=False), encoding="utf-8")
    assert load_examples(path)[0].query == "a\u2028b\x85c"


def test_field_map(tmp_path):
    row = {"prompt": "Why?", "principles": ROW["constitutions"], "responses": ROW["responses"], "query": "not this"}
    path = write(tmp_path / "data.jsonl", row)
    fields = {"query": "prompt", "constitutions": "principles"}
    assert load_examples(path, fields=fields)[0].query == "Why?"
    with pytest.raises(ValueError, match=r"line 1: missing field 'question' \(for 'query'\); there are: prompt, "):
        load_examples(path, fields=fields | {"query": "question"})
    with pytest.raises(ValueError, match=r"line 1: missing field 'key' \(for 'id'\)"):
        load_examples(path, fields=fields | {"id": "key"})
    with pytest.raises(ValueError, match=r"fields: expected keys among query, .*, got prompt"):
        load_examples(path, fields={"prompt": "query"})


def test_bad_source_and_options(tmp_path):
    path = write(tmp_path / "data.jsonl", ROW)
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        load_examples(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match=r"no such file: .*none\.parquet"):
        load_examples(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"source: expected a file ending in \.parquet, .*data\.txt"):
        load_examples(write(tmp_path / "data.txt", ROW))
    with pytest.raises(ValueError, match=r"source: expected a path, .*, got int"):
        load_examples(3)
    with pytest.raises(ValueError, match=r"empty\.jsonl: expected at least one example, got none"):
        load_examples(write(tmp_path / "empty.jsonl", ""))
    with pytest.raises(ValueError, match="expected neither with a JSON file, got 'train'"):
        load_examples(path, split="train")
    for limit in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="limit: expected a positive int or None"):
            load_examples(path, limit=limit)


ROWS = [ROW | {"positives": [1, 0]}, ROW | {"id": "b", "query": "None", "positives": None}]


def test_datasets_objects_and_folders(tmp_path):
    expected = [Example(**row) for row in ROWS]
    data = datasets.Dataset.from_list(ROWS)
    assert load_examples(data) == load_examples(data.with_format("numpy")) == expected
    assert load_examples(data.to_iterable_dataset(), limit=1) == expected[:1]
    splits = datasets.DatasetDict(train=data, test=data.select([1]))
    assert load_examples(splits, split="test") == expected[1:]
    assert load_examples(datasets.DatasetDict(only=data)) == expected
    with pytest.raises(ValueError, match="split: expected one of train, test, got None"):
        load_examples(splits)
    with pytest.raises(ValueError, match="split: expected one of train, test, got 'dev'"):
        load_examples(splits, split="dev")
    with pytest.raises(ValueError, match="split: expected None for a data set without splits, got 'train'"):
        load_examples(data, split="train")
    data.save_to_disk(tmp_path / "one")
    splits.save_to_disk(tmp_path / "many")
    assert load_examples(tmp_path / "one") == load_examples(str(tmp_path / "many"), split="train") == expected
    with pytest.raises(ValueError, match="Dataset, row 2: id: expected a new one, got 'a', which row 1 has too"):
        load_examples(datasets.Dataset.from_list([ROW, ROW]))


def test_files_that_datasets_reads(tmp_path):
    expected = [Example(**row) for row in ROWS]
    options = {"load_options": {"cache_dir": str(tmp_path / "cache")}}
    data = datasets.Dataset.from_list(ROWS)
    data.to_parquet(tmp_path / "data.parquet")
    assert load_examples(tmp_path / "data.parquet", **options) == expected
    flat = data.map(lambda row: {k: v if k in ("id", "query") or v is None else json.dumps(v) for k, v in row.items()})
    flat.to_csv(tmp_path / "data.csv")
    flat.to_csv(tmp_path / "data.tsv", sep="\t")
    (tmp_path / "data.csv.gz").write_bytes(gzip.compress((tmp_path / "data.csv").read_bytes()))
    for name in ("data.csv", "data.tsv", "data.csv.gz"):
        assert load_examples(tmp_path / name, split="train", **options) == expected
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl", *ROWS)
    write(tmp_path / "folder" / "test.jsonl", ROWS[0])
    assert load_examples(tmp_path / "folder", split="train[1:]", **options) == expected[1:]
    with pytest.raises(ValueError, match="split: expected one of train, test, got None"):
        load_examples(tmp_path / "folder", **options)
    flat.remove_columns("responses").add_column("responses", ["Because.", "[]"]).to_csv(tmp_path / "bad.csv")
    with pytest.raises(ValueError, match=r"bad\.csv, row 1: responses: expected a list or its JSON text, got 'Because"):
        load_examples(tmp_path / "bad.csv", **options)
