"""Files in, groups out: every way bad data is refused, templates, and the exact prefix."""

import gzip
import json
import logging
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sami_fast.data import (
    Example,
    GroupDataset,
    PromptTemplate,
    load_examples,
    prompt_ids,
    response_ids,
    tokenize_example,
    train_test_split,
)
from sami_fast.prefix_tree import pack

BUILT_IN = ("query_first", "constitution_first", "query_first_chat", "constitution_first_chat")
CORPUS = [
    "The post is about a person who wants to lose weight and get in shape for the summer.",
    "Summaries should be brief and to the point, avoiding unnecessary details.\nResponse: a summary.",
    "Query: what is {query} in a template? Constitution: {constitution}; it's 42, isn't it?",
] * 4
CHAT = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[/]{% endfor %}[assistant]"
ROW = {"id": "a", "query": "Why?", "constitutions": ["brief", "long"], "responses": ["Because.", "Well, because."]}
EXAMPLE = Example("a", "What is the point?", ["Be brief.", "Be thorough."], ["It is brief.", "It is about details."])


def train_tokenizer(kind: str, *, adds_bos: bool = True, adds_eos: bool = False) -> PreTrainedTokenizerFast:
    """`bytes`: byte-level BPE as GPT-2's. `metaspace`: BPE that puts a space before every text, as Llama 2's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)  # no merge across words
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
        alphabet = [*map(chr, range(33, 127)), "\n"]
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False, max_token_length=12
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    form = f"{'<s> ' * adds_bos}$A{' </s>' * adds_eos}"
    tokenizer.post_processor = processors.TemplateProcessing(form, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=CHAT
    )


TOKENIZERS = {
    "bytes": train_tokenizer("bytes"),
    "bytes, no BOS": train_tokenizer("bytes", adds_bos=False),
    "bytes, BOS and EOS": train_tokenizer("bytes", adds_eos=True),
    "metaspace": train_tokenizer("metaspace"),
}
BYTES, METASPACE = TOKENIZERS["bytes"], TOKENIZERS["metaspace"]


def write(path: Path, *rows: dict | str) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# Loading


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


# Templates

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


# Tokenisation

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


def test_eos_is_appended_when_scored_and_never_to_a_prompt():
    template = PromptTemplate.load("query_first")
    for tokenizer in TOKENIZERS.values():
        bare = tokenize_example(EXAMPLE, tokenizer, template)
        scored = tokenize_example(EXAMPLE, tokenizer, template, score_eos=True)
        for prompt in bare.prompts:
            assert tokenizer.eos_token_id not in prompt
        for one, other in zip(bare.responses, scored.responses, strict=True):
            assert tokenizer.eos_token_id not in one
            assert other.tolist() == [*one, tokenizer.eos_token_id]
        assert response_ids(tokenizer, template, "It.</s>", score_eos=True).count(tokenizer.eos_token_id) == 1


def test_tokenizer_without_eos_or_chat_template():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(BYTES.backend_tokenizer.to_str()))
    template = PromptTemplate.load("query_first")
    assert len(tokenize_example(EXAMPLE, tokenizer, template).responses) == 2
    with pytest.raises(ValueError, match="tokenizer: expected one with an EOS token for score_eos"):
        tokenize_example(EXAMPLE, tokenizer, template, score_eos=True)
    with pytest.raises(ValueError, match=r"tokenizer: expected one with a chat template for .*query_first"):
        tokenize_example(EXAMPLE, tokenizer, template, chat=True)


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


def test_chat_argument_overrides_the_template():
    chat, flat = PromptTemplate.load("query_first_chat"), PromptTemplate.load("query_first")
    for template in (chat, flat):
        texts = [
            BYTES.decode(tokenize_example(EXAMPLE, BYTES, template, chat=c).prompts[0]) for c in (None, True, False)
        ]
        assert texts[1].startswith("<s>[user]") and texts[1].endswith("[/][assistant]")
        assert "[user]" not in texts[2]
        assert texts[0] == texts[1 if template is chat else 2]


def test_too_long_names_the_example_its_length_and_the_limit():
    template = PromptTemplate.load("query_first")
    group = tokenize_example(EXAMPLE, BYTES, template)
    length = max(map(len, group.prompts)) + max(map(len, group.responses))
    assert tokenize_example(EXAMPLE, BYTES, template, max_length=length).id == "a"
    message = f"example 'a': expected at most max_length={length - 1} tokens, got {length}$"
    with pytest.raises(ValueError, match=message):
        tokenize_example(EXAMPLE, BYTES, template, max_length=length - 1)


@pytest.mark.parametrize("chat", [False, True])
def test_query_first_shares_the_query(chat):
    query = CORPUS[0] * 20
    example = Example("a", query, ["Be brief.", "Avoid details."], ["It is.", "It is about a person."])
    group = tokenize_example(example, BYTES, PromptTemplate.load("query_first_chat" if chat else "query_first"))
    shared = next(i for i, (a, b) in enumerate(zip(*group.prompts, strict=False)) if a != b)
    assert shared >= len(BYTES.encode(query))
    other = tokenize_example(example, BYTES, PromptTemplate.load("constitution_first"), chat=chat)
    assert len(pack([group]).input_ids) < 0.6 * len(pack([other]).input_ids)


def test_positives_and_mask_reach_the_group():
    mask = [[True, True, False], [True, True, True]]
    example = Example("a", "Why?", ["brief", "long"], ["1", "2", "3"], [0, 1, 1], mask)
    group = tokenize_example(example, BYTES, PromptTemplate.load("query_first"))
    assert (group.positives.tolist(), group.mask.tolist(), group.shape, group.id) == ([0, 1, 1], mask, (2, 3), "a")


# Data sets


def test_group_dataset_from_source_logs_what_it_read(tmp_path, caplog):
    more = ROW | {"id": "b", "responses": ["1", "2", "3"], "positives": [0, 1, 1]}
    path = write(tmp_path / "data.jsonl", ROW, more, ROW | {"id": "c"})
    with caplog.at_level(logging.INFO, logger="sami_fast"):
        data = GroupDataset.from_source(path, BYTES, limit=2, score_eos=True)
    assert [group.id for group in data] == ["a", "b"] and len(data) == 2
    assert data[1].responses[0][-1] == BYTES.eos_token_id
    tokens = [len(prompt) for group in data for prompt in group.prompts]
    assert "2 groups, plain prompts from " in caplog.text and "query_first.txt" in caplog.text
    assert "constitutions 2 to 2, responses 2 to 3" in caplog.text
    assert f"mean tokens of a prompt {sum(tokens) / 4:.1f}" in caplog.text
    with pytest.raises(ValueError, match="groups: expected at least one"):
        GroupDataset([])


def test_group_dataset_takes_template_files_and_chat(tmp_path, caplog):
    (tmp_path / "mine.txt").write_text("{constitution}|{query}|\n")
    examples = [EXAMPLE]
    data = GroupDataset.from_examples(examples, BYTES, tmp_path / "mine.txt")
    assert BYTES.decode(data[0].prompts[0]) == "<s>Be brief.|What is the point?|"
    with caplog.at_level(logging.INFO, logger="sami_fast"):
        data = GroupDataset.from_examples(examples, BYTES, PromptTemplate.load(tmp_path / "mine.txt"), chat=True)
    assert BYTES.decode(data[0].prompts[0]) == "<s>[user]Be brief.|What is the point?|[/][assistant]"
    assert "chat prompts" in caplog.text


def test_train_test_split(caplog):
    examples = [Example(str(i), f"Why {i}?", ["a"], ["b"]) for i in range(10)]
    train, test = train_test_split(examples, 3, seed=1)
    assert (len(train), len(test)) == (7, 3)
    assert sorted(train + test, key=examples.index) == examples
    assert train == sorted(train, key=examples.index) and test == sorted(test, key=examples.index)
    assert train_test_split(examples, 0.3, seed=1) == (train, test)
    assert any(train_test_split(examples, 3, seed=seed)[1] != test for seed in range(2, 6))
    for held_out in (0, 10, -1, 0.01, 1.0):
        with pytest.raises(ValueError, match="held_out: expected 1 to 9 of 10 examples"):
            train_test_split(examples, held_out)
    assert not caplog.records
    train_test_split([Example(str(i), "Why?", ["a"], ["b"]) for i in range(4)], 2)
    assert "1 queries are in the training and in the held-out part" in caplog.text


def test_real_posts():
    path = Path(__file__).parents[2] / "shared" / "data" / "tldr_sample.jsonl"
    if not path.exists():
        pytest.skip("no sample of real posts beside the repository")
    examples = load_examples(path)
    assert len(examples) == 26 and examples[0].query.startswith("POST: ") and len(examples[0].constitutions) == 2
    trained = load_examples(path, fields={"responses": "responses_trained"})
    assert trained[0].responses != examples[0].responses
    data = GroupDataset.from_examples(examples, BYTES)
    for example, group in zip(examples, data, strict=True):
        assert BYTES.decode(group.responses[1]) == " " + example.responses[1].lstrip(" ")
