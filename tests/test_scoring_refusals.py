"""What cannot be scored exactly is refused by name."""

import peft
import pytest
import torch
from factory import perturbed, tiny_config, tiny_model
from scored_models import SMALL, assert_exact_on, two_trees
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention

from sami_fast import Group, pack
from sami_fast.scoring import UnsupportedModelError, score

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")


@pytest.mark.parametrize("method", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_virtual_tokens_are_refused(method):
    options = dict(encoder_hidden_size=8) if method == "PromptEncoderConfig" else {}
    config = getattr(peft, method)(num_virtual_tokens=3, task_type="CAUSAL_LM", **options)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM"):
        score(peft.get_peft_model(tiny_model(dtype=torch.float32), config), pack(two_trees()))


def test_a_sharded_head_is_refused_by_name(tmp_path):
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tiny_model(tie_word_embeddings=False)
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)]))
        with pytest.raises(ValueError, match=r"output embedding is sharded \(DTensor\)"):
            score(model, pack(two_trees()))
    finally:
        torch.distributed.destroy_process_group()


REFUSED = {
    # Attention of their own: they would ignore the tree in silence.
    "BloomForCausalLM": dict(family="bloom"),
    "FalconForCausalLM": dict(family="falcon"),
    "MptForCausalLM": dict(family="mpt"),
    "GPTJForCausalLM": dict(family="gptj", rotary_dim=4),
    "GPTNeoForCausalLM": dict(
        family="gpt_neo", num_layers=2, attention_types=[[["global", "local"], 1]], max_position_embeddings=64
    ),
    # Keyword arguments dropped on the way, or a mask of their own.
    "NemotronAttention": dict(family="nemotron", intermediate_size=48, num_key_value_heads=2, head_dim=8),
    "DogeForCausalLM": dict(family="doge", intermediate_size=48, num_key_value_heads=2),
    # State outside of attention.
    "MambaForCausalLM": dict(family="mamba"),
    "FalconH1ForCausalLM": dict(family="falcon_h1", intermediate_size=48, num_key_value_heads=2),
    "RecurrentGemmaForCausalLM": dict(
        family="recurrent_gemma", intermediate_size=48, lru_width=32, num_hidden_layers=3
    ),
    "Lfm2ForCausalLM": dict(
        family="lfm2", intermediate_size=48, num_key_value_heads=2, layer_types=["conv", "full_attention"]
    ),
    # Attention in both directions, positions that are not ours, windows that the attention is not told.
    "BertLMHeadModel": dict(family="bert", intermediate_size=48),
    "BartForCausalLM": dict(
        family="bart", d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, pad_token_id=1
    ),
    "PhimoeForCausalLM": dict(
        family="phimoe", intermediate_size=48, num_key_value_heads=2, num_local_experts=4, sliding_window=6
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_families_are_refused_by_name(name):
    options = SMALL | REFUSED[name]
    config = AutoConfig.for_model(options.pop("family"), **options)
    model = perturbed(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    with pytest.raises(UnsupportedModelError, match=f"model: {name} "):
        score(model, pack(two_trees()))


def test_what_is_no_causal_lm_is_refused():
    sizes = dict(vocab_size=97, d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4)
    encoder_decoder = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes))
    with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration is an encoder-decoder"):
        score(encoder_decoder, pack(two_trees()))
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no output embeddings"):
        score(LlamaModel(tiny_config("llama")), pack(two_trees()))


class OwnAttention(LlamaAttention):
    """Attends by itself."""

    def forward(self, hidden_states, position_embeddings, **kwargs):
        return self.o_proj(self.q_proj(hidden_states).cumsum(1)), None


class DeafAttention(LlamaAttention):
    """Drops the keyword arguments that it does not know."""

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        return super().forward(hidden_states, position_embeddings, attention_mask)


class DoubledLlama(LlamaForCausalLM):
    """Has logits that its config does not tell."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


def test_a_single_layer_that_does_not_attend_through_the_interface_is_noticed():
    model = tiny_model()
    model.model.layers[1].self_attn.__class__ = OwnAttention
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM .*: 1 of its 2 layers attend through"):
        score(model, pack(two_trees()))


def test_a_layer_that_drops_our_arguments_is_named():
    model = tiny_model()
    model.model.layers[1].self_attn.__class__ = DeafAttention
    with pytest.raises(UnsupportedModelError, match="DeafAttention dropped the keyword arguments"):
        score(model, pack(two_trees()))


def test_logits_that_the_config_does_not_tell_are_refused():
    model = perturbed(DoubledLlama(tiny_config("llama")).double())
    with pytest.raises(UnsupportedModelError, match=r"DoubledLlama .* its logits are not"):
        score(model, pack(two_trees()))


def test_attention_dropout_is_refused_in_training_only():
    model = tiny_model(attention_dropout=0.1)
    assert_exact_on(model, two_trees())
    with pytest.raises(ValueError, match=r"attention dropout must be 0 to score exactly, got 0.1 in LlamaAttention"):
        score(model.train(), pack(two_trees()))


def test_packs_that_do_not_fit_the_model_are_refused():
    model = tiny_model()
    bad = {
        "packed: expected token ids below the vocabulary size 97, got 97": [Group([[1, 97]], [[2, 3]])],
        "packed: expected token ids below the vocabulary size 97, got 98": [Group([[1]], [[2, 98]])],  # a label only
        "packed: expected sequences of at most 64 tokens, .* of LlamaForCausalLM, got 65": [
            Group([[1] * 60], [[2] * 5])
        ],
    }
    for message, groups in bad.items():
        with pytest.raises(ValueError, match=message):
            score(model, pack(groups))
    with torch.no_grad():
        assert score(model, pack([Group([[1] * 60], [[2] * 4])])).token_logprobs.isfinite().all()
    with pytest.raises(ValueError, match="packed: expected tensors on cpu as the model is, got meta"):
        score(model, pack(two_trees()).to("meta"))
    with pytest.raises(ValueError, match="backend: expected one of"):
        score(model, pack(two_trees()), backend="magic")
