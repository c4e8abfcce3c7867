"""prepare and restore: what trains, what does not, and that nothing else of the model moved."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from conftest import inputs, tiny, train, values
from safetensors.torch import load_file
from torch import nn

from beft_ext import (
    AdapterError,
    PrepareError,
    Tap,
    TapError,
    find_biases,
    load_adapter,
    merge_adapter,
    prepare,
    restore,
    save_adapter,
    set_adapter,
)
from beft_ext.errors import BeftWarning
from beft_ext.models import head_parameters
from beft_ext.training.preparation import prepared_of, trained_slices


def assert_trained_alone(model, before, biases, head):
    """Every element of the biases changed, and beside the head no other."""
    for name, after in model.state_dict().items():
        changed = after != before[name]
        for bias in (b for b in biases if b.parameter == name):
            assert bias.view(changed).all()
            bias.view(changed).fill_(False)
        assert name in head or not changed.any(), name


def test_only_the_chosen_bias_and_the_head_move(family):
    model = tiny(family)
    before, own = values(model), find_biases(model)
    head = {id(p) for p in head_parameters(model)}
    prepared = prepare(model, "value")
    assert list(model.state_dict()) == list(before)
    train(model)
    head_names = {n for n, p in model.named_parameters() if id(p) in head}
    assert head_names == set(prepared.head)
    assert_trained_alone(model, before, [b for b in own if b.term == "value"], head_names)


def test_restore_takes_back_all_but_the_trained_values(family):
    model = tiny(family)
    next(model.parameters()).requires_grad_(False)
    required = [p.requires_grad for p in model.parameters()]
    keys = list(model.state_dict())
    prepare(model, ("query", "value"), layers=[0])
    train(model)
    trained = values(model)
    restore(model)
    assert [p.requires_grad for p in model.parameters()] == required
    assert list(model.state_dict()) == keys and prepared_of(model) is None
    assert all(torch.equal(t, trained[n]) for n, t in model.state_dict().items())
    assert not any(p._backward_hooks for p in model.parameters())


def test_a_bias_is_added_where_there_is_none(bias_free_family):
    model = tiny(bias_free_family)
    data = inputs(model)
    logits, keys = model(**data).logits, list(model.state_dict())
    prepared = prepare(model, "value")
    layers = 4 if bias_free_family == "t5" else 2
    assert len(prepared.added) == len(prepared.biases) == layers
    assert all(not t.any() for t in prepared.initial.values())
    torch.testing.assert_close(model(**data).logits, logits, rtol=0, atol=1e-6)
    train(model)
    for bias in prepared.biases:
        assert model.get_parameter(bias.parameter).abs().min() > 0
    assert str(prepared.biases[0].parameter) in str(prepared) and "(added)" in str(prepared)
    restore(model)
    assert list(model.state_dict()) == keys


def test_added_biases_follow_the_weight():
    model = tiny("llama").bfloat16()
    prepared = prepare(model, ["value", "mlp_down"])
    assert all(model.get_parameter(n).dtype == torch.bfloat16 for n in prepared.added)
    assert len(prepared.added) == 4


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox"])
def test_gradient_outside_a_slice_is_zero_even_where_it_would_not_be_finite(name):
    model = tiny(name)
    prepared = prepare(model, "value")
    bias = prepared.biases[0]
    parameter = model.get_parameter(bias.parameter)
    (parameter * torch.full_like(parameter, float("inf"))).sum().backward()
    assert bias.view(parameter.grad).isinf().all()
    bias.view(parameter.grad).zero_()
    assert not parameter.grad.any()


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox"])
@pytest.mark.parametrize("terms", [("query", "value"), ("key", "value"), ("query", "key", "value")])
def test_all_chosen_slices_of_one_parameter_have_a_gradient_and_no_other(name, terms):
    model = tiny(name)
    wanted = {b for b in find_biases(model) if b.term in terms}
    prepare(model, terms)
    for key in {b.parameter for b in wanted}:
        parameter = model.get_parameter(key)
        parameter.sum().backward()
        for bias in (b for b in wanted if b.parameter == key):
            assert bias.view(parameter.grad).eq(1).all(), bias.name
            bias.view(parameter.grad).zero_()
        assert not parameter.grad.any()


def test_trained_slices():
    model = tiny("gpt2")
    assert all(bias is None for _, _, bias in trained_slices(model))
    prepared = prepare(model, ("query", "value"), layers=[1])
    slices = trained_slices(model)
    assert [b.term for _, _, b in slices if b] == ["query", "value"]
    assert [n for n, _, b in slices if b is None] == prepared.head == ["score.weight"]
    assert all(model.get_parameter(n) is p for n, p, _ in slices)


def test_the_printed_counts():
    model = tiny("bert")
    total = sum(p.numel() for p in model.parameters())
    text = str(prepare(model, ("value", "query")))
    assert f"biases: 128 of {total:,} parameters ({12800 / total:.4f} %)" in text
    assert f"with the head {128 + 66:,}; adapter {4 * 194:,} bytes" in text
    assert "classifier.weight, classifier.bias" in text


TABLES = {
    "llama": """\
trains             layers   elements  first parameter
value@1                 1         16  model.layers.1.self_attn.v_proj.bias (added)
mlp_up@1                1         48  model.layers.1.mlp.up_proj.bias (added)
head                              64  score.weight
biases: 64 of 17,696 parameters (0.3617 %); with the head 128; adapter 512 bytes""",
    "gpt2": """\
trains             layers   elements  first parameter
value@1                 1         32  transformer.h.1.attn.c_attn.bias
mlp_up@1                1        128  transformer.h.1.mlp.c_fc.bias
head                              64  score.weight
biases: 160 of 60,352 parameters (0.2651 %); with the head 224; adapter 1,152 bytes""",
}


@pytest.mark.parametrize("name", TABLES)
def test_the_printed_table(name):
    assert str(prepare(tiny(name), ("mlp_up", "value"), layers=[1])) == TABLES[name]


def test_a_notebook_sees_two_lines():
    prepared = prepare(tiny("gpt2"), ("mlp_up", "value"), layers=[1])
    assert repr(prepared) == f"<Prepared: value@1+mlp_up@1\n {TABLES['gpt2'].splitlines()[-1]}>"


def test_without_a_head_the_biases_train_alone():
    prepared = prepare(tiny("bert").bert, "value")
    assert prepared.head == [] and prepared.head_initial == {}
    assert "head                               0  none\n" in str(prepared)


def test_what_prepare_tells_is_of_before_training():
    model = tiny("gpt2")
    before, own = values(model), find_biases(model)
    prepared = prepare(model, ["value", "query", "value"], layers=[1, 0, 1])
    assert prepared.terms == ("query", "value") and prepared.layers == (0, 1)
    assert prepared.model_type == "gpt2" and prepared_of(model) is prepared
    assert prepared.biases == sorted(
        (b for b in own if b.term in prepared.terms), key=lambda b: (b.layer, b.term)
    )
    train(model)
    for bias in prepared.biases:
        assert torch.equal(prepared.initial[bias.name], bias.read(before[bias.parameter]))
    assert list(prepared.head_initial) == prepared.head == ["score.weight"]
    assert torch.equal(prepared.head_initial["score.weight"], before["score.weight"])
    assert not torch.equal(model.score.weight, before["score.weight"])


def test_parameters_that_come_later_are_as_the_others_were():
    for required in (True, False):
        model = tiny("bert").requires_grad_(required)
        prepare(model)
        model.extra = nn.Linear(2, 2).requires_grad_(not required)
        restore(model)
        assert all(p.requires_grad is required for p in model.parameters())


def test_a_tied_bias_is_prepared_once():
    model = tiny("bert")
    first, second = (layer.attention.self for layer in model.bert.encoder.layer)
    second.value.bias = first.value.bias
    (bias,) = prepare(model).biases
    assert model.get_parameter(bias.parameter) is first.value.bias
    assert len(trained_slices(model)) == 1 + len(prepared_of(model).head)


def test_the_mark_is_not_part_of_the_model(tmp_path):
    model = tiny("bert")
    prepare(model)
    names = {n for n, _ in model.named_modules()}
    assert not any("beft" in n for n in names | set(model.state_dict()))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert prepared_of(again) is None
    assert prepared_of(copy.deepcopy(model)).biases == prepared_of(model).biases


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bert", {"terms": "valu"}, "unknown term 'valu': use query"),
        ("bert", {"terms": ()}, "unknown term"),
        ("bert", {"layers": [2]}, "layer 2 is out of range: the model has 0 to 1"),
        ("bert", {"layers": [-1]}, "layer -1 is out of range"),
        ("bert", {"layers": []}, "none of the layers"),
        ("llama", {"terms": "mlp_norm"}, "RMSNorm"),
        ("t5", {"terms": "mlp_norm"}, "has no term 'mlp_norm': it has query"),
        ("bert", {"terms": "value@0-2"}, "out of range: the model has 2 layers, 0 to 1"),
        ("bert", {"terms": "query+value@1-0"}, "'value@1-0' ends before it begins"),
        ("bert", {"terms": ["value", "value@1"]}, "share a layer"),
        ("bert", {"terms": "query+value@1", "layers": [0]}, "'value@1' is in none of the layers"),
        ("t5", {"terms": "cross_value@0-1"}, "none of the layers of 'cross_value', which are 2, 3"),
        ("phi3", {"terms": "mlp_gate@2"}, "out of range"),
    ],
)
def test_what_cannot_be_prepared_is_named_and_nothing_changes(name, options, message):
    model = tiny(name)
    keys = list(model.state_dict())
    with pytest.raises(PrepareError, match=message) as caught:
        prepare(model, **options)
    assert "\n" not in str(caught.value)
    assert all(p.requires_grad for p in model.parameters())
    assert list(model.state_dict()) == keys and prepared_of(model) is None


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "phi3"])
def test_terms_train_in_their_layers_alone(name):
    model = tiny(name)
    prepared = prepare(model, ["value@1", "mlp_up@0+query"])
    places = {(b.term, b.layer) for b in prepared.biases}
    assert places == {("value", 1), ("mlp_up", 0), ("query", 0), ("query", 1)}
    assert prepared.terms == ("query", "value@1", "mlp_up@0") and prepared.layers == (0, 1)
    rows = str(prepared).splitlines()[1:4]
    assert [r.split()[:2] for r in rows] == [["query", "2"], ["value@1", "1"], ["mlp_up@0", "1"]]
    before = values(model)
    train(model)
    assert_trained_alone(model, before, prepared.biases, prepared.head)
    restore(model)
    assert prepare(model, prepared.terms).biases == prepared.biases


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "opt", "llama", "qwen2"])
def test_below_the_lowest_trained_layer_nothing_is_kept_for_the_backward(name):
    kept = {}
    for term in ("value@0", "value@1"):
        model, saved, begun = tiny(name).train(), [], []
        prepare(model, term)
        blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
        blocks[1].register_forward_pre_hook(lambda *_, s=saved, b=begun: b.append(len(s)))
        pack = lambda t, s=saved: s.append(t) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(**inputs(model))
        kept[term] = begun[0]
    assert kept["value@0"] > 0 and kept["value@1"] == 0


def test_layers_of_prepare_and_of_the_terms_meet():
    prepared = prepare(tiny("bert"), "value@0-1+query", layers=[1])
    assert prepared.terms == ("query@1", "value@1") and prepared.layers == (1,)


def test_one_vector_is_added_for_gate_and_up():
    model = tiny("phi3")
    elements = sum(p.numel() for p in model.parameters())
    prepared = prepare(model, "mlp_gate+mlp_up@0")
    assert prepared.added == [f"model.layers.{i}.mlp.gate_up_proj.bias" for i in range(2)]
    assert prepared.parameters == elements + 2 * 96
    restore(model)
    assert sum(p.numel() for p in model.parameters()) == elements


def test_a_quantised_head_is_refused():
    model = tiny("bert")
    whole = torch.ones(2, 32, dtype=torch.int8)
    model.classifier.weight = nn.Parameter(whole, requires_grad=False)
    with pytest.raises(PrepareError, match=r"head's 'classifier\.weight' is quantised"):
        prepare(model)
    assert prepared_of(model) is None and model.classifier.bias.requires_grad


def test_twice_and_never():
    model = tiny("bert")
    with pytest.raises(PrepareError, match="not prepared"):
        restore(model)
    prepare(model)
    with pytest.raises(PrepareError, match=r"restore\(model\) first"):
        prepare(model)
    restore(model)
    prepare(model, "query")


def test_a_tapped_model_is_neither_prepared_nor_restored():
    """Else its hooks would stay for good: nothing on the model would know of them."""
    model = tiny("bert")
    with Tap(model, find_biases(model)) as tap:
        with pytest.raises(PrepareError, match=r"call remove\(\) of that tap first"):
            prepare(model)
        tap.step(4)
        model(**inputs(model)).loss.backward()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    prepare(model)
    with Tap(model, find_biases(model)):
        for undo in (restore, merge_adapter):
            with pytest.raises((PrepareError, AdapterError), match="tapped already"):
                undo(model)
    restore(model)
    assert all(p.requires_grad for p in model.parameters())


def of_another_model():
    """Biases that do not fit a tiny BERT, of 32, and what is said of each."""
    own = find_biases(tiny("bert"))[2]
    narrow, wide = replace(own, stop=16), replace(own, stop=64)
    return [
        (find_biases(tiny("distilbert")), "bias '0.query' .* has no 'distilbert"),
        ([narrow], "bias '0.value' of 16 elements is of another model, .* of 32 elements"),
        ([wide], "bias '0.value' of 64 elements is of another model, .* of 32 elements"),
        ([replace(own, groups=3, stop=16)], "bias '0.value' of 48 elements"),
        ([own, own], "two biases have the name '0.value': give each a number"),
    ]


@pytest.mark.parametrize(("biases", "message"), of_another_model())
def test_biases_of_another_model_are_named_and_nothing_changes(biases, message):
    model = tiny("bert")
    with pytest.raises(PrepareError, match=message):
        prepare(model, "query+value" if len(biases) > 2 else "value", biases=biases)
    with pytest.raises(TapError, match=message):
        Tap(model, iter(biases))
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_slice_of_one_fused_projection_is_no_slice_of_another():
    """GPT-2's blocks are not GPT-NeoX's interleaved heads, even where the names are the same."""
    model = tiny("gpt2")
    own = next(b for b in find_biases(model) if b.term == "value")
    with pytest.raises(PrepareError, match=r"'0\.value' of 32 elements is of another"):
        prepare(model, biases=[replace(own, groups=4, start=16, stop=24)])
    assert prepare(model, biases=[own]).biases == [own]


def test_an_architecture_that_is_not_known():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.wq, self.wv = nn.Linear(4, 4), nn.Linear(4, 4)

    model = nn.Module()
    model.blocks = nn.ModuleList([Block(), Block()])
    with pytest.raises(PrepareError, match="names="):
        prepare(model)
    prepared = prepare(model, biases=find_biases(model, names={"query": "wq", "value": "wv"}))
    assert [b.parameter for b in prepared.biases] == ["blocks.0.wv.bias", "blocks.1.wv.bias"]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "blocks.0.wv.bias",
        "blocks.1.wv.bias",
    ]


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox"])
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: copy.deepcopy(copy.copy(m))],
)
def test_a_copy_trains_its_slices_alone(name, copied):
    model = tiny(name)
    prepared = prepare(model, "value")
    other = copied(model)
    before, original = values(other), values(model)
    train(other)
    assert_trained_alone(other, before, prepared.biases, prepared.head)
    assert all(torch.equal(t, original[n]) for n, t in model.state_dict().items())
    restore(other)
    assert not any(p._backward_hooks for p in other.parameters())
    train(model)


def test_gradients_of_what_is_frozen_again_are_gone():
    model = tiny("bert")
    next(model.parameters()).requires_grad_(False)
    for p in model.parameters():
        p.requires_grad_(False)
    prepare(model)
    model(**inputs(model)).loss.backward()
    assert any(p.grad is not None for p in model.parameters())
    restore(model)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_counts_and_bytes_are_those_of_the_model_and_the_file(name, dtype, tmp_path):
    model = tiny(name).to(dtype)
    prepared = prepare(model, ("value", "mlp_up"))
    assert prepared.parameters == sum(p.numel() for p in model.parameters())
    save_adapter(model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors").values()
    assert prepared.adapter_bytes == sum(t.numel() * t.element_size() for t in saved)


def test_an_added_bias_is_announced(recwarn):
    prepare(tiny("bert"))
    assert not [w for w in recwarn if issubclass(w.category, BeftWarning)]
    with pytest.warns(BeftWarning, match="from_pretrained drops it; use save_adapter"):
        prepare(tiny("llama"))


def test_an_inactive_adapter_is_forgotten(tmp_path):
    """Its differences are to values that training changes."""
    model = tiny("bert")
    prepare(model)
    train(model)
    save_adapter(model, tmp_path)
    other = tiny("bert")
    load_adapter(other, tmp_path)
    set_adapter(other, None)
    prepare(other)
    restore(other)
    with pytest.raises(AdapterError, match="no adapter 'default'"):
        set_adapter(other, "default")
