"""The one factory of tokenizers: every kind that a prefix tree meets, small and trained on the spot."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sami_fast.examples import Example

CORPUS = [
    "The post is about a person who wants to lose weight and get in shape for the summer.",
    "Summaries should be brief and to the point, avoiding unnecessary details.\nResponse: a summary.",
    "Query: what is {query} in a template? Constitution: {constitution}; it's 42, isn't it?",
] * 4
CHAT = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[/]{% endfor %}[assistant]"


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
EXAMPLE = Example("a", "What is the point?", ["Be brief.", "Be thorough."], ["It is brief.", "It is about details."])


def byte_tokenizer(alphabet: Iterable[str] | None = None) -> PreTrainedTokenizerFast:
    """A token for each byte, or for those of `alphabet` alone; no merges."""
    alphabet = pre_tokenizers.ByteLevel.alphabet() if alphabet is None else alphabet
    table = {"<unk>": 0, "<s>": 1, "</s>": 2, **{c: i for i, c in enumerate(sorted(alphabet), 3)}}
    tokenizer = Tokenizer(models.BPE(table, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
