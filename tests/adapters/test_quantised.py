"""Quantised bases on the CPU, from the tap to the merged adapter: torchao's weight-only int8 and
int4; packed weights as bitsandbytes has them."""

import pytest
import torch
from conftest import batch, close, logits, tiny, values
from torch import nn

from beft_ext import (
    AdapterError,
    BiasAdamW,
    PrepareError,
    Recipe,
    Tap,
    find_biases,
    load_adapter,
    merge_adapter,
    prepare,
    save_adapter,
    select,
    set_adapter,
    tune,
    unmerge_adapter,
)

quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

FAMILIES = ["bert", "opt", "gpt-neox", "llama"]
GROUPS = quantization.PerGroup(16)
KINDS = {
    "int8": quantization.Int8WeightOnlyConfig(),  # a scale for each output
    "int4": quantization.IntxWeightOnlyConfig(torch.int4, GROUPS),  # for each 16 inputs
}


def quantised(name, dtype=torch.float32, kind="int8"):
    """Every linear layer of the base model as integers and scales."""
    model = tiny(name).to(dtype)
    quantization.quantize_(model.base_model, KINDS[kind])
    return model


def tuned(name, terms="value", dtype=torch.float32, kind="int8"):
    model = quantised(name, dtype, kind)
    prepared = prepare(model, terms)
    optimizer = BiasAdamW(model, lr=1e-2)
    for seed in range(3):
        optimizer.zero_grad()
        model(**batch(seed=seed)).loss.backward()
        optimizer.step()
    return model, prepared


def floats(model):
    """The state but for the quantised tensors, which know no comparison."""
    return {n: t for n, t in values(model).items() if type(t) is torch.Tensor}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_chosen_biases_and_the_head_train(name, kind):
    fresh, (model, prepared) = quantised(name, kind=kind), tuned(name, kind=kind)
    before, after = floats(fresh), floats(model)
    names = {b.parameter for b in prepared.biases} | set(prepared.head)
    for own in before:
        assert torch.equal(before[own], after[own]) == (own not in names)
    projection = model.get_submodule(prepared.biases[0].module)
    assert type(projection.weight).__name__ in ("Int8Tensor", "IntxUnpackedToInt8Tensor")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["bert", "opt", "gpt-neox"])
def test_the_tap_gives_autograds_gradients(name, kind):
    model = quantised(name, kind=kind)
    biases = find_biases(model)
    model.requires_grad_(False)
    own = {b.parameter: model.get_parameter(b.parameter) for b in biases}
    for parameter in own.values():
        parameter.requires_grad_(True)
    model(**batch()).loss.backward()
    expected = {n: p.grad.clone() for n, p in own.items()}
    with Tap(model, biases) as tap:
        tap.step(4, 4.0)
        model(**batch()).loss.backward()
        for bias, leaf in tap.leaves():
            close(leaf.grad, bias.view(expected[bias.parameter]))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_goes_to_another_quantised_base_and_back(name, dtype, kind, tmp_path):
    want = logits(tuned(name, dtype=dtype, kind=kind)[0])
    save_adapter(tuned(name, dtype=dtype, kind=kind)[0], tmp_path)
    model = quantised(name, dtype, kind)
    base = logits(model)
    load_adapter(model, tmp_path)
    close(logits(model), want)
    merge_adapter(model)
    close(logits(model), want)
    unmerge_adapter(model)
    set_adapter(model, None)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("name", ["bert", "opt", "llama"])
def test_peft_loads_it_on_a_quantised_base(name, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, _ = tuned(name)
    save_adapter(model, tmp_path)
    close(logits(peft.PeftModel.from_pretrained(quantised(name), tmp_path)), logits(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_a_selection_ends_with_the_model_as_it_was(name, kind):
    model = quantised(name, kind=kind)
    want = logits(model)
    selection = select(model, [batch(seed=seed) for seed in range(3)])
    assert set(selection.ranking["gain"]) >= {"query", "value", "mlp_up"}
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_bias_folds_into_a_quantised_output(kind):
    model, _ = tuned("gpt-neo", kind=kind)
    want = logits(model)
    merge_adapter(model)
    close(logits(model), want)


def test_a_quantised_head_is_refused_and_the_model_stays(tmp_path):
    save_adapter(tuned("bert")[0], tmp_path)
    model = tiny("bert")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    before = floats(model)
    with pytest.raises(PrepareError, match=r"'classifier.weight' is quantised \(Int8Tensor\)"):
        prepare(model)
    with pytest.raises(AdapterError, match=r"'classifier.weight' .* is quantised"):
        load_adapter(model, tmp_path)
    after = floats(model)
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_an_adapter_of_a_quantised_base_fits_the_base_in_full_precision(name, tmp_path):
    model, _ = tuned(name)
    save_adapter(model, tmp_path)
    plain = tiny(name)
    base = logits(plain)
    load_adapter(plain, tmp_path)
    moved = (logits(plain) - base).abs().max()
    assert (logits(plain) - logits(model)).abs().max() < moved / 2


class Params4bit(nn.Parameter):
    """Two weights a byte, as bitsandbytes has them."""

    def __new__(cls, data):
        return super().__new__(cls, data, requires_grad=False)


class Linear4bit(nn.Linear):
    """As bitsandbytes' layer from outside: a packed weight ``(n, 1)``, and a bias that its forward
    brings to the type of what comes in."""

    def __init__(self, dense):
        super().__init__(dense.in_features, dense.out_features, dense.bias is not None)
        self.dense = dense.weight.detach()  # no parameter: what the packed weight stands for
        packed = torch.zeros(self.dense.numel() // 2, 1, dtype=torch.uint8)
        self.weight, self.bias = Params4bit(packed), dense.bias

    def forward(self, x):
        if self.bias is not None and self.bias.dtype != x.dtype:
            self.bias.data = self.bias.data.to(x.dtype)
        return nn.functional.linear(x, self.dense.to(x.dtype), self.bias)


def packed(name, dtype=torch.bfloat16):
    model = tiny(name).to(dtype)
    for path, module in list(model.base_model.named_modules()):
        if type(module) is nn.Linear:
            parent, _, leaf = path.rpartition(".")
            setattr(model.base_model.get_submodule(parent), leaf, Linear4bit(module))
    return model


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_packed_weights_are_left_alone_and_their_biases_train(name, tmp_path):
    model = packed(name)
    prepared = prepare(model, "value")
    where = {b.parameter: model.get_parameter(b.parameter).data_ptr() for b in prepared.biases}
    before = logits(model)
    tune(model, [batch(seed=seed) for seed in range(3)], recipe=Recipe(epochs=1, lr=1e-2))
    want = logits(model.eval())
    assert not torch.equal(want, before)
    for name_of, pointer in where.items():  # the forward had no reason to make another
        parameter = model.get_parameter(name_of)
        assert parameter.dtype == torch.bfloat16 and parameter.data_ptr() == pointer
    save_adapter(model, tmp_path)
    other = packed(name)
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), want)
    merge_adapter(other)
    assert torch.equal(logits(other), want)
