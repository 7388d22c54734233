"""Examples become groups: the exact prefix, ends, lengths, and the data set."""

import logging
from pathlib import Path

import pytest
from test_examples import ROW, write
from text_factory import BYTES, CORPUS, EXAMPLE, TOKENIZERS
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from sami_fast.data import GroupDataset, tokenize_example, train_test_split
from sami_fast.examples import Example, load_examples
from sami_fast.prefix_tree import pack
from sami_fast.prompts import PromptTemplate, response_ids


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
