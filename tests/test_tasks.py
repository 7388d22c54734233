"""Queries of the public data sets' layouts and of any file, and the prompts that go with them."""

import json
from pathlib import Path

import datasets
import pytest

from sami_fast.prompts import PromptTemplate
from sami_fast.run_config import TaskConfig
from sami_fast.tasks import TASKS, find_task, load_queries

SHARED = Path(__file__).parents[2] / "shared" / "data"
CONVERSATION = "\n\nHuman: Hi there.\n\nAssistant: Hello!\n\nHuman: What is tea?\n\nAssistant: A drink."


def queries(**options):
    config = TaskConfig(**options)
    return load_queries(find_task(config), limit=config.limit)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def tldr_folder(tmp_path):
    """The layout of the public data set's conversion: a folder for each part, a file for each split."""
    posts = [{"id": f"t3_{i}", "post": f"Post {i} \n", "title": "T", "article": None} for i in (1, 1, 2, 3)]
    posts.append({"id": "news", "post": None, "title": None, "article": "Not a post."})
    for part, split, rows in (
        ("comparisons", "train", [{"info": info, "choice": 0} for info in posts]),
        ("comparisons", "validation", [{"info": posts[0], "choice": 1}]),
        ("axis", "test", [{"info": {"id": "x", "article": "A"}, "summary": {"text": "S"}}]),
    ):
        (tmp_path / part / split).mkdir(parents=True)
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / part / split / "0000.parquet")
    return tmp_path


def test_posts_in_the_layout_of_the_public_data(tldr_folder):
    options = {"split": "train", "load_options": {"data_dir": "comparisons"}}
    found, counts = queries(name="tldr", source=str(tldr_folder), **options)
    assert [(query.id, query.text) for query in found] == [("t3_1", "Post 1"), ("t3_2", "Post 2"), ("t3_3", "Post 3")]
    assert counts == {"rows": 5, "duplicate": 1, "unusable": 1}
    assert find_task(TaskConfig(name="tldr")).load_options["data_dir"] == "comparisons"
    assert find_task(TaskConfig(name="tldr")).split == "train"


def test_a_local_file_needs_no_split(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"info": {"id": "a", "post": "POST: Some text."}}])
    found, _ = queries(name="tldr", source=path)
    assert [(query.id, query.text) for query in found] == [("a", "Some text.")]


def test_the_real_sample():
    if not (path := SHARED / "tldr_sample.jsonl").exists():
        pytest.skip("no sample of the real data here")
    found, counts = queries(name="tldr", source=str(path), field="query")
    assert len(found) == counts["rows"] == 26 and counts["duplicate"] == counts["unusable"] == 0
    assert found[0].id == "6" and found[0].text.startswith("It's summer and")


def test_conversations(tmp_path):
    rows = [
        {"chosen": CONVERSATION, "rejected": "x"},
        {"chosen": "\n\nHuman: Only a question", "rejected": "x"},
        {"chosen": CONVERSATION, "rejected": "y"},
        {"chosen": "\n\nAssistant: Nobody asked.", "rejected": "x"},
        {"chosen": "\n\nHuman: And coffee?\n\nAssistant:", "rejected": "x"},
    ]
    found, counts = queries(name="hh", source=write_lines(tmp_path / "hh.jsonl", rows))
    assert [query.text for query in found] == [
        "Human: Hi there.\n\nAssistant: Hello!\n\nHuman: What is tea?",
        "Human: And coffee?",
    ]
    assert [query.id for query in found] == ["line-1", "line-5"]
    assert counts == {"rows": 5, "duplicate": 1, "unusable": 2}


def test_any_file_of_queries(tmp_path):
    path = write_lines(tmp_path / "q.jsonl", [{"q": {"text": "Why? "}, "n": 7}, {"q": {"text": "How?"}, "n": 8}])
    found, _ = queries(source=path, field="q.text", id_field="n")
    assert [(query.id, query.text) for query in found] == [("7", "Why?"), ("8", "How?")]
    assert len(queries(source=path, field="q.text", limit=1)[0]) == 1


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"query": "a"}, {"text": "b"}], {}, r"q.jsonl, line 2: missing field 'query'; there are: text$"),
        ([{"query": "a"}], {"field": "info.post"}, r"line 1: missing field 'info.post'; there are: query$"),
        ([{"info": "a"}], {"field": "info.post"}, r"line 1: missing field 'info.post'; there are: info$"),
        ([{"query": 3}], {}, r"line 1: query: expected text, got int$"),
        ([["a"]], {}, r"line 1: missing field 'query'; there are: list$"),
        (
            [{"id": 1, "query": "a"}, {"id": 1, "query": "b"}],
            {},
            r"line 2: id: '1' is the id of another query already$",
        ),
        ([{"query": " "}], {}, r"q.jsonl: expected at least one query in 'query', got none in 1 rows$"),
        ([{"query": "a"}], {"split": "train"}, r"^split, load_options: expected neither with a JSON file"),
    ],
)
def test_bad_data_is_named(rows, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        queries(source=write_lines(tmp_path / "q.jsonl", rows), **options)


def test_bad_settings():
    with pytest.raises(ValueError, match=r"task.name: expected one of generic, tldr, hh, got 'chess'"):
        find_task(TaskConfig(name="chess"))
    with pytest.raises(ValueError, match=r"task.source: expected a file or data set for the task generic"):
        find_task(TaskConfig())
    with pytest.raises(ValueError, match=r"task.limit: expected an int of at least 1 or None, got 0"):
        TaskConfig(limit=0)
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        queries(source="none.jsonl")


@pytest.mark.parametrize("name", ["tldr", "hh"])
def test_prompts_differ_between_generation_and_training_as_in_the_paper(name):
    task = find_task(TaskConfig(name=name))
    training, generation = (PromptTemplate.load(t) for t in (task.template, task.generation_template))
    texts = [template.render("QUERY", "1. FIRST\n2. SECOND") for template in (training, generation)]
    for text in texts:
        assert text.index("1. FIRST\n2. SECOND") < text.index("QUERY"), "constitution first"
    assert len(texts[1]) > len(texts[0]) and texts[1].endswith(texts[0].partition("Constitution:")[2])


def test_settings_are_laid_over_the_task():
    task = find_task(TaskConfig(name="tldr", template="query_first", stop=["\n"], response_prefix=""))
    assert (task.template, task.generation_template) == ("query_first", None)
    assert task.stop == ("\n",) and task.response_prefix == "" and task.source == TASKS["tldr"].source
    both = find_task(TaskConfig(name="hh", template="query_first", generation_template="constitution_first"))
    assert both.generation_template == "constitution_first"
