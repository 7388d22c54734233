"""Templates, and the ids of prompts and responses with tokenizers of every kind."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_factory import BYTES, CHAT, CORPUS, METASPACE, TOKENIZERS, train_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sami_fast.data import tokenize_example
from sami_fast.examples import Example
from sami_fast.prompts import PromptTemplate, prompt_ids, response_ids

BUILT_IN = ("query_first", "constitution_first", "query_first_chat", "constitution_first_chat")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
TRICKY = TEXT | st.lists(
    st.sampled_from(["{query}", "{constitution}", "{", "}", "{{query}}", "{0}", "{x}", "\\1", "\\g<1>", "%s", "$query"])
).map("".join)


@given(
    parts=st.lists(st.sampled_from(["query", "constitution", None, '{"a": 1}', "{ x }", "{}", "\\1"]) | TEXT),
    query=TRICKY,
    constitution=TRICKY,
)
def test_substitution_is_verbatim_and_in_one_pass(parts, query, constitution):
    parts = ["query", "constitution", *(part for part in parts if part is not None)]
    names = {"query": "{query}", "constitution": "{constitution}"}
    parts = [part if part in names or part.startswith("{") else part.replace("{", "(") for part in parts]
    template = PromptTemplate("".join(names.get(part, part) for part in parts))
    expected = "".join({"query": query, "constitution": constitution}.get(part, part) for part in parts)
    assert template.render(query, constitution) == expected


@pytest.mark.parametrize("name", BUILT_IN)
def test_templates_that_come_with_the_package(name):
    template = PromptTemplate.load(name)
    assert template.chat == name.endswith("_chat")
    assert not template.text[-1].isspace()
    query, constitution = (template.text.index(f"{{{field}}}") for field in ("query", "constitution"))
    assert (query < constitution) == name.startswith("query_first")


def test_template_files(tmp_path):
    path = tmp_path / "mine.txt"
    for data, text in [
        ("{constitution}\n{query}", "{constitution}\n{query}"),
        ("{constitution}\n{query}\n", "{constitution}\n{query}"),
        ("{constitution}\r\n{query}\r\n", "{constitution}\n{query}"),
        ("{constitution}\n{query}\n\n", "{constitution}\n{query}\n"),
        ("\ufeff{constitution} é\n{query}", "{constitution} é\n{query}"),
    ]:
        path.write_bytes(data.encode())
        assert PromptTemplate.load(path) == PromptTemplate.load(str(path)) == PromptTemplate(text, str(path), False)
    chat = tmp_path / "mine_chat.txt"
    chat.write_text("{constitution}{query}")
    assert PromptTemplate.load(chat).chat


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{constitution}", r"mine\.txt: expected the placeholder \{query\}"),
        (b"{query} {Constitution}", r"mine\.txt: expected the placeholder \{constitution\}"),
        (b"{query} {constitution} {response}", r"mine\.txt: expected only .*, got \{response\}"),
        (b"{query} {constitution} \xff", r"mine\.txt: not UTF-8 at byte 23"),
    ],
)
def test_bad_template_file_is_named(tmp_path, data, message):
    path = tmp_path / "mine.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        PromptTemplate.load(path)


def test_unknown_template():
    with pytest.raises(ValueError, match=r"template: expected a file or one of .*query_first.*, got 'query_last'"):
        PromptTemplate.load("query_last")


def plain(text: str) -> PromptTemplate:
    return PromptTemplate(text)


@pytest.mark.parametrize("tokenizer", [BYTES, METASPACE], ids=["bytes", "metaspace"])
@pytest.mark.parametrize("response", ["It is brief.", " It is brief.", "\nIt is brief."])
@pytest.mark.parametrize("end", [" Response:", " Response:\n", " Response: "])
def test_white_space_between_prompt_and_response(tokenizer, end, response):
    template = plain("{query} {constitution}" + end)
    prompt = prompt_ids(tokenizer, template, "What?", "Be brief.")[1:]
    joined = tokenizer.decode(prompt + response_ids(tokenizer, template, response))
    space = " " if end.endswith(":") and response[0] == "I" else ""
    assert joined == f"What? Be brief.{end}{space}{response}"


def test_response_is_tokenised_as_in_the_running_text():
    for tokenizer in (BYTES, METASPACE):
        template = plain("{constitution} {query} Response:")
        whole = tokenizer.encode("Be brief. What? Response: It is about details.")
        parts = prompt_ids(tokenizer, template, "What?", "Be brief.")
        assert parts + response_ids(tokenizer, template, "It is about details.") == whole


def test_response_that_merges_with_the_anchor():
    vocab = {token: i for i, token in enumerate(["▁", "x", ":", "\n", "a", "▁x", "▁:", "\n\n", ":)", "▁:)", ")"])}
    merges = [("▁", "x"), ("▁", ":"), ("\n", "\n"), (":", ")"), ("▁:", ")")]
    raw = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    template = plain("{query}{constitution}\n")
    for response, tokens in [("\na", ["\n", "a"]), (")a", [")", "a"]), ("a", ["a"]), ("\n\na", ["\n\n", "a"])]:
        assert tokenizer.convert_ids_to_tokens(response_ids(tokenizer, template, response)) == tokens


def test_bos_once_with_any_chat_template():
    template = PromptTemplate.load("query_first_chat")
    tokenizer = train_tokenizer("bytes")
    with_bos = prompt_ids(tokenizer, template, "What?", "Be brief.")
    tokenizer.chat_template = CHAT.removeprefix("{{ bos_token }}")
    assert prompt_ids(tokenizer, template, "What?", "Be brief.") == with_bos
    assert with_bos.count(tokenizer.bos_token_id) == 1
    silent = train_tokenizer("bytes", adds_bos=False)
    silent.chat_template = tokenizer.chat_template
    assert prompt_ids(silent, template, "What?", "Be brief.") == with_bos[1:]
    assert prompt_ids(tokenizer, plain("<s>{query}{constitution}"), "What?", "Be brief.").count(1) == 1


WORDS = st.text(st.sampled_from(sorted(set("".join(CORPUS)) - set("[]/"))), min_size=1, max_size=40)
SAID = WORDS.filter(str.strip)
ANY = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(str.strip)


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_prompt_is_an_exact_prefix_and_every_text_survives(kind, name, data):
    tokenizer, template = TOKENIZERS[kind], PromptTemplate.load(name)
    query, *texts = (data.draw(SAID if kind == "metaspace" else ANY) for _ in range(5))
    group = tokenize_example(Example("a", query, texts[:2], texts[2:]), tokenizer, template)
    bos = [tokenizer.bos_token_id] if template.chat or kind != "bytes, no BOS" else []
    for constitution, prompt in zip(texts[:2], group.prompts, strict=True):
        text = template.render(query, constitution)
        if template.chat:
            text = f"[user]{text}[/][assistant]"
        assert prompt[: len(bos)].tolist() == bos and tokenizer.bos_token_id not in prompt[len(bos) :]
        assert tokenizer.decode(prompt[len(bos) :]) == text
        for response, ids in zip(texts[2:], group.responses, strict=True):
            space = "" if template.chat or response[0].isspace() else " "
            assert tokenizer.decode([*prompt[len(bos) :], *ids]) == text + space + response
