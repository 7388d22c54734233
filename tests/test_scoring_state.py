"""Scoring leaves the model as it was found."""

import pytest
import torch
from factory import perturbed, tiny_config, tiny_model
from scored_models import ADAPTERS, adapted, assert_exact_on, objective, two_trees
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from sami_fast import pack
from sami_fast.scoring import check_model, score

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")


def multimodal() -> nn.Module:
    """A text model inside a vision-language model: configs within configs, each with an attention setting."""
    text = tiny_config("gemma3_text").to_dict()
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=28)
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=dict(patch_size=14, **vision), mm_tokens_per_image=4
    )
    settings = {"text_config": "eager", "vision_config": "sdpa"}
    return perturbed(AutoModelForCausalLM.from_config(config, attn_implementation=settings, dtype=torch.float32))


def settings_of(config) -> list[str]:
    """Attention settings of a config and of all inside it."""
    parts = [part for name in config.sub_configs if (part := getattr(config, name, None)) is not None]
    return [config._attn_implementation, *(setting for part in parts for setting in settings_of(part))]


def traces(model: nn.Module) -> list:
    """All that scoring touches for the time of a call."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_gradient_checkpointing_func", "forward")
    held = [{name: m.__dict__.get(name) for name in names} for m in model.modules()]
    parts = [{name: dict(v) if isinstance(v, dict) else v for name, v in part.items()} for part in held]
    needs = [p.requires_grad for p in model.parameters()]
    return [settings_of(model.config), parts, [m.training for m in model.modules()], needs]


LEFT_AS_FOUND = {
    "llama": tiny_model,
    "llama, eager": lambda: tiny_model(attn_implementation="eager"),
    "gpt2": lambda: tiny_model("gpt2"),
    "gemma2": lambda: tiny_model("gemma2", dtype=torch.float32),
    "gpt_oss": lambda: tiny_model("gpt_oss"),
    "multimodal": multimodal,
    "adapters": lambda: adapted(tiny_model(), **ADAPTERS["saved head"]),
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", LEFT_AS_FOUND)
def test_the_model_is_left_as_it_was_found(name, checkpointing):
    model, ids = LEFT_AS_FOUND[name](), torch.arange(3, 15)[None]
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def behaviour():
        generated = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        return model(input_ids=ids).logits, model(input_ids=generated, use_cache=False).logits, generated

    before, found = behaviour(), traces(model)
    model.train(checkpointing)
    scores = score(model, pack(two_trees()), ref_model=model if name == "adapters" else None)
    model.train(False)
    assert traces(model) == found
    objective(scores.matrices).backward()
    assert traces(model) == found
    check_model(model.train())
    assert all(m.training for m in model.modules())
    model.eval()
    assert traces(model) == found
    for a, b in zip(behaviour(), before, strict=True):
        assert torch.equal(a, b)


class Boom(Exception):
    pass


@pytest.mark.parametrize("where", ["embedding", "first layer", "last layer", "head", "backward"])
def test_the_model_is_left_as_it_was_found_by_errors(where):
    model, ids, packed = tiny_model(), torch.arange(3, 15)[None], pack(two_trees())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    logits = model(input_ids=ids, use_cache=False).logits
    layers = model.model.layers
    places = {"embedding": model.model.embed_tokens, "first layer": layers[0].self_attn.q_proj, "head": model.lm_head}
    loss = objective(score(model, packed).matrices) if where == "backward" else None

    def explode(*_):
        raise Boom("boom")

    handle = places.get(where, layers[1].mlp).register_forward_pre_hook(explode)
    found = traces(model)
    with pytest.raises(Boom):
        loss.backward() if where == "backward" else score(model, packed)
    assert traces(model) == found
    handle.remove()
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, logits)
    assert_exact_on(model.eval(), two_trees())
