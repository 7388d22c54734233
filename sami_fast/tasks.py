"""Tasks: where queries come from, how they are cleaned, and the prompts that go with them.

`tldr` summarises Reddit posts, `hh` continues conversations with an assistant; both read the public data sets or local
files of the same layout. `generic` takes the queries of any JSON Lines file.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sami_fast.examples import iter_rows
from sami_fast.run_config import TaskConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Query:
    """One query and the name it has in files and logs."""

    id: str
    text: str


@dataclass(frozen=True)
class Task:
    """A kind of query.

    Attributes:
        name: of the task.
        field, id_field: columns with the query and its id; dots go into nested columns, `info.post`.
        template: of the prompt that is scored and trained on.
        generation_template: of the prompt that responses are sampled from.
        response_prefix: words that every response starts with; they are given in generation.
        stop: strings at which a response ends.
        markers: strings that only a response gone astray holds.
        clean: what makes a query out of a cell; "" leaves the row out.
        source, split, load_options: the public data set.
    """

    name: str
    field: str = "query"
    id_field: str = "id"
    template: str = "query_first_chat"
    generation_template: str | None = None
    response_prefix: str = ""
    stop: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()
    clean: Callable[[str], str] = str.strip
    source: str | None = None
    split: str | None = None
    load_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _post(text: str) -> str:
    return text.strip().removeprefix("POST:").strip()


def _conversation(text: str) -> str:
    """A conversation without the assistant's last reply, which is for the model to write."""
    head, found, _ = ("\n\n" + text.strip()).rpartition("\n\nAssistant:")
    return head.strip() if found and "\n\nHuman:" in head else ""


TASKS = {
    "generic": Task("generic"),
    "tldr": Task(
        "tldr",
        field="info.post",
        id_field="info.id",
        template="tldr",
        generation_template="tldr_generation",
        response_prefix="The post",
        stop=("\n\nHuman:", "\n\n###", "\n\nPost:"),
        markers=("stands here)", "stand here)", "Constitution:"),
        clean=_post,
        source="openai/summarize_from_feedback",
        split="train",
        # The data set itself is a script, which `datasets` no longer runs: this is its conversion on the hub.
        load_options={"data_dir": "comparisons", "revision": "refs/convert/parquet"},
    ),
    "hh": Task(
        "hh",
        field="chosen",
        template="hh",
        generation_template="hh_generation",
        stop=("\n\nHuman:", "\n\nAssistant:", "\n\n###"),
        markers=("stands here)", "stand here)", "Constitution:"),
        clean=_conversation,
        source="Anthropic/hh-rlhf",
        split="train",
    ),
}


def find_task(config: TaskConfig) -> Task:
    """The named task with what the configuration sets laid over it.

    A `source` of one's own comes without the public data set's split and load options, a `field` without its id column,
    a `template` without its generation template.

    Raises:
        ValueError: an unknown task, or one that has no data set of its own and is given none.
    """
    if config.name not in TASKS:
        raise ValueError(f"task.name: expected one of {', '.join(TASKS)}, got {config.name!r}")
    task = TASKS[config.name]
    if config.source is not None:
        task = dataclasses.replace(task, split=None, load_options={})
    if config.field is not None:
        task = dataclasses.replace(task, id_field="id")
    if config.template is not None:
        task = dataclasses.replace(task, generation_template=None)
    given = {f.name: getattr(config, f.name, None) for f in dataclasses.fields(Task) if f.name != "name"}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    task = dataclasses.replace(task, **{name: value for name, value in given.items() if value is not None})
    if task.source is None:
        raise ValueError(f"task.source: expected a file or data set for the task {task.name}, got nothing")
    return task


def load_queries(task: Task, *, limit: int | None = None) -> tuple[list[Query], dict[str, int]]:
    """Queries in the order of the source, each text once, and counts of `rows`, `duplicate` and `unusable` ones.

    Args:
        task: as `find_task` gives it.
        limit: read only so many rows.

    Raises:
        ValueError: a row without the field (names the source, the row, the field and those there are), with a value
            that is no text, or two different queries of one id.
    """
    label = Path(task.source).name if Path(task.source).exists() else task.source
    counts = dict.fromkeys(("rows", "duplicate", "unusable"), 0)
    queries: dict[str, Query] = {}
    texts: set[str] = set()
    for place, row in iter_rows(task.source, split=task.split, load_options=task.load_options):
        counts["rows"] += 1
        try:
            text = _cell(row, task.field)
            text = "" if text is None else text  # a few rows of the public data are of another kind
            if not isinstance(text, str):
                raise ValueError(f"{task.field}: expected text, got {type(text).__name__}")
            text = task.clean(text)
            try:
                id = str(_cell(row, task.id_field))
            except ValueError:
                id = place.replace(" ", "-")
            if not text:
                counts["unusable"] += 1
            elif text in texts:
                counts["duplicate"] += 1
            elif id in queries:
                raise ValueError(f"{task.id_field}: {id!r} is the id of another query already")
            else:
                texts.add(text)
                queries[id] = Query(id, text)
        except ValueError as error:
            raise ValueError(f"{label}, {place}: {error}") from None
        if counts["rows"] == limit:
            break
    if not queries:
        raise ValueError(f"{label}: expected at least one query in {task.field!r}, got none in {counts['rows']} rows")
    logger.info("%s: %d queries; %s", label, len(queries), ", ".join(f"{n} {kind}" for kind, n in counts.items()))
    return list(queries.values()), counts


def _cell(row: Any, path: str) -> Any:
    value = row
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            there = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
            raise ValueError(f"missing field {path!r}; there are: {there or 'none'}")
        value = value[name]
    return value
