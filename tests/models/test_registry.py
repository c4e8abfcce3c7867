"""Fused projections: where query, key and value lie, split as the models' own code splits them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from beft_ext import find_biases
from beft_ext.models import TERMS

HEADS, SHARED, SIZE = 4, 2, 8  # heads of the query, of key and value, and each head's length
OUT = torch.arange(1000)


def split_by_group(out):
    """Falcon's: the heads of a group, then its key and its value."""
    own = out[: (HEADS + 2 * SHARED) * SIZE].view(SHARED, HEADS // SHARED + 2, SIZE)
    return own[:, :-2], own[:, -2], own[:, -1]


def split_in_blocks(out):
    """Phi3's: key and value are as wide as they have heads."""
    return out[: (HEADS + 2 * SHARED) * SIZE].split([HEADS * SIZE, SHARED * SIZE, SHARED * SIZE])


def split_by_quarter(out):
    """CodeGen's: four parts, each of query, value and key."""
    query, value, key = out[: 3 * HEADS * SIZE].view(4, -1).split(HEADS * SIZE // 4, dim=-1)
    return query, key, value


def split_by_head(out):
    return out[: 3 * HEADS * SIZE].view(HEADS, 3, SIZE).unbind(1)


def split_thrice(out):
    return out[: 3 * HEADS * SIZE].chunk(3)


def split_for_one_key(out):
    """GPT-BigCode's: one key and one value for all heads."""
    return out[: (HEADS + 2) * SIZE].split([HEADS * SIZE, SIZE, SIZE])


KEYS = {"num_key_value_heads": SHARED}
NEW = {"new_decoder_architecture": True, "num_kv_heads": SHARED, "multi_query": True}
INNER = {"attn_config": SimpleNamespace(kv_n_heads=SHARED)}
FUSED = [
    ("attn.query_key_value", NEW, split_by_group),
    ("attn.query_key_value", {}, split_by_head),
    ("attn.query_key_value", {"multi_query": True}, split_for_one_key),
    ("attn.c_attn", {}, split_thrice),
    ("attn.c_attn", {"multi_query": True}, split_for_one_key),
    ("attn.c_attn", {"multi_query": False}, split_by_head),
    ("attn.qkv_proj", {}, split_by_quarter),
    ("self_attn.qkv_proj", KEYS, split_in_blocks),
    ("attn.Wqkv", {}, split_thrice),
    ("attn.Wqkv", INNER, split_in_blocks),
]


@pytest.mark.parametrize(("path", "config", "split"), FUSED)
def test_each_slice_is_what_the_model_takes_for_it(path, config, split):
    parts = split(OUT)
    layer, (above, name) = nn.Module(), path.split(".")
    attention = nn.Module()
    setattr(layer, above, attention)
    setattr(attention, name, nn.Linear(1, sum(p.numel() for p in parts)))
    model = nn.Module()
    model.layers = nn.ModuleList([layer])
    model.config = SimpleNamespace(num_attention_heads=HEADS, **config)
    found = {b.term: b for b in find_biases(model)}
    assert tuple(found) == TERMS[:3]
    for bias, part in zip(found.values(), parts, strict=True):
        own = torch.arange(sum(p.numel() for p in parts))
        assert torch.equal(bias.read(own), part.flatten()) and bias.width == part.numel()


@pytest.mark.parametrize("query", ["q_b_proj", "q_proj"])
def test_a_latent_attention_has_a_key_and_a_value_in_each_head(query):
    """DeepSeek's: the key's part without positions, then the value; the query on its own."""
    attention = nn.Module()
    setattr(attention, query, nn.Linear(1, 40))
    attention.kv_b_proj = nn.Linear(1, HEADS * (6 + 8))
    layer = nn.Module()
    layer.self_attn = attention
    model = nn.Module()
    model.layers = nn.ModuleList([layer])
    model.config = SimpleNamespace(qk_nope_head_dim=6, v_head_dim=8)
    found = {b.term: b for b in find_biases(model)}
    assert found["query"].module == f"layers.0.self_attn.{query}" and len(found) == 3
    key, value = OUT[:56].view(HEADS, 14).split([6, 8], dim=-1)
    for term, part in (("query", OUT[:40]), ("key", key), ("value", value)):
        own = torch.arange(40 if term == "query" else 56)
        assert torch.equal(found[term].read(own), part.flatten())
