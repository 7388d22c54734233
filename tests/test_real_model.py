"""A real pretrained model on real text: the tree against the padded batch that one would run without it."""

from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
from tolerance import assert_same_gradients
from transformers import AutoModelForCausalLM, AutoTokenizer

from sami_fast import pack
from sami_fast.bundled import BundledModelMissing, bundled_model_path
from sami_fast.data import tokenize_example
from sami_fast.examples import Example, load_examples
from sami_fast.losses import infonce_loss
from sami_fast.prompts import PromptTemplate
from sami_fast.scoring import check_model, score

POSTS = Path(__file__).resolve().parents[2] / "shared" / "data" / "tldr_sample.jsonl"


@pytest.fixture(scope="module")
def pretrained():
    try:
        path = bundled_model_path()
    except BundledModelMissing as missing:
        pytest.skip(str(missing))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path)


def first_words(example: Example, query: int, constitution: int, response: int) -> Example:
    def cut(text: str, words: int) -> str:
        return " ".join(text.split()[:words])

    return replace(
        example,
        query=cut(example.query, query),
        constitutions=[cut(text, constitution) for text in example.constitutions],
        responses=[cut(text, response) for text in example.responses],
    )


@pytest.fixture(scope="module")
def post() -> Example:
    if not POSTS.exists():
        pytest.skip(f"no TL;DR posts: {POSTS} does not exist")
    return min(load_examples(POSTS), key=lambda example: sum(map(len, [example.query, *example.responses])))


@torch.no_grad()
@pytest.mark.parametrize("template", ["query_first", "constitution_first"])
def test_scores_of_a_real_post_are_those_of_the_padded_batch(template, pretrained, post):
    model, tokenizer = pretrained
    if template == "constitution_first":
        post = first_words(post, 60, 40, 40)
    group = tokenize_example(post, tokenizer, PromptTemplate.load(template))
    packed = pack([group])
    assert packed.token_ratio > 1.5
    actual = score(model, packed)
    (expected,) = oracle.padded_matrices(model, [group])
    assert float((actual.matrices[0] - expected).abs().max()) < 1e-4
    information = oracle.infonce(expected, [0, 1])[1]
    assert float(infonce_loss(actual).mutual_information) == pytest.approx(float(information), abs=1e-4)


EXAMPLE = Example(
    id="bicycle",
    query="How do I stop my bicycle chain from squeaking?",
    constitutions=["Answer in one short sentence.", "Answer with every detail that you can think of."],
    responses=[
        "Clean the chain and oil it.",
        "First wipe the chain with a dry cloth, then put a drop of oil on each link.",
    ],
)


def test_gradients_of_a_real_model_are_those_of_the_padded_batch(pretrained):
    model, tokenizer = pretrained
    group = tokenize_example(EXAMPLE, tokenizer, PromptTemplate.load("query_first"))

    def gradients(loss):
        found = torch.autograd.grad(loss, list(model.parameters()))
        return {name: g for (name, _), g in zip(model.named_parameters(), found, strict=True)}

    actual = infonce_loss(score(model, pack([group]))).loss
    expected = infonce_loss(oracle.padded_matrices(model, [group])).loss
    assert actual.item() == pytest.approx(expected.item(), abs=1e-5)
    # Thirty layers in float32, and a loss whose gradients nearly cancel.
    assert_same_gradients(gradients(actual), gradients(expected), slack=10)


def test_a_real_model_passes_the_check(pretrained):
    model, _ = pretrained
    assert check_model(model) < 1e-5
