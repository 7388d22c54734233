"""Prompt templates, and the token ids of prompts and of the responses that follow them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES = Path(__file__).parent / "templates"
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")


def placeholders(text: str) -> set[str]:
    """Names that stand in braces in a template."""
    return set(_PLACEHOLDER.findall(text))


def fill(text: str, values: Mapping[str, str]) -> str:
    """A template with the values put in verbatim, in one pass: braces inside them mean nothing."""
    return _PLACEHOLDER.sub(lambda match: values[match[1]], text)


def read_template(name_or_path: str | os.PathLike[str], folder: Path = TEMPLATES) -> tuple[Path, str]:
    """Path and text of a template in `folder`, by name, or of a text file.

    One line break at the end of the file is dropped, since editors add it; a template that is to end in one ends in an
    empty line.

    Raises:
        ValueError: no such template, or not UTF-8.
    """
    built_in = {path.stem: path for path in sorted(folder.glob("*.txt"))}
    path = built_in.get(str(name_or_path), Path(name_or_path))
    if not path.is_file():
        raise ValueError(f"template: expected a file or one of {', '.join(built_in)}, got {str(name_or_path)!r}")
    try:
        return path, path.read_text(encoding="utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None


@dataclass(frozen=True)
class PromptTemplate:
    """Text with `{query}` and `{constitution}` where those go, each at least once; any other `{name}` is refused.

    Args:
        text: the template. The response follows it directly, after a space unless the template ends in white space.
        name: file or name, for error messages.
        chat: the rendered text is a user message, to be wrapped in the tokenizer's chat template.
    """

    text: str
    name: str = "template"
    chat: bool = False

    def __post_init__(self) -> None:
        found = placeholders(self.text)
        for name in ("query", "constitution"):
            if name not in found:
                raise ValueError(f"{self.name}: expected the placeholder {{{name}}}, got a template without it")
        if unknown := sorted(found - {"query", "constitution"}):
            raise ValueError(f"{self.name}: expected only {{query}} and {{constitution}}, got {{{unknown[0]}}}")

    @classmethod
    def load(cls, name_or_path: str | Path) -> PromptTemplate:
        """Read a template that comes with the package (`query_first`) or a text file (`./mine.txt`).

        A file whose name ends in `_chat` before the suffix holds a chat template's user message.

        Raises:
            ValueError: no such template, not UTF-8, or a placeholder missing or unknown.
        """
        path, text = read_template(name_or_path)
        return cls(text, str(path), path.stem.endswith("_chat"))

    def render(self, query: str, constitution: str) -> str:
        """The template with both texts put in, see `fill`."""
        return fill(self.text, {"query": query, "constitution": constitution})


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, template: PromptTemplate, query: str, constitution: str
) -> list[int]:
    """Token ids that a response follows, in scoring and in generation alike.

    They start with what the tokenizer puts before a text (BOS), exactly once, also where a chat template spells it out,
    and end without what it puts after one.

    Raises:
        ValueError: a chat template is asked for and the tokenizer has none.
    """
    text = template.render(query, constitution)
    if template.chat:
        if not tokenizer.chat_template:
            raise ValueError(f"tokenizer: expected one with a chat template for {template.name}, got one without")
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    bare, special = tokenizer.encode("x", add_special_tokens=False), tokenizer.encode("x")
    start = next((i for i in range(len(special)) if special[i : i + len(bare)] == bare), 0)
    return ids if ids[:start] == special[:start] else special[:start] + ids


def response_ids(
    tokenizer: PreTrainedTokenizerBase, template: PromptTemplate, response: str, *, score_eos: bool = False
) -> list[int]:
    """Token ids of a response as it continues a prompt, tokenised apart so that the prompt stays an exact prefix.

    A space goes between unless one side has white space there; after a chat template there is none. `score_eos` appends
    the tokenizer's EOS, so that where a response ends counts too.

    Raises:
        ValueError: `score_eos` with a tokenizer that has no EOS.
    """
    if not (template.chat or template.text[-1:].isspace() or response[:1].isspace()):
        response = " " + response
    ids = _continuation_ids(tokenizer, response)
    if score_eos:
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: expected one with an EOS token for score_eos, got one without")
        if ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
    return ids


def _continuation_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of `text` inside a sequence: without the space that SentencePiece tokenizers put before every text."""

    def encode(part: str) -> list[int]:
        return tokenizer.encode(part, add_special_tokens=False, verbose=False)

    if tokenizer.decode(encode("x") * 2) == "xx":
        return encode(text)
    for anchor in ("\n", ":", "x"):  # more than one, for `text` may merge with an anchor
        head, both = encode(anchor), encode(anchor + text)
        if head and both[: len(head)] == head:
            return both[len(head) :]
    raise ValueError(f"response: no way to tokenise it apart from its prompt with this tokenizer, got {text[:40]!r}")
