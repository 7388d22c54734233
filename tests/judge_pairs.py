"""Pairs of responses with a known better one, and judges of them: what tests of judges share.

PYTEST_DONT_REWRITE: it is imported before it is loaded as a plugin.
"""

import json
import re

import pytest
import torch
from factory import tiny_model
from text_factory import byte_tokenizer

from sami_fast.win_rate import Pair


def make_pairs(count, constitution="Be brief."):
    """Pair i: the response is shorter than the other when i is even."""
    texts = ["Yes.", "Yes, and here is why, at some length."]
    return [Pair(f"p{i}", f"Query {i}?", constitution, *(texts if i % 2 == 0 else texts[::-1])) for i in range(count)]


def shown(messages):
    """Texts of responses A and B in a question."""
    (message,) = messages
    return [re.search(rf"<response_{x}>\n(.*)\n</response_{x}>", message["content"], re.S)[1] for x in "ab"]


def brief(messages):
    a, b = shown(messages)
    return f"Comparison: response A has {len(a)} characters.\n\n**Final choice:** {'A' if len(a) < len(b) else 'B'}"


def prompts(server):
    return [request["messages"][0]["content"] for request in server.requests]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_pairs(folder, pairs):
    def rows(field):
        return [{"query": p.query, "constitution": p.constitution, "response": getattr(p, field)} for p in pairs]

    return [write(folder / f"{field}.jsonl", rows(field)) for field in ("response", "against")]


@pytest.fixture(scope="module")
def local():
    model = tiny_model("llama", vocab_size=259, max_position_embeddings=2048, dtype=torch.float32)
    return model, byte_tokenizer()
