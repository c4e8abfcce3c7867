"""The probe for dead terms, on attentions whose dead terms are known by construction."""

from collections import namedtuple

import pytest
import torch
from torch import nn

from beft_ext import find_biases
from beft_ext.selection import ProbeError, dead_terms

Pair = namedtuple("Pair", "one two")


class Attention(nn.Module):
    """One head. rotary: scores of a token with itself differ. wanted: else it cannot run."""

    def __init__(self, rotary=False, wanted=None, scale=1.0):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(4, 4))
        self.rotary, self.wanted, self.scale = rotary, wanted, scale
        self.ran = []

    def forward(self, x, extra=None):
        if self.wanted is not None and x.dtype not in self.wanted:
            raise NotImplementedError(f"no kernel for {x.dtype}\nsecond line")
        if extra is not None:
            floats = (extra["list"][0], extra["tuple"][0], extra["tensor"])
            assert all(t.dtype == x.dtype == self.q_proj.weight.dtype for t in floats)
            assert extra["ids"].dtype == torch.int64 and extra["name"] == "kept"
            assert extra["pair"].one.dtype == torch.float32  # what is not known stays as it is
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.rotary:
            turned = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
            query, key = query * turned.cos(), key * turned.cos()
        weights = (query @ key.transpose(1, 2)).softmax(-1)
        return {"out": (weights @ value * self.scale,), "weights": [weights.detach()], "n": 7}


class Model(nn.Module):
    def __init__(self, *attentions):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"self_attn": a}) for a in attentions)

    def forward(self, x, **extra):
        for layer in self.layers:
            x = x + layer["self_attn"](x, **extra)["out"][0]
        return x


def dead(*attentions, dtype=torch.float32, **extra):
    torch.manual_seed(0)
    model = Model(*attentions).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    before = {n: p.clone() for n, p in model.named_parameters()}
    x = torch.randn(2, 5, 4).to(dtype)
    found = dead_terms(model, find_biases(model), lambda: model(x, **extra))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    return found


def test_a_key_lives_by_position():
    assert dead(Attention(), Attention()) == ["key"]
    assert dead(Attention(rotary=True), Attention(rotary=True)) == []


@pytest.mark.parametrize("order", [1, -1])
def test_what_lives_in_one_layer_is_not_dead(order):
    assert dead(*[Attention(), Attention(rotary=True)][::order]) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_model_does_not_matter(dtype):
    assert dead(Attention(), dtype=dtype) == ["key"]
    assert dead(Attention(rotary=True), dtype=dtype) == []


def test_where_no_gradient_arrives_nothing_is_known():
    assert dead(Attention(scale=0.0)) == []


def test_float32_will_do_where_the_models_own_code_has_no_float64():
    native = Attention(wanted=(torch.bfloat16, torch.float32))
    assert dead(native, dtype=torch.bfloat16) == ["key"]


def test_what_runs_in_neither_is_named_with_its_first_reason():
    with pytest.raises(ProbeError, match=r"'layers.0.self_attn' is dead.*no kernel for torch.flo"):
        dead(Attention(wanted=(torch.bfloat16,)), dtype=torch.bfloat16)
    with pytest.raises(ProbeError) as caught:
        dead(Attention(wanted=(torch.float16,)), dtype=torch.float16)
    assert "float64)" in str(caught.value) and "second" not in str(caught.value)


def test_arguments_of_any_nesting_come_in_the_probes_dtype():
    """At the model's own forward too: nothing that was given is changed."""
    half = torch.ones(2)
    extra = {"list": [half], "tuple": (half, None), "tensor": half, "name": "kept"}
    extra |= {"ids": torch.arange(3), "pair": Pair(half, half)}
    assert dead(Attention(), extra=extra) == ["key"]
    assert extra["tensor"] is half and half.dtype == torch.float32


def test_terms_that_are_not_of_the_attention_are_never_dead():
    model = Model(Attention())
    model.layers[0]["mlp"] = nn.ModuleDict({"fc1": nn.Linear(4, 4)})
    assert "mlp_up" in find_biases(model).terms
    x = torch.randn(2, 5, 4)
    assert dead_terms(model, find_biases(model), lambda: model(x)) == ["key"]
    assert dead_terms(model, [b for b in find_biases(model) if b.term == "mlp_up"], list) == []
