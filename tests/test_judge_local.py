"""A local model as the judge, read by its log-odds of the two answers."""

import numpy as np
import pytest
import torch
from judge_pairs import lines, make_pairs
from text_factory import byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sami_fast.comparison import JudgeTemplate, judge_pairs
from sami_fast.judge import LocalJudge
from sami_fast.win_rate import Pair

pytest_plugins = ["judge_pairs"]


@pytest.mark.parametrize("chat", [False, True])
def test_a_local_judge_reads_the_likelier_letter(tmp_path, local, chat):
    model, tokenizer = local[0], byte_tokenizer()
    if chat:
        tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    pairs = [*make_pairs(3), Pair("plain", "No principles?", None, "One.", "Two!")]
    outcomes = judge_pairs(
        pairs, LocalJudge(model, tokenizer, "tiny", weights="w"), tmp_path / "v.jsonl", progress=False
    )
    template = JudgeTemplate.load("letter")
    for pair, outcome in zip(pairs, outcomes, strict=True):
        for order, (a, b) in enumerate(((pair.response, pair.against), (pair.against, pair.response))):
            text = template.render(pair.query, pair.constitution, a, b)
            ids = tokenizer.encode(f"<s>{text}</s>" if chat else text)
            space = [] if chat else tokenizer.encode(" ")
            letters = [tokenizer.encode(letter) for letter in "AB"]
            with torch.no_grad():
                logits = model(torch.tensor([ids + space])).logits[0, -1].double().log_softmax(-1)
            margin = float(logits[letters[0][0]] - logits[letters[1][0]])
            assert outcome.margins[order] == pytest.approx(margin, abs=1e-4)
            assert outcome.scores[order] == (margin > 0 if order == 0 else margin < 0)
    rows = lines(tmp_path / "v.jsonl")
    assert len(rows) == 8 and all(len(row["logprobs"]) == 2 and row["choice"] in "AB" for row in rows)


def test_a_local_judge_goes_on_with_half_a_pair(tmp_path, local):
    path, judge = tmp_path / "v.jsonl", LocalJudge(*local, "tiny", weights="w", max_tokens=4096)
    outcomes = judge_pairs(make_pairs(4), judge, path, progress=False)
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join(rows[:3]))
    for outcome, again in zip(outcomes, judge_pairs(make_pairs(4), judge, path, progress=False), strict=True):
        assert outcome.scores == again.scores and np.allclose(outcome.margins, again.margins, atol=1e-5)
    assert len(lines(path)) == 8 and path.read_text().splitlines(keepends=True)[:3] == rows[:3]


def test_a_local_judge_with_nothing_left_to_ask(tmp_path, local):
    path, judge = tmp_path / "v.jsonl", LocalJudge(*local, "tiny", weights="w", max_tokens=4096)
    same = [Pair("same", "Query?", None, "Equal.", "Equal.")]
    assert judge_pairs(same, judge, path, progress=False)[0].identical and not path.exists()
    first = judge_pairs(make_pairs(1), judge, path, progress=False)
    assert judge_pairs(make_pairs(1), judge, path, progress=False) == first


def test_a_local_judge_refuses_what_it_cannot_read(tmp_path, local):
    model, tokenizer = local
    long = [*make_pairs(1), Pair("long", "Query?", None, "word " * 500, "No.")]
    with pytest.raises(ValueError, match="pair 'long': expected at most 2048 tokens for this judge, got"):
        judge_pairs(long, LocalJudge(model, tokenizer, "tiny", weights="w"), tmp_path / "v.jsonl", progress=False)
    assert not (tmp_path / "v.jsonl").exists(), "nothing was asked"
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "x": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="judge: expected a tokenizer that tells A from B, got the ids"):
        LocalJudge(model, PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]"), "tiny", weights="w")
