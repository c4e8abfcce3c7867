"""find_biases: which biases each family has, and that each slice is the projection it claims."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import CONFIGS, tiny
from torch import nn
from transformers.pytorch_utils import Conv1D

from beft_ext import Bias, BiasError, BiasMap, find_biases
from beft_ext.models import TERMS, head_parameters, is_linear, output_width

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


@pytest.mark.parametrize(("lists", "told"), [(0, "none"), (1, "a0"), (7, "a0, a1, a2, a3, a4")])
def test_what_is_not_known_is_told_in_a_line(lists, told):
    """Five lists and eight biases are enough to find the names by."""
    model = nn.Module()
    for i in range(lists):
        setattr(model, f"a{i}", nn.ModuleList())
    for i in range(10):
        setattr(model, f"b{i}", nn.Linear(2, 2))
    model.bias = nn.Parameter(torch.zeros(2, 2))
    biases = ", ".join(f"b{i}.bias" for i in range(8))
    with pytest.raises(BiasError) as caught:
        find_biases(model)
    assert f"Module lists: {told}; biases: {biases}. Describe" in str(caught.value)
    with pytest.raises(BiasError, match=r"Module lists: \(root\); biases: 0.bias\."):
        find_biases(nn.ModuleList([nn.Linear(2, 2)]))


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


def test_an_ending_matches_whole_names():
    """``output.dense`` is not the end of ``throughput.dense``, nor ``q`` of ``wq``."""
    block = _Block()
    block.throughput, block.wq, block.q = nn.Module(), nn.Linear(4, 4), nn.Linear(4, 4)
    block.throughput.dense = nn.Linear(4, 4)
    model = _Layers(block, _Block())
    assert find_biases(model).terms == TERMS[:3]
    (named,) = find_biases(model, names={"query": "q"})
    assert named.module == "layers.0.q"


@pytest.mark.parametrize("name", ["linear_attn", "mixer"])
def test_what_is_no_softmax_attention_has_no_query(name):
    block = _Block()
    setattr(block, name, _Block().self_attn)
    getattr(block, name).o_proj = nn.Linear(4, 4)
    found = find_biases(_Layers(block, _Block()))
    assert len(found) == 6 and not any(name in b.module for b in found)


def test_what_looks_at_an_encoder_has_terms_of_its_own():
    """Its norm and its output are crossing, an MLP within it is an MLP like any other."""
    block = _Block()
    block.encoder_attn = _Block().self_attn
    block.encoder_attn.out_proj, block.self_attn.out_proj = nn.Linear(4, 4), nn.Linear(4, 4)
    block.encoder_attn.fc1 = nn.Linear(4, 4)
    block.encoder_attn_layer_norm = nn.LayerNorm(4)
    found = {b.module.partition(".0.")[2]: b.term for b in find_biases(_Layers(block))}
    assert found == {
        "self_attn.q_proj": "query",
        "self_attn.k_proj": "key",
        "self_attn.v_proj": "value",
        "self_attn.out_proj": "attention_output",
        "encoder_attn.q_proj": "cross_query",
        "encoder_attn.k_proj": "cross_key",
        "encoder_attn.v_proj": "cross_value",
        "encoder_attn.out_proj": "cross_attention_output",
        "encoder_attn_layer_norm": "cross_attention_norm",
        "encoder_attn.fc1": "mlp_up",
    }


@pytest.mark.parametrize("kind", ["vision", "audio"])
def test_a_tower_beside_a_text_model_has_no_term(kind):
    """Told by its config, which stands in the model's beside the text's."""
    configs = {name: SimpleNamespace(model_type=f"own_{name}") for name in ("text", kind)}
    model = nn.Module()
    model.config = SimpleNamespace(**{f"{n}_config": c for n, c in configs.items()})
    for name, config in configs.items():
        setattr(model, name, _Layers(_Block()))
        getattr(model, name).config = config
    model.adapter = _Layers(_Block())
    found = {b.module.partition(".")[0] for b in find_biases(model)}
    assert found == {"text", "adapter"}
    alone = getattr(model, kind)  # by itself it is no tower
    assert len(find_biases(alone)) == 3
    model.config = SimpleNamespace(encoder_config=configs[kind], decoder_config=configs["text"])
    assert len(find_biases(model)) == 9


def test_projections_that_wrap_a_linear_layer():
    block = _Block()
    for name in ("q_proj", "k_proj", "v_proj"):
        wrapped = nn.Module()
        wrapped.linear = getattr(block.self_attn, name)
        setattr(block.self_attn, name, wrapped)
    found = find_biases(_Layers(block))
    assert [b.module.partition(".0.")[2] for b in found] == [
        f"self_attn.{n}_proj.linear" for n in "qkv"
    ]
    block.self_attn.q_proj.linear = nn.ReLU()
    with pytest.raises(BiasError, match="no layer with known"):
        find_biases(_Layers(block))


def test_layers_are_numbered_from_the_first_list_on():
    """Lists within a layer are parts of it, as T5 keeps them; the encoder comes first."""

    def layer(crossing):
        parts = [_Block(), nn.Module()]
        if crossing:
            parts.insert(1, nn.Module())
            parts[1].EncDecAttention = _Block().self_attn
        parts[-1].fc1 = nn.Linear(4, 4)
        made = nn.Module()
        made.layer = nn.ModuleList(parts)
        return made

    model = nn.Module()
    model.encoder = nn.ModuleList([layer(False), layer(False)])
    model.decoder = nn.ModuleList([layer(True), layer(True)])
    model.config = SimpleNamespace(num_hidden_layers=4)
    found = find_biases(model)
    assert found.layers == 4
    own = [(b.layer, b.term) for b in found]
    ends = [*TERMS[:3], "mlp_up"]
    assert own[:8] == [(i, t) for i in (0, 1) for t in ends]
    ends += ["cross_query", "cross_key", "cross_value"]
    assert own[8:] == [(i, t) for i in (2, 3) for t in ends]
    assert all(b.module.startswith("decoder.0.layer.") for b in found if b.layer == 2)


def test_what_has_a_place_for_a_bias():
    """``(H,)`` beside the last axis: linear layers and norms, with a bias or without one."""
    odd = nn.Module()
    odd.bias, odd.weight = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(3, 3))
    switch = nn.Module()
    switch.bias, switch.weight = True, nn.Parameter(torch.zeros(3, 3))
    for module, width in (
        (nn.Linear(3, 5), 5),
        (nn.Linear(3, 5, bias=False), 5),
        (Conv1D(5, 3), 5),
        (nn.LayerNorm(7), 7),
        (nn.RMSNorm(7), 7),
        (nn.Conv1d(3, 5, 1), None),
        (nn.Embedding(3, 5), None),
        (nn.ReLU(), None),
        (odd, None),
        (switch, None),
    ):
        assert output_width(module) == width
        if width:
            assert is_linear(module) == (not isinstance(module, (nn.LayerNorm, nn.RMSNorm)))


def test_a_model_without_biases_says_where_it_looked():
    block = nn.Module()
    block.self_attn = nn.Module()
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(block.self_attn, name, nn.Linear(4, 4, bias=False))
    with pytest.raises(BiasError, match=r"of its 2 layers \(looked in 'layers.0.self_attn.q_proj'"):
        find_biases(_Layers(block, copy.deepcopy(block)))


def test_the_printed_map():
    """A line a term: layers, width, elements, and where the first lies."""
    query = str(find_biases(tiny("gpt-neox"))).splitlines()[1]
    place = "gpt_neox.layers.0.attention.query_key_value.bias (4 groups, [0:8] of each)"
    assert re.sub(" +", " ", query) == f"query 2 32 64 {place}"
    lines = str(find_biases(tiny("gpt2"))).splitlines()
    assert [line.split()[-1] for line in lines[1:4]] == ["[0:32]", "[32:64]", "[64:96]"]
    assert lines[5].split() == ["mlp_up", "2", "128", "256", "transformer.h.0.mlp.c_fc.bias"]
    found = find_biases(tiny("gpt2"))
    assert repr(found) == f"<BiasMap: 16 biases in 2 layers\n {', '.join(found.terms)}>"
    assert repr(BiasMap([])) == "<BiasMap: 0 biases in 0 layers\n no term>"
    long = Bias("cross_attention_output", 0, "m", "m.bias", 0, 4)
    assert str(BiasMap([long])).splitlines()[1].startswith("cross_attention_output ")


def test_a_quantised_head_cannot_train():
    model = tiny("bert")
    model.classifier.weight = nn.Parameter(torch.zeros(2, 32).char(), requires_grad=False)
    with pytest.raises(BiasError, match=r"head's 'classifier.weight' is quantised"):
        head_parameters(model)


def test_the_head_is_what_lies_outside_the_base_and_the_output_embeddings():
    names = {
        "BertForSequenceClassification": {"classifier.weight", "classifier.bias"},
        "BertForQuestionAnswering": {"qa_outputs.weight", "qa_outputs.bias"},
        "BertModel": set(),
    }
    config = CONFIGS["bert"]()
    for kind, head in names.items():
        model = getattr(transformers, kind)(config)
        own = {id(p): n for n, p in model.named_parameters()}
        assert {own[id(p)] for p in head_parameters(model)} == head
    assert not head_parameters(transformers.OPTForCausalLM(CONFIGS["opt"]()))
