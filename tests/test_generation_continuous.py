"""Continuous batching: the same ends and draws as `generate`, nothing left running, the model left as it was."""

import math

import pytest
import torch
from factory import tiny_model
from test_generation import PROMPTS, tokenizer  # noqa: F401

from sami_fast.continuous_generation import iter_responses
from sami_fast.generation import generate_responses


@pytest.fixture
def model():
    return tiny_model("llama", dtype=torch.float32)


def generate(model, tokenizer, prompts=PROMPTS, **options):  # noqa: F811
    options = {"max_new_tokens": 6, "progress": False} | options
    found = [response for batch in iter_responses(model, tokenizer, prompts, **options) for response in batch]
    return sorted(found, key=lambda response: (response.prompt, response.sample))


def test_likeliest_tokens_are_those_of_generate(model, tokenizer):  # noqa: F811
    sampling = dict(max_new_tokens=8, temperature=0, num_return_sequences=2)
    expected = generate_responses(model, tokenizer, PROMPTS, progress=False, **sampling)
    kept = model.config._attn_implementation, model.generation_config
    assert generate(model, tokenizer, **sampling) == expected
    assert (model.config._attn_implementation, model.generation_config) == kept
    assert generate(model, tokenizer, **sampling, batch_size=2, options={"num_blocks": 3}) == expected


def test_ends_and_stop_strings(model, tokenizer):  # noqa: F811
    whole = generate(model, tokenizer, temperature=0, max_new_tokens=8)
    end = whole[0].token_ids[2]
    model.generation_config.eos_token_id = end
    ended = generate(model, tokenizer, temperature=0, max_new_tokens=8)
    for before, after in zip(whole, ended, strict=True):
        length = before.token_ids.index(end) if end in before.token_ids else len(before.token_ids)
        assert after.token_ids == before.token_ids[:length] and after.finished == (length < 8)
    model.generation_config.eos_token_id = None
    stopped = generate(model, tokenizer, temperature=0, max_new_tokens=8, stop=[f"w{end}"])
    assert [r.text for r in stopped] == [r.text.partition(f"w{end}")[0] for r in whole] and stopped[0].finished


def test_what_is_done_already_is_left_out(model, tokenizer):  # noqa: F811
    done = {(1, 0), (3, 1), (0, 0)}
    rest = generate(model, tokenizer, num_return_sequences=2, done=done)
    everything = {(p, s) for p in range(len(PROMPTS)) for s in range(2)}
    assert [(r.prompt, r.sample) for r in rest] == sorted(everything - done)
    assert generate(model, tokenizer, num_return_sequences=2, done=everything) == []


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.3, 0.7)])
def test_draws_have_the_distribution_of_the_model(temperature, top_p, tokenizer):  # noqa: F811
    model, prompt, N = tiny_model("llama", vocab_size=12, dtype=torch.float32), [3, 4, 5], 1500
    sampling = dict(max_new_tokens=1, temperature=temperature, top_p=top_p, num_return_sequences=N)
    model.generation_config.top_k = 2  # set aside, as are all settings of the model but its end-of-sequence tokens
    drawn = generate(model, tokenizer, [prompt], **sampling)
    with torch.no_grad():
        p = (model(torch.tensor([prompt])).logits[0, -1].double() / temperature).softmax(-1)
    values, order = p.sort(descending=True)
    p[order[values.cumsum(0) - values >= top_p]] = 0
    p /= p.sum()
    tokens = [r.token_ids[0] if r.token_ids else tokenizer.eos_token_id for r in drawn]
    for token, count in enumerate(torch.bincount(torch.tensor(tokens), minlength=12).tolist()):
        expected = N * float(p[token])
        assert abs(count - expected) <= 5 * math.sqrt(expected * (1 - float(p[token]))) + (expected > 0)


def test_another_seed_draws_others_and_samples_differ(model, tokenizer):  # noqa: F811
    drawn = [generate(model, tokenizer, [PROMPTS[1]], num_return_sequences=4, seed=seed) for seed in (0, 1)]
    assert len({r.token_ids for responses in drawn for r in responses}) == 8


def test_a_consumer_that_stops_leaves_nothing_running(model, tokenizer):  # noqa: F811
    model.config.max_position_embeddings = 4096
    batches = iter_responses(model, tokenizer, PROMPTS * 40, max_new_tokens=200, progress=False)
    next(batches)
    batches.close()
    assert model.config._attn_implementation == "sdpa"
    assert len(generate(model, tokenizer)) == len(PROMPTS)


def test_what_transformers_gives_up_on_is_said(model, tokenizer):  # noqa: F811
    def fail(*_, **__):
        raise RuntimeError("the device is gone")

    model.forward = fail
    with pytest.raises(RuntimeError, match=r"generation.backend: continuous batching (failed: .*gone|ended with)"):
        generate(model, tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"options": {"blocks": 3}},
            "generation.continuous: expected arguments of ContinuousBatchingConfig: .*'blocks'",
        ),
        ({"top_p": 0}, "top_p: expected more than 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1"),
        ({"prompts": [[5], [3] * 60]}, r"prompts: the model has 64 positions, prompts\[1\] has 60 tokens"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(model, tokenizer, options, message):  # noqa: F811
    model.forward = lambda *_, **__: pytest.fail("the model ran")
    with pytest.raises(ValueError, match=message):
        generate(model, tokenizer, **options)
