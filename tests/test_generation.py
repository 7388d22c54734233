"""Sampling: drawn from the right distribution, the same however it is batched, the model left as it was. Filters."""

import copy
import itertools

import pytest
import torch
from factory import tiny_model
from text_factory import byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from sami_fast.generation import filter_responses, generate_responses, iter_responses, trim_to_sentence

PROMPTS = [[5], [7, 8, 9, 10, 11, 12], [20, 21, 22], [7, 8, 9, 10, 11, 13], [30, 31, 32, 33, 34, 35, 36, 37, 38]]


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, 97))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture
def model():
    return tiny_model("llama")


def generate(model, tokenizer, prompts=PROMPTS, **options):
    return generate_responses(model, tokenizer, prompts, **{"max_new_tokens": 6, "progress": False} | options)


def test_a_response_depends_on_its_prompt_and_the_seed_alone(model, tokenizer):
    expected = generate(model, tokenizer, num_return_sequences=2, batch_size=10)
    assert [(r.prompt, r.sample) for r in expected] == [(p, s) for p in range(len(PROMPTS)) for s in range(2)]
    state = torch.get_rng_state()
    for batch_size in (1, 3):
        torch.rand(batch_size)
        assert generate(model, tokenizer, num_return_sequences=2, batch_size=batch_size) == expected
    rest = generate(model, tokenizer, PROMPTS[3:], num_return_sequences=2)
    assert [r.token_ids for r in rest] == [r.token_ids for r in expected[6:]]
    torch.set_rng_state(state)
    other_seed = generate(model, tokenizer, num_return_sequences=2, seed=1)
    assert all(a.token_ids != b.token_ids for a, b in zip(expected, other_seed, strict=True))
    assert torch.equal(torch.get_rng_state(), state), "the global random state was used"


def test_what_is_done_already_is_left_out_and_the_rest_is_the_same(model, tokenizer):
    prompts = [*PROMPTS, PROMPTS[1]]  # the last counts as a further sample of the second
    expected = generate(model, tokenizer, prompts, num_return_sequences=2)
    done = {(1, 0), (5, 0), (3, 1), (0, 0)}
    rest = generate(model, tokenizer, prompts, num_return_sequences=2, done=done)
    assert rest == [r for r in expected if (r.prompt, r.sample) not in done] and len(rest) == 8
    everything = {(p, s) for p in range(6) for s in range(2)}
    assert generate(model, tokenizer, prompts, num_return_sequences=2, done=everything) == []


def test_equal_prompts_and_further_samples_are_drawn_anew(model, tokenizer):
    samples = generate(model, tokenizer, [PROMPTS[1]], num_return_sequences=4)
    assert len({r.token_ids for r in samples}) == 4
    repeated = generate(model, tokenizer, [PROMPTS[1]] * 4)
    assert [r.token_ids for r in repeated] == [r.token_ids for r in samples]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.3, 0.7)])
def test_draws_have_the_distribution_of_the_model(temperature, top_p, tokenizer):
    model, prompt, N = tiny_model("llama", vocab_size=12), [3, 4, 5], 3000
    drawn = generate(
        model,
        tokenizer,
        [prompt],
        max_new_tokens=1,
        num_return_sequences=N,
        batch_size=N,
        temperature=temperature,
        top_p=top_p,
    )
    with torch.no_grad():
        p = (model(torch.tensor([prompt])).logits[0, -1].double() / temperature).softmax(-1)
    values, order = p.sort(descending=True)
    outside = values.cumsum(0) - values >= top_p
    p[order[outside]] = 0
    p /= p.sum()
    tokens = [r.token_ids[0] if r.token_ids else tokenizer.eos_token_id for r in drawn]
    count = torch.bincount(torch.tensor(tokens), minlength=12).double()
    assert count[p == 0].sum() == 0
    expected = N * p[p > 0]
    assert ((count[p > 0] - expected).abs() < 5 * (expected * (1 - p[p > 0])).sqrt() + 1).all()


def test_temperature_zero_takes_the_likeliest_token_without_padding_effects(model, tokenizer):
    for response in generate(model, tokenizer, temperature=0):
        ids = list(PROMPTS[response.prompt])
        for token in response.token_ids:
            with torch.no_grad():
                assert token == model(torch.tensor([ids])).logits[0, -1].argmax()
            ids.append(token)


def test_settings_of_the_model_are_set_aside_and_put_back(model, tokenizer):
    expected = generate(model, tokenizer)
    own = GenerationConfig(do_sample=True, top_k=1, repetition_penalty=9.0, max_length=3, eos_token_id=2)
    model.generation_config = own
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    assert generate(model, tokenizer) == expected
    batches = iter_responses(model, tokenizer, PROMPTS, max_new_tokens=2, batch_size=2, progress=False)
    assert [r.prompt for r in next(batches)] == [4, 1], "the longest prompts come first"
    assert model.generation_config is own and [module.training for module in model.modules()] == modes
    batches.close()
    model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, tokenizer)
    assert model.generation_config is own and [module.training for module in model.modules()] == modes


def test_a_lora_model_is_sampled_and_left_alone(model, tokenizer):
    peft = pytest.importorskip("peft")
    expected = generate(model, tokenizer)
    config = model.generation_config
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    assert generate(adapted, tokenizer) == expected, "a fresh adapter changes nothing"
    assert adapted.generation_config is config and adapted.get_base_model().generation_config is config


def test_ends(model, tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = model.generation_config.eos_token_id = None
    cut_off = generate(model, endless, max_new_tokens=8)
    assert all(len(r.token_ids) == 8 and not r.finished for r in cut_off)
    ends = {r.token_ids[3] for r in cut_off[1:]} | {tokenizer.eos_token_id}
    model.generation_config.eos_token_id = sorted(ends - {tokenizer.eos_token_id})
    for before, after in zip(cut_off, generate(model, tokenizer, max_new_tokens=8), strict=True):
        expected = list(itertools.takewhile(lambda token: token not in ends, before.token_ids))
        assert list(after.token_ids) == expected and after.finished == (len(expected) < 8)
        assert after.text == tokenizer.decode(expected)


def test_stop_strings(model):
    tokenizer = byte_tokenizer(map(chr, range(33, 127)))
    tokenizer.eos_token = model.generation_config.eos_token_id = None
    plain = generate(model, tokenizer, max_new_tokens=12)
    end = len(tokenizer.decode(plain[2].token_ids)) // 2
    stop = ["never seen", plain[2].text[end : end + 2]]
    for before, after in zip(plain, generate(model, tokenizer, max_new_tokens=12, stop=stop), strict=True):
        place = before.text.find(stop[1])
        assert after.finished == (place >= 0)
        assert after.text == (before.text[:place] if place >= 0 else before.text)
        assert after.token_ids == before.token_ids[: len(after.token_ids)]
        assert tokenizer.decode(after.token_ids) == after.text


def test_no_broken_character_at_a_cut():
    tokenizer, model = byte_tokenizer(pre_tokenizers.ByteLevel.alphabet()), tiny_model("llama", vocab_size=259)
    responses = generate(model, tokenizer, num_return_sequences=8, max_new_tokens=2)
    assert any(len(r.token_ids) < 2 for r in responses), "random bytes are rarely whole characters"
    for response in responses:
        assert not response.text.endswith("\ufffd")
        assert tokenizer.decode(response.token_ids) == response.text


def test_texts_get_the_special_tokens_once(model, tokenizer, monkeypatch):
    bare, special = [7, 8], [1, 7, 8]
    encode = type(tokenizer).__call__

    def with_bos(self, text, add_special_tokens=True):
        encoded = encode(self, text, add_special_tokens=False)
        encoded["input_ids"] = [1] * add_special_tokens + encoded["input_ids"]
        return encoded

    monkeypatch.setattr(type(tokenizer), "__call__", with_bos)
    expected = [generate(model, tokenizer, [ids])[0].token_ids for ids in (special, special, bare)]
    assert [generate(model, tokenizer, [p])[0].token_ids for p in ("w7 w8", "<s> w7 w8", bare)] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"num_return_sequences": -1}, "num_return_sequences: expected at least 1, got -1"),
        ({"temperature": -0.5}, "temperature: expected a finite number of at least 0, got -0.5"),
        ({"temperature": float("nan")}, "temperature: .* got nan"),
        ({"top_p": 0}, "top_p: expected more than 0 and at most 1, got 0"),
        ({"top_p": 1.5}, "top_p: .* got 1.5"),
        ({"stop": ["a", ""]}, "stop: expected strings that are not empty"),
        ({"prompts": [[3], []]}, r"prompts: .* got none in prompts\[1\]"),
        ({"prompts": [[3] * 60]}, r"the model has 64 positions, prompts\[0\] has 60 tokens and max_new_tokens is 6"),
        ({"prompts": "one text"}, "prompts: expected a list of texts or token ids, got one text"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(model, tokenizer, options, message):
    options = {"prompts": PROMPTS, "max_new_tokens": 6} | options
    with pytest.raises(ValueError, match=message):
        iter_responses(model, tokenizer, **options)  # not even asked for its first batch


def test_nothing_to_do(model, tokenizer):
    assert generate(model, tokenizer, []) == []


def test_filters_remove_and_count():
    groups = [
        ["The sky is blue.", "A long answer."],
        ["Yes.", " yes. "],
        ["Fine.<|im_start|>user", "Also fine."],
        ["   ", "Text."],
        ["An answer.\nUser: and then?", "[INST] What?"],
        ["See ### Response for it.", "He asked: User: who?"],
    ]
    filtered = filter_responses(groups)
    assert filtered.texts == [groups[0], [None, None], [None, "Also fine."], [None, "Text."], [None, None], groups[5]]
    assert filtered.counts == {"leftover": 3, "trimmed": 0, "unfinished": 0, "empty": 1, "identical": 2, "kept": 6}
    assert sum(filtered.counts.values()) == 12


def test_identical_responses_matter_across_constitutions_only():
    group = ["Same.", "same. ", "Other.", "Same.", "Other."]
    assert filter_responses([group], [[0, 0, 1, 0, 1]]).texts == [group]
    assert filter_responses([group], [[0, 0, 1, 1, 1]]).texts == [[None, None, "Other.", None, "Other."]]


def test_filters_trim_and_take_further_markers():
    groups = [["One. Two and", "1. First thing.\n2. Sec"], ["Ends so", "Guidelines: one. Two"]]
    filtered = filter_responses(groups, trim=True, markers=["Guidelines:"], finished=[[False, False], [True, False]])
    assert filtered.texts == [["One.", "1. First thing."], ["Ends so", None]]
    assert filtered.counts == {"leftover": 1, "trimmed": 2, "unfinished": 0, "empty": 0, "identical": 0, "kept": 3}
    for name in ("positives", "finished"):
        with pytest.raises(ValueError, match=f"{name}: expected the shape of groups"):
            filter_responses(groups, **{name: [[0, 1]]})


def test_unfinished_sentences_are_dropped_when_asked_for():
    groups = [["Whole one. ", "Half a"], ["1.", 'He said "no."'], ["One. Two and", "  "]]
    filtered = filter_responses(groups, drop_unfinished=True)
    assert filtered.texts == [["Whole one. ", None], [None, 'He said "no."'], [None, None]]
    assert filtered.counts == {"leftover": 0, "trimmed": 0, "unfinished": 3, "empty": 1, "identical": 0, "kept": 2}
    trimmed = filter_responses(groups, drop_unfinished=True, trim=True)
    assert trimmed.texts[2] == ["One.", None] and trimmed.counts["unfinished"] == 2


@pytest.mark.parametrize(
    ("text", "trimmed"),
    [
        ("One. Two! Three? Fo", "One. Two! Three?"),
        ('He said "no." And', 'He said "no."'),
        ("In 1990. Then", "In 1990."),
        ("It costs 3.50 and", "It costs 3.50 and"),
        ("Steps.\n\n1. Wash it.\n2.", "Steps.\n\n1. Wash it."),
        ("See this. For example, e.g. a", "See this."),
        ("No end at all", "No end at all"),
        ("", ""),
    ],
)
def test_trim_to_sentence(text, trimmed):
    assert trim_to_sentence(text) == trimmed
