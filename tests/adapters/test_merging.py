"""Merged into a plain model and out again: only what must change changes, and all of it back."""

import pytest
import torch
import transformers as hf
from conftest import batch, close, logits, tiny, train, values
from test_adapters import causal, flags, same, tuned

from beft_ext import (
    AdapterError,
    load_adapter,
    merge_adapter,
    prepare,
    restore,
    save_adapter,
    set_adapter,
    unmerge_adapter,
)
from beft_ext.adapters.applying import Adapters, Merged
from beft_ext.models import state
from beft_ext.training.preparation import prepared_of

FLAGS = {("value",): {"attention_bias"}, ("mlp_up",): {"mlp_bias"}}
FLAGS[("value", "mlp_down")] = {"attention_bias", "mlp_bias"}


@pytest.mark.parametrize("terms", FLAGS)
def test_the_fewest_flags_that_make_place_are_set(terms):
    """What they bring along beside the trained biases is zero."""
    model = tiny("llama")
    before, own = flags(model), set(values(model))
    prepared = prepare(model, terms)
    train(model)
    merge_adapter(model)
    after = flags(model)
    assert {k for k in after if after[k] != before[k]} == FLAGS[terms]
    fresh = hf.AutoModelForSequenceClassification.from_config(model.config)
    assert set(values(fresh)) == set(values(model))
    brought = set(values(model)) - own - set(prepared.added)
    assert brought and not any(values(model)[n].any() for n in brought)
    assert model.model.layers[0].mlp.up_proj.weight.requires_grad


def test_tied_embeddings_are_no_hindrance(tmp_path):
    model = causal(tied=True)
    ids = batch()["input_ids"]
    prepare(model, "value")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.bias.fill_(0.5)
    merge_adapter(model)
    model.save_pretrained(tmp_path)
    again = hf.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_an_output_bias_takes_in_the_value_bias_and_gives_it_back():
    """GPT-Neo: ``b_o + W_o b_v``, to the rounding of one addition in float64."""
    model = tiny("gpt-neo")
    prepare(model, "value")
    train(model)
    attentions = [block.attn.attention for block in model.transformer.h]
    weights = [a.out_proj.weight.detach().double().numpy() for a in attentions]
    values_ = [a.v_proj.bias.detach().double().numpy() for a in attentions]
    outputs = [a.out_proj.bias.detach().clone() for a in attentions]
    objects = [a.v_proj.bias for a in attentions]
    merge_adapter(model)
    for attention, w, v, o in zip(attentions, weights, values_, outputs, strict=True):
        assert attention.v_proj.bias is None and v.any()
        want = torch.from_numpy(o.double().numpy() + w @ v).float()
        torch.testing.assert_close(attention.out_proj.bias.detach(), want, rtol=0, atol=1e-7)
    unmerge_adapter(model)
    for attention, o, kept in zip(attentions, outputs, objects, strict=True):
        assert attention.v_proj.bias is kept and torch.equal(attention.out_proj.bias, o)


@pytest.mark.parametrize("name", ["llama", "gpt-neo"])
def test_a_merged_adapter_comes_out_active_and_guarded(name, tmp_path):
    _, want = tuned(name, tmp_path)
    model = tiny(name)
    base = values(model)
    load_adapter(model, tmp_path, "mine")
    loaded = values(model)
    merge_adapter(model)
    assert state.get(model, Adapters) is None
    model.load_state_dict(model.state_dict())  # a plain model takes it
    unmerge_adapter(model)
    assert state.get(model, Merged) is None and same(model, loaded)
    with pytest.raises(AdapterError, match=r"set_adapter\(model, None\) first"):
        model.load_state_dict(model.state_dict())
    close(logits(model), want)
    set_adapter(model, None)
    model.load_state_dict(base)
    assert same(model, base)
    assert not any(m._load_state_dict_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["bert", "llama", "gpt-neo"])
def test_merged_training_comes_out_prepared(name):
    model = tiny(name)
    prepared = prepare(model, "value")
    train(model)
    trained = values(model)
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    merge_adapter(model)
    assert prepared_of(model) is None and state.get(model, Adapters) is None
    with pytest.raises(AdapterError, match="nothing to save"):
        save_adapter(model, "nowhere")
    unmerge_adapter(model)
    assert prepared_of(model) is prepared and same(model, trained)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == required
    with pytest.raises(AdapterError, match="no adapter is merged"):
        unmerge_adapter(model)
    restore(model)


def test_an_adapter_that_is_not_active_is_not_merged(tmp_path):
    tuned("bert", tmp_path)
    model = tiny("bert")
    load_adapter(model, tmp_path)
    set_adapter(model, None)
    with pytest.raises(AdapterError, match="nothing to merge"):
        merge_adapter(model)
    set_adapter(model, "default")
    merge_adapter(model)


def test_a_bias_of_its_own_stays_where_a_flag_brings_others():
    """Qwen2's query, key and value have biases: an added one elsewhere has no place."""
    model = tiny("qwen2")
    prepare(model, "attention_output")
    before = values(model)
    with pytest.raises(
        AdapterError, match=r"cannot be saved with a bias in 'model.layers.0.self_a"
    ):
        merge_adapter(model)
    assert same(model, before) and prepared_of(model) is not None
