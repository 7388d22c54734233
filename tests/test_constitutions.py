"""The reader of principles and published pairs, and the sampler of contrasting constitutions."""

import itertools
import json
from collections import Counter

import pytest

from sami_fast.constitutions import (
    Constitution,
    Principle,
    load_constitution_pairs,
    load_principles,
    sample_constitutions,
    shuffle_principles,
)

ATTRIBUTES = [{"attribute": n, "principle": f"More {n}.", "antithesis": f"Less {n}."} for n in ("wit", "care", "speed")]


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "file.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def test_all_attributes_are_the_default_of_a_file_that_names_none(write):
    assert load_principles(write({"attributes": ATTRIBUTES})) == [Principle(**entry) for entry in ATTRIBUTES]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"file.json: expected JSON: "),
        ([], r"file.json: expected an object with 'attributes', got \[\]"),
        ({}, r"file.json: 'attributes': expected a list with at least one entry, got nothing"),
        ({"attributes": ["wit"]}, r"file.json: attributes\[0\]: expected an object, got 'wit'"),
        ({"attributes": [{"attribute": "wit"}]}, r"attributes\[0\]\.principle: expected a text, got nothing"),
        ({"attributes": [ATTRIBUTES[0], ATTRIBUTES[0]]}, r"attributes\[1\]\.attribute: 'wit' is listed already"),
        (
            {"attributes": [ATTRIBUTES[0] | {"antithesis": " "}]},
            r"attributes\[0\]\.antithesis: expected a text, got ' '",
        ),
        ({"attributes": [ATTRIBUTES[0] | {"antithesis": "More wit."}]}, r"\.antithesis: expected the opposite"),
        ({"attributes": [ATTRIBUTES[0] | {"anti": "x"}]}, r"attributes\[0\]: expected the fields .*, got also anti"),
        ({"attributes": ATTRIBUTES, "default": "wit"}, r"'default': expected a list of attributes, got 'wit'"),
        ({"attributes": ATTRIBUTES, "default": ["wiz"]}, r"'default': expected .* out of wit, care, speed, got 'wiz'"),
        ({"attributes": ATTRIBUTES, "default": ["wit", "wit"]}, r"'default': expected each attribute once"),
    ],
)
def test_bad_principles_are_refused_by_field(write, content, message):
    with pytest.raises(ValueError, match=message):
        load_principles(write(content))


def test_unknown_attribute_asked_for(write):
    with pytest.raises(ValueError, match="attributes: expected attributes out of wit, care, speed, got 'luck'"):
        load_principles(write({"attributes": ATTRIBUTES}), ["luck"])


def test_constitutions_of_a_query_contrast():
    principles = [Principle(**entry) for entry in ATTRIBUTES]
    orders = set()
    for i in range(40):
        constitutions = sample_constitutions(principles, 3, seed=0, query_id=f"q{i}")
        sides = [tuple(sorted(c.identifiers.items())) for c in constitutions]
        assert len(set(sides)) == 3
        for c in constitutions:
            lines = [line.split(". ", 1) for line in c.text.split("\n")]
            assert [number for number, _ in lines] == ["1", "2", "3"]
            assert {text for _, text in lines} == {getattr(p, c.identifiers[p.attribute]) for p in principles}
            assert list(c.identifiers) == list(constitutions[0].identifiers), "one order for the query"
        orders.add(tuple(constitutions[0].identifiers))
    assert len(orders) == 6
    everything = sample_constitutions(principles, 8, seed=0)
    assert len({c.text for c in everything}) == 8
    with pytest.raises(ValueError, match=r"count: expected 1 to 8 constitutions of 3 attribute\(s\), got 9"):
        sample_constitutions(principles, 9, seed=0)


def test_constitutions_are_seeded_by_query():
    principles = [Principle(**entry) for entry in ATTRIBUTES]
    drawn = [sample_constitutions(principles, 2, seed=s, query_id=q) for s, q in itertools.product((0, 1), "abcdef")]
    assert drawn == [
        sample_constitutions(principles, 2, seed=s, query_id=q) for s, q in itertools.product((0, 1), "abcdef")
    ]
    assert len({tuple(c.text for c in pair) for pair in drawn}) > 8
    pair = sample_constitutions(principles[:1], 2, seed=0)
    assert {c.text for c in pair} == {"More wit.", "Less wit."}, "a single principle needs no number"
    firsts = Counter(sample_constitutions(principles[:1], 2, seed=0, query_id=str(i))[0].text for i in range(200))
    assert min(firsts.values()) > 60, "neither side always comes first"


def test_pairs_in_the_format_of_the_paper(write):
    entry = {
        "positive": "1. Be brief. \n2. Be thorough.",
        "negative": "1. Be lengthy. \n2. Be thorough.",
        "identifiers": {"positive": ["pos concise", "pos thorough"], "negative": ["neg concise", "pos thorough"]},
    }
    ((positive, negative),) = load_constitution_pairs(write([entry]))
    assert (positive.text, negative.text) == (entry["positive"], entry["negative"])
    assert positive.identifiers == {"concise": "principle", "thorough": "principle"}
    assert negative.identifiers == {"concise": "antithesis", "thorough": "principle"}
    for change, message in (
        ({"negative": None}, r"\[0\]\.negative: expected a text, got nothing"),
        ({"negative": entry["positive"]}, r"\[0\]\.negative: expected a text that differs"),
        ({"identifiers": ["pos"]}, r"\[0\]\.identifiers: expected an object"),
        ({"identifiers": {"negative": ["not concise"]}}, r"\[0\]\.identifiers\.negative: expected a list such as"),
        ({"identifiers": {"positive": "pos concise"}}, r"\[0\]\.identifiers\.positive: expected a list such as"),
    ):
        with pytest.raises(ValueError, match=message):
            load_constitution_pairs(write([entry | change]))
    with pytest.raises(ValueError, match=r"expected a list of constitution pairs, got \{\}"):
        load_constitution_pairs(write({}))


def test_shuffled_principles():
    constitution = Constitution(
        "1. One. \n2. Two,\n  and more.\n3. Three.", {"a": "principle", "b": "antithesis", "c": "principle"}
    )
    seen = set()
    for seed in range(30):
        shuffled = shuffle_principles(constitution, str(seed))
        assert shuffled == shuffle_principles(constitution, str(seed))
        lines = [part.split(". ", 1)[1] for part in shuffled.text.replace(",\n  and", ", and").split("\n")]
        place = {"One.": ("a", "principle"), "Two, and more.": ("b", "antithesis"), "Three.": ("c", "principle")}
        assert list(shuffled.identifiers.items()) == [place[line] for line in lines]
        assert [part[:2] for part in shuffled.text.replace(",\n", ", ").split("\n")] == ["1.", "2.", "3."]
        seen.add(tuple(lines))
    assert len(seen) == 6
    for text in ("Be brief.", "1. Be brief.", "Rules:\n1. a b\n2. c d"):
        assert shuffle_principles(Constitution(text, {}), "0").text == text
