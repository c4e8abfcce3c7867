"""find_biases: which biases each family has, and that each slice is the projection it claims."""

import pytest
import torch
from conftest import tiny
from torch import nn

from beft_ext import BiasError, find_biases
from beft_ext.models import TERMS

ATTENTION_ONLY = {"qwen2": ("query", "key", "value")}


def test_terms_and_layers(family):
    biases = find_biases(tiny(family))
    assert biases.terms == ATTENTION_ONLY.get(family, TERMS[:8])
    assert biases.layers == (1 if family == "albert" else 2)
    widths = {b.term: b.width for b in biases}
    assert widths["query"] == 32
    assert widths["key"] == widths["value"] == (16 if family == "qwen2" else 32)
    assert all(b.shared == (family == "albert") for b in biases)


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
