"""Constitutions: short lists of principles that a response is to follow, sampled so that they contrast.

Two formats are read. Ours lists attributes, and which of them are used by default:

    {"default": ["brevity"],
     "attributes": [{"attribute": "brevity", "principle": "Answer in one ...", "antithesis": "Answer at length ..."}]}

The paper's (arXiv 2404.14313) holds ready-made pairs, each
`{"positive": text, "negative": text, "identifiers": {"positive": ["pos concise", ...], "negative": [...]}}`.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Side = Literal["principle", "antithesis"]
_SIDES: tuple[Side, Side] = ("principle", "antithesis")
_FIELDS = ("attribute", *_SIDES)


@dataclass(frozen=True)
class Principle:
    """What to do about one attribute of a response, and its opposite."""

    attribute: str
    principle: str
    antithesis: str


@dataclass(frozen=True)
class Constitution:
    """The text that is shown to the model, and the side it takes in each attribute."""

    text: str
    identifiers: Mapping[str, Side]


def read_principles(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Principle]]:
    """What a file of principles holds, and the principles in it by attribute, in its order.

    Raises:
        ValueError: the file, the field in it, what was expected and what came.
    """
    if not isinstance(content := _read_json(path), dict):
        raise ValueError(f"{path}: expected an object with 'attributes', got {_kind(content)}")
    entries = content.get("attributes")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: 'attributes': expected a list with at least one entry, got {_kind(entries)}")
    found: dict[str, Principle] = {}
    for i, entry in enumerate(entries):
        where = f"{path}: attributes[{i}]"
        principle = Principle(*(_text(entry, field, where) for field in _FIELDS))
        if unknown := sorted(set(entry) - set(_FIELDS)):
            raise ValueError(f"{where}: expected the fields {', '.join(_FIELDS)}, got also {', '.join(unknown)}")
        if principle.attribute in found:
            raise ValueError(f"{where}.attribute: {principle.attribute!r} is listed already")
        if principle.principle == principle.antithesis:
            raise ValueError(f"{where}.antithesis: expected the opposite of 'principle', got the same text")
        found[principle.attribute] = principle
    return content, found


def load_principles(path: str | os.PathLike[str], attributes: Sequence[str] | None = None) -> list[Principle]:
    """Principles of the named attributes, in that order; of the file's `default`, or of all, when None.

    Raises:
        ValueError: the file, the field in it, what was expected and what came; or an attribute it does not have.
    """
    content, found = read_principles(path)
    names = content.get("default", list(found)) if attributes is None else attributes
    source = f"{path}: 'default'" if attributes is None else "attributes"
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise ValueError(f"{source}: expected a list of attributes, got {names!r}")
    for name in names:
        if not isinstance(name, str) or name not in found:
            raise ValueError(f"{source}: expected attributes out of {', '.join(found)}, got {name!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"{source}: expected each attribute once, got {list(names)}")
    return [found[name] for name in names]


def sample_constitutions(
    principles: Sequence[Principle], count: int, *, seed: int, query_id: str = ""
) -> list[Constitution]:
    """`count` constitutions for one query, any two of which take opposite sides in at least one attribute.

    The draw depends on `seed` and `query_id` alone. The order of the principles is shuffled once for the query and is
    the same in its constitutions, so that only what they ask for tells them apart.

    Raises:
        ValueError: `count` is below 1 or above 2 ** len(principles), the number of different constitutions.
    """
    most = 2 ** len(principles)
    if not 1 <= count <= most:
        raise ValueError(f"count: expected 1 to {most} constitutions of {len(principles)} attribute(s), got {count}")
    generator = random.Random(f"{seed}/{query_id}")
    order = generator.sample(list(principles), len(principles))
    constitutions = []
    for code in generator.sample(range(most), count):
        chosen = {principle.attribute: _SIDES[code >> i & 1] for i, principle in enumerate(order)}
        lines = [getattr(principle, chosen[principle.attribute]) for principle in order]
        text = lines[0] if len(lines) == 1 else "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))
        constitutions.append(Constitution(text, chosen))
    return constitutions


_NUMBER = re.compile(r"^[ \t]*\d{1,2}[.)][ \t]+", re.MULTILINE)


def shuffle_principles(constitution: Constitution, seed: str) -> Constitution:
    """The same constitution with its numbered principles in another order, drawn from `seed` alone.

    A text without at least two numbered principles stays as it is. So does one with text before the first.
    """
    starts = [match.start() for match in _NUMBER.finditer(constitution.text)]
    if len(starts) < 2 or constitution.text[: starts[0]].strip():
        return constitution
    parts = [constitution.text[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    order = random.Random(seed).sample(range(len(parts)), len(parts))
    lines = [f"{number}. {_NUMBER.sub('', parts[i], count=1).strip()}" for number, i in enumerate(order, 1)]
    identifiers = constitution.identifiers
    if len(identifiers) == len(parts):  # they are listed in the order of the text
        listed = list(identifiers.items())
        identifiers = dict(listed[i] for i in order)
    return Constitution("\n".join(lines), identifiers)


def load_constitution_pairs(path: str | os.PathLike[str]) -> list[tuple[Constitution, Constitution]]:
    """(positive, negative) pairs from a file in the format published with the paper.

    Raises:
        ValueError: the file, the field in it, what was expected and what came.
    """
    if not isinstance(content := _read_json(path), list) or not content:
        raise ValueError(f"{path}: expected a list of constitution pairs, got {_kind(content)}")
    pairs = []
    for i, entry in enumerate(content):
        where = f"{path}: [{i}]"
        texts = {name: _text(entry, name, where) for name in ("positive", "negative")}
        if not isinstance(identifiers := entry.get("identifiers", {}), dict):
            raise ValueError(f"{where}.identifiers: expected an object, got {_kind(identifiers)}")
        sides = {name: _sides(identifiers.get(name, []), f"{where}.identifiers.{name}") for name in texts}
        if texts["positive"] == texts["negative"]:
            raise ValueError(f"{where}.negative: expected a text that differs from 'positive', got the same")
        pairs.append(tuple(Constitution(texts[name], sides[name]) for name in ("positive", "negative")))
    return pairs


def _sides(labels: Any, where: str) -> dict[str, Side]:
    known = dict(zip(("pos", "neg"), _SIDES, strict=True))
    split = [str(label).split(maxsplit=1) for label in labels] if isinstance(labels, list) else [[]]
    if any(len(parts) != 2 or parts[0] not in known for parts in split):
        raise ValueError(f"{where}: expected a list such as ['pos concise', 'neg comprehensive'], got {labels!r}")
    return {attribute: known[sign] for sign, attribute in split}


def _text(entry: Any, field: str, where: str) -> str:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object, got {_kind(entry)}")
    value = entry.get(field)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}.{field}: expected a text, got {_kind(value)}")
    return value.strip()


def _read_json(path: str | os.PathLike[str]) -> Any:
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise ValueError(f"{path}: expected JSON: {error}") from None


def _kind(value: Any) -> str:
    return "nothing" if value is None else "an empty text" if value == "" else repr(value)[:60]
