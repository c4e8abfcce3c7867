"""find_biases: which biases each family has, and that each slice is the projection it claims."""

from types import SimpleNamespace

import pytest
import torch
from conftest import tiny
from torch import nn

from beft_ext import BiasError, find_biases
from beft_ext.models import TERMS

UNGATED = (*TERMS[:3], "attention_output", "mlp_up", "mlp_down", "attention_norm", "mlp_norm")
ATTENTION_ONLY = {"qwen2": ("query", "key", "value")}


def test_terms_and_layers(family):
    biases = find_biases(tiny(family))
    assert biases.terms == ATTENTION_ONLY.get(family, UNGATED)
    assert biases.layers == (1 if family == "albert" else 2)
    widths = {b.term: b.width for b in biases}
    assert widths["query"] == 32
    assert widths["key"] == widths["value"] == (16 if family == "qwen2" else 32)


def test_each_slice_moves_its_projection_and_nothing_else(family):
    """Query, key and value as the attention function receives them, split as the model does."""
    model = tiny(family)
    for bias in find_biases(model):
        module, parameter = model.get_submodule(bias.module), model.get_parameter(bias.parameter)
        assert module.bias is parameter
        x = torch.randn(3, _fan_in(module, parameter))
        before = module(x)
        with torch.no_grad():
            bias.view(parameter).add_(1.0)
        moved = (module(x) - before).abs() > 0.5
        with torch.no_grad():
            bias.view(parameter).sub_(1.0)
        parts = _as_the_model_splits(moved, bias, model.config)
        for term, part in parts.items():
            assert part.all() if term == bias.term else not part.any()


def _fan_in(module, parameter):
    return next((n for n in module.weight.shape if n != len(parameter)), len(parameter))


def _as_the_model_splits(out, bias, config):
    if bias.module.endswith("c_attn"):  # GPT-2: three blocks side by side
        return dict(zip(TERMS[:3], out.split(32, dim=-1), strict=True))
    if bias.module.endswith("query_key_value"):  # GPT-NeoX: (heads, 3 * head size), then chunks
        heads = out.view(len(out), config.num_attention_heads, -1)
        return dict(zip(TERMS[:3], heads.chunk(3, dim=-1), strict=True))
    return {bias.term: out}


@pytest.mark.parametrize("groups", [None, 2])
def test_chatglms_fused_projection_is_split_as_its_own_code_does(groups):
    """transformers has no such class: the split is that of the repositories' own modelling code."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attention = nn.Module()
            width = 3 * 32 if groups is None else 32 + 2 * groups * 8
            self.self_attention.query_key_value = nn.Linear(32, width)

    model = nn.Module()
    model.layers = nn.ModuleList([Block(), Block()])
    model.config = SimpleNamespace(num_attention_heads=4, multi_query_attention=groups is not None)
    model.config.multi_query_group_num = groups
    out = torch.arange(model.layers[0].self_attention.query_key_value.out_features)
    if groups is None:
        parts = out.view(4, 3 * 8).split(8, dim=-1)
    else:
        parts = out.split([32, groups * 8, groups * 8])
    for bias in find_biases(model):
        expected = dict(zip(TERMS[:3], parts, strict=True))[bias.term]
        assert bias.view(out).flatten().equal(expected.flatten())


def test_unknown_architecture_is_described_and_can_be_named():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.wq, self.wv = nn.Linear(4, 4), nn.Linear(4, 4)

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

    with pytest.raises(BiasError, match=r"blocks.*names=") as caught:
        find_biases(Odd())
    assert "blocks.0.wq.bias" in str(caught.value)
    assert find_biases(Odd(), names={"query": "wq", "value": "wv"}).terms == ("query", "value")
    with pytest.raises(BiasError, match="unknown term"):
        find_biases(Odd(), names={"quary": "wq"})


class _Block(nn.Module):
    """An attention as many models have it."""

    def __init__(self):
        super().__init__()
        self.self_attn = nn.Module()
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self.self_attn, name, nn.Linear(4, 4))


class _Layers(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.layers = nn.ModuleList(blocks)


def test_a_module_or_parameter_under_two_names_is_one_bias():
    model = _Layers(_Block(), _Block())
    model.layers[1].self_attn.v_proj = model.layers[0].self_attn.v_proj
    model.layers[1].self_attn.q_proj.bias = model.layers[0].self_attn.q_proj.bias
    found = find_biases(model)
    layers = {term: [b.layer for b in found if b.term == term] for term in found.terms}
    assert layers == {"query": [0], "key": [0, 1], "value": [0]}


@pytest.mark.parametrize("name", ["experts", "shared_expert", "block_sparse_moe"])
def test_experts_have_no_term(name):
    block = _Block()
    block.mlp = nn.Module()
    expert = nn.Module()
    expert.up_proj, expert.down_proj = nn.Linear(4, 8), nn.Linear(8, 4)
    block.mlp.up_proj, block.mlp.down_proj = nn.Linear(4, 8), nn.Linear(8, 4)
    setattr(block, name, nn.ModuleDict({"mlp": expert}))
    found = {b.module for b in find_biases(_Layers(block, _Block()))}
    assert {"layers.0.mlp.up_proj", "layers.0.mlp.down_proj"} <= found
    assert not any(f".{name}." in module for module in found)
