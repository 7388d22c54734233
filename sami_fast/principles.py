"""The principle writer: a model is asked for a principle about each named attribute of a task, and for its antithesis.

What it writes is the JSON file that `sami_fast.constitutions` reads, meant to be looked at and edited by a person.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sami_fast.config import ModelConfig, build, check_count, check_number, load_model
from sami_fast.constitutions import Principle, read_principles
from sami_fast.prompts import TEMPLATES, fill, read_template
from sami_fast.report import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Writer(Protocol):
    """Anything that answers a prompt; `sami_fast.endpoint.Endpoint` is one."""

    def complete(self, prompt: str, *, max_tokens: int, temperature: float, seed: int | None = None) -> str:
        """The answer to one message."""


class ModelWriter:
    """A causal LM as a writer: its chat template is used where it has one, else it goes on after the prompt."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer

    def complete(self, prompt: str, *, max_tokens: int, temperature: float, seed: int | None = None) -> str:
        """The answer to one message; another `seed` gives another answer."""
        from sami_fast.generation import generate_responses

        if self.tokenizer.chat_template:
            message = [{"role": "user", "content": prompt}]
            prompt = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        sampling = dict(max_new_tokens=max_tokens, temperature=temperature, seed=seed or 0, progress=False)
        return generate_responses(self.model, self.tokenizer, [prompt], **sampling)[0].text


@dataclass(frozen=True)
class Dropped:
    """Something that a model wrote and that was not used."""

    attribute: str
    reason: str
    text: str


@dataclass
class Written:
    """All principles that the file holds now, attributes still without one, and what was dropped on the way."""

    principles: list[Principle] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)


def write_principles(
    path: str | os.PathLike[str],
    writer: Writer,
    task: str,
    attributes: Sequence[str],
    *,
    attempts: int = 3,
    max_tokens: int = 160,
    temperature: float = 0.7,
    seed: int = 0,
) -> Written:
    """Write a principle and its antithesis for each attribute to a JSON file, which is saved after each.

    Attributes that the file has already are kept as they are, edited or not; so a run that was cut off goes on.

    Args:
        path: the file.
        writer: whom to ask.
        task: what responses are for, in a few words ("Summarise Reddit posts.").
        attributes: what the principles are about ("concise", "faithful to the post").
        attempts: how often to ask for one text; each time with another seed.
        max_tokens, temperature: of an answer.
        seed: of the first attempt.

    Raises:
        ValueError: no task, no attributes, one twice, fewer than one attempt, or a file that is no list of principles.
        EndpointError: the writer's endpoint fails; what was written before is in the file.
    """
    names = _check(task, attributes, attempts)
    content, found = read_principles(path) if Path(path).exists() else ({"task": task}, {})
    result = Written()

    def ask(template: str, attribute: str, taken: set[str], **texts: str) -> str | None:
        prompt = _render(template, task=task, attribute=attribute, **texts)
        for attempt in range(attempts):
            reply = writer.complete(prompt, max_tokens=max_tokens, temperature=temperature, seed=seed + attempt)
            text, ignored = parse_principle(reply)
            result.dropped += [Dropped(attribute, "beside the principle", line) for line in ignored]
            if (reason := _refused(text, taken)) is None:
                return text
            result.dropped.append(Dropped(attribute, reason, text or reply.strip()))
            logger.info("%s: dropped (%s): %s", attribute, reason, (text or reply.strip())[:80])
        return None

    for name in names:
        if name in found:
            logger.info("%s: in %s already, kept", name, path)
            continue
        taken = {_key(text) for p in found.values() for text in (p.principle, p.antithesis)}
        principle = ask("principle", name, taken)
        antithesis = principle and ask("antithesis", name, taken | {_key(principle)}, principle=principle)
        if not principle or not antithesis:
            logger.warning(
                "%s: no usable %s in %d attempts", name, "antithesis" if principle else "principle", attempts
            )
            result.missing.append(name)
            continue
        found[name] = Principle(name, principle, antithesis)
        write_json(path, content | {"attributes": [asdict(p) for p in found.values()]})
    result.principles = list(found.values())
    return result


def write_from_config(values: Mapping[str, Any]) -> Written:
    """`write_principles` as a configuration asks for it: with a section `endpoint`, or `model` for a causal LM.

    Raises:
        ValueError: a key that is missing, unknown or of the wrong kind, before any model is loaded.
    """
    for name in ("task", "output"):
        if not isinstance(values.get(name), str) or not values[name].strip():
            raise ValueError(f"{name}: expected text, got {values.get(name)!r}")
    if "endpoint" in values and "model" in values:
        raise ValueError("endpoint, model: expected one of them, got both")
    options = {key: values[key] for key in ("attempts", "max_tokens", "temperature", "seed") if key in values}
    for name in ("attempts", "max_tokens"):
        check_count(name, options.get(name, 1))
    check_number("temperature", options.get("temperature", 0))
    if type(options.get("seed", 0)) is not int:
        raise ValueError(f"seed: expected an int, got {options['seed']!r}")
    attributes = values.get("attributes")
    _check(values["task"], attributes, options.get("attempts", 1))
    if "endpoint" in values:
        from sami_fast.endpoint import Endpoint

        writer: Writer = Endpoint.from_config("endpoint", values["endpoint"])
    else:
        writer = ModelWriter(*load_model(build(ModelConfig, "model", values.get("model", {}))))
    return write_principles(values["output"], writer, values["task"], attributes, **options)


_THOUGHTS = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_DECORATION = re.compile(r"^(?:[\s>#*_`•–-]+|\(?\d{1,2}[.):]\s+)+")
_LABEL = re.compile(
    r"^(?:the\s+)?(?:principle|antithesis|opposite|answer|response|prompt|rule)\s*(?:\d+\s*)?(?::|is:|would be:)\s*",
    re.I,
)
_CHATTER = re.compile(
    r"^(?:sure|certainly|of course|absolutely|ok(?:ay)?|here(?:'s|’s| is| are))\b[^.:!]*(?:[.:!]\s*|$)"
    r"|^(?:i hope|let me know|feel free|please let|this (?:principle|antithesis)|note:|explanation:).*$",
    re.I,
)


def parse_principle(reply: str) -> tuple[str, list[str]]:
    """(principle, other lines) of a model's answer; the principle is "" where none can be seen.

    Numbers, bullets, quotation marks, emphasis, labels ("Principle:"), greetings ("Sure! Here is ...:"), code fences
    and thoughts (`<think>`) around it are taken away.
    """
    lines = []
    for line in _THOUGHTS.sub("", reply).splitlines():
        before = None
        while line != before:  # each rule may uncover what another takes away
            before = line
            line = _LABEL.sub("", _CHATTER.sub("", _DECORATION.sub("", line.strip()), count=1).strip()).strip()
            line = line.strip("*_`").strip()
            if len(line) > 1 and line[0] in "\"'“‘«" and line[-1] in "\"'”’»":
                line = line[1:-1].strip()
        if line and not line.endswith(":"):
            lines.append(line)
    return (lines[0], lines[1:]) if lines else ("", [])


def _check(task: str, attributes: Any, attempts: int) -> list[str]:
    if not task.strip():
        raise ValueError("task: expected a description of the task, got nothing")
    if isinstance(attributes, str) or not isinstance(attributes, Sequence) or not attributes:
        raise ValueError(f"attributes: expected a list of names, got {attributes!r}")
    names = [name.strip() if isinstance(name, str) else "" for name in attributes]
    if "" in names or len(set(names)) != len(names):
        raise ValueError(f"attributes: expected different names that are not empty, got {list(attributes)!r}")
    if attempts < 1:
        raise ValueError(f"attempts: expected at least 1, got {attempts}")
    return names


def _refused(text: str, taken: set[str]) -> str | None:
    words = len(text.split())
    if words == 0:
        return "empty"
    if words < 3:
        return "too short"
    if words > 60:
        return "too long"
    if _key(text) in taken:
        return "duplicate"
    return None


def _key(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _render(name: str, **texts: str) -> str:
    return fill(read_template(name, TEMPLATES / "principles")[1], texts)
